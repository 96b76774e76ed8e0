"""How to explain a model best, by what was measured on models of its kind.

The figures are those of ``benchmarks/RESULTS.md``, "Real models"; ``python -m benchmarks.real`` reproduces
them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from captum_abslrp.seeds import Contrast

__all__ = ["Recommendation", "recommend"]


@dataclass(frozen=True)
class Recommendation:
    """Options of :class:`~captum_abslrp.AbsLRP` for a kind of model, and what they were chosen by.

    Attributes:
        kind: the kind of model.
        mapping: the name of the mapping, or None for that of the model's class.
        normalization: as for :class:`~captum_abslrp.AbsLRP`.
        contrast: the default of :meth:`~captum_abslrp.AbsLRP.attribute`, as is ``combine``.
        combine: see ``contrast``.
        figures: what was measured, and on which models.
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
    """The recommended mapping for a kind of model that it was measured on."""
    return Recommendation(kind, "recommended", "joint", "softmax", "guided", figures)


TRANSFORMER = _of(
    "Vision Transformer",
    "GridPG (chance 0.25) of this and of the published method: ViT-Tiny/16 (ImageNet) 0.72 and 0.25, DINOv2 "
    "ViT-S/14 (four classes) 0.71 and 0.32.",
)
CONVOLUTIONAL = _of(
    "convolutional network with batch norm",
    "GridPG (chance 0.25) of this and of the published method: EfficientNet-Lite0 (ImageNet) 0.91 and 0.77, "
    "ResNet-56 (CIFAR-10) 0.85 and 0.74.",
)
OTHER = Recommendation(
    "model of another kind",
    None,
    "separate",
    "others",
    "difference",
    "This is the published method: nothing was measured on models of this kind.",
)


def recommend(model: nn.Module) -> Recommendation:
    """The recommendation for a model, by its structure.

    A Vision Transformer has layers of attention and no batch norm: ViT, DeiT, DINOv2, Swin, EVA, of timm,
    torchvision or Hugging Face. A convolutional network has convolutions and batch norm, and neither
    attention nor layer norm: ResNet, EfficientNet, MobileNet.

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
    """Whether a module is a layer of attention: it has a number of heads."""
    heads = (getattr(module, name, None) for name in _HEADS)
    return any(isinstance(number, int) for number in heads)


_HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads")
"""What layers of attention call the number of their heads."""


def _is_layer_norm(module: nn.Module) -> bool:
    return any(
        name in kind.__name__
        for kind in type(module).__mro__
        for name in ("LayerNorm", "RmsNorm", "RMSNorm")
    )
