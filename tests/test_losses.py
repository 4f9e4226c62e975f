import numpy as np
import pytest
import torch

from fcn.losses import LOSSES

cross_entropy = LOSSES["cross_entropy"]


def numpy_cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Sum over the valid pixels of log Σ exp(z) - z[label], pixel by pixel, in float64."""
    total = 0.0
    for n, y, x in np.ndindex(labels.shape):
        if labels[n, y, x] != 255:
            pixel = logits[n, :, y, x].astype(np.float64)
            total += np.log(np.exp(pixel).sum()) - pixel[labels[n, y, x]]
    return total


def sample(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 4, 5).to(dtype), torch.randint(0, 3, (2, 4, 5))
    labels[0, 1] = 255
    labels[1, :, 2] = 255
    return logits, labels


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_is_the_sum_over_valid_pixels(dtype, relative):
    logits, labels = sample(dtype)
    expected = numpy_cross_entropy(logits.numpy(), labels.numpy())
    loss = cross_entropy(logits, labels)
    assert loss.shape == ()
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(expected, rel=relative)


def test_two_classes_with_equal_logits_cost_log_2_a_pixel():
    labels = torch.tensor([[[0, 1, 255]]])
    assert cross_entropy(torch.zeros(1, 2, 1, 3).double(), labels).item() == pytest.approx(2 * np.log(2), rel=1e-15)


def test_the_gradient_is_softmax_minus_one_hot_and_zero_where_ignored():
    logits, labels = sample()
    logits.requires_grad_()
    cross_entropy(logits, labels).backward()
    z, valid = logits.detach().numpy(), labels.numpy() != 255
    expected = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    for n, y, x in zip(*np.nonzero(valid)):
        expected[n, labels[n, y, x], y, x] -= 1
    found = logits.grad.numpy().transpose(0, 2, 3, 1)
    assert not found[~valid].any()
    np.testing.assert_allclose(found[valid], expected.transpose(0, 2, 3, 1)[valid], rtol=0, atol=1e-15)


def test_logits_of_ignored_pixels_do_not_change_the_loss():
    logits, labels = sample()
    before = cross_entropy(logits, labels)
    logits.transpose(0, 1)[:, labels == 255] = 1e30
    assert torch.equal(cross_entropy(logits, labels), before)


def test_nothing_valid_gives_zero_and_zero_gradients():
    logits = torch.randn(2, 3, 4, 5, requires_grad=True)
    loss = cross_entropy(logits, torch.full((2, 4, 5), 255))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_float32(dtype):
    # 4096·log 2 = 2839.1; bfloat16 has no number between 2832 and 2848, float16 none between 2838 and 2840.
    loss = cross_entropy(torch.zeros(1, 2, 64, 64, dtype=dtype), torch.zeros(1, 64, 64, dtype=torch.int64))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(4096 * np.log(2), rel=1e-6)
