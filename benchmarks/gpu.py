"""Measure the cost of attribution on a GPU: ``python -m benchmarks.gpu``, a few minutes, no network.

The script prints a row for each model, precision and batch size: milliseconds of the forward pass, multiples
of it for maps (eager, traced as a program, and the program in a CUDA graph), images per second, and peak
memory. It then prints whether any operation waits for the GPU. It names the rows for which the time does not
suffice. Without a GPU it says so, and runs tiny models on the host as a check.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import captum.attr
import timm
import torch
from torch import Tensor, nn

from benchmarks.real import seconds
from captum_abslrp import LRP, AbsLRP
from captum_abslrp.text import markdown_table

MODELS = ("resnet50", "vit_base_patch16_224", "vgg16", "swin_tiny_patch4_window7_224")
TINY = ("test_resnet", "test_vit")
LRP_OF = {"vit": "cp_lrp", "swin": "cp_lrp"}
"""The composite of a model by a part of its name; epsilon for others."""
PRECISIONS = ("float32", "TF32", "bfloat16, autocast")
TRACED_UP_TO = 16
"""Images of a batch for which a program is traced, too: tracing takes some ten seconds."""
INTEGRATED_UP_TO = 16
"""Images of a batch for which IntegratedGradients is timed, too, once."""
HEADER = (
    *("model", "precision", "batch", "forward, ms", "Saliency", "IntegratedGradients(50)"),
    *("AbsLRP, target", "two maps", "joint", "LRP", "recommended"),
    *("two maps, traced", "two maps, CUDA graph", "images/s, best", "peak, MB", "of Saliency, MB"),
)


class Setting(NamedTuple):
    """A model and images in one precision."""

    name: str
    precision: str
    batch: int
    device: str


def median_seconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """Return the median time of several calls, after one that is not counted."""
    seconds(run)
    return statistics.median(seconds(run) for _ in range(repeats))


def methods_of(name: str, model: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the maps to time, by the titles of their columns."""
    composite = next((c for part, c in LRP_OF.items() if part in name), "epsilon")
    separate, joint = AbsLRP(model), AbsLRP(model, normalization="joint")
    saliency, lrp = captum.attr.Saliency(model), LRP(model, composite)
    recommended = AbsLRP.recommended(model)
    return {
        "Saliency": lambda x: saliency.attribute(x, target=1),
        "AbsLRP, target": lambda x: separate.attribute(x, target=1, contrast=None),
        "two maps": lambda x: separate.attribute(x, target=1),
        "joint": lambda x: joint.attribute(x, target=1),
        "LRP": lambda x: lrp.attribute(x, target=1, contrast="others"),
        "recommended": lambda x: recommended.attribute(x, target=1),
    }


@contextlib.contextmanager
def precision_of(setting: Setting) -> Any:
    """Run in a precision, and restore the previous one."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    tf32 = setting.precision == "TF32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    half = setting.precision.startswith("bfloat16")
    try:
        with torch.autocast(setting.device, torch.bfloat16, enabled=half):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def row(setting: Setting) -> list[str]:
    """Return the cells of one setting."""
    name, precision, batch, device = setting
    model = timm.create_model(name).eval().to(device)
    x = torch.randn(batch, *model.default_cfg["input_size"], device=device)
    times: dict[str, float] = {}
    peaks: dict[str, float] = {}
    with torch.no_grad():
        forward = median_seconds(lambda: model(x))
    for label, maps in methods_of(name, model).items():
        peaks[label], times[label] = measured(lambda maps=maps: maps(x), device)
    if batch <= INTEGRATED_UP_TO:
        integrated = captum.attr.IntegratedGradients(model)
        times["IntegratedGradients(50)"] = seconds(
            lambda: integrated.attribute(x, target=1, n_steps=50, internal_batch_size=4 * batch)
        )
    if batch <= TRACED_UP_TO:
        program, target = AbsLRP(model).trace(x, target=1), torch.ones(batch, dtype=torch.int64)
        target = target.to(device)
        times["two maps, traced"] = median_seconds(lambda: program(x, target))
        if device == "cuda":
            replay = captured(lambda: program(x, target))
            times["two maps, CUDA graph"] = median_seconds(replay)
    best = min(times[label] for label in times if label.startswith("two maps"))
    cells = {label: f"{value / forward:.1f}" for label, value in times.items()}
    cells |= {"model": name, "precision": precision, "batch": str(batch)}
    cells |= {"forward, ms": f"{1000 * forward:.1f}", "images/s, best": f"{batch / best:.0f}"}
    if device == "cuda":
        cells |= {"peak, MB": f"{peaks['two maps']:.0f}"}
        cells |= {"of Saliency, MB": f"{peaks['Saliency']:.0f}"}
    return [cells.get(head, "-") for head in HEADER]


def measured(run: Callable[[], Any], device: str) -> tuple[float, float]:
    """Return the peak memory in MB on a GPU, and the median time in seconds."""
    if device != "cuda":
        return 0.0, median_seconds(run)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    time_of_run = median_seconds(run)
    return (torch.cuda.max_memory_allocated() - before) / 2**20, time_of_run


def captured(run: Callable[[], Any]) -> Callable[[], None]:
    """Capture the work of a function on the GPU in a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        run()
    replay: Callable[[], None] = graph.replay
    return replay


def waits(name: str) -> dict[str, str]:
    """Find which maps wait for the GPU and where, and count how often with the profiler."""
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
        torch.cuda.synchronize()
        with torch.profiler.profile() as profile:
            maps(x)
        calls = {e.key: e.count for e in profile.key_averages() if "Synchronize" in e.key}
        # The profiler waits once at its own end.
        found[label] += f"; by the profiler {sum(calls.values())} synchronizations {calls}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=6.0, help="for the table; default: 6")
    parser.add_argument("--cpu", action="store_true", help="tiny models on the host")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "Input Tensor|The maps of target|The guided map")
    device = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"
    if device == "cpu":
        print("There is no GPU to measure: tiny models run on the CPU, whose figures mean nothing.")
    kind = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print("Device:", kind, "torch", torch.__version__, flush=True)
    end = time.monotonic() + 60 * args.minutes
    names, batches = (MODELS, (1, 16, 64)) if device == "cuda" else (TINY, (1,))
    precisions = PRECISIONS if device == "cuda" else ("float32", PRECISIONS[-1])
    settings = [
        Setting(name, precision, batch, device)
        for precision, name, batch in itertools.product(precisions, names, batches)
    ]
    print(markdown_table(HEADER, [], aligned=False), flush=True)
    for number, setting in enumerate(settings):
        if time.monotonic() > end:
            left = [f"{s.name} {s.precision} {s.batch}" for s in settings[number:]]
            print(f"Left out for lack of time: {', '.join(left)}.")
            break
        with precision_of(setting):
            print(f"| {' | '.join(row(setting))} |", flush=True)
    if device == "cuda":
        for name in ("resnet50", "vit_small_patch16_224"):
            for label, found in waits(name).items():
                print(f"{name}, {label}: {found}", flush=True)


if __name__ == "__main__":
    main()
