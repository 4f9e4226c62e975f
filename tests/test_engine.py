from __future__ import annotations

import pytest
import torch

from fcn.engine import infer
from fcn.models import build_model
from fcn.run import Numerics


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_logits_of_an_image_do_not_depend_on_its_batch(precision: str, channels_last: bool) -> None:
    """LinkNet at this size has a transposed convolution whose CPU kernel gives five images other bits than one."""
    torch.manual_seed(0)
    numerics = Numerics(precision, channels_last, torch.device("cpu"))
    model = numerics.place(build_model("linknet", 11)).eval()
    images = torch.randint(0, 256, (5, 180, 240, 3), dtype=torch.uint8)
    with torch.inference_mode():
        together = infer(model, images, numerics)
        alone = torch.cat([infer(model, image[None], numerics) for image in images])
    assert torch.equal(together, alone)
