"""A distributed training loop as it is commonly written, for comparison.

    torchrun --nproc_per_node=N -m benchmarks.stock_ddp SHAPES_ROOT OUTPUT STEPS

The same network, data, augmentation and hyperparameters as `benchmarks/same_numbers.py` gives the harness, in the
habits of published training scripts: each rank's loss is the mean over its own pixels, BatchNorm is each rank's own,
the sampler repeats images until the ranks have equally many, and workers draw augmentation from their own generator.
The global batch is the same on any number of ranks that divides it, which many scripts do not even do.
"""

from __future__ import annotations

import copy
import os
import random
import sys

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from fcn.config import Data, Optim
from fcn.data import TrainTransform, build_dataset, to_input
from fcn.models import build_model
from fcn.training.optim import build_optimizer, learning_rate, set_learning_rate

BATCH, CLIP, DECAY = 12, 0.5, 0.9


class Samples(Dataset):
    """images (3, h, w) and labels (h, w), augmented by whatever generator the worker has."""

    def __init__(self, root: str) -> None:
        self.pairs = build_dataset(Data(name="shapes", root=root), "train")
        self.transform = TrainTransform((48, 64), (0.8, 1.25), 0.5, (0.3, 0.3, 0.3, 0.1))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, labels = self.transform(*self.pairs.read(index), random.Random(int(torch.randint(1 << 60, ()))))
        height, width = labels.shape
        pixels, classes = np.zeros((48, 64, 3), np.uint8), np.full((48, 64), 255, np.uint8)
        pixels[:height, :width], classes[:height, :width] = image, labels
        inputs = to_input(torch.from_numpy(pixels)[None], torch.tensor([[height, width]]), torch.float32, False)[0]
        return inputs, torch.from_numpy(classes).long()


def main(root: str, output: str, steps: int) -> None:
    if "RANK" not in os.environ:  # one process, without torchrun
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dataset = Samples(root)
    network = build_model("unet", 7, width=4)
    model = DistributedDataParallel(network)
    average = copy.deepcopy(network)
    config = Optim(name="sgd", lr=0.01, momentum=0.9, weight_decay=1e-2, schedule="cosine", warmup=5)
    optimizer = build_optimizer(network, config)
    sampler = DistributedSampler(dataset, seed=0)
    loader = DataLoader(dataset, BATCH // world_size, sampler=sampler, num_workers=2, drop_last=True)
    losses: list[float] = []
    while len(losses) < steps:
        sampler.set_epoch(sampler.epoch + 1)
        for images, labels in loader:
            if len(losses) == steps:
                break
            set_learning_rate(optimizer, learning_rate(len(losses), steps, config))
            loss = nn.functional.cross_entropy(model(images), labels, ignore_index=255)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), CLIP)
            optimizer.step()
            decay = min(DECAY, (1 + len(losses)) / (10 + len(losses)))
            with torch.no_grad():
                for mean, value in zip(average.state_dict().values(), network.state_dict().values(), strict=True):
                    mean.copy_(mean.lerp(value, 1 - decay) if mean.is_floating_point() else value)
            losses.append(loss.item())
    if rank == 0:
        states = {"model": network.state_dict(), "ema": average.state_dict()}
        tensors = {f"{kind}/{key}": value for kind, state in states.items() for key, value in state.items()}
        floats = {key: value.double().flatten().tolist() for key, value in tensors.items() if value.is_floating_point()}
        torch.save(floats | {"loss": losses}, output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
