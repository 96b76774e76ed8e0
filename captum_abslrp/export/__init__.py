"""Explanations as files that run without this package: ``.pt2`` for PyTorch and ONNX.

A file contains the model, its explanation and the metadata to use both. It needs no Captum and no timm. A
``.pt2`` file needs PyTorch, an ``.onnx`` file a runtime such as onnxruntime.

Axes: B samples, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import copy
import io
import json
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from captum_abslrp import __version__
from captum_abslrp.attribution import AbsLRP
from captum_abslrp.engine.errors import UnsupportedCallError
from captum_abslrp.export import onnx_file
from captum_abslrp.export.preprocessing import Preprocessing
from captum_abslrp.files import replaced
from captum_abslrp.inspection import stem_stride
from captum_abslrp.program import Program
from captum_abslrp.seeds import DEFAULT, Contrast, Default

__all__ = ["METADATA", "Preprocessing", "save_explainer"]

METADATA = "captum_abslrp.json"
"""Name of the metadata, as an extra file of a ``.pt2`` file and as a metadata property of an ONNX model."""

FORMATS = ("pt2", "onnx")
TOLERANCE = 1e-2
"""Differences that a saved program may have, as parts of the largest value."""


class _Explainer(nn.Module):
    """A program that takes one class per sample."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.explain = program.graph

    def forward(self, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        # The graph reads memory in the order of the example.
        image = image.clone(memory_format=torch.contiguous_format)
        scores, relevance = self.explain(image, target.view(-1, 1))
        return scores, relevance


def save_explainer(
    attributor: AbsLRP,
    file: str | Path | BinaryIO,
    inputs: Tensor,
    target: int = 0,
    *,
    format: str | None = None,
    name: str | None = None,
    class_names: Sequence[str] | None = None,
    preprocessing: Preprocessing | str | None = None,
    contrast: Contrast | Default = DEFAULT,
    combine: str | Default = DEFAULT,
    guide: nn.Module | None = None,
) -> dict[str, Any]:
    """Save the explanation of a model as one file that runs without this package.

    The program in the file takes ``image``, a batch with the shape of `inputs`, and ``target``, one class per
    sample (B,), int64. It returns ``scores``, the output of the model (B, K, ...), and ``relevance``, the map
    of each class with the shape of `inputs`. The map is NaN where ``attribute`` would raise an error, see
    :meth:`Program.forward <captum_abslrp.program.Program.forward>`. There are no warnings.

    Args:
        attributor: explains the model. Model and inputs must be on the CPU.
        file: path that ends in ``.pt2`` or ``.onnx``, or a binary file object. A file is replaced only when
            the new one is complete.
        inputs: an example, (B, C, H, W) or another shape. It fixes the shape, the dtype and the batch size.
        target: a class for the example.
        format: ``"pt2"`` or ``"onnx"``; required for a file object.
        name: name of the model for the metadata; by default the name of its class.
        class_names: names of the K classes for the metadata.
        preprocessing: how an image becomes the input, or a text that says so, for the metadata.
        contrast, combine, guide: as in :meth:`AbsLRP.trace <captum_abslrp.AbsLRP.trace>`; they are fixed.

    Returns:
        The metadata. They are stored in the file as JSON under the name :data:`METADATA`.

    Raises:
        TypeError: if `attributor` is not an AbsLRP or LRP, or `inputs` is not a tensor.
        ValueError: if the format is unknown, the number of names is not K, the model is not on the CPU, its
            operations depend on values, or it cannot be converted to ONNX, which needs float32 or float16.
        ModuleNotFoundError: if a package that ONNX requires is missing.
        RuntimeError: if the saved program computes other scores or another map.
        IndexError, NotImplementedError, FloatingPointError: as
            :meth:`AbsLRP.trace <captum_abslrp.AbsLRP.trace>`.
        OSError: if the file cannot be written.

    Example:
        >>> import io
        >>> model = timm.create_model("test_resnet").eval()
        >>> file = io.BytesIO()
        >>> about = save_explainer(AbsLRP(model), file, torch.rand(1, 3, 160, 160), format="pt2")
        >>> about["outputs"]
        {'scores': [1, 1000], 'relevance': [1, 3, 160, 160]}
        >>> program = torch.export.load(io.BytesIO(file.getvalue())).module()
        >>> scores, relevance = program(torch.rand(1, 3, 160, 160), torch.tensor([7]))
        >>> relevance.shape
        torch.Size([1, 3, 160, 160])
    """
    format = _format(file, format)
    if format == "onnx":
        onnx_file.check_installed()
    _check_given(attributor, inputs, format)
    # Opening the file first finds a missing folder before minutes of work.
    with replaced(Path(file)) if isinstance(file, (str, Path)) else nullcontext(file) as opened:
        inputs = inputs.detach().contiguous()
        program = attributor.trace(inputs, target, contrast=contrast, combine=combine, guide=guide)
        explainer = _Explainer(program)
        targets = torch.full((len(inputs),), target)
        references = _references(explainer, inputs, targets)
        about = _about(
            attributor,
            inputs,
            references[0].scores,
            name,
            class_names,
            preprocessing,
            contrast,
            combine,
        )
        if format == "onnx":
            onnx_file.prepare(program.graph)
        with torch.no_grad():
            exported = torch.export.export(explainer, (inputs, targets))
        _forget_sources(exported)
        content, run = _onnx(exported, about) if format == "onnx" else _pt2(exported, about)
        for reference in references:
            _check(run, reference)
        opened.write(content)
    return about


def _onnx(exported: ExportedProgram, about: dict[str, Any]) -> tuple[bytes, Any]:
    """Return the content of a file and a function that runs it; `about` gets the opset."""
    about["versions"]["opset"] = onnx_file.OPSET
    content = onnx_file.of(exported, METADATA, json.dumps(about))
    return content, onnx_file.runner(content)


def _pt2(exported: ExportedProgram, about: dict[str, Any]) -> tuple[bytes, Any]:
    """Return the content of a file and a function that runs it."""
    saved = io.BytesIO()
    with warnings.catch_warnings():  # about constants that are parts of others
        warnings.filterwarnings("ignore", "No complete tensor found")
        torch.export.save(exported, saved, extra_files={METADATA: json.dumps(about)})
    content = saved.getvalue()
    return content, torch.export.load(io.BytesIO(content)).module()


def _format(file: Any, format: str | None) -> str:
    """Return the format to write; raise ValueError if it is unknown.

    If `format` is None, the end of the path decides.
    """
    if format is None and isinstance(file, (str, Path)):
        format = Path(file).suffix.removeprefix(".").lower()
        if format not in FORMATS:
            raise ValueError(
                f"Expected `file` to end in .pt2 or .onnx, but got {str(file)!r}. Rename it, or pass "
                '`format="pt2"` or `format="onnx"`.'
            )
    if format not in FORMATS:
        raise ValueError(f"Expected `format` to be 'pt2' or 'onnx', but got {format!r}.")
    return format


def _check_given(attributor: Any, inputs: Any, format: str) -> None:
    if not isinstance(attributor, AbsLRP):
        raise TypeError(
            f"Expected `attributor` to be an AbsLRP or LRP, but got {type(attributor).__name__}."
        )
    if not isinstance(inputs, Tensor):
        raise TypeError(f"Expected `inputs` to be one tensor, but got {type(inputs).__name__}.")
    if format == "onnx" and inputs.dtype not in (torch.float32, torch.float16):
        raise ValueError(
            f"Expected inputs of float32 or float16 for ONNX, but got {inputs.dtype}. Call `model.float()` "
            "and `inputs.float()`, or save a .pt2 file."
        )
    for tensor in (inputs, *attributor.model.parameters(), *attributor.model.buffers()):
        if tensor.device.type != "cpu":
            raise ValueError(
                f"Expected the model and `inputs` to be on the CPU, but got a tensor on {tensor.device}. "
                "Call `model.cpu()` and `inputs.cpu()`."
            )


def _about(
    attributor: AbsLRP,
    inputs: Tensor,
    scores: Tensor,
    name: str | None,
    class_names: Sequence[str] | None,
    preprocessing: Preprocessing | str | None,
    contrast: Any,
    combine: Any,
) -> dict[str, Any]:
    """The metadata of a file."""
    if class_names is not None and (scores.dim() < 2 or len(class_names) != scores.shape[1]):
        raise ValueError(
            f"Expected `class_names` to have one name per class, but got {len(class_names)} names for scores "
            f"of shape {tuple(scores.shape)}."
        )
    smoothing = 1
    if inputs.dim() == 4:
        with suppress(UnsupportedCallError):
            smoothing = stem_stride(attributor.model, inputs)
    attributor = copy.copy(attributor)  # whose settings are those of this file
    if not isinstance(contrast, Default):
        attributor.contrast = contrast
    if not isinstance(combine, Default):
        attributor.combine = combine
    contrast = attributor.contrast
    if isinstance(preprocessing, Preprocessing):
        preprocessing = preprocessing.as_dict()  # type: ignore[assignment]
    return {
        "format": 1,
        "model": name or type(attributor.model).__name__,
        "method": repr(attributor),
        "contrast": contrast if isinstance(contrast, (int, str, type(None))) else str(contrast),
        "combine": None if contrast is None else attributor.combine,
        "inputs": {"image": [*inputs.shape], "target": [len(inputs)]},
        "outputs": {"scores": [*scores.shape], "relevance": [*inputs.shape]},
        "dtype": str(inputs.dtype).removeprefix("torch."),
        "class_names": None if class_names is None else [*class_names],
        "preprocessing": preprocessing,
        "smoothing": smoothing,
        "versions": {"captum-abslrp": __version__, "torch": torch.__version__},
    }


def _forget_sources(exported: ExportedProgram) -> None:
    """Remove from a graph where its nodes come from, which names files of this machine."""
    for module in exported.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node"):
                    node.meta.pop(key, None)


class _Reference(NamedTuple):
    """What a saved program has to return."""

    inputs: Tensor
    targets: Tensor
    scores: Tensor
    relevance: Tensor


def _references(explainer: nn.Module, inputs: Tensor, targets: Tensor) -> list[_Reference]:
    """The maps of the example, and of another input for its predicted classes."""
    other = inputs.flip(-1)
    with torch.no_grad():
        scores, relevance = explainer(inputs, targets)
        predicted = explainer(other, targets)[0]
        predicted = predicted.flatten(2).mean(2) if predicted.dim() > 2 else predicted
        others = predicted.argmax(1) if predicted.dim() == 2 else targets
        found = explainer(other, others)
        if not found[1].isfinite().all():  # such as the class that is the contrast
            others, found = targets, explainer(other, targets)
    return [_Reference(inputs, targets, scores, relevance), _Reference(other, others, *found)]


def _check(run: Any, reference: _Reference) -> None:
    """Compare what a saved program returns with the traced program."""
    with torch.no_grad():
        found = run(reference.inputs, reference.targets)
    pairs = zip(("scores", "map"), found, (reference.scores, reference.relevance), strict=True)
    for name, value, expected in pairs:
        largest = float(expected.nan_to_num().abs().max())
        if not torch.allclose(value, expected, rtol=0, atol=TOLERANCE * largest, equal_nan=True):
            away = float((value - expected).abs().max()) / largest if largest else torch.inf
            raise RuntimeError(
                f"Expected the saved program to reproduce the {name}, but the largest difference is "
                f"{away:.1%} of the largest value. Either rounding changes it as much, or an operator is "
                "computed differently. Save it in the other format. If the weights are trained, report "
                "the model."
            )
