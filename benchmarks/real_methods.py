"""The methods of the benchmark on real models: functions from (model, images, targets) to maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captum_abslrp import LRP, AbsLRP
from captum_abslrp.guide import find_guide
from captum_abslrp.mappings.composites import signed_rules
from captum_abslrp.methods import find_feature_layer, get_method
from captum_abslrp.rules.abslrp import AbsLRPRule
from captum_abslrp.rules.base import ConstantRule
from captum_abslrp.rules.lrp import FlatRule, GammaRule, ZPlusRule

__all__ = ["methods_of"]

Maps = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Maps (B, C, H, W) of images (B, C, H, W) for targets (B,)."""

CONTRASTS: list[tuple[str, dict[str, Any]]] = [
    ("no contrast", {"contrast": None}),
    ("others", {"contrast": "others"}),
    ("softmax", {"contrast": "softmax"}),
]


def methods_of(model: nn.Module) -> dict[str, Maps]:
    """Return all methods for a kind of model, by name."""
    attends = has_attention(model)
    found: dict[str, Maps] = {
        "AbsLRP.recommended": lambda model, x, t: AbsLRP.recommended(model).attribute(x, t)
    }
    for normalization in ("separate", "joint"):
        for label, options in CONTRASTS:
            ways = ["difference", "gated", "guided"] if options["contrast"] else ["difference"]
            for way in ways:
                name = f"AbsLRP {normalization}, {label}{'' if way == 'difference' else ', ' + way}"
                found[name] = _abslrp({**options, "combine": way}, normalization=normalization)
    for label, options in CONTRASTS[1:]:
        guided = {**options, "combine": "guided"}
        found[f"AbsLRP recommended rules, {label}, guided"] = _abslrp(guided, mapping="recommended")
        found[f"AbsLRP recommended rules, {label}"] = _abslrp(options, mapping="recommended")
        found[f"AbsLRP epsilon_plus, {label}, guided"] = _abslrp(guided, mapping="epsilon_plus")
    for place, position in {"a quarter": 0.25, "three quarters": 0.75, "the end": 1.0}.items():
        found[f"AbsLRP recommended rules, softmax, guided at {place}"] = _guided_at(position)
    found |= _transformers() if attends else _convolutional()
    composites = ["attnlrp", "cp_lrp", "res_lrp"] if attends else []
    for name in [
        "epsilon",
        *composites,
        "epsilon_plus",
        "epsilon_plus_flat",
        "epsilon_alpha2_beta1",
    ]:
        for label, options in CONTRASTS:
            found[f"LRP {name}, {label}"] = _lrp(name, options)
    if not attends:
        for label, options in CONTRASTS:
            found[f"LRP epsilon_gamma_box, {label}"] = _gamma_box(options)
    for name, title in CAPTUM.items():
        found[title] = _captum(name)
    if not attends:
        found["GuidedBackprop, all ReLUs"] = guided_backprop
        found["GuidedGradCam, all ReLUs"] = lambda model, x, t: (
            guided_backprop(model, x, t) * _captum("gradcam")(model, x, t)
        )
    found["LayerCAM"] = layer_cam
    found["random"] = _captum("random")
    return found


CAPTUM = {
    "saliency": "Saliency",
    "inputxgradient": "InputXGradient",
    "ig": "IntegratedGradients",
    "deeplift": "DeepLift",
    "gradient_shap": "GradientShap",
    "guided_backprop": "GuidedBackprop",
    "gradcam": "LayerGradCam",
    "guided_gradcam": "GuidedGradCam",
    "occlusion": "Occlusion",
    "lrp": "Captum LRP",
}


def has_attention(model: nn.Module) -> bool:
    """Return whether a model has attention over tokens, judged by the names of its layers."""
    return any("attn" in name or "attention" in name for name, _ in model.named_modules())


def _abslrp(options: dict[str, Any], **arguments: Any) -> Maps:
    return lambda model, x, t: AbsLRP(model, **arguments).attribute(x, t, **options)


def _guided_at(position: float) -> Maps:
    """The recommended map, guided by a layer other than the middle one."""

    def maps(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        guide = find_guide(model, [x], model, position=position)
        attributor = AbsLRP(model, mapping="recommended")
        return attributor.attribute(x, t, contrast="softmax", combine="guided", guide=guide)

    return maps


def _lrp(name: str, options: dict[str, Any]) -> Maps:
    return lambda model, x, t: LRP(model, name).attribute(x, t, **options)


def _captum(name: str) -> Maps:
    return lambda model, x, t: get_method(name)(model)(x, t)


def _gamma_box(options: dict[str, Any]) -> Maps:
    def maps(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        low, high = x.amin((0, 2, 3), keepdim=True), x.amax((0, 2, 3), keepdim=True)
        return LRP(model, "epsilon_gamma_box", low=low, high=high).attribute(x, t, **options)

    return maps


def _transformers() -> dict[str, Maps]:
    """Signed rules in the blocks, by the rules of attention, of residual sums and of the embedding."""
    constant = ConstantRule()
    variants = {
        "CP, gamma 1, z-plus": signed_rules(ZPlusRule(), softmax=constant),
        "CP, gamma 1, z-plus, gamma 1 in linear layers": signed_rules(
            ZPlusRule(), softmax=constant, linear=GammaRule(1.0)
        ),
        "CP, gamma 1, absLRP": signed_rules(AbsLRPRule(), softmax=constant),
        "CP, gamma 1, flat": signed_rules(FlatRule(), softmax=constant),
        "CP, gamma 0, z-plus": signed_rules(ZPlusRule(), softmax=constant, residual_gamma=0.0),
        "AttnLRP, gamma 1, z-plus": signed_rules(ZPlusRule()),
        "AttnLRP, gamma 0, z-plus": signed_rules(ZPlusRule(), residual_gamma=0.0),
    }
    return {
        f"AbsLRP transformer {name}, {label}": _abslrp(options, mapping=mapping)
        for name, mapping in variants.items()
        for label, options in CONTRASTS
    }


def _convolutional() -> dict[str, Maps]:
    """Signed rules, by the rules of convolutions and of residual sums; z-plus in the first layer."""
    variants = {
        "gamma 1, residual gamma 1": signed_rules(ZPlusRule(), convolution=GammaRule(1.0)),
        "gamma 1": signed_rules(ZPlusRule(), convolution=GammaRule(1.0), residual_gamma=0.0),
        "gamma 1, in linear layers, too": signed_rules(
            ZPlusRule(),
            convolution=GammaRule(1.0),
            linear=GammaRule(1.0),
            residual_gamma=0.0,
        ),
        "gamma 0.25": signed_rules(ZPlusRule(), convolution=GammaRule(0.25), residual_gamma=0.0),
    }
    return {
        f"AbsLRP signed {name}, {label}": _abslrp(options, mapping=mapping)
        for name, mapping in variants.items()
        for label, options in CONTRASTS
    }


def _coarse_map(values: Tensor, x: Tensor) -> Tensor:
    """Positive sums over channels, (B, 1, H, W), of a feature map (B, D, h, w) or of tokens (B, L, D)."""
    if values.dim() == 3:  # those of patches are last
        side = int(values.shape[1] ** 0.5)
        values = values[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))
    summed = values.sum(1, keepdim=True).clamp(min=0)
    return F.interpolate(summed, size=x.shape[2:], mode="bilinear")


class _Guided(torch.autograd.Function):
    """ReLU (or ReLU6) whose gradient passes only where it is positive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor) -> Tensor:
        ctx.save_for_backward((x > 0) & (output == x))
        return output.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (open_,) = ctx.saved_tensors
        return gradient.clamp(min=0) * open_, None


class _GuidedMode(TorchFunctionMode):
    """Guided backpropagation for every ReLU, module or function."""

    NAMES = ("relu", "relu_", "relu6", "hardtanh", "hardtanh_")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in self.NAMES:
            return func(*args, **(kwargs or {}))
        self.count += 1
        x = args[0]
        limit = 6.0 if "6" in func.__name__ or "tanh" in func.__name__ else float("inf")
        return _Guided.apply(x, x.detach().clamp(0, limit))


def guided_backprop(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Guided backpropagation that, unlike Captum's, also changes functional ReLUs and ReLU6.

    Source: Springenberg et al., *Striving for Simplicity*, ICLR 2015 workshop.
    """
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad(), _GuidedMode() as mode:
        output = model(leaf)
    if not mode.count:
        raise ValueError("Expected `model` to have ReLUs, but got none.")
    score = output.gather(1, target.view(-1, 1)).sum()
    (gradient,) = torch.autograd.grad(score, leaf)
    return gradient


def layer_cam(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Positive gradients times activations of the last feature map, or of the tokens of the last block.

    Source: Jiang et al., *LayerCAM*, IEEE TIP 2021; on tokens as pytorch-grad-cam does it.
    """
    blocks = getattr(model, "blocks", None)
    layer = blocks[-1].norm1 if has_attention(model) and blocks else find_feature_layer(model, x)
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, args, output: kept.append(output))
    try:
        with torch.enable_grad():
            output = model(x.detach().clone().requires_grad_())
    finally:
        handle.remove()
    (gradient,) = torch.autograd.grad(output.gather(1, target.view(-1, 1)).sum(), kept)
    coarse = _coarse_map(gradient.clamp(min=0) * kept[0].detach(), x)
    return coarse.expand_as(x) / x.shape[1]
