"""Mappings: the register, how one is found, and the models that they are for."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from captum_abslrp import AbsLRP, inspect_rules, register_call_rule
from captum_abslrp.mappings import (
    At,
    Mapping,
    find_mapping,
    get_mapping,
    list_mappings,
    register_mapping,
)
from captum_abslrp.mappings import registry as registry_module
from captum_abslrp.rules import DropoutRule, PassThroughRule, TwinRule
from tests.conftest import load_golden

TIMM = """
    vgg11 resnet18 resnet26d resnet50 resnext50_32x4d seresnet50 vit_tiny_patch16_224
    deit_tiny_distilled_patch16_224 vit_small_patch14_reg4_dinov2
""".split()
LARGER = "vgg16 vgg16_bn vgg19 wide_resnet50_2 vit_small_patch16_224 vit_base_patch16_224".split()
TORCHVISION = ["vgg11", "resnet18", "vit_b_16"]


def check(model: nn.Module, x: Tensor, target: int = 0) -> None:
    for module in model.modules():  # heads are made with weights of zero, which explain nothing
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    relevance, delta = AbsLRP(model.eval()).attribute(x, target, return_convergence_delta=True)
    assert relevance.shape == x.shape
    assert bool(torch.isfinite(relevance).all())
    assert bool(relevance.any())
    assert bool((delta.abs() < 1e-4).all())


# With random weights the classes of some are told apart in float64 only.
@pytest.mark.filterwarnings("ignore:The maps of target and contrast")
@pytest.mark.parametrize(
    "name", [*TIMM, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGER)]
)
def test_timm_models(name: str) -> None:
    torch.manual_seed(0)
    # DINOv2 comes for 518 pixels and without a head, its output being features.
    options = {"img_size": 224, "num_classes": 10} if "dinov2" in name else {}
    check(timm.create_model(name, **options), torch.randn(1, 3, 224, 224))


def test_features_of_a_model_without_a_head_are_explained() -> None:
    model = timm.create_model("test_vit", num_classes=0).eval()
    x = torch.randn(1, 3, 160, 160)
    check(model, x, target=int(model(x).argmax()))


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_models(name: str) -> None:
    torch.manual_seed(0)
    check(getattr(torchvision.models, name)(), torch.randn(1, 3, 224, 224))


VIT_OPTIONS = {
    "average pooling": {"global_pool": "avg"},
    "token pooling": {"global_pool": "token"},
    "map pooling": {"global_pool": "map"},
    "register tokens": {"reg_tokens": 4},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "q/k norm": {"qk_norm": True},
    "LayerScale": {"init_values": 0.5},
    "pre-norm": {"pre_norm": True},
    "final norm": {"final_norm": False},
    "no embedding in the class token": {"no_embed_class": True},
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", VIT_OPTIONS)
def test_vit_options(name: str, fused: bool) -> None:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=4,
        num_classes=5,
        **VIT_OPTIONS[name],
    ).double()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    check(model, torch.randn(2, 3, 32, 32, dtype=torch.float64))


FOUND = {
    "timm:test_vit": "vit",
    "timm:resnet18": "resnet",
    "timm:vgg11": "vgg",
    "timm:deit_tiny_distilled_patch16_224": "vit_distilled",
    "torchvision:vit_b_16": "vit",
    "torchvision:resnet18": "resnet",
    "torchvision:vgg11": "vgg",
}
"""A model of each registered class, and its mapping."""


def of_class(model: str) -> nn.Module:
    library, name = model.split(":")
    with torch.device("meta"):
        made: nn.Module = (
            timm.create_model(name) if library == "timm" else getattr(torchvision.models, name)()
        )
    return made


@pytest.mark.parametrize("model", FOUND)
def test_the_mapping_is_found_from_the_class(model: str) -> None:
    assert find_mapping(of_class(model)) is get_mapping(FOUND[model])


def test_every_registered_class_of_timm_and_torchvision_is_tested() -> None:
    registered = {
        name
        for name in registry_module._ARCHITECTURES
        if name.startswith(("timm.", "torchvision."))
    }
    tested = {type(of_class(model)) for model in FOUND}
    missing = registered - {f"{cls.__module__}.{cls.__qualname__}" for cls in tested}
    assert not missing, f"{missing} have no model in FOUND"


def test_other_models_get_the_generic_mapping() -> None:
    assert find_mapping(nn.Sequential(nn.Linear(2, 2))) is None
    x = torch.rand(2, 2)
    model = nn.Sequential(nn.Linear(2, 2), nn.MaxPool1d(1))
    torch.testing.assert_close(
        AbsLRP(model).attribute(x[:, None], (0, 1), class_dim=2),
        AbsLRP(model, get_mapping("generic")).attribute(x[:, None], (0, 1), class_dim=2),
    )


def test_a_wrapped_model_keeps_its_mapping() -> None:
    golden = load_golden("vit")
    wrapped = nn.Sequential(nn.Identity(), golden.model)
    torch.testing.assert_close(
        AbsLRP(wrapped).attribute(golden.x, golden.target),
        AbsLRP(golden.model).attribute(golden.x, golden.target),
    )


def test_mapping_by_name_and_as_an_object_agree() -> None:
    golden = load_golden("vit")
    by_name = AbsLRP(golden.model, "vit").attribute(golden.x, golden.target)
    as_object = AbsLRP(golden.model, get_mapping("vit")).attribute(golden.x, golden.target)
    automatic = AbsLRP(golden.model).attribute(golden.x, golden.target)
    assert torch.equal(by_name, as_object)
    assert torch.equal(by_name, automatic)


def test_entries_of_an_extension_win_by_call_layer_type_and_place() -> None:
    golden = load_golden("vit")
    vit = get_mapping("vit")
    everywhere = vit.extended({"dropout": PassThroughRule()})
    by_type = vit.extended({nn.Dropout: PassThroughRule()})
    by_place = vit.extended({At("*drop*"): PassThroughRule(), "dropout": PassThroughRule()})
    maps = [
        AbsLRP(golden.model, m).attribute(golden.x, golden.target)
        for m in (everywhere, by_type, by_place, get_mapping("generic"), vit)
    ]
    torch.testing.assert_close(maps[0], maps[2])
    torch.testing.assert_close(maps[0], maps[3])
    assert not torch.allclose(maps[0], maps[4])
    assert everywhere.name == "vit (extended)"


def test_registering() -> None:
    class Net(nn.Sequential):
        pass

    name = f"{Net.__module__}.{Net.__qualname__}"
    mine = Mapping("mine", [("erf", TwinRule()), ("dropout", DropoutRule())], get_mapping())
    assert register_mapping(mine, architectures=[name]) is mine
    assert get_mapping("mine") is mine
    assert "mine" in list_mappings()
    assert find_mapping(Net()) is mine
    for taken in (name, Net):
        with pytest.raises(ValueError, match=r"got \['mine', .*`overwrite=True`"):
            register_mapping(mine, architectures=[taken])
    for wrong in (3, "Net", int):
        with pytest.raises(TypeError, match="model classes or qualified names"):
            register_mapping(Mapping("yours", []), architectures=[wrong])  # type: ignore[list-item]
    other = Mapping("mine", [])
    register_mapping(other, overwrite=True)
    assert get_mapping("mine") is other


def test_unknown_names_bring_near_ones() -> None:
    with pytest.raises(
        ValueError, match=r"Expected `mapping` to be one of \[.*'vit'.*Did you mean 'resnet'"
    ):
        get_mapping("resnets")


def test_entries_of_a_mapping_win_over_registered_calls() -> None:
    class Net(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sinc(super().forward(x)) + torch.erfinv(x[:, :2].tanh())

    register_call_rule("sinc", TwinRule())
    register_call_rule("erfinv", TwinRule())
    own = PassThroughRule()
    alone = Mapping("alone", [("sinc", own), *get_mapping().entries])  # over nothing
    for mapping in (alone, get_mapping().extended({"sinc": own})):
        calls = {
            c.call: c for c in inspect_rules(Net(3, 2), torch.rand(2, 3), mapping=mapping).calls
        }
        assert calls["torch.sinc"].origin == f"mapping {mapping.name!r}"
        assert calls["torch.erfinv"].origin == "registered"
