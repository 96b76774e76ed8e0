"""The relevance that flows through each call of a model, to find where relevance is lost or grows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from captum_abslrp.attribution import AbsLRP
from captum_abslrp.engine.observers import ObservedCall, Observer
from captum_abslrp.engine.propagation import TOTAL
from captum_abslrp.mappings import Mapping
from captum_abslrp.seeds import Target
from captum_abslrp.text import markdown_table

__all__ = ["RelevanceTrace", "TracedCall", "trace_relevance"]


@dataclass(frozen=True)
class TracedCall:
    """A call of the backward pass and the relevance that flows through it.

    Values are sums of magnitudes, averaged over samples, as a fraction of the seed.

    Attributes:
        call: the function, for example ``"torch.nn.functional.conv2d"``.
        path: the module that made the call, for example ``"blocks.0.attn.proj"``.
        layer: the type of this module.
        rule: the rule of the call.
        arrived: relevance of the output of the call.
        passed: relevance of each input of the call.
    """

    call: str
    path: str
    layer: str
    rule: str
    arrived: float
    passed: tuple[float, ...]


@dataclass(frozen=True)
class RelevanceTrace:
    """The calls of the backward pass from the output to the input; prints as a table.

    Attributes:
        calls: every call that has a rule and receives relevance.
    """

    calls: tuple[TracedCall, ...]

    def __str__(self) -> str:
        return markdown_table(
            ["call", "in", "rule", "arrived", "passed"],
            [
                [
                    call.call,
                    f"{call.path or '(model)'} ({call.layer})",
                    call.rule,
                    f"{call.arrived:.3g}",
                    " + ".join(f"{share:.3g}" for share in call.passed),
                ]
                for call in self.calls
            ],
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
    """Explain a target and measure the relevance at each call, to find where relevance is lost or grows.

    The function is for debugging: it copies every tensor, which takes time and memory.

    Args:
        model, mapping, normalization, output: as in :class:`~captum_abslrp.AbsLRP`.
        inputs, target, additional_forward_args, class_dim: as in :meth:`AbsLRP.attribute
            <captum_abslrp.AbsLRP.attribute>`. There is no contrast.

    Returns:
        The calls of the backward pass, from the output to the inputs. Calls that only move elements are
        omitted, because they conserve relevance. With ``"joint"``, the relevance of the inputs of a call
        sums to that of its output, unless its rule passes on no relevance. With ``"separate"``, each input
        gets a total of one, and relevance grows where branches meet.

    Raises:
        TypeError, ValueError, IndexError, FloatingPointError, UnsupportedCallError: as in ``attribute``.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
        >>> trace = trace_relevance(model, torch.rand(4, 3), target=1)
        >>> [call.call for call in trace.calls]
        ['torch.nn.functional.linear', 'torch.nn.functional.relu', 'torch.nn.functional.linear']
        >>> trace.calls[0].path, trace.calls[0].arrived
        ('2', 1.0)
    """
    observer = Observer(traced=True)
    AbsLRP(model, mapping, normalization=normalization, output=output).explain_observed(
        inputs, target, additional_forward_args, observer, class_dim=class_dim
    )
    return RelevanceTrace(tuple(map(_traced, observer.calls)))


def _traced(call: ObservedCall) -> TracedCall:
    """The sums of an observed call, as a fraction of the seed."""
    assert call.arrived is not None
    return TracedCall(
        call.function,
        call.path,
        call.layer,
        call.rule,
        float(call.arrived[0].mean()) / TOTAL,
        tuple(float(share[0].mean()) / TOTAL for share in call.passed),
    )
