"""Recommended settings for kinds of models, based on benchmarks.

The figures are from ``benchmarks/RESULTS.md``, "Real models"; ``python -m benchmarks.real`` reproduces
them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from captum_abslrp.seeds import Contrast

__all__ = ["Recommendation", "recommend"]


@dataclass(frozen=True)
class Recommendation:
    """Recommended options of :class:`~captum_abslrp.AbsLRP` for a kind of model.

    Attributes:
        kind: the kind of model.
        mapping: the name of the mapping, or None for that of the model's class.
        normalization: as in :class:`~captum_abslrp.AbsLRP`.
        contrast: the default of ``contrast`` in :meth:`~captum_abslrp.AbsLRP.attribute`.
        combine: the default of ``combine`` in :meth:`~captum_abslrp.AbsLRP.attribute`.
        figures: the benchmark results, with the models that they were measured on.
    """

    kind: str
    mapping: str | None
    normalization: str
    contrast: Contrast
    combine: str
    figures: str

    def __str__(self) -> str:
        options = {
            name: value
            for name in ("mapping", "normalization", "contrast", "combine")
            if (value := getattr(self, name)) is not None
        }
        chosen = ", ".join(f"{name}={value!r}" for name, value in options.items())
        return f"{chosen} for a {self.kind}. {self.figures}"


def _of(kind: str, figures: str) -> Recommendation:
    """The recommendation for a kind of model that was measured."""
    return Recommendation(kind, "recommended", "joint", "softmax", "guided", figures)


TRANSFORMER = _of(
    "Vision Transformer",
    "GridPG (chance level 0.25), recommended vs. published: ViT-Tiny/16 (ImageNet) 0.72 vs. 0.25, DINOv2 "
    "ViT-S/14 (four classes) 0.71 vs. 0.32.",
)
CONVOLUTIONAL = _of(
    "convolutional network with batch norm",
    "GridPG (chance level 0.25), recommended vs. published: EfficientNet-Lite0 (ImageNet) 0.91 vs. 0.77, "
    "ResNet-56 (CIFAR-10) 0.85 vs. 0.74.",
)
OTHER = Recommendation(
    "model of another kind",
    None,
    "separate",
    "others",
    "difference",
    "This is the published method, because models of this kind were not measured.",
)


def recommend(model: nn.Module) -> Recommendation:
    """Return the recommendation for a model, based on its layers.

    A model with attention layers and without batch norm counts as a Vision Transformer: ViT, DeiT, DINOv2,
    Swin, EVA, from timm, torchvision or Hugging Face. A model with convolutions and batch norm, but without
    attention or layer norm, counts as a convolutional network: ResNet, EfficientNet, MobileNet.

    Example:
        >>> recommend(timm.create_model("test_vit")).kind
        'Vision Transformer'
        >>> recommend(timm.create_model("test_resnet")).kind
        'convolutional network with batch norm'
        >>> recommend(timm.create_model("convnext_atto")).kind  # convolutions with layer norm
        'model of another kind'
    """
    modules = list(model.modules())
    has_batch_norm = any(isinstance(m, nn.modules.batchnorm._NormBase) for m in modules)
    if any(map(_attends, modules)):
        return OTHER if has_batch_norm else TRANSFORMER
    convolves = any(isinstance(module, nn.Conv2d) for module in modules)
    has_layer_norm = any(map(_is_layer_norm, modules))
    return CONVOLUTIONAL if convolves and has_batch_norm and not has_layer_norm else OTHER


def _attends(module: nn.Module) -> bool:
    """Whether a module is an attention layer, which has a number of heads."""
    heads = (getattr(module, name, None) for name in _HEADS)
    return any(isinstance(number, int) for number in heads)


_HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads")
"""Names of the attribute for the number of heads in attention layers."""


def _is_layer_norm(module: nn.Module) -> bool:
    return any(
        name in kind.__name__
        for kind in type(module).__mro__
        for name in ("LayerNorm", "RmsNorm", "RMSNorm")
    )
