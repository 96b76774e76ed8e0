"""Three slim models of timm's own classes, trained on scenes of handwritten digits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from .scenes import CLASS_NAMES, MEAN, SIZE, STD

WEIGHTS = Path(__file__).parent / "weights"


def _vgg() -> nn.Module:
    from timm.models.vgg import VGG

    # Three poolings leave 8x8 features, so that the 7x7 head convolution needs no resizing.
    cfg = [16, "M", 32, "M", 64, 64, "M", 64, 64]
    model: nn.Module = VGG(
        cfg=cfg,
        num_classes=len(CLASS_NAMES),
        in_chans=3,
        mlp_ratio=24 / 4096,
        norm_layer=nn.BatchNorm2d,
    )
    return model


def _resnet() -> nn.Module:
    from timm.models.resnet import BasicBlock, ResNet

    model: nn.Module = ResNet(
        block=BasicBlock,
        layers=(2, 2, 2, 2),
        channels=(32, 48, 64, 48),
        stem_width=32,
        zero_init_last=False,
        num_classes=len(CLASS_NAMES),
        in_chans=3,
    )
    return model


def _vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    model: nn.Module = VisionTransformer(
        img_size=SIZE,
        patch_size=8,
        in_chans=3,
        num_classes=len(CLASS_NAMES),
        embed_dim=96,
        depth=5,
        num_heads=4,
        mlp_ratio=3.0,
    )
    return model


_BUILDERS: dict[str, Callable[[], nn.Module]] = {"vgg": _vgg, "resnet": _resnet, "vit": _vit}


def list_models() -> list[str]:
    """Return the names of the demo models.

    Example:
        >>> list_models()
        ['vgg', 'resnet', 'vit']
    """
    return list(_BUILDERS)


def build_model(name: str) -> nn.Module:
    """Build an untrained demo model; its initial weights come from torch's global generator.

    `timm.data.resolve_model_data_config` finds the preprocessing on the model.

    Raises:
        ValueError: `name` is unknown.
    """
    if name not in _BUILDERS:
        raise ValueError(f"Expected `name` to be one of {list_models()}, but got {name!r}.")
    model = _BUILDERS[name]()
    cfg = {
        "input_size": (3, SIZE, SIZE),
        "fixed_input_size": True,
        "mean": MEAN,
        "std": STD,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "num_classes": len(CLASS_NAMES),
    }
    vars(model).update(pretrained_cfg=cfg, default_cfg=cfg)
    return model


def load_model(name: str) -> nn.Module:
    """Load a trained demo model in evaluation mode.

    It maps normalized images (B, 3, 64, 64) to logits (B, 10).

    Raises:
        ValueError: `name` is unknown.

    Example:
        >>> from captum_abslrp.demo import load_scenes
        >>> scenes = load_scenes("single", 10)
        >>> with torch.no_grad():
        ...     load_model("resnet")(scenes.inputs).argmax(1).tolist()
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    from safetensors.torch import load_file

    # Building draws initial weights that are replaced: the caller's generator stays as it is.
    with torch.random.fork_rng(devices=[]):
        model = build_model(name)
    model.load_state_dict(load_file(WEIGHTS / f"{name}.safetensors"))
    return model.eval()
