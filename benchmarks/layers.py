"""Measure the cost of maps of several layers from one pass, relative to one layer alone.

``python -m benchmarks.layers`` prints, for ViT-S/16 and ResNet-50, the number of forward passes and the time
of the maps of all blocks, of one block, and of the inputs through 16 channels (``select``), side by side.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial

import timm
import torch
from torch import nn

from captum_abslrp import AbsLRP, LayerAbsLRP


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a ViT or a ResNet."""
    if hasattr(model, "blocks"):
        return [*model.blocks]
    return [block for i in range(1, 5) for block in getattr(model, f"layer{i}")]


def measure(
    name: str, batch_size: int, image_size: int, repeats: int
) -> list[tuple[str, int, float]]:
    """Return the row of each map: its name, forward passes, and time relative to the first block."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    x = torch.randn(batch_size, 3, image_size, image_size)
    blocks = blocks_of(model)
    middle = LayerAbsLRP(model, blocks[len(blocks) // 2])
    runs: dict[str, Callable[[], object]] = {
        "the first block": partial(LayerAbsLRP(model, blocks[0]).attribute, x, 1),
        f"all {len(blocks)} blocks": partial(LayerAbsLRP(model, blocks).attribute, x, 1),
        "the inputs": partial(AbsLRP(model).attribute, x, 1),
        "the inputs, through 16 channels": partial(
            middle.attribute, x, 1, select=[[c] for c in range(16)]
        ),
    }
    passes: list[int] = []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    counts: dict[str, int] = {}
    for what, run in runs.items():
        passes.clear()
        run()
        counts[what] = len(passes)
    handle.remove()
    times: dict[str, list[float]] = {what: [] for what in runs}
    for _ in range(repeats):
        for what, run in runs.items():
            start = time.perf_counter()
            run()
            times[what].append(time.perf_counter() - start)
    base = statistics.median(times["the first block"])
    return [(what, counts[what], statistics.median(s) / base) for what, s in times.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["vit_small_patch16_224", "resnet50"])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| model | what | forward passes | time by the first block |\n|---|---|---|---|")
    for name in args.models:
        for what, passes, ratio in measure(name, args.batch_size, args.image_size, args.repeats):
            print(f"| {name} | {what} | {passes} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
