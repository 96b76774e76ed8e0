"""Detection of operations that attribution methods for modules do not handle.

Methods that modify the backward pass of modules silently return plain gradients for operations outside of
these modules. This module finds such operations in one forward pass, which intercepts all PyTorch
operations (of functions, methods, scripted code and `autograd.Function`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LINEAR", "MOVING", "Operation", "find_operation"]

MOVING = frozenset(
    """
    _reshape_alias _to_copy _unsafe_view alias as_strided cat clone constant_pad_nd contiguous copy detach
    expand fill flip gather index index_put index_select lift_fresh masked_fill narrow permute
    pixel_shuffle pixel_unshuffle native_channel_shuffle
    reflection_pad1d reflection_pad2d reflection_pad3d repeat
    replication_pad1d replication_pad2d replication_pad3d resize roll rot90 scatter select select_backward
    select_scatter slice slice_scatter split split_with_sizes split_with_sizes_copy squeeze stack t
    take transpose unbind unfold unsafe_split unsqueeze view where zero
    """.split()
)
"""ATen names of operations that only move and copy elements."""

LINEAR = MOVING | frozenset(
    """
    _adaptive_avg_pool2d _adaptive_avg_pool3d _batch_norm_no_update _native_batch_norm_legit_no_training
    _upsample_bicubic2d_aa _upsample_bilinear2d_aa add addmm addmv avg_pool2d avg_pool3d baddbmm bmm
    col2im convolution cudnn_batch_norm cumsum diagonal div dot grid_sampler_2d grid_sampler_3d im2col
    index_add lerp linear matmul mean mm mul mv native_batch_norm neg positive rsub scatter_add sub sum
    trace tril triu upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d
    upsample_nearest2d upsample_nearest3d upsample_trilinear3d
    """.split()
)
"""ATen names of operations that are affine in the arguments that may depend on inputs."""

# At most one of these arguments may depend on the inputs.
_FACTORS = {
    "addmm": ("mat1", "mat2"),
    "addmv": ("mat", "vec"),
    "baddbmm": ("batch1", "batch2"),
    "bmm": ("self", "mat2"),
    "convolution": ("input", "weight"),
    "dot": ("self", "tensor"),
    "linear": ("input", "weight"),
    "matmul": ("self", "other"),
    "mm": ("self", "mat2"),
    "mul": ("self", "other"),
    "mv": ("self", "vec"),
}

# None of these arguments may depend on the inputs.
_CONSTANTS = {
    "_batch_norm_no_update": ("weight", "running_mean", "running_var"),
    "_native_batch_norm_legit_no_training": ("weight", "running_mean", "running_var"),
    "cudnn_batch_norm": ("weight", "running_mean", "running_var"),
    "div": ("other",),
    "grid_sampler_2d": ("grid",),
    "grid_sampler_3d": ("grid",),
    "lerp": ("weight",),
    "native_batch_norm": ("weight", "running_mean", "running_var"),
}

# These operations use the shape and dtype of a tensor, but not its values.
_OF_SHAPE = frozenset(
    """
    empty_like full_like new_empty new_empty_strided new_full new_ones new_zeros ones_like rand_like
    randn_like randint_like zeros_like
    """.split()
)


@dataclass(frozen=True)
class Operation:
    """An operation and the module that calls it; prints as a description.

    Attributes:
        order: index of the operation in the forward pass.
        name: ATen name, for example ``"native_layer_norm"``.
        path: path of the module that calls it, for example ``"blocks.0.norm1"``.
        layer: the type of this module.
        trouble: the reason why this use is not allowed; empty for operations that are never allowed.
    """

    order: int
    name: str
    path: str
    layer: str
    trouble: str = ""

    def __str__(self) -> str:
        where = f"`{self.path}` ({self.layer})" if self.path else f"its own forward ({self.layer})"
        return f"`{self.name}`{self.trouble} in {where}"


def find_operation(
    model: nn.Module,
    inputs: Tensor,
    allowed: Collection[str],
    layers: Collection[nn.Module],
    *,
    products: bool = False,
) -> Operation | None:
    """Find the first operation that is not allowed and that the output of a model depends on.

    The model runs once, on the first sample. Pass a copy, because the model is modified.

    Args:
        model: a copy of a model; afterwards, its parameters do not require gradients.
        inputs: an example input, (B, ...).
        allowed: ATen names of allowed operations, such as :data:`LINEAR`.
        layers: modules inside which any operation is allowed.
        products: whether products and quotients of two factors that both depend on the input are allowed.

    Returns:
        The operation, or None if all are allowed. An operation is also not allowed if it cuts off gradients
        (`detach`, `no_grad`, `autograd.Function`), or if the output depends on its integer or boolean
        result or on a Python number.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.ReLU())
        >>> print(find_operation(model, torch.rand(1, 3), LINEAR, {model[2]}))
        `gelu` in `1` (GELU)
        >>> find_operation(model, torch.rand(1, 3), LINEAR, {model[1], model[2]}) is None
        True
    """
    model.requires_grad_(False)
    mode = _Watch(model, allowed, frozenset(layers), products)
    handles = []
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # it takes no hooks
        handles.append(module.register_forward_pre_hook(mode.entering(path), prepend=True))
        handles.append(module.register_forward_hook(mode.leave, always_call=True))
    try:
        with torch.enable_grad():
            # Clone the leaf: the model may modify its input in place, which autograd forbids for leaves.
            sample = inputs[:1].detach().clone().requires_grad_().clone()
            mode.mark(sample, None)
            with mode:
                output = model(sample)
            return mode.trouble_of(output)
    finally:
        for handle in handles:
            handle.remove()


class _Watch(TorchDispatchMode):
    """Tracks the tensors that depend on the input, each with the first disallowed operation before it."""

    def __init__(
        self,
        model: nn.Module,
        allowed: Collection[str],
        layers: Collection[nn.Module],
        products: bool,
    ) -> None:
        super().__init__()
        self.allowed, self.layers, self.products = allowed, layers, products
        self.running: list[tuple[str, nn.Module]] = []
        self.exempt = 0
        self.order = 0
        # By storage, so that views count as their base; kept alive, so that no address is reused.
        self.troubles: dict[int, Operation | None] = {}
        self.storages: list[torch.UntypedStorage] = []
        self.escaped: Operation | None = None

    def entering(self, path: str) -> Any:
        def enter(module: nn.Module, args: object) -> None:
            self.running.append((path, module))
            self.exempt += module in self.layers

        return enter

    def leave(self, module: nn.Module, args: object, output: object) -> None:
        self.running.pop()
        self.exempt -= module in self.layers

    def mark(self, tensor: Tensor, trouble: Operation | None) -> None:
        storage = _storage(tensor)
        assert storage is not None
        if storage._cdata not in self.troubles:
            self.storages.append(storage)
        self.troubles[storage._cdata] = _first([self.troubles.get(storage._cdata), trouble])

    def depends(self, value: object) -> bool:
        storage = _storage(value)
        return storage is not None and storage._cdata in self.troubles

    def dependent(self, value: object) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(value) if self.depends(leaf)]

    def trouble_of(self, *values: object) -> Operation | None:
        """The first disallowed operation that some of these values depend on."""
        known = [self.troubles[t.untyped_storage()._cdata] for t in self.dependent(values)]
        return _first([*known, self.escaped])

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        names = [argument.name for argument in func._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        sources = self.dependent(given)
        # Check before the operation runs, because it may modify its arguments.
        before, cut = self.trouble_of(given), _is_cut(sources)
        result = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        self.order += 1
        if not sources or name in _OF_SHAPE:
            return result
        path, module = self.running[-1] if self.running else ("", None)
        operation = Operation(self.order, name, path, type(module).__name__)

        def trouble(text: str = "") -> Operation:
            return Operation(self.order, name, path, type(module).__name__, text)

        found = None
        if not self.exempt:
            if cut:
                found = trouble(", which gets no gradient,")
            elif name not in self.allowed or kwargs.get("rounding_mode") is not None:
                found = operation
            elif "batch_norm" in name and given.get("training") and not self.products:
                found = trouble(" in training mode")
            elif not self.products and self._multiplies(name, given):
                found = trouble(" of two tensors that depend on the input")
        changed = [
            given.get(argument.name)
            for argument in func._schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        for value in tree_leaves((result, changed)):
            if _storage(value) is not None:
                is_real = value.is_floating_point() or value.is_complex()
                self.mark(value, _first([before, found if is_real else found or operation]))
            elif isinstance(value, Tensor) or (
                name == "_local_scalar_dense" and type(value) is not bool
            ):
                # The value cannot be tracked, so the output is assumed to depend on it. Booleans are
                # excluded, because they only control which operations run.
                self.escaped = _first([self.escaped, before, operation])
        return result

    def _multiplies(self, name: str, given: dict[str, Any]) -> bool:
        factors = [factor for factor in _FACTORS.get(name, ()) if self.depends(given.get(factor))]
        return len(factors) > 1 or any(
            self.depends(given.get(constant)) for constant in _CONSTANTS.get(name, ())
        )


def _storage(value: object) -> torch.UntypedStorage | None:
    """The storage of a dense tensor; None for anything else."""
    if isinstance(value, Tensor) and value.layout == torch.strided:
        return value.untyped_storage()
    return None


def _is_cut(sources: list[Tensor]) -> bool:
    """Whether gradients cannot reach some of these tensors, all of which depend on the input."""
    reals = [source for source in sources if source.is_floating_point() or source.is_complex()]
    return bool(reals) and not (
        torch.is_grad_enabled() and all(source.requires_grad for source in reals)
    )


def _first(operations: list[Operation | None]) -> Operation | None:
    known = [operation for operation in operations if operation is not None]
    return min(known, key=lambda operation: operation.order, default=None)
