"""AbsLRP against Captum's methods on the three demo models, by GAE, GridPG and LeRF-MoRF.

``python -m benchmarks.gae run --model vgg`` computes scores, and resumes an interrupted run;
``python -m benchmarks.gae report`` writes the tables of ``benchmarks/RESULTS.md``.

The scenes are rendered anew from digits that no demo model has seen in training.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from captum_abslrp import AbsLRP, demo
from captum_abslrp.methods import get_method, list_methods
from captum_abslrp.metrics import Comparison, Evaluation, MethodScores
from captum_abslrp.metrics.comparison import score_maps
from captum_abslrp.metrics.evaluation import plan_mosaics
from captum_abslrp.metrics.functional import mosaic
from captum_abslrp.metrics.gae import Setting

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
    """Return all methods of the command line, and absLRP with its options."""

    def method(name: str) -> Callable[..., Tensor]:
        return lambda inputs, target: get_method(name)(model)(inputs, target)

    def variant(normalization: str, **options: object) -> Callable[..., Tensor]:
        attribute = AbsLRP(model, normalization=normalization).attribute
        return lambda inputs, target: attribute(inputs, target, **options)

    others = {name: method(name) for name in list_methods() if name != "abslrp"}
    return {name: variant(**options) for name, options in VARIANTS.items()} | others


def oracle_maps(setting: Setting, masks: Tensor) -> Tensor:
    """Maps of an attributor that knows the pixels of the digit, except for the masked ones.

    Args:
        setting: the states of one mosaic.
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
    """Maps of all pixels except those of :func:`oracle_maps`."""
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
"""Rows of the tables; the other options of absLRP have tables of their own."""
TITLES = {"vgg": "VGG", "resnet": "ResNet", "vit": "ViT"}


def report(work: Path) -> None:
    """Write the tables between the marks of ``RESULTS.md``."""
    tables = {name: Comparison.load(work / f"{name}.json") for name in TITLES}
    parts = []
    for model, table in tables.items():
        rows = {NAMES[name]: table.methods[name] for name in NAMES if name in table.methods}
        parts += [f"### {TITLES[model]}", "", table_of(rows), ""]
    parts += ["### Contrast and combination", ""]
    for model, table in tables.items():
        parts += [f"{TITLES[model]}:", "", table_of({n: table.methods[n] for n in VARIANTS}), ""]
    write_between_marks(HERE / "RESULTS.md", "\n".join(parts))


def table_of(rows: dict[str, MethodScores]) -> str:
    """Format the table without its last column, the time, which depends on the load of the machine."""
    lines = str(Comparison(rows)).splitlines()
    return "\n".join(line.rpartition(" | ")[0] + " |" for line in lines)


def write_between_marks(path: Path, text: str, name: str = "gae") -> None:
    before, begin, rest = path.read_text(encoding="utf-8").partition(f"<!-- {name}: begin -->\n")
    _, end, after = rest.partition(f"<!-- {name}: end -->\n")
    if not end:
        raise ValueError(f"Expected {path} to have the marks of the table, but got none.")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


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
