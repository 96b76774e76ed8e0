r"""The LRP rules of linear layers and convolutions: z-plus, gamma, alpha-beta, flat ...

Each rule splits the contributions :math:`x_i w_{ij}` of a layer into groups and distributes relevance within
each group in proportion to the contributions. Source: Montavon et al., *Layer-Wise Relevance Propagation: An
Overview*, 2019, extended to inputs of both signs: positive and negative refer to the contributions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_abslrp.engine import numerics
from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.dependence import carries_relevance
from captum_abslrp.engine.nodes import history, is_recorded
from captum_abslrp.engine.numerics import EPS
from captum_abslrp.engine.tape import Record
from captum_abslrp.rules.base import Rule
from captum_abslrp.rules.groups import Group, LayerParts, LayerRule, Run, Term, total


class ZPlusRule(LayerRule):
    r"""The z-plus rule: positive contributions only, :math:`R_i = \sum_j (x_i w_{ij})^+ / z_j^+ \, R_j`.

    Here :math:`z_j^+ = \sum_i (x_i w_{ij})^+ + b_j^+`.

    Args:
        stabilizer: added to the sum.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> layer.rule = ZPlusRule()
        >>> LRP(nn.Sequential(layer)).attribute(torch.rand(4, 3), target=0).shape
        torch.Size([4, 3])
    """

    spares_zeros = True

    def groups(self, parts: LayerParts) -> list[Group]:
        w, b = parts.weight, parts.bias
        return [Group(parts.positive(w.clamp(min=0), w.clamp(max=0), _clamp(b, min=0)))]


class AlphaBetaRule(LayerRule):
    r"""The alpha-beta rule: positive and negative contributions, weighted :math:`\alpha` and :math:`-\beta`.

    Relevance is :math:`\alpha` times the share of the positive contributions minus :math:`\beta` times the
    share of the negative contributions.

    Args:
        alpha, beta: nonnegative, with :math:`\alpha - \beta = 1`.
        stabilizer: added to the sums.

    Raises:
        ValueError: if ``alpha`` and ``beta`` do not meet these conditions.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> layer.rule = AlphaBetaRule(2, 1)
        >>> LRP(nn.Sequential(layer)).attribute(torch.rand(4, 3), target=0).shape
        torch.Size([4, 3])
    """

    spares_zeros = True

    def __init__(self, alpha: float = 2.0, beta: float = 1.0, stabilizer: float = EPS) -> None:
        if alpha < 0 or beta < 0 or abs(alpha - beta - 1) > 1e-9:
            raise ValueError(
                f"Expected `alpha` and `beta` to be at least 0 and `alpha - beta` to be 1, but got "
                f"alpha={alpha}, beta={beta}."
            )
        super().__init__(stabilizer)
        self.alpha, self.beta = alpha, beta

    def groups(self, parts: LayerParts) -> list[Group]:
        w, b = parts.weight, parts.bias
        plus, minus = w.clamp(min=0), w.clamp(max=0)
        return [
            Group(parts.positive(plus, minus, _clamp(b, min=0)), self.alpha),
            Group(parts.positive(minus, plus, _clamp(b, max=0)), -self.beta),
        ]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(alpha={self.alpha}, beta={self.beta})"


class GammaRule(LayerRule):
    r"""The gamma rule: contributions with the sign of the output are weighted by :math:`1 + \gamma`.

    :math:`R_i = \sum_j (c_{ij} + \gamma c_{ij}^+) / \sum_{i'} (c_{i'j} + \gamma c_{i'j}^+) \, R_j` with
    :math:`c_{ij} = x_i w_{ij}` if :math:`z_j > 0`, and with :math:`c^-` instead of :math:`c^+` if it is
    negative (Montavon et al. 2019; for inputs of both signs, Andéol et al. 2021).

    Args:
        gamma: additional weight of these contributions.
        stabilizer: added to the sums.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> layer.rule = GammaRule(0.25)
        >>> LRP(nn.Sequential(layer)).attribute(torch.rand(4, 3), target=0).shape
        torch.Size([4, 3])
    """

    spares_zeros = True

    def __init__(self, gamma: float = 0.25, stabilizer: float = EPS) -> None:
        super().__init__(stabilizer)
        self.gamma = gamma

    def groups(self, parts: LayerParts) -> list[Group]:
        def more_positive(x: Tensor) -> Tensor:
            return torch.add(x, x.clamp(min=0), alpha=self.gamma)

        def more_negative(x: Tensor) -> Tensor:
            return F.leaky_relu(x, 1 + self.gamma)

        w, b = parts.weight, parts.bias
        plus, minus = more_positive(w), more_negative(w)
        biases = (None, None) if b is None else (more_positive(b), more_negative(b))
        return [
            Group(parts.positive(plus, minus, biases[0]), sign=1),
            Group(parts.positive(minus, plus, biases[1]), sign=-1),
        ]

    def factors(
        self, parts: LayerParts, groups: Sequence[Group], output: Tensor, run: Run
    ) -> list[Tensor]:
        if not parts.is_whole or type(self).groups is not GammaRule.groups:
            return super().factors(parts, groups, output, run)
        # The positive contributions p and the negative ones n sum to z, so (z + gamma p) + (z + gamma n) is
        # (2 + gamma) z. The magnitude of the first sum where z is positive, and of the second where z is
        # negative, is the first sum minus (2 + gamma) times the negative part of z, without cancellation.
        size = total(groups[0], output, run)
        size.sub_(output.clamp(max=0), alpha=2 + self.gamma).add_(self.stabilizer)
        ratio = output.abs().div_(size)
        of_positive = numerics.rectify(ratio, output)
        return [of_positive, numerics.rectify_in_place(ratio, output, negative=True).neg_()]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(gamma={self.gamma})"


class FlatRule(LayerRule):
    r"""The flat rule: each output spreads its relevance evenly, :math:`R_i = \sum_j R_j / \sum_{i'} 1`.

    The rule is used for the first layer (Lapuschkin et al. 2019).

    Args:
        stabilizer: added to the number of inputs.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> layer.rule = FlatRule()
        >>> LRP(nn.Sequential(layer)).attribute(torch.rand(4, 3), target=0).shape
        torch.Size([4, 3])
    """

    def groups(self, parts: LayerParts) -> list[Group]:
        return [Group([Term(torch.ones_like(parts.x), torch.ones_like(parts.weight))])]


class WSquareRule(LayerRule):
    r"""The w-square rule: :math:`R_i = \sum_j w_{ij}^2 / (\sum_{i'} w_{i'j}^2 + b_j^2) \, R_j`.

    The rule is used for the first layer and does not depend on its input (Montavon et al. 2017).

    Args:
        stabilizer: added to the sum.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> layer.rule = WSquareRule()
        >>> LRP(nn.Sequential(layer)).attribute(torch.rand(4, 3), target=0).shape
        torch.Size([4, 3])
    """

    def groups(self, parts: LayerParts) -> list[Group]:
        b = parts.bias
        squares = parts.weight.square(), None if b is None else b.square()
        return [Group([Term(torch.ones_like(parts.x), *squares)])]


class ZBoxRule(LayerRule):
    r"""The z-box rule, for pixels between known limits ``low`` and ``high`` (Montavon et al. 2017).

    :math:`R_i = \sum_j (x_i w_{ij} - l_i w_{ij}^+ - h_i w_{ij}^-) / (z_j - \sum_{i'} ...) \, R_j`.

    Args:
        low, high: smallest and largest value of the input: a number, or a tensor that broadcasts with the
            input and has a leading dimension of 1, such as (1, 3, 1, 1).
        stabilizer: added to the sum.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> layer.rule = ZBoxRule(0.0, 1.0)
        >>> LRP(nn.Sequential(layer)).attribute(torch.rand(4, 3), target=0).shape
        torch.Size([4, 3])
    """

    def __init__(self, low: Any, high: Any, stabilizer: float = EPS) -> None:
        super().__init__(stabilizer)
        self.low, self.high = low, high

    def groups(self, parts: LayerParts) -> list[Group]:
        (x, w), b = (parts.x, parts.weight), parts.bias

        def filled(value: Any) -> Tensor:
            return torch.as_tensor(value, dtype=x.dtype, device=x.device).expand_as(x)

        low, high = filled(self.low), filled(self.high)
        return [
            Group(
                [
                    Term(x, w, b),
                    Term(low, w.clamp(min=0), _clamp(b, min=0), factor=-1.0),
                    Term(high, w.clamp(max=0), _clamp(b, max=0), factor=-1.0),
                ]
            )
        ]


def _clamp(bias: Tensor | None, **limit: float) -> Tensor | None:
    return None if bias is None else bias.clamp(**limit)


class FirstLayerRule(Rule):
    """One rule for the first layers with weights after the inputs, and another for all other layers.

    Args:
        first: the rule of linear layers and convolutions without such a layer before them.
        otherwise: the rule of all other layers.

    Example:
        >>> from captum_abslrp.rules import EpsilonRule
        >>> rule = FirstLayerRule(FlatRule(), EpsilonRule())
        >>> mapping = get_mapping("epsilon").extended({("linear", "conv2d"): rule})
        >>> mapping.name
        'epsilon (extended)'
    """

    def __init__(self, first: Rule, otherwise: Rule) -> None:
        self.first, self.otherwise = first, otherwise

    def record(self, call: Call) -> Any:
        rule = self.first if _is_first(call) else self.otherwise
        record = rule.record(call)
        if isinstance(record, Record) and record.layer is None:
            record = record._replace(layer=rule)
        return record

    def suits_complex(self, call: Call) -> bool:
        return self.otherwise.suits_complex(call)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.first}, {self.otherwise})"


def _is_first(call: Call) -> bool:
    """Whether the input of a layer does not depend on another layer with weights."""
    input = call.operands[0] if call.operands else call.kwargs["input"]
    if not carries_relevance(input):
        return False
    return not any(is_recorded(node) and node.step.is_layer for node in history(input.grad_fn))
