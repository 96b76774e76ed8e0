"""The HTML report: what is in it, and what a browser makes of it."""

from __future__ import annotations

import base64
import io
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from captum_abslrp import AbsLRP, demo
from captum_abslrp.cli import evaluate as evaluate_command
from captum_abslrp.cli import explain as explain_command
from captum_abslrp.cli import main
from captum_abslrp.report import LEVELS, Panel, Section, Table, render
from captum_abslrp.visualization import smooth_map


def data_of(page: str) -> Any:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found[1])


def pixels(url: str) -> np.ndarray[Any, Any]:
    assert url.startswith("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def panel(**changes: Any) -> Panel:
    given = {
        "name": "cat.jpg",
        "picture": torch.rand(3, 4, 6),
        "classes": ["cat", "dog"],
        "maps": {"target": torch.randn(2, 3, 4, 6)},
    }
    return Panel(**(given | changes))


def page_of(*panels: Panel, **options: Any) -> str:
    options = {"title": "Why?", "settings": {"seed": 3}} | options
    return render([Section("model", list(panels))], **options)


def test_maps_are_what_is_shown() -> None:
    target = torch.tensor([[[2.0, -1.0, 0.0]], [[1.0, -1.0, 0.0]]])
    given = panel(picture=torch.zeros(1, 1, 3), maps={"target": target})
    (shown,) = data_of(page_of(given, clip_percentile=100))["sections"][0]["panels"]
    first = shown["maps"]["target"][0]
    assert pixels(first["src"]).tolist() == [[2 * LEVELS, LEVELS // 2, LEVELS]]
    assert first["limit"] == "2"
    # One class rather than the other: 1, 0, 0 and the opposite.
    assert pixels(shown["pairs"]["0 1"]["src"]).tolist() == [[2 * LEVELS, LEVELS, LEVELS]]
    assert pixels(shown["pairs"]["1 0"]["src"]).tolist() == [[0, LEVELS, LEVELS]]
    assert (
        "cat compared with dog: 100% of the relevance is positive" in shown["pairs"]["0 1"]["alt"]
    )
    assert shown["pairs"]["1 0"]["alt"] == (
        "dog compared with cat: 100% of the relevance is negative, the largest part (100%) in the "
        "upper left"
    )


def test_nothing_is_loaded_and_no_text_breaks_out() -> None:
    nasty = "</script><img src=http://example.org/x onerror=alert(1)>"
    given = panel(name=nasty, classes=[nasty, "{{data}}"], notes=[nasty], contrast=nasty)
    table = Table(nasty, [nasty, "b"], [[nasty, "{{style}}"]])
    page = render(
        [Section(nasty, [given], [table], notes=[nasty])],
        title=nasty,
        settings={nasty: nasty},
        command=nasty,
    )
    assert page.count("</script>") == 2  # of the data and of the program
    assert "<img" not in page
    data = data_of(page)
    assert data["command"] == nasty and data["settings"] == {nasty: nasty}
    assert data["sections"][0]["panels"][0]["classes"] == [nasty, "{{data}}"]
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)=[\"']?(https?:|//)", page_of(panel()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"maps": {}}, "to have maps of classes, but got none"),
        ({"classes": []}, "to have maps of classes, but got none"),
        ({"classes": ["cat"]}, "to have 1 of `target`, one per class, but got 2"),
        ({"probabilities": [0.5]}, "to have 2 of `probabilities`, one per class, but got 1"),
        ({"probabilities": torch.tensor([0.5, torch.nan])}, "to be in \\[0, 1\\]"),
        ({"picture": torch.rand(3, 4, 5)}, "height and width of its picture"),
        ({"picture": torch.rand(3, 4, 6) + 1}, "values in \\[0, 1\\]"),
        ({"maps": {"target": torch.full((2, 3, 4, 6), torch.nan)}}, "to be finite"),
    ],
)
def test_bad_panels_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        page_of(panel(**changes))


def test_a_missing_map_is_left_out() -> None:
    given = panel(maps={"target": [torch.ones(4, 6), None]})
    (shown,) = data_of(page_of(given))["sections"][0]["panels"]
    assert shown["maps"]["target"][1] is None and shown["pairs"] == {}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for i, image in enumerate(demo.load_scenes("pair", 2).images):
        paths.append(folder / f"scene{i}.png")
        Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def report(pictures: list[Path]) -> Path:
    path = pictures[0].parent / "report.html"
    words = ["--model", "demo:resnet", "--top", "3", "--compare", "saliency", "--html", path]
    words += ["--mapping", "published", "--normalization", "joint", "--out", path.parent / "maps"]
    assert main(["explain", *map(str, [*pictures, *words])]) == 0
    return path


def test_explain_writes_a_report(report: Path, pictures: list[Path]) -> None:
    data = data_of(report.read_text(encoding="utf-8"))
    assert "explain" in data["command"] and "--top 3" in data["command"]
    assert data["settings"]["normalization"] == "joint"
    assert data["settings"]["torch"] == torch.__version__
    first, second = data["sections"][0]["panels"]
    assert (first["name"], second["name"]) == ("scene0.png", "scene1.png")
    assert first["views"] == ["difference", "target", "contrast", "saliency"]
    assert len(first["classes"]) == len(first["probabilities"]) == 3
    assert len(first["pairs"]) == 6
    # Any two classes against each other: what `contrast=` of one class gives.
    x = demo.normalize(
        torch.tensor(np.asarray(Image.open(pictures[0]))).permute(2, 0, 1)[None] / 255
    )
    a, b = (int(name) for name in first["classes"][:2])
    attributor = AbsLRP(demo.load_model("resnet"), normalization="joint")
    raw = attributor.attribute(x, target=a, contrast=b)[0]
    difference = torch.from_numpy(smooth_map(raw, 2))
    limit = difference.abs().flatten().quantile(0.99)
    expected = ((difference / limit).clamp(-1, 1) * LEVELS).round() + LEVELS
    steps = torch.tensor(pixels(first["pairs"]["0 1"]["src"]).astype(int))
    assert (steps - expected).abs().max() <= 1


def test_without_contrast_there_is_one_map(pictures: list[Path], tmp_path: Path) -> None:
    words = ["--model", "demo:vgg", "--contrast", "none", "--html", tmp_path / "r.html"]
    assert main(["explain", *map(str, [pictures[0], *words, "--out", tmp_path])]) == 0
    (shown,) = data_of((tmp_path / "r.html").read_text(encoding="utf-8"))["sections"][0]["panels"]
    assert shown["views"] == ["target"] and len(shown["classes"]) == 1


def test_a_report_that_cannot_be_written_is_one_line(
    pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder.html"
    folder.mkdir()
    before = pictures[1].read_bytes()
    for path, message in (
        (folder, f"{folder} could not be written: Is a directory"),
        (pictures[0] / "new" / "r.html", f"could not be written: {pictures[0]} is not a dir"),
        (pictures[1], "to be a file name that ends in .html, but got"),
    ):
        for command in (["explain", pictures[0], "--model", "demo:vgg"], ["evaluate", "--demo"]):
            words = [*command, "--html", path, "--out", tmp_path / "out"]
            assert main([str(word) for word in words]) == 2
            assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    words = ["--model", "demo:vg", "--html", tmp_path / "new" / "r.html"]
    assert main(["explain", *map(str, [pictures[0], *words])]) == 2
    assert not (tmp_path / "new").exists()
    assert pictures[1].read_bytes() == before


def test_what_is_finished_is_in_the_report_of_a_stopped_run(
    pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopping(work: Any, calls: int) -> Any:
        left = iter(range(calls))

        def stopped(*args: Any) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return work(*args)

        return stopped

    page = tmp_path / "r.html"
    words = ["--html", page, "--out", tmp_path / "out"]
    explain = ["explain", *pictures[:2], "--model", "demo:vgg", *words]
    evaluate = ["evaluate", "--demo", "--methods", "random", "--n-mosaics", 1, *words]
    for command, module, function, title in (
        (explain, explain_command, "_explain_image", pictures[0].name),
        (evaluate, evaluate_command, "_evaluate_model", "Mosaic 1"),
    ):
        monkeypatch.setattr(module, function, stopping(getattr(module, function), 1))
        with pytest.raises(KeyboardInterrupt):
            main([str(word) for word in command])
        (section,) = data_of(page.read_text(encoding="utf-8"))["sections"]
        assert [shown["name"] for shown in section["panels"]] == [title]


def test_maps_that_differ_by_rounding_are_told_of(
    pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alike = torch.ones(2, 4, 6)
    alike[1, 0, 0] += 1e-5
    given = panel(maps={"target": alike})
    (shown,) = data_of(page_of(given))["sections"][0]["panels"]
    assert shown["notes"] == [
        "cat compared with dog: the two maps are so similar that their difference is rounding error."
    ]
    (shown,) = data_of(page_of(panel(maps={"target": alike.double()})))["sections"][0]["panels"]
    assert shown["notes"] == []


def test_warnings_are_lines_and_notes(
    pictures: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attribute = AbsLRP.attribute

    def doubtful(*args: Any, **options: Any) -> Any:
        warnings.warn("The maps are alike.", stacklevel=1)
        return attribute(*args, **options)

    monkeypatch.setattr(AbsLRP, "attribute", doubtful)
    words = ["--model", "demo:vgg", "--html", tmp_path / "r.html", "--out", tmp_path]
    words += ["--contrast", "none"]
    assert main(["explain", *map(str, [pictures[0], *words])]) == 0
    assert capsys.readouterr().err.endswith(f"warning: {pictures[0]}: 3: The maps are alike.\n")
    (section,) = data_of((tmp_path / "r.html").read_text(encoding="utf-8"))["sections"]
    assert section["panels"][0]["notes"] == ["3: The maps are alike."]


def test_a_report_tells_what_failed(pictures: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    page = tmp_path / "new" / "r.html"
    words = ["--model", "demo:vgg", "--html", page, "--out", tmp_path]
    assert main(["explain", *map(str, [broken, pictures[0], *words])]) == 2
    (section,) = data_of(page.read_text(encoding="utf-8"))["sections"]
    assert len(section["panels"]) == 1
    assert "broken.png could not be read as an image" in section["notes"][0]
    page.unlink()
    assert main(["explain", *map(str, [broken, *words])]) == 2
    assert not page.exists()


def test_pictures_of_one_name_are_told_apart(pictures: list[Path], tmp_path: Path) -> None:
    (tmp_path / "scene0.png").write_bytes(pictures[0].read_bytes())
    both = [pictures[0], tmp_path / "scene0.png"]
    words = ["--model", "demo:vgg", "--html", tmp_path / "r.html", "--out", tmp_path]
    assert main(["explain", *map(str, [*both, *words])]) == 0
    (section,) = data_of((tmp_path / "r.html").read_text(encoding="utf-8"))["sections"]
    assert [shown["name"] for shown in section["panels"]] == [str(path) for path in both]


def test_evaluate_writes_a_report(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    words = ["--demo", "--model", "demo:vgg", "--methods", "abslrp,saliency", "--n-mosaics", "2"]
    assert main(["evaluate", *words, "--out", str(tmp_path / "out"), "--html", str(path)]) == 0
    data = data_of(path.read_text(encoding="utf-8"))
    (section,) = data["sections"]
    assert [row[0] for row in section["tables"][0]["rows"]] == ["abslrp", "saliency"]
    assert [given["name"] for given in section["panels"]] == ["Mosaic 1", "Mosaic 2"]
    assert section["panels"][0]["views"] == ["abslrp", "saliency"]
    assert data["settings"]["seed"] == "0" and "resume" not in data["settings"]
    assert section["figures"][0]["alt"] == "Scores of the methods on demo:vgg"


@pytest.fixture
def opened(browser: Any, report: Path) -> Iterator[Any]:
    """The report in a page of its own, which must not complain or ask for anything."""
    context = browser.new_context(viewport={"width": 400, "height": 800})
    page = context.new_page()
    trouble: list[str] = []
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    yield page
    assert not trouble
    assert not [url for url in asked if not url.startswith(("file:", "data:"))]
    context.close()


def shown(page: Any, number: int = 0) -> tuple[str, str, str]:
    """Picture, alt text and caption of the map in a panel."""
    place = page.locator(".panel").nth(number)
    overlay = place.locator(".overlay")
    alt = overlay.get_attribute("alt")
    return overlay.get_attribute("src"), alt, place.locator("figcaption").nth(1).inner_text()


def test_clicks_change_the_map(opened: Any) -> None:
    place = opened.locator(".panel").first
    names = place.locator("fieldset").first.locator(".choice span").all_inner_texts()
    first, second, third = (text.split()[0] for text in names)
    before, beside = shown(opened), shown(opened, 1)
    assert before[2] == f"{first} compared with the other classes"
    place.locator(".choice").nth(1).click()
    after = shown(opened)
    assert after[2] == f"{second} compared with the other classes" and after[0] != before[0]
    assert after[1].startswith(f"{second}, compared with the other classes: ")
    place.get_by_label("compared with").select_option(label=third)
    against = shown(opened)
    assert against[2] == f"{second} compared with {third}" and against[0] not in (
        before[0],
        after[0],
    )
    place.get_by_text("relevance for the other classes", exact=True).click()
    assert shown(opened)[2] == third
    place.get_by_text("saliency").click()
    assert shown(opened)[2] == f"{second}, saliency"
    # The class that the other is held against takes its place: the others are back.
    place.get_by_text("specific to the class", exact=True).click()
    place.locator(".choice").nth(2).click()
    assert shown(opened)[2] == f"{third} compared with the other classes"
    assert shown(opened, 1) == beside  # another picture has choices of its own


def test_a_guided_map_is_called_one_and_pairs_are_differences(browser: Any, tmp_path: Path) -> None:
    maps = {"difference": torch.rand(2, 4, 6), "target": torch.rand(2, 4, 6)}
    page_text = page_of(panel(maps=maps, combined="the guided map"))
    (tmp_path / "r.html").write_text(page_text, encoding="utf-8")
    page = browser.new_page()
    page.goto((tmp_path / "r.html").as_uri())
    assert page.get_by_text("(the guided map)").is_visible()
    assert shown(page)[2] == "cat compared with the other classes"
    page.get_by_label("compared with").select_option(label="dog")
    assert shown(page)[2] == "cat compared with dog, the difference of their maps"
    assert page.get_by_text("Red: more relevance for the class than for dog.").is_visible()
    page.close()


def test_small_numbers_have_a_power_of_ten() -> None:
    content = data_of(
        page_of(panel(classes=["a", "b"], maps={"target": torch.full((2, 4, 6), 2.5e-6)}))
    )
    assert (
        content["sections"][0]["panels"][0]["maps"]["target"][0]["limit"]
        == "2.5 \N{MULTIPLICATION SIGN} 10⁻⁶"
    )


def test_two_classes_are_compared_whatever_map_comes_first(browser: Any, tmp_path: Path) -> None:
    maps = {"saliency": torch.rand(2, 4, 6), "target": torch.rand(2, 4, 6)}
    (tmp_path / "r.html").write_text(page_of(panel(maps=maps)), encoding="utf-8")
    page = browser.new_page()
    page.goto((tmp_path / "r.html").as_uri())
    assert shown(page)[2] == "cat, saliency"
    page.get_by_label("compared with").select_option(label="dog")
    assert shown(page)[2] == "cat compared with dog"
    page.close()


def test_a_missing_map_has_no_scale(browser: Any, tmp_path: Path) -> None:
    given = panel(maps={"target": [torch.ones(4, 6), None]})
    (tmp_path / "r.html").write_text(page_of(given), encoding="utf-8")
    page = browser.new_page()
    page.goto((tmp_path / "r.html").as_uri())
    assert page.locator(".scale").is_visible()
    page.locator(".choice").nth(1).click()
    assert not page.locator(".scale").is_visible()
    assert page.get_by_text("This map is not available.").is_visible()
    page.close()


def test_the_foot_tells_what_there_is(browser: Any, tmp_path: Path) -> None:
    page = browser.new_page()
    feet = {}
    for command in (None, "captum-abslrp explain"):
        for sections in ([], [Section("model", [panel()])]):
            text = render(sections, title="Why?", settings={"seed": 3}, command=command)
            (tmp_path / "r.html").write_text(text, encoding="utf-8")
            page.goto((tmp_path / "r.html").as_uri())
            feet[command, len(sections)] = page.locator("footer").inner_text()
    assert all("How to reproduce" in foot and "null" not in foot for foot in feet.values())
    assert [key for key, foot in feet.items() if "captum-abslrp explain" in foot] == [
        ("captum-abslrp explain", 0),
        ("captum-abslrp explain", 1),
    ]
    assert [key for key, foot in feet.items() if "Keys" in foot] == [
        (None, 1),
        ("captum-abslrp explain", 1),
    ]
    page.close()


def test_what_is_chosen_is_seen_in_forced_colors(browser: Any, report: Path) -> None:
    page = browser.new_page(forced_colors="active")
    page.goto(report.as_uri())
    grounds = [
        page.locator(".choice span").nth(i).evaluate("e => getComputedStyle(e).backgroundColor")
        for i in range(2)
    ]
    assert grounds[0] != grounds[1]
    page.close()


def test_the_slider_fades_the_map(opened: Any) -> None:
    place = opened.locator(".panel").first
    overlay = place.locator(".overlay")
    assert overlay.evaluate("e => getComputedStyle(e).opacity") == "1"
    place.locator("input[type=range]").fill("30")
    assert overlay.evaluate("e => getComputedStyle(e).opacity") == "0.3"
    assert place.locator("output").inner_text() == "30%"


def test_keys_are_enough(opened: Any) -> None:
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.type") == "radio"
    before = shown(opened)
    opened.keyboard.press("ArrowRight")
    assert shown(opened) != before
    opened.keyboard.press("3")
    third = shown(opened)
    opened.keyboard.press("1")
    assert shown(opened) == before and third != before
    opened.keyboard.press("-")
    assert opened.locator("output").first.inner_text() == "90%"


def test_every_picture_has_a_text_and_nothing_is_cut_off(opened: Any) -> None:
    for image in opened.locator("img:not(.below)").all():
        assert image.get_attribute("alt")
    for width in (400, 1400):
        opened.set_viewport_size({"width": width, "height": 800})
        assert opened.evaluate("document.documentElement.scrollWidth") <= width
    grounds = set()
    for scheme in ("light", "dark"):
        opened.emulate_media(color_scheme=scheme)
        grounds.add(opened.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds == {"rgb(255, 255, 255)", "rgb(20, 23, 26)"}


def test_a_report_has_the_channels_of_a_layer(
    pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "r.html"
    words = ["--model", "demo:resnet", "--html", page, "--out", tmp_path / "out"]
    command = ["explain", *map(str, [*pictures, *words])]
    assert main([*command, "--concepts", "layer3"]) == 0
    _, section = data_of(page.read_text(encoding="utf-8"))["sections"]
    assert section["title"] == "Concepts: channels of layer3"
    assert 1 <= len(section["figures"]) <= 3
    for figure in section["figures"]:
        assert figure["alt"].startswith("most relevant channels of layer3 for ")
        assert figure["src"].startswith("data:image/png;base64,")
    assert main([*command, "--concepts", "layer33"]) == 2
    message = "the path of a layer of the model, but got 'layer33' (did you mean layer3"
    assert message in capsys.readouterr().err
    assert main(["explain", *map(str, [pictures[0], *words[:2]]), "--concepts", "layer3"]) == 2
    assert "Expected `--html` with `--concepts`" in capsys.readouterr().err
