"""What relevance does at each call: where it stops being finite, where it is lost.

Axes: B samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import resolve_name

from captum_abslrp.functional import EPS, sums
from captum_abslrp.steps import Kept, in_full_precision
from captum_abslrp.text import markdown_table

if TYPE_CHECKING:
    from captum_abslrp.contrast import Target
    from captum_abslrp.interception import Call
    from captum_abslrp.mappings import Mapping

__all__ = ["RelevanceTrace", "TracedCall", "Watch", "trace_relevance"]


@dataclass(frozen=True)
class TracedCall:
    """A call on the way back, and the relevance that went through it.

    Sums are of magnitudes, mean over the samples, in shares of what the output started with.

    Attributes:
        call: the function, for example ``"torch.nn.functional.conv2d"``.
        path: the module that made the call, for example ``"blocks.0.attn.proj"``.
        layer: the type of this module.
        rule: what answered the call.
        arrived: relevance of its output.
        handed_on: relevance of each of its inputs.
    """

    call: str
    path: str
    layer: str
    rule: str
    arrived: float
    handed_on: tuple[float, ...]


@dataclass(frozen=True)
class RelevanceTrace:
    """The calls on the way back from the output to the input; printed as a table.

    Attributes:
        calls: every call that a rule answered and that relevance went through.
    """

    calls: tuple[TracedCall, ...]

    def __str__(self) -> str:
        return markdown_table(
            ["call", "in", "rule", "arrived", "handed on"],
            [
                [
                    call.call,
                    f"{call.path or '(model)'} ({call.layer})",
                    call.rule,
                    f"{call.arrived:.3g}",
                    " + ".join(f"{share:.3g}" for share in call.handed_on),
                ]
                for call in self.calls
            ],
        )


@dataclass
class Watch:
    """What is looked at while a model is explained.

    Args:
        finite: raise FloatingPointError at the first call that makes something that is not finite.
        traced: keep what is needed to tell the relevance at each call.
        repeated: whether this is a second look, so that nothing is warned about again.
    """

    finite: bool = False
    traced: bool = False
    repeated: bool = False
    calls: list[Watched] = field(default_factory=list)
    """The calls on the way back, in its order, where they are traced."""

    def answered(
        self, call: Call, rule: Any, sources: Sequence[Tensor], output: Tensor, batch_size: int
    ) -> Watched:
        """Look at a call of the forward pass that a rule has answered."""
        if self.finite:
            _check_output(call, sources, output)
        return Watched(
            self,
            str(call),
            resolve_name(call.func) or call.name,
            call.path,
            type(call.module).__name__,
            repr(rule),
            batch_size,
            Kept(output.detach().clone()) if self.traced else None,
            [Kept(source.detach().clone()) for source in sources] if self.traced else [],
        )


def _check_output(call: Call, sources: Sequence[Tensor], output: Tensor) -> None:
    from captum_abslrp.calls import tensors_in

    # A mask may be of -inf, and so may be what it is added to.
    given = [t for t in (*tensors_in((call.args, call.kwargs)), *sources) if t.is_floating_point()]
    masked = any(bool(t.isinf().any()) for t in given)
    bad = output.isnan() if masked else ~output.isfinite()
    if not bool(bad.any()):
        return
    spoilt = any(bool(t.isnan().any()) for t in given)
    finite = [t.detach().abs().float().max().item() for t in given if t.numel() and not spoilt]
    of = (
        "an input or weight of it has NaN already"
        if spoilt
        else f"its inputs and weights are up to {max(finite, default=0):.3g} in magnitude"
    )
    raise FloatingPointError(
        f"Expected every call to return finite values, but got {int(bad.sum())} NaN or infinite ones "
        f"of {output.numel()} in {output.dtype} from {call}; {of}. Explain inputs in the range that the "
        f"model was made for, or compute in a wider dtype: `model.float()`, `model.double()`."
    )


@dataclass
class Watched:
    """A call that is looked at again on the way back."""

    watch: Watch
    name: str
    call: str
    path: str
    layer: str
    rule: str
    batch_size: int
    output: Kept | None
    sources: Sequence[Kept]
    arrived: Tensor | None = None
    """What has arrived, of each seed and sample."""
    handed_on: Sequence[Tensor] = ()
    """What each source got, of each seed and sample."""

    def arrives(self, seeds: Sequence[Tensor], *, stabilised: bool) -> None:
        """What arrives, per magnitude of the output, for each seed."""
        self._check(seeds, "arrived at")
        if self.output is not None:
            magnitude = self.output().abs() + (EPS if stabilised else 0)
            self.arrived = torch.stack([sums(magnitude, s, self.batch_size) for s in seeds])

    def hands_on(self, of_seeds: Sequence[Sequence[Tensor]], *, stabilised: bool = False) -> None:
        """What is handed on, per magnitude of each source."""
        for shares in of_seeds:
            self._check(shares, "came out of")
        if self.output is None:
            return
        magnitudes = [kept().abs() + (EPS if stabilised else 0) for kept in self.sources]
        self.handed_on = [
            torch.stack(
                [sums(size, in_full_precision(shares[i]), self.batch_size) for shares in of_seeds]
            )
            for i, size in enumerate(magnitudes)
        ]
        self.watch.calls.append(self)

    def _check(self, values: Sequence[Tensor], what: str) -> None:
        if self.watch.finite and not all(bool(s.isfinite().all()) for s in values):
            raise FloatingPointError(
                f"Expected relevance to be finite, but got NaN or infinite values that {what} {self.name} "
                f"on the way back. Compute in a wider dtype: `model.float()`, `model.double()`."
            )

    def ends(self, seed: int, samples: Sequence[int]) -> bool:
        """Whether relevance of a seed arrived for one of the samples, and no source got any of it."""
        assert self.arrived is not None
        arrived = self.arrived[seed, samples] > 0
        passed = [share[seed, samples] > 0 for share in self.handed_on]
        return bool((arrived & ~torch.stack(passed).any(0)).any())

    def traced(self, total: float) -> TracedCall:
        """What is told of the call; `total` is what the output started with."""
        assert self.arrived is not None
        return TracedCall(
            self.call,
            self.path,
            self.layer,
            self.rule,
            float(self.arrived[0].mean()) / total,
            tuple(float(share[0].mean()) / total for share in self.handed_on),
        )


def trace_relevance(
    model: nn.Module,
    inputs: Tensor | tuple[Tensor, ...],
    target: Target = None,
    additional_forward_args: Any = None,
    *,
    mapping: Mapping | str | None = None,
    normalization: str = "separate",
    output: Callable[[Any], Tensor] | None = None,
    class_dim: int | None = None,
) -> RelevanceTrace:
    """Explain a target and tell how much relevance went through each call: where it is lost, or grows.

    For debugging: everything is kept and looked at, which takes time and memory.

    Args:
        model, mapping, normalization, output: as for :class:`~captum_abslrp.AbsLRP`.
        inputs, target, additional_forward_args, class_dim: as for :meth:`AbsLRP.attribute
            <captum_abslrp.AbsLRP.attribute>`; the map is that of the target alone.

    Returns:
        The calls on the way back, from the output to the inputs. Calls that move elements are left out:
        they keep all of it. With ``"joint"`` what is handed on adds up to what arrived, unless a rule hands
        on nothing at all; with ``"separate"`` each input gets a total of one, and what arrives grows where
        branches meet.

    Raises:
        TypeError, ValueError, IndexError, FloatingPointError, UnsupportedCallError: as ``attribute``.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
        >>> trace = trace_relevance(model, torch.rand(4, 3), target=1)
        >>> [call.call for call in trace.calls]
        ['torch.nn.functional.linear', 'torch.nn.functional.relu', 'torch.nn.functional.linear']
        >>> trace.calls[0].path, trace.calls[0].arrived
        ('2', 1.0)
    """
    from captum_abslrp.attribution import AbsLRP
    from captum_abslrp.propagation import TOTAL

    watch = Watch(traced=True)
    AbsLRP(model, mapping, normalization=normalization, output=output).explain_watched(
        inputs, target, additional_forward_args, watch, class_dim=class_dim
    )
    return RelevanceTrace(tuple(call.traced(TOTAL) for call in watch.calls))
