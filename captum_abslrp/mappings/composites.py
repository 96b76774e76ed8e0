"""Composites: tables of LRP rules for whole models, one for each name that the field uses.

Every table shares relevance of the logit by signed contributions, so relevance starts as the logit itself
(``signed=True``). They differ in the rules of linear layers and convolutions, of softmax and of sums.
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
    """The rules of a composite: those of its layers, and those that all composites have in common."""
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
    """The epsilon rule everywhere."""
    return _table("epsilon", [], epsilon=epsilon)


def epsilon_plus(*, epsilon: float = EPS, stabilizer: float = EPS) -> Mapping:
    """Z-plus in convolutions, epsilon in linear layers."""
    return _table("epsilon_plus", [(CONV, ZPlusRule(stabilizer))], epsilon=epsilon)


def epsilon_plus_flat(*, epsilon: float = EPS, stabilizer: float = EPS) -> Mapping:
    """As ``epsilon_plus``, with the flat rule in the first layer."""
    flat = FlatRule(stabilizer)
    layers: Entries = [
        (CONV, FirstLayerRule(flat, ZPlusRule(stabilizer))),
        (("linear",), FirstLayerRule(flat, EpsilonRule(epsilon))),
    ]
    return _table("epsilon_plus_flat", layers, epsilon=epsilon)


def epsilon_alpha2_beta1(*, epsilon: float = EPS, stabilizer: float = EPS) -> Mapping:
    """Alpha-beta with 2 and 1 in convolutions, epsilon in linear layers."""
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
    """Z-box in the first convolution, gamma in the others, epsilon in linear layers."""
    rule = FirstLayerRule(ZBoxRule(low, high, stabilizer), GammaRule(gamma, stabilizer))
    return _table("epsilon_gamma_box", [(CONV, rule)], epsilon=epsilon)


def attnlrp(
    *,
    epsilon: float = EPS,
    conv_gamma: float | None = None,
    linear_gamma: float | None = None,
    residual_gamma: float = 0.0,
) -> Mapping:
    """AttnLRP: softmax by its gradient, products shared evenly; gamma rules where they are asked for."""
    return _transformer("attnlrp", None, epsilon, conv_gamma, linear_gamma, residual_gamma)


def cp_lrp(
    *,
    epsilon: float = EPS,
    conv_gamma: float | None = None,
    linear_gamma: float | None = None,
    residual_gamma: float = 0.0,
) -> Mapping:
    """CP-LRP: attention is a constant, so that all relevance goes to the values."""
    return _transformer("cp_lrp", ConstantRule(), epsilon, conv_gamma, linear_gamma, residual_gamma)


def res_lrp(
    *,
    epsilon: float = EPS,
    conv_gamma: float | None = None,
    linear_gamma: float | None = None,
    residual_gamma: float = 1.0,
) -> Mapping:
    """ResLRP: AttnLRP with a gamma in sums."""
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
"""The composites by name; each takes its parameters as keywords."""


def composite(name: str, **parameters: Any) -> Mapping:
    """The table of a composite.

    Args:
        name: one of ``COMPOSITES``, such as ``"epsilon_plus"``.
        parameters: its parameters, ``epsilon=1e-6`` for example.

    Raises:
        ValueError: if there is no composite of this name.
        TypeError: if it has no such parameter, or needs one that is not given.

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
            f"{f', with {needed} given' if needed else ''}, but got {[*parameters]}."
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
    """Signed rules with another rule in the first layer: the embedding of a transformer, the stem of a CNN.

    Args:
        first: the rule of the first layer with weights.
        convolution: the rule of other convolutions; None for epsilon.
        linear: the rule of other linear layers; None for epsilon.
        softmax: the rule of softmax; None for its gradient (AttnLRP).
        residual_gamma: how much more the summands of the sign of a sum count.
        name: of the mapping.
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
"""What measured best on real Vision Transformers and convolutional networks: z-plus in the first layer, gamma
in other convolutions, epsilon in linear layers, attention as a constant, and sums with a gamma."""
