"""Time and peak memory of AbsLRP and of Captum's methods, as multiples of the forward pass.

``python -m benchmarks.speed`` prints the tables of ``benchmarks/RESULTS.md``. All methods of a model and a
batch size run in turn, so that other load on the machine affects all of them. Each figure is the median over
``--repeats`` rounds. Peak memory is measured in a separate process, beyond the loaded model and its inputs.
On a GPU the time of a forward pass is that of the device.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import platform
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import captum
import timm
import torch
from captum.attr import IntegratedGradients
from torch import Tensor, nn

from benchmarks.real_methods import has_attention
from captum_abslrp import LRP, AbsLRP
from captum_abslrp.methods import get_method

MODELS = ("vgg16", "resnet50", "vit_base_patch16_224")
Run = Callable[[], object]
METHODS: dict[str, Callable[[nn.Module, Tensor, Tensor], Run]] = {
    "forward": lambda m, x, t: lambda: m(x),
    "Saliency": lambda m, x, t: lambda: get_method("saliency")(m)(x, t),
    "InputXGradient": lambda m, x, t: lambda: get_method("inputxgradient")(m)(x, t),
    "AbsLRP, target": lambda m, x, t: lambda: AbsLRP(m).attribute(x, t, contrast=None),
    "AbsLRP, target and contrast": lambda m, x, t: lambda: AbsLRP(m).attribute(x, t),
    "AbsLRP, target and contrast, joint": lambda m, x, t: (
        lambda: AbsLRP(m, normalization="joint").attribute(x, t)
    ),
    "LRP, target less others": lambda m, x, t: (
        lambda: LRP(m, "attnlrp" if has_attention(m) else "epsilon").attribute(
            x, t, contrast="others"
        )
    ),
    "AbsLRP.recommended": lambda m, x, t: lambda: AbsLRP.recommended(m).attribute(x, t),
    "DeepLift": lambda m, x, t: lambda: get_method("deeplift")(m)(x, t),
    "Captum's LRP": lambda m, x, t: lambda: get_method("lrp")(m)(x, t),
    "IntegratedGradients(50)": lambda m, x, t: (
        lambda: IntegratedGradients(m).attribute(
            x, target=t, n_steps=50, internal_batch_size=4 * len(x)
        )
    ),
}
DEAR = ("IntegratedGradients(50)",)
"""Measured once: its 100 forward passes average by themselves."""


def prepare(name: str, batch_size: int, device: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = timm.create_model(name).eval().to(device)
    x = torch.randn(batch_size, 3, 224, 224, device=device)
    return model, x, torch.arange(batch_size, device="cpu")


def run_once(method: str, call: Run, device: str) -> float:
    """Return the seconds of one run."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.no_grad() if method == "forward" else contextlib.nullcontext():
        call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_times(
    name: str, batch_size: int, methods: list[str], repeats: int, device: str
) -> dict[str, float | str]:
    """Return the median seconds of each method, or the reason why it does not run."""
    prepared = prepare(name, batch_size, device)
    calls = {method: METHODS[method](*prepared) for method in methods}
    times: dict[str, list[float]] = {method: [] for method in methods}
    failed: dict[str, str] = {}
    for method, call in calls.items():
        if method in DEAR:
            times[method].append(run_once(method, call, device))
            continue
        try:
            run_once(method, call, device)  # not timed: the first call is slower
        except (TypeError, AssertionError, RuntimeError) as error:
            failed[method] = type(error).__name__
    for _ in range(repeats):
        for method, call in calls.items():
            if method not in failed and method not in DEAR:
                times[method].append(run_once(method, call, device))
    return {m: failed.get(m) or statistics.median(times[m]) for m in methods}


@contextlib.contextmanager
def peak_resident_set() -> Iterator[list[float]]:
    """Append the peak of the resident set, beyond its size at the start, to the list at the end, in MB."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = peak = resident()
    stop = threading.Event()

    def observer() -> None:
        nonlocal peak
        while not stop.is_set():
            peak = max(peak, resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=observer)
    watcher.start()
    result: list[float] = []
    try:
        yield result
    finally:
        stop.set()
        watcher.join()
        result.append((peak - before) / 1e6)


def measure_memory_here(name: str, batch_size: int, method: str, device: str) -> float:
    """Return the peak extra memory of the first run of a method in this process, in MB."""
    call = METHODS[method](*prepare(name, batch_size, device))
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_once(method, call, device)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with peak_resident_set() as peak:
        run_once(method, call, device)
    return peak[0]


def measure_memory(name: str, batch_size: int, method: str, device: str) -> float | str:
    """Return the median of three runs of :func:`measure_memory_here`, each in its own process."""
    found = []
    for _ in range(3):
        request = json.dumps([name, batch_size, method, device])
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.speed", "--one", request],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            return "fails"
        found.append(float(done.stdout))
    return statistics.median(found)


def print_table(title: str, rows: dict[str, dict[str, str]]) -> None:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    print(f"\n{title}\n\n| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for method, row in rows.items():
        print(f"| {method} | {' | '.join(row.get(column, '') for column in columns)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--what", nargs="+", choices=["time", "memory"], default=["time", "memory"])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.one:
        print(measure_memory_here(*json.loads(args.one)))
        return
    print(
        f"{date.today()}; {args.device}"
        f"{f' ({torch.cuda.get_device_name()})' if args.device != 'cpu' else ''}, "
        f"{torch.get_num_threads()} threads, {platform.machine()}; torch {torch.__version__}, "
        f"captum {captum.__version__}, timm {timm.__version__}; float32, 224 x 224"
    )
    rows: dict[str, dict[str, str]] = {method: {} for method in args.methods}
    if "time" in args.what:
        for name in args.models:
            for batch_size in args.batch_sizes:
                found = measure_times(name, batch_size, args.methods, args.repeats, args.device)
                print(f"{name}, {batch_size}: {found}", file=sys.stderr, flush=True)
                forward = found["forward"]
                for method, value in found.items():
                    shown = value
                    if not isinstance(value, str):
                        shown = (
                            f"{value:.2f} s" if method == "forward" else f"{value / forward:.2f}"
                        )
                    rows[method][f"{name}, {batch_size}"] = str(shown)
        print_table("Time: seconds of the forward pass, multiples of it for the others.", rows)
    if "memory" in args.what:
        rows = {method: {} for method in args.methods}
        for name in args.models:
            for batch_size in args.batch_sizes:
                for method in args.methods:
                    peak = measure_memory(name, batch_size, method, args.device)
                    shown = peak if isinstance(peak, str) else f"{peak:.0f}"
                    rows[method][f"{name}, {batch_size}"] = shown
        print_table("Peak memory beyond model and inputs, MB.", rows)


if __name__ == "__main__":
    main()
