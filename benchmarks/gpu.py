"""What attribution costs on a GPU: ``python -m benchmarks.gpu``, some minutes, no network.

Prints a row for each model, precision and batch size: milliseconds of the forward pass, multiples of it for
maps, images per second and peak memory. Then whether anything inside waits for the GPU. ``--cpu`` runs tiny
models on the host, to see that the script runs.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import captum.attr
import timm
import torch
from torch import Tensor, nn

from benchmarks.real import seconds
from captum_abslrp import LRP, AbsLRP
from captum_abslrp.text import markdown_table

MODELS = ("resnet50", "vgg16", "vit_base_patch16_224", "swin_tiny_patch4_window7_224")
TINY = ("test_resnet", "test_vit")
LRP_OF = {"vit": "cp_lrp", "swin": "cp_lrp"}
"""The composite of a model by a part of its name; epsilon for others."""


def median_seconds(run: Callable[[], Any]) -> float:
    """Median time of five calls, after one that is not counted."""
    seconds(run)
    return statistics.median(seconds(run) for _ in range(5))


def methods_of(name: str, model: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    """The maps that are timed."""
    composite = next((c for part, c in LRP_OF.items() if part in name), "epsilon")
    separate, joint = AbsLRP(model), AbsLRP(model, normalization="joint")
    saliency, lrp = captum.attr.Saliency(model), LRP(model, composite)
    return {
        "Saliency": lambda x: saliency.attribute(x, target=1),
        "AbsLRP, target": lambda x: separate.attribute(x, target=1, contrast=None),
        "AbsLRP, two maps": lambda x: separate.attribute(x, target=1),
        "joint": lambda x: joint.attribute(x, target=1),
        f"LRP {composite}": lambda x: lrp.attribute(x, target=1, contrast="others"),
    }


def row(name: str, precision: str, batch: int, device: str) -> list[str]:
    """The cells of one model, precision and batch size."""
    model = timm.create_model(name).eval().to(device)
    x = torch.randn(batch, *model.default_cfg["input_size"], device=device)
    with torch.no_grad():
        forward = median_seconds(lambda: model(x))
    cells, peaks = [name, precision, str(batch), f"{1000 * forward:.1f}"], []
    for maps in methods_of(name, model).values():
        before = 0
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        cells.append(f"{median_seconds(lambda maps=maps: maps(x)) / forward:.1f}")
        peaks.append(
            (torch.cuda.max_memory_allocated() - before) / 2**20 if device == "cuda" else 0
        )
    return [
        *cells,
        f"{batch / (float(cells[6]) * forward):.0f}",
        f"{peaks[2]:.0f}",
        f"{peaks[0]:.0f}",
    ]


def waits(name: str) -> dict[str, str]:
    """Which maps wait for the GPU, and where."""
    model = timm.create_model(name).eval().cuda()
    x = torch.randn(2, *model.default_cfg["input_size"], device="cuda")
    found = {}
    for label, maps in methods_of(name, model).items():
        maps(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            maps(x)
            found[label] = "waits nowhere"
        except RuntimeError as error:
            found[label] = f"waits: {error}".splitlines()[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="tiny models on the host")
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        parser.error("there is no GPU; `--cpu` runs tiny models on the host")
    warnings.filterwarnings("ignore", "Input Tensor")
    device = "cpu" if args.cpu else "cuda"
    print(
        "Device:", "CPU" if args.cpu else torch.cuda.get_device_name(), "torch", torch.__version__
    )
    header = [
        "model",
        "precision",
        "batch",
        "forward, ms",
        "Saliency",
        "AbsLRP, target",
        "two maps",
    ]
    header += ["joint", "LRP", "images/s, two maps", "peak, MB", "of Saliency, MB"]
    rows = []
    for tf32 in (False,) if args.cpu else (False, True):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        for name in TINY if args.cpu else MODELS:
            for batch in (1, 2) if args.cpu else (1, 16, 64):
                rows.append(row(name, "TF32" if tf32 else "float32", batch, device))
    print(markdown_table(header, rows, aligned=False))
    if not args.cpu:
        for name in ("resnet50", "vit_small_patch16_224"):
            for label, found in waits(name).items():
                print(f"{name}, {label}: {found}")


if __name__ == "__main__":
    main()
