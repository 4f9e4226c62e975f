"""Images of mixed size without a crop: what stands in the padding changes nothing, however hard it tries."""

import numpy as np
import pytest
import torch
from torch import nn

from fcn.config import Loss
from fcn.data import LabelCounts, TrainingBatch
from fcn.data.loaders import pad_collate
from fcn.distributed import DistributedContext
from fcn.models import Precision, build_model
from fcn.training import TrainingState, build_loss, train_step
from fcn.training.losses import LOSSES

SIZES = [(17, 40), (33, 9), (33, 40)]
PRECISION = Precision("fp64", False, torch.device("cpu"))


class Adversary(nn.Module):
    """Adds enormous logits for every class in turn wherever the input is padding, and nowhere else."""

    def __init__(self, network: nn.Module, hostile: bool) -> None:
        super().__init__()
        self.network, self.hostile = network, hostile

    def forward(self, images):
        logits = self.network(images)
        if not self.hostile:
            return logits
        padding = (images == 0).all(1, keepdim=True)  # after normalisation no 8-bit pixel is 0 in all channels
        classes = torch.arange(logits.shape[1]).view(1, -1, 1, 1)
        place = torch.arange(logits.shape[-1]) % logits.shape[1]
        return logits + padding * (classes == place) * 1e6


def step(junk: int | None) -> TrainingBatch:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]
    labels = [rng.integers(0, 4, size).astype(np.uint8) for size in SIZES]
    batch = pad_collate(images, labels, [0, 1, 2])
    if junk is not None:
        for image, (height, width) in zip(batch.images, SIZES):
            image[height:] = junk
            image[:, width:] = junk
    return TrainingBatch(batch, batch.padded, LabelCounts.of(batch.counts), False, 0.0)


def outcome(data: TrainingBatch, hostile: bool, name: str = "cross_entropy") -> list[torch.Tensor]:
    """Loss, gradient norm, and the weights and statistics after a step."""
    torch.manual_seed(0)
    model = Adversary(build_model("unet", 4, width=2), hostile).double().train()
    state = TrainingState(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=build_loss(Loss(name=name), 4),
        precision=PRECISION,
        context=DistributedContext(0, 1, 0, torch.device("cpu"), "python"),
    )
    found = train_step(state, data)
    return [*found, *model.state_dict().values()]


@pytest.mark.parametrize("name", LOSSES)
def test_padding_enters_neither_loss_nor_gradient(name):
    clean = outcome(step(None), False, name)
    for junk, hostile in ((255, False), (None, True), (77, True)):
        assert all(map(torch.equal, outcome(step(junk), hostile, name), clean))


def test_the_padding_is_there_and_its_labels_would_be_heard():
    """Without the ignored label the same adversary does change the loss: the test above can fail."""
    batch = step(None).local
    assert batch.padded
    assert int((batch.labels == 255).sum()) == 33 * 40 * 3 - sum(h * w for h, w in SIZES)
    batch.labels[batch.labels == 255] = 0
    heard = step(None)._replace(local=batch)
    assert outcome(heard, True)[0] > 1000 * outcome(heard, False)[0]
