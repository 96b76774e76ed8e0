"""Bad input raises a clear error or has a documented result.

One table: arguments, models, files, options, checkpoints."""

from __future__ import annotations

import os
import pickle
import resource
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.font_manager  # noqa: F401  # writes a file when it is imported first
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from captum_abslrp import AbsLRP, LayerAbsLRP, register_call_rule, register_mapping
from captum_abslrp.cli import main
from captum_abslrp.cli.files import UserError, read_image, save_text
from captum_abslrp.mappings import Mapping
from captum_abslrp.metrics import gae
from captum_abslrp.rules import TwinRule

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
X = torch.randn(2, 3, 8, 8)
FOUR = torch.randn(4, 3, 8, 8)


class Returns(nn.Module):
    """A model that returns what a function makes of its input."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def without_gradient(x: Tensor) -> Tensor:
    with torch.no_grad():
        return MODEL(x)


def of(inputs: Any, target: Any = 0, **options: Any) -> Callable[[], Any]:
    return lambda: AbsLRP(MODEL).attribute(inputs, target, **options)


def made(*arguments: Any, **options: Any) -> Callable[[], Any]:
    return lambda: AbsLRP(*arguments, **options).attribute(X, 0)


def layer(chosen: Any, **options: Any) -> Callable[[], Any]:
    return lambda: LayerAbsLRP(MODEL, chosen).attribute(X, 0, **options)


def score(inputs: Tensor, explain: Any = None, **options: Any) -> Callable[[], Any]:
    return lambda: gae(MODEL, explain or AbsLRP(MODEL), inputs, **options)


def with_one(value: float) -> Tensor:
    x = X.clone()
    x[1, 0, 3, 3] = value
    return x


class Refused(Exception):
    """The command line refused something, in one line."""


Make = Callable[[Path], Any]
"""Makes what is to be read, at a path."""


def command(*words: Any, capsys: Any) -> None:
    """Run the command line; its one line of error is raised."""
    try:
        code = main([str(word) for word in words])
    except SystemExit as stop:  # of the parser, after its usage
        assert stop.code == 2
        raise Refused(capsys.readouterr().err.splitlines()[-1]) from None
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert code == 2 and len(lines) == 1 and "Traceback" not in lines[0]
    raise Refused(lines[0])


def explained(
    make: Make | None = None, *words: Any, name: str = "x.png", model: str = "demo:vgg"
) -> Callable[[Path, Any], None]:
    def attempt(tmp_path: Path, capsys: Any) -> None:
        path = tmp_path / name
        if make is not None:
            make(path)
        command("explain", path, "--model", model, "--out", tmp_path / "out", *words, capsys=capsys)

    return attempt


def picture(path: Path, mode: str = "RGB", **options: Any) -> None:
    Image.effect_noise((64, 64), 60).convert(mode).save(path, **options)


def truncated(path: Path) -> None:
    picture(path)
    path.write_bytes(path.read_bytes()[:1500])


def text(path: Path) -> None:
    path.write_text("no picture")


def bomb(path: Path) -> None:
    """A small file of a picture with 10^10 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


def of_numbers(dtype: Any) -> Make:
    return lambda path: Image.fromarray(np.ones((64, 64), dtype)).save(path)


def weights(content: Any, name: str = "w.pt") -> Any:
    """Explain with a checkpoint that holds something."""

    def attempt(tmp_path: Path, capsys: Any) -> None:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif callable(content):
            content(path)
        elif content is not None:
            torch.save(content, path)
        explained(picture, "--checkpoint", path, model="test_vit")(tmp_path, capsys)

    return attempt


class Malicious:
    """An object whose unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.path}'",)


def malicious(protocol: str) -> Any:
    def attempt(tmp_path: Path, capsys: Any) -> None:
        trace, path = tmp_path / "it has run", tmp_path / "w.pt"
        if protocol == "zip":
            torch.save({"state_dict": Malicious(trace)}, path)
        else:
            path.write_bytes(pickle.dumps(Malicious(trace)))
        try:
            weights(None)(tmp_path, capsys)
        finally:
            assert not trace.exists()
        pickle.loads(pickle.dumps(Malicious(trace)))
        assert trace.exists()  # it would have run

    return attempt


def wrong_keys() -> dict[str, Tensor]:
    state = timm.create_model("test_vit").state_dict()
    return {("neck" if key == "norm.weight" else key): value for key, value in state.items()}


def wrong_shapes() -> dict[str, Tensor]:
    state = timm.create_model("test_vit").state_dict()
    return state | {"norm.weight": torch.ones(3)}


def evaluated(*words: Any, make: Make | None = None) -> Any:
    def attempt(tmp_path: Path, capsys: Any) -> None:
        if make is not None:
            make(tmp_path / "data")
        words_of = [str(word).replace("DATA", str(tmp_path / "data")) for word in words]
        command("evaluate", *words_of, "--out", tmp_path / "out", capsys=capsys)

    return attempt


def pictures(count: int) -> Make:
    def make(path: Path) -> None:
        path.mkdir()
        for number in range(count):
            picture(path / f"{number}.png")

    return make


def scores(line: str, settings: str = "{}") -> Make:
    """A folder of scores, beside the one of the data."""

    def make(path: Path) -> None:
        (path.parent / "out").mkdir()
        (path.parent / "out" / "scores.jsonl").write_text(line)
        (path.parent / "out" / "settings.json").write_text(settings)

    return make


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without the rights of root, who may write everywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def written_to_a_read_only_folder(tmp_path: Path, capsys: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        try:
            with as_nobody():
                save_text("x", Path(folder) / "x.txt")
        finally:
            Path(folder).chmod(0o755)


def written_over_a_read_only_file(tmp_path: Path, capsys: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.txt"
        path.write_text("kept")
        path.chmod(0o444)
        Path(folder).chmod(0o777)
        try:
            with as_nobody():
                save_text("x", path)
        finally:
            assert path.read_text() == "kept" and list(Path(folder).iterdir()) == [path]


def without_room(*words: str) -> Any:
    """The command where no file may be larger than a kilobyte, as on a disk that is full."""

    def attempt(tmp_path: Path, capsys: Any) -> None:
        picture(tmp_path / "x.png")
        given = [word.replace("PICTURE", str(tmp_path / "x.png")) for word in words]
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
        try:
            command(*given, "--out", tmp_path / "out", capsys=capsys)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            out = tmp_path / "out"
            assert not list(out.glob("*.part")) + list(out.glob("*.png"))

    return attempt


def shows(make: Make, name: str, pixel: tuple[int, int, int]) -> Any:
    """A picture that is read, and the color in its corner."""

    def attempt(tmp_path: Path, capsys: Any) -> None:
        make(tmp_path / name)
        read = read_image(tmp_path / name, 3)
        assert read.mode == "RGB" and read.getpixel((0, 0)) == pytest.approx(pixel, abs=3)

    return attempt


def plain(mode: str, color: Any, **options: Any) -> Make:
    return lambda path: Image.new(mode, (64, 64), color).save(path, **options)


def animated(path: Path) -> None:
    frames = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def sixteen_bits(path: Path) -> None:
    Image.fromarray(np.full((64, 64), 100 * 256, np.uint16)).save(path)


unreadable = "x.png could not be read as an image: "
unfit = "Expected `--checkpoint` to be a weights file, but got "
no_state = "Expected `--checkpoint` to contain a state dict, but got "
DEMO = ("--demo", "--model", "demo:vgg", "--methods", "random", "--n-mosaics", 1)

# Files, options, checkpoints: what was tried, what the one line of error says; None where it is no error.
COMMANDS: list[tuple[str, Callable[[Path, Any], Any], str | None]] = [
    ("image is missing", explained(), unreadable + "No such file or directory"),
    ("image is empty", explained(lambda p: p.touch()), unreadable + "cannot identify"),
    ("image is a text", explained(text), unreadable + "cannot identify image file"),
    ("image is truncated", explained(truncated), unreadable + "image file is truncated"),
    ("image is a bomb", explained(bomb), unreadable + ".*decompression bomb"),
    ("image of floats", explained(of_numbers(np.float32), name="x.tif"), "x.tif could .* 8 or 16 bits"),
    ("image of ints", explained(of_numbers(np.int32), name="x.tif"), "32-bit integers with an unknown range"),
    ("folder is empty", explained(lambda p: p.mkdir()), "a folder with images, but got no image"),
    ("16 bits", shows(sixteen_bits, "x.png", (100, 100, 100)), None),
    ("16 bits, TIFF", shows(sixteen_bits, "x.tif", (100, 100, 100)), None),
    ("CMYK", shows(plain("CMYK", (0, 255, 255, 0), quality=100), "x.jpg", (254, 0, 0)), None),
    ("animated", shows(animated, "x.gif", (255, 0, 0)), None),
    ("with transparency", shows(plain("RGBA", (9, 99, 199, 255)), "x.png", (9, 99, 199)), None),
    ("palette", shows(plain("P", 0), "x.png", (0, 0, 0)), None),
    ("two levels", shows(plain("1", 1), "x.png", (255, 255, 255)), None),
    ("gray", shows(plain("L", 77), "x.bmp", (77, 77, 77)), None),
    ("wrong ending", shows(plain("L", 77, format="PNG"), "x.jpg", (77, 77, 77)), None),
    ("out is a file", explained(picture, "--out", __file__), "`--out` to be a folder to write to"),
    ("html is no page", explained(picture, "--html", "x.png"), "to be a file name that ends in .html"),
    ("html and resume", explained(picture, "--html", "x.html", "--resume"), "`--html` or `--resume`"),
    ("folder is read-only", written_to_a_read_only_folder, "could not be written: Permission denied"),
    ("file is read-only", written_over_a_read_only_file, "could not be written: Permission denied"),
    ("disk is full: explain", without_room("explain", "PICTURE", "--model", "demo:vgg"),
     "x-abslrp.npy could not be written: "),
    ("disk is full: evaluate", without_room("evaluate", *map(str, DEMO)),
     "comparison.png could not be written: File too large"),
    ("disk is full: scores", without_room("evaluate", *map(str, DEMO), "--n-mosaics", "4"),
     "out could not be written to: File too large"),
    ("model is unknown", explained(picture, model="resnt50"), "did you mean resnet50"),
    ("demo is unknown", explained(picture, model="demo:vig"), "did you mean demo:v"),
    ("model has no classes", explained(picture, model="resnet18.nothing"), "'resnet18.nothing'"),
    ("target is unknown", explained(picture, "--target", "cat"), "a class of the model, but got 'cat'"),
    ("target is too large", explained(picture, "--target", "10"), "between 0 and 9, but got 10"),
    ("contrast is target", explained(picture, "--target=3", "--contrast=3"), "another class than"),
    ("top is too large", explained(picture, "--top", "11"), "number of classes 10, but got 11"),
    ("top is nothing", explained(picture, "--top", "0"), "a positive integer, but got '0'"),
    ("top and target", explained(picture, "--top=1", "--target=1"), "not allowed with argument"),
    ("device is unknown", explained(picture, "--device", "abacus"), "`--device` to be available"),
    ("device is not there", explained(picture, "--device", "cuda:63"), "`--device` to be available"),
    ("method is unknown", explained(picture, "--compare", "magic"), "invalid choice: 'magic'"),
    ("weights are missing", weights(None), unfit),
    ("weights are a folder", weights(lambda p: p.mkdir()), unfit),
    ("weights are empty", weights(b""), unfit),
    ("weights are a text", weights(b"nonsense"), unfit),
    ("weights are empty, safe", weights(b"", "w.safetensors"), unfit),
    ("weights lie on their size", weights(b"\xff" * 64, "w.safetensors"), unfit),
    ("weights are a pickle, safe", weights(pickle.dumps({}), "w.safetensors"), unfit),
    ("weights are a list", weights([1, 2]), no_state),
    ("weights are numbers", weights({"epoch": 3}), no_state),
    ("weights are a model", weights(lambda p: torch.save(nn.ReLU(), p)), unfit),
    ("weights run a program", malicious("zip"), unfit + ".*Weights only load failed"),
    ("weights are a program", malicious("pickle"), unfit),
    ("weights have other keys", weights(wrong_keys()), "do not match 'test_vit': .*neck"),
    ("weights have other shapes", weights(wrong_shapes()), "do not match 'test_vit': .*norm.weight"),
    ("weights of a few", weights({"a": torch.ones(1)}), "do not match 'test_vit': .*Missing key"),
    ("weights are safe, wrong", weights(lambda p: save_file({"a": torch.ones(1)}, p), "w.safetensors"),
     "do not match 'test_vit'"),
    ("weights of a demo", explained(picture, "--checkpoint", "x"), "with a timm model"),
    ("data is missing", evaluated("--model", "demo:vgg", "--data", "DATA"), "to be a folder, but got"),
    ("data is a file", evaluated("--model", "demo:vgg", "--data", "DATA", make=text), "which is not one"),
    ("data is three", evaluated("--model", "demo:vgg", "--data", "DATA", make=pictures(3)),
     "at least four images, but got 3"),
    ("no data", evaluated("--model", "demo:vgg"), "one of the arguments --data --demo is required"),
    ("methods unknown", evaluated("--demo", "--methods", "ig,sal"), "argument --methods: .*'sal'"),
    ("no methods", evaluated("--demo", "--methods", ","), "method names, but got ','"),
    ("there are scores", evaluated(*DEMO, make=scores("")), "to be a folder without scores, but got"),
    ("other settings", evaluated(*DEMO, "--resume", make=scores("")), "Choose another folder"),
    ("damaged settings", evaluated(*DEMO, "--resume", make=scores("", "{")), "to contain the settings of"),
]  # fmt: skip


# What was tried, the error, and what it says.
TABLE: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("inputs are a list", of([1, 2]), TypeError, "a tuple of tensors, but got list"),
    ("inputs are None", of(None), TypeError, "a tuple of tensors, but got NoneType"),
    ("inputs are numpy", of(X.numpy()), TypeError, "a tuple of tensors, but got ndarray"),
    ("inputs are a path", of("cat.jpg"), TypeError, "a tuple of tensors, but got str"),
    ("inputs are ints", of(X.long()), TypeError, "floating-point dtype, but got torch.int64"),
    ("inputs are bools", of(X > 0), TypeError, "floating-point dtype, but got torch.bool"),
    ("inputs are complex", of(X.to(torch.complex64)), TypeError, "but got torch.complex64"),
    ("inputs are sparse", of(X.to_sparse()), TypeError, "dense tensors .* `x.to_dense\\(\\)`"),
    ("inputs are meta", of(X.to("meta")), TypeError, "without values \\(meta\\)"),
    ("inputs are empty", of(X[:0]), ValueError, "at least one sample, but got shape \\(0, 3, 8, 8\\)"),
    ("inputs are a number", of(torch.tensor(1.0)), ValueError, "batch dimension .* shape \\(\\)"),
    ("inputs are one image", of(X[0]), ValueError, "`x.unsqueeze\\(0\\)`"),
    ("inputs have a NaN", of(with_one(torch.nan)), ValueError, "finite, but got NaN or infinite"),
    ("inputs are infinite", of(with_one(torch.inf)), ValueError, "finite, but got NaN or infinite"),
    ("inputs are no tensors", of(()), ValueError, "at least one tensor, but got an empty tuple"),
    ("inputs differ in length", of((X, X[:1])), ValueError, "same number of samples, .* \\[2, 1\\]"),
    ("channels do not fit", of(X[:, :1]), RuntimeError, "3 channels, but got 1"),
    ("size does not fit", of(torch.randn(2, 3, 9, 9)), RuntimeError, "shapes cannot be multiplied"),
    ("dtype does not fit", of(X.double()), RuntimeError, "should be the same"),
    ("target too large", of(X, 5), IndexError, "`target` to be within .* \\(5,\\) .* but got 5"),
    ("target too small", of(X, -6), IndexError, "`target` to be within .* but got -6"),
    ("target is a float", of(X, 1.5), TypeError, "`target` to be an int, .* but got 1.5"),
    ("target is a name", of(X, "cat"), TypeError, "`target` to be an int, .* but got 'cat'"),
    ("target is a bool", of(X, True), TypeError, "`target` to be an int, .* but got True"),
    ("target is a dict", of(X, {0: 1}), TypeError, "`target` to be an int, .* but got \\{0: 1\\}"),
    ("target is no class", of(X, []), TypeError, "`target` to be an int, .* but got \\[\\]"),
    ("targets too few", of(X, [1]), ValueError, "one entry per sample \\(2\\), but got 1"),
    ("targets too many", of(X, [1, 2, 3]), ValueError, "one entry per sample \\(2\\), but got 3"),
    ("targets are floats", of(X, torch.rand(2)), TypeError, "tensor of integers .* torch.float32"),
    ("targets are a matrix", of(X, torch.ones(2, 2).long()), TypeError, "at most one dimension"),
    ("target has two indices", of(X, (1, 2)), ValueError, "1 indices per sample .* but got 2"),
    ("contrast is a word", of(X, contrast="other"), ValueError, '"others", "softmax", None or'),
    ("contrast is the target", of(X, contrast=0), ValueError, "`contrast` and `target` to be different"),
    ("contrast too large", of(X, contrast=9), IndexError, "`contrast` to be within"),
    ("contrast is a float", of(X, contrast=0.5), TypeError, "`contrast` to be an int"),
    ("contrasts too few", of(X, contrast=[1]), ValueError, "`contrast` to have one entry per sample"),
    ("combine is unknown", of(X, combine="sum"), ValueError, '"gated" or "guided", but got'),
    ("parts of none", of(X, internal_batch_size=0), ValueError, "at least 1, but got 0"),
    ("parts of a half", of(X, internal_batch_size=0.5), ValueError, "at least 1, but got 0.5"),
    ("parts of a word", of(X, internal_batch_size="all"), ValueError, "at least 1, but got 'all'"),
    ("model is a function", made(lambda x: x), TypeError, "torch.nn.Module, but got function"),
    ("model is a class", made(nn.ReLU), TypeError, "torch.nn.Module, but got type"),
    ("model is None", made(None), TypeError, "torch.nn.Module, but got NoneType"),
    ("mapping is unknown", made(MODEL, "vitt"), ValueError, "Did you mean 'vit'"),
    ("mapping is a number", made(MODEL, 3), TypeError, "a Mapping, the name of a mapping or None"),
    ("normalization", made(MODEL, normalization="sum"), ValueError, '"separate" or "joint"'),
    ("output is a name", made(MODEL, output="logits"), TypeError, "`output` to be a function"),
    ("output is a list", made(MODEL, output=lambda o: o.tolist()), TypeError, "but got list"),
    ("returns a dict", made(Returns(lambda x: {"a": x})), TypeError, "a tensor, but got dict"),
    ("returns a text", made(Returns(lambda x: "no")), TypeError, "a tensor, but got str"),
    ("returns a sum", made(Returns(lambda x: x.sum())), ValueError, "one row per sample"),
    ("returns classes", made(Returns(lambda x: x.flatten(1).argmax(1))), ValueError, "to depend on"),
    ("returns a constant", made(Returns(lambda x: torch.ones(2, 3))), ValueError, "to depend on"),
    ("has no gradient", made(Returns(without_gradient)), ValueError, "`torch.no_grad\\(\\)`"),
    ("layer of another model", layer(nn.ReLU()), ValueError, "a ReLU that is not part of it"),
    ("layer is a name", layer("0"), TypeError, "torch.nn.Module, but got str"),
    ("call of a layer", layer(MODEL[0], call_index=3), ValueError, "from 0 to 0, .* but got 3"),
    ("images not by fours", score(X), ValueError, "\\(4 M, C, H, W\\), but got \\(2, 3, 8, 8\\)"),
    ("images of odd size", score(FOUR[..., :7]), ValueError, "even, but got 8 x 7"),
    ("one step", score(FOUR, n_steps=1), ValueError, "at least 2, but got 1"),
    ("schedule", score(FOUR, schedule="all"), ValueError, "one of \\('published', 'cumulative'\\)"),
    ("maps", score(FOUR, lambda x, target: x[:, :, :1]), ValueError, "return maps of shape"),
    ("rule is a layer", lambda: register_call_rule("sinc", nn.ReLU()), TypeError, "got ReLU\\(\\)"),  # type: ignore[arg-type]
    ("call is a number", lambda: register_call_rule(3, TwinRule()), TypeError, "a layer class"),  # type: ignore[arg-type]
    ("call has a rule", lambda: register_call_rule("gelu", TwinRule()), ValueError, "overwrite=True"),
    ("call moves", lambda: register_call_rule("reshape", TwinRule()), ValueError, "moves elements"),
    ("mapping is taken", lambda: register_mapping(Mapping("vit", [])), ValueError, "overwrite=True"),
]  # fmt: skip


ROWS = [
    *((name, lambda tmp_path, capsys, a=attempt: a(), error, line) for name, attempt, error, line in TABLE),
    *((name, attempt, line and (Refused, UserError), line) for name, attempt, line in COMMANDS),
]  # fmt: skip


@pytest.mark.parametrize(
    ("attempt", "error", "message"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS]
)
# Little is left to tell the classes apart by in an image that GAE has masked nearly everywhere.
@pytest.mark.filterwarnings("ignore:The maps of target and contrast")
def test_bad_input(
    attempt: Callable[[Path, Any], Any],
    error: Any,
    message: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = {name: value.clone() for name, value in MODEL.state_dict().items()}
    before = X.clone()
    if message is None:
        attempt(tmp_path, capsys)
    else:
        with pytest.raises(error, match=message):
            attempt(tmp_path, capsys)
    # Nothing of the user's is changed, and the next call is as if nothing had been.
    assert torch.equal(X, before)
    assert all(torch.equal(weights[name], value) for name, value in MODEL.state_dict().items())
    assert AbsLRP(MODEL).attribute(X, 0).isfinite().all()
