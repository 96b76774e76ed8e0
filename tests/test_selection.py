"""Relevance of inputs that goes through chosen channels of a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from captum_abslrp import LRP, AbsLRP, LayerAbsLRP, UnsupportedCallError, demo
from tests.conftest import realistic, relative_error
from tests.test_no_trace import no_trace

LAYERS = {"vgg": "features.5", "resnet": "layer2.0", "vit": "blocks.2"}
KINDS: dict[str, dict[str, Any]] = {
    "separate": {},
    "joint": {"normalization": "joint"},
    "attnlrp": {"mapping": "attnlrp"},
}


def subject(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    model = demo.load_model(name).double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    return model, model.get_submodule(LAYERS[name]), x


@pytest.mark.parametrize("contrast", [None, "others", "softmax"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_maps_through_all_channels_add_up_to_the_map(
    name: str, kind: str, contrast: str | None
) -> None:
    model, layer, x = subject(name)
    of_layer = LayerAbsLRP(model, layer, **KINDS[kind])
    channels = of_layer.attribute(x, 3).shape[2 if name == "vit" else 1]
    with no_trace(model):
        parts = of_layer.attribute(x, 3, contrast=contrast, select=[[c] for c in range(channels)])
    whole = AbsLRP(model, **KINDS[kind]).attribute(x, 3, contrast=contrast)
    assert len(parts) == channels
    assert relative_error(sum(parts), whole) < 1e-9
    assert all(relative_error(part, whole) > 0.1 for part in parts)


def test_float32_adds_up_too() -> None:
    model = timm.create_model("resnet18").eval()
    x = torch.randn(2, 3, 96, 96)
    realistic(model, x)
    of_layer = LayerAbsLRP(model, model.layer3, normalization="joint")
    parts = of_layer.attribute(
        x, 3, contrast=None, select=[range(i, i + 16) for i in range(0, 256, 16)]
    )
    whole = AbsLRP(model, normalization="joint").attribute(x, 3, contrast=None)
    assert relative_error(sum(parts), whole) < 1e-5


def test_what_goes_past_the_layer_is_in_no_part() -> None:
    """Inside of a residual block: through the branch, through the shortcut, and both are the map."""
    model, _, x = subject("resnet")
    block = model.layer2[0]
    branch, shortcut = block.bn2, block.downsample
    parts = [
        LayerAbsLRP(model, layer, normalization="joint").attribute(
            x, 3, select=torch.ones(1, 1, 1, dtype=torch.float64)
        )
        for layer in (branch, shortcut)
    ]
    whole = AbsLRP(model, normalization="joint").attribute(x, 3)
    assert relative_error(sum(parts), whole) < 1e-9
    assert all(relative_error(part, whole) > 0.05 for part in parts)


def test_a_channel_of_a_constructed_network_sees_its_input_alone() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1, groups=3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 4)
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    x = torch.rand(2, 3, 4, 4).double()
    layer = LayerAbsLRP(model.eval(), model[1])
    for channel in range(3):
        part = layer.attribute(x, 1, contrast=None, select=channel)
        others = [c for c in range(3) if c != channel]
        assert part[:, channel].all() and not part[:, others].any()
    corner = torch.zeros(4, 4)
    corner[0, 0] = 1
    part = layer.attribute(x, 1, contrast=None, select=corner)
    assert part[:, :, :2, :2].all() and not part[:, :, 2:].any() and not part[:, :, :, 2:].any()


def test_tokens_and_heads_are_selected_by_their_dimension() -> None:
    model, block, x = subject("vit")
    of_block = LayerAbsLRP(model, block, normalization="joint")
    tokens = of_block.attribute(x, 3).shape[1]
    whole = AbsLRP(model, normalization="joint").attribute(x, 3)
    by_token = of_block.attribute(x, 3, select=[[t] for t in range(tokens)], select_dim=1)
    assert relative_error(sum(by_token), whole) < 1e-9
    # Heads are neighboring channels of what the projection of attention gets.
    attention = model.blocks[1].attn
    width = attention.proj.in_features // attention.num_heads
    heads = [range(h * width, (h + 1) * width) for h in range(attention.num_heads)]
    of_heads = LayerAbsLRP(model, attention.proj, normalization="joint")
    parts = of_heads.attribute(x, 3, attribute_to_layer_input=True, select=heads)
    everything = of_heads.attribute(
        x, 3, attribute_to_layer_input=True, select=torch.ones(1).double()
    )
    assert len(parts) == attention.num_heads
    assert relative_error(sum(parts), everything) < 1e-9
    assert relative_error(everything, whole) > 0.05  # much goes past attention


@pytest.mark.parametrize("size", [1, None])
def test_samples_inputs_and_selections_keep_their_order(size: int | None) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(4, 6)
            self.head = nn.Sequential(nn.ReLU(), nn.Linear(6, 5))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.head(self.a(x) + self.b(y))

    model = Two().double().eval()
    inputs = torch.randn(3, 3).double(), torch.randn(3, 4).double()
    layer = LayerAbsLRP(model, model.head[0], normalization="joint")
    parts = layer.attribute(inputs, 2, select=[[0, 1, 2], [3, 4, 5]], internal_batch_size=size)
    whole = AbsLRP(model, normalization="joint").attribute(inputs, 2)
    for i in range(2):
        assert parts[0][i].shape == inputs[i].shape
        torch.testing.assert_close(parts[0][i] + parts[1][i], whole[i])
    alone = layer.attribute(inputs, 2, select=[0, 1, 2])
    torch.testing.assert_close(alone, parts[0])


def test_one_pass_is_enough_for_all_selections(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layer, x = subject("resnet")
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    LayerAbsLRP(model, layer).attribute(x, 3, select=[[0], [1], [2, 3]])
    assert len(calls) == 1


def test_composites_are_divided_too() -> None:
    model, layer, x = subject("resnet")
    for composite in ("epsilon_plus", "epsilon_alpha2_beta1"):
        of_layer = LayerAbsLRP(model, layer, composite)
        channels = of_layer.attribute(x, 3).shape[1]
        half = channels // 2
        parts = of_layer.attribute(x, 3, select=[range(half), range(half, channels)])
        assert (
            relative_error(sum(parts), LRP(model, composite).attribute(x, 3, contrast="others"))
            < 1e-9
        )


WRONG: dict[str, tuple[Callable[[Any], dict[str, Any]], type[Exception], str]] = {
    "words": (lambda m: {"select": "all"}, TypeError, "to be a channel index, .* got 'all'"),
    "nothing": (
        lambda m: {"select": []},
        ValueError,
        "at least one channel, but got an empty list",
    ),
    "out of range": (
        lambda m: {"select": 1000},
        IndexError,
        r"to be indices of the \d+ channels in dimension 1 .* but got 1000\. Pass `select_dim`",
    ),
    "the samples": (lambda m: {"select": 0, "select_dim": 0}, IndexError, "Expected `select_dim`"),
    "weights": (
        lambda m: {"select": torch.ones(7, 1, 1)},
        ValueError,
        r"to broadcast with a sample of shape .* got torch.float32 of shape \(7, 1, 1\)",
    ),
    "gated": (
        lambda m: {"select": 0, "combine": "gated"},
        ValueError,
        "because the maps of parts must sum",
    ),
    "delta": (
        lambda m: {"select": 0, "return_convergence_delta": True},
        ValueError,
        "Expected no `return_convergence_delta` with `select`",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_selected_is_refused(case: str) -> None:
    options, error, message = WRONG[case]
    model, layer, x = subject("resnet")
    with pytest.raises(error, match=message):
        LayerAbsLRP(model, layer).attribute(x, 3, **options(model))


def test_several_layers_and_integers_are_refused() -> None:
    model, layer, x = subject("resnet")
    with pytest.raises(ValueError, match="Expected one layer with `select`, but got 2"):
        LayerAbsLRP(model, [layer, model.layer1]).attribute(x, 3, select=0)
    words = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 5)).eval()
    with pytest.raises(
        TypeError, match="floating-point dtype with `select`.* Explain a model that takes emb"
    ):
        LayerAbsLRP(words, words[1]).attribute(torch.tensor([[1, 5, 2]]), 2, select=0)


def test_channels_are_chosen_by_tensors_of_indices_and_of_weights() -> None:
    model, layer, x = subject("resnet")
    of_layer = LayerAbsLRP(model, layer)
    channels = of_layer.attribute(x, 3).shape[1]
    expected = of_layer.attribute(x, 3, select=[2, 5])
    mask = torch.zeros(channels, dtype=torch.bool)
    mask[[2, 5]] = True
    for select in (
        torch.tensor([2, 5]),
        torch.tensor([5, 2], dtype=torch.int32),
        mask,
        mask.float(),
    ):
        assert torch.equal(of_layer.attribute(x, 3, select=select), expected)
    largest = torch.tensor(2)  # as `argmax` returns it
    assert torch.equal(of_layer.attribute(x, 3, select=largest), of_layer.attribute(x, 3, select=2))
    several = of_layer.attribute(x, 3, select=[torch.tensor(2), torch.tensor(5)])
    torch.testing.assert_close(several[0] + several[1], expected)
    for select, error, message in (
        (
            torch.ones(2, 2, dtype=torch.long),
            TypeError,
            "Pass channel indices as a one-dimensional tensor",
        ),
        (mask[:-1], ValueError, f"one weight for each of {channels} channels in dimension 1"),
        (mask.float() / 0, ValueError, "weights in `select` to be finite"),
    ):
        with pytest.raises(error, match=message):
            of_layer.attribute(x, 3, select=select)


class ChannelsLast(nn.Module):
    """A block of 12 channels on a grid of 8 by 12, channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 1)
        self.block = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 12), nn.GELU())
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x).permute(0, 2, 3, 1)).mean((1, 2)))


def test_layers_say_where_their_channels_are() -> None:
    model = ChannelsLast().double().eval()
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    layer = LayerAbsLRP(model, model.block, normalization="joint")
    for channel in (0, 11):
        last = layer.attribute(x, 1, select=channel, select_dim=-1)
        assert torch.equal(layer.attribute(x, 1, select=channel), last)
    rows = layer.attribute(x, 1, select=[[r] for r in range(8)], select_dim=1)
    assert all(not part[:, :, [r for r in range(8) if r != i]].any() for i, part in enumerate(rows))
    sequence = (
        nn.Sequential(nn.Conv1d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)).double().eval()
    )
    y = torch.randn(2, 3, 10, dtype=torch.float64)
    parts = LayerAbsLRP(sequence, sequence[0]).attribute(y, 1, select=[[c] for c in range(6)])
    assert relative_error(sum(parts), AbsLRP(sequence).attribute(y, 1)) < 1e-9


def test_a_layer_that_batch_norm_is_folded_into_is_refused() -> None:
    """Its output has no relevance of its own under rules that fold; the batch norm's has."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5)
    )
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    model.double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    channels = [[c] for c in range(6)]
    for mapping in ("epsilon", "epsilon_plus", "recommended"):
        with pytest.raises(UnsupportedCallError, match=r"is folded into.* Choose the batch norm"):
            LayerAbsLRP(model, model[0], mapping).attribute(x, 1, select=channels)
        parts = LayerAbsLRP(model, model[1], mapping).attribute(x, 1, select=channels)
        whole = AbsLRP(model, mapping).attribute(x, 1)
        assert relative_error(sum(parts), whole) < 1e-9
    parts = LayerAbsLRP(model, model[0]).attribute(x, 1, select=channels)  # where nothing is folded
    assert relative_error(sum(parts), AbsLRP(model).attribute(x, 1)) < 1e-9
    with pytest.raises(UnsupportedCallError, match="is folded into"):
        AbsLRP.recommended(model).attribute(x, 1, guide=model[0])
    guided = AbsLRP.recommended(model).attribute(x, 1)  # does not choose it by itself
    assert guided.isfinite().all() and guided.any()
