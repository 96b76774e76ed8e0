"""Global Attribution Evaluation, with an interface like Captum's ``infidelity`` and ``sensitivity_max``.

Axes: M mosaics, C channels, H height, W width, K classes, S masking states.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from captum.attr import Attribution
from torch import Tensor
from tqdm.auto import tqdm

from captum_abslrp.metrics import functional

__all__ = ["GAEResult", "gae"]

SCORES = ("gae", "local_consistency", "faithfulness", "robustness", "contrastiveness")
SCHEDULES = ("published", "cumulative")


@dataclass(frozen=True)
class GAEResult:
    """Scores of one attributor, one value per mosaic, with the images that they were measured on.

    Attributes:
        gae: ``local_consistency * contrastiveness``, (M,), in [0, 1].
        local_consistency: ``relu(faithfulness + robustness) / 2``, (M,), in [0, 1].
        faithfulness: how much relevance lies on elements whose masking changes the output, (M,), in [-1, 1].
        robustness: how well shifts of relevance follow shifts of the output, (M,), in [-1, 1].
        contrastiveness: how much relevance lies on the image of the target class, (M,), in [0, 1].
        mosaics: (M, C, H, W).
        positives: the positive images, (M, C, H, W).
        positive_index: position of the positive image in its mosaic, (M,).
        targets: the predicted class of each positive image, (M,).

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).eval()
        >>> result = gae(model, captum.attr.Saliency(model), torch.rand(8, 3, 4, 4))
        >>> sorted(result.mean())
        ['contrastiveness', 'faithfulness', 'gae', 'local_consistency', 'robustness']
    """

    gae: Tensor
    local_consistency: Tensor
    faithfulness: Tensor
    robustness: Tensor
    contrastiveness: Tensor
    mosaics: Tensor
    positives: Tensor
    positive_index: Tensor
    targets: Tensor

    def mean(self) -> dict[str, float]:
        """Return the mean of each score over the mosaics."""
        return {name: getattr(self, name).mean().item() for name in SCORES}

    def confidence_interval(
        self,
        level: float = 0.95,
        *,
        n_resamples: int = 2000,
        generator: torch.Generator | None = None,
    ) -> dict[str, tuple[float, float]]:
        """Return a bootstrap confidence interval of the mean of each score.

        Args:
            level: confidence level, in (0, 1).
            n_resamples: number of resamples of the mosaics.
            generator: CPU generator for the resamples; by default, a new one with seed 0.

        Raises:
            ValueError: if the level is not between 0 and 1.
        """
        return {
            name: bootstrap_interval(
                getattr(self, name), level, n_resamples=n_resamples, generator=generator
            )
            for name in SCORES
        }

    def __repr__(self) -> str:
        means = ", ".join(f"{name}={value:.4f}" for name, value in self.mean().items())
        return f"GAEResult({len(self.gae)} mosaics: {means})"


def bootstrap_interval(
    values: Tensor,
    level: float = 0.95,
    *,
    n_resamples: int = 2000,
    generator: torch.Generator | None = None,
) -> tuple[float, float]:
    """Return a bootstrap confidence interval of the mean of values, (M,).

    See :meth:`GAEResult.confidence_interval`.

    Example:
        >>> bootstrap_interval(torch.ones(5))
        (1.0, 1.0)
    """
    if not 0 < level < 1:
        raise ValueError(f"Expected `level` to be between 0 and 1, but got {level}.")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    drawn = torch.randint(len(values), (n_resamples, len(values)), generator=generator)
    bounds = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = values.cpu().double()[drawn].mean(1).quantile(bounds).tolist()
    return low, high


def gae(
    forward_func: Callable[..., Tensor],
    explanation_func: Attribution | Callable[..., Tensor],
    inputs: Tensor,
    *,
    n_steps: int = 10,
    schedule: str = "published",
    baseline: float = 0.0,
    positive_index: Tensor | None = None,
    generator: torch.Generator | None = None,
    max_examples_per_batch: int | None = None,
    show_progress: bool = False,
    **explain_kwargs: Any,
) -> GAEResult:
    """Compute Global Attribution Evaluation (GAE) for one attributor.

    Every four images form a mosaic, and one of the four is drawn as the positive image. Its class is
    explained on the image itself, which is masked step by step in the order of the model's gradient
    (faithfulness and robustness), and on the mosaic (contrastiveness).

    Source: Vukadin et al., ACM TIST 15(3), 2024, section on GAE.

    Args:
        forward_func: the model in evaluation mode, which maps images, (B, C, H, W), to outputs, (B, K).
        explanation_func: a Captum ``Attribution``, or any callable ``(inputs, target=..., **kwargs)``
            that returns maps of shape (B, C, H, W), (B, 1, H, W) or (B, H, W).
        inputs: images, (4 M, C, H, W), H and W even.
        n_steps: number of masking states S, including the unmasked one.
        schedule: ``"published"`` masks a growing fraction of all elements at each step, so that masking
            the most relevant first accumulates (10, 30, 60, 100%) and masking the least relevant first
            does not. ``"cumulative"`` masks 10, 20, ... 90% in both orders.
        baseline: value of a masked element.
        positive_index: position (0 to 3) of the positive image in each mosaic, (M,). By default it is
            drawn with the model's probabilities of the four classes for the mosaic.
        generator: CPU generator for that draw.
        max_examples_per_batch: maximum number of images per batch; all by default.
        show_progress: whether to show a progress bar over the attributions.
        **explain_kwargs: further arguments of ``explanation_func``.

    Returns:
        The scores, one per mosaic.

    Raises:
        ValueError: if an argument has the wrong shape or value, or if a map has the wrong shape.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).eval()
        >>> result = gae(model, captum.attr.InputXGradient(model), torch.rand(8, 3, 4, 4))
        >>> result.gae.shape
        torch.Size([2])
    """
    setting = prepare(
        forward_func,
        inputs,
        n_steps=n_steps,
        schedule=schedule,
        baseline=baseline,
        positive_index=positive_index,
        generator=generator,
        max_examples_per_batch=max_examples_per_batch,
    )
    return setting.score(
        setting.explain(
            explanation_func,
            max_examples_per_batch=max_examples_per_batch,
            show_progress=show_progress,
            **explain_kwargs,
        )
    )


@dataclass(frozen=True)
class Setting:
    """The part of GAE that does not depend on the attributor, computed once.

    Attributes:
        mosaics: as in :class:`GAEResult`, (M, C, H, W).
        positives: as in :class:`GAEResult`, (M, C, H, W).
        positive_index: as in :class:`GAEResult`, (M,).
        targets: as in :class:`GAEResult`, (M,).
        states: the images to explain for local consistency: the positive image, its S - 1 states that are
            masked most relevant first, and as many least relevant first, (2 S - 1, M, C, H, W).
        impact: see :func:`~captum_abslrp.metrics.functional.impact_map`, (M, C, H, W).
        output_shift: see :func:`~captum_abslrp.metrics.functional.robustness`, (M, S - 1).
        scores: see :func:`~captum_abslrp.metrics.functional.score_map`, (M, H, W).
        of_four_classes: whether the four images of a mosaic have different predicted classes, (M,).
        baseline: value of a masked element.
    """

    mosaics: Tensor
    positives: Tensor
    positive_index: Tensor
    targets: Tensor
    states: Tensor
    impact: Tensor
    output_shift: Tensor
    scores: Tensor
    of_four_classes: Tensor
    baseline: float

    def explain(
        self,
        explanation_func: Attribution | Callable[..., Tensor],
        *,
        max_examples_per_batch: int | None = None,
        show_progress: bool = False,
        **explain_kwargs: Any,
    ) -> Tensor:
        """Return signed attributions of the states, followed by the mosaics, (2 S, M, C, H, W)."""
        asked = torch.cat([self.states, self.mosaics[None]])
        return _explain(
            explanation_func,
            asked.flatten(0, 1),
            self.targets.repeat(len(asked)),
            max_examples_per_batch or len(asked) * len(self.targets),
            show_progress,
            explain_kwargs,
        ).unflatten(0, (len(asked), -1))

    def score(self, attributions: Tensor) -> GAEResult:
        """Return the scores of attributions from :meth:`explain`."""
        relevance = functional.positive_part(attributions.flatten(0, 1))
        steps = self.output_shift.shape[1]
        (whole,), morf, lerf, (of_mosaic,) = relevance.view_as(attributions).split(
            [1, steps, steps, 1]
        )

        def distances(states: Tensor) -> Tensor:
            return torch.stack([functional.dice_distance(whole, state) for state in states], 1)

        faithfulness = functional.faithfulness(self.impact, whole)
        robustness = functional.robustness(distances(morf) - distances(lerf), self.output_shift)
        local_consistency = (faithfulness + robustness).clamp(min=0) / 2
        contrastiveness = functional.weighted_mean(self.scores.unsqueeze(1), of_mosaic).clamp(min=0)
        return GAEResult(
            local_consistency * contrastiveness,
            local_consistency,
            faithfulness,
            robustness,
            contrastiveness,
            self.mosaics,
            self.positives,
            self.positive_index,
            self.targets,
        )


def prepare(
    forward_func: Callable[..., Tensor],
    inputs: Tensor,
    *,
    n_steps: int = 10,
    schedule: str = "published",
    baseline: float = 0.0,
    positive_index: Tensor | None = None,
    generator: torch.Generator | None = None,
    max_examples_per_batch: int | None = None,
) -> Setting:
    """Compute mosaics, positives and masked states; arguments as in :func:`gae`."""
    if schedule not in SCHEDULES:
        raise ValueError(f"Expected `schedule` to be one of {SCHEDULES}, but got {schedule!r}.")
    if n_steps < 2:
        raise ValueError(f"Expected `n_steps` to be at least 2, but got {n_steps}.")
    size = len(inputs) if max_examples_per_batch is None else max_examples_per_batch
    if size < 1:
        raise ValueError(f"Expected `max_examples_per_batch` to be at least 1, but got {size}.")
    mosaics = functional.mosaic(inputs)
    with torch.no_grad():
        outputs = _in_batches(forward_func, inputs, size)
        mosaic_outputs = _in_batches(forward_func, mosaics, size)
    predictions = outputs.argmax(1).view(-1, 4)
    if positive_index is None:
        chances = functional.positive_probabilities(mosaic_outputs, predictions).double().cpu()
        positive_index = torch.multinomial(chances, 1, generator=generator).squeeze(1)
    elif positive_index.shape != (len(mosaics),) or not bool(
        ((positive_index >= 0) & (positive_index < 4)).all()
    ):
        raise ValueError(
            f"Expected `positive_index` to have {len(mosaics)} positions from 0 to 3, but got "
            f"{positive_index.tolist()}."
        )
    positive_index = positive_index.to(inputs.device)
    rows = 4 * torch.arange(len(mosaics), device=inputs.device) + positive_index
    positives = inputs[rows]
    targets = predictions.gather(1, positive_index.view(-1, 1)).squeeze(1)

    def masked(x: Tensor, t: Tensor) -> list[Tensor]:
        """States, outputs and maps for masking most relevant first, then for least relevant first."""
        unmasked = functional.gradient_map(forward_func, x, t)  # the start of both orders
        return [
            tensor
            for most_relevant_first in (True, False)
            for tensor in functional.masked_states(
                forward_func,
                x,
                t,
                most_relevant_first=most_relevant_first,
                n_steps=n_steps,
                schedule=schedule,
                baseline=baseline,
                unmasked=unmasked,
            )
        ]

    parts = [masked(x, t) for x, t in zip(positives.split(size), targets.split(size), strict=True)]
    morf_states, morf_outputs, morf_maps, lerf_states, lerf_outputs, lerf_maps = (
        torch.cat(tensors, 1) for tensors in zip(*parts, strict=True)
    )
    shift = (lerf_outputs - morf_outputs)[1:] / _away_from_zero(morf_outputs[0])
    probabilities = outputs[rows].softmax(1).gather(1, predictions)
    ranked = predictions.sort(1).values
    return Setting(
        mosaics,
        positives,
        positive_index,
        targets,
        torch.cat([positives[None], morf_states[1:], lerf_states[1:]]),
        functional.impact_map(lerf_maps, morf_maps),
        shift.T,
        functional.score_map(probabilities, positive_index, *inputs.shape[2:]),
        (ranked[:, 1:] != ranked[:, :-1]).all(1),
        baseline,
    )


def _away_from_zero(values: Tensor) -> Tensor:
    """Replace values below the smallest normal number in magnitude by this number."""
    tiny = torch.finfo(values.dtype).tiny
    return torch.where(values.abs() < tiny, tiny, values)


def _in_batches(function: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    return torch.cat([function(part) for part in x.split(size)])


def _explain(
    explanation_func: Attribution | Callable[..., Tensor],
    inputs: Tensor,
    targets: Tensor,
    size: int,
    show_progress: bool,
    kwargs: dict[str, Any],
) -> Tensor:
    """Maps (B, C, H, W) of an attributor for images and their targets."""
    explain = getattr(explanation_func, "attribute", explanation_func)
    batches: Sequence[tuple[Tensor, Tensor]] = list(
        zip(inputs.split(size), targets.split(size), strict=True)
    )
    maps = []
    for x, target in tqdm(batches, desc="attributions", disable=not show_progress):
        with warnings.catch_warnings():
            # In an image that is almost fully masked, little or nothing distinguishes the classes.
            warnings.filterwarnings("ignore", "The maps? of (target|the target|the contrast)")
            attribution = explain(x.clone(), target=target, **kwargs).detach()
        if attribution.dim() == 3:
            attribution = attribution.unsqueeze(1)
        fits = attribution.dim() == 4 and attribution.shape[1] in (1, x.shape[1])
        if not fits or len(attribution) != len(x) or attribution.shape[2:] != x.shape[2:]:
            raise ValueError(
                f"Expected `explanation_func` to return maps of shape (B, C, H, W), (B, 1, H, W) or "
                f"(B, H, W) for inputs of shape {tuple(x.shape)}, but got {tuple(attribution.shape)}. "
                f"Upsample layer maps, for example with `LayerAttribution.interpolate`."
            )
        maps.append(attribution.expand_as(x))
    return torch.cat(maps)
