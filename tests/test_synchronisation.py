"""Nothing in ``attribute`` waits for a device: no value of a tensor decides what is done next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from captum_abslrp import AbsLRP, LayerAbsLRP, attribution, contrast
from captum_abslrp.forms import base, elementwise
from tests.conftest import GOLDEN_NAMES, load_golden, realistic, relative_error

WAITING = frozenset(
    "_local_scalar_dense item is_nonzero nonzero equal allclose masked_select unique "
    "unique_consecutive _unique2 bincount".split()
)


class NoWaiting(TorchDispatchMode):
    """Raises where a call hands values of a tensor to the host, or has a result of a size that depends on
    them."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.__name__.split(".")[0]
        by_mask = name == "index" and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name in WAITING or by_mask:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["host", "device"])
def known(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where values are: on the host, where they may be looked at, or as if they were on a device."""
    if request.param == "device":
        for module in (attribution, base, contrast, elementwise):
            monkeypatch.setattr(module, "on_host", lambda condition: None)
    return str(request.param)


@pytest.mark.parametrize("look", [bool, float, Tensor.item, Tensor.nonzero, lambda x: x[x > 0]])
def test_the_mode_sees_what_waits(look: Callable[[Tensor], Any]) -> None:
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        look(torch.ones(1))


@pytest.mark.parametrize("normalization", ["separate", "joint"])
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_nothing_waits(name: str, normalization: str, known: str) -> None:
    golden = load_golden(name)
    attributor = AbsLRP(golden.model, normalization=normalization)
    expected = attributor.attribute(golden.x, golden.target)
    with NoWaiting():
        actual = attributor.attribute(golden.x, golden.target)
        attributor.attribute(golden.x, contrast="softmax")
        attributor.attribute(golden.x, 0, contrast=1, combine="gated")
    assert torch.equal(actual, expected)


@pytest.mark.filterwarnings("ignore:The maps of target and contrast differ")
@pytest.mark.parametrize(
    "name",
    ["efficientnet_b0", "mobilenetv3_small_050", "convnext_atto", "swin_tiny_patch4_window7_224",
     "mixer_s32_224", "pvt_v2_b0"],
)  # fmt: skip
def test_nothing_waits_in_other_architectures(name: str, known: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 224, 224)
    model = realistic(timm.create_model(name), x)
    expected = AbsLRP(model).attribute(x, [3, 4])
    with NoWaiting():
        actual = AbsLRP(model).attribute(x, [3, 4])
    assert relative_error(actual, expected) < 1e-5


def test_nothing_waits_for_a_mask_or_a_layer(known: str) -> None:
    torch.manual_seed(0)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(6, 5), nn.Linear(5, 4)
            self.register_buffer("mask", torch.tensor([0.0, -200.0, 0.0, 0.0, -200.0]))

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.inner(x) + self.mask).softmax(1))

    model, x = Masked().double(), torch.randn(3, 6, dtype=torch.float64)
    expected = AbsLRP(model).attribute(x, 1)
    with NoWaiting():
        actual = AbsLRP(model).attribute(x, 1)
        LayerAbsLRP(model, model.inner).attribute(x, 1)
    assert relative_error(actual, expected) < 1e-12
