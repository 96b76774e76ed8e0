"""Compare the time of ``compare`` on five attributors with five runs of ``gae`` on single images.

``python -m benchmarks.sharing`` prints a table, as in ``benchmarks/RESULTS.md``. Both sides compute GAE;
``compare`` also measures the localization and the area between the LeRF and MoRF curves.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from captum_abslrp import AbsLRP, demo
from captum_abslrp.methods import get_method
from captum_abslrp.metrics import compare, gae

METHODS: dict[str, Callable[[nn.Module], Callable[..., Tensor]]] = {
    "abslrp": get_method("abslrp"),
    "abslrp, joint": lambda model: AbsLRP(model, normalization="joint").attribute,
    "saliency": get_method("saliency"),
    "inputxgradient": get_method("inputxgradient"),
    "abslrp, no contrast": lambda model: partial(AbsLRP(model).attribute, contrast=None),
}
# Integrated gradients runs 50 points of each image in batches by itself: sharing gains little.
WITH_IG = {name: METHODS[name] for name in METHODS if name != "abslrp, joint"} | {
    "ig": get_method("ig")
}


def measure(
    model: nn.Module, images: Tensor, chosen: dict[str, Callable[..., Callable[..., Tensor]]]
) -> tuple[float, float]:
    """Return the seconds of ``compare``, and of ``gae`` of each method, one image at a time."""
    methods = {name: make(model) for name, make in chosen.items()}
    start = time.perf_counter()
    table = compare(methods, model, images, generator=torch.Generator().manual_seed(0))
    together = time.perf_counter() - start
    failures = {name: s.failure for name, s in table.methods.items() if s.failure is not None}
    if failures:
        raise RuntimeError(f"Expected all methods to run, but got {failures}.")
    start = time.perf_counter()
    for method in methods.values():
        generator = torch.Generator().manual_seed(0)
        gae(model, method, images, generator=generator, max_examples_per_batch=1)
    return together, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n-mosaics", type=int, default=4)
    parser.add_argument("--models", nargs="+", default=["vit", "resnet"])
    args = parser.parse_args()
    scenes = demo.render_scenes("single", 4 * args.n_mosaics, generator=0)
    print(f"{args.n_mosaics} mosaics; {torch.get_num_threads()} threads\n")
    print("| demo model | methods | `compare` | five times `gae`, image by image | ratio |")
    print("|---|---|---|---|---|")
    for name in args.models:
        model = demo.load_model(name)
        for chosen in (METHODS, WITH_IG):
            measure(model, scenes.inputs[:4], chosen)  # not timed: the first call is slower
            together, apart = measure(model, scenes.inputs, chosen)
            print(
                f"| {name} | {'; '.join(chosen)} | {together:.1f} s | {apart:.1f} s | "
                f"{together / apart:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
