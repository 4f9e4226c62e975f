"""Load pretrained weights, torchvision's or from a file, and account for every tensor."""

from __future__ import annotations

import http.client
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from fcn.checkpoints.format import load_checkpoint, read_plain
from fcn.checkpoints.safetensors import read_safetensors
from fcn.config import PRETRAINED
from fcn.errors import InputError

Tensors = dict[str, torch.Tensor]
COUNTER = ".num_batches_tracked"
WRAPPERS = ("state_dict", "model", "model_state_dict", "net", "network", "params")
"""Keys under which training programs keep a state dict beside other things; the first that is there counts."""
MOST_WRAPPERS = 4
"""One around the other; a file may hold a dict that contains itself."""


def load_pretrained(model: nn.Module, name: str, weights: str, num_classes: int) -> list[str]:
    """Copy pretrained weights into a network of `fcn.models` or a user's own.

    It accepts fcn's checkpoints; .safetensors files; state dicts with the network's own names (torchvision's, for the
    ResNet FCNs), also inside {"model": …} or other `WRAPPERS`, and with the prefixes of DistributedDataParallel and
    torch.compile; and torchvision's classification networks, for their trunk. A file must contain every tensor of the
    network, or of the trunk. Only heads may differ: those whose shape depends on the number of classes, and the
    auxiliary one.

    Args:
        model: changed in place, after all checks have passed.
        name: `model.name` of the config.
        weights: `model.weights` of the config: imagenet, coco, or a file.
        num_classes: channels of the network's logits.

    Returns:
        Lines for the log: what was loaded, left out, and left as initialised, by name and shape.

    Raises:
        InputError: the weights do not exist or do not fit; the message lists names and shapes.
    """
    own = model.state_dict()
    source, found, unwrapped = _read(name, weights, own)
    found, trunk, left_out = _in_the_networks_names(found, own, source)
    wanted = [key for key in own if key.startswith(trunk)]
    reshaped = [key for key in wanted if key in found and found[key].shape != own[key].shape]
    heads, file_classes = _heads(reshaped, found, model, num_classes)
    missing = [key for key in wanted if key not in found and not _optional(key)]
    unexpected = [key for key in found if key not in own]
    aux = {key: found[key] for key in unexpected if key.startswith("aux_classifier.")}
    problems = [
        *_listed("missing", [f"{key} {_shape(own[key])}" for key in missing]),
        *_listed("unexpected", [f"{key} {_shape(found[key])}" for key in unexpected if key not in aux]),
        *_listed(
            "of another shape",
            [f"{key} {_shape(found[key])} instead of {_shape(own[key])}" for key in reshaped if key not in heads],
        ),
    ]
    if problems:
        raise InputError(
            f"model.weights: {source}: does not fit {name}: {'; '.join(problems)}; give a file of this network with "
            f"the same model.* options, or of torchvision's classification network for its trunk"
        )
    taken = [key for key in wanted if key in found and key not in heads]
    with torch.no_grad():
        for key in taken:
            own[key].copy_(found[key])
    lines = [f"weights from {source}: {len(taken)} of {len(own)} tensors"]
    if unwrapped:
        lines.append(f"taken from the file's {', '.join(unwrapped)}")
    if heads:
        lines.append(
            f"head re-initialised for {num_classes} classes, the file has {file_classes}: {_named(own, heads)}"
        )
    fresh = [key for key in own if key not in taken and key not in heads]
    counters = [key for key in fresh if key.endswith(COUNTER) and f"{key.removesuffix(COUNTER)}.running_mean" in taken]
    fresh = [key for key in fresh if key not in counters]
    if counters:
        lines.append(f"not in the file: {len(counters)} of BatchNorm's {COUNTER[1:]} (), which start at 0")
    if fresh:
        lines.append(f"not in the file, freshly initialised: {_named(own, fresh)}")
    if left_out | aux:
        lines.append(f"in the file, not in the network: {_named(left_out | aux, [*left_out, *aux])}")
    return lines


def _read(name: str, weights: str, own: Tensors) -> tuple[str, Tensors, list[str]]:
    """(name of the weights for messages, their tensors, what was taken off around them)."""
    if weights in PRETRAINED:
        enum = PRETRAINED[weights][name]
        from torchvision.models import get_weight

        path = _downloaded(enum, get_weight(enum).url)
        source = f"{enum} ({path})"
    else:
        path = Path(weights)
        source = weights
    if path.is_dir():
        raise InputError(f"model.weights: {path}: is a folder; give a file, such as {path}/checkpoints/best.pt")
    try:
        safe = path.suffix == ".safetensors"
        content = read_safetensors(path) if safe else read_plain(path)
        if isinstance(content, Mapping) and "format" in content and not safe:
            content = load_checkpoint(path)  # verified by its checksum
    except InputError as error:
        raise InputError(f"model.weights: {error}") from None
    return source, *_tensors(path, content, own)


def _downloaded(enum: str, url: str) -> Path:
    """The file in torch hub's folder, where torchvision keeps it, too."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not path.is_file():
        digest = re.search(r"-([0-9a-f]{8,})\.", path.name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), digest and digest.group(1))
        except (OSError, RuntimeError, http.client.HTTPException) as error:  # RuntimeError: not the name's checksum
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(
                f"model.weights: {enum} cannot be downloaded to {path} ({reason}); where there is no network, copy "
                f"{url} there by hand, or set TORCH_HOME to a folder that has it as hub/checkpoints/{path.name}"
            ) from None
    return path


def _tensors(path: Path, content: object, own: Tensors) -> tuple[Tensors, list[str]]:
    unwrapped = []
    for _ in range(MOST_WRAPPERS):
        found = content if isinstance(content, Mapping) else {}
        key = next((key for key in WRAPPERS if isinstance(found.get(key), Mapping)), None)
        if key is None:
            break
        unwrapped += [repr(key)] if "format" not in found else []  # fcn's own checkpoints are no surprise
        content = found[key]
    tensors = dict(content) if isinstance(content, Mapping) else {}
    named = all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in tensors.items())
    if not tensors or not named:
        raise InputError(
            f"model.weights: {path}: holds no weights; accepted: names and tensors, as model.state_dict() gives them"
        )
    for key, tensor in tensors.items():
        dense = tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_quantized or tensor.is_complex())
        if not dense or not torch.isfinite(tensor).all():
            raise InputError(
                f"model.weights: {path}: {key} {_shape(tensor)} is not a dense tensor of finite real numbers; give a "
                f"file in which all are"
            )
    prefixes = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile, in either order
    while prefix := next((p for p in prefixes if _all_have(p, tensors) and not _all_have(p, own)), None):
        tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
        unwrapped.append(f"names without {prefix!r}")
    return tensors, unwrapped


def _all_have(prefix: str, tensors: Tensors) -> bool:
    return all(key.startswith(prefix) for key in tensors)


def _in_the_networks_names(found: Tensors, own: Tensors, source: str) -> tuple[Tensors, str, Tensors]:
    """(tensors under the network's names, the prefix that they must fill, classifier tensors that are left out)."""
    if "features.0.weight" in found and "trunk.fc6.weight" in own:
        return *_from_vgg16(found, own), {key: found[key] for key in found if key.startswith("classifier.6.")}
    probe = "layer1.0.conv1.weight"
    prefix = next((key.removesuffix(probe) for key in own if key.endswith(f".{probe}")), None)
    if probe in found and probe not in own and prefix:
        rest = {key: tensor for key, tensor in found.items() if key in ("fc.weight", "fc.bias")}
        return {prefix + key: tensor for key, tensor in found.items() if key not in rest}, prefix, rest
    if not found.keys() & own.keys():
        raise InputError(
            f"model.weights: {source}: none of its {len(found)} tensors is in the network; the file begins with "
            f"{_named(found, list(found)[:3])}, the network with {_named(own, list(own)[:3])}"
        )
    return found, "", {}


def _from_vgg16(found: Tensors, own: Tensors) -> tuple[Tensors, str]:
    """torchvision's VGG16 as our trunk; its fully connected layers become fc6 (7×7) and fc7 (1×1)."""
    trunk = "trunk."
    convolutions = [key.removesuffix("weight") for key in own if re.match(r"trunk\.stages\..*weight$", key)]
    numbers = sorted({int(key.split(".")[1]) for key in found if key.startswith("features.")})
    renamed = {f"features.{number}.": ours for number, ours in zip(numbers, convolutions, strict=False)}
    renamed |= {"classifier.0.": f"{trunk}fc6.", "classifier.3.": f"{trunk}fc7."}
    tensors: Tensors = {}
    for key, tensor in found.items():
        layer, _, kind = key.rpartition(".")
        if layer == "classifier.6":
            continue
        ours = renamed.get(f"{layer}.", f"{layer}.") + kind
        if layer.startswith("classifier.") and ours in own and tensor.numel() == own[ours].numel():
            tensor = tensor.reshape(own[ours].shape)
        tensors[ours] = tensor
    return tensors, trunk


def _heads(reshaped: list[str], found: Tensors, model: nn.Module, num_classes: int) -> tuple[list[str], int | None]:
    """The reshaped tensors that differ only in the number of classes, and the number in the file."""
    by_classes: dict[int, list[str]] = {}
    own = model.state_dict()
    for key in reshaped:
        ours, theirs = own[key].shape, found[key].shape
        if len(ours) != len(theirs):
            continue
        transposed = isinstance(model.get_submodule(key.rpartition(".")[0]), nn.ConvTranspose2d)
        differing = [place for place in range(len(ours)) if ours[place] != theirs[place]]
        pairs = {(theirs[place], ours[place]) for place in differing}
        # Classes are output channels, of transposed convolutions also input channels; never a kernel's size.
        if max(differing) <= transposed and len(pairs) == 1 and ours[differing[0]] == num_classes:
            by_classes.setdefault(theirs[differing[0]], []).append(key)
    return (next(iter(by_classes.values())), next(iter(by_classes))) if len(by_classes) == 1 else ([], None)


def _optional(key: str) -> bool:
    """Old files lack BatchNorm's counters, on which nothing depends; some lack the auxiliary head."""
    return key.endswith(COUNTER) or key.startswith("aux_classifier.")


def _shape(tensor: torch.Tensor) -> str:
    return str(tuple(tensor.shape))


def _named(tensors: Mapping[str, torch.Tensor], keys: list[str]) -> str:
    return ", ".join(f"{key} {_shape(tensors[key])}" for key in keys)


def _listed(what: str, entries: list[str]) -> list[str]:
    more = f" and {len(entries) - 5} more" if len(entries) > 5 else ""
    return [f"{what}: {', '.join(entries[:5])}{more}"] if entries else []
