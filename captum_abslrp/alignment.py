"""Which sample an element belongs to, where a model moves the batch dimension.

Rules scale relevance sample by sample. Nearly every intermediate result keeps samples in its leading
dimension: B rows, or B blocks of rows (windows, heads). A model may move that dimension away (sequence
first) or stack samples behind each other; as long as it moves it back before the next call with a rule,
nothing is to be done. This module follows the calls that move elements with a small shadow, the number
of its sample in place of every element, and says so where a rule would meet a tensor that is out of
order. :class:`captum_abslrp.AbsLRP` then runs the samples one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["Misaligned", "check_aligned", "follow"]

_SHADOW = "_abslrp_samples"
_KEEP_ORDER = frozenset(
    "clone contiguous to float half bfloat16 type type_as pad masked_fill where tril triu alias real".split()
)
_KEEP_ELEMENT_ORDER = frozenset("view reshape flatten unflatten ravel".split())


class Misaligned(Exception):
    """A call with a rule met a tensor whose samples are not in the leading dimension."""


def check_aligned(tensor: Tensor, batch_size: int) -> None:
    """Raise :class:`Misaligned` unless the leading dimension holds B samples, one after the other."""
    if batch_size == 1:
        return
    if hasattr(tensor, _SHADOW) or tensor.dim() == 0 or tensor.shape[0] % batch_size:
        raise Misaligned


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
        tensors: those among the arguments.
    """
    if batch_size == 1:
        return
    moved = any(hasattr(tensor, _SHADOW) for tensor in tensors)
    if not moved and (name in _KEEP_ORDER or _keeps_samples_first(name, args, result, batch_size)):
        return
    leaves, spec = tree_flatten((args, kwargs))
    shadows = [_shadow(leaf, batch_size) for leaf in leaves]
    shadow_args, shadow_kwargs = tree_unflatten(shadows, spec)
    if name == "view":  # the memory of a shadow is laid out otherwise
        func = Tensor.reshape
    with torch.no_grad():
        try:
            shadow = func(*shadow_args, **shadow_kwargs)
        except RuntimeError as error:  # it looks at the memory itself: `as_strided`
            raise Misaligned from error
    for tensor, samples in zip(tree_flatten(result)[0], tree_flatten(shadow)[0], strict=True):
        if isinstance(tensor, Tensor) and not _in_order(samples, batch_size):
            setattr(tensor, _SHADOW, samples)


def _keeps_samples_first(name: str, args: tuple[Any, ...], result: Any, batch_size: int) -> bool:
    """Whether it is plain from the arguments that samples stay in the leading dimension."""
    dims = [a for a in args[1:] if isinstance(a, int)]
    if name in _KEEP_ELEMENT_ORDER:
        return result.dim() > 0 and result.shape[0] % batch_size == 0
    if name in ("transpose", "swapaxes", "swapdims"):
        return len(dims) == 2 and not any(d % args[0].dim() == 0 for d in dims)
    if name in ("gather", "index_select", "take_along_dim"):
        return len(dims) == 1 and dims[0] % args[0].dim() != 0
    if name == "__getitem__" and isinstance(args[1], tuple) and args[1]:
        # Two tensors of indices that are apart would move their dimension to the front.
        indices = [i for i in args[1] if isinstance(i, Tensor)]
        first = args[1][0]
        return isinstance(first, slice) and first == slice(None) and len(indices) <= 1
    return False


def _shadow(leaf: Any, batch_size: int) -> Any:
    """The number of its sample for every element, on the host; indices and masks keep their values."""
    if not isinstance(leaf, Tensor):
        return leaf
    if not leaf.is_floating_point():
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
    # A view of an expanded shadow is told by its strides, without looking at the elements.
    if any(samples.stride()[1:]) and samples.dim() > 1:
        rows = samples.reshape(batch_size, -1)
    else:
        rows = samples.as_strided(samples.shape[:1], samples.stride()[:1]).reshape(batch_size, -1)
    expected = torch.arange(batch_size, dtype=samples.dtype, device="cpu")
    return bool((rows == expected.unsqueeze(1)).all().numpy())
