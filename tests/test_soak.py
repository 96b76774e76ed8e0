"""A hundred attributions in a row (two thousand among the slow tests): memory stays flat, and nothing is
left on."""

from __future__ import annotations

import gc
import random
import statistics
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack

from captum_abslrp import AbsLRP, LayerAbsLRP
from captum_abslrp.engine.state import _SNAPSHOTS

WARM_UP = 100
"""Attributions of the slow run before those whose memory is compared: what PyTorch makes once is made."""


def resident() -> int:
    """Memory of this process, in bytes."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


def live_tensors() -> int:
    """Tensors that something refers to: what other tests have left behind is collected first."""
    for _ in range(3):  # what one pass sets free may hold more
        gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def attributors() -> list[AbsLRP]:
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", dynamic_img_size=True).eval()
    resnet = timm.create_model("test_resnet").eval()
    drawn: list[AbsLRP] = []
    for normalization in ("separate", "joint"):
        drawn += [AbsLRP(model, normalization=normalization) for model in (vit, resnet)]
    return [*drawn, LayerAbsLRP(vit, vit.blocks[0]), LayerAbsLRP(resnet, resnet.layer2)]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory where Linux has it")
# Small images with random weights: the classes are hardly told apart.
@pytest.mark.filterwarnings("ignore:The maps of target and contrast")
@pytest.mark.parametrize(
    ("warm_up", "n"), [(0, 50), pytest.param(WARM_UP, 2000, marks=pytest.mark.slow)]
)
def test_attributions_leave_nothing(warm_up: int, n: int) -> None:
    draw = random.Random(0)
    torch.manual_seed(0)
    chosen = attributors()
    before = live_tensors()
    sizes = []
    for number in range(-warm_up, n):
        attributor = draw.choice(chosen)
        side = 16 * draw.randint(2, 4)
        x = torch.randn(draw.randint(1, 3), 3, side, 16 * draw.randint(2, 4))
        if number % 50 == 7:  # one that fails half way
            with pytest.raises(IndexError):
                attributor.attribute(x, 5000)
        else:
            attributor.attribute(
                x,
                draw.choice([None, 3]),
                contrast=draw.choice([None, "others", "softmax", 7]),
                check_finite=number % 100 == 0,
            )
        sizes.append(resident())
    if n >= 2000:  # a few hundred are not enough for the allocator to settle
        first, last = (
            statistics.median(part) for part in (sizes[warm_up : warm_up + 100], sizes[-100:])
        )
        print(f"resident memory: {first / 2**20:.1f} MiB, then {last / 2**20:.1f} MiB")
        assert last - first < 0.02 * first
    del x
    assert live_tensors() == before
    assert not _get_current_function_mode_stack() and torch.is_grad_enabled()
    assert not torch_module._global_forward_hooks and not torch_module._global_forward_pre_hooks
    assert not _SNAPSHOTS
    for module in (m for attributor in chosen for m in attributor.model.modules()):
        assert isinstance(module, nn.Module)
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not module._backward_hooks and not module.training
