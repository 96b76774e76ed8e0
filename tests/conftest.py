"""Shared by all tests: golden cases and devices."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_NAMES = ["vgg", "vgg_bn", "resnet_basic", "resnet_bottleneck", "vit"]


@dataclass(frozen=True)
class Golden:
    """A stored reference result: a small model, its inputs and float64 relevances."""

    model: nn.Module
    x: Tensor
    target: Tensor
    logits: Tensor
    relevance_target: Tensor
    relevance_rest: Tensor
    relevance: Tensor


def load_golden(name: str, dtype: torch.dtype = torch.float64) -> Golden:
    import timm.models.resnet
    import timm.models.vgg
    import timm.models.vision_transformer

    file = np.load(GOLDEN / f"{name}.npz")
    modules = (timm.models.vgg, timm.models.resnet, timm.models.vision_transformer)
    module = next(m for m in modules if hasattr(m, str(file["model"])))
    config = json.loads(str(file["config"]))
    for key in {"block", "norm_layer"} & config.keys():
        config[key] = getattr(module, config[key], None) or getattr(nn, config[key])
    model = getattr(module, str(file["model"]))(**config)
    prefix = "state/"
    model.load_state_dict(
        {k.removeprefix(prefix): torch.from_numpy(file[k]) for k in file if k.startswith(prefix)}
    )
    arrays = ("logits", "relevance_target", "relevance_rest", "relevance")
    return Golden(
        model.eval().to(dtype),
        torch.from_numpy(file["x"]).to(dtype),
        torch.from_numpy(file["target"]),
        *(torch.from_numpy(file[a]) for a in arrays),
    )


# PyTorch's default on a GPU is TF32, which is too coarse for the difference of two maps.
torch.backends.cudnn.allow_tf32 = False

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 error over all elements."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@torch.no_grad()
def realistic(model: nn.Module, *inputs: Tensor) -> nn.Module:
    """The model, in evaluation mode, as if it had been trained.

    Parameters that are made constant (heads of zeros, LayerScale, biases) are drawn around their
    value, and batch norm learns its statistics from ``inputs``.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        value = parameter.flatten()[:1]
        if bool((parameter == value).all()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter += noise * (0.1 if value else 0.05)
    model.eval()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over what it is shown
        norm.train()
    if norms:
        model(*inputs)
    return model.eval()


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, without a window."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: `apt-get install chromium`")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()
