"""Global Attribution Evaluation: parity with the stored values, and its promises."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from captum.attr import (
    InputXGradient,
    LayerAttribution,
    LayerGradCam,
    NoiseTunnel,
    Occlusion,
    Saliency,
)
from torch import Tensor, nn

from captum_abslrp import AbsLRP
from captum_abslrp.metrics import Comparison, GAEResult, compare, functional, gae
from tests.conftest import GOLDEN, load_golden

SCORES = ["gae", "local_consistency", "faithfulness", "robustness", "contrastiveness"]


@pytest.fixture(scope="module")
def stored() -> dict[str, Tensor]:
    file = np.load(GOLDEN / "gae.npz")
    return {k: torch.from_numpy(file[k]) for k in file if file[k].dtype.kind in "fi"}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return load_golden("resnet_basic").model


def images(n: int = 8) -> Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-6, atol=1e-9)


def test_scores_agree_with_the_stored_ones(model: nn.Module, stored: dict[str, Tensor]) -> None:
    result = gae(
        model,
        InputXGradient(model),
        stored["x"].double(),
        positive_index=stored["positive_index"],
    )
    for name in SCORES:
        assert_close(getattr(result, name), stored[name])
    assert_close(result.mosaics, stored["mosaic"])


def test_parts_agree_with_the_stored_ones(model: nn.Module, stored: dict[str, Tensor]) -> None:
    x, positive = stored["x"].double(), stored["positive_index"]
    mosaics = functional.mosaic(x)
    with torch.no_grad():
        outputs, mosaic_outputs = model(x), model(mosaics)
    predictions = outputs.argmax(1).view(-1, 4)
    assert_close(functional.positive_probabilities(mosaic_outputs, predictions), stored["sampling"])
    rows = torch.arange(2) * 4 + positive
    target = predictions.gather(1, positive.view(-1, 1)).squeeze(1)
    maps = {}
    relevances = {}

    def explain(x: Tensor) -> Tensor:
        return functional.positive_part(InputXGradient(model).attribute(x.clone(), target=target))

    for name in ("morf", "lerf"):
        states, state_outputs, maps[name] = functional.masked_states(
            model, x[rows], target, most_relevant_first=name == "morf"
        )
        assert_close(state_outputs.T, stored[f"{name}_outputs"])
        zeros = (states == 0).flatten(2).double().mean(2).T
        assert_close(zeros, stored[f"{name}_zero_fraction"])
        relevances[name] = [explain(state) for state in states]
    impact = functional.impact_map(maps["lerf"], maps["morf"])
    assert torch.equal(impact.to(torch.int8), stored["impact_sign"].to(torch.int8))
    whole = relevances["morf"][0]
    shift = [
        functional.dice_distance(whole, most) - functional.dice_distance(whole, least)
        for most, least in zip(relevances["morf"][1:], relevances["lerf"][1:])
    ]
    assert_close(torch.stack(shift, 1), stored["relevance_shift"])
    output_shift = (stored["lerf_outputs"] - stored["morf_outputs"])[:, 1:]
    assert_close(output_shift / stored["morf_outputs"][:, :1], stored["output_shift"])
    probabilities = outputs[rows].softmax(1).gather(1, predictions)
    scores = functional.score_map(probabilities, positive, 32, 32)
    assert_close(scores.unsqueeze(1).expand(-1, 3, -1, -1), stored["score_map"])


def test_eight_images_give_the_values_of_two_times_four(model: nn.Module) -> None:
    x, positive = images(), torch.tensor([1, 3])
    attributor = AbsLRP(model)
    together = gae(model, attributor, x, positive_index=positive)
    apart = [
        gae(model, attributor, x[4 * m : 4 * m + 4], positive_index=positive[m : m + 1])
        for m in range(2)
    ]
    for name in SCORES:
        expected = torch.cat([getattr(a, name) for a in apart])
        torch.testing.assert_close(getattr(together, name), expected, rtol=1e-6, atol=1e-9)


def test_the_same_seed_gives_the_same_result_whatever_the_batch_size(model: nn.Module) -> None:
    results = [
        gae(
            model,
            Saliency(model),
            images(),
            generator=torch.Generator().manual_seed(3),
            max_examples_per_batch=size,
        )
        for size in (None, 3, 1)
    ]
    for other in results[1:]:
        assert torch.equal(results[0].positive_index, other.positive_index)
        for name in SCORES:
            expected = getattr(results[0], name)
            torch.testing.assert_close(getattr(other, name), expected, rtol=1e-6, atol=1e-9)


ATTRIBUTORS: dict[str, Callable[[nn.Module], object]] = {
    "abslrp": AbsLRP,
    "noise tunnel": lambda m: (
        lambda x, target: NoiseTunnel(Saliency(m)).attribute(x, nt_samples=2, target=target)
    ),
    "layer grad-cam": lambda m: (
        lambda x, target: LayerAttribution.interpolate(
            LayerGradCam(m, m.layer2).attribute(x, target=target), x.shape[2:]
        )
    ),
    "occlusion": lambda m: (
        lambda x, target: Occlusion(m).attribute(x, (3, 16, 16), (3, 16, 16), target=target)
    ),
    "maps without channels": lambda m: lambda x, target: x.abs().sum(1),
}


@pytest.mark.parametrize("schedule", ["published", "cumulative"])
@pytest.mark.parametrize("name", ATTRIBUTORS)
def test_any_attributor_gets_values_in_range(model: nn.Module, name: str, schedule: str) -> None:
    result = gae(model, ATTRIBUTORS[name](model), images(), schedule=schedule)  # type: ignore[arg-type]
    assert_in_range(result)


def assert_in_range(result: GAEResult) -> None:
    for name in SCORES:
        values = getattr(result, name)
        low = -1 if name in ("faithfulness", "robustness") else 0
        assert bool(torch.isfinite(values).all()), name
        assert bool(((values >= low - 1e-6) & (values <= 1 + 1e-6)).all()), name


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :5] * 0


def test_degenerate_cases_are_finite(model: nn.Module) -> None:
    x = images()
    assert_in_range(gae(model, lambda x, target: torch.zeros_like(x), x))
    assert_in_range(gae(model, Saliency(model), torch.zeros_like(x)))
    assert_in_range(gae(model, Saliency(model), torch.ones_like(x)))
    assert_in_range(gae(Constant(), Saliency(Constant()), x))


def test_the_cumulative_schedule_masks_exactly(model: nn.Module) -> None:
    x, target = images(2), torch.tensor([1, 2])
    for order in (True, False):
        states, _, _ = functional.masked_states(
            model, x, target, most_relevant_first=order, schedule="cumulative", baseline=7.0
        )
        shares = (states == 7.0).flatten(2).double().mean(2)
        expected = torch.arange(10).double() / 10
        torch.testing.assert_close(shares, expected.view(-1, 1).expand(-1, 2), atol=1e-3, rtol=0)


def test_arguments_reach_the_attributor(model: nn.Module) -> None:
    seen = set()

    def explain(x: Tensor, target: Tensor, **kwargs: object) -> Tensor:
        seen.update(kwargs.items())
        return x

    gae(model, explain, images(4), flavour="sweet")
    assert seen == {("flavour", "sweet")}


def test_mean_and_confidence_interval(model: nn.Module) -> None:
    result = gae(model, Saliency(model), images(16), generator=torch.Generator().manual_seed(0))
    means, intervals = result.mean(), result.confidence_interval()
    for name in SCORES:
        low, high = intervals[name]
        assert low <= means[name] <= high
    assert intervals == result.confidence_interval()
    assert repr(result).startswith("GAEResult(4 mosaics: gae=")
    with pytest.raises(ValueError, match="Expected `level` to be between 0 and 1, but got 95"):
        result.confidence_interval(95)


def test_progress_is_shown_on_request(model: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    gae(model, Saliency(model), images(4))
    assert not capsys.readouterr().err
    gae(model, Saliency(model), images(4), show_progress=True)
    assert "attributions" in capsys.readouterr().err


BAD = {
    "three images": ({"inputs": torch.rand(3, 3, 4, 4)}, r"shape \(4 M, C, H, W\), but got \(3, 3, 4, 4\)"),
    "odd size": ({"inputs": torch.rand(4, 3, 5, 4)}, "to be even, but got 5 x 4"),
    "schedule": ({"schedule": "other"}, "Expected `schedule` to be one of .*but got 'other'"),
    "one step": ({"n_steps": 1}, "Expected `n_steps` to be at least 2, but got 1"),
    "batch of none": ({"max_examples_per_batch": 0}, "`max_examples_per_batch` to be at least 1"),
    "positions": ({"positive_index": torch.tensor([4, 0])}, "2 positions from 0 to 3, but got"),
    "maps of another size": (
        {"explanation_func": lambda x, target: x[..., :2]}, "return maps of shape .*but got",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(model: nn.Module, name: str) -> None:
    change, message = BAD[name]
    given = {"inputs": images(), "explanation_func": Saliency(model)} | change
    with pytest.raises(ValueError, match=message):
        gae(model, given.pop("explanation_func"), given.pop("inputs"), **given)  # type: ignore[arg-type]


def failing(x: Tensor, target: Tensor) -> Tensor:
    raise RuntimeError("no such thing here\nand more of it")


def comparison(model: nn.Module, data: object) -> Comparison:
    methods = {
        "abslrp": AbsLRP(model),
        "saliency": Saliency(model),
        "failing": failing,
    }
    return compare(methods, model, data, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]


def test_methods_are_scored_on_the_same_mosaics_as_alone(model: nn.Module) -> None:
    table = comparison(model, images(8))
    alone = gae(model, Saliency(model), images(8), generator=torch.Generator().manual_seed(0))
    for name in SCORES:
        values = torch.tensor(table.methods["saliency"].values[name])
        torch.testing.assert_close(values.double(), getattr(alone, name), rtol=1e-6, atol=1e-9)
    assert table.methods["failing"].failure == "RuntimeError: no such thing here"


def test_a_loader_with_labels_gives_the_same_scores(model: nn.Module) -> None:
    x = images(10)  # two are left over
    batches = [(x[:3], torch.zeros(3)), (x[3:9], torch.zeros(6)), (x[9:], torch.zeros(1))]
    expected, loaded = comparison(model, x[:8]), comparison(model, batches)
    for name in ("localization", "lerf_morf", "gae"):
        got = loaded.methods["abslrp"].values[name]
        assert got == pytest.approx(expected.methods["abslrp"].values[name], abs=1e-9, nan_ok=True)
    with pytest.raises(ValueError, match="at least four images"):
        comparison(model, [x[:3]])


def test_a_comparison_is_printed_saved_loaded_and_plotted(model: nn.Module, tmp_path: Path) -> None:
    table = comparison(model, images(8))
    lines = str(table).splitlines()
    assert lines[0].startswith("| method | gae | local_consistency")
    assert len(lines) == 5
    assert "| failing | failed: RuntimeError: no such thing here |" in lines[-1]
    table.save(tmp_path / "table.json")
    loaded = Comparison.load(tmp_path / "table.json")
    assert str(loaded) == str(table)
    assert repr(loaded) == repr(table)
    rows = list(csv.DictReader(io.StringIO(table.to_csv())))
    assert [row["method"] for row in rows] == ["abslrp", "saliency", "failing"]
    assert float(rows[1]["gae_low"]) <= float(rows[1]["gae"]) <= float(rows[1]["gae_high"])
    assert rows[2]["failure"] == "RuntimeError: no such thing here"
    figure = table.plot(title="a title")
    assert figure.get_suptitle() == "a title"
    assert len(figure.axes) == 8
    assert figure.axes[-1].get_xlabel() == "contrastiveness"
    assert figure.axes[0].get_title() == "gae"


def test_localization_and_lerf_morf_of_an_oracle() -> None:
    class Corner(nn.Module):
        """Class 0 by the top left quarter of the image."""

        def forward(self, x: Tensor) -> Tensor:
            score = x[:, :, :4, :4].mean((1, 2, 3))
            return torch.stack([20 * score, torch.ones_like(score)], 1)

    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 0.5
    oracle = torch.zeros_like(x)
    oracle[:, :, :4, :4] = 1
    target = torch.zeros(4, dtype=torch.long)
    share = functional.localization(oracle, torch.tensor([0, 1, 2, 3]))
    assert share.tolist() == [1, 0, 0, 0]
    area = functional.lerf_morf_area(Corner(), x, oracle, target)
    worst = functional.lerf_morf_area(Corner(), x, -oracle, target)
    assert bool((area > 0.2).all())
    assert bool((worst < -0.2).all())


def test_localization_is_of_mosaics_of_four_classes_alone(model: nn.Module) -> None:
    class Brightness(nn.Module):
        """A class per level of the image."""

        def forward(self, x: Tensor) -> Tensor:
            return -(x.mean((1, 2, 3)).view(-1, 1) - torch.arange(4.0)).abs()

    levels = torch.tensor([0.0, 1, 2, 3, 0, 1, 2, 2]).view(-1, 1, 1, 1)
    table = compare(
        {"constant": lambda x, target: x * 0 + 1}, Brightness(), levels.expand(8, 3, 8, 8)
    )
    scores = table.methods["constant"]
    assert scores.values["localization"][0] == 0.25
    assert np.isnan(scores.values["localization"][1])
    assert scores.mean("localization") == 0.25
    assert "| 0.250 [0.250, 0.250] |" in str(table)
    table = compare({"constant": lambda x, target: x}, Brightness(), levels[4:].expand(4, 3, 8, 8))
    assert "| - |" in str(table)


def test_a_comparison_as_a_dataframe(model: nn.Module) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is optional")
    frame = comparison(model, images(4)).to_dataframe()
    assert list(frame.index) == ["abslrp", "saliency", "failing"]
    assert frame.loc["failing", "failure"].startswith("RuntimeError")
    assert not pandas.isna(frame.loc["abslrp", "gae"])


def test_the_model_and_the_attributor_see_each_image_once() -> None:
    """What the method asks for, and no more: outputs of 4 images and 1 mosaic, gradients of 1 + 9 + 9 states
    and attributions of the same and of the mosaic."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).eval()
    seen = {"outputs": 0, "gradients": 0, "attributions": 0}
    calls = {"outputs": 0, "gradients": 0, "attributions": 0}

    def model(x: Tensor) -> Tensor:
        kind = "gradients" if torch.is_grad_enabled() else "outputs"
        seen[kind] += len(x)
        calls[kind] += 1
        return plain(x)

    def attributor(x: Tensor, target: Tensor) -> Tensor:
        seen["attributions"] += len(x)
        calls["attributions"] += 1
        return x.abs()

    x = torch.rand(12, 3, 4, 4)
    gae(model, attributor, x)
    assert seen == {"outputs": 3 * 5, "gradients": 3 * 19, "attributions": 3 * 20}
    assert calls == {"outputs": 2, "gradients": 19, "attributions": 1}

    seen.update(outputs=0, gradients=0, attributions=0)
    compare({"a": attributor, "b": attributor, "c": attributor}, model, x)
    # Beside what GAE asks for, once for all methods: the curves of each method's own order.
    assert seen["gradients"] == 3 * 19
    assert seen["attributions"] == 3 * 3 * 20
    assert seen["outputs"] == 3 * 5 + 3 * 3 * 2 * 9
