"""Composites: tables of LRP rules for whole models, under their usual names.

Every table distributes the logit by signed contributions (``signed=True``). The tables differ in the rules
of linear layers and convolutions, of softmax and of sums.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from captum_abslrp.engine.numerics import EPS
from captum_abslrp.mappings.generic import BY_DEFINITION, DIVISORS, SHIFTED_OR_SCALED
from captum_abslrp.mappings.registry import Entries, Mapping, register_mapping
from captum_abslrp.rules.affine import CONVOLUTIONS
from captum_abslrp.rules.base import ConstantRule, PassThroughRule, Rule
from captum_abslrp.rules.choices import AttentionRule, PowerRule
from captum_abslrp.rules.elementwise import ACTIVATIONS, DROPOUTS
from captum_abslrp.rules.linear_maps import LINEAR_MAPS
from captum_abslrp.rules.lrp import (
    AlphaBetaRule,
    FirstLayerRule,
    FlatRule,
    GammaRule,
    ZBoxRule,
    ZPlusRule,
)
from captum_abslrp.rules.matmul import MATMULS
from captum_abslrp.rules.pooling import MAX_POOLS
from captum_abslrp.rules.signed import (
    PARTS,
    BatchNormRule,
    EpsilonRule,
    NormalizationRule,
    PartsRule,
    SumRule,
    UniformRule,
)

__all__ = ["COMPOSITES", "RECOMMENDED", "composite", "signed_rules"]

CONV = tuple(CONVOLUTIONS)
ALL_LAYERS = ("linear", *CONV)
POINTWISE = tuple(name for name in ACTIVATIONS if name not in ("pow", "float_power"))
SUMS_OF_PRODUCTS = ("_sparse_addmm", "addbmm", "addmm", "addmv", "baddbmm")


def _table(
    name: str,
    layers: Entries,
    *,
    epsilon: float = EPS,
    softmax: Rule | None = None,
    residual_gamma: float = 0.0,
) -> Mapping:
    """The mapping of a composite: the rules of its layers, and the rules that all composites share."""
    plain = EpsilonRule(epsilon)
    of_softmax = plain if softmax is None else AttentionRule(softmax, plain)
    return Mapping(
        name,
        [
            *layers,
            (PARTS, PartsRule()),
            (("batch_norm",), BatchNormRule()),
            (("layer_norm", "rms_norm", "group_norm", "instance_norm"), NormalizationRule(epsilon)),
            (("softmax",), of_softmax),
            (("add", "sub"), SumRule(residual_gamma, epsilon)),
            (("mul", *(set(MATMULS) - set(SUMS_OF_PRODUCTS)), "bilinear"), UniformRule(epsilon)),
            (
                (*POINTWISE, *DROPOUTS, *SHIFTED_OR_SCALED, "normalize", "local_response_norm"),
                PassThroughRule(),
            ),
            (DIVISORS, ConstantRule()),
            (("pow", "float_power"), PowerRule()),
            (tuple(MAX_POOLS), EpsilonRule(0.0)),
            (("div", *SUMS_OF_PRODUCTS, *LINEAR_MAPS, *ALL_LAYERS, *BY_DEFINITION), plain),
        ],
        signed=True,
    )


def epsilon(*, epsilon: float = EPS) -> Mapping:
    """Return the mapping with the epsilon rule everywhere."""
    return _table("epsilon", [], epsilon=epsilon)


def epsilon_plus(*, epsilon: float = EPS, stabilizer: float = EPS) -> Mapping:
    """Return the mapping with z-plus for convolutions and epsilon for linear layers."""
    return _table("epsilon_plus", [(CONV, ZPlusRule(stabilizer))], epsilon=epsilon)


def epsilon_plus_flat(*, epsilon: float = EPS, stabilizer: float = EPS) -> Mapping:
    """Return ``epsilon_plus`` with the flat rule for the first layer."""
    flat = FlatRule(stabilizer)
    layers: Entries = [
        (CONV, FirstLayerRule(flat, ZPlusRule(stabilizer))),
        (("linear",), FirstLayerRule(flat, EpsilonRule(epsilon))),
    ]
    return _table("epsilon_plus_flat", layers, epsilon=epsilon)


def epsilon_alpha2_beta1(*, epsilon: float = EPS, stabilizer: float = EPS) -> Mapping:
    """Return the mapping with alpha-beta (2, 1) for convolutions and epsilon for linear layers."""
    layers: Entries = [(CONV, AlphaBetaRule(2.0, 1.0, stabilizer))]
    return _table("epsilon_alpha2_beta1", layers, epsilon=epsilon)


def epsilon_gamma_box(
    *,
    low: float | Tensor,
    high: float | Tensor,
    epsilon: float = EPS,
    gamma: float = 0.25,
    stabilizer: float = EPS,
) -> Mapping:
    """Return the mapping with z-box for the first convolution, gamma for the others, epsilon elsewhere."""
    rule = FirstLayerRule(ZBoxRule(low, high, stabilizer), GammaRule(gamma, stabilizer))
    return _table("epsilon_gamma_box", [(CONV, rule)], epsilon=epsilon)


def attnlrp(
    *,
    epsilon: float = EPS,
    conv_gamma: float | None = None,
    linear_gamma: float | None = None,
    residual_gamma: float = 0.0,
) -> Mapping:
    """Return the AttnLRP mapping: softmax by its gradient, products split evenly; optional gamma rules."""
    return _transformer("attnlrp", None, epsilon, conv_gamma, linear_gamma, residual_gamma)


def cp_lrp(
    *,
    epsilon: float = EPS,
    conv_gamma: float | None = None,
    linear_gamma: float | None = None,
    residual_gamma: float = 0.0,
) -> Mapping:
    """Return the CP-LRP mapping: attention weights are constants, so all relevance flows to the values."""
    return _transformer("cp_lrp", ConstantRule(), epsilon, conv_gamma, linear_gamma, residual_gamma)


def res_lrp(
    *,
    epsilon: float = EPS,
    conv_gamma: float | None = None,
    linear_gamma: float | None = None,
    residual_gamma: float = 1.0,
) -> Mapping:
    """Return the ResLRP mapping: AttnLRP with a gamma rule for sums."""
    return _transformer("res_lrp", None, epsilon, conv_gamma, linear_gamma, residual_gamma)


def _transformer(
    name: str,
    softmax: Rule | None,
    epsilon: float,
    conv_gamma: float | None,
    linear_gamma: float | None,
    residual_gamma: float,
) -> Mapping:
    layers: list[Any] = []
    if conv_gamma is not None:
        layers.append((CONV, GammaRule(conv_gamma, epsilon)))
    if linear_gamma is not None:
        layers.append((("linear",), GammaRule(linear_gamma, epsilon)))
    return _table(name, layers, epsilon=epsilon, softmax=softmax, residual_gamma=residual_gamma)


COMPOSITES: dict[str, Callable[..., Mapping]] = {
    function.__name__: function
    for function in (
        epsilon,
        epsilon_plus,
        epsilon_plus_flat,
        epsilon_alpha2_beta1,
        epsilon_gamma_box,
        attnlrp,
        cp_lrp,
        res_lrp,
    )
}
"""The composites by name; each takes its parameters as keyword arguments."""


def composite(name: str, **parameters: Any) -> Mapping:
    """Return the mapping of a composite.

    Args:
        name: one of ``COMPOSITES``, such as ``"epsilon_plus"``.
        parameters: parameters of the composite, for example ``epsilon=1e-6``.

    Raises:
        ValueError: if the name is unknown.
        TypeError: if a parameter is unknown, or if a required one is missing.

    Example:
        >>> composite("epsilon_plus", epsilon=1e-6).name
        'epsilon_plus'
    """
    if name not in COMPOSITES:
        near = difflib.get_close_matches(str(name), COMPOSITES, n=3, cutoff=0.5) or [*COMPOSITES]
        raise ValueError(
            f"Expected `composite` to be one of {[*COMPOSITES]} or a Mapping, but got {name!r}. Did you mean "
            f"{' or '.join(map(repr, near))}?"
        )
    taken = inspect.signature(COMPOSITES[name]).parameters
    needed = [p.name for p in taken.values() if p.default is p.empty]
    if not set(needed) <= set(parameters) <= set(taken):
        raise TypeError(
            f"Expected the parameters of the composite {name!r} to be among {[*taken]}"
            f"{f', including {needed}' if needed else ''}, but got {[*parameters]}."
        )
    return COMPOSITES[name](**parameters)


def signed_rules(
    first: Rule,
    *,
    convolution: Rule | None = None,
    linear: Rule | None = None,
    softmax: Rule | None = None,
    residual_gamma: float = 1.0,
    name: str = "signed_rules",
) -> Mapping:
    """Return signed rules with a separate rule for the first layer (patch embedding or stem).

    Args:
        first: the rule of the first layer with weights.
        convolution: the rule of other convolutions; None for epsilon.
        linear: the rule of other linear layers; None for epsilon.
        softmax: the rule of softmax; None for its gradient (AttnLRP).
        residual_gamma: the gamma of sums, which favors summands with the sign of the sum.
        name: the name of the mapping.
    """
    plain = EpsilonRule()
    layers: Entries = [
        (CONV, FirstLayerRule(first, convolution or plain)),
        (("linear",), FirstLayerRule(first, linear or plain)),
    ]
    return _table(name, layers, softmax=softmax, residual_gamma=residual_gamma)


for _name in (
    "epsilon",
    "epsilon_plus",
    "epsilon_plus_flat",
    "epsilon_alpha2_beta1",
    "attnlrp",
    "cp_lrp",
    "res_lrp",
):
    register_mapping(composite(_name))

RECOMMENDED = register_mapping(
    signed_rules(
        ZPlusRule(),
        convolution=GammaRule(1.0),
        softmax=ConstantRule(),
        residual_gamma=1.0,
        name="recommended",
    )
)
"""The mapping with the best results on real Vision Transformers and convolutional networks: z-plus for the
first layer, gamma for other convolutions and for sums, epsilon for linear layers, and constant attention."""
