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
    """Samples that are run together: inputs, targets, contrasts and additional arguments."""

    inputs: tuple[Tensor, ...]
    """(B, ...) each."""
    target: Tensor | None
    """Indices, (B, I)."""
    contrast: Any
    """Indices, (B, I), or the name of the contrast."""
    extra: tuple[Any, ...]
    """Additional arguments of the model; tensors with B rows are split with the samples."""
    scores: Scores | None = None
    """The explained scores, if they are given by functions."""

    def target_in(self, output: Tensor) -> Tensor | None:
        """The target indices in the explained output; None if a function returns one score per sample."""
        return None if self.scores is not None and output.dim() == 1 else self.target

    def rows(self, start: int, stop: int) -> Samples:
        """Return samples `start` to `stop - 1`."""
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
    """Explain samples chunk by chunk, or one at a time if the model mixes samples.

    Args:
        samples: all samples.
        size: maximum number of samples per chunk.
        explain: explains a chunk, given the samples and the index of the first one.
        shrinks: whether to halve the chunk size when memory runs out.
        restart: called before all samples are explained again, one at a time.

    Returns:
        The result of each chunk.

    Raises:
        ValueError: if the model mixes samples and fails on one.
    """
    try:
        return _run(samples, size, explain, shrinks)
    except Misaligned:  # the model mixes samples or moves them out of the leading dimension
        restart()
        try:
            return _run(samples, 1, explain, shrinks)
        except RuntimeError as error:
            if type(error) is not RuntimeError or is_out_of_memory(error):
                raise  # not caused by the single sample
            raise ValueError(
                f"Expected the model to run on one sample at a time, because it mixes samples or moves "
                f"them out of the leading dimension, but got an error: {error}. If the rows of `inputs` "
                f"belong together, like the nodes of a graph, turn them into one sample: wrap the model in "
                f"a module that calls it with `x.squeeze(0)`, and pass `x.unsqueeze(0)`."
            ) from error


def _run(
    samples: Samples, size: int, explain: Callable[[Samples, int], T], shrinks: bool
) -> list[T]:
    """Explain chunks of a given size."""
    results: list[T] = []
    start, batch_size = 0, len(samples.inputs[0])
    while start < batch_size:
        try:
            result = explain(samples.rows(start, start + size), start)
        except Exception as error:  # out-of-memory errors have several types
            if not (shrinks and size > 1 and is_out_of_memory(error)):
                raise
            size = size // 2
            continue
        results.append(result)
        start += size
    return results
