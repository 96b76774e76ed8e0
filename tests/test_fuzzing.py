"""Random networks against the definition of absLRP, evaluated call by call.

Each network is a program of a few calls (:mod:`tests.networks`), drawn by hypothesis; where one fails, the
shortest program that still fails is printed, and can be pasted back into :func:`check`. Of each network, with
weights and inputs in float64, these properties are checked:

- the map of the target and that of the contrast are what the definition gives, and their difference is the
  attribution,
- a warning says so if the definition's map of a sample is zero, and only then,
- ``"joint"`` conserves relevance wherever the definition does,
- a batch has the maps of its samples one by one,
- a second call gives the same map to the last bit,
- the model (state, hooks, flags), its plain output and the input are what they were before,
- float32 gives nearly the same maps.

The tests run a few networks that are the same each time. Any number of them, from any seed:

    python -m tests.test_fuzzing --networks 10000 --seed 0

Two of three networks do something to their score behind the last layer with weights; ``--no-tails`` leaves
that out, in the networks and in the definition.

A network may be ill-conditioned: the definition itself then gives another map for another stabiliser, where
a hundredth or a hundred times of 1e-12 of a total is taken for no relevance, or where the last digits of the
input are others (relevance that cancels on the tail). It is counted, and its maps are not compared with the
definition; all else is checked. Likewise a map that changes with the last
digits of weights and input is not compared with that of float32.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from torch import Tensor

from captum_abslrp import AbsLRP
from tests.networks import (
    EPS,
    KINDS,
    ROUNDING,
    TAILS,
    Definition,
    Network,
    Program,
    Step,
    Value,
    defined,
    programs,
)
from tests.test_no_trace import no_trace

ACCURACY = 1e-6
"""Relative L2 error of a map, in float64."""
ACCURACY_OF_BATCHES = 1e-9
ACCURACY_OF_FLOAT32 = 1e-3
ZERO = "The map of"
"""How the warning of a map that is zero begins."""
ALIKE = "The maps of target and contrast differ by"


class Found:
    """What has been met, over all networks."""

    def __init__(self) -> None:
        self.networks = 0
        self.calls: Counter[str] = Counter()
        self.ways: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.worst = self.worst_in_float32 = 0.0


def error(actual: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    """Relative L2 error of the worst sample; of nothing, but for rounding, it is the error itself."""
    difference = (actual.double() - expected.double()).flatten(1).norm(dim=1)
    size = (expected if scale is None else scale).double().flatten(1).norm(dim=1)
    return (difference / torch.where(size > ROUNDING, size, 1)).max().item()


def by_definition(
    program: Program, definition: Definition, x: Value, output: Value
) -> tuple[Tensor, Tensor]:
    """The maps of target and contrast: of the other classes at the place of the target, or none."""
    z = output.data
    target = torch.zeros_like(z)
    for of_sample, at in zip(target, targets_of(program, z), strict=True):
        of_sample[at] = 1
    contrast = target.sum(1, keepdim=True) - target  # classes are dimension 1
    contrast = contrast / max(1, z.shape[1] - 1)
    of_target, of_contrast = definition.relevance(
        output, x, [target, contrast], joint=program.joint
    )
    return of_target, of_contrast


def targets_of(program: Program, output: Tensor) -> list[Any]:
    """A class of each sample, with a place where the output has places."""
    numbers = [(program.seed + i) % output[0].numel() for i in range(len(output))]
    indices = [torch.unravel_index(torch.tensor(n), output.shape[1:]) for n in numbers]
    rows = [tuple(map(int, at)) for at in indices]
    return rows if output.dim() > 2 else [at for (at,) in rows]


def attributor_of(program: Program, network: Network) -> AbsLRP:
    return AbsLRP(network, normalization="joint" if program.joint else "separate")


def attributed(attributor: AbsLRP, *args: Any, **kwargs: Any) -> tuple[Tensor, bool]:
    """An attribution, and whether a warning says that a map is zero; any other warning is an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = attributor.attribute(*args, class_dim=1, **kwargs)
    messages = [str(warning.message) for warning in caught]
    others = [message for message in messages if not message.startswith((ZERO, ALIKE))]
    assert not others, f"warnings: {others}"
    return result, any(message.startswith(ZERO) for message in messages)


def check(program: Program, found: Found | None = None, *, tails: bool = TAILS) -> None:
    """Raise an AssertionError where a property does not hold for a network."""
    found = Found() if found is None else found
    network, x = Network(program), program.inputs()
    definition, value, output = defined(program, tails=tails)
    largest = max(entry.output.data.abs().max().item() for entry in definition.entries)
    expected, expected_contrast = by_definition(program, definition, value, output)
    finite = bool((expected + expected_contrast).isfinite().all())  # exp(|x|) may not be
    if not (finite and largest < 1e6):
        found.notes["too large"] += 1
        return
    found.networks += 1
    found.calls.update(step.kind for step in program.steps)
    found.ways.update(step.way for step in program.steps)
    found.ways.update("the same layer again" for step in program.steps if step.layer is not None)

    with torch.no_grad():
        plain = network(x.clone())
    # The definition leaves out what has a probability of at most 1e-9.
    torch.testing.assert_close(plain, output.data, rtol=1e-9, atol=1e-8)
    targets = targets_of(program, plain)
    attributor = attributor_of(program, network)
    given_ = x.clone()
    with no_trace(network):
        of_target, warned_of_target = attributed(attributor, given_, targets, contrast=None)
        difference, warned = attributed(attributor, given_, targets)
        again, _ = attributed(attributor, given_, targets)
        one_by_one = [
            attributed(attributor, x[i : i + 1], target)
            for i, target in enumerate(targets if program.batch > 1 else [])
        ]
    of_contrast = of_target - difference
    assert torch.equal(given_, x), "the input was changed"
    assert bool(difference.isfinite().all() and of_target.isfinite().all()), "not finite"
    assert torch.equal(again, difference), "the second call differs"
    with torch.no_grad():
        assert torch.equal(network(x.clone()), plain), "the output differs"

    size = torch.maximum(expected.abs(), expected_contrast.abs())
    no_target = _is_zero(expected)
    nothing = no_target | (_is_zero(expected_contrast) if output.data.shape[1] > 1 else False)
    warnings_fit = (
        warned_of_target == bool(no_target.any())
        and warned == bool(nothing.any())
        and all(w == bool(n) for (_, w), n in zip(one_by_one, nothing))
    )
    errors = {
        "target": error(of_target, expected),
        "contrast": error(of_contrast, expected_contrast, size),
        "difference": error(difference, expected - expected_contrast, size),
    }
    found.notes["with a tail"] += bool(definition.on_tail(output))
    found.notes["a map of zero"] += bool(nothing.any())
    # Where relevance cancels in one element, rounding may be left of it: no fault as long as it stays small.
    warnings_fit |= definition.cancelled
    good = max(errors.values()) <= ACCURACY and warnings_fit
    if not good and ill_conditioned(program, expected, expected_contrast, tails=tails):
        found.notes["ill-conditioned"] += 1
    else:
        for name, value_ in errors.items():
            assert value_ <= ACCURACY, f"the map of the {name} is off by {value_:.1e}"
        assert warnings_fit, (
            f"maps that are zero: of the targets {no_target.tolist()}, or of the contrast, too "
            f"{nothing.tolist()}; warned of: {warned_of_target}, {warned}, and one by one "
            f"{[w for _, w in one_by_one]}"
        )
        found.worst = max(found.worst, *errors.values())
        if program.joint and definition.lossless:
            found.notes["conserves relevance"] += 1
            totals = of_target.flatten(1).sum(1)
            torch.testing.assert_close(totals, torch.ones_like(totals), rtol=1e-6, atol=0)
    if program.batch > 1:
        off = error(difference, torch.cat([one for one, _ in one_by_one]), of_target)
        assert off <= ACCURACY_OF_BATCHES, f"a sample on its own is off by {off:.1e}"
        found.notes["one by one"] += 1
    # A map that is zero in one of the two dtypes only is off by more than any bound.
    narrow, _ = attributed(
        attributor_of(program, network.float()), x.float(), targets, contrast=None
    )
    off = error(narrow, of_target)
    if off > ACCURACY_OF_FLOAT32:
        # What is no relevance in float32 may be some in float64.
        bound = torch.finfo(torch.float32).eps ** (7 / 8)
        by_bound, _ = by_definition(program, *defined(program, least=bound, tails=tails))
        below = error(narrow, by_bound) <= ACCURACY_OF_FLOAT32
        found.notes["below the bound of float32"] += below
        off = 0 if below else off
    if off > ACCURACY_OF_FLOAT32 and sensitive(program, targets, of_target, expected, tails=tails):
        found.notes["sensitive to rounding"] += 1
    else:
        assert off <= ACCURACY_OF_FLOAT32, f"the map in float32 is off by {off:.1e}"
        found.worst_in_float32 = max(found.worst_in_float32, off)


def _is_zero(of_samples: Tensor) -> Tensor:
    return (of_samples == 0).flatten(1).all(1)


def ill_conditioned(program: Program, *maps: Tensor, tails: bool) -> bool:
    """Whether the definition gives other maps where its stabiliser, what it takes for no relevance, or the
    last digits of the input are others."""
    scale = torch.maximum(*(m.abs() for m in maps))
    others: list[dict[str, Any]] = [
        {"eps": EPS / 1000}, {"least": ROUNDING / 100}, {"least": ROUNDING * 100}, {"noise": 1e-13}
    ]  # fmt: skip
    return any(
        error(a, b, scale) > ACCURACY / 10
        for other in others
        for a, b in zip(by_definition(program, *defined(program, **other, tails=tails)), maps)
    )


def sensitive(
    program: Program, targets: list[Any], of_target: Tensor, expected: Tensor, *, tails: bool
) -> bool:
    """Whether float32 cannot hold the map: weights and input that differ by some roundings have another one,
    or the definition, evaluated in float32, does (a sigmoid that is rounded to one has no slope)."""
    network, generator = Network(program), torch.Generator().manual_seed(0)

    def changed(values: Tensor) -> Tensor:
        noise = torch.randn(values.shape, generator=generator, dtype=values.dtype)
        return values * (1 + 1e-6 * noise)

    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(changed(parameter))
    x = changed(program.inputs())
    other, _ = attributed(attributor_of(program, network), x, targets, contrast=None)
    of_float32, _ = by_definition(program, *defined(program, dtype=torch.float32, tails=tails))
    off = max(error(other, of_target), error(of_float32, expected))
    return off > ACCURACY_OF_FLOAT32 / 10


RUN = settings(
    deadline=None,
    database=None,
    report_multiple_bugs=False,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


FAILURES = {
    "no fault: negative relevance that is below the bound for rounding in float32, not in float64":
    Program(shape=(2,), batch=2, joint=False, seed=4170, steps=(
        Step("changed twice", (0, 0), "function", {}),
        Step("foreign norm", (1,), "inside", {"source": "rows"}),
        Step("cos", (2,), "function", {}),
        Step("linear", (3,), "module", {"out": 2, "bias": False}),
    )),
    "in float32, relevance below the bound for rounding of one sign, where RMS norm has met it":
    Program(shape=(2,), batch=1, joint=True, seed=65536, steps=(
        Step("foreign less", (0,), "inside", {"source": "fast weights"}),
        Step("cube", (1,), "function", {}),
        Step("batch_norm", (2,), "function", {}),
        Step("rms_norm", (3,), "function", {}),
        Step("linear", (4,), "function", {"out": 1, "bias": False}),
        Step("linear", (5,), "function", {"out": 1, "bias": False}),
        Step("linear", (6,), "function", {"out": 1, "bias": False}, layer=5),
        Step("linear", (7,), "module", {"out": 2, "bias": False}),
        Step("mean of two", (8, 3), "beside", {}),
    )),
    "in float32, relevance below the bound for rounding that is of one sign": Program(
        (2,), 1, True, 13, (
            Step("foreign norm", (0,), "inside", {"source": "normalized"}),
            Step("linear", (1,), "module", {"out": 2, "bias": False}),
        ),
    ),
    "joint, a ReLU in place at the end: what arrived at its zeros was a share of what it is made from":
    Program(shape=(5,), batch=2, joint=True, seed=0, steps=(
        Step("linear", (0,), "module", {"out": 2, "bias": False}),
        Step("relu in place", (1,), "in place"),
    )),
    "joint, what is passed to a zero was lost":
    Program(shape=(2, 5, 5), batch=1, joint=True, seed=0, steps=(
        Step("relu in place", (0,), "in place"),
        Step("log_softmax", (1,), "function", {"dim": 1}),
        Step("flatten", (2,), "flatten"),
        Step("linear", (3,), "module", {"out": 2, "bias": False}),
    )),
    "one element times a number was an AttributeError":
    Program(shape=(1,), batch=1, joint=False, seed=0, steps=(
        Step("linear", (0,), "module", {"out": 1, "bias": True}),
        Step("mul number", (1,), "operator", {"c": -1.5}),
        Step("linear", (2,), "module", {"out": 2, "bias": True}),
    )),
    "a difference in place was scaled by its result":
    Program(shape=(4, 6), batch=1, joint=False, seed=0, steps=(
        Step("exp", (0,)),
        Step("sub", (0, 1), "in place"),
        Step("flatten", (2,), "flatten"),
        Step("linear", (3,), "module", {"out": 2, "bias": False}),
    )),
    "joint, a summand with a factor got no more for it":
    Program(shape=(5,), batch=2, joint=True, seed=0, steps=(
        Step("linear", (0,), "module", {"out": 5, "bias": True}),
        Step("add alpha", (0, 1), "function"),
        Step("linear", (2,), "module", {"out": 3, "bias": False}),
    )),
    "no fault: what is passed on by a saturated call is less than rounding":
    Program(shape=(2, 5, 5), batch=1, joint=False, seed=0, steps=(
        Step("einsum", (0, 0), "function"),
        Step("leaky_relu", (1,), "function"),
        Step("leaky_relu", (2,), "function"),
        Step("erf", (3,), "function"),
        Step("flatten", (4,), "flatten"),
        Step("linear", (5,), "module", {"out": 2, "bias": False}),
    )),
    "no fault: two branches that cancel leave 1e-16":
    Program(shape=(5,), batch=1, joint=False, seed=1431, steps=(
        Step("layer_norm", (0,), "function"),
        Step("rms_norm", (1,), "function"),
        Step("batch_norm", (1,), "function"),
        Step("maximum", (3, 0), "function"),
        Step("linear", (4,), "module", {"out": 4, "bias": False}),
    )),
    "a byte was negated before it was subtracted":
    Program(shape=(5,), batch=1, joint=False, seed=0, steps=(
        Step("minus integers", (0,), "operator", {"dtype": "uint8"}),
        Step("linear", (1,), "module", {"out": 2, "bias": False}),
    )),
    "a boolean factor had no magnitude":
    Program(shape=(5,), batch=2, joint=False, seed=0, steps=(
        Step("times what is positive", (0,), "operator"),
        Step("linear", (1,), "module", {"out": 2, "bias": False}),
    )),
    "joint, prototypes with a history of their own got half":
    Program(shape=(3, 4), batch=1, joint=True, seed=0, steps=(
        Step("cosine to prototypes", (0,), "function", {"out": 2}),
        Step("flatten", (1,), "flatten"),
        Step("linear", (2,), "module", {"out": 2, "bias": False}),
    )),
    "a sum with the mean of an embedding's rows was refused":
    Program(shape=(5,), batch=2, joint=False, seed=0, steps=(
        Step("foreign add", (0,), "stored", {"source": "embedding"}),
        Step("linear", (1,), "module", {"out": 2, "bias": False}),
    )),
    "a negative score behind a sigmoid had no map":
    Program(shape=(5,), batch=3, joint=False, seed=0, steps=(
        Step("linear", (0,), "module", {"out": 3, "bias": True}),
        Step("sigmoid", (1,)),
    )),
    "the head with a negative score had no part in the mean of two":
    Program(shape=(5,), batch=3, joint=True, seed=0, steps=(
        Step("linear", (0,), "module", {"out": 3, "bias": True}),
        Step("linear", (0,), "module", {"out": 3, "bias": True}),
        Step("mean of two", (1, 2), "behind"),
    )),
    "a distance had no map":
    Program(shape=(5,), batch=3, joint=False, seed=1, steps=(
        Step("linear", (0,), "module", {"out": 5, "bias": True}),
        Step("cosine to prototypes", (1,), "function", {"out": 3}),
        Step("number less", (2,), "operator", {"c": 2.0}),
    )),
    "negative logits of a map that is upsampled had no map":
    Program(shape=(2, 5, 5), batch=2, joint=False, seed=0, steps=(
        Step("conv2d", (0,), "module", {"out": 2, "kernel": (3, 3), "stride": 1, "padding": 0,
                                        "dilation": 1, "groups": 1, "bias": True}),
        Step("interpolate", (1,), "function", {"mode": "bilinear"}),
    )),
    "a class whose log-probability is rounded to 0 had no map":
    Program(shape=(4,), batch=2, joint=False, seed=0, steps=(
        Step("mul number", (0,), "operator", {"c": 300.0}),
        Step("linear", (1,), "module", {"out": 2, "bias": False}),
        Step("log_softmax", (2,), "function", {"dim": 1}),
    )),
}  # fmt: skip
"""What has failed, by what was wrong: faults that were mended, and two that the test took for faults."""


@pytest.mark.parametrize("failure", FAILURES)
def test_what_has_failed_once(failure: str) -> None:
    check(FAILURES[failure])


DRAWN = {
    "a mask": ("times what is positive", "times where another is positive", "times a mask"),
    "an integer factor": ("times integers", "times an integer", "divided by integers"),
    "a foreign constant": tuple(name for name in KINDS if name.startswith("foreign")),
}
"""What must be among the networks that are drawn, besides tails."""


def test_networks() -> None:
    found = Found()

    @settings(RUN, max_examples=90, derandomize=True)
    @given(programs())
    def some(program: Program) -> None:
        check(program, found)

    some()
    missing = [name for name, kinds in DRAWN.items() if not any(found.calls[k] for k in kinds)]
    assert not missing
    assert found.notes["with a tail"] > found.networks / 4


def test_the_warning_of_a_zero_map_is_told_and_any_other_is_an_error() -> None:
    class Warning_:
        def __init__(self, message: str) -> None:
            self.message = message

        def attribute(self, x: Tensor, class_dim: int) -> Tensor:
            warnings.warn(self.message, stacklevel=2)
            return x

    for message, expected in ((f"{ZERO} the target is zero", True), (f"{ALIKE} 1e-17", False)):
        _, warned = attributed(Warning_(message), torch.ones(1))  # type: ignore[arg-type]  # a stand-in
        assert warned == expected
    with pytest.raises(AssertionError, match="another"):
        attributed(Warning_("another"), torch.ones(1))  # type: ignore[arg-type]  # a stand-in


def run(networks: int, first_seed: int, chunk: int = 500, *, tails: bool = TAILS) -> bool:
    """Check many networks, and print what was met; whether all of them passed."""
    found, start, passed = Found(), time.time(), True
    for number, begin in enumerate(range(0, networks, chunk)):

        @seed(first_seed * 1_000_003 + number)
        @settings(RUN, max_examples=min(chunk, networks - begin))
        @given(programs(tails=tails))
        def some(program: Program) -> None:
            check(program, found, tails=tails)

        try:
            some()
        except Exception as failure:
            passed = False
            print(f"chunk {number}: {type(failure).__name__}: {failure}")
            print("\n".join(getattr(failure, "__notes__", [])), flush=True)
        spent = time.time() - start
        worst = f"{found.worst:.1e}, in float32 {found.worst_in_float32:.1e}"
        print(
            f"chunk {number}: {found.networks} networks, {spent:.0f} s, worst error {worst}, "
            f"{dict(found.notes)}",
            flush=True,
        )
    print(f"networks {found.networks}, seed {first_seed}, {time.time() - start:.0f} s")
    print("calls:", ", ".join(f"{name} {found.calls[name]}" for name in KINDS))
    print("written as:", dict(found.ways.most_common()))
    return passed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Random networks against the definition.")
    parser.add_argument("--networks", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tails", action=argparse.BooleanOptionalAction, default=TAILS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    return 0 if run(options.networks, options.seed, tails=options.tails) else 1


if __name__ == "__main__":
    sys.exit(main())
