"""Warnings about uninformative maps: zero maps, differences that are rounding errors, detached tensors.

Axes: B samples, S seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from captum_abslrp.engine.messages import warn
from captum_abslrp.engine.observers import Observer

__all__ = ["ZeroMaps", "warn_of_detached", "warn_of_no_guide", "warn_of_noise", "zero_maps"]


def zero_maps(relevances: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor | None:
    """Return which maps of nonzero samples are zero, by seed and sample, (S, B).

    Return None if there are none, or if the check would have to wait for a device.
    """
    if relevances[0].device.type != "cpu":
        return None
    batch_size = len(inputs[0])
    in_order = all(r.dim() > 1 and r.shape[1] % batch_size == 0 for r in relevances)
    rows = batch_size if in_order else 1  # otherwise, single samples cannot be checked
    found = torch.zeros(max(map(len, relevances)), rows, dtype=torch.bool)
    for r in relevances:  # the inputs of a guided map have a single seed
        found[: len(r)] |= r.reshape(len(r), rows, -1).any(2)
    given = torch.stack([x.reshape(batch_size, -1).any(1) for x in inputs]).any(0)
    zero = ~found & given
    return zero if bool(zero.any().numpy()) else None


class ZeroMaps:
    """The maps that are zero, and the calls where their relevance ended."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._found: dict[str, tuple[list[int], dict[str, None]]] = {}

    def clear(self) -> None:
        """Remove all entries."""
        self._found.clear()

    def add(self, start: int, zero: Tensor, observer: Observer, of_inputs: bool) -> None:
        """Add the zero maps of some samples.

        Args:
            start: index of the first sample.
            zero: which maps are zero, (S, B).
            observer: the observer of the backward pass.
            of_inputs: whether the maps are of the inputs. Relevance can bypass a layer, so a map of a layer
                is only added if the call where its relevance ends is known.
        """
        for seed, maps in enumerate(zero):
            samples = maps.nonzero().flatten().tolist()
            ends = {call.place: None for call in observer.calls if call.ends(seed, samples)}
            if samples and (ends or of_inputs):
                kind = ("target", "contrast")[seed]
                known, known_ends = self._found.setdefault(kind, ([], {}))
                known += [start + i for i in samples]
                known_ends |= ends

    def warn(self) -> None:
        """Raise one warning for target and contrast each."""
        for kind, (samples, ends) in self._found.items():
            where = " and ".join(list(ends)[:3]) or "a call that moves elements"
            warn(
                f"The map of the {kind} is zero for {len(samples)} of {self._batch_size} samples, first for "
                f"sample {samples[0]}: its relevance ends at {where}, because its rule finds no "
                f"contributions to the output. Such a map does not show what the score depends on. Explain "
                f"another class, or use another rule for the call: "
                f"`AbsLRP(model, get_mapping().extended({{...}}))`."
            )


def warn_of_noise(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Warn if the maps of target and contrast are so similar that their difference is rounding error."""
    exact = torch.promote_types(pairs[0][0].dtype, torch.float32)
    apart: Any = sum((r - o).abs().sum(dtype=exact) for r, o in pairs)
    total = sum(r.abs().sum(dtype=exact) + o.abs().sum(dtype=exact) for r, o in pairs)
    if apart.device.type != "cpu":  # the check would wait for the device
        return
    share = float((apart / total).numpy())
    if 0 < share < 100 * torch.finfo(exact).eps:
        better = "" if exact == torch.float64 else " Use float64: `model.double()`, `x.double()`."
        warn(
            f"The maps of target and contrast differ by only {share:.0e} of their total, which is close to "
            f"the rounding error of {exact}.{better} Or explain the target alone with `contrast=None`."
        )


def warn_of_no_guide(found: Tensor, fine: Tensor) -> None:
    """Warn if a guided map is zero although the map of the target, (B, ...), is not."""
    if found.device.type != "cpu":  # the check would wait for the device
        return
    zero = ~found.flatten(1).any(1) & fine.flatten(1).any(1)
    if bool(zero.any().numpy()):
        of_which = f" for {int(zero.sum())} of {len(zero)} samples" if len(zero) > 1 else ""
        warn(
            f"The guided map is zero{of_which}, because no position of "
            f"the guide layer has more relevance for the target than for the contrast. Use "
            f'`combine="difference"`, or choose another layer with `guide=model.layer`.'
        )


def warn_of_detached(paths: Sequence[str]) -> None:
    """Warn about modules that get no relevance because their results are detached."""
    if paths:
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        warn(
            f"The output of the model depends on a tensor that is detached or computed under "
            f"`torch.no_grad()`, in {', '.join(paths[:3])}{more}. The tensor is a constant, so no relevance "
            f"flows through it. To explain it as well, remove `detach()` or `no_grad()`."
        )
