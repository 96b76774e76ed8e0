"""What relevance does at each call: where it stops being finite, where it is lost.

Axes: B samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from captum_abslrp.engine.observers import ObservedCall, Observer

if TYPE_CHECKING:
    from captum_abslrp.contrast import Target
    from captum_abslrp.mappings import Mapping

__all__ = ["RelevanceTrace", "TracedCall", "Observer", "trace_relevance"]


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
        from captum_abslrp.inspection import table

        return table(
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


def _traced(call: ObservedCall, total: float) -> TracedCall:
    """What is known of a call; `total` is the relevance that the output started with."""
    assert call.arrived is not None
    return TracedCall(
        call.call,
        call.path,
        call.layer,
        call.rule,
        float(call.arrived[0].mean()) / total,
        tuple(float(share[0].mean()) / total for share in call.handed_on),
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
    from captum_abslrp.engine.propagation import TOTAL

    observer = Observer(traced=True)
    AbsLRP(model, mapping, normalization=normalization, output=output).explain_watched(
        inputs, target, additional_forward_args, observer, class_dim=class_dim
    )
    return RelevanceTrace(tuple(_traced(call, TOTAL) for call in observer.calls))
