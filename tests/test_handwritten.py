"""Models written by hand have the map of the same network written with modules.

What breaks methods that look at modules is all here: functions instead of layers, in-place calls, a
module used more than once, shortcuts without a module, dicts of tensors, several inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_abslrp import AbsLRP
from tests.conftest import realistic, relative_error
from tests.test_no_trace import no_trace

CLASSES = 5


class Features(nn.Module):
    """Part of a network by hand: takes a dict of tensors, changes it and hands it on."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(4, 4, 3, padding=1)  # used three times
        self.scale = nn.Parameter(torch.rand(4) + 0.5)
        self.shift = nn.Parameter(torch.randn(4))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        x = state["image"]
        for _ in range(3):
            y = F.batch_norm(x, self.mean, self.var, self.scale, self.shift)
            x += self.mix(F.relu(y))
        state["features"] = torch.relu_(x)
        return state


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Parameter(torch.randn(4, 3, 3, 3) / 3)
        self.features = Features()
        self.down = nn.Parameter(torch.randn(6, 4, 3, 3) / 4)
        self.branches = nn.ParameterList([torch.randn(3, 6, 1, 1), torch.randn(2, 6, 3, 3) / 3])
        self.head = nn.Parameter(torch.randn(CLASSES, 11) / 3)
        self.bias = nn.Parameter(torch.randn(CLASSES))
        self.shortcut = lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        state = self.features({"image": F.conv2d(x, self.stem, stride=1, padding=1)})
        x = state.pop("features")
        x = F.conv2d(x, self.down, stride=2, padding=1).add_(self.shortcut(x)).relu()
        maps = [x]
        for weight in self.branches:
            maps.append(F.conv2d(x, weight, padding=weight.shape[-1] // 2).relu_())
        x = F.max_pool2d(torch.cat(maps, dim=1), 2).mean((2, 3))
        return F.linear(x, self.head, self.bias), x


def conv(weight: Tensor, bias: Tensor | None = None, stride: int = 1) -> nn.Conv2d:
    out, into, size, _ = weight.shape
    layer = nn.Conv2d(into, out, size, stride, size // 2, bias=bias is not None)
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


class Sum(nn.Module):
    """The sum of what two branches make of their input."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


class Concat(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class EverySecond(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., ::2, ::2]


def with_modules(model: ByHand) -> nn.Sequential:
    """The network of :class:`ByHand`: a module for each step, each of them used once."""
    of = model.features
    blocks = []
    for _ in range(3):
        norm = nn.BatchNorm2d(4)
        norm.weight, norm.bias = of.scale, of.shift
        norm.running_mean, norm.running_var = of.mean, of.var
        mix = conv(of.mix.weight, of.mix.bias)
        blocks.append(Sum(nn.Identity(), nn.Sequential(norm, nn.ReLU(), mix)))
    shortcut = nn.Sequential(EverySecond(), nn.ConstantPad3d((0, 0, 0, 0, 1, 1), 0.0))
    branches = [nn.Sequential(conv(weight), nn.ReLU()) for weight in model.branches]
    head = nn.Linear(11, CLASSES)
    head.weight, head.bias = model.head, model.bias
    return nn.Sequential(
        conv(model.stem),
        *blocks,
        nn.ReLU(),
        Sum(conv(model.down, stride=2), shortcut),
        nn.ReLU(),
        Concat(nn.Identity(), *branches),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        head,
    ).eval()


def logits_of(output: Any) -> Tensor:
    logits: Tensor = output[0]
    return logits


def both(normalization: str) -> tuple[AbsLRP, AbsLRP, Tensor]:
    """Attributors of the network by hand and of that with modules, and images."""
    torch.manual_seed(0)
    by_hand = ByHand().double().eval()
    by_hand.features.mean.normal_()
    by_hand.features.var.uniform_(0.5, 2)
    modular = with_modules(by_hand)
    x = torch.randn(3, 3, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(by_hand(x)[0], modular(x))
    return (
        AbsLRP(by_hand, normalization=normalization, output=logits_of),
        AbsLRP(modular, normalization=normalization),
        x,
    )


@pytest.mark.parametrize("normalization", ["separate", "joint"])
@pytest.mark.parametrize("contrast", ["others", None])
def test_a_network_by_hand_has_the_map_of_the_same_network_with_modules(
    normalization: str, contrast: str | None
) -> None:
    by_hand, modular, x = both(normalization)
    before, target = x.clone(), [1, 2, 3]
    with no_trace(by_hand.model):
        relevance: Tensor = by_hand.attribute(x, target, contrast=contrast)
    assert torch.equal(x, before)
    assert bool(relevance.flatten(1).any(1).all())
    assert relative_error(relevance, modular.attribute(x, target, contrast=contrast)) < 1e-9
    for i in range(3):
        alone = by_hand.attribute(x[i : i + 1], target[i], contrast=contrast)
        assert relative_error(relevance[i : i + 1], alone) < 1e-9


@pytest.mark.parametrize("normalization", ["separate", "joint"])
def test_any_output_by_hand_can_be_explained(normalization: str) -> None:
    by_hand, modular, x = both(normalization)
    with pytest.raises(TypeError, match=r"but got tuple\. Pick one .* `out\[0\]`"):
        AbsLRP(by_hand.model).attribute(x, 1)
    features = AbsLRP(by_hand.model, normalization=normalization, output=lambda out: out[1])
    expected = AbsLRP(modular.model[:-1], normalization=normalization).attribute(x, 7)
    assert relative_error(features.attribute(x, 7), expected) < 1e-9


class Outputs(NamedTuple):
    loss: Tensor | None
    logits: Tensor
    features: Tensor


class Returning(nn.Module):
    """Returns its logits inside of something else."""

    def __init__(self, package: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.package = nn.Linear(6, CLASSES).double(), package

    def forward(self, x: Tensor) -> Any:
        return self.package(self.layer(x))


PACKAGES: dict[str, Callable[[Tensor], Any]] = {
    "dict": lambda logits: {"features": logits.flip(1), "logits": logits},
    "named tuple": lambda logits: Outputs(None, logits, logits.flip(1)),
    "object": lambda logits: SimpleNamespace(logits=logits, features=logits.flip(1)),
    "similarities": lambda logits: {"logits_per_text": logits.T, "logits_per_image": logits},
}


@pytest.mark.parametrize("name", PACKAGES)
def test_logits_are_found_in_what_a_model_returns(name: str) -> None:
    model, x = Returning(PACKAGES[name]), torch.randn(3, 6, dtype=torch.float64)
    expected = AbsLRP(model.layer).attribute(x, 1)
    assert torch.equal(AbsLRP(model).attribute(x, 1), expected)


def test_logits_are_left_where_another_output_is_asked_for() -> None:
    model = Returning(lambda logits: {"logits": logits, "last": logits.flip(1)})
    x = torch.randn(3, 6, dtype=torch.float64)
    relevance = AbsLRP(model, output=lambda out: out["last"]).attribute(x, 0)
    assert torch.equal(relevance, AbsLRP(model.layer).attribute(x, CLASSES - 1))


class Tabular(nn.Module):
    """A table with embedded categories and with numbers, which also have a linear path of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.hidden = nn.BatchNorm1d(6), nn.Linear(4 * 3 + 6, 32)
        self.head, self.linear = nn.Linear(32, CLASSES), nn.Linear(6, CLASSES)

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        row = torch.cat([categories.flatten(1), self.norm(numbers)], 1)
        return self.head(F.relu(self.hidden(row))) + self.linear(numbers)


def table() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A model and a table of which no relevance is lost: nowhere is all that is added up negative."""
    torch.manual_seed(1)
    inputs = torch.randn(4, 4, 3, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    inputs[1][:, :2].abs_()
    model = realistic(Tabular().double(), *inputs)
    with torch.no_grad():
        model.head.bias += 5
        model.linear.bias += 5
    return model, inputs


@pytest.mark.parametrize("normalization", ["separate", "joint"])
def test_all_inputs_of_a_table_get_relevance(normalization: str) -> None:
    model, inputs = table()
    attributor = AbsLRP(model, normalization=normalization)
    for contrast in (None, "others"):
        relevances, delta = attributor.attribute(
            inputs, 1, contrast=contrast, return_convergence_delta=True
        )
        for relevance, x in zip(relevances, inputs, strict=True):
            assert relevance.shape == x.shape
            assert bool(relevance.flatten(1).any(1).all())
        of_categories, of_numbers = (relevance.flatten(1).sum(1) for relevance in relevances)
        started_with = 1.0 if contrast is None else 0.0
        total = of_categories + of_numbers
        torch.testing.assert_close(delta, total - started_with)
        if normalization == "joint":
            expected = torch.full_like(total, started_with)
            torch.testing.assert_close(total, expected, atol=1e-6, rtol=0)
        elif contrast is None:  # one share from each of the calls that the numbers go into
            expected = torch.full_like(total, 2.0)
            torch.testing.assert_close(of_numbers, expected, atol=1e-6, rtol=0)
            assert bool((of_categories < 1).all())


@pytest.mark.parametrize("normalization", ["separate", "joint"])
def test_rows_of_a_table_are_explained_on_their_own(normalization: str) -> None:
    model, inputs = table()
    attributor = AbsLRP(model, normalization=normalization)
    together = attributor.attribute(inputs, 1)
    split = attributor.attribute(inputs, 1, internal_batch_size=1)
    for rows, one_by_one in zip(together, split, strict=True):
        assert relative_error(rows, one_by_one) < 1e-9


TOKENS, WIDTH, HEADS = 6, 16, 4


class Encoder(nn.Module):
    """A small BERT, called with embeddings: position table, encoder, classifier of the first token."""

    def __init__(self, activation: Callable[[Tensor], Tensor], *, norm_first: bool) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, TOKENS, WIDTH) / 4)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 32, activation=activation, batch_first=True, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, embeddings: Tensor, padded: Tensor | None = None) -> Tensor:
        x = embeddings + self.positions[:, : embeddings.shape[1]]
        x = self.encoder(x, src_key_padding_mask=padded)
        return self.head(x[:, 0])


class EncoderByHand(nn.Module):
    """The encoder above, written out, with its weights."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.of = encoder

    def forward(self, embeddings: Tensor, padded: Tensor | None = None) -> Tensor:
        x = embeddings + self.of.positions[:, : embeddings.shape[1]]
        for layer in self.of.encoder.layers:
            if layer.norm_first:
                x = x + self.attend(layer, layer.norm1(x), padded)
                x = x + self.expand(layer, layer.norm2(x))
            else:
                x = layer.norm1(x + self.attend(layer, x, padded))
                x = layer.norm2(x + self.expand(layer, x))
        return self.of.head(x[:, 0])

    def attend(self, layer: Any, x: Tensor, padded: Tensor | None) -> Tensor:
        weights = layer.self_attn
        qkv = F.linear(x, weights.in_proj_weight, weights.in_proj_bias)
        shape = (*x.shape[:2], 3, HEADS, WIDTH // HEADS)
        q, k, v = qkv.reshape(shape).permute(2, 0, 3, 1, 4)
        scores = torch.einsum("bhqd,bhkd->bhqk", q / (WIDTH // HEADS) ** 0.5, k)
        if padded is not None:
            mask = torch.zeros(padded.shape, dtype=x.dtype).masked_fill(padded, -torch.inf)
            scores += mask[:, None, None]
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
        return weights.out_proj(mixed)

    def expand(self, layer: Any, x: Tensor) -> Tensor:
        return layer.linear2(layer.activation(layer.linear1(x)))


@pytest.mark.parametrize("activation", [F.relu, F.gelu], ids=lambda f: f.__name__)
@pytest.mark.parametrize("norm_first", [False, True], ids=["norm last", "norm first"])
@pytest.mark.parametrize("normalization", ["separate", "joint"])
@pytest.mark.parametrize("is_padded", [False, True], ids=["full", "padded"])
def test_an_encoder_by_hand_has_the_map_of_the_same_encoder_of_pytorch(
    activation: Callable[[Tensor], Tensor], norm_first: bool, normalization: str, is_padded: bool
) -> None:
    torch.manual_seed(0)
    model = realistic(Encoder(activation, norm_first=norm_first).double())
    x = torch.randn(3, TOKENS, WIDTH, dtype=torch.float64)
    lengths = torch.tensor([TOKENS, TOKENS - 1, 3])
    padded = torch.arange(TOKENS) >= lengths[:, None] if is_padded else None
    attributor = AbsLRP(model, normalization=normalization)
    with no_trace(model):
        relevance = attributor.attribute(x, [1, 2, 3], padded)
    by_hand = AbsLRP(EncoderByHand(model).eval(), normalization=normalization)
    assert relative_error(by_hand.attribute(x, [1, 2, 3], padded), relevance) < 1e-9
    assert bool(relevance[:, :3].any(2).all())
    if is_padded:
        assert not bool(relevance[padded].any())
        assert bool(relevance[~padded].any(1).all())
    for i in range(3):
        mask = None if padded is None else padded[i : i + 1]
        alone = attributor.attribute(x[i : i + 1], [i + 1], mask)
        assert relative_error(relevance[i : i + 1], alone) < 1e-9
