"""Relevance of the inputs or outputs of layers inside a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NoReturn

import torch
from captum.attr._utils.attribution import LayerAttribution
from torch import Tensor, nn

from captum_abslrp.attribution import AbsLRP, Explained, delta_of
from captum_abslrp.captures import captured
from captum_abslrp.checks import IndependentOutput, part_of_model, unwrapped
from captum_abslrp.chunks import Samples
from captum_abslrp.engine.observers import Observer
from captum_abslrp.engine.propagation import Through
from captum_abslrp.engine.samples import Misaligned, check_aligned
from captum_abslrp.integers import IntegerInputs
from captum_abslrp.mappings import Mapping
from captum_abslrp.noise_tunnel import for_captum
from captum_abslrp.recommendation import OTHER, recommend
from captum_abslrp.seeds import DEFAULT, Contrast, Default, Target
from captum_abslrp.selection import Selection, channel_dimension, parts_of

__all__ = ["LayerAbsLRP"]


class LayerAbsLRP(AbsLRP, LayerAttribution):
    r"""absLRP relevance of the output or the input of a layer of the model.

    Relevance is propagated as in :class:`AbsLRP`, but the backward pass stops at the layer.

    With the published rules, the relevance of one seed (``contrast=None``) sums to one over any set of
    tensors that separates the inputs from the output, if no relevance is lost. With ``normalization="joint"``
    this holds:

    - at the input and the output of every block of a ResNet;
    - at the input and the output of every block of a Vision Transformer, as long as relevance is positive.
      The softmax of attention can produce negative relevance from negative inputs; calls then conserve the
      sum of magnitudes. Less than one reaches the tensors before the blocks, because the class token and
      the position embedding are constants, which absorb their share.

    It does not hold inside a block, where several paths run in parallel and each carries a share.

    With ``normalization="separate"`` each input of a call gets a total of one. A tensor that two calls
    read, such as the one between two blocks, therefore has a total of two; the next single call reduces it
    to one again.

    The weights of the model are never modified. During the forward pass the layer has hooks, which ignore
    calls from other threads. They are always removed, even after an error.

    With integer inputs (token indices), relevance ends at the tensors of the layer: an embedding, or a layer
    after one. The explained tensors are those that depend on both the inputs and parameters of the model,
    which excludes masks. If there is none, all floating-point tensors of the layer are explained, so that a
    position embedding can be explained as well. Several such layers are explained together: with
    ``normalization="joint"`` a sum of their outputs divides the relevance among them.

    Args:
        model: as in :class:`AbsLRP`.
        layer: a module of the model, or the model itself; or a list of such modules, in any order.
        mapping, normalization, output: as in :class:`AbsLRP`.

    Raises:
        TypeError: as in :class:`AbsLRP`, or if ``layer`` is neither a module nor a list of modules.
        ValueError: as in :class:`AbsLRP`, or if ``layer`` is not part of the model or is an empty list.

    Example:
        >>> model = timm.create_model("test_vit").eval()
        >>> x = torch.rand(2, 3, 160, 160)
        >>> relevance = LayerAbsLRP(model, model.blocks[0]).attribute(x, target=3)
        >>> relevance.shape  # samples, tokens, features
        torch.Size([2, 101, 64])
        >>> every_block = LayerAbsLRP(model, list(model.blocks)).attribute(x, target=3)
        >>> len(every_block) == len(model.blocks)
        True
    """

    _takes_integers = True

    def __init__(
        self,
        model: nn.Module,
        layer: nn.Module | Sequence[nn.Module],
        mapping: Mapping | str | None = None,
        *,
        normalization: str = "separate",
        output: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__(model, mapping, normalization=normalization, output=output)
        several = isinstance(layer, (list, tuple))
        given: Sequence[Any] = layer if isinstance(layer, (list, tuple)) else [layer]
        layers = [part_of_model(self.model, part) for part in given]
        if not layers:
            raise ValueError("Expected `layer` to have at least one module, but got an empty list.")
        LayerAttribution.__init__(self, self.model, layers if several else layers[0])

    @staticmethod
    def recommended(  # type: ignore[override]  # a layer is needed as well
        model: nn.Module,
        layer: nn.Module | Sequence[nn.Module],
        *,
        output: Callable[[Any], Tensor] | None = None,
    ) -> LayerAbsLRP:
        """Return an attributor of a layer with the rules of :meth:`AbsLRP.recommended`.

        The mapping, the normalization and the default contrast are those of :meth:`AbsLRP.recommended` for
        this kind of model. Maps of target and contrast are subtracted, because the relevance of a layer has
        no guided map.

        Args:
            model, layer, output: as in :class:`LayerAbsLRP`.

        Raises:
            TypeError, ValueError: as in :class:`LayerAbsLRP`.

        Example:
            >>> model = timm.create_model("test_vit").eval()
            >>> attributor = LayerAbsLRP.recommended(model, model.blocks[0])
            >>> attributor.recommendation.mapping, attributor.contrast, attributor.combine
            ('recommended', 'softmax', 'difference')
            >>> attributor.attribute(torch.rand(2, 3, 160, 160), target=3).shape
            torch.Size([2, 101, 64])
        """
        chosen = recommend(unwrapped(model)) if isinstance(model, nn.Module) else OTHER
        if chosen is not OTHER:
            figures = "Maps of pixels were measured, maps of layers were not."
            chosen = replace(chosen, combine="difference", figures=figures)
        attributor = LayerAbsLRP(
            model, layer, chosen.mapping, normalization=chosen.normalization, output=output
        )
        attributor.recommendation = chosen
        attributor.contrast = chosen.contrast
        return attributor

    @for_captum
    def attribute(  # type: ignore[override]  # options are keyword-only
        self,
        inputs: Any,
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        contrast: Contrast | Default = DEFAULT,
        combine: str = "difference",
        class_dim: int | None = None,
        attribute_to_layer_input: bool = False,
        call_index: int | Sequence[int | None] | None = None,
        select: Selection | None = None,
        select_dim: int | None = None,
        internal_batch_size: int | str | None = None,
        return_convergence_delta: bool = False,
        check_finite: bool = False,
    ) -> Any:
        r"""Attribute the target's output to the elements of the layer's output or input.

        Args:
            inputs: as in :meth:`AbsLRP.attribute`, or integers such as token indices.
            target, additional_forward_args, contrast, class_dim, internal_batch_size, check_finite:
                as in :meth:`AbsLRP.attribute`.
            combine: ``"difference"``, or ``"gated"`` without signed rules. A layer has no guided map.
            attribute_to_layer_input: explain the input of the layer instead of its output. Relevance that
                bypasses the layer through a shortcut is not included.
            call_index: index of the call to explain if the model calls the layer more than once, counted
                from 0 in the order in which calls start (for inputs) or return (for outputs). For several
                layers, an int for all or a list with one entry per layer.
            select: channels of the layer: an index; a list or a tensor of indices; one weight or boolean per
                channel; or a tensor of weights that broadcasts with the elements of a sample. The result is
                then the part of the relevance of the *inputs* that flows through these channels, instead of
                the relevance of the layer. It shows where a concept of the layer lies in the input (concept
                relevance propagation, Achtibat et al. 2023). A list of selections, ``[[3], [7, 8]]``, is
                computed in one pass.
            select_dim: the channel dimension. None selects the last dimension for tokens, (B, L, D), and for
                feature maps of layers whose linear layers or layer norms expect it; otherwise dimension 1.
                Pass 1 to select tokens of (B, L, D).
            return_convergence_delta: whether to return the delta as well.

        Returns:
            Relevance with the shape, dtype and device of the layer's output (or input), without autograd
            history. If the layer returns (or receives, by position or keyword) several tensors that depend on
            the inputs, a tuple of such tensors, as is Captum's convention. A tensor that is passed twice is
            included once. Relevance is zero if the output of the model does not depend on the tensor.

            For a list of layers, a list with one entry per layer, in the same order, from one forward and
            one backward pass. With ``select``, relevance with the shape of ``inputs``, or a list of it with
            one entry per selection. If the layer has no bypass, the maps of all its channels sum to the map
            of the model. With ``return_convergence_delta``, a pair of the relevance and the delta, (B,), or
            a list of deltas with one per layer: the sum of the relevance of the layer's tensors minus what
            relevance started as, in the units of :meth:`AbsLRP.attribute`. The delta shows how much
            relevance bypasses the layer or is counted twice.

        Raises:
            TypeError, IndexError, FloatingPointError, UnsupportedCallError: as in :meth:`AbsLRP.attribute`.
            ValueError: as in :meth:`AbsLRP.attribute`; or if a layer is not called, if it is called more than
                once and ``call_index`` is None, or if its tensors do not depend on the inputs; or if samples
                are not in the leading dimension of its tensors, although they are run in several batches or
                the delta is requested.

        Example:
            >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
            >>> x = torch.rand(2, 3, 8, 8)
            >>> _ = model.eval()(x)
            >>> relevance = LayerAbsLRP(model, model[0]).attribute(x, target=2, contrast=None)
            >>> relevance.sum(dim=(2, 3)).shape  # share of each channel
            torch.Size([2, 4])

            Explain a model of token indices:

            >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 5)).eval()
            >>> tokens = torch.tensor([[1, 5, 2], [8, 0, 3]])
            >>> relevance = LayerAbsLRP(model, model[0]).attribute(tokens, target=2)
            >>> relevance.sum(-1).shape  # of each token
            torch.Size([2, 3])

            Split the map of a class into the parts that flow through the first two channels and the others:

            >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
            >>> x = torch.rand(2, 3, 8, 8)
            >>> _ = model.eval()(x)
            >>> layer = LayerAbsLRP(model, model[1])
            >>> parts = layer.attribute(x, target=2, select=[[0, 1], [2, 3]])
            >>> torch.allclose(parts[0] + parts[1], AbsLRP(model).attribute(x, target=2), atol=1e-6)
            True
        """
        contrast = self.contrast if isinstance(contrast, Default) else contrast
        if select is not None:
            options: dict[str, Any] = {
                "contrast": contrast,
                "combine": combine,
                "class_dim": class_dim,
                "internal_batch_size": internal_batch_size,
                "check_finite": check_finite,
            }
            if return_convergence_delta:
                raise ValueError(
                    "Expected no `return_convergence_delta` with `select`, because the total of a part of "
                    "the relevance is not known, but got both. Omit one of them."
                )
            return self._attribute_through(
                select,
                select_dim,
                (inputs, target, additional_forward_args),
                of_input=attribute_to_layer_input,
                call_index=call_index,
                **options,
            )
        if combine == "guided":
            raise ValueError(
                'Expected `combine` to be "difference" or "gated" for the relevance of a layer, but got '
                '"guided".'
            )
        several = isinstance(self.layer, list)
        layers: list[nn.Module] = self.layer if several else [self.layer]
        wanted = _call_indices(call_index, len(layers) if several else None)
        sizes: list[int] = []
        in_order: list[tuple[int, list[bool]]] = []

        def forward(
            leaves: Sequence[Tensor], samples: Samples, observer: Observer | None
        ) -> Explained:
            tokens = not all(leaf.is_floating_point() for leaf in leaves)
            integers = IntegerInputs(leaves) if tokens else None

            def choose() -> list[list[Tensor]]:
                return [
                    self._choose(*of_layer, of_input=attribute_to_layer_input, integers=tokens)
                    for of_layer in zip(layers, calls, wanted, strict=True)
                ]

            with (
                integers or nullcontext(),
                captured(
                    layers,
                    of_input=attribute_to_layer_input,
                    integers=integers,
                    goes_on=len(layers) > 1,
                ) as calls,
            ):
                try:
                    output = self._forward(leaves, samples, observer)
                except IndependentOutput as error:
                    choose()  # raises if that is why
                    if not tokens:
                        raise
                    raise IndependentOutput(
                        f"Expected the output of the model to depend on the tensors of "
                        f"{' or '.join(map(self._name, layers))}, but got an output that does not. The model "
                        f"does not use them, detaches them or runs under `torch.no_grad()` after them."
                    ) from error
            chosen = choose()
            sizes[:] = map(len, chosen)
            count = len(leaves[0])
            in_order.append(
                (count, [all(_in_order(t, count) for t in tensors) for tensors in chosen])
            )
            return Explained(output, [tensor for tensors in chosen for tensor in tensors])

        chunks = self._explain(
            inputs,
            target,
            additional_forward_args,
            contrast,
            combine,
            internal_batch_size,
            class_dim=class_dim,
            forward=forward,
            observer=Observer(finite=True) if check_finite else None,
        )
        batch_size = sum(len(started) for _, started in chunks)
        parts = [iter(relevances) for relevances, _ in chunks]
        most = max(count for count, _ in in_order)  # for one sample, only the shape is known
        of_most = [flags for count, flags in in_order if count == most]
        ordered = [all(flags) for flags in zip(*of_most, strict=True)]
        attributions: list[Any] = []
        deltas: list[Tensor] = []
        for layer, size, apart in zip(layers, sizes, ordered, strict=True):
            of_parts = [[next(part) for _ in range(size)] for part in parts]
            if not apart and (len(parts) > 1 or (return_convergence_delta and batch_size > 1)):
                raise ValueError(
                    f"Expected samples to be in the leading dimension of the tensors of "
                    f"{self._name(layer)}, because they are run in several batches or the delta is "
                    f"requested, but got relevance of shape {tuple(of_parts[0][0].shape)} for the first of "
                    f"{len(parts)} batches. Call `attribute` for one sample at a time."
                )
            relevances = tuple(map(_joined, zip(*of_parts, strict=True)))
            attributions.append(relevances if size > 1 else relevances[0])
            if return_convergence_delta:
                deltas.append(delta_of(relevances, torch.cat([started for _, started in chunks])))
        if not return_convergence_delta:
            return attributions if several else attributions[0]
        return (attributions, deltas) if several else (attributions[0], deltas[0])

    def _attribute_through(
        self,
        select: Selection,
        select_dim: int | None,
        arguments: tuple[Any, Target, Any],
        *,
        contrast: Contrast,
        combine: str,
        class_dim: int | None,
        internal_batch_size: int | str | None,
        check_finite: bool,
        of_input: bool,
        call_index: int | Sequence[int | None] | None,
    ) -> Any:
        """Compute the relevance of the inputs that flows through parts of the layer."""
        if isinstance(self.layer, list):
            raise ValueError(
                f"Expected one layer with `select`, but got {len(self.layer)}. Construct `LayerAbsLRP` with "
                f"a single layer."
            )
        if combine != "difference":
            raise ValueError(
                f'Expected `combine` to be "difference" with `select`, because the maps of parts must sum to '
                f"the whole map, but got {combine!r}."
            )
        inputs = arguments[0]
        (wanted,) = _call_indices(call_index, None)
        several = False

        def forward(
            leaves: Sequence[Tensor], samples: Samples, observer: Observer | None
        ) -> Explained:
            nonlocal several
            if not all(leaf.is_floating_point() for leaf in leaves):
                raise TypeError(
                    "Expected `inputs` to have a floating-point dtype with `select`, because the result is "
                    "the relevance of the inputs, but got integers. Explain a model that takes embeddings."
                )
            # Fused attention scales relevance inside the call, by seed, which would break the split.
            fuses = self.normalization != "joint"
            with captured([self.layer], of_input=of_input, integers=None, goes_on=True) as (calls,):
                output = self._forward(leaves, samples, observer, fuses=fuses)
            found = self._choose(self.layer, calls, wanted, of_input=of_input, integers=False)
            if len(found) != 1:
                raise ValueError(
                    f"Expected {self._name(self.layer)} to have one tensor with `select`, but got "
                    f"{len(found)}. Choose a layer inside it or after it."
                )
            dim = channel_dimension(self.layer, found[0]) if select_dim is None else select_dim
            parts, several = parts_of(select, found[0], dim)
            return Explained(output, leaves, Through(found[0], parts))

        chunks = self._explain(
            *arguments,
            contrast,
            combine,
            internal_batch_size,
            class_dim=class_dim,
            forward=forward,
            observer=Observer(finite=True) if check_finite else None,
        )
        joined = [torch.cat(parts) for parts in zip(*(found for found, _ in chunks), strict=True)]
        size = len(inputs) if isinstance(inputs, tuple) else 1
        of_parts = [tuple(joined[i : i + size]) for i in range(0, len(joined), size)]
        maps: list[Any] = [part if isinstance(inputs, tuple) else part[0] for part in of_parts]
        return maps if several else maps[0]

    def trace(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported: a traced program explains inputs, not layers.

        Raises:
            NotImplementedError: always.

        Example:
            >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5)).eval()
            >>> AbsLRP(model).trace(torch.rand(2, 3), target=1)(torch.rand(2, 3), 4)[1].shape
            torch.Size([2, 3])
        """
        raise NotImplementedError(
            "Expected `AbsLRP` for `trace`, which explains inputs, but got `LayerAbsLRP`. Use "
            "`AbsLRP(model).trace(...)`, or `attribute` for layers."
        )

    def _name(self, layer: nn.Module) -> str:
        paths = (path for path, m in self.model.named_modules() if m is layer)
        path = next(paths, "layer")  # the default: the layer has been removed from the model since
        return f"`{path or 'model'}` ({type(layer).__name__})"

    def _choose(
        self,
        layer: nn.Module,
        calls: list[list[Tensor]],
        call_index: int | None,
        *,
        of_input: bool,
        integers: bool,
    ) -> list[Tensor]:
        """The tensors of the selected call of a layer."""
        name = self._name(layer)
        if not calls:
            raise ValueError(
                f"Expected {name} to be called by the model, but got no call of it. The model does not "
                f"call containers such as `nn.ModuleList`, nor layers whose weights the parent module uses "
                f"directly, as in `nn.MultiheadAttention`. Choose a layer that is called, or all modules "
                f"of a container, `LayerAbsLRP(model, list(container))`."
            )
        if call_index is None and len(calls) > 1:
            raise ValueError(
                f"Expected {name} to be called once, but got {len(calls)} calls in one forward "
                f"pass. Select one with `call_index=0` to `call_index={len(calls) - 1}`."
            )
        if call_index is not None and not 0 <= call_index < len(calls):
            raise ValueError(
                f"Expected `call_index` to be an int from 0 to {len(calls) - 1}, because {name} "
                f"is called {len(calls)} times in one forward pass, but got {call_index!r}."
            )
        found = calls[call_index or 0]
        if not found and integers and of_input:
            raise ValueError(
                f"Expected {name} to have a floating-point input, because `inputs` are integers, but got "
                f"none. Explain its output with `attribute_to_layer_input=False`."
            )
        if not found:
            raise ValueError(
                f"Expected the {'input' if of_input else 'output'} of {name} to depend on "
                f"`inputs`, but got one that does not, that is computed under `torch.no_grad()`, or that is "
                f"inside a module with a rule of its own. Choose another layer."
            )
        return found


def _call_indices(call_index: Any, layers: int | None) -> list[int | None]:
    """The call index of each layer; `layers` is None for a single layer."""
    if layers is not None and isinstance(call_index, (list, tuple)):
        if len(call_index) != layers:
            raise ValueError(
                f"Expected `call_index` to have one entry per layer ({layers}), but got {call_index!r}."
            )
        indices = list(call_index)
    else:
        indices = [call_index] * (layers or 1)
    for index in indices:
        if index is not None and (isinstance(index, bool) or not isinstance(index, int)):
            several = "" if layers is None else " or a list with one entry per layer"
            raise ValueError(
                f"Expected `call_index` to be an int{several}, but got {call_index!r}."
            )
    return indices


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _in_order(tensor: Tensor, batch_size: int) -> bool:
    """Whether samples are in the leading dimension."""
    if batch_size == 1:  # samples are not tracked, only the shape is known
        return tensor.dim() > 0 and len(tensor) == 1
    try:
        check_aligned(tensor, batch_size)
    except Misaligned:
        return False
    return True
