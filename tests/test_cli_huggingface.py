"""The command line on models of Hugging Face, which are small, random and saved in folders."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from captum_abslrp import AbsLRP
from captum_abslrp.cli import explain as explain_command
from captum_abslrp.cli import files, main
from captum_abslrp.cli.huggingface import Pictures
from captum_abslrp.cli.models import load_subject
from captum_abslrp.methods import get_method
from tests.conftest import realistic

transformers = pytest.importorskip("transformers", reason="the models come from transformers")

NAMES = ["tench, Tinca tinca", "red fox", "tabby, tabby cat", "LABEL_3", "crane"]
ENCODER = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "image_size": 32, "patch_size": 8, "initializer_range": 0.2,
}  # fmt: skip
STAGES = {"hidden_sizes": [16, 32], "depths": [1, 2], "num_stages": 2}
WINDOWS = {
    "image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
    "window_size": 4, "initializer_range": 0.2,
}  # fmt: skip
SQUARE = {"height": 32, "width": 32}
CROPPED = {"size": {"shortest_edge": 36}, "crop_size": SQUARE}
KINDS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "vit": ("ViT", ENCODER, "ViTImageProcessor", {"size": SQUARE}),
    "resnet": ("ResNet", {"embedding_size": 16, **STAGES}, "CLIPImageProcessor", CROPPED),
    "swin": ("Swin", WINDOWS, "ViTImageProcessor", {"size": SQUARE}),
    "convnext": ("ConvNext", STAGES, "ConvNextImageProcessor", {"size": {"shortest_edge": 32}}),
}

Capture = pytest.CaptureFixture[str]
Run = Callable[..., int]


def made(family: str, options: dict[str, Any], architecture: str = "ForImageClassification") -> Any:
    torch.manual_seed(0)
    names = dict(enumerate(NAMES))
    config = getattr(transformers, f"{family}Config")(**{"id2label": names, **options})
    model = getattr(transformers, f"{family}{architecture}")(config)
    return realistic(model, torch.randn(8, getattr(config, "num_channels", 3), 32, 32))


def save(folder: Path, model: Any, processor: str, options: dict[str, Any]) -> Path:
    model.save_pretrained(folder)
    getattr(transformers, processor)(**options).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {
        kind: save(place / kind, made(family, options), processor, of_processor)
        for kind, (family, options, processor, of_processor) in KINDS.items()
    }


def save_picture(path: Path, seed: int = 0, size: tuple[int, int] = (48, 40)) -> Path:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize(size).save(path)
    return path


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return save_picture(tmp_path / "animal.png")


@pytest.fixture
def explain(tmp_path: Path) -> Run:
    def run(model: Any, *arguments: Any) -> int:
        words = ["explain", "--model", f"hf:{model}", "--out", tmp_path / "out", *arguments]
        return main([str(word) for word in words])

    return run


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """Every figure that `explain` saves, by the name of its file."""
    saved: dict[str, Figure] = {}

    def spy(figure: Figure, path: Path, *args: Any) -> None:
        saved[path.name] = figure
        files.save_figure(figure, path, *args)

    monkeypatch.setattr(explain_command, "save_figure", spy)
    return saved


def one_error(capsys: Capture) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0].removeprefix("captum-abslrp: error: ")


def by_hand(folder: Path, picture: Path) -> tuple[Any, Tensor]:
    """The model in a folder and its input for a picture, without the command line."""
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = processor(images=Image.open(picture).convert("RGB"), return_tensors="pt")
    return model, pixels["pixel_values"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_a_folder_is_explained(
    kind: str, folders: dict[str, Path], picture: Path, tmp_path: Path, explain: Run,
    figures: dict[str, Figure], capsys: Capture,
) -> None:  # fmt: skip
    assert explain(folders[kind], picture) == 0
    model, pixels = by_hand(folders[kind], picture)
    best = model(pixels).logits.softmax(-1)[0].max(0)
    target = int(best.indices)
    method = AbsLRP.recommended(model)
    expected = method.attribute(pixels, target=target)[0].numpy()
    raw = np.load(tmp_path / "out" / "animal-abslrp.npy")
    assert raw.shape == (3, 32, 32)
    np.testing.assert_allclose(raw, expected, atol=1e-3 * np.abs(expected).max())

    captured = capsys.readouterr()
    chosen, found = captured.out.splitlines()
    assert chosen == f"Explained by {method!r}"
    label = f"{NAMES[target].split(',')[0]} ({target})"
    assert found.startswith(f"{picture}: {label} {100 * best.values.item():.1f}% -> ")
    assert f"why {label}?" in figures["animal-abslrp.png"].get_suptitle()


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_other_methods_take_the_logits(
    kind: str, folders: dict[str, Path], picture: Path, explain: Run, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    drawn: dict[str, list[Tensor]] = {}
    explanation = explain_command._explanation

    def spy(name: str, image: Tensor, maps: dict[str, list[Tensor]], *args: Any) -> Figure:
        drawn.update(maps)
        return explanation(name, image, maps, *args)

    monkeypatch.setattr(explain_command, "_explanation", spy)
    compared = ["saliency", "ig"] if kind == "vit" else ["saliency", "deeplift", "gradcam"]
    assert explain(folders[kind], picture, "--target", "Red Fox", "--compare", *compared) == 0
    assert list(drawn) == ["abslrp", *compared]

    class Logits(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: Tensor) -> Tensor:
            logits: Tensor = self.model(pixels).logits
            return logits

    model, pixels = by_hand(folders[kind], picture)
    for method in compared:
        expected = get_method(method)(Logits(model))(pixels, 1)[0]
        assert expected.abs().sum() > 0
        torch.testing.assert_close(drawn[method][0], expected, rtol=1e-3, atol=1e-5)


def test_the_report_has_names_and_versions(
    folders: dict[str, Path], picture: Path, tmp_path: Path, explain: Run
) -> None:
    report = tmp_path / "report.html"
    assert explain(folders["vit"], picture, "--top", 5, "--html", report) == 0
    page = report.read_text(encoding="utf-8")
    for index, name in enumerate(NAMES):
        assert f"{name.split(',')[0]} ({index})" in page
    assert "transformers" in page and transformers.__version__ in page


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_evaluate(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    for i in range(4):
        save_picture(tmp_path / "data" / f"{i}.png", i)
    methods = ["abslrp", "abslrp_recommended", "saliency", "random"]
    words = ["--methods", ",".join(methods), "--n-mosaics", "1", "--data", str(tmp_path / "data")]
    out = tmp_path / "scores"
    command = ["evaluate", "--model", f"hf:{folders[kind]}", *words, "--out", str(out)]
    assert main(command) == 0
    with (out / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == methods
    assert not any(row["failure"] for row in rows)
    assert all(np.isfinite(float(row["gae"])) for row in rows)
    assert f'"model": "hf:{folders[kind]}"' in (out / "settings.json").read_text(encoding="utf-8")


def test_inspect_needs_no_weights(
    folders: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    for kind, layer in (("vit", "layer_norm"), ("resnet", "batch_norm")):
        for file in folders[kind].glob("*.json"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
        assert main(["inspect", "--model", f"hf:{tmp_path}"]) == 0
        captured = capsys.readouterr()
        assert f"torch.nn.functional.{layer}" in captured.out
        assert captured.out.endswith("none without a rule\n")


def test_the_model_keeps_its_class_and_paths(folders: dict[str, Path]) -> None:
    subject = load_subject(f"hf:{folders['vit']}", None, torch.device("cpu"))
    assert type(subject.model) is transformers.ViTForImageClassification
    assert not any(p.requires_grad for p in subject.model.parameters())
    scores = subject.model(torch.zeros(2, *subject.input_size))
    assert isinstance(scores, Tensor) and scores.shape == (2, len(NAMES))
    assert subject.names == NAMES


def test_relative_names_are_exact_in_what_is_written(
    folders: dict[str, Path], picture: Path, tmp_path: Path, explain: Run, capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Another folder of the same relative name is another model."""
    for name, kind in (("a", "vit"), ("b", "resnet")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").symlink_to(folders[kind])
    explained = []
    for name in ("a", "a", "b"):
        monkeypatch.chdir(tmp_path / name)
        assert explain("./model", picture, "--resume") == 0
        explained.append(" -> " in capsys.readouterr().out)
    assert explained == [True, False, True]


PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "normalized": ("ViTImageProcessor", {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2] * 3}),
    "not normalized": ("ViTImageProcessor", {"do_normalize": False}),
    "not even scaled": ("ViTImageProcessor", {"do_normalize": False, "do_rescale": False}),
    "from -1 to 1": ("EfficientNetImageProcessor", {"rescale_offset": True, "include_top": True}),
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_what_the_processor_did_is_undone(case: str) -> None:
    name, options = PROCESSORS[case]
    pictures = Pictures(getattr(transformers, name)(size=SQUARE, **options), "RGB")
    assert pictures.input_size == (3, 32, 32)
    values = pictures.prepare(Image.new("RGB", (50, 60), (200, 100, 50)))
    assert values.dtype == torch.float32 and values.shape == (3, 32, 32)
    expected = torch.tensor([200, 100, 50]).view(3, 1, 1) / 255
    torch.testing.assert_close(pictures.show(values), expected.expand(3, 32, 32))


def test_channels_in_reverse_are_turned_back() -> None:
    processor = transformers.MobileViTImageProcessor(
        size={"shortest_edge": 36}, crop_size=SQUARE, do_flip_channel_order=True
    )
    pictures = Pictures(processor, "RGB")
    values = pictures.prepare(Image.new("RGB", (50, 60), (200, 100, 50)))
    assert values[0, 0, 0] < values[2, 0, 0]
    expected = torch.tensor([200, 100, 50]) / 255
    torch.testing.assert_close(pictures.show(values)[:, 16, 16], expected)


def test_pictures_of_one_channel(tmp_path: Path, picture: Path, explain: Run) -> None:
    options = {"size": SQUARE, "image_mean": [0.5], "image_std": [0.25]}
    model = made("ViT", {**ENCODER, "num_channels": 1})
    folder = save(tmp_path / "gray", model, "ViTImageProcessor", options)
    assert explain(folder, picture) == 0
    assert np.load(tmp_path / "out" / "animal-abslrp.npy").shape == (1, 32, 32)


def test_weights_of_half_precision_are_computed_with_in_single_precision(tmp_path: Path) -> None:
    model = made("ViT", ENCODER).half()
    folder = save(tmp_path / "half", model, "ViTImageProcessor", {"size": SQUARE})
    subject = load_subject(f"hf:{folder}", None, torch.device("cpu"))
    loaded = dict(subject.model.named_parameters())
    for name, parameter in model.named_parameters():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], parameter.float())


def test_a_processor_that_leaves_sizes_as_they_are(
    tmp_path: Path, picture: Path, explain: Run, capsys: Capture
) -> None:
    model = made("ResNet", KINDS["resnet"][1])
    folder = save(tmp_path / "model", model, "ViTImageProcessor", {"do_resize": False})
    fitting = save_picture(tmp_path / "fitting.png", size=(224, 224))
    assert explain(folder, picture, fitting) == 2
    assert f"an input (3, 224, 224) for {picture}, but got (3, 40, 48)" in capsys.readouterr().err
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "fitting-abslrp.npy",
        "fitting-abslrp.png",
    }


# --- what a user can put right --------------------------------------------------------------------


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def torn_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"no weights")


def no_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


def other_sizes(folder: Path) -> None:
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"hidden_size": 32', '"hidden_size": 64'))


def other_code(folder: Path) -> None:
    config = (folder / "config.json").read_text()
    named = '"model_type": "mine", "auto_map": {"AutoConfig": "mine.MyConfig"}'
    (folder / "config.json").write_text(config.replace('"model_type": "vit"', named))
    (folder / "mine.py").write_text("raise SystemExit('it was run')")


def other_pictures(folder: Path) -> None:
    transformers.ViTImageProcessor().save_pretrained(folder)


def colors_of_a_palette(folder: Path) -> None:
    clusters = [[0, 0, 0], [1, 1, 1]]
    transformers.ImageGPTImageProcessor(clusters=clusters, size=SQUARE).save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_config, "could not be loaded: Unrecognized model in"),
        (no_weights, "could not be loaded: Error no file named"),
        (torn_weights, "could not be loaded: Error while deserializing header"),
        (no_processor, "could not be loaded: "),
        (other_code, "could not be loaded: "),
        (other_sizes, "do not match its configuration: classifier.weight, vit."),
        (
            other_pictures,
            "to accept the inputs (3, 224, 224) of its image processor, but got ValueError: Input image size",
        ),
        (colors_of_a_palette, "to return an input (C, H, W) for an image, but got KeyError"),
    ],
)
def test_damaged_folders_are_one_line(
    damage: Callable[[Path], None], message: str, folders: dict[str, Path], picture: Path,
    tmp_path: Path, explain: Run, capsys: Capture,
) -> None:  # fmt: skip
    folder = tmp_path / "model"
    folder.mkdir()
    for file in folders["vit"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    damage(folder)
    assert explain(folder, picture) == 2
    line = one_error(capsys)
    assert message in line and f"'hf:{folder}'" in line
    assert not (tmp_path / "out").exists()


def test_other_models_are_one_line(
    tmp_path: Path, picture: Path, explain: Run, capsys: Capture
) -> None:
    made("ViTMAE", ENCODER, "ForPreTraining").save_pretrained(tmp_path / "mae")
    processor = "ViTImageProcessor", {"size": SQUARE}
    save(tmp_path / "body", made("ViT", ENCODER, "Model"), *processor)
    save(tmp_path / "headless", made("ViT", {**ENCODER, "id2label": {}}), *processor)
    capsys.readouterr()

    assert explain(tmp_path / "mae", picture) == 2
    line = one_error(capsys)
    assert "to be an image classifier, but got" in line and "of type 'vit_mae'." in line
    assert main(["inspect", "--model", f"hf:{tmp_path / 'mae'}"]) == 2
    assert one_error(capsys) == line

    assert explain(tmp_path / "body", picture) == 2
    assert one_error(capsys).endswith("whose weights lack classifier.bias, classifier.weight.")

    assert explain(tmp_path / "headless", picture) == 2
    assert one_error(capsys).endswith(f"but got 'hf:{tmp_path / 'headless'}' without classes.")


@pytest.mark.parametrize("name", ["", "./nothing", "../nothing", "/nothing/here", "~/nothing"])
def test_a_folder_that_does_not_exist(
    name: str, picture: Path, tmp_path: Path, explain: Run, capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert explain(name, picture) == 2
    assert one_error(capsys) == (
        f"Expected `--model` to be hf:ORG/NAME or hf:FOLDER, but got 'hf:{name}', which is not a "
        "folder."
    )


def test_checkpoints_go_with_timm_models(
    folders: dict[str, Path], picture: Path, explain: Run, capsys: Capture
) -> None:
    assert explain(folders["vit"], picture, "--checkpoint", "weights.pt") == 2
    assert one_error(capsys) == (
        f"Expected `--checkpoint` with a timm model, but got 'hf:{folders['vit']}'."
    )


def test_the_prefix_is_suggested(picture: Path, capsys: Capture) -> None:
    assert main(["explain", str(picture), "--model", "google/vit-base-patch16-224"]) == 2
    assert "(did you mean hf:google/vit-base-patch16-224?)" in one_error(capsys)


@pytest.mark.parametrize("command", ["explain", "inspect"])
def test_without_transformers_the_line_says_what_to_install(
    command: str, folders: dict[str, Path], picture: Path, capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "transformers", None)
    images = [str(picture)] if command == "explain" else []
    assert main([command, *images, "--model", f"hf:{folders['vit']}"]) == 2
    assert one_error(capsys) == (
        f"Expected transformers to be installed for 'hf:{folders['vit']}', but it is not. Run "
        "`pip install 'captum-abslrp[hf]'`."
    )


def in_a_new_process(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command in a process without network, whose messages of transformers all go to stderr."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-m", "captum_abslrp", *words],
        env={**os.environ, **offline},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_offline_a_model_that_is_not_there_is_one_line(picture: Path, tmp_path: Path) -> None:
    done = in_a_new_process(tmp_path, "explain", str(picture), "--model", "hf:some/model")
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(
        r"captum-abslrp: error: 'hf:some/model' could not be downloaded \(.*connect.*\); pass a folder, "
        r"hf:\./FOLDER, or use a model that is included in the package: demo:vgg\n",
        done.stderr,
    )


def test_nothing_else_is_printed(picture: Path, tmp_path: Path) -> None:
    """Neither progress bars, nor a report of weights that the model has no use for."""
    model = made("ViT", ENCODER)
    model.extra = nn.Linear(2, 2)
    save(tmp_path / "model", model, "ViTImageProcessor", {"size": SQUARE})
    done = in_a_new_process(tmp_path, "explain", str(picture), "--model", "hf:./model")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 2


def test_progress_bars_are_put_back(folders: dict[str, Path]) -> None:
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    try:
        for shown in (True, False):
            (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
            load_subject(f"hf:{folders['resnet']}", None, torch.device("cpu"))
            assert logging.is_progress_bar_enabled() == shown
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()
