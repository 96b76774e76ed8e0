"""The Captum attribution class of absLRP."""

from __future__ import annotations

import collections.abc
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any, ClassVar, NamedTuple

import torch
from captum._utils.common import _format_additional_forward_args
from captum.attr._utils.attribution import GradientAttribution
from captum.attr._utils.lrp_rules import PropagationRule
from captum.log import log_usage
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from captum_abslrp.contrast import (
    Contrast,
    Target,
    check_class_dim,
    check_contrast,
    contrast_seed,
    expand_target,
    repeated,
    target_seed,
)
from captum_abslrp.diagnostics import Observer
from captum_abslrp.engine.arguments import on_host
from captum_abslrp.engine.dependence import carries_relevance
from captum_abslrp.engine.errors import UnsupportedCallError
from captum_abslrp.engine.messages import warn
from captum_abslrp.engine.propagation import TOTAL, logits, propagate
from captum_abslrp.engine.recording import Recording
from captum_abslrp.engine.samples import Misaligned, check_aligned
from captum_abslrp.engine.state import saver, unchanged
from captum_abslrp.engine.tape import history, is_hook, is_recorded
from captum_abslrp.mappings import Mapping, MappingScope, get_mapping
from captum_abslrp.memory import fitting, is_out_of_memory

__all__ = ["AbsLRP"]

Forward = Callable[
    [Sequence[Tensor], tuple[Any, ...], Observer | None], tuple[Tensor, Sequence[Tensor]]
]
"""From inputs, further arguments and who looks at the calls, to the output and the tensors that relevance is
asked for."""

Chunk = tuple[list[Tensor], Tensor]
"""Relevance of what is explained, and the sum that the relevance of each sample started with, (B,)."""


def for_captum(attribute: Callable[..., Any]) -> Callable[..., Any]:
    """Make a method what Captum expects of ``attribute``: its calls are logged, unless they are Captum's own.

    Captum's ``NoiseTunnel`` calls ``attribute.__wrapped__``. It repeats each sample and its target, but hands
    over all other arguments as they are. There, and only there, a contrast per sample is repeated as well.
    """

    @wraps(attribute)
    def unlogged(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        first = inputs[0] if isinstance(inputs, tuple) and inputs else inputs
        if "contrast" in kwargs and isinstance(first, Tensor) and first.dim() > 0:
            kwargs["contrast"] = repeated(kwargs["contrast"], len(first))
        return attribute(self, inputs, *args, **kwargs)

    logged = log_usage()(attribute)
    logged.__wrapped__ = unlogged
    return logged


class IndependentOutput(ValueError):
    """The output of a model does not depend on what is explained."""


class _Maps(NamedTuple):
    """What one forward pass and one backward pass give."""

    relevances: list[Tensor]
    """Relevance of each explained tensor, (S, ...), for each of S seeds."""
    changes: list[Tensor]
    """By how much the relevance of each seed and sample, (S, B), changed on the tail of the score."""
    of_inputs: bool
    """Whether the inputs are explained, not tensors inside."""


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

    _takes_integers: ClassVar[bool] = False
    """Whether relevance may start behind inputs of integers."""

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

    @for_captum
    def attribute(  # type: ignore[override]  # options are keyword-only
        self,
        inputs: Any,
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        contrast: Contrast = "others",
        combine: str = "difference",
        class_dim: int | None = None,
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
                than two dimensions a tuple, or a list of B tuples. With fewer indices than the output
                has dimensions, the sum over the other dimensions is explained: ``k`` is class k of all
                positions of an output (B, K, H, W). None explains the predicted class, or the only
                output.
            additional_forward_args: what the model is given after the inputs, one argument or a tuple.
            contrast: what the target is held against: ``"others"``, all other classes alike (as
                published); ``"softmax"``, the other classes by their probability; classes in any
                form of ``target``: why this rather than that? None returns the map of the target
                alone. With one output per sample there is nothing to hold it against. Classes are
                compared at the position of the target, or as sums where the target is one. In Captum's
                ``NoiseTunnel`` one class per sample is taken for all of the sample's copies.
            combine: how the map of the target and that of the contrast make one: ``"difference"`` (as
                published), or ``"gated"``: the target's map where it exceeds the contrast's, and 0
                elsewhere.
            class_dim: the dimension of the output that classes are in, for ``"others"``, ``"softmax"``
                and the predicted class. None is dimension 1, as in (B, K), (B, K, L), (B, K, H, W); pass
                2 or -1 for (B, L, K).
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
                have no batch dimension, or the target does not fit the output; if classes are to be
                compared, but the target is a sum over them; if a lazy layer of the model has not run yet.
            IndexError: if the target or ``class_dim`` is out of range.
            FloatingPointError: if a map is not finite (on the host, or with ``check_finite``); the call
                that made the first value that is not is named.
            UnsupportedCallError: if the model makes a call that has no rule; it is named.

        Example:
            >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5)).eval()
            >>> x = torch.rand(2, 3)
            >>> why_2 = AbsLRP(model).attribute(x, target=2)
            >>> why_2_rather_than_0 = AbsLRP(model).attribute(x, target=2, contrast=0)

            Of a model that returns classes at positions, (B, K, H, W), one position or all of them:

            >>> model = nn.Conv2d(3, 5, 3, padding=1).eval()
            >>> x = torch.rand(2, 3, 8, 8)
            >>> class_2_in_the_corner = AbsLRP(model).attribute(x, target=(2, 0, 0))
            >>> class_2_anywhere = AbsLRP(model).attribute(x, target=2)
        """
        chunks = self._explain(
            inputs,
            target,
            additional_forward_args,
            contrast,
            combine,
            internal_batch_size,
            class_dim=class_dim,
            forward=self._to_inputs,
            observer=Observer(finite=True) if check_finite else None,
        )
        relevances = tuple(torch.cat(parts) for parts in zip(*(r for r, _ in chunks), strict=True))
        attributions = relevances if isinstance(inputs, tuple) else relevances[0]
        if not return_convergence_delta:
            return attributions
        return attributions, delta_of(relevances, torch.cat([started for _, started in chunks]))

    def has_convergence_delta(self) -> bool:
        """Yes: ``attribute(..., return_convergence_delta=True)`` returns it."""
        return True

    def compute_convergence_delta(self, *args: Any, **kwargs: Any) -> Tensor:
        """Refused: what Captum makes of given attributions has no meaning for shares of relevance.

        Raises:
            NotImplementedError: always.

        Example:
            >>> model, x = nn.Linear(3, 4).eval(), torch.rand(2, 3)
            >>> relevance, delta = AbsLRP(model).attribute(x, 1, return_convergence_delta=True)
            >>> delta.shape
            torch.Size([2])
        """
        raise NotImplementedError(
            "Expected the delta to be asked for with `attribute(..., return_convergence_delta=True)`, but "
            "got a call of `compute_convergence_delta`. That compares the sum of an attribution with the "
            "difference of two outputs of the model; relevance is a share of the sample's total, not of "
            "the output."
        )

    @property
    def multiplies_by_inputs(self) -> bool:
        return True

    def explain_watched(
        self,
        inputs: Any,
        target: Target,
        additional_forward_args: Any,
        observer: Observer,
        *,
        class_dim: int | None = None,
    ) -> None:
        """Explain the target alone while every call is looked at; arguments as for :meth:`attribute`."""
        self._explain(
            inputs,
            target,
            additional_forward_args,
            None,
            "difference",
            None,
            class_dim=class_dim,
            forward=self._to_inputs,
            observer=observer,
        )

    def _to_inputs(
        self, leaves: Sequence[Tensor], extra: tuple[Any, ...], observer: Observer | None
    ) -> tuple[Tensor, Sequence[Tensor]]:
        return self._forward(leaves, extra, observer), leaves

    def _explain(
        self,
        inputs: Any,
        target: Target,
        additional_forward_args: Any,
        contrast: Contrast,
        combine: str,
        internal_batch_size: int | str | None,
        *,
        class_dim: int | None,
        forward: Forward,
        observer: Observer | None,
    ) -> list[Chunk]:
        """Results of :meth:`_explain_chunk`, for all samples in turn; arguments are checked."""
        given: tuple[Tensor, ...] = _plain(inputs if isinstance(inputs, tuple) else (inputs,))
        batch_size = _check_inputs(given, None if self._takes_integers else self.model)
        check_contrast(contrast)
        check_class_dim(class_dim)
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
            dense = isinstance(value, Tensor) and value.layout == torch.strided and value.dim() > 0
            return value[rows] if dense and len(value) == batch_size else value

        def run(step: int) -> list[Chunk]:
            chunks = []
            zeros = _Zeros(batch_size)
            start = 0
            while start < batch_size:
                part = partial(rows_of, rows=slice(start, start + step))
                leaves, others = tuple(map(part, given)), tuple(map(part, extra))
                try:
                    chunk = self._explain_chunk(
                        leaves,
                        part(targets),
                        others,
                        part(contrasts),
                        combine,
                        class_dim,
                        forward,
                        observer,
                        partial(zeros.add, start),
                    )
                except Exception as error:  # raised again, unless it says that memory was short
                    if not (automatic and step > 1 and is_out_of_memory(error)):
                        raise
                    step = step // 2
                    continue
                chunks.append(chunk)
                start += step
            zeros.warn()
            return chunks

        if automatic and batch_size > 1:
            one = partial(rows_of, rows=slice(0, 1))
            step = self._fitting(
                tuple(map(one, given)), tuple(map(one, extra)), batch_size, forward
            )
        try:
            return run(step)
        except Misaligned:  # samples are not kept apart in the leading dimension somewhere
            try:
                return run(1)
            except RuntimeError as error:
                if type(error) is not RuntimeError or is_out_of_memory(error):
                    raise  # an error of the model's own
                raise ValueError(
                    f"Expected the model to run on one sample at a time, because it mixes samples or moves "
                    f"them out of the leading dimension, but it failed on one: {error}. Where the rows of "
                    f"`inputs` are parts of one whole, as the nodes of a graph are, make them one sample: "
                    f"pass `x.unsqueeze(0)`, to a model that takes it apart again."
                ) from error

    def _fitting(
        self,
        inputs: tuple[Tensor, ...],
        extra: tuple[Any, ...],
        batch_size: int,
        forward: Forward,
    ) -> int:
        """How many samples fit into memory at a time, by the first of them."""
        with torch.inference_mode(False), torch.enable_grad(), unchanged(self.model):
            output, _ = forward([_leaf(x) for x in inputs], extra, None)
            return fitting(output, batch_size)

    def _explain_chunk(
        self,
        inputs: tuple[Tensor, ...],
        target: Tensor | None,
        extra: tuple[Any, ...],
        contrast: Any,
        combine: str,
        class_dim: int | None,
        forward: Forward,
        observer: Observer | None,
        note_zeros: Callable[[Tensor, Observer, bool], None],
    ) -> Chunk:
        """Relevance of what is explained, and the sum per sample that it started with, of samples
        that are run together."""

        def relevance(observer: Observer | None) -> _Maps:
            with torch.inference_mode(False), torch.enable_grad(), unchanged(self.model):
                return self._maps(inputs, target, extra, contrast, class_dim, forward, observer)

        maps = relevance(observer)
        finite = torch.stack([r.isfinite().all() for r in maps.relevances]).all()
        if (on_host(finite) if observer is None else bool(finite)) is False:
            if observer is None or not observer.finite:  # once more, to find the call
                relevance(Observer(finite=True))
            raise FloatingPointError(
                "Expected the map to be finite, but got NaN or infinite values, though those of all "
                "calls are finite. Compute in a wider dtype: `model.float()`, `model.double()`."
            )
        zero = _zero_maps(maps.relevances, inputs)
        if zero is not None:  # once more, to find the call where it ends
            again = Observer(traced=True, repeated=True)
            relevance(again)
            note_zeros(zero, again, maps.of_inputs)
        started = torch.ones(
            len(maps.relevances[0]), len(inputs[0]), device=maps.relevances[0].device
        )
        for change in maps.changes:
            started = started + change
        if len(started) == 1:
            return [r[0] for r in maps.relevances], started[0]
        pairs = [(of_target, of_contrast) for of_target, of_contrast in maps.relevances]
        _warn_of_noise(pairs)
        if combine == "difference":
            return [r - o for r, o in pairs], started[0] - started[1]
        return [r.where(r > o, 0) for r, o in pairs], started[0]

    def _maps(
        self,
        inputs: tuple[Tensor, ...],
        target: Tensor | None,
        extra: tuple[Any, ...],
        contrast: Any,
        class_dim: int | None,
        forward: Forward,
        observer: Observer | None,
    ) -> _Maps:
        """One forward pass, and relevance of the target and of the contrast, if there is one."""
        leaves = [_leaf(x) for x in inputs]
        output, explained = forward(leaves, extra, observer)
        values = output.detach()
        seed = target_seed(values, target, class_dim=class_dim)
        held_against = contrast_seed(
            values, target, contrast, class_dim=class_dim, logits=logits(output)
        )
        seeds = [seed] if held_against is None else [seed, held_against]
        changes: list[Tensor] = []
        relevances = propagate(
            output, explained, torch.stack(seeds), positive=True, changes=changes
        )
        return _Maps(relevances, changes, explained is leaves)

    def _forward(
        self, leaves: Sequence[Tensor], extra: tuple[Any, ...], observer: Observer | None = None
    ) -> Tensor:
        """Output of the model, (B, ...), with a history whose backward pass is the rules."""
        recording = Recording(
            MappingScope(self.mapping),
            inputs=[leaf for leaf in leaves if leaf.requires_grad],
            batch_size=len(leaves[0]),
            model=self.model,
            joint=self.normalization == "joint",
            total=TOTAL,
            observer=observer,
        )
        output, unseen = self.run(leaves, extra, recording)
        for node in unseen:
            raise UnsupportedCallError(
                f"Expected every call of the model to have a rule, but got `{node}` from code whose "
                f"calls cannot be seen: a scripted part, `torch.vmap`, checkpointing with "
                f"`use_reentrant=True` or another thread. Write it as plain calls, or register its layer "
                f"as one call: `captum_abslrp.register_call_rule(Layer, captum_abslrp.rules.TwinRule())`."
            )
        return output

    def run(
        self, leaves: Sequence[Tensor], extra: tuple[Any, ...], recording: Recording
    ) -> tuple[Tensor, list[str]]:
        """Output of the model, (B, ...), as it depends on the leaves under an recording, and the names
        of the nodes of its history that no visible call has made."""
        batch_size = len(leaves[0])
        # Clones, because a leaf cannot be changed in place, which the model may do.
        given = [leaf.clone() for leaf in leaves]
        recording.before_change = saver(self.model)
        with _eager(self.model), recording:
            try:
                output = self.model(*given, *extra)
            except Exception as error:  # raised again, explained where it can be
                _explain_missing_batch_dimension(self.model, leaves[0], error)
                raise
            output = _logits(output) if self.output is None else self.output(output)
            with torch._C.DisableTorchFunction():
                return self._checked(output, batch_size, recording)

    def _checked(
        self, output: Any, batch_size: int, recording: Recording
    ) -> tuple[Tensor, list[str]]:
        """What :meth:`run` returns; raises where the output cannot be explained."""
        if not isinstance(output, Tensor):
            raise TypeError(
                f"Expected the model to return a tensor, but got {type(output).__name__}. Pick one with "
                f"`AbsLRP(model, output=lambda out: ...)`, for example `out.logits` or `out[0]`."
            )
        if output.is_complex():
            raise TypeError(
                f"Expected the model to return a real tensor, but got {output.dtype}. Say what of it is the "
                f"score, for example its magnitude: `AbsLRP(model, output=torch.abs)`."
            )
        if batch_size == 1 and _is_squeezed(output):
            output = output.unsqueeze(0)
        if output.dim() == 0 or len(output) != batch_size:
            raise ValueError(
                f"Expected the model to return one row per sample ({batch_size}), but got shape "
                f"{tuple(output.shape)}. Does `inputs` have a batch dimension? Add it with "
                f"`x.unsqueeze(0)`."
            )
        if not carries_relevance(output):
            raise IndependentOutput(
                "Expected the output of the model to depend on `inputs`, but got one that does not: "
                "the model detaches it, runs under `torch.no_grad()` inside, or divides a constant by what "
                "depends on them: a divisor is a constant of its call. Write `torch.sigmoid(z)` for "
                "`1 / (1 + exp(-z))`, and `torch.exp(-torch.log(d))` for `1 / d`."
            )
        check_aligned(output, batch_size)
        if recording.observer is None or not recording.observer.repeated:
            _warn_of_detached(recording.detached.reaching(output))
        return output, list(unseen_nodes(output, recording.depends))


def _warn_of_detached(paths: Sequence[str]) -> None:
    """Warn where a part of the model gets no relevance because its history is cut off."""
    if paths:
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        warn(
            f"A value that is detached, or computed under `torch.no_grad()`, reaches the output of the "
            f"model: in {', '.join(paths[:3])}{more}. It counts as a constant, so nothing of the map goes "
            f"through it. To explain it as well, remove `detach()` or `no_grad()` there."
        )


def _zero_maps(relevances: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor | None:
    """Which maps, of each seed and sample (S, B), are zero though the sample is not; None if none is, or if
    a device would have to be waited for."""
    if relevances[0].device.type != "cpu":
        return None
    batch_size = len(inputs[0])
    in_order = all(r.dim() > 1 and r.shape[1] % batch_size == 0 for r in relevances)
    rows = batch_size if in_order else 1  # else nothing can be said of one sample
    found = torch.stack([r.reshape(len(r), rows, -1).any(2) for r in relevances]).any(0)
    given = torch.stack([x.reshape(batch_size, -1).any(1) for x in inputs]).any(0)
    zero = ~found & given
    return zero if bool(zero.any().numpy()) else None


class _Zeros:
    """The maps that are zero, and the calls where their relevance ended."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._found: dict[str, tuple[list[int], dict[str, None]]] = {}

    def add(self, start: int, zero: Tensor, observer: Observer, of_inputs: bool) -> None:
        """Note some samples.

        Args:
            start: the number of the first of them.
            zero: which maps are zero, (S, B).
            observer: has seen the calls of the backward pass.
            of_inputs: whether the maps are of the inputs. Relevance may go past a layer, so a map of a
                layer counts only if a call is known where its relevance ended.
        """
        for seed, maps in enumerate(zero):
            samples = maps.nonzero().flatten().tolist()
            ends = {call.name: None for call in observer.calls if call.ends(seed, samples)}
            if samples and (ends or of_inputs):
                kind = ("target", "contrast")[seed]
                known, known_ends = self._found.setdefault(kind, ([], {}))
                known += [start + i for i in samples]
                known_ends |= ends

    def warn(self) -> None:
        """Warn once of all of them."""
        for kind, (samples, ends) in self._found.items():
            where = " and ".join(list(ends)[:3]) or "a call that moves elements"
            warn(
                f"The map of the {kind} is zero for {len(samples)} of {self._batch_size} samples, first for "
                f"sample {samples[0]}: its relevance ends at {where}, because no input of the call "
                f"contributes to its output in a way that the rule counts. Such a map does not tell what the "
                f"score depends on. Explain another class, or give the call another rule: "
                f"`AbsLRP(model, get_mapping().extended({{...}}))`."
            )


def delta_of(relevances: Sequence[Tensor], started: Tensor) -> Tensor:
    """The sum over each sample of tensors of relevance, (B, ...), less what it started with, (B,)."""
    exact = torch.promote_types(relevances[0].dtype, torch.float32)
    arrived = [r.to(exact).reshape(len(started), -1).sum(1) for r in relevances]
    return torch.stack(arrived).sum(0) - started.to(arrived[0])


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
            return not is_recorded(node)
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
        warn(
            f"The maps of target and contrast differ by {share:.0e} of their total only, which {exact} "
            f"can hardly tell from rounding.{better} Or look at the map of the target alone, "
            f"`contrast=None`."
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


def _plain(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Tensors of a subclass as plain tensors."""
    with torch._C.DisableTorchFunctionSubclass():  # they may have handlers of their own
        for x in inputs:
            if isinstance(x, Tensor) and (x.is_nested or _has_no_memory(x)):
                raise TypeError(
                    f"Expected `inputs` to be dense tensors, but got {type(x).__name__}"
                    f"{' (nested)' if x.is_nested else ''}, which keeps its values in other tensors. "
                    f"Pass a plain tensor of the values, for example `x.to_padded_tensor(0.0)` of a "
                    f"nested one, `x.full_tensor()` of a distributed one or `x.get_data()` of a masked one."
                )
        return tuple(
            x.as_subclass(Tensor) if isinstance(x, Tensor) and x.layout == torch.strided else x
            for x in inputs
        )


def _has_no_memory(x: Tensor) -> bool:
    """Whether a tensor is a wrapper around others, which implements every operator itself."""
    own: Any = type(x).__torch_dispatch__
    return own is not torch._C._disabled_torch_dispatch_impl and type(x) is not Tensor


def _leaf(x: Tensor) -> Tensor:
    """What stands for an input: a leaf of the history, where the input is not of integers."""
    leaf = x.clone().detach()
    return leaf.requires_grad_() if leaf.is_floating_point() else leaf


def _check_inputs(inputs: tuple[Any, ...], model: nn.Module | None) -> int:
    """The batch size; raises where inputs cannot be explained, or are integers of a given model."""
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
        if x.is_complex():
            raise TypeError(
                f"Expected `inputs` to be of a real floating-point dtype, but got {x.dtype}. Explain the "
                f"real and the imaginary part as two numbers: pass `torch.view_as_real(x)` to a module "
                f"that makes it complex with `torch.view_as_complex` and calls the model."
            )
        if model is not None and not x.is_floating_point():
            raise TypeError(
                f"Expected `inputs` to be of a floating-point dtype, but got {x.dtype}. Convert images "
                f"with the model's own preprocessing. {_EXPLAIN_TOKENS.format(_embedding_of(model))}"
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
    "Of token indices explain the embeddings: "
    "`LayerAbsLRP(model, model{}).attribute(token_ids, target)`."
)


def _embedding_of(model: nn.Module | None) -> str:
    """Where a model has an embedding, to be read behind its name."""
    modules = model.named_modules() if model is not None else ()
    paths = [path for path, m in modules if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    if paths == [""]:
        return ""
    return f'.get_submodule("{paths[0]}")' if paths else ".embedding"


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
        warn(
            f"Expected the model to be in evaluation mode, but {training} is in training mode: results "
            f"differ from call to call or between batches. Call `model.eval()` first."
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
                f"instance of its class. If the attribute is the model's own, give it another name, or "
                f"make it one of a class: `layer.__class__ = type(type(layer).__name__, (type(layer),), "
                f'{{"rule": layer.__dict__.pop("rule")}})`.'
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


_MOVING_NODES = re.compile(
    r"(AccumulateGrad|Alias|AsStrided|BlockDiag|Broadcast\w*|Cat|Clone|Copy|CopyBackwards|CopySlices|DiagEmbed|Diagonal\w*|"
    r"Expand|Fill|Flip|Gather|Im2Col|Index|IndexCopy|IndexPut|IndexSelect|Kthvalue|MaskedFill|"
    r"MaskedScatter|MaskedSelect|Median\w*|Mode|\w*PadNd?|(Constant|Reflection|Replication)Pad\w*|"
    r"Permute|PixelShuffle|PixelUnshuffle|Put|Repeat|Reshape\w*|Roll|Rot90|Scatter|Select\w*|Slice\w*|"
    r"Sort|Split|SplitWithSizes|Squeeze|Stack|SwapAxes|T|Take|TakeAlongDim|ToCopy|Topk|Transpose|Tril|"
    r"Triu|Unbind|Unfold|UnsafeSplit\w*|UnsafeView|Unsqueeze|View|ViewAsReal|Where|Zero|"
    r"ChannelShuffle|Complex|NativeChannelShuffle|ViewAsComplex)(Backward[A-Za-z]*\d*)?"
)
"""Nodes that autograd makes for calls that move elements."""


def unseen_nodes(output: Tensor, depends: Callable[[Any], bool]) -> Iterator[str]:
    """Names of the nodes of a history that carry relevance, and that neither a rule nor a call that moves
    elements has made."""
    for node in history(output.grad_fn):
        name = type(node).__name__
        known = is_recorded(node) or is_hook(node) or _MOVING_NODES.fullmatch(name)
        if not known and depends(node):
            yield name
