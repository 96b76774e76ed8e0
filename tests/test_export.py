"""Explanations as files: `.pt2` and ONNX give the maps of `attribute`, also without this package."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
import venv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import captum_abslrp.export
from captum_abslrp import LRP, AbsLRP, demo
from captum_abslrp.cli import main
from captum_abslrp.export import METADATA, Preprocessing, onnx_file, operators, save_explainer
from captum_abslrp.files import replaced
from captum_abslrp.graphs import simplify
from captum_abslrp.web import RUNTIME_VERSION
from tests.conftest import relative_error

pytestmark = [
    pytest.mark.filterwarnings("ignore:The guided map is zero"),
    pytest.mark.filterwarnings("ignore:The maps of target and contrast differ"),  # random weights
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the exporters of PyTorch
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

ATTRIBUTORS: dict[str, Callable[[nn.Module], AbsLRP]] = {
    "published": AbsLRP,
    "recommended": AbsLRP.recommended,
    "epsilon_plus": lambda model: LRP(model, "epsilon_plus"),
    "attnlrp": lambda model: LRP(model, "attnlrp"),
}
LIMITS = {"pt2": 1e-5, "onnx": 1e-4}
"""Differences that are allowed, as parts of the largest relevance."""
CASES = [("demo:vgg", "recommended"), ("demo:resnet", "epsilon_plus"), ("demo:vit", "recommended")]
MORE = [
    ("demo:vgg", "published"),
    ("demo:resnet", "recommended"),
    ("demo:vit", "attnlrp"),
    *(
        (name, way)
        for name in (
            "resnet18",
            "vit_tiny_patch16_224",
            "convnext_atto",
            "swin_tiny_patch4_window7_224",
        )
        for way in ("recommended", "epsilon_plus")
    ),
]
"""Minutes of work."""
UNSTABLE = {("vit_tiny_patch16_224", "epsilon_plus"), ("convnext_atto", "epsilon_plus")}
"""Networks whose single pixels differ by up to 2e-4 in ONNX, so the error over all pixels has the limit.

Behind layer norm, the epsilon rule divides by sums, and with random weights some are near zero. The float32
map of PyTorch is as far from its float64 map.
"""


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = demo.load_model(name[5:]) if ":" in name else timm.create_model(name)
    return model.eval()


def images_of(model: nn.Module) -> Tensor:
    """An image to export with, and another one."""
    size = model.default_cfg["input_size"]  # type: ignore[index]
    if size == (3, 64, 64):
        return demo.load_scenes("single", 2).inputs
    return torch.randn(2, *size, generator=torch.Generator().manual_seed(0))


def save(name: str, way: str, file: Any, format: str | None = None) -> tuple[Tensor, int, Tensor]:
    """Save an explanation; return another image, its class and its map."""
    model = model_of(name)
    attributor = ATTRIBUTORS[way](model)
    x, other = images_of(model).split(1)
    save_explainer(attributor, file, x, format=format)
    target = int(model(other).argmax())
    return other, target, attributor.attribute(other, target)


def error(found: Any, expected: Tensor) -> float:
    found = torch.as_tensor(found)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    return float((found - expected).abs().max() / expected.abs().max())


PROGRAMS = {
    "pt2": """
import importlib.util, json, sys
import numpy as np, torch
assert not any(map(importlib.util.find_spec, ("captum", "captum_abslrp", "timm")))
for case in sys.argv[1:]:
    about = {"captum_abslrp.json": ""}
    program = torch.export.load(case + ".pt2", extra_files=about).module()
    given = np.load(case + ".npz")
    scores, relevance = program(torch.from_numpy(given["image"]), torch.from_numpy(given["target"]))
    assert json.loads(about["captum_abslrp.json"])["outputs"]["relevance"] == list(relevance.shape)
    np.savez(case + ".pt2.npz", scores=scores.numpy(), relevance=relevance.numpy())
""",
    "onnx": """
import importlib.util, json, sys
import numpy as np, onnxruntime
assert not any(map(importlib.util.find_spec, ("captum", "captum_abslrp", "timm", "torch", "onnx")))
for case in sys.argv[1:]:
    session = onnxruntime.InferenceSession(case + ".onnx")
    about = json.loads(session.get_modelmeta().custom_metadata_map["captum_abslrp.json"])
    given = np.load(case + ".npz")
    scores, relevance = session.run(None, {"image": given["image"], "target": given["target"]})
    assert about["outputs"]["relevance"] == list(relevance.shape)
    np.savez(case + ".onnx.npz", scores=scores, relevance=relevance)
""",
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Python with PyTorch only, and with onnxruntime only."""
    pythons = {}
    for format, package in (("pt2", "torch"), ("onnx", "onnxruntime")):
        place = tmp_path_factory.mktemp(format)
        venv.create(place, with_pip=False, symlinks=True)
        pythons[format] = place / "bin" / "python"
        command = [sys.executable, "-m", "pip", "--python", str(pythons[format]), "install", "-q"]
        own = __import__(package).__version__.partition("+")[0]
        wanted = [f"{package}=={own}", "numpy"]
        if package == "torch":  # 5 GB: take the files of this environment instead
            packages = Path(torch.__file__).parents[1]
            target = next((place / "lib").glob("python*")) / "site-packages"
            for entry in packages.iterdir():
                if not re.match(r"(captum|timm|__editable__|_virtualenv|distutils)", entry.name):
                    (target / entry.name).symlink_to(entry)
            for link in target.glob("*.pth"):
                link.unlink()
        else:
            done = subprocess.run([*command, *wanted], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no {package} from a package index: {done.stderr[-200:]}")
    return pythons


def check_alone(alone: dict[str, Path], cases: list[tuple[str, str]], place: Path) -> None:
    """Save explanations, run them where only a runtime is installed, and compare."""
    expected = {}
    for number, case in enumerate(cases):
        stem = place / str(number)
        for format in PROGRAMS:
            expected[stem, case] = save(*case, f"{stem}.{format}")
        image, target, _ = expected[stem, case]
        np.savez(f"{stem}.npz", image=image.numpy(), target=np.array([target]))
    for format, program in PROGRAMS.items():
        stems = [str(stem) for stem, _ in expected]
        done = subprocess.run(
            [alone[format], "-I", "-c", program, *stems], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        for (stem, (name, way)), (image, _, relevance) in expected.items():
            found = np.load(f"{stem}.{format}.npz")
            model = model_of(name)
            torch.testing.assert_close(
                torch.from_numpy(found["scores"]), model(image).detach(), rtol=1e-4, atol=1e-4
            )
            unstable = format == "onnx" and (name, way) in UNSTABLE
            measure = relative_error if unstable else error
            away = measure(torch.from_numpy(found["relevance"]), relevance)
            assert away <= LIMITS[format], (name, way, format, away)


def test_files_run_alone(alone: dict[str, Path], tmp_path: Path) -> None:
    check_alone(alone, CASES, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE, ids="-".join)
def test_files_of_more_models_run_alone(
    case: tuple[str, str], alone: dict[str, Path], tmp_path: Path
) -> None:
    check_alone(alone, [case], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", timm.list_models("test_*"))
def test_small_models_of_timm_in_onnx(name: str) -> None:
    """ONNX is as near to float64 as float32 in PyTorch, which some random weights put far away."""
    model = model_of(name)
    attributor = AbsLRP.recommended(model)
    x, other = images_of(model).split(1)
    file = io.BytesIO()
    save_explainer(attributor, file, x, format="onnx")
    run = onnx_file.runner(file.getvalue())
    images = (x, other, x.flip(-1), other.flip(-1))
    found = []
    for image in images:
        target = model(image).argmax(1)
        scores, relevance = run(image, target)
        torch.testing.assert_close(scores, model(image).detach(), rtol=1e-4, atol=1e-4)
        found.append((image, target, relevance, attributor.attribute(image, target)))
    exact = AbsLRP.recommended(model.double())
    errors, own = [], []
    for image, target, relevance, in_float32 in found:
        expected = exact.attribute(image.double(), target)
        errors.append(relative_error(relevance, expected))
        own.append(relative_error(in_float32, expected))
    assert np.median(errors) <= max(1e-3, 3 * np.median(own)), (errors, own)


def pt2_of(attributor: AbsLRP, x: Tensor, **options: Any) -> tuple[dict[str, Any], Any]:
    file = io.BytesIO()
    about = save_explainer(attributor, file, x, format="pt2", **options)
    return about, torch.export.load(io.BytesIO(file.getvalue())).module()


def test_a_batch_has_a_class_for_each_sample() -> None:
    model = model_of("demo:vgg")
    x = images_of(model)
    _, program = pt2_of(AbsLRP(model), x)
    targets = torch.tensor([7, 2])
    assert torch.equal(program(x, targets)[1], AbsLRP(model).attribute(x, targets))
    assert program(x, torch.tensor([7, 10]))[1].isnan().flatten(1).all(1).tolist() == [False, True]


def test_maps_are_nan_where_attribute_raises() -> None:
    model = model_of("demo:vgg")
    x = images_of(model)[:1]
    attributor = AbsLRP(model)
    file = io.BytesIO()
    save_explainer(attributor, file, x, format="onnx")
    for run in (onnx_file.runner(file.getvalue()), pt2_of(attributor, x)[1]):
        for image, target in ((x, 10), (x, -11), (x / 0, 3), (x * torch.nan, 3)):
            assert run(image, torch.tensor([target]))[1].isnan().all(), target


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_inputs_of_another_shape(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval().to(dtype)
    x = torch.rand(2, 4, dtype=dtype)
    about, program = pt2_of(AbsLRP(model), x)
    assert about["smoothing"] == 1 and about["inputs"]["image"] == [2, 4]
    assert torch.equal(program(x, torch.tensor([2, 1]))[1], AbsLRP(model).attribute(x, [2, 1]))


def test_the_order_of_memory_is_free() -> None:
    model = model_of("demo:vgg")
    x = images_of(model)[:1].to(memory_format=torch.channels_last)
    _, program = pt2_of(AbsLRP(model), x)
    expected = AbsLRP(model).attribute(x.contiguous(), 3)
    for given in (x, x.contiguous(), x.mT.contiguous().mT):
        assert error(program(given, torch.tensor([3]))[1], expected) < 1e-5


def test_options_are_those_of_trace() -> None:
    model = model_of("demo:resnet")
    x = images_of(model)[:1]
    attributor = AbsLRP.recommended(model)
    options: dict[str, Any] = {"contrast": 3, "combine": "difference"}
    about, program = pt2_of(attributor, x, target=1, **options)
    expected = attributor.attribute(x, 5, **options)
    assert torch.equal(program(x, torch.tensor([5]))[1], expected)
    assert (about["contrast"], about["combine"]) == (3, "difference")
    assert "contrast=3, combine='difference'" in about["method"]


@pytest.mark.parametrize("format", LIMITS)
def test_the_metadata_are_in_the_file(format: str, tmp_path: Path) -> None:
    model = model_of("demo:vit")
    file = tmp_path / f"vit.{format}"
    prepare = Preprocessing("RGB", 64, "bilinear", (64, 64), (0.5,) * 3, (0.25,) * 3)
    about = save_explainer(
        AbsLRP(model), file, images_of(model)[:1], name="demo:vit", class_names=demo.CLASS_NAMES,
        preprocessing=prepare,
    )  # fmt: skip
    if format == "pt2":
        extra: dict[str, Any] = {METADATA: ""}
        torch.export.load(file, extra_files=extra)
        stored = json.loads(extra[METADATA])
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(file)
        stored = json.loads(session.get_modelmeta().custom_metadata_map[METADATA])
        assert about["versions"]["opset"] == onnx_file.OPSET
    assert stored == json.loads(json.dumps(about))
    assert stored["class_names"] == list(demo.CLASS_NAMES) and stored["model"] == "demo:vit"
    assert stored["preprocessing"]["crop"] == [64, 64] and stored["smoothing"] == 8
    assert stored["inputs"] == {"image": [1, 3, 64, 64], "target": [1]}
    assert stored["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("format", LIMITS)
def test_a_file_has_the_weights_once_and_no_paths(format: str) -> None:
    model = model_of("resnet18")
    file = io.BytesIO()
    save_explainer(LRP(model, "epsilon_plus"), file, images_of(model)[:1], format=format)
    content = file.getvalue()
    weights = sum(v.numel() * v.element_size() for v in model.state_dict().values())
    assert weights <= len(content) < 1.1 * weights
    for place in (Path(captum_abslrp.export.__file__).parents[2], Path(timm.__file__).parents[1]):
        assert str(place).encode() not in content


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) if x.sum() > 0 else self.second(x)


def test_bad_arguments_get_one_clear_line(tmp_path: Path) -> None:
    model = model_of("demo:vgg")
    x = images_of(model)[:1]
    attributor = AbsLRP(model)

    def save_to(file: Any, **options: Any) -> None:
        save_explainer(**({"attributor": attributor, "file": file, "inputs": x} | options))

    file = tmp_path / "a.pt2"
    for error_class, message, options in [
        (ValueError, "to end in .pt2 or .onnx, but got", {"file": tmp_path / "a.pt"}),
        (ValueError, "'pt2' or 'onnx', but got None", {"file": io.BytesIO()}),
        (ValueError, "'pt2' or 'onnx', but got 'tf'", {"format": "tf"}),
        (TypeError, "an AbsLRP or LRP, but got VGG", {"attributor": model}),
        (TypeError, "one tensor, but got tuple", {"inputs": (x,)}),
        (ValueError, "one name per class, but got 2 names", {"class_names": ["a", "b"]}),
        (ValueError, "be on the CPU, but got a tensor on meta", {"inputs": x.to("meta")}),
        (ValueError, "same operators for all values", 
         {"attributor": AbsLRP(Branches().eval()), "inputs": torch.rand(1, 4)}),
        (IndexError, "target", {"target": 11}),
        (ValueError, "float32 or float16 for ONNX, but got torch.float64",
         {"inputs": x.double(), "file": tmp_path / "a.onnx"}),
        (FileNotFoundError, "No such file", {"file": tmp_path / "none" / "a.pt2"}),
    ]:  # fmt: skip
        with pytest.raises(error_class, match=message) as caught:
            save_to(**({"file": file} | options))
        assert "\n" not in str(caught.value)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("size", [(9, 12), (8, 8)])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 2},
        {"kernel_size": (3, 2), "stride": (2, 1)},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False},
        {"kernel_size": 3, "stride": 3, "divisor_override": 5},
    ],
    ids=str,
)
def test_decomposition_of_average_pooling(options: dict[str, Any], size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    output = nn.functional.avg_pool2d(x, **options)
    gradient = torch.randn_like(output)
    (expected,) = torch.autograd.grad(output, x, gradient)
    given = {"stride": (), "padding": 0, "count_include_pad": True, "divisor_override": None}
    given |= options
    sizes = [
        [value] if isinstance(value, int) else [*value]
        for value in (given["kernel_size"], given["stride"], given["padding"])
    ]
    found = operators._avg_pool2d_backward(
        gradient, x, *sizes, False, given["count_include_pad"], given["divisor_override"]
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dims", [None, (0,), (-1,), (1, -2), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (2, 96, 97, 130), (101, 1, 194, 0)], ids=str)
@pytest.mark.parametrize("function", [torch.sum, torch.mean])
def test_decomposition_of_long_sums(
    function: Callable[..., Tensor],
    shape: tuple[int, ...],
    dims: tuple[int, ...] | None,
    keepdim: bool,
) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    added = torch.ops.aten.sum.dim_IntList
    table = {added: operators._sum, torch.ops.aten.mean.dim: operators._mean}
    graph = make_fx(lambda x: function(x, dims, keepdim), table)(x)
    torch.testing.assert_close(graph(x), function(x, dims, keepdim), equal_nan=True)
    for node in graph.graph.nodes:
        if node.target is added:
            given = node.args[0].meta["tensor_meta"].shape
            length = math.prod(given[d] for d in node.args[1] or range(len(given)))
            assert length <= operators.LONGEST_SUM or length in (97, 101)  # primes


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"),
    [(1, 0, 1, 1), (2, 1, 1, 2), (3, 2, 2, 1), (2, 0, 1, 4)],
)
def test_decomposition_of_convolution(
    transposed: bool, stride: int, padding: int, dilation: int, groups: int
) -> None:
    x = torch.randn(2, 4, 11, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 4 // groups, 3, 3, dtype=torch.float64)
    settings = [[stride] * 2, [padding] * 2, [dilation] * 2, transposed, [0, 0], groups]
    output = torch.convolution(x, weight, None, *settings)
    gradient = torch.randn_like(output)
    (expected,) = torch.autograd.grad(output, x, gradient)
    found, *rest = operators._convolution_backward(
        gradient, x, weight, None, *settings, [True, False, False]
    )
    torch.testing.assert_close(found, expected)
    assert rest == [None, None]


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach()
    return x.mean((0, 2, 3)), x.square().mean((0, 2, 3)) + 1


OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "mish": nn.functional.mish,
    "bilinear": partial(nn.functional.interpolate, scale_factor=2, mode="bilinear"),
    "corners": partial(
        nn.functional.interpolate, size=(13, 5), mode="bilinear", align_corners=True
    ),
    "nearest": partial(nn.functional.interpolate, size=(13, 20)),
    "bicubic": partial(nn.functional.interpolate, scale_factor=(2, 1.5), mode="bicubic"),
    "bicubic, corners": partial(
        nn.functional.interpolate, size=(5, 17), mode="bicubic", align_corners=True
    ),
    "adaptive average": partial(nn.functional.adaptive_avg_pool2d, output_size=(3, 4)),
    "replicated": partial(nn.functional.pad, pad=(1, 2, 0, 3), mode="replicate"),
    "reflected": partial(nn.functional.pad, pad=(1, 2, 0, 3), mode="reflect"),
    "softshrink": partial(nn.functional.softshrink, lambd=0.4),
    "batch norm": lambda x: nn.functional.batch_norm(x, *statistics(x)),
    "affine batch norm": lambda x: nn.functional.batch_norm(x, *statistics(x), *statistics(x)),
    "average": partial(nn.functional.avg_pool2d, kernel_size=3, stride=2, padding=1),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_in_onnx(name: str) -> None:
    x, targets = torch.randn(1, 3, 8, 10), torch.tensor([1])

    def run(image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        image.requires_grad_()
        output = OPERATORS[name](image)
        (gradient,) = torch.autograd.grad(output.square().sum(), image)
        return output + 0 * target.sum(), gradient

    graph = make_fx(run)(x.clone(), targets)
    simplify(graph)
    expected = graph(x, targets)
    onnx_file.prepare(graph)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.graph = graph

        def forward(self, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            output, gradient = self.graph(image, target)
            return output, gradient

    with torch.no_grad():
        exported = torch.export.export(Whole(), (x, targets))
    found = onnx_file.runner(onnx_file.of(exported, "key", "value"))(x, targets)
    torch.testing.assert_close(found, [*expected], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "stride", "offset", "kept"),
    [
        ((4, 6), (6, 1), None, True),
        ((6, 1, 4), (1, 24, 6), 0, True),
        ((2, 3, 4), (1, 8, 2), 0, True),
        ((4, 6), (6, 1), 1, False),
        ((4, 3), (6, 2), 0, False),
        ((5, 5), (1, 1), 0, False),
    ],
)
def test_decomposition_of_strided_views(
    size: tuple[int, ...], stride: tuple[int, ...], offset: int | None, kept: bool
) -> None:
    x = torch.arange(24.0).view(2, 12)
    given = (size, stride, offset)
    found = operators._as_strided(x, *given)
    if not kept:
        assert found is NotImplemented
        assert operators._as_strided_scatter(x, torch.zeros(size), *given) is NotImplemented
        return
    assert torch.equal(found, x.as_strided(*given))
    source = torch.randn(size)
    expected = torch.ops.aten.as_strided_scatter(x, source, *given)
    assert torch.equal(operators._as_strided_scatter(x, source, *given), expected)


def test_views_of_another_order_of_memory() -> None:
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert torch.equal(operators._view(x, [2, 60]), x.reshape(2, 60))
    assert operators._view(x.contiguous(), [2, 60]) is NotImplemented


def test_decomposition_of_copysign() -> None:
    values = torch.tensor([0.0, -0.0, 1.5, -2.0, torch.inf, -torch.inf, 1e-45, -1e-45])
    a, b = values[:, None], values[None]
    found, expected = operators._copysign(a, b), torch.copysign(a, b)
    assert torch.equal(found, expected) and torch.equal(found.signbit(), expected.signbit())


def test_a_missing_operator_of_onnx_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("demo:vit")
    monkeypatch.delitem(operators.DECOMPOSITIONS, torch.ops.aten.copysign.Tensor)
    with pytest.raises(
        ValueError, match=r"can be converted to ONNX, but got .*signbit.*\.pt2"
    ) as caught:
        save_explainer(AbsLRP.recommended(model), io.BytesIO(), images_of(model)[:1], format="onnx")
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(onnx_file, "PACKAGES", ("onnx", "not_there"))
    model = model_of("demo:vgg")
    with pytest.raises(ModuleNotFoundError, match=r"not_there is not\. Run `pip install 'captum"):
        save_explainer(AbsLRP(model), tmp_path / "a.onnx", images_of(model)[:1])


def test_another_map_is_not_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = model_of("demo:vgg")
    file = tmp_path / "a.onnx"
    file.write_text("mine")
    monkeypatch.setitem(
        operators.DECOMPOSITIONS,
        torch.ops.aten.abs.default,
        lambda x: torch.where(x > 0, x, -1.1 * x),
    )
    with pytest.raises(RuntimeError, match=r"reproduce the map, .* is [\d.]+% of the largest"):
        save_explainer(AbsLRP(model), file, images_of(model)[:1])
    assert file.read_text() == "mine" and [*tmp_path.iterdir()] == [file]


def test_other_scores_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("demo:vgg")
    runner = onnx_file.runner

    def without_scores(content: bytes) -> Callable[..., Any]:
        run = runner(content)
        return lambda image, target: (0 * run(image, target)[0], run(image, target)[1])

    monkeypatch.setattr(onnx_file, "runner", without_scores)
    with pytest.raises(RuntimeError, match=r"the scores, .* is 100.0% of the largest value"):
        save_explainer(AbsLRP(model), io.BytesIO(), images_of(model)[:1], format="onnx")


def test_operators_that_write_to_given_memory() -> None:
    def run(x: Tensor) -> Tensor:
        memory = torch.empty_like(x)
        torch.ops.aten.threshold_backward.grad_input(x, x - 1, 0, grad_input=memory)
        torch.ops.aten.div.out(memory, x, out=memory)
        return memory

    x = torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last) * 2
    graph = make_fx(run)(x)
    onnx_file.prepare(graph)
    assert torch.equal(graph(x), run(x))
    assert not [n for n in graph.graph.nodes if str(n.target).endswith(("grad_input", "out"))]


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    file = tmp_path / "a.onnx"
    mine = tmp_path / ".a.onnx.part"
    mine.write_text("mine")
    with replaced(file) as first:
        with pytest.raises(ZeroDivisionError), replaced(file) as second:
            second.write(b"second")
            raise ZeroDivisionError
        first.write(b"first")
    assert file.read_bytes() == b"first" and mine.read_text() == "mine"
    assert sorted(tmp_path.iterdir()) == [mine, file]
    with pytest.raises(IsADirectoryError), replaced(tmp_path):
        pass


def test_the_model_is_left_as_it_was() -> None:
    model = model_of("demo:vgg")
    before = {
        name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()
    }
    hooks = [len(m._forward_hooks) for m in model.modules()]
    pt2_of(AbsLRP(model), images_of(model)[:1])
    for name, value in model.state_dict(keep_vars=True).items():
        assert value is before[name][0] and torch.equal(value, before[name][1])
    assert hooks == [len(m._forward_hooks) for m in model.modules()]


# Preprocessing


def transform_of(**options: Any) -> Any:
    return create_transform(**({"input_size": (3, 96, 96), "is_training": False} | options))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("size", [(96, 96), (500, 333), (71, 203), (640, 97)])
def test_preprocessing_of_timm(interpolation: str, crop_mode: str, size: tuple[int, int]) -> None:
    transform = transform_of(interpolation=interpolation, crop_mode=crop_mode, crop_pct=0.9)
    found = Preprocessing.of(transform)
    assert found.crop == (96, 96) and found.interpolation == interpolation
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    torch.testing.assert_close(found(picture), transform(picture), rtol=0, atol=1e-5)


def test_preprocessing_of_gray_images() -> None:
    transform = transform_of(input_size=(1, 32, 32), mean=(0.5,), std=(0.5,))
    found = Preprocessing.of(transform, "L")
    picture = Image.fromarray(np.arange(4800, dtype=np.uint32).reshape(60, 80).astype(np.uint8))
    assert found.mode == "L" and found(picture).shape == (1, 32, 32)
    torch.testing.assert_close(found(picture), transform(picture), rtol=0, atol=1e-5)


def test_preprocessing_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    for processor, expected in [
        (transformers.ViTImageProcessor(), ((224, 224), "bilinear", None)),
        (
            transformers.ConvNextImageProcessor(size={"shortest_edge": 224}, resample=3),
            (256, "bicubic", (224, 224)),
        ),
    ]:
        found = Preprocessing.of(processor)
        assert (found.resize, found.interpolation, found.crop) == expected
    assert found.rounding == "down"


@pytest.mark.parametrize("size", [224, 299, 380, 518])
def test_rounding_of_borders(size: int) -> None:
    transformers = pytest.importorskip("transformers")
    for shortest in (size, size + 32):
        processor = transformers.CLIPImageProcessor(
            size={"shortest_edge": shortest}, crop_size={"height": size, "width": size}
        )
        assert Preprocessing.of(processor).rounding == "down"
        compose = create_transform((3, size, size), crop_pct=size / shortest)
        assert Preprocessing.of(compose).rounding == "even"


def test_other_preprocessing_is_refused() -> None:
    with pytest.raises(ValueError, match="but got .* with ResizeKeepRatio"):
        Preprocessing.of(transform_of(input_size=(3, 64, 96)))

    class Flip(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flip(-1)

    transform = transform_of()
    transform.transforms[-1] = nn.Sequential(transform.transforms[-1], Flip())
    type(transform.transforms[-1]).__name__ = "Sequential"
    with pytest.raises(ValueError, match="with Sequential"):
        Preprocessing.of(transform)
    transform.transforms[-1] = type("Normalize", (Flip,), {})()
    with pytest.raises(ValueError, match="more than these steps"):
        Preprocessing.of(transform)


# Command line


@pytest.mark.parametrize("ending", ["pt2", "onnx"])
def test_the_command_writes_the_map_of_explain(
    ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = Path(__file__).parents[1] / "docs" / "scene.png"
    assert main(["explain", str(scene), "--model", "demo:vgg", "--out", str(tmp_path)]) == 0
    file = tmp_path / "deep" / f"vgg.{ending}"
    assert main(["export", "--model", "demo:vgg", "--out", str(file)]) == 0
    assert f"vgg.{ending}: " in capsys.readouterr().out
    if ending == "pt2":
        extra: dict[str, Any] = {METADATA: ""}
        run = torch.export.load(file, extra_files=extra).module()
    else:
        import onnxruntime

        content = file.read_bytes()
        run = onnx_file.runner(content)
        extra = onnxruntime.InferenceSession(content).get_modelmeta().custom_metadata_map
    about = json.loads(extra[METADATA])
    x = Preprocessing(**about["preprocessing"])(Image.open(scene))[None]
    target = model_of("demo:vgg")(x).argmax(1)
    relevance = torch.as_tensor(run(x, target)[1])[0]
    assert error(relevance, torch.from_numpy(np.load(tmp_path / "scene-abslrp.npy"))) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Expected `--out FILE` or `--web DIR`, but got neither"),
        (["--out", "a.pt2", "--runtime", "x"], "Expected `--web DIR` with `--runtime`"),
        (["--web", "page", "--runtime", "x"], "--web: Expected"),
        (["--out", "a.pb"], "Expected `--out` to end in .pt2 or .onnx, but got a.pb."),
        (["--out", "new/a.pt2", "--mapping", "vg"], "--mapping: "),
        (["--out", "a.pt2", "--contrast", "11"], "Expected `--contrast` to be between 0 and 9"),
        (["--out", "/dev/null/a.pt2"], "could not be written"),
    ],
)  # fmt: skip
def test_bad_options_of_the_command(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--model", "demo:vgg", *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert not [*tmp_path.iterdir()]


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that passes for the npm package: the command copies it without running it."""
    place = tmp_path_factory.mktemp("runtime") / "onnxruntime-web"
    (place / "dist").mkdir(parents=True)
    (place / "package.json").write_text(
        json.dumps({"name": "onnxruntime-web", "version": RUNTIME_VERSION})
    )
    for name in ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"):
        (place / "dist" / name).write_text("")
    return place


def test_the_command_writes_a_page(
    runtime: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "page"
    given = ["export", "--model", "demo:vgg", "--runtime", str(runtime)]
    assert main([*given, "--web", str(place), "--out", str(tmp_path / "vgg.onnx")]) == 0
    assert "python -m http.server" in capsys.readouterr().out
    assert (place / "explainer.onnx").read_bytes() == (tmp_path / "vgg.onnx").read_bytes()
    assert json.loads((place / "about.json").read_text())["model"] == "demo:vgg"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "index.html").write_text("mine")
    assert main([*given, "--web", str(tmp_path / "mine")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["index.html"]
    assert (tmp_path / "mine" / "index.html").read_text() == "mine"


def test_a_page_needs_known_steps(
    runtime: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unknown(cls: Any, transform: Any, mode: str) -> Preprocessing:
        raise ValueError("unknown steps")

    monkeypatch.setattr(Preprocessing, "of", classmethod(unknown))
    given = ["export", "--model", "demo:vgg"]
    assert main([*given, "--web", str(tmp_path / "page"), "--runtime", str(runtime)]) == 2
    warning, failure = capsys.readouterr().err.strip().splitlines()
    assert "unknown steps" in warning and "Use `--out FILE` instead" in failure
    assert not (tmp_path / "page").exists()
    assert main([*given, "--out", str(tmp_path / "vgg.pt2")]) == 0
    extra: dict[str, Any] = {METADATA: ""}
    torch.export.load(tmp_path / "vgg.pt2", extra_files=extra)
    assert json.loads(extra[METADATA])["preprocessing"].startswith("Compose(")
