r"""Signed rules: relevance in proportion to contributions of both signs.

With :math:`g = R_z / (z + \epsilon \, \mathrm{sign} z)` at the output of a call, the relevance of an input is
:math:`R_x = x \, \partial / \partial x \langle g, f(x) \rangle` (the epsilon rule). Its variants apply this
formula to a modified call. Relevance is not rescaled, so the share of biases is lost.

Sources: Bach et al. 2015 (epsilon), Achtibat et al. 2024 (AttnLRP), Ali et al. 2022 (CP-LRP), Berend et al.
2026 (ResLRP); design.md section 9.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_abslrp.engine.arguments import instances_in
from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.dependence import is_source
from captum_abslrp.engine.errors import UnsupportedCallError
from captum_abslrp.engine.names import LAYERS
from captum_abslrp.engine.numerics import EPS
from captum_abslrp.engine.tape import Propagate, Record
from captum_abslrp.rules.affine import Affine, affine_of
from captum_abslrp.rules.attention import ATTENTION
from captum_abslrp.rules.base import Form, Rule, record_passed
from captum_abslrp.rules.decompositions import DECOMPOSITIONS
from captum_abslrp.rules.multi_head import MULTI_HEAD
from captum_abslrp.rules.normalization import reordered
from captum_abslrp.rules.recurrent import RECURRENT
from captum_abslrp.rules.signed_forms import (
    PRODUCTS,
    per_magnitude_of,
    per_output,
    record_layer_norm,
    record_weighted_sum,
    suits,
)
from captum_abslrp.rules.twin import Again, record_again, refuse_without_gradient


def stabilized(z: Tensor, epsilon: float) -> Tensor:
    """Add the stabilizer to ``z``, with the sign of ``z``; zeros become the stabilizer.

    Example:
        >>> stabilized(torch.tensor([2.0, -2.0, 0.0]), 0.5)
        tensor([ 2.5000, -2.5000,  0.5000])
    """
    result = z + 0.0  # zeros lose their sign
    return result.add_(torch.full((), epsilon, dtype=z.dtype, device=z.device).copysign(result))


def record_gradient(
    call: Call,
    *_: Any,
    epsilon: float,
    halves: bool = False,
    func: Callable[..., Any] | None = None,
    **__: Any,
) -> Any:
    """Record any differentiable call by the epsilon rule, using its gradient.

    Args:
        call: the call.
        epsilon: the stabilizer.
        halves: whether to split relevance evenly between the inputs, as for the factors of a product.
        func: the function to differentiate; None for the function of the call.
    """

    def record_one(again: Again, output: Tensor, number: int, alone: bool) -> Record:
        propagate = _by_gradient(
            again,
            number,
            call.save(output),
            epsilon,
            func or again.func,
            alone=alone,
            halves=halves,
        )
        return Record(
            output,
            again.sources,
            propagate,
            scaled=False,
            constants=again.places,
            spares_zeros=True,
        )

    return record_again(call, record_one)


def _by_gradient(
    again: Again,
    number: int,
    z: Callable[[], Tensor],
    epsilon: float,
    func: Callable[..., Any],
    *,
    alone: bool,
    halves: bool,
) -> Propagate:
    divide = per_output(z, epsilon * len(again.at) if halves else epsilon)

    def propagate(s: Tensor) -> list[Tensor]:
        values = again.values()
        with torch.enable_grad():
            for i in again.at:
                values[i] = values[i].detach().requires_grad_()
            result = instances_in(Tensor, again.run(func, values))[number]
        leaves = [values[i] for i in again.at]
        if not result.requires_grad:
            if alone:
                refuse_without_gradient(again, "epsilon")
            return [torch.zeros_like(x) for x in leaves]
        g = divide(s)
        found = torch.autograd.grad(
            result, leaves, g.to(result.dtype), allow_unused=True, materialize_grads=True
        )
        parts = len(leaves) if halves else 1
        return [
            (x.detach().sign() * of_x / parts).nan_to_num_(0.0)
            for x, of_x in zip(leaves, found, strict=True)
        ]

    return propagate


class Layer(NamedTuple):
    """A layer with weights that a subsequent batch norm can be folded into."""

    affine: Affine
    record: Callable[[Call, Affine, Tensor], Record]
    """Records the folded layer, given a call, the layer with its new weights, and its output."""


class EpsilonRule(Rule):
    r"""The epsilon rule: relevance in proportion to the contribution of each input to the output.

    :math:`R_i = x_i \sum_j w_{ij} R_j / (z_j + \epsilon \, \mathrm{sign} z_j)` for linear layers and
    convolutions (Bach et al. 2015). Any other differentiable call is linearized at ``x``.

    Args:
        epsilon: the stabilizer, in the unit of the output.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> layer.rule = EpsilonRule(1e-6)
        >>> AbsLRP(nn.Sequential(layer)).attribute(torch.rand(4, 3), target=0, contrast=None).shape
        torch.Size([4, 3])
    """

    def __init__(self, epsilon: float = EPS) -> None:
        self.epsilon = epsilon

    def form_of(self, call: Call) -> Form | None:
        if call.name in LAYERS:
            return self._record_layer
        # The gradient of a product counts its relevance twice; see `UniformRule`.
        closed = None if call.name in PRODUCTS else suits(call)
        return partial(closed or record_gradient, epsilon=self.epsilon)

    def _record_layer(self, call: Call, *_: Any, **__: Any) -> Any:
        affine = affine_of(call)
        if affine is None:
            return record_gradient(call, epsilon=self.epsilon)
        output = call.run(lambda: affine.run(affine.input, affine.weight, affine.bias))
        return self.record_affine(call, affine, output)

    def record_affine(self, call: Call, affine: Affine, output: Tensor) -> Record:
        """Record a layer, given its input, weight and bias."""
        x, w, transposed = call.save(affine.input), call.save(affine.weight), affine.transposed
        divide = per_output(call.save(output), self.epsilon, finite=True)
        signed = per_magnitude_of(x, nonnegative=call.is_nonnegative(affine.input))

        def propagate(s: Tensor) -> list[Tensor]:
            return [signed(transposed(divide(s), w(), x()))]

        return Record(
            output,
            [affine.input],
            propagate,
            scaled=False,
            spares_zeros=True,
            layer=Layer(affine, self.record_affine),
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'' if self.epsilon == EPS else self.epsilon})"


class UniformRule(EpsilonRule):
    r"""The uniform rule for products: relevance is split evenly between the factors.

    :math:`R_a = a \, (g b^T) / 2` for ``z = a @ b``, and likewise for ``a * b``, einsum ... (Achtibat et al.
    2024, AttnLRP). Constant factors get no relevance.

    Args:
        epsilon: the stabilizer.

    Example:
        >>> class Gated(nn.Linear):
        ...     def forward(self, x):
        ...         return super().forward(x) * x.sigmoid()
        >>> mapping = get_mapping().extended({"mul": UniformRule()})
        >>> AbsLRP(Gated(3, 3), mapping).attribute(torch.rand(4, 3), target=0).shape
        torch.Size([4, 3])
    """

    def form_of(self, call: Call) -> Form | None:
        closed = suits(call) if call.name in PRODUCTS else None
        if closed is not None:
            return partial(closed, epsilon=self.epsilon)
        return partial(record_gradient, epsilon=self.epsilon, halves=True)


class SumRule(EpsilonRule):
    r"""The gamma rule for sums: summands with the sign of the sum are weighted by :math:`1 + \gamma`.

    :math:`R_x = w_x x / (w_x x + w_y y) \, R` with :math:`w_x = 1 + \gamma [x z > 0]` (Berend et al. 2026,
    ResLRP). With ``gamma=0`` it is the epsilon rule.

    Args:
        gamma: additional weight of these summands.
        epsilon: the stabilizer.

    Example:
        >>> class Residual(nn.Linear):
        ...     def forward(self, x):
        ...         return x + super().forward(x)
        >>> mapping = get_mapping().extended({"add": SumRule(gamma=1.0)})
        >>> AbsLRP(Residual(3, 3), mapping).attribute(torch.rand(4, 3), target=0).shape
        torch.Size([4, 3])
    """

    def __init__(self, gamma: float = 0.0, epsilon: float = EPS) -> None:
        super().__init__(epsilon)
        self.gamma = gamma

    def form_of(self, call: Call) -> Form | None:
        both = len(call.operands) == 2 and all(map(is_source, call.operands))
        if self.gamma and both and call.name in ("add", "sub"):
            return partial(record_weighted_sum, gamma=self.gamma, epsilon=self.epsilon)
        return super().form_of(call)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(gamma={self.gamma})"


def _rsigma(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    return (x.detach().square().mean(dims, keepdim=True) + eps).rsqrt()


def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    centered = input - input.mean(dims, keepdim=True)
    result = centered * _rsigma(centered, dims, eps)
    return result if weight is None else result * weight


def _rms_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    result = input * _rsigma(input, dims, torch.finfo(input.dtype).eps if eps is None else eps)
    return result if weight is None else result * weight


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    grouped = input.unflatten(1, (num_groups, -1)).flatten(2)
    centered = grouped - grouped.mean(-1, keepdim=True)
    result = (centered * _rsigma(centered, (-1,), eps)).reshape(input.shape)
    return result if weight is None else result * weight.view(-1, *[1] * (input.dim() - 2))


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if use_input_stats:
        return _group_norm(input, input.shape[1], weight, bias, eps)
    assert running_mean is not None and running_var is not None
    scale = (running_var + eps).rsqrt()
    return input * (scale if weight is None else scale * weight).view(-1, *[1] * (input.dim() - 2))


class NormalizationRule(EpsilonRule):
    r"""The epsilon rule for layer, group, instance and RMS norm, with a constant standard deviation.

    :math:`R_i = x_i \sum_j \partial (x_j - \bar x) / \partial x_i \, w_j / \sigma \, g_j`.

    Args:
        epsilon: the stabilizer.

    Example:
        >>> layer = nn.LayerNorm(3)
        >>> layer.rule = NormalizationRule()
        >>> AbsLRP(nn.Sequential(layer)).attribute(torch.rand(4, 3), target=0).shape
        torch.Size([4, 3])
    """

    _frozen: ClassVar[Mapping[str, Callable[..., Tensor]]] = {
        "layer_norm": _layer_norm,
        "rms_norm": _rms_norm,
        "group_norm": _group_norm,
        "instance_norm": _instance_norm,
    }

    def form_of(self, call: Call) -> Form | None:
        if call.name == "layer_norm" and not any(
            map(is_source, (*call.operands[1:], *call.kwargs.values()))
        ):
            return partial(record_layer_norm, epsilon=self.epsilon)
        frozen = self._frozen.get(call.name)
        if frozen is None:
            return None
        if call.func is torch.instance_norm:

            def frozen(x: Tensor, *args: Any) -> Tensor:  # its arguments start with weight and bias
                return _instance_norm(x, *args[2:4], *args[:2], *args[4:7])

        return partial(record_gradient, epsilon=self.epsilon, func=frozen)


class BatchNormRule(Rule):
    r"""Fold batch norm into the preceding layer, whose rule then applies to both.

    The folded layer has the weight :math:`w \, c` and the bias :math:`(b - \mu) c + \beta` with
    :math:`c = \gamma / \sqrt{var + eps}`. The model itself is not modified. Without a layer to fold into,
    relevance passes unchanged. This corresponds to a canonizer in zennit.

    Example:
        >>> layers = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten()).eval()
        >>> LRP(layers, "epsilon_plus").attribute(torch.rand(2, 3, 5, 5), target=0).shape
        torch.Size([2, 3, 5, 5])
    """

    def form_of(self, call: Call) -> Form:
        return reordered(torch.batch_norm, self._record)

    def _record(
        self,
        call: Call,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Any:
        layer = call.recording.layer_behind(input)
        folds = isinstance(layer, Layer) and layer.affine.channels is not None
        if layer is None and call.recording.hides_layer(input):
            raise UnsupportedCallError(
                f"Expected to select parts of a layer that has its own rule, but got a layer that the batch "
                f"norm of {call} is folded into, so that both share one rule. Choose the batch norm or a "
                f"later layer."
            )
        if training or running_mean is None or running_var is None or not folds:
            return record_passed(call)
        affine = layer.affine
        output = call.run(
            lambda: F.batch_norm(
                input, running_mean, running_var, weight, bias, False, momentum, eps
            )
        )
        scale = (running_var + eps).rsqrt() * (1 if weight is None else weight)
        shift = (0 if bias is None else bias) - running_mean * scale
        shape = [1] * affine.weight.dim()
        shape[affine.channels] = -1
        own = shift if affine.bias is None else affine.bias * scale + shift
        folded = affine._replace(weight=affine.weight * scale.view(shape), bias=own)
        record = layer.record(call, folded, output)
        return record._replace(constants=[*record.constants, input])


_PARTS = {**ATTENTION, **MULTI_HEAD, **RECURRENT, **DECOMPOSITIONS}


class PartsRule(Rule):
    """Decompose a call, such as attention, into simpler calls with their own rules.

    Example:
        >>> mapping = get_mapping().extended({"scaled_dot_product_attention": PartsRule()})
        >>> mapping.name
        'generic (extended)'
    """

    closed_forms: ClassVar[Mapping[str, Form]] = _PARTS


PARTS = tuple(_PARTS)
"""The calls that :class:`PartsRule` records."""
