"""Measure the effect of options on time and error, and the growth of time with the number of tokens.

``python -m benchmarks.options`` prints the tables of ``benchmarks/RESULTS.md``. Time is relative to float32
without options, in the same run. The error is the relative L2 distance from the map in float64, for the
target map and for the difference of target and contrast. ``torch.compile`` is measured on the elementwise
formulas only. It needs a C++ compiler, and the package does not use it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import time
import warnings
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

from captum_abslrp import AbsLRP, functional


def median_seconds(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median time of each, run in turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def precision(name: str, repeats: int, device: str) -> None:
    """Print a row for each precision below float32."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval().to(device)
    x, target = torch.randn(4, 3, 224, 224, device=device), [0, 1, 2, 3]

    def of(
        model: nn.Module, x: Tensor, contrast: str | None = "others", **autocast: object
    ) -> Tensor:
        context = torch.autocast(device, **autocast) if autocast else contextlib.nullcontext()  # type: ignore[arg-type]  # options of one kind each
        with context:
            return AbsLRP(model).attribute(x, target, contrast=contrast)

    exact_model, exact_x = copy.deepcopy(model).double(), x.double()
    half_model, half_x = copy.deepcopy(model).bfloat16(), x.bfloat16()
    exact = {contrast: of(exact_model, exact_x, contrast) for contrast in (None, "others")}
    ways: dict[str, Callable[[str | None], Tensor]] = {
        "float32": lambda c: of(model, x, c),
        "autocast, bfloat16": lambda c: of(model, x, c, dtype=torch.bfloat16),
        "bfloat16": lambda c: of(half_model, half_x, c),
    }
    if device == "cuda":

        def in_tf32(contrast: str | None) -> Tensor:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
            try:
                return of(model, x, contrast)
            finally:
                torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

        torch.backends.cudnn.allow_tf32 = False
        ways["float32, TF32"] = in_tf32
    seconds = median_seconds({k: lambda way=way: way("others") for k, way in ways.items()}, repeats)
    for way_name, way in ways.items():
        errors = [
            ((way(c).double() - exact[c]).norm() / exact[c].norm()).item() for c in (None, "others")
        ]
        print(
            f"| {name} | {way_name} | {seconds[way_name] / seconds['float32']:.2f} | {errors[0]:.0e} | "
            f"{errors[1]:.0e} |",
            flush=True,
        )


def growth(repeats: int, device: str, sizes: list[int]) -> None:
    """Print the growth of time with the number of tokens."""
    for size in sizes:
        torch.manual_seed(0)
        model = timm.create_model("vit_small_patch16_224", img_size=size).eval().to(device)
        x = torch.randn(1, 3, size, size, device=device)

        def forward(model: nn.Module = model, x: Tensor = x) -> None:
            with torch.no_grad():
                model(x)

        runs = {"forward": forward, "map": lambda m=model, x=x: AbsLRP(m).attribute(x, 0)}
        seconds = median_seconds(runs, repeats)
        tokens = (size // 16) ** 2
        print(
            f"| {tokens} | {seconds['forward']:.3f} s | {seconds['map']:.2f} s | "
            f"{seconds['map'] / seconds['forward']:.1f} |",
            flush=True,
        )


def layout(repeats: int, device: str) -> None:
    """Print the effect of the channels-last layout."""
    torch.manual_seed(0)
    plain = timm.create_model("resnet50").eval().to(device)
    x = torch.randn(4, 3, 224, 224, device=device)
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    runs: dict[str, Callable[[], object]] = {}
    for name, model, inputs in (
        ("contiguous", plain, x),
        ("channels last", last, x.contiguous(memory_format=torch.channels_last)),
    ):

        def forward(model: nn.Module = model, x: Tensor = inputs) -> None:
            with torch.no_grad():
                model(x)

        runs[f"{name}, forward"] = forward
        runs[name] = lambda m=model, x=inputs: AbsLRP(m).attribute(x, 0)
    seconds = median_seconds(runs, repeats)
    for name in ("contiguous", "channels last"):
        forward_seconds = seconds[f"{name}, forward"]
        print(
            f"| {name} | {forward_seconds:.3f} s | {seconds[name]:.2f} s | "
            f"{seconds[name] / forward_seconds:.1f} |",
            flush=True,
        )


def compiled(repeats: int, device: str) -> None:
    """Print the effect of compiling elementwise formulas, at the shapes of ViT-B/16 with a batch of 4."""
    tokens, hidden = (torch.randn(4, 197, width, device=device) for width in (768, 4 * 768))
    logits = torch.randn(4, 12, 197, 197, device=device)
    probabilities, weight = logits.softmax(-1), torch.randn(768, device=device)
    formulas: dict[str, Callable[..., Tensor]] = {
        "layer norm": lambda: functional.layer_norm(tokens, 1, weight, 1e-6),
        "softmax": lambda: functional.softmax(logits, probabilities, -1),
        "GELU": lambda: functional.elementwise(hidden, torch.nn.functional.gelu),
        "batch norm": lambda: functional.diagonal(tokens, weight),
    }
    for name, formula in formulas.items():
        fused = torch.compile(formula)
        with torch.no_grad():
            seconds = median_seconds({"eager": formula, "compiled": fused}, 10 * repeats)
        print(
            f"| {name} | {1e3 * seconds['eager']:.2f} ms | {1e3 * seconds['compiled']:.2f} ms |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["resnet50", "vit_base_patch16_224"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 448, 896])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--what", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for what in args.what:
        columns, run = SECTIONS[what]
        print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
        run(args)


SECTIONS: dict[str, tuple[list[str], Callable[[argparse.Namespace], None]]] = {
    "precision": (
        ["model", "computed in", "time", "error, target", "error, target and contrast"],
        lambda args: [precision(name, args.repeats, args.device) for name in args.models][-1],
    ),
    "growth": (
        ["tokens", "forward pass", "target and contrast", "forward passes"],
        lambda args: growth(args.repeats, args.device, args.sizes),
    ),
    "layout": (
        ["ResNet-50, batch of 4", "forward pass", "target and contrast", "forward passes"],
        lambda args: layout(args.repeats, args.device),
    ),
    "compile": (
        ["formula", "eager", "compiled"],
        lambda args: compiled(args.repeats, args.device),
    ),
}


if __name__ == "__main__":
    main()
