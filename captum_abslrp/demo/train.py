"""Train the demo models: `python -m captum_abslrp.demo.train --out DIR`.

Writes the weights, the held-out digits, the shipped scenes and `results.json`, in the layout of
this package. Needs scikit-learn for the digits; about half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models import build_model, list_models
from .scenes import (
    CLASS_NAMES,
    Digits,
    Scenes,
    compose,
    draw_index,
    normalize,
    render_scenes,
    save_scenes,
)

SEED = 0
HELDOUT_SHARE = 0.2
EVAL_SEED = 20_000
SHIPPED_SEED = 30_000


@dataclass(frozen=True)
class Recipe:
    """How one model is trained on freshly rendered batches: AdamW, warm-up and cosine.

    - `tap`: the stage whose features are also asked for the digit at each place;
    - `local`: weight of that second loss;
    - `muon`: learning rate of the matrices within transformer blocks, which Muon trains in about
      half the steps of AdamW; None trains them like the rest;
    - `slow`: parameters whose names start so learn at a tenth of the rate;
    - `pairs`: share of pair scenes in a batch;
    - `warmup`: share of the steps in which the learning rate rises.
    """

    steps: int
    lr: float
    tap: int
    local: float = 1.0
    muon: float | None = None
    slow: tuple[str, ...] = ()
    weight_decay: float = 0.02
    batch: int = 64
    pairs: float = 0.35
    warmup: float = 0.08


RECIPES: dict[str, Recipe] = {
    # Adam's steps add up over the 3136 inputs of VGG's head, which would go dead at the full rate.
    "vgg": Recipe(steps=1000, lr=2e-3, tap=3, slow=("pre_logits", "head")),
    "resnet": Recipe(steps=1400, lr=3e-3, tap=2),
    "vit": Recipe(steps=3000, lr=2e-3, tap=3, local=2.0, muon=6e-3, warmup=0.03),
}


def load_uci_digits() -> tuple[Digits, Digits]:
    """Split scikit-learn's copy of the UCI digits into training and held-out digits.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Expected scikit-learn to be installed for training, but it is not: "
            "`pip install scikit-learn`."
        ) from error
    bunch = load_digits()
    images, labels = bunch.images.astype(np.uint8), bunch.target.astype(np.int64)
    return split(Digits(images=torch.from_numpy(images), labels=torch.from_numpy(labels)))


def split(
    digits: Digits, *, share: float = HELDOUT_SHARE, seed: int = SEED
) -> tuple[Digits, Digits]:
    """Split digits class by class into (training, held-out); `share` of each class is held out."""
    generator = torch.Generator().manual_seed(seed)
    train: list[Tensor] = []
    heldout: list[Tensor] = []
    for label in range(len(CLASS_NAMES)):
        members = (digits.labels == label).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        count = round(share * len(members))
        heldout.append(members[:count])
        train.append(members[count:])
    return _take(digits, torch.cat(train)), _take(digits, torch.cat(heldout))


def _take(digits: Digits, index: Tensor) -> Digits:
    return Digits(images=digits.images[index], labels=digits.labels[index])


def training_batches(
    digits: Digits, recipe: Recipe, *, seed: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield inputs (B, 3, H, W), targets (B, C) and class maps (B, C, H, W), one batch a step.

    A pair has the target 1/2 for each of its digits. A class map marks the pixels of a digit.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = round(recipe.pairs * recipe.batch)
    for _ in range(recipe.steps):
        single = render_scenes("single", recipe.batch - pairs, generator=generator, digits=digits)
        pair = render_scenes("pair", pairs, generator=generator, digits=digits)
        one = F.one_hot(single.labels, len(CLASS_NAMES)).float()
        two = F.one_hot(pair.labels, len(CLASS_NAMES)).float()
        inputs = normalize(torch.cat([single.images, pair.images]))
        targets = torch.cat([one, two.mean(1)])
        maps = torch.cat(
            [
                torch.einsum("bc,bhw->bchw", one, single.masks.float()),
                torch.einsum("bdc,bdhw->bchw", two, pair.masks.float()),
            ]
        )
        yield inputs.contiguous(memory_format=torch.channels_last), targets, maps


def local_targets(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Pool class maps (B, C, H, W) to distributions over C classes and "no digit" per cell.

    A cell counts as the digit's to the full where a third of it or more is ink.

    Returns:
        Targets of shape (B, C + 1, *size).

    Example:
        >>> local_targets(torch.ones(1, 1, 8, 8), (2, 2))[0, :, 0, 0].tolist()
        [1.0, 0.0]
    """
    cover = (3 * F.adaptive_avg_pool2d(maps, size)).clamp(max=1)
    rest = (1 - cover.sum(1, keepdim=True)).clamp(min=0)
    targets = torch.cat([cover, rest], dim=1)
    return targets / targets.sum(1, keepdim=True)


@torch.no_grad()
def initialize(model: nn.Module) -> None:
    """Move VGG and ViT to starting points that make the short training work.

    VGG's 7x7 head starts as a flat kernel, as average pooling. In ViT, position embeddings start
    as 2-d sinusoids and keys equal queries, so that a patch first attends to its neighbors.
    """
    from timm.layers import build_sincos2d_pos_embed
    from timm.models.vgg import VGG
    from timm.models.vision_transformer import VisionTransformer

    if isinstance(model, VGG):
        kernel = model.pre_logits.fc1.weight
        kernel.copy_(3 * kernel.mean((2, 3), keepdim=True).expand_as(kernel))
    if isinstance(model, VisionTransformer):
        width = model.embed_dim
        sincos = build_sincos2d_pos_embed(list(model.patch_embed.grid_size), width)
        model.pos_embed[:, 1:] = sincos
        for block in model.blocks:
            query, key, _ = block.attn.qkv.weight.view(3, width, width)
            nn.init.xavier_uniform_(query)
            key.copy_(query)


def build_optimizers(
    model: nn.Module, local: nn.Module, recipe: Recipe
) -> list[torch.optim.Optimizer]:
    """Return AdamW, and Muon (torch 2.9 or later) where the recipe asks for it.

    Only matrices and kernels decay.
    """
    matrices: list[nn.Parameter] = []
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if recipe.muon is not None and name.startswith("blocks.") and parameter.ndim == 2:
            matrices.append(parameter)
            continue
        rate = 0.1 if recipe.slow and name.startswith(recipe.slow) else 1.0
        decays = name.endswith(".weight") and parameter.ndim > 1
        key = (rate * recipe.lr, recipe.weight_decay if decays else 0.0)
        groups.setdefault(key, []).append(parameter)
    table: list[dict[str, Any]] = [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]
    table.append({"params": list(local.parameters())})
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(table, lr=recipe.lr, betas=(0.9, 0.98))
    ]
    if recipe.muon is not None:
        optimizers.append(
            torch.optim.Muon(
                matrices,
                lr=recipe.muon,
                weight_decay=recipe.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return optimizers


def learning_rate(step: int, recipe: Recipe) -> float:
    """Return the factor on `recipe.lr` at `step`: linear warm-up, then a cosine to zero.

    Example:
        >>> recipe = Recipe(steps=100, lr=1.0, tap=0, warmup=0.1)
        >>> [round(learning_rate(step, recipe), 2) for step in (0, 9, 54, 99)]
        [0.1, 1.0, 0.5, 0.0]
    """
    rise = max(1, round(recipe.warmup * recipe.steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step + 1 - rise) / (recipe.steps - rise)))


def train_model(name: str, digits: Digits, recipe: Recipe, *, seed: int) -> nn.Module:
    """Train one model from scratch and return it in evaluation mode.

    The loss is the cross entropy of the logits plus that of a linear layer, dropped afterwards,
    that names the digit at each place of the features `recipe.tap`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = build_model(name).train()
        initialize(model)
        channels = model.feature_info[recipe.tap]["num_chs"]
        local = nn.Conv2d(channels, len(CLASS_NAMES) + 1, 1)
    # Channels-last convolutions are about a third faster on CPUs.
    model = model.to(memory_format=torch.channels_last)
    optimizers = build_optimizers(model, local, recipe)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, recipe))
        for optimizer in optimizers
    ]
    start, running = time.perf_counter(), 0.0
    batches = training_batches(digits, recipe, seed=seed)
    for step, (inputs, targets, maps) in enumerate(batches, 1):
        final, (features,) = model.forward_intermediates(inputs, indices=[recipe.tap], norm=True)
        loss = F.cross_entropy(model.forward_head(final), targets)
        size = (features.shape[2], features.shape[3])
        local_loss = F.cross_entropy(local(features), local_targets(maps, size))
        for optimizer in optimizers:
            optimizer.zero_grad()
        (loss + recipe.local * local_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        running += loss.item()
        if step % 100 == 0 or step == recipe.steps:
            seconds = time.perf_counter() - start
            mean = running / ((step - 1) % 100 + 1)
            print(
                f"{name} step {step}/{recipe.steps} loss {mean:.3f} "
                f"local {local_loss.item():.3f} {seconds:.0f} s",
                flush=True,
            )
            running = 0.0
    trained: nn.Module = model.eval().to(memory_format=torch.contiguous_format)
    return trained


@torch.no_grad()
def accuracy(model: nn.Module, scenes: Scenes, *, batch: int = 250) -> float:
    """Return the share of scenes whose D digits are the D highest logits."""
    labels = scenes.labels if scenes.labels.ndim == 2 else scenes.labels[:, None]
    logits = torch.cat([model(chunk) for chunk in torch.split(scenes.inputs, batch)])
    top = logits.topk(labels.shape[1], dim=1).indices
    return (top.sort(1).values == labels.sort(1).values).all(1).float().mean().item()


def shipped_scenes(digits: Digits, *, seed: int = SHIPPED_SEED) -> tuple[Scenes, Scenes]:
    """Render 100 single scenes, ten of each class in turn, and 60 pair scenes."""
    generator = torch.Generator().manual_seed(seed)
    per_class = [
        members[torch.randperm(len(members), generator=generator)[:10]]
        for members in ((digits.labels == c).nonzero()[:, 0] for c in range(len(CLASS_NAMES)))
    ]
    single = compose(digits, torch.stack(per_class, dim=1).reshape(-1, 1), generator)
    pair = compose(digits, draw_index(digits.labels, 60, 2, generator), generator)
    return single, pair


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m captum_abslrp.demo.train", description="Train the demo models."
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="output folder")
    parser.add_argument("--model", nargs="+", choices=list_models(), default=list_models())
    parser.add_argument("--steps", type=int, help="training steps instead of each recipe's")
    parser.add_argument("--scenes", type=int, default=4000, help="held-out scenes to judge by")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args(argv)

    from safetensors.torch import save_file

    torch.set_num_threads(2)
    train, heldout = load_uci_digits()
    data, weights = args.out / "data", args.out / "weights"
    data.mkdir(parents=True, exist_ok=True)
    weights.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        data / "heldout.npz",
        images=heldout.images.numpy(),
        labels=heldout.labels.numpy().astype(np.uint8),
    )
    for kind, scenes in zip(("single", "pair"), shipped_scenes(heldout), strict=True):
        save_scenes(scenes, data / f"{kind}.npz")

    single = render_scenes("single", args.scenes, generator=EVAL_SEED, digits=heldout)
    pair = render_scenes("pair", args.scenes, generator=EVAL_SEED, digits=heldout)
    path = args.out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in args.model:
        recipe = RECIPES[name]
        if args.steps is not None:
            recipe = Recipe(**{**vars(recipe), "steps": args.steps})
        start = time.perf_counter()
        model = train_model(name, train, recipe, seed=args.seed)
        seconds = time.perf_counter() - start
        save_file(model.state_dict(), weights / f"{name}.safetensors")
        results[name] = {
            "heldout_accuracy": round(accuracy(model, single), 4),
            "heldout_pair_top2": round(accuracy(model, pair), 4),
            "parameters": sum(p.numel() for p in model.parameters()),
            "training_seconds": round(seconds),
            "steps": recipe.steps,
            "seed": args.seed,
        }
        print(name, results[name], flush=True)
        path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
