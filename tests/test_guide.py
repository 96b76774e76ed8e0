"""Guided maps, the layer that guides them, and what is recommended."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from captum.attr import NoiseTunnel
from torch import Tensor, nn

from captum_abslrp import LRP, AbsLRP, LayerAbsLRP, demo
from captum_abslrp.engine.steps import Step
from captum_abslrp.guide import find_guide, grid_of, guided
from captum_abslrp.recommendation import OTHER, recommend
from tests.conftest import relative_error

SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
IMAGE = {"image_size": 32, "patch_size": 8, "num_labels": 5}


def vit() -> nn.Module:
    return demo.load_model("vit")


def scenes(count: int = 2) -> Tensor:
    return demo.load_scenes("single", count).inputs


LABELS = demo.load_scenes("single", 3).labels.tolist()
"""What the scenes show: for another class there may be nothing to say."""


def images(size: int = 64, count: int = 2) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, m in model.named_modules() if m is module)


def guide_of(model: nn.Module, x: Tensor) -> str:
    return name_of(model, find_guide(model, (x,), model))


def test_layers_that_batch_norm_is_folded_into_do_not_shift_the_middle() -> None:
    """The options of `recommended` were measured with the middle of all layers, the folded ones included."""
    x = images(count=1)
    assert guide_of(demo.load_model("vgg"), x) == "features.12"
    assert guide_of(demo.load_photo_model(), images(224, 1)) == "blocks.4.0.bn1"


@pytest.mark.parametrize("mapping", [None, "recommended"], ids=str)
@pytest.mark.parametrize("contrast", ["others", "softmax", 2], ids=str)
def test_a_guided_map_is_fine_times_coarse(mapping: Any, contrast: Any) -> None:
    model, x = vit().double(), scenes().double()
    y = LABELS[:2]
    ((name, middle),) = ((n, m) for n, m in model.named_modules() if n == "blocks.2")
    found = AbsLRP(model, mapping).attribute(x, y, contrast=contrast, combine="guided")
    fine = AbsLRP(model, mapping).attribute(x, y, contrast=None)
    coarse = LayerAbsLRP(model, middle, mapping).attribute(x, y, contrast=contrast)
    grid = coarse[:, -64:].sum(2).view(2, 1, 8, 8).clamp(min=0)
    expected = fine * F.interpolate(grid, size=(64, 64), mode="bilinear")
    expected *= (fine.abs().sum((1, 2, 3)) / expected.abs().sum((1, 2, 3))).view(2, 1, 1, 1)
    assert guide_of(model, x) == name
    assert relative_error(found, expected) < 1e-9
    same = AbsLRP(model, mapping).attribute(x, y, contrast=contrast, combine="guided", guide=middle)
    assert torch.equal(same, found)
    other = AbsLRP(model, mapping).attribute(
        x, y, contrast=contrast, combine="guided", guide=model.blocks[3]
    )
    assert relative_error(other, found) > 1e-3


@pytest.mark.parametrize("normalization", ["separate", "joint"])
def test_a_guided_map_has_the_total_of_the_targets(normalization: str) -> None:
    model, x = demo.load_model("resnet"), demo.load_scenes("single", 3).inputs
    attributor = AbsLRP(model, normalization=normalization)
    fine = attributor.attribute(x, LABELS, contrast=None)
    found, delta = attributor.attribute(x, LABELS, combine="guided", return_convergence_delta=True)
    torch.testing.assert_close(found.abs().sum((1, 2, 3)), fine.abs().sum((1, 2, 3)))
    torch.testing.assert_close(delta, found.sum((1, 2, 3)) - 1, atol=1e-5, rtol=0)


def test_without_a_contrast_it_is_the_map_of_the_target() -> None:
    model, x = vit(), scenes()
    alone = AbsLRP(model).attribute(x, 1, contrast=None)
    assert torch.equal(AbsLRP(model).attribute(x, 1, contrast=None, combine="guided"), alone)
    single = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    single = nn.Sequential(single, nn.Linear(4, 1)).eval()  # one output has nothing beside it
    expected = AbsLRP(single).attribute(x, 0, contrast=None)
    found = AbsLRP(single).attribute(x, 0, combine="guided")
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("size", [1, "auto"])
def test_guided_maps_in_parts_and_alone(size: Any) -> None:
    model, x = vit().double(), scenes(3).double()
    attributor = AbsLRP.recommended(model)
    whole = attributor.attribute(x, LABELS)
    parts = attributor.attribute(x, LABELS, internal_batch_size=size)
    assert relative_error(parts, whole) < 1e-9


FAMILIES = {
    "resnet18": "layer2",
    "swin_tiny_patch4_window7_224": "layers.2.blocks.1",  # (B, h, w, D)
    "deit_tiny_distilled_patch16_224": "blocks.5",  # two tokens before the patches
    "eva02_tiny_patch14_224": "blocks.5",
    "convnext_atto": "stages.2.blocks.1",  # whose shortcut is an identity
    "mixer_s32_224": "blocks.3",
    "xcit_nano_12_p16_224": "blocks.5",
}


@pytest.mark.parametrize(("family", "expected"), FAMILIES.items())
def test_the_guide_is_in_the_middle(family: str, expected: str) -> None:
    model = timm.create_model(family).eval()
    x = images(224 if model.default_cfg.get("fixed_input_size") else 96, 1)
    hooks = [len(m._forward_hooks) for m in model.modules()]
    assert guide_of(model, x) == expected
    assert [len(m._forward_hooks) for m in model.modules()] == hooks


def hugging_face(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "swin":
        config = transformers.SwinConfig(
            image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 2],
            window_size=4, num_labels=5,
        )  # fmt: skip
        return transformers.SwinForImageClassification(config).eval()
    name = {"vit": "ViT", "dinov2": "Dinov2WithRegisters", "beit": "Beit", "deit": "DeiT"}[kind]
    config = getattr(transformers, f"{name}Config")(**SMALL, **IMAGE)
    return getattr(transformers, f"{name}ForImageClassification")(config).eval()


# With random weights no place may speak for the predicted class.
@pytest.mark.filterwarnings("ignore:The guided map is zero")
@pytest.mark.parametrize("kind", ["vit", "dinov2", "beit", "deit", "swin"])
def test_transformers_of_hugging_face_are_explained_as_recommended(kind: str) -> None:
    model, x = hugging_face(kind).double(), images(32).double()
    attributor = AbsLRP.recommended(model)
    assert attributor.recommendation is not None
    assert attributor.recommendation.kind == "Vision Transformer"
    together = attributor.attribute(x)  # the predicted class, which most places speak for
    alone = torch.cat([attributor.attribute(image[None]) for image in x])
    assert together.abs().sum() > 0
    assert relative_error(together, alone) < 1e-9


def test_kinds_are_told_by_structure() -> None:
    def kind(model: nn.Module) -> str:
        return recommend(model).kind

    with torch.device("meta"):
        assert kind(torchvision.models.vit_b_16()) == "Vision Transformer"
        assert kind(torchvision.models.swin_t()) == "Vision Transformer"
        assert kind(torchvision.models.resnet18()) == "convolutional network with batch norm"
        assert kind(timm.create_model("seresnet50")) == "convolutional network with batch norm"
        assert recommend(torchvision.models.vgg11()) is OTHER  # without batch norm
        for name in ("convnext_atto", "levit_128s", "mixer_s32_224", "maxvit_tiny_tf_224"):
            assert recommend(timm.create_model(name)) is OTHER
    assert recommend(nn.Linear(3, 4)) is OTHER


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("vit", ("recommended", "softmax", "guided")),
        ("resnet", ("recommended", "softmax", "guided")),
        ("vgg", ("recommended", "softmax", "guided")),
    ],
)
def test_recommended_has_the_defaults_that_it_says(model: str, options: Any) -> None:
    network, x, y = demo.load_model(model), scenes(), LABELS[:2]
    attributor = AbsLRP.recommended(network)
    chosen = attributor.recommendation
    assert chosen is not None
    assert (chosen.mapping, chosen.contrast, chosen.combine) == options
    explicit = AbsLRP(network, chosen.mapping, normalization=chosen.normalization)
    expected = explicit.attribute(x, y, contrast=chosen.contrast, combine=chosen.combine)
    assert torch.equal(attributor.attribute(x, y), expected)
    other = [(label + 1) % 10 for label in y]
    asked = attributor.attribute(x, y, contrast=other, combine="difference")
    assert torch.equal(asked, explicit.attribute(x, y, contrast=other))
    shown = repr(attributor)
    assert shown.startswith(f"AbsLRP.recommended({type(network).__name__}): ")
    assert chosen.kind in shown and f"combine={chosen.combine!r}" in shown
    assert "GridPG" in shown
    assert repr(AbsLRP(network, "epsilon")) == (
        f"AbsLRP({type(network).__name__}, mapping='epsilon', normalization='separate')"
    )


def test_a_model_of_another_kind_gets_the_published_method() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    x = torch.rand(2, 6)
    attributor = AbsLRP.recommended(model)
    assert "models of this kind were not measured" in repr(attributor)
    assert torch.equal(attributor.attribute(x, 1), AbsLRP(model).attribute(x, 1))


def test_what_is_recommended_is_an_abslrp() -> None:
    assert type(LRP.recommended(vit())) is AbsLRP
    with pytest.raises(TypeError, match="Expected `model` to be"):
        AbsLRP.recommended("vit")  # type: ignore[arg-type]


def test_recommended_takes_an_output_and_noise() -> None:
    model, x = vit(), scenes()
    pair = nn.Sequential(model)
    pair.forward = lambda x: (0, model(x))  # type: ignore[method-assign]
    attributor = AbsLRP.recommended(pair, output=lambda out: out[1])
    y = torch.tensor(LABELS[:2])
    direct = AbsLRP.recommended(model).attribute(x, y)
    assert relative_error(attributor.attribute(x, y), direct) < 1e-4
    smooth = NoiseTunnel(AbsLRP.recommended(model)).attribute(x, target=y, nt_samples=2, stdevs=0.1)
    assert smooth.shape == x.shape


def test_signed_rules_can_be_guided_too() -> None:
    model, x = vit(), scenes()
    found = LRP(model, "attnlrp").attribute(x, LABELS[:2], contrast="others", combine="guided")
    assert found.shape == x.shape and found.abs().sum() > 0


def test_a_guided_map_of_zeros_warns() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.fill_(1.0)
            layer.bias.zero_()
    x = images(8)
    guide: Any = model[1]
    with pytest.warns(UserWarning) as caught:
        found = AbsLRP(model).attribute(x, 1, combine="guided", guide=guide)
    assert not found.any()
    assert any("The guided map is zero for 2 of 2 samples" in str(w.message) for w in caught)


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [
        ((2, 5, 7, 7), (224, 224), (2, 7, 7)),
        ((2, 7, 7, 5), (224, 224), (2, 7, 7)),
        ((2, 7, 14, 5), (112, 224), (2, 7, 14)),
        ((2, 197, 5), (224, 224), (2, 14, 14)),
        ((2, 200, 5), (224, 224), (2, 14, 14)),
        ((2, 99, 5), (112, 224), (2, 7, 14)),
        ((2, 196, 5), (224, 224), (2, 14, 14)),
    ],
)
def test_grids(shape: Any, size: Any, expected: Any) -> None:
    assert grid_of(torch.ones(shape), size).shape == expected


def test_tokens_lie_where_their_patches_do() -> None:
    tokens = torch.zeros(1, 17, 2)
    tokens[0, 0] = 9.0  # the class token
    tokens[0, 1 + 4 * 2 + 3] = 1.0
    expected = torch.zeros(1, 4, 4)
    expected[0, 2, 3] = 2.0
    assert torch.equal(grid_of(tokens, (64, 64)), expected)


@pytest.mark.parametrize("shape", [(2, 5), (2, 1, 5), (2, 5, 1, 1), (2, 60, 5), (2, 3, 40, 4)])
def test_what_lies_on_no_grid_is_refused(shape: Any) -> None:
    with pytest.raises(ValueError, match="Expected values on a grid with the aspect ratio"):
        grid_of(torch.ones(shape), (224, 224))


def test_windows_are_no_images() -> None:
    with pytest.raises(ValueError, match="to have the images in its leading dimension"):
        guided(torch.ones(1, 3, 8, 8), torch.ones(4, 4, 5))

    class Windows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.unfold(2, 4, 4).unfold(3, 4, 4).permute(2, 3, 0, 1, 4, 5).reshape(4, 3, 4, 4)

    model = nn.Sequential(nn.Conv2d(3, 3, 1), Windows(), nn.ReLU(), nn.Conv2d(3, 3, 1)).eval()
    whole = nn.Sequential(model, nn.Flatten(0), nn.Linear(192, 2), nn.Unflatten(0, (1, 2)))
    assert guide_of(whole, images(8, 1)) == "0.0"


def test_weights_are_enlarged_bilinearly() -> None:
    fine = torch.ones(1, 1, 4, 4)
    coarse = torch.tensor([[[[1.0, -1.0], [3.0, 0.0]]]])
    found = guided(fine, coarse)
    weight = F.interpolate(coarse.clamp(min=0), size=(4, 4), mode="bilinear")
    torch.testing.assert_close(found, weight * 16 / weight.sum())


FLAT = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval()
CONV = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)).eval()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: AbsLRP(FLAT).attribute(images(8), 1, combine="guided"), ValueError,
         "Expected Sequential to have a layer"),
        (lambda: AbsLRP(nn.Linear(6, 4).eval()).attribute(torch.rand(2, 6), 1, combine="guided"),
         ValueError, "Expected `inputs` to be one tensor of images"),
        (lambda: AbsLRP(CONV).attribute(images(8), 1, combine="guided", guide=nn.ReLU()),
         ValueError, "Expected `guide` to be a module of `model`"),
        (lambda: AbsLRP(CONV).attribute(images(8), 1, combine="guided", guide="0"),
         TypeError, "Expected `guide` to be a torch.nn.Module, but got str"),
        (lambda: AbsLRP(CONV).attribute(images(8), 1, combine="guided", guide=CONV[2]),
         ValueError, "Expected values on a grid"),
        (lambda: LayerAbsLRP(CONV, CONV[0]).attribute(images(8), 1, combine="guided"),
         ValueError, "relevance of a layer"),
        (lambda: AbsLRP(CONV).attribute(images(8), 1, guide=CONV[0]),
         ValueError, 'Expected `guide` only with `combine="guided"`'),
    ],
)  # fmt: skip
def test_what_cannot_be_guided_says_why(call: Any, error: Any, message: str) -> None:
    CONV(images(8))
    with pytest.raises(error, match=message):
        call()


def test_the_model_is_left_alone_when_a_guide_fails() -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.conv(x)
            raise RuntimeError("half way")

    model = Breaks().eval()
    with pytest.raises(RuntimeError, match="half way"):
        AbsLRP(model).attribute(images(8), 1, combine="guided")
    assert not model.conv._forward_hooks and not model._forward_hooks


@pytest.mark.parametrize("mapping", [None, "recommended"], ids=str)
def test_the_contrast_ends_at_the_guide(mapping: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = vit(), scenes()
    counts: list[int] = []
    run = Step.__call__

    def counted(step: Step, seeds: Any, arrived: Any = None) -> Any:
        counts.append(len(seeds))
        return run(step, seeds, arrived)

    monkeypatch.setattr(Step, "__call__", counted)
    AbsLRP(model, mapping).attribute(x, LABELS[:2], contrast="others", combine="guided")
    before, behind = counts.count(1), counts.count(2)
    assert counts == [2] * behind + [1] * before
    assert before > 10
    assert behind > 10


@pytest.mark.parametrize("contrast", ["others", 2])
@pytest.mark.parametrize("normalization", ["separate", "joint"])
def test_a_score_that_goes_past_the_guide(contrast: Any, normalization: str) -> None:
    class Past(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grid, self.head = nn.Conv2d(3, 5, 3, padding=1), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            past = torch.tanh(x.mean((2, 3)).neg())  # on the tail of the score, with a sign
            return self.head(self.grid(x).relu().mean((2, 3))) + past

    torch.manual_seed(0)
    model, x = Past().double().eval(), images(16).double()
    attributor = AbsLRP(model, normalization=normalization)
    found = attributor.attribute(x, 0, contrast=contrast, combine="guided", guide=model.grid)
    fine = attributor.attribute(x, 0, contrast=None)
    layer = LayerAbsLRP(model, model.grid, normalization=normalization)
    coarse = layer.attribute(x, 0, contrast=contrast)
    assert relative_error(found, guided(fine, coarse)) < 1e-9
