"""Batches that are explained in chunks: all samples at once, as many as fit into memory, or one at a time.

Axes: B samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from captum_abslrp.engine.samples import Misaligned
from captum_abslrp.memory import is_out_of_memory
from captum_abslrp.scores import Scores

__all__ = ["Samples", "in_chunks"]

T = TypeVar("T")


class Samples(NamedTuple):
    """Samples that are run together: inputs, targets, contrasts and further arguments."""

    inputs: tuple[Tensor, ...]
    """(B, ...) each."""
    target: Tensor | None
    """Indices, (B, I)."""
    contrast: Any
    """Indices, (B, I), or the contrast by its name."""
    extra: tuple[Any, ...]
    """Further arguments of the model; tensors of B rows are of the samples."""
    scores: Scores | None = None
    """What is explained, where it is given by functions."""

    def target_in(self, output: Tensor) -> Tensor | None:
        """Indices of the target in the explained output; None of a function that returned one score each."""
        return None if self.scores is not None and output.dim() == 1 else self.target

    def rows(self, start: int, stop: int) -> Samples:
        """Samples number `start` to `stop - 1`."""
        batch_size = len(self.inputs[0])

        def rows_of(value: Any) -> Any:
            dense = isinstance(value, Tensor) and value.layout == torch.strided and value.dim() > 0
            return value[start:stop] if dense and len(value) == batch_size else value

        return Samples(
            tuple(map(rows_of, self.inputs)),
            rows_of(self.target),
            rows_of(self.contrast),
            tuple(map(rows_of, self.extra)),
            None if self.scores is None else self.scores.rows(start, stop),
        )


def in_chunks(
    samples: Samples,
    size: int,
    explain: Callable[[Samples, int], T],
    *,
    shrinks: bool,
    restart: Callable[[], None],
) -> list[T]:
    """Explain samples chunk by chunk, or one at a time where the model does not keep them apart.

    Args:
        samples: all samples.
        size: how many of them a chunk has, at most.
        explain: explains a chunk, given the number of its first sample.
        shrinks: whether to go on with chunks of half the size where memory runs out.
        restart: is called before the samples are explained again, one at a time.

    Returns:
        The result of each chunk.

    Raises:
        ValueError: if the model mixes samples and fails on one.
    """
    try:
        return _run(samples, size, explain, shrinks)
    except Misaligned:  # samples are not kept apart in the leading dimension somewhere
        restart()
        try:
            return _run(samples, 1, explain, shrinks)
        except RuntimeError as error:
            if type(error) is not RuntimeError or is_out_of_memory(error):
                raise  # an error of the model's own
            raise ValueError(
                f"Expected the model to run on one sample at a time, because it mixes samples or moves "
                f"them out of the leading dimension, but it failed on one: {error}. Where the rows of "
                f"`inputs` are parts of one whole, as the nodes of a graph are, make them one sample: "
                f"pass `x.unsqueeze(0)`, to a model that takes it apart again."
            ) from error


def _run(
    samples: Samples, size: int, explain: Callable[[Samples, int], T], shrinks: bool
) -> list[T]:
    """The results of chunks of some size."""
    results: list[T] = []
    start, batch_size = 0, len(samples.inputs[0])
    while start < batch_size:
        try:
            result = explain(samples.rows(start, start + size), start)
        except Exception as error:  # raised again, unless it says that memory was short
            if not (shrinks and size > 1 and is_out_of_memory(error)):
                raise
            size = size // 2
            continue
        results.append(result)
        start += size
    return results
