"""LRP: each rule against its literal formula, composites against other libraries, seeds and folding."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import captum.attr
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from captum.attr._utils.lrp_rules import EpsilonRule as CaptumEpsilonRule
from captum.attr._utils.lrp_rules import GammaRule as CaptumGammaRule
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode

from captum_abslrp import LRP, AbsLRP, LayerAbsLRP, inspect_rules, trace_relevance
from captum_abslrp.engine.steps import Step
from captum_abslrp.mappings import Mapping, composite
from captum_abslrp.mappings.composites import ALL_LAYERS, COMPOSITES
from captum_abslrp.rules import (
    AbsLRPRule,
    AlphaBetaRule,
    EpsilonRule,
    FirstLayerRule,
    FlatRule,
    GammaRule,
    Group,
    LayerParts,
    LayerRule,
    Rule,
    Term,
    WSquareRule,
    ZBoxRule,
    ZPlusRule,
)
from tests.conftest import relative_error
from tests.test_closed_forms import draw_tensor
from tests.test_no_trace import no_trace

BOX = {"low": -3.0, "high": 3.0}
NAMES = [name for name in COMPOSITES if name != "epsilon_gamma_box"]


def stabilized(z: np.ndarray, epsilon: float) -> np.ndarray:
    return z + np.where(z < 0, -epsilon, epsilon)


def literal(
    rule: Rule, x: np.ndarray, w: np.ndarray, b: np.ndarray, relevance: np.ndarray
) -> np.ndarray:
    """What a rule gives to each input (I,) of ``z_j = sum_i x_i w_ij + b_j``, by its formula alone."""
    eps = rule.epsilon if isinstance(rule, EpsilonRule) else rule.stabilizer  # type: ignore[attr-defined]
    result = np.zeros_like(x)
    for j in range(w.shape[1]):
        c = x * w[:, j]
        z = c.sum() + b[j]
        plus, minus = np.maximum, np.minimum
        if isinstance(rule, EpsilonRule):
            share = c / stabilized(z, eps)
        elif isinstance(rule, ZPlusRule):
            share = plus(c, 0) / stabilized(plus(c, 0).sum() + plus(b[j], 0), eps)
        elif isinstance(rule, AlphaBetaRule):
            share = rule.alpha * plus(c, 0) / stabilized(plus(c, 0).sum() + plus(b[j], 0), eps)
            share = share - rule.beta * minus(c, 0) / stabilized(
                minus(c, 0).sum() + minus(b[j], 0), eps
            )
        elif isinstance(rule, GammaRule):
            of_sign = plus if z > 0 else minus
            more = c + rule.gamma * of_sign(c, 0)
            whole = more.sum() + b[j] + rule.gamma * of_sign(b[j], 0)
            share = more / stabilized(whole, eps) if z != 0 else np.zeros_like(c)
        elif isinstance(rule, FlatRule):
            taken = np.ones_like(c)
            share = taken / stabilized(taken.sum(), eps)
        elif isinstance(rule, WSquareRule):
            share = w[:, j] ** 2 / stabilized((w[:, j] ** 2).sum() + b[j] ** 2, eps)
        else:
            assert isinstance(rule, ZBoxRule)
            low, high = plus(w[:, j], 0), minus(w[:, j], 0)
            boxed = c - rule.low * low - rule.high * high
            whole = boxed.sum() + b[j] - plus(b[j], 0) - minus(b[j], 0)
            share = boxed / stabilized(whole, eps)
        result += share * relevance[j]
    return result


RULES: dict[str, Rule] = {
    "epsilon": EpsilonRule(),
    "epsilon 0.1": EpsilonRule(0.1),
    "zplus": ZPlusRule(0.01),
    "alpha2 beta1": AlphaBetaRule(),
    "alpha1 beta0": AlphaBetaRule(1.0, 0.0),
    "gamma": GammaRule(0.3),
    "flat": FlatRule(),
    "wsquare": WSquareRule(),
    "zbox": ZBoxRule(-2.0, 3.0),
}


def table(rule: Rule) -> Mapping:
    return Mapping("mine", [(ALL_LAYERS, rule)], base=composite("epsilon"), signed=True)


@pytest.mark.parametrize("name", RULES)
@given(seed=st.integers(0, 10**6), sizes=st.tuples(st.integers(1, 5), st.integers(1, 4)))
def test_a_linear_layer_against_the_formula(name: str, seed: int, sizes: tuple[int, int]) -> None:
    layer = nn.Linear(*sizes).double()
    w, b = draw_tensor(seed, sizes[1], sizes[0]), draw_tensor(seed + 1, sizes[1])
    layer.load_state_dict({"weight": w, "bias": b})
    x = draw_tensor(seed + 2, 3, sizes[0])
    x[0, 0] = 0.0
    for target in range(sizes[1]):
        actual = LRP(layer, table(RULES[name])).attribute(x, target)
        for row, of_row in zip(x, actual, strict=True):
            relevance = np.zeros(sizes[1])
            relevance[target] = layer(row)[target].item()
            expected = literal(RULES[name], row.numpy(), w.T.numpy(), b.numpy(), relevance)
            np.testing.assert_allclose(of_row.numpy(), expected, rtol=1e-7, atol=1e-9)


CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "plain": (nn.Conv2d(2, 3, 3), (5, 4)),
    "patches": (nn.Conv2d(3, 2, 2, stride=2), (4, 6)),
    "strided image": (nn.Conv2d(3, 2, 3, stride=2, padding=1), (5, 5)),
    "grouped": (nn.Conv2d(4, 4, 2, groups=2, dilation=2), (5, 4)),
    "1 x 1 strided": (nn.Conv2d(3, 2, 1, stride=2), (5, 3)),
    "whole": (nn.Conv2d(3, 2, (4, 3)), (4, 3)),
    "1d, same": (nn.Conv1d(2, 3, 4, padding="same"), (5,)),
    "3d": (nn.Conv3d(1, 2, 2), (3, 2, 3)),
    "transposed": (nn.ConvTranspose2d(2, 3, 2, stride=2, output_padding=1), (2, 3)),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_a_convolution_is_a_sparse_linear_layer(name: str, kind: str) -> None:
    layer, size = copy.deepcopy(CONVOLUTIONS[kind])
    layer.double()
    x = draw_tensor(5, 2, layer.in_channels, *size)
    output = layer(x)
    # The matrix of the layer, and which of its entries are weights that happen to be anything but absent.
    matrix = torch.autograd.functional.jacobian(lambda v: layer(v[None])[0].flatten(), x[0])
    w = matrix.flatten(1).T
    bias = layer(torch.zeros_like(x[:1]))[0].flatten()
    ones = copy.deepcopy(layer)
    nn.init.ones_(ones.weight)
    present = torch.autograd.functional.jacobian(lambda v: ones(v[None])[0].flatten(), x[0])
    present = present.flatten(1).T != 0
    rule = RULES[name]
    for position in (0, output[0].numel() // 2, output[0].numel() - 1):
        target = tuple(int(i) for i in np.unravel_index(position, output.shape[1:]))
        actual = LRP(layer, table(rule)).attribute(x, target)
        for row, of_row, z in zip(x, actual, output, strict=True):
            relevance = np.zeros(w.shape[1])
            relevance[position] = z[target].item()
            if isinstance(rule, (FlatRule, ZBoxRule)):  # only what an output sees takes part
                seen = present[:, position]
                few = literal(
                    rule,
                    row.flatten()[seen].numpy(),
                    w[seen][:, [position]].numpy(),
                    bias[[position]].detach().numpy(),
                    relevance[[position]],
                )
                expected = np.zeros(len(w))
                expected[seen.numpy()] = few
            else:
                expected = literal(
                    rule, row.flatten().numpy(), w.numpy(), bias.detach().numpy(), relevance
                )
            np.testing.assert_allclose(of_row.flatten().numpy(), expected, rtol=1e-7, atol=1e-9)


def test_a_pixel_that_is_zero_keeps_what_the_flat_rule_gives() -> None:
    x = torch.zeros(2, 3)
    relevance = LRP(nn.Linear(3, 2), table(FlatRule())).attribute(x, target=1)
    assert bool((relevance != 0).all())


def randomized(model: nn.Module) -> nn.Module:
    """A model whose batch norm and biases are no identities, in float64."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0, 0.3, generator=generator)
        elif isinstance(module, (nn.Linear, nn.LayerNorm, nn.Conv2d)) and module.bias is not None:
            nn.init.normal_(module.bias, 0, 0.2, generator=generator)
    return model.eval().double()


ZENNIT = {
    "epsilon_plus": "EpsilonPlus",
    "epsilon_plus_flat": "EpsilonPlusFlat",
    "epsilon_alpha2_beta1": "EpsilonAlpha2Beta1",
    "epsilon_gamma_box": "EpsilonGammaBox",
}


@pytest.mark.parametrize("name", ZENNIT)
@pytest.mark.parametrize(
    ("architecture", "canonizer"),
    [("vgg11_bn", "VGGCanonizer"), ("vgg11", "VGGCanonizer"), ("resnet18", "ResNetCanonizer")],
)
def test_composites_are_those_of_zennit(name: str, architecture: str, canonizer: str) -> None:
    zennit_torchvision = pytest.importorskip("zennit.torchvision", reason="zennit is not installed")
    import torchvision
    from zennit import composites
    from zennit.attribution import Gradient

    torch.manual_seed(0)
    if architecture == "resnet18":
        model: nn.Module = torchvision.models.resnet18(num_classes=7)
    else:  # its classifier has 100 million weights
        features = torchvision.models.vgg.make_layers(
            torchvision.models.vgg.cfgs["A"], batch_norm=architecture == "vgg11_bn"
        )
        head = [nn.Flatten(), nn.Linear(2048, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 7)]
        model = nn.Sequential(features, nn.AdaptiveAvgPool2d(2), *head)
    model = randomized(model)
    x, target = draw_tensor(1, 2, 3, 64, 64), [3, 5]
    box = {k: torch.full((1, 3, 1, 1), v).double() for k, v in BOX.items()}
    options: dict[str, Any] = box if name == "epsilon_gamma_box" else {}
    peer = getattr(composites, ZENNIT[name])(
        canonizers=[getattr(zennit_torchvision, canonizer)()], **options
    )
    own = copy.deepcopy(model)
    for module in own.modules():
        if isinstance(
            module, nn.BatchNorm2d
        ):  # the canonizer leaves a norm that divides by sqrt(1 + eps)
            module.running_var += module.eps
            module.eps = 0.0
    with torch.no_grad():
        seed = torch.eye(7).double()[target] * own(x)
    with Gradient(own, peer) as attributor:
        _, expected = attributor(x, seed)
    actual = LRP(model, name, epsilon=1e-6, stabilizer=1e-6, **options).attribute(x, target)
    assert (actual - expected).norm() < 1e-9 * expected.norm()


@pytest.mark.parametrize("gamma", [None, 0.25])
def test_captum_on_a_sequential_cnn(gamma: float | None) -> None:
    torch.manual_seed(0)
    # Captum's gamma rule does not count biases, and is meant for positive inputs and outputs.
    first, second, last = (
        nn.Conv2d(*size, bias=gamma is None) for size in [(3, 4, 3), (4, 5, 3), (5, 6, 1)]
    )
    layers = [first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU(), nn.AdaptiveAvgPool2d(1), last]
    model = nn.Sequential(*layers).double()
    x = draw_tensor(0, 2, 3, 14, 14).abs()
    logits, classes = model(x).flatten(1).max(1)
    assert bool((logits > 0).all())
    target = [(int(k), 0, 0) for k in classes]
    peer = copy.deepcopy(model)
    for layer in peer:
        if isinstance(layer, nn.Conv2d) and gamma is not None:
            layer.rule = CaptumGammaRule(gamma)
        elif not isinstance(layer, nn.ReLU):
            layer.rule = CaptumEpsilonRule()
    expected = captum.attr.LRP(peer).attribute(x, target)
    actual = LRP(model, "attnlrp", conv_gamma=gamma).attribute(x, target)
    assert (actual - expected).norm() < 1e-6 * expected.norm()


class Reference(nn.Module):
    """A timm ViT whose ``x * gradient`` is signed relevance: parts of it are constants."""

    def __init__(self, model: nn.Module, *, constant_attention: bool, gamma: float) -> None:
        super().__init__()
        self.model, self.constant_attention, self.gamma = model, constant_attention, gamma

    def norm(self, layer: Any, x: Tensor) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        sigma = (centered.square().mean(-1, keepdim=True) + layer.eps).sqrt().detach()
        return centered / sigma * layer.weight + layer.bias

    def halved(self, x: Tensor) -> Tensor:
        return (x + x.detach()) / 2 if not self.constant_attention else x

    def attention(self, layer: Any, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = layer.qkv(x).view(b, n, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
        p = (self.halved(q) * layer.scale @ self.halved(k).mT).softmax(-1)
        p = p.detach() if self.constant_attention else self.halved(p)
        return layer.proj((p @ self.halved(v)).transpose(1, 2).reshape(b, n, d))

    def mlp(self, layer: Any, x: Tensor) -> Tensor:
        h = layer.fc1(x)
        return layer.fc2(h * (F.gelu(h) / h).detach())

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        z = (x + y).detach()
        of_x, of_y = (1 + self.gamma * (t * z > 0) for t in (x, y))
        whole = of_x * x.detach() + of_y * y.detach()
        parts = [t * (w * z / whole) for t, w in ((x, of_x), (y, of_y))]
        moved = parts[0] + parts[1]
        return moved - moved.detach() + z

    def forward(self, x: Tensor) -> Tensor:
        m: Any = self.model
        x = m.norm_pre(m._pos_embed(m.patch_embed(x)))
        for block in m.blocks:
            x = self.add(x, block.ls1(self.attention(block.attn, self.norm(block.norm1, x))))
            x = self.add(x, block.ls2(self.mlp(block.mlp, self.norm(block.norm2, x))))
        return m.head(m.fc_norm(self.norm(m.norm, x)[:, 0]))


VITS: list[tuple[str, dict[str, Any]]] = [
    ("attnlrp", {}),
    ("res_lrp", {}),
    ("cp_lrp", {}),
    ("cp_lrp", {"residual_gamma": 1.0}),
]


@pytest.mark.parametrize(("name", "options"), VITS, ids=str)
def test_a_vit_against_a_modified_gradient(name: str, options: dict[str, Any]) -> None:
    model = randomized(
        timm.create_model("vit_tiny_patch16_224", img_size=48, depth=3, num_classes=5)
    )
    gamma = options.get("residual_gamma", 1.0 if name == "res_lrp" else 0.0)
    reference = Reference(model, constant_attention=name == "cp_lrp", gamma=gamma)
    x, target = draw_tensor(1, 2, 3, 48, 48), torch.tensor([1, 3])
    torch.testing.assert_close(reference(x), model(x))
    leaf = x.clone().requires_grad_()
    own = reference(leaf).gather(1, target[:, None]).sum()
    (own - (reference(leaf).sum() - own) / 4).backward()
    expected = x * leaf.grad
    lrp = LRP(model, name, epsilon=1e-13, **options)
    actual = lrp.attribute(x, target, contrast="others")
    assert (actual - expected).norm() < 1e-6 * expected.norm()


def small_cnn() -> nn.Module:
    torch.manual_seed(0)
    return randomized(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
            nn.AvgPool2d(2), nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Flatten(), nn.Linear(8 * 9, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 5),
        )
    )  # fmt: skip


def fused(model: Any) -> nn.Module:
    layers = list(model)
    for i, layer in enumerate(layers):
        if isinstance(layer, nn.BatchNorm2d):
            layers[i - 1 : i + 1] = [fuse_conv_bn_eval(layers[i - 1], layer), nn.Identity()]
        elif isinstance(layer, nn.BatchNorm1d):
            layers[i - 1 : i + 1] = [fuse_linear_bn_eval(layers[i - 1], layer), nn.Identity()]
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("name", COMPOSITES)
def test_batch_norm_is_part_of_the_layer_before_it(name: str) -> None:
    model, x = small_cnn(), draw_tensor(3, 2, 3, 14, 14)
    options: dict[str, Any] = BOX if name == "epsilon_gamma_box" else {}
    expected = LRP(fused(model), name, **options).attribute(x, [1, 3])
    with no_trace(model):
        actual = LRP(model, name, **options).attribute(x, [1, 3])
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)
    assert expected.abs().sum() > 0


@pytest.mark.parametrize(
    "kind", ["transposed", "transposed, grouped", "apart", "used twice", "training"]
)
def test_where_batch_norm_does_not_follow_a_layer(kind: str) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x)
            return (self.norm(h) + h).flatten(1)

    groups = 2 if "grouped" in kind else 1
    layers: dict[str, list[nn.Module]] = {
        "apart": [nn.Conv2d(4, 4, 3), nn.Tanh(), nn.BatchNorm2d(4), nn.Flatten()],
        "used twice": [Twice()],
        "training": [
            nn.Conv2d(4, 4, 3),
            nn.BatchNorm2d(4, track_running_stats=False),
            nn.Flatten(),
        ],
    }
    transposed = [nn.ConvTranspose2d(4, 4, 3, groups=groups), nn.BatchNorm2d(4), nn.Flatten()]
    model = nn.Sequential(*layers.get(kind, transposed)).eval().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.fill_(0.3)
    x = draw_tensor(0, 2, 4, 5, 5)
    relevance = LRP(model, "epsilon_plus").attribute(x, 3)
    assert bool(relevance.isfinite().all())
    if kind == "transposed":
        conv, norm, _ = model
        expected = LRP(
            nn.Sequential(fuse_conv_bn_eval(conv, norm, True), nn.Flatten()), "epsilon_plus"
        )
        torch.testing.assert_close(relevance, expected.attribute(x, 3), rtol=1e-7, atol=1e-9)
    else:
        assert relevance.abs().sum() > 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("build", [small_cnn, lambda: randomized(timm.create_model("test_vit"))])
def test_seeds_are_linear(name: str, build: Callable[[], nn.Module]) -> None:
    model = build()
    x = draw_tensor(0, 2, 3, *((14, 14) if isinstance(model, nn.Sequential) else (160, 160)))
    lrp = AbsLRP(model, name)
    classes = model(x).shape[1] if isinstance(model, nn.Sequential) else 4
    maps = torch.stack([lrp.attribute(x, k, contrast=None) for k in range(classes)])
    torch.testing.assert_close(lrp.attribute(x, 1, contrast=2), maps[1] - maps[2])
    if isinstance(model, nn.Sequential):
        others = maps[[0, 2, 3, 4]]
        torch.testing.assert_close(lrp.attribute(x, 1), maps[1] - others.mean(0))
        p = model(x).softmax(1).masked_fill(F.one_hot(torch.tensor(1), classes).bool(), 0)
        p = (p / p.sum(1, keepdim=True)).T[[0, 2, 3, 4]].detach()
        expected = maps[1] - (others * p[:, :, None, None, None]).sum(0)
        torch.testing.assert_close(lrp.attribute(x, 1, contrast="softmax"), expected)


def test_relevance_is_conserved_without_biases() -> None:
    layers = [nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(4 * 36, 5, bias=False)).double()
    x = draw_tensor(0, 3, 3, 14, 14)
    options = {"epsilon_gamma_box": BOX}
    for name in COMPOSITES:
        relevance, delta = LRP(model, name, **options.get(name, {})).attribute(
            x, [0, 1, 4], return_convergence_delta=True
        )
        logits = model(x).detach()[range(3), [0, 1, 4]]
        torch.testing.assert_close(relevance.flatten(1).sum(1), logits, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(delta, torch.zeros(3).double(), rtol=0, atol=1e-4)


def test_the_delta_is_what_biases_take() -> None:
    model, x = nn.Linear(3, 2).double(), draw_tensor(0, 4, 3)
    _, delta = LRP(model).attribute(x, 1, return_convergence_delta=True)
    torch.testing.assert_close(delta, -model.bias[1].detach().expand(4), rtol=1e-6, atol=1e-6)
    calls = trace_relevance(model, x, 1, mapping="epsilon")
    assert len(str(calls).splitlines()) == 3


def test_a_sum_of_positions_is_explained_as_a_whole() -> None:
    model, x = nn.Conv2d(3, 4, 3, bias=False).double(), draw_tensor(0, 2, 3, 6, 6)
    whole = LRP(model).attribute(x, 1)
    single = [LRP(model).attribute(x, (1, i, j)) for i in range(4) for j in range(4)]
    torch.testing.assert_close(whole, torch.stack(single).sum(0))
    others = LRP(model).attribute(x, 1, contrast="others")
    expected = whole - torch.stack([LRP(model).attribute(x, k) for k in (0, 2, 3)]).mean(0)
    torch.testing.assert_close(others, expected)


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_independent(name: str) -> None:
    for model, size in ((small_cnn(), 14), (randomized(timm.create_model("test_vit2")), 64)):
        x = draw_tensor(0, 3, 3, size, size)
        with no_trace(model):
            together = LRP(model, name).attribute(x, [1, 2, 3], contrast="others")
        for i in range(3):
            alone = LRP(model, name).attribute(x[i : i + 1], i + 1, contrast="others")
            assert (together[i] - alone[0]).norm() < 1e-9 * alone.norm()


def test_layers_are_explained_by_a_composite() -> None:
    model, x = randomized(timm.create_model("test_vit")), draw_tensor(0, 2, 3, 160, 160)
    blocks = LayerAbsLRP(model, [model.blocks[0], model.blocks[-1]], "attnlrp")
    first, last = blocks.attribute(x, 3, contrast=None)
    assert first.shape == last.shape == (2, 101, 64)
    assert bool(first.any()) and bool(last.any())


def test_noise_is_averaged_as_by_hand() -> None:
    model, x = small_cnn(), draw_tensor(0, 2, 3, 14, 14)
    tunnel = captum.attr.NoiseTunnel(LRP(model, "epsilon_plus"))
    same = tunnel.attribute(x, nt_samples=3, stdevs=0.0, target=[1, 2], contrast=[3, 0])
    torch.testing.assert_close(
        same, LRP(model, "epsilon_plus").attribute(x, [1, 2], contrast=[3, 0])
    )
    assert isinstance(LRP(model), captum.attr.GradientAttribution)
    assert LRP(model).has_convergence_delta()


def test_the_rules_of_a_composite_are_listed() -> None:
    model = timm.create_model("test_vit").eval()
    calls = inspect_rules(model, torch.rand(1, 3, 160, 160), mapping="cp_lrp").calls
    rules = {call.call: call.rule for call in calls}
    assert rules["torch.nn.functional.linear"] == "EpsilonRule()"
    assert rules["torch.nn.functional.layer_norm"] == "NormalizationRule()"
    assert all(call.rule is not None for call in calls)


def test_the_first_layer_has_its_own_rule() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.c(torch.relu(self.a((x - 0.3) / 0.2)) + self.b(y))

    seen: list[int] = []

    class Noting(LayerRule):
        def groups(self, parts: Any) -> list[Group]:
            seen.append(parts.x.shape[-1])
            return [Group([Term(parts.x, parts.weight, parts.bias)])]

    model, x, y = TwoInputs().double(), draw_tensor(0, 2, 3), draw_tensor(1, 2, 2)
    rule = FirstLayerRule(Noting(), EpsilonRule())
    LRP(model, table(rule)).attribute((x, y), 1)
    assert sorted(seen) == [2, 3]
    positive = AbsLRP(model, table(FirstLayerRule(AbsLRPRule(), EpsilonRule())))
    assert bool(positive.attribute((x, y), 1)[0].any())


NORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "layer_norm": lambda x, w, b: F.layer_norm(x, (4,), w[:4], b[:4], 0.1),
    "rms_norm": lambda x, w, b: F.rms_norm(x, (4,), w[:4], 0.1),
    "group_norm": lambda x, w, b: F.group_norm(x, 3, w, b, 0.1),
    "instance_norm": lambda x, w, b: F.instance_norm(x, None, None, w, b, True, 0.1, 0.1),
    "torch.instance_norm": lambda x, w, b: torch.instance_norm(
        x, w, b, None, None, True, 0.1, 0.1, False
    ),
    "instance_norm, known": lambda x, w, b: F.instance_norm(x, b, w + 1, w, b, False, 0.1, 0.1),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_have_a_constant_deviation(name: str) -> None:
    x, w, b = draw_tensor(0, 2, 6, 4), draw_tensor(1, 6).abs(), draw_tensor(2, 6)

    class Norm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return NORMS[name](x, w, b).flatten(1)

    groups = {"layer_norm": (-1,), "rms_norm": (-1,), "group_norm": (2, 3)}.get(name, (-1,))
    leaf = x.clone().requires_grad_()
    parts = leaf.view(2, 3, 2, 4) if name == "group_norm" else leaf
    mean = parts.mean(groups, keepdim=True) * (name not in ("rms_norm", "instance_norm, known"))
    size = (parts - mean).square().mean(groups, keepdim=True).detach()
    if name == "instance_norm, known":
        size = (w + 1)[:, None]
    scaled = ((parts - mean) / (size + 0.1).sqrt()).reshape(2, 6, 4)
    scaled = scaled * (w[:4] if name in ("layer_norm", "rms_norm") else w[:, None])
    scaled.flatten(1)[:, 7].sum().backward()
    assert leaf.grad is not None
    actual = LRP(Norm()).attribute(x, 7)
    torch.testing.assert_close(actual, x * leaf.grad, rtol=1e-6, atol=1e-8)


def test_a_sum_with_gamma_favors_the_sign_of_the_sum() -> None:
    class Adding(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.sub(x, y, alpha=2.0)

    x, y = torch.tensor([[3.0, 1.0]]).double(), torch.tensor([[1.0, 1.5]]).double()
    a, b = LRP(Adding(), "res_lrp").attribute((x, y), 0)  # 3 - 2 = 1
    torch.testing.assert_close(a[0, 0].item(), 6 / (6 - 2) * 1.0)
    torch.testing.assert_close(b[0, 0].item(), -2 / (6 - 2) * 1.0)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (["epsilon_pluss"], {}, ValueError, "Did you mean 'epsilon_plus'"),
        ([3], {}, ValueError, "Expected `composite` to be one of"),
        (["epsilon"], {"gamma": 1}, TypeError, r"to be among \['epsilon'\], but got \['gamma'\]"),
        (["epsilon_gamma_box"], {}, TypeError, r"including \['low', 'high'\]"),
        ([Mapping("mine", [])], {}, ValueError, "a mapping with signed rules, but got 'mine'"),
        ([table(FlatRule())], {"epsilon": 1}, TypeError, "with a custom mapping"),
    ],
)
def test_bad_composites(
    arguments: list[Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        LRP(nn.Linear(3, 2), *arguments, **options)


def test_bad_parameters_of_rules_and_calls() -> None:
    with pytest.raises(ValueError, match="`alpha - beta` to be 1, but got alpha=2, beta=2"):
        AlphaBetaRule(2, 2)
    with pytest.raises(ValueError, match="compute a single map for the difference"):
        LRP(nn.Linear(3, 2)).attribute(torch.rand(2, 3), 0, combine="gated")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(dtype: torch.dtype) -> None:
    model, x = small_cnn(), draw_tensor(0, 2, 3, 14, 14)
    exact = LRP(model, "epsilon_plus").attribute(x, [1, 3])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual = LRP(copy.deepcopy(model).to(dtype), "epsilon_plus").attribute(x.to(dtype), [1, 3])
    assert actual.dtype == dtype
    limit = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.3}[dtype]
    assert (actual.double() - exact).norm() < limit * exact.norm()


class _Gates(nn.Module):
    """Functions that are zero at zero behind layers, with dead units, and a merge."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(5))
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = self.layers[0](x).relu()
        y = self.layers[1](F.dropout(F.gelu(first), 0.0))
        y = self.layers[2](F.relu6(F.leaky_relu(y)) + first)
        y = self.layers[3](F.hardtanh(y, -0.5, 2.0)).sigmoid()  # which is not zero at zero
        return self.head(self.layers[4](y).tanh().mean((2, 3)))


@pytest.mark.parametrize("rule", [FlatRule(), WSquareRule(), ZPlusRule(), EpsilonRule()])
@pytest.mark.parametrize("at", ["", *(f"layers.{i}" for i in range(5))])
def test_relevance_of_zeros_goes_on(rule: Any, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = _Gates().double().eval(), torch.randn(2, 3, 6, 6).double()
    if at:
        model.get_submodule(at).rule = rule
    fast = LRP(model, "epsilon").attribute(x, 1, contrast="others")
    monkeypatch.setattr(Step, "expect_no_zeros", lambda step: None)
    slow = LRP(model, "epsilon").attribute(x, 1, contrast="others")
    assert relative_error(fast, slow) < 1e-12


@pytest.mark.parametrize("name", ["epsilon", "epsilon_plus_flat", "attnlrp", "res_lrp"])
def test_calls_that_have_no_closed_form(name: str) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 1), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            masked = self.first(x).masked_fill(torch.arange(6) > 3, -float("inf"))
            return self.head((masked * self.second(x).abs()).softmax(1))

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.layer_norm(self.first(x), (6,), self.second(x)[0]))

    torch.manual_seed(0)
    pooled = nn.Sequential(nn.Linear(6, 6), nn.MaxPool1d(2), nn.Linear(3, 4))
    x = torch.randn(1, 6)
    for model in (pooled, Masked(), Normed()):
        relevance = LRP(model.eval(), name).attribute(x, 1)
        assert relevance.isfinite().all() and relevance.any()


class _Products(TorchDispatchMode):
    """Counts products with the weight of a convolution, forward and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.forward, self.transposed = 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.forward += func is torch.ops.aten.convolution.default
        self.transposed += func is torch.ops.aten.convolution_backward.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["gamma", "alpha_beta"])
def test_groups_are_summed_once_for_all_seeds(name: str) -> None:
    rule = {"gamma": GammaRule(0.5), "alpha_beta": AlphaBetaRule(2, 1)}[name]
    layer = nn.Conv2d(8, 8, 3, padding=1)
    layer.rule = rule  # type: ignore[assignment]  # as users set it
    model = nn.Sequential(nn.ReLU(), layer, nn.Flatten()).eval()
    attributor = AbsLRP(model)
    counts = []
    for contrast in (None, "others"):
        with _Products() as products:
            attributor.attribute(torch.rand(2, 8, 5, 5), 1, contrast=contrast)
        counts.append((products.forward, products.transposed))
    sums = 1 if name == "gamma" else 2  # that of the other sign is known
    assert counts == [(1 + sums, 2), (1 + sums, 4)]


def test_the_groups_of_a_gamma_rule_may_be_others() -> None:
    class Half(GammaRule):
        def groups(self, parts: LayerParts) -> list[Group]:
            return [group._replace(factor=0.5) for group in super().groups(parts)]

    torch.manual_seed(0)
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    maps = []
    for rule in (GammaRule(0.5), Half(0.5)):
        layer.rule = rule  # type: ignore[assignment]  # as users set it
        maps.append(LRP(nn.Sequential(layer).eval()).attribute(x, 1))
    torch.testing.assert_close(maps[1], maps[0] / 2)


@pytest.mark.parametrize("rule", [GammaRule(0.5), ZPlusRule(), AlphaBetaRule(2, 1)], ids=str)
def test_entries_that_take_no_part_contribute_nothing(rule: Rule) -> None:
    """Under the mapping "vit", dropout passes nothing to what is negative."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6), nn.Dropout(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)]
    model, x = nn.Sequential(*layers).eval().double(), torch.randn(2, 6).double()
    model[2].rule = rule  # type: ignore[assignment]  # as users set it
    found = AbsLRP(model, "vit").attribute(x, 1, contrast=None)

    class Hidden(type(rule)):  # type: ignore[misc]  # groups written out
        def groups(self, parts: LayerParts) -> list[Group]:
            parts = LayerParts(parts.x.clamp(min=0), parts.weight, parts.bias, False)
            return super().groups(parts)

    model[2].rule = copy.copy(rule)
    model[2].rule.__class__ = Hidden
    expected = AbsLRP(model, "vit").attribute(x, 1, contrast=None)
    torch.testing.assert_close(found, expected)


def test_a_rule_with_groups_of_its_own_does_not_spare_zeros_unasked() -> None:
    class Even(GammaRule):
        def groups(self, parts: LayerParts) -> list[Group]:
            return [Group([Term(torch.ones_like(parts.x), torch.ones_like(parts.weight))])]

    torch.manual_seed(0)
    layer, x = nn.Linear(4, 2), torch.rand(1, 4)
    maps = []
    for rule in (Even(0.5), FlatRule()):
        layer.rule = rule  # type: ignore[assignment]  # as users set it
        model = nn.Sequential(nn.Hardtanh(0.5, 1.0), nn.ReLU(), layer).eval()
        maps.append(LRP(model).attribute(x - 0.5, 1))
    assert not Even.spares_zeros
    torch.testing.assert_close(maps[0], maps[1])
