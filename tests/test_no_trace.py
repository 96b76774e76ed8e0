"""The model is not touched: after success, a bad target, and a crash forward or backward.

Models that change themselves as they run are in ``test_state.py``.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.modules.module as module_internals
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from captum_abslrp import AbsLRP
from captum_abslrp.rules import AbsLRPRule, Rule
from tests.conftest import load_golden

GLOBAL_HOOKS = [name for name in vars(module_internals) if name.startswith("_global_")]


def trace(model: nn.Module) -> dict[str, object]:
    """All that could be left on a model, comparable with ``==``."""
    state: dict[str, object] = {
        name: repr(getattr(module_internals, name)) for name in GLOBAL_HOOKS
    }
    state["modes"] = len(_get_current_function_mode_stack())
    state["grad mode"] = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    for path, module in model.named_modules():
        state[f"{path} keys"] = sorted(module.__dict__)
        state[f"{path} class"] = type(module)
        state[f"{path} training"] = module.training
        for key, value in module.__dict__.items():
            if "hook" in key:
                state[f"{path}.{key}"] = repr(value)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        state[name] = (
            tensor.data_ptr(), tensor._version, tensor.requires_grad, tensor.grad,
            digest(tensor), sorted(vars(tensor)), tensor._backward_hooks,
        )  # fmt: skip
    return state


def digest(tensor: Tensor) -> int:
    """A number that tells values apart, to the last bit."""
    flat = tensor.detach().contiguous().flatten()
    return zlib.crc32(flat.view(torch.uint8).numpy()) if len(flat) else 0


@contextmanager
def no_trace(model: nn.Module) -> Iterator[None]:
    before = trace(model)
    yield
    after = trace(model)
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert after[key] == value, key


class Crash(RuntimeError):
    pass


class CrashForward(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise Crash


class CrashBackward(Rule):
    def record(self, call: object) -> object:
        answer = AbsLRPRule().record(call)  # type: ignore[arg-type]

        def propagate(relevance: Tensor) -> list[Tensor]:
            raise Crash

        return answer._replace(propagate=propagate)


NAMES = ["vgg_bn", "resnet_basic", "vit"]


@pytest.mark.parametrize("name", NAMES)
def test_after_success(name: str) -> None:
    golden = load_golden(name)
    with no_trace(golden.model):
        AbsLRP(golden.model).attribute(golden.x, golden.target)


@pytest.mark.parametrize("name", NAMES)
def test_after_a_bad_target(name: str) -> None:
    golden = load_golden(name)
    with no_trace(golden.model), pytest.raises(IndexError, match="target"):
        AbsLRP(golden.model).attribute(golden.x, 99)


@pytest.mark.parametrize("name", NAMES)
def test_after_a_crash_in_the_middle_of_the_forward_pass(name: str) -> None:
    golden = load_golden(name)
    middle = list(golden.model.children())[-2]
    wrapped = nn.Sequential(golden.model, CrashForward())
    with no_trace(wrapped), pytest.raises(Crash):
        AbsLRP(wrapped).attribute(golden.x, golden.target)
    middle.forward = CrashForward().forward
    with no_trace(golden.model), pytest.raises(Crash):
        AbsLRP(golden.model).attribute(golden.x, golden.target)


@pytest.mark.parametrize("name", NAMES)
def test_after_a_crash_in_the_middle_of_the_backward_pass(name: str) -> None:
    golden = load_golden(name)
    first = next(m for m in golden.model.modules() if isinstance(m, nn.Conv2d))
    first.rule = CrashBackward()
    with no_trace(golden.model), pytest.raises(Crash):
        AbsLRP(golden.model).attribute(golden.x, golden.target)


def test_a_crash_in_a_hook_of_the_model_leaves_no_trace() -> None:
    golden = load_golden("vit")

    def hook(module: nn.Module, args: object, output: object) -> None:
        raise Crash

    golden.model.blocks[1].register_forward_hook(hook)
    with no_trace(golden.model), pytest.raises(Crash):
        AbsLRP(golden.model).attribute(golden.x, golden.target)


@pytest.mark.filterwarnings("ignore:Expected the model to be in evaluation mode")
def test_buffers_of_a_model_in_training_mode_are_put_back() -> None:
    golden = load_golden("resnet_basic")
    golden.model.train()
    with no_trace(golden.model):
        AbsLRP(golden.model).attribute(golden.x, golden.target)


@pytest.mark.filterwarnings("ignore:Expected the model to be in evaluation mode")
def test_statistics_that_a_thread_of_the_model_updates_are_put_back() -> None:
    class Threaded(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 4)
            self.norm = nn.BatchNorm1d(3, momentum=None)

        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=self.norm, args=(torch.rand(5, 3),))
            thread.start()
            thread.join()
            return super().forward(x)

    model = Threaded()
    before = {name: value.clone() for name, value in model.norm.named_buffers()}
    AbsLRP(model).attribute(torch.rand(2, 3), 1)
    assert all(torch.equal(value, before[name]) for name, value in model.norm.named_buffers())


def test_what_a_model_stores_as_it_runs_is_put_back() -> None:
    class Storing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)
            self.register_buffer("calls", torch.zeros(()))
            self.features = None

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.features = self.layer(x)
            self.extra = True
            return self.features

    model = Storing().eval()
    with no_trace(model):
        AbsLRP(model).attribute(torch.rand(2, 3), 1)
    assert model.features is None
    assert model.calls == 0


def test_gradients_of_the_model_are_left_alone() -> None:
    golden = load_golden("vgg")
    golden.model(golden.x).sum().backward()
    before = {name: p.grad.clone() for name, p in golden.model.named_parameters()}
    golden.model.features[0].weight.requires_grad_(False)
    AbsLRP(golden.model).attribute(golden.x, golden.target)
    for name, parameter in golden.model.named_parameters():
        assert torch.equal(parameter.grad, before[name]), name
    assert not golden.model.features[0].weight.requires_grad
