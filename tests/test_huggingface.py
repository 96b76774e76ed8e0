"""Models of Hugging Face's transformers, from small configurations with random weights.

Their outputs are taken as they come: a ``ModelOutput`` with ``logits`` or ``logits_per_image``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from captum_abslrp import AbsLRP
from captum_abslrp.mappings import find_mapping, get_mapping
from tests.conftest import realistic, relative_error
from tests.test_no_trace import no_trace
from tests.test_state import state_of

transformers = pytest.importorskip("transformers", reason="the models come from transformers")

CLASSES, TOKENS, VOCABULARY = 5, 6, 50
SCALE = {"initializer_range": 0.2}  # as made, with 0.02, small models hardly tell images apart
LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **SCALE}
ENCODER = {"intermediate_size": 64, **LAYERS}
PATCHES = {"image_size": 32, "patch_size": 8}
STAGES = {"hidden_sizes": [16, 32], "depths": [1, 2], "num_stages": 2, **SCALE}
WINDOWS = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, **SCALE}
DRAWN = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


def made(architecture: str, attention: str, **options: Any) -> nn.Module:
    """A model of transformers; its family, in front of ``For`` or ``Model``, names its configuration."""
    family = re.split("For(?=[A-Z])", architecture)[0].removesuffix("Model")
    config = getattr(transformers, f"{family}Config")(num_labels=CLASSES, **options)
    try:
        model: nn.Module = getattr(transformers, architecture)._from_config(
            config, attn_implementation=attention
        )
    except ValueError as error:
        if "does not support an attention implementation" not in str(error):
            raise
        pytest.skip(f"{architecture} of transformers {transformers.__version__} has no {attention}")
    return model


class ImageTower(nn.Module):
    """The cosine similarity of features of images to those of fixed texts, one text per class."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        config = transformers.CLIPVisionConfig(projection_dim=16, **ENCODER, **PATCHES)
        self.tower = transformers.CLIPVisionModelWithProjection._from_config(
            config, attn_implementation=attention
        )
        self.register_buffer("texts", nn.functional.normalize(torch.randn(CLASSES, 16), dim=-1))

    def forward(self, pixel_values: Tensor) -> Tensor:
        features = self.tower(pixel_values=pixel_values).image_embeds
        return features / features.norm(dim=-1, keepdim=True) @ self.texts.T


class ImagesFirst(nn.Module):
    """CLIP itself, called with what is explained, the images, in front of the texts."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        words = {"vocab_size": VOCABULARY, "max_position_embeddings": TOKENS}
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": VOCABULARY - 1}
        config = transformers.CLIPConfig(
            text_config={**ENCODER, **words, **special},
            vision_config={**ENCODER, **PATCHES},
            projection_dim=16,
        )
        self.clip = transformers.CLIPModel._from_config(config, attn_implementation=attention)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Any:
        default = torch.get_default_dtype()
        torch.set_default_dtype(pixel_values.dtype)  # in which transformers 4 makes a mask
        try:
            return self.clip(
                input_ids=input_ids, pixel_values=pixel_values, attention_mask=attention_mask
            )
        finally:
            torch.set_default_dtype(default)


class FromEmbeddings(nn.Module):
    """A text classifier, called with the embeddings of its tokens."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        words = {"vocab_size": VOCABULARY, "max_position_embeddings": TOKENS}
        self.classifier = made(
            "BertForSequenceClassification", attention, **ENCODER, **words, **DRAWN
        )

    def forward(self, embeddings: Tensor, attention_mask: Tensor | None = None) -> Any:
        return self.classifier(inputs_embeds=embeddings, attention_mask=attention_mask)


OPTIONS: dict[str, dict[str, Any]] = {
    "ViTForImageClassification": {**ENCODER, **PATCHES, **DRAWN},
    "DeiTForImageClassification": {**ENCODER, **PATCHES},
    "DeiTForImageClassificationWithTeacher": {**ENCODER, **PATCHES},
    "SwinForImageClassification": {**WINDOWS, "image_size": 32, "patch_size": 4},
    "Dinov2ForImageClassification": {**LAYERS, **PATCHES, "use_swiglu_ffn": False},
    "ConvNextV2ForImageClassification": STAGES,
    "ResNetForImageClassification": {**STAGES, "embedding_size": 16},
}
WITHOUT_ATTENTION = ("ConvNextV2ForImageClassification", "ResNetForImageClassification")
WRAPPED = {"CLIP image tower": ImageTower, "CLIPModel": ImagesFirst, "BERT": FromEmbeddings}
NAMES = [*OPTIONS, *WRAPPED]
CASES = [
    (name, attention)
    for name in NAMES
    for attention in ("eager", "sdpa")
    if attention == "eager" or name not in WITHOUT_ATTENTION
]


def case(name: str, attention: str) -> tuple[nn.Module, Tensor, tuple[Tensor, ...]]:
    """Model, explained input and what else the model takes, in float64."""
    torch.manual_seed(0)
    if name in WRAPPED:
        model = WRAPPED[name](attention)
    else:
        model = made(name, attention, **OPTIONS[name])
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    extra: tuple[Tensor, ...] = ()
    if name == "CLIPModel":  # four texts: classes, not samples
        words = torch.randint(2, VOCABULARY - 1, (4, TOKENS))
        words[:, -1] = VOCABULARY - 1
        extra = words, torch.ones_like(words)
    elif name == "BERT":
        x = torch.randn(3, TOKENS, 32, dtype=torch.float64)
        extra = (torch.ones(3, TOKENS, dtype=torch.long),)
    return realistic(model.double(), x, *extra), x, extra


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_models_are_explained_as_they_are(name: str, attention: str) -> None:
    model, x, extra = case(name, attention)
    with no_trace(model):
        relevance: Tensor = AbsLRP(model).attribute(x, 1, extra)
    assert relevance.shape == x.shape
    assert bool(torch.isfinite(relevance).all())
    assert bool(relevance.flatten(1).any(1).all())
    assert torch.equal(AbsLRP(model).attribute(x, 1, extra), relevance)
    assert relative_error(AbsLRP(model).attribute(x, 2, extra), relevance) > 0.1
    alone = tuple(t[:1] if len(t) == len(x) else t for t in extra)
    assert relative_error(AbsLRP(model).attribute(x[:1], 1, alone), relevance[:1]) < 1e-9


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITHOUT_ATTENTION])
def test_both_implementations_of_attention_give_the_same_map(name: str) -> None:
    eager, x, extra = case(name, "eager")
    sdpa, *_ = case(name, "sdpa")
    sdpa.load_state_dict(eager.state_dict())
    maps = [AbsLRP(model).attribute(x, 1, extra) for model in (eager, sdpa)]
    # The models themselves differ: most eager implementations run softmax in float32.
    assert relative_error(*maps) < 1e-5


LENGTHS = [TOKENS, TOKENS - 2, 3]


def padded_texts(attention: str) -> tuple[nn.Module, Tensor, Tensor]:
    model, x, (mask,) = case("BERT", attention)
    for sample, length in zip(mask, LENGTHS, strict=True):
        sample[length:] = 0
    return model, x, AbsLRP(model).attribute(x, 1, mask)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_of_a_text_gets_no_relevance(attention: str) -> None:
    _, _, relevance = padded_texts(attention)
    for sample, length in zip(relevance, LENGTHS, strict=True):
        assert not bool(sample[length:].any())
        assert bool(sample[:length].any(1).all())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_padded_text_has_the_map_of_the_text_alone(attention: str) -> None:
    model, x, relevance = padded_texts(attention)
    for sample, alone, length in zip(relevance, x, LENGTHS, strict=True):
        cut = AbsLRP(model).attribute(alone[None, :length], 1)
        assert relative_error(sample[:length], cut[0]) < 1e-9


def test_an_output_without_logits_is_named() -> None:
    model = made("ViTModel", "sdpa", **OPTIONS["ViTForImageClassification"]).eval()
    x = torch.randn(2, 3, 32, 32)
    with pytest.raises(TypeError, match=r"but got BaseModelOutputWithPooling\. Pick one .*output="):
        AbsLRP(model).attribute(x, 1)
    relevance: Tensor = AbsLRP(model, output=lambda out: out.pooler_output).attribute(x, 1)
    assert bool(relevance.flatten(1).any(1).all())


def test_the_two_heads_of_a_distilled_model_are_one_layer() -> None:
    model, x, _ = case("DeiTForImageClassificationWithTeacher", "sdpa")
    assert find_mapping(model) is get_mapping("two_heads")
    heads = model(x)
    below = (heads.cls_logits < 0) & (heads.distillation_logits < 0)
    sample, target = below.nonzero()[0].tolist()
    relevance = AbsLRP(model).attribute(x[[sample]], target, contrast=None)
    assert bool(relevance.any())


# Models that install hooks the first time that they are asked for attention maps.

HEADS = {"num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 16}
LAZY: dict[str, dict[str, Any]] = {
    "ViTForImageClassification": {**ENCODER, **PATCHES},
    "BeitForImageClassification": {**ENCODER, **PATCHES, "vocab_size": 20},
    "SegformerForImageClassification": {
        "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], **HEADS, **SCALE,
    },
    "SegformerForSemanticSegmentation": {
        "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], **HEADS, **SCALE,
    },
    "DPTForSemanticSegmentation": {
        **ENCODER, **PATCHES, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3],
        "neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "is_hybrid": False,
    },
}  # fmt: skip


def lazy_case(name: str) -> tuple[nn.Module, Tensor, Callable[[Any], Tensor] | None]:
    """Model, input, and what picks one score per class; equal each time."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    if name == "MaskFormerForInstanceSegmentation":
        half = {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2}
        widths = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "decoder_attention_heads": 2}
        backbone = transformers.SwinConfig(
            image_size=32,
            patch_size=4,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=2,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )
        decoder = transformers.DetrConfig(d_model=32, num_queries=3, **half, **widths)
        options: dict[str, Any] = {
            "backbone_config": backbone,
            "decoder_config": decoder,
            "fpn_feature_size": 32,
            "mask_feature_size": 32,
        }
        model = made(name, "eager", **options)
        return model.eval(), torch.randn(2, 3, 32, 32, generator=generator), _queries
    model = made(name, "eager", **LAZY[name]).eval()
    output = _pixels if name.endswith("SemanticSegmentation") else None
    return model, torch.randn(2, 3, 32, 32, generator=generator), output


def _queries(output: Any) -> Tensor:
    scores: Tensor = output.class_queries_logits
    return scores.mean(1)


def _pixels(output: Any) -> Tensor:
    scores: Tensor = output.logits
    return scores.mean((2, 3))


@pytest.mark.parametrize("asked", ["attentions", "hidden_states", "nothing"])
@pytest.mark.parametrize("name", [*LAZY, "MaskFormerForInstanceSegmentation"])
def test_models_that_install_hooks_are_left_without_them(name: str, asked: str) -> None:
    (model, x, output), (untouched, *_) = lazy_case(name), lazy_case(name)
    if asked != "nothing":
        setattr(model.config, f"output_{asked}", True)
        setattr(untouched.config, f"output_{asked}", True)
    before = state_of(model)
    relevance = AbsLRP(model, output=output).attribute(x, 1)
    after = state_of(model)
    assert [key for key in {**before, **after} if before.get(key) != after.get(key)] == []
    assert torch.equal(AbsLRP(model, output=output).attribute(x, 1), relevance)
    assert bool(relevance.any())
    for options in ({"output_attentions": True}, {}, {"output_hidden_states": True}):
        with torch.no_grad():
            got, expected = model(x, **options), untouched(x, **options)
        assert got.keys() == expected.keys()
        pairs = zip(tree_leaves(dict(got)), tree_leaves(dict(expected)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert len(model(x, output_attentions=True).attentions) > 1
