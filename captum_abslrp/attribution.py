"""The Captum attribution class of absLRP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
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
    """A recorded forward pass: the output to explain, and the tensors to attribute it to."""

    output: Tensor
    """The output to explain."""
    tensors: Sequence[Tensor]
    """The tensors whose relevance is computed."""
    through: Through | None = None
    """Parts of an inner tensor; the relevance that flows through each is propagated separately."""
    guide: nn.Module | None = None
    """The guide layer; its output is the last of the tensors."""


Forward = Callable[[Sequence[Tensor], Samples, Observer | None], Explained]
"""Maps leaf inputs, samples and an observer to the output and the tensors to explain."""

Chunk = tuple[list[Tensor], Tensor]
"""Relevance of the explained tensors, and the sum of the seed of each sample, (B,)."""


class _Maps(NamedTuple):
    """Relevance from one forward pass and one backward pass."""

    relevances: list[Tensor]
    """Relevance of each explained tensor, (S, ...), for each of S seeds. With a guide, the relevance of the
    inputs may have only the seed of the target."""
    totals: list[Tensor]
    """The sum of each seed and sample, (S, B), followed by its changes on the tail of the score."""
    of_inputs: bool
    """Whether the inputs are explained, rather than inner tensors."""
    output: Tensor
    """The output that is explained."""
    parts: list[list[Tensor]]
    """For each part of an inner tensor, the relevance that flows through it."""
    model: nn.Module
    """The model."""
    guide: nn.Module | None = None
    """The guide layer, if any."""

    def combined(self, combine: str) -> list[Tensor]:
        """Combine the maps of target and contrast into one map for each explained tensor."""
        if len(self.relevances[-1]) == 1:  # a guided map leaves out the guide layer
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

    Relevance starts at the target's output and is propagated backward call by call. Each call distributes it
    among the inputs that contributed positively, in proportion to their contributions and relative to the
    magnitude of its net output. Subtracting the relevance of the contrast removes evidence that the other
    classes share: :math:`R(\text{target}) - R(\text{contrast})`.

    Source: Vukadin, Afrić, Šilić, Delač, *Advancing Attribution-Based Neural Network Explainability
    through Relative Absolute Magnitude Layer-Wise Relevance Propagation and Multi-Component
    Evaluation*, ACM TIST 15(3), 2024.

    The model is never modified: no weights or flags change, and no hooks remain.

    Args:
        model: the model, in evaluation mode. If the model is compiled or wrapped in ``nn.DataParallel`` or
            ``DistributedDataParallel``, the inner module is explained, on the device of its weights.
        mapping: the mapping, which assigns a rule to each call: a :class:`~captum_abslrp.mappings.Mapping` or
            the name of a registered one. None selects it by the class of the model (``"generic"`` if the
            class is not registered). A rule set on a module, ``module.rule``, takes precedence.
        normalization: ``"separate"`` scales the relevance of each input of a call to the total of the seed
            (as published). ``"joint"`` scales the relevance of all inputs of a call together to the
            relevance of its output, which conserves relevance.
        output: a function that picks the tensor to explain from the model's output, for example
            ``lambda out: out[0]``. None uses the returned tensor, or ``logits`` or ``logits_per_image`` of
            a returned object or dict (such as Hugging Face's ``ModelOutput``).

    Raises:
        TypeError: if ``model`` is not a module, if any part of it is scripted or quantized, if the
            attribute ``rule`` of a submodule is a string or a class instead of a rule, or if another
            argument has the wrong type.
        ValueError: if the mapping or the normalization is unknown.

    Example:
        >>> model = timm.create_model("test_vit").eval()
        >>> x = torch.rand(2, 3, 160, 160)
        >>> relevance = AbsLRP(model).attribute(x, target=3)
        >>> relevance.shape
        torch.Size([2, 3, 160, 160])
    """

    _takes_integers: ClassVar[bool] = False
    """Whether integer inputs are allowed; relevance then ends at the tensors of a layer."""

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
        """Return an attributor with the settings that performed best on real models of this kind.

        For Vision Transformers and for convolutional networks with batch norm, the mapping is
        ``"recommended"``, and :meth:`attribute` defaults to the contrast ``"softmax"`` and to guided maps
        (to differences for a model with several inputs). All other models get the published method, because
        they were not measured. The attribute ``recommendation`` and the ``repr`` give the settings and the
        figures that they are based on.

        Args:
            model, output: as in :class:`AbsLRP`.

        Raises:
            TypeError: as in :class:`AbsLRP`.

        Example:
            >>> model = timm.create_model("test_vit").eval()
            >>> attributor = AbsLRP.recommended(model)
            >>> attributor.recommendation.mapping, attributor.contrast, attributor.combine
            ('recommended', 'softmax', 'guided')
            >>> x = torch.rand(2, 3, 160, 160)
            >>> attributor.attribute(x, target=model(x).argmax(1)).shape
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
            chosen = replace(
                self.recommendation,
                normalization=self.normalization,
                contrast=self.contrast,
                combine=self.combine,
            )
            if chosen != self.recommendation:
                chosen = replace(chosen, figures="Some settings are not the recommended ones.")
            name = f"{type(self).__name__}.recommended"
            return f"{name}({type(self.model).__name__}): {chosen}"
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
            target: index of the output to explain, in any form that Captum accepts: an int or a
                one-element tensor for all samples; a list or 1-d tensor of B ints; for outputs with more
                than two dimensions, a tuple or a list of B tuples. If there are fewer indices than
                output dimensions, the sum over the remaining dimensions is explained: ``k`` is class k
                at all positions of an output (B, K, H, W). None explains the predicted class, or the only
                output. A function is accepted as well: it maps the model's output (or the tensor that
                ``output`` picks) to one score per sample, (B,), or to class scores, (B, K), of which the
                predicted one is explained. The function receives the samples of one internal batch.
                :mod:`captum_abslrp.targets` provides functions for segments, boxes and similarities.
            additional_forward_args: arguments of the model after the inputs, one argument or a tuple.
            contrast: the classes that the target is compared with: ``"others"`` weights all other classes
                equally (as published, and the default); ``"softmax"`` weights them by their probability;
                an index in any form of ``target`` selects one class (why this class rather than that
                one? Pass ``combine="difference"`` as well, because a guided map has hardly any negative
                relevance). None returns the map of the target alone. A model with one output per sample
                has no contrast. Classes are compared at the position of the target; if the target is a sum
                over positions, so is the contrast. If the target is a function, the contrast can be a
                function as well (why more of this score than of that one?). Captum's ``NoiseTunnel`` uses
                one contrast class per sample for all noisy copies of the sample.
            combine: how to combine the maps of target and contrast. ``"difference"`` subtracts them (as
                published, and the default). ``"gated"`` keeps the target's map where it exceeds the
                contrast's map and is 0 elsewhere (not with signed rules). ``"guided"``, for images,
                multiplies the target's map by the positive part of the difference at a layer, upsampled
                bilinearly, and rescales it to the total magnitude of the target's map. A guided map has the
                resolution of the target's map and the class contrast of the difference.
            guide: the layer for ``"guided"``: a module whose output is a feature map, (B, D, h, w) or
                (B, h, w, D), or tokens, (B, L, D). None selects a layer in the middle of the model, using
                one forward pass of the first image.
            class_dim: the class dimension of the output, for ``"others"``, ``"softmax"`` and the
                predicted class. None is dimension 1, as in (B, K), (B, K, L), (B, K, H, W); pass 2 or -1
                for (B, L, K).
            internal_batch_size: maximum number of samples per forward pass. None runs all at once.
                ``"auto"`` runs as many as fit into half of the free memory, estimated from the saved
                tensors of one sample.
            return_convergence_delta: whether to return the delta as well.
            check_finite: check the values of every call in the forward and the backward pass. This takes
                time, especially on a GPU. On the CPU it always happens if a map is not finite.

        Returns:
            Relevance with the shape, dtype and device of ``inputs``, without autograd history. Its unit
            depends on the rules:

            - absLRP rules, the default: a share. The map of the target sums to one and a difference to
              zero, if no relevance is lost.
            - signed rules (:attr:`signed`), which :meth:`recommended` selects for most models: the unit of
              the score. Relevance starts as the score of the target, or as its difference from the score
              of the contrast. Biases and constants keep a part.
            - a guided map: the magnitudes sum to those of the target's map.

            With ``return_convergence_delta``, a pair of the relevance and the delta, (B,): the sum of the
            relevance of all inputs minus what it started as. This is 1 for absLRP rules (0 for a
            difference), and the score for signed rules (the difference of scores for a difference). For
            gated and guided maps, it is what the target's map started as.

        Values on a GPU are not checked unless ``check_finite`` is set, so that no check waits for the
        device. Pass targets as ints or as CPU tensors.

        Warns:
            UserWarning: if a layer is in training mode, or (on the CPU) if the maps of target and
                contrast are so similar that their difference is rounding error.

        Raises:
            TypeError: if the inputs or the target have the wrong type, or if the model does not return a
                tensor; or if the contrast is a function, but the target is not.
            ValueError: if inputs are not finite (checked on the CPU only) or have no batch dimension, or if
                the target does not fit the output; if there is a contrast, but the target is a sum over
                classes; if a lazy layer of the model is not initialized.
            IndexError: if the target or ``class_dim`` is out of range.
            FloatingPointError: if a map is not finite (on the CPU, or with ``check_finite``). The message
                names the call with the first value that is not finite.
            UnsupportedCallError: if the model makes a call that has no rule. The message names the call.

        Example:
            >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5)).eval()
            >>> x = torch.rand(2, 3)
            >>> why_2 = AbsLRP(model).attribute(x, target=2)
            >>> why_2_rather_than_0 = AbsLRP(model).attribute(x, target=2, contrast=0)

            For a model that returns class scores at positions, (B, K, H, W), explain one position or all:

            >>> model = nn.Conv2d(3, 5, 3, padding=1).eval()
            >>> x = torch.rand(2, 3, 8, 8)
            >>> class_2_in_the_corner = AbsLRP(model).attribute(x, target=(2, 0, 0))
            >>> class_2_anywhere = AbsLRP(model).attribute(x, target=2)

            Explain any score, here why there is more of class 2 on the right than on the left:

            >>> def left(out): return out[:, 2, :, :4].mean((1, 2))
            >>> def right(out): return out[:, 2, :, 4:].mean((1, 2))
            >>> relevance = AbsLRP(model).attribute(x, target=right, contrast=left)
        """
        contrast = self.contrast if isinstance(contrast, Default) else contrast
        combine = self._combine_for(inputs) if isinstance(combine, Default) else combine
        if guide is not None and combine != "guided":
            raise ValueError(
                f'Expected `guide` only with `combine="guided"`, but got `combine={combine!r}`.'
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
        """Trace the whole explanation into one flat program, without the overhead of Python.

        The program computes the same as :meth:`attribute`, for other inputs of the same shapes and other
        targets. The example fixes the batch size, the guide layer, and which masks and constants are
        nonnegative. Warnings and errors are raised for the example only.

        Args:
            inputs, target, additional_forward_args: an example, as in :meth:`attribute`. Without a target
                the program explains the predicted class and accepts no target.
            contrast, combine, guide, class_dim: as in :meth:`attribute`; they are fixed. If the contrast is
                given as classes, every run uses the classes of the example.

        Returns:
            A module that is called as ``program(inputs, target, additional_forward_args)`` and returns the
            explained output and the relevance, which has the shape of ``inputs``. See
            :class:`~captum_abslrp.program.Program`.

        Raises:
            ValueError: if a module is in training mode, or if the model mixes samples and the example has
                more than one.
            TypeError, ValueError, IndexError, FloatingPointError, UnsupportedCallError: as in
                :meth:`attribute`, for the example.

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
        """The default of `combine` for these inputs. Guided maps require a single input."""
        several = isinstance(inputs, tuple) and len(inputs) > 1
        return "difference" if several and self.combine == "guided" else self.combine

    @property
    def signed(self) -> bool:
        """Whether the mapping has signed rules, see :class:`~captum_abslrp.mappings.Mapping`."""
        mapping = self.mapping or find_mapping(self.model)
        return mapping is not None and mapping.signed

    def has_convergence_delta(self) -> bool:
        """Return True: ``attribute(..., return_convergence_delta=True)`` returns the delta."""
        return True

    def compute_convergence_delta(self, *args: Any, **kwargs: Any) -> Tensor:
        """Not supported: the delta of given attributions is not known. :meth:`attribute` returns its delta.

        Raises:
            NotImplementedError: always.

        Example:
            >>> model, x = nn.Linear(3, 4).eval(), torch.rand(2, 3)
            >>> relevance, delta = AbsLRP(model).attribute(x, 1, return_convergence_delta=True)
            >>> delta.shape
            torch.Size([2])
        """
        raise NotImplementedError(
            "Expected `attribute(..., return_convergence_delta=True)`, but got a call of "
            "`compute_convergence_delta`, which compares the sum of an attribution with the difference of "
            "two outputs of the model. Relevance is compared with what it started as, which only `attribute` "
            "knows."
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
        """Explain the target alone while an observer sees every call; arguments as in :meth:`attribute`."""
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
        """The forward pass for guided maps, which also explains the output of the guide layer."""
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
                    f"that depends on the inputs, but got {type(guide).__name__}, which is called "
                    f"{len(calls)} times and returns {[len(tensors) for tensors in calls]} such tensors. "
                    f"Choose another layer."
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
        """Check the arguments, then run :meth:`_explain_chunk` for all samples, chunk by chunk."""
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
        """Raise if a target function scores a sample differently when the sample is run alone."""
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
                "Expected the functions in `target` and `contrast` to give a sample the same score in every "
                "batch, because samples are run in several batches, but got different scores. If a function "
                "holds one value per sample, add a method `rows(start, stop)` that returns the function for "
                "these samples, like the functions in `captum_abslrp.targets`."
            )

    def _fitting(self, samples: Samples, forward: Forward) -> int:
        """The number of samples that fit into memory together, estimated from the first one."""
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
        """Compute relevance for one chunk of samples, which begins at index `start`."""

        def maps_seen_by(observer: Observer | None, *, chains: bool = False) -> _Maps:
            with torch.inference_mode(False), torch.enable_grad(), unchanged(self.model):
                return self._maps(samples, combine, class_dim, forward, observer, chains=chains)

        for chains in (True, False):  # scaling at every step may avoid values that are not finite
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
            if observer is None or not observer.finite:  # run again to find the call
                maps_seen_by(Observer(finite=True))
            raise FloatingPointError(
                "Expected the map to be finite, but got NaN or infinite values, although the values of all "
                "calls are finite. Use a wider dtype: `model.float()` or `model.double()`."
            )
        zero = zero_maps(maps.relevances, samples.inputs)
        if zero is not None:  # run again to find the call where relevance ends
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
        """Run one forward pass and propagate the relevance of the target and of the contrast, if any."""
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
                "Expected `contrast` to be a function, because the function `target` returns one score per "
                "sample, but got classes. Pass `contrast=lambda out: ...`, or None."
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
        # For the inputs of a guided map, only the relevance of the target is needed.
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
        """Run the model; the autograd history of its output, (B, ...), applies the rules."""
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
        """The tensor to explain, picked from the model's output."""
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
        """Run the model on the leaves under a recording and return the output to explain, (B, ...)."""
        batch_size = len(leaves[0])
        # Clone the leaves: the model may modify its inputs in place, which autograd forbids for leaves.
        given = [leaf.clone() for leaf in leaves]
        recording.before_change = saver(self.model)
        with eager(self.model), recording:
            recording.depends.mark_seen(given)
            try:
                output = self.model(*given, *extra)
            except Exception as error:  # raise a clearer error if possible
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
"""Number of samples on which :meth:`AbsLRP._check_rows` compares scores."""


def _leaf(x: Tensor) -> Tensor:
    """A copy of an input, which requires gradients if it is floating-point."""
    leaf = x.clone().detach()
    return leaf.requires_grad_() if leaf.is_floating_point() else leaf


def delta_of(relevances: Sequence[Tensor], started: Tensor) -> Tensor:
    """Compute the delta: the sum of relevance, (B, ...), per sample, minus the sum of its seed, (B,)."""
    exact = torch.promote_types(relevances[0].dtype, torch.float32)
    arrived = [r.to(exact).reshape(len(started), -1).sum(1) for r in relevances]
    return torch.stack(arrived).sum(0) - started.to(arrived[0])
