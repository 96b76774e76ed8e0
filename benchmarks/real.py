"""Score all methods on real models: localization, faithfulness, GAE, randomized parameters, time, memory.

``python -m benchmarks.real run --model lite0 --images FOLDER`` computes scores, and resumes an interrupted
run; ``python -m benchmarks.real report`` prints the tables. ``--model`` is ``lite0`` (extra ``real``), the
name of a timm model (``--checkpoint FILE``), or ``FILE.py:FUNCTION``, a function that returns a model and its
preprocessing; :func:`benchmarks.real_data.load_case` says how images are labeled.

Scores:

- ``gridpg_half``, ``gridpg_full``: share of positive relevance in the right quarter of a mosaic of four
  classes, quarters of half the size of the images, and of their size (Böhle et al. 2021); chance is 0.25;
- ``lerf_morf``: area between the curves of masking (symmetric relevance gain, Blücher et al. 2024);
- ``gae``: Global Attribution Evaluation (Vukadin et al. 2024);
- ``energy``: share of positive relevance in the box of the object, where boxes are known;
- ``mprt_head``, ``mprt_half``, ``mprt_all`` and with ``_abs``: rank correlation of the map with the map of a
  model with a random head, a random upper half or random parameters everywhere (Adebayo et al. 2018), of
  signed maps and of magnitudes. A method that depends on the parameters has a low correlation;
- ``time``: time of a map in forward passes; ``memory``: peak memory beyond the model in MB, on a GPU.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from benchmarks.gae import write_between_marks
from benchmarks.real_data import Case, Mosaics, load_case, make_mosaics
from benchmarks.real_methods import Maps, methods_of
from captum_abslrp import demo
from captum_abslrp.metrics.evaluation import plan_mosaics
from captum_abslrp.metrics.functional import lerf_morf_area, localization
from captum_abslrp.metrics.gae import Setting, bootstrap_interval, prepare
from captum_abslrp.text import markdown_table

HERE = Path(__file__).parent
RANDOMIZED = {"head": 0.0, "half": 0.5, "all": 1.0}
GROUPS = [
    ["gridpg_half"],
    ["lerf_morf"],
    ["gae"],
    ["gridpg_full"],
    ["energy"],
    [f"mprt_{part}{kind}" for part in RANDOMIZED for kind in ("", "_abs")],
    ["time"],
    ["memory"],
]
"""The scores in the order in which they are computed; those of a group share maps."""
SCORES = [score for group in GROUPS for score in group]


class Benchmark:
    """Scores of methods on one model, each written to ``scores.jsonl`` as soon as it is computed.

    Args:
        folder: where scores are written; a later run reads them.
        case: model and images, on one device.
        sizes: how many mosaics (``gridpg``, ``gae``) and images (``images``, ``mprt``).
        batch_size: of the maps.
    """

    def __init__(self, folder: Path, case: Case, sizes: dict[str, int], batch_size: int) -> None:
        self.case = case
        self.sizes = sizes
        self.batch_size = batch_size
        self.path = folder / "scores.jsonl"
        self._made: dict[str, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self.done = {(e["method"], e["score"]) for e in read(self.path) if "values" in e}

    def run(self, methods: dict[str, Maps], scores: list[str]) -> None:
        """Score the methods that have no scores yet."""
        impossible = {
            "energy": self.case.boxes is None,
            "memory": not self.case.images.is_cuda,
        }
        failed: set[str] = set()
        groups = [[s for s in group if s in scores and not impossible.get(s)] for group in GROUPS]
        asked = [(name, score) for group in groups for name in methods for score in group]
        for name, score in tqdm([pair for pair in asked if pair not in self.done], mininterval=5):
            if name in failed:
                continue
            entry: dict[str, Any] = {"method": name, "score": score}
            try:
                entry["values"] = self._score(score.partition("_")[0], score, methods[name])
            except torch.OutOfMemoryError as error:
                entry["failure"] = f"out of memory: {error}".splitlines()[0]
            except Exception as error:  # methods fail on models that they do not know
                entry["failure"] = f"{type(error).__name__}: {error}".splitlines()[0]
                failed.add(name)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            if self.case.images.is_cuda:
                torch.cuda.empty_cache()

    def _score(self, kind: str, score: str, maps: Maps) -> list[float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(self, f"_{kind}")(score, maps)

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        """Return a value that all methods share; it is computed for the first of them."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def _explain(
        self, model: nn.Module, x: Tensor, targets: Tensor, maps: Maps, batch_size: int = 0
    ) -> Tensor:
        size = batch_size or self.batch_size
        parts = zip(x.split(size), targets.split(size), strict=True)
        return torch.cat([maps(model, images, of).detach() for images, of in parts])

    def _gridpg(self, score: str, maps: Maps) -> list[float]:
        full = score.endswith("full")
        mosaics: Mosaics = self._once(
            score, lambda: make_mosaics(self.case, self.sizes["gridpg"], full_size=full)
        )
        size = max(1, self.batch_size // 4) if full else self.batch_size
        found = self._explain(mosaics.model, mosaics.images, mosaics.targets, maps, size)
        return localization(found, mosaics.positions).tolist()

    def _images(self, count: int) -> tuple[Tensor, Tensor]:
        """Images, drawn at random, and the classes that the model predicts for them."""
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randperm(len(self.case.images), generator=generator)[:count]
        images = self.case.images[chosen]
        with torch.no_grad():
            return images, self.case.model(images).argmax(1)

    def _lerf(self, score: str, maps: Maps) -> list[float]:
        x, targets = self._once("images", lambda: self._images(self.sizes["images"]))
        found = self._explain(self.case.model, x, targets, maps)
        return lerf_morf_area(self.case.model, x, found, targets).tolist()

    def _gae(self, score: str, maps: Maps) -> list[float]:
        setting: Setting = self._once("gae", self._setting)
        found = setting.explain(
            lambda x, target: maps(self.case.model, x, target),
            max_examples_per_batch=self.batch_size,
        )
        return setting.score(found).gae.tolist()

    def _setting(self) -> Setting:
        labels: list[int] = self.case.labels.tolist()
        rows = plan_mosaics(labels, self.sizes["gae"], 0)
        return prepare(
            self.case.model,
            self.case.images[torch.tensor(rows).flatten()],
            generator=torch.Generator().manual_seed(0),
            max_examples_per_batch=self.batch_size,
        )

    def _energy(self, score: str, maps: Maps) -> list[float]:
        boxes = self.case.boxes
        assert boxes is not None
        count = self.sizes["images"]
        x, targets = self.case.images[:count], self.case.labels[:count]
        positive = self._explain(self.case.model, x, targets, maps).sum(1).clamp(min=0)
        total = positive.flatten(1).sum(1).clamp(min=torch.finfo(positive.dtype).tiny)
        return ((positive * boxes[:count]).flatten(1).sum(1) / total).tolist()

    def _mprt(self, score: str, maps: Maps) -> list[float]:
        part, magnitudes = score.split("_")[1], score.endswith("_abs")
        x, targets = self._once("mprt", lambda: self._images(self.sizes["mprt"]))
        if maps is not self._made.get("maps"):  # one method after the other
            self._made["maps"], self._made["of parts"] = maps, {}
        trained, random = (
            self._map_of(name, share, x, targets, maps)
            for name, share in ((None, 0.0), (part, RANDOMIZED[part]))
        )
        if magnitudes:
            trained, random = trained.abs(), random.abs()
        return rank_correlation(trained, random).tolist()

    def _map_of(
        self, part: str | None, share: float, x: Tensor, targets: Tensor, maps: Maps
    ) -> Tensor:
        """Maps (B, P) of the model, or of the model with random parts."""
        known: dict[str | None, Tensor] = self._made["of parts"]
        if part not in known:
            model = self.case.model
            if part is not None:
                model = self._once(f"mprt {part}", lambda: randomized(self.case.model, share))
            known[part] = self._explain(model, x, targets, maps).sum(1).flatten(1)
        return known[part]

    def _time(self, score: str, maps: Maps) -> list[float]:
        x, targets = self._images(4)
        model = self.case.model

        def forward() -> None:
            with torch.no_grad():
                model(x)

        maps(model, x, targets)
        ratios = []
        for _ in range(3):
            base = min(seconds(forward) for _ in range(3))
            ratios.append(seconds(lambda: maps(model, x, targets)) / base)
        return ratios

    def _memory(self, score: str, maps: Maps) -> list[float]:
        x, targets = self._images(4)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        maps(self.case.model, x, targets)
        return [(torch.cuda.max_memory_allocated() - before) / 2**20]


def randomized(model: nn.Module, share: float) -> nn.Module:
    """Copy a model and randomize the upper ``share`` of its layers, at least one.

    New parameters are drawn from a normal distribution with the mean and standard deviation of the old ones.
    """
    model = copy.deepcopy(model)
    layers = [module for module in model.modules() if [*module.parameters(recurse=False)]]
    generator = torch.Generator().manual_seed(0)
    for layer in layers[-max(1, round(share * len(layers))) :]:
        for parameter in layer.parameters(recurse=False):
            values = parameter.detach()
            noise = torch.randn(values.shape, generator=generator).to(values)
            parameter.data = values.mean() + noise * (values.std() if values.numel() > 1 else 1)
    return model


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's correlation of each row, (B, P) and (B, P) to (B,); 0 where a row is constant."""
    first, second = (torch.stack([_ranks(row) for row in rows]) for rows in (a, b))
    length = first.norm(dim=1) * second.norm(dim=1)
    return torch.where(length > 0, (first * second).sum(1) / length, 0)


def _ranks(values: Tensor) -> Tensor:
    """Ranks of values (P,), minus their mean; equal values share the mean of their ranks."""
    ordered, order = values.sort()
    _, counts = ordered.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0).double()
    of_group = ends - (counts + 1) / 2
    ranks = torch.empty(len(values), dtype=torch.float64, device=values.device)
    ranks[order] = of_group.repeat_interleave(counts)
    return ranks - ranks.mean()


def seconds(run: Callable[[], Any]) -> float:
    """Return the time of a call, including the work that it starts on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Read the scores so far; incomplete lines are skipped."""
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


REAL = {
    "lite0": "EfficientNet-Lite0",
    "resnet56": "ResNet-56",
    "vit_tiny": "ViT-Tiny/16",
    "dinov2": "DINOv2 ViT-S/14",
}
"""The models of the tables in ``README.md`` and ``RESULTS.md``, by the names of their folders."""
DEMO = {name: f"demo:{name}" for name in demo.list_models()}
SUMMARY = {"GridPG": "gridpg_half", "LeRF - MoRF": "lerf_morf", "GAE": "gae"}
FULL_SIZE = ("resnet56", *DEMO)
"""Models of images that are too small to be shrunk."""
ROWS = [
    "AbsLRP.recommended",
    "AbsLRP separate, others",
    "AbsLRP joint, others",
    "AbsLRP joint, no contrast",
    "LRP epsilon_plus, softmax",
    "LRP epsilon_plus, no contrast",
    "LRP epsilon_gamma_box, no contrast",
    "LRP attnlrp, no contrast",
    "LRP cp_lrp, no contrast",
    "LRP res_lrp, no contrast",
    "GuidedGradCam, all ReLUs",
    "LayerGradCam",
    "LayerCAM",
    "Occlusion",
    "IntegratedGradients",
    "GradientShap",
    "InputXGradient",
    "Saliency",
    "GuidedBackprop, all ReLUs",
    "random",
]
"""The methods in the overview of ``RESULTS.md``."""
README_ROWS = [
    "AbsLRP.recommended",
    "AbsLRP separate, others",
    "LRP epsilon_plus, softmax",
    "LRP epsilon_plus, no contrast",
    "LRP attnlrp, no contrast",
    "GuidedGradCam, all ReLUs",
    "LayerGradCam",
    "Occlusion",
    "IntegratedGradients",
    "Saliency",
    "random",
]
README_SCORES = {"GridPG": "gridpg_half"}


def report(folder: Path, patterns: list[str]) -> str:
    """Tables of all models in a folder: means and 95% bootstrap intervals."""
    parts = []
    titles = REAL | DEMO
    paths = sorted(folder.glob("*/scores.jsonl"), key=lambda path: path.parent.name not in REAL)
    for path in paths:
        found = {(e["method"], e["score"]): e for e in read(path)}
        methods = [*dict.fromkeys(method for method, _ in found)]
        names = [m for m in methods if not patterns or any(fnmatch.fnmatch(m, p) for p in patterns)]
        columns = [s for s in SCORES if any("values" in found.get((m, s), {}) for m in names)]
        rows = [[name, *(_cell(found.get((name, s))) for s in columns)] for name in names]
        failures = {
            f"- {method}: {entry['failure']}"
            for (method, _), entry in found.items()
            if method in names and "failure" in entry
        }
        table = markdown_table(["method", *columns], rows, aligned=False)
        title = titles.get(path.parent.name, path.parent.name)
        parts += [f"### {title}", "", table, "", *sorted(failures), ""]
    return "\n".join(parts)


def summary(
    folder: Path,
    models: Mapping[str, str],
    *,
    methods: Sequence[str],
    scores: Mapping[str, str],
    errors: bool,
) -> str:
    """A table of some scores of some methods on some models, with the best of each column in bold.

    Args:
        folder: the folder with the scores.
        models: from the names of folders to titles.
        methods: the rows.
        scores: from titles to the names of scores.
        errors: whether to add the standard errors of the means.
    """
    columns = [(title, model) for title in scores for model in models]
    found = {
        (entry["method"], entry["score"], model): entry["values"]
        for model in models
        for entry in read(folder / model / "scores.jsonl")
        if "values" in entry
    }
    cells: dict[str, list[tuple[float, float] | None]] = {}
    for method in methods:
        cells[method] = []
        for title, model in columns:
            full = title == "GridPG" and model in FULL_SIZE
            values = found.get((method, "gridpg_full" if full else scores[title], model))
            sample = torch.tensor(values or [], dtype=torch.float64)
            error = sample.std().item() / len(sample) ** 0.5 if values else 0.0
            cells[method].append((sample.mean().item(), error) if values else None)
    best = [
        max((f"{cell[0]:.2f}" for cell in column if cell), default="")
        for column in zip(*cells.values(), strict=True)
    ]
    rows = []
    for method, of_method in cells.items():
        row = [method]
        for cell, highest in zip(of_method, best, strict=True):
            text = "-" if cell is None else f"{cell[0]:.2f}".replace("-0.00", "0.00")
            bold = f"**{text}**" if text == highest else text
            row.append(f"{bold} ± {cell[1]:.2f}" if errors and cell else bold)
        rows.append(row)
    header = ["method", *(f"{title}<br>{models[model]}" for title, model in columns)]
    return markdown_table(header, rows, aligned=False) + "\n"


def _cell(entry: dict[str, Any] | None) -> str:
    if entry is None or "failure" in entry:
        return "-"
    values = torch.tensor(entry["values"], dtype=torch.float64)
    if entry["score"] in ("time", "memory"):
        return f"{values.median():.1f}"
    low, high = bootstrap_interval(values)
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, dest="command")
    score = commands.add_parser("run")
    score.add_argument("--model", required=True)
    score.add_argument("--images", type=Path, help="a folder or an .npz file; not for demo:NAME")
    score.add_argument("--checkpoint", type=Path)
    score.add_argument("--classes", default="", help="names in the order of the outputs: dog,cat")
    score.add_argument("--scores", default=",".join(SCORES), help="some of them: gridpg_half,gae")
    score.add_argument("--name", help="of the folder; default: the model")
    score.add_argument("--device", default="cpu")
    score.add_argument("--batch-size", type=int, default=6)
    for name, count in {"gridpg": 48, "images": 48, "gae": 24, "mprt": 12}.items():
        score.add_argument(f"--n-{name}", type=int, default=count)
    printed = commands.add_parser("report")
    printed.add_argument(
        "--write", action="store_true", help="write the tables into README.md and RESULTS.md"
    )
    for command in (score, printed):
        command.add_argument("--work", type=Path, default=Path("real-benchmark"))
        command.add_argument(
            "--methods",
            nargs="*",
            default=[],
            metavar="PATTERN",
            help="such as 'LRP *'; default: all",
        )
    args = parser.parse_args()
    if args.command == "report":
        tables = report(args.work, args.methods)
        print(tables)
        if args.write:
            overview = "\n".join(
                summary(args.work, m, methods=ROWS, scores=SUMMARY, errors=True)
                for m in (REAL, DEMO)
            )
            write_between_marks(HERE / "RESULTS.md", f"{overview}\n{tables}", "real")
            short = {name: title.split("/")[0].split()[0] for name, title in REAL.items()}
            shown = summary(
                args.work, short, methods=README_ROWS, scores=README_SCORES, errors=False
            )
            write_between_marks(HERE.parent / "README.md", shown, "real")
        return
    case = load_case(
        args.model,
        args.images,
        checkpoint=args.checkpoint,
        classes=[name for name in args.classes.split(",") if name],
    ).to(args.device)
    sizes = {name: getattr(args, f"n_{name}") for name in ("gridpg", "images", "gae", "mprt")}
    folder = args.work / (args.name or args.model.rpartition(":")[2])
    methods = methods_of(case.model)
    chosen = {
        name: maps
        for name, maps in methods.items()
        if not args.methods or any(fnmatch.fnmatch(name, pattern) for pattern in args.methods)
    }
    unknown = [score for score in args.scores.split(",") if score not in SCORES]
    if unknown or not chosen:
        parser.error(f"there are no such scores or methods: {unknown or args.methods}")
    Benchmark(folder, case, sizes, args.batch_size).run(chosen, args.scores.split(","))
    print(report(folder.parent, args.methods))


if __name__ == "__main__":
    main()
