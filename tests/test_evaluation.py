"""``Evaluation`` and ``captum-abslrp evaluate``: stopped, resumed, and disturbed."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from captum.attr import InputXGradient, IntegratedGradients, Occlusion, Saliency
from PIL import Image
from torch import Tensor, nn

from captum_abslrp import demo
from captum_abslrp.cli import main
from captum_abslrp.cli.models import load_subject
from captum_abslrp.metrics import Comparison, Evaluation, MethodScores, gae
from captum_abslrp.metrics.comparison import score_maps
from captum_abslrp.metrics.evaluation import plan_mosaics
from captum_abslrp.metrics.functional import mosaic
from captum_abslrp.metrics.gae import SCORES, Setting

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64, 6)).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def scored(table: Comparison) -> dict[str, dict[str, list[float]]]:
    """All but the times, in a form in which NaN equals NaN."""
    return {
        name: {column: list(map(repr, values)) for column, values in scores.values.items()}
        for name, scores in table.methods.items()
    }


# --- the plan -----------------------------------------------------------------------------------


def test_every_image_takes_part_once_before_any_does_twice() -> None:
    labels = [i % 5 for i in range(40)]
    plan = plan_mosaics(labels, 20, seed=3)
    assert sorted(chain(*plan[:10])) == list(range(40))
    assert max(Counter(chain(*plan)).values()) == 2
    assert plan_mosaics(labels, 7, seed=3) == plan[:7]
    assert plan_mosaics(labels, 20, seed=4) != plan


def test_mosaics_are_of_four_classes_while_there_are_four() -> None:
    plan = plan_mosaics([i % 7 for i in range(70)], 15, seed=0)
    assert all(len({i % 7 for i in chosen}) == 4 for chosen in plan)
    for labels in ([0] * 8, [0] * 5 + [1] * 3):
        plan = plan_mosaics(labels, 3, seed=0)
        assert all(len(set(chosen)) == 4 for chosen in plan)


# --- Evaluation ---------------------------------------------------------------------------------


def test_scores_are_those_of_gae(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    evaluation = Evaluation(tmp_path, model, images, seed=5)
    table = evaluation.run({"saliency": Saliency(model)}, 3)
    for number, chosen in enumerate(plan_mosaics([0] * 16, 3, seed=5)):
        setting = evaluation.setting(number)
        expected = gae(
            model, Saliency(model), images[chosen], positive_index=setting.positive_index
        )
        for name in SCORES:
            values = torch.tensor(table.methods["saliency"].values[name][number])
            torch.testing.assert_close(values, getattr(expected, name)[0])


class Stopping:
    """An attributor at whose n-th call the run is stopped."""

    def __init__(self, model: nn.Module, calls: int) -> None:
        self.model = model
        self.left = calls

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return Saliency(self.model).attribute(x, target=target)


@pytest.mark.parametrize("torn", [b"", b'{"mosaic": 1, "meth'])
def test_a_stopped_run_goes_on_and_loses_nothing(
    model: nn.Module, images: Tensor, tmp_path: Path, torn: bytes
) -> None:
    whole = Evaluation(tmp_path / "whole", model, images).run(
        {"gradient": InputXGradient(model), "saliency": Saliency(model)}, 4
    )
    folder = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        Evaluation(folder, model, images).run(
            {"gradient": InputXGradient(model), "saliency": Stopping(model, 2)}, 4
        )
    finished = (folder / "scores.jsonl").read_bytes()
    assert finished.count(b"\n") == 5
    (folder / "scores.jsonl").write_bytes(finished + torn)
    counting = Stopping(model, 100)
    resumed = Evaluation(folder, model, images, resume=True).run(
        {"gradient": InputXGradient(model), "saliency": counting}, 4
    )
    assert scored(resumed) == scored(whole)
    assert counting.left == 98
    assert (folder / "scores.jsonl").read_bytes().startswith(finished)


def test_more_mosaics_and_methods_are_added(
    model: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    both: dict[str, Any] = {"gradient": InputXGradient(model), "saliency": Saliency(model)}
    Evaluation(tmp_path / "grown", model, images).run({"gradient": both["gradient"]}, 2)
    grown = Evaluation(tmp_path / "grown", model, images, resume=True).run(both, 4)
    assert scored(grown) == scored(Evaluation(tmp_path / "new", model, images).run(both, 4))


def test_a_failure_is_a_row_and_is_tried_again(
    model: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    calls = []

    def failing(x: Tensor, target: Tensor) -> Tensor:
        calls.append(len(x))
        raise RuntimeError("no memory | today")

    methods: dict[str, Any] = {"failing": failing, "saliency": Saliency(model)}
    table = Evaluation(tmp_path, model, images).run(methods, 3)
    assert len(calls) == 1
    assert r"failed: RuntimeError: no memory \| today" in str(table)
    assert len(table.methods["saliency"].values["gae"]) == 3
    methods["failing"] = Saliency(model)
    table = Evaluation(tmp_path, model, images, resume=True).run(methods, 3)
    assert scored(table)["failing"] == scored(table)["saliency"]


def test_files_of_other_names_are_the_users(
    tmp_path: Path, model: nn.Module, images: Tensor
) -> None:
    methods = {"saliency": Saliency(model)}
    table = Evaluation(tmp_path, model, images).run(methods, 2)
    for name in ("scores-of-2025.jsonl", "scores-1.jsonl.bak"):
        (tmp_path / name).write_text("not a line of scores")
    assert scored(Evaluation(tmp_path, model, images, resume=True).run(methods, 2)) == scored(table)
    for name in ("scores-of-2025.jsonl", "scores-1.jsonl.bak"):
        assert (tmp_path / name).read_text() == "not a line of scores"


class Damaged:
    """Images of which some cannot be read."""

    def __init__(self, images: Tensor, bad: set[int]) -> None:
        self.images = images
        self.bad = bad

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        if index in self.bad:
            raise OSError(f"image {index} is no image")
        return self.images[index]


def test_unreadable_images_are_named_once_and_replaced(
    model: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    labels = [i % 4 for i in range(16)]
    images = torch.arange(16.0).view(-1, 1, 1, 1).expand_as(images)
    evaluation = Evaluation(tmp_path, model, Damaged(images, {3, 7}), labels=labels)
    table = evaluation.run({"saliency": Saliency(model)}, 8)
    assert evaluation.skipped == {3: "image 3 is no image", 7: "image 7 is no image"}
    assert len(table.methods["saliency"].values["gae"]) == 8
    for number in range(8):
        used = evaluation.setting(number).mosaics.unique().int().tolist()
        # Another image of the same class takes the place.
        assert sorted(labels[index] for index in used) == [0, 1, 2, 3]
        assert not {3, 7} & set(used)
    again = Evaluation(tmp_path, model, Damaged(images, {3, 7}), labels=labels, resume=True)
    assert again.skipped == evaluation.skipped
    assert (tmp_path / "scores.jsonl").read_text().count("skipped") == 2


def test_too_few_images_that_can_be_read(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    evaluation = Evaluation(tmp_path, model, Damaged(images[:5], {0, 1}))
    with pytest.raises(ValueError, match=r"at least four readable images, but got 3. The"):
        evaluation.run({"saliency": Saliency(model)}, 1)
    with pytest.raises(
        ValueError, match="Expected `images` to have at least four images, but got 3"
    ):
        Evaluation(tmp_path / "few", model, images[:3])


def test_a_folder_of_other_settings_is_left_alone(
    model: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    Evaluation(tmp_path, model, images, description={"model": "a"}).run({"s": Saliency(model)}, 1)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match="Expected `folder` to have no scores"):
        Evaluation(tmp_path, model, images, description={"model": "a"})
    for change, message in [
        ({"seed": 1}, "Expected seed to be 0, .* but got 1. Choose another folder"),
        ({"description": {"model": "b"}}, "Expected model to be 'a', .* but got 'b'"),
        ({"description": {}}, "Expected model to be 'a', .* but got None"),
        ({"labels": [1] * 16}, "Expected labels to be"),
    ]:
        options: dict[str, Any] = {"description": {"model": "a"}, "resume": True} | change
        with pytest.raises(ValueError, match=message):
            Evaluation(tmp_path, model, images, **options)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "scores.jsonl").write_text('{"mosaic": 0}\n')
    with pytest.raises(ValueError, match=r"Expected line 1 of .* to contain scores, but got"):
        Evaluation(tmp_path, model, images, description={"model": "a"}, resume=True)


# --- the oracle ---------------------------------------------------------------------------------


def oracle_maps(setting: Setting, masks: Tensor, inverse: bool) -> Tensor:
    """The digit's pixels (or all the others), masked ones excepted: (2 S, 1, C, H, W)."""
    position = int(setting.positive_index)
    right = torch.zeros_like(masks).index_fill(0, torch.tensor(position), 1) * masks
    of_states = masks[position].expand_as(setting.states)
    of_mosaic = mosaic(right.unsqueeze(1).float()).bool().expand_as(setting.mosaics)
    seen = torch.cat([setting.states != 0, torch.ones_like(of_mosaic)[None]])
    wanted = torch.cat([of_states, of_mosaic[None]])
    return (seen & (~wanted if inverse else wanted)).to(setting.states)


@pytest.mark.parametrize("name", demo.list_models())
def test_the_oracle_beats_random_and_its_inverse_is_worst(name: str, tmp_path: Path) -> None:
    model, n = demo.load_model(name), 8
    scenes = demo.render_scenes("single", 4 * n, generator=0)
    labels = scenes.labels.tolist()
    evaluation = Evaluation(tmp_path, model, scenes.inputs, labels=labels)
    noise = torch.Generator().manual_seed(0)
    rows = {name: MethodScores() for name in ("oracle", "random", "inverse")}
    for number, chosen in enumerate(plan_mosaics(labels, n, 0)):
        setting = evaluation.setting(number, chosen)
        maps = {
            "oracle": oracle_maps(setting, scenes.masks[chosen], inverse=False),
            "inverse": oracle_maps(setting, scenes.masks[chosen], inverse=True),
        }
        maps["random"] = torch.randn(maps["oracle"].shape, generator=noise)
        for row, scores in rows.items():
            scores.extend(MethodScores(score_maps(setting, model, maps[row])))
    for column in ("gae", "local_consistency", "contrastiveness", "localization", "lerf_morf"):
        assert rows["oracle"].interval(column)[0] > rows["random"].interval(column)[1], column
    for column in ("faithfulness", "localization", "lerf_morf"):
        assert rows["inverse"].mean(column) < rows["random"].mean(column), column
    # No score is below 0, which is what random gets, too.
    assert rows["inverse"].mean("gae") == 0


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three scenes of each of five digits, and what else lies about in folders."""
    scenes = demo.load_scenes("single", 30)
    for number, (image, label) in enumerate(zip(scenes.images, scenes.labels.tolist())):
        if label < 5:
            path = tmp_path / "data" / str(label) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = image.mul(255).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(path)
    (tmp_path / "data" / "notes.txt").write_text("no image")
    (tmp_path / "data" / "1" / "broken.png").write_bytes(b"no image either")
    return tmp_path / "data"


Evaluate = Callable[..., int]


@pytest.fixture
def evaluate(tmp_path: Path) -> Evaluate:
    def run(*args: object, out: str = "out", methods: str = "abslrp,random") -> int:
        given = ["--out", tmp_path / out, "--methods", methods, "--n-mosaics", 2, *args]
        return main(["evaluate", *map(str, given)])

    return run


def test_evaluate_a_folder(
    evaluate: Evaluate, folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    # Six mosaics need 24 images: all are drawn, the broken one, too.
    args = ["--model", "demo:vgg", "--data", folder, "--n-mosaics", 6]
    assert evaluate(*args, methods="abslrp,saliency") == 0
    out = tmp_path / "out"
    written = {path.name for path in out.iterdir()}
    assert written == {
        "settings.json", "scores.jsonl", "comparison.md", "comparison.csv", "comparison.json",
        "comparison.png", "maps.png",
    }  # fmt: skip
    text = (out / "comparison.md").read_text()
    assert "Skipped images (1)" in text and "broken.png could not be read" in text
    assert "notes.txt" not in text
    with (out / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["mosaics"]) for row in rows] == [("abslrp", "6"), ("saliency", "6")]
    assert float(rows[0]["gae"]) > float(rows[1]["gae"])
    lines = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert sum("mosaic" in line for line in lines) == 12
    printed = capsys.readouterr().out
    assert "16 images for 6 mosaics: some images are used repeatedly." in printed
    assert text in printed
    with Image.open(out / "comparison.png") as picture:
        assert picture.size[0] > 1000


def test_evaluate_the_demo_has_a_folder_per_model(evaluate: Evaluate, tmp_path: Path) -> None:
    assert evaluate("--demo", "--n-mosaics", 1, methods="random") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(demo.list_models())


def test_a_flat_folder_will_do(evaluate: Evaluate, folder: Path) -> None:
    assert evaluate("--model", "demo:vgg", "--data", folder / "0") == 2
    for path in folder.glob("[2-4]/*.png"):
        path.rename(folder / "0" / path.name)
    assert evaluate("--model", "demo:vgg", "--data", folder / "0", methods="random") == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data", "nowhere"], "Expected `--model` with `--data`, but got none"),
        (["--demo", "--model", "resnet18"], "a demo model with `--demo`, but got 'resnet18'"),
        (["--model", "demo:vgg", "--data", "nowhere"], "Expected `--data` to be a folder, but got no"),
    ],
)  # fmt: skip
def test_what_evaluate_refuses(
    evaluate: Evaluate, args: list[str], message: str, capsys: Capture
) -> None:
    assert evaluate(*args) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("methods", "message"),
    [("abslrp,salience", "did you mean saliency"), (",", "Expected method names")],
)
def test_unknown_methods(evaluate: Evaluate, methods: str, message: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        evaluate("--demo", methods=methods)
    assert message in capsys.readouterr().err


def test_scores_are_not_overwritten(evaluate: Evaluate, tmp_path: Path, capsys: Capture) -> None:
    assert evaluate("--demo", "--model", "demo:vit", methods="random") == 0
    before = (tmp_path / "out" / "scores.jsonl").read_bytes()
    assert evaluate("--demo", "--model", "demo:vit", methods="random") == 2
    assert "which has some. Continue with `--resume`" in capsys.readouterr().err
    assert evaluate("--demo", "--model", "demo:vgg", "--resume", methods="random") == 2
    assert "Expected model to be 'demo:vit'" in capsys.readouterr().err
    assert (tmp_path / "out" / "scores.jsonl").read_bytes() == before


def test_what_the_vit_cannot_run_says_so(evaluate: Evaluate, tmp_path: Path) -> None:
    methods = "lrp,guided_backprop,gradcam,random"
    assert evaluate("--demo", "--model", "demo:vit", "--n-mosaics", 1, methods=methods) == 0
    failures = {
        name: scores.failure
        for name, scores in Comparison.load(tmp_path / "out" / "comparison.json").methods.items()
    }
    assert failures["random"] is None
    assert "additions outside of modules" in str(failures["lrp"])
    assert "nn.ReLU" in str(failures["guided_backprop"])
    assert "feature map" in str(failures["gradcam"])


# Little is left for any class in an image that is masked nearly everywhere.
@pytest.mark.filterwarnings("ignore:The guided map is zero")
def test_all_methods_run_on_the_vgg(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from captum_abslrp.methods import list_methods

    def coarsely(method: Any, **fewer: Any) -> None:
        def attribute(*args: Any, attribute: Any = method.attribute, **options: Any) -> Any:
            return attribute(*args, **options | fewer)

        monkeypatch.setattr(method, "attribute", attribute)

    coarsely(IntegratedGradients, n_steps=2)
    coarsely(Occlusion, sliding_window_shapes=(3, 32, 32), strides=(3, 32, 32))
    every = ",".join(list_methods())
    assert evaluate("--demo", "--model", "demo:vgg", "--n-mosaics", 1, methods=every) == 0
    table = Comparison.load(tmp_path / "out" / "comparison.json").methods
    assert list(table) == list_methods()
    assert {scores.failure for scores in table.values()} == {None}


@pytest.mark.slow
def test_a_killed_run_is_resumed(tmp_path: Path, folder: Path) -> None:
    def command(out: str) -> list[str]:
        args = f"--model demo:vgg --data {folder} --methods abslrp,random,saliency --n-mosaics 5"
        return [sys.executable, "-m", "captum_abslrp", "evaluate", *args.split(), "--out", out]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(command(str(whole))[3:]) == 0
    process = subprocess.Popen(command(str(killed)), stderr=subprocess.DEVNULL)
    scores = killed / "scores.jsonl"
    deadline = time.monotonic() + 120
    while not (scores.exists() and scores.read_bytes().count(b"\n") >= 4):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = scores.read_bytes()
    assert not (killed / "comparison.md").exists()
    assert main([*command(str(killed))[3:], "--resume"]) == 0
    tables = [Comparison.load(path / "comparison.json") for path in (whole, killed)]
    for name, expected in tables[0].methods.items():
        for column, values in expected.values.items():
            got = tables[1].methods[name].values[column]
            assert got == pytest.approx(values, rel=1e-4, abs=1e-5, nan_ok=True), (name, column)
    assert scores.read_bytes().startswith(finished.rpartition(b"\n")[0])


def test_ctrl_c_says_how_to_go_on(
    evaluate: Evaluate, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Evaluation, "run", stopped)
    with pytest.raises(SystemExit) as exit_:
        evaluate("--demo", "--model", "demo:vgg")
    assert exit_.value.code == 130
    assert "--resume" in capsys.readouterr().err


def test_the_model_of_a_folder_is_any_of_timm(
    folder: Path, evaluate: Evaluate, tmp_path: Path
) -> None:
    import timm

    state = timm.create_model("test_resnet", num_classes=10).state_dict()
    torch.save(state, tmp_path / "weights.pt")
    args = ["--model", "test_resnet", "--checkpoint", tmp_path / "weights.pt", "--data", folder]
    assert evaluate(*args, "--n-mosaics", 1, methods="saliency") == 0
    assert load_subject("demo:vgg", None, torch.device("cpu")).channels == 3
