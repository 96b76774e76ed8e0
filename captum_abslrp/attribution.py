"""The Captum attribution class of absLRP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from captum._utils.common import _format_additional_forward_args
from captum.attr._utils.attribution import GradientAttribution
from torch import Tensor, nn

from captum_abslrp.captures import captured
from captum_abslrp.checks import (
    check_arguments,
    check_combine,
    check_evaluation,
    check_inputs,
    check_model,
    check_rules,
    check_visible,
    checked_output,
    chunk_size,
    explain_missing_batch_dimension,
    logits_of,
    part_of_model,
    plain,
    unwrapped,
)
from captum_abslrp.chunks import Samples, in_chunks
from captum_abslrp.eager import eager
from captum_abslrp.engine.arguments import on_host
from captum_abslrp.engine.observers import Observer
from captum_abslrp.engine.propagation import TOTAL, Through, logits, propagate
from captum_abslrp.engine.recording import Recording
from captum_abslrp.engine.state import saver, unchanged
from captum_abslrp.guide import find_guide, guided
from captum_abslrp.map_checks import (
    ZeroMaps,
    warn_of_detached,
    warn_of_no_guide,
    warn_of_noise,
    zero_maps,
)
from captum_abslrp.mappings import Mapping, MappingScope, find_mapping, get_mapping
from captum_abslrp.memory import fitting
from captum_abslrp.noise_tunnel import for_captum
from captum_abslrp.program import Program, trace
from captum_abslrp.recommendation import OTHER, Recommendation, recommend
from captum_abslrp.scores import Scores, scores_of
from captum_abslrp.seeds import (
    DEFAULT,
    Contrast,
    Default,
    Target,
    check_class_dim,
    check_contrast,
    contrast_seed,
    expand_target,
    fitting_targets,
    target_seed,
)

__all__ = ["AbsLRP"]


class Explained(NamedTuple):
    """What a forward pass was recorded for."""

    output: Tensor
    """What is explained."""
    tensors: Sequence[Tensor]
    """What relevance is wanted of."""
    through: Through | None = None
    """Parts of the relevance of a tensor inside that are followed on their own."""
    guide: nn.Module | None = None
    """The layer that guides, the last of the tensors being its output."""


Forward = Callable[[Sequence[Tensor], Samples, Observer | None], Explained]
"""From inputs as leaves, the samples and an observer to what is explained."""

Chunk = tuple[list[Tensor], Tensor]
"""Relevance of the explained tensors, and the sum that the relevance of each sample started with, (B,)."""


class _Maps(NamedTuple):
    """Relevance from one forward pass and one backward pass."""

    relevances: list[Tensor]
    """Relevance of each explained tensor, (S, ...), for each of S seeds; with a guide, of the inputs perhaps
    that of the target alone."""
    totals: list[Tensor]
    """The sum of each seed and sample, (S, B), and by how much it changed on the tail of the score."""
    of_inputs: bool
    """Whether the inputs are explained, not tensors inside."""
    output: Tensor
    """The output that is explained."""
    parts: list[list[Tensor]]
    """For each part of a tensor inside, what of the relevances goes through it."""
    model: nn.Module
    """The model, and the layer that guides, if one does."""
    guide: nn.Module | None = None

    def combined(self, combine: str) -> list[Tensor]:
        """The map of each explained tensor, from those of target and contrast."""
        if len(self.relevances[-1]) == 1:  # of a guided map the layer is left out
            explained = self.relevances if self.guide is None else self.relevances[:-1]
            return [r[0] for r in explained]
        if combine == "guided":
            fine, coarse = self.relevances
            return [guided(fine[0], coarse[0] - coarse[1], self.model, self.guide)]
        if combine == "difference":
            return [r[0] - r[1] for r in self.relevances]
        return [r[0].where(r[0] > r[1], 0) for r in self.relevances]


class AbsLRP(GradientAttribution):
    r"""Relative absolute magnitude layer-wise relevance propagation (absLRP).

    Relevance starts at the target's output and goes back call by call. Each call passes it to those of
    its inputs that contributed positively, in proportion, relative to the magnitude of its net output.
    The contrast removes what speaks for the other classes as well:
    :math:`R(\text{target}) - R(\text{contrast})`.

    Source: Vukadin, Afrić, Šilić, Delač, *Advancing Attribution-Based Neural Network Explainability
    through Relative Absolute Magnitude Layer-Wise Relevance Propagation and Multi-Component
    Evaluation*, ACM TIST 15(3), 2024.

    The model is never changed: no hooks, no weights, no flags.

    Args:
        model: the model, in evaluation mode. A compiled one and one in ``nn.DataParallel`` or
            ``DistributedDataParallel`` is explained as the module inside, on the device of its weights.
        mapping: the rule of each call: a :class:`~captum_abslrp.mappings.Mapping`, the name of a
            registered one, or None to choose it from the class of the model (``"generic"`` where
            the class is not registered). A rule set on a module, ``module.rule``, wins.
        normalization: ``"separate"`` scales the relevance of each input of a call to the same total
            on its own (as published); ``"joint"`` scales all inputs of a call together to what
            arrived at its output, which conserves relevance.
        output: picks the tensor to explain from what the model returns, for example
            ``lambda out: out[0]``. None takes the tensor that is returned, or the ``logits`` or
            ``logits_per_image`` of an object or dict (such as Hugging Face's ``ModelOutput``).

    Raises:
        TypeError: if ``model`` is not a module, if it or a part of it is scripted or quantized, if the
            attribute ``rule`` of a part of it is a string or a class instead of a rule, or if another
            argument is not of a type that is listed here.
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
        check_arguments(model, mapping, normalization, output)
        model = unwrapped(model)
        check_visible(model)
        check_rules(model)
        super().__init__(model)
        self.model = model
        self.mapping = get_mapping(mapping) if isinstance(mapping, str) else mapping
        self.normalization = normalization
        self.output = output
        self.recommendation: Recommendation | None = None
        self.contrast: Contrast = "others"
        self.combine = "difference"

    @staticmethod
    def recommended(model: nn.Module, *, output: Callable[[Any], Tensor] | None = None) -> AbsLRP:
        """The attributor that measured best on real models of this kind.

        Vision Transformers, and convolutional networks with batch norm, get the mapping
        ``"recommended"``, and the contrast ``"softmax"`` and guided maps as defaults of
        :meth:`attribute` (differences, where a model has several inputs). Other models get the published
        method, because nothing was measured on them.
        The attribute ``recommendation`` and the representation say what was chosen, and on which figures.

        Args:
            model, output: as for :class:`AbsLRP`.

        Raises:
            TypeError: as for :class:`AbsLRP`.

        Example:
            >>> model = timm.create_model("test_vit").eval()
            >>> attributor = AbsLRP.recommended(model)
            >>> attributor.recommendation.mapping, attributor.contrast, attributor.combine
            ('recommended', 'softmax', 'guided')
            >>> attributor.attribute(torch.rand(2, 3, 160, 160), target=3).shape
            torch.Size([2, 3, 160, 160])
        """
        chosen = recommend(unwrapped(model)) if isinstance(model, nn.Module) else OTHER
        attributor = AbsLRP(
            model, chosen.mapping, normalization=chosen.normalization, output=output
        )
        attributor.recommendation = chosen
        attributor.contrast, attributor.combine = chosen.contrast, chosen.combine
        return attributor

    def __repr__(self) -> str:
        if self.recommendation is not None:
            return f"AbsLRP.recommended({type(self.model).__name__}): {self.recommendation}"
        mapping = self.mapping or find_mapping(self.model) or get_mapping()
        return (
            f"{type(self).__name__}({type(self.model).__name__}, mapping={mapping.name!r}, "
            f"normalization={self.normalization!r})"
        )

    @for_captum
    def attribute(  # type: ignore[override]  # options are keyword-only
        self,
        inputs: Any,
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        contrast: Contrast | Default = DEFAULT,
        combine: str | Default = DEFAULT,
        guide: nn.Module | None = None,
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
                output. Or a function from what the model returns (or from what ``output`` picks of it) to one
                score per sample, (B,), or to scores of classes, (B, K), of which the predicted one is
                explained; :mod:`captum_abslrp.targets` has such functions for segments, boxes and
                similarities. It sees the samples that are run together.
            additional_forward_args: arguments of the model after the inputs, one argument or a tuple.
            contrast: what the target is compared with: ``"others"``, all other classes alike (as
                published, and the default); ``"softmax"``, the other classes by their probability;
                classes in any form of ``target``: why this rather than that? None returns the map of the
                target alone. With one output per sample there is nothing to hold it against. Classes are
                compared at the position of the target, or as sums where the target is one. Where the target
                is a function, another function of the output, too: why more of this score than of that? In
                Captum's ``NoiseTunnel`` one class per sample is taken for all of the sample's copies.
            combine: how the maps of the target and of the contrast are combined: ``"difference"`` (as
                published, and the default); ``"gated"``: the target's map where it exceeds the contrast's,
                and 0 elsewhere; or ``"guided"``, for images: the target's map times the positive part of
                the difference at a layer, bilinearly enlarged, of the target's total magnitude. It has the
                resolution of the one, and the contrast of the other.
            guide: the layer for ``"guided"``, a module whose output is a feature map (B, D, h, w) or
                (B, h, w, D), or tokens (B, L, D). None finds the one in the middle of the model, with a
                forward pass of the first image.
            class_dim: the dimension of the output that classes are in, for ``"others"``, ``"softmax"``
                and the predicted class. None is dimension 1, as in (B, K), (B, K, L), (B, K, H, W); pass
                2 or -1 for (B, L, K).
            internal_batch_size: how many samples are run at a time, at most; None runs all at once,
                ``"auto"`` as many as fit into half of the free memory, by what one sample keeps.
            return_convergence_delta: whether to return the delta, too.
            check_finite: check the values of every call, forward and back, which takes time, most of all
                on a GPU. On the host this happens anyway where a map is not finite.

        Returns:
            Relevance shaped like ``inputs``, same dtype and device, without history; its unit is the
            share of the sample's total: the map of one seed adds up to one where no relevance is
            lost. With ``return_convergence_delta`` a pair of it and the delta, of shape (B,): the sum
            of the relevance of all inputs less that of the seeds (1, or 0 for a difference).

        No check waits for a GPU, unless ``check_finite`` asks for it: values there are not checked.
        Targets are best given as ints or on the host.

        Warns:
            UserWarning: if a layer is in training mode, or (on the host) if the maps of target and
                contrast are so alike that their difference is rounding.

        Raises:
            TypeError: if inputs or target are not of a type that is listed here, or the model does
                not return a tensor; or if the contrast is a function, and the target is none.
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

            Of any score: why there is more of class 2 on the right than on the left:

            >>> def left(out): return out[:, 2, :, :4].mean((1, 2))
            >>> def right(out): return out[:, 2, :, 4:].mean((1, 2))
            >>> relevance = AbsLRP(model).attribute(x, target=right, contrast=left)
        """
        contrast = self.contrast if isinstance(contrast, Default) else contrast
        combine = self._combine_for(inputs) if isinstance(combine, Default) else combine
        if guide is not None and combine != "guided":
            raise ValueError(
                f'Expected `guide` with `combine="guided"` alone, but got it with {combine!r}.'
            )
        is_guided = combine == "guided" and contrast is not None
        chunks = self._explain(
            inputs,
            target,
            additional_forward_args,
            contrast,
            combine,
            internal_batch_size,
            class_dim=class_dim,
            forward=self._to_guide(guide) if is_guided else self._to_inputs,
            observer=Observer(finite=True) if check_finite else None,
        )
        relevances = tuple(torch.cat(parts) for parts in zip(*(r for r, _ in chunks), strict=True))
        attributions = relevances if isinstance(inputs, tuple) else relevances[0]
        if not return_convergence_delta:
            return attributions
        return attributions, delta_of(relevances, torch.cat([started for _, started in chunks]))

    def trace(
        self,
        inputs: Any,
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        contrast: Contrast | Default = DEFAULT,
        combine: str | Default = DEFAULT,
        guide: nn.Module | None = None,
        class_dim: int | None = None,
    ) -> Program:
        """Trace the whole explanation as one flat program, without the overhead of Python.

        The program computes what :meth:`attribute` does, for other inputs of these shapes and other targets.
        Decided once, by the example: which masks and constants are nonnegative, the layer that guides,
        warnings and errors. The batch size is fixed.

        Args:
            inputs, target, additional_forward_args: an example, as for :meth:`attribute`. Without a target
                the program explains the predicted class, and takes none.
            contrast, combine, guide, class_dim: as for :meth:`attribute`; they are fixed. Classes to be held
                against are those of the example, in every run.

        Returns:
            A module that is called as ``program(inputs, target, additional_forward_args)`` and returns the
            explained output and relevance shaped like ``inputs``. See
            :class:`~captum_abslrp.program.Program`.

        Raises:
            ValueError: if a module is in training mode, or if the model mixes samples and the example has
                more than one.
            TypeError, ValueError, IndexError, FloatingPointError, UnsupportedCallError: as :meth:`attribute`
                of the example.

        Example:
            >>> model = timm.create_model("test_vit").eval()
            >>> program = AbsLRP(model).trace(torch.rand(1, 3, 160, 160), target=3)
            >>> x = torch.rand(1, 3, 160, 160)
            >>> logits, relevance = program(x, target=7)
            >>> torch.equal(relevance, AbsLRP(model).attribute(x, target=7))
            True
        """
        contrast = self.contrast if isinstance(contrast, Default) else contrast
        combine = self._combine_for(inputs) if isinstance(combine, Default) else combine
        check_evaluation(self.model)
        options: dict[str, Any] = {"contrast": contrast, "combine": combine, "class_dim": class_dim}
        is_guided = combine == "guided" and contrast is not None
        if is_guided and guide is None:
            given = plain(inputs if isinstance(inputs, tuple) else (inputs,))
            extra = _format_additional_forward_args(additional_forward_args) or ()
            scores = scores_of(target, contrast, check_inputs(given, self.model))
            samples = Samples(given, None, None, extra, scores)
            guide = self._find_guide([_leaf(x) for x in given], samples)
        if guide is not None:
            options["guide"] = guide
        expected = self.attribute(inputs, target, additional_forward_args, **options)
        forward = self._to_guide(guide) if is_guided else self._to_inputs

        def explain(samples: Samples, chains: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
            maps = self._maps(samples, combine, class_dim, forward, checked=False, chains=chains)
            target = samples.target_in(maps.output)
            fits = fitting_targets(maps.output, target, samples.contrast, class_dim)
            return maps.output, fits, maps.combined(combine)

        return trace(
            self.model, explain, inputs, target, additional_forward_args, contrast, expected
        )

    def _combine_for(self, inputs: Any) -> str:
        """How maps are combined by default. Guided maps are those of one input."""
        several = isinstance(inputs, tuple) and len(inputs) > 1
        return "difference" if several and self.combine == "guided" else self.combine

    @property
    def signed(self) -> bool:
        """Whether relevance starts as the output itself, see :class:`~captum_abslrp.mappings.Mapping`."""
        mapping = self.mapping or find_mapping(self.model)
        return mapping is not None and mapping.signed

    def has_convergence_delta(self) -> bool:
        """Yes: ``attribute(..., return_convergence_delta=True)`` returns it."""
        return True

    def compute_convergence_delta(self, *args: Any, **kwargs: Any) -> Tensor:
        """Refused: Captum's delta of given attributions has no meaning for shares of relevance.

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

    def explain_observed(
        self,
        inputs: Any,
        target: Target,
        additional_forward_args: Any,
        observer: Observer,
        *,
        class_dim: int | None = None,
    ) -> None:
        """Explain the target alone for an observer of every call; arguments as for :meth:`attribute`."""
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
        self, leaves: Sequence[Tensor], samples: Samples, observer: Observer | None
    ) -> Explained:
        return Explained(self._forward(leaves, samples, observer), leaves)

    def _to_guide(self, guide: nn.Module | None) -> Forward:
        """The forward pass that explains the output of a layer, too."""
        guide = None if guide is None else part_of_model(self.model, guide, "guide")

        def forward(
            leaves: Sequence[Tensor], samples: Samples, observer: Observer | None
        ) -> Explained:
            nonlocal guide
            if guide is None:
                guide = self._find_guide(leaves, samples)
            with captured([guide], of_input=False, integers=None, goes_on=True) as (calls,):
                output = self._forward(leaves, samples, observer)
            if len(calls) != 1 or len(calls[0]) != 1:
                raise ValueError(
                    f"Expected `guide` to be a module that the model calls once and that returns one tensor "
                    f"that depends on the inputs, but got {type(guide).__name__} with {len(calls)} calls "
                    f"that return {[len(tensors) for tensors in calls]} such tensors."
                )
            return Explained(output, [*leaves, calls[0][0]], guide=guide)

        return forward

    def _find_guide(self, leaves: Sequence[Tensor], samples: Samples) -> nn.Module:
        first = samples._replace(inputs=tuple(leaves)).rows(0, 1)

        def run(image: Tensor) -> Tensor:
            return self._explained(self.model(image, *first.extra), first.scores, 1)

        with eager(self.model):
            return find_guide(self.model, first.inputs, run)

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
        given: tuple[Tensor, ...] = plain(inputs if isinstance(inputs, tuple) else (inputs,))
        batch_size = check_inputs(given, None if self._takes_integers else self.model)
        check_contrast(contrast)
        check_class_dim(class_dim)
        check_combine(combine, signed=self.signed)
        scores = scores_of(target, contrast, batch_size)
        if scores is not None:
            target, contrast = scores.index, contrast if scores.contrast is None else 1
        targets = expand_target(target, batch_size)
        contrasts = (
            contrast
            if contrast is None or isinstance(contrast, str)
            else expand_target(contrast, batch_size, name="contrast")
        )
        extra = _format_additional_forward_args(additional_forward_args) or ()
        extra = tuple(a.detach() if isinstance(a, Tensor) else a for a in extra)
        size = chunk_size(internal_batch_size, batch_size)
        automatic = internal_batch_size == "auto"
        check_model(self.model)
        samples = Samples(given, targets, contrasts, extra, scores)
        if automatic and batch_size > 1:
            size = self._fitting(samples, forward)
        zeros = ZeroMaps(batch_size)

        def restart() -> None:  # one sample at a time
            zeros.clear()
            self._check_rows(samples)

        if size < batch_size:
            self._check_rows(samples)
        explain = partial(
            self._explain_chunk,
            combine=combine,
            class_dim=class_dim,
            forward=forward,
            observer=observer,
            zeros=zeros,
        )
        chunks = in_chunks(samples, size, explain, shrinks=automatic, restart=restart)
        zeros.warn()
        return chunks

    def _check_rows(self, samples: Samples) -> None:
        """Raise where a function that is explained gives a sample another score when it is run alone."""
        if samples.scores is None or samples.scores.has_rows:
            return
        several = samples.rows(0, _COMPARED)
        with torch.no_grad(), eager(self.model), unchanged(self.model):

            def scores_in(part: Samples) -> Tensor:
                output = self.model(*part.inputs, *part.extra)
                found: Tensor = self._explained(output, part.scores, len(part.inputs[0]))
                return found

            together = scores_in(several)
            alone = torch.cat([scores_in(several.rows(i, i + 1)) for i in range(len(together))])
        least = 1e-2 * together.abs().max()
        if not torch.allclose(together, alone, rtol=1e-2, atol=float(least)):
            raise ValueError(
                "Expected the functions in `target` and `contrast` to give a sample the same score whichever "
                "samples are run with it, because samples are run in parts, but got other scores. Does a "
                "function hold a value for each sample? Give it a method `rows(start, stop)` that returns "
                "the function for these samples, as those of `captum_abslrp.targets` have it."
            )

    def _fitting(self, samples: Samples, forward: Forward) -> int:
        """How many samples fit into memory together, by the first of them."""
        first = samples.rows(0, 1)
        with torch.inference_mode(False), torch.enable_grad(), unchanged(self.model):
            explained = forward([_leaf(x) for x in first.inputs], first, None)
            return fitting(explained.output, len(samples.inputs[0]))

    def _explain_chunk(
        self,
        samples: Samples,
        start: int,
        *,
        combine: str,
        class_dim: int | None,
        forward: Forward,
        observer: Observer | None,
        zeros: ZeroMaps,
    ) -> Chunk:
        """Relevance of samples that are run together; the first of them is number `start` of all."""

        def maps_seen_by(observer: Observer | None, *, chains: bool = False) -> _Maps:
            with torch.inference_mode(False), torch.enable_grad(), unchanged(self.model):
                return self._maps(samples, combine, class_dim, forward, observer, chains=chains)

        for chains in (True, False):  # what is not finite may be so when it is scaled at each step
            try:
                maps = maps_seen_by(observer, chains=chains)
            except FloatingPointError:  # by the observer
                if chains:
                    continue
                raise
            finite = torch.stack([r.isfinite().all() for r in maps.relevances]).all()
            if (on_host(finite) if observer is None else bool(finite)) is not False:
                break
        else:
            if observer is None or not observer.finite:  # once more, to find the call
                maps_seen_by(Observer(finite=True))
            raise FloatingPointError(
                "Expected the map to be finite, but got NaN or infinite values, though those of all "
                "calls are finite. Compute in a wider dtype: `model.float()`, `model.double()`."
            )
        zero = zero_maps(maps.relevances, samples.inputs)
        if zero is not None:  # once more, to find the call where it ends
            again = Observer(traced=True, repeated=True)
            maps_seen_by(again)
            zeros.add(start, zero, again, maps.of_inputs)
        found = maps.combined(combine)
        if maps.parts:
            of_parts = [maps._replace(relevances=part).combined(combine) for part in maps.parts]
            found = [relevance for of_part in of_parts for relevance in of_part]
        started = torch.stack(maps.totals).sum(0)
        if len(started) == 1:
            return found, started[0]
        compared = maps.relevances[1:] if combine == "guided" else maps.relevances
        warn_of_noise([(of_target, of_contrast) for of_target, of_contrast in compared])
        if combine == "guided":
            warn_of_no_guide(found[0], maps.relevances[0][0])
        return found, started[0] - started[1] if combine == "difference" else started[0]

    def _maps(
        self,
        samples: Samples,
        combine: str,
        class_dim: int | None,
        forward: Forward,
        observer: Observer | None = None,
        *,
        checked: bool = True,
        chains: bool = True,
    ) -> _Maps:
        """One forward pass, and relevance of the target and of the contrast, if there is one."""
        leaves = [_leaf(x) for x in samples.inputs]
        output, explained, through, guide = forward(leaves, samples, observer)
        values, signed = output.detach(), self.signed
        options: dict[str, Any] = {"class_dim": class_dim, "signed": signed, "checked": checked}
        target = samples.target_in(values)
        if (
            samples.scores is not None
            and values.dim() == 1
            and isinstance(samples.contrast, Tensor)
        ):
            raise ValueError(
                "Expected `contrast` to be a function, too, where the function `target` returns one score "
                "per sample, but got classes. Pass `contrast=lambda out: ...`, or None."
            )
        seeds = [target_seed(values, target, **options)]
        contrasted = contrast_seed(
            values, target, samples.contrast, logits=logits(output), **options
        )
        if contrasted is not None and signed and combine == "difference":  # which is linear
            seeds = [seeds[0] - contrasted]
        elif contrasted is not None:
            seeds.append(contrasted)
        changes: list[Tensor] = []
        counts = None
        # Of the inputs of a guided map, relevance of the target alone is wanted.
        if combine == "guided" and observer is None:
            counts = [*[1] * len(leaves), *[len(seeds)] * (len(explained) - len(leaves))]
        relevances = propagate(
            output,
            explained,
            torch.stack(seeds),
            positive=not signed,
            counts=counts,
            changes=changes,
            chains=chains,
            through=through,
        )
        parts: list[list[Tensor]] = []
        if through is not None:
            count = len(seeds)
            parts = [
                [r[start : start + count] for r in relevances]
                for start in range(count, count * (1 + len(through.parts)), count)
            ]
            relevances = [r[:count] for r in relevances]
        started = torch.stack([seed.reshape(len(seed), -1).sum(1) for seed in seeds])
        of_inputs = explained is leaves
        return _Maps(relevances, [started, *changes], of_inputs, values, parts, self.model, guide)

    def _forward(
        self,
        leaves: Sequence[Tensor],
        samples: Samples,
        observer: Observer | None = None,
        *,
        fuses: bool = True,
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
        recording.fuses = fuses
        return self.run(leaves, samples.extra, recording, samples.scores)

    def _explained(self, output: Any, scores: Scores | None, batch_size: int) -> Any:
        """The tensor to explain, of what the model returns."""
        if scores is not None:
            return scores(output if self.output is None else self.output(output), batch_size)
        return logits_of(output) if self.output is None else self.output(output)

    def run(
        self,
        leaves: Sequence[Tensor],
        extra: tuple[Any, ...],
        recording: Recording,
        scores: Scores | None = None,
    ) -> Tensor:
        """Output of the model, (B, ...), as it depends on the leaves under a recording."""
        batch_size = len(leaves[0])
        # Clones, because a leaf cannot be changed in place, which the model may do.
        given = [leaf.clone() for leaf in leaves]
        recording.before_change = saver(self.model)
        with eager(self.model), recording:
            recording.depends.mark_seen(given)
            try:
                output = self.model(*given, *extra)
            except Exception as error:  # raised again, explained where it can be
                explain_missing_batch_dimension(self.model, leaves[0], error)
                raise
            recording.in_score = True
            output = self._explained(output, scores, batch_size)
            with torch._C.DisableTorchFunction():
                recording.check_visible(output)
                output = checked_output(output, batch_size)
                if recording.observer is None or not recording.observer.repeated:
                    warn_of_detached(recording.detached.reaching(output))
                return output


_COMPARED = 4
"""Samples that the scores of functions are compared on, when samples are run in parts."""


def _leaf(x: Tensor) -> Tensor:
    """A copy of an input that is a leaf of the history, unless the input is of integers."""
    leaf = x.clone().detach()
    return leaf.requires_grad_() if leaf.is_floating_point() else leaf


def delta_of(relevances: Sequence[Tensor], started: Tensor) -> Tensor:
    """The sum over each sample of tensors of relevance, (B, ...), less what it started with, (B,)."""
    exact = torch.promote_types(relevances[0].dtype, torch.float32)
    arrived = [r.to(exact).reshape(len(started), -1).sum(1) for r in relevances]
    return torch.stack(arrived).sum(0) - started.to(arrived[0])
