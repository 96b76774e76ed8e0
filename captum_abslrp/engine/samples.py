"""Tracking of the sample of each element if a model moves the batch dimension.

Relevance is scaled sample by sample, so every call with a rule needs the samples in its leading dimension:
B rows, or B blocks of rows (windows, heads). A model may move that dimension away (sequence first) if it
moves it back before the next call with a rule. This module tracks calls that move elements with a *shadow*,
a tensor with the sample index of each element. It raises :class:`Misaligned` if a call with a rule gets a
tensor that is out of order, or if its arguments show that it mixes samples (a reduction, softmax or norm
over the leading dimension, a product that sums over it). :class:`captum_abslrp.AbsLRP` then runs the samples
one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from captum_abslrp.engine.names import ARITHMETIC, JOINING, LAYERS, TRANSFORMS, transformed_dims

_SHADOW = "_abslrp_samples"


_KEEP_ORDER = frozenset(
    "clone contiguous to float half bfloat16 cfloat cdouble chalf type type_as pad masked_fill where tril "
    "triu alias real imag conj conj_physical resolve_conj resolve_neg".split()
)


_SAME_PLACE = frozenset(
    "to float double half bfloat16 cfloat cdouble chalf type type_as real imag conj conj_physical "
    "resolve_conj resolve_neg".split()
)
"""Calls that keep the position of every element."""


_KEEP_ELEMENT_ORDER = frozenset("view reshape flatten unflatten ravel".split())


class Misaligned(Exception):
    """A call with a rule mixes samples, or its samples are not in the leading dimension."""

    def __init__(self) -> None:
        super().__init__(
            "Expected the samples of a batch to stay separate in the leading dimension of every call with a "
            "rule, but got a call that moves or mixes them. Explain one sample at a time."
        )


def check_aligned(tensor: Tensor, batch_size: int) -> None:
    """Raise :class:`Misaligned` unless the leading dimension has B samples in order."""
    if batch_size == 1:
        return
    if hasattr(tensor, _SHADOW) or tensor.dim() == 0 or tensor.shape[0] % batch_size:
        raise Misaligned


def copy_samples(tensor: Tensor, copy: Tensor) -> Tensor:
    """Copy the mark of a tensor to a copy of it, and return the copy."""
    if hasattr(tensor, _SHADOW):
        setattr(copy, _SHADOW, getattr(tensor, _SHADOW))
    return copy


_DIMS = (
    dict.fromkeys(
        "amax amin cumprod cumsum log_softmax logcumsumexp logsumexp mean median nanmean nansum prod "
        "softmax std sum var".split(),
        (1, None),
    )
    | dict.fromkeys(
        "cummax cummin index_add index_reduce nanmedian scatter_add scatter_reduce".split(),
        (1, None),
    )
    | dict.fromkeys("linalg_norm linalg_vector_norm nanquantile norm quantile".split(), (2, None))
    | dict.fromkeys(["diff", "kthvalue", "linalg_cross", "topk"], (2, -1))
    | dict.fromkeys(["cumulative_trapezoid", "trapezoid", "trapz"], (2, -1))
    | {"mode": (1, -1), "msort": (1, 0), "normalize": (2, 1), "sort": (1, -1)}
    | {"aminmax": (1, None), "cross": (2, None), "segment_reduce": (2, 0)}
)
"""Calls on one tensor that mix its elements along some dimensions: the position of the dimensions among the
arguments, and their default (None: all)."""


_PRODUCTS = frozenset("_sparse_mm linalg_matmul matmul mm spmm".split())


_BY_ROW_OF_THE_SECOND = frozenset("cdist dot inner mv vdot".split())


_PRODUCTS_AND_SUMS = frozenset("_sparse_addmm addmm addmv".split())


_BY_ELEMENT = ARITHMETIC | {"pairwise_distance"}


_BETWEEN_ROWS = frozenset("addbmm corrcoef cov pdist renorm".split())


_OF_ANY_BATCH = frozenset("linalg_cross linalg_norm linalg_vecdot linalg_vector_norm".split())
"""Calls of ``torch.linalg`` that do not work on matrices."""


_OF_REGIONS = frozenset(
    f"torchvision::{name}" for name in ("ps_roi_align", "ps_roi_pool", "roi_align", "roi_pool")
)


def check_apart(
    name: str,
    operands: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch_size: int,
    is_source: Callable[[Any], bool],
) -> None:
    """Raise :class:`Misaligned` if the arguments of a call show that it mixes samples.

    Args:
        name: canonical name of the call.
        operands, kwargs: its arguments, in the order of the operation.
        batch_size: B.
        is_source: whether an argument depends on the explained inputs.
    """
    if name in _OF_REGIONS:
        arguments = dict(zip(("input", "rois"), operands)) | kwargs
        _check_regions(name, arguments["input"], arguments["rois"], batch_size)
    if batch_size == 1:
        return
    given = (*operands, *kwargs.values())
    tensors = [t for t in given if isinstance(t, Tensor)]
    # A tensor with fewer dimensions broadcasts along the leading dimension of the others.
    least = max((t.dim() for t in tensors), default=0)
    mixes = False
    if name in _DIMS:
        mixes = _is_over_samples(name, operands, kwargs)
    elif name in ("layer_norm", "rms_norm"):
        shape = kwargs.get("normalized_shape", operands[1:2] and operands[1])
        mixes = len(shape) >= tensors[0].dim()
    elif name in LAYERS:
        mixes = any(map(is_source, tensors[1:]))
    elif name == "einsum":
        mixes = _adds_up_samples(operands, is_source)
    elif name in _PRODUCTS:  # a product sums over the rows of the second matrix
        mixes = any(t.dim() < least and is_source(t) for t in tensors)
        mixes = mixes or (tensors[-1].dim() <= 2 and is_source(tensors[-1]))
    elif name in TRANSFORMS:
        mixes = 0 in transformed_dims(name, tensors[0].dim(), *operands[1:], **kwargs)
    elif name in _BY_ROW_OF_THE_SECOND:
        mixes = tensors[-1].dim() <= 2 and is_source(tensors[-1])
    elif name in _PRODUCTS_AND_SUMS:
        mixes = any(map(is_source, tensors[2:])) or any(
            t.dim() < least and is_source(t) for t in tensors
        )
    elif name in _BETWEEN_ROWS:
        mixes = any(map(is_source, tensors))
    elif name in ("embedding", "embedding_bag"):  # if the table depends on the inputs
        mixes = any(is_source(t) for t in tensors[:2])
    elif name.startswith("linalg_") and name not in _OF_ANY_BATCH:
        mixes = any(t.dim() <= 2 and is_source(t) for t in tensors)
    elif name in _BY_ELEMENT:
        mixes = any(t.dim() < least and is_source(t) for t in tensors)
    if mixes:
        raise Misaligned


def _check_regions(name: str, input: Tensor, rois: Tensor, batch_size: int) -> None:
    """Raise if the regions, each with the index of its image, are not in order of samples."""
    images = rois[:, 0].detach().cpu().long()  # requires synchronization
    outside = images[(images < 0) | (images >= len(input))]
    if outside.numel():
        raise ValueError(
            f"Expected the image index of every region of `{name}` to be less than {len(input)}, but got "
            f"{int(outside[0])}. Samples with different numbers of regions are run one at a time. Pass one "
            f"sample with its regions at a time, `for i in range(len(x)): attributor.attribute("
            f"x[i : i + 1], target, additional_forward_args=([boxes[i]],))`."
        )
    samples = images * batch_size // len(input)
    if len(images) % batch_size:
        raise Misaligned
    expected = torch.arange(batch_size).repeat_interleave(len(images) // batch_size)
    if not torch.equal(samples, expected):
        raise Misaligned


def _is_over_samples(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call mixes elements along the leading dimension."""
    position, dims = _DIMS[name]
    x = args[0] if args else kwargs["input"]
    if len(args) > position and not isinstance(args[position], (bool, torch.dtype)):
        dims = args[position]
    dims = kwargs.get("dim", kwargs.get("axis", dims))
    if isinstance(dims, Tensor):  # a different argument, such as coordinates or lengths
        dims = _DIMS[name][1]
    chosen = list(dims) if isinstance(dims, (tuple, list)) else [] if dims is None else [dims]
    return not chosen or any(isinstance(d, int) and d % max(x.dim(), 1) == 0 for d in chosen)


def _adds_up_samples(operands: tuple[Any, ...], is_source: Callable[[Any], bool]) -> bool:
    """Whether an einsum has samples outside of the first dimension of an operand or the result."""
    equation, *given = operands
    if not isinstance(equation, str):
        return False
    if len(given) == 1 and isinstance(given[0], (tuple, list)):
        given = list(given[0])
    terms, arrow, result = equation.replace(" ", "").partition("->")
    if not arrow:
        once = [c for c in sorted(set(terms)) if c.isalpha() and terms.count(c) == 1]
        result = ("..." if "..." in terms else "") + "".join(once)
    return any(
        is_source(operand) and term[:1] != result[:1]
        for term, operand in zip(terms.split(","), given)
    )


def follow(
    name: str,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    result: Any,
    batch_size: int,
    tensors: Sequence[Tensor],
) -> None:
    """Mark the results of a call that moves elements if their samples are out of order.

    Args:
        name: canonical name of the call.
        func, args, kwargs: the call.
        result: its result, a tensor or a tuple of them.
        batch_size: B.
        tensors: the tensors among the arguments.
    """
    if batch_size == 1:
        return
    if name in _DIMS and _is_over_samples(name, args, kwargs):
        raise Misaligned  # the values determine the positions of its elements
    moved = any(hasattr(tensor, _SHADOW) for tensor in tensors)
    if not moved and (name in _KEEP_ORDER or _keeps_samples_first(name, args, result, batch_size)):
        return
    leaves, spec = tree_flatten((args, kwargs))
    masks = name in ("masked_fill", "where")

    def shadow_of(leaf: Any) -> Any:
        is_value = name in JOINING and not (masks and getattr(leaf, "dtype", None) == torch.bool)
        return _shadow(leaf, batch_size, is_value=is_value)

    shadows = [shadow_of(leaf) for leaf in leaves]
    shadow_args, shadow_kwargs = tree_unflatten(shadows, spec)
    func = _ON_SHADOWS.get(name, func)
    with torch.no_grad():
        try:
            shadow = func(*shadow_args, **shadow_kwargs)
        except RuntimeError as error:  # the call accesses memory directly: `as_strided`
            raise Misaligned from error
    for tensor, samples in zip(tree_flatten(result)[0], tree_flatten(shadow)[0], strict=True):
        is_mask = isinstance(tensor, Tensor) and tensor.dtype == torch.bool
        if isinstance(tensor, Tensor) and not is_mask and not _in_order(samples, batch_size):
            setattr(tensor, _SHADOW, samples)


def _in_agreement(first: Tensor, second: Tensor) -> Tensor:
    """The common sample of the two parts of each element; -1 if they differ."""
    return torch.where(first == second, first, -1)


_ON_SHADOWS: dict[str, Callable[..., Tensor]] = {
    "view": Tensor.reshape,  # a shadow has a different memory layout
    "view_as_real": lambda s: s.unsqueeze(-1).expand(*s.shape, 2),
    "view_as_complex": lambda s: _in_agreement(*s.unbind(-1)),
    "complex": _in_agreement,
    **dict.fromkeys(_SAME_PLACE, lambda s, *args, **kwargs: s),
}
"""Replacements for calls whose function does not work on a shadow."""


def _keeps_samples_first(name: str, args: tuple[Any, ...], result: Any, batch_size: int) -> bool:
    """Whether the arguments show that samples stay in the leading dimension."""
    dims = [a for a in args[1:] if isinstance(a, int)]
    if name in _KEEP_ELEMENT_ORDER:
        return result.dim() > 0 and result.shape[0] % batch_size == 0
    if name in ("view_as_real", "view_as_complex"):
        return len(args) == 1 and args[0].dim() > (name == "view_as_complex")
    if name == "complex":
        return len(args) == 2 and args[0].dim() == args[1].dim() > 0
    if name in ("transpose", "swapaxes", "swapdims"):
        return len(dims) == 2 and not any(d % args[0].dim() == 0 for d in dims)
    if name in ("gather", "index_select", "take_along_dim"):
        return len(dims) == 1 and dims[0] % args[0].dim() != 0
    if name == "__getitem__" and isinstance(args[1], tuple) and args[1]:
        # Two index tensors that are not adjacent would move their dimension to the front.
        indices = [i for i in args[1] if isinstance(i, Tensor)]
        first = args[1][0]
        return isinstance(first, slice) and first == slice(None) and len(indices) <= 1
    return False


def _shadow(leaf: Any, batch_size: int, *, is_value: bool = False) -> Any:
    """The sample index of every element, on the CPU. Indices and masks keep their values, unless they are
    moved as values."""
    if not isinstance(leaf, Tensor):
        return leaf
    if not (is_value or leaf.is_floating_point() or leaf.is_complex()):
        return leaf.cpu()
    if hasattr(leaf, _SHADOW):
        return getattr(leaf, _SHADOW)
    if leaf.dim() == 0 or leaf.shape[0] % batch_size:
        return torch.full((), -1, dtype=torch.float32, device="cpu").expand(leaf.shape)
    samples = torch.arange(batch_size, dtype=torch.float32, device="cpu")
    samples = samples.repeat_interleave(leaf.shape[0] // batch_size)
    return samples.view(-1, *[1] * (leaf.dim() - 1)).expand(leaf.shape)


def _in_order(samples: Tensor, batch_size: int) -> bool:
    if samples.dim() == 0 or samples.shape[0] % batch_size:
        return False
    if samples.numel() == 0:
        return True
    # The strides of an expanded shadow show its order without reading the elements.
    if any(samples.stride()[1:]) and samples.dim() > 1:
        rows = samples.reshape(batch_size, -1)
    else:
        rows = samples.as_strided(samples.shape[:1], samples.stride()[:1]).reshape(batch_size, -1)
    expected = torch.arange(batch_size, dtype=samples.dtype, device="cpu")
    return bool((rows == expected.unsqueeze(1)).all().numpy())
