"""Errors for unsupported calls; each message names the remedy."""

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
    """Raise for a call without a rule; `layer` is the type of the module that makes it."""
    if is_complex(call):
        raise UnsupportedCallError(
            f"{_EVERY_CALL} have a rule, but got {call} of a complex tensor, which has none. Add a rule to "
            f'the mapping, `AbsLRP(model, mapping=get_mapping().extended({{"{call.name}": '
            f"captum_abslrp.rules.TwinRule()}}))`, or to the module, `module.rule = "
            f"captum_abslrp.rules.TwinRule()`. The twin rule works for every differentiable call."
        )
    if any(t.layout != torch.strided for t in instances_in(Tensor, output)):
        refuse_sparse(call, layer)
    raise UnsupportedCallError(
        f"{_EVERY_CALL} have a rule, but got {call}, which has none. Register a rule: "
        f'`captum_abslrp.register_call_rule("{call.name}", captum_abslrp.rules.TwinRule())`. The twin rule '
        f"works for every differentiable call. For this model only, add it to the mapping, `AbsLRP(model, "
        f'mapping=get_mapping().extended({{"{call.name}": rule}}))`, or to the module, `module.rule = rule`.'
    )


def check_not_numpy(call: Call) -> None:
    """Raise for a NumPy call on a tensor that carries relevance."""
    if call.name == "__array__":
        raise UnsupportedCallError(
            f"{_EVERY_CALL} be a PyTorch call, but got a NumPy call in "
            f"{place(call.path, call.module)}. Convert arrays to tensors, `torch.as_tensor(array)`, and use "
            f"PyTorch functions."
        )


def refuse_sparse(where: Call | str, layer: str) -> NoReturn:
    """Raise for a call whose result is a sparse tensor that carries relevance."""
    raise UnsupportedCallError(
        f"{_EVERY_CALL} return a dense tensor, but got a sparse or nested tensor from {where}. Use dense "
        f"tensors, or register the layer, if its inputs and outputs are dense, as a single call: "
        f"`captum_abslrp.register_call_rule({layer}, captum_abslrp.rules.TwinRule())`."
    )


def refuse_unseen(node: Any, frame: Frame) -> NoReturn:
    """Raise for a node of the autograd graph whose call cannot be intercepted."""
    layer = "Layer" if frame.module is None else type(frame.module).__name__
    remedy = (
        f"`captum_abslrp.register_call_rule({layer}, "
        f"captum_abslrp.rules.TwinRule())`. Split the layer first if it computes more than that."
    )
    name = node.name().removesuffix("Backward")
    if name == "CheckpointFunction":  # the frame is of the next module, or of none
        raise UnsupportedCallError(
            f"{_EVERY_CALL} have a rule, but got the result of `{name}` in {frame}: "
            f"`torch.utils.checkpoint` hides the calls of a part that it runs with `use_reentrant=True`. "
            f"Pass `use_reentrant=False`."
        )
    if isinstance(node, BackwardCFunction):
        raise UnsupportedCallError(
            f"{_EVERY_CALL} have a rule, but got the autograd function `{name}` in {frame}, whose calls "
            f"cannot be intercepted. Register the layer that calls it as a single call: {remedy}"
        )
    raise UnsupportedCallError(
        f"{_EVERY_CALL} have a rule, but got `{type(node).__name__}` in {frame}, from code whose calls "
        f"cannot be intercepted: scripted code, `torch.vmap` or another thread. Replace it by plain calls, "
        f"or register its layer as a single call: {remedy}"
    )


def refuse_stale(frame: Frame) -> NoReturn:
    """Raise for a tensor whose memory was overwritten through an alias."""
    raise UnsupportedCallError(
        f"Expected a tensor that shares memory with the output of a call not to be modified, but got one in "
        f"{frame} that was modified in place through the output and is used again. Replace the in-place "
        f"call, or clone the tensor before."
    )


def check_untransformed(value: Any, frame: Frame) -> None:
    """Raise for calls on tensors that a transform of ``torch.func`` has wrapped."""
    if torch._C._functorch.maybe_current_level() is None:
        return
    tensors = tensors_in(value)
    wrapped = [t for t in tensors if torch._C._functorch.is_functorch_wrapped_tensor(t)]
    if not wrapped or not any(map(carries_relevance, [*tensors, *map(_unwrapped, wrapped)])):
        return
    raise UnsupportedCallError(
        f"{_EVERY_CALL} have a rule, but got calls under a transform of `torch.func` (`vmap`, `grad`, ...) "
        f"in {frame}, which are not supported. Replace `vmap` by a loop. For the members of an ensemble: "
        f"`torch.stack([functional_call(base, {{name: value[i] for name, value in params.items()}}"
        f", (x,)) for i in range(members)])`. For samples: call the function with the whole batch."
    )


def _unwrapped(tensor: Tensor) -> Tensor:
    """The tensor inside the wrappers of ``torch.func``."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def check_inputs(record: Any, call: Call) -> None:
    """Raise for a call whose rule does not pass relevance to all inputs that need it."""
    records = instances_in(Record, record)
    if not records:
        return
    known = [t for r in records for t in (*r.inputs, *r.constants)]
    for tensor in tensors_in((call.args, call.kwargs)):
        if carries_relevance(tensor) and not any(tensor is t for t in known):
            raise UnsupportedCallError(
                f"Expected only the input of {call} to depend on the explained inputs, but got a weight or "
                f"bias that does as well. Use `TwinRule()` for this call, which passes relevance to all of "
                f"them."
            )
