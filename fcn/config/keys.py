"""Every key of the config.

The docstring under a key documents it. Its annotation says what the file may contain (see `fcn.config.yaml_schema`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, Literal

from fcn.config.yaml_schema import PATH, Accept
from fcn.metrics import METRICS

Positive = Annotated[float, Accept("a number above 0", lambda value: value > 0)]
NotNegative = Annotated[float, Accept("a number, 0 or more", lambda value: value >= 0)]
UnitInterval = Annotated[float, Accept("a number from 0 to 1", lambda value: 0 <= value <= 1)]
Momentum = Annotated[float, Accept("a number from 0 to below 1", lambda value: 0 <= value < 1)]
Count = Annotated[int, Accept("a whole number, 1 or more", lambda value: value >= 1)]
CountOrZero = Annotated[int, Accept("a whole number, 0 or more", lambda value: value >= 0)]
Byte = Annotated[int, Accept("a whole number from 0 to 255", lambda value: 0 <= value <= 255)]
Size = Annotated[
    tuple[int, int], Accept("[height, width], two whole numbers, 1 or more", lambda value: min(value) >= 1)
]
Jitter = Annotated[
    tuple[float, float, float, float],
    Accept(
        "[brightness, contrast, saturation, hue], each from 0 to 1, hue to 0.5",
        lambda value: all(0 <= x <= 1 for x in value) and value[3] <= 0.5,
    ),
]
Channels = Annotated[
    tuple[float, float, float],
    Accept("three numbers above 0 and up to 1", lambda value: all(0 < x <= 1 for x in value)),
]
ScaleRange = Annotated[
    tuple[float, float], Accept("[low, high], two numbers with 0 < low <= high", lambda value: 0 < value[0] <= value[1])
]
Milestones = Annotated[
    tuple[float, ...],
    Accept(
        "rising fractions of the run, each between 0 and 1",
        lambda v: all(0 < x < 1 for x in v) and list(v) == sorted(set(v)),
    ),
]
Text = Annotated[str, Accept("a text that is not empty", lambda value: bool(value.strip()))]
PathText = Annotated[str, PATH]
ImportPath = Annotated[
    str,
    Accept("package.module:function of your own", lambda v: re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", v)),
]
ClassNames = Annotated[
    tuple[Text, ...],
    Accept("a list of 2 to 254 different names", lambda v: len(set(v)) == len(v) and 2 <= len(v) <= 254),
]
Scales = Annotated[
    tuple[float, ...],
    Accept("a list of different numbers above 0", lambda v: v and min(v) > 0 and len(set(v)) == len(v)),
]
PartOfOne = Annotated[float, Accept("a number between 0 and 1", lambda value: 0 < value < 1)]
Grey = Annotated[int, Accept("a whole number from 0 to 254", lambda value: 0 <= value <= 254)]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of red, green and blue, 0 to 1, that torchvision's pretrained networks expect."""


OWN = "your own"
"""Stands for a network or a data set given by import path."""
VGG = ("fcn32s", "fcn16s", "fcn8s", "fcn8_kitti")
"""The FCNs on VGG16."""


def only(*names: str) -> Any:
    """A key, null by default, that only these networks, data sets or losses take."""
    return dataclasses.field(default=None, metadata={"only": names})


def options_of(section: type, name: str) -> list[str]:
    """The keys of a section that are options of this network, data set or loss."""
    return [field.name for field in dataclasses.fields(section) if name in field.metadata.get("only", ())]


@dataclass(slots=True, kw_only=True)
class Data:
    name: Literal["voc", "camvid", "cityscapes", "kitti_road", "portrait", "folder", "shapes"] | ImportPath
    """The data set, which determines the layout under `root`, the class names and the palette. Or a data set of your
    own: `package.module:function` (or a class) is called with root, split and `data.options` and returns a map-style
    dataset of (image, mask)."""
    root: PathText
    """Folder of the data set. A relative path starts at the current directory."""
    train: Text = "train"
    """Split to train on."""
    val: Text = "val"
    """Split to score every `eval.every` steps and at the end of the run."""
    test: Text | None = None
    """Split to score once, with the weights of the last step. The summary then reports it instead of `val`."""
    crop: Size | None = None
    """Size of training crops in pixels. null: train on whole images, padded to the largest of the global batch."""
    group: Count = 32
    """Number of steps that exchange images if `crop` is null, so that a batch has images of similar shape and less
    padding. The order of steps stays random, and each epoch has every image once. 1: no exchange."""
    scale: ScaleRange | None = None
    """Range of the random resize factor before the crop, in steps of 1/32. null: no resize."""
    hflip: UnitInterval = 0.5
    """Probability of a horizontal flip."""
    jitter: Jitter | None = None
    """Random colour changes: the largest change of [brightness, contrast, saturation, hue], the first three as a
    fraction, hue as a fraction of the circle. null: no change."""
    resize: Literal["cpu", "device"] = "cpu"
    """Where to resize training images: in the data loader, or as whole batches on the GPU, which helps a loader that
    cannot keep up. The results differ by at most one grey level."""
    workers: CountOrZero = 4
    """Data-loader processes per training process. 0: load in the training process itself."""
    cache: Literal["memory", "disk"] | None = None
    """Where to keep decoded training images, 4 bytes a pixel, so that each is decoded once instead of in every
    epoch. All processes and runs on a node share the cache, and a data set that has changed gets a new one. Memory
    is freed at the end of the run. A run that was stopped or killed leaves it to its next start; a later run removes
    it after a day, or when it needs the space. A cache on disk stays until you delete it. A data set of your own
    needs an attribute `fingerprint`, a string that changes whenever its samples do. null: no cache."""
    cache_dir: PathText | None = None
    """Folder of the caches, best on a local disk. null: `.cache` next to run_dir, shared by the runs there (disk), or
    /dev/shm (memory)."""
    exif_orientation: bool = True
    """Turn images and masks upright, each as its own EXIF orientation says. false: take all pixels as they are stored,
    as for masks without EXIF that were drawn on the images' stored pixels."""
    on_error: Literal["stop", "skip"] = "stop"
    """What happens at a broken training image or mask: stop the run, or use another image instead and report it at
    the end of the epoch. Evaluation always stops, because a score covers the whole split."""
    val_fraction: PartOfOne | None = only("portrait", "folder")
    """Fraction of the images for `val`, chosen by name; the rest is `train` (portrait, folder). null: the splits are
    lists or folders."""
    images: PathText | None = only("folder")
    """Folder of the images under `root`; {split} in it stands for the split's name (folder; null: images)."""
    masks: PathText | None = only("folder")
    """Folder of the masks under `root`, like `images` (folder; null: masks)."""
    mask_suffix: str | None = only("folder")
    """What follows the image's name in a mask's name, such as _mask (folder; null: nothing)."""
    classes: ClassNames | None = only("folder", OWN)
    """Class names in the order of their indices (folder, or a data set of your own without `classes`)."""
    values: dict | None = only("folder")
    """How each class appears in a mask: a number, a colour such as "#ff00ff", a list of those, or `rest` for all
    others. Besides the class names there is `ignore` (folder; null: masks contain class indices)."""
    threshold: Grey | None = only("portrait")
    """A pixel is a person if its grey in the matte is above this (portrait; null: 0)."""
    num_classes: Count | None = None
    """Number of classes you expect; a different number is an error. null: any number."""
    options: dict | None = only(OWN)
    """Keyword arguments for a data set of your own."""
    mean: Channels = IMAGENET_MEAN
    """Mean of red, green and blue, 0 to 1, to subtract from images. Default: ImageNet's."""
    std: Channels = IMAGENET_STD
    """Standard deviation of red, green and blue, 0 to 1, to divide images by. Default: ImageNet's."""


@dataclass(slots=True, kw_only=True)
class Model:
    name: (
        Literal[
            "fcn32s", "fcn16s", "fcn8s", "fcn8_kitti", "fcn_resnet18", "fcn_resnet50", "fcn_resnet101",
            "unet", "linknet",
        ]
        | ImportPath
    )  # fmt: skip
    """The network. Or one of your own: `package.module:function` is called with num_classes and `model.options`."""
    weights: PathText | None = None
    """Pretrained weights: imagenet or coco (torchvision's, downloaded by one process), or a file in torchvision's or
    fcn's format, or a .safetensors file. A resumed run does not read them. null: none."""
    width: Count | None = only(*VGG, "unet")
    """Channels of the first level (unet, FCNs on VGG16; null: 64, as in the papers)."""
    norm: Literal["batch", "none"] | None = only("unet")
    """Normalisation after each convolution (unet; null: batch, while the paper has none)."""
    layout: Literal["classic", "same"] | None = only("fcn32s", "fcn16s", "fcn8s")
    """Padding (fcn32s, fcn16s, fcn8s; null: classic). classic: 100 around the image, as in the reference code. same: 3
    around fc6, which costs 0.6 times as much."""
    dropout: Momentum | None = only(*VGG)
    """Dropout rate after fc6 and fc7 (FCNs on VGG16; null: 0.5)."""
    encoder: Literal["resnet18", "plain"] | None = only("linknet")
    """Encoder (linknet; null: resnet18)."""
    aux: bool | None = only("fcn_resnet50", "fcn_resnet101")
    """Auxiliary head in training (fcn_resnet50, fcn_resnet101; null: true). `loss.aux_weight` weights its loss."""
    options: dict | None = only(OWN)
    """Keyword arguments for a network of your own."""

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `build_model`, without unset keys."""
        names = [name for name in sorted(options_of(Model, self.name)) if getattr(self, name) is not None]
        return {name: getattr(self, name) for name in names} | (self.options or {})


PRETRAINED = {
    "imagenet": {
        "fcn32s": "VGG16_Weights.IMAGENET1K_V1",
        "fcn16s": "VGG16_Weights.IMAGENET1K_V1",
        "fcn8s": "VGG16_Weights.IMAGENET1K_V1",
        "fcn8_kitti": "VGG16_Weights.IMAGENET1K_V1",
        "fcn_resnet18": "ResNet18_Weights.IMAGENET1K_V1",
        "fcn_resnet50": "ResNet50_Weights.IMAGENET1K_V1",
        "fcn_resnet101": "ResNet101_Weights.IMAGENET1K_V1",
        "linknet": "ResNet18_Weights.IMAGENET1K_V1",
    },
    "coco": {
        "fcn_resnet50": "FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1",
        "fcn_resnet101": "FCN_ResNet101_Weights.COCO_WITH_VOC_LABELS_V1",
    },
}
"""torchvision's weights, by set and model."""


@dataclass(slots=True, kw_only=True)
class Train:
    batch_size: Count
    """Images of a step over all processes. The result does not depend on the number of processes."""
    uneven: bool = False
    """Accept a batch size that is not a multiple of the number of processes, or is smaller. The numbers stay the same;
    processes with fewer images wait for the others."""
    shards: Count | None = None
    """Compute the global batch as this many equal shards, for any number of processes up to that: each by itself,
    then their sums along a fixed tree. The run then ends with the same bytes on any number of processes of one kind of
    hardware. Divides `batch_size`. Implies `deterministic`, and one thread on a CPU. null: off."""
    micro_batch: Count | None = None
    """Largest number of images per process and forward pass; gradients of more are accumulated. null: all of a
    process's images at once. With sync_bn, a network with BatchNorm needs all of them for its statistics. Then, on a
    GPU, what the backward pass needs waits in host memory instead."""
    steps: Count | None = None
    """Length of the run in steps. Set this or `epochs`."""
    epochs: Positive | None = None
    """Length of the run in passes over the training split; converted to steps once."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "bf16"
    """Precision of the forward pass. Under bf16 and fp16 weights stay float32; fp16 adds gradient scaling."""
    channels_last: bool = True
    """Store images and activations in NHWC order, which convolutions on current hardware prefer."""
    sync_bn: bool = True
    """Compute BatchNorm over the global batch instead of each process's part of it."""
    compile: bool = False
    """Compile the network with torch.compile."""
    deterministic: bool = False
    """Use deterministic kernels, so that a run repeats bit for bit on the same hardware and number of processes. The
    log names operations that have none. Slower, because cuDNN does not autotune."""
    grad_clip: Positive | None = None
    """Clip the global norm of the gradient to this. null: no clipping."""
    ema: Momentum | None = None
    """Decay per step of an exponential moving average of the weights, such as 0.999; at step s at most (1 + s) / (10
    + s). Evaluation then scores the average, and best.pt contains it. null: no average."""
    max_nonfinite: CountOrZero = 3
    """Largest number of consecutive steps whose loss or gradient is not finite. Such a step changes no weight on any
    process; one more ends the run. fp16 may take 32 more, because each of them halves its loss scale."""
    timeout: Positive = 600
    """Seconds that a process waits for another one before the run ends with a message that names it. Must be longer
    than anything rank 0 does alone, and than the slowest process's evaluation takes beyond the fastest one's."""
    gradient_compression: Literal["bf16"] | None = None
    """Type of gradients on their way between processes. bf16 halves the bytes but rounds to 8 bits of mantissa, and the
    numbers then depend on the number of processes, unless `shards` is set. null: their own type."""
    profile: Count | None = None
    """Write a trace of this many steps to run_dir/profile, starting at the sixth step. null: no trace."""
    log_every: Count = 10
    """Steps between progress lines. Apart from evaluation and saving, only these steps wait for the device."""


@dataclass(slots=True, kw_only=True)
class AddedLosses:
    cross_entropy: Positive | None = None
    """Weight of this loss; `loss.name` has weight 1. null: not added."""
    dice: Positive | None = None
    """Weight of this loss."""
    focal: Positive | None = None
    """Weight of this loss."""
    lovasz: Positive | None = None
    """Weight of this loss."""
    ohem: Positive | None = None
    """Weight of this loss."""


ClassWeights = Annotated[
    tuple[float, ...],
    Accept("a list of numbers, one per class, each 0 or more, not all 0", lambda v: min(v, default=-1) >= 0 < max(v)),
]
PositiveFraction = Annotated[float, Accept("a number above 0, up to 1", lambda value: 0 < value <= 1)]


@dataclass(slots=True, kw_only=True)
class Loss:
    name: Literal["cross_entropy", "dice", "focal", "lovasz", "ohem"] = "cross_entropy"
    """The loss: a mean over the valid pixels of the global batch (cross_entropy, focal; ohem: over the hardest) or
    over its images (dice, lovasz). See `fcn.training.losses`."""
    add: AddedLosses = dataclasses.field(default_factory=AddedLosses)
    """Other losses to add, with their weights, such as {dice: 0.5}."""
    weights: ClassWeights | None = only("cross_entropy", "focal", "ohem")
    """Weight of each class's pixels (cross_entropy, focal, ohem; null: 1 each). The mean is a weighted mean, so only
    the ratios matter."""
    label_smoothing: Momentum | None = only("cross_entropy", "ohem")
    """Fraction of each label to spread over all classes (cross_entropy, ohem; null: 0)."""
    gamma: NotNegative | None = only("focal")
    """Exponent that lowers the weight of pixels that are already right (focal; null: 2)."""
    keep: PositiveFraction | None = only("ohem")
    """Fraction of each image's valid pixels that count, those with the largest loss (ohem; null: 0.25)."""
    ignore_index: Byte = 255
    """Label value that counts in neither loss nor score. A class with this index has no score and is in no mean; where
    the network predicts it, the labelled class is missed."""
    aux_weight: NotNegative = 0.5
    """Weight of the auxiliary head's loss, if the network has one. The logged loss includes it."""


@dataclass(slots=True, kw_only=True)
class Optim:
    name: Literal["sgd", "adamw"] = "sgd"
    """Optimizer. Biases and normalisation parameters have no weight decay."""
    lr: Positive = 0.01
    """Peak learning rate, at the end of the warm-up."""
    momentum: Momentum = 0.9
    """Momentum of SGD; the first beta of AdamW (whose second is 0.999)."""
    weight_decay: NotNegative = 1e-4
    """L2 penalty in SGD, decoupled weight decay in AdamW."""
    schedule: Literal["poly", "cosine", "step", "constant"] = "poly"
    """How the learning rate falls after the warm-up."""
    warmup: CountOrZero = 0
    """Steps during which the rate rises linearly from lr / warmup to lr."""
    power: Positive = 0.9
    """Exponent for `schedule: poly`."""
    milestones: Milestones = (0.6, 0.85)
    """Fractions of the run after which `schedule: step` multiplies the rate by `gamma`."""
    gamma: UnitInterval = 0.1
    """Factor for `schedule: step`."""


@dataclass(slots=True, kw_only=True)
class Eval:
    every: Count = 1000
    """Steps between evaluations of `data.val`. There is always one after the last step."""
    batch_size: Count = 8
    """Largest number of images per process and forward pass; they have equal size. No score depends on it."""
    preset: Literal["native", "short520", "center_crop"] = "native"
    """What to score. native: the whole image, at the size of its labels. short520: image (antialiased bilinear) and
    labels (nearest) resized to a short side of 520, as torchvision's segmentation references do; comparable only
    with such scores. center_crop: the centre of image and labels; a side shorter than the crop stays whole."""
    crop: Size | None = None
    """Size for `preset: center_crop` in pixels. null: `data.crop`."""
    scales: Scales = (1.0,)
    """Resize factors for the network's input; its logits are resized back. With several, their softmax is averaged."""
    flip: bool = False
    """Average the softmax of the image and of its mirror image."""
    window: Size | None = None
    """Images larger than this, after scaling, go through the network in windows of this size, which overlap by a third;
    the logits are averaged there. null: all images go through whole."""
    pictures: CountOrZero = 4
    """Images of the split to show as panels at every evaluation. 0: draw nothing and write no report.html."""


@dataclass(slots=True, kw_only=True)
class Checkpoint:
    every: Count = 500
    """Steps between checkpoints. The last step is always saved. There is no save right after a step whose gradient
    is not finite."""
    keep: Annotated[int, Accept("a whole number, 2 or more", lambda value: value >= 2)] = 3
    """How many of the newest checkpoints to keep, besides best.pt. Broken ones do not count."""
    best: Literal[tuple(METRICS)] = "miou"  # type: ignore[valid-type]
    """The metric of `data.val` that chooses best.pt."""


@dataclass(slots=True, kw_only=True)
class Wandb:
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online if there are W&B credentials, else offline. It never asks."""
    project: Text = "fcn"
    """W&B project."""
    artifact: bool = False
    """Upload best.pt as an artifact when the run is finished."""


@dataclass(slots=True, kw_only=True)
class Config:
    """A complete description of a run."""

    seed: CountOrZero = 0
    """Seed of every random choice."""
    run_dir: PathText
    """Directory of the run: checkpoints, metrics, pictures, log. It belongs to this run alone."""
    resume: PathText = "auto"
    """auto: continue from the newest checkpoint in run_dir. never: start from scratch and refuse to overwrite a run.
    Or a checkpoint file, to start from if run_dir has no checkpoint."""
    data: Data
    """What to train and score on."""
    model: Model
    """What to train."""
    train: Train
    """How to compute a step, and how many."""
    loss: Loss = dataclasses.field(default_factory=Loss)
    """What to minimise."""
    optim: Optim = dataclasses.field(default_factory=Optim)
    """How to minimise it."""
    eval: Eval = dataclasses.field(default_factory=Eval)
    """When and how to score the run."""
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    """When to save the run."""
    wandb: Wandb = dataclasses.field(default_factory=Wandb)
    """Whether and how to record the run in W&B."""


def total_steps(train: Train, dataset_size: int) -> int:
    """The length of a run in steps: `train.steps`, or enough for `train.epochs` passes over the split."""
    if train.steps is not None:
        return train.steps
    assert train.epochs is not None
    # In decimals as the user wrote them: 1.1 epochs of 100 images are 110 images, not 110.00000000000001.
    return max(1, math.ceil(Fraction(str(train.epochs)) * dataset_size / train.batch_size))


def protocol(evaluation: Eval, crop: tuple[int, int] | None) -> str:
    """How scores are computed, in words, such as `native` or `center_crop 480x480, scales 0.5 1, flip`.

    Args:
        evaluation: the config's section.
        crop: `data.crop`.
    """

    def size(pixels: tuple[int, int] | None) -> str:
        return "x".join(map(str, pixels or ()))

    cropped = evaluation.preset == "center_crop"
    parts = [f"{evaluation.preset} {size(evaluation.crop or crop)}" if cropped else evaluation.preset]
    if evaluation.scales != (1.0,):
        parts.append(f"scales {' '.join(f'{scale:g}' for scale in evaluation.scales)}")
    if evaluation.flip:
        parts.append("flip")
    if evaluation.window:
        parts.append(f"window {size(evaluation.window)}")
    return ", ".join(parts)
