"""The absLRP rules as Captum ``PropagationRule`` subclasses.

A rule answers calls: it runs the call and says how relevance of its output is handed to its inputs.
:class:`captum_abslrp.AbsLRP` asks the mapping of the model for the rule of each call. A rule that is
set on a module, ``module.rule = AbsLRPRule()``, wins over every mapping there, and it works in the same
place under Captum's own ``captum.attr.LRP``.

Each rule lists its closed forms, one per kind of call; the mathematics is in
:mod:`captum_abslrp.functional`.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from captum.attr._utils.lrp_rules import PropagationRule
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from captum_abslrp import forms, functional
from captum_abslrp.complex_calls import PREFIX, has_complex, suits_parts
from captum_abslrp.interception import Call, Interception
from captum_abslrp.steps import Answer, Given, Kept, Returned, Tail

__all__ = [
    "AbsLRPRule",
    "ActivationRule",
    "AdditionRule",
    "Answer",
    "BatchNormRule",
    "CompositeRule",
    "ConstantRule",
    "DropoutRule",
    "HeadSumRule",
    "LayerNormRule",
    "MatmulRule",
    "MaxPoolRule",
    "PassThroughRule",
    "ProductRule",
    "Rule",
    "SoftmaxRule",
    "Tail",
    "TwinRule",
]


_IDEMPOTENT = (nn.ReLU, nn.modules.dropout._DropoutNd)
"""Modules whose output may stand for their input: Captum hands over an input changed in place."""


class Rule(PropagationRule):
    """Base class of the absLRP rules.

    A subclass lists its closed forms in ``closed_forms``, by the canonical name of the call that each
    one answers, or overrides :meth:`answer`.
    """

    closed_forms: ClassVar[Mapping[str, forms.Form]] = {}

    def answer(self, call: Call) -> Any:
        """Run a call and say how relevance goes from its output to its inputs.

        Args:
            call: the call. History is not recorded while it is answered.

        Returns:
            An :class:`~captum_abslrp.rules.Answer`.

        Raises:
            TypeError: if the rule has no form for this kind of call.
        """
        form = self._form_of(call)
        if form is None:
            raise TypeError(
                f"Expected {type(self).__name__} to be used for one of {sorted(self.closed_forms)}, but "
                f"got {call}. Use `AbsLRPRule()` or `TwinRule()` there."
            )
        return form(call, *call.operands, **call.kwargs)

    def _form_of(self, call: Call) -> forms.Form | None:
        name = call.name.removeprefix(PREFIX)
        on_parts = name != call.name and name in self.closed_forms
        return forms.COMPLEX.get(name) if on_parts else self.closed_forms.get(call.name)

    def suits_complex(self, call: Call) -> bool:
        """Whether the rule can answer a call on complex tensors, which it will see as real views.

        Args:
            call: the call, on complex tensors.
        """
        has_form = call.name in forms.COMPLEX or suits_parts(call.name) or self.runs_parts_of(call)
        return call.name not in self.closed_forms or has_form

    def runs_parts_of(self, call: Call) -> bool:
        """Whether the rule answers a call by running the calls it is made of, each by its own rule.

        Args:
            call: the call.
        """
        form = self.closed_forms.get(call.name)
        return form is not None and form is forms.COMPOSITES.get(call.name)

    def forward_hook(self, module: nn.Module, inputs: Any, outputs: Any) -> Any:
        """Entry for Captum's ``LRP``, which registers this as the module's forward hook.

        Args:
            module: a module with one input tensor of shape (B, ...).
            inputs: its inputs.
            outputs: its output, which is known already and not computed again.

        Returns:
            The output, with a history whose backward pass is this rule.
        """
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        if has_complex((inputs, outputs)):
            raise TypeError(
                f"Expected {type(module).__name__} to map real tensors to a real one under Captum's `LRP`, "
                f"but got complex ones. Set the rule on a module around it, or use `AbsLRP`."
            )
        if getattr(module, "inplace", False) and not isinstance(module, _IDEMPOTENT):
            raise ValueError(
                f"Expected {type(module).__name__} to keep its input, which {self} needs, but got "
                f"`inplace=True`. Set `module.inplace = False`."
            )
        # Calls of torch's own leaf modules are single, so their result is the module's.
        own = type(module).__module__.startswith("torch.nn.") and not list(module.children())
        given = [Given.apply(x) for x in inputs]
        with Interception(
            lambda call: self,
            inputs=[x for x in given if x.requires_grad],
            batch_size=inputs[0].shape[0],
            result=outputs if own and isinstance(outputs, Tensor) else None,
        ):
            output = module.forward(*given)
        return tree_map_only(Tensor, Returned.apply, output)

    def _manipulate_weights(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        """Captum's place to change weights: these rules need none of it."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class TwinRule(Rule):
    r"""The definition of absLRP, for any differentiable call.

    :math:`R_{in} = x \, \partial/\partial x \langle s, f(x; w, b) + f(|x|; |w|, |b|) \rangle` with
    :math:`s = R / (|z| + \epsilon)` (the paper's rule, section 1 of the method): the call and
    its *twin*, the same call on absolute input and parameters. It costs two more forward passes of the
    call; the other rules are its closed forms. A call on complex tensors is one on their real and imaginary
    parts: ``x``, ``w`` and ``z`` are real views (``torch.view_as_real``).

    Args:
        divide: whether relevance is divided by the magnitude of the output. Without, :math:`s = R`.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> layer.rule = TwinRule()
        >>> AbsLRP(nn.Sequential(layer)).attribute(torch.rand(4, 3), target=0).shape
        torch.Size([4, 3])
    """

    def __init__(self, *, divide: bool = True) -> None:
        self.divide = divide

    def answer(self, call: Call) -> Answer:
        return forms.answer_twin(call, divides=self.divide)

    def __repr__(self) -> str:
        return f"TwinRule({'' if self.divide else 'divide=False'})"


class PassThroughRule(Rule):
    """Relevance moves with its element: reshape, scaling by a constant, dropout in evaluation mode.

    Example:
        >>> layer = nn.Dropout()
        >>> layer.rule = PassThroughRule()
        >>> model = nn.Sequential(nn.Linear(3, 2), layer).eval()
        >>> AbsLRP(model).attribute(torch.rand(4, 3), target=0).shape
        torch.Size([4, 3])
    """

    def answer(self, call: Call) -> Answer:
        return forms.answer_passed(call)


class ConstantRule(Rule):
    """No relevance: the result is a constant of the call that uses it, as a divisor is.

    Example:
        >>> class Gated(nn.Linear):
        ...     def forward(self, x):
        ...         return super().forward(x) * x.softmax(1)
        >>> mapping = get_mapping().extended({"softmax": ConstantRule()})
        >>> AbsLRP(Gated(3, 3), mapping).attribute(torch.rand(4, 3), target=0).shape
        torch.Size([4, 3])
    """

    def answer(self, call: Call) -> Any:
        return forms.answer_constant(call)


class ActivationRule(Rule):
    r"""Functions of each element alone: :math:`R_{in} = (x f'(x) + |x| f'(|x|)) s`, the twin form, see
    :func:`captum_abslrp.functional.elementwise`.

    ReLU is the identity where relevance arrives. A power with a negative exponent is a divisor, which is
    a constant.

    Example:
        >>> layer = nn.GELU()
        >>> layer.rule = ActivationRule()
        >>> AbsLRP(nn.Sequential(nn.Linear(3, 2), layer)).attribute(torch.rand(4, 3), 0).shape
        torch.Size([4, 3])
    """

    closed_forms: ClassVar[Mapping[str, forms.Form]] = forms.ACTIVATIONS


class MaxPoolRule(Rule):
    """Max pooling: the twin rule, the maximum of ``x`` and of ``|x|`` in every window.

    Args:
        divide: whether relevance is divided by the magnitude of the output, as everywhere else.
            The published VGG mapping does not.

    Example:
        >>> layer = nn.MaxPool2d(2)
        >>> layer.rule = MaxPoolRule(divide=False)
        >>> AbsLRP(nn.Sequential(layer, nn.Flatten())).attribute(torch.rand(4, 3, 2, 2), 0).shape
        torch.Size([4, 3, 2, 2])
    """

    closed_forms: ClassVar[Mapping[str, forms.Form]] = forms.MAX_POOLS

    def __init__(self, *, divide: bool = True) -> None:
        self.divide = divide

    def answer(self, call: Call) -> Answer:
        if call.name not in self.closed_forms:
            return super().answer(call)
        return forms.answer_max_pool(call, *call.operands, divides=self.divide, **call.kwargs)

    def __repr__(self) -> str:
        return f"MaxPoolRule({'' if self.divide else 'divide=False'})"


class BatchNormRule(Rule):
    r"""Batch norm in evaluation mode: a weight per channel, :math:`R_{in} = 2 (x c)^+ s` with
    :math:`c = w / \sqrt{var + eps}`, see :func:`captum_abslrp.functional.diagonal`.

    Example:
        >>> layer = nn.BatchNorm1d(3).eval()
        >>> layer.rule = BatchNormRule()
        >>> AbsLRP(nn.Sequential(layer)).attribute(torch.rand(4, 3), target=0).shape
        torch.Size([4, 3])
    """

    closed_forms: ClassVar[Mapping[str, forms.Form]] = {"batch_norm": forms.answer_batch_norm}


class LayerNormRule(Rule):
    """Layer, group, instance and RMS norm: the statistics of a sample are constants of the call.

    See :func:`captum_abslrp.functional.layer_norm`, :func:`captum_abslrp.functional.group_norm` and
    :func:`captum_abslrp.functional.rms_norm`. ``F.normalize`` and ``F.local_response_norm`` divide by a
    positive number, which is a constant, too: :math:`2 (x / c)^+ s`.

    Example:
        >>> layer = nn.LayerNorm(3)
        >>> layer.rule = LayerNormRule()
        >>> AbsLRP(nn.Sequential(layer)).attribute(torch.rand(4, 3), target=0).shape
        torch.Size([4, 3])
    """

    closed_forms: ClassVar[Mapping[str, forms.Form]] = forms.NORMALIZATIONS


class SoftmaxRule(Rule):
    """Softmax: maximum and denominator are constants of the call.

    See :func:`captum_abslrp.functional.softmax`.

    Example:
        >>> layer = nn.Softmax(dim=1)
        >>> layer.rule = SoftmaxRule()
        >>> AbsLRP(nn.Sequential(nn.Linear(3, 2), layer)).attribute(torch.rand(4, 3), 0).shape
        torch.Size([4, 3])
    """

    closed_forms: ClassVar[Mapping[str, forms.Form]] = {"softmax": forms.answer_softmax}


class MatmulRule(Rule):
    r"""Product of two tensors of the network: each argument with the other one fixed.

    For ``a @ b``: :math:`2 (a^+ \, s b^{+T} + a^- \, s b^{-T})`, see
    :func:`captum_abslrp.functional.matmul`; for einsum and its kin
    :func:`captum_abslrp.functional.bilinear`. In ``addmm`` and its kin, one affine call, the
    summand gets :math:`2 x^+ s`. Of complex tensors each part of the result is a sum of products, see
    :func:`captum_abslrp.functional.complex_bilinear`.

    Example:
        >>> mapping = get_mapping().extended({("matmul", "bmm"): MatmulRule()})
        >>> AbsLRP(nn.Sequential(nn.Linear(3, 2)), mapping).attribute(torch.rand(4, 3), 0).shape
        torch.Size([4, 3])
    """

    closed_forms: ClassVar[Mapping[str, forms.Form]] = forms.MATMULS


class AdditionRule(Rule):
    r"""Sum of two tensors: :math:`2 x^+ s` and :math:`2 y^+ s` (residuals, position embedding).

    A difference is the sum with the negated tensor. Of complex tensors each part is a sum of its own.

    Example:
        >>> mapping = get_mapping().extended({"add": AdditionRule()})
        >>> AbsLRP(nn.Sequential(nn.Linear(3, 2)), mapping).attribute(torch.rand(4, 3), 0).shape
        torch.Size([4, 3])
    """

    closed_forms: ClassVar[Mapping[str, forms.Form]] = forms.SUMS


class HeadSumRule(AdditionRule):
    r"""Sum of the outputs of two linear heads (distilled DeiT): :math:`|x| s` and :math:`|y| s`.

    Two linear layers whose outputs are added are one linear layer on both inputs. This is the share
    at which each of them takes part in the rule of that layer: positive contributions are sought in
    the heads' inputs, not in their outputs, so that a class with two negative logits is explained,
    too. A sum with a constant (the position embedding) is left to :class:`AdditionRule`.
    No mapping of this package needs it: on the tail of the score every sum shares in this way.

    Example:
        >>> mapping = get_mapping().extended({At("", call="add"): HeadSumRule()})
        >>> AbsLRP(nn.Sequential(nn.Linear(3, 2)), mapping).attribute(torch.rand(4, 3), 0).shape
        torch.Size([4, 3])
    """

    closed_forms: ClassVar[Mapping[str, forms.Form]] = {"add": forms.answer_head_sum}


class ProductRule(Rule):
    r"""Elementwise product, :math:`2 (x y)^+ s` for each factor (gates, LayerScale).

    A divisor is a constant of the call, even where it depends on the data: :math:`2 (x / c)^+ s`.
    Scaling by a number passes relevance through. Of complex tensors each part of the result is a sum of
    products, see :func:`captum_abslrp.functional.complex_diagonal`.

    Example:
        >>> mapping = get_mapping().extended({"mul": ProductRule()})
        >>> AbsLRP(nn.Sequential(nn.Linear(3, 2)), mapping).attribute(torch.rand(4, 3), 0).shape
        torch.Size([4, 3])
    """

    closed_forms: ClassVar[Mapping[str, forms.Form]] = forms.PRODUCTS


class DropoutRule(Rule):
    r"""Dropout as in the published Vision Transformer mapping: the twin of the identity,
    :math:`2 x^+ s`, which lets relevance through where the activation is positive.

    Example:
        >>> mapping = get_mapping().extended({"dropout": DropoutRule()})
        >>> AbsLRP(nn.Sequential(nn.Linear(3, 2)), mapping).attribute(torch.rand(4, 3), 0).shape
        torch.Size([4, 3])
    """

    closed_forms: ClassVar[Mapping[str, forms.Form]] = forms.DROPOUTS


class CompositeRule(Rule):
    """A call that is made of others: run again part by part, so that each part meets its own rule.

    ``scaled_dot_product_attention`` and ``nn.MultiheadAttention``; LSTM, GRU and RNN, unrolled; GLU,
    ``lerp``, ``addcmul`` and their kin. Attention whose parts all have their usual rules is answered at
    once, with the same result, see :func:`captum_abslrp.functional.attention`.

    Example:
        >>> mapping = get_mapping().extended({"scaled_dot_product_attention": CompositeRule()})
        >>> AbsLRP(nn.Sequential(nn.Linear(3, 2)), mapping).attribute(torch.rand(4, 3), 0).shape
        torch.Size([4, 3])
    """

    closed_forms: ClassVar[Mapping[str, forms.Form]] = {
        **forms.ATTENTION,
        **forms.RECURRENT,
        **forms.COMPOSITES,
    }


class AbsLRPRule(Rule):
    """The absLRP rule: picks the closed form of the call itself.

    Affine layers (linear, convolution, transposed convolution), pooling, mean and sum, interpolation,
    normalisation, activations, softmax, products, sums and Fourier transforms have a closed form; every other
    differentiable call is answered by its definition, :class:`TwinRule`.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> for layer in model:
        ...     layer.rule = AbsLRPRule()
        >>> captum.attr.LRP(model).attribute(torch.rand(5, 3), target=1).shape
        torch.Size([5, 3])
    """

    closed_forms: ClassVar[Mapping[str, forms.Form]] = {
        **forms.AFFINE,
        **ActivationRule.closed_forms,
        **MaxPoolRule.closed_forms,
        **BatchNormRule.closed_forms,
        **LayerNormRule.closed_forms,
        **SoftmaxRule.closed_forms,
        **MatmulRule.closed_forms,
        **AdditionRule.closed_forms,
        **ProductRule.closed_forms,
        **DropoutRule.closed_forms,
        **CompositeRule.closed_forms,
    }

    def answer(self, call: Call) -> Any:
        return forms.answer_twin(call) if self._form_of(call) is None else super().answer(call)

    def suits_complex(self, call: Call) -> bool:
        return True


def answer_by_captum_rule(
    rule: PropagationRule, module: nn.Module, inputs: Sequence[Any], output: Tensor, z: Kept
) -> Answer:
    """Let a rule of Captum's (or one written for it) answer a module.

    The rule is run as ``captum.attr.LRP`` runs it, on copies of the module and of the rule, since
    it changes weights and keeps state on both.

    Args:
        rule: ``module.rule``.
        module: the module, with one output.
        inputs: its positional inputs, as they came.
        output: its output, of any shape.
        z: the output, kept for the backward pass.
    """
    kept = [x.detach().clone() if isinstance(x, Tensor) else x for x in inputs]
    at = [i for i, x in enumerate(inputs) if forms.is_source(x)]

    def propagate(s: Tensor) -> list[Tensor]:
        relevances = hand_on(functional.relevance(z(), s))
        return [functional.per_magnitude(r, kept[i]) for i, r in zip(at, relevances, strict=True)]

    def hand_on(relevance: Tensor) -> list[Tensor]:
        layer = copy.deepcopy(module)
        own = copy.copy(rule)
        own.relevance_input = defaultdict(list)
        own.relevance_output = {}
        layer.activations = {}  # type: ignore[assignment]  # Captum keeps them on the module
        with torch.no_grad():
            own.forward_hook_weights(
                layer,
                tuple(kept),
                layer(*map(_copied, kept)),
            )
        with torch.enable_grad():
            leaves = {i: kept[i].clone().requires_grad_() for i in at}
            given = tuple(leaves[i].clone() if i in leaves else x for i, x in enumerate(kept))
            # Clones, because the layer may change its input in place.
            result = own.forward_hook(layer, given, layer(*map(_copied, given)))
            return list(
                torch.autograd.grad(result, list(leaves.values()), relevance.to(result.dtype))
            )

    return Answer(output.detach(), [inputs[i] for i in at], propagate, scaled=False)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
