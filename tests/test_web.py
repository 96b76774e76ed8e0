"""The page that explains images: how it prepares and draws them, and what a browser makes of it."""

from __future__ import annotations

import base64
import functools
import http.server
import io
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import captum_abslrp
from captum_abslrp import AbsLRP, demo, web
from captum_abslrp.export import Preprocessing, save_explainer
from captum_abslrp.report import _in_words, _number, drawing
from captum_abslrp.visualization import color_limit, smooth_map
from captum_abslrp.web import RUNTIME_VERSION, find_runtime, write_page

SOURCE = Path(web.__file__).parent
Pixels = np.ndarray[Any, Any]
Node = Callable[[str, Any], Any]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Node:
    """Runs JavaScript with the modules `prepare`, `maps` and `files` of the page, and data as `given`."""
    program = shutil.which("node")
    if program is None:
        pytest.skip("no node on this machine: `apt-get install nodejs`")
    folder = tmp_path_factory.mktemp("node")
    (folder / "package.json").write_text('{"type": "module"}')
    names = ("prepare", "maps", "files")
    for name in names:
        shutil.copy(SOURCE / f"{name}.js", folder)

    def run(script: str, given: Any) -> Any:
        (folder / "given.json").write_text(json.dumps(given))
        head = [f'import * as {name} from "./{name}.js";' for name in names]
        head += [
            'import fs from "node:fs";',
            'const given = JSON.parse(fs.readFileSync("given.json"));',
        ]
        (folder / "main.js").write_text(
            "\n".join([*head, f"fs.writeFileSync('found.json', JSON.stringify({script}));"])
        )
        done = subprocess.run([program, "main.js"], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads((folder / "found.json").read_text())

    return run


def resized(image: Image.Image, width: int, height: int, resample: Any) -> Image.Image:
    """Resize axis by axis in the order of Pillow 13; before, it was always the same."""
    vertical_first = image.height - height > 2 * max(0, image.width - width)
    between = (image.width, height) if vertical_first else (width, image.height)
    return image.resize(between, resample).resize((width, height), resample)


@pytest.mark.parametrize(
    "interpolation", ["bilinear", "bicubic", "nearest", "lanczos", "box", "hamming"]
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_images_are_prepared_as_by_torchvision(node: Node, interpolation: str, mode: str) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    resample = transforms.InterpolationMode(interpolation)
    random = np.random.default_rng(0)
    cases, expected = [], []
    channels = len(mode) if mode == "RGB" else 1
    for resize in (None, 1, 24, 64, [30, 50], [1, 1], [70, 20]):
        for crop in (None, [20, 24], [33, 64]):
            width, height = (int(size) for size in random.integers(1, 90, 2))
            pixels = random.integers(0, 256, (height, width, 4), dtype=np.uint8)
            pixels[..., 3] = 255
            mean, std = random.random(channels).tolist(), (random.random(channels) + 0.1).tolist()
            settings = {
                "mode": mode,
                "resize": resize,
                "interpolation": interpolation,
                "crop": crop,
            }
            settings |= {"mean": mean, "std": std}
            cases.append([width, height, pixels.ravel().tolist(), settings])
            image = Image.fromarray(pixels).convert("RGB").convert(mode)
            if resize is not None:
                by_torchvision = transforms.Resize(resize, interpolation=resample)(image)
                of_pillow = getattr(Image.Resampling, interpolation.upper())
                image = resized(image, *by_torchvision.size, of_pillow)
                if int(PIL.__version__.split(".")[0]) >= 13:
                    assert image.tobytes() == by_torchvision.tobytes()
            steps = [transforms.CenterCrop(crop)] if crop else []
            steps += [transforms.ToTensor(), transforms.Normalize(mean, std)]
            expected.append(transforms.Compose(steps)(image).numpy())
    found = node(
        """given.map(([width, height, pixels, settings]) => {
            const data = new Uint8ClampedArray(pixels);
            const { picture } = prepare.fromCanvas({ width, height, data }, settings.mode);
            const shaped = prepare.shape(picture, settings);
            return [shaped.channels, shaped.height, shaped.width, [...prepare.normalize(shaped, settings)]];
        })""",
        cases,
    )
    for (*shape, values), of_torchvision in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.array(values, np.float32).reshape(shape), of_torchvision)


@pytest.mark.parametrize("rounding", ["even", "down"])
def test_parts_start_where_python_starts_them(node: Node, rounding: str) -> None:
    random = np.random.default_rng(1)
    settings = {"mode": "L", "resize": None, "interpolation": "bilinear", "mean": [0], "std": [1]}
    settings |= {"rounding": rounding}
    for width, height, crop in [(9, 7, (4, 4)), (7, 9, (4, 4)), (9, 9, (8, 6)), (3, 9, (6, 4))]:
        image = random.integers(0, 256, (height, width), dtype=np.uint8)
        given = settings | {"crop": list(crop)}
        found = node(
            "[...prepare.normalize(prepare.shape({...given[0], channels: 1, data: Uint8Array.from("
            "given[1])}, given[2]), given[2])]",
            [{"width": width, "height": height}, image.ravel().tolist(), given],
        )
        expected = Preprocessing(**given)(Image.fromarray(image))
        np.testing.assert_array_equal(np.array(found, np.float32), expected.numpy().ravel())


def test_maps_are_drawn_and_described_as_in_reports(node: Node) -> None:
    random = np.random.default_rng(0)
    maps = [random.standard_normal((3, *shape)) * scale
            for shape, scale in [((7, 9), 1), ((5, 4), 1e-7), ((2, 3), 1e5), ((16, 16), 0.01)]]  # fmt: skip
    maps += [np.abs(maps[0]), -np.abs(maps[1]), np.zeros((1, 3, 3))]
    for smoothing in (1, 2, 4, 8):
        given = [[values.ravel().tolist(), values.shape, smoothing] for values in maps]
        found = node(
            """given.map(([values, [channels, height, width], smoothing]) => {
                const map = maps.sumChannels(values, channels);
                const drawn = maps.smoothMap(map, width, height, smoothing);
                const limit = maps.colorLimit(drawn);
                return [[...drawn], limit, maps.inDigits(limit), maps.inWords(map, width, height)];
            })""",
            given,
        )
        for values, (drawn, limit, digits, words) in zip(maps, found, strict=True):
            smooth = smooth_map(values, smoothing)
            np.testing.assert_allclose(
                drawn, smooth.ravel(), rtol=1e-9, atol=1e-12 * np.abs(values).max()
            )
            assert limit == pytest.approx(color_limit(smooth))
            assert digits == _number(color_limit(smooth))
            assert words == _in_words(values.sum(0))


def test_numbers_and_files_are_those_of_python(node: Node, tmp_path: Path) -> None:
    numbers = [1.0, 0.024, 0.0012, 0.00012, 2.44e-6, 12.3, 123.4, 5678.0, 12345.0, 1e30, 3e-300]
    assert node("given.map(maps.inDigits)", numbers) == [_number(number) for number in numbers]
    assert _number(123.4) == "120" and _number(5678.0) == "5700"
    values = np.random.default_rng(0).standard_normal((3, 2, 5)).astype(np.float32)
    given = [values.ravel().tolist(), values.shape]
    file = node("[...maps.toNpy(new Float32Array(given[0]), given[1])]", given)
    np.testing.assert_array_equal(np.load(io.BytesIO(bytes(file))), values)
    scores = [3.0, -1.0, 100.0, 99.0]
    expected = torch.tensor(scores, dtype=torch.float64).softmax(0)
    assert node("[...maps.softmax(given)]", scores) == pytest.approx(expected.tolist())


def frames(kind: str, count: int) -> bytes:
    images = [Image.new("RGB", (32, 24), (80 * i + 40, 90, 20)) for i in range(count)]
    file = io.BytesIO()
    images[0].save(
        file, kind, **({"save_all": True, "append_images": images[1:]} if count > 1 else {})
    )
    return file.getvalue()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_animations_are_found(node: Node, kind: str) -> None:
    given = [
        list(frames(kind, 1)),
        list(frames(kind, 3)),
        list(frames(kind, 3)[:30]),
        [],
        list(frames("JPEG", 1)),
    ]
    found = node("given.map((bytes) => files.isAnimated(Uint8Array.from(bytes)))", given)
    assert found == [False, True, kind == "WEBP", False, False]


# The package of the runtime


def installed(folder: Path, version: str = RUNTIME_VERSION, files: bool = True) -> Path:
    """A folder that passes for the package of the runtime."""
    (folder / "dist").mkdir(parents=True)
    (folder / "package.json").write_text(
        json.dumps({"name": "onnxruntime-web", "version": version})
    )
    for name in ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")[: 2 if files else 1]:
        (folder / "dist" / name).write_bytes(name.encode())
    return folder


def test_the_runtime_is_found_in_a_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = installed(tmp_path / "node_modules" / "onnxruntime-web")
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    installed(inside / "node_modules" / "onnxruntime-web", version="1.2.3")
    monkeypatch.chdir(inside)
    with find_runtime() as found:
        assert found == package
    with find_runtime(package) as found:
        assert found == package


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder, "but got a folder without package.json"),
        (
            lambda folder: installed(folder, "1.2.3"),
            "but got onnxruntime-web 1.2.3. Run `npm install",
        ),
        (
            lambda folder: installed(folder, files=False),
            "but got a package without dist/ort-wasm-simd",
        ),
        (lambda folder: Path(__file__), "but got a file"),
    ],
)
def test_another_folder_is_refused(make: Any, message: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "package")
    with pytest.raises(ValueError, match=message), find_runtime(folder):
        pass
    with pytest.raises(ValueError, match=message):
        write_page(tmp_path / "page", b"", TINY, folder)
    assert not (tmp_path / "page").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="the npm of this test is a shell script")
@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "but npm is not installed. Run `npm install onnxruntime-web@"),
        (
            "echo npm error code ENOTFOUND >&2; exit 3",
            "but got exit status 3: error code ENOTFOUND. Run",
        ),
        ("exit 0", "but got no package that could be unpacked"),
        ("echo text > a.tgz", "but got no package that could be unpacked"),
    ],
)
def test_npm_fails_with_one_line(
    script: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    if script is not None:
        (tmp_path / "npm").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "npm").chmod(0o755)
    with pytest.raises(RuntimeError, match=re.escape(message)) as raised, find_runtime():
        pass
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def runtime() -> Iterator[Path]:
    try:
        with find_runtime() as found:
            yield found
    except RuntimeError as error:
        pytest.skip(f"no onnxruntime-web: {error}")


# Files of the page

TINY = {
    "model": "a <tiny> model",
    "method": "by hand",
    "inputs": {"image": [1, 3, 24, 32], "target": [1]},
    "outputs": {"scores": [1, 7], "relevance": [1, 3, 24, 32]},
    "class_names": ["all", "nothing", "no number", "negative, minus", "<b>bold</b>", "twice", "twice"],
    "preprocessing": {"mode": "RGB", "resize": None, "interpolation": "bilinear", "crop": [24, 32],
                      "mean": [0.0] * 3, "std": [1.0] * 3},
    "smoothing": 2,
    "versions": {"captum-abslrp": captum_abslrp.__version__},
}  # fmt: skip
FILES = {
    "about.json", "common.js", "explainer.onnx", "files.js", "index.html", "main.js", "maps.js",
    "onnxruntime-license.txt", "ort-wasm-simd-threaded.wasm", "ort.js", "page.css", "prepare.js", "worker.js",
}  # fmt: skip


def test_a_page_is_complete_and_replaces_only_itself(tmp_path: Path) -> None:
    package = installed(tmp_path / "package")
    folder = tmp_path / "new" / "page"
    write_page(folder, b"first", TINY, package)
    assert {path.name for path in folder.iterdir()} == FILES
    assert (folder / "ort.js").read_bytes() == b"ort.wasm.bundle.min.mjs"
    about = json.loads((folder / "about.json").read_text())
    assert about["drawing"] == {**drawing(), "smoothed": "Maps are smoothed over 2 pixels."}
    assert {name: about[name] for name in TINY} == TINY
    text = (folder / "index.html").read_text()
    assert "<title>Why this class? a &lt;tiny&gt; model</title>" in text and "{{" not in text
    assert not re.search(r"(src|href)=[\"']?(https?:|//)", text)
    (folder / "notes.txt").write_text("mine")
    write_page(folder, b"second", TINY, package)
    assert (folder / "explainer.onnx").read_bytes() == b"second"
    assert {path.name for path in folder.iterdir()} == FILES | {"notes.txt"}
    # A page that was not written to its end has no index.html.
    (folder / "index.html").unlink()
    write_page(folder, b"second", TINY, package)
    assert (folder / "index.html").exists()


def test_a_page_that_is_replaced_in_part_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = installed(tmp_path / "package")
    folder = tmp_path / "page"
    write_page(folder, b"first", TINY, package)
    replaced = web.replaced

    def full(path: Path) -> Any:
        if path.name == "ort.js":
            raise OSError(28, "No space left on device")
        return replaced(path)

    monkeypatch.setattr(web, "replaced", full)
    with pytest.raises(OSError, match="No space left"):
        write_page(folder, b"second", TINY, package)
    text = (folder / "index.html").read_text()
    assert "This page is not complete" in text and "main.js" not in text
    monkeypatch.undo()
    size = write_page(folder, b"second", TINY, package)
    assert "main.js" in (folder / "index.html").read_text()
    assert size == sum(file.stat().st_size for file in folder.iterdir())


@pytest.mark.parametrize("name", ["index.html", "main.js", "explainer.onnx"])
def test_files_of_others_remain(name: str, tmp_path: Path) -> None:
    package = installed(tmp_path / "package")
    folder = tmp_path / "page"
    folder.mkdir()
    text = '<meta name="generator" content="captum-abslrp">'  # that of a report
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=f"but got another {name} in it. Choose another folder"):
        write_page(folder, b"", TINY, package)
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [(name, text)]


def test_a_page_needs_the_preprocessing(tmp_path: Path) -> None:
    package = installed(tmp_path / "package")
    for steps in (None, "Resize(24)"):
        with pytest.raises(
            ValueError, match=r"the steps of a preprocessing, but got .*Resize|None"
        ):
            write_page(tmp_path / "page", b"", TINY | {"preprocessing": steps}, package)
    for other in (
        {"dtype": "float16"},
        {"inputs": {"image": [2, 3, 24, 32], "target": [2]}},
        {"inputs": {"image": [1, 4], "target": [1]}},
    ):
        with pytest.raises(ValueError, match="to take one image"):
            write_page(tmp_path / "page", b"", TINY | other, package)
    with pytest.raises(OSError, match="page"):
        (tmp_path / "page").write_text("a file")
        write_page(tmp_path / "page", b"", TINY, package)


# In a browser


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder and its address."""
    folder = tmp_path_factory.mktemp("served")
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


MODELS = {
    name: functools.cache(functools.partial(demo.load_model, name)) for name in ("vit", "resnet")
}
PREPROCESSING = {
    "mode": "RGB", "resize": 64, "interpolation": "bilinear", "crop": [64, 64],
    "mean": list(demo.MEAN), "std": list(demo.STD),
}  # fmt: skip


@pytest.fixture(scope="module")
def of_demo(
    request: pytest.FixtureRequest, served: tuple[Path, str], runtime: Path
) -> tuple[str, str]:
    """The name of a demo model, and the address of its page."""
    name = request.param
    folder, address = served
    model = MODELS[name]().eval()
    inputs = demo.load_scenes("single", 1).inputs
    file = io.BytesIO()
    about = save_explainer(
        AbsLRP.recommended(model),
        file,
        inputs,
        class_names=list(demo.CLASS_NAMES),
        preprocessing=Preprocessing(**PREPROCESSING),
        format="onnx",
    )
    write_page(folder / name, file.getvalue(), about, runtime)
    return name, f"{address}/{name}/"


def tiny_explainer() -> bytes:
    """An explainer whose map is the image, times a number that depends on the class."""
    helper = pytest.importorskip("onnx.helper")
    float32, int64 = 1, 7
    factors = np.array([1, 0, np.nan, -1, 1e-6, 2, 3], np.float32)
    shape = TINY["inputs"]["image"]  # type: ignore[index]
    constants = {"factors": factors, "base": np.array([[2, 1, 0, -1, -2, -3, -4]], np.float32)}
    constants["zero"] = np.zeros((), np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["factors", "target"], ["factor"]),
            helper.make_node("Mul", ["image", "factor"], ["relevance"]),
            helper.make_node("ReduceMean", ["image"], ["mean"], keepdims=0),
            helper.make_node("Mul", ["mean", "zero"], ["none"]),
            helper.make_node("Add", ["base", "none"], ["scores"]),
        ],
        "tiny",
        [
            helper.make_tensor_value_info("image", float32, shape),
            helper.make_tensor_value_info("target", int64, [1]),
        ],
        [
            helper.make_tensor_value_info("scores", float32, [1, 7]),
            helper.make_tensor_value_info("relevance", float32, shape),
        ],
        [helper.make_tensor(n, float32, v.shape, v.ravel().tolist()) for n, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return bytes(model.SerializeToString())


@pytest.fixture(scope="module")
def tiny(served: tuple[Path, str], runtime: Path) -> str:
    """The address of a page with a tiny explainer."""
    folder, address = served
    write_page(folder / "tiny", tiny_explainer(), TINY, runtime)
    return f"{address}/tiny/"


Opened = Callable[..., Any]


@pytest.fixture
def opened(browser: Any, served: tuple[Path, str]) -> Iterator[Opened]:
    """Opens pages, which must not complain or ask others for anything."""
    trouble: list[str] = []
    asked: list[str] = []
    contexts = []

    def open_page(address: str, script: str = "", **options: Any) -> Any:
        contexts.append(
            browser.new_context(**({"viewport": {"width": 400, "height": 800}} | options))
        )
        contexts[-1].on("request", lambda request: asked.append(request.url))
        page = contexts[-1].new_page()
        page.add_init_script(script)
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.goto(address)
        page.locator("#status", has_text="Ready for an image.").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not trouble
    remote = [url for url in asked if not url.startswith(("blob:", "data:", served[1]))]
    assert not remote
    assert any(url.endswith("explainer.onnx") for url in asked)  # of the worker


def give(
    page: Any, *files: tuple[str, bytes] | Path, expect: str | re.Pattern[str] = "xplained in"
) -> str:
    """Choose files, wait for a line of the status, and return it."""
    kinds = {"png": "image/png", "jpg": "image/jpeg", "gif": "image/gif", "webp": "image/webp"}
    page.set_input_files(
        "#file",
        [
            file
            if isinstance(file, Path)
            else {
                "name": file[0],
                "mimeType": kinds.get(file[0].rpartition(".")[2], "text/plain"),
                "buffer": file[1],
            }
            for file in files
        ],
    )
    return says(page, expect)


def says(page: Any, expect: str | re.Pattern[str]) -> str:
    page.locator("#status", has_text=expect).wait_for()
    return page.locator("#status").inner_text()


def downloaded(page: Any, name: str = "Download the map (.npy)") -> tuple[str, bytes]:
    with page.expect_download() as download:
        page.get_by_role("button", name=name).click()
    return download.value.suggested_filename, Path(download.value.path()).read_bytes()


def map_of(page: Any) -> Pixels:
    return np.load(io.BytesIO(downloaded(page)[1]))


def png(pixels: Pixels, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def some_pixels(height: int = 24, width: int = 32, channels: int = 3) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.filterwarnings("ignore:The guided map is zero")
@pytest.mark.parametrize("of_demo", ["vit", "resnet"], indirect=True)
def test_maps_are_those_of_python(of_demo: tuple[str, str], opened: Opened) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    name, address = of_demo
    model = MODELS[name]().eval()
    page = opened(address)
    scene = (demo.load_scenes("single", 2).images[1] * 255).round().byte().permute(1, 2, 0).numpy()
    large = np.asarray(Image.fromarray(scene).resize((300, 211), Image.Resampling.BICUBIC))
    for number, picture in enumerate((scene, large)):
        steps = [transforms.Resize(64), transforms.CenterCrop(64), transforms.ToTensor()]
        steps.append(transforms.Normalize(demo.MEAN, demo.STD))
        inputs = transforms.Compose(steps)(Image.fromarray(picture))[None]
        with torch.no_grad():
            probabilities = model(inputs)[0].softmax(0)
        ranked = probabilities.argsort(descending=True).tolist()
        give(
            page,
            (f"{number}.png", png(picture)),
            expect=re.compile(rf"{number}\.png: .*xplained in"),
        )
        for place, target in ((0, ranked[0]), (2, ranked[2])):
            page.locator(".choice").nth(place).click()
            caption = f"{target}, {probabilities[target]:.1%}"
            page.locator("figcaption", has_text=caption).wait_for()
            expected = AbsLRP.recommended(model).attribute(inputs, target=target)[0].numpy()
            found = map_of(page)
            assert found.dtype == np.float32 and found.shape == (3, 64, 64)
            assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()


def test_pixels_are_those_of_pillow(tiny: str, opened: Opened) -> None:
    page = opened(tiny)
    pixels = some_pixels()
    rotated = Image.Exif()
    rotated[0x0112] = 6
    turned = np.ascontiguousarray(np.rot90(pixels, 1))
    gamma = PngInfo()
    gamma.add(b"gAMA", (100000).to_bytes(4, "big"))  # Pillow does not convert colors, either
    cases = {
        "plain.png": png(pixels),
        "sharp.webp": png(pixels, "WEBP", lossless=True),
        "turned.png": png(turned, exif=rotated),
        "large.png": png(some_pixels(60, 90)),
        "small.png": png(some_pixels(11, 13)),
        "gray.png": png(pixels[..., 0]),
        "gamma.png": png(pixels, pnginfo=gamma),
        "photo.jpg": png(pixels, "JPEG", quality=95, subsampling=0),
    }
    for name, file in cases.items():
        give(page, (name, file), expect=re.compile(f"{re.escape(name)}: .*xplained in"))
        upright = Image.open(io.BytesIO(file))
        if name == "turned.png":
            expected = pixels
        else:
            whole = np.asarray(upright.convert("RGB"))
            expected = np.zeros((24, 32, 3), np.uint8)
            top, left = (round((whole.shape[i] - expected.shape[i]) / 2) for i in (0, 1))
            if name == "small.png":
                expected[6:17, 9:22] = whole
            else:
                expected[:] = whole[top : top + 24, left : left + 32]
        found = (map_of(page) * 255).round().astype(int).transpose(1, 2, 0)
        assert np.abs(found - expected).max() <= (name == "photo.jpg") * 2, name


def test_transparent_pixels_are_black(tiny: str, opened: Opened) -> None:
    page = opened(tiny)
    pixels = some_pixels(channels=4)
    pixels[:, :20, 3] = 255
    pixels[:, 20:, 3] = 0
    give(page, ("clear.png", png(pixels)))
    found = (map_of(page) * 255).round().astype(int).transpose(1, 2, 0)
    assert (found[:, :20] == pixels[:, :20, :3]).all() and (found[:, 20:] == 0).all()
    assert page.get_by_text("Transparent pixels are black for the model.").is_visible()


def test_bad_files_get_a_line_and_the_map_stays(tiny: str, opened: Opened, tmp_path: Path) -> None:
    page = opened(tiny)
    whole = png(some_pixels(200, 200))
    give(page, ("good.png", png(some_pixels())))
    before = page.locator("#shown").inner_html()
    huge = io.BytesIO()
    Image.new("1", (10000, 6000)).save(huge, "PNG")
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(101_000_000)
    for file, line in (
        (
            ("text.txt", b"no image"),
            "text.txt is not an image. Choose a PNG, JPEG, GIF or WebP file.",
        ),
        (("text.png", b"no image"), "text.png could not be decoded. The file may be damaged"),
        (
            ("cut.png", whole[: len(whole) // 2]),
            "cut.png could not be decoded. The file may be damaged",
        ),
        (("empty.png", b""), "empty.png could not be decoded"),
        (
            ("huge.png", huge.getvalue()),
            "huge.png has 10000 \u00d7 6000 pixels. The most is 50 million pixels",
        ),
        (large, "large.png has 101 MB. The most is 100 MB."),
    ):
        give(page, file, expect=line)
        assert page.locator("#status.trouble").count() == 1
        assert page.locator("#shown").inner_html() == before
    # The explanation goes on.
    page.locator(".choice").nth(3).click()
    says(page, "good.png: negative, minus, ")
    assert page.locator("#status.trouble").count() == 0


def test_an_error_stays_while_another_image_is_explained(tiny: str, opened: Opened) -> None:
    page = opened(tiny, LATE_MAP)
    give(page, ("good.png", png(some_pixels())), expect="Computing")
    refused = "text.txt is not an image. Choose a PNG, JPEG, GIF or WebP file."
    give(page, ("text.txt", b"no image"), expect=refused)
    line = says(page, "xplained in")
    assert line.startswith(f"{refused} good.png: ")
    assert page.locator("#status.trouble").count() == 1
    page.locator(".choice").nth(3).click()
    assert says(page, "negative, minus, ").startswith("good.png: ")
    assert page.locator("#status.trouble").count() == 0


def test_an_image_that_fails_late_leaves_the_other_one(
    tiny: str, served: tuple[Path, str], opened: Opened
) -> None:
    folder = served[0] / "late"
    shutil.copytree(served[0] / "tiny", folder)
    worker = folder / "worker.js"
    start = "async function run(image, target) {"
    text = worker.read_text()
    assert start in text
    fails = 'if (image.id === 2 && image.scores) throw new Error("no memory");'
    worker.write_text(text.replace(start, f"{start} {fails}"))
    page = opened(tiny.replace("/tiny", "/late"))
    give(page, ("good.png", png(some_pixels())))
    give(page, ("late.png", png(some_pixels())), expect="no memory")
    page.locator(".choice").nth(3).click()
    assert says(page, "negative, minus, ").startswith("good.png: ")
    assert page.locator("#shown").get_attribute("aria-busy") == "false"


@pytest.mark.parametrize("kind", ["gif", "png", "webp"])
def test_the_first_frame_of_an_animation_is_explained(kind: str, tiny: str, opened: Opened) -> None:
    page = opened(tiny)
    line = give(page, (f"moving.{kind}", frames(kind.upper(), 3)), ("b.png", png(some_pixels())))
    assert "The file is an animation. Its first frame is explained." in line
    assert "2 files were given. The first one is explained." in line
    found = (map_of(page) * 255).round()[:, 0, 0]
    assert np.abs(found - np.array([40, 90, 20])).max() <= (8 if kind == "webp" else 0)
    notes = page.locator(".note").all_inner_texts()
    assert notes[:2] == [
        "2 files were given. The first one is explained.",
        "The file is an animation. Its first frame is explained.",
    ]


def test_a_map_without_values_is_a_line(tiny: str, opened: Opened) -> None:
    page = opened(tiny)
    give(page, ("a.png", png(some_pixels())))
    assert page.locator(".scale").is_visible()
    assert page.get_by_text("Maps are smoothed over 2 pixels.").is_visible()
    for place, reason in (
        (1, "The map is zero: no pixel has relevance"),
        (2, "No map: the relevance has values"),
    ):
        page.locator(".choice").nth(place).click()
        says(page, reason)
        assert page.locator(".missing", has_text=reason).is_visible()
        assert not page.locator(".scale").is_visible() and not page.locator(".overlay").is_visible()
    assert np.isnan(map_of(page)).all()
    page.locator(".choice").nth(0).click()
    says(page, "all, ")
    assert page.locator(".overlay").is_visible() and not page.locator(".missing").is_visible()


def test_keys_are_enough(tiny: str, opened: Opened) -> None:
    page = opened(tiny)
    page.on("filechooser", lambda _: None)  # or the browser may open its own dialog
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "choose"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(
        {"name": "a.png", "mimeType": "image/png", "buffer": png(some_pixels())}
    )
    says(page, "a.png: all, 63.3%")
    assert page.evaluate("document.activeElement.id") == "choose"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.type") == "radio"
    first = page.locator(".overlay").get_attribute("src")
    page.keyboard.press("4")
    says(page, "negative, minus, ")
    overlay = page.locator(".overlay")
    assert overlay.get_attribute("src") != first
    assert overlay.get_attribute("alt").startswith(
        "negative, minus, relevance of the class: 100% of the relevance is negative, the largest part ("
    )
    page.keyboard.press("ArrowDown")
    says(page, "<b>bold</b>, ")
    assert page.locator(".scale span").last.inner_text().endswith("\u00d7 10⁻⁶")
    page.keyboard.press("-")
    assert page.locator("output").inner_text() == "90%"
    page.keyboard.press("1")
    says(page, "all, ")
    page.keyboard.press("Tab")
    page.keyboard.type("twice (5)")  # digits in the text select no class
    page.keyboard.press("Enter")
    says(page, "twice (5), ")
    assert page.locator(".choice").count() == 6
    assert page.locator("input[type=radio]").nth(5).is_checked()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("6", "twice (6)"),
        ("MINUS", "negative, minus"),
        ("all", "all"),
        ("7", None),
        ("twice", None),
        ("", None),
    ],
)
def test_any_class_can_be_named(text: str, name: str | None, tiny: str, opened: Opened) -> None:
    page = opened(tiny)
    give(page, ("a.png", png(some_pixels())))
    page.get_by_label("Another class").fill(text)
    page.get_by_role("button", name="Explain", exact=True).click()
    if name is not None:
        says(page, f"a.png: {name}, ")
        assert page.locator("figcaption").nth(1).inner_text().startswith(f"{name}, ")
    else:
        given = f"“{text}”" if text else "nothing"
        says(page, f"Expected the name of a class or an index from 0 to 6, but got {given}.")


LATE_FILE = """
    const read = File.prototype.arrayBuffer;
    File.prototype.arrayBuffer = async function () {
        if (this.name === "a.png") await new Promise((done) => setTimeout(done, 600));
        return read.call(this);
    };"""
LATE_MAP = """
    const add = Worker.prototype.addEventListener;
    Worker.prototype.addEventListener = function (type, listener) {
        const late = (event) => setTimeout(() => listener(event), 600);
        add.call(this, type, type === "message" ? late : listener);
    };"""


@pytest.mark.parametrize("script", ["", LATE_FILE, LATE_MAP], ids=["", "late file", "late map"])
def test_the_newest_image_wins(script: str, tiny: str, opened: Opened) -> None:
    page = opened(tiny, script)
    pictures = [list(png(pixels)) for pixels in (some_pixels(), 255 - some_pixels())]
    seen = page.evaluate(
        """([first, second]) => new Promise((done) => {
            const seen = [];
            const drop = (bytes, ...names) => {
                const dataTransfer = new DataTransfer();
                for (const name of names) {
                    const type = "image/png";
                    dataTransfer.items.add(new File([Uint8Array.from(bytes)], name, { type }));
                }
                dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
            };
            const shown = document.getElementById("shown");
            new MutationObserver(() => {
                const [title, image] = ["h2", "img"].map((name) => shown.querySelector(name));
                if (image.src && seen.at(-1)?.[1] !== image.src) seen.push([title.textContent, image.src]);
            }).observe(shown, { childList: true, subtree: true, characterData: true });
            drop(first, "a.png");
            setTimeout(() => drop(second, "b.png", "c.png"), 300);
            setTimeout(() => done(seen), 2500);
        })""",
        pictures,
    )
    titles = [title for title, _ in seen]
    assert titles == (["b.png"] if script else ["a.png", "b.png"])
    shown = page.locator("#shown img").first.get_attribute("src").partition(",")[2]
    found = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown))).convert("RGB"))
    assert (found == 255 - some_pixels()).all()
    assert (
        page.locator("#status")
        .inner_text()
        .endswith("2 files were given. The first one is explained.")
    )
    assert page.locator("#shown").get_attribute("aria-busy") == "false"


def test_images_can_be_pasted_and_texts_cannot(tiny: str, opened: Opened) -> None:
    page = opened(tiny)
    paste = """([kind, content]) => {
        const clipboardData = new DataTransfer();
        if (kind === "text") clipboardData.setData("text/plain", "a");
        else clipboardData.items.add(new File([Uint8Array.from(content)], "image.png", { type: kind }));
        const options = { clipboardData, bubbles: true, cancelable: true };
        document.body.dispatchEvent(new ClipboardEvent("paste", options));
    }"""
    page.evaluate(paste, ["text", []])
    says(page, "Expected an image file, but got something else.")
    page.evaluate(paste, ["image/png", list(png(some_pixels()))])
    says(page, "image.png: all, ")


def test_pictures_are_saved_and_nothing_is_cut_off(tiny: str, opened: Opened) -> None:
    page = opened(tiny)
    name = "a very long name without an end " * 3 + "x" * 120 + ".png"
    for given in (False, True):
        if given:
            give(page, (name, png(some_pixels())))
        for width in (400, 1400):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
    for image in page.locator("img:not(.below)").all():
        assert image.get_attribute("alt")
    file, content = downloaded(page, "Download the picture (.png)")
    assert file.endswith("-all-abslrp.png")
    assert Image.open(io.BytesIO(content)).size == (512, 384)
    assert downloaded(page)[0].endswith("-all-abslrp.npy")
    assert page.locator("#about").inner_text().splitlines()[:2] == ["model", "a <tiny> model"]


def test_what_is_chosen_is_seen_in_forced_colors(tiny: str, opened: Opened) -> None:
    page = opened(tiny, forced_colors="active", color_scheme="dark")
    give(page, ("a.png", png(some_pixels())))
    grounds = [
        page.locator(".choice span").nth(i).evaluate("e => getComputedStyle(e).backgroundColor")
        for i in range(2)
    ]
    assert grounds[0] != grounds[1]


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("explainer.onnx", None, "explainer.onnx could not be loaded: the server answered 404"),
        ("explainer.onnx", b"no model", "explainer.onnx could not be loaded: "),
        ("ort.js", None, "ort.js and ort-wasm-simd-threaded.wasm could not be loaded: "),
        ("ort-wasm-simd-threaded.wasm", None, "could not be loaded: the server answered 404"),
        ("ort-wasm-simd-threaded.wasm", b"nothing", "could not be loaded: "),
        ("about.json", None, "about.json could not be loaded: the server answered 404"),
        ("worker.js", None, "worker.js could not be loaded or run"),
    ],
)
def test_a_broken_page_says_so(
    name: str, content: bytes | None, line: str, tiny: str, browser: Any, served: tuple[Path, str]
) -> None:
    folder = served[0] / "broken"
    shutil.copytree(served[0] / "tiny", folder)
    try:
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        page = browser.new_page()
        page.goto(f"{served[1]}/broken/")
        says(page, line)
        assert page.get_by_role("button", name="Choose an image").is_disabled()
        page.close()
    finally:
        shutil.rmtree(folder)


def test_a_page_that_is_not_served_says_so(
    tiny: str, browser: Any, served: tuple[Path, str]
) -> None:
    page = browser.new_page()
    page.goto((served[0] / "tiny" / "index.html").as_uri())
    line = page.get_by_text("python -m http.server --directory DIR")
    line.wait_for()
    assert line.is_visible()
    page.goto(tiny)
    says(page, "Ready for an image.")
    assert line.count() == 0
    page.close()
