"""Comparison of several attributors on the same mosaics, positives and masked states.

Axes: M mosaics, C channels, H height, W width.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import math
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
from captum_abslrp.metrics.gae import SCORES, Setting, bootstrap_interval, prepare
from captum_abslrp.text import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Comparison", "MethodScores", "compare"]

COLUMNS = (*SCORES, "localization", "lerf_morf")
"""Scores of a method, with one value per mosaic; higher is better for all of them."""


@dataclass
class MethodScores:
    """Scores of one method.

    Attributes:
        values: one value per mosaic for each score; the localization is NaN for mosaics with
            fewer than four classes.
        seconds: total time of the attributions.
        n_images: number of images that were explained in that time.
        failure: the reason if the method failed, or None.

    Example:
        >>> scores = MethodScores()
        >>> scores.values["gae"] += [0.25, 0.75]
        >>> scores.mean("gae")
        0.5
    """

    values: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in COLUMNS})
    seconds: float = 0.0
    n_images: int = 0
    failure: str | None = None

    def extend(self, more: MethodScores) -> None:
        """Add the scores of more mosaics; a failure on any mosaic is a failure of the method."""
        for column, values in more.values.items():
            self.values[column].extend(values)
        self.seconds += more.seconds
        self.n_images += more.n_images
        self.failure = self.failure or more.failure

    def mean(self, column: str) -> float:
        """Return the mean of a score over the mosaics that have one; NaN if none has."""
        values = self._known(column)
        return sum(values) / len(values) if values else math.nan

    def interval(self, column: str, level: float = 0.95) -> tuple[float, float]:
        """Return a bootstrap confidence interval of :meth:`mean`."""
        values = self._known(column)
        return _interval(tuple(values), level) if values else (math.nan, math.nan)

    def _known(self, column: str) -> list[float]:
        return [value for value in self.values[column] if not math.isnan(value)]

    @property
    def seconds_per_image(self) -> float:
        return self.seconds / max(self.n_images, 1)


@functools.lru_cache(maxsize=256)
def _interval(values: tuple[float, ...], level: float) -> tuple[float, float]:
    """The confidence interval of a column, cached for table, file and figure."""
    return bootstrap_interval(torch.tensor(values, dtype=torch.float64), level)


@dataclass
class Comparison:
    """Scores of several methods on the same mosaics; prints as a Markdown table.

    Attributes:
        methods: scores by name of the method.

    Example:
        >>> print(Comparison({"mine": MethodScores(failure="no rule")}))
        | method | gae | local_consistency | faithfulness | robustness | contrastiveness | localization
        | lerf_morf | ms / image |
        | --- | --- | --- | --- | --- | --- | --- | --- | --- |
        | mine | failed: no rule |  |  |  |  |  |  |  |
    """

    methods: dict[str, MethodScores]

    def __str__(self) -> str:
        header, *rows = self.rows()
        return markdown_table(header, rows, aligned=False)

    def rows(self) -> list[list[str]]:
        """Return the table as text: the column names, followed by one row per method."""
        rows = [["method", *COLUMNS, "ms / image"]]
        for name, scores in self.methods.items():
            if scores.failure is not None:
                rows.append([name, f"failed: {scores.failure}", *[""] * len(COLUMNS)])
                continue
            cells = []
            for column in COLUMNS:
                low, high = scores.interval(column)
                known = f"{scores.mean(column):.3f} [{low:.3f}, {high:.3f}]"
                cells.append("-" if math.isnan(low) else known)
            rows.append([name, *cells, f"{1000 * scores.seconds_per_image:.1f}"])
        return rows

    def to_csv(self) -> str:
        """Return means and confidence intervals as comma-separated values, one line per method."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        bounds = [f"{column}{end}" for column in COLUMNS for end in ("", "_low", "_high")]
        writer.writerow(["method", "mosaics", *bounds, "seconds_per_image", "failure"])
        for name, scores in self.methods.items():
            if scores.failure is not None:
                writer.writerow([name, "", *[""] * len(bounds), "", scores.failure])
                continue
            numbers = [n for c in COLUMNS for n in (scores.mean(c), *scores.interval(c))]
            mosaics = len(scores.values[COLUMNS[0]])
            writer.writerow([name, mosaics, *numbers, scores.seconds_per_image, ""])
        return buffer.getvalue()

    def to_dataframe(self) -> Any:
        """Return means as a pandas DataFrame, one row per method.

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

    def to_json(self) -> str:
        """Return all values as JSON."""
        table = {name: scores_to_json(scores) for name, scores in self.methods.items()}
        return json.dumps(table, indent=1)

    def save(self, path: str | Path) -> None:
        """Write all values as JSON."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Comparison:
        """Load a comparison that :meth:`save` has written."""
        table = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls({name: scores_from_json(scores) for name, scores in table.items()})

    def plot(self, title: str | None = None) -> Figure:
        """Plot bars with confidence intervals per score, and local consistency against contrastiveness.

        Args:
            title: heading of the figure.
        """
        from matplotlib.figure import Figure

        scored = {name: s for name, s in self.methods.items() if s.failure is None}
        names = list(scored)
        height = 1.6 + 0.26 * max(len(names), 6)
        figure = Figure(figsize=(15, 2 * height), dpi=120, layout="constrained")
        if title:
            figure.suptitle(title, fontsize=13, parse_math=False)
        axes = figure.subplots(2, 4)
        *bars, scatter = axes.flat
        for axis, column in zip(bars, COLUMNS, strict=True):
            means = [s.mean(column) for s in scored.values()]
            bounds = [s.interval(column) for s in scored.values()]
            errors = [
                [max(m - low, 0) for m, (low, _) in zip(means, bounds, strict=True)],
                [max(high - m, 0) for m, (_, high) in zip(means, bounds, strict=True)],
            ]
            axis.barh(range(len(names)), means, xerr=errors, color="#4477aa", ecolor="#333333")
            axis.set_yticks(range(len(names)), names)
            axis.invert_yaxis()
            axis.axvline(0, color="0.6", linewidth=0.8)
            axis.set_title(column.replace("_", " "))
        for axis in axes[:, 1:].flat:
            axis.tick_params(labelleft=axis is scatter)
        for number, (name, s) in enumerate(scored.items()):
            point = s.mean("contrastiveness"), s.mean("local_consistency")
            scatter.scatter(
                *point, label=name, color=f"C{number % 10}", marker="osD"[number // 10 % 3]
            )
        scatter.set_xlabel("contrastiveness")
        scatter.set_ylabel("local consistency")
        scatter.margins(0.1)
        scatter.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
        return figure


def scores_to_json(scores: MethodScores) -> dict[str, Any]:
    """Convert scores to JSON-serializable values, with None instead of NaN."""
    table = asdict(scores)
    table["values"] = {
        column: [None if math.isnan(value) else value for value in values]
        for column, values in scores.values.items()
    }
    return table


def scores_from_json(table: dict[str, Any]) -> MethodScores:
    """Restore scores from :func:`scores_to_json`."""
    values = {
        column: [math.nan if value is None else value for value in values]
        for column, values in table["values"].items()
    }
    return MethodScores(**{**table, "values": values})


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
        explanation_funcs: attributors by name, as in :func:`~captum_abslrp.metrics.gae`.
        forward_func: the model in evaluation mode, which maps images, (B, C, H, W), to outputs, (B, K).
        data: images, (4 M, C, H, W), or a DataLoader over images or over pairs of images and labels (labels
            are ignored). If the number of images is not a multiple of four, the remainder is dropped.
        n_steps, schedule, baseline, generator, max_examples_per_batch: as in
            :func:`~captum_abslrp.metrics.gae`.
        show_progress: whether to show a progress bar over methods.

    Returns:
        The table: GAE and its parts, localization
        (:func:`~captum_abslrp.metrics.functional.localization`), the area between the LeRF and MoRF
        curves (:func:`~captum_abslrp.metrics.functional.lerf_morf_area`), and the time. If a method fails,
        its row gives the reason, and the other methods are still scored.

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
            if methods[name].failure is None:
                methods[name].extend(
                    score_method(setting, forward_func, explanation_func, max_examples_per_batch)
                )
    if not seen:
        raise ValueError("Expected `data` to have at least four images, but got fewer.")
    return Comparison(methods)


def score_method(
    setting: Setting,
    forward_func: Callable[..., Tensor],
    explanation_func: Attribution | Callable[..., Tensor],
    max_examples_per_batch: int | None = None,
) -> MethodScores:
    """Score one attributor in one setting; ``failure`` is the reason if it raises an error."""
    start = time.perf_counter()
    try:
        attributions = setting.explain(
            explanation_func, max_examples_per_batch=max_examples_per_batch
        )
    except Exception as error:  # attributors fail in many ways on unknown layers
        return MethodScores(failure=f"{type(error).__name__}: {error}".splitlines()[0])
    seconds = time.perf_counter() - start
    n_images = attributions.shape[0] * attributions.shape[1]
    return MethodScores(score_maps(setting, forward_func, attributions), seconds, n_images)


def score_maps(
    setting: Setting, forward_func: Callable[..., Tensor], attributions: Tensor
) -> dict[str, list[float]]:
    """Compute all columns for attributions, (2 S, M, C, H, W), from :meth:`Setting.explain`."""
    result = setting.score(attributions)
    values = {name: getattr(result, name) for name in SCORES}
    localization = functional.localization(attributions[-1], setting.positive_index)
    # In a mosaic with fewer than four classes, several quadrants can be correct.
    values["localization"] = localization.where(setting.of_four_classes, torch.nan)
    values["lerf_morf"] = functional.lerf_morf_area(
        forward_func,
        setting.positives,
        attributions[0],
        setting.targets,
        n_steps=len(attributions) // 2,
        baseline=setting.baseline,
    )
    return {column: values[column].tolist() for column in COLUMNS}


def _fours(data: Tensor | Iterable[Any]) -> Iterator[Tensor]:
    """Yield batches of images in order, with a multiple of four images each."""
    rest: Tensor | None = None
    for batch in [data] if isinstance(data, Tensor) else data:
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        images = images if rest is None else torch.cat([rest, images])
        whole = len(images) - len(images) % 4
        if whole:
            yield images[:whole]
        rest = images[whole:]
