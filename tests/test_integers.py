"""Integer inputs: `LayerAbsLRP` of embeddings, and of layers behind them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import LayerGradientXActivation, LayerIntegratedGradients
from torch import Tensor, nn

from captum_abslrp import AbsLRP, LayerAbsLRP
from tests.conftest import realistic
from tests.test_layer import batch, same
from tests.test_layer_lists import explain_each
from tests.test_no_trace import no_trace

TOKENS = torch.tensor([[1, 5, 2, 0], [8, 3, 3, 7], [4, 4, 6, 0], [2, 9, 1, 1]])
"""Four samples of four tokens: which dimension holds samples cannot be told from the shape."""


class Attention(nn.Module):
    """A block that is given masks and positions, and returns them."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)

    def forward(
        self, hidden: Tensor, mask: Tensor, wave: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        hidden = hidden * wave[0] + hidden.roll(1, -1) * wave[1]
        rows = mask.repeat_interleave(2, 0).expand(-1, hidden.shape[1], -1)
        mixed, _ = self.mix(hidden, hidden, hidden, attn_mask=rows)
        return self.norm(hidden + mixed), mask


class Reader(nn.Module):
    """Tokens to classes: embeddings of words and positions, two blocks, a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.positions = nn.Embedding(10, 8, padding_idx=0), nn.Embedding(4, 8)
        self.blocks = nn.ModuleList([Attention(), Attention()])
        self.act, self.head = nn.GELU(), nn.Linear(8, 5)
        realistic(self.double())

    def forward(self, tokens: Tensor, weight: Tensor | None = None) -> Tensor:
        mask = (tokens == 0).to(torch.float64)[:, None] * -1e9
        steps = torch.arange(tokens.shape[1]).expand_as(tokens)
        wave = (steps[..., None] / 3).to(torch.float64)
        hidden = self.words(tokens) + self.positions(steps)
        return self.tail(hidden, mask, (wave.cos(), wave.sin()), weight)

    def tail(self, hidden: Tensor, mask: Tensor, wave: Any, weight: Tensor | None) -> Tensor:
        for block in self.blocks:
            hidden, mask = block(hidden, mask, wave)
        return self.head(self.act(hidden if weight is None else hidden * weight).mean(1))


class Behind(nn.Module):
    """A part of a network as a model of its own: given what the part before it returns."""

    def __init__(self, model: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *given: Tensor) -> Tensor:
        return self.function(self.model, *given)


def small(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    layers = layers or (
        nn.Embedding(10, 3),
        nn.Flatten(),
        nn.Linear(12, 6),
        nn.ReLU(),
        nn.Linear(6, 5),
    )
    return nn.Sequential(*layers).eval().double()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("normalization", ["separate", "joint"])
@pytest.mark.parametrize("contrast", ["others", None, 0])
def test_the_embedding_has_the_map_of_a_model_of_embeddings(
    contrast: Any, normalization: str, dtype: torch.dtype
) -> None:
    model, tokens = small(), TOKENS.to(dtype)
    with torch.no_grad():
        embedded = model[0](tokens)
    expected = AbsLRP(model[1:], normalization=normalization)
    attributor = LayerAbsLRP(model, model[0], normalization=normalization)
    before = tokens.clone()
    with no_trace(model):
        relevance = attributor.attribute(tokens, 1, contrast=contrast)
    assert relevance.shape == (4, 4, 3)
    assert relevance.dtype == torch.float64
    assert not relevance.requires_grad
    assert torch.equal(tokens, before)
    assert vars(tokens) == {}
    same(relevance, expected.attribute(embedded, 1, contrast=contrast))
    same(attributor.attribute(tokens, 1, contrast=contrast), relevance)
    same(attributor.attribute((tokens,), 1, contrast=contrast), relevance)


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
@pytest.mark.parametrize("of_input", [False, True])
def test_a_layer_behind_the_embedding(layer: int, of_input: bool) -> None:
    model = small()
    with torch.no_grad():
        embedded = model[0](TOKENS)
    options = {"target": 1, "attribute_to_layer_input": of_input}
    relevance = LayerAbsLRP(model, model[layer]).attribute(TOKENS, **options)
    tail = model[1:]
    same(relevance, LayerAbsLRP(tail, tail[layer - 1]).attribute(embedded, **options))


@pytest.mark.parametrize("part", [0, 1, 2])
def test_shapes_are_those_of_captum(part: int) -> None:
    model = small()
    ours = LayerAbsLRP(model, model[part]).attribute(TOKENS, 1)
    integrated = LayerIntegratedGradients(model, model[part])
    theirs = integrated.attribute(TOKENS, torch.zeros_like(TOKENS), target=1, n_steps=2)
    assert ours.shape == theirs.shape
    assert ours.shape == LayerGradientXActivation(model, model[part]).attribute(TOKENS, 1).shape


@pytest.mark.parametrize("normalization", ["separate", "joint"])
@pytest.mark.parametrize("contrast", ["others", None])
def test_masks_and_positions_are_constants(contrast: Any, normalization: str) -> None:
    model = Reader()
    options: dict[str, Any] = {"target": [1, 2, 0, 4], "contrast": contrast}
    given: list[Any] = []
    handle = model.blocks[0].register_forward_hook(lambda _, args, __: given.extend(args))
    with torch.no_grad():
        model(TOKENS)
    handle.remove()
    hidden, mask, wave = given
    weight = torch.ones(4, 1, 1, dtype=torch.float64)
    # Masks and waves are constants here, because they are the module's own.
    behind = Behind(model, lambda m, h: m.tail(h, mask, wave, weight))
    expected = AbsLRP(behind, normalization=normalization).attribute(hidden, **options)
    attributor = LayerAbsLRP(model, model.blocks[0], normalization=normalization)
    with no_trace(model):
        relevance = attributor.attribute(TOKENS, attribute_to_layer_input=True, **options)
    assert isinstance(relevance, Tensor), "masks or waves were explained, too"
    same(relevance, expected)
    output = attributor.attribute(TOKENS, **options)
    assert isinstance(output, Tensor), "the mask was explained, too"
    words = LayerAbsLRP(model, model.words, normalization=normalization)
    assert words.attribute(TOKENS, **options).shape == (4, 4, 8)


@pytest.mark.parametrize("of_input", [False, True])
@pytest.mark.parametrize("normalization", ["separate", "joint"])
@pytest.mark.parametrize("contrast", ["others", None])
def test_a_list_of_layers(contrast: Any, normalization: str, of_input: bool) -> None:
    model = Reader()
    parts: list[Any] = [model.blocks[1].norm, *model.blocks, model.head, model.act, model.blocks[0]]
    if not of_input:
        parts += [model.words, model]
    options = {"target": 1, "contrast": contrast, "attribute_to_layer_input": of_input}
    attributor = LayerAbsLRP(model, parts, normalization=normalization)
    with no_trace(model):
        together = attributor.attribute(TOKENS, **options)
    same(together, explain_each(model, parts, TOKENS, normalization=normalization, **options))


def test_words_and_positions_are_explained_together() -> None:
    model = Reader()
    options = {"target": 1, "contrast": None}
    words, positions = LayerAbsLRP(model, [model.words, model.positions]).attribute(
        TOKENS, **options
    )
    same(positions, LayerAbsLRP(model, model.positions).attribute(TOKENS, **options))
    same(words, LayerAbsLRP(model, model.words).attribute(TOKENS, **options))
    joint = LayerAbsLRP(model, [model.positions, model.words], normalization="joint")
    _, deltas = joint.attribute(TOKENS, return_convergence_delta=True, **options)
    alone = LayerAbsLRP(model, model.blocks[0], normalization="joint")
    relevance = alone.attribute(TOKENS, attribute_to_layer_input=True, **options)
    same(deltas[0] + deltas[1] + 2, relevance.sum((1, 2)))


@pytest.mark.parametrize("size", [1, 3, "auto"])
@pytest.mark.parametrize("part", ["words", "blocks.0", "act"])
def test_samples_in_parts(part: str, size: Any) -> None:
    model, weight = Reader(), batch(4, 1, 1).abs()
    attributor = LayerAbsLRP(model, model.get_submodule(part))
    options: dict[str, Any] = {"target": [1, 2, 0, 4], "additional_forward_args": weight}
    together = attributor.attribute(TOKENS, **options)
    same(attributor.attribute(TOKENS, internal_batch_size=size, **options), together)
    single = [
        attributor.attribute(TOKENS[i, None], t, weight[i, None])
        for i, t in enumerate(options["target"])
    ]
    same(together, torch.cat(single))


SEQUENCE_FIRST: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "tokens": lambda m, t: m[0](t.t()).transpose(0, 1),
    "tokens, cast": lambda m, t: m[0](t.t().int().long()).transpose(0, 1),
    "embeddings": lambda m, t: m[0](t).transpose(0, 1).transpose(0, 1),
    "embeddings, permuted": lambda m, t: m[0](t).permute(1, 2, 0).permute(2, 0, 1),
    "rows": lambda m, t: m[0](t.reshape(-1)).reshape(4, len(t), 3).mT.reshape(-1, 4, 3)
    if len(t) == 1 else m[0](t.t().reshape(-1)).reshape(4, len(t), 3).transpose(0, 1),
    "table": lambda m, t: m[0].weight[t.t()].transpose(0, 1),
    "one-hot": lambda m, t: (F.one_hot(t.t(), 10).double() @ m[0].weight).transpose(0, 1),
    "stacked": lambda m, t: torch.stack([m[0](t[:, i]) for i in range(4)]).transpose(0, 1),
}  # fmt: skip


@pytest.mark.parametrize("case", SEQUENCE_FIRST)
def test_samples_that_are_not_in_the_leading_dimension(case: str) -> None:
    model = small()
    reader = Behind(model, lambda m, t: m[1:](SEQUENCE_FIRST[case](m, t)))
    attributor = LayerAbsLRP(reader, model[1])
    options: dict[str, Any] = {"attribute_to_layer_input": True}
    together = attributor.attribute(TOKENS, [1, 2, 0, 4], **options)
    single = [
        attributor.attribute(TOKENS[i, None], t, **options) for i, t in enumerate([1, 2, 0, 4])
    ]
    same(together, torch.cat(single))


def test_an_embedding_of_sequences_first() -> None:
    model = small()
    reader = Behind(model, lambda m, t: m[1:](m[0](t.t()).transpose(0, 1)))
    attributor = LayerAbsLRP(reader, model[0])
    with pytest.raises(ValueError, match=r"leading dimension .*`model\.0` \(Embedding\)"):
        attributor.attribute(TOKENS, 1)
    single = torch.cat([attributor.attribute(t[None], 1) for t in TOKENS], 1).transpose(0, 1)
    same(single, LayerAbsLRP(model, model[0]).attribute(TOKENS, 1))


LOOKUPS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "function": lambda m, t: F.embedding(t, m[0].weight),
    "table": lambda m, t: m[0].weight[t],
    "selected": lambda m, t: m[0].weight.index_select(0, t.flatten()).reshape(*t.shape, 3),
    "one-hot": lambda m, t: F.one_hot(t, 10).double() @ m[0].weight,
    "detached": lambda m, t: F.embedding(t, m[0].weight.detach()),
    "shifted": lambda m, t: m[0]((t + 1).clamp(max=10) - 1) * 1.0,
    "put together": lambda m, t: torch.cat([m[0](t[:, :1]), m[0](t[:, 1:])], 1),
    "filled in": lambda m, t: filled(m, t),
}


def filled(model: Any, tokens: Tensor) -> Tensor:
    buffer = torch.zeros(*tokens.shape, 3, dtype=torch.float64)
    buffer[:, :2] = model[0](tokens[:, :2])
    buffer[:, 2:] = model[0](tokens[:, 2:])
    return buffer


class Masked(nn.Module):
    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return hidden.tanh() * mask, mask


@pytest.mark.parametrize("of_input", [False, True])
@pytest.mark.parametrize("case", LOOKUPS)
def test_lookups_without_an_embedding_layer(case: str, of_input: bool) -> None:
    model, masked = small(), Masked()
    embed = LOOKUPS[case]

    def wiring(parts: Any, tokens: Tensor) -> Tensor:
        mask = (tokens != 0).double()[..., None]
        hidden, _ = parts[1](embed(parts[0], tokens), mask)
        return parts[0][1:](hidden)

    reader = Behind(nn.ModuleList([model, masked]), wiring)
    relevance = LayerAbsLRP(reader, masked).attribute(TOKENS, 1, attribute_to_layer_input=of_input)
    mask = (TOKENS != 0).double()[..., None]
    with torch.no_grad():
        hidden = model[0](TOKENS)
    tail = Behind(model, lambda m, h: m[1:](h if not of_input else h.tanh() * mask))
    expected = AbsLRP(tail).attribute(hidden if of_input else hidden.tanh() * mask, 1)
    same(relevance, expected)


def test_tokens_beside_features() -> None:
    model = small()
    features = nn.Linear(2, 12).double()

    def wiring(parts: Any, x: Tensor, tokens: Tensor) -> Tensor:
        return parts[0][2:](parts[0][:2](tokens) + parts[1](x))

    parts = nn.ModuleList([model, features])
    reader, x = Behind(parts, wiring), batch(4, 2)
    options = {"target": 1, "contrast": None}
    layers = [features, model[0]]
    of_features, of_words = LayerAbsLRP(reader, layers).attribute((x, TOKENS), **options)
    assert of_features.shape == (4, 12)
    alone = [LayerAbsLRP(reader, layer).attribute((x, TOKENS), **options) for layer in layers]
    same([of_features, of_words], alone)
    with torch.no_grad():
        words = model[0](TOKENS)
    behind = Behind(parts, lambda p, x, w: p[0][2:](p[0][1](w) + p[1](x)))
    same(of_words, AbsLRP(behind).attribute((x, words), **options)[1])


def test_bags_of_tokens() -> None:
    model = small(nn.EmbeddingBag(10, 6, mode="sum"), nn.ReLU(), nn.Linear(6, 5))
    with torch.no_grad():
        bags = model[0](TOKENS)
    relevance = LayerAbsLRP(model, model[0]).attribute(TOKENS, 1)
    same(relevance, AbsLRP(model[1:]).attribute(bags, 1))


def test_the_remedies_for_integers_work() -> None:
    reader, plain = Reader(), small()
    for model, remedy in (
        (
            reader,
            r'`LayerAbsLRP(model, model.get_submodule("words")).attribute(token_ids, target)`',
        ),
        (plain, r'`LayerAbsLRP(model, model.get_submodule("0")).attribute(token_ids, target)`'),
    ):
        with pytest.raises(TypeError) as raised:
            AbsLRP(model).attribute(TOKENS, 1)
        assert remedy in str(raised.value)
        names = {"LayerAbsLRP": LayerAbsLRP, "model": model, "token_ids": TOKENS, "target": 1}
        assert eval(remedy.strip("`"), names).dim() == 3
    with pytest.raises(ValueError, match="attribute_to_layer_input=False") as of_input:
        LayerAbsLRP(plain, plain[0]).attribute(TOKENS, 1, attribute_to_layer_input=True)
    assert "`0` (Embedding)" in str(of_input.value)
    assert LayerAbsLRP(plain, plain[0]).attribute(
        TOKENS, 1, attribute_to_layer_input=False
    ).shape == (4, 4, 3)


def unused() -> tuple[nn.Module, nn.Module]:
    model = small()
    spare = nn.Embedding(10, 3).double()
    wiring = Behind(nn.ModuleList([model, spare]), lambda p, t: (p[1](t), p[0](t))[1])
    return wiring, spare


def not_called() -> tuple[nn.Module, nn.Module]:
    model, spare = small(), nn.Embedding(10, 3).double()
    return Behind(nn.ModuleList([model, spare]), lambda p, t: p[0](t)), spare


def without_gradients() -> tuple[nn.Module, nn.Module]:
    def wiring(model: Any, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = model[:3](tokens)
        return model[3:](hidden)

    return Behind(model := small(), wiring), model[0]


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a layer that is not used": (
        unused, ValueError, r"depend on the tensors of `model\.1` \(Embedding\), but .* not use them",
    ),
    "a layer that is not called": (
        not_called, ValueError, r"`model\.1` \(Embedding\) to be called by the model",
    ),
    "a layer without gradients": (
        without_gradients, ValueError, r"output of `model\.0` \(Embedding\).* under `torch\.no_grad\(\)`",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        LayerAbsLRP(*make()).attribute(TOKENS, 1)


def test_complex_inputs_are_refused() -> None:
    model = small()
    for attributor in (AbsLRP(model), LayerAbsLRP(model, model[0])):
        with pytest.raises(TypeError, match=r"floating-point dtype, but got torch\.complex64"):
            attributor.attribute(torch.ones(2, 4, dtype=torch.complex64), 1)


def test_images_of_bytes_start_at_the_layer() -> None:
    model = small(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5))
    reader = Behind(model, lambda m, x: m(x.double() / 255))
    images = torch.randint(0, 255, (3, 4), dtype=torch.uint8)
    relevance = LayerAbsLRP(reader, model[0]).attribute(images, 1)
    same(relevance, LayerAbsLRP(model, model[0]).attribute(images.double() / 255, 1))
