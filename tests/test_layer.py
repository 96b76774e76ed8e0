"""Relevance inside a model: `LayerAbsLRP`."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from captum.attr import LayerAttribution, NoiseTunnel
from captum.attr._utils.lrp_rules import EpsilonRule
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from captum_abslrp import AbsLRP, LayerAbsLRP, register_call_rule
from captum_abslrp.rules import TwinRule
from tests.conftest import GOLDEN_NAMES, Golden, load_golden
from tests.test_no_trace import no_trace

MIDDLE = {
    "vgg": "features.3",
    "vgg_bn": "features.4",
    "resnet_basic": "layer2",
    "resnet_bottleneck": "layer1.0.conv3",
    "vit": "blocks.1",
}
FIRST = {"vgg": "features.0", "vgg_bn": "features.0", "vit": "patch_embed"}
TARGET = [3, 1, 2]


class Wired(nn.Module):
    """Layers from 6 features over 8 to 5 classes, called as ``wiring(self, *inputs)`` says."""

    def __init__(self, wiring: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wiring = wiring
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 5)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.eval().double()

    def forward(self, *inputs: Tensor) -> Any:
        return self.wiring(self, *inputs)


def chain(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    layers = layers or (nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    return nn.Sequential(*layers).eval().double()


def batch(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def explain(
    model: nn.Module,
    layer: nn.Module | str,
    x: Tensor,
    *,
    target: Any = 1,
    of_input: bool = False,
    normalization: str = "separate",
    output: Callable[[Any], Tensor] | None = None,
    **kwargs: Any,
) -> Any:
    layer = model.get_submodule(layer) if isinstance(layer, str) else layer
    attributor = LayerAbsLRP(model, layer, normalization=normalization, output=output)
    return attributor.attribute(x, target, attribute_to_layer_input=of_input, **kwargs)


def same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def sums(relevance: Tensor) -> Tensor:
    return relevance.flatten(1).sum(1)


def ones(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.float64)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_at_the_input_of_the_model_and_of_its_first_layer_it_is_the_map_of_the_input(
    name: str,
) -> None:
    golden = load_golden(name)
    for contrast in ("others", None, 0):
        expected = AbsLRP(golden.model).attribute(golden.x, TARGET, contrast=contrast)
        for layer in ("", FIRST.get(name, "conv1")):
            options = {"of_input": True, "target": TARGET, "contrast": contrast}
            same(explain(golden.model, layer, golden.x, **options), expected)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_at_the_output_of_the_model_it_is_what_relevance_starts_from(name: str) -> None:
    golden = load_golden(name)
    seed = F.one_hot(torch.tensor(TARGET), golden.logits.shape[1]).double()
    same(explain(golden.model, "", golden.x, target=TARGET, contrast=None), seed)
    others = (1 - seed) / (seed.shape[1] - 1)
    same(explain(golden.model, "", golden.x, target=TARGET), seed - others)


def without(golden: Golden, *parts: str) -> nn.Module:
    """The golden model from some place on: the parts before it pass on what they are given."""
    tail = copy.deepcopy(golden.model)
    for part in parts:
        parent, _, name = part.rpartition(".")
        setattr(tail.get_submodule(parent), name, nn.Identity())
    return tail


STEM = ("conv1", "bn1", "act1", "maxpool")


@pytest.mark.parametrize(("normalization", "contrast"), [("separate", "others"), ("joint", None)])
@pytest.mark.parametrize(
    ("name", "layer", "before"),
    [
        ("vgg", "features.3", [f"features.{i}" for i in range(4)]),
        ("resnet_basic", "conv1", STEM[:1]),
        ("resnet_basic", "layer2", (*STEM, "layer1", "layer2")),
        ("resnet_bottleneck", "layer3", (*STEM, "layer1", "layer2", "layer3")),
        ("vit", "blocks.0", ("patch_embed", "blocks.0")),
        ("vit", "blocks.1", ("patch_embed", "blocks.0", "blocks.1")),
        ("vit", "norm", ("patch_embed", "blocks.0", "blocks.1", "blocks.2", "norm")),
    ],
)
def test_it_is_the_map_of_the_input_of_what_follows(
    name: str, layer: str, before: tuple[str, ...], contrast: str | None, normalization: str
) -> None:
    golden = load_golden(name)
    features: list[Tensor] = []
    handle = golden.model.get_submodule(layer).register_forward_hook(
        lambda _, __, output: features.append(output.detach().clone())
    )
    with torch.no_grad():
        golden.model(golden.x)
    handle.remove()
    tail = without(golden, *before)
    if name == "vit":
        tail._pos_embed = lambda tokens: tokens
    options = {"contrast": contrast}
    expected = AbsLRP(tail, normalization=normalization).attribute(features[0], 1, **options)
    relevance = explain(golden.model, layer, golden.x, normalization=normalization, **options)
    assert relevance.shape == features[0].shape
    assert not relevance.requires_grad
    same(relevance, expected)


@pytest.mark.parametrize(("of_input", "contrast"), [(False, "others"), (True, 0)])
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_a_batch_equals_its_samples_one_by_one(
    name: str, contrast: str | int, of_input: bool
) -> None:
    golden = load_golden(name)
    options = {"of_input": of_input, "contrast": contrast}
    together = explain(golden.model, MIDDLE[name], golden.x, target=TARGET, **options)
    single = [
        explain(golden.model, MIDDLE[name], x[None], target=t, **options)
        for x, t in zip(golden.x, TARGET)
    ]
    same(together, torch.cat(single))
    options["internal_batch_size"] = 2
    same(explain(golden.model, MIDDLE[name], golden.x, target=TARGET, **options), together)


def test_a_contrast_is_the_difference_of_two_maps_and_gated_keeps_the_larger() -> None:
    golden = load_golden("vit")
    why, why_not = (
        explain(golden.model, "blocks.1", golden.x, target=k, contrast=None) for k in (1, 0)
    )
    same(explain(golden.model, "blocks.1", golden.x, contrast=0), why - why_not)
    gated = explain(golden.model, "blocks.1", golden.x, contrast=0, combine="gated")
    same(gated, why.where(why > why_not, 0))


BLOCKS = {
    "resnet_basic": ["layer1.0", "layer1.1", "layer2.0", "layer3.0", "layer4.0"],
    "resnet_bottleneck": ["layer1.0", "layer1.1", "layer2.0", "layer3.0", "layer4.0"],
    "vit": ["blocks.0", "blocks.1", "blocks.2"],
}


@pytest.mark.parametrize("of_input", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_joint_normalization_keeps_the_sum_of_one_between_blocks(name: str, of_input: bool) -> None:
    golden = load_golden(name)
    options = {"of_input": of_input, "contrast": None}
    for block in BLOCKS[name]:
        joint = sums(explain(golden.model, block, golden.x, normalization="joint", **options))
        torch.testing.assert_close(joint, ones(3), rtol=0, atol=1e-9, msg=block)
        separate = sums(explain(golden.model, block, golden.x, **options))
        before_one_call = block == BLOCKS[name][-1] and not of_input
        expected = ones(3) * (1 if before_one_call else 2)
        torch.testing.assert_close(separate, expected, rtol=0, atol=1e-6, msg=block)


@pytest.mark.parametrize(
    ("name", "branches"),
    [
        ("resnet_basic", ["layer1.0.bn2", "layer1.0.downsample"]),
        ("resnet_bottleneck", ["layer1.0.conv3", "layer1.0.downsample.0"]),
    ],
)
def test_joint_normalization_divides_the_sum_among_the_branches_of_a_block(
    name: str, branches: list[str]
) -> None:
    golden = load_golden(name)
    options = {"normalization": "joint", "contrast": None}
    main, shortcut = (sums(explain(golden.model, b, golden.x, **options)) for b in branches)
    assert bool((main > 0.01).all() and (shortcut > 0.01).all())
    torch.testing.assert_close(main + shortcut, ones(3), rtol=0, atol=1e-9)


def test_class_token_and_position_embedding_keep_their_part_of_the_sum() -> None:
    golden = load_golden("vit")
    options = {"normalization": "joint", "contrast": None}
    relevance = explain(golden.model, "patch_embed", golden.x, **options)
    assert bool((sums(relevance) < 0.9).all())
    same(explain(golden.model, "", golden.x, of_input=True, **options).sum(), relevance.sum())


def test_negative_logits_of_attention_take_from_the_sum() -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2}
    model = VisionTransformer(**sizes, num_classes=3).eval().double()
    torch.manual_seed(0)  # how much is drawn to make the model depends on timm
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    x, total = batch(2, 3, 8, 8), {}
    for sign in (1, -1):
        with torch.no_grad():
            for block in model.blocks:
                block.attn.qkv.bias[:12], block.attn.qkv.bias[12:24] = 5.0, 5.0 * sign
        total[sign] = sums(explain(model, "blocks.0", x, normalization="joint", contrast=None))
    torch.testing.assert_close(total[1], ones(2), rtol=0, atol=1e-9)
    assert bool((total[-1] < 0.999).all())


class Pair(nn.Module):
    """Two tensors and more from two tensors and more."""

    def forward(self, a: Tensor, b: Tensor, scale: float = 2.0, *, mask: Any = None) -> Any:
        return {"sum": a * scale + b, "rest": (b.relu(), None, torch.ones(3), scale)}


PAIR_CALLS = {
    "positional": lambda m, x: m.pair(m.first(x), m.second(x)),
    "keyword": lambda m, x: m.pair(m.first(x), mask=[None], b=m.second(x)),
    "only keywords": lambda m, x: m.pair(a=m.first(x), b=m.second(x), scale=2.0),
}


@pytest.mark.parametrize("call", PAIR_CALLS)
def test_several_inputs_and_outputs_of_a_layer_come_as_a_tuple(call: str) -> None:
    def use(model: Any, out: dict[str, Any]) -> Tensor:
        return model.head(out["sum"] * out["rest"][0])

    model = Wired(lambda m, x: use(m, PAIR_CALLS[call](m, x)), pair=Pair(), second=nn.Linear(6, 8))
    x = batch(3, 6)
    with torch.no_grad():
        a, b = model.first(x), model.second(x)
    inputs = explain(model, "pair", x, of_input=True)
    assert isinstance(inputs, tuple)
    after = Wired(lambda m, a, b: use(m, m.pair(a, b)), pair=Pair(), head=model.head)
    same(inputs, AbsLRP(after).attribute((a, b), 1))
    outputs = explain(model, "pair", x)
    after = Wired(lambda m, total, rest: m.head(total * rest), head=model.head)
    same(outputs, AbsLRP(after).attribute((a * 2 + b, b.relu()), 1))
    same(explain(model, "pair", x, internal_batch_size=2), outputs)


def test_a_tensor_that_is_given_twice_is_one_tensor() -> None:
    def attention(model: Any, x: Tensor) -> Tensor:
        tokens = model.first(x)
        return model.head(model.attention(tokens, tokens, value=tokens)[0].mean(1))

    model = Wired(attention, attention=nn.MultiheadAttention(8, 2, batch_first=True))
    x = batch(3, 4, 6)
    same(explain(model, "attention", x, of_input=True), explain(model, "first", x))


@dataclasses.dataclass(frozen=True)
class Record:
    main: Tensor
    rest: list[Any]


class Table(dict):
    pass


CONTAINERS = {
    list: lambda out: out,
    dict: lambda out: out.values(),
    Table: lambda out: out.values(),
    Record: lambda out: (out.main, out.rest),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_outputs_in_containers(container: Any) -> None:
    made: list[tuple[Any, Tensor]] = []

    class Contained(nn.Module):
        def forward(self, x: Tensor) -> Any:
            main, rest = x.tanh(), [x.relu(), 1]
            if container is list:
                out = [main, rest]
            else:
                out = container(main=main, rest=rest)
            made.append((out, main))
            return out

    def wiring(model: Any, x: Tensor) -> Tensor:
        out = model.layer(model.first(x))
        assert type(out) is container
        main, (rest, _) = CONTAINERS[container](out)
        return model.head(main + rest)

    main, rest = explain(Wired(wiring, layer=Contained()), "layer", batch(3, 6))
    assert main.shape == rest.shape == (3, 8)
    assert bool((main != 0).any() and (rest != 0).any())
    ((out, own),) = made
    assert next(iter(CONTAINERS[container](out))) is own, "the container of the layer was changed"


def test_a_list_that_the_layer_fills_stays_the_one_of_the_model() -> None:
    class Filling(nn.Module):
        def forward(self, x: Tensor, kept: list[Tensor]) -> Tensor:
            kept.append(x.tanh())
            return x.relu()

    def wiring(model: Any, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        return model.head(model.layer(model.first(x), kept) + kept[0])

    model, x = Wired(wiring, layer=Filling()), batch(3, 6)
    same(explain(model, "layer", x, of_input=True), explain(model, "first", x))


@pytest.mark.parametrize("of_input", [False, True])
@pytest.mark.parametrize("layer", range(5))
def test_layers_that_work_in_place_do_not_differ(layer: int, of_input: bool) -> None:
    def model(inplace: bool) -> nn.Module:
        activations = [nn.ReLU(inplace), nn.SiLU(inplace)]
        return chain(
            nn.Linear(6, 8), activations[0], nn.Linear(8, 8), activations[1], nn.Linear(8, 5)
        )

    x = batch(3, 6)
    in_place, other = (explain(model(p), str(layer), x, of_input=of_input) for p in (True, False))
    same(in_place, other)


IN_PLACE = {
    "the input is read again": (
        lambda m, x: (h := m.first(x), m.head(m.act(h) + m.other(h)))[1],
        lambda m, x: (h := m.act(m.first(x)), m.head(h + m.other(h)))[1],
    ),
    "the result is not used": (
        lambda m, x: (h := m.first(x), m.act(h), m.head(h + m.other(h)))[2],
        lambda m, x: (h := m.act(m.first(x)), m.head(h + m.other(h)))[1],
    ),
    "a slice is changed": (
        lambda m, x: (h := m.first(x), m.act(h[:, :4]), m.head(h))[2],
        lambda m, x: (h := m.first(x), m.head(torch.cat([m.act(h[:, :4]), h[:, 4:]], 1)))[1],
    ),
}


@pytest.mark.parametrize("case", IN_PLACE)
@pytest.mark.parametrize("of_input", [False, True])
def test_what_a_layer_does_in_place_is_seen_by_all_who_read_its_input(
    case: str, of_input: bool
) -> None:
    x, other = batch(3, 6), nn.Linear(8, 8)
    in_place, functional = (
        Wired(wiring, act=nn.ReLU(inplace), other=other)
        for wiring, inplace in zip(IN_PLACE[case], (True, False))
    )
    with torch.no_grad():
        same(in_place(x), functional(x))
    relevance = explain(in_place, "act", x, of_input=of_input)
    same(relevance, explain(functional, "act", x, of_input=of_input))
    assert bool((relevance != 0).any())


def test_a_shortcut_past_the_layer_is_not_counted() -> None:
    model = Wired(lambda m, x: (h := m.first(x), m.head(h + m.skip(h)))[1], skip=nn.Identity())
    x = batch(3, 6)
    of_input = explain(model, "skip", x, of_input=True, contrast=None)
    same(of_input, explain(model, "skip", x, contrast=None))
    same(2 * of_input, explain(model, "first", x, contrast=None))


@pytest.mark.parametrize("of_input", [False, True])
@pytest.mark.parametrize("call", range(3))
def test_one_call_of_a_layer_that_is_called_again_is_explained(call: int, of_input: bool) -> None:
    shared = nn.Linear(8, 8)
    layers = [nn.Linear(6, 8), shared, nn.ReLU(), shared, nn.ReLU(), shared, nn.Linear(8, 5)]
    model, x = chain(*layers), batch(3, 6)
    unrolled = nn.Sequential(*[copy.deepcopy(layer) for layer in model])
    relevance = explain(model, "1", x, of_input=of_input, call_index=call)
    same(relevance, explain(unrolled, str(1 + 2 * call), x, of_input=of_input))


def test_calls_inside_of_calls_are_counted_from_their_start_or_end() -> None:
    class Recursive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, depth: int = 1) -> Tensor:
            return self.up(self(self.down(x), depth - 1) if depth else x)

    model, x = Wired(lambda m, x: m.head(m.layer(m.first(x))), layer=Recursive()), batch(3, 6)
    outer, inner = (explain(model, "layer", x, of_input=True, call_index=i) for i in range(2))
    same(outer, explain(model, "first", x))
    same(inner, explain(model, "layer.down", x))
    inner, outer = (explain(model, "layer", x, call_index=i) for i in range(2))
    same(inner, explain(model, "layer.up", x, call_index=0))
    same(outer, explain(model, "layer.up", x, call_index=1))


@pytest.mark.parametrize("size", [None, 2])
def test_parts_of_samples_in_the_leading_dimension_are_put_together(size: int | None) -> None:
    sizes: list[int] = []

    def windows(model: Any, x: Tensor) -> Tensor:
        sizes.append(len(x))
        parts = model.layer(model.first(x).reshape(-1, 2, 8))
        return model.head(parts.reshape(len(x), 4, 8).mean(1))

    model, x = Wired(windows, layer=nn.Linear(8, 8)), batch(3, 4, 6)
    relevance = explain(model, "layer", x, internal_batch_size=size)
    assert sizes == ([3] if size is None else [2, 1])
    same(relevance, torch.cat([explain(model, "layer", sample[None]) for sample in x]))


def test_samples_that_cannot_be_run_together_are_run_one_by_one() -> None:
    def sequence_first(model: Any, x: Tensor) -> Tensor:
        return model.head(model.layer(model.first(x).transpose(0, 1)).transpose(0, 1).mean(1))

    model, x = Wired(sequence_first, layer=nn.Linear(8, 8)), batch(3, 4, 6)
    for layer in ("first", "head"):
        single = [explain(model, layer, sample[None]) for sample in x]
        same(explain(model, layer, x), torch.cat(single))
    with pytest.raises(ValueError, match=r"leading dimension .*`layer` \(Linear\).* \(4, 1, 8\)"):
        explain(model, "layer", x)
    assert explain(model, "layer", x[:1]).shape == (4, 1, 8)


SEED_OF_1 = torch.tensor([[-0.25, 1, -0.25, -0.25, -0.25]], dtype=torch.float64).expand(3, 5)


@pytest.mark.parametrize("layer", ["0", "2", ""])
def test_a_layer_with_a_rule_of_captum(layer: str) -> None:
    model, x = chain(), batch(3, 6)
    without_rule = explain(model, layer, x, of_input=True)
    model.get_submodule(layer).rule = EpsilonRule()
    of_input = explain(model, layer, x, of_input=True)
    same(of_input, explain(model, "1", x) if layer == "2" else AbsLRP(model).attribute(x, 1))
    assert not torch.allclose(of_input, without_rule)
    output = explain(model, layer, x)
    same(output, explain(model, "1", x, of_input=True) if layer == "0" else SEED_OF_1)


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * 2


class Opaque(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Doubling.apply(x)


def test_a_layer_of_a_class_that_has_a_rule() -> None:
    register_call_rule(Opaque, TwinRule(), overwrite=True)
    model, x = chain(nn.Linear(6, 8), Opaque(), nn.Linear(8, 5)), batch(3, 6)
    same(explain(model, "1", x, of_input=True), explain(model, "0", x))
    same(explain(model, "1", x), explain(model, "2", x, of_input=True))


BAD_CALLS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no module": (
        lambda: LayerAbsLRP(chain(), "0"),  # type: ignore[arg-type]
        TypeError, r"Expected `layer` to be a torch\.nn\.Module, but got str",
    ),
    "a layer of another model": (
        lambda: LayerAbsLRP(chain(), chain()[0]),
        ValueError, "Expected `layer` to be a module of `model`, but got a Linear that is not part of it",
    ),
    "a layer that is not called": (
        lambda: explain(Wired(lambda m, x: m.head(m.first(x)), spare=nn.Tanh()), "spare", batch(2, 6)),
        ValueError, r"Expected `spare` \(Tanh\) to be called by the model, but got no call",
    ),
    "a layer that was replaced": (
        lambda: replaced().attribute(batch(2, 6), 1), ValueError, r"\(ReLU\) to be called by the model",
    ),
    "several calls": (
        lambda: explain(twice(), "act", batch(2, 6)),
        ValueError, r"`act` \(ReLU\) to be called once, but got 2 calls.*`call_index=0` to `call_index=1`",
    ),
    "a call that there is not": (
        lambda: explain(twice(), "act", batch(2, 6), call_index=2),
        ValueError, r"`call_index` to be an int from 0 to 1, because `act` \(ReLU\) is called 2 times.*got 2",
    ),
    "a call from the end": (
        lambda: explain(twice(), "act", batch(2, 6), call_index=-1), ValueError, "`call_index` .* got -1",
    ),
    "a layer of constants": (
        lambda: explain(on_constants(), "table", batch(2, 6)),
        ValueError, r"Expected the output of `table` \(Linear\) to depend on `inputs`",
    ),
    "input of a layer of constants": (
        lambda: explain(on_constants(), "table", batch(2, 6), of_input=True),
        ValueError, r"Expected the input of `table` \(Linear\) to depend on `inputs`",
    ),
    "a layer without gradients": (
        lambda: explain(without_gradients(), "gate", batch(2, 6), of_input=True),
        ValueError, r"Expected the input of `gate` \(Linear\).*computed under `torch\.no_grad\(\)`",
    ),
    "a layer inside of one with a rule of Captum": (
        lambda: explain(with_rule_around(), "0.0", batch(2, 6)),
        ValueError, r"output of `0\.0` \(Linear\).* inside a module with a rule of its own",
    ),
    "a bad contrast": (
        lambda: explain(chain(), "0", batch(2, 6), contrast="rest"), ValueError, "Expected `contrast`",
    ),
}  # fmt: skip


def replaced() -> LayerAbsLRP:
    model = chain()
    explained = LayerAbsLRP(model, model[1])
    model[1] = nn.Tanh()
    return explained


def twice() -> nn.Module:
    return Wired(lambda m, x: m.head(m.act(m.act(m.first(x)))), act=nn.ReLU())


def on_constants() -> nn.Module:
    table = torch.ones(8, dtype=torch.float64)
    return Wired(lambda m, x: m.head(m.first(x) + m.table(table)), table=nn.Linear(8, 8))


def without_gradients() -> nn.Module:
    def wiring(model: Any, x: Tensor) -> Tensor:
        features = model.first(x)
        with torch.no_grad():
            gate = model.gate(features)
        return model.head(features * gate)

    return Wired(wiring, gate=nn.Linear(8, 8))


def with_rule_around() -> nn.Module:
    model = chain(nn.Sequential(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 5))
    model[0].rule = EpsilonRule()
    return model


@pytest.mark.parametrize("name", BAD_CALLS)
@pytest.mark.filterwarnings("ignore:The output of the model depends on a tensor that is detached")
def test_bad_input_is_named(name: str) -> None:
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        call()


def test_what_does_not_reach_the_output_gets_nothing() -> None:
    model = Wired(lambda m, x: (h := m.first(x), m.spare(h), m.head(h))[2], spare=nn.Linear(8, 8))
    for of_input in (False, True):
        relevance = explain(model, "spare", batch(3, 6), of_input=of_input)
        assert torch.equal(relevance, torch.zeros(3, 8).double())


class Crash(RuntimeError):
    pass


def crash(*args: object) -> None:
    raise Crash


@pytest.mark.parametrize("rule", [None, EpsilonRule()], ids=["no rule", "Captum's rule"])
@pytest.mark.parametrize("of_input", [False, True])
@pytest.mark.parametrize("layer", ["", "0", "1"])
def test_no_trace_is_left(layer: str, of_input: bool, rule: object) -> None:
    model, x = chain(), batch(3, 6)
    if rule is not None:
        model.get_submodule(layer).rule = rule
    with no_trace(model):
        first = explain(model, layer, x, of_input=of_input)
    with no_trace(model), pytest.raises(IndexError, match="target"):
        explain(model, layer, x, of_input=of_input, target=99)
    with no_trace(model), pytest.raises(ValueError, match="call_index"):
        explain(model, layer, x, of_input=of_input, call_index=7)
    assert torch.equal(explain(model, layer, x, of_input=of_input), first)
    assert not x.requires_grad
    for crashing in (model[0], model[1], model[2]):
        crashing.forward = crash
        with no_trace(model), pytest.raises(Crash):
            explain(model, layer, x, of_input=of_input)
        del crashing.forward


def test_hooks_of_the_user_are_kept_and_what_they_change_is_explained() -> None:
    plain, hooked, x = chain(), chain(), batch(3, 6)
    hooked[0].register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    hooked[0].register_forward_hook(lambda _, __, output: output.tanh())
    with no_trace(hooked):
        of_input = explain(hooked, "0", x, of_input=True)
    plain.insert(1, nn.Tanh())
    same(of_input, explain(plain, "0", x + 1, of_input=True))
    same(explain(hooked, "0", x), explain(plain, "1", x + 1))


def test_threads_that_explain_layers_of_one_model_do_not_meet() -> None:
    golden = load_golden("resnet_basic")
    jobs = [("layer1", False), ("layer1", True), ("layer3", False), ("layer1", False)]
    alone = [explain(golden.model, n, golden.x, of_input=i, target=2) for n, i in jobs]
    together: dict[int, list[Tensor]] = {}
    start = threading.Barrier(len(jobs))

    def run(job: int) -> None:
        layer, of_input = jobs[job]
        start.wait()
        together[job] = [
            explain(golden.model, layer, golden.x, of_input=of_input, target=2) for _ in range(4)
        ]

    threads = [threading.Thread(target=run, args=(job,)) for job in range(len(jobs))]
    with no_trace(golden.model):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for job, expected in enumerate(alone):
        assert len(together[job]) == 4
        for relevance in together[job]:
            same(relevance, expected)


@pytest.mark.parametrize("rule", [None, EpsilonRule()], ids=["no rule", "Captum's rule"])
def test_calls_of_another_thread_are_not_captured(rule: object) -> None:
    model, x = chain(), batch(3, 6)
    if rule is not None:
        model[1].rule = rule
    expected = [explain(model, "1", x, of_input=i) for i in (False, True)]

    def call_in_another_thread(*args: object) -> None:
        thread = threading.Thread(target=model[1], args=(batch(2, 8).requires_grad_() * 1,))
        thread.start()
        thread.join()

    model[0].register_forward_hook(call_in_another_thread)
    same([explain(model, "1", x, of_input=i) for i in (False, True)], expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=lambda c: c.__name__)
def test_works_where_the_caller_switched_gradients_off(context: type) -> None:
    golden = load_golden("vit")
    expected = explain(golden.model, "blocks.1", golden.x)
    with context():
        relevance = explain(golden.model, "blocks.1", golden.x.clone())
    same(relevance.clone(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtype_and_device_are_those_of_the_layer(dtype: torch.dtype, device: torch.device) -> None:
    golden = load_golden("resnet_basic", dtype)
    relevance = explain(golden.model.to(device), "layer2", golden.x.to(device))
    assert relevance.dtype == dtype
    assert relevance.device.type == device.type
    assert bool(torch.isfinite(relevance).all())


def test_a_layer_in_a_wrapper_is_the_module_inside() -> None:
    x = batch(3, 6)
    expected = explain(chain(), "0", x)
    model = chain()
    model[0] = torch.compile(model[0])
    same(explain(model, model[0], x), expected)
    model = nn.DataParallel(chain())
    same(explain(model, model.module[0], x), expected)
    same(explain(model, model, x, of_input=True), AbsLRP(chain()).attribute(x, 1))


def test_additional_arguments_reach_the_model_sample_by_sample() -> None:
    model = Wired(lambda m, x, gate: m.head(m.act(m.first(x)) * gate), act=nn.ReLU())
    x, gate = batch(3, 6), batch(3, 8)
    # Of one sample the maps of target and contrast are the same: one feature gets all.
    relevance = explain(model, "act", x, additional_forward_args=gate, contrast=None)
    of_act = Wired(lambda m, x: m.head(x * gate), head=model.head)
    with torch.no_grad():
        features = model.act(model.first(x))
    same(relevance, AbsLRP(of_act).attribute(features, 1, contrast=None))
    options = {"contrast": None, "internal_batch_size": 1}
    same(explain(model, "act", x, additional_forward_args=(gate,), **options), relevance)


def test_output_picks_what_is_explained() -> None:
    model, x = Wired(lambda m, x: {"a": m.first(x), "b": m.head(m.first(x))}), batch(3, 6)
    options = {"output": lambda out: out["b"]}
    same(explain(model, "head", x, **options), SEED_OF_1)
    same(explain(model, model, x, **options)[1], SEED_OF_1)


def test_works_with_the_conventions_of_captum() -> None:
    golden = load_golden("resnet_basic")
    attributor = LayerAbsLRP(golden.model, golden.model.layer2)
    assert isinstance(attributor, LayerAttribution)
    assert attributor.layer is golden.model.layer2
    assert attributor.has_convergence_delta()
    relevance = attributor.attribute(golden.x, 1, attribute_to_layer_input=True)
    assert LayerAttribution.interpolate(relevance, (32, 32)).shape == (3, 8, 32, 32)
    smooth = NoiseTunnel(attributor).attribute(
        golden.x, nt_samples=2, stdevs=0.0, target=1, attribute_to_layer_input=True
    )
    same(smooth, relevance)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_recommended_has_the_rules_that_are_recommended_for_the_pixels(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).eval()
    x = torch.randn(2, 3, 160, 160)
    layer = model.blocks[2] if name == "test_vit" else model.layer3
    attributor = LayerAbsLRP.recommended(model, layer)
    assert repr(attributor).startswith("LayerAbsLRP.recommended(")
    assert "combine='difference'" in repr(attributor)
    relevance = attributor.attribute(x, target=3)
    explicit = LayerAbsLRP(model, layer, "recommended", normalization="joint")
    same(relevance, explicit.attribute(x, target=3, contrast="softmax"))
    published = LayerAbsLRP(model, layer).attribute(x, target=3)
    assert relevance.shape == published.shape
    assert torch.corrcoef(torch.stack([relevance.flatten(), published.flatten()]))[0, 1] < 0.9
    alone = attributor.attribute(x, target=3, contrast=None)
    same(alone, explicit.attribute(x, target=3, contrast=None))
    smooth = NoiseTunnel(attributor).attribute(x, nt_samples=2, stdevs=0.0, target=3)
    torch.testing.assert_close(smooth, relevance, rtol=1e-3, atol=1e-6)


def test_recommended_for_a_layer_of_another_kind_of_model_is_the_published_method() -> None:
    model, x = chain(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)), batch(3, 6)
    attributor = LayerAbsLRP.recommended(model, model[0], output=lambda out: out * 2)
    assert type(attributor) is LayerAbsLRP
    expected = LayerAbsLRP(model, model[0], output=lambda out: out * 2).attribute(x, 1)
    same(attributor.attribute(x, 1), expected)
    with pytest.raises(TypeError, match="`layer`"):
        LayerAbsLRP.recommended(model, "0")  # type: ignore[arg-type]


def test_training_mode_is_warned_about_where_the_caller_is() -> None:
    model = chain(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 5)).train()
    with pytest.warns(UserWarning, match="evaluation mode") as record:
        explain(model, "0", batch(3, 6))
    assert record[0].filename == __file__
