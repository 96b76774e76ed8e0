"""The code of ``docs/logging.md`` as it stands there, with TensorBoard, Weights & Biases and Lightning.

All three are the real packages. W&B runs offline and writes to the temporary folder of the test. It brings
many packages, so that it is not among those that the tests install.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from captum_abslrp.demo import MEAN, STD, load_model, load_scenes

pytestmark = [
    # Lightning asks for more processes than loading from memory needs.
    pytest.mark.filterwarnings("ignore:The '(train|val)_dataloader' does not have many workers"),
    # Lightning says that its own metrics come rarely: the tests take two steps per epoch.
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    # Lightning points out the layer that is frozen here.
    pytest.mark.filterwarnings(r"ignore:Found 1 module\(s\) in eval mode at the start of training"),
    # Lightning asks PyTorch's trees in a way that PyTorch calls old.
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated"),
]

PAGE = Path(__file__).parents[1] / "docs" / "logging.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS: dict[str, list[str]] = {
    section.partition("\n")[0]: re.findall(r"```python\n(.*?)```", section, flags=re.S)
    for section in TEXT.split("\n## ")
}
[FIGURE] = BLOCKS["A figure"]
[TENSORBOARD] = BLOCKS["TensorBoard"]
[WANDB] = BLOCKS["Weights & Biases"]
[CALLBACK, TRAINER] = BLOCKS["PyTorch Lightning"]
SCENES = load_scenes("single", 4)
Pixels = npt.NDArray[np.uint8]


def run(block: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run a block of the page with what it takes as given, and return all names."""
    lines_before = TEXT[: TEXT.index(block)].count("\n")  # so that a traceback shows the page
    exec(compile("\n" * lines_before + block, str(PAGE), "exec"), names)
    return names


def given(**more: Any) -> dict[str, Any]:
    """What the page takes as given: a batch, its classes and its normalization."""
    return {"x": SCENES.inputs, "target": SCENES.labels, "mean": MEAN, "std": STD, **more}


LogMaps: Any = run(CALLBACK, {"__name__": __name__})["LogMaps"]


class Digits(pl.LightningModule):
    """The ResNet of the demo, whose training draws at random and has frozen parts."""

    def __init__(self) -> None:
        super().__init__()
        self.network = load_model("resnet").train()
        self.network.drop_rate = 0.2
        self.network.bn1.eval()
        self.network.conv1.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, target = batch
        return F.cross_entropy(self(x), target)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)


class DigitsInTraining(Digits):
    """A module that validates as it trains."""

    def on_validation_model_eval(self) -> None:
        pass


def loader() -> DataLoader[Any]:
    """Two batches of two images."""
    return DataLoader(TensorDataset(SCENES.inputs, SCENES.labels), batch_size=2)


def trainer(folder: Path, *callbacks: pl.Callback, epochs: int = 2, **options: Any) -> pl.Trainer:
    options = {"logger": TensorBoardLogger(folder), **options}
    return pl.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def state(model: nn.Module) -> dict[str, Any]:
    """Flags, values and gradients, comparable with :func:`assert_same`."""
    found: dict[str, Any] = {"random numbers": torch.get_rng_state()}
    for name, module in model.named_modules():
        found[f"{name} training"] = module.training
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found[f"{name} value"] = tensor.detach().clone()
        found[f"{name} requires_grad"] = tensor.requires_grad
        found[f"{name} grad"] = None if tensor.grad is None else tensor.grad.clone()
    return found


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert list(a) == list(b)
    for name, value in a.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, b[name]), name
        else:
            assert value is b[name], name


def logged(folder: Path) -> dict[int, Pixels]:
    """The pictures with the tag of the page that TensorBoard reads from a folder, by step."""
    [file] = folder.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()["images"]
    assert tags == (["maps"] if tags else [])
    found = {}
    for event in events.Images("maps") if tags else ():
        picture = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB"))
        assert picture.shape == (event.height, event.width, 3)
        found[event.step] = picture
    return found


def reds_and_blues(picture: Pixels) -> tuple[int, int]:
    """How many pixels have the colors of relevance for and against a class."""
    red, _, blue = np.moveaxis(picture.astype(int), -1, 0)
    return int((red - blue > 60).sum()), int((blue - red > 60).sum())


def drawn() -> dict[str, Any]:
    """The names that the first block of the page leaves, and an epoch."""
    return run(FIGURE, given(model=load_model("resnet"), epoch=7))


def test_a_board_takes_three_lines() -> None:
    for block in (TENSORBOARD, WANDB):
        assert len([line for line in block.splitlines() if line.strip()]) == 3


def test_tensorboard_has_the_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(TENSORBOARD, drawn())
    [(step, picture)] = logged(tmp_path / "runs").items()
    assert step == 7
    assert min(reds_and_blues(picture)) > 100
    # A figure's layout settles as it is drawn, so the one to compare with is new.
    canvas = FigureCanvasAgg(drawn()["figure"])
    canvas.draw()
    assert np.array_equal(picture, np.asarray(canvas.buffer_rgba())[..., :3])


def test_wandb_has_the_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="install wandb>=0.20.1 to test its lines")
    settings = {"MODE": "offline", "SILENT": "true", "CONSOLE": "off", "ERROR_REPORTING": "false"}
    folders = dict.fromkeys(("DIR", "CONFIG_DIR", "CACHE_DIR", "DATA_DIR"), str(tmp_path))
    for name, value in {**settings, **folders}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.chdir(tmp_path)
    try:
        run(WANDB, drawn())
    finally:
        wandb.teardown()  # ends the process that writes
    [file] = tmp_path.glob("wandb/offline-run-*/files/media/images/*")
    assert re.fullmatch(r"maps_0_\w+\.png", file.name)
    picture = np.asarray(Image.open(file).convert("RGB"))
    assert min(reds_and_blues(picture)) > 100
    drawn()["figure"].savefig("expected.png")
    assert np.array_equal(picture, np.asarray(Image.open("expected.png").convert("RGB")))


def test_lightning_draws_every_few_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loaders = {"train_loader": loader(), "validation_loader": loader()}
    names = run(CALLBACK, given(lightning_module=Digits(), **loaders))
    run(TRAINER, names)
    pictures = logged(tmp_path / "logs")
    assert list(pictures) == [10, 20]  # two steps per epoch, every fifth of ten epochs
    early, late = pictures.values()
    assert early.shape == late.shape
    assert early.shape[0] > early.shape[1]  # an image below the other
    for picture in (early, late):
        assert min(reds_and_blues(picture)) > 100
    title = len(early) // 20
    assert not np.array_equal(early[title:], late[title:])  # the model has learned in between


class Watched(LogMaps):  # type: ignore[misc]
    """Looks at the model before and after each call, also where it raises."""

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        before = state(pl_module)
        try:
            super().on_validation_epoch_end(trainer, pl_module)
        finally:
            self.seen = [*getattr(self, "seen", []), (before, state(pl_module))]


@pytest.mark.parametrize("module", [Digits, DigitsInTraining])
@pytest.mark.parametrize("raises", [False, True])
def test_the_model_is_as_before(module: type[Digits], raises: bool, tmp_path: Path) -> None:
    no_class = SCENES.labels + 10
    callback = Watched(**given(target=no_class if raises else SCENES.labels))
    # Validation between two batches whose gradients are summed: there are gradients to be kept.
    midway = {"accumulate_grad_batches": 2, "val_check_interval": 1, "num_sanity_val_steps": 0}
    fit = trainer(tmp_path, callback, epochs=1, **midway)
    model = module()
    with pytest.raises(IndexError, match="10") if raises else nullcontext():
        fit.fit(model, loader(), loader())
    assert list(logged(tmp_path)) == ([] if raises else [0, 1])
    assert len(callback.seen) == (1 if raises else 2)
    for before, after in callback.seen:
        assert_same(before, after)
    before, _ = callback.seen[0]
    assert before["network.bn1 training"] is False
    assert before["network.fc training"] is (module is DigitsInTraining)
    assert before["network.fc.weight grad"] is not None
    assert before["network.conv1.weight requires_grad"] is False


def test_training_goes_on_as_without(tmp_path: Path) -> None:
    states = []
    for name, callbacks in {"with": [LogMaps(**given())], "without": []}.items():
        torch.manual_seed(0)
        model = Digits()
        trainer(tmp_path / name, *callbacks).fit(model, loader(), loader())
        states.append(state(model))
    assert_same(*states)
    assert list(logged(tmp_path / "with")) == [2, 4]
    assert not torch.equal(states[0]["network.fc.weight value"], load_model("resnet").fc.weight)


def test_maps_in_inference_mode_and_double_precision(tmp_path: Path) -> None:
    modes = []

    class Noted(LogMaps):  # type: ignore[misc]
        def draw(self, model: nn.Module, x: Tensor, title: str) -> Any:
            modes.append((torch.is_inference_mode_enabled(), x.dtype))
            return super().draw(model, x, title)

    fit = trainer(tmp_path, Noted(**given()), precision="64-true")
    fit.validate(Digits(), loader())
    assert modes == [(True, torch.float64)]
    assert min(reds_and_blues(logged(tmp_path)[0])) > 100


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"sanity_checking": True},
        {"is_global_zero": False},
        {"current_epoch": 2},
        {"loggers": []},
    ],
    ids=str,
)
def test_when_the_callback_draws(changed: dict[str, Any], tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path)
    usual = {
        "sanity_checking": False,
        "is_global_zero": True,
        "current_epoch": 3,  # the fourth
        "global_step": 40,
        "loggers": [CSVLogger(tmp_path), board],
        "precision_plugin": SimpleNamespace(convert_input=lambda x: x),
    }
    callback = LogMaps(**given(every_n_epochs=2))
    model = Digits().eval()
    callback.on_validation_epoch_end(SimpleNamespace(**{**usual, **changed}), model)
    if changed:
        assert not list(tmp_path.rglob("events*"))
    else:
        board.finalize("success")
        assert list(logged(tmp_path)) == [40]


TWO_PROCESSES = """
from tests.test_logging import Digits, LogMaps, given, loader, trainer

class Counted(LogMaps):
    def draw(self, model, x, title):
        print("drawn")
        return super().draw(model, x, title)

fit = trainer(".", Counted(**given()), devices=2, strategy="ddp")
fit.fit(Digits(), loader(), loader())
print("done")
"""


@pytest.mark.slow
def test_one_of_two_processes_draws(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TWO_PROCESSES, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*command, "train.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PAGE.parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("drawn") == 2  # once per epoch
    assert result.stdout.count("done") == 2
    assert list(logged(tmp_path)) == [1, 2]
