"""Profile the time of an attribution by kind of call.

``python -m benchmarks.profile --model vit_base_patch16_224`` prints the time of the forward pass, plain and
recorded, and the time of each kind of rule in the backward pass, in milliseconds and as multiples of the
plain forward pass. It also prints the time of the operators: the products, which every implementation
needs, and the others, longest first. (Run it as a module. A script in this folder would import this file
instead of the module ``profile`` of the standard library.)
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from unittest import mock

import timm
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from captum_abslrp import AbsLRP, demo
from captum_abslrp.chunks import Samples
from captum_abslrp.engine.steps import Step
from captum_abslrp.engine.tape import Totals

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution_backward",
            "aten::mkldnn_convolution", "aten::cudnn_convolution")  # fmt: skip


def load(name: str, batch_size: int) -> tuple[nn.Module, Tensor]:
    """A timm model with random weights, or a demo model, ``demo:vit``, and inputs."""
    torch.manual_seed(0)
    if name.startswith("demo:"):
        return demo.load_model(name.removeprefix("demo:")), torch.randn(batch_size, 3, 64, 64)
    model = timm.create_model(name).eval()
    return model, torch.randn(batch_size, *model.default_cfg["input_size"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--normalization", choices=["separate", "joint"], default="separate")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    model, x = load(args.model, args.batch_size)
    attributor = AbsLRP(model, normalization=args.normalization)
    attributor.attribute(x, 0)

    plain, watched, whole = [], [], []
    spent: Counter[str] = Counter()
    count: Counter[str] = Counter()
    run_step = Step.__call__

    def timed(
        step: Step, seeds: Sequence[Tensor], arrived: Totals = None
    ) -> tuple[list[list[Tensor]], list[Totals]]:
        kind = step.propagate.__qualname__.split(".<locals>")[0].lstrip("_")
        start = time.perf_counter()
        shares = run_step(step, seeds, arrived)
        spent[kind] += time.perf_counter() - start
        count[kind] += 1
        return shares

    for _ in range(args.repeats):
        start = time.perf_counter()
        with torch.no_grad():
            model(x)
        plain.append(time.perf_counter() - start)
        start = time.perf_counter()
        attributor.attribute(x, 0)
        whole.append(time.perf_counter() - start)
        start = time.perf_counter()
        attributor._forward([x.clone().requires_grad_()], Samples((x,), None, None, ()))
        watched.append(time.perf_counter() - start)
        with mock.patch.object(Step, "__call__", timed):
            attributor.attribute(x, 0)
    forward = statistics.median(plain)
    print(f"{args.model}, batch of {len(x)}, target and contrast\n")
    print("| | calls | ms | forward passes |\n|---|---|---|---|")
    rows = [
        ("forward pass, plain", "", forward),
        ("forward pass, watched", "", statistics.median(watched)),
    ]
    rows += [
        (kind, str(count[kind] // args.repeats), t / args.repeats)
        for kind, t in spent.most_common()
    ]
    rows.append(("all", "", statistics.median(whole)))
    for kind, calls, seconds in rows:
        print(f"| {kind} | {calls} | {1e3 * seconds:.1f} | {seconds / forward:.2f} |")

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        attributor.attribute(x, 0)
    events = profiler.key_averages()
    products = sum(e.self_cpu_time_total for e in events if e.key in PRODUCTS) / 1e6
    print(
        f"\nProducts, forward and back: {1e3 * products:.0f} ms, {products / forward:.2f} forward passes."
    )
    others = sorted(
        (e for e in events if e.key not in PRODUCTS), key=lambda e: -e.self_cpu_time_total
    )
    longest = [
        f"`{e.key.removeprefix('aten::')}` {e.self_cpu_time_total / 1e6 / forward:.2f}"
        for e in others[:10]
    ]
    rest = sum(e.self_cpu_time_total for e in others) / 1e6 / forward
    print(f"Other operators: {rest:.2f} forward passes, the longest {', '.join(longest)}.")

    with torch.no_grad():
        one = x[:1]
        times = {"plain": [], "attribution": []}
        for _ in range(4 * args.repeats):
            start = time.perf_counter()
            model(one)
            times["plain"].append(time.perf_counter() - start)
            start = time.perf_counter()
            attributor.attribute(one, 0)
            times["attribution"].append(time.perf_counter() - start)
    one_forward, one_attribution = (1e3 * statistics.median(t) for t in times.values())
    n_calls = sum(count.values()) // args.repeats
    print(
        f"One sample: {one_attribution:.1f} ms, its plain forward pass {one_forward:.1f} ms; "
        f"{n_calls} calls are recorded: {one_attribution / n_calls:.2f} ms each at most."
    )


if __name__ == "__main__":
    main()
