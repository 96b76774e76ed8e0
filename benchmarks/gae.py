"""AbsLRP against Captum's methods on the three demo models, by GAE, GridPG and LeRF-MoRF.

``python -m benchmarks.gae run --model vgg`` scores (and goes on where it was stopped);
``python -m benchmarks.gae report`` writes the tables of ``benchmarks/RESULTS.md`` and ``README.md`` and
the figures.

The scenes are drawn anew from digits that no demo model has seen in training.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from captum_abslrp import AbsLRP, demo
from captum_abslrp.methods import get_method, list_methods
from captum_abslrp.metrics import Comparison, Evaluation, MethodScores
from captum_abslrp.metrics.comparison import score_maps
from captum_abslrp.metrics.evaluation import plan_mosaics
from captum_abslrp.metrics.functional import mosaic
from captum_abslrp.metrics.gae import Setting
from captum_abslrp.text import markdown_table

SEED = 0
HERE = Path(__file__).parent
VARIANTS = {
    f"{normalization}, {contrast or 'none'}{', gated' if combine == 'gated' else ''}": {
        "normalization": normalization,
        "contrast": contrast,
        "combine": combine,
    }
    for normalization in ("separate", "joint")
    for contrast, combine in [
        (None, "difference"),
        ("others", "difference"),
        ("softmax", "difference"),
        ("others", "gated"),
        ("softmax", "gated"),
    ]
}
PUBLISHED = "separate, others"


class Scenes:
    """Four scenes of single digits for each mosaic."""

    def __init__(self, n_mosaics: int) -> None:
        scenes = demo.render_scenes("single", 4 * n_mosaics, generator=SEED)
        self.inputs, self.masks = scenes.inputs, scenes.masks
        self.labels: list[int] = scenes.labels.tolist()

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Tensor:
        return self.inputs[index]


def explanation_funcs(model: nn.Module) -> dict[str, Callable[..., Tensor]]:
    """All methods of the command line, and absLRP with its options."""

    def method(name: str) -> Callable[..., Tensor]:
        return lambda inputs, target: get_method(name)(model)(inputs, target)

    def variant(normalization: str, **options: object) -> Callable[..., Tensor]:
        attribute = AbsLRP(model, normalization=normalization).attribute
        return lambda inputs, target: attribute(inputs, target, **options)

    others = {name: method(name) for name in list_methods() if name != "abslrp"}
    return {name: variant(**options) for name, options in VARIANTS.items()} | others


def oracle_maps(setting: Setting, masks: Tensor) -> Tensor:
    """What an attributor would say that knows the digit's pixels, masked ones excepted.

    Args:
        setting: of one mosaic.
        masks: where the digits of its four scenes are, (4, H, W), bool.

    Returns:
        Maps of the states and the mosaic, as ``Setting.explain`` returns them.
    """
    position = int(setting.positive_index)
    seen = setting.states != setting.baseline
    of_states = seen * masks[position].to(setting.states)
    right = torch.zeros_like(masks, dtype=setting.states.dtype)
    right[position] = masks[position].to(right)
    of_mosaic = mosaic(right.unsqueeze(1)).expand_as(setting.mosaics)
    return torch.cat([of_states, of_mosaic[None]])


def inverse_maps(setting: Setting, masks: Tensor) -> Tensor:
    """All pixels but those of :func:`oracle_maps`."""
    seen = torch.cat(
        [setting.states != setting.baseline, torch.ones_like(setting.mosaics[None]) > 0]
    )
    return seen * (oracle_maps(setting, masks) == 0).to(setting.states)


def oracles(
    evaluation: Evaluation, scenes: Scenes, model: nn.Module, n_mosaics: int
) -> dict[str, MethodScores]:
    """Scores of the oracle and of its inverse."""
    rows = {"oracle": MethodScores(), "inverse of the oracle": MethodScores()}
    for number, chosen in enumerate(plan_mosaics(scenes.labels, n_mosaics, SEED)):
        setting = evaluation.setting(number, chosen)
        for scores, maps in zip(rows.values(), (oracle_maps, inverse_maps), strict=True):
            found = maps(setting, scenes.masks[chosen])
            scores.extend(MethodScores(score_maps(setting, model, found)))
    return rows


def run(name: str, n_mosaics: int, work: Path, threads: int | None) -> None:
    """Score all methods on one demo model and store the table."""
    if threads:
        torch.set_num_threads(threads)
    model, scenes = demo.load_model(name), Scenes(n_mosaics)
    evaluation = Evaluation(
        work / name,
        model,
        scenes,
        labels=scenes.labels,
        seed=SEED,
        description={"model": name},
        resume=True,
    )
    table = evaluation.run(explanation_funcs(model), n_mosaics, show_progress=True)
    table.methods |= oracles(evaluation, scenes, model, n_mosaics)
    table.save(work / f"{name}.json")
    print(table)


NAMES = {
    "abslrp_recommended": "AbsLRP.recommended",
    PUBLISHED: "AbsLRP (published)",
    "joint, others": "AbsLRP, joint",
    "joint, others, gated": "AbsLRP, joint, gated",
    "lrp": "LRP",
    "ig": "IntegratedGradients",
    "saliency": "Saliency",
    "inputxgradient": "InputXGradient",
    "deeplift": "DeepLift",
    "guided_backprop": "GuidedBackprop",
    "guided_gradcam": "GuidedGradCam",
    "gradient_shap": "GradientShap",
    "gradcam": "LayerGradCam",
    "occlusion": "Occlusion",
    "random": "random",
    "oracle": "oracle",
    "inverse of the oracle": "inverse of the oracle",
}
"""Rows of the tables and bars of the figure; the other options of absLRP are in the frontier."""
TITLES = {"vgg": "VGG", "resnet": "ResNet", "vit": "ViT"}
SHOWN = {"gae": "GAE", "localization": "localization (GridPG)", "lerf_morf": "LeRF - MoRF"}


def report(work: Path) -> None:
    """Write the tables between the marks of ``RESULTS.md`` and ``README.md``, and the figures."""
    tables = {name: Comparison.load(work / f"{name}.json") for name in TITLES}
    parts = []
    for model, table in tables.items():
        rows = {NAMES[name]: table.methods[name] for name in NAMES}
        parts += [f"### {TITLES[model]}", "", table_of(rows), ""]
    parts += ["### Contrast and combination", ""]
    for model, table in tables.items():
        parts += [f"{TITLES[model]}:", "", table_of({n: table.methods[n] for n in VARIANTS}), ""]
    write_between_marks(HERE / "RESULTS.md", "\n".join(parts))
    write_between_marks(HERE.parent / "README.md", overview(tables))
    plot_scores(tables).savefig(HERE.parent / "docs" / "gae.png")
    plot_frontier(tables).savefig(HERE.parent / "docs" / "frontier.png")


def table_of(rows: dict[str, MethodScores]) -> str:
    """The table without its last column, the time, which other work on the machine has a share in."""
    lines = str(Comparison(rows)).splitlines()
    return "\n".join(line.rpartition(" | ")[0] + " |" for line in lines)


def overview(tables: dict[str, Comparison]) -> str:
    """Three scores of every method on every model, GAE with its 95 % confidence interval."""
    columns = [(model, score) for score in SHOWN for model in TITLES]
    header = [f"{SHOWN[score].partition(' (')[0]}<br>{TITLES[model]}" for model, score in columns]
    best = {
        column: max(
            tables[column[0]].methods[name].mean(column[1])
            for name in NAMES
            if "oracle" not in name and tables[column[0]].methods[name].failure is None
        )
        for column in columns
    }
    rows = []
    for name, title in NAMES.items():
        cells = [title]
        for model, score in columns:
            found = tables[model].methods[name]
            if found.failure is not None:
                cells.append("not supported")
                continue
            mean, (low, high) = found.mean(score), found.interval(score)
            text = f"{mean:.2f}".replace("-0.00", "0.00")
            if "oracle" not in name and text == f"{best[model, score]:.2f}":
                text = f"**{text}**"
            cells.append(f"{text} [{low:.2f}, {high:.2f}]" if score == "gae" else text)
        rows.append(cells)
    return markdown_table(["method", *header], rows, aligned=False) + "\n"


def write_between_marks(path: Path, text: str, name: str = "gae") -> None:
    before, begin, rest = path.read_text(encoding="utf-8").partition(f"<!-- {name}: begin -->\n")
    _, end, after = rest.partition(f"<!-- {name}: end -->\n")
    if not end:
        raise ValueError(f"Expected {path} to have the marks of the table, but got none.")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def plot_scores(tables: dict[str, Comparison]) -> Figure:
    """Bars with 95 % confidence intervals: rows are scores, columns models."""
    figure = Figure(figsize=(13, 11), dpi=110, layout="constrained")
    axes = figure.subplots(len(SHOWN), len(tables), sharey=True, sharex="row")
    for row, (column, title) in enumerate(SHOWN.items()):
        for axis, (model, table) in zip(axes[row], tables.items(), strict=True):
            for place, name in enumerate(NAMES):
                scores = table.methods[name]
                if scores.failure is not None:
                    axis.text(0.01, place, "not supported", va="center", fontsize=8, color="0.4")
                    continue
                mean, (low, high) = scores.mean(column), scores.interval(column)
                color = {"A": "#cc3311", "o": "0.6", "i": "0.6", "r": "0.6"}
                axis.barh(
                    place,
                    mean,
                    xerr=[[max(mean - low, 0)], [max(high - mean, 0)]],
                    color=color.get(NAMES[name][0], "#4477aa"),
                    ecolor="#333333",
                )
            axis.set_yticks(range(len(NAMES)), NAMES.values(), fontsize=9)
            axis.axvline(0, color="0.6", linewidth=0.8)
            axis.set_title(f"{TITLES[model]}: {title}", fontsize=11)
        axes[row, 0].invert_yaxis()
    return figure


def plot_frontier(tables: dict[str, Comparison]) -> Figure:
    """What a choice of contrast and combination gains in one score and pays in another."""
    figure = Figure(figsize=(13, 8.4), dpi=110, layout="constrained")
    axes = figure.subplots(2, len(tables), sharex=True, sharey="row")
    colors = {None: "#bbbbbb", "others": "#cc3311", "softmax": "#0077bb"}
    others = [name for name in NAMES if name not in VARIANTS and "oracle" not in name]
    for row, (column, reach) in enumerate({"lerf_morf": 0.03, "gae": 0.012}.items()):
        for axis, (model, table) in zip(axes[row], tables.items(), strict=True):
            for name, options in VARIANTS.items():
                scores = table.methods[name]
                color = colors[options["contrast"]]
                joint = options["normalization"] == "joint"
                axis.scatter(
                    scores.mean("localization"),
                    scores.mean(column),
                    s=110,
                    marker="s" if options["combine"] == "gated" else "o",
                    edgecolor=color,
                    facecolor=color if joint else "none",
                    linewidth=2,
                    label=name,
                    zorder=3,
                )
            labels: dict[tuple[float, float], list[str]] = {}
            for number, name in enumerate(others, start=1):
                scores = table.methods[name]
                if scores.failure is None:
                    x, y = scores.mean("localization"), scores.mean(column)
                    axis.scatter(x, y, s=14, color="0.3")
                    # Points that would hide each other's numbers share a label.
                    near = (at for at in labels if abs(at[0] - x) < 0.03 and abs(at[1] - y) < reach)
                    labels.setdefault(next(near, (x, y)), []).append(str(number))
            for point, numbers in labels.items():
                axis.annotate(
                    ", ".join(numbers),
                    point,
                    textcoords="offset points",
                    xytext=(4, 3),
                    fontsize=8,
                    color="0.2",
                )
            axis.set_title(f"{TITLES[model]}", fontsize=11)
            axis.set_xlabel(SHOWN["localization"] if row else "")
        axes[row, 0].set_ylabel(SHOWN[column])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    key = ", ".join(f"{number} {NAMES[name]}" for number, name in enumerate(others, start=1))
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=5,
        fontsize=9,
        title=key,
        title_fontsize=9,
    )
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    score = commands.add_parser("run")
    score.add_argument("--model", choices=demo.list_models(), required=True)
    score.add_argument("--n-mosaics", type=int, default=100)
    score.add_argument("--threads", type=int)
    written = commands.add_parser("report")
    for command in (score, written):
        command.add_argument("--work", type=Path, default=Path("gae-benchmark"))
    args = parser.parse_args()
    if args.command == "run":
        run(args.model, args.n_mosaics, args.work, args.threads)
    else:
        report(args.work)


if __name__ == "__main__":
    main()
