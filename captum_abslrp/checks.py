"""Checks of the model, the inputs and the output.

Axes: B samples.
"""

from __future__ import annotations

import collections.abc
from typing import Any

import torch
from captum.attr._utils.lrp_rules import PropagationRule
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from captum_abslrp.engine.arguments import on_host
from captum_abslrp.engine.dependence import carries_relevance
from captum_abslrp.engine.errors import UnsupportedCallError
from captum_abslrp.engine.messages import warn
from captum_abslrp.engine.nodes import is_recorded
from captum_abslrp.engine.samples import Misaligned, check_aligned
from captum_abslrp.mappings import Mapping

__all__ = [
    "IndependentOutput",
    "check_arguments",
    "check_combine",
    "check_initialized",
    "check_inputs",
    "check_model",
    "check_rules",
    "check_visible",
    "checked_output",
    "chunk_size",
    "differs_in_training",
    "explain_missing_batch_dimension",
    "logits_of",
    "part_of_model",
    "plain",
    "unwrapped",
]


class IndependentOutput(ValueError):
    """The output of a model does not depend on the explained tensors."""


def check_arguments(model: Any, mapping: Any, normalization: Any, output: Any) -> None:
    """Raise if an argument of the constructor of an attribution class is invalid."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"Expected `model` to be a torch.nn.Module, but got {type(model).__name__}. Wrap a function in "
            f"a module."
        )
    if normalization not in ("separate", "joint"):
        raise ValueError(
            f'Expected `normalization` to be "separate" or "joint", but got {normalization!r}.'
        )
    if not (mapping is None or isinstance(mapping, (str, Mapping))):
        raise TypeError(
            f"Expected `mapping` to be a Mapping, the name of a mapping or None, but got "
            f"{type(mapping).__name__}."
        )
    if not (output is None or callable(output)):
        raise TypeError(
            f"Expected `output` to be a function that picks a tensor, such as `lambda out: out[0]`, or "
            f"None, but got {output!r}."
        )


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside wrappers such as ``nn.DataParallel`` or a compiled module."""
    while True:
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif "_orig_mod" in module._modules:  # from `torch.compile`
            module = module.get_submodule("_orig_mod")
        else:
            return module


def check_visible(model: nn.Module) -> None:
    """Raise if a submodule is scripted or quantized, so that its calls cannot be intercepted."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            kind, remedy = "scripted", "the original module, before scripting or tracing"
        elif _is_quantized(type(module)):
            kind, remedy = "quantized", "the float model, before quantization"
        else:
            continue
        where = f"`{path}` of `model`" if path else "`model`"
        cls = f"{type(module).__module__}.{type(module).__qualname__}"
        raise TypeError(
            f"Expected {where} to be a plain module, but got a {kind} module ({cls}), whose calls cannot "
            f"be intercepted. Pass {remedy}."
        )


def _is_quantized(cls: type[nn.Module]) -> bool:
    """Whether a class is one of PyTorch's quantized layers (``FloatFunctional`` computes in float)."""
    home = cls.__module__.split(".")
    return home[0] == "torch" and "quantized" in home and "FloatFunctional" not in cls.__name__


def check_model(model: nn.Module) -> None:
    """Raise for invalid rules and uninitialized lazy layers; warn about layers in training mode."""
    check_rules(model)
    check_initialized(model)
    training = ""
    for name, module in model.named_modules():
        if module.training and not training and differs_in_training(module):
            training = f"`{name}` ({type(module).__name__})"
    if training:
        warn(
            f"Expected the model to be in evaluation mode, but got {training} in training mode, so that "
            f"results vary between calls or batches. Call `model.eval()` first."
        )


def check_evaluation(model: nn.Module) -> None:
    """Raise if a submodule is in training mode, in which it may have random or changing behavior."""
    changing = [name for name, module in model.named_modules() if module.training]
    if changing:
        raise ValueError(
            f"Expected the model to be in evaluation mode for `trace`, because a program is fixed, but got "
            f"modules in training mode, first {changing[0] or 'the model'!r}. Call `model.eval()`."
        )


def check_rules(model: nn.Module) -> None:
    """Raise if the attribute `rule` of a module is a string or a class instead of a rule.

    A number, tensor, module or class attribute of this name is assumed to be part of the model.
    """
    for name, module in model.named_modules():
        rule = getattr(module, "rule", None)
        own = vars(module).get("rule")
        if isinstance(own, (str, type)) or (
            isinstance(rule, type) and issubclass(rule, PropagationRule)
        ):
            raise TypeError(
                f"Expected `rule` of `{name}` to be an instance of a "
                f"PropagationRule, such as `AbsLRPRule()`, but got {rule!r}. To set a rule, use an instance "
                f"of a rule class. If the attribute is part of the model, rename it or turn it into a class "
                f"attribute: `layer.__class__ = type(type(layer).__name__, (type(layer),), "
                f'{{"rule": layer.__dict__.pop("rule")}})`.'
            )


def check_initialized(model: nn.Module) -> None:
    """Raise if a lazy layer is not initialized."""
    for name, module in model.named_modules():
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if any(map(is_lazy, own)):
            raise ValueError(
                f"Expected every layer of the model to be initialized, but got an uninitialized lazy layer, "
                f"`{name}` ({type(module).__name__}). Run the model once: `model(x)`."
            )


def differs_in_training(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return module.dropout > 0
    known = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)
    return isinstance(module, known) or type(module).__name__.startswith("Drop")


def plain(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Convert tensor subclasses in the inputs to plain tensors."""
    with torch._C.DisableTorchFunctionSubclass():  # subclasses may override the calls below
        for x in inputs:
            if isinstance(x, Tensor) and (x.is_nested or _has_no_memory(x)):
                raise TypeError(
                    f"Expected `inputs` to be dense tensors, but got {type(x).__name__}"
                    f"{' (nested)' if x.is_nested else ''}, which stores its values in other tensors. "
                    f"Pass a plain tensor, for example `x.to_padded_tensor(0.0)` for a nested tensor, "
                    f"`x.full_tensor()` for a distributed one or `x.get_data()` for a masked one."
                )
        return tuple(
            x.as_subclass(Tensor) if isinstance(x, Tensor) and x.layout == torch.strided else x
            for x in inputs
        )


def _has_no_memory(x: Tensor) -> bool:
    """Whether a tensor is a wrapper around other tensors, which implements every operator itself."""
    own: Any = type(x).__torch_dispatch__
    return own is not torch._C._disabled_torch_dispatch_impl and type(x) is not Tensor


def check_inputs(inputs: tuple[Any, ...], model: nn.Module | None) -> int:
    """Check the inputs and return the batch size; with `model`, integer inputs are an error."""
    if not inputs:
        raise ValueError("Expected `inputs` to have at least one tensor, but got an empty tuple.")
    for x in inputs:
        if not isinstance(x, Tensor):
            raise TypeError(
                f"Expected `inputs` to be a tensor or a tuple of tensors, but got {type(x).__name__}."
            )
        if x.is_meta or x.layout != torch.strided:
            kind = "a tensor without values (meta)" if x.is_meta else f"{x.layout}"
            raise TypeError(
                f"Expected `inputs` to be dense tensors with values, but got {kind}. Convert a sparse tensor "
                f"with `x.to_dense()`. To list the rules of a model without values, use `inspect_rules`."
            )
        if x.is_complex():
            raise TypeError(
                f"Expected `inputs` to have a real floating-point dtype, but got {x.dtype}. Explain the "
                f"real and imaginary parts: pass `torch.view_as_real(x)` to a module that applies "
                f"`torch.view_as_complex` and calls the model."
            )
        if model is not None and not x.is_floating_point():
            raise TypeError(
                f"Expected `inputs` to have a floating-point dtype, but got {x.dtype}. Convert images "
                f"with the preprocessing of the model. {_EXPLAIN_TOKENS.format(_embedding_of(model))}"
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


_EXPLAIN_TOKENS = (
    "For token indices, explain the embeddings: "
    "`LayerAbsLRP(model, model{}).attribute(token_ids, target)`."
)


def _embedding_of(model: nn.Module | None) -> str:
    """Code that accesses an embedding of a model, to follow the name of the model."""
    modules = model.named_modules() if model is not None else ()
    paths = [path for path, m in modules if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    if paths == [""]:
        return ""
    return f'.get_submodule("{paths[0]}")' if paths else ".embedding"


def explain_missing_batch_dimension(model: nn.Module, x: Tensor, error: Exception) -> None:
    """Raise a clearer error if an image model failed on inputs that look like a single image."""
    if isinstance(error, (Misaligned, UnsupportedCallError)):
        return
    takes_images = any(isinstance(m, nn.Conv2d) for m in model.modules())
    if x.dim() == 1 or (x.dim() == 3 and takes_images):
        raise ValueError(
            f"Expected `inputs` to have a batch dimension, (B, ...), but got samples of shape "
            f"{tuple(x.shape[1:])}, for which the model failed. Add a batch dimension to `inputs`: "
            f"`x.unsqueeze(0)`."
        ) from error


def part_of_model(model: nn.Module, layer: Any, name: str = "layer") -> nn.Module:
    """Return a layer without wrappers; raise if it is not part of the model."""
    if not isinstance(layer, nn.Module):
        several = " Pass several layers as a list of modules." if name == "layer" else ""
        raise TypeError(
            f"Expected `{name}` to be a torch.nn.Module, but got {type(layer).__name__}.{several}"
        )
    layer = unwrapped(layer)
    if not any(module is layer for module in model.modules()):
        raise ValueError(
            f"Expected `{name}` to be a module of `model`, but got a {type(layer).__name__} that is not "
            f"part of it."
        )
    return layer


def check_combine(combine: Any, *, signed: bool) -> None:
    """Raise if `combine` is unknown or not supported by the mapping."""
    if combine not in ("difference", "gated", "guided"):
        raise ValueError(
            f'Expected `combine` to be "difference", "gated" or "guided", but got {combine!r}.'
        )
    if signed and combine == "gated":
        raise ValueError(
            'Expected `combine` to be "difference" or "guided", because signed rules compute a single map '
            'for the difference of target and contrast, but got "gated".'
        )


def chunk_size(internal_batch_size: Any, batch_size: int) -> int:
    """Return the number of samples per run for `internal_batch_size`; all for None or "auto"."""
    size = batch_size if internal_batch_size in (None, "auto") else internal_batch_size
    if not isinstance(size, int) or size < 1:
        raise ValueError(
            f"Expected `internal_batch_size` to be an int of at least 1, but got {size!r}. Pass None to "
            f'run all samples at once, or "auto" to run as many as fit into memory.'
        )
    return size


def logits_of(output: Any) -> Any:
    """Return the logits in the output of a model, or the output itself."""
    if isinstance(output, Tensor):
        return output
    is_mapping = isinstance(output, collections.abc.Mapping)
    for name in ("logits", "logits_per_image"):
        value = output.get(name) if is_mapping else getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    return output


def checked_output(output: Any, batch_size: int) -> Tensor:
    """Return the output of the model as a tensor, (B, ...); raise if it cannot be explained."""
    if not isinstance(output, Tensor):
        raise TypeError(
            f"Expected the model to return a tensor, but got {type(output).__name__}. Pick one with "
            f"`AbsLRP(model, output=lambda out: ...)`, for example `out.logits` or `out[0]`."
        )
    if output.is_complex():
        raise TypeError(
            f"Expected the model to return a real tensor, but got {output.dtype}. Convert it to a real "
            f"score, for example its magnitude: `AbsLRP(model, output=torch.abs)`."
        )
    if batch_size == 1 and _is_squeezed(output):
        output = output.unsqueeze(0)
    if output.dim() == 0 or len(output) != batch_size:
        raise ValueError(
            f"Expected the model to return one row per sample ({batch_size}), but got shape "
            f"{tuple(output.shape)}. If `inputs` have no batch dimension, add one: `x.unsqueeze(0)`."
        )
    if not carries_relevance(output):
        raise IndependentOutput(
            "Expected the output of the model to depend on `inputs`, but got an output that does not. The "
            "model detaches it, runs under `torch.no_grad()`, or uses `inputs` only in a divisor, which is "
            "a constant of its call. Write `torch.sigmoid(z)` for `1 / (1 + exp(-z))`, and "
            "`torch.exp(-torch.log(d))` for `1 / d`."
        )
    check_aligned(output, batch_size)
    return output


def _is_squeezed(output: Tensor) -> bool:
    """Whether the leading dimension of a single sample was removed by a call that moves elements
    (``squeeze()``), rather than by a sum over samples."""
    if output.dim() and len(output) == 1:
        return False
    node = output.grad_fn
    while node is not None:
        after = [(following, n) for following, n in node.next_functions if following is not None]
        if not after:
            return False
        following, number = after[0]
        if list(following._input_metadata[number].shape[:1]) == [1]:
            return not is_recorded(node)
        node = following
    return False
