"""Recurrent layers and cells, unrolled into calls with their own rules.

The pre-activation of a gate is one affine call on the input of the step and the hidden state together.

Axes: B samples, T steps, D features, H hidden features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_abslrp.engine.calls import Call
from captum_abslrp.rules.base import Form

State = tuple[Tensor, ...]
"""The hidden state (B, H), and for an LSTM also the cell state (B, H)."""

Step = Callable[[Tensor, State], State]
"""Maps the input (B, D) and the state to the next state."""

Weight = Tensor | None


def _joined(w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Callable[..., Tensor]:
    """``W_ih x + W_hh h + b`` as one linear call."""
    weight = torch.cat([w_ih, w_hh], 1)
    bias = None if b_ih is None or b_hh is None else b_ih + b_hh
    return lambda x, h: F.linear(torch.cat([x, h], 1), weight, bias)


def _lstm_step(
    w_ih: Tensor, w_hh: Tensor, b_ih: Weight = None, b_hh: Weight = None, w_hr: Weight = None
) -> Step:
    gates = _joined(w_ih, w_hh, b_ih, b_hh)

    def step(x: Tensor, state: State) -> State:
        h, c = state
        i, f, g, o = gates(x, h).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (h if w_hr is None else F.linear(h, w_hr)), c

    return step


def _gru_step(w_ih: Tensor, w_hh: Tensor, b_ih: Weight = None, b_hh: Weight = None) -> Step:
    def halves(tensor: Weight) -> Sequence[Weight]:
        return (None, None) if tensor is None else tensor.tensor_split([2 * w_hh.shape[1]])

    of_gates, (w_in, w_hn, b_in, b_hn) = zip(*map(halves, (w_ih, w_hh, b_ih, b_hh)), strict=True)
    gates = _joined(*of_gates)

    def step(x: Tensor, state: State) -> State:
        (h,) = state
        r, z = gates(x, h).sigmoid().chunk(2, 1)
        n = (F.linear(x, w_in, b_in) + r * F.linear(h, w_hn, b_hn)).tanh()
        return ((1 - z) * n + z * h,)

    return step


def _rnn_step(activation: Callable[[Tensor], Tensor], *weights: Tensor) -> Step:
    joined = _joined(*weights)
    return lambda x, state: (activation(joined(x, *state)),)


_STEPS: dict[str, Callable[..., Step]] = {
    "lstm": _lstm_step,
    "gru": _gru_step,
    "rnn_tanh": partial(_rnn_step, torch.tanh),
    "rnn_relu": partial(_rnn_step, torch.relu),
}


def record_recurrent(call: Call, input: Tensor, hidden: Any, weights: Any, *options: Any) -> Any:
    make, states = _STEPS[call.name], _states(hidden)
    return call.recording.run_parts(_recurrent, make, input, states, weights, *options)


def _states(hidden: Any) -> State:
    return tuple(hidden) if isinstance(hidden, (tuple, list)) else (hidden,)


def _recurrent(
    make: Callable[..., Step],
    input: Tensor,
    states: State,
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    directions = 2 if bidirectional else 1
    per_cell = len(weights) // (num_layers * directions)
    x = input if batch_first else input.transpose(0, 1)
    finals: list[State] = []
    for layer in range(num_layers):
        if layer and dropout:
            x = F.dropout(x, dropout, train)
        outputs = []
        for direction in range(directions):
            cell = layer * directions + direction
            own: list[Weight] = list(weights[cell * per_cell : (cell + 1) * per_cell])
            if not has_biases:  # a projection follows the biases
                own[2:2] = [None, None]
            step, state = make(*own), tuple(s[cell] for s in states)
            steps = x.unbind(1)
            hidden = []
            for x_t in reversed(steps) if direction else steps:
                state = step(x_t, state)
                hidden.append(state[0])
            outputs.append(torch.stack(hidden[::-1] if direction else hidden, 1))
            finals.append(state)
        x = torch.cat(outputs, 2)
    output = x if batch_first else x.transpose(0, 1)
    return output, *(torch.stack(parts) for parts in zip(*finals, strict=True))


def record_cell(call: Call, input: Tensor, hidden: Any, *weights: Tensor) -> Any:
    def cell() -> Any:
        state = _STEPS[call.name.removesuffix("_cell")](*weights)(input, _states(hidden))
        return state if len(state) > 1 else state[0]

    return call.recording.run_parts(cell)


RECURRENT: dict[str, Form] = {
    **dict.fromkeys(_STEPS, record_recurrent),
    **{f"{name}_cell": record_cell for name in _STEPS},
}
