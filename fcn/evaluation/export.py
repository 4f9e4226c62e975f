"""Export a checkpoint to one file that runs without fcn: pixels in, classes out, normalisation included.

`.pt2` is a program of `torch.export`, `.onnx` is for other engines. Both take any number of images of any size.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.nn import functional

from fcn.errors import InputError
from fcn.evaluation.inference import Trained, load_trained
from fcn.files import replacing
from fcn.models import DoublingConv2d

PACKAGES = {".pt2": (), ".onnx": ("onnx", "onnxscript")}
"""Packages that writing a format needs besides PyTorch."""
INFORMATION = "fcn.json"
"""The extra file of a `.pt2` that describes the program."""
INPUT, DIMENSIONS = "images", ("batch", "height", "width")
CHECKED = ((1, 1, 1), (1, 97, 131), (2, 64, 96), (3, 33, 50))
"""Images, height and width of the batches on which a new file is tried: odd and even, one and several."""
TOLERATED = 1e-3
"""Fraction of pixels that may get another class from another engine, which rounds differently."""

Program = Callable[[torch.Tensor], torch.Tensor]
"""images (N, 3, H, W) uint8 → classes (N, H, W) uint8 or logits (N, C, H, W)."""


class Segmenter(nn.Module):
    """The network with normalisation and argmax, as in `fcn predict`: an image whole, once, at its own size.

    It computes in float32, or in float64 after fp64 training. The rounding of bf16 and fp16 depends on the device.
    """

    def __init__(self, trained: Trained, logits: bool) -> None:
        super().__init__()
        self.network, self.precision, self.logits = trained.model.requires_grad_(False), trained.precision, logits
        self._to_input(torch.zeros(1, 3, 1, 1, dtype=torch.uint8))  # caches constants, which must not be symbolic

    def _to_input(self, images: torch.Tensor) -> torch.Tensor:
        return self.precision.to_input(images.permute(0, 2, 3, 1).contiguous())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images (N, 3, H, W) uint8 RGB → classes (N, H, W) uint8, or logits (N, C, H, W)."""
        logits = self.network(self._to_input(images))
        return logits if self.logits else logits.argmax(dim=1).to(torch.uint8)


def export_checkpoint(checkpoint: str, output: Path, *, logits: bool, force: bool, trusted: Sequence[str] = ()) -> str:
    """Write the network of a checkpoint as a program, and compare the file's results with the network's.

    Args:
        checkpoint: a file, or a run directory for its newest one.
        output: `.pt2` or `.onnx`; it gets its name only after the comparison.
        logits: the program returns logits (N, C, H, W) instead of classes.
        force: overwrite an existing file.
        trusted: import paths of code that the checkpoint may run.

    Returns:
        A description of what was written and compared.

    Raises:
        InputError: the checkpoint cannot be used, the output cannot be written, a package is missing, or a user's own
            network behaves differently as a program; PyTorch is older than 2.14.
    """
    _check_output(output, force)
    trained = load_trained(checkpoint, [], torch.device("cpu"), trusted)
    segmenter = Segmenter(trained, logits).eval()
    information = describe(trained, logits)
    write, read = (_pt2, _read_pt2) if output.suffix == ".pt2" else (_onnx, _read_onnx)
    for layer in segmenter.modules():
        if isinstance(layer, DoublingConv2d):
            layer.constant_padding = output.suffix == ".onnx"
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's to itself
            content = write(trace(segmenter), information)
            with replacing(output) as file:
                file.write(content)
                file.flush()
                compared = _compare(segmenter, read(Path(file.name)), exact=output.suffix == ".pt2")
    except OSError as error:
        raise InputError(
            f"--output {output}: cannot be written ({error}); make room there, or choose another file"
        ) from None
    except InputError:
        raise
    except Exception as error:
        name = trained.config.model.name
        if ":" not in name:
            raise
        reason = (str(error).strip() or "no text").splitlines()[0]
        reason = f"{type(error).__name__}: {reason}"
        raise InputError(
            f"{checkpoint}: model.name={name} cannot be exported for images of every size ({reason}); accepted: a "
            f"network whose forward takes no branch on sizes or values"
        ) from None
    made = (
        f"{output}: {information['input']} → {information['output']}; step {trained.step}, {len(content) / 1e6:.1f} MB"
    )
    return f"{made}\n{compared}"


def _check_output(output: Path, force: bool) -> None:
    suffix = output.suffix
    if suffix not in PACKAGES:
        raise InputError(f"--output {output}: found the type {suffix!r}; accepted: a name that ends in .pt2 or .onnx")
    missing = [name for name in PACKAGES[suffix] if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"--output {output}: {suffix} needs {' and '.join(PACKAGES[suffix])}, found no {', no '.join(missing)}; "
            f"pip install {' '.join(PACKAGES[suffix])}, or choose .pt2"
        )
    if not output.parent.is_dir():
        raise InputError(f"--output {output}: no such folder; make it first")
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        raise InputError(f"--output {output}: cannot be written; give a file in a folder that you may write to")
    if output.exists() and not force:
        raise InputError(f"--output {output}: exists; choose another name, or overwrite with --force")


def describe(trained: Trained, logits: bool) -> dict[str, Any]:
    """The description in the file: inputs, outputs, and the meaning of the numbers."""
    classes = len(trained.classes)
    output = f"logits ({'float64' if trained.precision.name == 'fp64' else 'float32'} N, {classes}, H, W)"
    return {
        "input": f"{INPUT} (uint8 RGB N, 3, H, W), of any N, H and W from 1 up",
        "output": output if logits else "classes (uint8 N, H, W)",
        "classes": list(trained.classes.names),
        "palette": [list(colour) for colour in trained.classes.palette],
        "model": trained.config.model.name,
        "step": trained.step,
    }


def trace(segmenter: Segmenter) -> ExportedProgram:
    """Trace a network into a program for any number of images of any size, without a guard on a size except "at least
    1".

    Sizes are symbolic, so a branch on one is an error, not a silent specialisation.

    Raises:
        InputError: PyTorch is older than 2.14.
    """
    example = torch.zeros(2, 3, 64, 96, dtype=torch.uint8)
    program = torch.export.export(segmenter, (example,), dynamic_shapes=_any_size())
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # they contain paths of this machine
    return program


def _any_size() -> Any:
    try:
        from torch.fx.experimental.dynamic_spec import ParamsSpec, ShapesSpec, ShapeVar, TensorSpec
    except ImportError:
        raise InputError(
            f"export: found PyTorch {torch.__version__}, whose programs do not take images of every size; accepted: "
            f"2.14 or newer; the checkpoint can be exported on any machine that has it"
        ) from None
    batch, height, width = (ShapeVar(name, min=1) for name in DIMENSIONS)
    return ShapesSpec(params=ParamsSpec({INPUT: TensorSpec([batch, 3, height, width])}))


# --- formats -------------------------------------------------------------------------------------------------------


def _pt2(program: ExportedProgram, information: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={INFORMATION: json.dumps(information)})
    return file.getvalue()


def _read_pt2(path: Path) -> Program:
    with path.open("rb") as file:
        return torch.export.load(io.BytesIO(file.read())).module()


def _onnx(program: ExportedProgram, information: dict[str, Any]) -> bytes:
    name = information["output"].split()[0]
    made = torch.onnx.export(program, (), dynamo=True, verbose=False, input_names=[INPUT], output_names=[name])
    model = made.model_proto
    for key, value in information.items():
        model.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    symbols = [size.dim_param for size in model.graph.input[0].type.tensor_type.shape.dim if size.dim_param]
    names = dict(zip(symbols, DIMENSIONS, strict=True))
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = re.sub(r"\w+", lambda match: names.get(match[0], match[0]), size.dim_param)
    return model.SerializeToString()


def _read_onnx(path: Path) -> Program | None:
    """None if onnxruntime is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])


# --- the comparison ------------------------------------------------------------------------------------------------


def _compare(segmenter: Segmenter, program: Program | None, exact: bool) -> str:
    """Compare a program with the network on batches of different sizes, except those that the network itself refuses.

    Args:
        exact: no bit may differ; else a few pixels may get another class.
    """
    if program is None:
        return "not compared with the checkpoint: onnxruntime is not installed"
    taken, differing = [], 0.0
    for shape in CHECKED:
        images = _blobs(*shape)
        try:
            expected = segmenter(images)
        except Exception:  # a user's own network may raise anything for a size that it does not take
            continue
        found = program(images)
        if segmenter.logits and not exact:
            expected, found = expected.argmax(dim=1), found.argmax(dim=1)
        name = "×".join(map(str, shape))
        share = (found != expected).double().mean().item() if found.shape == expected.shape else 1.0
        if share > (0 if exact else TOLERATED):
            raise InputError(
                f"the program does not do what the network does: {share:.2%} of its results differ on images of {name} "
                f"(N×H×W); accepted: {0 if exact else TOLERATED:.1%}; nothing was written"
            )
        taken.append(name)
        differing = max(differing, share)
    if not taken:
        raise ValueError("the network takes no images of " + ", ".join("×".join(map(str, shape)) for shape in CHECKED))
    how = f"{differing:.4%} of the pixels other than" if differing else "equal to"
    left_out = (
        f"; {len(CHECKED) - len(taken)} other sizes the network itself refuses" if len(taken) < len(CHECKED) else ""
    )
    return f"compared on images of {', '.join(taken)} (N×H×W): {how} the checkpoint's{left_out}"


def _blobs(count: int, height: int, width: int) -> torch.Tensor:
    """Soft spots of all colours, (N, 3, H, W) uint8, always the same."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, height // 12 + 2, width // 12 + 2, generator=generator)
    return (functional.interpolate(coarse, size=(height, width), mode="bilinear") * 255).to(torch.uint8)
