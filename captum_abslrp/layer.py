"""Relevance inside a model: at the input or the output of any of its modules."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from captum.attr._utils.attribution import LayerAttribution
from captum.log import log_usage
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from captum_abslrp.alignment import Misaligned, check_aligned, hand_on_samples
from captum_abslrp.attribution import AbsLRP, unwrapped
from captum_abslrp.calls import map_instances, tensors_in
from captum_abslrp.contrast import Contrast, Target
from captum_abslrp.diagnostics import Watch
from captum_abslrp.interception import carries_relevance, rule_of_layer
from captum_abslrp.mappings import Mapping

__all__ = ["LayerAbsLRP"]


class LayerAbsLRP(AbsLRP, LayerAttribution):
    r"""absLRP relevance of what a layer of the model returns, or is given.

    Relevance starts and goes back as for :class:`AbsLRP`; what has arrived at the layer is returned,
    and nothing is asked of the calls before it.

    The relevance of one seed (``contrast=None``) adds up to one over all tensors that cut the way from
    the inputs to the output, as far as no relevance is lost. With ``normalization="joint"`` this holds:

    - at the input and the output of every block of a ResNet;
    - at those of every block of a Vision Transformer, too, as long as relevance is positive. The
      softmax of attention can make some of it negative where its inputs are, and what every call
      keeps is the sum of magnitudes. Before the blocks less than one arrives: the class token and
      the position embedding are constants, which keep their part;
    - not inside of a block, where more than one path leads past a layer: each gets its part.

    With ``normalization="separate"`` every input of a call gets a total of one on its own. Where two
    calls read the same tensor, as between two blocks, it adds up to two; a single call before them
    brings it back to one.

    The weights of the model are never changed. While the forward pass runs, the layer has hooks that
    let the calls of other threads through; they are removed whatever happens.

    Args:
        model: as for :class:`AbsLRP`.
        layer: a module of the model, or the model itself.
        mapping, normalization, output: as for :class:`AbsLRP`.

    Raises:
        TypeError: as for :class:`AbsLRP`, or if ``layer`` is no module.
        ValueError: as for :class:`AbsLRP`, or if ``layer`` is not part of the model.

    Example:
        >>> model = timm.create_model("test_vit").eval()
        >>> x = torch.rand(2, 3, 160, 160)
        >>> relevance = LayerAbsLRP(model, model.blocks[0]).attribute(x, target=3)
        >>> relevance.shape  # samples, tokens, features
        torch.Size([2, 101, 64])
    """

    def __init__(
        self,
        model: nn.Module,
        layer: nn.Module,
        mapping: Mapping | str | None = None,
        *,
        normalization: str = "separate",
        output: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__(model, mapping, normalization=normalization, output=output)
        if not isinstance(layer, nn.Module):
            raise TypeError(
                f"Expected `layer` to be a torch.nn.Module, but got {type(layer).__name__}."
            )
        layer = unwrapped(layer)
        if not any(module is layer for module in self.model.modules()):
            raise ValueError(
                f"Expected `layer` to be a module of `model`, but got a {type(layer).__name__} that "
                f"is none of them."
            )
        LayerAttribution.__init__(self, self.model, layer)

    @log_usage()
    def attribute(  # type: ignore[override]  # returns no delta
        self,
        inputs: Any,
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        contrast: Contrast = "others",
        combine: str = "difference",
        attribute_to_layer_input: bool = False,
        call_index: int | None = None,
        internal_batch_size: int | str | None = None,
        check_finite: bool = False,
    ) -> Any:
        r"""Attribute the target's output to the elements of the layer's output or input.

        Args:
            inputs, target, additional_forward_args, contrast, combine, internal_batch_size, check_finite:
                as for :meth:`AbsLRP.attribute`.
            attribute_to_layer_input: explain what the layer is given instead of what it returns.
                That is what goes through the layer: what a shortcut takes past it is not counted.
            call_index: which call of the layer to explain, counted from 0 in the order of the forward
                pass (of the calls' ends for outputs), where the model calls it more than once.

        Returns:
            Relevance shaped like the layer's output (or input), same dtype and device, without
            history. A tuple of such tensors where more than one tensor that depends on the inputs is
            returned by the layer (or given to it, by position or keyword): Captum's convention.
            A tensor that is given twice is counted once. Zeros where the output of the model does
            not depend on the tensor.

        Raises:
            TypeError, IndexError, FloatingPointError, UnsupportedCallError: as for :meth:`AbsLRP.attribute`.
            ValueError: as there; or if the layer is not called, is called more than once without
                a ``call_index``, or its tensors do not depend on the inputs; or if samples that
                are not run together are not in the leading dimension of its tensors.

        Example:
            >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
            >>> x = torch.rand(2, 3, 8, 8)
            >>> _ = model.eval()(x)
            >>> relevance = LayerAbsLRP(model, model[0]).attribute(x, target=2, contrast=None)
            >>> relevance.sum(dim=(2, 3)).shape  # share of each channel
            torch.Size([2, 4])
        """
        in_order: list[bool] = []

        def forward(
            leaves: Sequence[Tensor], extra: tuple[Any, ...], watch: Watch | None
        ) -> tuple[Tensor, Sequence[Tensor]]:
            with _captured(self.layer, of_input=attribute_to_layer_input) as calls:
                output = self._forward(leaves, extra, watch)
            captured = self._choose(calls, call_index, of_input=attribute_to_layer_input)
            in_order.append(all(_in_order(tensor, len(leaves[0])) for tensor in captured))
            return output, captured

        chunks = self._explain(
            inputs,
            target,
            additional_forward_args,
            contrast,
            combine,
            internal_batch_size,
            forward=forward,
            watch=Watch(finite=True) if check_finite else None,
        )
        parts = [relevances for relevances, _ in chunks]
        if len(parts) == 1:
            relevances = tuple(parts[0])
        elif in_order[-len(parts)]:  # of the first part, which is no smaller than the others
            relevances = tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
        else:
            raise ValueError(
                f"Expected samples to be in the leading dimension of the tensors of {self._name} "
                f"where they are not run together, but got relevance of shape "
                f"{tuple(parts[0][0].shape)} for the first of {len(parts)} parts. Call `attribute` "
                f"for one sample at a time."
            )
        return relevances if len(relevances) > 1 else relevances[0]

    def has_convergence_delta(self) -> bool:
        """No: relevance may go past the layer."""
        return False

    @property
    def _name(self) -> str:
        paths = (path for path, m in self.model.named_modules() if m is self.layer)
        path = next(paths, "layer")  # replaced in the model since
        return f"`{path or 'model'}` ({type(self.layer).__name__})"

    def _choose(
        self, calls: list[list[Tensor]], call_index: int | None, *, of_input: bool
    ) -> list[Tensor]:
        """The tensors of the call that is explained."""
        if not calls:
            raise ValueError(
                f"Expected {self._name} to be called by the model, but got no call of it. Containers "
                f"such as `nn.ModuleList` are not called, nor are layers whose weights the module "
                f"around them uses by itself, as `nn.MultiheadAttention` does: explain one that is."
            )
        if call_index is None and len(calls) > 1:
            raise ValueError(
                f"Expected {self._name} to be called once, but got {len(calls)} calls in one forward "
                f"pass. Choose one with `call_index=0` to `call_index={len(calls) - 1}`."
            )
        if call_index is not None and not (
            isinstance(call_index, int) and 0 <= call_index < len(calls)
        ):
            raise ValueError(
                f"Expected `call_index` to be an int from 0 to {len(calls) - 1}, because {self._name} "
                f"is called {len(calls)} times in one forward pass, but got {call_index!r}."
            )
        captured = calls[call_index or 0]
        if not captured:
            raise ValueError(
                f"Expected the {'input' if of_input else 'output'} of {self._name} to depend on "
                f"`inputs`, but got one that does not, or that is under `torch.no_grad()` or inside of a "
                f"module that its rule answers as one call."
            )
        return captured


def _in_order(tensor: Tensor, batch_size: int) -> bool:
    """Whether samples are in the leading dimension."""
    if batch_size == 1:  # not followed: nothing can be told but by the shape
        return tensor.dim() > 0 and len(tensor) == 1
    try:
        check_aligned(tensor, batch_size)
    except Misaligned:
        return False
    return True


@contextmanager
def _captured(layer: nn.Module, *, of_input: bool) -> Iterator[list[list[Tensor]]]:
    """Capture the tensors with relevance that each call of the layer in this thread returns or gets.

    What is captured is a clone, and another clone is handed on, so that nothing changes it in
    place and its gradient is that of this place alone.
    """
    calls: list[list[Tensor]] = []
    running: list[list[tuple[Tensor, Tensor, int]]] = []
    thread = threading.get_ident()

    def capture(
        value: Any, copied: Callable[[Tensor], Tensor] = torch.clone
    ) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
        """The value with clones to hand on, and pairs of a tensor and its clone."""
        captured: list[Tensor] = []
        clones: dict[int, tuple[Tensor, Tensor]] = {}

        def clone(tensor: Tensor) -> Tensor:
            if not (carries_relevance(tensor) and torch.is_grad_enabled()):
                return tensor
            if id(tensor) not in clones:  # attention tells by identity whether query is key
                own = copied(tensor)
                if not carries_relevance(own):  # inside of a layer that is answered as one call
                    return tensor
                captured.append(own)
                clones[id(tensor)] = tensor, copied(own)
            return clones[id(tensor)][1]

        value = map_instances(Tensor, clone, value)
        calls.append(captured)
        return value, list(clones.values())

    # While it is being removed, a hook may be called by another thread, without keyword arguments.
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: Any = None) -> Any:
        if module is not layer or threading.get_ident() != thread:
            return None
        given: Any = args if kwargs is None else (args, kwargs)
        if of_input:
            given, seen = capture(given)
        else:
            seen = [(tensor, tensor) for tensor in tensors_in(given) if not tensor.is_inference()]
        running.append([(tensor, clone, clone._version) for tensor, clone in seen])
        return given

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if threading.get_ident() != thread:
            return None
        changed = [(t, clone) for t, clone, version in running.pop() if clone._version != version]
        if not of_input:
            output, clones = capture(output)
            changed = [(t, clone) for t, clone in clones if any(t is own for own, _ in changed)]
        for (
            tensor,
            clone,
        ) in changed:  # all who read the input see what the layer did to it in place
            tensor.copy_(clone)
        return output

    def before_with_keywords(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any] | None:
        if threading.get_ident() != thread:
            return None
        # The calls of the layer itself are not looked at any more.
        kwargs, seen = capture(kwargs, _clone_unseen)
        calls[-2:] = [calls[-2] + calls[-1]]
        running[-1] += [(tensor, clone, clone._version) for tensor, clone in seen]
        return args, kwargs

    handles = [layer.register_forward_hook(after)]
    if of_input and rule_of_layer(layer) is not None:
        # The hooks of the interception, which come before those of the layer, cut its positional inputs off.
        handles.append(register_module_forward_pre_hook(before))
        handles.append(layer.register_forward_pre_hook(before_with_keywords, with_kwargs=True))
    else:
        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _clone_unseen(tensor: Tensor) -> Tensor:
    """A clone that the interception does not see."""
    with torch._C.DisableTorchFunction():
        clone = tensor.clone()
    return hand_on_samples(tensor, clone)
