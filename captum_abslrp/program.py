"""An explanation as one flat program: forward and backward pass as a graph of ATen operators.

Axes: B samples, I indices of a target.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from captum._utils.common import _format_additional_forward_args
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from captum_abslrp.checks import plain
from captum_abslrp.chunks import Samples
from captum_abslrp.engine.arguments import instances_in
from captum_abslrp.engine.samples import Misaligned
from captum_abslrp.engine.saved import storage_of
from captum_abslrp.engine.state import unchanged
from captum_abslrp.graphs import simplify
from captum_abslrp.scores import scores_of
from captum_abslrp.seeds import Contrast, Target, expand_target

__all__ = ["Program", "trace"]


class Program(nn.Module):
    """An explanation as one graph of ATen operators, for inputs of one shape.

    :meth:`AbsLRP.trace <captum_abslrp.AbsLRP.trace>` creates it. The graph contains no Python code of the
    model or of this package. It therefore has less overhead, and ``torch.compile`` can compile it. It is
    built to be captured in a CUDA graph; ``benchmarks/gpu.sh`` tries that. It shares memory with the weights
    of the model at the time of tracing: in-place updates of the weights take effect, but replaced weights
    (``model.to(...)``, ``assign=True``) do not.

    Attributes:
        graph: a :class:`torch.fx.GraphModule` that maps the flat list of input tensors to the output and the
            maps.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5)).eval()
        >>> x = torch.rand(2, 3)
        >>> program = AbsLRP(model).trace(x, target=1)
        >>> output, relevance = program(torch.rand(2, 3), target=torch.tensor([4, 0]))
        >>> output.shape, relevance.shape
        (torch.Size([2, 5]), torch.Size([2, 3]))
    """

    def __init__(
        self, graph: GraphModule, example: Sequence[Tensor], spec: TreeSpec, *, indices: int
    ) -> None:
        super().__init__()
        self.graph = graph
        self._spec = spec
        self._indices = indices
        self._expected = [_layout(x) for x in example]

    def forward(
        self, inputs: Any, target: Target = None, additional_forward_args: Any = None
    ) -> tuple[Tensor, Any]:
        """Run the program.

        Args:
            inputs: tensors with the shapes, dtypes and devices of the example.
            target: as in ``attribute``, with as many indices as in the example; None if the example had no
                target. A tensor on the device of the inputs avoids synchronization.
            additional_forward_args: as in the example. Only the values of tensors may differ.

        Returns:
            The explained output of the model, (B, ...), and relevance with the shape of ``inputs``. Relevance
            is NaN for samples for which ``attribute`` would raise an error: if an input is not finite, if a
            target is out of range, or if the contrast equals the target. It is also NaN where ``attribute``
            would run a second time, because relevance of both signs cancels up to rounding errors.

        Raises:
            TypeError, ValueError: if an argument does not match the example.

        Example:
            >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5)).eval()
            >>> program = AbsLRP(model).trace(torch.rand(1, 3))
            >>> output, relevance = program(torch.rand(1, 3))  # of the predicted class
            >>> relevance.shape
            torch.Size([1, 3])
        """
        tensors, spec = _flat(inputs, additional_forward_args)
        batch_size = self._expected[0][0][0]
        if self._indices:
            tensors.append(_rows(target, batch_size, tensors[0].device))
        elif target is not None:
            raise ValueError(
                "Expected no `target`, because the program was traced without a target or with a function, "
                "but got one. Trace it with a class: `trace(inputs, target=0)`."
            )
        found = [_layout(x) for x in tensors]
        if spec != self._spec or found != self._expected:
            raise ValueError(
                f"Expected arguments with the shapes, dtypes and devices of the example, "
                f"{_described(self._expected)}, but got {_described(found)}. Trace another program for "
                f"other shapes or batch sizes."
            )
        # Casts of autocast are part of the program.
        with torch.no_grad(), torch.autocast(tensors[0].device.type, enabled=False):
            output, *relevance = self.graph(*tensors)
        return output, tuple(relevance) if isinstance(inputs, tuple) else relevance[0]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        raise RuntimeError(
            "Expected the program to keep its device and dtype, which are fixed, but got a call that moves "
            "or casts it. Move or cast the model, and trace it again."
        )

    def extra_repr(self) -> str:
        """The arguments that the program takes."""
        return f"arguments={_described(self._expected)}, nodes={len(self.graph.graph.nodes)}"


def trace(
    model: nn.Module,
    explain: Callable[[Samples, bool], tuple[Tensor, Tensor, list[Tensor]]],
    inputs: Any,
    target: Target,
    additional_forward_args: Any,
    contrast: Contrast,
    expected: Any,
) -> Program:
    """Trace an explanation into a program.

    Args:
        model: the model, in evaluation mode; it is not modified.
        explain: a function of samples, and of whether relevance may stay unscaled for some steps, that
            returns the explained output, (B, ...), which samples have a valid target, (B,), and the
            relevance of each input.
        inputs, target, additional_forward_args, contrast: the example.
        expected: the map of the example, to check the program.

    Raises:
        ValueError: if the model mixes samples.
        RuntimeError: if the program computes a different map.
    """
    tensors, spec = _flat(inputs, additional_forward_args)
    count = len(inputs) if isinstance(inputs, tuple) else 1
    batch_size = len(tensors[0])
    others: Any = contrast
    scores = scores_of(target, contrast, batch_size)
    fixed = None
    if scores is not None:
        fixed, target = expand_target(scores.index, batch_size), None
        others = contrast if scores.contrast is None else 1
    if not (others is None or isinstance(others, str)):
        others = expand_target(others, batch_size, name="contrast")
    if target is not None:
        tensors.append(_rows(target, batch_size, tensors[0].device))
    extra = _format_additional_forward_args(additional_forward_args) or ()
    leaves_of_extra, of_extra = tree_flatten(extra)

    def run(chains: bool, *given: Tensor) -> list[Tensor]:
        values, rows = [*given], fixed
        if target is not None:
            rows = values.pop()
        leaves, further = values[:count], iter(values[count:])
        arguments = [next(further) if isinstance(v, Tensor) else v for v in leaves_of_extra]
        further_arguments = tuple(tree_unflatten(arguments, of_extra))
        samples = Samples(tuple(leaves), rows, others, further_arguments, scores)
        output, fits, relevances = explain(samples, chains)
        finite = [x.isfinite().view(batch_size, -1).all(1) for x in leaves]
        valid = torch.stack([fits, *finite]).all(0)
        masked = [r.where(valid.view(-1, *[1] * (r.dim() - 1)), torch.nan) for r in relevances]
        return [output, *masked]

    indices = 0 if target is None else tensors[-1].shape[1]
    for chains in (True, False):  # scaling at every step may avoid values that are not finite
        graph = _graph(partial(run, chains), tensors, model)
        program = Program(graph, tensors, spec, indices=indices)
        found = program(inputs, target, additional_forward_args)[1]
        pairs = [*zip(*map(_tuple, (found, expected)), strict=True)]
        if all(bool(relevance.isfinite().all()) for relevance, _ in pairs):
            break
    for relevance, of_example in pairs:
        largest = float(of_example.abs().max())
        if not torch.allclose(relevance, of_example, rtol=1e-2, atol=1e-2 * largest):
            raise RuntimeError(
                "Expected the program to reproduce the map of the example, but got a different map. Make "
                "sure that the model and custom rules are deterministic."
            )
    return program


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _graph(run: Callable[..., Any], tensors: Sequence[Tensor], model: nn.Module) -> GraphModule:
    """The graph of a function of tensors that runs a model."""
    example = [x.detach().clone() for x in tensors]
    with warnings.catch_warnings(), torch.inference_mode(False), unchanged(model):
        warnings.simplefilter("ignore")  # the explanation of the example has already warned
        try:
            with torch.enable_grad():
                graph = make_fx(lambda *given: run(*given))(*example)
        except Misaligned as error:
            raise ValueError(
                "Expected the model to keep samples separate in the leading dimension, because it is traced "
                "for a batch, but got a model that moves or mixes them. Trace it for one sample."
            ) from error
        except (RuntimeError, NotImplementedError) as error:
            if type(error) not in (RuntimeError, NotImplementedError):
                raise  # a more specific error
            raise ValueError(
                f"Expected the forward pass of {type(model).__name__} to run the same operators for all "
                f"values and to overwrite none of its tensors, as tracing requires, but got: "
                f"{str(error).splitlines()[0]} Use `attribute`."
            ) from error
    _own(graph)
    inside = [value for module in model.modules() for value in instances_in(Tensor, vars(module))]
    live = [*model.parameters(), *model.buffers(), *inside]
    simplify(graph, live={storage_of(tensor) for tensor in live})
    return graph


def _flat(inputs: Any, additional_forward_args: Any) -> tuple[list[Tensor], Any]:
    """Return the tensors among the arguments, and the structure of the arguments without tensors.

    The tensors are contiguous, because a graph depends on the order of the elements in memory.
    """
    given = plain(inputs if isinstance(inputs, tuple) else (inputs,))
    extra = _format_additional_forward_args(additional_forward_args) or ()
    leaves, spec = tree_flatten(extra)
    tensors = [x.detach().contiguous() for x in (*given, *leaves) if isinstance(x, Tensor)]
    others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return tensors, (isinstance(inputs, tuple), len(given), spec, others)


def _rows(target: Target, batch_size: int, device: torch.device) -> Tensor:
    """The target indices of each sample, (B, I), on a device, without synchronization if possible."""
    if isinstance(target, Tensor) and target.dtype == torch.int64 and target.shape == (batch_size,):
        return target.detach().to(device).view(-1, 1)
    rows = expand_target(target, batch_size)
    if rows is None:
        raise ValueError(
            "Expected `target`, because the program was traced with a target, but got None. Pass a target, "
            "or trace a program for the predicted class, `trace(inputs)`."
        )
    return rows.to(device).contiguous()


def _own(graph: GraphModule) -> None:
    """Replace the parameters of the graph by buffers that share memory with those of the model."""
    for name, parameter in [*graph.named_parameters()]:
        delattr(graph, name)
        graph.register_buffer(name, parameter.detach())


Layout = tuple[torch.Size, torch.dtype, torch.device]


def _layout(x: Tensor) -> Layout:
    return x.shape, x.dtype, x.device


def _described(layouts: Sequence[Layout]) -> str:
    return ", ".join(f"{tuple(shape)} {dtype} {device}" for shape, dtype, device in layouts)
