"""The forward pass in which every call meets its rule.

The model is never changed. Its forward pass runs under a ``TorchFunctionMode``: each call on a tensor
that carries relevance (``F.linear``, ``+``, ``@``, ``softmax``, an in-place ReLU ...) is answered by a
node of the autograd graph whose forward is the call itself and whose backward is the rule. Autograd
then does the bookkeeping: relevance of a tensor that is used twice adds up, views and slices route it.

A call has one of three fates:

1. it has a rule: the rule answers it;
2. it only moves elements (reshape, slice, cat, ...): it runs as it is, and the gradient that autograd
   defines for it moves the relevance with its element;
3. anything else whose result depends on a tensor that carries relevance is an error that names it.

Calls on tensors that carry no relevance (weights, position tables, masks) run untouched.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode, resolve_name

from captum_abslrp import functional

if TYPE_CHECKING:
    from captum.attr._utils.lrp_rules import PropagationRule

    from captum_abslrp.mappings import Mapping
    from captum_abslrp.rules import Rule

__all__ = ["PASS_THROUGH", "Answer", "Call", "Interception", "UnsupportedCallError"]

PASS_THROUGH = frozenset(
    """
    __getitem__ __setitem__ alias as_strided atleast_1d atleast_2d atleast_3d broadcast_tensors
    broadcast_to cat channel_shuffle chunk clone column_stack concat concatenate contiguous copy
    diagonal double dstack dsplit expand expand_as flatten flip fliplr flipud float gather half
    hsplit hstack index_select masked_fill meshgrid moveaxis movedim narrow native_channel_shuffle numpy_T pad
    permute pixel_shuffle pixel_unshuffle ravel repeat repeat_interleave reshape reshape_as roll
    rot90 select split split_with_sizes squeeze stack swapaxes swapdims t take_along_dim
    tensor_split tile to transpose tril triu type type_as unbind unflatten unfold unsqueeze unsafe_chunk
    unsafe_split view view_as vsplit vstack where bfloat16 T mT H mH real
    """.split()
)
"""Calls that only move, copy or cast elements: relevance moves with its element."""

CONSTANT = frozenset(
    """
    size dim numel nelement ndimension stride storage_offset element_size get_device is_contiguous
    is_floating_point is_complex is_same_size detach item tolist numpy argmax argmin argsort eq ne
    lt le gt ge isnan isinf isfinite isneginf isposinf all any sign new_zeros new_ones new_empty
    new_full new_tensor zeros_like ones_like empty_like full_like rand_like randn_like equal allclose
    data_ptr untyped_storage backward register_hook retain_grad has_names names requires_grad_
    """.split()
)
"""Calls whose result carries no relevance."""

Propagate = Callable[[Tensor], Sequence[Tensor]]
"""From the relevance of the output to that of each source, before it is scaled."""


class UnsupportedCallError(NotImplementedError):
    """A call of the model has no rule. The message names the call, where it is and the remedy."""


class Answer(NamedTuple):
    """What a rule makes of a call."""

    output: Tensor
    """The result of the call, without history."""
    sources: Sequence[Tensor]
    """The inputs of the call that receive relevance."""
    propagate: Propagate
    """Hands relevance of the output to the sources; may be called once per seed."""
    scaled: bool = True
    """Whether the relevance of each sample is scaled afterwards (pass-through calls: no)."""


class Kept:
    """A tensor kept for the backward pass. A call that is about to change it in place has it cloned
    first (see :meth:`Interception.keep`), so that it always is what the call has seen."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __call__(self) -> Tensor:
        """The tensor, in float32 where it is of half precision."""
        return in_full_precision(self.tensor)


@dataclass
class Call:
    """One call of the forward pass.

    Attributes:
        name: canonical name: no module, no dunder, no trailing underscore (``"add"`` for
            ``torch.add``, ``+``, ``+=`` and ``Tensor.add_``).
        func: the function that was called, as ``torch.overrides`` hands it over.
        args, kwargs: its arguments, in the order of the out-of-place function.
        module: the innermost module whose forward pass makes the call.
        path: where this module is in the model, for example ``"blocks.0.attn.proj"``.
        local_path: where it is in the part of the model that the mapping was found for.
        interception: the forward pass that the call belongs to.
    """

    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    module: nn.Module | None
    path: str
    local_path: str
    interception: Interception

    def keep(self, tensor: Tensor) -> Kept:
        """Keep a tensor for the backward pass."""
        return self.interception.keep(tensor)

    def run(self, compute: Callable[[], Tensor]) -> Tensor:
        """The output of the call: computed, unless it is known already."""
        known = self.interception.result
        return compute() if known is None else known.detach()

    def __str__(self) -> str:
        where = f"`{self.path}`" if self.path else "the model itself"
        kind = f" ({type(self.module).__name__})" if self.module is not None else ""
        return f"`{resolve_name(self.func) or self.name}` in {where}{kind}"


class Interception(TorchFunctionMode):
    """Context in which the calls of one forward pass are answered by their rules.

    Args:
        find_rule: finds the rule of a call; None asks the mapping of the innermost enclosing module
            of a registered architecture.
        batch_size: number of samples B; the leading dimension of the inputs.
        model: the model, for the paths of its modules.
        joint: scale the relevance of the inputs of one call together.
        total: sum of relevance of each sample after a call, where each input is scaled on its own.
        result: answer for the one call of a module whose output is known already.
    """

    def __init__(
        self,
        find_rule: Callable[[Call], Rule | None] | None,
        *,
        batch_size: int,
        model: nn.Module | None = None,
        joint: bool = False,
        total: float = 1.0,
        result: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.find_rule = find_rule
        self.batch_size = batch_size
        self.joint = joint
        self.total = total
        self.result = result
        self._modules = _ModuleStack(self, model)
        self._kept: dict[int, list[Kept]] = {}

    def __enter__(self) -> Interception:
        self._modules.start()
        try:
            super().__enter__()
        except BaseException:
            self._modules.stop()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        self._modules.stop()
        self._kept.clear()
        super().__exit__(exc_type, exc_val, exc_tb)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name, in_place, reflected = _canonical_name(func)
        if in_place or kwargs.get("out") is not None or _in_place_argument(func, args, kwargs):
            return self._in_place(name, func, args, kwargs)
        if not any(map(carries_relevance, _tensors((args, kwargs)))):
            return _untracked(func, args, kwargs)
        if reflected:
            args = args[::-1]
        return self._answer(name, func, args, kwargs)

    def _answer(
        self,
        name: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        is_property = getattr(func, "__name__", "") == "__get__"
        moves = name in PASS_THROUGH
        if moves or is_property or name in CONSTANT or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        module, path, local_path = self._modules.innermost
        call = Call(name, func, args, kwargs, module, path, local_path, self)
        rule = self.rule_of(call)
        if rule is None:
            output = func(*args, **kwargs)
            if any(t.requires_grad for t in _tensors(output)):
                raise UnsupportedCallError(
                    f"Expected every call on the way from the input to the output to have a rule, "
                    f"but got {call}, which has none. Give one to the mapping, `AbsLRP(model, "
                    f'mapping=get_mapping().extended({{"{name}": rule}}))`, or to the module, '
                    f"`module.rule = rule`; `captum_abslrp.rules.TwinRule()` suits every "
                    f"differentiable call."
                )
            return output
        with torch.no_grad():
            answer = rule.answer(call)
        return self.attach(answer)

    def rule_of(self, call: Call) -> Rule | None:
        """The rule of a call: of its module, if the user set one there, or of the mapping."""
        from captum_abslrp.rules import Rule

        own = getattr(call.module, "rule", None)
        if isinstance(own, Rule):
            return own
        find_rule = self.find_rule or self._modules.mapping.rule_of_call
        return find_rule(call)

    def composite(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a function of ours under this mode, so that the calls it is made of are answered."""
        with torch.enable_grad(), _Reentered(self):
            return func(*args, **kwargs)

    def attach(self, answer: Answer | Any) -> Any:
        """Give the output of a call the history that its rule asks for."""
        if not isinstance(answer, Answer):
            return answer
        output = answer.output
        if any(_storage(output) == _storage(s) for s in answer.sources):
            output = output.clone()

        # The closure must not hold the output, whose history it becomes: memory would be freed late.
        rule, scaled = answer.propagate, answer.scaled
        shapes = [(s.shape, s.dtype) for s in answer.sources]

        def propagate(relevance: Tensor) -> list[Tensor]:
            relevance = in_full_precision(relevance)
            relevances = rule(relevance)
            if scaled:
                relevances = self.normalize(relevance, relevances)
            return [
                r.reshape(shape).to(dtype)
                for r, (shape, dtype) in zip(relevances, shapes, strict=True)
            ]

        return _Node.apply(propagate, [output], *answer.sources)

    def normalize(self, relevance: Tensor, relevances: Sequence[Tensor]) -> list[Tensor]:
        """Scale what a call hands to its inputs: each to the total, or all to what arrived."""
        rows = [self._by_sample(r) for r in relevances]
        totals: Tensor | float = self.total
        if self.joint:
            totals = self._by_sample(relevance).abs().sum(1)
        scaled = functional.normalize(rows, totals=totals, joint=self.joint)
        return [r.reshape(like.shape) for r, like in zip(scaled, relevances, strict=True)]

    def _by_sample(self, tensor: Tensor) -> Tensor:
        """View of shape (B, -1). A leading dimension of k B holds k parts of every sample."""
        if self.batch_size == 1 or (tensor.dim() and tensor.shape[0] % self.batch_size == 0):
            return tensor.reshape(self.batch_size, -1)
        raise UnsupportedCallError(
            f"Expected the first dimension of every intermediate result to be a multiple of the "
            f"batch size {self.batch_size}, but got shape {tuple(tensor.shape)}. Explain one "
            f"sample at a time (`internal_batch_size=1`)."
        )

    def keep(self, tensor: Tensor) -> Kept:
        """Keep a tensor for the backward pass without a copy, unless it is changed in place later."""
        tensor = tensor.detach()
        cells = self._kept.setdefault(_storage(tensor), [])
        for cell in cells:
            if _same_view(cell.tensor, tensor):
                return cell
        cells.append(Kept(tensor))
        return cells[-1]

    def _in_place(
        self,
        name: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """An in-place call: the out-of-place call, answered as ever, and a copy into the target."""
        target = kwargs.get("out")
        if target is None:
            target = args[0] if args else kwargs["input"]
        if not isinstance(target, Tensor):
            return _untracked(func, args, kwargs)
        if not any(map(carries_relevance, _tensors((args, kwargs)))):
            self._release(target)
            return _untracked(func, args, kwargs)
        if name in _IN_PLACE_PASS_THROUGH:
            self._release(target)
            return func(*args, **kwargs)
        func, args, kwargs = _out_of_place(name, func, args, kwargs)
        result = self._answer(name, func, args, kwargs)
        self._release(target)
        target.copy_(result)
        return target

    def _release(self, target: Tensor) -> None:
        """Clone what is kept of a tensor that is about to change."""
        for cell in self._kept.pop(_storage(target), []):
            cell.tensor = cell.tensor.clone()


_IN_PLACE_PASS_THROUGH = frozenset(
    "__setitem__ copy squeeze unsqueeze transpose t swapaxes swapdims zero fill masked_fill "
    "index_copy detach requires_grad".split()
)


class _Node(torch.autograd.Function):
    """The node of the autograd graph whose backward is a rule."""

    @staticmethod
    def forward(ctx: Any, propagate: Propagate, output: list[Tensor], *sources: Tensor) -> Tensor:
        ctx.propagate = propagate
        ctx.set_materialize_grads(False)
        # Handed over in a list: autograd takes a tensor that is an argument and is returned for a
        # view of it, which later in-place calls of the model could then not change.
        return output[0]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (relevance,) = grad_outputs
        if relevance is None:
            return (None,) * len(ctx.needs_input_grad)
        with torch.autocast(relevance.device.type, enabled=False):
            return (None, None, *ctx.propagate(relevance))


class _Reentered:
    """Context that turns an interception on again inside the call that it is answering."""

    def __init__(self, mode: Interception) -> None:
        self._mode = mode

    def __enter__(self) -> None:
        TorchFunctionMode.__enter__(self._mode)

    def __exit__(self, *exc: Any) -> None:
        TorchFunctionMode.__exit__(self._mode, *exc)


class _ModuleStack:
    """Which module of the model is running, in this thread.

    PyTorch's process-wide module hooks report it while the forward pass runs; the model itself gets
    no hook, and calls of other threads are let through. A module with a rule that is not one of
    ours (Captum's ``EpsilonRule``, say) is answered here as one call.
    """

    def __init__(self, interception: Interception, model: nn.Module | None) -> None:
        self._interception = interception
        self._paths = {m: name for name, m in model.named_modules()} if model is not None else {}
        self._stack: list[tuple[nn.Module, Mapping | None, tuple[Any, ...] | None]] = []
        self._handles: list[Any] = []
        self._thread = -1

    def start(self) -> None:
        self._thread = threading.get_ident()
        self._handles = [
            register_module_forward_pre_hook(self._enter),  # type: ignore[arg-type]  # may return
            register_module_forward_hook(self._leave, always_call=True),
        ]

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stack.clear()

    @property
    def innermost(self) -> tuple[nn.Module | None, str, str]:
        """The running module, its path, and its path from the module that the mapping is for."""
        if not self._stack:
            return None, "", ""
        module = self._stack[-1][0]
        path = self._paths.get(module, type(module).__name__)
        roots = [self._paths.get(m, "") for m, mapping, _ in self._stack if mapping is not None]
        root = roots[-1] if roots else ""
        return module, path, path[len(root) :].lstrip(".") if path.startswith(root) else path

    @property
    def mapping(self) -> Mapping:
        """The mapping of the innermost running module of a registered architecture."""
        from captum_abslrp.mappings import get_mapping

        found = (mapping for _, mapping, _ in reversed(self._stack) if mapping is not None)
        return next(found, None) or get_mapping("generic")

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        from captum_abslrp.mappings import find_mapping

        if threading.get_ident() != self._thread:
            return None
        mapping = find_mapping(module) if self._interception.find_rule is None else None
        foreign = self._foreign_rule(module) is not None
        with torch._C.DisableTorchFunction():  # the hooks run under the mode
            foreign = foreign and any(map(carries_relevance, _tensors(args)))
            self._stack.append((module, mapping, args if foreign else None))
            if not foreign:
                return None
            return tuple(a.detach() if isinstance(a, Tensor) else a for a in args)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if threading.get_ident() != self._thread or not self._stack:
            return None
        _, _, sources = self._stack.pop()
        rule = self._foreign_rule(module)
        if sources is None or rule is None or not isinstance(output, Tensor):
            return None
        from captum_abslrp.rules import answer_by_captum_rule

        with torch._C.DisableTorchFunction():
            return self._interception.attach(answer_by_captum_rule(rule, module, sources, output))

    def _foreign_rule(self, module: nn.Module) -> PropagationRule | None:
        from captum.attr._utils.lrp_rules import PropagationRule

        from captum_abslrp.rules import Rule

        own = getattr(module, "rule", None)
        return own if isinstance(own, PropagationRule) and not isinstance(own, Rule) else None


def carries_relevance(tensor: Tensor) -> bool:
    """Whether a tensor depends on the inputs that are explained.

    Under an :class:`Interception` every other call runs without history, so a tensor that has one
    and is no leaf (a parameter) comes from the inputs.
    """
    return tensor.requires_grad and not tensor.is_leaf


def in_full_precision(tensor: Tensor) -> Tensor:
    """The tensor, in float32 where it is of half precision: ``EPS`` is zero there."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _untracked(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a call that carries no relevance; parameters leave no history on its result."""
    if not any(t.requires_grad for t in _tensors((args, kwargs))):
        return func(*args, **kwargs)
    with torch.no_grad():
        return func(*args, **kwargs)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _same_view(a: Tensor, b: Tensor) -> bool:
    layout_a = (a.shape, a.dtype, a.stride(), a.storage_offset())
    return layout_a == (b.shape, b.dtype, b.stride(), b.storage_offset())


@functools.lru_cache(maxsize=4096)
def _canonical_name(func: Callable[..., Any]) -> tuple[str, bool, bool]:
    """Name without module, dunder and trailing underscore; whether in place; whether reflected."""
    name = getattr(func, "__name__", str(func))
    if name == "__get__":  # a property such as Tensor.T
        return getattr(getattr(func, "__self__", None), "__name__", name), False, False
    if name in ("__getitem__", "__setitem__"):
        return name, name == "__setitem__", False
    if name.startswith("__") and name.endswith("__"):
        bare = name[2:-2]
        if bare.startswith("i") and bare[1:] in _OPERATORS:
            return _OPERATORS[bare[1:]], True, False
        if bare.startswith("r") and bare[1:] in _OPERATORS:
            return _OPERATORS[bare[1:]], False, True
        return _OPERATORS.get(bare, name), False, False
    if name.endswith("_") and not name.startswith("_"):
        return _ALIASES.get(name[:-1], name[:-1]), True, False
    return _ALIASES.get(name, name), False, False


_ALIASES = {
    "absolute": "abs",
    "divide": "div",
    "multiply": "mul",
    "negative": "neg",
    "special_expit": "sigmoid",
    "special_softmax": "softmax",
    "subtract": "sub",
    "true_divide": "div",
}
_OPERATORS = {
    "add": "add",
    "matmul": "matmul",
    "mul": "mul",
    "neg": "neg",
    "pow": "pow",
    "sub": "sub",
    "truediv": "div",
    "div": "div",
}


@functools.lru_cache(maxsize=4096)
def _signature(func: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(func)
    except (TypeError, ValueError):  # built-in functions have none
        return None


def _in_place_argument(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether ``inplace=True`` was given, by name or position."""
    signature = _signature(func)
    if signature is None or "inplace" not in signature.parameters:
        return False
    return bool(signature.bind(*args, **kwargs).arguments.get("inplace", False))


def _out_of_place(
    name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The call that has the same result as an in-place one and leaves its arguments alone."""
    kwargs = {key: value for key, value in kwargs.items() if key != "out"}
    signature = _signature(func)
    if signature is not None and "inplace" in signature.parameters:
        bound = signature.bind(*args, **kwargs)
        bound.arguments["inplace"] = False
        return func, bound.args, bound.kwargs
    for namespace in (torch.Tensor, torch, torch.nn.functional):
        if hasattr(namespace, name):
            return getattr(namespace, name), args, kwargs
    return func, args, kwargs
