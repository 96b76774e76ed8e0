"""Sizes and times of exported explanations, as a Markdown table.

``python -m benchmarks.export`` prints the table; ``--write`` puts it into ``serving.md``. The times
are for one image on one CPU thread, measured side by side: the median of each in rounds of one call.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from captum_abslrp import AbsLRP, demo
from captum_abslrp.export import onnx_file, save_explainer
from captum_abslrp.text import markdown_table

MODELS = (
    "demo:vgg",
    "demo:resnet",
    "demo:vit",
    "resnet18",
    "vit_tiny_patch16_224",
    "convnext_atto",
    "swin_tiny_patch4_window7_224",
)
PAGE = Path(__file__).parents[1] / "docs" / "howto" / "serving.md"
BEGIN, END = "<!-- export: begin -->\n", "<!-- export: end -->"
HEADER = (
    "model",
    "weights",
    ".pt2",
    ".onnx",
    "time to save ONNX",
    "forward pass",
    "`attribute`",
    ".pt2",
    ".onnx",
)


def build(name: str) -> nn.Module:
    model = demo.load_model(name[5:]) if name.startswith("demo:") else timm.create_model(name)
    return model.eval()


def medians(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of each call, measured in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:  # the first call warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(of_call) for name, of_call in times.items()}


def row(name: str, rounds: int) -> list[str]:
    model = build(name)
    attributor = AbsLRP.recommended(model)
    size = model.default_cfg["input_size"]  # type: ignore[index]  # an attribute of timm
    x = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([1])
    with tempfile.TemporaryDirectory() as folder:
        sizes, seconds = {}, {}
        for format in ("pt2", "onnx"):
            file = Path(folder, f"explainer.{format}")
            start = time.perf_counter()
            save_explainer(attributor, file, x)
            seconds[format] = time.perf_counter() - start
            sizes[format] = file.stat().st_size
        program = torch.export.load(Path(folder, "explainer.pt2")).module()
        session = onnx_file.runner(Path(folder, "explainer.onnx").read_bytes(), threads=1)
    with torch.no_grad():
        found = medians(
            {
                "forward": lambda: model(x),
                "attribute": lambda: attributor.attribute(x, 1),
                "pt2": lambda: program(x, target),
                "onnx": lambda: session(x, target),
            },
            rounds,
        )
    weights = sum(v.numel() * v.element_size() for v in model.state_dict().values())
    ratios = [f"{found[way] / found['forward']:.1f}" for way in ("attribute", "pt2", "onnx")]
    megabytes = [f"{number / 1e6:.1f} MB" for number in (weights, sizes["pt2"], sizes["onnx"])]
    return [
        name,
        *megabytes,
        f"{seconds['onnx']:.0f} s",
        f"{1000 * found['forward']:.1f} ms",
        *ratios,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help=f"write the table into {PAGE.name}")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for name in args.models:
        rows.append(row(name, args.rounds))
        print(rows[-1], flush=True)
    table = markdown_table(HEADER, rows, aligned=False)
    print(table)
    if args.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        PAGE.write_text(f"{before}{BEGIN}\n{table}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
