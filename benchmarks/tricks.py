"""Measure what each optimization of the rules gains: time without it, relative to time with it.

``python -m benchmarks.tricks`` prints the table of ``benchmarks/RESULTS.md``. Within one process,
the script replaces the code of a function by code without the optimization, and back, for one map each in
turn. The figure is the median of the ratios. The first row, without any change, shows the precision. An
optimization stays if one of the models is at least 3% slower without it, or needs at least 3% more memory.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import timm
import torch

from captum_abslrp import LRP, AbsLRP, demo

PACKAGE = "captum_abslrp"


@dataclass(frozen=True)
class Trick:
    """An optimization, and how to remove it.

    Attributes:
        name: its name in the table.
        module: its module, without the name of the package.
        with_it, without: a piece of its source, and the replacement without the optimization.
        models: the models that it may affect, see :func:`make`.
        saves_memory: whether its purpose is to save memory.
    """

    name: str
    module: str
    with_it: str
    without: str
    models: tuple[str, ...]
    saves_memory: bool = False


CNNS = ("resnet50", "efficientnet_b0")
VITS = ("vit_small_patch16_224", "swin_tiny_patch4_window7_224")
SMALL = ("demo:resnet", "demo:vit")
ALL = ("resnet50", "vit_small_patch16_224", "demo:vit")
JOINT = ("vit_small_patch16_224 joint", "demo:vit joint")

TRICKS = [
    Trick("nothing (how exact the figures are)", "engine.numerics", "LARGE = 2**17", "LARGE = 131072", ALL),
    Trick(
        "sums of nonnegative relevance as dot products", "engine.numerics",
        "if positive and x.is_contiguous() and s.is_contiguous():", "if False:", ALL,
    ),
    Trick(
        "one product for a nonnegative input", "engine.saved",
        "return mark is not None and mark == self._count(tensor)", "return False", ALL,
    ),
    Trick(
        "relevance unscaled for up to 8 calls", "engine.propagation",
        "UNSCALED_STEPS = 8", "UNSCALED_STEPS = 1", ALL,
    ),
    Trick("one slope of GELU and SiLU", "rules.elementwise", "_GATES.get(call.name)", "None",
          ("efficientnet_b0", *VITS, "demo:vit")),
    Trick("one slope of sigmoid and tanh", "rules.elementwise", "call.name in _EVEN_SLOPE", "False",
          ("efficientnet_b0",)),
    Trick(
        "attention at once", "rules.attention",
        "if stabilized is not None and len(leading) == 1", "if False and len(leading) == 1",
        ("vit_small_patch16_224", "demo:vit"), True,
    ),
    Trick(
        "convolution of an image: both products as one", "rules.affine",
        "if nonnegative or not plain or x.shape[1] > FEW:", "if True:", (*CNNS, *SMALL),
    ),
    Trick(
        "convolution with a stride by its phases: images", "rules.affine",
        "if plain and weight.shape[1] <= FEW and max(stride) > 1:", "if False:",
        ("resnet50", "efficientnet_b0", "demo:resnet", "demo:vit"),
    ),
    Trick(
        "convolution of the size of its input as a linear layer", "rules.affine",
        "if _is_linear(parts.weight, x, **options):", "if False:",
        ("vgg16",),
    ),
    Trick(
        "large weights piece by piece, once for both seeds", "rules.affine",
        "LARGE = 2**22", "LARGE = 2147483648",
        ("vgg16",), True,
    ),
    Trick(
        "relevance of a transposed matrix laid out like it", "rules.matmul",
        "lies_transposed = y.stride(-2) < y.stride(-1)", "lies_transposed = False",
        (*JOINT, "swin_tiny_patch4_window7_224"),
    ),
    Trick(
        "inputs laid out like their relevance", "engine.steps",
        "return x if x.stride() == share.stride() else", "return x if True else",
        (*JOINT, *VITS, *CNNS),
    ),
    Trick("factors multiplied in place", "rules.base", "[s.mul_(made())]", "[s * made()]", ALL),
    Trick(
        "relevance that nothing else has is overwritten", "engine.steps",
        "s if own and _is_dense(s) else s.clone()", "s.clone()", ALL,
    ),
    Trick(
        "a mask by the kernel of ReLU's gradient", "engine.numerics",
        "result: Tensor = torch.ops.aten.threshold_backward(s, x, 0)",
        "result: Tensor = torch.where(x > 0, s, 0)", ALL,
    ),
    Trick(
        "both parts masked in the memory of a sum", "engine.numerics",
        "rectify(s, x) if any(s is later for later in shares[i + 1 :]) else rectify_in_place(s, x)",
        "rectify(s, x)", ("resnet50", "efficientnet_b0", *VITS, *SMALL),
    ),
    Trick(
        "ReLU in place stays in place", "rules.elementwise",
        "if call.target is input and call.recording.is_fresh(input):", "if False:", ("vgg16", "resnet50"),
        True,
    ),
    Trick(
        "sums in place stay in place", "rules.sums",
        "if call.target is None or call.target is not target or target._is_view() or target.is_leaf:",
        "if True:", ("resnet50", "demo:resnet"), True,
    ),
    Trick(
        "order of samples known from the arguments", "engine.samples",
        "if not moved and (name in _KEEP_ORDER or _keeps_samples_first(name, args, result, batch_size)):",
        "if not moved and name in _KEEP_ORDER:", (*VITS, *SMALL),
    ),
    Trick("what is the same for both seeds computed once", "rules.base",
          "        if steps:\n            result.append(steps.pop()())\n        return result[0]",
          "        return compute()", ALL),
    Trick("relevance of branches added in place", "engine.arrivals",
          "a.add_(b) if a.is_contiguous() else a + b", "a + b", ("resnet50", *VITS, "demo:vit")),
    Trick("signs of a weight by its first row first", "rules.base",
          "for w in (few, weight))", "for w in (weight,))", ALL),
    Trick("1 x 1 convolutions transposed as products of matrices", "rules.affine",
          "of_points = plain and set(weight.shape[2:]) == {1} and not any(padding)",
          "of_points = False", (*CNNS, "resnet50 epsilon")),
    Trick("no product for positive factors of batch norm", "rules.contributions",
          "if positive:", "if False:", CNNS),
    Trick("the memory of a result handed over, not copied", "engine.saved",
          "if is_traced() or not (is_ours and alike):", "if True:", ("resnet50 epsilon",), True),
    Trick("the contrast of a guided map ends at the guide", "attribution",
          'if combine == "guided" and observer is None:', "if False:",
          ("resnet50 recommended", "vit_small_patch16_224 recommended")),
]  # fmt: skip


def changed(trick: Trick, source: str) -> str:
    """Return the source without an optimization; raise an error if it is not found."""
    if source.count(trick.with_it) != 1:
        raise ValueError(f"Expected {trick.with_it!r} once in {trick.module}, but it is not.")
    return source.replace(trick.with_it, trick.without)


def switch(trick: Trick) -> Callable[[bool], None]:
    """Return a function that turns an optimization on and off in this process."""
    module = importlib.import_module(f"{PACKAGE}.{trick.module}")
    source = inspect.getsource(module)
    new_source = changed(trick, source)
    name, equals, value = trick.without.partition(" = ")
    if equals and name.isupper():
        values = {
            True: getattr(module, name),
            False: ast.literal_eval(ast.parse(value, mode="eval")),
        }
        return lambda on: setattr(module, name, values[on])
    function = _changed_function(module, source, new_source)
    codes = {
        True: function.__code__,
        False: _code_of(compile(new_source, module.__file__ or "", "exec"), function.__qualname__),
    }

    def turn(on: bool) -> None:
        function.__code__ = codes[on]

    return turn


def _changed_function(module: Any, source: str, new_source: str) -> FunctionType:
    """Return the function or method in which two sources of a module differ."""
    before, after = (
        {(*path, node.name): ast.unparse(node) for path, node in _functions(ast.parse(text))}
        for text in (source, new_source)
    )
    (path,) = (path for path, text in before.items() if after[path] != text)
    found: Any = module
    for name in path:
        found = vars(found)[name]
    function: FunctionType = getattr(found, "__func__", found)
    return function


def _functions(tree: ast.Module) -> list[tuple[tuple[str, ...], ast.FunctionDef]]:
    """Yield the functions and methods of a module, each with the names of its classes."""
    places: list[tuple[tuple[str, ...], list[ast.stmt]]] = [((), tree.body)]
    places += [((c.name,), c.body) for c in tree.body if isinstance(c, ast.ClassDef)]
    return [(p, node) for p, body in places for node in body if isinstance(node, ast.FunctionDef)]


def _code_of(code: CodeType, name: str) -> CodeType:
    """Find the code of a function in the code of its module, by its qualified name."""
    for part in name.split("."):
        (code,) = (c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == part)
    return code


def make(name: str, batch_size: int) -> Callable[[], object]:
    """Return a function that explains a batch with a timm model or a demo model.

    ``NAME joint`` chooses the normalization, ``NAME epsilon`` a composite, and ``NAME recommended`` the
    recommended options.
    """
    torch.manual_seed(0)
    name, _, option = name.partition(" ")
    if name.startswith("demo:"):
        model, x = (
            demo.load_model(name.removeprefix("demo:")),
            torch.rand(8 * batch_size, 3, 64, 64),
        )
    else:
        model, x = timm.create_model(name).eval(), torch.randn(batch_size, 3, 224, 224)
    attributor: AbsLRP
    if option == "recommended":
        attributor = AbsLRP.recommended(model)
    elif option in ("", "joint"):
        attributor = AbsLRP(model, normalization=option or "separate")
    else:
        attributor = LRP(model, option)
    return lambda: attributor.attribute(x, 0)


def time_without(trick: Trick, run: Callable[[], object], rounds: int) -> float:
    """Return the time without an optimization, relative to the time with it: the median over rounds."""
    turn = switch(trick)

    def seconds(on: bool) -> float:
        turn(on)
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    try:
        for on in (True, False):
            seconds(on)
        pairs = [(seconds(False), seconds(True)) for _ in range(rounds)]
    finally:
        turn(True)
    return statistics.median(without / with_it for without, with_it in pairs)


def peak_without(number: int, model: str, batch_size: int) -> float:
    """Return the peak memory of a process without an optimization, relative to one with all of them."""
    peaks = []
    for options in ([], ["--number", str(number)]):
        command = [sys.executable, "-m", "benchmarks.tricks", "--peak", model, *options]
        command += ["--batch-size", str(batch_size)]
        peaks.append(float(subprocess.run(command, check=True, capture_output=True).stdout))
    return peaks[1] / peaks[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", help="parts of names of optimizations")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.peak:
        if args.number is not None:
            switch(TRICKS[args.number])(False)
        make(args.peak, args.batch_size)()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return
    chosen = [t for t in TRICKS if not args.only or any(part in t.name for part in args.only)]
    times: dict[str, dict[str, float]] = {trick.name: {} for trick in chosen}
    for model in dict.fromkeys(m for trick in chosen for m in trick.models):
        run = make(model, args.batch_size)
        for trick in chosen:
            if model in trick.models:
                rounds = args.rounds * (3 if model.startswith("demo:") else 1)
                times[trick.name][model] = time_without(trick, run, rounds)
    print("| without | time, slowest first | memory |\n|---|---|---|")
    for trick in chosen:
        ordered = sorted(times[trick.name].items(), key=lambda item: -item[1])
        memory = ""
        if trick.saves_memory:
            number = TRICKS.index(trick)
            found = {m: peak_without(number, m, args.batch_size) for m in trick.models}
            memory = ", ".join(f"{m} {ratio:.2f}" for m, ratio in found.items())
        of_models = ", ".join(f"{m} {ratio:.2f}" for m, ratio in ordered)
        print(f"| {trick.name} | {of_models} | {memory} |", flush=True)


if __name__ == "__main__":
    main()
