"""The base class of rules that multiply relevance per magnitude by a factor."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.dependence import is_source
from captum_abslrp.engine.errors import UnsupportedCallError
from captum_abslrp.engine.tape import Record
from captum_abslrp.rules.base import Rule, once


class FactorRule(Rule):
    r"""Base class for a rule of a call with one input: :math:`s_x = k(x) \, s`.

    A subclass defines :meth:`factor`, the ``k`` of the call.

    Example:
        >>> class SquareRule(FactorRule):
        ...     def factor(self, x):
        ...         return 4 * x.clamp(min=0)
        >>> mapping = get_mapping().extended({"square": SquareRule()})
        >>> class Net(nn.Linear):
        ...     def forward(self, x):
        ...         return super().forward(x).square()
        >>> AbsLRP(Net(3, 2), mapping).attribute(torch.rand(4, 3), target=0).shape
        torch.Size([4, 3])
    """

    def factor(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the relevance per magnitude of the output is multiplied by.

        Args:
            x: the input of the call, in float32 where it is of half precision.
            args, kwargs: its other arguments.

        Returns:
            Tensor shaped like ``x`` and like the output.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define `factor`.")

    def record(self, call: Call) -> Record:
        if not call.operands or not is_source(call.operands[0]):
            found = type(call.operands[0]).__name__ if call.operands else "no argument by position"
            raise UnsupportedCallError(
                f"Expected the first argument of {call} to be the tensor that {type(self).__name__} passes "
                f"relevance to, by position, but got {found} there. Use `TwinRule()` for it."
            )
        x, *others = call.operands
        output = call.run(lambda: call.func(*call.args, **call.kwargs))
        saved = call.save(x)
        factor = once(lambda: self.factor(saved(), *others, **call.kwargs))
        return Record(output, [x], lambda s: [s * factor()])
