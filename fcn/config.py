"""Configuration: one YAML file ⇄ typed dataclasses, checked strictly and all at once.

The docstring under a field is its documentation, its annotation what the file may say (see `fcn.schema`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

import yaml

from fcn import schema
from fcn.errors import InputError
from fcn.schema import Accept

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
"""Of red, green and blue, 0 to 1, as torchvision's pretrained networks expect them."""


@dataclass(slots=True, kw_only=True)
class Data:
    name: Literal["voc", "camvid", "cityscapes", "kitti_road", "portrait", "folder", "shapes"] | ImportPath
    """Which data set, and so which layout under `root`, class names and palette. `package.module:function`, or a class,
    is called with root, split and `data.options`, and returns a map-style dataset of (image, mask)."""
    root: Text
    """Folder of the data set. Relative paths start at the current directory."""
    train: Text = "train"
    """Split to train on."""
    val: Text = "val"
    """Split that is scored every `eval.every` steps and at the end of the run."""
    test: Text | None = None
    """Split that is scored once, with the weights of the last step. Then the summary reports it instead of `val`."""
    crop: Size | None = None
    """Training crop in pixels. null trains on whole images, padded to the largest of the global batch."""
    group: Count = 32
    """Steps that exchange images where `crop` is null, so that images of similar shape share a batch and less of it is
    padding. The order of the steps stays random, and an epoch has each image once. 1: none do."""
    scale: ScaleRange | None = None
    """Range of the random resize factor before the crop, which is drawn in steps of 1/32. null leaves the size as it
    is."""
    hflip: UnitInterval = 0.5
    """Probability of a horizontal flip."""
    jitter: Jitter | None = None
    """Random colours: largest change of [brightness, contrast, saturation, hue], the first three as a fraction, hue as
    a fraction of the circle. null leaves colours as they are."""
    resize: Literal["cpu", "device"] = "cpu"
    """Where training images are resized: by the data loader, or as whole batches on the GPU, which takes work from a
    loader that cannot keep up. Equal to one grey level."""
    workers: CountOrZero = 4
    """Data-loader processes per training process. 0 loads in the training process itself."""
    cache: Literal["memory", "disk"] | None = None
    """Where decoded training images are kept, 4 bytes a pixel, so that each is decoded once and not in every epoch. All
    processes and runs of a node share them, and a data set that changed gets a new cache. memory is given back at the
    end of the run; a run that was stopped or killed leaves it to its next start, and a later run removes it after a
    day, or when it needs the room. disk stays until you delete it. A data set of your own needs an attribute
    `fingerprint`, a text that changes whenever its samples do. null: nothing is kept."""
    cache_dir: Text | None = None
    """Folder of the caches, best on a disk of the node itself. null: .cache beside run_dir, which all runs there share
    (disk), or /dev/shm (memory)."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a broken training image or mask does: stop the run, or be replaced by another image and reported at the end
    of the epoch. Evaluation always stops: a score is of the whole split."""
    val_fraction: PartOfOne | None = None
    """Share of the images that are `val`, chosen by their names; the others are `train` (portrait, folder). null: the
    splits are lists or folders."""
    images: Text | None = None
    """Folder of the images under `root`; {split} in it is the split's name (folder; null: images)."""
    masks: Text | None = None
    """Folder of the masks under `root`, like `images` (folder; null: masks)."""
    mask_suffix: str | None = None
    """What a mask's name has after the image's, before its type, such as _mask (folder; null: nothing)."""
    classes: ClassNames | None = None
    """Names of the classes, in the order of their indices (folder, or a data set of your own that has no `classes`)."""
    values: dict | None = None
    """What each class is in a mask: a number, a colour such as "#ff00ff", a list of those, or `rest` for all others.
    `ignore` stands beside the names of the classes (folder; null: masks hold class indices)."""
    threshold: Grey | None = None
    """Grey of a matte above which a pixel is a person (portrait; null: 0)."""
    num_classes: Count | None = None
    """Number of classes that you expect; another one is an error. null: as many as the data set has."""
    options: dict | None = None
    """Keyword arguments for a data set of your own."""
    mean: Channels = IMAGENET_MEAN
    """Mean of red, green and blue, 0 to 1, that is subtracted from images. The default is ImageNet's."""
    std: Channels = IMAGENET_STD
    """Standard deviation of red, green and blue, 0 to 1, that images are divided by. The default is ImageNet's."""


DATA_OPTIONS = {
    "voc": (), "camvid": (), "cityscapes": (), "kitti_road": (), "shapes": (),
    "portrait": ("val_fraction", "threshold"),
    "folder": ("val_fraction", "images", "masks", "mask_suffix", "classes", "values"),
}  # fmt: skip
"""Keys that only some data sets take."""
DATA_KEYS = ("val_fraction", "threshold", "images", "masks", "mask_suffix", "classes", "values", "options")


class PixelClasses(NamedTuple):
    """`data.values`, read: what a pixel of a mask says."""

    numbers: dict[int, int]
    """Pixel value from 0 to 65535 → class, or 255 for ignore."""
    colours: dict[tuple[int, int, int], int]
    """(red, green, blue) → class, or 255 for ignore."""
    rest: int | None
    """What all other pixels are; None: an error."""


def pixel_classes(names: Sequence[str], values: Mapping[str, Any]) -> PixelClasses:
    """Read `data.values`.

    Raises:
        ValueError: names the entry, what was found, and what is accepted.
    """
    read = PixelClasses({}, {}, None)
    for name, entry in values.items():
        if name not in names and name != "ignore":
            raise ValueError(f"{name}: is no class; accepted: {', '.join(names)}, ignore")
        label = names.index(name) if name in names else 255
        for value in entry if isinstance(entry, list) else [entry]:
            if value == "rest" and read.rest is None:
                read = read._replace(rest=label)
                continue
            colour = re.fullmatch("#([0-9a-fA-F]{6})", value) if isinstance(value, str) else None
            known = read.colours if colour else read.numbers
            pixel: Any = tuple(bytes.fromhex(colour[1])) if colour else value
            if not colour and (type(value) is not int or not 0 <= value <= 65535):
                raise ValueError(
                    f"{name}: found {schema.show(value)}; accepted: a number from 0 to 65535, a colour in quotes such "
                    f'as "#ff00ff", a list of those, or rest (once)'
                )
            if pixel in known:
                raise ValueError(f"{name}: found {value}, which another entry has; keep one")
            known[pixel] = label
    absent = [name for name in names if name not in values]
    if absent:
        raise ValueError(f"found nothing for {', '.join(absent)}; accepted: an entry for every class of data.classes")
    return read


@dataclass(slots=True, kw_only=True)
class Model:
    name: (
        Literal[
            "fcn32s", "fcn16s", "fcn8s", "fcn8_kitti", "fcn_resnet18", "fcn_resnet50", "fcn_resnet101",
            "unet", "linknet",
        ]
        | ImportPath
    )  # fmt: skip
    """Which network. `package.module:function` is called with num_classes and `model.options`."""
    weights: Text | None = None
    """Pretrained weights: imagenet or coco (torchvision's, downloaded by one process), a file in torchvision's or this
    program's format, or null for none. A run that resumes does not read them."""
    width: Count | None = None
    """Channels of the first level (unet, FCNs on VGG16; null: 64, as in the papers)."""
    norm: Literal["batch", "none"] | None = None
    """Normalisation after each convolution (unet; null: batch; the paper has none)."""
    layout: Literal["classic", "same"] | None = None
    """Padding (fcn32s, fcn16s, fcn8s; null: classic): 100 around the image as in the reference code, or 3 around fc6,
    which costs 0.6 times as much."""
    dropout: Momentum | None = None
    """Dropout rate after fc6 and fc7 (FCNs on VGG16; null: 0.5)."""
    encoder: Literal["resnet18", "plain"] | None = None
    """Encoder (linknet; null: resnet18)."""
    aux: bool | None = None
    """Auxiliary head in training (fcn_resnet50, fcn_resnet101; null: true); `loss.aux_weight` weighs its loss."""
    options: dict | None = None
    """Keyword arguments for a network of your own."""

    def arguments(self) -> dict[str, Any]:
        """What `build_model` takes beside the name and the number of classes; unset keys are left out."""
        own = {key: getattr(self, key) for key in MODEL_KEYS if getattr(self, key) is not None}
        return own | (self.options or {})


_VGG = ("dropout", "width")
MODEL_OPTIONS = {
    "fcn32s": ("layout", *_VGG), "fcn16s": ("layout", *_VGG), "fcn8s": ("layout", *_VGG), "fcn8_kitti": _VGG,
    "fcn_resnet18": (), "fcn_resnet50": ("aux",), "fcn_resnet101": ("aux",),
    "unet": ("width", "norm"), "linknet": ("encoder",),
}  # fmt: skip
"""Which options each model takes; `fcn.models.build_model` has a parameter for each."""
MODEL_KEYS = tuple(sorted({option for options in MODEL_OPTIONS.values() for option in options}))
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
"""torchvision's weights by the name of the set and of the model."""


@dataclass(slots=True, kw_only=True)
class Train:
    batch_size: Count
    """Images of one step over all processes. The run does not depend on how many processes share them."""
    uneven: bool = False
    """Accept a batch size that is no multiple of the number of processes, even one below it. The numbers stay the same,
    and processes with fewer images wait for the others."""
    micro_batch: Count | None = None
    """Most images per process and forward pass; more are accumulated. null: all of the process's share at once. With
    sync_bn a network with BatchNorm needs the whole share for its statistics: then, on a GPU, what the backward pass
    needs waits in host memory instead."""
    steps: Count | None = None
    """Length of the run in steps. Give this or `epochs`."""
    epochs: Positive | None = None
    """Length of the run in passes over the training split, converted to steps once."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "bf16"
    """Arithmetic of the forward pass. Weights stay float32 under bf16 and fp16; fp16 adds gradient scaling."""
    channels_last: bool = True
    """Keep images and activations in NHWC order, which convolutions on current hardware prefer."""
    sync_bn: bool = True
    """BatchNorm over the global batch instead of each process's part of it."""
    compile: bool = False
    """Compile the network with torch.compile."""
    deterministic: bool = False
    """Use deterministic kernels, so that a run repeats bit for bit on the same hardware and number of processes. An
    operation that has none is named in the log. No cuDNN autotuning, so slower."""
    grad_clip: Positive | None = None
    """Largest global norm of the gradient. null: no clipping."""
    ema: Momentum | None = None
    """Decay per step of a moving average of the weights, such as 0.999; at step s at most (1 + s) / (10 + s). Then
    evaluation scores the average, and best.pt holds it. null: none."""
    max_nonfinite: CountOrZero = 3
    """Most steps in a row without a finite loss and gradient. Such a step changes no weight on any process; one more
    ends the run. fp16 may take 32 more, because its loss scale is found by halving it after such steps."""
    timeout: Positive = 600
    """Seconds that a process waits for another one before the run ends with a message that names the one that did not
    come. It must be longer than anything that rank 0 does alone, and than the longest evaluation of a process's share
    of the images exceeds the shortest."""
    gradient_compression: Literal["bf16"] | None = None
    """Send gradients between processes in this type, which halves the bytes. They are then rounded to 8 bits of
    mantissa, and the numbers depend on the number of processes. null: as they are."""
    profile: Count | None = None
    """Write a trace of that many steps to run_dir/profile, from the sixth of this start on. null: none."""
    log_every: Count = 10
    """Steps between progress lines. Beside evaluation and saving, only these steps wait for the device."""


@dataclass(slots=True, kw_only=True)
class AddedLosses:
    cross_entropy: Positive | None = None
    """Weight of this loss beside `loss.name`, which weighs 1; null: not added. So for the others."""
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
Share = Annotated[float, Accept("a number above 0, up to 1", lambda value: 0 < value <= 1)]


@dataclass(slots=True, kw_only=True)
class Loss:
    name: Literal["cross_entropy", "dice", "focal", "lovasz", "ohem"] = "cross_entropy"
    """What a step minimises: a mean over the valid pixels (cross_entropy, focal, ohem: of the hardest) or over the
    images (dice, lovasz) of the global batch; see `fcn.losses`."""
    add: AddedLosses = dataclasses.field(default_factory=AddedLosses)
    """Losses that are added to it, with their weights, such as {dice: 0.5}."""
    weights: ClassWeights | None = None
    """Weight of each class's pixels (cross_entropy, focal, ohem; null: 1 each). The mean is a weighted one, so only
    their ratios matter."""
    label_smoothing: Momentum | None = None
    """Part of a pixel's label that is spread over all classes (cross_entropy, ohem; null: 0)."""
    gamma: NotNegative | None = None
    """Exponent that takes weight from pixels that are right already (focal; null: 2)."""
    keep: Share | None = None
    """Fraction of each image's valid pixels that counts, those of largest loss (ohem; null: 0.25)."""
    ignore_index: Byte = 255
    """Label value that enters neither loss nor score."""
    aux_weight: NotNegative = 0.5
    """Weight of the loss of an auxiliary head, where the network has one. The logged loss includes it."""


LOSS_OPTIONS = {
    "cross_entropy": ("weights", "label_smoothing"), "dice": (), "focal": ("weights", "gamma"), "lovasz": (),
    "ohem": ("weights", "label_smoothing", "keep"),
}  # fmt: skip
"""Which options each loss takes; its function in `fcn.losses` has a parameter for each."""


@dataclass(slots=True, kw_only=True)
class Optim:
    name: Literal["sgd", "adamw"] = "sgd"
    """Optimizer. Biases and normalisation parameters are never decayed."""
    lr: Positive = 0.01
    """Highest learning rate, reached at the end of the warm-up."""
    momentum: Momentum = 0.9
    """Momentum of SGD; the first beta of AdamW (whose second is 0.999)."""
    weight_decay: NotNegative = 1e-4
    """L2 penalty for SGD, decoupled decay for AdamW."""
    schedule: Literal["poly", "cosine", "step", "constant"] = "poly"
    """Shape of the learning rate after the warm-up."""
    warmup: CountOrZero = 0
    """Steps of linear rise from lr / warmup to lr."""
    power: Positive = 0.9
    """Exponent of `schedule: poly`."""
    milestones: Milestones = (0.6, 0.85)
    """Fractions of the run after which `schedule: step` multiplies the rate by `gamma`."""
    gamma: UnitInterval = 0.1
    """Factor of `schedule: step`."""


@dataclass(slots=True, kw_only=True)
class Eval:
    every: Count = 1000
    """Steps between evaluations of `data.val`; the last step is always evaluated."""
    batch_size: Count = 8
    """Most images per process and forward pass. Only images of equal size share one. No score depends on it."""
    preset: Literal["native", "short520", "center_crop"] = "native"
    """What of an image is scored. native: all of it, at the labels' own size. short520: image (antialiased bilinear)
    and labels (nearest) resized to a short side of 520, as torchvision's segmentation references do; comparable with
    scores of that kind alone. center_crop: the middle of image and labels; a side shorter than the crop stays whole."""
    crop: Size | None = None
    """Size of `preset: center_crop` in pixels. null: `data.crop`."""
    scales: Scales = (1.0,)
    """Factors by which images are resized for the network, and its logits back. Several are averaged as softmax."""
    flip: bool = False
    """Average the softmax of the image and of its mirror image."""
    window: Size | None = None
    """Images larger than this, after scaling, go through the network in windows of this size, which overlap by a third;
    logits are averaged where they do. null: images go through whole, whatever their size."""
    pictures: CountOrZero = 4
    """Images of the split shown as panels at every evaluation. 0: a run draws nothing, and writes no report.html."""


@dataclass(slots=True, kw_only=True)
class Checkpoint:
    every: Count = 500
    """Steps between checkpoints; the last step is always saved. A save that is due right after a step without a finite
    gradient is left out."""
    keep: Annotated[int, Accept("a whole number, 2 or more", lambda value: value >= 2)] = 3
    """Checkpoints kept, newest first, beside best.pt. Broken ones do not count."""
    best: Literal["miou", "pixel_acc", "mean_acc", "fw_iou"] = "miou"
    """Score of `data.val` by which best.pt is chosen."""


@dataclass(slots=True, kw_only=True)
class Wandb:
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto is online if W&B credentials are found, else offline; it never asks."""
    project: Text = "fcn"
    """W&B project."""
    artifact: bool = False
    """Whether best.pt is uploaded as an artifact when the run is finished."""


@dataclass(slots=True, kw_only=True)
class Config:
    """A run, completely described."""

    seed: CountOrZero = 0
    """Root of every random choice."""
    run_dir: Text
    """Folder that the run owns: checkpoints, metrics, pictures, log."""
    resume: Text = "auto"
    """auto continues from the newest checkpoint in run_dir. never starts afresh and refuses to overwrite. A checkpoint
    file is where the run starts if run_dir has no checkpoint of its own."""
    data: Data
    """What is trained and scored on."""
    model: Model
    """What is trained."""
    train: Train
    """How a step is computed, and how many there are."""
    loss: Loss = dataclasses.field(default_factory=Loss)
    """What is minimised."""
    optim: Optim = dataclasses.field(default_factory=Optim)
    """How it is minimised."""
    eval: Eval = dataclasses.field(default_factory=Eval)
    """When and how the run is scored."""
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    """When the run is saved."""
    wandb: Wandb = dataclasses.field(default_factory=Wandb)
    """Where the run is recorded beside its folder."""


def load_config(path: str | Path, overrides: Iterable[str] = (), world_size: int = 1) -> Config:
    """Read one YAML file, apply `KEY=VALUE` overrides, check everything.

    Args:
        path: the YAML file.
        overrides: texts such as `"optim.lr=0.1"`; the value is YAML.
        world_size: processes that will share `train.batch_size`.

    Raises:
        InputError: with one line for each problem found.
    """
    problems: list[str] = []
    return _checked(schema.read_yaml(Path(path), problems), str(path), overrides, world_size, problems)


def config_from_dict(values: Mapping[str, Any], source: str, overrides: Iterable[str] = ()) -> Config:
    """The config that `to_dict` described, as found in a checkpoint; `source` names it in messages."""
    return _checked(schema.tree_from_dict(values, source), source, overrides, 1, [])


def to_dict(config: Config) -> dict[str, Any]:
    """Plain data (dicts, lists, numbers, texts) that YAML and a weights-only checkpoint can hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return plain(dataclasses.asdict(config))


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config as YAML that `load_config` reads back to an equal config."""
    path.write_text(
        yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None, width=120), encoding="utf-8"
    )


def total_steps(train: Train, dataset_size: int) -> int:
    """Length of a run in steps: `train.steps`, or enough steps for `train.epochs` passes over the split."""
    if train.steps is not None:
        return train.steps
    assert train.epochs is not None
    # In decimals as the user wrote them: 1.1 epochs of 100 images are 110 images, not 110.00000000000001.
    return max(1, math.ceil(Fraction(str(train.epochs)) * dataset_size / train.batch_size))


def protocol(evaluation: Eval, crop: tuple[int, int] | None) -> str:
    """How scores were computed, in words, such as `native` or `center_crop 480x480, scales 0.5 1, flip`.

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


MAY_CHANGE = (
    "run_dir", "resume", "data.root", "data.val", "data.test", "data.resize", "data.workers", "data.cache",
    "data.cache_dir", "data.on_error",
    "train.uneven", "train.micro_batch", "train.steps", "train.epochs", "train.precision", "train.channels_last",
    "train.compile", "train.deterministic", "train.log_every", "train.max_nonfinite", "train.timeout",
    "train.gradient_compression", "train.profile",
    "eval", "checkpoint", "wandb",
)  # fmt: skip
"""Keys that a resumed run may change: where things are, how they are computed, and the length of the run."""


def config_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Compare two `to_dict` results, one line a difference: (those that make another run, those that may change)."""
    before, after = _defaults(Config) | flatten(old), flatten(new)  # a key that is newer than `old` was its default
    fatal: list[str] = []
    harmless: list[str] = []
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            section = key.split(".")[0]
            found = harmless if key in MAY_CHANGE or section in MAY_CHANGE else fatal
            found.append(f"{key}: {schema.show(before.get(key))} → {schema.show(after.get(key))}")
    return fatal, harmless


def _defaults(cls: type, prefix: str = "") -> dict[str, Any]:
    """Dotted key → default, as plain data, of every key that has one."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        hint = get_type_hints(cls)[field.name]
        if dataclasses.is_dataclass(hint):
            found |= _defaults(hint, f"{prefix}{field.name}.")
        elif field.default is not dataclasses.MISSING:
            found[prefix + field.name] = list(field.default) if isinstance(field.default, tuple) else field.default
    return found


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key → value of a nested dict."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _checked(
    tree: schema.Section, source: str, overrides: Iterable[str], world_size: int, problems: list[str]
) -> Config:
    for override in overrides:
        schema.apply_override(tree, override, problems)
    parsed: dict[str, Any] = {}
    config = schema.build(Config, tree, source, problems, parsed)
    problems += _cross_checks(parsed, source, world_size)
    if problems:
        raise InputError("\n".join(problems))
    config.run_dir, config.data.root = _at_home(config.run_dir), _at_home(config.data.root)
    return config


def _at_home(path: str) -> str:
    """With the ~ at its start resolved, which a shell leaves alone in KEY=~/folder."""
    return str(Path(path).expanduser()) if path.startswith("~") else path


def _cross_checks(parsed: Mapping[str, Any], source: str, world_size: int) -> list[str]:
    """Everything that depends on more than one key; `parsed` holds the keys that are right by themselves."""
    found: list[str] = []
    if {"train.steps", "train.epochs"} <= parsed.keys():
        steps, epochs = parsed["train.steps"], parsed["train.epochs"]
        if (steps is None) == (epochs is None):
            state = "neither is set" if steps is None else "both are set"
            found.append(
                f"{source}: train.steps, train.epochs: {state}; accepted: exactly one of them, the other null or absent"
            )
    size, uneven = parsed.get("train.batch_size", world_size), parsed.get("train.uneven", True)
    if size % world_size and not uneven:
        below = size // world_size * world_size
        multiples = " or ".join(str(fit) for fit in (below, below + world_size) if fit)
        divisors = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        found.append(
            f"{source}: train.batch_size: found {size}, which {world_size} processes cannot share equally; "
            f"accepted: a multiple of {world_size}, such as {multiples}; or start {divisors} processes; "
            f"or set train.uneven=true"
        )
    if size < world_size and uneven and not parsed.get("train.sync_bn", True):
        found.append(
            f"{source}: train.batch_size: found {size} for {world_size} processes without train.sync_bn, whose "
            f"BatchNorm cannot do without images; accepted: {world_size} or more, or train.sync_bn=true"
        )
    if parsed.get("data.test") and parsed.get("data.test") == parsed.get("data.val"):
        found.append(
            f"{source}: data.test: found '{parsed['data.test']}', as in data.val; accepted: another split, or null"
        )
    crops = [parsed.get(key, "wrong by itself") for key in ("eval.crop", "data.crop")]
    if parsed.get("eval.preset") == "center_crop" and crops == [None, None]:
        found.append(
            f"{source}: eval.crop: missing, and so is data.crop; accepted for eval.preset=center_crop: [height, width]"
        )
    for key, checks in (("data.name", _data_checks), ("loss.name", _loss_checks), ("model.name", _model_checks)):
        if name := parsed.get(key):
            found += checks(name, parsed, source)
    return found


def _data_checks(name: str, parsed: Mapping[str, Any], source: str) -> list[str]:
    """Keys that a data set does not take, or cannot do without."""
    found: list[str] = []
    own = DATA_OPTIONS.get(name, ("classes", "options"))
    for key in DATA_KEYS:
        if key not in own and parsed.get(f"data.{key}") is not None:
            owners = ", ".join(other for other, keys in DATA_OPTIONS.items() if key in keys)
            where = owners if owners else "a data set of your own"
            found.append(f"{source}: data.{key}: {name} has no such key; remove it (it is for {where})")
    names, values = parsed.get("data.classes"), parsed.get("data.values")
    if name == "folder" and "data.classes" in parsed and names is None:
        found.append(f"{source}: data.classes: missing; accepted: a list of names, such as [background, road]")
    if names and values is not None:
        try:
            pixel_classes(names, values)
        except ValueError as error:
            found.append(f"{source}: data.values: {error}")
    if parsed.get("data.resize") == "device" and parsed.get("data.jitter"):
        found.append(
            f"{source}: data.resize: found device, but data.jitter changes colours after the resize; accepted: cpu, or "
            "data.jitter=null"
        )
    if parsed.get("data.val_fraction") and parsed.get("data.train") == parsed.get("data.val"):
        found.append(
            f"{source}: data.val: found '{parsed['data.val']}', as in data.train; accepted: a name for each share"
        )
    return found


def _loss_checks(name: str, parsed: Mapping[str, Any], source: str) -> list[str]:
    """A loss that is added to itself, and options that no chosen loss has."""
    found: list[str] = []
    added = [loss for loss in LOSS_OPTIONS if parsed.get(f"loss.add.{loss}") is not None]
    if name in added:
        found.append(f"{source}: loss.add.{name}: {name} is loss.name already, with weight 1; remove one of them")
    chosen = dict.fromkeys([name, *added])
    for option in dict.fromkeys(option for options in LOSS_OPTIONS.values() for option in options):
        owners = [loss for loss, options in LOSS_OPTIONS.items() if option in options]
        if parsed.get(f"loss.{option}") is not None and not chosen.keys() & set(owners):
            have = "has" if len(chosen) == 1 else "have"
            found.append(
                f"{source}: loss.{option}: {' and '.join(chosen)} {have} no such option; remove it "
                f"(an option of {', '.join(owners)})"
            )
    return found


def _model_checks(name: str, parsed: Mapping[str, Any], source: str) -> list[str]:
    """Options and weights that a network does not have."""
    found: list[str] = []
    own = MODEL_OPTIONS.get(name, ("options",))
    for option in (*MODEL_KEYS, "options"):
        if option not in own and parsed.get(f"model.{option}") is not None:
            owners = ", ".join(model for model, options in MODEL_OPTIONS.items() if option in options)
            where = f"an option of {owners}" if owners else "for a network of your own"
            remedy = "; write it under model.options" if "options" in own else ""
            found.append(f"{source}: model.{option}: {name} has no such option; remove it ({where}){remedy}")
    weights = parsed.get("model.weights")
    sets = [key for key, models in PRETRAINED.items() if name in models]
    if name == "linknet" and parsed.get("model.encoder") == "plain":
        sets = []
    if weights in PRETRAINED and weights not in sets:
        accepted = ", ".join([*sets, "a file", "null"])
        found.append(
            f"{source}: model.weights: found {weights}, which does not exist for this {name}; accepted: {accepted}"
        )
    return found
