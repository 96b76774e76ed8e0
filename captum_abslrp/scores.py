"""Scores of a model's output that are given by functions instead of class indices.

Axes: B samples, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_abslrp.checks import differs_in_training

__all__ = ["Score", "Scores", "scores_of"]

Score = Callable[[Any], Tensor]
"""Maps the output of a model for B samples to one score per sample, (B,), or to class scores, (B, K)."""


class Scores(NamedTuple):
    """The target function, and the contrast if it is a function."""

    target: Score
    contrast: Score | None = None

    @property
    def index(self) -> Any:
        """The class to explain if the function returns class scores; None for the predicted class."""
        return 0 if self.contrast is not None else getattr(self.target, "index", None)

    @property
    def has_rows(self) -> bool:
        """Whether all functions have a method `rows` to select samples."""
        return all(score is None or hasattr(score, "rows") for score in self)

    def rows(self, start: int, stop: int) -> Scores:
        """Return the scores for samples `start` to `stop - 1`, by the method `rows` of the functions."""

        def rows_of(score: Any) -> Any:
            own = getattr(score, "rows", None)
            return score if own is None else own(start, stop)

        return Scores(*map(rows_of, self))

    def __call__(self, output: Any, batch_size: int) -> Tensor:
        """Compute the scores of an output, (B,) or (B, K); with a contrast (B, 2), the target first."""
        of_target = _checked(self.target(output), batch_size, "target")
        if self.contrast is None:
            return of_target
        of_contrast = _checked(self.contrast(output), batch_size, "contrast")
        pair = [
            _single(of_target, self.target, "target"),
            _single(of_contrast, self.contrast, "contrast"),
        ]
        return torch.stack(pair, 1)


def scores_of(target: Any, contrast: Any, batch_size: int) -> Scores | None:
    """Return the scores if the target is a function, or None.

    Args:
        target, contrast: as in ``attribute``.
        batch_size: B.

    Raises:
        TypeError: if the contrast is a function, but the target is not.
        ValueError: if a function is a module in training mode, if it is for a different number of samples, or
            if target and contrast are the same.

    Example:
        >>> scores = scores_of(lambda out: out[:, 1], lambda out: out[:, 2:].mean(1), 2)
        >>> scores(torch.tensor([[0.0, 1.0, 2.0, 4.0], [0.0, 5.0, 6.0, 8.0]]), 2)
        tensor([[1., 3.],
                [5., 7.]])
    """
    if not callable(target):
        if callable(contrast):
            raise TypeError(
                f"Expected `target` to be a function, because `contrast` is a function, but got {target!r}. "
                f"Pass `target=lambda out: out[:, {target if isinstance(target, int) else 0}]`."
            )
        return None
    if contrast is target:
        raise ValueError(
            f"Expected `contrast` and `target` to be different functions, but got the same function, "
            f"{target!r}."
        )
    found = Scores(target, contrast if callable(contrast) else None)
    for name, score in zip(("target", "contrast"), found):
        if isinstance(score, nn.Module) and any(
            m.training and differs_in_training(m) for m in score.modules()
        ):
            raise ValueError(
                f"Expected the module `{name}` to be in evaluation mode, but got {type(score).__name__} in "
                f"training mode, in which it may be random. Call `{name}.eval()`."
            )
        known = getattr(score, "samples", None)
        if known not in (None, 1, batch_size):
            raise ValueError(
                f"Expected `{name}` to be for one sample or for all {batch_size} samples of `inputs`, but "
                f"got {score!r}, which is for {known} samples."
            )
    return found


def _checked(scores: Any, batch_size: int, name: str) -> Tensor:
    """Scores as a tensor, (B,) or (B, K)."""
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        found = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(
            f"Expected the function `{name}` to return a floating-point tensor of scores, but got {found}."
        )
    if scores.dim() == 0 and batch_size == 1:
        return scores.reshape(1)
    if scores.dim() not in (1, 2) or len(scores) != batch_size or scores.numel() == 0:
        raise ValueError(
            f"Expected the function `{name}` to return one score per sample, ({batch_size},), or class "
            f"scores, ({batch_size}, K), but got shape {tuple(scores.shape)}. The function receives one "
            f"internal batch, which can have fewer samples than `inputs`."
        )
    return scores


def _single(scores: Tensor, score: Score, name: str) -> Tensor:
    """Return one score per sample; from class scores, pick the class of the function."""
    if scores.dim() == 1:
        return scores
    index = getattr(score, "index", None)
    if index is None and scores.shape[1] > 1:
        raise ValueError(
            f"Expected the function `{name}` to return one score per sample, because `contrast` is a "
            f"function, but got shape {tuple(scores.shape)}. Pick one score: `lambda out: ...[:, 0]`."
        )
    columns = torch.as_tensor(0 if index is None else index, device=scores.device)
    columns = columns.remainder(scores.shape[1]).reshape(-1, 1)
    return scores.gather(1, columns.expand(len(scores), 1)).squeeze(1)
