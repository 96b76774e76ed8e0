"""The Captum attribution class of absLRP."""

from __future__ import annotations

import collections.abc
import re
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from captum._utils.common import _format_additional_forward_args
from captum.attr._utils.attribution import GradientAttribution
from captum.attr._utils.lrp_rules import PropagationRule
from captum.log import log_usage
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from captum_abslrp.alignment import Misaligned, check_aligned
from captum_abslrp.calls import on_host
from captum_abslrp.contrast import (
    Contrast,
    Target,
    check_contrast,
    contrast_seed,
    expand_target,
    target_seed,
)
from captum_abslrp.diagnostics import Watch
from captum_abslrp.interception import Interception, UnsupportedCallError
from captum_abslrp.mappings import Mapping, get_mapping
from captum_abslrp.memory import fitting, is_out_of_memory
from captum_abslrp.propagation import TOTAL, propagate
from captum_abslrp.steps import is_answered

__all__ = ["AbsLRP"]

Forward = Callable[
    [Sequence[Tensor], tuple[Any, ...], Watch | None], tuple[Tensor, Sequence[Tensor]]
]
"""From inputs, further arguments and who looks at the calls, to the output and the tensors that relevance is
asked for."""


class AbsLRP(GradientAttribution):
    r"""Relative absolute magnitude layer-wise relevance propagation (absLRP).

    Relevance starts at the target's output and goes back call by call: each call hands it to those
    of its inputs that contributed positively, in proportion, relative to the magnitude of its net
    output. What speaks for the other classes as well is taken out by the contrast:
    :math:`R(\text{target}) - R(\text{contrast})`.

    Source: Vukadin, Afrić, Šilić, Delač, *Advancing Attribution-Based Neural Network Explainability
    through Relative Absolute Magnitude Layer-Wise Relevance Propagation and Multi-Component
    Evaluation*, ACM TIST 15(3), 2024.

    The model is never changed: no hooks, no weights, no flags.

    Args:
        model: the model, in evaluation mode. A compiled one and one in ``nn.DataParallel`` or
            ``DistributedDataParallel`` is explained as the module inside, on the device of its weights.
        mapping: which rule answers which call: a :class:`~captum_abslrp.mappings.Mapping`, the name of
            a registered one, or None to choose it from the class of the model (``"generic"`` where
            the class is not registered). A rule set on a module, ``module.rule``, wins.
        normalization: ``"separate"`` scales the relevance of each input of a call to the same total
            on its own (as published); ``"joint"`` scales all inputs of a call together to what
            arrived at its output, which conserves relevance.
        output: picks the tensor to explain from what the model returns, for example
            ``lambda out: out[0]``. None takes the tensor that is returned, or the ``logits`` or
            ``logits_per_image`` of an object or dict (such as Hugging Face's ``ModelOutput``).

    Raises:
        TypeError: if ``model`` is no module, if it or a part of it is scripted or quantised, if the
            attribute ``rule`` of a part of it is a string or a class, which looks like a rule and is
            none, or if another argument is not of a type that is listed here.
        ValueError: if the mapping or the normalization is unknown.

    Example:
        >>> model = timm.create_model("test_vit").eval()
        >>> x = torch.rand(2, 3, 160, 160)
        >>> relevance = AbsLRP(model).attribute(x, target=3)
        >>> relevance.shape
        torch.Size([2, 3, 160, 160])
    """

    def __init__(
        self,
        model: nn.Module,
        mapping: Mapping | str | None = None,
        *,
        normalization: str = "separate",
        output: Callable[[Any], Tensor] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"Expected `model` to be a torch.nn.Module, but got {type(model).__name__}. Rules are "
                f"found for the calls and layers of a module; wrap a function in one."
            )
        if normalization not in ("separate", "joint"):
            raise ValueError(
                f'Expected `normalization` to be "separate" or "joint", but got {normalization!r}.'
            )
        if not (mapping is None or isinstance(mapping, (str, Mapping))):
            raise TypeError(
                f"Expected `mapping` to be a Mapping, the name of one or None, but got "
                f"{type(mapping).__name__}."
            )
        if not (output is None or callable(output)):
            raise TypeError(
                f"Expected `output` to be a function that picks a tensor, such as `lambda out: out[0]`, or "
                f"None, but got {output!r}."
            )
        model = unwrapped(model)
        _check_visible(model)
        check_rules(model)
        super().__init__(model)
        self.model = model
        self.mapping = get_mapping(mapping) if isinstance(mapping, str) else mapping
        self.normalization = normalization
        self.output = output

    @log_usage()  # NoiseTunnel looks for what this decorator leaves on a method
    def attribute(  # type: ignore[override]  # options are keyword-only
        self,
        inputs: Any,
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        contrast: Contrast = "others",
        combine: str = "difference",
        internal_batch_size: int | str | None = None,
        return_convergence_delta: bool = False,
        check_finite: bool = False,
    ) -> Any:
        r"""Attribute the target's output to the elements of the inputs.

        Axes: B samples, K classes.

        Args:
            inputs: floating-point tensor of shape (B, ...), or a tuple of such tensors.
            target: index of the output to explain, in any form that Captum takes: an int or a tensor
                of one element for all samples; a list or 1-d tensor of B ints; for outputs of more
                than two dimensions a tuple, or a list of B tuples. None explains the predicted
                class, or the only output.
            additional_forward_args: what the model is given after the inputs, one argument or a tuple.
            contrast: what the target is held against: ``"others"``, all other classes alike (as
                published); ``"softmax"``, the other classes by their probability; classes in any
                form of ``target``: why this rather than that? None returns the map of the target
                alone. With one output per sample there is nothing to hold it against.
            combine: how the map of the target and that of the contrast make one: ``"difference"`` (as
                published), or ``"gated"``: the target's map where it exceeds the contrast's, and 0
                elsewhere.
            internal_batch_size: how many samples are run at a time, at most; None runs all at once,
                ``"auto"`` as many as fit into half of the free memory, by what one sample keeps.
            return_convergence_delta: whether to return the delta, too.
            check_finite: look at what every call makes, forward and back, which takes time (on a GPU most
                of all). On the host this is done by itself where a map is not finite.

        Returns:
            Relevance shaped like ``inputs``, same dtype and device, without history; its unit is the
            share of the sample's total: the map of one seed adds up to one where no relevance is
            lost. With ``return_convergence_delta`` a pair of it and the delta, of shape (B,): the sum
            of the relevance of all inputs less that of the seeds (1, or 0 for a difference).

        Nothing waits for a GPU: what would have to be looked at there is not checked, unless
        ``check_finite`` asks for it. Targets are best given as ints or on the host.

        Warns:
            UserWarning: if a layer is in training mode, or (on the host) if the maps of target and
                contrast are so alike that their difference is rounding.

        Raises:
            TypeError: if inputs or target are not of a type that is listed here, or the model does
                not return a tensor.
            ValueError: if inputs are not finite (on the host; elsewhere their maps are not either) or
                have no batch dimension, the target does not fit the output, or a lazy layer of the
                model has not run yet.
            IndexError: if the target is out of range.
            FloatingPointError: if a map is not finite (on the host, or with ``check_finite``); the call
                that made the first value that is not is named.
            UnsupportedCallError: if the model makes a call that has no rule; it is named.

        Example:
            >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5)).eval()
            >>> x = torch.rand(2, 3)
            >>> why_2 = AbsLRP(model).attribute(x, target=2)
            >>> why_2_rather_than_0 = AbsLRP(model).attribute(x, target=2, contrast=0)
        """
        chunks = self._explain(
            inputs,
            target,
            additional_forward_args,
            contrast,
            combine,
            internal_batch_size,
            forward=self._to_inputs,
            watch=Watch(finite=True) if check_finite else None,
        )
        relevances = tuple(torch.cat(parts) for parts in zip(*(r for r, _ in chunks), strict=True))
        attributions = relevances if isinstance(inputs, tuple) else relevances[0]
        if not return_convergence_delta:
            return attributions
        exact = torch.promote_types(relevances[0].dtype, torch.float32)
        arrived = [r.to(exact).reshape(len(r), -1).sum(1) for r in relevances]
        _, started_with = chunks[0]
        return attributions, torch.stack(arrived).sum(0) - started_with

    def has_convergence_delta(self) -> bool:
        return True

    @property
    def multiplies_by_inputs(self) -> bool:
        return True

    def explain_watched(
        self, inputs: Any, target: Target, additional_forward_args: Any, watch: Watch
    ) -> None:
        """Explain the target alone while every call is looked at; arguments as for :meth:`attribute`."""
        self._explain(
            inputs,
            target,
            additional_forward_args,
            None,
            "difference",
            None,
            forward=self._to_inputs,
            watch=watch,
        )

    def _to_inputs(
        self, leaves: Sequence[Tensor], extra: tuple[Any, ...], watch: Watch | None
    ) -> tuple[Tensor, Sequence[Tensor]]:
        return self._forward(leaves, extra, watch), leaves

    def _explain(
        self,
        inputs: Any,
        target: Target,
        additional_forward_args: Any,
        contrast: Contrast,
        combine: str,
        internal_batch_size: int | str | None,
        *,
        forward: Forward,
        watch: Watch | None,
    ) -> list[tuple[list[Tensor], float]]:
        """Results of :meth:`_explain_chunk`, for all samples in turn; arguments are checked."""
        given: tuple[Tensor, ...] = inputs if isinstance(inputs, tuple) else (inputs,)
        batch_size = _check_inputs(given)
        check_contrast(contrast)
        if combine not in ("difference", "gated"):
            raise ValueError(
                f'Expected `combine` to be "difference" or "gated", but got {combine!r}.'
            )
        targets = expand_target(target, batch_size)
        contrasts = (
            contrast
            if contrast is None or isinstance(contrast, str)
            else expand_target(contrast, batch_size, name="contrast")
        )
        extra = _format_additional_forward_args(additional_forward_args) or ()
        extra = tuple(a.detach() if isinstance(a, Tensor) else a for a in extra)
        step = batch_size if internal_batch_size in (None, "auto") else internal_batch_size
        if not isinstance(step, int) or step < 1:
            raise ValueError(
                f"Expected `internal_batch_size` to be an int of at least 1, but got {step!r}. Pass None for "
                f'all samples at once, or "auto" for as many as fit into memory.'
            )
        automatic = internal_batch_size == "auto"
        _check_model(self.model)

        def rows_of(value: Any, rows: slice) -> Any:
            by_sample = isinstance(value, Tensor) and value.dim() and len(value) == batch_size
            return value[rows] if by_sample else value

        def run(step: int) -> list[tuple[list[Tensor], float]]:
            chunks = []
            start = 0
            while start < batch_size:
                part = partial(rows_of, rows=slice(start, start + step))
                leaves, others = tuple(map(part, given)), tuple(map(part, extra))
                try:
                    chunk = self._explain_chunk(
                        leaves, part(targets), others, part(contrasts), combine, forward, watch
                    )
                except Exception as error:  # raised again, unless it says that memory was short
                    if not (automatic and step > 1 and is_out_of_memory(error)):
                        raise
                    step = step // 2
                    continue
                chunks.append(chunk)
                start += step
            return chunks

        if automatic and batch_size > 1:
            one = partial(rows_of, rows=slice(0, 1))
            step = self._fitting(tuple(map(one, given)), tuple(map(one, extra)), batch_size)
        try:
            return run(step)
        except Misaligned:  # samples are not kept apart in the leading dimension somewhere
            try:
                return run(1)
            except RuntimeError as error:
                if isinstance(error, NotImplementedError) or is_out_of_memory(error):
                    raise
                raise ValueError(
                    f"Expected the model to run on one sample at a time, because it mixes samples or moves "
                    f"them out of the leading dimension, but it failed on one: {error}. Where the rows of "
                    f"`inputs` are parts of one whole, as the nodes of a graph are, make them one sample: "
                    f"pass `x.unsqueeze(0)`, to a model that takes it apart again."
                ) from error

    def _fitting(self, inputs: tuple[Tensor, ...], extra: tuple[Any, ...], batch_size: int) -> int:
        """How many samples fit into memory at a time, by the first of them."""
        with torch.inference_mode(False), torch.enable_grad(), unchanged(self.model):
            leaves = [x.clone().detach().requires_grad_() for x in inputs]
            return fitting(self._forward(leaves, extra), batch_size)

    def _explain_chunk(
        self,
        inputs: tuple[Tensor, ...],
        target: Tensor | None,
        extra: tuple[Any, ...],
        contrast: Any,
        combine: str,
        forward: Forward,
        watch: Watch | None,
    ) -> tuple[list[Tensor], float]:
        """Relevance of what is explained, and the sum per sample that it started with, of samples
        that are run together."""
        with torch.inference_mode(False), torch.enable_grad(), unchanged(self.model):
            leaves = [x.clone().detach().requires_grad_() for x in inputs]
            output, explained = forward(leaves, extra, watch)
            values = output.detach()
            seed = target_seed(values, target)
            held_against = contrast_seed(values, seed, contrast)
            seeds = [seed] if held_against is None else [seed, held_against]
            relevances = propagate(output, explained, torch.stack(seeds), positive=True)
            finite = torch.stack([r.isfinite().all() for r in relevances]).all()
            if (on_host(finite) if watch is None else bool(finite)) is False:
                if watch is None or not watch.finite:  # once more, to find the call
                    watch = Watch(finite=True)
                    self._explain_chunk(inputs, target, extra, contrast, combine, forward, watch)
                raise FloatingPointError(
                    "Expected the map to be finite, but got NaN or infinite values, though those of all "
                    "calls are finite. Compute in a wider dtype: `model.float()`, `model.double()`."
                )
            if held_against is None:
                return [r[0] for r in relevances], 1.0
            pairs = [(of_target, of_contrast) for of_target, of_contrast in relevances]
            _warn_of_noise(pairs)
            if combine == "difference":
                return [r - o for r, o in pairs], 0.0
            return [r.where(r > o, 0) for r, o in pairs], 1.0

    def _forward(
        self, leaves: Sequence[Tensor], extra: tuple[Any, ...], watch: Watch | None = None
    ) -> Tensor:
        """Output of the model, (B, ...), with a history whose backward pass is the rules."""
        interception = Interception(
            None if self.mapping is None else self.mapping.rule_of_call,
            batch_size=len(leaves[0]),
            model=self.model,
            joint=self.normalization == "joint",
            total=TOTAL,
            watch=watch,
        )
        output = self.run(leaves, extra, interception)
        for node in unseen_nodes(output):
            raise UnsupportedCallError(
                f"Expected every call of the model to have a rule, but got `{node}` from code whose "
                f"calls cannot be seen: a scripted part, `torch.vmap`, checkpointing with "
                f"`use_reentrant=True` or another thread. Write it as plain calls, or register its layer "
                f"as one call: `captum_abslrp.register_call_rule(Layer, captum_abslrp.rules.TwinRule())`."
            )
        return output

    def run(
        self, leaves: Sequence[Tensor], extra: tuple[Any, ...], interception: Interception
    ) -> Tensor:
        """Output of the model, (B, ...), as it depends on the leaves under an interception."""
        batch_size = len(leaves[0])
        # Clones, because a leaf cannot be changed in place, which the model may do.
        given = [leaf.clone() for leaf in leaves]
        with _eager(self.model), interception:
            try:
                output = self.model(*given, *extra)
            except Exception as error:  # raised again, explained where it can be
                _explain_missing_batch_dimension(self.model, leaves[0], error)
                raise
            output = _logits(output) if self.output is None else self.output(output)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"Expected the model to return a tensor, but got {type(output).__name__}. Pick one with "
                f"`AbsLRP(model, output=lambda out: ...)`, for example `out.logits` or `out[0]`."
            )
        if batch_size == 1 and _is_squeezed(output):
            output = output.unsqueeze(0)
        if output.dim() == 0 or len(output) != batch_size:
            raise ValueError(
                f"Expected the model to return one row per sample ({batch_size}), but got shape "
                f"{tuple(output.shape)}. Does `inputs` have a batch dimension? Add it with "
                f"`x.unsqueeze(0)`."
            )
        if not output.requires_grad:
            raise ValueError(
                "Expected the output of the model to depend on `inputs`, but got one that does not: "
                "the model detaches it, or runs under `torch.no_grad()` inside."
            )
        check_aligned(output, batch_size)
        return output


def _is_squeezed(output: Tensor) -> bool:
    """Whether the output for one sample has lost its leading dimension to a call that moves elements
    (``squeeze()``), rather than to a sum over the samples."""
    if output.dim() and len(output) == 1:
        return False
    node = output.grad_fn
    while node is not None:
        after = [(following, n) for following, n in node.next_functions if following is not None]
        if not after:
            return False
        following, number = after[0]
        if list(following._input_metadata[number].shape[:1]) == [1]:
            return not is_answered(node)
        node = following
    return False


def _warn_of_noise(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Warn where the maps of target and contrast are so alike that rounding is left of their difference."""
    exact = torch.promote_types(pairs[0][0].dtype, torch.float32)
    apart: Any = sum((r - o).abs().sum(dtype=exact) for r, o in pairs)
    total = sum(r.abs().sum(dtype=exact) + o.abs().sum(dtype=exact) for r, o in pairs)
    if apart.device.type != "cpu":  # it would have to be waited for
        return
    share = float((apart / total).numpy())
    if 0 < share < 100 * torch.finfo(exact).eps:
        better = (
            "" if exact == torch.float64 else " Compute in float64: `model.double()`, `x.double()`."
        )
        warnings.warn(
            f"The maps of target and contrast differ by {share:.0e} of their total only, which {exact} "
            f"can hardly tell from rounding.{better} Or look at the map of the target alone, "
            f"`contrast=None`.",
            stacklevel=7,
        )


def _logits(output: Any) -> Any:
    """What a model returned, or the logits in it."""
    if isinstance(output, Tensor):
        return output
    is_mapping = isinstance(output, collections.abc.Mapping)
    for name in ("logits", "logits_per_image"):
        value = output.get(name) if is_mapping else getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    return output


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of wrappers that compute the same."""
    while True:
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif "_orig_mod" in module._modules:  # made by `torch.compile`
            module = module.get_submodule("_orig_mod")
        else:
            return module


class _Shared:
    """A context that holds for the whole process, shared by the passes that need it at a time.

    The first of them enters it, the last one leaves it, in whatever thread.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._users = 0
        self._context: AbstractContextManager[Any] = nullcontext()

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._context = self._make()
                self._context.__enter__()
            self._users += 1

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._context.__exit__(None, None, None)


def _force_eager() -> AbstractContextManager[Any]:
    return torch.compiler.set_stance("force_eager")


@contextmanager
def _ignore_hook_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Using `torch.compile.module.` when there are global hooks"
        )
        yield


_EAGER = _Shared(_force_eager)
_NO_HOOK_WARNING = _Shared(_ignore_hook_warning)


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Run compiled modules and functions as the code that they were made from."""
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled
            stack.enter_context(_EAGER)
        if any("_orig_mod" in module._modules for module in model.modules()):
            stack.enter_context(_NO_HOOK_WARNING)
        yield


def _check_visible(model: nn.Module) -> None:
    """Raise where a part of the model computes by calls that cannot be seen."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            kind, remedy = "scripted", "the module that it was scripted or traced from"
        elif _is_quantised(type(module)):
            kind, remedy = "quantised", "the float model, as it was before it was quantised"
        else:
            continue
        where = f"`{path}` of `model`" if path else "`model`"
        cls = f"{type(module).__module__}.{type(module).__qualname__}"
        raise TypeError(
            f"Expected {where} to be a plain module, but got a {kind} one ({cls}), whose calls cannot "
            f"be seen. Pass {remedy}."
        )


def _is_quantised(cls: type[nn.Module]) -> bool:
    """Whether a class is one of PyTorch's quantised layers (``FloatFunctional`` computes in float)."""
    home = cls.__module__.split(".")
    return home[0] == "torch" and "quantized" in home and "FloatFunctional" not in cls.__name__


def _check_inputs(inputs: tuple[Any, ...]) -> int:
    """The batch size; raises where inputs cannot be explained."""
    if not inputs:
        raise ValueError("Expected `inputs` to hold at least one tensor, but got an empty tuple.")
    for x in inputs:
        if not isinstance(x, Tensor):
            raise TypeError(
                f"Expected `inputs` to be a tensor or a tuple of tensors, but got {type(x).__name__}."
            )
        if x.is_meta or x.layout != torch.strided:
            kind = "a tensor without values (meta)" if x.is_meta else f"{x.layout}"
            raise TypeError(
                f"Expected `inputs` to be dense tensors with values, but got {kind}. Convert it first, "
                f"`x.to_dense()`; without values `inspect_rules` tells which rules a model gets."
            )
        if not x.is_floating_point():
            raise TypeError(
                f"Expected `inputs` to be of a floating-point dtype, but got {x.dtype}. Convert images "
                f"with the model's own preprocessing; explain the embeddings of token indices."
            )
        if x.dim() == 0 or len(x) == 0:
            raise ValueError(
                f"Expected `inputs` to have a batch dimension with at least one sample, but got shape "
                f"{tuple(x.shape)}."
            )
        if on_host(x.detach().isfinite().all()) is False:
            raise ValueError("Expected `inputs` to be finite, but got NaN or infinite values.")
        if len(x) != len(inputs[0]):
            raise ValueError(
                f"Expected all `inputs` to have the same number of samples, but got "
                f"{[len(i) for i in inputs]}."
            )
    return len(inputs[0])


def _explain_missing_batch_dimension(model: nn.Module, x: Tensor, error: Exception) -> None:
    """Raise a clear error where a model of images failed on something that looks like one image."""
    if isinstance(error, (Misaligned, UnsupportedCallError)):
        return
    takes_images = any(isinstance(m, nn.Conv2d) for m in model.modules())
    if x.dim() == 1 or (x.dim() == 3 and takes_images):
        raise ValueError(
            f"Expected `inputs` to have a batch dimension, (B, ...), but got samples of shape "
            f"{tuple(x.shape[1:])}, on which the model failed. Add the batch dimension to `inputs`: "
            f"`x.unsqueeze(0)`."
        ) from error


def _check_model(model: nn.Module) -> None:
    """Raise where a rule is none or a layer has no weights yet; warn about layers in training mode."""
    check_rules(model)
    check_initialized(model)
    training = ""
    for name, module in model.named_modules():
        if module.training and not training and _differs_in_training(module):
            training = f"`{name}` ({type(module).__name__})"
    if training:
        warnings.warn(
            f"Expected the model to be in evaluation mode, but {training} is in training mode: results "
            f"differ from call to call or between batches. Call `model.eval()` first.",
            stacklevel=5,
        )


def check_rules(model: nn.Module) -> None:
    """Raise where an attribute `rule` of a module looks like a rule and is none.

    What else a model has under this name (a number, a tensor, a module, an attribute of a class) is its own.
    """
    for name, module in model.named_modules():
        rule = getattr(module, "rule", None)
        own = vars(module).get("rule")
        if isinstance(own, (str, type)) or (
            isinstance(rule, type) and issubclass(rule, PropagationRule)
        ):
            raise TypeError(
                f"Expected `rule` of `{name}` to be an instance of a "
                f"PropagationRule, such as `AbsLRPRule()`, but got {rule!r}. If a rule is meant, set an "
                f"instance of its class. If the attribute is the model's own, keep it on the class, "
                f'`type(layer).rule = layer.__dict__.pop("rule")`, or give it another name.'
            )


def check_initialized(model: nn.Module) -> None:
    """Raise where a lazy layer has not run yet, so that it has no weights."""
    for name, module in model.named_modules():
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if any(map(is_lazy, own)):
            raise ValueError(
                f"Expected every layer of the model to have its weights, but got a lazy one that has not "
                f"run yet, `{name}` ({type(module).__name__}). Run the model once: `model(x)`."
            )


def _differs_in_training(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return module.dropout > 0
    known = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)
    return isinstance(module, known) or type(module).__name__.startswith("Drop")


class _Snapshot:
    """What a model holds, to be put back."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self.tables = [t for m in modules for t in (m.__dict__, m._buffers, m._parameters)]
        self.entries = [dict(table) for table in self.tables]
        self.buffers = [
            (buffer, buffer.clone(), buffer._version, module.training)
            for module in modules
            for buffer in module.buffers(recurse=False)
            if not buffer.is_inference()
        ]
        self.users = 0

    def put_back(self) -> None:
        for table, before in zip(self.tables, self.entries, strict=True):
            # Entry by entry: another thread may be looking.
            for key in [key for key in table if key not in before]:
                del table[key]
            for key, value in before.items():
                if key not in table or table[key] is not value:
                    table[key] = value
            if list(table) != list(before):  # in the order that state dicts have
                table.clear()
                table.update(before)
        with torch.no_grad():
            for buffer, value, version, training in self.buffers:
                # Batch norm updates its statistics without telling the version.
                if training or buffer._version != version:
                    buffer.copy_(value)


_SNAPSHOTS: weakref.WeakKeyDictionary[nn.Module, _Snapshot] = weakref.WeakKeyDictionary()
_SNAPSHOTS_LOCK = threading.Lock()


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put back what a model changes of itself as it runs: statistics, counters, stored activations.

    Threads that run one model at a time share what was there before the first of them; the last one puts
    it back.
    """
    with _SNAPSHOTS_LOCK:
        snapshot = _SNAPSHOTS.get(model)
        if snapshot is None:
            snapshot = _SNAPSHOTS[model] = _Snapshot(model)
        snapshot.users += 1
    try:
        yield
    finally:
        with _SNAPSHOTS_LOCK:
            snapshot.users -= 1
            if snapshot.users == 0:
                del _SNAPSHOTS[model]
                snapshot.put_back()


_MOVING_NODES = re.compile(
    r"(AccumulateGrad|Alias|AsStrided|BlockDiag|Broadcast\w*|Cat|Clone|Copy|CopyBackwards|CopySlices|DiagEmbed|Diagonal\w*|"
    r"Expand|Fill|Flip|Gather|Im2Col|Index|IndexCopy|IndexPut|IndexSelect|Kthvalue|MaskedFill|"
    r"MaskedScatter|MaskedSelect|Median\w*|Mode|\w*PadNd?|(Constant|Reflection|Replication)Pad\w*|"
    r"Permute|PixelShuffle|PixelUnshuffle|Put|Repeat|Reshape\w*|Roll|Rot90|Scatter|Select\w*|Slice\w*|"
    r"Sort|Split|SplitWithSizes|Squeeze|Stack|SwapAxes|T|Take|TakeAlongDim|ToCopy|Topk|Transpose|Tril|"
    r"Triu|Unbind|Unfold|UnsafeSplit\w*|UnsafeView|Unsqueeze|View|ViewAsReal|Where|Zero|"
    r"ChannelShuffle|NativeChannelShuffle)(Backward[A-Za-z]*\d*)?"
)
"""Nodes that autograd makes for calls that move elements."""


def unseen_nodes(output: Tensor) -> Iterator[str]:
    """Names of the nodes of a history that neither a rule nor a call that moves elements has made."""
    seen = set()
    stack = [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = type(node).__name__
        if not (is_answered(node) or _MOVING_NODES.fullmatch(name)):
            yield name
        stack.extend(fn for fn, _ in node.next_functions)
