"""Calls that are refused, with the remedy in each message."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from captum_abslrp.engine.arguments import instances_in, tensors_in
from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.complex import is_complex
from captum_abslrp.engine.dependence import carries_relevance
from captum_abslrp.engine.errors import UnsupportedCallError
from captum_abslrp.engine.messages import place
from captum_abslrp.engine.modules import Frame
from captum_abslrp.engine.tape import Record

_EVERY_CALL = "Expected every call on the way from the input to the output to"


def refuse_without_rule(call: Call, output: Any, layer: str) -> NoReturn:
    """Refuse a call that has no rule; `layer` is the type of the module that makes it."""
    if is_complex(call):
        raise UnsupportedCallError(
            f"{_EVERY_CALL} have a rule, but got {call} of a complex tensor, which has none. Give it one by "
            f'the mapping, `AbsLRP(model, mapping=get_mapping().extended({{"{call.name}": '
            f"captum_abslrp.rules.TwinRule()}}))`, or by the module, `module.rule = "
            f"captum_abslrp.rules.TwinRule()`; the twin rule suits every differentiable call."
        )
    if any(t.layout != torch.strided for t in instances_in(Tensor, output)):
        refuse_sparse(call, layer)
    raise UnsupportedCallError(
        f"{_EVERY_CALL} have a rule, but got {call}, which has none. Register one: "
        f'`captum_abslrp.register_call_rule("{call.name}", captum_abslrp.rules.TwinRule())`; the twin rule '
        f"suits every differentiable call. For this model alone, give it to the mapping, `AbsLRP(model, "
        f'mapping=get_mapping().extended({{"{call.name}": rule}}))`, or to the module, `module.rule = rule`.'
    )


def check_not_numpy(call: Call) -> None:
    """Refuse a call of NumPy on a tensor that carries relevance."""
    if call.name == "__array__":
        raise UnsupportedCallError(
            f"{_EVERY_CALL} be one of PyTorch, but got one of NumPy in "
            f"{place(call.path, call.module)}. Make a tensor of what it is combined with, "
            f"`torch.as_tensor(array)`, and use the functions of PyTorch."
        )


def refuse_sparse(where: Call | str, layer: str) -> NoReturn:
    """Refuse a call whose result is a sparse tensor that carries relevance."""
    raise UnsupportedCallError(
        f"{_EVERY_CALL} return a dense tensor, but got a sparse or nested one from {where}. Compute with "
        f"dense tensors there, or register the layer around it, from dense tensors to dense ones, as one "
        f"call: `captum_abslrp.register_call_rule({layer}, captum_abslrp.rules.TwinRule())`."
    )


def refuse_unseen(node: Any, frame: Frame) -> NoReturn:
    """Refuse a node of the autograd graph that comes from a call that cannot be seen."""
    layer = "Layer" if frame.module is None else type(frame.module).__name__
    remedy = (
        f"`captum_abslrp.register_call_rule({layer}, "
        f"captum_abslrp.rules.TwinRule())`. A layer that does more should be split first."
    )
    name = node.name().removesuffix("Backward")
    if isinstance(node, BackwardCFunction):
        raise UnsupportedCallError(
            f"{_EVERY_CALL} have a rule, but got the autograd function `{name}` in {frame}, whose inside "
            f"cannot be seen. Register the layer that calls it as one call: {remedy}"
        )
    raise UnsupportedCallError(
        f"{_EVERY_CALL} have a rule, but got `{type(node).__name__}` in {frame}, from code whose calls "
        f"cannot be seen: a scripted part, `torch.vmap`, checkpointing with `use_reentrant=True` or another "
        f"thread. Write it as plain calls, or register its layer as one call: {remedy}"
    )


def refuse_stale(frame: Frame) -> NoReturn:
    """Refuse a tensor whose memory was overwritten through an alias."""
    raise UnsupportedCallError(
        f"Expected a tensor that a call has returned as it was to be left alone afterwards, but got one in "
        f"{frame} that was changed in place by that other name and is used again. Replace the in-place call, "
        f"or clone the tensor before."
    )


def check_untransformed(value: Any, frame: Frame) -> None:
    """Refuse calls on tensors that a transform of ``torch.func`` has wrapped."""
    if torch._C._functorch.maybe_current_level() is None:
        return
    tensors = tensors_in(value)
    wrapped = [t for t in tensors if torch._C._functorch.is_functorch_wrapped_tensor(t)]
    if not wrapped or not any(map(carries_relevance, [*tensors, *map(_unwrapped, wrapped)])):
        return
    raise UnsupportedCallError(
        f"{_EVERY_CALL} have a rule, but got calls under a transform of `torch.func` (`vmap`, `grad`, ...) "
        f"in {frame}, where one call stands for many. Replace `vmap` by a loop. Over the members of an "
        f"ensemble: `torch.stack([functional_call(base, {{name: value[i] for name, value in params.items()}}"
        f", (x,)) for i in range(members)])`. Over samples: call the function with the whole batch."
    )


def _unwrapped(tensor: Tensor) -> Tensor:
    """A tensor as it was before transforms of ``torch.func``."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def check_inputs(record: Any, call: Call) -> None:
    """Refuse a call whose rule passes relevance to a part of its inputs only."""
    records = instances_in(Record, record)
    if not records:
        return
    known = [t for r in records for t in (*r.inputs, *r.constants)]
    for tensor in tensors_in((call.args, call.kwargs)):
        if carries_relevance(tensor) and not any(tensor is t for t in known):
            raise UnsupportedCallError(
                f"Expected only the input of {call} to depend on the explained inputs, but got a weight or "
                f"bias that does, too. Use `TwinRule()` for this call, which passes relevance to all of them."
            )
