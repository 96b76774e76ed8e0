"""Explanations as ONNX models."""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import GraphModule

from captum_abslrp.export.operators import COMPOSITES, DECOMPOSITIONS

__all__ = ["OPSET", "check_installed", "of", "prepare", "runner"]

OPSET = 18
LARGEST = 2**31 - 2**24
"""Maximum number of bytes of all weights: a file in the format of ONNX has at most 2 GB."""
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LARGEST_FOLDED = 2**14
"""Maximum number of elements of a constant that is computed in advance."""


def check_installed() -> None:
    """Raise ModuleNotFoundError if a package that ONNX requires is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"Expected {', '.join(PACKAGES)} to be installed for ONNX, but {missing[0]} is not. Run "
            "`pip install 'captum-abslrp[export]'`."
        )


def prepare(graph: GraphModule) -> None:
    """Write operators that the conversion would keep, or not understand, as others, in place."""
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        with graph.graph.inserting_before(node):
            if node.target in COMPOSITES:
                given = [torch.fx.Proxy(argument) for argument in node.args]
                new = COMPOSITES[node.target](*given).node
            elif (functional := _functional(node.target)) is not None:
                others = dict(node.kwargs)
                memory = others.pop(node.target._schema.arguments[-1].name)
                value = graph.graph.call_function(functional, node.args, others)
                new = graph.graph.call_function(torch.ops.aten.copy_.default, (memory, value))
            else:
                continue
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
    graph.recompile()


def _functional(target: Any) -> OpOverload | None:
    """For an operator that writes its result to its last argument, such as `out`: the one that returns it."""
    if not isinstance(target, OpOverload):
        return None
    arguments = [(a.name, str(a.type)) for a in target._schema.arguments]
    last = target._schema.arguments[-1] if arguments else None
    if last is None or not last.kwarg_only or last.alias_info is None:
        return None
    packet = target.overloadpacket
    overloads = (getattr(packet, name) for name in packet.overloads())
    return next(
        (
            o
            for o in overloads
            if [(a.name, str(a.type)) for a in o._schema.arguments] == arguments[:-1]
        ),
        None,
    )


def of(exported: ExportedProgram, key: str, about: str) -> bytes:
    """Convert an exported explanation to an ONNX model.

    Args:
        exported: a program that maps image and target to scores and relevance.
        key, about: a metadata property of the model.

    Raises:
        ValueError: if ONNX lacks an operator, or the model is larger than 2 GB.
    """
    import onnx_ir
    from onnx_ir.passes import common
    from onnxscript import optimizer

    table = torch.export.default_decompositions()
    table.update(DECOMPOSITIONS)
    with warnings.catch_warnings(), _quiet(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                exported.run_decompositions(table),
                dynamo=True,
                opset_version=OPSET,
                input_names=["image", "target"],
                output_names=["scores", "relevance"],
                optimize=False,  # it would fold weights, and store them twice
                verbose=False,
            )
        except (torch.onnx.OnnxExporterError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"Expected an explanation that can be converted to ONNX, but got {_reason(error)}. Save a "
                ".pt2 file."
            ) from error
        assert program is not None
        model = program.model
        # Not `optimize_ir`: its rewriting rules take minutes for thousands of nodes.
        common.InlinePass()(model)
        optimizer.fold_constants(
            model,
            onnx_shape_inference=False,
            input_size_limit=LARGEST_FOLDED,
            output_size_limit=LARGEST_FOLDED,
        )
        for simplify in (
            common.IdentityEliminationPass(),
            common.CommonSubexpressionEliminationPass(),
            common.RemoveUnusedNodesPass(),
            common.ClearMetadataAndDocStringPass(),
        ):
            simplify(model)
    model.metadata_props[key] = about
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    if size > LARGEST:
        raise ValueError(
            f"Expected less than 2 GB of weights, the limit of ONNX files, but got {size / 1e9:.1f} GB. "
            "Save a .pt2 file."
        )
    return onnx_ir.to_proto(model).SerializeToString()


def runner(content: bytes, threads: int | None = None) -> Callable[[Tensor, Tensor], list[Tensor]]:
    """Return a function that runs an ONNX model in onnxruntime, with the threads of PyTorch by default."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(image: Tensor, target: Tensor) -> list[Tensor]:
        given = {"image": image.detach().numpy(), "target": target.numpy()}
        return [torch.from_numpy(value) for value in session.run(None, given)]

    return run


def _reason(error: BaseException) -> str:
    """What the innermost error says, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:200].rstrip(".")


class _quiet:
    """Hide log messages of the exporter."""

    names = ("torch.onnx", "onnxscript", "onnx_ir")

    def __enter__(self) -> None:
        self.levels = [logging.getLogger(name).level for name in self.names]
        for name in self.names:
            logging.getLogger(name).setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        for name, level in zip(self.names, self.levels, strict=True):
            logging.getLogger(name).setLevel(level)
