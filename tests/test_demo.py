"""The embedded demo: accuracy, scenes with their masks, sizes and messages."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from captum_abslrp import demo
from captum_abslrp.demo import load_model, load_scenes, render_scenes
from captum_abslrp.demo.scenes import Kind, heldout_digits
from captum_abslrp.demo.train import (
    RECIPES,
    learning_rate,
    load_uci_digits,
    local_targets,
    main,
    shipped_scenes,
)

PACKAGE = Path(demo.__file__).parent
THRESHOLDS = {"vgg": 0.97, "resnet": 0.97, "vit": 0.95}
MODELS = tuple(THRESHOLDS)
KINDS = ("single", "pair")


@pytest.fixture(scope="module")
def heldout() -> dict[str, demo.Scenes]:
    return {
        "single": render_scenes("single", 1000, generator=1),
        "pair": render_scenes("pair", 400, generator=2),
    }


@pytest.fixture(scope="module", params=MODELS)
def named_model(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    return request.param, load_model(request.param)


def test_list_models() -> None:
    assert demo.list_models() == list(MODELS) == list(RECIPES)


@torch.no_grad()
def test_heldout_accuracy(
    named_model: tuple[str, nn.Module], heldout: dict[str, demo.Scenes]
) -> None:
    name, model = named_model
    scenes = heldout["single"]
    accuracy = (model(scenes.inputs).argmax(1) == scenes.labels).float().mean().item()
    assert accuracy >= THRESHOLDS[name]


@torch.no_grad()
def test_a_pair_gives_evidence_for_both_digits(
    named_model: tuple[str, nn.Module], heldout: dict[str, demo.Scenes]
) -> None:
    _, model = named_model
    scenes = heldout["pair"]
    logits = model(scenes.inputs)
    first = (scenes.labels == logits.argmax(1, keepdim=True)).any(1).float().mean().item()
    both = logits.topk(2, dim=1).indices.sort(1).values == scenes.labels.sort(1).values
    assert first >= 0.97
    assert both.all(1).float().mean().item() >= 0.8


def test_load_model_is_ready_to_use(named_model: tuple[str, nn.Module]) -> None:
    name, model = named_model
    assert not any(module.training for module in model.modules())
    state = torch.get_rng_state()
    again = load_model(name)
    assert torch.equal(torch.get_rng_state(), state)
    for one, two in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, two)


def test_timm_finds_the_preprocessing(named_model: tuple[str, nn.Module]) -> None:
    from timm.data import create_transform, resolve_model_data_config

    config = resolve_model_data_config(named_model[1])
    assert config["input_size"] == (3, 64, 64)
    assert config["mean"] == demo.MEAN
    assert config["std"] == demo.STD
    assert config["crop_pct"] == 1.0
    assert config["interpolation"] == "bilinear"

    image = load_scenes("single", 1).images[0]
    pixels = image.mul(255).round().byte().permute(1, 2, 0).numpy()
    through_timm = create_transform(**config, is_training=False)(Image.fromarray(pixels))
    torch.testing.assert_close(through_timm, demo.normalize(image), atol=1e-6, rtol=0)


def test_weights_are_small() -> None:
    files = sorted((PACKAGE / "weights").iterdir())
    assert [file.name for file in files] == sorted(f"{name}.safetensors" for name in MODELS)
    assert sum(file.stat().st_size for file in files) <= 5_000_000
    assert sum(file.stat().st_size for file in (PACKAGE / "data").iterdir()) <= 2_000_000


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["shipped", "rendered"])
def test_scenes_and_masks(kind: Kind, source: str, heldout: dict[str, demo.Scenes]) -> None:
    scenes = load_scenes(kind) if source == "shipped" else heldout[kind]
    b = len(scenes)
    digits = () if kind == "single" else (2,)
    assert scenes.images.shape == (b, 3, 64, 64)
    assert scenes.images.dtype == torch.float32
    assert scenes.images.min() >= 0 and scenes.images.max() <= 1
    assert scenes.labels.shape == (b, *digits) and scenes.labels.dtype == torch.int64
    assert scenes.masks.shape == (b, *digits, 64, 64) and scenes.masks.dtype == torch.bool
    assert scenes.labels.unique().tolist() == list(range(10))
    # The smallest digits are 20 pixels high, the largest 36: no mask is a speck or a field.
    ink = scenes.masks.sum((-1, -2))
    assert ink.min() >= 25 and ink.max() <= 36 * 36
    if kind == "pair":
        assert (scenes.labels[:, 0] != scenes.labels[:, 1]).all()
        assert not (scenes.masks[:, 0] & scenes.masks[:, 1]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_masks_cover_the_ink(kind: Kind) -> None:
    scenes = render_scenes(kind, 64, generator=3)
    luma = torch.einsum("bchw,c->bhw", scenes.images, torch.tensor([0.299, 0.587, 0.114]))
    masks = scenes.masks if kind == "pair" else scenes.masks[:, None]
    for i in range(masks.shape[1]):
        inside = (luma * masks[:, i]).sum((1, 2)) / masks[:, i].sum((1, 2))
        ground = luma.flatten(1).median(1).values
        assert (inside > ground + 0.1).all()


def test_shipped_singles_are_balanced() -> None:
    assert load_scenes("single").labels.bincount().tolist() == [10] * 10
    assert len(load_scenes("pair")) == 60
    assert len(load_scenes("pair", 7)) == 7


@pytest.mark.parametrize("kind", KINDS)
def test_rendering_is_reproducible(kind: Kind) -> None:
    one = render_scenes(kind, 8, generator=7)
    two = render_scenes(kind, 8, generator=torch.Generator().manual_seed(7))
    other = render_scenes(kind, 8, generator=8)
    assert torch.equal(one.images, two.images)
    assert torch.equal(one.labels, two.labels)
    assert torch.equal(one.masks, two.masks)
    assert not torch.equal(one.images, other.images)


def test_rendering_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    render_scenes("single", 2, generator=0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", KINDS)
def test_no_scenes(kind: Kind) -> None:
    assert render_scenes(kind, 0, generator=0).images.shape == (0, 3, 64, 64)


def test_normalize() -> None:
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    before = images.clone()
    inputs = demo.normalize(images)
    assert inputs.dtype == torch.float64
    assert torch.equal(images, before)
    mean = torch.tensor(demo.MEAN, dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor(demo.STD, dtype=torch.float64).view(3, 1, 1)
    torch.testing.assert_close(inputs * std + mean, images)


def test_messages() -> None:
    with pytest.raises(ValueError, match="Expected `name` to be one of .*'vit'.*, but got 'x'"):
        load_model("x")
    with pytest.raises(ValueError, match="Expected `kind` to be one of .*'pair'.*, but got 'x'"):
        load_scenes("x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Expected `kind` to be one of .*, but got 'x'"):
        render_scenes("x", 1, generator=0)  # type: ignore[arg-type]
    for n in (0, -1, 61):
        with pytest.raises(ValueError, match=f"Expected `n` to be between 1 and 60, but got {n}"):
            load_scenes("pair", n)
    with pytest.raises(ValueError, match="Expected `n` to be at least 0, but got -1"):
        render_scenes("single", -1, generator=0)
    with pytest.raises(ValueError, match="Expected `digits` to be 'heldout' .* but got 'train'"):
        render_scenes("single", 1, generator=0, digits="train")  # type: ignore[arg-type]


def test_training_never_sees_the_heldout_digits() -> None:
    pytest.importorskip("sklearn")
    train, heldout = load_uci_digits()
    assert len(train) + len(heldout) == 1797
    assert torch.equal(heldout.images, heldout_digits().images)
    assert torch.equal(heldout.labels, heldout_digits().labels)
    seen = {image.numpy().tobytes() for image in train.images}
    assert not any(image.numpy().tobytes() in seen for image in heldout.images)


def test_shipped_scenes_come_from_the_script() -> None:
    for kind, scenes in zip(KINDS, shipped_scenes(heldout_digits()), strict=True):
        shipped = load_scenes(kind)  # type: ignore[arg-type]
        assert torch.equal(scenes.labels, shipped.labels)
        # Other processors may round a sine differently: a rare pixel may differ by a level.
        assert (scenes.masks != shipped.masks).float().mean() < 1e-4
        assert (scenes.images - shipped.images).abs().mean() < 2 / 255


def test_local_targets_are_distributions() -> None:
    maps = torch.zeros(1, 10, 64, 64)
    maps[0, 3, :16, :16] = 1
    targets = local_targets(maps, (8, 8))
    assert targets.shape == (1, 11, 8, 8)
    torch.testing.assert_close(targets.sum(1), torch.ones(1, 8, 8))
    assert targets[0, 3, :2, :2].eq(1).all() and targets[0, 10, 2:].eq(1).all()


@pytest.mark.parametrize("name", MODELS)
def test_learning_rate_rises_and_falls(name: str) -> None:
    recipe = RECIPES[name]
    rates = [learning_rate(step, recipe) for step in range(recipe.steps)]
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert max(rates) == pytest.approx(1) and rates[-1] == pytest.approx(0)


def test_training_script_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    if not hasattr(timm.models.VGG, "forward_intermediates"):
        pytest.skip(f"the VGG of timm {timm.__version__} hands out no features to train on")
    monkeypatch.setitem(RECIPES, "vgg", replace(RECIPES["vgg"], batch=8))
    threads = torch.get_num_threads()
    try:
        main(["--out", str(tmp_path), "--model", "vgg", "--steps", "2", "--scenes", "20"])
    finally:
        torch.set_num_threads(threads)
    assert "vgg step 2/2" in capsys.readouterr().out
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")}
    assert written == {
        "data/heldout.npz",
        "data/pair.npz",
        "data/single.npz",
        "results.json",
        "weights/vgg.safetensors",
    }


def test_demo_needs_no_scikit_learn() -> None:
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "from captum_abslrp import demo\n"
        "demo.render_scenes('pair', 1, generator=0); demo.load_model('vit')\n"
        "from captum_abslrp.demo.train import load_uci_digits\n"
        "try: load_uci_digits()\n"
        "except ModuleNotFoundError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Expected scikit-learn to be installed" in result.stdout, result.stderr
