"""Every classification model of torchvision: a small one of each architecture always, the others with
``pytest -m slow``.

Weights are random, images small and numbers float64: deep models tell classes apart by small differences
of two maps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision.models
from torch import Tensor, nn
from torchvision.models import maxvit, swin_transformer, vgg
from torchvision.models.convnext import CNBlockConfig

from captum_abslrp import AbsLRP
from tests.conftest import realistic, relative_error
from tests.test_no_trace import no_trace

SMALL = frozenset(
    """
    densenet121 efficientnet_b0 googlenet mnasnet0_5 mobilenet_v2 mobilenet_v3_small regnet_x_400mf
    regnet_y_400mf resnet18 shufflenet_v2_x0_5 squeezenet1_1
    """.split()
)
"""The smallest model of each architecture that has one of at most 12 million parameters."""


def weights_of(name: str) -> list[Any]:
    """The weights that are offered for a model; what is known of it is told by them."""
    return list(torchvision.models.get_model_weights(name))


def build(name: str) -> nn.Module:
    """A model of torchvision's register, with the initial weights of its layers."""
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # They draw their weights anew, slowly, and warn unless they are told.
        options["init_weights"] = False
    if name.startswith("vit_"):  # made for images of one size: here of four patches by four
        options["image_size"] = 4 * int(name.split("_")[-1])
    return torchvision.models.get_model(name, weights=None, **options)


def smallest_images(model: nn.Module, *sizes: int) -> Tensor:
    """Images of the first size that the model, in evaluation mode, takes."""
    for size in sizes:
        images = torch.randn(4, 3, size, size, dtype=torch.float64)
        try:
            with torch.no_grad():
                model(images[:1])
        except (AssertionError, RuntimeError):
            continue
        return images
    raise ValueError(f"no size of {sizes} fits the model")


def check(model: nn.Module, *sizes: int) -> None:
    """The contract: a map for each image that is finite, its own, and of its class."""
    model = model.eval().double()
    images = smallest_images(model, *sizes)
    realistic(model, images)
    # The same image twice, for two classes, and another one in between.
    x, target = images[[0, 1, 0]], [1, 1, 2]
    with no_trace(model):
        relevance = AbsLRP(model).attribute(x, target)
        of_class = AbsLRP(model).attribute(x, target, contrast=None)
    for maps in (relevance, of_class):
        assert maps.shape == x.shape
        assert bool(torch.isfinite(maps).all())
    assert bool(relevance.flatten(1).any(1).all())
    with torch.no_grad():  # a logit that a last ReLU has made zero has no relevance
        logits = model(x).gather(1, torch.tensor(target).view(-1, 1)).squeeze(1)
    assert of_class.flatten(1).any(1).tolist() == (logits != 0).tolist()
    alone = AbsLRP(model).attribute(x[:1], 1)
    # In shares of the total: the two maps are one each, and nearly cancel in deep models.
    assert (relevance[:1] - alone).abs().sum() < 1e-12
    assert relative_error(relevance[2], relevance[0]) > 0.1


def of_each_size(name: str) -> Any:
    return pytest.param(name, marks=[] if name in SMALL else [pytest.mark.slow])


NAMES = torchvision.models.list_models(module=torchvision.models)
assert set(NAMES) >= SMALL


# With random weights the classes of the deepest ones, efficientnet_b7 and v2_l, differ by rounding only,
# which is what the warning says.
@pytest.mark.filterwarnings("ignore:The maps of target and contrast")
@pytest.mark.parametrize("name", [of_each_size(name) for name in NAMES])
def test_every_model_is_explained(name: str) -> None:
    torch.manual_seed(0)
    smallest = min(min(weights.meta["min_size"]) for weights in weights_of(name))
    model = build(name)
    check(model, 64, getattr(model, "image_size", smallest))


SWIN = {"patch_size": [4, 4], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
WINDOWS = {"window_size": [4, 4], "stochastic_depth_prob": 0.1, "num_classes": 10}
V2 = {
    "block": swin_transformer.SwinTransformerBlockV2,
    "downsample_layer": swin_transformer.PatchMergingV2,
}
VIT = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 32}
MAXVIT = {
    "input_size": (56, 56), "stem_channels": 8, "partition_size": 7, "block_channels": [16, 16],
    "block_layers": [1, 2], "head_dim": 8, "stochastic_depth_prob": 0.1, "num_classes": 10,
}  # fmt: skip


def small_vgg() -> nn.Module:
    features = vgg.make_layers([8, "M", 16, "M", 16, 16, "M"])
    with torch.device("meta"):  # its own classifier has 120 million parameters
        model = torchvision.models.VGG(features, init_weights=False)
    layers = nn.Linear(16 * 7 * 7, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 10)
    model.classifier = nn.Sequential(*layers)
    return model


REDUCED: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ConvNeXt": (
        lambda: torchvision.models.ConvNeXt(
            [CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 2)], num_classes=10
        ),
        32,
    ),
    "Inception": (lambda: torchvision.models.Inception3(num_classes=10, init_weights=False), 75),
    "MaxVit": (lambda: maxvit.MaxVit(**MAXVIT), 56),
    "Swin": (lambda: torchvision.models.SwinTransformer(**SWIN, **WINDOWS), 40),
    "Swin V2": (lambda: torchvision.models.SwinTransformer(**SWIN, **WINDOWS, **V2), 40),
    "VGG": (small_vgg, 64),
    "VisionTransformer": (lambda: torchvision.models.VisionTransformer(**VIT, mlp_dim=64), 32),
}
"""Families that have no small model, as classes of torchvision with few layers, and image sizes."""


@pytest.mark.parametrize("family", REDUCED)
def test_families_without_a_small_model_are_explained(family: str) -> None:
    torch.manual_seed(0)
    model, size = REDUCED[family]
    check(model(), size)
