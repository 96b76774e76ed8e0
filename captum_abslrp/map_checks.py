"""Warnings about maps that say little: zero maps, differences that are rounding, detached parts of a model.

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
    """Which maps, of each seed and sample (S, B), are zero though the sample is not.

    None if there are none, or if the check would wait for a device.
    """
    if relevances[0].device.type != "cpu":
        return None
    batch_size = len(inputs[0])
    in_order = all(r.dim() > 1 and r.shape[1] % batch_size == 0 for r in relevances)
    rows = batch_size if in_order else 1  # else nothing can be said of one sample
    found = torch.zeros(max(map(len, relevances)), rows, dtype=torch.bool)
    for r in relevances:  # of the inputs of a guided map there is one seed
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
        """Forget all of them."""
        self._found.clear()

    def add(self, start: int, zero: Tensor, observer: Observer, of_inputs: bool) -> None:
        """Note some samples.

        Args:
            start: the number of the first of them.
            zero: which maps are zero, (S, B).
            observer: has seen the calls of the backward pass.
            of_inputs: whether the maps are of the inputs. Relevance may go past a layer, so a map of a
                layer counts only if a call is known where its relevance ended.
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
        """Warn once of all of them."""
        for kind, (samples, ends) in self._found.items():
            where = " and ".join(list(ends)[:3]) or "a call that moves elements"
            warn(
                f"The map of the {kind} is zero for {len(samples)} of {self._batch_size} samples, first for "
                f"sample {samples[0]}: its relevance ends at {where}, because no input of the call "
                f"contributes to its output in a way that the rule counts. Such a map does not show what the "
                f"score depends on. Explain another class, or give the call another rule: "
                f"`AbsLRP(model, get_mapping().extended({{...}}))`."
            )


def warn_of_noise(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Warn where the maps of target and contrast are so alike that their difference is rounding."""
    exact = torch.promote_types(pairs[0][0].dtype, torch.float32)
    apart: Any = sum((r - o).abs().sum(dtype=exact) for r, o in pairs)
    total = sum(r.abs().sum(dtype=exact) + o.abs().sum(dtype=exact) for r, o in pairs)
    if apart.device.type != "cpu":  # the check would wait for the device
        return
    share = float((apart / total).numpy())
    if 0 < share < 100 * torch.finfo(exact).eps:
        better = (
            "" if exact == torch.float64 else " Compute in float64: `model.double()`, `x.double()`."
        )
        warn(
            f"The maps of target and contrast differ by {share:.0e} of their total only, which {exact} "
            f"can hardly tell from rounding.{better} Or look at the map of the target alone, "
            f"`contrast=None`."
        )


def warn_of_no_guide(found: Tensor, fine: Tensor) -> None:
    """Warn where a guided map is zero and the map of the target, (B, ...), is not."""
    if found.device.type != "cpu":  # the check would wait for the device
        return
    zero = ~found.flatten(1).any(1) & fine.flatten(1).any(1)
    if bool(zero.any().numpy()):
        warn(
            f"The guided map is zero for {int(zero.sum())} of {len(zero)} samples, because no place of the "
            f"guiding layer has more relevance for the target than for the contrast. Look at "
            f'`combine="difference"`, or choose another layer, `guide=model.layer`.'
        )


def warn_of_detached(paths: Sequence[str]) -> None:
    """Warn where a part of the model gets no relevance because its history is cut off."""
    if paths:
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        warn(
            f"A value that is detached, or computed under `torch.no_grad()`, reaches the output of the "
            f"model: in {', '.join(paths[:3])}{more}. It counts as a constant, so nothing of the map goes "
            f"through it. To explain it as well, remove `detach()` or `no_grad()` there."
        )
