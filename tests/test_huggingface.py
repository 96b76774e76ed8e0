"""Models of Hugging Face's transformers, from small configurations with random weights.

Their outputs are taken as they come: a ``ModelOutput`` with ``logits`` or ``logits_per_image``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_abslrp import AbsLRP
from captum_abslrp.mappings import find_mapping, get_mapping
from tests.conftest import realistic, relative_error
from tests.test_no_trace import no_trace

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
    family = architecture.split("For")[0].removesuffix("Model")
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
