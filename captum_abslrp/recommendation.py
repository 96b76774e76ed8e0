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


TRANSFORMER = _of("Vision Transformer", "FIGURES")
CONVOLUTIONAL = _of("convolutional network with batch norm", "FIGURES")
PLAIN = Recommendation(
    "convolutional network without batch norm", None, "joint", "others", "guided", "FIGURES"
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
    torchvision or Hugging Face. A convolutional network has convolutions, and neither attention nor layer
    norm: ResNet and EfficientNet with batch norm, VGG without.

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
    if not convolves or any(map(_is_layer_norm, modules)):
        return OTHER
    return CONVOLUTIONAL if has_batch_norm else PLAIN


def _attends(module: nn.Module) -> bool:
    """Whether a module is a layer of attention: it has heads, and linear layers of its own."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    heads = (getattr(module, name, None) for name in _HEADS)
    projects = any(isinstance(child, nn.Linear) for child in module.children())
    return projects and any(isinstance(number, int) for number in heads)


_HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads")
"""What layers of attention call the number of their heads."""


def _is_layer_norm(module: nn.Module) -> bool:
    return any(
        name in kind.__name__
        for kind in type(module).__mro__
        for name in ("LayerNorm", "RmsNorm", "RMSNorm")
    )
