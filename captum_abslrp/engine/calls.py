"""A call of the forward pass, as passed to its rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import resolve_name

from captum_abslrp.engine.arguments import map_instances
from captum_abslrp.engine.messages import place
from captum_abslrp.engine.names import PREFIX
from captum_abslrp.engine.saved import SavedTensor


class Recorder(Protocol):
    """The interface of the recording for rules."""

    fuses: bool
    """Whether a composite call may be recorded as one, if the result is the same."""
    in_score: bool
    """Whether the model has returned and its output is being converted to a score."""
    joint: bool
    """Whether the relevance of all inputs of a call is scaled together."""
    batch_size: int
    """Number of samples."""
    hides_negatives: bool
    """Whether an output is marked as nonnegative only because its rule ignores negative entries."""

    def save(self, tensor: Tensor) -> SavedTensor: ...
    def release(self, tensor: Tensor) -> None: ...
    def hand_memory(self, target: Tensor, result: Tensor, *, is_ours: bool) -> bool: ...
    def is_fresh(self, tensor: Tensor) -> bool: ...
    def is_nonnegative(self, tensor: Tensor) -> bool: ...
    def mark_nonnegative(self, tensor: Tensor) -> None: ...
    def run_parts(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any: ...
    def rule_of(self, call: Call) -> Any: ...
    def layer_behind(self, tensor: Tensor) -> Any: ...

    def hides_layer(self, tensor: Tensor) -> bool: ...


@dataclass
class Call:
    """One call of the forward pass.

    Attributes:
        name: canonical name: no dunder, no trailing underscore, and no module if that is PyTorch's (``"add"``
            for ``torch.add``, ``+``, ``+=`` and ``Tensor.add_``).
        func: the function that was called, as ``torch.overrides`` passes it.
        args: its positional arguments.
        kwargs: its keyword arguments, without ``out`` and ``inplace``.
        module: the innermost module whose forward pass makes the call.
        path: path of this module in the model, for example ``"blocks.0.attn.proj"``.
        local_path: path relative to the module that the mapping belongs to.
        recording: the recording that the call belongs to.
        reflected: whether the positional arguments are in reverse order.
        result: the output, if it is already computed.
        target: the tensor that the call overwrites, if it is an in-place call.
        absolute_func: the function with the magnitudes of its parameters, for a layer.
    """

    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    module: nn.Module | None
    path: str
    local_path: str
    recording: Recorder
    reflected: bool = False
    result: Any = None
    target: Tensor | None = None
    absolute_func: Callable[..., Any] | None = None

    @property
    def operands(self) -> tuple[Any, ...]:
        """The positional arguments in the order of the operation (2 and x for ``2 - x``)."""
        return self.args[::-1] if self.reflected else self.args

    def save(self, tensor: Tensor) -> SavedTensor:
        """Save a tensor for the backward pass; it is cloned if the model overwrites it later.

        Call the result to get the tensor; half precision is converted to float32.
        """
        return self.recording.save(tensor)

    def save_output(self, output: Tensor, remake: Callable[[], Tensor]) -> SavedTensor:
        """Save the output of a call for the backward pass by a function that recomputes it.

        This saves memory and costs little for an activation or a norm. In half precision the tensor itself
        is saved, because recomputing it in float32 would give a different result.
        """
        exact = output.dtype in (torch.float32, torch.float64)
        if not exact or (not output.is_meta and torch.is_autocast_enabled(output.device.type)):
            return self.save(output)
        return SavedTensor(remake=remake)

    def run(self, compute: Callable[[], Tensor]) -> Tensor:
        """Return the output of the call; compute it if necessary."""
        if self.result is None:
            return compute()
        result: Tensor = map_instances(Tensor, Tensor.detach, self.result)
        return result

    def is_nonnegative(self, *values: Any) -> bool:
        """Whether numbers and tensors are known to be nonnegative, without reading the values of tensors."""
        return all(
            self.recording.is_nonnegative(v)
            if isinstance(v, Tensor)
            else isinstance(v, (int, float)) and v >= 0
            for v in values
        )

    def __str__(self) -> str:
        name = resolve_name(self.func) or self.name.removeprefix(PREFIX)
        return f"`{name}` in {place(self.path, self.module)}"
