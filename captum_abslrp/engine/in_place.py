"""In-place calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from captum_abslrp.engine.arguments import out_of_place, tensors_in
from captum_abslrp.engine.calls import Recorder
from captum_abslrp.engine.dependence import carries_relevance, untracked
from captum_abslrp.engine.names import IN_PLACE_PASS_THROUGH
from captum_abslrp.engine.nodes import is_recorded
from captum_abslrp.engine.samples import check_aligned


class Runner(Recorder, Protocol):
    """The interface of the recording for in-place calls."""

    batch_size: int

    def check_visible(self, value: Any) -> None: ...
    def run_with_relevance(
        self,
        name: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        target: Tensor | None = None,
    ) -> Any: ...


def run_in_place(
    recording: Runner,
    name: str,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run the out-of-place version of an in-place call, and copy the result into the target."""
    target = kwargs.get("out")
    if target is None:
        target = args[0] if args else next(iter(tensors_in(kwargs)), None)
    if not isinstance(target, Tensor):
        return untracked(func, args, kwargs)
    carrying = [t for t in tensors_in((args, kwargs)) if carries_relevance(t)]
    if not carrying:
        recording.release(target)
        return untracked(func, args, kwargs)
    if name in IN_PLACE_PASS_THROUGH:
        recording.release(target)
        for tensor in carrying:
            check_aligned(tensor, recording.batch_size)
        return func(*args, **kwargs)
    recording.check_visible((args, kwargs))
    func, args, kwargs = out_of_place(name, func, args, kwargs)
    result = recording.run_with_relevance(name, func, args, kwargs, target=target)
    if result is target:  # the rule has already modified it
        return target
    nonnegative = isinstance(result, Tensor) and recording.is_nonnegative(result)
    is_ours = is_recorded(target.grad_fn)
    handed = isinstance(result, Tensor) and recording.hand_memory(target, result, is_ours=is_ours)
    if not handed:
        recording.release(target)
    if not target._is_view() and not target.is_leaf:
        target.detach_()  # the previous history no longer applies
    target.copy_(result)  # only copies the history if the memory was exchanged
    if nonnegative:
        recording.mark_nonnegative(target)
    return target
