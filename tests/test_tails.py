"""The tail of the score: what the model does to it behind the last layer with weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_abslrp import AbsLRP, LayerAbsLRP, trace_relevance
from captum_abslrp.engine.calls import Call
from captum_abslrp.mappings import get_mapping
from captum_abslrp.rules import AbsLRPRule, Record, Rule
from tests.conftest import relative_error

Tail = Callable[[Tensor], Tensor]
COMBINATIONS = [(n, c) for n in ("separate", "joint") for c in ("others", None, 3)]


class Scored(nn.Module):
    """Logits of four classes, and a function of them."""

    def __init__(self, tail: Tail, *, out: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(4 * 36, out)
        self.tail = tail
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.head(self.features(x)))


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def logits(z: Tensor) -> Tensor:
    return z


WHOLE: dict[str, Tail] = {
    "sigmoid": torch.sigmoid,
    "in place": lambda z: z.add_(1).sigmoid_(),
    "softmax": lambda z: z.softmax(1),
    "log_softmax": lambda z: F.log_softmax(z, dim=1),
    "half": lambda z: z / 2,
    "a tenth": lambda z: 0.1 * z,
    "temperature": lambda z: z / torch.tensor([1.5], dtype=torch.float64),
    "a constant": lambda z: z + 3,
    "a constant less": lambda z: z - torch.linspace(-5, 5, 4, dtype=torch.float64),
    "calibration": lambda z: z * torch.linspace(1, 2, 4, dtype=torch.float64) - 1,
    "soft capping": lambda z: torch.tanh(z / 5) * 5,
    "exp": torch.exp,
    "softplus, log": lambda z: F.softplus(z).log(),
    "leaky": lambda z: F.leaky_relu(z, 0.2),
    "twice negative": lambda z: torch.neg(-z),
    "from one, twice": lambda z: 1 - (1 - z),
    "batch norm": lambda z: F.batch_norm(z, torch.ones(4).double(), torch.ones(4).double()),
    "normalize": lambda z: F.normalize(z, dim=1),
    "by its norm": lambda z: z / z.norm(dim=1, keepdim=True),
    "the same twice": lambda z: (z + z) / 2,
    "mean of the same": lambda z: torch.stack([z, z]).mean(0),
    "mean over crops": lambda z: z[:, None].expand(-1, 5, -1).mean(1),
    "max over crops": lambda z: z[:, None].repeat(1, 5, 1).amax(1),
    "max pooling": lambda z: F.max_pool1d(z[..., None].repeat(1, 1, 4), 4)[..., 0],
    "moved": lambda z: z.flip(1)[:, [3, 2, 1, 0]].t().contiguous().t(),
    "three of them": lambda z: (torch.sigmoid(z / 2) + 1).log(),
}


@pytest.mark.parametrize(("normalization", "contrast"), COMBINATIONS)
@pytest.mark.parametrize("name", WHOLE)
def test_the_map_of_a_score_is_that_of_its_logit(
    name: str, normalization: str, contrast: str | int | None
) -> None:
    def explain(tail: Tail) -> Tensor:
        attributor = AbsLRP(Scored(tail), normalization=normalization)
        relevance: Tensor = attributor.attribute(images(), [0, 1, 2], contrast=contrast)
        return relevance

    assert relative_error(explain(WHOLE[name]), explain(logits)) < 1e-9


@pytest.mark.parametrize("name", ["sigmoid", "softmax", "log_softmax"])
def test_the_softmax_contrast_weighs_by_probability(name: str) -> None:
    maps = [
        AbsLRP(Scored(tail)).attribute(images(), 1, contrast="softmax")
        for tail in (WHOLE[name], logits)
    ]
    assert relative_error(*maps) < 1e-9


LOWERS: dict[str, Tail] = {
    "1 - d": lambda d: 1 - d,
    "-d": lambda d: -d,
    "d * -2": lambda d: d * -2,
    "exp(-d)": lambda d: torch.exp(-d),
    "d / -3": lambda d: d / -3,
    "sub": lambda d: torch.sub(torch.ones(4).double(), d),
}


@pytest.mark.parametrize("normalization", ["separate", "joint"])
@pytest.mark.parametrize("name", LOWERS)
def test_what_lowers_a_distance_speaks_for_a_score_that_falls_with_it(
    name: str, normalization: str
) -> None:
    (falling, delta), (rising, _) = (
        AbsLRP(Scored(tail), normalization=normalization).attribute(
            images(), 1, contrast=None, return_convergence_delta=True
        )
        for tail in (LOWERS[name], logits)
    )
    assert relative_error(-falling, rising) < 1e-9
    assert delta.abs().max() < 1e-6  # the sums are -1 where the seeds have become -1


class TwoHeads(Scored):
    def __init__(self, together: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(logits)
        torch.manual_seed(3)
        self.other = nn.Linear(4 * 36, 4).double()
        self.together = together

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.together(self.head(x), self.other(x))


HEADS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float]] = {
    "sum": (lambda a, b: a + b, 1),
    "mean": (lambda a, b: (a + b) / 2, 1),
    "mean of a stack": (lambda a, b: torch.stack([a, b]).mean(0), 1),
    "mean of a list": (lambda a, b: sum([a, b]) / 2, 1),  # type: ignore[arg-type,return-value]
    "difference": (lambda a, b: a - b, -1),
}


@pytest.mark.parametrize("name", HEADS)
def test_two_heads_share_by_their_magnitudes(name: str) -> None:
    together, sign = HEADS[name]
    model = TwoHeads(together)
    x = images()
    heads = LayerAbsLRP(model, model.head), LayerAbsLRP(model, model.other)
    first, second = (h.attribute(x, 2, contrast=None) for h in heads)
    features = model.features(x)
    a, b = model.head(features)[:, 2].detach(), model.other(features)[:, 2].detach()
    torch.testing.assert_close(first[:, 2], a.abs() / (a.abs() + b.abs()), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        second[:, 2], sign * b.abs() / (a.abs() + b.abs()), rtol=1e-6, atol=0
    )
    assert first[:, [0, 1, 3]].abs().max() == 0


class Segmented(nn.Module):
    """Logits of three classes at each place, resized to the image."""

    def __init__(self, resize: Tail) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 3, 1))
        self.resize = resize
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.resize(self.features(x))


RESIZED: dict[str, Tail] = {
    "bilinear": lambda z: F.interpolate(z, scale_factor=2, mode="bilinear"),
    "bicubic": lambda z: F.interpolate(z, scale_factor=2, mode="bicubic"),
    "nearest": lambda z: F.interpolate(z, scale_factor=2),
    "shuffled": lambda z: F.pixel_shuffle(z.repeat_interleave(4, 1), 2),
    "softmax of bilinear": lambda z: F.interpolate(z, size=(8, 8), mode="bilinear").softmax(1),
}


@pytest.mark.parametrize("name", RESIZED)
def test_resized_logits_keep_their_relevance(name: str) -> None:
    model = Segmented(RESIZED[name])
    x = images()
    output = model(x)
    for k in range(3):
        of_logits = LayerAbsLRP(model, model.features).attribute(x, (k, 3, 4), contrast=None)
        total = torch.ones(3, dtype=torch.float64)
        torch.testing.assert_close(of_logits.sum((1, 2, 3)), total, rtol=1e-6, atol=0)
        assert of_logits.min() >= 0
        assert of_logits[:, [c for c in range(3) if c != k]].abs().max() == 0
        relevance = AbsLRP(model).attribute(x, (k, 3, 4), contrast=None)
        assert (relevance.flatten(1).abs().sum(1) > 0.1).all()
    assert (output[:, :, 3, 4] < 0).any() or "softmax" in name  # negative logits are among them


class Compared(nn.Module):
    """A score of two networks on one image."""

    def __init__(self, score: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = Scored(logits), TwoHeads(lambda a, b: b)
        self.score = score

    def forward(self, x: Tensor) -> Tensor:
        return self.score(self.a(x), self.b(x))


SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "1 - cosine": lambda a, b: (1 - F.cosine_similarity(a, b))[:, None],
    "cosine": lambda a, b: F.cosine_similarity(a, b)[:, None],
    "euclidean": lambda a, b: -(a - b).norm(dim=1, keepdim=True),
    "squared": lambda a, b: (a - b).square().sum(1, keepdim=True),
    "absolute": lambda a, b: (a - b).abs().mean(1, keepdim=True),
    "to a prototype": lambda a, b: -(a - torch.ones(4).double()).pow(2).sum(1, keepdim=True),
    "logsumexp": lambda a, b: torch.logsumexp(torch.cat([a, b], 1), 1, keepdim=True),
    "maximum": lambda a, b: torch.maximum(a, b),
    "minimum": lambda a, b: torch.minimum(a, b),
    "mean of sigmoids": lambda a, b: (a.sigmoid() + b.sigmoid()) / 2,
    "pooled": lambda a, b: F.adaptive_avg_pool1d(torch.stack([a, b], 2), 1).flatten(1),
}


@pytest.mark.filterwarnings("error:The map of the")
@pytest.mark.parametrize("normalization", ["separate", "joint"])
@pytest.mark.parametrize("name", SCORES)
def test_no_score_has_a_map_of_zeros(name: str, normalization: str) -> None:
    model = Compared(SCORES[name]).eval()
    x = images(6)
    attributor = AbsLRP(model, normalization=normalization)
    for k in range(model(x).shape[1]):
        relevance = attributor.attribute(x, k, contrast=None)
        assert (relevance.flatten(1).abs().sum(1) > 0.1).all()
        singles = torch.cat([attributor.attribute(i[None], k, contrast=None) for i in x])
        assert relative_error(relevance, singles) < 1e-9


def test_a_rule_of_the_users_holds_on_the_tail() -> None:
    model = Scored(logits)
    activated = nn.Sequential(model, nn.Sigmoid()).double().eval()
    nn.init.constant_(model.head.bias, -10)
    x, negative = images(), 0
    of_logit = AbsLRP(model).attribute(x, negative, contrast=None)
    assert relative_error(AbsLRP(activated).attribute(x, negative, contrast=None), of_logit) < 1e-9
    activated[1].rule = AbsLRPRule()
    with pytest.warns(UserWarning, match=r"The map of the target is zero for 3 of 3 .*sigmoid"):
        by_rule = AbsLRP(activated).attribute(x, negative, contrast=None)
    assert by_rule.abs().max() == 0
    del activated[1].rule
    own = get_mapping().extended({"sigmoid": AbsLRPRule()})
    with pytest.warns(
        UserWarning, match=r"first for sample 0: its relevance ends at `torch.sigmoid`"
    ):
        assert AbsLRP(activated, own).attribute(x, negative, contrast=None).abs().max() == 0


def test_a_call_whose_output_is_also_used_elsewhere_is_not_on_the_tail() -> None:
    class Residual(Scored):
        def forward(self, x: Tensor) -> Tensor:
            z = self.head(self.features(x)).tanh()
            return z + z @ torch.eye(4).double()

    trace = trace_relevance(Residual(logits), images(), 0)
    assert [c.call.split(".")[-1] for c in trace.calls[:3]] == ["add", "matmul", "tanh"]


DEAD: dict[str, tuple[nn.Module, str]] = {
    "no positive contribution": (nn.Linear(4, 2), "linear` in `2` (Linear)"),
    "only the other class": (nn.Linear(4, 2), "linear` in `2` (Linear)"),
    "behind a sigmoid": (nn.Sequential(nn.Linear(4, 2), nn.Sigmoid()), "linear` in `2.0` (Linear)"),
}


@pytest.mark.parametrize("name", DEAD)
def test_a_map_of_zeros_is_warned_about(name: str) -> None:
    head, where = DEAD[name]
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), head).eval()
    linear = head if isinstance(head, nn.Linear) else head[0]
    assert isinstance(linear, nn.Linear)
    nn.init.constant_(model[0].weight, 0.5)
    nn.init.constant_(linear.weight, 1.0)
    dead = 1 if name == "only the other class" else 0
    linear.weight.data[dead] *= -1
    kind = "contrast" if dead else "target"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        AbsLRP(model).attribute(torch.rand(2, 3), 0)
    (message,) = (str(w.message) for w in seen)
    assert message.startswith(f"The map of the {kind} is zero for 2 of 2 samples")
    assert where in message
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an image of zeros has a map of zeros
        AbsLRP(model).attribute(torch.zeros(2, 3), 0)


def test_a_layer_that_relevance_ends_before_is_warned_about() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    nn.init.constant_(model[0].weight, 0.5)
    nn.init.constant_(model[2].weight, -1.0)
    with pytest.warns(UserWarning, match=r"The map of the target is zero.*`2` \(Linear\)"):
        LayerAbsLRP(model, model[0]).attribute(torch.rand(2, 3), 0, contrast=None)


def test_a_layer_that_relevance_goes_past_is_not() -> None:
    class Past(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.unused(x)
            return self.used(x)

    model = Past()
    assert LayerAbsLRP(model, model.unused).attribute(torch.rand(2, 3), 0).abs().max() == 0


OFFSETS: dict[str, tuple[Tail, Tail]] = {
    "softmax, shifted": (lambda z: (z - z.max(1, keepdim=True)[0]).softmax(1), logits),
    "softmax by hand": (
        lambda z: (e := (z - z.amax(1, keepdim=True)).exp()) / e.sum(1, keepdim=True),
        logits,
    ),
    "log_softmax by hand": (lambda z: z - z.logsumexp(1, keepdim=True), logits),
    "centered": (lambda z: z - z.mean(1, keepdim=True), logits),
    "softmin": (lambda z: F.softmin(-z, dim=1), logits),
    "logit": (lambda z: torch.logit(z.sigmoid()), logits),
    "arctan": (lambda z: torch.arctan(z), logits),
    "rsub": (lambda z: torch.rsub(z, 1), lambda z: 1 - z),
    "rsub, alpha": (lambda z: torch.rsub(z, 1, alpha=2), lambda z: 1 - 2 * z),
    "rsub of a tensor": (lambda z: torch.rsub(z, torch.full_like(z, 2.0)), lambda z: 2 - z),
    "scattered": (
        lambda z: torch.zeros_like(z).scatter_add(1, torch.tensor([[0, 1, 2, 3]] * len(z)), z),
        logits,
    ),
    "index_add of crops": (
        lambda z: torch.zeros_like(z).index_add(1, torch.arange(4).repeat(2), z.repeat(1, 2)),
        logits,
    ),
    "a margin": (
        lambda z: z.scatter_add(1, torch.zeros(len(z), 1).long(), torch.full((len(z), 1), -0.3).double()),
        logits,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("normalization", "contrast"), COMBINATIONS)
@pytest.mark.parametrize("name", OFFSETS)
def test_what_all_classes_share_is_an_offset(
    name: str, normalization: str, contrast: str | int | None
) -> None:
    maps = [
        AbsLRP(Scored(tail), normalization=normalization).attribute(
            images(), [0, 1, 2], contrast=contrast
        )
        for tail in OFFSETS[name]
    ]
    assert relative_error(*maps) < 1e-9


def test_zero_maps_of_parts_of_a_batch_are_warned_about_once() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    for layer in (model[0], model[2]):
        nn.init.constant_(layer.weight, 0.5)
        nn.init.constant_(layer.bias, 0.0)
    x = torch.tensor([[1.0, 1, 1], [2, 2, 2], [-1, -1, -1], [-2, -2, -2]])
    for size in (None, 1, 3):
        with pytest.warns(UserWarning, match="zero for 2 of 4 samples, first for sample 2") as seen:
            AbsLRP(model).attribute(x, 0, contrast=None, internal_batch_size=size)
        assert len(seen) == 1


class Unscaled(Rule):
    """A linear layer whose relevance is left as it is."""

    def record(self, call: Call) -> Record:
        x, weight = call.args[:2]
        w = call.save(weight)
        output = call.run(lambda: call.func(*call.args, **call.kwargs))
        return Record(output, [x], lambda s: [s @ w().abs()], scaled=False)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_score_of_zero_behind_a_relu_has_no_relevance_whatever_the_rule_before(
    inplace: bool,
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace)), torch.randn(3, 4)
    at_zero = model(x).argmin(1)
    mapping = get_mapping().extended({"linear": Unscaled()})
    with pytest.warns(UserWarning, match="The map of the target is zero"):
        relevance = AbsLRP(model, mapping).attribute(x, at_zero, contrast=None)
    assert not relevance.any()
