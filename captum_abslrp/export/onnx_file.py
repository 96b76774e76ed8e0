"""Explanations as ONNX models."""

from __future__ import annotations

import importlib.util
import io
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

__all__ = ["OPSET", "check_installed", "of", "prepare", "runner"]

OPSET = 18
LARGEST = 2**31 - 2**24
"""Maximum number of bytes of all weights: a file in the format of ONNX has at most 2 GB."""
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LARGEST_FOLDED = 2**14
"""Maximum number of bytes of a constant that is computed in advance."""
LONGEST_SUM = 64
"""Maximum number of elements of a sum."""

_ATEN = torch.ops.aten


def check_installed() -> None:
    """Raise ModuleNotFoundError if a package that ONNX requires is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"Expected {', '.join(PACKAGES)} to be installed for ONNX, but {missing[0]} is not. Run "
            "`pip install 'captum-abslrp[export]'`."
        )


def prepare(graph: GraphModule) -> None:
    """Write operators that the conversion would keep as others, in place."""
    for node in graph.graph.nodes:
        if node.target in COMPOSITES:
            with graph.graph.inserting_before(node):
                given = [torch.fx.Proxy(argument) for argument in node.args]
                node.replace_all_uses_with(COMPOSITES[node.target](*given).node)
            graph.graph.erase_node(node)
    graph.recompile()


def of(exported: ExportedProgram, key: str, about: str) -> bytes:
    """Convert an exported explanation to an ONNX model.

    Args:
        exported: a program that maps image and target to scores and relevance.
        key, about: a metadata property of the model.

    Raises:
        ValueError: if ONNX lacks an operator, or the model is larger than 2 GB.
    """
    import onnx_ir
    from onnx_ir.passes import common
    from onnxscript import optimizer

    table = torch.export.default_decompositions()
    table.update(DECOMPOSITIONS)
    with warnings.catch_warnings(), _quiet(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                exported.run_decompositions(table),
                dynamo=True,
                opset_version=OPSET,
                input_names=["image", "target"],
                output_names=["scores", "relevance"],
                optimize=False,  # it would fold weights, and store them twice
                verbose=False,
            )
        except (torch.onnx.OnnxExporterError, RuntimeError, NotImplementedError) as error:
            raise ValueError(
                f"Expected an explanation of operators that ONNX has, but got {_reason(error)}. Save a .pt2 "
                "file."
            ) from error
        assert program is not None
        model = program.model
        # Not `optimize_ir`: its rewriting rules take minutes for thousands of nodes.
        common.InlinePass()(model)
        optimizer.fold_constants(
            model,
            onnx_shape_inference=False,
            input_size_limit=LARGEST_FOLDED,
            output_size_limit=LARGEST_FOLDED,
        )
        for simplify in (
            common.IdentityEliminationPass(),
            common.CommonSubexpressionEliminationPass(),
            common.RemoveUnusedNodesPass(),
            common.ClearMetadataAndDocStringPass(),
        ):
            simplify(model)
    model.metadata_props[key] = about
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    if size > LARGEST:
        raise ValueError(
            f"Expected less than 2 GB of weights, the limit of ONNX files, but got {size / 1e9:.1f} GB. "
            "Save a .pt2 file."
        )
    return onnx_ir.to_proto(model).SerializeToString()


def runner(content: bytes, threads: int | None = None) -> Callable[[Tensor, Tensor], list[Tensor]]:
    """Return a function that runs an ONNX model in onnxruntime, with the threads of PyTorch by default."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(image: Tensor, target: Tensor) -> list[Tensor]:
        given = {"image": image.detach().numpy(), "target": target.numpy()}
        return [torch.from_numpy(value) for value in session.run(None, given)]

    return run


def _reason(error: BaseException) -> str:
    """What the innermost error says, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:200].rstrip(".")


class _quiet:
    """Hide log messages of the exporter."""

    names = ("torch.onnx", "onnxscript", "onnx_ir")

    def __enter__(self) -> None:
        self.levels = [logging.getLogger(name).level for name in self.names]
        for name in self.names:
            logging.getLogger(name).setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        for name, level in zip(self.names, self.levels, strict=True):
            logging.getLogger(name).setLevel(level)


def _copysign(a: Tensor, b: Tensor) -> Tensor:
    """The magnitude of `a` with the sign of `b`, also where `b` is a zero with a sign."""
    return torch.where((b < 0) | (b.reciprocal() < 0), -a.abs(), a.abs())


def _convolution_backward(
    gradient: Tensor,
    inputs: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> Any:
    """The gradient of a convolution with respect to its input: the transposed convolution."""
    if output_mask[1] or output_mask[2]:
        return NotImplemented
    if transposed:
        back = _ATEN.convolution(
            gradient, weight, None, stride, padding, dilation, False, output_padding, groups
        )
        return back, None, None
    covered = [
        (size - 1) * step - 2 * pad + spread * (kernel - 1) + 1
        for size, step, pad, spread, kernel in zip(
            gradient.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True
        )
    ]
    rest = [size - c for size, c in zip(inputs.shape[2:], covered, strict=True)]
    back = _ATEN.convolution(gradient, weight, None, stride, padding, dilation, True, rest, groups)
    return back, None, None


def _avg_pool2d_backward(
    gradient: Tensor,
    inputs: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Any:
    """The gradient of average pooling: each output spreads over its window."""
    kernel = [*kernel_size] * (3 - len(kernel_size))
    step = [*(stride or kernel)] * (3 - len(stride or kernel))
    pad = [*padding] * (3 - len(padding))
    window = gradient.new_ones(1, 1, *kernel)
    if divisor_override is not None or count_include_pad:
        scaled = gradient / (divisor_override or kernel[0] * kernel[1])
    else:
        inside = gradient.new_ones(1, 1, *inputs.shape[-2:])
        scaled = gradient / _ATEN.convolution(
            inside, window, None, step, pad, [1, 1], False, [0, 0], 1
        )
    covered = [
        (size - 1) * s - 2 * p + k
        for size, s, p, k in zip(gradient.shape[-2:], step, pad, kernel, strict=True)
    ]
    rest = [size - c for size, c in zip(inputs.shape[-2:], covered, strict=True)]
    if ceil_mode and min(rest) < 0:
        return NotImplemented
    each = scaled.reshape(-1, 1, *gradient.shape[-2:])
    back = _ATEN.convolution(each, window, None, step, pad, [1, 1], True, rest, 1)
    return back.reshape(inputs.shape)


def _silu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    gate = x.sigmoid()
    return gradient * gate * (1 + x * (1 - gate))


def _mish_backward(gradient: Tensor, x: Tensor) -> Tensor:
    gate = torch.nn.functional.softplus(x).tanh()
    return gradient * (gate + x * x.sigmoid() * (1 - gate * gate))


def _spread(gradient: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """The gradient of a resizing, from what it makes of unit vectors along each axis: (in, 1, out, 1)."""
    rows, columns = height.flatten(1), width.flatten(1)
    return rows @ gradient @ columns.T


def _upsample_bilinear2d_backward(
    gradient: Tensor,
    output_size: Sequence[int],
    input_size: Sequence[int],
    align_corners: bool,
    scales_h: float | None = None,
    scales_w: float | None = None,
) -> Tensor:
    def along(axis: int, scale: float | None) -> Tensor:
        unit = torch.eye(input_size[2 + axis], dtype=gradient.dtype)[:, None, :, None]
        size = [output_size[axis], 1]
        return _ATEN.upsample_bilinear2d(unit, size, align_corners, scale, None)

    return _spread(gradient, along(0, scales_h), along(1, scales_w))


def _upsample_nearest2d_backward(
    gradient: Tensor,
    output_size: Sequence[int],
    input_size: Sequence[int],
    scales_h: float | None = None,
    scales_w: float | None = None,
) -> Tensor:
    def along(axis: int, scale: float | None) -> Tensor:
        unit = torch.eye(input_size[2 + axis], dtype=gradient.dtype)[:, None, :, None]
        return _ATEN.upsample_nearest2d(unit, [output_size[axis], 1], scale, None)

    return _spread(gradient, along(0, scales_h), along(1, scales_w))


def _is_view(x: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None) -> bool:
    """Whether the elements of a strided view are those of `x`, in order."""
    expected = 1
    for length, step in zip(reversed(size), reversed(stride), strict=True):
        if length != 1 and step != expected:
            return False
        expected *= length
    return not offset and expected == x.numel() and x.is_contiguous()


def _as_strided(
    x: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> Any:
    return x.reshape(size) if _is_view(x, size, stride, storage_offset) else NotImplemented


def _as_strided_scatter(
    x: Tensor,
    src: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int | None = None,
) -> Any:
    return src.reshape(x.shape) if _is_view(x, size, stride, storage_offset) else NotImplemented


def _zeros(size: Sequence[int], *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Tensor:
    return torch.zeros(size, dtype=dtype)


def _full_like(
    x: Tensor, value: Any, *_: Any, dtype: torch.dtype | None = None, **__: Any
) -> Tensor:
    return torch.full(x.shape, value, dtype=dtype or x.dtype)


def _zeros_like(x: Tensor, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Tensor:
    return torch.zeros(x.shape, dtype=dtype or x.dtype)


def _new_zeros(
    x: Tensor, size: Sequence[int], *_: Any, dtype: torch.dtype | None = None, **__: Any
) -> Tensor:
    return torch.zeros(size, dtype=dtype or x.dtype)


def _sum(
    x: Tensor,
    dims: Sequence[int] | None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Any:
    """A long sum as sums of short ones: onnxruntime adds all elements in turn, which rounds more."""
    axes = sorted(d % x.dim() for d in dims or range(x.dim()))
    if dtype is not None or math.prod(x.shape[d] for d in axes) <= LONGEST_SUM:
        return NotImplemented
    last = axes[-1]
    size = x.shape[last]
    part = next((n for n in range(LONGEST_SUM, 1, -1) if size % n == 0), 1)
    if size > LONGEST_SUM and part > 1:
        parts = x.reshape(*x.shape[:last], size // part, part, *x.shape[last + 1 :])
        return parts.sum(last + 1).sum(axes, keepdim)
    return x.sum(last, keepdim).sum(axes[:-1], keepdim) if len(axes) > 1 else NotImplemented


def _mean(
    x: Tensor,
    dims: Sequence[int] | None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Any:
    axes = [*(dims or range(x.dim()))]
    return x.sum(axes, keepdim, dtype=dtype) / math.prod(x.shape[d] for d in axes)


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    _ATEN.copysign.Tensor: _copysign,
    _ATEN.sum.dim_IntList: _sum,
    _ATEN.mean.dim: _mean,
    _ATEN.convolution_backward.default: _convolution_backward,
    _ATEN.avg_pool2d_backward.default: _avg_pool2d_backward,
    _ATEN.upsample_bilinear2d_backward.default: _upsample_bilinear2d_backward,
    _ATEN.upsample_nearest2d_backward.default: _upsample_nearest2d_backward,
    _ATEN.full_like.default: _full_like,
    _ATEN.as_strided.default: _as_strided,
    _ATEN.as_strided_scatter.default: _as_strided_scatter,
    # Memory without values: the graph writes all of it before it reads it.
    _ATEN.empty.memory_format: _zeros,
    _ATEN.empty_permuted.default: _zeros,
    _ATEN.empty_strided.default: _zeros,
    _ATEN.empty_like.default: _zeros_like,
    _ATEN.new_empty.default: _new_zeros,
    _ATEN.new_empty_strided.default: _new_zeros,
}
"""Operators that ONNX lacks, as operators that it has."""

COMPOSITES: dict[Any, Callable[[Any, Any], Any]] = {
    _ATEN.silu_backward.default: _silu_backward,
    _ATEN.mish_backward.default: _mish_backward,
}
"""Operators that ONNX lacks and that `run_decompositions` keeps, because PyTorch has a composite kernel."""
