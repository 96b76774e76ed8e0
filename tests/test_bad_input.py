"""What comes of arguments that are wrong: an error that says what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_abslrp import AbsLRP, LayerAbsLRP, register_call_rule, register_mapping
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
    ("target too large", of(X, 5), IndexError, "`target` to lie within .* \\(5,\\) .* but got 5"),
    ("target too small", of(X, -6), IndexError, "`target` to lie within .* but got -6"),
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
    ("contrast is the target", of(X, contrast=0), ValueError, "another class than `target`"),
    ("contrast too large", of(X, contrast=9), IndexError, "`contrast` to lie within"),
    ("contrast is a float", of(X, contrast=0.5), TypeError, "`contrast` to be an int"),
    ("contrasts too few", of(X, contrast=[1]), ValueError, "`contrast` to have one entry per sample"),
    ("combine is unknown", of(X, combine="sum"), ValueError, '"difference" or "gated", but got'),
    ("parts of none", of(X, internal_batch_size=0), ValueError, "at least 1, but got 0"),
    ("parts of a half", of(X, internal_batch_size=0.5), ValueError, "at least 1, but got 0.5"),
    ("parts of a word", of(X, internal_batch_size="all"), ValueError, "at least 1, but got 'all'"),
    ("model is a function", made(lambda x: x), TypeError, "torch.nn.Module, but got function"),
    ("model is a class", made(nn.ReLU), TypeError, "torch.nn.Module, but got type"),
    ("model is None", made(None), TypeError, "torch.nn.Module, but got NoneType"),
    ("mapping is unknown", made(MODEL, "vitt"), ValueError, "Did you mean 'vit'"),
    ("mapping is a number", made(MODEL, 3), TypeError, "a Mapping, the name of one or None"),
    ("normalization", made(MODEL, normalization="sum"), ValueError, '"separate" or "joint"'),
    ("output is a name", made(MODEL, output="logits"), TypeError, "`output` to be a function"),
    ("output is a list", made(MODEL, output=lambda o: o.tolist()), TypeError, "but got list"),
    ("returns a dict", made(Returns(lambda x: {"a": x})), TypeError, "a tensor, but got dict"),
    ("returns a text", made(Returns(lambda x: "no")), TypeError, "a tensor, but got str"),
    ("returns a sum", made(Returns(lambda x: x.sum())), ValueError, "one row per sample \\(2\\)"),
    ("returns classes", made(Returns(lambda x: x.flatten(1).argmax(1))), ValueError, "to depend on"),
    ("returns a constant", made(Returns(lambda x: torch.ones(2, 3))), ValueError, "to depend on"),
    ("has no gradient", made(Returns(without_gradient)), ValueError, "`torch.no_grad\\(\\)` inside"),
    ("layer of another model", layer(nn.ReLU()), ValueError, "a ReLU that is none of them"),
    ("layer is a name", layer("0"), TypeError, "torch.nn.Module, but got str"),
    ("call of a layer", layer(MODEL[0], call_index=3), ValueError, "from 0 to 0, .* but got 3"),
    ("images not by fours", score(X), ValueError, "\\(4 M, C, H, W\\), but got \\(2, 3, 8, 8\\)"),
    ("images of odd size", score(FOUR[..., :7]), ValueError, "even, but got 8 x 7"),
    ("one step", score(FOUR, n_steps=1), ValueError, "at least 2, but got 1"),
    ("schedule", score(FOUR, schedule="all"), ValueError, "one of \\('published', 'cumulative'\\)"),
    ("maps", score(FOUR, lambda x, target: x[:, :, :1]), ValueError, "return maps of shape"),
    ("rule is a layer", lambda: register_call_rule("sinc", nn.ReLU()), TypeError, "got ReLU\\(\\)"),  # type: ignore[arg-type]
    ("call is a number", lambda: register_call_rule(3, TwinRule()), TypeError, "a class of layers"),  # type: ignore[arg-type]
    ("call has a rule", lambda: register_call_rule("gelu", TwinRule()), ValueError, "overwrite=True"),
    ("call moves", lambda: register_call_rule("reshape", TwinRule()), ValueError, "moves elements"),
    ("mapping is taken", lambda: register_mapping(Mapping("vit", [])), ValueError, "overwrite=True"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("attempt", "error", "message"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
# Little is left to tell the classes apart by in an image that GAE has masked nearly everywhere.
@pytest.mark.filterwarnings("ignore:The maps of target and contrast")
def test_bad_arguments(attempt: Callable[[], Any], error: type[Exception], message: str) -> None:
    weights = {name: value.clone() for name, value in MODEL.state_dict().items()}
    before = X.clone()
    with pytest.raises(error, match=message):
        attempt()
    # Nothing of the user's is changed, and the next call is as if nothing had been.
    assert torch.equal(X, before)
    assert all(torch.equal(weights[name], value) for name, value in MODEL.state_dict().items())
    assert AbsLRP(MODEL).attribute(X, 0).isfinite().all()
