"""The base class of rules with a factor for relevance per magnitude."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.dependence import is_source
from captum_abslrp.engine.errors import UnsupportedCallError
from captum_abslrp.engine.tape import Record
from captum_abslrp.rules.base import Rule, once


class FactorRule(Rule):
    r"""Base class of rules for calls with one input: :math:`s_x = k(x) \, s`.

    A subclass defines :meth:`factor`, which returns :math:`k(x)`. Here :math:`s` is relevance per magnitude.

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
        """Return the factor for the relevance per magnitude of the output.

        Args:
            x: the input of the call; half precision is converted to float32.
            args, kwargs: the other arguments of the call.

        Returns:
            Tensor with the shape of ``x``, which is also that of the output.
        """
        raise NotImplementedError(
            f"Expected {type(self).__name__} to define `factor`, but got a class that does not."
        )

    def record(self, call: Call) -> Record:
        if not call.operands or not is_source(call.operands[0]):
            found = type(call.operands[0]).__name__ if call.operands else "no positional argument"
            raise UnsupportedCallError(
                f"Expected the first positional argument of {call} to be the tensor that receives relevance "
                f"from {type(self).__name__}, but got {found}. Use `TwinRule()` for this call."
            )
        x, *others = call.operands
        output = call.run(lambda: call.func(*call.args, **call.kwargs))
        saved = call.save(x)
        factor = once(lambda: self.factor(saved(), *others, **call.kwargs))
        return Record(output, [x], lambda s: [s * factor()])
