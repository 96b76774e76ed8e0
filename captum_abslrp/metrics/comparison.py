"""Several attributors on the same mosaics, positives and masked states, computed once.

Axes: M mosaics, C channels, H height, W width.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from captum.attr import Attribution
from torch import Tensor
from tqdm.auto import tqdm

from captum_abslrp.metrics import functional
from captum_abslrp.metrics.gae import SCORES, bootstrap_interval, prepare

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Comparison", "MethodScores", "compare"]

COLUMNS = (*SCORES, "localization", "lerf_morf")
"""Scores of a method, one value per mosaic each; all are better the higher they are."""


@dataclass
class MethodScores:
    """Scores of one method.

    Attributes:
        values: one value per mosaic for each of the scores.
        seconds: time that its attributions took in all.
        n_images: how many images were explained in that time.
        failure: why the method could not be scored; None where it could.
    """

    values: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in COLUMNS})
    seconds: float = 0.0
    n_images: int = 0
    failure: str | None = None

    def mean(self, column: str) -> float:
        """Mean of a score over the mosaics."""
        return sum(self.values[column]) / len(self.values[column])

    def interval(self, column: str, level: float = 0.95) -> tuple[float, float]:
        """Bootstrap confidence interval of :meth:`mean`."""
        return bootstrap_interval(torch.tensor(self.values[column], dtype=torch.float64), level)

    @property
    def seconds_per_image(self) -> float:
        return self.seconds / max(self.n_images, 1)


@dataclass
class Comparison:
    """Scores of several methods on the same mosaics; printed as a Markdown table.

    Attributes:
        methods: scores by the name of the method.
    """

    methods: dict[str, MethodScores]

    def __str__(self) -> str:
        rows = [["method", *COLUMNS, "ms / image"], ["---"] * (len(COLUMNS) + 2)]
        for name, scores in self.methods.items():
            if scores.failure is not None:
                rows.append([name, f"failed: {scores.failure}", *[""] * len(COLUMNS)])
                continue
            cells = []
            for column in COLUMNS:
                low, high = scores.interval(column)
                cells.append(f"{scores.mean(column):.3f} [{low:.3f}, {high:.3f}]")
            rows.append([name, *cells, f"{1000 * scores.seconds_per_image:.1f}"])
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)

    def to_dataframe(self) -> Any:
        """Means as a pandas DataFrame, one row per method.

        Raises:
            ModuleNotFoundError: if pandas is not installed.
        """
        import pandas

        rows: dict[str, dict[str, float | str | None]] = {}
        for name, scores in self.methods.items():
            rows[name] = {"failure": scores.failure}
            if scores.failure is None:
                rows[name] |= {column: scores.mean(column) for column in COLUMNS}
                rows[name]["seconds_per_image"] = scores.seconds_per_image
        return pandas.DataFrame.from_dict(rows, orient="index")

    def save(self, path: str | Path) -> None:
        """Write all values as JSON."""
        table = {name: asdict(scores) for name, scores in self.methods.items()}
        Path(path).write_text(json.dumps(table, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Comparison:
        """Read what :meth:`save` has written."""
        table = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls({name: MethodScores(**scores) for name, scores in table.items()})

    def plot(self) -> Figure:
        """Bars with confidence intervals per score; local consistency against contrastiveness."""
        from matplotlib.figure import Figure

        scored = {name: s for name, s in self.methods.items() if s.failure is None}
        figure = Figure(figsize=(15, 7), layout="constrained")
        *bars, scatter = figure.subplots(2, 4).flat
        for axis, column in zip(bars, COLUMNS, strict=True):
            means = [s.mean(column) for s in scored.values()]
            bounds = [s.interval(column) for s in scored.values()]
            errors = [
                [max(m - low, 0) for m, (low, _) in zip(means, bounds, strict=True)],
                [max(high - m, 0) for m, (_, high) in zip(means, bounds, strict=True)],
            ]
            axis.barh(list(scored), means, xerr=errors, color="#4477aa", ecolor="#333333")
            axis.invert_yaxis()
            axis.set_title(column.replace("_", " "))
        for name, s in scored.items():
            point = s.mean("contrastiveness"), s.mean("local_consistency")
            scatter.scatter(*point, color="#4477aa")
            scatter.annotate(name, point, textcoords="offset points", xytext=(4, 4), fontsize=8)
        scatter.set_xlabel("contrastiveness")
        scatter.set_ylabel("local consistency")
        scatter.margins(0.2)
        return figure


def compare(
    explanation_funcs: Mapping[str, Attribution | Callable[..., Tensor]],
    forward_func: Callable[..., Tensor],
    data: Tensor | Iterable[Any],
    *,
    n_steps: int = 10,
    schedule: str = "published",
    baseline: float = 0.0,
    generator: torch.Generator | None = None,
    max_examples_per_batch: int | None = None,
    show_progress: bool = False,
) -> Comparison:
    """Score several attributors on the same mosaics, positives and masked states.

    Args:
        explanation_funcs: attributors as for :func:`~captum_abslrp.metrics.gae`, by name.
        forward_func: from images (B, C, H, W) to outputs (B, K): the model, in evaluation mode.
        data: images (4 M, C, H, W), or a DataLoader over images or pairs of images and labels, which
            are not used. Images that are left over from fours take no part.
        n_steps, schedule, baseline, generator, max_examples_per_batch: as for
            :func:`~captum_abslrp.metrics.gae`.
        show_progress: show a progress bar over methods.

    Returns:
        The table: GAE and its parts, localization
        (:func:`~captum_abslrp.metrics.functional.localization`), the area between the LeRF and MoRF
        curves (:func:`~captum_abslrp.metrics.functional.lerf_morf_area`), and the time. A method that
        fails has a row that says why, and the others are still scored.

    Raises:
        ValueError: if there are fewer than four images.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).eval()
        >>> methods = {"saliency": captum.attr.Saliency(model), "input": lambda x, target: x}
        >>> table = compare(methods, model, torch.rand(8, 3, 4, 4))
        >>> list(table.methods)
        ['saliency', 'input']
    """
    methods = {name: MethodScores() for name in explanation_funcs}
    seen = False
    for images in _fours(data):
        seen = True
        setting = prepare(
            forward_func,
            images,
            n_steps=n_steps,
            schedule=schedule,
            baseline=baseline,
            generator=generator,
            max_examples_per_batch=max_examples_per_batch,
        )
        for name, explanation_func in tqdm(
            explanation_funcs.items(), desc="methods", disable=not show_progress
        ):
            scores = methods[name]
            if scores.failure is not None:
                continue
            start = time.perf_counter()
            try:
                attributions = setting.explain(
                    explanation_func, max_examples_per_batch=max_examples_per_batch
                )
            except Exception as error:  # whatever a method cannot do is said in its row
                scores.failure = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            scores.seconds += time.perf_counter() - start
            scores.n_images += attributions.shape[0] * attributions.shape[1]
            result = setting.score(attributions)
            measured = {name: getattr(result, name) for name in SCORES}
            measured["localization"] = functional.localization(
                attributions[-1], setting.positive_index
            )
            measured["lerf_morf"] = functional.lerf_morf_area(
                forward_func, setting.positives, attributions[0], setting.targets,
                n_steps=n_steps, baseline=baseline,
            )  # fmt: skip
            for column, values in measured.items():
                scores.values[column].extend(values.tolist())
    if not seen:
        raise ValueError("Expected `data` to hold at least four images, but got fewer.")
    return Comparison(methods)


def _fours(data: Tensor | Iterable[Any]) -> Iterator[Tensor]:
    """Batches of images whose number is a multiple of four, in order."""
    rest: Tensor | None = None
    for batch in [data] if isinstance(data, Tensor) else data:
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        images = images if rest is None else torch.cat([rest, images])
        whole = len(images) - len(images) % 4
        if whole:
            yield images[:whole]
        rest = images[whole:]
