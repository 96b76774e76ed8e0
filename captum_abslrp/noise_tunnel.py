"""Integration of ``attribute`` with Captum: usage logs and ``NoiseTunnel``."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from captum.log import log_usage
from torch import Tensor

__all__ = ["for_captum", "repeated"]


def for_captum(attribute: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an ``attribute`` method as Captum expects: calls are logged, except those from Captum itself.

    Captum's ``NoiseTunnel`` calls ``attribute.__wrapped__``. It repeats each sample and its target, and
    passes keyword arguments unchanged. For these calls only, a contrast per sample is repeated as well, and
    so are target functions with values per sample.
    """

    @wraps(attribute)
    def unlogged(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        first = inputs[0] if isinstance(inputs, tuple) and inputs else inputs
        if isinstance(first, Tensor) and first.dim() > 0:
            if "contrast" in kwargs:
                kwargs["contrast"] = repeated(kwargs["contrast"], len(first))
            if callable(kwargs.get("target")):
                kwargs["target"] = repeated(kwargs["target"], len(first))
        return attribute(self, inputs, *args, **kwargs)

    logged = log_usage()(attribute)
    logged.__wrapped__ = unlogged
    return logged


def repeated(classes: Any, batch_size: int) -> Any:
    """Repeat classes for samples that Captum has repeated to add noise.

    Args:
        classes: a target or contrast, as in ``attribute``.
        batch_size: the number of samples after repetition.

    Returns:
        One class per sample if ``classes`` has one for every n samples; otherwise ``classes`` unchanged.

    Example:
        >>> repeated([3, 1], 4)
        [3, 3, 1, 1]
        >>> repeated("others", 4)
        'others'
    """
    count = 1
    if callable(classes):
        count = getattr(classes, "samples", 1)
        times = batch_size // count
        return classes if count == 1 or batch_size % count else classes.repeated(times)
    if isinstance(classes, list) or (isinstance(classes, Tensor) and classes.dim() == 1):
        count = len(classes)
    # A one-element tensor applies to all samples.
    per_sample = isinstance(classes, list) or count > 1
    if not per_sample or count == 0 or batch_size % count:
        return classes
    times = batch_size // count
    if isinstance(classes, Tensor):
        return classes.repeat_interleave(times)
    return [entry for entry in classes for _ in range(times)]
