"""The Captum attribution class of absLRP."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from captum._utils.common import _format_additional_forward_args
from captum.attr._utils.attribution import GradientAttribution
from captum.attr._utils.lrp_rules import PropagationRule
from captum.log import log_usage
from torch import Tensor, nn

from captum_abslrp.alignment import Misaligned
from captum_abslrp.contrast import (
    Contrast,
    Target,
    check_contrast,
    contrast_seed,
    expand_target,
    target_seed,
)
from captum_abslrp.interception import Interception, UnsupportedCallError
from captum_abslrp.mappings import Mapping, get_mapping

__all__ = ["AbsLRP"]

TOTAL = 256.0
"""Relevance of a sample while it is propagated. A power of two changes no digit of the result; this one
keeps the relevance of single elements and of sums over branches within the range of float16, too."""


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
        model: the model, in evaluation mode.
        mapping: which rule answers which call: a :class:`~captum_abslrp.mappings.Mapping`, the name of
            a registered one, or None to choose it from the class of the model (``"generic"`` where
            the class is not registered). A rule set on a module, ``module.rule``, wins.
        normalization: ``"separate"`` scales the relevance of each input of a call to the same total
            on its own (as published); ``"joint"`` scales all inputs of a call together to what
            arrived at its output, which conserves relevance.
        output: picks the tensor to explain from what the model returns, for example
            ``lambda out: out.logits``.

    Raises:
        TypeError: if ``model`` is no module, or one that is scripted.
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
        if isinstance(model, torch.jit.ScriptModule):
            raise TypeError(
                "Expected `model` to be a plain module, but got a scripted one, whose calls cannot be "
                "seen. Pass the module that it was made from."
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
        # A compiled model is explained by the module that it was made from.
        model = getattr(model, "_orig_mod", model)
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
        internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
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
            internal_batch_size: how many samples are run at a time, at most; None runs all at once.
            return_convergence_delta: whether to return the delta, too.

        Returns:
            Relevance shaped like ``inputs``, same dtype and device, without history; its unit is the
            share of the sample's total: the map of one seed adds up to one where no relevance is
            lost. With ``return_convergence_delta`` a pair of it and the delta, of shape (B,): the sum
            of the relevance of all inputs less that of the seeds (1, or 0 for a difference).

        Raises:
            TypeError: if inputs or target are not of a type that is listed here, or the model does
                not return a tensor.
            ValueError: if inputs are not finite or have no batch dimension, or the target does not
                fit the output.
            IndexError: if the target is out of range.
            UnsupportedCallError: if the model makes a call that has no rule; it is named.

        Example:
            >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5)).eval()
            >>> x = torch.rand(2, 3)
            >>> why_2 = AbsLRP(model).attribute(x, target=2)
            >>> why_2_rather_than_0 = AbsLRP(model).attribute(x, target=2, contrast=0)
        """
        is_tuple = isinstance(inputs, tuple)
        given: tuple[Tensor, ...] = inputs if is_tuple else (inputs,)
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
        step = batch_size if internal_batch_size is None else internal_batch_size
        if not isinstance(step, int) or step < 1:
            raise ValueError(
                f"Expected `internal_batch_size` to be an int of at least 1, but got {step!r}."
            )
        _check_model(self.model)
        run = partial(self._attribute_in_chunks, given, targets, extra, contrasts, combine)
        try:
            chunks = run(step)
        except Misaligned:  # samples are not kept apart in the leading dimension somewhere
            chunks = run(1)
        relevances = tuple(torch.cat(parts) for parts in zip(*(c[0] for c in chunks), strict=True))
        attributions = relevances if is_tuple else relevances[0]
        if return_convergence_delta:
            return attributions, torch.cat([c[1] for c in chunks])
        return attributions

    def has_convergence_delta(self) -> bool:
        return True

    @property
    def multiplies_by_inputs(self) -> bool:
        return True

    def _attribute_in_chunks(
        self,
        inputs: tuple[Tensor, ...],
        target: Tensor | None,
        extra: tuple[Any, ...],
        contrast: Any,
        combine: str,
        step: int,
    ) -> list[tuple[list[Tensor], Tensor]]:
        """Results of :meth:`_attribute_chunk` for ``step`` samples at a time."""
        batch_size = len(inputs[0])

        def rows_of(value: Any, rows: slice) -> Any:
            by_sample = isinstance(value, Tensor) and value.dim() and len(value) == batch_size
            return value[rows] if by_sample else value

        chunks = []
        for start in range(0, batch_size, step):
            part = partial(rows_of, rows=slice(start, start + step))
            given = tuple(map(part, inputs))
            chunks.append(
                self._attribute_chunk(
                    given, part(target), tuple(map(part, extra)), part(contrast), combine
                )
            )
        return chunks

    def _attribute_chunk(
        self,
        inputs: tuple[Tensor, ...],
        target: Tensor | None,
        extra: tuple[Any, ...],
        contrast: Any,
        combine: str,
    ) -> tuple[list[Tensor], Tensor]:
        """Relevance of the inputs and convergence delta of samples that are run together."""
        with torch.inference_mode(False), torch.enable_grad(), _unchanged(self.model):
            leaves = [x.clone().detach().requires_grad_() for x in inputs]
            output = self._forward(leaves, extra)
            values = output.detach()
            seed = target_seed(values, target)
            held_against = contrast_seed(values, seed, contrast)
            relevances = _propagate(output, leaves, seed, retain_graph=held_against is not None)
            exact = torch.promote_types(inputs[0].dtype, torch.float32)
            started_with = 1.0
            if held_against is not None:
                others = _propagate(output, leaves, held_against, retain_graph=False)
                pairs = list(zip(relevances, others, strict=True))
                if combine == "difference":
                    relevances = [r - o for r, o in pairs]
                    started_with = 0.0
                else:
                    relevances = [r.where(r > o, 0) for r, o in pairs]
            arrived = [r.to(exact).reshape(len(r), -1).sum(1) for r in relevances]
            delta = torch.stack(arrived).sum(0) - started_with
        return [r.to(x.dtype) for r, x in zip(relevances, inputs, strict=True)], delta

    def _forward(self, leaves: Sequence[Tensor], extra: tuple[Any, ...]) -> Tensor:
        """Output of the model, (B, ...), with a history whose backward pass is the rules."""
        batch_size = len(leaves[0])
        # Clones, because a leaf cannot be changed in place, which the model may do.
        given = [leaf.clone() for leaf in leaves]
        with Interception(
            None if self.mapping is None else self.mapping.rule_of_call,
            batch_size=batch_size,
            model=self.model,
            joint=self.normalization == "joint",
            total=TOTAL,
        ):
            try:
                output = self.model(*given, *extra)
            except Exception as error:  # raised again, explained where it can be
                _explain_missing_batch_dimension(self.model, leaves[0], error)
                raise
            if self.output is not None:
                output = self.output(output)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"Expected the model to return a tensor, but got {type(output).__name__}. Pick one with "
                f"`AbsLRP(model, output=lambda out: ...)`, for example `out.logits` or `out[0]`."
            )
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
        _check_history(output)
        return output


def _propagate(
    output: Tensor, leaves: Sequence[Tensor], seed: Tensor, *, retain_graph: bool
) -> list[Tensor]:
    """Relevance of the leaves, for relevance ``seed`` of the output."""
    relevances = torch.autograd.grad(
        output, leaves, seed * TOTAL, retain_graph=retain_graph, allow_unused=True
    )
    return [
        torch.zeros_like(leaf) if r is None else r / TOTAL
        for r, leaf in zip(relevances, leaves, strict=True)
    ]


def _check_inputs(inputs: tuple[Any, ...]) -> int:
    """The batch size; raises where inputs cannot be explained."""
    if not inputs:
        raise ValueError("Expected `inputs` to hold at least one tensor, but got an empty tuple.")
    for x in inputs:
        if not isinstance(x, Tensor):
            raise TypeError(
                f"Expected `inputs` to be a tensor or a tuple of tensors, but got {type(x).__name__}."
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
        if not bool(torch.isfinite(x).all()):
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
    """Raise where a rule is none; warn about layers in training mode."""
    training = ""
    for name, module in model.named_modules():
        rule = getattr(module, "rule", None)
        if rule is not None and not isinstance(rule, PropagationRule):
            raise TypeError(
                f"Expected `rule` of `{name}` to be an instance of a PropagationRule, such as "
                f"`AbsLRPRule()`, but got {rule!r}."
            )
        if module.training and not training and _differs_in_training(module):
            training = f"`{name}` ({type(module).__name__})"
    if training:
        warnings.warn(
            f"Expected the model to be in evaluation mode, but {training} is in training mode: results "
            f"differ from call to call or between batches. Call `model.eval()` first.",
            stacklevel=4,
        )


def _differs_in_training(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return module.dropout > 0
    known = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)
    return isinstance(module, known) or type(module).__name__.startswith("Drop")


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Put back what a model changes of itself as it runs: statistics, counters, stored activations."""
    modules = list(model.modules())
    tables = [t for m in modules for t in (m.__dict__, m._buffers, m._parameters)]
    entries = [dict(table) for table in tables]
    saved = [
        (buffer, buffer.clone(), buffer._version, module.training)
        for module in modules
        for buffer in module.buffers(recurse=False)
        if not buffer.is_inference()
    ]
    try:
        yield
    finally:
        for table, before in zip(tables, entries, strict=True):
            if len(table) != len(before) or any(table[k] is not v for k, v in before.items()):
                table.clear()
                table.update(before)
        with torch.no_grad():
            for buffer, value, version, training in saved:
                # Batch norm updates its statistics without telling the version.
                if training or buffer._version != version:
                    buffer.copy_(value)


_MOVING_NODES = re.compile(
    r"(AccumulateGrad|Alias|AsStrided|Broadcast\w*|Cat|Clone|CopyBackwards|CopySlices|Copy|Diagonal|"
    r"Expand|Fill|Flip|Gather|Index|IndexCopy|IndexPut|IndexSelect|MaskedFill|\w*PadNd?|"
    r"(Constant|Reflection|Replication)Pad\w*|Permute|PixelShuffle|PixelUnshuffle|Repeat|Reshape\w*|"
    r"Roll|Rot90|Select|Slice|Split|SplitWithSizes|Squeeze|Stack|SwapAxes|T|TakeAlongDim|ToCopy|"
    r"Transpose|Tril|Triu|Unbind|Unfold|UnsafeSplit\w*|UnsafeView|Unsqueeze|View|ViewAsReal|Where|"
    r"Zero|ChannelShuffle|NativeChannelShuffle)(Backward[A-Za-z]*\d*)?"
)
"""Nodes that autograd makes for calls that move elements."""


def _check_history(output: Tensor) -> None:
    """Raise where a part of the model went past the rules: code whose calls cannot be seen."""
    seen = set()
    stack = [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = type(node).__name__
        ours = (
            isinstance(node, torch.autograd.function.BackwardCFunction) and name == "_NodeBackward"
        )
        if not ours and not _MOVING_NODES.fullmatch(name):
            raise UnsupportedCallError(
                f"Expected every call of the model to have a rule, but got `{name}` from code whose "
                f"calls cannot be seen: an autograd function, a scripted part, `torch.vmap` or another "
                f"thread. Write it as plain calls, or as a module with a rule of Captum's kind set "
                f"on it: `module.rule = rule`."
            )
        stack.extend(fn for fn, _ in node.next_functions)
