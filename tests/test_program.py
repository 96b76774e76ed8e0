"""Explanations as flat programs: they are those of `attribute`, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from captum_abslrp import LRP, AbsLRP, LayerAbsLRP, demo
from captum_abslrp.graphs import LARGEST, simplify
from captum_abslrp.rules import EpsilonRule, TwinRule
from tests.test_no_trace import no_trace

pytestmark = [
    pytest.mark.filterwarnings("ignore:The guided map is zero"),
    pytest.mark.filterwarnings("ignore:The maps of target and contrast differ"),  # random weights
]


def model_of(name: str) -> nn.Module:
    model = demo.load_model(name[5:]) if ":" in name else timm.create_model(name)
    return model.eval()


def draw(model: nn.Module, batch_size: int, seed: int = 0) -> Tensor:
    if not hasattr(model, "default_cfg"):
        return demo.load_scenes("single", 10).inputs[5 * seed : 5 * seed + batch_size].clone()
    size = model.default_cfg["input_size"]
    return torch.randn(batch_size, *size, generator=torch.Generator().manual_seed(seed))


ATTRIBUTORS: dict[str, Callable[[nn.Module], AbsLRP]] = {
    "separate": AbsLRP,
    "joint": lambda model: AbsLRP(model, normalization="joint"),
    "recommended": AbsLRP.recommended,
    "epsilon_plus": lambda model: LRP(model, "epsilon_plus"),
    "attnlrp": lambda model: LRP(model, "attnlrp"),
}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("demo:vgg", "separate"),
        ("demo:vgg", "recommended"),
        ("demo:resnet", "joint"),
        ("demo:resnet", "epsilon_plus"),
        ("demo:vit", "joint"),
        ("demo:vit", "attnlrp"),
        ("demo:vit", "recommended"),
    ],
)
def test_a_program_is_the_explanation(name: str, way: str) -> None:
    model = model_of(name)
    attributor = ATTRIBUTORS[way](model)
    program = attributor.trace(draw(model, 2), target=3)
    x, targets = draw(model, 2, seed=1), torch.tensor([7, -9])
    output, relevance = program(x, targets)
    assert torch.equal(relevance, attributor.attribute(x, targets))
    torch.testing.assert_close(output, model(x))
    assert not output.requires_grad and not relevance.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["resnet50", "vit_small_patch16_224", "convnext_tiny", "swin_tiny_patch4_window7_224"],
)
@pytest.mark.parametrize("way", ["separate", "joint", "recommended"])
def test_a_program_of_a_large_model(name: str, way: str) -> None:
    model = model_of(name)
    attributor = ATTRIBUTORS[way](model)
    program = attributor.trace(draw(model, 1), target=3)
    x = draw(model, 1, seed=1)
    assert torch.equal(program(x, 500)[1], attributor.attribute(x, 500))


OPTIONS: dict[str, dict[str, Any]] = {
    "none": {"contrast": None},
    "softmax": {"contrast": "softmax"},
    "classes": {"contrast": [5, 0]},
    "gated": {"combine": "gated"},
    "guided": {"combine": "guided"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_are_fixed(options: dict[str, Any]) -> None:
    model = model_of("demo:vgg")
    attributor = AbsLRP(model)
    program = attributor.trace(draw(model, 2), [1, 2], **options)
    x = draw(model, 2, seed=1)
    assert torch.equal(program(x, [8, 3])[1], attributor.attribute(x, [8, 3], **options))


def test_a_guide_can_be_given() -> None:
    model = model_of("demo:resnet")
    attributor = AbsLRP.recommended(model)
    guide = model.get_submodule("layer1")
    program = attributor.trace(draw(model, 1), 1, guide=guide)
    x = draw(model, 1, seed=1)
    assert torch.equal(program(x, 4)[1], attributor.attribute(x, 4, guide=guide))
    assert not torch.equal(program(x, 4)[1], attributor.attribute(x, 4))


@pytest.mark.parametrize("name", ["demo:vgg", "demo:vit"])
def test_the_order_of_memory_is_free(name: str) -> None:
    model = model_of(name)
    x, attributor = draw(model, 2, seed=1), AbsLRP(model)
    expected = attributor.attribute(x, 3)
    flipped = x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    for example in (draw(model, 2), draw(model, 2).to(memory_format=torch.channels_last)):
        program = attributor.trace(example, target=3)
        for given in (x, x.to(memory_format=torch.channels_last), flipped):
            assert torch.equal(program(given, 3)[1], expected)


def test_casts_are_part_of_a_program() -> None:
    model = model_of("demo:vgg")
    attributor, x = AbsLRP(model), draw(model, 1, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        program = attributor.trace(draw(model, 1), 1, contrast=None)
        expected = attributor.attribute(x, 4, contrast=None)
        assert torch.equal(program(x, 4)[1], expected)
    assert torch.equal(program(x, 4)[1], expected)
    assert not torch.equal(attributor.attribute(x, 4, contrast=None), expected)


def test_without_a_target_it_is_the_predicted_class() -> None:
    model = model_of("demo:vgg")
    program = AbsLRP(model).trace(draw(model, 3))
    x = demo.load_scenes("single", 3).inputs
    assert len(set(model(x).argmax(1).tolist())) > 1
    assert torch.equal(program(x)[1], AbsLRP(model).attribute(x))
    with pytest.raises(ValueError, match="Expected no `target`"):
        program(x, 1)


class Several(nn.Module):
    """Two inputs, a mask, a number and a dict of outputs at places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Conv1d(5, 4, 1)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor, scale: float) -> dict[str, Tensor]:
        hidden = self.first(x).relu()[:, :, None] + self.second(y)
        return {"scores": hidden.masked_fill(mask, 0.0) * scale}


def test_several_inputs_and_arguments() -> None:
    torch.manual_seed(0)
    model = Several().eval()
    attributor = AbsLRP(model, output=lambda out: out["scores"])

    def arguments(seed: int) -> tuple[Any, Any]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2, 3, generator=generator)
        y = torch.randn(2, 5, 6, generator=generator)
        return (x, y), (torch.rand(2, 4, 6, generator=generator) < 0.2, 2.0)

    inputs, extra = arguments(0)
    program = attributor.trace(inputs, (1, 4), extra)
    inputs, extra = arguments(1)
    target = [(0, 3), (3, -1)]
    output, relevances = program(inputs, target, extra)
    assert torch.equal(output, model(*inputs, *extra)["scores"]) and isinstance(relevances, tuple)
    expected = attributor.attribute(inputs, target, extra)
    assert all(torch.equal(a, b) for a, b in zip(relevances, expected, strict=True))
    with pytest.raises(
        ValueError, match="Expected arguments with the shapes, dtypes and devices of the example"
    ):
        program(inputs, target, (extra[0], 3.0))  # a number is fixed
    with pytest.raises(
        ValueError, match="Expected arguments with the shapes, dtypes and devices of the example"
    ):
        program(inputs, [0, 1], extra)  # indices of a sum over places


def test_sums_over_places() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1)).eval()
    program = AbsLRP(model).trace(torch.randn(2, 3, 6, 6), 1)
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(program(x, [4, 0])[1], AbsLRP(model).attribute(x, [4, 0]))
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).eval()
    program, x = AbsLRP(model).trace(torch.randn(2, 3)), torch.randn(2, 3)
    assert torch.equal(program(x)[1], AbsLRP(model).attribute(x))


def test_what_attribute_refuses_is_nan() -> None:
    model = model_of("demo:vgg")
    program = AbsLRP(model).trace(draw(model, 4), 1, contrast=[5, 5, 5, 5])
    x = draw(model, 4, seed=1)
    expected = AbsLRP(model).attribute(x, [1, 2, 3, 4], contrast=5)
    x[1, 0, 3, 3] = torch.inf
    relevance = program(x, torch.tensor([1, 2, 10, 5]))[1]
    assert torch.equal(relevance[0], expected[0]) and relevance[1:].isnan().all()
    relevance = program(x, torch.tensor([-11, 2, 3, -5]))[1]
    assert relevance[[0, 1, 3]].isnan().all() and torch.equal(relevance[2], expected[2])


def test_the_predicted_class_is_not_its_own_contrast() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).eval()
    x = torch.randn(20, 6)
    predicted = model(x).argmax(1)
    first = predicted[0]
    program = AbsLRP(model).trace(x[predicted != first][:1], contrast=int(first))
    assert program(x[:1])[1].isnan().all()


def test_each_index_of_a_single_output_is_looked_at() -> None:
    model = nn.Sequential(nn.Linear(6, 1), nn.Unflatten(1, (1, 1))).eval()
    x = torch.randn(2, 6)
    program = AbsLRP(model).trace(x, (0, 0))
    assert torch.equal(program(x, (0, -1))[1], AbsLRP(model).attribute(x, (0, 0)))
    assert program(x, (0, 5))[1].isnan().all()


def test_samples_may_be_numbers() -> None:
    class Numbers(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, None])

    model, x = Numbers(1, 4).eval(), torch.rand(3)
    assert torch.equal(AbsLRP(model).trace(x, 1)(x, 2)[1], AbsLRP(model).attribute(x, 2))


def test_models_that_decide_by_values_are_refused() -> None:
    class Deciding(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    with pytest.raises(ValueError, match="to run the same operators for all values"):
        AbsLRP(Deciding(3, 4).eval()).trace(torch.rand(1, 3), 1)


def test_arguments_have_to_be_as_in_the_example() -> None:
    model = model_of("demo:vgg")
    program = AbsLRP(model).trace(draw(model, 2), 1)
    with pytest.raises(ValueError, match=r"\(2, 3, 64, 64\).*other shapes or batch sizes"):
        program(draw(model, 3), 1)
    with pytest.raises(ValueError, match="float64"):
        program(draw(model, 2).double(), 1)
    with pytest.raises(ValueError, match="Expected arguments"):
        program((draw(model, 2),), 1)
    with pytest.raises(ValueError, match="Expected `target`, because"):
        program(draw(model, 2))
    with pytest.raises(ValueError, match="one entry per sample"):
        program(draw(model, 2), [1, 2, 3])
    with pytest.raises(RuntimeError, match="keep its device"):
        program.double()
    assert "2, 3, 64, 64" in repr(program)


def test_a_program_reads_the_weights_of_the_model() -> None:
    model = model_of("demo:vgg")
    program, x = AbsLRP(model).trace(draw(model, 1), 1), draw(model, 1)
    before = program(x, 2)[1]
    torch.manual_seed(0)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.mul_(1 + 0.1 * torch.rand_like(tensor))
    assert torch.equal(program(x, 2)[1], AbsLRP(model).attribute(x, 2))
    assert not torch.equal(program(x, 2)[1], before)


@pytest.mark.parametrize("tensor", ["parameter", "attribute"])
def test_tensors_of_the_model_are_no_constants(tensor: str) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.factor

    model, x = Scaled(3, 4).eval(), torch.randn(2, 3)
    factor = torch.rand(4)
    model.factor = nn.Parameter(factor) if tensor == "parameter" else factor
    program = AbsLRP(model).trace(x, 1)
    model.factor.data.mul_(-2)
    assert torch.equal(program(x, 2)[0], model(x))
    assert torch.equal(program(x, 2)[1], AbsLRP(model).attribute(x, 2))


class Mixing(nn.Linear):
    """Standardizes over the samples."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


def test_what_cannot_be_traced() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.Linear(3, 2)), torch.randn(2, 3)
    with pytest.raises(ValueError, match="in evaluation mode for `trace`.*'the model'"):
        AbsLRP(model).trace(x, 1)
    model.eval()[1].train()
    with pytest.raises(ValueError, match="first '1'"):
        AbsLRP(model).trace(x, 1)
    model.eval()
    with pytest.raises(IndexError, match="within the output shape"):
        AbsLRP(model).trace(x, 2)
    with pytest.raises(ValueError, match="Trace it for one sample"):
        AbsLRP(Mixing(3, 2).eval()).trace(x, 1)
    with pytest.raises(NotImplementedError, match="`AbsLRP` for `trace`"):
        LayerAbsLRP(model, model[0]).trace(x, 1)
    with pytest.raises(ValueError, match="`guide` only with"):
        AbsLRP(model).trace(x, 1, guide=model[0])


class Drawn(TwinRule):
    """A rule that is different in every run."""

    def record(self, call: Any) -> Any:
        record = super().record(call)
        return record._replace(propagate=lambda s: [torch.rand_like(x) for x in record.inputs])


def test_a_rule_that_draws_is_noticed() -> None:
    model = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 2)).eval()
    model[0].rule = Drawn()  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="to reproduce the map of the example"):
        AbsLRP(model).trace(torch.randn(2, 30), 1)


def test_the_model_stays_as_it_is() -> None:
    model = model_of("demo:vgg")
    with no_trace(model):
        program = AbsLRP.recommended(model).trace(draw(model, 1), 1)
        program(draw(model, 1), 2)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    own = [b for b in program.graph.buffers() if b.untyped_storage().data_ptr() not in weights]
    known = {b.untyped_storage().data_ptr() for b in model.buffers()}
    large = [b for b in own if b.numel() > LARGEST and b.untyped_storage().data_ptr() not in known]
    assert not large and not [*program.parameters()]


def test_a_program_has_nothing_but_operators() -> None:
    model = model_of("demo:vgg")
    program = AbsLRP(model).trace(draw(model, 1), 1)
    called = {n.target for n in program.graph.graph.nodes if n.op == "call_function"}
    assert all(isinstance(t, torch._ops.OpOverload) or t.__name__ == "getitem" for t in called)
    assert not [n for n in program.graph.graph.nodes if n.op in ("call_module", "call_method")]


def test_programs_compile() -> None:
    model = model_of("demo:vgg")
    program, x = AbsLRP(model).trace(draw(model, 1), 1), draw(model, 1, seed=1)
    compiled = torch.compile(program.graph, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        relevance = compiled(x, torch.tensor([[7]]))[1]
    torch.testing.assert_close(relevance, program(x, 7)[1])


def simplified(function: Callable[..., Any], *example: Tensor) -> torch.fx.GraphModule:
    graph = make_fx(function)(*example)
    simplify(graph)
    for seed in range(3):
        torch.manual_seed(seed)
        given = [torch.randn_like(x) for x in example]
        torch.testing.assert_close(graph(*given), function(*given), rtol=0, atol=0)
    return graph


def operators(graph: torch.fx.GraphModule) -> list[str]:
    return [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]


def test_constants_are_computed_once() -> None:
    weight = torch.randn(3)
    graph = simplified(lambda x: x.detach() * (weight.abs() + 1).sqrt(), torch.randn(3))
    assert operators(graph) == ["aten.mul.Tensor"]
    several = torch.arange(6.0).view(2, 3)
    graph = simplified(lambda x: x * several.unbind(0)[1], torch.randn(3))
    assert operators(graph) == ["aten.mul.Tensor"]


def test_constants_that_are_overwritten_are_made_in_every_run() -> None:
    def overwrites(x: Tensor) -> Tensor:
        sums = torch.zeros(3)
        sums[1:].add_(x[1:])
        part = torch.ones(2, 3).view(3, 2)
        part.select(0, 1).mul_(x[:2])
        return sums + part.sum(1)

    assert "aten.zeros.default" in operators(simplified(overwrites, torch.randn(3)))


def test_constants_that_are_copied_or_viewed_may_be_overwritten() -> None:
    def copies(x: Tensor) -> Tensor:
        h = torch.tensor([1.0, 2.0, 3.0])
        h.add_(1)
        return h * x

    def views(x: Tensor) -> Tensor:
        h = (torch.ones(1, 3, 2) @ torch.ones(2, 3))[0]
        before = h[0].sum()
        h.add_(x.detach())
        return h[0] * x + before + h[1].sum()

    for function in (copies, views):
        simplified(function, torch.randn(3))


def test_large_constants_are_made_in_every_run() -> None:
    weight = torch.randn(LARGEST + 1)
    graph = simplified(lambda x: (weight.clamp(min=0) * x).sum(), torch.randn(()))
    assert operators(graph)[0] == "aten.clamp.default"


def test_names_of_constants_that_are_taken() -> None:
    graph = make_fx(lambda x: x + torch.arange(3.0) + torch.arange(3.0).cumsum(0))(torch.zeros(3))
    graph.register_buffer("constant_0", torch.full((3,), 7.0))
    simplify(graph)
    assert graph(torch.zeros(3)).tolist() == [0.0, 2.0, 5.0]
    assert graph.constant_0.tolist() == [7.0] * 3


def test_random_numbers_are_drawn_in_every_run() -> None:
    graph = make_fx(lambda x: x + torch.rand(3))(torch.zeros(3))
    simplify(graph)
    assert not torch.equal(graph(torch.zeros(3)), graph(torch.zeros(3)))


class _Weak(nn.Module):
    """A branch of which little is left, so that relevance is scaled at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(6, 6), nn.ReLU())])
        self.middle, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.middle.rule = EpsilonRule()  # type: ignore[assignment]  # as users set it
        with torch.no_grad():
            for layer in self.branch[::2]:
                layer.weight.abs_().mul_(1e-3)
                layer.bias.fill_(1.0)
            self.middle.weight.abs_()
            self.middle.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(x * 1.0 + self.branch(x)))


@pytest.mark.parametrize("normalization", ["separate", "joint"])
def test_signs_of_the_example_are_no_part_of_a_program(normalization: str) -> None:
    torch.manual_seed(0)
    model = _Weak().eval()
    attributor = AbsLRP(model, normalization=normalization)
    program = attributor.trace(torch.rand(1, 6), 1, contrast=None)
    for _ in range(4):
        x = torch.randn(1, 6) * 3
        expected = attributor.attribute(x, 1, contrast=None)
        torch.testing.assert_close(program(x, 1)[1], expected, rtol=1e-4, atol=1e-5)
