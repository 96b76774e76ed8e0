"""Threads that share a model: the maps of one after another, and nobody else is disturbed."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from captum_abslrp import AbsLRP, LayerAbsLRP, UnsupportedCallError, demo, inspect_rules

N_THREADS = 8


def together(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run each job in a thread of its own, all of them started at the same moment."""
    start = threading.Barrier(len(jobs))

    def run(job: Callable[[], Any]) -> Any:
        start.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(run, jobs))


@pytest.fixture(autouse=True)
def few_threads_each() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", demo.list_models())
def test_maps_of_a_shared_model_are_those_of_one_after_another(name: str) -> None:
    model = demo.load_model(name)
    images = demo.render_scenes("single", N_THREADS, generator=0).inputs
    attributor = AbsLRP(model)

    def explain(i: int) -> list[Tensor]:
        x = images[i : i + 1]
        return [attributor.attribute(x, target) for target in (i % 10, None)]

    alone = [explain(i) for i in range(N_THREADS)]
    state = copy.deepcopy(model.state_dict())
    for _ in range(3):
        at_once = together([lambda i=i: explain(i) for i in range(N_THREADS)])
        for expected, got in zip(alone, at_once, strict=True):
            assert all(map(torch.equal, expected, got))
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert not torch_module._global_forward_hooks and not torch_module._global_forward_pre_hooks


def test_forward_passes_of_other_threads_are_not_affected() -> None:
    model = demo.load_model("vit")
    x = demo.render_scenes("single", 2, generator=0).inputs
    layer = LayerAbsLRP(model, model.blocks[2])
    expected = model(x).detach()
    leaf = x.clone().requires_grad_()
    gradient = torch.autograd.grad(model(leaf)[:, 3].sum(), leaf)[0]
    done = threading.Event()

    def explain() -> None:
        try:
            for target in range(6):
                AbsLRP(model).attribute(x, target)
                layer.attribute(x, target)
        finally:
            done.set()

    def predict() -> list[tuple[Tensor, Tensor]]:
        seen = []
        while not (done.is_set() and seen):
            leaf = x.clone().requires_grad_()
            output = model(leaf)
            seen.append((output.detach(), torch.autograd.grad(output[:, 3].sum(), leaf)[0]))
        return seen

    _, *seen = together([explain, predict, predict])
    for output, gradient_beside in [pair for of_thread in seen for pair in of_thread]:
        assert torch.equal(output, expected) and torch.equal(gradient_beside, gradient)


class Counting(nn.Module):
    """A model that keeps what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x
        self.added = x
        return self.linear(x)


def test_what_a_model_keeps_is_put_back_by_the_last_thread() -> None:
    model, x = Counting().eval(), torch.rand(2, 4)
    names = list(model.__dict__)
    for _ in range(20):
        together([lambda: AbsLRP(model).attribute(x, 1) for _ in range(N_THREADS)])
        assert model.last is None and not hasattr(model, "added") and list(model.__dict__) == names
        assert model.calls == 0


def test_errors_of_one_thread_are_its_own() -> None:
    class Strange(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sinc(x) if x.shape[1] == 5 else x.tanh()

    model, good, bad = Strange().eval(), torch.rand(2, 4), torch.rand(2, 5)
    expected = AbsLRP(model).attribute(good, 1)

    def refused() -> bool:
        with pytest.raises(UnsupportedCallError, match=r"torch\.sinc"):
            AbsLRP(model).attribute(bad, 1)
        return True

    def explained() -> bool:
        return torch.equal(AbsLRP(model).attribute(good, 1), expected)

    for _ in range(20):
        assert all(together([refused, explained] * 4))
    assert not inspect_rules(model, good).unsupported
