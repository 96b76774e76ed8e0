"""The definition behind the fuzzing, on the tail of a network: numbers that were computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.networks import (
    KINDS,
    Definition,
    Program,
    Step,
    Value,
    by_gradient,
    by_magnitude,
    by_share,
    by_sign,
    by_slope,
    defined,
)
from tests.test_fuzzing import by_definition


def values(*numbers: Any) -> Value:
    """One sample."""
    return Value(torch.tensor([numbers], dtype=torch.float64))


def of(d: Definition, output: Value, x: Value, seed: Any, *, joint: bool = False) -> Any:
    """Relevance of a value, of the one sample."""
    seed = torch.tensor([seed], dtype=torch.float64)
    return d.relevance(output, x, [seed], joint=joint)[0][0].tolist()


def applied(kind: str, d: Definition, *xs: Value, weights: Any = (), **options: Any) -> Value:
    return KINDS[kind].values(d, weights, xs, options)[0]


def scored(d: Definition, x: Value) -> Value:
    """Two scores of (1, 2): -3 = 1 - 4 and 2.5 = 0.5 + 2."""
    weight = torch.tensor([[1.0, -2.0], [0.5, 1.0]], dtype=torch.float64)
    return d.call(lambda w, t: F.linear(t, w[0]), x, weights=[weight])


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("kind", ["sigmoid", "tanh", "exp", "softplus", "clamp", "softsign"])
def test_a_function_that_rises_passes_relevance_whole(kind: str, joint: bool) -> None:
    for seed, expected in (([1, 0], [1, 0]), ([0, 1], [0.2, 0.8])):
        d, x = Definition(tails=True), values(1.0, 2.0)
        output = applied(kind, d, scored(d, x))
        assert of(d, output, x, seed, joint=joint) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["relu", "relu in place", "clamp at 0"])
def test_a_score_that_relu_makes_zero_has_no_map(kind: str) -> None:
    for seed, expected in (([1, 0], [0, 0]), ([0, 1], [0.2, 0.8])):
        d, x = Definition(tails=True), values(1.0, 2.0)
        assert of(d, applied(kind, d, scored(d, x)), x, seed) == pytest.approx(expected)


def test_factors_share_by_halves_whatever_their_signs() -> None:
    d, a, b = Definition(tails=True), values(-2.0, 1.0), values(1.0, 3.0)
    output = applied("mul", d, a, b)
    assert of(d, output, a, [0.4, 0.6]) == of(d, output, b, [0.4, 0.6]) == [0.2, 0.3]


def test_without_a_tail_a_negative_score_behind_a_sigmoid_has_no_map() -> None:
    d, x = Definition(tails=False), values(1.0, 2.0)
    assert of(d, applied("sigmoid", d, scored(d, x)), x, [1, 0]) == [0, 0]


def test_where_a_function_falls_relevance_is_negative() -> None:
    d, x = Definition(tails=True), values(-2.0, 3.0, 0.0)
    assert of(d, applied("square", d, x), x, [1, 0.5, 2]) == [-1, 0.5, 2]
    d, x = Definition(tails=True), values(-2.0, 1.0)
    assert of(d, applied("gelu", d, x), x, [1, 1]) == [-1, 1]
    d, x = Definition(tails=True), values(-2.0, 1.0)
    assert of(d, applied("neg", d, x), x, [1, -0.5]) == [-1, 0.5]


def test_two_heads_share_by_magnitude() -> None:
    for kind, sign in (("add", 1), ("sub", -1)):
        d, a, b = Definition(tails=True), values(-3.0, 0.0), values(1.0, 0.0)
        output = applied(kind, d, a, b)
        assert of(d, output, a, [1, 1]) == [0.75, 0]
        assert of(d, output, b, [1, 1]) == [sign * 0.25, 0]
    d, a, b = Definition(tails=True), values(-3.0), values(1.0)
    output = applied("add alpha", d, a, b)  # a + 2 b
    assert of(d, output, a, [1]) == [0.6]
    assert of(d, output, b, [1]) == [0.4]


def test_two_heads_with_weights_each_get_a_map() -> None:
    d, x = Definition(tails=True), values(1.0, 2.0)
    first = scored(d, x)
    swapped = torch.tensor([[1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)
    second = d.call(lambda w, t: F.linear(t, w[0]), x, weights=[swapped])  # 3, 1
    output = applied("add", d, first, second)
    # Of the first score each head gets half: all to the first feature, and a third and two thirds.
    assert of(d, output, x, [1, 0], joint=True) == pytest.approx([0.5 + 0.5 / 3, 1 / 3])
    # "separate" scales what each of the two layers hands to its input to one.
    assert of(d, output, x, [1, 0]) == pytest.approx([1 + 1 / 3, 2 / 3])


def test_a_broadcast_summand_gets_the_sum() -> None:
    d, a, b = Definition(tails=True), values([1.0, 3.0], [-1.0, 1.0]), values([1.0, -1.0])
    output = d.call(lambda v, a, b: a + b, a, b, tail=by_magnitude)
    assert of(d, output, a, [[1, 1], [1, 1]]) == [[0.5, 0.75], [0.5, 0.5]]
    assert of(d, output, b, [[1, 1], [1, 1]]) == [[1, 0.75]]


def test_the_mean_of_crops_shares_by_magnitude() -> None:
    d, x = Definition(tails=True), values([-2.0, 0.0], [6.0, 0.0])
    output = applied("mean", d, x, dim=1, keepdim=False)
    assert of(d, output, x, [1, 1]) == [[0.25, 0], [0.75, 0]]
    d, a, b = Definition(tails=True), values(-2.0), values(6.0)
    assert of(d, applied("mean of two", d, a, b), b, [1]) == [0.75]


def test_a_cumulative_sum() -> None:
    d, x = Definition(tails=True), values(1.0, -3.0)
    assert of(d, applied("cumsum", d, x, dim=1), x, [1, 1]) == [1.25, 0.75]


def test_a_constant_summand_takes_no_part() -> None:
    for kind, sign in (("add number", 1), ("sub number", 1), ("number less", -1)):
        d, x = Definition(tails=True), values(-3.0, 4.0)
        assert of(d, applied(kind, d, x, c=2.0), x, [1, 0.5]) == [sign, sign * 0.5]


def test_one_minus_a_distance_keeps_its_sign_down_to_the_input() -> None:
    d, x = Definition(tails=True), values(1.0, 2.0)
    output = applied("number less", d, scored(d, x), c=1.0)
    assert of(d, output, x, [0, 1]) == pytest.approx([-0.2, -0.8])


def test_one_minus_the_cosine_to_a_prototype() -> None:
    # (3, 4) / 5 and the prototype (0, 2) / 2, and one that is opposite.
    d, x = Definition(tails=True), values(3.0, 4.0)
    prototypes = torch.tensor([[0.0, 2.0], [-3.0, -4.0]], dtype=torch.float64)
    cosine = applied("cosine to prototypes", d, x, weights=[prototypes], out=2)
    output = applied("number less", d, cosine, c=1.0)
    assert output.data.tolist() == [pytest.approx([0.2, 2.0])]
    # 1 - 0.8: all of the product is in the second feature. 1 + 1: shares 9 / 25 and 16 / 25, and each
    # feature lowers the cosine.
    assert of(d, output, x, [1, 0]) == pytest.approx([0, -1])
    assert of(d, output, x, [0, 1]) == pytest.approx([0.36, 0.64])


@pytest.mark.parametrize(
    ("mode", "at", "expected"),
    [
        ("nearest", (0, 1), [1, 0]),
        ("nearest", (1, 2), [0, 1]),
        ("bilinear", (0, 0), [1, 0]),  # a
        ("bilinear", (1, 1), [0.5, 0.5]),  # 0.75 a + 0.25 b, with a = 1 and b = -3
        ("bilinear", (0, 2), [0.1, 0.9]),  # 0.25 a + 0.75 b
    ],
)
def test_an_upsampled_map(mode: str, at: tuple[int, int], expected: list[float]) -> None:
    d, x = Definition(tails=True), values([[1.0, -3.0]])
    output = applied("interpolate", d, x, mode=mode)
    seed = torch.zeros(1, 2, 4)
    seed[(0, *at)] = 1
    assert of(d, output, x, seed.tolist()) == [[pytest.approx(expected)]]


def test_a_factor_passes_its_sign() -> None:
    d, x = Definition(tails=True), values([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    factor = torch.tensor([2.0, -0.1, 0.0], dtype=torch.float64)
    output = d.call(lambda w, t: t * w[0], x, weights=[factor], tail=by_sign)
    assert of(d, output, x, [[1, 1, 1], [0, 2, 2]]) == [[1, -1, 0], [0, -2, 0]]
    d, x = Definition(tails=True), values(1.0, 2.0)  # broadcast along a new dimension
    output = d.call(lambda w, t: t * w[0], x, weights=[factor[:, None]], tail=by_sign)
    assert of(d, output, x, [[1, 0], [1, 1], [1, 1]]) == [0, -1]


def test_a_divisor_is_a_constant() -> None:
    d, x, y = Definition(tails=True), values(-1.0, 2.0), values(5.0, -7.0)
    output = applied("divided", d, x, y)
    assert of(d, output, x, [1, 1]) == [1, 1]
    assert of(d, output, y, [1, 1]) == [0, 0]
    d, x = Definition(tails=True), values(3.0, -4.0)
    assert of(d, applied("normalize", d, x), x, [1, 0.5]) == [1, 0.5]


def test_masks_and_integers_are_factors() -> None:
    d, x = Definition(tails=True), values(-1.0, 2.0)
    assert of(d, applied("times what is positive", d, x), x, [1, 1]) == [0, 1]
    d, x = Definition(tails=True), values(*range(1, 7))
    output = applied("times integers", d, x, dtype="int64")  # 2, -1, 3, 1, -2, 0
    assert of(d, output, x, [1] * 6) == [1, -1, 1, 1, -1, 0]


def test_softmax_and_its_logarithm_pass_relevance_whole() -> None:
    for kind in ("softmax", "log_softmax"):
        d, x = Definition(tails=True), values(-50.0, 0.0)
        assert of(d, applied(kind, d, x, dim=1), x, [1, 0.5]) == [1, 0.5]


def test_maxima_go_by_their_gradient() -> None:
    d, x = Definition(tails=True), values([-1.0, -2.0], [-3.0, 5.0])
    for kind, expected in (("amax", [[1, 0], [0, 1]]), ("amin", [[0, 1], [1, 0]])):
        assert of(d, applied(kind, d, x, dim=1, keepdim=False), x, [1, 1]) == expected
    d, x = Definition(tails=True), values([0.0], [3.0])
    share = 1 / (1 + torch.e**3)
    output = applied("logsumexp", d, x, dim=1, keepdim=False)
    assert of(d, output, x, [1]) == [[pytest.approx(share)], [pytest.approx(1 - share)]]
    d, a, b = Definition(tails=True), values(-1.0, 2.0), values(-2.0, 3.0)
    assert of(d, applied("maximum", d, a, b), a, [1, 1]) == [1, 0]


def test_a_call_is_on_the_tail_if_all_of_its_paths_are() -> None:
    d, x = Definition(tails=True), values(1.0, 2.0)
    z = scored(d, x)  # 0
    gate = d.call(lambda w, t: t.sigmoid(), z, tail=by_slope)  # 1: also a factor
    product = d.call(lambda w, a, b: a @ b.mT, z, gate)  # 2: ends the tail
    moved = d.moved(lambda t: t.flip(1), product)  # 3
    d.call(lambda w, t: t.mean(1), moved, tail=by_share)  # 4: leads nowhere
    total = d.call(lambda w, a, b: a + b, moved, gate, tail=by_magnitude)  # 5
    output = d.call(lambda w, t: t.amax(1), total, tail=by_gradient)  # 6
    assert d.on_tail(output) == {5, 6}
    assert d.on_tail(total) == {5}
    assert d.on_tail(gate) == {1}
    assert Definition(tails=False).on_tail(output) == set()


def test_a_call_that_ends_the_tail_gets_signed_relevance() -> None:
    d, a, b = Definition(tails=True), values(2.0, 1.0), values(1.0, 3.0)
    product = d.call(lambda w, a, b: a * b, a, b)  # 2, 3; as if it were a product of matrices
    output = d.call(lambda w, t: w[0] * t + w[1], product, tail=by_slope,
                    weights=[torch.tensor([-1.0, 1.0]), torch.ones(1)])  # fmt: skip
    # Of relevance (-0.2, 0.3) each factor gets 2 (-0.2, 0.3), scaled to one or to half of 0.5.
    assert of(d, output, a, [0.2, 0.3]) == pytest.approx([-0.4, 0.6])
    assert of(d, output, b, [0.2, 0.3], joint=True) == pytest.approx([-0.1, 0.15])


SAME_AS_THE_LOGITS = {
    "sigmoid": {}, "tanh": {}, "exp": {}, "softplus": {},
    "softmax": {"dim": 1}, "log_softmax": {"dim": 1}, "div number": {"c": 2.0},
    "add number": {"c": -1.5}, "soft cap": {"c": 3}, "plus integers": {"dtype": "int32"},
    "foreign add": {"source": "rows"}, "foreign less": {"source": "embedding"},
}  # fmt: skip


@pytest.mark.parametrize("kind", SAME_AS_THE_LOGITS)
@pytest.mark.parametrize("joint", [False, True])
def test_the_map_of_the_score_is_that_of_the_logits(kind: str, joint: bool) -> None:
    linear = Step("linear", (0,), "module", {"out": 4, "bias": True})
    tail = Step(kind, (1,), "function", SAME_AS_THE_LOGITS[kind])
    for seed in range(4):
        maps = [
            _maps(Program((5,), 3, joint, seed, steps)) for steps in ((linear,), (linear, tail))
        ]
        sign = -1 if kind == "foreign less" else 1
        for of_logits, of_scores in zip(*maps, strict=True):
            torch.testing.assert_close(of_scores, sign * of_logits, rtol=1e-12, atol=1e-15)
            assert bool(of_logits.any())


def _maps(program: Program) -> tuple[Tensor, Tensor]:
    return by_definition(program, *defined(program, tails=True))


def test_relevance_that_cancels_is_told() -> None:
    for kind, cancelled in (("add", False), ("sub", True)):
        d, x = Definition(tails=True), values(1.0, 2.0)
        z = scored(d, x)
        assert of(d, applied(kind, d, z, z), x, [1, 0]) == pytest.approx([int(not cancelled), 0])
        assert d.cancelled == cancelled
