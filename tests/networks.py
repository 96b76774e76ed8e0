"""Small networks as programs, and what the definition of absLRP makes of them, call by call.

A :class:`Program` is a list of steps on registers: register 0 is the input, each step appends its results,
and the last register is the output. :data:`KINDS` lists what a step can be. Each kind says twice what it
does: in the ways in which a model may write it (a module, a function, a method, an in-place call ...), which
:class:`Network` runs, and as calls of :class:`Definition`, out of place, which the rule is evaluated on
literally,

    s = R / (|z| + EPS),   R_in = x * d/dx <s, f(x; w, b) + f(|x|; |w|, |b|)>,   R_in /= sum |R_in|,

by autograd on detached inputs. Nothing of the package is used here. A probability of softmax of at most EPS
is that of a mask, here as there. Two things are said of rounding:

- What is left of two parts of ``R_in`` that cancel to the last digits is no relevance, and neither is an
  ``R_in`` that is less, in all, than the last digits of what it shall be. Relevance of a sample that was
  nowhere negative on its way cannot have cancelled, so it is none of rounding, unless it is next to
  nothing: a share of :data:`LEAST`. In
  ``sum |R_in| + EPS`` the stabiliser stands for that; it is no part of the rule, and is left out where there
  is relevance. The bound is that of :func:`is_rounding`, and nowhere else.
- Where an output ``z`` is not far from EPS, the result depends on the stabiliser in ``s``; where an ``R_in``
  is not far from those last digits, on what is taken for less. A test asks for others, and knows by how much.

What a network does to its score behind the last layer with weights is the *tail*. A call is on the tail if
it has a tail rule (one of :data:`TailRule` below) and every path of relevance from its result to the output
goes through calls on the tail and calls that move elements. A tail rule works on relevance itself, which may
be negative there, and nothing is rescaled. The first other call gets the rule above. Constants take no part
in a path: a divisor, a mask, and a tensor with a history of its own that does not depend on the input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

EPS = 1e-9
ROUNDING = torch.finfo(torch.float64).eps ** (7 / 8)
"""Share of a sum's parts, or of a total, that is taken for rounding, in float64."""
LEAST = 1e-30
"""Share of a total that is taken for nothing, though none of it is negative."""
TAILS = True
"""Whether networks with tails are drawn, and the definition has tail rules."""
LARGEST = 200
"""Elements of a tensor, for one sample."""

Shape = tuple[int, ...]
Options = dict[str, Any]
Draw = Callable[[st.SearchStrategy[Any]], Any]


# ------------------------------------------------------------------------------------- the definition


def is_rounding(amount: Tensor, parts: Any, share: float | Tensor = ROUNDING) -> Tensor:
    """Whether an amount of relevance is no more than the rounding of the parts that it is made from.

    This is the one place where the bound is applied: change it here.
    """
    return amount <= share * parts


Function = Callable[..., Tensor]
TailRule = Callable[[Function, Tensor, Sequence[Tensor]], list[Tensor]]
"""From a call as a function of its inputs, relevance ``R`` of its result, and the inputs, to relevance of
each input."""


def by_slope(f: Function, r: Tensor, xs: Sequence[Tensor]) -> list[Tensor]:
    """An element-wise function: ``-R`` where it falls, else ``R``, whatever the slope."""
    (x,) = xs
    leaf = x.expand(r.shape).clone().requires_grad_()  # an input may be broadcast
    (slope,) = _gradients(f(leaf), [leaf], torch.ones_like(r))
    return [torch.where(slope < 0, -r, r).sum_to_size(x.shape)]


def by_relu(f: Function, r: Tensor, xs: Sequence[Tensor]) -> list[Tensor]:
    """ReLU: ``R`` where the input is positive; a score of zero does not depend on what is negative."""
    (x,) = xs
    return [torch.where(x > 0, r, 0)]


def by_halves(f: Function, r: Tensor, xs: Sequence[Tensor]) -> list[Tensor]:
    """A product of two tensors of the network: half for each factor, whatever their signs."""
    return [(r / 2).sum_to_size(x.shape) for x in xs]


def whole(f: Function, r: Tensor, xs: Sequence[Tensor]) -> list[Tensor]:
    """``R`` of the same element: softmax, log_softmax, division by a norm."""
    return [r]


def by_sign(f: Function, r: Tensor, xs: Sequence[Tensor]) -> list[Tensor]:
    """A product with a constant c, or a quotient: ``sign(c) R``; 0 where c is."""
    (x,) = xs
    return [(f(torch.ones_like(x)).sign() * r).sum_to_size(x.shape)]


def by_magnitude(f: Function, r: Tensor, xs: Sequence[Tensor]) -> list[Tensor]:
    """A sum ``a + b`` or ``a - b``: ``|a| / (|a| + |b|) R``, and ``-|b| / (|a| + |b|) R`` of a difference."""

    def alone(i: int, value: Tensor) -> Tensor:
        return f(*(value if j == i else torch.zeros_like(x) for j, x in enumerate(xs)))

    sizes = [alone(i, x).abs() for i, x in enumerate(xs)]
    falls = len(xs) == 2 and bool((alone(1, torch.ones_like(xs[1])) < 0).all())
    if falls and xs[1].numel() < r.numel() == xs[0].numel():  # an offset of many
        return [r, torch.zeros_like(xs[1])]
    shares = [torch.where(sum(sizes) > 0, size / sum(sizes), 0) for size in sizes]
    signs = [alone(i, torch.ones_like(x)).sign() for i, x in enumerate(xs)]
    return [
        (sign * share * r).sum_to_size(x.shape)
        for sign, share, x in zip(signs, shares, xs, strict=True)
    ]


def by_share(f: Function, r: Tensor, xs: Sequence[Tensor]) -> list[Tensor]:
    """A linear map with coefficients ``a_ij >= 0``: ``sum_j |x_i| a_ij / (sum_k |x_k| a_kj) R_j``."""
    (x,) = xs
    leaf = x.abs().requires_grad_()
    z = f(leaf)
    (g,) = _gradients(z, [leaf], torch.where(z > 0, r / z, 0).detach())
    return [x.abs() * g]


def by_gradient(f: Function, r: Tensor, xs: Sequence[Tensor]) -> list[Tensor]:
    """A maximum, a minimum, logsumexp: ``sum_j dz_j / dx_i R_j``."""
    leaves = [x.clone().requires_grad_() for x in xs]
    return _gradients(f(*leaves), leaves, r)


class Value:
    """A tensor of the network, as the definition sees it: by its values alone."""

    def __init__(self, data: Tensor) -> None:
        self.data = data.detach()


@dataclass
class _Entry:
    function: Callable[..., Tensor]
    """From weights and inputs to the output."""
    inputs: Sequence[Value]
    weights: Sequence[Tensor]
    output: Value
    rule: str
    tail: TailRule | None
    """The rule on the tail; a call without one ends the tail."""


class Definition:
    """Records the calls of a network, and takes relevance back through them.

    Args:
        eps: the stabiliser.
        least: share of what it shall be that an ``R_in`` has at least; less is none.
        tails: whether calls on the tail get their tail rule; without, there is no tail.
    """

    def __init__(self, eps: float = EPS, least: float = ROUNDING, *, tails: bool = TAILS) -> None:
        self.eps = eps
        self.least = least
        self.tails = tails
        self.entries: list[_Entry] = []
        self.lossless = True
        """Whether no relevance was lost, or negative, on the way back."""
        self.cancelled = False
        """Whether relevance of both signs met in one element and left no more than rounding."""

    def call(
        self,
        function: Callable[..., Tensor],
        *inputs: Value,
        weights: Sequence[Tensor] = (),
        tail: TailRule | None = None,
    ) -> Value:
        """A call that meets the rule; each input gets relevance with the others held fixed."""
        return self._record("call", function, inputs, weights, tail)

    def moved(self, function: Callable[..., Tensor], *inputs: Value) -> Value:
        """A call that moves elements, and relevance with them."""
        return self._record("moved", lambda weights, *xs: function(*xs), inputs, ())

    def passed(self, function: Callable[..., Tensor], x: Value, *, tail: TailRule) -> Value:
        """A call that hands on the relevance of each element as it is."""
        return self._record("passed", lambda weights, x: function(x), [x], (), tail)

    def _record(
        self,
        rule: str,
        function: Callable[..., Tensor],
        inputs: Sequence[Value],
        weights: Sequence[Tensor],
        tail: TailRule | None = None,
    ) -> Value:
        weights = [w.detach() for w in weights]
        output = Value(function(weights, *(x.data for x in inputs)))
        self.entries.append(_Entry(function, inputs, weights, output, rule, tail))
        return output

    def on_tail(self, output: Value) -> set[int]:
        """The calls on the tail, by their place among the entries."""
        found: set[int] = set()
        reaching = {output}
        apart: set[Value] = set()  # some path from these to the output leaves the tail
        for place, entry in reversed(list(enumerate(self.entries if self.tails else ()))):
            if entry.output not in reaching:
                continue
            reaching.update(entry.inputs)
            if entry.output in apart or (entry.rule != "moved" and entry.tail is None):
                apart.update(entry.inputs)
            elif entry.rule != "moved":
                found.add(place)
        return found

    def relevance(
        self, output: Value, of: Value, seeds: Sequence[Tensor], *, joint: bool
    ) -> list[Tensor]:
        """Relevance of a value for each seed, relevance of the output."""
        found: dict[Value, list[Tensor]] = {output: list(seeds)}
        clean = {output: [_nonnegative(seed) for seed in seeds]}
        on_tail = self.on_tail(output)
        for place, entry in reversed(list(enumerate(self.entries))):
            arrived = found.pop(entry.output, None)
            if arrived is None:
                continue
            if place in on_tail:
                shares = self._back_through_tail(entry, arrived)
            elif entry.rule == "passed":
                shares = [arrived]
            elif entry.rule == "moved":
                shares = self._back_through_move(entry, arrived)
            else:
                shares = self._back_through_call(entry, arrived, clean[entry.output], joint=joint)
            after = [sum(_totals(share[i]) for share in shares) for i in range(len(seeds))]
            for before, left in zip(arrived, after, strict=True):
                if entry.rule != "call" or joint or place in on_tail:
                    self.lossless &= torch.allclose(_totals(before), left, rtol=1e-9, atol=0)
                self.lossless &= bool((before >= 0).all())
            for x, share in zip(entry.inputs, shares, strict=True):
                self.lossless &= all(bool((part >= 0).all()) for part in share)
                before = [c & _nonnegative(r) for c, r in zip(clean[entry.output], share)]
                clean[x] = [a & b for a, b in zip(clean[x], before)] if x in clean else before
                known = found.get(x)
                found[x] = share if known is None else [a + b for a, b in zip(known, share)]
                for a, b in zip(known or (), share):
                    left = is_rounding((a + b).abs(), a.abs() + b.abs())
                    self.cancelled |= bool((left & (a != 0)).any())
        result = found.get(of) or [torch.zeros_like(of.data) for _ in seeds]
        self.lossless &= all(bool((r >= 0).all()) for r in result)
        return result

    def _back_through_tail(self, entry: _Entry, arrived: Sequence[Tensor]) -> list[list[Tensor]]:
        xs = [x.data for x in entry.inputs]
        assert entry.tail is not None
        of_seeds = [
            entry.tail(lambda *v: entry.function(entry.weights, *v), r, xs) for r in arrived
        ]
        return [[of_seed[i] for of_seed in of_seeds] for i in range(len(xs))]

    def _back_through_move(self, entry: _Entry, arrived: Sequence[Tensor]) -> list[list[Tensor]]:
        leaves = [x.data.clone().requires_grad_() for x in entry.inputs]
        z = entry.function(entry.weights, *leaves)
        of_seeds = [_gradients(z, leaves, r) for r in arrived]
        return [[of_seed[i] for of_seed in of_seeds] for i in range(len(leaves))]

    def _back_through_call(
        self, entry: _Entry, arrived: Sequence[Tensor], clean: Sequence[Tensor], *, joint: bool
    ) -> list[list[Tensor]]:
        z = entry.output.data
        noise = self._noise(entry)
        shares = []
        for i, value in enumerate(entry.inputs):
            x = value.data.clone().requires_grad_()
            fixed = [x if j == i else other.data for j, other in enumerate(entry.inputs)]
            plain = entry.function(entry.weights, *fixed)
            twin = entry.function([w.abs() for w in entry.weights], *(v.abs() for v in fixed))
            of_seeds = []
            for r in arrived:
                s = (r / (z.abs() + self.eps)).masked_fill(noise, 0)
                (g,), (g_twin,) = _gradients(plain, [x], s), _gradients(twin, [x], s)
                both = g + g_twin
                both[is_rounding(both.abs(), g.abs() + g_twin.abs())] = 0
                of_seeds.append(torch.where(value.data == 0, 0, value.data * both))
            shares.append(of_seeds)
        for k, r in enumerate(arrived):
            sums = [_totals(of_seeds[k]) for of_seeds in shares]
            one_sign = clean[k]
            for of_seeds in shares:
                one_sign = one_sign & _nonnegative(of_seeds[k])
            if joint:
                factors = [self._divided(_totals(r), sum(sums), one_sign)] * len(sums)
            else:
                ones = torch.ones_like(one_sign, dtype=r.dtype)
                factors = [self._divided(ones, total, one_sign) for total in sums]
            for of_seeds, factor in zip(shares, factors, strict=True):
                of_seeds[k] = of_seeds[k] * factor.view(-1, *[1] * (of_seeds[k].dim() - 1))
        return shares

    def _noise(self, entry: _Entry) -> Tensor:
        """Elements of means and differences that are rounding of what they are made from."""
        xs = [x.data for x in entry.inputs]
        z = entry.output.data
        if entry.tail is by_share:
            return is_rounding(z.abs(), entry.function(entry.weights, xs[0].abs()))
        if entry.tail is by_magnitude and len(xs) == 2:
            zeros = [torch.zeros_like(x) for x in xs]
            minus = entry.function(entry.weights, zeros[0], torch.ones_like(xs[1]))
            if bool((minus < 0).all()):
                subtrahend = entry.function(entry.weights, zeros[0], xs[1]).abs()
                return is_rounding(z.abs(), torch.maximum(xs[0].abs(), subtrahend))
        return torch.zeros_like(z, dtype=torch.bool)

    def _divided(self, total: Any, by: Any, one_sign: Tensor) -> Tensor:
        """The factor that makes one amount the other; 0 where that would be a factor of rounding."""
        least = torch.where(one_sign, LEAST, self.least)
        return torch.where(is_rounding(by, total, least), 0, total / by)


def _nonnegative(relevance: Tensor) -> Tensor:
    """Whether no relevance of a sample is negative."""
    return (relevance >= 0).flatten(1).all(1)


def _gradients(z: Tensor, leaves: Sequence[Tensor], s: Tensor) -> list[Tensor]:
    if not z.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(z, leaves, s, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found)]


def _totals(relevance: Tensor) -> Tensor:
    """The sum of magnitudes of each sample."""
    return relevance.abs().flatten(1).sum(1)


# --------------------------------------------------------------------------------------- the programs


@dataclass(frozen=True)
class Step:
    """One step: a kind, the registers it reads, how it is written, and its options."""

    kind: str
    of: tuple[int, ...]
    way: str = "function"
    options: Options = field(default_factory=dict)
    layer: int | None = None
    """The step whose layer, with its weights, is used again."""

    def __repr__(self) -> str:
        again = "" if self.layer is None else f", layer={self.layer}"
        return f"Step({self.kind!r}, {self.of}, {self.way!r}, {self.options}{again})"


@dataclass(frozen=True)
class Program:
    """A network: what is drawn, and printed where it fails. ``repr`` can be read back."""

    shape: Shape
    """Of one sample."""
    batch: int
    joint: bool
    seed: int
    steps: tuple[Step, ...]

    def __repr__(self) -> str:
        head = f"shape={self.shape}, batch={self.batch}, joint={self.joint}, seed={self.seed}"
        steps = "".join(f"\n        {step}," for step in self.steps)
        return f"Program({head}, steps=({steps}\n    ))"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    def inputs(self) -> Tensor:
        return random(self.seed, (self.batch, *self.shape))


def random(seed: int, shape: Sequence[int], kind: str = "normal") -> Tensor:
    """Drawn numbers; weights of several dimensions keep the size of what they are multiplied with."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if kind == "weight":
        return x / math.sqrt(max(1, math.prod(shape[1:])))
    return x.abs() + 0.1 if kind == "positive" else x


@dataclass(frozen=True)
class Kind:
    """What a step can be."""

    run: Callable[..., Any]
    """From weights and inputs to the output: a call whose gradient is that of the rule, in which
    statistics and divisors are constants."""
    rule: str = "call"
    """``"call"``, ``"moved"``, ``"passed"``; or ``"parts"``, where ``define`` makes several calls."""
    tail: TailRule | None = field(default=None, kw_only=True)
    """Its rule on the tail, where it is one call."""
    define: Callable[..., Any] | None = None
    """From a :class:`Definition`, weights and values to the resulting values."""
    ways: dict[str, Callable[..., Any]] = field(default_factory=dict)
    """How a model may write it; the first one if it does not matter. Without any, as in ``run``."""
    modules: dict[str, Callable[..., nn.Module]] = field(default_factory=dict)
    """Ways that are modules of PyTorch's, from weights and options."""
    fits: Callable[[Shape], bool] = lambda shape: True
    options: Callable[[Draw, Shape], Options] = lambda draw, shape: {}
    weights: Callable[..., Sequence[tuple[Sequence[int], str]]] = lambda shape, **options: ()
    """Shape and kind of each weight, from the shape of a sample."""
    operands: int = 1
    """How many registers of one shape it reads."""

    @property
    def owns(self) -> bool:
        """Whether the result has memory of its own."""
        return self.rule != "moved"

    def all_ways(self) -> list[str]:
        return [*(self.ways or {"function": self.run}), *self.modules]

    def layer(self, way: str, weights: Sequence[Tensor], options: Options) -> nn.Module:
        if way in self.modules:
            return self.modules[way](weights, options)
        return Layer(self.ways.get(way, self.run), weights, options)

    def values(
        self, definition: Definition, weights: Sequence[Tensor], xs: Sequence[Value], o: Options
    ) -> list[Value]:
        if self.define is not None:
            result = self.define(definition, weights, *xs, **o)
        elif self.rule == "call":
            result = definition.call(
                lambda w, *v: self.run(w, *v, **o), *xs, weights=weights, tail=self.tail
            )
        elif self.rule == "moved":
            result = definition.moved(lambda *v: self.run([], *v, **o), *xs)
        else:
            assert self.tail is not None
            result = definition.passed(lambda v: self.run([], v, **o), *xs, tail=self.tail)
        return list(result) if isinstance(result, (tuple, list)) else [result]


class Layer(nn.Module):
    """A step whose calls are written out."""

    def __init__(
        self, way: Callable[..., Any], weights: Sequence[Tensor], options: Options
    ) -> None:
        super().__init__()
        self.way, self.options = way, options
        self.weights = nn.ParameterList(nn.Parameter(w.clone()) for w in weights)

    def forward(self, *xs: Tensor) -> Any:
        return self.way(list(self.weights), *xs, **self.options)


class Network(nn.Module):
    """The model that a program describes."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.steps = program.steps
        shapes = shapes_of(program)
        self.layers = nn.ModuleDict(
            {
                str(i): KINDS[step.kind].layer(
                    step.way, weights_of(program, i, shapes[step.of[0]]), step.options
                )
                for i, step in enumerate(self.steps)
                if step.layer is None
            }
        )
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        registers = [x]
        for i, step in enumerate(self.steps):
            layer = self.layers[str(i if step.layer is None else step.layer)]
            result = layer(*(registers[r] for r in step.of))
            registers.extend(result if isinstance(result, (tuple, list)) else [result])
        return registers[-1]


def weights_of(program: Program, i: int, shape: Shape) -> list[Tensor]:
    """The weights of a step that reads a register of this shape."""
    step = program.steps[i]
    first = step.layer if step.layer is not None else i
    kinds = KINDS[step.kind].weights(shape, **step.options)
    return [
        random(program.seed + 1000 * (first + 1) + j, size, kind)
        for j, (size, kind) in enumerate(kinds)
    ]


def shapes_of(program: Program) -> list[Shape]:
    """The shape of a sample in each register."""
    shapes = [program.shape]
    for i, step in enumerate(program.steps):
        shapes += result_shapes(
            step, shapes, weights_of(program, i, shapes[step.of[0]]), program.batch
        )
    return shapes


def result_shapes(
    step: Step, shapes: Sequence[Shape], weights: Sequence[Tensor], batch: int
) -> list[Shape]:
    xs = [torch.ones(batch, *shapes[r], dtype=torch.float64) for r in step.of]
    result = KINDS[step.kind].run(weights, *xs, **step.options)
    return [tuple(t.shape[1:]) for t in (result if isinstance(result, (tuple, list)) else [result])]


def defined(
    program: Program,
    *,
    eps: float = EPS,
    least: float = ROUNDING,
    dtype: torch.dtype = torch.float64,
    tails: bool = TAILS,
    noise: float = 0,
) -> tuple[Definition, Value, Value]:
    """The definition's record of a program, with the values of its input and output.

    Args:
        noise: relative size of what is added to the input at random.
    """
    definition = Definition(eps, least, tails=tails)
    x = program.inputs()
    x = Value((x + noise * x * random(program.seed + 1, x.shape)).to(dtype))
    registers = [x]
    for i, step in enumerate(program.steps):
        xs = [registers[r] for r in step.of]
        weights = weights_of(program, i, tuple(xs[0].data.shape[1:]))
        weights = [w.to(dtype) for w in weights]
        registers += KINDS[step.kind].values(definition, weights, xs, step.options)
    return definition, x, registers[-1]


# ------------------------------------------------------------------------------------------ the kinds


def _with(module: nn.Module, **weights: Tensor | None) -> nn.Module:
    """A module of PyTorch's with these weights and statistics."""
    for name, value in weights.items():
        if name in module._parameters and value is not None:
            setattr(module, name, nn.Parameter(value.clone()))
        elif value is not None:
            module._buffers[name] = value.clone()
    return module


def _elementwise(
    run: Callable[..., Tensor],
    module: Callable[[], nn.Module] | None = None,
    *,
    in_place: Callable[[Tensor], Any] | None = None,
    method: Callable[[Tensor], Tensor] | None = None,
    tail: TailRule = by_slope,
) -> Kind:
    ways: dict[str, Callable[..., Any]] = {"function": lambda w, x: run(x)}
    if method is not None:
        ways["method"] = lambda w, x: method(x)
    if in_place is not None:
        ways["in place"] = lambda w, x: in_place(x)
    modules = {} if module is None else {"module": lambda w, o: module()}
    return Kind(lambda w, x: run(x), ways=ways, modules=modules, tail=tail)


def _number(draw: Draw, shape: Shape) -> Options:
    return {"c": draw(st.sampled_from([0.5, -0.5, 2.0, -1.5, 3]))}


def _dims(lowest: int) -> Callable[[Draw, Shape], Options]:
    """One of the dimensions behind the batch, by its number from the front or from the end."""

    def options(draw: Draw, shape: Shape) -> Options:
        dim = draw(st.integers(lowest, len(shape)))
        return {"dim": draw(st.sampled_from([dim, dim - len(shape) - 1]))}

    return options


def _size(extent: int, k: int, stride: int, padding: int, dilation: int = 1) -> int:
    return (extent + 2 * padding - dilation * (k - 1) - 1) // stride + 1


def _convolution_options(draw: Draw, shape: Shape) -> Options:
    channels, *extents = shape
    padding, dilation = draw(st.integers(0, 1)), draw(st.integers(1, 2))
    kernels = [
        draw(st.integers(1, min(3, (extent + 2 * padding - 1) // dilation + 1)))
        for extent in extents
    ]
    groups = draw(st.sampled_from([g for g in (1, 2, channels) if channels % g == 0]))
    return {
        "out": groups * draw(st.integers(1, max(1, 4 // groups))), "kernel": tuple(kernels),
        "stride": draw(st.integers(1, 2)), "padding": padding, "dilation": dilation,
        "groups": groups, "bias": draw(st.booleans()),
    }  # fmt: skip


def _convolution_weights(shape: Shape, *, out: int, kernel: Shape, groups: int, bias: bool,
                         **_: Any) -> list[tuple[Sequence[int], str]]:  # fmt: skip
    weight = ((out, shape[0] // groups, *kernel), "weight")
    return [weight, ((out,), "normal")] if bias else [weight]


def _convolution(dims: int) -> Kind:
    function = getattr(F, f"conv{dims}d")

    def run(w: Sequence[Tensor], x: Tensor, **o: Any) -> Tensor:
        bias = w[1] if o["bias"] else None
        return function(x, w[0], bias, o["stride"], o["padding"], o["dilation"], o["groups"])

    def module(w: Sequence[Tensor], o: Options) -> nn.Module:
        layer = getattr(nn, f"Conv{dims}d")(
            w[0].shape[1] * o["groups"], o["out"], o["kernel"], o["stride"], o["padding"],
            o["dilation"], o["groups"], o["bias"],
        )  # fmt: skip
        return _with(layer, weight=w[0], bias=w[1] if o["bias"] else None)

    return Kind(run, ways={"function": run}, modules={"module": module}, options=_convolution_options,
                weights=_convolution_weights, fits=lambda shape: len(shape) == dims + 1)  # fmt: skip


def _transposed_options(draw: Draw, shape: Shape) -> Options:
    groups = draw(st.sampled_from([g for g in (1, 2) if shape[0] % g == 0]))
    return {"out": draw(st.integers(1, 2)), "kernel": draw(st.integers(1, 3)),
            "stride": draw(st.integers(1, 2)), "groups": groups}  # fmt: skip


def _transposed(w: Sequence[Tensor], x: Tensor, *, stride: int, groups: int, **_: Any) -> Tensor:
    return F.conv_transpose2d(x, w[0], None, stride, 0, 0, groups)


def _linear(w: Sequence[Tensor], x: Tensor, *, out: int, bias: bool) -> Tensor:
    return F.linear(x, w[0], w[1] if bias else None)


def _linear_module(w: Sequence[Tensor], o: Options) -> nn.Module:
    layer = nn.Linear(w[0].shape[1], o["out"], o["bias"])
    return _with(layer, weight=w[0], bias=w[1] if o["bias"] else None)


def _affine(shape: Shape, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    view = (-1, *[1] * (len(shape) - 1))
    return x * weight.view(view) + bias.view(view)


def _batch_norm(w: Sequence[Tensor], x: Tensor) -> Tensor:
    weight, bias, mean, var = w
    scale = weight / torch.sqrt(var + 1e-5)
    return _affine(x.shape[1:], x, scale, bias - mean * scale)


def _batch_norm_module(w: Sequence[Tensor], o: Options, dims: int) -> nn.Module:
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d}[dims](len(w[0]))
    return _with(norm, weight=w[0], bias=w[1], running_mean=w[2], running_var=w[3])


def _standardised(x: Tensor, dims: Sequence[int]) -> Tensor:
    mean = x.mean(dims, keepdim=True).detach()
    sigma = torch.sqrt(x.var(dims, correction=0, keepdim=True) + 1e-5).detach()
    return (x - mean) / sigma


def _layer_norm(w: Sequence[Tensor], x: Tensor) -> Tensor:
    return _standardised(x, [-1]) * w[0] + w[1]


def _group_norm(w: Sequence[Tensor], x: Tensor, *, groups: int) -> Tensor:
    grouped = _standardised(x.unflatten(1, (groups, -1)).flatten(2), [2])
    return _affine(x.shape[1:], grouped.reshape(x.shape), w[0], w[1])


def _rms_norm(w: Sequence[Tensor], x: Tensor) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5).detach() * w[0]


def _soft(x: Tensor, dim: int, seen: Tensor | None = None) -> Tensor:
    """Softmax with a constant maximum and denominator; what is not seen takes no part."""
    if seen is not None:
        x = torch.where(seen, x, -torch.inf)
    e = torch.exp(x - x.amax(dim, keepdim=True).detach())
    return e / e.sum(dim, keepdim=True).detach()


def _soft_defined(d: Definition, x: Value, dim: int, seen: Tensor | None = None) -> Value:
    """What has a probability of at most the stabiliser counts as masked, and takes no part."""
    likely = _soft(x.data, dim, seen) > d.eps
    return d.call(lambda w, v: _soft(v, dim, likely), x, tail=whole)


def _pool_options(draw: Draw, shape: Shape) -> Options:
    k = draw(st.integers(1, min(3, *shape[1:])))
    return {"k": k, "stride": draw(st.integers(1, 2)), "padding": draw(st.integers(0, k // 2))}


def _pool(name: str, dims: int) -> Kind:
    function = getattr(F, f"{name}_pool{dims}d")
    module = getattr(nn, f"{name.title()}Pool{dims}d")
    return Kind(
        lambda w, x, k, stride, padding: function(x, k, stride, padding),
        modules={"module": lambda w, o: module(o["k"], o["stride"], o["padding"])},
        options=_pool_options,
        fits=lambda shape: len(shape) == dims + 1,
        tail=by_share if name == "avg" else by_gradient,
    )


def _adaptive(name: str, dims: int) -> Kind:
    function = getattr(F, f"adaptive_{name}_pool{dims}d")
    module = getattr(nn, f"Adaptive{name.title()}Pool{dims}d")
    return Kind(
        lambda w, x, size: function(x, size),
        modules={"module": lambda w, o: module(o["size"])},
        options=lambda draw, shape: {"size": draw(st.integers(1, 3))},
        fits=lambda shape: len(shape) == dims + 1,
        tail=by_share if name == "avg" else by_gradient,
    )


def _over(function: Callable[..., Tensor], tail: TailRule) -> Kind:
    """A reduction of one dimension."""
    return Kind(
        lambda w, x, dim, keepdim: function(x, dim, keepdim=keepdim),
        options=lambda draw, shape: _dims(1)(draw, shape) | {"keepdim": draw(st.booleans())},
        fits=lambda shape: len(shape) > 1,
        tail=tail,
    )


def _move(
    run: Callable[..., Any],
    options: Callable[[Draw, Shape], Options] = lambda draw, shape: {},
    *,
    least: int = 1,
    most: int = 9,
    operands: int = 1,
    ways: dict[str, Callable[..., Any]] | None = None,
    fits: Callable[[Shape], bool] = lambda shape: True,
) -> Kind:
    return Kind(
        lambda w, *xs, **o: run(*xs, **o),
        "moved",
        ways={name: lambda w, *xs, _way=way, **o: _way(*xs, **o) for name, way in (ways or {}).items()},
        options=options,
        fits=lambda shape: least <= len(shape) <= most and fits(shape),
        operands=operands,
    )  # fmt: skip


def _several(run: Callable[..., Sequence[Tensor]], options: Callable[[Draw, Shape], Options],
             **kwargs: Any) -> Kind:  # fmt: skip
    """A call that moves elements into several results."""

    def define(d: Definition, w: Sequence[Tensor], x: Value, **o: Any) -> list[Value]:
        count = len(run(x.data, **o))
        return [d.moved(lambda v, i=i: run(v, **o)[i], x) for i in range(count)]

    kind = _move(run, options, **kwargs)
    return Kind(kind.run, "moved", define, options=options, fits=kind.fits)


def _slice_options(draw: Draw, shape: Shape) -> Options:
    dim = draw(st.integers(1, len(shape)))
    extent = shape[dim - 1]
    start = draw(st.integers(0, extent - 1))
    return {"dim": dim, "start": start, "stop": draw(st.integers(start + 1, extent)),
            "step": draw(st.integers(1, 2))}  # fmt: skip


def _at(dim: int, index: Any) -> tuple[Any, ...]:
    return (*[slice(None)] * dim, index)


def _sliced(x: Tensor, dim: int, start: int, stop: int, step: int) -> Tensor:
    return x[_at(dim, slice(start, stop, step))]


def _index_options(draw: Draw, shape: Shape) -> Options:
    dim = draw(st.integers(1, len(shape)))
    places = st.lists(st.integers(0, shape[dim - 1] - 1), min_size=1, max_size=3)
    return {"dim": dim, "places": draw(places)}


def _mask(shape: Sequence[int], every: int) -> Tensor:
    """A constant mask in which every so many-th element is true."""
    return (torch.arange(math.prod(shape)) % every == 0).view(tuple(shape))


def _scaling(
    run: Callable[[Tensor, float], Tensor], ways: dict[str, Callable[[Tensor, float], Any]]
) -> Kind:
    return Kind(
        lambda w, x, c: run(x, c),
        "passed",
        ways={name: lambda w, x, c, _way=way: _way(x, c) for name, way in ways.items()},
        options=_number,
        tail=by_sign,
    )


def _sum(run: Callable[..., Tensor], ways: dict[str, Callable[..., Any]], sign: float = 1) -> Kind:
    """A sum, in which the second summand has a weight."""
    return Kind(
        lambda w, x, y: run(x, y),
        define=lambda d, w, x, y: d.call(
            lambda v, x, y: x + v[0] * y,
            x,
            y,
            tail=by_magnitude,
            weights=[torch.tensor(sign, dtype=torch.float64)],
        ),
        ways={name: lambda w, x, y, _way=way: _way(x, y) for name, way in ways.items()},
        operands=2,
    )


def _added_number(
    ways: dict[str, Callable[[Tensor, float], Any]], sign: float = 1, of_x: float = 1
) -> Kind:
    def define(d: Definition, w: Sequence[Tensor], x: Value, c: float) -> Value:
        factor = torch.tensor([of_x, sign * c], dtype=torch.float64)
        return d.call(lambda v, x: v[0][0] * x + v[0][1], x, weights=[factor], tail=by_slope)

    return Kind(
        lambda w, x, c: of_x * x + sign * c,
        define=define,
        ways={name: lambda w, x, c, _way=way: _way(x, c) for name, way in ways.items()},
        options=_number,
    )


def _of_each(shape: Shape, **_: Any) -> list[tuple[Sequence[int], str]]:
    return [(shape, "normal")]


def _product(d: Definition, x: Value, y: Value) -> Value:
    """A product of two tensors of the network."""
    return d.call(lambda v, a, b: a * b, x, y, tail=by_halves)


def _gated(d: Definition, w: Sequence[Tensor], x: Value, y: Value) -> Value:
    return _product(d, x, d.call(lambda v, b: b.sigmoid(), y, tail=by_slope))


def _glu(d: Definition, w: Sequence[Tensor], x: Value, dim: int) -> Value:
    halves = [d.moved(lambda v, i=i: v.chunk(2, dim)[i], x) for i in range(2)]
    return _gated(d, w, *halves)


def _divided_by_size(d: Definition, w: Sequence[Tensor], x: Value, y: Value) -> Value:
    divisor = 1 + y.data.abs()
    return d.call(lambda v, a: a / v[0], x, weights=[divisor], tail=by_sign)


def _weighted(d: Definition, w: Sequence[Tensor], x: Value, *, out: int) -> Value:
    product = d.call(lambda v, a: a @ v[0], x, weights=[w[0]])
    return d.call(lambda v, a: a + v[0], product, weights=[w[1]], tail=by_slope)


def _scores(d: Definition, query: Value, key: Value) -> Value:
    transposed = d.moved(lambda t: t.mT, key)
    return d.call(lambda v, a, b: a @ b, query, transposed)


def _seen(scores: Tensor, mask: str) -> Tensor | None:
    if mask == "none":
        return None
    if mask == "causal":
        return torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    seen = _mask(scores.shape[-2:], 2)
    return seen | torch.eye(*seen.shape, dtype=torch.bool)  # each sees itself


def _attended(d: Definition, q: Value, k: Value, v: Value, mask: str = "none") -> Value:
    scale = q.data.shape[-1] ** -0.5
    scores = _scores(d, d.passed(lambda t: t * scale, q, tail=by_sign), k)
    weights = _soft_defined(d, scores, -1, _seen(scores.data, mask))
    return d.call(lambda w, a, b: a @ b, weights, v)


def _sdpa(w: Sequence[Tensor], q: Tensor, k: Tensor, v: Tensor, mask: str) -> Tensor:
    causal = mask == "causal"
    seen = None if causal else _seen(torch.empty(q.shape[-2], k.shape[-2]), mask)
    return F.scaled_dot_product_attention(q, k, v, seen, is_causal=causal)


def _by_hand(w: Sequence[Tensor], q: Tensor, k: Tensor, v: Tensor, mask: str) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    seen = _seen(scores, mask)
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return F.dropout(scores.softmax(-1), 0.1, False) @ v


def _heads_weights(shape: Shape, *, heads: int) -> list[tuple[Sequence[int], str]]:
    d = shape[1]
    return [((3 * d, d), "weight"), ((3 * d,), "normal"), ((d, d), "weight"), ((d,), "normal")]


def _multi_head(w: Sequence[Tensor], x: Tensor, *, heads: int) -> Tensor:
    """Self-attention of several heads, written out as in a ViT."""
    qkv = F.linear(x, w[0], w[1]).reshape(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    attended = F.scaled_dot_product_attention(q, k, v)
    return F.linear(attended.transpose(1, 2).reshape(x.shape), w[2], w[3])


def _multi_head_defined(d: Definition, w: Sequence[Tensor], x: Value, *, heads: int) -> Value:
    qkv = d.call(lambda v, t: F.linear(t, *v), x, weights=w[:2])
    of_heads = [
        d.moved(lambda t, i=i: t.chunk(3, -1)[i].unflatten(-1, (heads, -1)).transpose(1, 2), qkv)
        for i in range(3)
    ]
    merged = d.moved(lambda t: t.transpose(1, 2).flatten(2), _attended(d, *of_heads))
    return d.call(lambda v, t: F.linear(t, *v), merged, weights=w[2:])


class _SelfAttention(nn.Module):
    def __init__(self, w: Sequence[Tensor], o: Options) -> None:
        super().__init__()
        attention = nn.MultiheadAttention(len(w[3]), o["heads"], batch_first=True)
        _with(attention, in_proj_weight=w[0], in_proj_bias=w[1])
        _with(attention.out_proj, weight=w[2], bias=w[3])
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def _in_slice(change: str) -> Callable[..., Tensor]:
    """An in-place call on a slice of a clone."""

    def way(w: Sequence[Tensor], x: Tensor, y: Tensor, **o: Any) -> Tensor:
        result = x.clone()
        part, other = _sliced(result, **o), _sliced(y, **o)
        if change == "relu_":
            part.relu_()
        elif change == "mul_":
            part.mul_(-2)
        elif change == "add_":
            part += other
        elif change == "mul_ by another":
            part *= other
        elif change == "set":
            result[_at(o["dim"], slice(o["start"], o["stop"], o["step"]))] = other
        else:
            part.copy_(other)
        return result

    return way


def _in_slice_defined(change: str) -> Callable[..., Value]:
    def define(d: Definition, w: Sequence[Tensor], x: Value, y: Value, **o: Any) -> Value:
        part, other = (d.moved(lambda t: _sliced(t, **o), value) for value in (x, y))
        if change == "relu_":
            changed = d.call(lambda v, t: t.relu(), part, tail=by_relu)
        elif change == "mul_":
            changed = d.passed(lambda t: t * -2, part, tail=by_sign)
        elif change == "add_":
            changed = d.call(lambda v, a, b: a + b, part, other, tail=by_magnitude)
        elif change == "mul_ by another":
            changed = _product(d, part, other)
        else:
            changed = other

        def put(whole: Tensor, into: Tensor) -> Tensor:
            result = whole.clone()
            _sliced(result, **o).copy_(into)
            return result

        return d.moved(put, x, changed)

    return define


def _changed_slice(change: str) -> Kind:
    way = _in_slice(change)
    return Kind(way, "parts", _in_slice_defined(change), options=_slice_options, operands=2)


def _seen_in_view(w: Sequence[Tensor], x: Tensor) -> Tensor:
    """A view that shows what an in-place call does to its base."""
    base = (x * 0.5).contiguous()
    view = base.flatten(1)[:, ::2]
    base.relu_()
    return view.add_(1)


def _seen_in_view_defined(d: Definition, w: Sequence[Tensor], x: Value) -> Value:
    half = d.passed(lambda t: t * 0.5, x, tail=by_sign)
    base = d.call(lambda v, t: t.relu(), half, tail=by_relu)
    return d.call(lambda v, t: t + 1, d.moved(lambda t: t.flatten(1)[:, ::2], base), tail=by_slope)


def _twice_changed(w: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
    """A tensor that is used, changed, used again, changed, and used with what was made before."""
    t = x + y
    first = t.sigmoid()
    t.mul_(first)
    second = torch.tanh(t)
    t += second
    return t.mul_(2) + first


def _twice_changed_defined(d: Definition, w: Sequence[Tensor], x: Value, y: Value) -> Value:
    def added(a: Value, b: Value) -> Value:
        return d.call(lambda v, a, b: a + b, a, b, tail=by_magnitude)

    t = added(x, y)
    first = d.call(lambda v, a: a.sigmoid(), t, tail=by_slope)
    t = _product(d, t, first)
    second = d.call(lambda v, a: a.tanh(), t, tail=by_slope)
    t = added(t, second)
    return added(d.passed(lambda a: a * 2, t, tail=by_sign), first)


def _add_scaled(x: Tensor, y: Tensor) -> Tensor:
    return torch.add(x, y, alpha=2)


def _of_positive(run: Callable[[Tensor], Tensor]) -> Kind:
    """A function of positive numbers, of softplus."""

    def define(d: Definition, w: Sequence[Tensor], x: Value) -> Value:
        positive = d.call(lambda v, t: F.softplus(t), x, tail=by_slope)
        shift = torch.full(
            (), 0.1, dtype=x.data.dtype
        )  # the logarithm of what is rounded to 0 is infinite
        positive = d.call(lambda v, t: t + v[0], positive, weights=[shift], tail=by_slope)
        return d.call(lambda v, t: run(t), positive, tail=by_slope)

    return Kind(lambda w, x: run(F.softplus(x) + 0.1), "parts", define)


def _soft_cap(d: Definition, w: Sequence[Tensor], x: Value, c: float) -> Value:
    divided = d.passed(lambda t: t / c, x, tail=by_sign)
    bounded = d.call(lambda v, t: t.tanh(), divided, tail=by_slope)
    return d.passed(lambda t: t * c, bounded, tail=by_sign)


def _mean_of_two(d: Definition, w: Sequence[Tensor], x: Value, y: Value) -> Value:
    stacked = d.moved(lambda a, b: torch.stack([a, b], 1), x, y)
    return d.call(lambda v, t: t.mean(1), stacked, tail=by_share)


def _normalized(d: Definition, x: Value) -> Value:
    norm = x.data.norm(dim=-1, keepdim=True).clamp(min=1e-8)
    return d.call(lambda v, t: t / v[0], x, weights=[norm], tail=whole)


def _cosine(d: Definition, w: Sequence[Tensor], x: Value, y: Value) -> Value:
    product = _product(d, _normalized(d, x), _normalized(d, y))
    return d.call(lambda v, t: t.sum(-1), product, tail=by_share)


def _cosine_to(w: Sequence[Tensor], x: Tensor, out: int) -> Tensor:
    return F.cosine_similarity(x.unsqueeze(-2), w[0], dim=-1)


def _cosine_to_defined(d: Definition, w: Sequence[Tensor], x: Value, out: int) -> Value:
    repeated = d.moved(lambda t: t.unsqueeze(-2).expand(*t.shape[:-1], out, -1), x)
    prototypes = F.normalize(w[0], dim=-1)
    product = d.call(
        lambda v, t: t * v[0], _normalized(d, repeated), weights=[prototypes], tail=by_sign
    )
    return d.call(lambda v, t: t.sum(-1), product, tail=by_share)


OPERATORS: dict[str, dict[str, Callable[[Any, Any], Tensor]]] = {
    "mul": {
        "operator": lambda x, c: x * c,
        "reflected": lambda x, c: c * x,
        "function": torch.mul,
        "in place": lambda x, c: x.mul_(c),
        "in place operator": lambda x, c: x.__imul__(c),
    },
    "div": {
        "operator": lambda x, c: x / c,
        "function": torch.div,
        "in place": lambda x, c: x.div_(c),
    },
    "add": {
        "operator": lambda x, c: x + c,
        "reflected": lambda x, c: c + x,
        "function": torch.add,
        "in place": lambda x, c: x.add_(c),
    },
    "sub": {
        "operator": lambda x, c: x - c,
        "method": lambda x, c: x.sub(c),
        "in place operator": lambda x, c: x.__isub__(c),
    },
    "less": {"operator": lambda x, c: c - x, "function": lambda x, c: torch.sub(c, x)},
}
"""What a tensor and a constant are combined by, and the ways to write it."""


def _with_constant(d: Definition, operator: str, x: Value, constant: Tensor) -> Value:
    """The definition of an operator of :data:`OPERATORS`, with a constant of the tensor's dtype."""
    constant = constant.to(x.data.dtype)
    if operator == "mul":
        return d.call(lambda v, t: t * v[0], x, weights=[constant], tail=by_sign)
    if operator == "div":
        return d.call(lambda v, t: t / v[0], x, weights=[constant], tail=by_sign)
    if operator == "less":  # the sign is a weight
        weights = [-torch.ones_like(constant), constant]
    else:
        weights = [torch.ones_like(constant), constant if operator == "add" else -constant]
    return d.call(lambda v, t: v[0] * t + v[1], x, weights=weights, tail=by_slope)


def _combined(operator: str, made: Callable[..., Tensor], **kwargs: Any) -> Kind:
    """A tensor and a constant of another dtype, boolean or integer, which the definition casts to that of
    the tensor.

    Args:
        operator: name in :data:`OPERATORS`.
        made: from the registers and options to the constant.
    """
    run = next(iter(OPERATORS[operator].values()))

    def define(d: Definition, w: Sequence[Tensor], x: Value, *others: Value, **o: Any) -> Value:
        return _with_constant(d, operator, x, made(x.data, *(y.data for y in others), **o))

    return Kind(
        lambda w, x, *others, **o: run(x, made(x, *others, **o)),
        define=define,
        ways={
            name: lambda w, x, *others, _way=way, **o: _way(x, made(x, *others, **o))
            for name, way in OPERATORS[operator].items()
        },
        **{"fits": lambda shape: math.prod(shape) > 1} | kwargs,  # one element is a number
    )  # fmt: skip


def _positive(x: Tensor, *others: Tensor) -> Tensor:
    """The mask of what is positive, in the last of some tensors."""
    return (others[-1] if others else x) > 0


def _constant_mask(x: Tensor, every: int, wide: bool) -> Tensor:
    """A mask of each element, or one that is broadcast along the last dimension."""
    return _mask(x.shape[1:], every) if wide else (~_mask(x.shape[1:-1], every))[..., None]


def _mask_options(draw: Draw, shape: Shape) -> Options:
    wide = len(shape) == 1 or math.prod(shape[:-1]) == 1 or draw(st.booleans())
    return {"every": draw(st.sampled_from([2, 3])), "wide": wide}


def _integers(x: Tensor, dtype: str, zero: bool = False) -> Tensor:
    """Integers for each element of a sample."""
    few = torch.tensor([2, -1, 3, 1, -2, 0] if zero else [2, -1, 3, 1, -2])
    numbers = few.repeat(x[0].numel())[: x[0].numel()].view(x.shape[1:])
    return (numbers.abs() if dtype == "uint8" else numbers).to(getattr(torch, dtype))


def _integer_options(draw: Draw, shape: Shape) -> Options:
    return {"dtype": draw(st.sampled_from(["int64", "int32", "int16", "uint8"]))}


def _scaled_by_integer(operator: str) -> Kind:
    """A product or quotient with an integer that all elements share, in a tensor."""
    ways = OPERATORS[operator]
    run = next(iter(ways.values()))
    return Kind(
        lambda w, x, c: run(x, torch.tensor(c)),
        "passed",
        ways={
            name: lambda w, x, c, _way=way: _way(x, torch.tensor(c)) for name, way in ways.items()
        },
        options=lambda draw, shape: {"c": draw(st.sampled_from([2, -3]))},
        tail=by_sign,
    )


SOURCES: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda table: table[list(range(len(table) - 1, 0, -1))],
    "slice": lambda table: table[1:],
    "embedding": lambda table: F.embedding(
        torch.arange(len(table) - 1), table.flatten(1)
    ).unflatten(1, table.shape[1:]),
    "normalized": lambda table: F.normalize(table[1:], dim=-1),
    "fast weights": lambda table: table[1:] - 0.1 * table[:1].tanh(),
    "leaf": lambda table: table[1:].detach().requires_grad_(),
}
"""How a constant with a history of its own is made, from a parameter with one row more."""


class Stored(nn.Module):
    """A call with a constant that was made before the forward pass, with its history."""

    def __init__(
        self,
        run: Callable[..., Any],
        made: Callable[[Tensor], Tensor],
        weights: Sequence[Tensor],
        options: Options,
    ) -> None:
        super().__init__()
        self.run, self.options = run, options
        self.table = nn.Parameter(weights[0].clone())
        with torch.enable_grad():
            self.constant = made(self.table)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self.constant = fn(self.constant)
        return self

    def forward(self, *xs: Tensor) -> Any:
        return self.run(*xs, self.constant, **self.options)


def _foreign(
    run: Callable[..., Tensor],
    size: Callable[..., Sequence[int]],
    define: Callable[..., Value],
    *,
    options: Callable[[Draw, Shape], Options] = lambda draw, shape: {},
    finish: Callable[[Tensor], Tensor] = lambda rows: rows,
    fits: Callable[[Shape], bool] = lambda shape: True,
) -> Kind:
    """A call of a tensor and a constant with a history of its own, which does not depend on the input.

    Args:
        run: from the tensor, the constant and options to the output.
        size: of the rows that the constant is made of, from the shape of a sample and options.
        define: from a definition, the constant without history, the value and options.
        finish: from the rows to the constant.
    """

    def made(table: Tensor, source: str) -> Tensor:
        return finish(SOURCES[source](table))

    def drawn(draw: Draw, shape: Shape) -> Options:
        return {"source": draw(st.sampled_from(list(SOURCES)))} | options(draw, shape)

    def weights(shape: Shape, source: str, **o: Any) -> list[tuple[Sequence[int], str]]:
        rows, *rest = size(shape, **o)
        return [((rows + 1, *rest), "weight" if "out" in o else "normal")]

    def stored(w: Sequence[Tensor], o: Options) -> nn.Module:
        others = {name: value for name, value in o.items() if name != "source"}
        return Stored(run, lambda table: made(table, o["source"]), w, others)

    def inside(w: Sequence[Tensor], x: Tensor, source: str, **o: Any) -> Tensor:
        return run(x, made(w[0], source), **o)

    def defined(d: Definition, w: Sequence[Tensor], x: Value, source: str, **o: Any) -> Value:
        return define(d, made(w[0], source).detach(), x, **o)

    return Kind(inside, "parts", defined, ways={"inside": inside}, modules={"stored": stored},
                options=drawn, weights=weights, fits=fits)  # fmt: skip


def _called(run: Callable[..., Tensor]) -> Callable[..., Value]:
    """The definition of one call of a value and a constant."""

    def define(d: Definition, constant: Tensor, x: Value, **o: Any) -> Value:
        return d.call(lambda w, t: run(t, w[0], **o), x, weights=[constant])

    return define


def _two_rows(shape: Shape) -> Sequence[int]:
    return (2, shape[-1])


def _mean_of_rows(rows: Tensor) -> Tensor:
    return rows.mean(0)


def _out(draw: Draw, shape: Shape) -> Options:
    return {"out": draw(st.integers(2, 4))}


def _foreign_linear() -> Kind:
    def run(x: Tensor, c: Tensor, out: int) -> Tensor:
        return F.linear(x, c)

    return _foreign(run, lambda shape, out: (out, shape[-1]), _called(run), options=_out)


def _foreign_matmul() -> Kind:
    def run(x: Tensor, c: Tensor, out: int) -> Tensor:
        return x @ c.T

    return _foreign(
        run,
        lambda shape, out: (out, shape[-1]),
        _called(run),
        options=_out,
        fits=lambda shape: shape[-1] > 1,
    )


def _foreign_bias() -> Kind:
    def run(x: Tensor, c: Tensor) -> Tensor:
        return F.linear(x, torch.eye(x.shape[-1], dtype=x.dtype) + 0.5, c)

    return _foreign(run, _two_rows, _called(run), finish=_mean_of_rows)


def _foreign_convolution() -> Kind:
    def run(x: Tensor, c: Tensor, out: int) -> Tensor:
        return F.conv1d(x, c)

    return _foreign(
        run,
        lambda shape, out: (out, shape[0], 2),
        _called(run),
        options=_out,
        fits=lambda shape: len(shape) == 2 and shape[1] > 1,
    )


def _foreign_norm() -> Kind:
    def run(x: Tensor, c: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], c, c)

    def define(d: Definition, constant: Tensor, x: Value) -> Value:
        return d.call(lambda w, t: _layer_norm([w[0], w[0]], t), x, weights=[constant])

    return _foreign(run, _two_rows, define, finish=_mean_of_rows, fits=lambda shape: shape[-1] > 1)


def _foreign_combined(operator: str) -> Kind:
    """An operator with a constant for each place along the last dimension."""
    run = next(iter(OPERATORS[operator].values()))
    return _foreign(
        run,
        _two_rows,
        lambda d, constant, x: _with_constant(d, operator, x, constant),
        finish=(lambda c: c.mean(0).abs() + 0.5) if operator == "div" else _mean_of_rows,
        fits=lambda shape: shape[-1] > 1,
    )


def _foreign_scale(operator: str) -> Kind:
    """A product or quotient with one number, as with the scale of the logits."""
    run = next(iter(OPERATORS[operator].values()))

    def define(d: Definition, constant: Tensor, x: Value) -> Value:
        return d.passed(lambda t: run(t, constant), x, tail=by_sign)

    return _foreign(run, lambda shape: (1, 1), define, finish=lambda c: c[0, 0])


def _foreign_cat() -> Kind:
    """Tokens of the model's own beside those of the input."""

    def run(x: Tensor, c: Tensor) -> Tensor:
        return torch.cat([c.expand(len(x), -1, -1), x], 1)

    def define(d: Definition, constant: Tensor, x: Value) -> Value:
        return d.moved(lambda t: run(t, constant), x)

    return _foreign(
        run,
        lambda shape: (1, shape[1]),
        define,
        fits=lambda shape: len(shape) == 2 and math.prod(shape) < 100,
    )


def _foreign_where() -> Kind:
    """Masked elements that are replaced by a token of the model's own."""

    def run(x: Tensor, c: Tensor) -> Tensor:
        return torch.where(_mask(x.shape[1:], 3), c, x)

    def define(d: Definition, constant: Tensor, x: Value) -> Value:
        return d.moved(lambda t: run(t, constant), x)

    return _foreign(run, _two_rows, define, finish=_mean_of_rows)


KINDS: dict[str, Kind] = {
    # affine
    "linear": Kind(
        _linear,
        modules={"module": _linear_module},
        options=lambda draw, shape: {"out": draw(st.integers(1, 5)), "bias": draw(st.booleans())},
        weights=lambda shape, out, bias: [((out, shape[-1]), "weight"), ((out,), "normal")][
            : 1 + bias
        ],
    ),
    "product and sum": Kind(
        lambda w, x, out: x @ w[0] + w[1],
        "parts",
        _weighted,
        options=lambda draw, shape: {"out": draw(st.integers(2, 4))},
        weights=lambda shape, out: [((shape[-1], out), "weight"), ((out,), "normal")],
        fits=lambda shape: shape[-1] > 1,
    ),
    "conv1d": _convolution(1),
    "conv2d": _convolution(2),
    "conv_transpose2d": Kind(
        _transposed,
        options=_transposed_options,
        weights=lambda shape, out, kernel, groups, **_: [
            ((shape[0], out, kernel, kernel), "weight")
        ],
        fits=lambda shape: len(shape) == 3,
    ),
    "avg_pool1d": _pool("avg", 1),
    "avg_pool2d": _pool("avg", 2),
    "adaptive_avg_pool1d": _adaptive("avg", 1),
    "adaptive_avg_pool2d": _adaptive("avg", 2),
    "max_pool1d": _pool("max", 1),
    "max_pool2d": _pool("max", 2),
    "adaptive_max_pool2d": _adaptive("max", 2),
    "mean": _over(torch.mean, by_share),
    "sum": _over(torch.sum, by_share),
    "amax": _over(torch.amax, by_gradient),
    "amin": _over(torch.amin, by_gradient),
    "logsumexp": _over(torch.logsumexp, by_gradient),
    "cumsum": Kind(lambda w, x, dim: x.cumsum(dim), options=_dims(1), tail=by_share),
    "interpolate": Kind(
        lambda w, x, mode: F.interpolate(x, scale_factor=2, mode=mode),
        modules={"module": lambda w, o: nn.Upsample(scale_factor=2, mode=o["mode"])},
        options=lambda draw, shape: {"mode": draw(st.sampled_from(["nearest", "bilinear"]))},
        fits=lambda shape: len(shape) == 3,
        tail=by_share,
    ),
    # normalisation
    "batch_norm": Kind(
        _batch_norm,
        tail=by_slope,
        ways={
            "function": lambda w, x: F.batch_norm(x, w[2].detach(), w[3].detach(), w[0], w[1]),
        },
        weights=lambda shape: [
            ((shape[0],), kind) for kind in ("normal", "normal", "normal", "positive")
        ],
    ),
    "batch_norm2d": Kind(
        _batch_norm,
        tail=by_slope,
        ways={"function": lambda w, x: F.batch_norm(x, w[2].detach(), w[3].detach(), w[0], w[1])},
        modules={"module": lambda w, o: _batch_norm_module(w, o, 3)},
        weights=lambda shape: [
            ((shape[0],), kind) for kind in ("normal", "normal", "normal", "positive")
        ],
        fits=lambda shape: len(shape) == 3,
    ),
    "layer_norm": Kind(
        _layer_norm,
        ways={"function": lambda w, x: F.layer_norm(x, x.shape[-1:], w[0], w[1])},
        modules={"module": lambda w, o: _with(nn.LayerNorm(len(w[0])), weight=w[0], bias=w[1])},
        weights=lambda shape: [(shape[-1:], "normal"), (shape[-1:], "normal")],
        fits=lambda shape: shape[-1] > 1,
    ),
    "group_norm": Kind(
        _group_norm,
        ways={"function": lambda w, x, groups: F.group_norm(x, groups, w[0], w[1])},
        modules={
            "module": lambda w, o: _with(
                nn.GroupNorm(o["groups"], len(w[0])), weight=w[0], bias=w[1]
            )
        },
        options=lambda draw, shape: {
            "groups": draw(st.sampled_from([g for g in (1, 2) if shape[0] % g == 0]))
        },
        weights=lambda shape, groups: [((shape[0],), "normal"), ((shape[0],), "normal")],
        fits=lambda shape: len(shape) > 1 and math.prod(shape[1:]) > 1,
    ),
    "rms_norm": Kind(
        _rms_norm,
        ways={"function": lambda w, x: F.rms_norm(x, x.shape[-1:], w[0], 1e-5)},
        weights=lambda shape: [(shape[-1:], "normal")],
    ),
    "normalize": Kind(
        lambda w, x: x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12).detach(),
        ways={"function": lambda w, x: F.normalize(x, dim=-1)},
        tail=whole,
    ),
    "softmax": Kind(
        lambda w, x, dim: _soft(x, dim),
        "parts",
        lambda d, w, x, dim: _soft_defined(d, x, dim),
        ways={
            "function": lambda w, x, dim: F.softmax(x, dim),
            "method": lambda w, x, dim: x.softmax(dim),
        },
        modules={"module": lambda w, o: nn.Softmax(o["dim"])},
        options=_dims(1),
    ),
    # element by element
    "relu": _elementwise(
        torch.relu, nn.ReLU, in_place=lambda x: x.relu_(), method=lambda x: x.relu(), tail=by_relu
    ),
    "relu in place": Kind(
        lambda w, x: x.relu(),
        ways={"in place": lambda w, x: F.relu(x, inplace=True)},
        modules={"module in place": lambda w, o: nn.ReLU(inplace=True)},
        tail=by_relu,
    ),
    "clamp at 0": _elementwise(
        lambda x: x.clamp(min=0), in_place=lambda x: x.clamp_(min=0), tail=by_relu
    ),
    "clamp": _elementwise(lambda x: x.clamp(-0.5, 0.7), in_place=lambda x: x.clamp_(-0.5, 0.7)),
    "relu6": _elementwise(F.relu6, nn.ReLU6),
    "leaky_relu": _elementwise(F.leaky_relu, nn.LeakyReLU, in_place=F.leaky_relu_),
    "elu": _elementwise(F.elu, nn.ELU, in_place=F.elu_),
    "selu": _elementwise(F.selu, nn.SELU),
    "gelu": _elementwise(F.gelu, nn.GELU),
    "gelu by tanh": _elementwise(
        lambda x: F.gelu(x, approximate="tanh"), lambda: nn.GELU(approximate="tanh")
    ),
    "silu": _elementwise(F.silu, nn.SiLU, in_place=lambda x: F.silu(x, inplace=True)),
    "mish": _elementwise(F.mish, nn.Mish),
    "hardswish": _elementwise(
        F.hardswish, nn.Hardswish, in_place=lambda x: F.hardswish(x, inplace=True)
    ),
    "softplus": _elementwise(F.softplus, nn.Softplus),
    "sigmoid": _elementwise(torch.sigmoid, nn.Sigmoid, in_place=lambda x: x.sigmoid_()),
    "hardsigmoid": _elementwise(F.hardsigmoid, nn.Hardsigmoid),
    "tanh": _elementwise(torch.tanh, nn.Tanh, in_place=lambda x: x.tanh_()),
    "hardtanh": _elementwise(F.hardtanh, nn.Hardtanh),
    "softsign": _elementwise(F.softsign, nn.Softsign),
    "abs": _elementwise(torch.abs, in_place=lambda x: x.abs_()),
    "square": _elementwise(torch.square, method=lambda x: x**2),
    "cube": _elementwise(lambda x: x**3),
    "exp": _elementwise(torch.exp),
    "cos": _elementwise(torch.cos),
    "erf": _elementwise(torch.erf),
    "log1p of square": Kind(
        lambda w, x: torch.log1p(x.square()),
        "parts",
        define=lambda d, w, x: d.call(
            lambda v, t: torch.log1p(t),
            d.call(lambda v, t: t.square(), x, tail=by_slope),
            tail=by_slope,
        ),
    ),
    "log of softplus": _of_positive(torch.log),
    "sqrt of softplus": _of_positive(torch.sqrt),
    "power of softplus": _of_positive(lambda x: x**1.5),
    # sums, products, quotients
    "add": _sum(
        torch.add,
        {
            "function": torch.add,
            "operator": lambda x, y: x + y,
            "method": lambda x, y: x.add(y),
            "in place": lambda x, y: x.add_(y),
            "in place operator": lambda x, y: x.__iadd__(y),
        },
    ),
    "add alpha": _sum(_add_scaled, {"function": _add_scaled}, 2),
    "sub": _sum(
        torch.sub, {"operator": lambda x, y: x - y, "in place": lambda x, y: x.sub_(y)}, -1
    ),
    "add number": _added_number(
        {
            "operator": lambda x, c: x + c,
            "reflected": lambda x, c: c + x,
            "in place": lambda x, c: x.add_(c),
            "in place operator": lambda x, c: x.__iadd__(c),
        }
    ),
    "sub number": _added_number({"operator": lambda x, c: x - c}, -1),
    "number less": _added_number({"operator": lambda x, c: c - x}, of_x=-1),
    "add parameter": Kind(
        lambda w, x: x + w[0],
        ways={"operator": lambda w, x: x + w[0], "in place": lambda w, x: x.add_(w[0])},
        weights=_of_each,
        tail=by_slope,
    ),
    "mul": Kind(
        lambda w, x, y: x * y,
        define=lambda d, w, x, y: _product(d, x, y),
        ways={"operator": lambda w, x, y: x * y, "in place": lambda w, x, y: x.mul_(y)},
        operands=2,
    ),
    "gate": Kind(
        lambda w, x, y: x * y.sigmoid(),
        "parts",
        _gated,
        ways={
            "operator": lambda w, x, y: x * y.sigmoid(),
            "in place": lambda w, x, y: x.mul_(torch.sigmoid(y)),
        },
        operands=2,
    ),
    "glu": Kind(
        lambda w, x, dim: F.glu(x, dim),
        "parts",
        _glu,
        modules={"module": lambda w, o: nn.GLU(o["dim"])},
        options=lambda draw, shape: {
            "dim": draw(st.sampled_from([i + 1 for i, n in enumerate(shape) if n % 2 == 0]))
        },
        fits=lambda shape: any(n % 2 == 0 for n in shape),
    ),
    "mul parameter": Kind(
        lambda w, x: x * w[0],
        ways={"operator": lambda w, x: w[0] * x, "in place": lambda w, x: x.mul_(w[0])},
        weights=_of_each,
        fits=lambda shape: math.prod(shape) > 1,
        tail=by_sign,
    ),
    "mul number": _scaling(
        torch.mul,
        {
            "operator": lambda x, c: x * c,
            "reflected": lambda x, c: c * x,
            "tensor": lambda x, c: x * torch.tensor(c, dtype=x.dtype),
            "in place": lambda x, c: x.mul_(c),
            "in place operator": lambda x, c: x.__imul__(c),
        },
    ),
    "div number": _scaling(
        torch.div, {"operator": lambda x, c: x / c, "in place": lambda x, c: x.div_(c)}
    ),
    "neg": Kind(
        lambda w, x: -x,
        "passed",
        ways={"operator": lambda w, x: -x, "in place": lambda w, x: x.neg_()},
        tail=by_slope,
    ),
    "log_softmax": Kind(
        lambda w, x, dim: F.log_softmax(x, dim), "passed", options=_dims(1), tail=whole
    ),
    "nan_to_num": Kind(
        lambda w, x: x.nan_to_num(),
        "passed",
        ways={"method": lambda w, x: x.nan_to_num(), "in place": lambda w, x: x.nan_to_num_()},
        tail=whole,
    ),
    "soft cap": Kind(
        lambda w, x, c: torch.tanh(x / c) * c,
        "parts",
        define=_soft_cap,
        ways={
            "operator": lambda w, x, c: torch.tanh(x / c) * c,
            "in place": lambda w, x, c: x.div_(c).tanh_().mul_(c),
        },
        options=_number,
    ),
    "divided": Kind(
        lambda w, x, y: x / (1 + y.abs()),
        "parts",
        _divided_by_size,
        ways={
            "operator": lambda w, x, y: x / (1 + y.abs()),
            "in place": lambda w, x, y: x.div_(1 + y.abs()),
        },
        operands=2,
    ),
    "maximum": Kind(lambda w, x, y: torch.maximum(x, y), operands=2, tail=by_gradient),
    "minimum": Kind(lambda w, x, y: torch.minimum(x, y), operands=2, tail=by_gradient),
    # masks, and factors and summands of other dtypes
    "times what is positive": _combined("mul", _positive),
    "times where another is positive": _combined("mul", _positive, operands=2),
    "times a mask": _combined("mul", _constant_mask, options=_mask_options),
    "plus a mask": _combined("add", _constant_mask, options=_mask_options),
    "times integers": _combined("mul", partial(_integers, zero=True), options=_integer_options),
    "divided by integers": _combined("div", _integers, options=_integer_options),
    "plus integers": _combined("add", _integers, options=_integer_options),
    "minus integers": _combined("sub", _integers, options=_integer_options),
    "integers less": _combined("less", _integers, options=_integer_options),
    "times an integer": _scaled_by_integer("mul"),
    "divided by an integer": _scaled_by_integer("div"),
    # constants with a history of their own
    "foreign linear": _foreign_linear(),
    "foreign matmul": _foreign_matmul(),
    "foreign bias": _foreign_bias(),
    "foreign convolution": _foreign_convolution(),
    "foreign norm": _foreign_norm(),
    **{f"foreign {operator}": _foreign_combined(operator) for operator in OPERATORS},
    "foreign scale": _foreign_scale("mul"),
    "foreign temperature": _foreign_scale("div"),
    "foreign cat": _foreign_cat(),
    "foreign where": _foreign_where(),
    # heads, and similarities
    "mean of two": Kind(
        lambda w, x, y: torch.stack([x, y], 1).mean(1),
        "parts",
        _mean_of_two,
        ways={
            "beside": lambda w, x, y: torch.stack([x, y], 1).mean(1),
            "behind": lambda w, x, y: torch.stack([x, y], -1).mean(-1),
        },
        operands=2,
        fits=lambda shape: math.prod(shape) < 100,
    ),
    "cosine": Kind(
        lambda w, x, y: F.cosine_similarity(x, y, dim=-1),
        "parts",
        _cosine,
        ways={
            "function": lambda w, x, y: F.cosine_similarity(x, y, dim=-1),
            "by hand": lambda w, x, y: (F.normalize(x, dim=-1) * F.normalize(y, dim=-1)).sum(-1),
        },
        operands=2,
        fits=lambda shape: len(shape) > 1 and shape[-1] > 1,
    ),
    "cosine to prototypes": Kind(
        _cosine_to,
        "parts",
        _cosine_to_defined,
        options=_out,
        weights=lambda shape, out: [((out, shape[-1]), "normal")],
        fits=lambda shape: shape[-1] > 1 and len(shape) < 3,
    ),
    # products of tensors
    "matmul": Kind(
        lambda w, x, y: x @ y.mT,
        "parts",
        lambda d, w, x, y: _scores(d, x, y),
        ways={
            "operator": lambda w, x, y: x @ y.mT,
            "function": lambda w, x, y: torch.matmul(x, y.transpose(-2, -1)),
        },
        fits=lambda shape: len(shape) > 1,
        operands=2,
    ),
    "bmm": Kind(
        lambda w, x, y: torch.bmm(x, y.transpose(1, 2)),
        "parts",
        lambda d, w, x, y: _scores(d, x, y),
        fits=lambda shape: len(shape) == 2,
        operands=2,
    ),
    "einsum": Kind(
        lambda w, x, y: torch.einsum("bn...,bm...->bnm", x, y),
        fits=lambda shape: len(shape) > 1,
        operands=2,
    ),
    "attention": Kind(
        _sdpa,
        "parts",
        lambda d, w, q, k, v, mask: _attended(d, q, k, v, mask),
        ways={"function": _sdpa, "by hand": _by_hand},
        options=lambda draw, shape: {"mask": draw(st.sampled_from(["none", "causal", "some"]))},
        fits=lambda shape: len(shape) > 1,
        operands=3,
    ),
    "heads": Kind(
        _multi_head,
        "parts",
        _multi_head_defined,
        modules={"module": _SelfAttention},
        options=lambda draw, shape: {"heads": draw(st.sampled_from([1, 2]))},
        weights=_heads_weights,
        fits=lambda shape: len(shape) == 2 and shape[1] % 2 == 0,
    ),
    # what moves elements
    "flatten": _move(
        lambda x: x.flatten(1),
        ways={
            "flatten": lambda x: x.flatten(1),
            "reshape": lambda x: x.reshape(len(x), -1),
            "function": lambda x: torch.flatten(x, 1),
        },
    ),
    "reshape": _move(
        lambda x, size: x.reshape(len(x), *size),
        lambda draw, shape: {"size": draw(st.sampled_from([shape[::-1], (-1, shape[0]), (1, -1)]))},
    ),
    "transpose": _move(
        lambda x: x.transpose(1, 2),
        least=2,
        ways={"transpose": lambda x: x.transpose(1, 2), "swapaxes": lambda x: x.swapaxes(2, 1)},
    ),
    "permute": _move(lambda x: x.permute(0, 3, 1, 2), least=3, most=3),
    "slice": _move(_sliced, _slice_options),
    "select": _move(
        lambda x, dim, at: x.select(dim, at),
        lambda draw, shape: _dims(1)(draw, shape) | {"at": draw(st.sampled_from([0, -1]))},
        least=2,
    ),
    "index": _move(lambda x, dim, places: x[_at(dim, places)], _index_options),
    "index_select": _move(
        lambda x, dim, places: x.index_select(dim, torch.tensor(places)), _index_options
    ),
    "flip": _move(lambda x, dim: x.flip(dim), _dims(1)),
    "roll": _move(lambda x, dim: x.roll(1, dim), _dims(1)),
    "pad": _move(lambda x: F.pad(x, (1, 1)), fits=lambda shape: math.prod(shape) < 100),
    "repeat": _move(
        lambda x, dim: x.repeat_interleave(2, dim),
        _dims(1),
        fits=lambda shape: math.prod(shape) < 100,
    ),
    "expand": _move(
        lambda x: x.unsqueeze(1).expand(-1, 2, *x.shape[1:]),
        most=2,
        fits=lambda shape: math.prod(shape) < 100,
    ),
    "sort": _move(lambda x: x.sort(-1)[0]),
    "topk": _move(lambda x: x.topk(1, 1)[0]),
    "where": _move(
        lambda x, y: torch.where(_mask(x.shape[1:], 3), x, y),
        operands=2,
    ),
    "masked_fill": _move(lambda x: x.masked_fill(_mask(x.shape[1:], 3), 0)),
    "cat": _move(
        lambda x, y, dim: torch.cat([x, y], dim),
        _dims(1),
        operands=2,
        fits=lambda shape: math.prod(shape) < 100,
    ),
    "stack": _move(
        lambda x, y: torch.stack([x, y], 1),
        most=2,
        operands=2,
        fits=lambda shape: math.prod(shape) < 100,
    ),
    "clone": _move(lambda x: x.clone()),
    "contiguous": _move(lambda x: x.contiguous()),
    "dropout": Kind(
        lambda w, x: x,
        "moved",
        ways={"function": lambda w, x: F.dropout(x, 0.5, False)},
        modules={"module": lambda w, o: nn.Dropout(0.5), "identity": lambda w, o: nn.Identity()},
    ),
    "chunk": _several(lambda x, dim: x.chunk(2, dim), _dims(1), fits=lambda shape: min(shape) > 1),
    "unbind": _several(
        lambda x, dim: x.unbind(dim), _dims(1), least=2, fits=lambda shape: max(shape) < 5
    ),
    "split": _several(
        lambda x, sizes: x.split(sizes, 1),
        lambda draw, shape: {"sizes": [1, shape[0] - 1]},
        fits=lambda shape: shape[0] > 1,
    ),
    # in-place calls on what is seen by other names
    **{
        f"{change} in a slice": _changed_slice(change)
        for change in ("relu_", "mul_", "add_", "mul_ by another", "set", "copy_")
    },
    "seen in a view": Kind(_seen_in_view, "parts", _seen_in_view_defined),
    "changed twice": Kind(_twice_changed, "parts", _twice_changed_defined, operands=2),
}


# ---------------------------------------------------------------------------------------- drawing them


class _Registers:
    """What is known of the registers of a program that is being drawn."""

    def __init__(self, shape: Shape) -> None:
        self.shapes = [shape]
        self.group = [0]
        """Registers of one number may share memory."""
        self.owns = [True]
        self.dead: set[int] = set()

    def alive(self) -> list[int]:
        return [r for r in range(len(self.shapes)) if r not in self.dead]

    def add(self, step: Step, shapes: Sequence[Shape]) -> None:
        first, kind = step.of[0], KINDS[step.kind]
        is_view = not kind.owns
        group = self.group[first] if is_view or "in place" in step.way else len(self.shapes)
        if "in place" in step.way:
            self.dead |= {r for r, g in enumerate(self.group) if g == group}
        elif is_view and len(step.of) > 1:  # a copy: `cat`
            group, is_view = len(self.shapes), False
        for shape in shapes:
            self.shapes.append(shape)
            self.group.append(group)
            self.owns.append(not is_view)


def _may_be_in_place(registers: _Registers, of: Sequence[int]) -> bool:
    target, *others = of
    apart = all(
        registers.group[other] != registers.group[target] or other == target for other in others
    )
    return registers.owns[target] and apart


TAIL_KINDS = [
    *(name for name, kind in KINDS.items() if kind.tail is not None or kind.rule == "moved"),
    *("add", "add alpha", "sub", "add number", "sub number", "number less", "mean of two"),
    *("softmax", "log1p of square", "log of softplus", "sqrt of softplus", "power of softplus"),
    *("times what is positive", "times a mask", "plus a mask", "times integers", "integers less"),
    *("divided by integers", "plus integers", "minus integers", "divided", "soft cap"),
    *(f"foreign {operator}" for operator in OPERATORS),
    *("foreign scale", "foreign temperature", "cosine", "cosine to prototypes"),
    *(f"{change} in a slice" for change in ("relu_", "mul_", "add_", "mul_ by another")),
    *("seen in a view", "changed twice", "foreign where", "mul", "gate", "layer_norm", "matmul"),
]  # fmt: skip
"""What is drawn behind the last layer with weights: calls with a tail rule, and some that end the tail."""
JOINED = ["add", "sub", "mean of two", "maximum", "add alpha", "mul", "divided", "cat", "where"]
"""What is made of two heads, or of two crops."""
REDUCED = ["mean", "sum", "logsumexp", "amax", "amin", "cumsum"]
"""What is made of the scores of several places."""


@st.composite
def programs(draw: Draw, longest: int = 8, classes: int = 4, tails: bool = TAILS) -> Program:
    """Programs that end with scores for each sample: a row, or with ``tails`` also a map of each class."""
    shapes = st.sampled_from([(5,), (3, 4), (4, 6), (2, 5, 5), (3, 4, 6), (1, 6, 6), (2,)])
    shape, seed, batch = draw(shapes), draw(st.integers(0, 2**16)), draw(st.integers(1, 3))
    joint = draw(st.booleans())
    registers = _Registers(shape)
    steps: list[Step] = []

    def partial_program() -> Program:
        return Program(shape, batch, joint, seed, tuple(steps))

    def append(step: Step) -> bool:
        steps.append(step)
        of = registers.shapes[step.of[0]]
        made = result_shapes(
            step, registers.shapes, weights_of(partial_program(), len(steps) - 1, of), batch
        )
        if any(math.prod(s) > LARGEST or len(s) > 3 or not s or 0 in s for s in made):
            steps.pop()
            return False
        registers.add(step, made)
        return True

    def draw_step(names: Sequence[str], targets: Sequence[int], others: Sequence[int] = ()) -> None:
        """A step of one of these kinds; its other operands are drawn unless they are given."""
        target = draw(st.sampled_from(targets))
        of_shape = registers.shapes[target]
        fitting = [name for name in names if KINDS[name].fits(of_shape)]
        if not fitting:
            return
        name = draw(st.sampled_from(fitting))
        kind = KINDS[name]
        alike = others or [r for r in registers.alive()[::-1] if registers.shapes[r] == of_shape]
        of = (target, *(draw(st.sampled_from(alike)) for _ in range(kind.operands - 1)))
        again = [
            i
            for i, step in enumerate(steps)
            if step.kind == name
            and step.layer is None
            and "in place" not in step.way
            and registers.shapes[step.of[0]] == of_shape
        ]
        if again and draw(st.integers(0, 3)):
            before = steps[again[-1]]
            append(Step(name, of, before.way, before.options, again[-1]))
            return
        ways = [
            way
            for way in kind.all_ways()
            if "in place" not in way or _may_be_in_place(registers, of)
        ]
        if ways:
            options = kind.options(draw, of_shape)
            append(Step(name, of, draw(st.sampled_from(ways)), options))

    def last() -> int:
        return registers.alive()[-1]

    def flat() -> int:
        if len(registers.shapes[last()]) > 1:
            append(Step("flatten", (last(),), "flatten"))
        return last()

    def linear(of: int, layer: int | None = None) -> int:
        options = {"out": width, "bias": bias}
        append(Step("linear", (of,), "module", options, layer))
        return last()

    for _ in range(draw(st.integers(0, longest))):
        draw_step(list(KINDS), registers.alive()[::-1][:4])
    width, bias = draw(st.integers(2, classes)), draw(st.booleans())
    if not tails:
        linear(flat())
        ending = draw(
            st.sampled_from(["none", "none", "none", "log_softmax", "softmax", "relu in place"])
        )
        if ending != "none":
            options = {"dim": 1} if "softmax" in ending else {}
            append(Step(ending, (last(),), KINDS[ending].all_ways()[0], options))
        return partial_program()
    of_last = registers.shapes[last()]
    heads = ["one", "one", "two", "crops"]
    heads += {1: [], 2: ["places", "places"], 3: ["map", "map", "map"]}[len(of_last)]
    head = draw(st.sampled_from(heads))
    if head == "places":
        first = linear(last())
        append(Step("transpose", (first,), "transpose"))
        draw_step(["sigmoid", "clone", "neg", "tanh"], [last()])
        append(
            Step(
                draw(st.sampled_from(REDUCED[:-1])),
                (last(),),
                "function",
                {"dim": 2, "keepdim": False},
            )
        )
    elif head == "map":
        kernel = tuple(min(3, extent) for extent in of_last[1:])
        options = {"out": 2, "kernel": kernel, "stride": 1, "padding": 0, "dilation": 1,
                   "groups": 1, "bias": bias}  # fmt: skip
        append(Step("conv2d", (last(),), "module", options))
        first = last()
        draw_step(["interpolate", "avg_pool2d", "adaptive_avg_pool2d", "max_pool2d"], [first])
    else:
        features = flat()
        (count,) = registers.shapes[features]
        if head == "crops" and count > 1:
            half = {"dim": 1, "step": 1, "start": 0, "stop": count // 2}
            append(Step("slice", (features,), "function", half))
            first = linear(last())
            layer = len(steps) - 1
            half = {"dim": 1, "step": 1, "start": count - count // 2, "stop": count}
            append(Step("slice", (features,), "function", half))
            draw_step(JOINED, [first], [linear(last(), layer)])
        elif head == "two":
            first = linear(features)
            draw_step(JOINED, [first], [linear(features)])
        else:
            first = linear(features)
    for _ in range(draw(st.integers(0, 3))):
        behind = [r for r in registers.alive()[::-1] if r >= first]
        draw_step(TAIL_KINDS, behind[:3])
    return partial_program()
