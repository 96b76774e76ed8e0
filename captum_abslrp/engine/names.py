"""Names of calls, and the sets of calls that need no rule."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

PASS_THROUGH = frozenset(
    """
    H T __getitem__ __setitem__ adjoint alias as_strided as_tensor asarray atleast_1d atleast_2d
    atleast_3d bfloat16 block_diag broadcast_tensors broadcast_to cat cdouble cfloat chalf
    channel_shuffle chunk clone column_stack complex concat concatenate conj conj_physical contiguous
    copy cpu cuda diag diag_embed diagonal diagonal_scatter double dsplit dstack expand expand_as
    fft_fftshift fft_ifftshift flatten flip fliplr flipud float gather half hsplit hstack imag
    index_copy
    index_select kthvalue mH mT masked_fill masked_scatter masked_select median meshgrid mode
    moveaxis movedim msort narrow native_channel_shuffle numpy_T pad permute pixel_shuffle
    pixel_unshuffle ravel real repeat repeat_interleave reshape reshape_as resolve_conj resolve_neg
    roll rot90 scatter select select_scatter slice_scatter sort split split_with_sizes squeeze stack
    swapaxes swapdims t take take_along_dim tensor_split tile to topk transpose tril triu type
    type_as unbind unflatten unfold unsafe_chunk unsafe_split unsqueeze view view_as view_as_complex
    view_as_real vsplit vstack where
    """.split()
)
"""Calls that only move, select, copy or cast elements, or parts of complex ones: relevance moves with its
element."""


CONSTANT = frozenset(
    """
    __bool__ __contains__ __float__ __format__ __index__ __int__ __invert__ __len__ __repr__
    _assert all allclose any argmax argmin argsort backward bincount bool bucketize byte ceil
    count_nonzero data_ptr detach dim element_size empty_like eq equal floor floor_divide full_like ge
    get_device gt has_names heaviside int is_complex is_conj is_contiguous is_floating_point
    is_inference is_neg is_nonzero is_same_size isclose isfinite isin isinf isnan isneginf
    isposinf isreal item le long lt names ndimension ne nelement new_empty new_full new_ones
    new_tensor new_zeros nonzero numel numpy one_hot ones_like rand_like randn_like register_hook
    requires_grad_ retain_grad round searchsorted sgn short sign signbit size storage_offset
    stride tolist trunc untyped_storage zeros_like
    """.split()
)
"""Calls whose result carries no relevance: properties of a tensor, and step functions."""


ARITHMETIC = frozenset(
    """
    add addcdiv addcmul atan2 clamp clamp_max clamp_min clip copysign div float_power fmax fmin fmod
    hypot kron ldexp lerp logaddexp logaddexp2 max maximum min minimum mul outer pow remainder sub
    xlog1py xlogy
    """.split()
)
"""Calls that cast all operands to one dtype, such as masks, integers or floats of lower precision."""


LAYERS = frozenset(
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split()
)
"""Calls that are layers with weights."""


JOINING = frozenset(
    "block_diag cat column_stack concat concatenate dstack hstack masked_fill stack vstack where".split()
)
"""Calls that move elements of tensors of any dtype and take no indices."""


IN_PLACE_PASS_THROUGH = frozenset(
    "__setitem__ copy squeeze unsqueeze transpose t swapaxes swapdims zero fill masked_fill "
    "index_copy detach requires_grad".split()
)
"""In-place calls that move elements, or change no values."""


TRANSFORMS = frozenset(
    f"fft_{kind}{dims}"
    for kind in "fft ifft rfft irfft hfft ihfft".split()
    for dims in ("", 2, "n")
) | {"stft", "istft"}
"""Fourier transforms."""


PREFIX = "complex_"
"""Prefix of the name of a call on real views that cannot use the form of the real call."""


def transformed_dims(name: str, rank: int, *args: Any, **kwargs: Any) -> tuple[int, ...]:
    """Return the dimensions of the result of a Fourier transform along which elements are mixed.

    Args:
        name: canonical name of the call, one of :data:`TRANSFORMS`.
        rank: number of dimensions of its input.
        args, kwargs: its other arguments.
    """
    if name in ("stft", "istft"):  # the frequencies, or the time, of a signal
        return (rank - 1,) if name == "stft" else (rank - 2,)
    sizes = kwargs.get("s", args[0] if args else None)
    dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if dims is None and name.endswith("n"):
        dims = range(rank) if sizes is None else range(-len(sizes), 0)
    elif dims is None:
        dims = (-2, -1) if name.endswith("2") else -1
    return tuple(d % rank for d in ([dims] if isinstance(dims, int) else dims))


@functools.lru_cache(maxsize=4096)
def canonical_name(func: Callable[..., Any]) -> tuple[str, bool, bool]:
    """Return the name of a function, whether it works in place, and whether its arguments are reflected.

    The name has no module, dunder or trailing underscore. Operators of a library are named
    ``"namespace::name"``, and functions outside of PyTorch ``"module.name"``, with the module that defines
    them.
    """
    name = getattr(func, "__name__", str(func)).removeprefix("special_")
    if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        namespace, name = str(func).split(".")[:2]
        if namespace != "aten":  # registered by a library or by the user
            return f"{namespace}::{name}", False, False
    module = getattr(func, "__module__", None) or "torch"
    if not module.startswith("torch"):  # a custom function that PyTorch can override
        return f"{module}.{name}", False, False
    if name == "rsub":  # subtracts the first argument from the second
        return "sub", False, True
    if name == "__get__":  # a property such as Tensor.T
        return getattr(getattr(func, "__self__", None), "__name__", name), False, False
    if name in ("__getitem__", "__setitem__"):
        return name, name == "__setitem__", False
    if name.startswith("__") and name.endswith("__"):
        bare = name[2:-2]
        if bare.startswith("i") and bare[1:] in _OPERATORS:
            return _OPERATORS[bare[1:]], True, False
        if bare.startswith("r") and bare[1:] in _OPERATORS:
            return _OPERATORS[bare[1:]], False, True
        return _OPERATORS.get(bare, name), False, False
    if name.endswith("_") and not name.startswith("_"):
        return _ALIASES.get(name[:-1], name[:-1]), True, False
    return _ALIASES.get(name, name), False, False


_ALIASES = {
    "_threshold": "threshold",
    "absolute": "abs",
    "arcsinh": "asinh",
    "arctan": "atan",
    "divide": "div",
    "expit": "sigmoid",
    "log_sigmoid": "logsigmoid",
    "multiply": "mul",
    "negative": "neg",
    "subtract": "sub",
    "true_divide": "div",
}


_OPERATORS = {
    "add": "add",
    "floordiv": "floor_divide",
    "matmul": "matmul",
    "mod": "remainder",
    "mul": "mul",
    "neg": "neg",
    "pow": "pow",
    "sub": "sub",
    "truediv": "div",
    "div": "div",
}
