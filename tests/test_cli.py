"""The command line and the methods it offers: every option, every error line."""

from __future__ import annotations

import csv
import os
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from captum_abslrp import AbsLRP, UnsupportedCallError, __version__, demo, hookable
from captum_abslrp.cli import demo as demo_command
from captum_abslrp.cli import explain as explain_command
from captum_abslrp.cli import files, main
from captum_abslrp.cli.demo import short_reason
from captum_abslrp.cli.files import read_image
from captum_abslrp.cli.models import _class_names
from captum_abslrp.methods import (
    find_feature_layer,
    get_method,
    list_methods,
    positive_share,
    register_method,
)

# --- command line -------------------------------------------------------------------------------


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return save_picture(tmp_path / "digit.png")


def save_picture(path: Path, index: int = 0, size: int = 64) -> Path:
    image = demo.load_scenes("single", index + 1).images[index]
    pixels = image.mul(255).round().byte().permute(1, 2, 0).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).resize((size, size)).save(path)
    return path


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """Every figure that is saved, by the name of its file."""
    saved: dict[str, Figure] = {}
    save = files.save_figure

    def spy(figure: Figure, path: Path, *args: Any) -> None:
        saved[path.name] = figure
        save(figure, path, *args)

    for command in (demo_command, explain_command):
        monkeypatch.setattr(command, "save_figure", spy)
    return saved


@pytest.fixture
def random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm models have random weights instead of downloaded ones."""
    create = timm.create_model

    def create_without_download(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        torch.manual_seed(0)
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", create_without_download)


@pytest.fixture
def explain(tmp_path: Path) -> Callable[..., int]:
    def run(*arguments: Any, model: str = "demo:vgg") -> int:
        words = ["explain", "--model", model, "--out", tmp_path / "out", *arguments]
        return main([str(word) for word in words])

    return run


Explain = Callable[..., int]
Capture = pytest.CaptureFixture[str]


def error_lines(capsys: Capture) -> list[str]:
    lines = re.split(r"[\r\n]+", capsys.readouterr().err)
    return [line.removeprefix("captum-abslrp: error: ") for line in lines if "error:" in line]


def one_error(capsys: Capture) -> str:
    lines = error_lines(capsys)
    assert len(lines) == 1, lines
    return lines[0]


def titles(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def row_labels(figure: Figure) -> list[str]:
    """Labels of rows; color bars have labels, too."""
    rows = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    return [axes.get_ylabel() for axes in rows if axes.get_ylabel()]


def test_the_number_of_threads_is_put_back(
    picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, seen = torch.get_num_threads(), []
    attribute = AbsLRP.attribute

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.append(torch.get_num_threads())
        return attribute(*args, **kwargs)

    monkeypatch.setattr(AbsLRP, "attribute", counted)
    command = ["explain", str(picture), "--model", "demo:vgg", "--out", str(tmp_path)]
    assert main(command) == 0
    assert main([*command, "--threads", "3"]) == 0
    assert main([*command, "--threads", "4", "--target", "99"]) == 2
    assert seen == [before, 3] and torch.get_num_threads() == before


@pytest.mark.parametrize("model", ["vgg", "resnet", "vit"])
def test_explain_writes_a_figure_and_the_raw_relevance(
    model: str, picture: Path, tmp_path: Path, explain: Explain, figures: dict[str, Figure],
    capsys: Capture,
) -> None:  # fmt: skip
    assert explain(picture, model=f"demo:{model}") == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "digit-abslrp.npy",
        "digit-abslrp.png",
    ]
    figure = figures["digit-abslrp.png"]
    assert titles(figure) == ["input", "overlay", "relevance"]
    shown = re.fullmatch(r"digit\.png: why (\d)\? \(([\d.]+)%\)", figure.get_suptitle())
    assert shown is not None

    network = demo.load_model(model)
    inputs = demo.load_scenes("single", 1).inputs
    best = network(inputs).softmax(-1)[0].max(0)
    assert int(shown[1]) == int(best.indices)
    assert float(shown[2]) == pytest.approx(100 * best.values.item(), abs=0.06)
    raw = np.load(tmp_path / "out" / "digit-abslrp.npy")
    method = AbsLRP.recommended(network)
    expected = method.attribute(inputs, target=int(best.indices))[0].numpy()
    assert raw.shape == (3, 64, 64)
    np.testing.assert_allclose(raw, expected, atol=1e-3 * np.abs(expected).max())

    captured = capsys.readouterr()
    chosen, found = captured.out.splitlines()
    assert chosen == f"Explained by {method!r}"
    assert found.startswith(f"{picture}: {shown[1]} {shown[2]}% -> ")
    assert captured.err == ""


def test_explain_shows_what_the_model_sees(
    tmp_path: Path, explain: Explain, figures: dict[str, Figure], random_weights: None
) -> None:
    wide = Image.new("RGB", (400, 200), (255, 0, 0))
    wide.paste((0, 0, 255), (150, 0, 250, 200))
    wide.save(tmp_path / "wide.png")
    assert explain(tmp_path / "wide.png", model="test_resnet") == 0
    seen = figures["wide-abslrp.png"].axes[0].get_images()[0].get_array()
    assert seen is not None
    assert seen.shape == (160, 160, 3)
    np.testing.assert_allclose(seen[80, 80], [0, 0, 1], atol=0.01)
    np.testing.assert_allclose(seen[80, 1], [1, 0, 0], atol=0.01)


@pytest.mark.parametrize("model", ["test_vit", "test_resnet"])
def test_timm_models_have_imagenet_names(
    model: str, picture: Path, tmp_path: Path, explain: Explain, figures: dict[str, Figure],
    random_weights: None,
) -> None:  # fmt: skip
    assert explain(picture, "--target", "Tinca tinca", model=model) == 0
    title = figures["digit-abslrp.png"].get_suptitle()
    assert title.startswith("digit.png: why tench (0)? (")
    assert np.load(tmp_path / "out" / "digit-abslrp.npy").shape == (3, 160, 160)


def test_target_by_index(picture: Path, explain: Explain, figures: dict[str, Figure]) -> None:
    assert explain(picture, "--target", "7") == 0
    assert figures["digit-abslrp.png"].get_suptitle().startswith("digit.png: why 7? (")


@pytest.mark.parametrize(
    ("option", "contrast", "shown"),
    [
        ("others", "others", ""),
        ("softmax", "softmax", ""),
        ("none", None, ""),
        ("8", 8, " rather than 8"),
    ],
)
def test_contrast(
    option: str, contrast: Any, shown: str, picture: Path, tmp_path: Path, explain: Explain,
    figures: dict[str, Figure],
) -> None:  # fmt: skip
    words = ["--mapping", "published", "--target", 3, "--contrast", option]
    assert explain(picture, *words) == 0
    assert f"why 3{shown}? (" in figures["digit-abslrp.png"].get_suptitle()
    inputs = demo.load_scenes("single", 1).inputs
    network = demo.load_model("vgg")
    expected = AbsLRP(network).attribute(inputs, target=3, contrast=contrast)[0].numpy()
    raw = np.load(tmp_path / "out" / "digit-abslrp.npy")
    np.testing.assert_allclose(raw, expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("words", "arguments", "options"),
    [
        (["--mapping", "published"], {}, {}),
        (["--mapping", "published", "--normalization", "joint"], {"normalization": "joint"}, {}),
        (["--mapping", "published", "--combine", "guided"], {}, {"combine": "guided"}),
        (["--mapping", "attnlrp"], {"mapping": "attnlrp"}, {}),
        (
            ["--combine", "difference"],
            {"mapping": "recommended"},
            {"contrast": "softmax", "combine": "difference"},
        ),
        (["--contrast", "none"], {"mapping": "recommended"}, {"contrast": None}),
        (
            ["--contrast", "8"],
            {"mapping": "recommended"},
            {"contrast": 8, "combine": "guided"},
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_rules_can_be_chosen(
    words: list[str], arguments: Any, options: Any, picture: Path, tmp_path: Path, explain: Explain
) -> None:
    assert explain(picture, "--target", 3, *words, model="demo:vit") == 0
    inputs = demo.load_scenes("single", 1).inputs
    attributor = AbsLRP(demo.load_model("vit"), **arguments)
    expected = attributor.attribute(inputs, target=3, **options)[0].numpy()
    raw = np.load(tmp_path / "out" / "digit-abslrp.npy")
    np.testing.assert_allclose(raw, expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("mapping", "name"), [("recommended", "the guided map"), ("published", "the difference")]
)
def test_the_report_names_the_map(
    mapping: str, name: str, picture: Path, tmp_path: Path, explain: Explain
) -> None:
    report = tmp_path / "report.html"
    assert explain(picture, "--mapping", mapping, "--html", report, model="demo:vit") == 0
    assert f'"combined": "{name}"' in report.read_text(encoding="utf-8")


def test_unknown_rules_are_one_line(picture: Path, explain: Explain, capsys: Capture) -> None:
    assert explain(picture, "--mapping", "attnlpr") == 2
    assert one_error(capsys).startswith("--mapping: Expected `mapping` to be")
    assert explain(picture, "--mapping", "attnlrp", "--combine", "gated") == 2
    assert '"difference" or "guided"' in one_error(capsys)


def test_top_has_a_row_per_class(
    picture: Path, tmp_path: Path, explain: Explain, figures: dict[str, Figure]
) -> None:
    assert explain(picture, "--top", 3) == 0
    raw = np.load(tmp_path / "out" / "digit-abslrp.npy")
    assert raw.shape == (3, 3, 64, 64)
    figure = figures["digit-abslrp.png"]
    assert figure.get_suptitle() == "digit.png"
    labels = row_labels(figure)
    chances = [float(label.split("\n")[1].removesuffix("%")) for label in labels]
    assert len(labels) == 3 and chances == sorted(chances, reverse=True)
    assert len(figure.axes) == 1 + 3 * 3  # the input, and rows of two maps and a color bar


def test_top_one_keeps_its_axis(picture: Path, tmp_path: Path, explain: Explain) -> None:
    assert explain(picture, "--top", 1) == 0
    assert np.load(tmp_path / "out" / "digit-abslrp.npy").shape == (1, 3, 64, 64)


def test_top_leaves_out_the_contrast(
    picture: Path, explain: Explain, figures: dict[str, Figure]
) -> None:
    assert explain(picture, "--top", 9, "--contrast", 0) == 0
    figure = figures["digit-abslrp.png"]
    assert sorted(label.split("\n")[0] for label in row_labels(figure)) == list("123456789")
    assert figure.get_suptitle() == "digit.png: rather than 0"


def test_compare_has_a_row_per_method(
    picture: Path, tmp_path: Path, explain: Explain, figures: dict[str, Figure]
) -> None:
    assert explain(picture, "--target", 3, "--contrast", 8, "--compare", "saliency", "gradcam") == 0
    figure = figures["digit-abslrp.png"]
    assert row_labels(figure) == ["abslrp rather than 8", "saliency", "gradcam"]
    assert figure.get_suptitle().startswith("digit.png: why 3? (")
    assert np.load(tmp_path / "out" / "digit-abslrp.npy").shape == (3, 64, 64)


def test_top_and_compare_make_a_grid(
    picture: Path, tmp_path: Path, explain: Explain, figures: dict[str, Figure]
) -> None:
    assert explain(picture, "--top", 2, "--compare", "inputxgradient", "random") == 0
    figure = figures["digit-abslrp.png"]
    assert titles(figure) == ["input", "abslrp", "inputxgradient", "random"]
    assert len(row_labels(figure)) == 2
    assert np.load(tmp_path / "out" / "digit-abslrp.npy").shape == (2, 3, 64, 64)


def test_a_method_that_cannot_run_is_reported_and_the_others_drawn(
    picture: Path, explain: Explain, figures: dict[str, Figure], capsys: Capture
) -> None:
    assert explain(picture, "--compare", "gradcam", "saliency", model="demo:vit") == 2
    assert row_labels(figures["digit-abslrp.png"]) == ["abslrp", "saliency"]
    assert "gradcam failed on demo:vit: ValueError: Expected `model` to have a conv" in (
        one_error(capsys)
    )


def test_outputs_never_hit_each_other_nor_an_input(tmp_path: Path, capsys: Capture) -> None:
    images = [
        save_picture(tmp_path / "a" / "cat.png", 0),
        save_picture(tmp_path / "b" / "Cat.bmp", 1),
        save_picture(tmp_path / "cat-2.png", 2),
        save_picture(tmp_path / "x.y.png", 3),
        save_picture(tmp_path / "cat-abslrp.png", 4),
    ]
    before = [path.read_bytes() for path in images]
    assert main(["explain", *map(str, images), "--model", "demo:vgg", "--out", str(tmp_path)]) == 0
    assert [path.read_bytes() for path in images] == before
    written = sorted(path.name for path in tmp_path.glob("*.npy"))
    assert written == [
        "Cat-3-abslrp.npy",
        "cat-2-2-abslrp.npy",
        "cat-2-abslrp.npy",
        "cat-abslrp-abslrp.npy",
        "x.y-abslrp.npy",
    ]


def test_folders_keep_their_structure(tmp_path: Path, capsys: Capture) -> None:
    data = tmp_path / "data"
    for name, seed in (("a/x.png", 0), ("b/x.jpg", 1), ("b/x.png", 2), ("y.png", 3)):
        save_picture(data / name, seed)
    (data / "a" / "notes.txt").write_text("no picture")
    command = ["explain", str(data), "--model", "demo:vgg", "--out", str(data / "maps")]
    for _ in range(2):  # what is in the folder for the maps is none of the pictures
        assert main(command) == 0
        written = sorted(str(p.relative_to(data / "maps")) for p in data.rglob("*.npy"))
        assert written == ["a/x-abslrp.npy", "b/x-2-abslrp.npy", "b/x-abslrp.npy", "y-abslrp.npy"]


def test_resume_leaves_out_what_is_explained_as_it_is_asked_for(
    tmp_path: Path, capsys: Capture
) -> None:
    pictures = [save_picture(tmp_path / "data" / f"{i}.png", i) for i in range(3)]

    def explained(*words: str) -> list[str]:
        command = ["explain", str(tmp_path / "data"), "--model", "demo:vgg", *words]
        assert main([*command, "--out", str(tmp_path / "out")]) == 0
        lines = capsys.readouterr().out.splitlines()
        return [Path(line.partition(":")[0]).name for line in lines if " -> " in line]

    names = ["0.png", "1.png", "2.png"]
    assert explained("--resume") == names  # there is nothing yet
    assert explained("--resume") == []
    (tmp_path / "out" / "1-abslrp.npy").unlink()
    assert explained("--resume") == ["1.png"]
    assert explained("--resume", "--target", "3") == names
    assert explained("--resume", "--target", "3") == []
    assert explained("--target", "3") == names
    stamp = (tmp_path / "out" / "2-abslrp.png").stat().st_mtime + 5
    os.utime(pictures[2], (stamp, stamp))  # it was changed afterwards
    assert explained("--resume", "--target", "3") == ["2.png"]
    (tmp_path / "out" / "0-abslrp.png").write_bytes(b"torn")
    assert "0.png" in explained("--resume", "--target", "3")


def test_a_file_that_cannot_be_finished_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    files.save_text("before", path)
    with pytest.raises(ZeroDivisionError), files.written(path) as file:
        file.write(b"half of")
        raise ZeroDivisionError
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    (tmp_path / "link.txt").symlink_to(path)
    files.save_text("after", tmp_path / "link.txt")
    assert path.read_text() == "after" and (tmp_path / "link.txt").is_symlink()


def test_bad_images_leave_the_others_alone(
    tmp_path: Path, picture: Path, explain: Explain, capsys: Capture
) -> None:
    text = tmp_path / "text.png"
    text.write_text("no picture")
    cut = tmp_path / "cut.png"
    cut.write_bytes(picture.read_bytes()[:2000])
    missing = tmp_path / "missing.png"
    assert explain(text, missing, cut, picture) == 2
    assert (tmp_path / "out" / "digit-abslrp.png").exists()
    assert len(list((tmp_path / "out").iterdir())) == 2
    lines = error_lines(capsys)
    assert [line.split(" could not be read as an image: ")[0] for line in lines] == [
        str(path) for path in (text, missing, cut)
    ]
    assert "cannot identify image file" in lines[0]
    assert lines[1].endswith("No such file or directory")
    assert "truncated" in lines[2]


def test_progress_is_shown_for_several_images_only(
    tmp_path: Path, picture: Path, explain: Explain, capsys: Capture
) -> None:
    assert explain(picture) == 0
    assert "images/s" not in capsys.readouterr().err
    assert explain(picture, save_picture(tmp_path / "two.png", 1)) == 0
    captured = capsys.readouterr()
    assert "2/2" in captured.err and "images" in captured.err
    assert captured.out.count(" -> ") == 2


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA", "CMYK", "I;16"])
def test_pictures_of_all_modes_are_read(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    Image.new(mode, (64, 70)).save(path)
    read = read_image(path, 3)
    assert read.mode == "RGB" and read.size == (64, 70)


def test_pictures_are_turned_as_their_file_says(tmp_path: Path) -> None:
    lying = Image.new("L", (70, 64))
    exif = lying.getexif()
    exif[0x0112] = 6
    lying.save(tmp_path / "lying.jpg", exif=exif)
    assert read_image(tmp_path / "lying.jpg", 1).size == (64, 70)
    assert read_image(tmp_path / "lying.jpg", 1).mode == "L"
    assert read_image(tmp_path / "lying.jpg", 3).mode == "RGB"


@pytest.mark.parametrize(
    ("arguments", "model", "message"),
    [
        (
            ["--target", "cat"],
            "demo:vgg",
            "`--target` to be a class of the model, but got 'cat'. An index is accepted as well.",
        ),
        (["--target", "taby"], "test_vit", "but got 'taby' (did you mean tabby"),
        (
            ["--target", "crane"],
            "test_vit",
            "to name one class, but got 'crane', which matches 2 classes. Pass the index 134 or 517.",
        ),
        (["--target", "10"], "demo:vgg", "Expected `--target` to be between 0 and 9, but got 10."),
        (["--target", "-1"], "demo:vgg", "Expected `--target` to be between 0 and 9, but got -1."),
        (
            ["--contrast", "other"],
            "demo:vgg",
            "others, softmax, none or a class of the model, but got 'other' (did you mean others",
        ),
        (
            ["--target", "3", "--contrast", "3"],
            "demo:vgg",
            "`--contrast` to be another class than `--target`, but got 3 for both.",
        ),
        (
            ["--top", "11"],
            "demo:vgg",
            "`--top` to be at most the number of classes 10, but got 11.",
        ),
        (
            ["--top", "10", "--contrast", "0"],
            "demo:vgg",
            "`--top` to be at most the number of classes 9, but got 10.",
        ),
        (
            [],
            "demo:vggg",
            "got 'demo:vggg' (did you mean demo:vgg?). Available: demo:vgg, demo:resnet, demo:vit, "
            "demo:photo.",
        ),
        (
            [],
            "resnt50",
            "a timm model, hf:ORG/NAME or demo:NAME, but got 'resnt50' (did you mean resnet50 or",
        ),
        (
            [],
            "../model",
            "Expected `--model` to be a timm model, hf:ORG/NAME or demo:NAME, but got '../model'",
        ),
        (
            ["--checkpoint", "x.pt"],
            "demo:vgg",
            "Expected `--checkpoint` with a timm model, but got 'demo:vgg'.",
        ),
        (
            ["--device", "abacus"],
            "demo:vgg",
            "Expected `--device` to be available, but got 'abacus': ",
        ),
    ],
)
def test_wrong_requests_are_one_line(
    arguments: list[str], model: str, message: str, picture: Path, tmp_path: Path,
    explain: Explain, random_weights: None, capsys: Capture,
) -> None:  # fmt: skip
    assert explain(picture, *arguments, model=model) == 2
    assert message in one_error(capsys)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_one_line(picture: Path, capsys: Capture) -> None:
    code = main(["explain", str(picture), "--model", "demo:vgg", "--out", str(picture / "out")])
    assert code == 2
    assert "Expected `--out` to be a folder to write to, but got " in one_error(capsys)
    code = main(["demo", "--out", str(picture)])
    assert code == 2
    assert one_error(capsys).endswith("File exists")


def test_a_figure_that_cannot_be_written_is_one_line(
    picture: Path, tmp_path: Path, explain: Explain, capsys: Capture
) -> None:
    (tmp_path / "out" / "digit-abslrp.png").mkdir(parents=True)
    assert explain(picture) == 2
    assert one_error(capsys).endswith("digit-abslrp.png could not be written: Is a directory")
    (tmp_path / "out" / "digit-abslrp.png").rmdir()
    (tmp_path / "out" / "digit-abslrp.npy").unlink()
    (tmp_path / "out" / "digit-abslrp.npy").mkdir()
    assert explain(picture) == 2
    assert one_error(capsys).endswith("digit-abslrp.npy could not be written: Is a directory")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            FileNotFoundError("cannot find the requested files\nin the local cache"),
            "the weights of 'test_vit' could not be downloaded (cannot find the requested files); "
            "pass them with --checkpoint, or use a model that is included in the package: demo:vgg",
        ),
        (ConnectionError(), "could not be downloaded (ConnectionError)"),
        (
            RuntimeError("No pretrained weights exist for test_vit."),
            "'test_vit' could not be loaded: No pretrained weights exist for test_vit.",
        ),
    ],
)
def test_weights_out_of_reach_are_one_line(
    error: Exception, message: str, picture: Path, explain: Explain, capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fail(name: str, pretrained: bool) -> nn.Module:
        assert pretrained
        raise error

    monkeypatch.setattr(timm, "create_model", fail)
    assert explain(picture, model="test_vit") == 2
    assert message in one_error(capsys)


def test_a_wrong_tag_is_one_line(picture: Path, explain: Explain, capsys: Capture) -> None:
    assert explain(picture, model="test_vit.nowhere") == 2
    assert "'test_vit.nowhere' could not be loaded: Invalid pretrained tag" in one_error(capsys)


def test_models_without_classes_are_refused(
    picture: Path, explain: Explain, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    headless = timm.create_model("test_vit", num_classes=0)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: headless)
    assert explain(picture, model="test_vit") == 2
    assert one_error(capsys) == (
        "Expected `--model` to be a classifier, but got 'test_vit' without classes."
    )


def test_calls_without_a_rule_are_one_line(
    picture: Path, explain: Explain, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise UnsupportedCallError("Expected a rule for `erfinv`, but got none.")

    monkeypatch.setattr(AbsLRP, "attribute", fail)
    assert explain(picture) == 2
    assert one_error(capsys).endswith("digit.png: Expected a rule for `erfinv`, but got none.")


def test_crashes_are_not_swallowed(
    picture: Path, explain: Explain, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*args: Any, **options: Any) -> None:
        raise ZeroDivisionError("a fault of the program")

    monkeypatch.setattr(AbsLRP, "attribute", crash)
    with pytest.raises(ZeroDivisionError, match="a fault of the program"):
        explain(picture)


def checkpoint_of(model: nn.Module, path: Path) -> Path:
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        wrapped = {f"module.{key}": value for key, value in state.items()}
        torch.save({"epoch": 3, "state_dict": wrapped}, path)
    return path


@pytest.mark.parametrize(
    ("name", "classes"),
    [("weights.safetensors", 1000), ("weights.safetensors", 5), ("weights.pth.tar", 5)],
)
def test_checkpoints_are_loaded(
    name: str, classes: int, picture: Path, tmp_path: Path, explain: Explain,
    figures: dict[str, Figure],
) -> None:  # fmt: skip
    torch.manual_seed(3)
    model = timm.create_model("test_resnet", num_classes=classes).eval()
    with torch.no_grad():
        model.fc.bias[4] = 50
    path = checkpoint_of(model, tmp_path / name)
    assert explain(picture, "--checkpoint", path, model="test_resnet") == 0
    shown = "class 4" if classes == 5 else "hammerhead (4)"
    assert figures["digit-abslrp.png"].get_suptitle() == f"digit.png: why {shown}? (100.0%)"


class Unsafe:
    """Not among what torch.load lets pass."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "Expected `--checkpoint` to be a weights file, but got "),
        ({"a": torch.ones(1)}, "do not match 'test_vit': Error(s) in loading state_dict for"),
        ({"epoch": 3}, "Expected `--checkpoint` to contain a state dict, but got "),
        (["a"], "Expected `--checkpoint` to contain a state dict, but got "),
        ({"model": Unsafe()}, "Weights only load failed"),
        (b"", "Expected `--checkpoint` to be a weights file, but got "),
        (b"nonsense", "Expected `--checkpoint` to be a weights file, but got "),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_bad_checkpoints_are_one_line(
    content: Any, message: str, suffix: str, picture: Path, tmp_path: Path, explain: Explain,
    capsys: Capture,
) -> None:  # fmt: skip
    path = tmp_path / f"weights{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
        message = message if suffix == ".pt" else "Expected `--checkpoint` to be a weights file"
    assert explain(picture, "--checkpoint", path, model="test_vit") == 2
    assert message in one_error(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["explain", "a.png", "--model", "x", "--compare", "magic"], "invalid choice: 'magic'"),
        (["explain", "a.png", "--model", "x", "--compare", "abslrp"], "invalid choice: 'abslrp'"),
        (["explain", "a.png", "--model", "x", "--normalization", "no"], "invalid choice: 'no'"),
        (["explain", "a.png", "--model", "x", "--top", "0"], "Expected a positive integer, but"),
        (["explain", "a.png", "--model", "x", "--top", "two"], "but got 'two'"),
        (["explain", "a.png", "--model", "x", "--top", "1", "--target", "2"], "not allowed with"),
    ],
)
def test_arguments_that_cannot_be_parsed(
    arguments: list[str], message: str, capsys: Capture
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_version_and_help(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"captum-abslrp {__version__}\n"
    with pytest.raises(SystemExit) as stop:
        main(["explain", "--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    offered = [name for name in list_methods() if name != "abslrp"]
    assert ", ".join(offered) in shown
    assert "demo:vgg, demo:resnet, demo:vit" in shown


def test_python_runs_the_package_as_a_module(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(sys, "argv", ["captum_abslrp", "explain", "a.png", "--model", "demo:x"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("captum_abslrp", run_name="__main__")
    assert stop.value.code == 2
    assert "Expected `--model` to be a demo model" in one_error(capsys)


def test_class_names_come_with_the_weights() -> None:
    model = nn.Module()
    model.num_classes = 2  # type: ignore[assignment]
    model.pretrained_cfg = {  # type: ignore[assignment]
        "label_names": ["n1", "n2"],
        "label_descriptions": {"n1": "ant, emmet"},
    }
    assert _class_names(model) == ["ant, emmet", "n2"]


def test_demo(tmp_path: Path, figures: dict[str, Figure], capsys: Capture) -> None:
    out = tmp_path / "new" / "demo"
    assert main(["demo", "--out", str(out), "--pairs", "2"]) == 0
    names = demo.list_models()
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*(f"{name}.png" for name in names), "shares.csv", "shares.md"]
    )
    labels = demo.load_scenes("pair", 2).labels.flatten().tolist()
    for name in names:
        figure = figures[f"{name}.png"]
        assert row_labels(figure) == [
            f"why {'an' if label == 8 else 'a'} {label}?" for label in labels
        ]
        assert titles(figure)[:2] == ["input", "AbsLRP (recommended)"]
        assert titles(figure)[2:4] == ["AbsLRP (separate)", "AbsLRP (joint)"]

    text = (out / "shares.md").read_text()
    assert text in capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    assert lines[0] == ["method", *names]
    assert [line[0] for line in lines[2:]] == [
        "(uniform relevance)",
        "AbsLRP (recommended)",
        "AbsLRP (separate)",
        "AbsLRP (joint)",
        "Saliency",
        "InputXGradient",
        "IntegratedGradients",
        "LRP",
    ]
    lrp = lines[-1]
    assert lrp[1].endswith("%")
    assert lrp[2].startswith("not supported: ") and lrp[3].startswith("not supported: ")

    with (out / "shares.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 * len(names)
    assert all(row["questions"] == "4" for row in rows)
    by_name = {(row["model"], row["method"]): row for row in rows}
    assert by_name["vit", "LRP"]["positive_share"] == ""
    assert by_name["vit", "LRP"]["note"] == lrp[3]
    scenes = demo.load_scenes("pair", 2)
    images, masks = scenes.inputs.repeat_interleave(2, 0), scenes.masks.flatten(0, 1)
    maps = AbsLRP(demo.load_model("vit")).attribute(images, target=scenes.labels.flatten())
    share = float(by_name["vit", "AbsLRP (separate)"]["positive_share"])
    assert share == pytest.approx(float(positive_share(maps, masks).mean()), abs=1e-4)


def test_demo_refuses_more_pairs_than_there_are(tmp_path: Path, capsys: Capture) -> None:
    assert main(["demo", "--out", str(tmp_path), "--pairs", "999"]) == 2
    assert "--pairs: Expected `n` to be between 1 and" in one_error(capsys)


def test_demo_does_not_swallow_a_crash_of_abslrp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*args: Any, **options: Any) -> None:
        raise ZeroDivisionError("a fault of the program")

    monkeypatch.setattr(AbsLRP, "attribute", crash)
    with pytest.raises(ZeroDivisionError, match="a fault of the program"):
        main(["demo", "--out", str(tmp_path), "--pairs", "1"])


# --- methods ------------------------------------------------------------------------------------


class Small(nn.Module):
    """In-place activations, and one that is used three times, once under a second name."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), self.act)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6))
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.act(self.first(x)))
        result: Tensor = self.last(self.act(self.head(x)))
        return result


@pytest.fixture
def small() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(2, 3, 16, 20, generator=torch.Generator().manual_seed(0))


def traces(model: nn.Module) -> list[Any]:
    """All that a method could leave on a model."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        (
            sorted(vars(module)),
            [len(getattr(module, hook)) for hook in hooks],
            module.training,
            getattr(module, "inplace", None),
            [(p.data_ptr(), p.requires_grad, p.grad, p.sum().item()) for p in module.parameters()],
        )
        for module in model.modules()
    ]


@pytest.mark.parametrize("name", list_methods())
def test_methods_answer_maps_and_leave_no_trace(
    name: str, small: nn.Module, inputs: Tensor
) -> None:
    before, images = traces(small), inputs.clone()
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state(legacy=False)
    target = torch.tensor([1, 2])
    maps = get_method(name)(small)(inputs, target)
    assert maps.shape == inputs.shape and maps.dtype == inputs.dtype and not maps.requires_grad
    assert maps.isfinite().all() and maps.abs().sum() > 0
    assert traces(small) == before
    assert torch.equal(inputs, images) and not inputs.requires_grad and inputs.grad is None
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_equal(np.random.get_state(legacy=False), numpy_state)
    torch.testing.assert_close(get_method(name)(small)(inputs, target), maps)


@pytest.mark.parametrize("name", list_methods())
def test_methods_take_one_class_for_all_and_images_alone(
    name: str, small: nn.Module, inputs: Tensor
) -> None:
    attribute = get_method(name)(small)
    both = attribute(inputs, 2)
    torch.testing.assert_close(attribute(inputs, torch.tensor([2, 2])), both)
    torch.testing.assert_close(attribute(inputs[1:], 2), both[1:], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", sorted({*list_methods()} - {"random"}))
def test_methods_leave_no_trace_after_a_bad_target(
    name: str, small: nn.Module, inputs: Tensor
) -> None:
    before = traces(small)
    with pytest.raises((IndexError, AssertionError, RuntimeError)):
        get_method(name)(small)(inputs, 99)
    assert traces(small) == before


def test_copies_to_hook_are_not_in_place(small: nn.Module) -> None:
    copied = hookable.hookable_copy(small)
    assert copied is not small and not any(getattr(m, "inplace", False) for m in copied.modules())
    assert any(getattr(m, "inplace", False) for m in small.modules())


@pytest.mark.parametrize("name", list_methods())
def test_in_place_activations_make_no_difference(name: str, inputs: Tensor) -> None:
    def build(inplace: bool) -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 4, 3), nn.ReLU(inplace), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(4, 3)).eval()

    expected = get_method(name)(build(False))(inputs, 1)
    torch.testing.assert_close(get_method(name)(build(True))(inputs, 1), expected)


def test_deeplift_adds_up_where_an_activation_is_used_again(
    small: nn.Module, inputs: Tensor
) -> None:
    maps = get_method("deeplift")(small)(inputs, 1)
    difference = small(inputs)[:, 1] - small(torch.zeros_like(inputs))[:, 1]
    torch.testing.assert_close(maps.flatten(1).sum(1), difference, rtol=1e-3, atol=1e-5)


def test_lrp_refuses_additions_outside_of_modules(inputs: Tensor) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(20, 20)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.layer(x)

    with pytest.raises(TypeError, match="Expected `model` to add tensors only in modules"):
        get_method("lrp")(Residual())(inputs[0, 0], 1)


def test_lrp_names_layers_without_a_rule(inputs: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(TypeError, match=r"GELU.* has no rule defined") as error:
        get_method("lrp")(model)(inputs, 1)
    assert short_reason(error.value) == "no rule for GELU"


def test_guided_backprop_needs_relu() -> None:
    with pytest.raises(ValueError, match=r"Expected `model` to have nn\.ReLU modules"):
        get_method("guided_backprop")(nn.Linear(2, 2))


def test_gradcam_is_the_same_in_all_channels(small: nn.Module, inputs: Tensor) -> None:
    maps = get_method("gradcam")(small)(inputs, 1)
    assert (maps == maps[:, :1]).all() and (maps >= 0).all()


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("test_resnet", "layer4"),
        ("test_convnext", "stages"),
        ("test_efficientnet", "conv_head"),
        ("demo:vgg", "features"),
        ("demo:resnet", "layer4"),
    ],
)
def test_the_feature_layer_is_found(name: str, layer: str) -> None:
    is_demo = name.startswith("demo:")
    model = demo.load_model(name[5:]) if is_demo else timm.create_model(name).eval()
    size = 64 if is_demo else 160
    before = traces(model)
    assert find_feature_layer(model, torch.zeros(1, 3, size, size)) is model.get_submodule(layer)
    assert traces(model) == before


def test_without_a_feature_layer_there_is_no_gradcam() -> None:
    model = timm.create_model("test_vit").eval()
    with pytest.raises(
        ValueError, match="map larger than 1x1 for Grad-CAM, but got VisionTransformer without"
    ):
        get_method("gradcam")(model)(torch.zeros(1, 3, 160, 160), 0)


def test_hooks_go_when_the_model_crashes(small: nn.Module) -> None:
    before = traces(small)
    with pytest.raises(RuntimeError):
        find_feature_layer(small, torch.zeros(1, 5, 8, 8))
    assert traces(small) == before


def test_registration() -> None:
    def twice(model: nn.Module) -> Callable[..., Tensor]:
        return lambda inputs, target: 2 * inputs

    assert register_method("twice")(twice) is twice
    assert list_methods()[-1] == "twice" and get_method("twice") is twice
    with pytest.raises(ValueError, match="Expected `name` to be new, but got 'ig', which is"):
        register_method("ig")
    register_method("ig", overwrite=True)(twice)
    assert get_method("ig") is twice


def test_unknown_methods_have_near_names() -> None:
    with pytest.raises(
        ValueError, match="but got 'deeplif' \\(did you mean deeplift\\?\\). Available methods: "
    ):
        get_method("deeplif")
    with pytest.raises(
        ValueError, match="but got 'qqq'. Available methods: abslrp, abslrp_recommended"
    ):
        get_method("qqq")


def test_positive_share() -> None:
    attribution = torch.tensor([[2.0, -1.0], [1.0, 1.0]]).expand(3, 2, 2, 2).clone()
    attribution[2] = -1
    mask = torch.tensor([[[True, True], [False, False]]] * 3)
    mask[1] = False
    torch.testing.assert_close(positive_share(attribution, mask), torch.tensor([0.5, 0, 0]))
    # Channels are summed before negative relevance is left out.
    attribution[0, 1, 0, 0] = -2
    torch.testing.assert_close(positive_share(attribution, mask)[0], torch.tensor(0.0))


@pytest.mark.parametrize(
    ("attribution", "mask", "message"),
    [
        (torch.zeros(2, 4, 4), torch.ones(2, 4, 4).bool(), "shape (B, C, H, W), but got (2,"),
        (torch.zeros(2, 3, 4, 4), torch.ones(2, 4, 4), "of shape (2, 4, 4), but got torch.float32"),
        (torch.zeros(2, 3, 4, 4), torch.ones(1, 4, 4).bool(), "of shape (1, 4, 4)."),
    ],
)
def test_positive_share_refuses_shapes(attribution: Tensor, mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        positive_share(attribution, mask)
