"""The contract of `AbsLRP.attribute`."""

from __future__ import annotations

import captum
import numpy
import pytest
import timm
import torch
import torch.nn.functional as F
from captum.attr import NoiseTunnel, visualization
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from captum_abslrp import AbsLRP, UnsupportedCallError
from captum_abslrp.rules import TwinRule
from tests.conftest import GOLDEN_NAMES, load_golden, relative_error


def mlp(inputs: int = 6, classes: int = 5, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, classes)).eval().to(dtype)


def batch(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 5)

    def forward(self, a: Tensor, b: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        return self.head(F.relu(self.left(a) + self.right(b)) * scale)


class TokenClasses(nn.Module):
    """Output of shape (B, N tokens, K classes)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
@pytest.mark.parametrize("normalization", ["separate", "joint"])
@pytest.mark.parametrize("contrast", ["others", "softmax", None, 0])
def test_a_batch_equals_its_samples_one_by_one(
    name: str, normalization: str, contrast: str | int | None
) -> None:
    golden = load_golden(name)
    attributor = AbsLRP(golden.model, normalization=normalization)
    target = [3, 1, 2]
    together = attributor.attribute(golden.x, target, contrast=contrast)
    one_by_one = torch.cat(
        [attributor.attribute(x[None], t, contrast=contrast) for x, t in zip(golden.x, target)]
    )
    split = attributor.attribute(golden.x, target, contrast=contrast, internal_batch_size=2)
    assert relative_error(together, one_by_one) < 1e-5
    assert relative_error(split, one_by_one) < 1e-5


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_a_second_call_equals_the_first_and_inputs_are_left_alone(name: str) -> None:
    golden = load_golden(name)
    attributor, before = AbsLRP(golden.model), golden.x.clone()
    first = attributor.attribute(golden.x, golden.target)
    assert torch.equal(first, attributor.attribute(golden.x, golden.target))
    assert torch.equal(golden.x, before)
    assert not golden.x.requires_grad
    assert golden.x.grad is None


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_result_has_shape_dtype_and_no_history(name: str) -> None:
    golden = load_golden(name, torch.float32)
    relevance = AbsLRP(golden.model).attribute(golden.x, golden.target)
    assert relevance.shape == golden.x.shape
    assert relevance.dtype == golden.x.dtype
    assert relevance.device == golden.x.device
    assert not relevance.requires_grad
    assert bool(torch.isfinite(relevance).all())


TARGETS = [2, -3, torch.tensor(2), torch.tensor([2]), torch.tensor([2, 2, 2]), [2, 2, 2]]


@pytest.mark.parametrize("target", TARGETS, ids=repr)
def test_target_in_all_forms(target: object) -> None:
    attributor, x = AbsLRP(mlp()), batch(3, 6)
    assert torch.equal(attributor.attribute(x, target), attributor.attribute(x, 2))  # type: ignore[arg-type]


def test_no_target_explains_the_prediction() -> None:
    model, x = mlp(), batch(3, 6)
    predicted = model(x).argmax(1)
    attributor = AbsLRP(model)
    assert torch.equal(attributor.attribute(x), attributor.attribute(x, predicted))


def test_tuples_are_targets_of_outputs_of_more_dimensions() -> None:
    model, x = TokenClasses().double(), batch(2, 4, 3)
    attributor = AbsLRP(model)
    relevance = attributor.attribute(x, (1, 2), class_dim=-1)
    assert torch.equal(relevance, attributor.attribute(x, [(1, 2), (1, 2)], class_dim=-1))
    assert bool((relevance[:, [0, 2, 3]] == 0).all()), "relevance left the token that was asked for"
    assert bool((relevance[:, 1] != 0).any())


def test_contrast_is_the_difference_of_two_maps() -> None:
    attributor, x = AbsLRP(mlp(classes=3)), batch(3, 6)
    alone = [attributor.attribute(x, k, contrast=None) for k in range(3)]
    this_not_that = attributor.attribute(x, 0, contrast=1)
    torch.testing.assert_close(this_not_that, alone[0] - alone[1])
    tensor_of_classes = attributor.attribute(x, 0, contrast=torch.tensor([1, 2, 1]))
    torch.testing.assert_close(tensor_of_classes[1], (alone[0] - alone[2])[1])


def test_contrast_by_softmax_follows_the_probabilities() -> None:
    model, x = mlp(classes=3), batch(3, 6)
    with torch.no_grad():
        model[2].weight.abs_()  # so that every class has positive contributions
        model[2].bias += torch.tensor([0.0, 50.0, 0.0])
    attributor = AbsLRP(model)
    torch.testing.assert_close(
        attributor.attribute(x, 0, contrast="softmax"), attributor.attribute(x, 0, contrast=1)
    )


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_gated_keeps_the_target_map_where_it_exceeds_the_contrast(name: str) -> None:
    golden = load_golden(name)
    gated = AbsLRP(golden.model).attribute(golden.x, golden.target, combine="gated")
    target, rest = golden.relevance_target, golden.relevance_rest
    # Ties in the last digits may fall on either side.
    clear = (target - rest).abs() > 1e-9 * target.abs().max()
    expected = torch.where(target > rest, target, 0)
    assert relative_error(gated[clear], expected[clear]) < 1e-6


def test_one_output_has_no_contrast() -> None:
    x = batch(3, 6)
    for model in (mlp(classes=1), nn.Sequential(mlp(classes=1), nn.Flatten(0))):
        attributor = AbsLRP(model)
        alone = attributor.attribute(x, contrast=None)
        assert torch.equal(attributor.attribute(x), alone)
        assert torch.equal(attributor.attribute(x, 0), alone)


def test_several_inputs_and_additional_arguments() -> None:
    model = TwoInputs().double()
    a, b, scale = batch(3, 3), batch(3, 2), batch(3, 1).abs()
    attributor = AbsLRP(model)
    of_a, of_b = attributor.attribute((a, b), 1, additional_forward_args=(scale,))
    assert of_a.shape == a.shape
    assert of_b.shape == b.shape
    split = attributor.attribute((a, b), 1, (scale,), internal_batch_size=1)
    torch.testing.assert_close((of_a, of_b), split)
    single = attributor.attribute(a, 1, additional_forward_args=(b, scale))
    torch.testing.assert_close(of_a, single)


def test_joint_normalization_conserves_relevance() -> None:
    model, a, b = TwoInputs().double(), batch(3, 3).abs(), batch(3, 2).abs()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    for normalization, expected in (("joint", 1.0), ("separate", 2.0)):
        relevances, delta = AbsLRP(model, normalization=normalization).attribute(
            (a, b), 1, contrast=None, return_convergence_delta=True
        )
        totals = sum(r.sum(1) for r in relevances)
        torch.testing.assert_close(totals, torch.full((3,), expected, dtype=torch.float64))
        torch.testing.assert_close(delta, totals - 1, check_dtype=False, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_each_map_adds_up_to_one(name: str) -> None:
    golden = load_golden(name)
    relevance, delta = AbsLRP(golden.model).attribute(
        golden.x, golden.target, contrast=None, return_convergence_delta=True
    )
    torch.testing.assert_close(relevance.flatten(1).sum(1), torch.ones(3, dtype=torch.float64))
    assert delta.shape == (3,)
    assert bool((delta.abs() < 1e-6).all())


@settings(deadline=None, max_examples=10, derandomize=True)
@given(st.floats(0.1, 100), st.integers(0, 4))
def test_scaling_the_last_layer_changes_no_map(scale: float, target: int) -> None:
    model, x = mlp(), batch(3, 6)
    before = AbsLRP(model).attribute(x, target)
    with torch.no_grad():
        model[2].weight *= scale
        model[2].bias *= scale
    torch.testing.assert_close(AbsLRP(model).attribute(x, target), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_zeros_are_finite(name: str) -> None:
    golden = load_golden(name)
    relevance = AbsLRP(golden.model).attribute(torch.zeros_like(golden.x), 1)
    assert bool(torch.isfinite(relevance).all())


@pytest.mark.parametrize("name", GOLDEN_NAMES)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=lambda c: c.__name__)
def test_works_where_the_caller_switched_gradients_off(name: str, context: type) -> None:
    golden = load_golden(name)
    attributor = AbsLRP(golden.model)
    expected = attributor.attribute(golden.x, golden.target)
    with context():
        relevance = attributor.attribute(golden.x.clone(), golden.target)
    torch.testing.assert_close(relevance.clone(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_half_precision_is_close_to_full(name: str, dtype: torch.dtype) -> None:
    golden = load_golden(name)
    golden.model.to(dtype)
    relevance = AbsLRP(golden.model).attribute(golden.x.to(dtype), golden.target, contrast=None)
    assert relevance.dtype == dtype
    assert bool(torch.isfinite(relevance).all())
    overlap = F.cosine_similarity(
        relevance.double().flatten(1), golden.relevance_target.flatten(1), dim=1
    )
    assert bool((overlap > 0.95).all()), overlap
    torch.testing.assert_close(
        relevance.double().flatten(1).sum(1), torch.ones(3).double(), atol=0.1, rtol=0
    )


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_autocast_is_close_to_full(name: str) -> None:
    golden = load_golden(name, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        relevance = AbsLRP(golden.model).attribute(golden.x, golden.target, contrast=None)
    assert relevance.dtype == torch.float32
    overlap = F.cosine_similarity(
        relevance.double().flatten(1), golden.relevance_target.flatten(1), dim=1
    )
    assert bool((overlap > 0.95).all()), overlap


def test_noise_tunnel_infidelity_sensitivity_and_visualization() -> None:
    golden = load_golden("resnet_basic", torch.float32)
    attributor, x, target = AbsLRP(golden.model), golden.x[:2], golden.target[:2]
    smooth = NoiseTunnel(attributor).attribute(x, nt_samples=2, nt_type="smoothgrad", target=target)
    assert smooth.shape == x.shape

    def perturb(inputs: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.randn_like(inputs) * 0.01
        return noise, inputs - noise

    relevance = attributor.attribute(x, target)
    score = captum.metrics.infidelity(golden.model, perturb, x, relevance, target=target)
    assert bool(torch.isfinite(score).all())
    sensitivity = captum.metrics.sensitivity_max(attributor.attribute, x, target=target)
    assert sensitivity.shape == (2,)
    figure, _ = visualization.visualize_image_attr(
        relevance[0].permute(1, 2, 0).numpy(), use_pyplot=False, sign="all", show_colorbar=True
    )
    assert figure.axes


def test_is_a_gradient_attribution_of_captum() -> None:
    attributor = AbsLRP(mlp())
    assert isinstance(attributor, captum.attr.GradientAttribution)
    assert attributor.has_convergence_delta()
    assert attributor.multiplies_by_inputs


def test_output_picks_what_is_explained() -> None:
    class WithScores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"scores": self.inner(x)}

    model, x = WithScores(), batch(3, 6)
    with pytest.raises(
        TypeError, match=r"Expected the model to return a tensor, but got dict\. Pick one"
    ):
        AbsLRP(model).attribute(x, 1)
    relevance = AbsLRP(model, output=lambda out: out["scores"]).attribute(x, 1)
    assert torch.equal(relevance, AbsLRP(model.inner).attribute(x, 1))


class Unsupported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.erfinv(self.layer(x).tanh())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Unsupported()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_a_call_without_a_rule_is_named() -> None:
    model, x = nn.Sequential(Block()).double(), batch(3, 6)
    with pytest.raises(
        UnsupportedCallError,
        match=r"`torch\.\w*\.?erfinv` in `0\.inner` \(Unsupported\).*"
        r'register_call_rule\("erfinv", .*mapping=.*module\.rule',
    ):
        AbsLRP(model).attribute(x, 1)
    model[0].inner.rule = TwinRule()
    assert bool(torch.isfinite(AbsLRP(model).attribute(x, 1)).all())


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


def test_an_autograd_function_of_the_model_is_named() -> None:
    class Custom(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Square.apply(x)

    with pytest.raises(
        UnsupportedCallError,
        match=r"autograd function `Square` in `1` \(Custom\).*register_call_rule\(Custom, ",
    ):
        AbsLRP(nn.Sequential(mlp(), Custom())).attribute(batch(3, 6), 1)


BAD_CALLS = {
    "inputs of integers": (
        lambda: AbsLRP(mlp()).attribute(torch.ones(2, 6, dtype=torch.long), 1),
        TypeError, r"Expected `inputs` to have a floating-point dtype, but got torch\.int64",
    ),
    "inputs that are no tensor": (
        lambda: AbsLRP(mlp()).attribute([[1.0]], 1), TypeError, "Expected `inputs` .*but got list",
    ),
    "inputs with NaN": (
        lambda: AbsLRP(mlp()).attribute(torch.full((2, 6), float("nan")), 1),
        ValueError, "Expected `inputs` to be finite",
    ),
    "inputs with infinity": (
        lambda: AbsLRP(mlp()).attribute(torch.full((2, 6), float("inf")), 1),
        ValueError, "Expected `inputs` to be finite",
    ),
    "no batch dimension, vector": (
        lambda: AbsLRP(mlp()).attribute(batch(6), 1),
        ValueError, r"batch dimension.*`x\.unsqueeze\(0\)`",
    ),
    "no batch dimension, image": (
        lambda: AbsLRP(load_golden("resnet_basic").model).attribute(batch(3, 32, 32), 1),
        ValueError, r"Add a batch dimension to `inputs`: `x\.unsqueeze\(0\)`",
    ),
    "no batch dimension, image for a ViT": (
        lambda: AbsLRP(load_golden("vit").model).attribute(batch(3, 32, 32), 1),
        ValueError, r"Add a batch dimension to `inputs`: `x\.unsqueeze\(0\)`",
    ),
    "no inputs": (lambda: AbsLRP(mlp()).attribute(()), ValueError, "but got an empty tuple"),
    "inputs that are None": (
        lambda: AbsLRP(mlp()).attribute(None), TypeError, "Expected `inputs` .* but got NoneType",
    ),
    "target of numpy": (
        lambda: AbsLRP(mlp()).attribute(batch(2, 6), numpy.array([1, 2])),
        TypeError, "Expected `target` to be an int",
    ),
    "internal batch size of no int": (
        lambda: AbsLRP(mlp()).attribute(batch(2, 6), 1, internal_batch_size=2.5),
        ValueError, "Expected `internal_batch_size` to be an int",
    ),
    "mapping of no mapping": (lambda: AbsLRP(mlp(), 5), TypeError, "to be a Mapping, .*but got int"),
    "a class for a rule": (
        lambda: AbsLRP(with_rule(TwinRule)).attribute(batch(2, 6), 1),
        TypeError, r"Expected `rule` of `0` to be an instance of a PropagationRule",
    ),
    "empty batch": (
        lambda: AbsLRP(mlp()).attribute(batch(0, 6), 1), ValueError, "at least one sample",
    ),
    "inputs of different length": (
        lambda: AbsLRP(TwoInputs().double()).attribute((batch(3, 3), batch(2, 2)), 1),
        ValueError, r"same number of samples, but got \[3, 2\]",
    ),
    "target out of range": (
        lambda: AbsLRP(mlp()).attribute(batch(2, 6), 5),
        IndexError, r"Expected `target` to be within the output shape \(5,\).*but got 5",
    ),
    "contrast out of range": (
        lambda: AbsLRP(mlp()).attribute(batch(2, 6), 1, contrast=9),
        IndexError, r"Expected `contrast` to be within .*but got 9",
    ),
    "too many targets": (
        lambda: AbsLRP(mlp()).attribute(batch(2, 6), [1, 2, 3]),
        ValueError, r"one entry per sample \(2\), but got 3",
    ),
    "target of floats": (
        lambda: AbsLRP(mlp()).attribute(batch(2, 6), 1.5), TypeError, "Expected `target` to be an int",
    ),
    "target tensor of floats": (
        lambda: AbsLRP(mlp()).attribute(batch(2, 6), torch.ones(2)),
        TypeError, "Expected `target` to be a tensor of integers",
    ),
    "target for another output": (
        lambda: AbsLRP(TokenClasses().double()).attribute(batch(2, 4, 3), (1, 2, 0)),
        ValueError, "Expected `target` to have at most 2 indices per sample",
    ),
    "no target for an output of many dimensions": (
        lambda: AbsLRP(TokenClasses().double()).attribute(batch(2, 4, 3)),
        ValueError, "Expected `target` to be a tuple of 2 indices",
    ),
    "contrast is the target": (
        lambda: AbsLRP(mlp()).attribute(batch(2, 6), 1, contrast=[2, 1]),
        ValueError, "to be different classes, but got the same class for sample 1",
    ),
    "contrast of an unknown word": (
        lambda: AbsLRP(mlp()).attribute(batch(2, 6), 1, contrast="rest"),
        ValueError, "Expected `contrast` to be .*but got 'rest'",
    ),
    "combining in an unknown way": (
        lambda: AbsLRP(mlp()).attribute(batch(2, 6), 1, combine="product"),
        ValueError, "Expected `combine` to be .*but got 'product'",
    ),
    "no module": (lambda: AbsLRP(torch.sigmoid), TypeError, r"Expected `model` to be a torch\.nn\.Module"),
    "unknown normalization": (
        lambda: AbsLRP(mlp(), normalization="none"), ValueError, "Expected `normalization` to be",
    ),
    "unknown mapping": (
        lambda: AbsLRP(mlp(), "vitt"), ValueError, "Expected `mapping` to be one of .*Did you mean 'vit'",
    ),
    "internal batch size of zero": (
        lambda: AbsLRP(mlp()).attribute(batch(2, 6), 1, internal_batch_size=0),
        ValueError, "Expected `internal_batch_size` to be an int of at least 1, but got 0",
    ),
    "output that does not depend on the input": (
        lambda: AbsLRP(nn.Sequential(mlp(), Detach())).attribute(batch(2, 6), 1),
        ValueError, "depend on `inputs`",
    ),
}  # fmt: skip


def with_rule(rule: object) -> nn.Module:
    model = mlp()
    model[0].rule = rule
    return model


class Detach(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_named(name: str) -> None:
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_scripted_model_is_refused() -> None:
    scripted = torch.jit.script(mlp())
    with pytest.raises(TypeError, match="plain module, but got a scripted module"):
        AbsLRP(scripted)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_scripted_part_is_named() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(5, 5), nn.Tanh())).double()
    with pytest.raises(TypeError, match="Expected `1` of `model` to be .* a scripted module"):
        AbsLRP(nn.Sequential(mlp(), scripted))


def test_inputs_without_further_dimensions() -> None:
    class Unsqueezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp(inputs=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.unsqueeze(1))

    # Each sample has one element, which gets all: the maps of target and contrast are the same.
    relevance, delta = AbsLRP(Unsqueezed()).attribute(
        batch(3), 1, contrast=None, return_convergence_delta=True
    )
    assert relevance.shape == delta.shape == (3,)
    assert delta.dtype == torch.float64


def test_a_compiled_or_wrapped_model_is_explained_as_the_original() -> None:
    model, x = mlp(), batch(3, 6)
    expected = AbsLRP(model).attribute(x, 1)
    assert torch.equal(AbsLRP(torch.compile(model)).attribute(x, 1), expected)
    assert torch.equal(AbsLRP(nn.DataParallel(model)).attribute(x, 1), expected)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(8)], ids=repr)
def test_training_mode_is_warned_about(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(6, 8), layer, nn.Linear(8, 5)).train().double()
    with pytest.warns(
        UserWarning, match=rf"evaluation mode, but got `1` \({type(layer).__name__}\).*model\.eval"
    ):
        AbsLRP(model).attribute(batch(3, 6), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_difference_that_is_rounding_is_warned_about(dtype: torch.dtype) -> None:
    class Alike(nn.Module):
        """Two classes whose weights differ in the last digits."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.rand(1, 50, generator=torch.Generator().manual_seed(0)).repeat(2, 1)
            self.weight = self.weight.to(dtype)
            self.weight[1, 3] *= 1 + 20 * torch.finfo(dtype).eps

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight)

    x = torch.rand(2, 50).to(dtype)
    remedy = r"`model\.double\(\)`.*" if dtype == torch.float32 else ""
    with pytest.warns(
        UserWarning, match=rf"close to the rounding error.*{remedy}contrast=None"
    ) as seen:
        AbsLRP(Alike()).attribute(x, 1)
    assert seen[0].filename == __file__
    AbsLRP(Alike()).attribute(x, 1, contrast=None)


def test_many_architectures_share_one_contract() -> None:
    x = torch.rand(2, 3, 160, 160)
    for name in ("test_vit", "test_resnet"):
        model = timm.create_model(name).eval()
        assert AbsLRP(model).attribute(x, target=0).shape == x.shape
