"""What relevance starts from: the dimension of the classes, sums of outputs, contrasts per sample."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import NoiseTunnel
from torch import Tensor, nn

from captum_abslrp import AbsLRP, LayerAbsLRP, trace_relevance
from captum_abslrp.seeds import contrast_seed, target_seed


class Applied(nn.Module):
    """A function of what a network returns."""

    def __init__(self, network: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.function = network, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.network(x))


def batch(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(*layers: nn.Module) -> nn.Module:
    model = nn.Sequential(*layers).eval().double()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(values / 2)
    return model


def along_line(*last: nn.Module) -> nn.Module:
    """(B, 1, L) to (B, 4 classes, L)."""
    return network(nn.Conv1d(1, 6, 5, padding=2), nn.ReLU(), nn.Conv1d(6, 4, 5, padding=2), *last)


def over_image(*last: nn.Module) -> nn.Module:
    """(B, 2, H, W) to (B, 3 classes, H, W)."""
    return network(nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 3, 3, padding=1), *last)


def of_tokens() -> nn.Module:
    """(B, L tokens, 3) to (B, L, 5 classes)."""
    return network(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5))


DENSE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Any, Any, int, int | None]] = {
    # model, shape of the inputs, target, position, class, dimension of the classes
    "(B, K)": (lambda: network(nn.Linear(6, 5)), (3, 6), (2,), ..., 2, None),
    "(B, K, L)": (along_line, (2, 1, 40), (1, 20), (slice(None), slice(None), 20), 1, None),
    "(B, K, H, W)": (over_image, (2, 2, 6, 7), (2, 3, 4), (slice(None), slice(None), 3, 4), 2, None),
    "(B, L, K)": (of_tokens, (2, 4, 3), (1, 3), (slice(None), 1), 3, 2),
    "(B, H, W, K)": (
        lambda: Applied(over_image(), lambda z: z.movedim(1, -1)),
        (2, 2, 6, 7), (3, 4, 2), (slice(None), 3, 4), 2, -1,
    ),
    "(B, H, K, W)": (
        lambda: Applied(over_image(), lambda z: z.transpose(1, 2)),
        (2, 2, 6, 7), (3, 2, 4), (slice(None), 3, slice(None), 4), 2, -2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("contrast", ["others", "softmax"])
@pytest.mark.parametrize("name", DENSE)
def test_a_class_at_a_position_is_held_against_the_other_classes_there(
    name: str, contrast: str
) -> None:
    make, shape, target, position, label, class_dim = DENSE[name]
    model, x = make(), batch(*shape)
    there = Applied(model, lambda z: z[position])
    expected = AbsLRP(there).attribute(x, label, contrast=contrast)
    relevance = AbsLRP(model).attribute(x, target, contrast=contrast, class_dim=class_dim)
    torch.testing.assert_close(relevance, expected, rtol=1e-9, atol=1e-12)
    assert bool((expected != 0).any())


@pytest.mark.parametrize("class_dim", [None, 1, -2])
def test_relevance_stays_within_the_receptive_field(class_dim: int | None) -> None:
    model, x = along_line(), batch(1, 1, 40)
    for contrast in ("others", "softmax"):
        relevance = AbsLRP(model).attribute(x, (1, 20), contrast=contrast, class_dim=class_dim)
        assert bool((relevance[0, 0, :16] == 0).all() and (relevance[0, 0, 25:] == 0).all())
        longer = Applied(model, lambda z: z[..., None])
        of_longer = AbsLRP(longer).attribute(x, (1, 20, 0), contrast=contrast)
        torch.testing.assert_close(relevance, of_longer, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("shape", "class_dim"), [((5, 1, 1), None), ((1, 5), 2), ((1, 5, 1), -2), ((1, 1, 5), 3)]
)
def test_the_predicted_class_is_along_the_dimension_of_the_classes(
    shape: tuple[int, ...], class_dim: int | None
) -> None:
    flat, x = network(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)), batch(3, 6)
    model = Applied(flat, lambda z: z.reshape(len(z), *shape))
    relevance = AbsLRP(model).attribute(x, class_dim=class_dim)
    torch.testing.assert_close(relevance, AbsLRP(flat).attribute(x))
    trace = trace_relevance(model, x, class_dim=class_dim)
    assert trace == trace_relevance(Applied(flat, lambda z: z), x)


@pytest.mark.parametrize("shape", [(1, 5), (1, 5, 1)])
@pytest.mark.parametrize("contrast", ["others", "softmax"])
def test_a_dimension_of_one_class_is_warned_about(shape: tuple[int, ...], contrast: str) -> None:
    flat, x = network(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)), batch(3, 6)
    model = Applied(flat, lambda z: z.reshape(len(z), *shape))
    target = (0, 2, 0)[: len(shape)]
    with pytest.warns(UserWarning, match="Pass `class_dim` if the classes are in another"):
        relevance = AbsLRP(model).attribute(x, target, contrast=contrast)
    torch.testing.assert_close(relevance, AbsLRP(flat).attribute(x, 2, contrast=None))
    # Either remedy works, and is silent.
    AbsLRP(model).attribute(x, target, contrast=None)
    along = AbsLRP(model).attribute(x, target, contrast=contrast, class_dim=2)
    torch.testing.assert_close(along, AbsLRP(flat).attribute(x, 2, contrast=contrast))


def test_layers_are_explained_along_the_dimension_of_the_classes() -> None:
    model, x = of_tokens(), batch(2, 4, 3)
    there = Applied(model, lambda z: z[:, 1])
    relevance = LayerAbsLRP(model, model[0]).attribute(x, (1, 3), class_dim=-1)
    torch.testing.assert_close(relevance, LayerAbsLRP(there, model[0]).attribute(x, 3))


def dense(target: Any, **options: Any) -> Callable[[], object]:
    return lambda: AbsLRP(along_line()).attribute(batch(2, 1, 7), target, **options)


BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "out of range": (
        dense((1, 2), class_dim=3), IndexError,
        r"Expected `class_dim` to be .* shape \(2, 4, 7\), which has dimensions 1 to 2, but got 3",
    ),
    "out of range from the end": (dense((1, 2), class_dim=-4), IndexError, "but got -4"),
    "the samples": (
        dense((1, 2), class_dim=0), ValueError, "but got 0, which is the batch dimension",
    ),
    "the samples from the end": (
        dense((1, 2), class_dim=-3), ValueError, "but got -3, which is the batch dimension",
    ),
    "a bool": (
        dense((1, 2), class_dim=True), TypeError, "`class_dim` .* an int, or None, but got True",
    ),
    "a name": (dense((1, 2), class_dim="classes"), TypeError, "but got 'classes'"),
    "without a contrast": (dense((1, 2), class_dim=5, contrast=None), IndexError, "but got 5"),
    "of an output without classes": (
        lambda: AbsLRP(network(nn.Linear(6, 1), nn.Flatten(0))).attribute(batch(2, 6), class_dim=1),
        IndexError, r"of shape \(2,\), which has none, but got 1",
    ),
    "of a layer": (
        lambda: LayerAbsLRP(m := along_line(), m[0]).attribute(batch(2, 1, 7), (1, 2), class_dim=0),
        ValueError, "`class_dim`",
    ),
    "no target for several positions": (
        dense(None), ValueError,
        r"`target` to be a tuple of 2 indices .*more than one value per class \(dimension 1\)",
    ),
    "too many indices": (dense((1, 2, 0)), ValueError, "`target` to have at most 2 indices .*but got 3"),
    "others of a sum over classes": (
        dense(2, class_dim=2), ValueError,
        r"`target` to select a class with `contrast='others'`, but got 1 of the 2 .*`contrast=None`",
    ),
    "softmax of a sum over classes": (
        dense([2, 1], class_dim=-1, contrast="softmax"), ValueError, "`contrast='softmax'`.*`contrast=None`",
    ),
    "index of a sum out of range": (
        dense(4), IndexError, r"`target` to be within the output shape \(4,\) .*but got 4",
    ),
    "index of the contrast of a sum out of range": (
        dense(1, contrast=-5), IndexError, r"`contrast` to be within .*but got -5",
    ),
    "the sum is its own contrast": (
        dense(1, contrast=[0, 1]), ValueError, "to be different classes.*for sample 1",
    ),
    "the sum is its own contrast from the end": (
        dense(1, contrast=-3), ValueError, "to be different classes",
    ),
    "an empty output": (
        lambda: AbsLRP(Applied(along_line(), lambda z: z[..., :0])).attribute(batch(2, 1, 7), 1),
        ValueError, r"at least one value per sample, but got an output of shape \(2, 4, 0\)",
    ),
    "a contrast for too many samples": (
        dense((1, 2), contrast=[(0, 2)] * 4), ValueError, r"one entry per sample \(2\), but got 4",
    ),
    "a contrast for too few samples": (
        lambda: AbsLRP(along_line()).attribute(batch(4, 1, 7), 1, contrast=torch.tensor([0, 2])),
        ValueError, r"`contrast` to have one entry per sample \(4\), but got 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_a_sum_over_classes_can_be_explained_without_a_contrast() -> None:
    model, x = of_tokens(), batch(2, 4, 3)
    relevance = AbsLRP(model).attribute(x, 2, contrast=None, class_dim=-1)
    assert bool((relevance[:, [0, 1, 3]] == 0).all())
    assert bool((relevance[:, 2] != 0).any())


SUMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Any, Callable[[Tensor], Tensor]]] = {
    # model, shape of the inputs, target, the sums that it is one of
    "(B, K, L), class": (along_line, (2, 1, 9), 2, lambda z: z.sum(-1)),
    "(B, K, L), classes": (along_line, (2, 1, 9), [2, 0], lambda z: z.sum(-1)),
    "(B, K, H, W), class": (over_image, (2, 2, 4, 5), (1,), lambda z: z.sum((2, 3))),
    "(B, K, H, W), class of samples": (
        over_image, (2, 2, 4, 5), torch.tensor([1, 2]), lambda z: z.sum((2, 3)),
    ),
    "(B, K, H, W), class and row": (over_image, (2, 2, 4, 5), (1, -1), lambda z: z.sum(3)),
    "(B, K, H, W), classes and rows": (over_image, (2, 2, 4, 5), [(1, 0), (2, 3)], lambda z: z.sum(3)),
}  # fmt: skip


@pytest.mark.parametrize("normalization", ["separate", "joint"])
@pytest.mark.parametrize("contrast", [None, "others", "softmax", 0])
@pytest.mark.parametrize("name", SUMS)
def test_fewer_indices_explain_the_sum_over_the_rest(
    name: str, contrast: Any, normalization: str
) -> None:
    make, shape, target, summed = SUMS[name]
    model, x = make(nn.Softplus()), batch(*shape)  # type: ignore[call-arg]
    if contrast == 0:
        contrast = {int: 0, list: [1, 2], tuple: (0,), Tensor: torch.tensor([0, 0])}[type(target)]
        if "row" in name:
            contrast = (0, 1)
    model.eval().double()
    options = {"contrast": contrast}
    expected = AbsLRP(Applied(model, summed), normalization=normalization)
    relevance = AbsLRP(model, normalization=normalization).attribute(x, target, **options)
    torch.testing.assert_close(
        relevance, expected.attribute(x, target, **options), rtol=1e-7, atol=1e-10
    )
    assert bool((relevance != 0).any())


@pytest.mark.parametrize("contrast", [None, "others", "softmax", (0,)])
@pytest.mark.parametrize("name", [name for name in SUMS if "row" not in name])
def test_parts_of_a_sum_of_both_signs_count_by_their_magnitude(name: str, contrast: Any) -> None:
    make, shape, target, summed = SUMS[name]
    if isinstance(target, list) and contrast == (0,):
        contrast = [1, 2]
    model, x = make(), batch(*shape)
    assert bool((model(x) < 0).any())
    expected = AbsLRP(Applied(model, summed)).attribute(x, target, contrast=contrast)
    relevance = AbsLRP(model).attribute(x, target, contrast=contrast)
    torch.testing.assert_close(relevance, expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("target", [(1, 4), [(3, 0), (2, 8)]])
@pytest.mark.parametrize("contrast", ["others", "softmax"])
def test_probabilities_of_positions_have_the_map_of_their_logits(
    contrast: str, target: Any
) -> None:
    model, x = along_line(), batch(2, 1, 9)
    expected = AbsLRP(model).attribute(x, target, contrast=contrast)
    probabilities = Applied(model, lambda z: z.softmax(1))
    relevance = AbsLRP(probabilities).attribute(x, target, contrast=contrast)
    torch.testing.assert_close(relevance, expected, rtol=1e-6, atol=1e-9)


def test_the_seed_of_a_sum() -> None:
    output = torch.tensor([[[1.0, -3.0], [0.0, 0.0], [2.0, 2.0]]])
    seed = target_seed(output, torch.tensor([[0]]))
    torch.testing.assert_close(seed, torch.tensor([[[0.25, 0.75], [0, 0], [0, 0]]]))
    zeros = target_seed(output, torch.tensor([[1]]))
    torch.testing.assert_close(zeros, torch.tensor([[[0, 0], [0.5, 0.5], [0, 0]]]))
    others = contrast_seed(output, torch.tensor([[0]]), "others")
    torch.testing.assert_close(others, torch.tensor([[[0, 0], [0.25, 0.25], [0.25, 0.25]]]))
    softmax = contrast_seed(output, torch.tensor([[0]]), "softmax")
    p = torch.tensor([0.0, 4.0]).softmax(0) / 2
    torch.testing.assert_close(softmax[0, 1:], p[:, None].expand(2, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("contrast", ["others", "softmax"])
def test_seeds_of_many_positions_add_up_to_one(dtype: torch.dtype, contrast: str) -> None:
    output, target = batch(2, 3, 64, 64).to(dtype), torch.tensor([[1], [2]])
    seeds = [target_seed(output, target), contrast_seed(output, target, contrast)]
    for seed in seeds:
        torch.testing.assert_close(seed.flatten(1).sum(1), torch.ones(2), rtol=0, atol=1e-5)


TUNNELS: list[tuple[Any, Any]] = [
    ([3, 1, 0], [0, 2, 4]),
    ([3, 1, 0], torch.tensor([0, 2, 4])),
    (torch.tensor([3, 1, 0]), [4, 4, 4]),
    (1, [0, 2, 4]),
    ([3, 1, 0], 2),
    ([3, 1, 0], torch.tensor([2])),
    ([3, 1, 0], "softmax"),
    ([3, 1, 0], None),
]


@pytest.mark.parametrize("size", [None, 1, 2])
@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("case", range(len(TUNNELS)))
def test_a_contrast_per_sample_in_a_noise_tunnel(case: int, layer: bool, size: int | None) -> None:
    target, contrast = TUNNELS[case]
    model, x = network(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)), batch(3, 6)
    attributor = LayerAbsLRP(model, model[0]) if layer else AbsLRP(model)
    expected = attributor.attribute(x, target, contrast=contrast)
    options = {"target": target, "contrast": contrast, "nt_samples": 3, "stdevs": 0.0}
    tunnel = NoiseTunnel(attributor)
    smooth = tunnel.attribute(x, nt_samples_batch_size=size, **options)
    torch.testing.assert_close(smooth, expected, rtol=1e-9, atol=1e-12)
    varied = tunnel.attribute(x, nt_type="vargrad", nt_samples_batch_size=size, **options)
    torch.testing.assert_close(varied, torch.zeros_like(expected), rtol=0, atol=1e-12)


def test_a_contrast_per_sample_of_tuples_and_of_several_inputs_in_a_noise_tunnel() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = along_line()

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.layers(a * 2 + b)

    model, inputs = Both(), (batch(2, 1, 9), batch(2, 1, 9, seed=1))
    target, contrast = [(1, 4), (2, 5)], [(0, 4), (3, 5)]
    expected = AbsLRP(model).attribute(inputs, target, contrast=contrast)
    smooth = NoiseTunnel(AbsLRP(model)).attribute(
        inputs, target=target, contrast=contrast, nt_samples=4, nt_samples_batch_size=3, stdevs=0.0
    )
    torch.testing.assert_close(smooth, expected, rtol=1e-9, atol=1e-12)


def test_a_noise_tunnel_refuses_a_contrast_that_fits_no_number_of_samples() -> None:
    model, x = network(nn.Linear(6, 5)), batch(3, 6)
    with pytest.raises(ValueError, match=r"one entry per sample \(6\), but got 4"):
        NoiseTunnel(AbsLRP(model)).attribute(x, nt_samples=2, target=1, contrast=[0, 2, 3, 4])


@pytest.mark.parametrize("kind", [AbsLRP, LayerAbsLRP])
def test_the_signature_is_that_of_the_method(kind: Any) -> None:
    parameters = list(inspect.signature(kind.attribute).parameters)
    assert parameters[:4] == ["self", "inputs", "target", "additional_forward_args"]
    assert "class_dim" in parameters
    assert inspect.getdoc(kind.attribute).startswith("Attribute the target's output")


@pytest.mark.parametrize("layer", [None, 0, 1])
@pytest.mark.parametrize("contrast", [None, "others"])
def test_the_delta_in_a_noise_tunnel(contrast: str | None, layer: int | None) -> None:
    model, x = network(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)), batch(3, 6)
    attributor = AbsLRP(model) if layer is None else LayerAbsLRP(model, model[layer])
    options = {"target": 1, "contrast": contrast, "return_convergence_delta": True}
    expected, delta = attributor.attribute(x, **options)
    smooth, of_copies = NoiseTunnel(attributor).attribute(x, nt_samples=2, stdevs=0.0, **options)
    torch.testing.assert_close(smooth, expected)
    torch.testing.assert_close(of_copies, delta.repeat_interleave(2))


@pytest.mark.parametrize("layers", [None, 0, [0, 1]])
def test_the_delta_of_given_attributions_is_refused(layers: Any) -> None:
    model, x = network(nn.Linear(6, 5), nn.ReLU()), batch(3, 6)
    if layers is None:
        attributor = AbsLRP(model)
    else:
        part = model[layers] if isinstance(layers, int) else [model[i] for i in layers]
        attributor = LayerAbsLRP(model, part)
    assert attributor.has_convergence_delta()
    with pytest.raises(NotImplementedError, match="return_convergence_delta=True"):
        attributor.compute_convergence_delta(x, torch.zeros_like(x), x, target=1)
    with pytest.raises(NotImplementedError, match="return_convergence_delta=True"):
        attributor.compute_convergence_delta(attributions=x, start_point=x, end_point=x)
    _, delta = attributor.attribute(x, 1, return_convergence_delta=True)
    assert len(delta) == (2 if isinstance(layers, list) else 3)
