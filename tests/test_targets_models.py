"""Detectors, segmentation, image and text, similarity and text: real architectures with small configurations.

Weights are random. Each is explained as its users would: a box, a segment, a similarity, a class of a text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torchvision.models.detection as detection
import torchvision.models.segmentation as segmentation
import transformers
from torch import Tensor, nn

from captum_abslrp import LRP, AbsLRP, LayerAbsLRP
from captum_abslrp.targets import Box, Segment, Similarity, WithKeywords
from tests.conftest import realistic
from tests.test_no_trace import no_trace

SCALE = {"initializer_range": 0.2}
ENCODER = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, **SCALE,
}  # fmt: skip
SMALL_DETR = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_queries": 5,
    "init_std": 0.2,
}  # fmt: skip
ALL_BOXES = {"box_score_thresh": 0.0}
WORDS = {"vocab_size": 50, "max_position_embeddings": 8}
NO_DOWNLOAD = {"weights": None, "weights_backbone": None}


class Case(NamedTuple):
    """A model and how it is explained."""

    model: nn.Module
    inputs: Tensor
    """(2, ...)"""
    target: Callable[[Any], Any]
    """From what the model returns for the inputs to the target."""
    contrast: Any = "others"
    layer: str | None = None
    """The path of the layer that is explained, for integer inputs."""


def detector(name: str, **options: Any) -> Callable[[], Case]:
    """A detector of torchvision's; its surest box is explained."""

    def make() -> Case:
        model = getattr(detection, name)(**NO_DOWNLOAD, num_classes=4, **options)
        return Case(model, torch.rand(2, 3, 96, 96), surest_detection)

    return make


def surest_detection(out: list[dict[str, Tensor]]) -> Box:
    """The surest detection of each image that has an area."""
    chosen = []
    for found in out:
        size = (found["boxes"][:, 2:] - found["boxes"][:, :2]).prod(1)
        chosen.append(int((size > 16).int().argmax()))
    boxes = [found["boxes"][i] for found, i in zip(out, chosen, strict=True)]
    labels = [found["labels"][i] for found, i in zip(out, chosen, strict=True)]
    return Box(boxes, torch.stack(labels))


def segmenting(name: str) -> Callable[[], Case]:
    """A segmentation model of torchvision's; the class of most pixels is explained there."""

    def make() -> Case:
        model = getattr(segmentation, name)(**NO_DOWNLOAD, num_classes=4)
        x = torch.rand(2, 3, 64, 64)
        realistic(model.eval(), x)
        mask = torch.zeros(64, 64)
        mask[8:40, 16:48] = 1
        return Case(model, x, lambda out: Segment(1, mask))

    return make


def resnet_config() -> Any:
    return transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 32, 32], depths=[1] * 4, layer_type="basic",
        out_features=["stage4"],
    )  # fmt: skip


def swin_config() -> Any:
    return transformers.SwinConfig(
        image_size=64, patch_size=4, embed_dim=16, depths=[1] * 4, num_heads=[2] * 4, window_size=4,
        out_features=[f"stage{i}" for i in range(1, 5)], **SCALE,
    )  # fmt: skip


def surest(out: Any) -> Box:
    """The query of each image whose class is the surest, with the box that it has."""
    query = out.logits.softmax(-1)[..., :-1].amax(-1).argmax(-1)
    rows = torch.arange(len(query))
    center, size = out.pred_boxes[rows, query].split(2, dim=-1)
    labels = out.logits[rows, query, :-1].argmax(-1)
    return Box(torch.cat([center - size / 2, center + size / 2], -1), labels)


def detr() -> Case:
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        backbone_config=resnet_config(), num_labels=3, **SMALL_DETR,
    )  # fmt: skip
    return Case(transformers.DetrForObjectDetection(config), torch.rand(2, 3, 64, 64), surest)


def yolos() -> Case:
    config = transformers.YolosConfig(
        **ENCODER, image_size=[64, 64], patch_size=8, num_detection_tokens=5, num_labels=3
    )
    return Case(transformers.YolosForObjectDetection(config), torch.rand(2, 3, 64, 64), surest)


def segformer() -> Case:
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 16, 16, 32], depths=[1] * 4, num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=16, num_labels=3, **SCALE,
    )  # fmt: skip
    model = transformers.SegformerForSemanticSegmentation(config)
    return Case(model, torch.rand(2, 3, 64, 64), lambda out: Segment(1, torch.ones(64, 64)))


def mask2former() -> Case:
    config = transformers.Mask2FormerConfig(
        backbone_config=swin_config(), hidden_dim=32, mask_feature_size=32, feature_size=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=4, encoder_feedforward_dim=64,
        dim_feedforward=64, num_queries=5, num_labels=3,
    )  # fmt: skip
    model = transformers.Mask2FormerForUniversalSegmentation(config)
    return Case(model, torch.rand(2, 3, 64, 64), lambda out: Segment(1, torch.ones(64, 64)))


def maskformer() -> Case:
    config = transformers.MaskFormerConfig(
        backbone_config=swin_config(), decoder_config=transformers.DetrConfig(**SMALL_DETR),
        fpn_feature_size=32, mask_feature_size=32, num_labels=3,
    )  # fmt: skip
    model = transformers.MaskFormerForInstanceSegmentation(config)
    return Case(model, torch.rand(2, 3, 64, 64), lambda out: Segment(1, torch.ones(64, 64)))


def texts(count: int, length: int = 8) -> Tensor:
    words = torch.randint(2, 49, (count, length))
    words[:, -1] = 49
    return words


def image_and_text(family: str) -> Callable[[], Case]:
    """Images against four texts; the first is explained rather than the second."""

    def make() -> Case:
        vision = {**ENCODER, "image_size": 32, "patch_size": 8}
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 49}
        of_family = {} if family == "Siglip" else {"projection_dim": 16}
        config = getattr(transformers, f"{family}Config")(
            text_config={**ENCODER, **WORDS, **special}, vision_config=vision, **of_family
        )
        model = getattr(transformers, f"{family}Model")(config)
        fixed = {"input_ids": texts(4)}
        if family == "CLIP":
            fixed["attention_mask"] = torch.ones_like(fixed["input_ids"])
        images_first = WithKeywords(model, "pixel_values", **fixed)
        return Case(images_first, torch.rand(2, 3, 32, 32), lambda out: 0, 1)

    return make


def dinov2() -> Case:
    small = {k: v for k, v in ENCODER.items() if k != "intermediate_size"}
    config = transformers.Dinov2Config(**small, image_size=32, patch_size=8, use_swiglu_ffn=False)
    model = transformers.Dinov2Model(config)
    others = torch.randn(1, 3, 32)
    x = torch.rand(2, 3, 32, 32)
    return Case(
        model, x, lambda out: Similarity(out.pooler_output.flip(0)), contrast=Similarity(others)
    )


def of_timm() -> Case:
    model = timm.create_model("test_resnet", num_classes=0)
    x = torch.rand(2, 3, 64, 64)
    realistic(model.eval(), x)
    return Case(model, x, lambda out: Similarity(out.flip(0)), contrast=None)


def bert() -> Case:
    config = transformers.BertConfig(**ENCODER, **WORDS, num_labels=3)
    model = transformers.BertForSequenceClassification(config)
    return Case(model, texts(2), lambda out: [0, 2], layer="bert.embeddings")


def sentences() -> Case:
    model = transformers.BertModel(transformers.BertConfig(**ENCODER, **WORDS))
    return Case(
        model,
        texts(2),
        lambda out: Similarity(
            out.last_hidden_state.mean(1).flip(0),
            embedding=lambda out: out.last_hidden_state.mean(1),
        ),
        layer="embeddings.word_embeddings",
    )


CASES: dict[str, Callable[[], Case]] = {
    "Faster R-CNN": detector("fasterrcnn_mobilenet_v3_large_320_fpn", min_size=96, **ALL_BOXES),
    "RetinaNet": detector("retinanet_resnet50_fpn", min_size=96, score_thresh=0.0),
    "FCOS": detector("fcos_resnet50_fpn", min_size=96, score_thresh=0.0),
    "SSD": detector("ssdlite320_mobilenet_v3_large", score_thresh=0.0),
    "DeepLabV3": segmenting("deeplabv3_mobilenet_v3_large"),
    "FCN": segmenting("fcn_resnet50"),
    "DETR": detr,
    "YOLOS": yolos,
    "SegFormer": segformer,
    "Mask2Former": mask2former,
    "MaskFormer": maskformer,
    "CLIP": image_and_text("CLIP"),
    "SigLIP": image_and_text("Siglip"),
    "DINOv2, similarity": dinov2,
    "timm, similarity": of_timm,
    "BERT": bert,
    "BERT, similarity": sentences,
}


LARGE = frozenset("RetinaNet FCOS SSD FCN DeepLabV3".split()) | {"Faster R-CNN"}
"""Models of torchvision's that have no small configuration."""
KINDS = [
    pytest.param(name, kind, marks=[pytest.mark.slow] if kind == "signed" and name in LARGE else [])
    for name in CASES
    for kind in ("published", "signed")
]


# Faster R-CNN detaches its proposals: where boxes lie is not explained.
@pytest.mark.filterwarnings(
    "ignore:The output of the model depends on a tensor that is detached:UserWarning"
)
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_each_is_explained_and_left_as_it_was(name: str, kind: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]()
    model = case.model.eval().double()
    x = case.inputs.double() if case.inputs.is_floating_point() else case.inputs
    with torch.no_grad():
        target = case.target(model(x))
    attributor: Any = AbsLRP(model) if kind == "published" else LRP(model, "attnlrp")
    if case.layer is not None:
        mapping = None if kind == "published" else "attnlrp"
        attributor = LayerAbsLRP(model, model.get_submodule(case.layer), mapping)
    contrast = case.contrast
    with no_trace(model):
        relevance = attributor.attribute(x, target, contrast=contrast)
    assert relevance.isfinite().all()
    assert relevance.flatten(1).any(1).all()
    for i in range(2):
        own = target.rows(i, i + 1) if hasattr(target, "rows") else target
        own = own[i] if isinstance(own, list) else own
        alone = attributor.attribute(x[i : i + 1], own, contrast=contrast)
        difference = (relevance[i : i + 1] - alone).abs().sum() / alone.abs().sum()
        assert difference < 1e-6, f"sample {i}: {difference:.1e}"
