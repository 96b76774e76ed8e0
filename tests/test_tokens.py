"""Maps of tokens: each token lies where its patch does, in every layer of every kind of transformer.

The models are run with attention that takes each token for itself. A layer then depends, at one place, on one
patch of the image: where that patch differs between two images, the layer does, and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

from captum_abslrp import AbsLRP, LayerAbsLRP, demo, token_map
from captum_abslrp.guide import find_guide, grid_of, guided
from captum_abslrp.tokens import TokenPlaces
from tests.conftest import relative_error

Size = tuple[int, int]

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
SWIN = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 2), "num_classes": 5}
ENCODER = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "image_size": 64, "patch_size": 16, "num_labels": 5,
}  # fmt: skip
STAGES = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 2], "patch_size": 4, "num_labels": 5}


def of_timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **options)


def of_torchvision_swin(*size: int, **options: Any) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.SwinTransformer(
        [4, 4], 24, [2, 2], [2, 2], list(size), num_classes=5, **options
    )


def of_hugging_face(name: str, base: dict[str, Any] = ENCODER, **options: Any) -> Any:
    """A model of transformers; its family, in front of ``For``, ``Model`` or ``Backbone``, has a config."""

    def make() -> nn.Module:
        family = re.split("For(?=[A-Z])|Model|Backbone", name)[0]
        if not hasattr(transformers, name):
            pytest.skip(f"transformers {transformers.__version__} has no {name}")
        model: nn.Module = getattr(transformers, name)(
            getattr(transformers, f"{family}Config")(**{**base, **options})
        )
        return model

    return make


SAM = {"output_channels": 16, "mlp_dim": 64, "global_attn_indexes": [1]}
VITDET = {"pretrain_image_size": 112, "window_block_indices": [0], "num_channels": 3}
MODELS: dict[str, tuple[Callable[[], nn.Module], Size, int]] = {
    "vit, not square": (of_timm("vit_tiny_patch16_224", img_size=(48, 80), **SMALL), (48, 80), 16),
    "vit, registers, dynamic": (
        of_timm("vit_small_patch14_reg4_dinov2", img_size=56, dynamic_img_size=True, **SMALL),
        (42, 70), 14,
    ),
    "vit, dynamic, padded": (
        of_timm("vit_tiny_patch16_224", dynamic_img_size=True, dynamic_img_pad=True, **SMALL),
        (40, 70), 16,
    ),
    "vit, no class token": (
        of_timm("vit_tiny_patch16_224", img_size=64, class_token=False, global_pool="avg", **SMALL),
        (64, 64), 16,
    ),
    "deit, distilled": (of_timm("deit_tiny_distilled_patch16_224", img_size=64, **SMALL), (64, 64), 16),
    "eva": (of_timm("eva02_tiny_patch14_224", img_size=(56, 84), **SMALL), (56, 84), 14),
    "beit": (of_timm("beit_base_patch16_224", img_size=64, **SMALL), (64, 64), 16),
    "convit": (of_timm("convit_tiny", img_size=64, local_up_to_layer=1, **SMALL), (64, 64), 16),
    "sam": (
        of_timm("samvit_base_patch16", img_size=112, window_size=4, global_attn_indexes=(1,),
                neck_chans=16, **SMALL),
        (112, 112), 16,
    ),
    "swin": (of_timm("swin_tiny_patch4_window7_224", img_size=64, window_size=4, **SWIN), (64, 64), 4),
    "swin, not square": (
        of_timm("swin_tiny_patch4_window7_224", img_size=(56, 72), window_size=(2, 3), **SWIN),
        (56, 72), 4,
    ),
    "swin, padded": (
        of_timm("swin_tiny_patch4_window7_224", img_size=(44, 60), window_size=4, **SWIN), (44, 60), 4,
    ),
    "swin, one window": (
        of_timm("swin_tiny_patch4_window7_224", img_size=28, window_size=7, **SWIN), (28, 28), 4,
    ),
    "swin, dynamic": (
        of_timm("swin_tiny_patch4_window7_224", img_size=64, window_size=4, strict_img_size=False,
                always_partition=True, **SWIN),
        (44, 52), 4,
    ),
    "swinv2, padded": (
        of_timm("swinv2_tiny_window8_256", img_size=(44, 60), window_size=4, **SWIN), (44, 60), 4,
    ),
    "swinv2_cr, padded": (
        of_timm("swinv2_cr_tiny_224", img_size=(44, 60), window_size=(4, 3), **SWIN), (44, 60), 4,
    ),
    "torchvision vit": (
        lambda: torchvision.models.VisionTransformer(64, 16, 2, 2, 32, 64, num_classes=5), (64, 64), 16,
    ),
    "torchvision swin, padded": (of_torchvision_swin(4, 4), (44, 60), 4),
    "torchvision swinv2": (
        of_torchvision_swin(4, 2, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2),
        (64, 64), 4,
    ),
    "ViT": (of_hugging_face("ViTForImageClassification"), (64, 64), 16),
    "ViT, not square": (of_hugging_face("ViTModel", image_size=(48, 80)), (48, 80), 16),
    "DeiT": (of_hugging_face("DeiTForImageClassification"), (64, 64), 16),
    "Dinov2": (of_hugging_face("Dinov2ForImageClassification"), (64, 64), 16),
    "Dinov2, other size": (of_hugging_face("Dinov2Model"), (48, 96), 16),
    "Dinov2WithRegisters": (
        of_hugging_face("Dinov2WithRegistersForImageClassification", num_register_tokens=3),
        (64, 64), 16,
    ),
    "DINOv3ViT": (of_hugging_face("DINOv3ViTModel", num_register_tokens=3), (48, 64), 16),
    "Beit": (of_hugging_face("BeitForImageClassification"), (64, 64), 16),
    "Data2VecVision": (of_hugging_face("Data2VecVisionModel"), (64, 64), 16),
    "CLIPVision": (of_hugging_face("CLIPVisionModelWithProjection"), (64, 64), 16),
    "SiglipVision": (of_hugging_face("SiglipVisionModel"), (64, 64), 16),
    "BlipVision": (of_hugging_face("BlipVisionModel"), (64, 64), 16),
    "IJepa": (of_hugging_face("IJepaModel"), (64, 64), 16),
    "Yolos": (
        of_hugging_face("YolosModel", image_size=[64, 64], num_detection_tokens=7), (64, 64), 16,
    ),
    "Sam": (of_hugging_face("SamVisionModel", image_size=112, window_size=4, **SAM), (112, 112), 16),
    "VitDet": (of_hugging_face("VitDetModel", image_size=112, window_size=3, **VITDET), (112, 112), 16),
    "Swin": (
        of_hugging_face("SwinForImageClassification", STAGES, image_size=64, window_size=4), (64, 64), 4,
    ),
    "Swin, padded": (of_hugging_face("SwinModel", STAGES, image_size=64, window_size=3), (42, 58), 4),
    "Swin, one window": (of_hugging_face("SwinModel", STAGES, image_size=64, window_size=7), (28, 40), 4),
    "Swin, backbone": (
        of_hugging_face("SwinBackbone", STAGES, image_size=64, window_size=7, out_features=["stage2"]),
        (28, 40), 4,
    ),
    "Swinv2, padded": (
        of_hugging_face("Swinv2Model", STAGES, image_size=(44, 60), window_size=4), (44, 60), 4,
    ),
    "DonutSwin": (of_hugging_face("DonutSwinModel", STAGES, image_size=(56, 72), window_size=3), (56, 72), 4),
}  # fmt: skip
"""Models by name, the size of the images, and that of the patches."""

REFUSED = re.compile(
    # heads and pools, or a model that returns what they do
    r"(^|\.)(head|head_drop|head_dist|heads|fc_norm|classifier|avgpool|flatten|pooler|visual_projection)($|\.)|"
    r"^(vision_model|vit|deit|beit|dinov2|swin)?$|"
    # single heads of an attention, and a layer that sees windows at first and then the grid
    r"\.(q_norm|k_norm|attn_drop|softmax)$|layers\.\d\.blocks\.\d\.dropout$"
)
"""Paths of layers that may have no map."""
MIXED = re.compile(r"(^|\.)(neck|head)($|\.)|^(vision_encoder)?$")
"""Paths of layers that mix places by convolutions behind the blocks, or get or return what these do."""


@pytest.fixture
def local_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token attends to itself alone."""
    attention, softmax = F.scaled_dot_product_attention, torch.softmax

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if query.shape[-2] == value.shape[-2]:
            return value
        return attention(query, key, value, *args, **kwargs)

    def probabilities(scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if scores.dim() < 3 or scores.shape[-1] != scores.shape[-2]:
            return softmax(scores, -1)
        return torch.eye(scores.shape[-1], dtype=scores.dtype).expand(scores.shape)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    for owner in (F, torch, Tensor):
        monkeypatch.setattr(owner, "softmax", probabilities)


def made(make: Callable[[], nn.Module]) -> nn.Module:
    """A model in float64 and evaluation mode, none of whose parameters are zero."""
    torch.manual_seed(0)
    model = make().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


Seen = tuple[str, str, list[Tensor]]


def seen_by_layers(model: nn.Module, x: Tensor) -> list[Seen]:
    """The path of each layer, ``"input"`` or ``"output"``, and the tensors, in the order of calls."""
    found: list[Seen] = []
    hooks = []
    for path, module in model.named_modules():

        def note(value: Any, path: str, place: str) -> None:
            tensors = [t.detach().clone() for t in tree_leaves(value) if isinstance(t, Tensor)]
            found.append((path, place, [t for t in tensors if t.is_floating_point()]))

        def before(m: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            note((args, kwargs), path, "input")

        def after(m: nn.Module, args: Any, output: Any, path: str = path) -> None:
            note(output, path, "output")

        hooks += [module.register_forward_pre_hook(before, with_kwargs=True)]
        hooks += [module.register_forward_hook(after)]
    model(x)  # with a history, because PyTorch has attention in one call without
    for hook in hooks:
        hook.remove()
    return found


def with_a_patch_that_differs(size: Size, patch: int) -> tuple[Tensor, Tensor, list[Size]]:
    """Images, the same with one patch changed, and which it is in each."""
    h, w = -(-size[0] // patch), -(-size[1] // patch)
    places = [(0, 0), (h - 1, w - 1), (h // 2, w // 3), (1, w - 2)]
    x = torch.rand(len(places), 3, *size, generator=torch.Generator().manual_seed(1)).double()
    changed = x.clone()
    for image, (row, column) in zip(changed, places, strict=True):
        rows, columns = (slice(i * patch, (i + 1) * patch) for i in (row, column))
        image[:, rows, columns] += 1
    return x, changed, places


def _is_image(tensor: Tensor, size: Size) -> bool:
    return tensor.dim() == 4 and tensor.shape[1] == 3 and tensor.shape[3] >= size[1]


@pytest.mark.usefixtures("local_attention")
@pytest.mark.parametrize("name", MODELS)
def test_every_token_lies_where_its_patch_does(name: str) -> None:
    make, size, patch = MODELS[name]
    model = made(make)
    x, changed, places = with_a_patch_that_differs(size, patch)
    known, found = TokenPlaces(model, size), set()
    for (path, place, tensors), (_, _, others) in zip(
        seen_by_layers(model, x), seen_by_layers(model, changed), strict=True
    ):
        layer = model.get_submodule(path)
        for tensor, other in zip(tensors, others, strict=True):
            difference = (tensor - other).abs()
            if not difference.any() or _is_image(difference, size):
                continue
            try:
                maps = known.map(difference, layer)
            except ValueError:
                assert REFUSED.search(path), (path, place, tensor.shape)
                continue
            if MIXED.search(path):
                continue
            found.add(path)
            coarser = round(-(-size[0] // patch) / maps.shape[1])
            expected = torch.zeros_like(maps, dtype=torch.bool)
            for index, (row, column) in enumerate(places):
                expected[index, row // coarser, column // coarser] = True
            assert torch.equal(maps > 1e-12, expected), (path, place, tensor.shape)
    assert len(found) > 20
    attentions = [
        path
        for path, module in model.named_modules()
        if path.endswith(("attn", "attention")) and not path.startswith("head")
    ]
    assert found >= set(attentions)


SWIN_OF_TIMM = of_timm("swin_tiny_patch4_window7_224", img_size=32, window_size=4, **SWIN)
NO_CLASS_TOKEN = MODELS["vit, no class token"][0]


def images(count: int, *size: int) -> Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(1)).double()


def test_relevance_of_a_block_is_summed_and_laid_out() -> None:
    model, scenes = demo.load_model("vit"), demo.load_scenes("single", 2)
    relevance = LayerAbsLRP(model, model.blocks[2]).attribute(scenes.inputs, scenes.labels)
    found = token_map(relevance, model, model.blocks[2])
    assert relevance.shape[1] == 65
    torch.testing.assert_close(found, relevance.sum(2)[:, 1:].reshape(2, 8, 8))
    assert torch.equal(found, token_map(relevance, model))
    assert torch.equal(found, token_map(relevance, model, size=scenes.inputs.shape[2:]))
    assert torch.equal(found, token_map(relevance, nn.DataParallel(model), model.blocks[2]))
    assert torch.equal(found, token_map(relevance, nn.Sequential(nn.Identity(), model)))


@pytest.mark.parametrize("path", ["blocks.0", "blocks.1.attn", "blocks.1.attn.qkv", "patch_embed"])
def test_a_map_of_patches_alone_adds_up_to_the_relevance(path: str) -> None:
    model, x = made(NO_CLASS_TOKEN), images(2, 64, 64)
    layer = model.get_submodule(path)
    relevance = LayerAbsLRP(model, layer).attribute(x, 1, contrast=None)
    found = token_map(relevance, model, layer)
    assert found.shape == (2, 4, 4)
    torch.testing.assert_close(found.sum((1, 2)), relevance.sum((1, 2)))
    assert found.abs().sum() > 0.1


@pytest.mark.parametrize("path", ["layers.0.blocks.1.attn", "layers.0.blocks.1.attn.qkv"])
@pytest.mark.parametrize("of_input", [False, True])
def test_windows_of_a_batch_are_those_of_its_images(path: str, of_input: bool) -> None:
    model, x = made(SWIN_OF_TIMM), images(3, 32, 32)
    layer = model.get_submodule(path)

    def explained(x: Tensor) -> Tensor:
        attributor = LayerAbsLRP(model, layer)
        return attributor.attribute(x, 1, contrast=None, attribute_to_layer_input=of_input)

    relevance = explained(x)
    assert relevance.shape[:2] == (3 * 4, 16)  # 8 x 8 patches, in windows of 4 x 4
    found = token_map(relevance, model, layer)
    alone = torch.cat([token_map(explained(image[None]), model, layer) for image in x])
    assert found.shape == (3, 8, 8)
    assert relative_error(found, alone) < 1e-9
    by_image = relevance.view(3, -1).sum(1)
    torch.testing.assert_close(found.sum((1, 2)), by_image)
    as_windows = relevance.unflatten(1, (4, 4))
    assert torch.equal(token_map(as_windows, model, layer), found)


def test_a_shifted_window_is_put_back() -> None:
    model = made(SWIN_OF_TIMM)
    block = model.layers[0].blocks[1]
    assert (block.window_size, block.shift_size) == ((4, 4), (2, 2))
    windows = torch.zeros(4, 16, 2)
    windows[0, 0] = 1.0  # the first token of the first window is in row 2 and column 2
    windows[3, 15] = 2.0  # the last one of the last window has come around
    expected = torch.zeros(1, 8, 8)
    expected[0, 2, 2], expected[0, 1, 1] = 2.0, 4.0
    assert torch.equal(token_map(windows, model, block.attn), expected)
    plain = torch.zeros(1, 8, 8)
    plain[0, 0, 0], plain[0, 7, 7] = 2.0, 4.0
    assert torch.equal(token_map(windows, model, model.layers[0].blocks[0].attn), plain)


def test_a_block_that_fits_its_window_to_the_grid_as_it_runs() -> None:
    one = {**STAGES, "depths": [2], "num_heads": [2]}
    make = of_hugging_face("SwinForImageClassification", one, image_size=64, window_size=7)
    model, x = made(make), images(2, 28, 40)  # 7 x 10 patches, less than two windows high
    block = next(m for p, m in model.named_modules() if p.endswith("layers.0.blocks.1"))
    relevance = LayerAbsLRP(model, block.attention).attribute(x, 1, contrast=None)
    assert block.shift_size == 3  # as made; the block runs without a shift
    left, right = relevance.sum(2).view(2, 2, 7, 7).unbind(1)
    expected = torch.cat([left, right[:, :, :3]], 2)
    found = token_map(relevance, model, block.attention, size=x.shape[2:])
    torch.testing.assert_close(found, expected)
    assert found.abs().sum() > 0


@pytest.mark.parametrize("name", ["swin, padded", "Swin, padded"])
def test_relevance_of_padding_has_no_place(name: str) -> None:
    make, size, _ = MODELS[name]
    model = made(make)
    path = next(p for p, _ in model.named_modules() if re.search(r"blocks\.1\.att\w+$", p))
    layer = model.get_submodule(path)
    x = images(2, *size)
    ((_, _, tensors),) = [s for s in seen_by_layers(model, x) if s[:2] == (path, "input")]
    ones = torch.ones_like(tensors[0])[..., :1]
    h, w = -(-size[0] // 4), -(-size[1] // 4)
    assert ones.sum() > 2 * h * w
    assert torch.equal(token_map(ones, model, layer, size=size), torch.ones(2, h, w).double())


class Own(nn.Module):
    """A transformer about which nothing is known, with two class tokens."""

    def __init__(self, *, behind: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1)
        self.patches = nn.Conv2d(3, 8, (4, 8), (4, 8))
        self.tokens = nn.Parameter(torch.rand(1, 2, 8))
        self.block, self.head, self.behind = nn.Linear(8, 8), nn.Linear(8, 3), behind

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(self.stem(x)).flatten(2).transpose(1, 2)
        parts = [patches, self.tokens.expand(len(x), -1, -1)]
        return self.head(self.block(torch.cat(parts if self.behind else parts[::-1], 1)).mean(1))


@pytest.mark.parametrize("behind", [False, True])
def test_a_model_of_other_origin_needs_to_be_told(behind: bool) -> None:
    model, (x, changed, _) = (
        made(lambda: Own(behind=behind)),
        with_a_patch_that_differs((16, 32), 8),
    )
    (before,), (after,) = (
        [t for path, place, (t, *_) in seen_by_layers(model, i) if (path, place) == ("block", "output")]
        for i in (x, changed)
    )  # fmt: skip
    difference = (after - before).abs()
    extra: Any = (0, 2) if behind else 2
    found = token_map(difference, model, model.block, size=(16, 32), extra_tokens=extra)
    assert found.shape == (4, 4, 4)
    upper = found[0] > 0
    assert upper[:2, 0].all() and upper.sum() == 2  # two of 4 x 8 make up one of 8 x 8
    with pytest.raises(ValueError, match="whose patches are not known.*extra_tokens=1"):
        token_map(difference, model, model.block, size=(16, 32))
    with pytest.raises(ValueError, match=r"4 x 4 patches \(with or without 1 tokens before"):
        token_map(difference, model, model.block, size=(16, 32), extra_tokens=1)


def test_the_transformer_around_the_layer_is_asked() -> None:
    def vit(**options: Any) -> nn.Module:
        return timm.create_model("vit_tiny_patch16_224", **{**SMALL, **options})

    model = nn.ModuleDict({"fine": vit(img_size=(64, 16)), "coarse": vit(img_size=(32, 32))})
    tokens = torch.rand(2, 5, 32)
    for name, shape in (("fine", (2, 4, 1)), ("coarse", (2, 2, 2))):
        assert token_map(tokens, model, model[name].blocks[0]).shape == shape
    with pytest.raises(ValueError, match="several transformers, `fine`, `coarse`, but got None"):
        token_map(tokens, model)


def test_a_tower_of_images_is_found_beside_one_of_texts() -> None:
    vision = {k: v for k, v in ENCODER.items() if k != "num_labels"}
    config = transformers.CLIPConfig(
        text_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
        vision_config=vision,
        projection_dim=16,
    )
    model = transformers.CLIPModel(config)
    tokens = torch.rand(2, 17, 32)
    found = token_map(tokens, model, model.vision_model.encoder.layers[0])
    assert torch.equal(found, tokens[:, 1:].sum(2).view(2, 4, 4))
    assert torch.equal(found, token_map(tokens, model))


VIT = timm.create_model("vit_tiny_patch16_224", img_size=64, **SMALL)
ANY_SIZE = torchvision.models.SwinTransformer([4, 4], 24, [2, 2], [2, 2], [4, 4])
SHUFFLED = transformers.ViTMAEModel(transformers.ViTMAEConfig(**ENCODER, mask_ratio=0.0))
SWIN_OF_HF = of_hugging_face("SwinModel", STAGES, image_size=(44, 60), window_size=4)()
ATTENTION_OF_HF = SWIN_OF_HF.encoder.layers[0].blocks[0].attention
TALL = timm.create_model(
    "swin_tiny_patch4_window7_224", img_size=(8, 32), window_size=(2, 2), **SWIN
)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: token_map((torch.rand(2, 17, 32),), VIT), TypeError,
         "Expected `relevance` to be a tensor, but got tuple"),
        (lambda: token_map(torch.rand(2, 17, 32), "vit"), TypeError, "Expected `model` to be"),
        (lambda: token_map(torch.rand(2, 17, 32), VIT, "blocks.0"), TypeError,
         "Expected `layer` to be the torch.nn.Module that was explained, but got str"),
        (lambda: token_map(torch.rand(2, 17, 32), VIT, nn.ReLU()), ValueError,
         "Expected `layer` to be a module of `model`"),
        (lambda: token_map(torch.rand(2, 18, 32), VIT), ValueError,
         "for images of 64 x 64, to be that of 4 x 4 patches (with or without 1 tokens before and 0 "
         "after them), as (B, L, D), (B, h, w, D) or (B, D, h, w), but got shape (2, 18, 32). If the images "
         "have another size, pass `size=x.shape[2:]`"),
        (lambda: token_map(torch.rand(2, 17, 32), VIT, size=(80, 80)), ValueError, "5 x 5 patches"),
        (lambda: token_map(torch.rand(2, 4, 17, 8), VIT), ValueError,
         "Relevance of single heads cannot be mapped"),
        (lambda: token_map(torch.rand(2, 32), VIT), ValueError, "but got shape (2, 32)"),
        (lambda: token_map(torch.rand(2, 17, 32), VIT, size=(2, 3, 64, 64)), ValueError,
         "Expected `size` to be the height and width of the images, but got (2, 3, 64, 64)"),
        (lambda: token_map(torch.rand(2, 17, 32), VIT, size=64), ValueError, "but got 64. Pass"),
        (lambda: token_map(torch.rand(2, 17, 32), VIT, extra_tokens=-1), ValueError,
         "Expected `extra_tokens` to be the number of tokens before the patches"),
        (lambda: token_map(torch.rand(2, 4, 4, 4), VIT), ValueError,
         "with a unique layout of 4 x 4 patches, but got shape (2, 4, 4, 4)"),
        (lambda: token_map(torch.rand(2, 16, 16, 24), ANY_SIZE), ValueError,
         "Expected `size`, because SwinTransformer accepts images of any size"),
        (lambda: token_map(torch.rand(2, 17, 32), SHUFFLED), ValueError,
         "Expected a supported transformer, but got ViTMAEModel"),
        (lambda: token_map(torch.rand(2, 17, 32), nn.Linear(3, 4), extra_tokens=1, size=(64, 64)),
         ValueError, "Expected a supported transformer, but got Linear"),
        (lambda: token_map(torch.rand(24, 16, 24), SWIN_OF_HF), ValueError,
         "Expected `layer`, because relevance of shape (24, 16, 24) could be that of windows of 4 x 4"),
        (lambda: token_map(torch.rand(2, 165, 24), SWIN_OF_HF, ATTENTION_OF_HF),
         ValueError, "partitions 11 x 15 patches into 3 x 4 windows, to have shape (B * 12, 16, D)"),
        (lambda: token_map(torch.rand(25, 16, 24), SWIN_OF_HF, ATTENTION_OF_HF),
         ValueError, "but got (25, 16, 24)"),
        (lambda: token_map(torch.rand(2, 48, 48), SWIN_OF_HF, SWIN_OF_HF.pooler), ValueError,
         "Expected a layer whose relevance has one position per token, but got `pooler`"),
        (lambda: token_map(torch.rand(2, 4, 24), TALL), ValueError, "windows of 2 x 2 patches in `"),
    ],
)  # fmt: skip
def test_what_has_no_place_says_why(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_a_layer_that_sees_windows_and_the_grid_is_refused() -> None:
    layer = getattr(SWIN_OF_HF.encoder.layers[0].blocks[0], "dropout", None)
    if layer is None:
        pytest.skip(f"the block of transformers {transformers.__version__} has no such layer")
    for shape in ((24, 16, 24), (2, 165, 24)):  # of its two calls
        with pytest.raises(ValueError, match="relevance has one position per token"):
            token_map(torch.rand(shape), SWIN_OF_HF, layer)


def test_features_first_and_last() -> None:
    last = torch.rand(2, 4, 4, 7)
    assert torch.equal(token_map(last, VIT), last.sum(3))
    assert torch.equal(token_map(last.permute(0, 3, 1, 2), VIT), last.sum(3))
    unclear = torch.rand(2, 4, 4, 4)
    assert torch.equal(token_map(unclear.sum(-1, keepdim=True), VIT), unclear.sum(-1))
    assert torch.equal(token_map(unclear.sum(1, keepdim=True), VIT), unclear.sum(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_dtype_and_relevance_are_kept(dtype: torch.dtype) -> None:
    relevance = torch.ones(2, 17, 32, dtype=dtype)
    found = token_map(relevance, VIT)
    found += 1
    assert found.dtype == dtype
    assert torch.equal(relevance, torch.ones(2, 17, 32, dtype=dtype))


@pytest.mark.usefixtures("local_attention")
def test_tokens_behind_the_patches_do_not_shift_the_guide() -> None:
    make, size, patch = MODELS["Yolos"]
    model = made(make)
    x, changed, places = with_a_patch_that_differs(size, patch)
    layer = model.encoder.layer[0]
    path = next(p for p, module in model.named_modules() if module is layer)
    one, other = (
        next(t[0] for p, place, t in seen_by_layers(model, i) if (p, place) == (path, "output"))
        for i in (x, changed)
    )
    difference = (one - other).abs()
    with pytest.raises(ValueError, match="but got shape"):
        token_map(difference[:, :20], model, layer)
    known = TokenPlaces(model, size)
    weights = [grid_of(difference, size, known, layer), guided(x, difference, model, layer)]
    for index, (row, column) in enumerate(places):
        assert weights[0][index].nonzero().tolist() == [[row, column]]
        peak = F.avg_pool2d(weights[1][index].abs().sum(0)[None, None], patch)[0, 0]
        assert peak.argmax() == row * 4 + column
    assert grid_of(difference, size)[0].nonzero().tolist() != [[0, 0]]  # by proportions alone


def test_the_guide_of_an_image_that_patches_do_not_fill() -> None:
    options = {"dynamic_img_size": True, "dynamic_img_pad": True, **SMALL, "depth": 3}
    model = made(of_timm("vit_tiny_patch16_224", **options))
    x = images(2, 40, 150)  # 3 x 10 patches
    guide = find_guide(model, (x,), model)
    attributor = AbsLRP(model, "recommended", normalization="joint")
    found = attributor.attribute(x, 1, contrast=2, combine="guided")
    target = attributor.attribute(x, 1, contrast=None)
    layer = LayerAbsLRP(model, guide, "recommended", normalization="joint")
    tokens = layer.attribute(x, 1, contrast=2)
    weight = tokens[:, 1:].sum(2).view(2, 1, 3, 10).clamp(min=0)
    expected = target * F.interpolate(weight, size=(40, 150), mode="bilinear")
    expected *= (target.abs().sum((1, 2, 3)) / expected.abs().sum((1, 2, 3))).view(2, 1, 1, 1)
    assert relative_error(found, expected) < 1e-6


def test_windows_can_guide() -> None:
    model, x = made(SWIN_OF_TIMM), images(2, 32, 32)
    layer = model.layers[0].blocks[1].attn
    attributor = AbsLRP(model, "recommended", normalization="joint")
    found = attributor.attribute(x, 1, contrast=2, combine="guided", guide=layer)
    tokens = LayerAbsLRP(model, layer, "recommended", normalization="joint").attribute(
        x, 1, contrast=2
    )
    weight = token_map(tokens, model, layer)[:, None].clamp(min=0)
    target = attributor.attribute(x, 1, contrast=None)
    expected = target * F.interpolate(weight, size=(32, 32), mode="bilinear")
    expected *= (target.abs().sum((1, 2, 3)) / expected.abs().sum((1, 2, 3))).view(2, 1, 1, 1)
    assert relative_error(found, expected) < 1e-6
