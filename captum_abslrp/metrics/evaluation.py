"""Evaluation of attributors on many mosaics, with scores saved one by one, so that a run can be resumed.

The unit of work is one attributor on one mosaic. The random numbers of a mosaic depend only on the seed and
the index of the mosaic, so the scores do not depend on interruptions or on the number of processes.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from captum.attr import Attribution
from torch import Tensor
from tqdm.auto import tqdm

from captum_abslrp import processes
from captum_abslrp.metrics.comparison import (
    Comparison,
    MethodScores,
    score_method,
    scores_from_json,
    scores_to_json,
)
from captum_abslrp.metrics.gae import Setting, prepare

__all__ = ["Evaluation", "Images", "plan_mosaics"]


class Images(Protocol):
    """A sequence of images, (C, H, W), of one shape; raises OSError for images that cannot be read."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor: ...


class Evaluation:
    """Score attributors mosaic by mosaic, and save the scores to a folder, from which a run can be resumed.

    The folder contains ``settings.json``, the settings of the evaluation, and ``scores.jsonl``, with one line
    per mosaic and attributor. Other files in the folder are not modified.

    If ``torch.distributed`` is initialized, the processes share the mosaics: each process creates the
    evaluation and calls :meth:`run`, which returns the whole table in each process. All processes need
    access to the folder; process n > 0 writes to ``scores-n.jsonl``. A run can be resumed with a different
    number of processes. The scores equal those of a single process with the same number of threads
    (``torch.set_num_threads``); the number of threads affects the last digits.

    Args:
        folder: output folder; created if it does not exist.
        forward_func: the model in evaluation mode, which maps images, (B, C, H, W), to outputs, (B, K).
        images: a sequence of images, (C, H, W), H and W even; images that raise OSError are skipped.
        labels: one class per image. Mosaics consist of four classes as long as four classes are left.
        seed: random seed for the choice of images and positives.
        n_steps, schedule, baseline, max_examples_per_batch: as in
            :func:`~captum_abslrp.metrics.gae`.
        device: device for the images.
        description: other settings that affect the scores, such as names of the model and the data, as
            JSON-serializable values.
        resume: whether to continue from the scores in the folder. Failures are tried again.

    Raises:
        FileExistsError: if the folder has scores and ``resume`` is False.
        ValueError: if there are fewer than four images, or if the scores in the folder have different
            settings or are damaged.

    Example:
        >>> import tempfile
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).eval()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     evaluation = Evaluation(folder, model, torch.rand(12, 3, 4, 4))
        ...     table = evaluation.run({"saliency": captum.attr.Saliency(model)}, n_mosaics=2)
        >>> len(table.methods["saliency"].values["gae"])
        2
    """

    def __init__(
        self,
        folder: str | Path,
        forward_func: Callable[..., Tensor],
        images: Images,
        *,
        labels: Sequence[int] | None = None,
        seed: int = 0,
        n_steps: int = 10,
        schedule: str = "published",
        baseline: float = 0.0,
        max_examples_per_batch: int | None = None,
        device: torch.device | str = "cpu",
        description: Mapping[str, Any] | None = None,
        resume: bool = False,
    ) -> None:
        if len(images) < 4:
            raise ValueError(
                f"Expected `images` to have at least four images, but got {len(images)}."
            )
        self.forward_func = forward_func
        self.images = images
        self.labels = [0] * len(images) if labels is None else list(labels)
        self.seed = seed
        self.options: dict[str, Any] = {
            "n_steps": n_steps,
            "schedule": schedule,
            "baseline": baseline,
        }
        self.max_examples_per_batch = max_examples_per_batch
        self.device = device
        self.skipped: dict[int, str] = {}
        """The reasons why images could not be read, by image index."""
        self._scores: dict[tuple[int, str], MethodScores] = {}
        self._written: list[dict[str, Any]] = []
        settings = {
            **(description or {}),
            "images": len(images),
            "labels": zlib.crc32(json.dumps(self.labels).encode()),
            "seed": seed,
            **self.options,
        }
        folder, rank = Path(folder), processes.rank()
        self._path = folder / (f"scores-{rank}.jsonl" if rank else "scores.jsonl")
        self._add(processes.from_first(lambda: _open(folder, settings, resume)))

    def _add(self, entries: Iterable[dict[str, Any]]) -> None:
        for entry in entries:
            if "skipped" in entry:
                self.skipped[entry["skipped"]] = entry["reason"]
            else:
                scores = scores_from_json(entry["scores"])
                known = self._scores.get((entry["mosaic"], entry["method"]))
                if known is None or known.failure is not None:
                    self._scores[entry["mosaic"], entry["method"]] = scores

    def _write(self, entry: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self._written.append(entry)

    def run(
        self,
        explanation_funcs: Mapping[str, Attribution | Callable[..., Tensor]],
        n_mosaics: int = 100,
        *,
        show_progress: bool = False,
    ) -> Comparison:
        """Score attributors on mosaics ``0 .. n_mosaics - 1``, except where scores already exist.

        Args:
            explanation_funcs: attributors by name, as in :func:`~captum_abslrp.metrics.gae`.
            n_mosaics: number of mosaics. Images are reused if there are fewer than ``4 * n_mosaics``.
            show_progress: whether to show a progress bar over mosaics and attributors.

        Returns:
            The table of these attributors on these mosaics. An attributor that fails on a mosaic is not
            run again in this call, and its row gives the reason.

        Raises:
            ValueError: if fewer than four images can be read.
        """
        plan = plan_mosaics(self.labels, n_mosaics, self.seed)
        undone = [n for n in range(n_mosaics) if self._missing(n, explanation_funcs)]
        failed: set[str] = set()
        with tqdm(
            total=n_mosaics * len(explanation_funcs),
            initial=(n_mosaics - len(undone)) * len(explanation_funcs),
            disable=not show_progress or processes.rank() > 0,
        ) as bar:
            for number in processes.share(undone):
                setting = None
                for name in self._missing(number, explanation_funcs):
                    if name in failed:
                        continue
                    bar.set_postfix_str(f"mosaic {number + 1}, {name}")
                    setting = self.setting(number, plan[number]) if setting is None else setting
                    scores = score_method(
                        setting,
                        self.forward_func,
                        explanation_funcs[name],
                        self.max_examples_per_batch,
                    )
                    if scores.failure is not None:
                        failed.add(name)
                    self._scores[number, name] = scores
                    entry = {"mosaic": number, "method": name, "scores": scores_to_json(scores)}
                    self._write(entry)
                # Assume that the other processes progress at the same rate.
                bar.update(min(len(explanation_funcs) * processes.count(), bar.total - bar.n))
        for entries in processes.gather(self._written):
            self._add(entries)
        self._written = []
        self.skipped = dict(sorted(self.skipped.items()))
        return self.comparison(explanation_funcs, n_mosaics)

    def _missing(self, mosaic: int, methods: Iterable[str]) -> list[str]:
        return [name for name in methods if not self._is_done(mosaic, name)]

    def _is_done(self, mosaic: int, method: str) -> bool:
        scores = self._scores.get((mosaic, method))
        return scores is not None and scores.failure is None

    def comparison(self, methods: Sequence[str] | Mapping[str, Any], n_mosaics: int) -> Comparison:
        """Return the table of all scores so far."""
        table = {name: MethodScores() for name in methods}
        for number in range(n_mosaics):
            for name, total in table.items():
                total.extend(self._scores.get((number, name), MethodScores()))
        return Comparison(table)

    def setting(self, number: int, chosen: Sequence[int] | None = None) -> Setting:
        """Return the mosaic, the positive image and the masked states of mosaic ``number``.

        Args:
            number: index of the mosaic.
            chosen: indices of its images, if already known.
        """
        if chosen is None:
            chosen = plan_mosaics(self.labels, number + 1, self.seed)[number]
        generator = torch.Generator().manual_seed(_seed(self.seed, number))
        images = self._load(list(chosen), generator)
        return prepare(
            self.forward_func,
            images.to(self.device),
            **self.options,
            generator=generator,
            max_examples_per_batch=self.max_examples_per_batch,
        )

    def _load(self, chosen: list[int], generator: torch.Generator) -> Tensor:
        """Load four images; replace unreadable ones, if possible with images of the same class."""
        images: list[Tensor] = []
        reserve: list[int] | None = None
        while len(images) < 4:
            image = self._image(chosen[len(images)])
            if image is not None:
                images.append(image)
                continue
            if reserve is None:
                drawn = torch.randperm(len(self.images), generator=generator).tolist()
                reserve = [index for index in drawn if index not in chosen]
            if not reserve:
                raise ValueError(
                    f"Expected at least four readable images, but got "
                    f"{len(self.images) - len(self.skipped)}. The first error was: "
                    f"{next(iter(self.skipped.values()))}"
                )
            label = self.labels[chosen[len(images)]]
            reserve.sort(key=lambda index: self.labels[index] != label)
            chosen[len(images)] = reserve.pop(0)
        return torch.stack(images)

    def _image(self, index: int) -> Tensor | None:
        try:
            return self.images[index]
        except OSError as error:
            if index not in self.skipped:
                self.skipped[index] = str(error)
                self._write({"skipped": index, "reason": str(error)})
            return None


_SCORES = re.compile(r"scores(-\d+)?\.jsonl")
"""Names of the score files of all processes."""


def _open(folder: Path, settings: dict[str, Any], resume: bool) -> list[dict[str, Any]]:
    """Prepare a folder for these settings, and return its existing scores."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(settings))
    described = folder / "settings.json"
    paths = sorted(p for p in folder.iterdir() if _SCORES.fullmatch(p.name))
    if paths and not resume:
        raise FileExistsError(
            f"Expected `folder` to have no scores, but got {folder}, which has some. Pass `resume=True`, or "
            f"choose another folder."
        )
    if not paths:
        described.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        return []
    try:
        stored = dict(json.loads(described.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise ValueError(
            f"Expected {described} to contain the settings of the scores in this folder, but got "
            f"{type(error).__name__}. Choose another folder."
        ) from error
    for name in {**settings, **stored}:
        if stored.get(name) != settings.get(name):
            raise ValueError(
                f"Expected {name} to be {stored.get(name)!r}, as for the scores in {folder}, "
                f"but got {settings.get(name)!r}. Choose another folder."
            )
    return [entry for path in paths for entry in _read(path)]


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of a score file; remove an incomplete last line."""
    whole, newline, torn = path.read_bytes().rpartition(b"\n")
    if torn:
        # The run was interrupted while it wrote this line.
        os.truncate(path, len(whole) + len(newline))
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            entry = json.loads(line)
            _check(entry)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"Expected line {number} of {path} to contain scores, but got "
                f"{line[:80].decode(errors='replace')!r}. Remove the line and resume."
            ) from error
        yield entry


def _check(entry: dict[str, Any]) -> None:
    """Raise if an entry does not have the format of :class:`Evaluation`."""
    wanted = (
        {"skipped": int, "reason": str} if "skipped" in entry else {"mosaic": int, "method": str}
    )
    for name, kind in wanted.items():
        if not isinstance(entry[name], kind):
            raise TypeError(name)
    if "skipped" not in entry:
        scores_from_json(entry["scores"])


def plan_mosaics(labels: Sequence[int], n_mosaics: int, seed: int) -> list[list[int]]:
    """Choose the images of each mosaic; every image is used once, in random order, before any is reused.

    Args:
        labels: one class per image. The four images of a mosaic have different classes as long as
            images of four classes are left.
        n_mosaics: number of mosaics M.
        seed: random seed for the order.

    Returns:
        M lists of four different images. The plan for a smaller M is the beginning of that for a larger M.

    Example:
        >>> plan = plan_mosaics([0, 0, 1, 1, 2, 2, 3, 3], 2, seed=0)
        >>> sorted(plan[0] + plan[1])
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    generator = torch.Generator().manual_seed(_seed(seed, -1))
    rows = {label: row for row, label in enumerate(dict.fromkeys(labels))}
    left: list[list[int]] = [[] for _ in rows]
    counts = torch.zeros(len(rows))
    plan: list[list[int]] = []
    while len(plan) < n_mosaics:
        if counts.sum() < 4:
            left = [[] for _ in rows]
            for index in torch.randperm(len(labels), generator=generator).tolist():
                left[rows[labels[index]]].append(index)
            counts = torch.tensor([float(len(indices)) for indices in left])
        chosen: list[int] = []
        fresh = counts.clone()
        for _ in range(4):
            row = int(torch.multinomial(fresh if fresh.any() else counts, 1, generator=generator))
            chosen.append(left[row].pop())
            counts[row] -= 1
            fresh[row] = 0
        plan.append(chosen)
    return plan


def _seed(seed: int, number: int) -> int:
    # The CPU generator uses 32 bits of the seed.
    return zlib.crc32(f"{seed}:{number}".encode())
