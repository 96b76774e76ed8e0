"""How calls meet their rules: in-place calls, views, reuse, and what comes from outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_abslrp import LRP, AbsLRP, UnsupportedCallError
from captum_abslrp.engine.saved import SavedTensor
from tests.conftest import relative_error


class Calls(nn.Module):
    """A linear layer, some calls, and a linear layer."""

    def __init__(self, calls: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.calls = calls
        self.first, self.last = nn.Linear(6, 8).double(), nn.LazyLinear(3, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.calls(self.first(x)))


def explain(calls: Callable[[Tensor], Tensor], normalization: str = "separate") -> Tensor:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = Calls(calls)
    with torch.no_grad():
        model(x)  # shapes of the lazy layer
    model.last.reset_parameters()
    torch.manual_seed(2)
    nn.init.normal_(model.last.weight)
    relevance: Tensor = AbsLRP(model, normalization=normalization).attribute(x, 1)
    together = torch.cat(
        [AbsLRP(model, normalization=normalization).attribute(i[None], 1) for i in x]
    )
    assert relative_error(relevance, together) < 1e-9
    return relevance


def inplace_add(x: Tensor) -> Tensor:
    y = x.clone()
    y += x.tanh()
    return y


def inplace_on_a_slice(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, :4].relu_()
    return y


def linear_of_rows(x: Tensor) -> Tensor:
    """PyTorch flattens three dimensions to two inside: what it returns is a view."""
    weight = torch.linspace(-1, 2, 16, dtype=x.dtype).view(4, 4)
    return F.linear(x.view(len(x), 2, 4), weight, weight[0])


def inplace_on_a_linear_output(x: Tensor) -> Tensor:
    y = linear_of_rows(x)
    y[:, 1:] = y[:, 1:].relu()
    return y.flatten(1)


def assigned_slice(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, :4] = x[:, :4].relu()
    y[:, 4:] = x[:, 4:]
    return y


def inplace_after_use(x: Tensor) -> Tensor:
    y = x.sigmoid()
    kept = F.gelu(y)
    y.mul_(x)
    return torch.cat([kept, y], 1)


def out_of_place(x: Tensor) -> Tensor:
    y = x.sigmoid()
    return torch.cat([F.gelu(y), y * x], 1)


def constant_changed_after_use(x: Tensor) -> Tensor:
    factor = torch.linspace(-1, 2, 8, dtype=x.dtype)
    y = x * factor
    factor.neg_()
    return y


def changed_before_use(x: Tensor) -> Tensor:
    y = x.tanh()
    y.mul_(x)
    return y.tanh()


def lowered(x: Tensor) -> Tensor:
    y = x.sigmoid()
    y.sub_(0.5)
    return y


def copied_before(x: Tensor) -> Tensor:
    """The layer's output is copied before the ReLU overwrites it."""
    kept = x.clone()
    x.relu_()
    return torch.cat([kept, x], 1)


def halves(y: Tensor) -> Tensor:
    """Sums that are nonnegative if all elements are."""
    return torch.cat([y, y[:, :4] + y[:, 4:]], 1)


def ends_below_zero(x: Tensor) -> Tensor:
    return halves(torch.cat([x[:, :6].sigmoid(), torch.full_like(x[:, :2], -0.6)], 1))


def pairs(x: Tensor) -> Tensor:
    """Signed pairs from a linear layer on nonnegative elements."""
    return linear_of_rows(x.sigmoid()).view(-1, 1, 8)


def resized(x: Tensor) -> Tensor:
    """Bicubic interpolation of nonnegative elements may be negative."""
    return F.interpolate(x.view(-1, 1, 2, 4), scale_factor=2, mode="bicubic").flatten(1)


def use_after_inplace(x: Tensor) -> Tensor:
    F.relu(x, inplace=True)
    return x + x.tanh()


def outputs_given(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    torch.add(x, x.tanh(), out=out)
    return out


SAME = {
    "in-place addition": (inplace_add, lambda x: x + x.tanh()),
    "in-place on a slice": (
        inplace_on_a_slice, lambda x: torch.cat([x[:, :4].relu(), x[:, 4:]], 1),
    ),
    "assigned slices": (assigned_slice, lambda x: torch.cat([x[:, :4].relu(), x[:, 4:]], 1)),
    "in-place on what a call has made a view of": (
        inplace_on_a_linear_output,
        lambda x: torch.cat([(y := linear_of_rows(x))[:, :1], y[:, 1:].relu()], 1).flatten(1),
    ),
    "in-place after use": (inplace_after_use, out_of_place),
    "in-place on a constant after use": (
        constant_changed_after_use, lambda x: x * torch.linspace(-1, 2, 8, dtype=x.dtype),
    ),
    "in-place before use": (changed_before_use, lambda x: (x.tanh() * x).tanh()),
    "in-place below zero": (lowered, lambda x: x.sigmoid() - 0.5),
    "in-place after a copy": (copied_before, lambda x: torch.cat([x, x.relu()], 1)),
    "scaled below zero": (
        lambda x: halves(x.sigmoid() * -2.0), lambda x: halves(-x.sigmoid() * 2.0),
    ),
    "where below zero": (
        lambda x: halves(torch.where(torch.arange(8) < 6, x.sigmoid(), -0.6)), ends_below_zero,
    ),
    "masked below zero": (
        lambda x: halves(x.sigmoid().masked_fill(torch.arange(8) >= 6, -0.6)), ends_below_zero,
    ),
    "padded below zero": (
        lambda x: halves(F.pad(x[:, :6].sigmoid(), (0, 2), value=-0.6)), ends_below_zero,
    ),
    "pooled below zero": (
        lambda x: torch.cat([x, F.max_pool1d(pairs(x), 2).flatten(1)], 1),
        lambda x: torch.cat([x, pairs(x).view(-1, 4, 2).amax(2)], 1),
    ),
    "resized below zero": (lambda x: resized(x.relu()), lambda x: resized(x.relu() + 0.0)),
    "use after in-place": (use_after_inplace, lambda x: x.relu() + x.relu().tanh()),
    "method and function": (lambda x: x.softmax(1), lambda x: F.softmax(x, dim=1)),
    "reflected operators": (lambda x: 2.0 * x + 0.0 * x, lambda x: x * 2.0 + x * 0.0),
    "matmul operators": (
        lambda x: (x[:, None] @ x[:, :, None])[:, 0],
        lambda x: torch.bmm(x[:, None], x[:, :, None])[:, 0],
    ),
    "keyword arguments": (lambda x: torch.add(input=x, other=x.tanh()), lambda x: x + x.tanh()),
    "subclasses of Identity": (lambda x: nn.Identity()(x), lambda x: x),
    "transpose and back": (lambda x: x.T.T, lambda x: x),
    "scaling by a constant": (lambda x: x * 3.0, lambda x: x),
    "scaling by a tensor of one element": (lambda x: x * torch.tensor(3.0), lambda x: x * 3.0),
    "dropout": (lambda x: F.dropout(x, 0.5, False), lambda x: x),
    "out argument": (outputs_given, lambda x: x + x.tanh()),
    "no out argument": (lambda x: torch.add(x, x.tanh(), out=None), lambda x: x + x.tanh()),
    "difference": (lambda x: x - x.tanh(), lambda x: x + -x.tanh()),
    "reflected difference": (lambda x: 1 - x, lambda x: -x + 1),
    "difference with a constant": (lambda x: x - 1, lambda x: x + -1),
    "softmax of what is masked": (
        lambda x: x.masked_fill(torch.arange(8) >= 6, -torch.inf).softmax(1)[:, :6],
        lambda x: x[:, :6].softmax(1),
    ),
    "softmax with a dtype": (
        lambda x: torch.softmax(x, -1, torch.float64), lambda x: x.softmax(-1),
    ),
    "in-place SiLU": (lambda x: F.silu(x.clone(), inplace=True), F.silu),
    "log sigmoid": (lambda x: nn.LogSigmoid()(x), lambda x: torch.nn.functional.logsigmoid(x)),
}  # fmt: skip


@pytest.mark.parametrize("normalization", ["separate", "joint"])
@pytest.mark.parametrize("name", SAME)
def test_two_ways_to_write_the_same_agree(name: str, normalization: str) -> None:
    one, other = SAME[name]
    torch.testing.assert_close(explain(one, normalization), explain(other, normalization))


def test_a_tensor_used_twice_gets_both_shares() -> None:
    doubled = explain(lambda x: torch.cat([x, x], 1))
    stacked = explain(lambda x: x.unsqueeze(1).expand(-1, 2, -1).flatten(1))
    torch.testing.assert_close(doubled, stacked)


def test_a_module_used_twice_is_explained_twice() -> None:
    layer = nn.Linear(5, 5).double()
    x = torch.rand(3, 5, dtype=torch.float64)
    reused = AbsLRP(nn.Sequential(layer, nn.ReLU(), layer)).attribute(x, 1)
    twin = nn.Linear(5, 5).double()
    twin.load_state_dict(layer.state_dict())
    torch.testing.assert_close(
        reused, AbsLRP(nn.Sequential(layer, nn.ReLU(), twin)).attribute(x, 1)
    )


def test_calls_without_relevance_run_untouched() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(1, 5))
            self.layer = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            position = torch.erfinv(self.table.cos().clamp(-0.9, 0.9)).cumsum(1)
            return self.layer(x + position)

    relevance = AbsLRP(Table().double()).attribute(torch.rand(2, 5).double(), 1)
    assert bool(torch.isfinite(relevance).all())


def self_attention(**kwargs: object) -> nn.Module:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.attention = nn.MultiheadAttention(8, 2, **kwargs)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = x if kwargs.get("batch_first") else x.transpose(0, 1)
            y = self.attention(y, y, y)[0]
            return self.head(y if kwargs.get("batch_first") else y.transpose(0, 1)).mean(1)

    return Attention().eval().double()


@pytest.mark.parametrize("normalization", ["separate", "joint"])
def test_multi_head_attention_is_the_same_written_out(normalization: str) -> None:
    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = self_attention(batch_first=True)

    class WrittenOut(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a = model.attention
            qkv = F.linear(x, a.in_proj_weight, a.in_proj_bias)
            q, k, v = (t.reshape(len(x), 6, 2, 4).transpose(1, 2) for t in qkv.chunk(3, -1))
            y = (q * 0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
            return model.head(a.out_proj(y.transpose(1, 2).reshape(len(x), 6, 8))).mean(1)

    of_module = AbsLRP(model, normalization=normalization).attribute(x, 1)
    written_out = AbsLRP(WrittenOut(), normalization=normalization).attribute(x, 1)
    assert relative_error(of_module, written_out) < 1e-6
    sequence_first = self_attention()
    sequence_first.load_state_dict(model.state_dict())
    assert (
        relative_error(
            AbsLRP(sequence_first, normalization=normalization).attribute(x, 1), of_module
        )
        < 1e-9
    )
    one_by_one = [AbsLRP(model, normalization=normalization).attribute(i[None], 1) for i in x]
    assert relative_error(torch.cat(one_by_one), of_module) < 1e-9


@pytest.mark.parametrize("average", [True, False])
def test_attention_weights_are_those_of_the_layer(average: bool) -> None:
    model = self_attention(batch_first=True)
    attention, shown = model.attention, []

    class Showing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y, weights = attention(x, x, x, average_attn_weights=average)
            shown.append(weights)
            return model.head(y).mean(1)

    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    AbsLRP(Showing()).attribute(x, 1)
    torch.testing.assert_close(
        shown[0], attention(x, x, x, average_attn_weights=average)[1].detach()
    )


def test_masked_attention_hands_nothing_to_what_it_does_not_see() -> None:
    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.scaled_dot_product_attention(x, x, x, is_causal=True)[:, 0, 2])

    x = torch.randn(2, 1, 5, 4, dtype=torch.float64)
    relevance = AbsLRP(Causal().double()).attribute(x, 1)
    assert bool(torch.isfinite(relevance).all())
    assert bool((relevance[:, :, 3:] == 0).all())
    assert bool((relevance[:, :, :3] != 0).any())


@pytest.mark.parametrize("masked", [False, True])
def test_transformer_encoder_layer(masked: bool) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            padding = torch.zeros(x.shape[:2], dtype=torch.bool)
            padding[:, -1] = masked
            return self.head(self.layer(x, src_key_padding_mask=padding)[:, 0])

    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = Encoder().eval().double()
    relevance = AbsLRP(model).attribute(x, 1)
    one_by_one = torch.cat([AbsLRP(model).attribute(i[None], 1) for i in x])
    assert relative_error(relevance, one_by_one) < 1e-9
    assert bool((relevance[:, -1] == 0).all()) is masked


def time_by_batch(x: Tensor) -> Tensor:
    rows = x.unflatten(1, (4, 2)).transpose(0, 1).reshape(-1, 2)
    return F.gelu(rows).view(4, len(x), 2).transpose(0, 1).flatten(1)


SHUFFLED = {
    "sequence first": lambda x: F.gelu(x.unflatten(1, (2, 4)).transpose(0, 1)).transpose(0, 1).flatten(1),
    "time by batch": time_by_batch,
    "concatenated": lambda x: torch.cat(F.gelu(torch.cat([x, x.flip(1)])).chunk(2), 1),
    "transposed": lambda x: F.gelu(x.T).T,
    "reversed": lambda x: F.gelu(x.flip(0)).flip(0),
    "windows": lambda x: F.gelu(x.reshape(-1, 4)).reshape(-1, 8),
    "moved there and back": lambda x: F.gelu(x.unflatten(1, (2, 4)).mT.mT.transpose(0, 1).transpose(0, 1))
    .flatten(1),
    "one scale per batch": lambda x: x * torch.tensor([-2.0], dtype=torch.float64),
}  # fmt: skip


@pytest.mark.parametrize("normalization", ["separate", "joint"])
@pytest.mark.parametrize("name", SHUFFLED)
def test_samples_are_kept_apart_wherever_the_model_moves_them(
    name: str, normalization: str
) -> None:
    relevance = explain(SHUFFLED[name], normalization)  # compares with one by one
    assert bool(relevance.any())


class Between(nn.Module):
    """A function between two layers, or behind both. As many samples as features: shapes tell nothing."""

    def __init__(self, function: Callable[[Tensor], Tensor], *, at_the_end: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
        self.function, self.at_the_end = function, at_the_end

    def forward(self, x: Tensor) -> Tensor:
        runs.append(len(x))
        x = self.first(x).relu() + 0.1
        return self.function(self.second(x)) if self.at_the_end else self.second(self.function(x))


runs: list[int] = []
"""The batch sizes that a model was run with."""


def backwards(x: Tensor) -> list[int]:
    return list(range(len(x)))[::-1]


MIXED = {
    "flip": lambda x: x.flip(0),
    "index": lambda x: x[backwards(x)],
    "index_select": lambda x: x.index_select(0, torch.tensor(backwards(x))),
    "gather": lambda x: x.gather(0, torch.tensor(backwards(x))[:, None].expand_as(x)),
    "roll": lambda x: torch.roll(x, 1, 0),
    "roll of all elements": lambda x: torch.roll(x, 1),
    "sort": lambda x: x.sort(0)[0],
    "topk": lambda x: x.topk(len(x), 0)[0],
    "median": lambda x: x - x.median(0)[0],
    "mean": lambda x: x + x.mean(0),
    "mean, kept": lambda x: x + x.mean(dim=0, keepdim=True),
    "mean of all": lambda x: x * torch.mean(x),
    "last but one": lambda x: x + x.sum(axis=-2),
    "amax": lambda x: x - x.amax((0,)),
    "max": lambda x: x - x.max(0)[0],
    "max of all": lambda x: x / x.max(),
    "softmax": lambda x: F.softmax(x, 0),
    "cumsum": lambda x: x.cumsum(0),
    "norm": lambda x: x / x.norm(2, 0).clamp(min=0.1),
    "normalize": lambda x: F.normalize(x, dim=0),
    "std": lambda x: x + x.std(0, correction=0),
    "layer_norm": lambda x: F.layer_norm(x, tuple(x.shape)),
    "logsumexp": lambda x: x.logsumexp(0) + x,
    "cosine_similarity": lambda x: x * F.cosine_similarity(x, x, dim=0),
    "attention": lambda x: (x @ x.T).softmax(-1) @ x,
    "attention in one call": lambda x: F.scaled_dot_product_attention(*[x[None]] * 3)[0],
    "product": lambda x: torch.matmul(x[:, : len(x)], x),
    "weight": lambda x: F.linear(x, torch.ones(4, len(x)).double() @ x),
    "einsum": lambda x: torch.einsum("bi,ci,cj->bj", x, x, x),
    "einsum without a result": lambda x: torch.einsum("ij,kj", x, x).softmax(-1) @ x,
    "laid along features": lambda x: x + x[:, 0] if len(x) > 1 else x + x[:, 0, None],
    "shifted": lambda x: torch.cat([x[:1], x[1:] - x[:-1]]),
}  # fmt: skip


@pytest.mark.parametrize("at_the_end", [False, True])
@pytest.mark.parametrize("name", MIXED)
def test_samples_that_a_model_mixes_are_explained_on_their_own(name: str, at_the_end: bool) -> None:
    attributor = AbsLRP(Between(MIXED[name], at_the_end=at_the_end))
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    runs.clear()
    relevance = attributor.attribute(x, [0, 1, 2, 3], contrast=None)
    assert runs[0] == 4 and runs[1:] == [1] * max(4, len(runs) - 1)
    one_by_one = [attributor.attribute(x[i : i + 1], i, contrast=None) for i in range(4)]
    torch.testing.assert_close(relevance, torch.cat(one_by_one), rtol=0, atol=0)


KEPT_APART = {
    "mean": lambda x: x - x.mean(-1, keepdim=True),
    "softmax": lambda x: x.softmax(1),
    "norms": lambda x: F.normalize(F.layer_norm(x, (4,))),
    "sort": lambda x: x.sort()[0].topk(4)[0],
    "reductions": lambda x: x * (x.std(1, keepdim=True) + x.amax(1, True) + x.norm(dim=1, keepdim=True)),
    "heads": lambda x: torch.einsum("bhi,bhj->bij", *[x.view(-1, 2, 2)] * 2).softmax(-1).flatten(1),
    "positions": lambda x: torch.einsum("...i,ij->...j", x, torch.ones(4, 4).double()) + torch.ones(4),
    "attention": lambda x: F.scaled_dot_product_attention(*[x.view(-1, 2, 2)] * 3).flatten(1),
    "product": lambda x: x @ torch.ones(4, 4).double() * torch.ones(4).double(),
    "product of tokens": lambda x: (torch.ones(2, 2).double() @ x.view(-1, 2, 2)).flatten(1),
    "gate": lambda x: F.glu(torch.cat([x, x], 1)) * x.max(1, keepdim=True)[0],
    "transform of the last of all": lambda x: torch.fft.fftn(x, s=(4,)).real,
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT_APART)
def test_samples_that_a_model_keeps_apart_are_explained_together(name: str) -> None:
    attributor = AbsLRP(Between(KEPT_APART[name], at_the_end=False))
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    runs.clear()
    relevance = attributor.attribute(x, [0, 1, 2, 3], contrast=None)
    assert set(runs) == {4}
    one_by_one = [attributor.attribute(x[i : i + 1], i, contrast=None) for i in range(4)]
    assert relative_error(relevance, torch.cat(one_by_one)) < 1e-9


def test_an_encoder_that_is_sequence_first() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder(x.transpose(0, 1)).transpose(0, 1).mean(1))

    model = Encoder().eval().double()
    for tokens in (4, 6, 8):
        x = torch.randn(4, tokens, 8, generator=torch.Generator().manual_seed(0)).double()
        one_by_one = torch.cat([AbsLRP(model).attribute(i[None], 1) for i in x])
        assert relative_error(AbsLRP(model).attribute(x, 1), one_by_one) < 1e-9


def test_a_query_that_may_see_nothing_is_finite() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.ones(5, 5, dtype=torch.bool)
            mask[-1] = False
            return self.head(F.scaled_dot_product_attention(x, x, x, mask)[:, 0].mean(1))

    x = torch.randn(2, 1, 5, 4, dtype=torch.float64)
    relevance = AbsLRP(Masked().double()).attribute(x)
    assert bool(torch.isfinite(relevance).all())


def test_tensors_made_in_inference_mode_take_part() -> None:
    with torch.inference_mode():
        mask = torch.rand(8) > 0.5
        layer = nn.Linear(6, 8).double()
        head = nn.Linear(8, 3).double()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = layer, head

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            y = torch.where(mask, self.layer(x), 0.0)
            return self.head(y[:, torch.arange(8)].prelu(self.head.weight[0, :1]))

    relevance = AbsLRP(Model()).attribute(torch.rand(2, 6).double(), 1, mask)
    assert bool(torch.isfinite(relevance).all())


def test_a_weight_that_depends_on_the_input_is_not_dropped_silently() -> None:
    with pytest.raises(UnsupportedCallError, match=r"a weight or bias that does as well.*TwinRule"):
        explain(lambda x: F.linear(x, torch.eye(8).double(), x[0]))


def growing_tensors(calls: Callable[[Tensor], Tensor]) -> int:
    """Tensors that stay alive after an attribution, beyond those of the first."""
    import gc

    model, x = Calls(calls), torch.rand(4, 6, dtype=torch.float64)
    with torch.no_grad():
        model(x)

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    AbsLRP(model).attribute(x, 1, contrast=2)
    gc.freeze()  # what there was before is not looked through again
    try:
        before = alive()
        for _ in range(3):
            AbsLRP(model).attribute(x, 1, contrast=2)
        return alive() - before
    finally:
        gc.unfreeze()


@pytest.mark.filterwarnings("ignore:The maps of target and contrast")  # one sum has no classes
@pytest.mark.parametrize("name", SAME)
def test_nothing_stays_in_memory(name: str) -> None:
    assert growing_tensors(SAME[name][0]) <= 0


def test_the_model_is_freed_with_its_last_reference() -> None:
    import gc
    import weakref

    model = nn.Sequential(nn.Linear(6, 3))
    AbsLRP(model).attribute(torch.rand(2, 6), 1)
    gc.collect()
    gc.disable()
    try:
        AbsLRP(model).attribute(torch.rand(2, 6), 1)
        reference = weakref.ref(model)
        del model
        assert reference() is None
    finally:
        gc.enable()


def test_a_branch_that_is_not_used_is_freed_without_the_garbage_collector() -> None:
    import gc

    model = Calls(lambda x: (x.softmax(1).tanh(), x.relu())[1])
    x = torch.rand(2, 6, dtype=torch.float64)
    with torch.no_grad():
        model(x)

    def alive() -> int:
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    AbsLRP(model).attribute(x, 1)
    gc.collect()
    gc.disable()
    try:
        before = alive()
        AbsLRP(model).attribute(x, 1)
        assert alive() == before
    finally:
        gc.enable()


def test_memory_is_freed_without_the_garbage_collector() -> None:
    import gc
    import weakref

    model = Calls(lambda x: x.relu())
    x = torch.rand(2, 6, dtype=torch.float64)
    with torch.no_grad():
        model(x)
    seen: list[weakref.ref[Tensor]] = []
    model.calls = lambda x: seen.append(weakref.ref(x)) or x.relu()  # type: ignore[func-returns-value]
    gc.collect()
    gc.disable()
    try:
        AbsLRP(model).attribute(x, 1)
        assert seen and all(ref() is None for ref in seen)
    finally:
        gc.enable()


class _Overwriting(nn.Module):
    """Overwrites the output of a layer, which another tensor may look at."""

    def __init__(self, look: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.look, self.layer, self.head = look, nn.Linear(6, 6), nn.Linear(6, 3)
        self.in_place = True

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        if self.in_place:
            seen = self.look(h)
            h.relu_()
            h += x
        else:
            h = self.layer(x).relu() + x
            seen = self.look(h)
        return self.head(h) + seen.detach().sum()


class _Later:
    """The memory of a tensor, which is looked at when it is asked for."""

    def __init__(self, storage: torch.UntypedStorage, shape: torch.Size) -> None:
        self.storage, self.shape = storage, shape

    def detach(self) -> Tensor:
        return torch.empty(0).set_(self.storage, 0, self.shape)


LOOKS: dict[str, Callable[[Tensor], Any]] = {
    "at nothing": torch.zeros_like,
    "by detach": lambda h: h.detach(),
    "by data": lambda h: h.data,
    "by a view": lambda h: h.detach().view(-1),
    "by NumPy": lambda h: torch.from_numpy(h.detach().numpy()),
    "by its memory": lambda h: torch.empty(0).set_(h.detach().untyped_storage()),
    "by its memory, later": lambda h: _Later(h.untyped_storage(), h.shape),
}


@pytest.mark.filterwarnings("ignore:The output of the model depends on a tensor that is detached")
@pytest.mark.parametrize("look", LOOKS)
def test_what_looks_at_memory_sees_what_overwrites_it(
    look: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x = _Overwriting(LOOKS[look]).eval(), torch.rand(4, 6)
    clones = []
    release = SavedTensor.release
    monkeypatch.setattr(
        SavedTensor, "release", lambda saved: (clones.append(saved), release(saved))
    )
    # A constant of the score changes a map that starts as the logit.
    relevance, delta = LRP(model, "epsilon").attribute(x, 1, return_convergence_delta=True)
    assert bool(clones) == (look != "at nothing")  # a copy is made where somebody else looks
    model.in_place = False
    expected, of_expected = LRP(model, "epsilon").attribute(x, 1, return_convergence_delta=True)
    torch.testing.assert_close(relevance, expected)
    torch.testing.assert_close(delta, of_expected)


def test_a_buffer_keeps_its_memory() -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.register_buffer("kept", torch.zeros(2, 3))

        def forward(self, x: Tensor) -> Tensor:
            self.kept.zero_()
            self.kept += self.layer(x)
            self.kept.relu_()
            self.kept += x
            return self.kept * 1

    model, x = Keeping().eval(), torch.rand(2, 3)
    memory, before = model.kept.data_ptr(), model.kept.clone()
    LRP(model, "epsilon").attribute(x, 1)
    assert model.kept.data_ptr() == memory
    assert torch.equal(model.kept, before)
