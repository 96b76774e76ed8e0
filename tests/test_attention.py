"""Attention that is answered at once is the attention of its parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_abslrp import AbsLRP
from captum_abslrp.mappings import get_mapping
from captum_abslrp.rules import PassThroughRule, TwinRule, attention
from tests.conftest import relative_error

TOKENS, HEADS, WIDTH = 6, 4, 3


class Attention(nn.Module):
    """Attention with options of its own, between two linear layers."""

    def __init__(self, key_heads: int = HEADS, **options: Any) -> None:
        super().__init__()
        self.heads = (HEADS, key_heads, key_heads)
        self.options = options
        self.qkv = nn.Linear(5, WIDTH * sum(self.heads))
        self.head = nn.Linear(HEADS * TOKENS * WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).split([WIDTH * n for n in self.heads], -1)
        q, k, v = (
            t.unflatten(-1, (n, WIDTH)).transpose(1, 2)
            for t, n in zip(parts, self.heads, strict=True)
        )
        return self.head(F.scaled_dot_product_attention(q, k, v, **self.options).flatten(1))


MASK = torch.rand(3, 1, TOKENS, TOKENS, generator=torch.Generator().manual_seed(0)) < 0.7
BLIND = MASK.clone()
BLIND[1, :, 2] = False  # a query that sees nothing
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": -0.3},
    "causal": {"is_causal": True},
    "mask": {"attn_mask": MASK[0, 0]},
    "mask, four dimensions": {"attn_mask": MASK[:1]},
    "mask of each sample": {"attn_mask": MASK},
    "mask of all tokens": {"attn_mask": BLIND},
    "grouped heads": {"key_heads": 2, "enable_gqa": True},
}


@pytest.mark.parametrize("blocks", [4, 100, 2**18])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mapping", ["generic", "vit"])
@pytest.mark.parametrize("normalization", ["separate", "joint"])
def test_at_once_and_part_by_part(
    case: str, mapping: str, blocks: int, normalization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Attention(**CASES[case]).double()
    x = torch.randn(3, TOKENS, 5).double()
    monkeypatch.setitem(attention.BLOCK, "cpu", blocks)
    monkeypatch.setattr(attention, "ROWS", 1)
    calls: list[int] = []
    at_once = attention.attention

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return at_once(*args, **kwargs)

    monkeypatch.setattr(attention, "attention", counted)
    attributor = AbsLRP(model, mapping=mapping, normalization=normalization)
    maps = attributor.attribute(x, 1)
    assert calls == [1]
    monkeypatch.setattr(attention, "_stabilized", lambda call: None)
    assert relative_error(maps, attributor.attribute(x, 1)) < 1e-9
    assert calls == [1]


class Partly(nn.Module):
    """Attention in which only some of query, key and value depend on the input, beside the input itself."""

    def __init__(self, kinds: str) -> None:
        super().__init__()
        self.kinds = kinds
        self.projections = nn.ModuleList(nn.Linear(5, WIDTH) for _ in range(3))
        self.beside = nn.Linear(5, WIDTH)
        self.constants = nn.Parameter(torch.randn(3, 1, TOKENS, WIDTH))
        self.head = nn.Linear(TOKENS * WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unsqueeze(1) if kind in self.kinds else constant.expand(len(x), -1, -1, -1)
            for kind, layer, constant in zip("qkv", self.projections, self.constants, strict=True)
        )
        attended = F.scaled_dot_product_attention(q, k, v, scale=-0.4).flatten(1)
        return self.head(attended + self.beside(x).flatten(1))


@pytest.mark.parametrize("kinds", ["q", "k", "v", "qk", "qv", "kv", "qkv"])
@pytest.mark.parametrize("normalization", ["separate", "joint"])
def test_constants_get_nothing(
    kinds: str, normalization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    model, x = Partly(kinds).double(), torch.randn(3, TOKENS, 5).double()
    attributor = AbsLRP(model, normalization=normalization)
    maps = attributor.attribute(x, 1)
    monkeypatch.setattr(attention, "_stabilized", lambda call: None)
    assert relative_error(maps, attributor.attribute(x, 1)) < 1e-9


def test_parts_with_rules_of_their_own_are_answered_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("answered at once")

    torch.manual_seed(0)
    monkeypatch.setattr(attention, "attention", refused)
    model, x = Attention(), torch.randn(2, TOKENS, 5)
    for name, rule in (("softmax", TwinRule()), ("mul", PassThroughRule())):
        mapping = get_mapping().extended({name: rule})
        assert AbsLRP(model, mapping=mapping).attribute(x, 1).isfinite().all()
    with pytest.raises(AssertionError, match="at once"):
        AbsLRP(model).attribute(x, 1)
