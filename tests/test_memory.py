"""Batches that are cut to fit into memory, and what an attribution keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from captum_abslrp import AbsLRP, memory
from captum_abslrp.chunks import Samples
from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.propagation import saved_bytes
from tests.conftest import load_golden, relative_error


def sizes_of_batches(attributor: AbsLRP, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that are explained from now on."""
    sizes: list[int] = []
    run = attributor._explain_chunk

    def recorded(samples: Samples, start: int, **options: Any) -> Any:
        sizes.append(len(samples.inputs[0]))
        return run(samples, start, **options)

    monkeypatch.setattr(attributor, "_explain_chunk", recorded)
    return sizes


@pytest.mark.parametrize("name", ["resnet_basic", "vit"])
def test_auto_runs_as_many_samples_as_fit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = load_golden(name)
    x, target = golden.x.repeat(3, 1, 1, 1)[:5], golden.target.repeat(3)[:5]
    attributor = AbsLRP(golden.model)
    expected = attributor.attribute(x, target)
    one = saved_bytes(
        attributor._forward([x[:1].clone().requires_grad_()], Samples((x,), None, None, ()))
    )
    room_for_two = int(2.5 * one * memory.NEEDED / memory.SHARE)
    monkeypatch.setattr(memory, "free_bytes", lambda device: room_for_two)
    sizes = sizes_of_batches(attributor, monkeypatch)
    actual = attributor.attribute(x, target, internal_batch_size="auto")
    assert sizes == [2, 2, 1]
    assert relative_error(actual, expected) < 1e-9


@pytest.mark.parametrize(("free", "sizes_expected"), [(1, [1] * 5), (10**15, [5]), (None, [5])])
def test_auto_runs_one_sample_at_least_and_all_at_most(
    free: int | None, sizes_expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = load_golden("resnet_basic")
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    attributor = AbsLRP(golden.model)
    sizes = sizes_of_batches(attributor, monkeypatch)
    attributor.attribute(golden.x.repeat(3, 1, 1, 1)[:5], 1, internal_batch_size="auto")
    assert sizes == sizes_expected


def test_auto_halves_a_batch_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    golden = load_golden("resnet_basic")
    x = golden.x.repeat(3, 1, 1, 1)[:5]
    attributor = AbsLRP(golden.model)
    expected = attributor.attribute(x, 1)
    run, tried = attributor._explain_chunk, []

    def short_of_memory(samples: Samples, start: int, **options: Any) -> Any:
        tried.append(len(samples.inputs[0]))
        if len(samples.inputs[0]) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return run(samples, start, **options)

    monkeypatch.setattr(attributor, "_explain_chunk", short_of_memory)
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        attributor.attribute(x, 1, internal_batch_size=5)
    tried.clear()
    actual = attributor.attribute(x, 1, internal_batch_size="auto")
    assert tried == [5, 2, 1, 1, 1, 1, 1]
    assert relative_error(actual, expected) < 1e-9


def test_the_free_memory_of_the_host_is_known() -> None:
    free = memory.free_bytes(torch.device("cpu"))
    assert free is None or free > 2**20


@pytest.mark.parametrize(("name", "share"), [("resnet_bottleneck", 0.95), ("vit", 0.8)])
def test_norms_and_activations_are_made_again_rather_than_kept(
    name: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = load_golden(name)
    attributor = AbsLRP(golden.model)

    def kept() -> int:
        samples = Samples((golden.x,), None, None, ())
        return saved_bytes(attributor._forward([golden.x.clone().requires_grad_()], samples))

    made_again, relevance = kept(), attributor.attribute(golden.x, 1)
    monkeypatch.setattr(Call, "save_output", lambda call, output, remake: call.save(output))
    assert made_again < share * kept()
    torch.testing.assert_close(relevance, attributor.attribute(golden.x, 1), rtol=1e-9, atol=1e-15)
