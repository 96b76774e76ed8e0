"""What a forward pass changes in a model is put back, whole: models that do something the first time."""

from __future__ import annotations

import array
import collections
import copy
import gc
import random
import threading
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, parametrize

from captum_abslrp import AbsLRP, LayerAbsLRP, inspect_rules, trace_relevance
from captum_abslrp.engine.saved import storage_of
from captum_abslrp.engine.state import unchanged
from tests.test_no_trace import Crash, digest, no_trace


def state_of(root: object, *, versions: bool = True) -> dict[str, object]:
    """All that can be reached from a model by data, comparable with ``==``; an object once."""
    state: dict[str, object] = {}
    seen: dict[int, object] = {}

    def look(path: str, value: Any) -> None:
        kind = type(value)
        state[path] = kind, id(value)
        if isinstance(value, np.ndarray):
            state[path] = kind, id(value), value.tobytes()
        elif isinstance(value, (bytearray, array.array)):
            state[path] = kind, id(value), bytes(value)
        elif isinstance(value, torch.Generator):
            state[path] = kind, id(value), digest(value.get_state())
        elif isinstance(value, random.Random):
            state[path] = kind, id(value), value.getstate()
        if id(value) in seen or isinstance(value, (type, types.FunctionType, types.ModuleType)):
            return
        seen[id(value)] = value
        if isinstance(value, Tensor) and not is_lazy(value):
            hooks = value._backward_hooks
            state[path] = (
                kind, id(value), storage_of(value), value.storage_offset(),
                value.shape, value.stride(), value.dtype,
                digest(value.detach().clone()), value.requires_grad, value.grad_fn,
                value._version if versions else 0,
                None if hooks is None else list(hooks),
            )  # fmt: skip
            look(f"{path}.grad", value.grad if value.is_leaf else None)
        if isinstance(value, (dict, weakref.WeakKeyDictionary)):
            keys = list(value.keys())
            state[f"{path} keys"] = [k if isinstance(k, (str, int)) else id(k) for k in keys]
            for key, item in list(value.items()):
                look(f"{path}[{key if isinstance(key, (str, int)) else id(key)}]", item)
        elif isinstance(value, (list, tuple, collections.deque)):
            state[f"{path} length"] = len(value)
            for i, item in enumerate(value):
                look(f"{path}[{i}]", item)
        elif isinstance(value, (set, frozenset)):
            state[f"{path} elements"] = sorted(map(id, value))
        if not isinstance(value, (torch.Generator, types.MethodType)):
            for base in kind.__mro__:
                for name in vars(base).get("__slots__", ()):
                    if kind.__module__ == __name__:
                        look(f"{path}.{name}", getattr(value, name, "unset"))
            if hasattr(value, "__dict__") and kind is not weakref.WeakKeyDictionary:
                look(f"{path}.__dict__", vars(value))

    look("model", root)
    return state


class Lazy(nn.Module):
    """A model that changes itself as it runs; subclasses say how."""

    crashes = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)
        self.set_up()

    def set_up(self) -> None:
        pass

    def step(self, x: Tensor) -> Tensor:
        return self.a(x)

    def forward(self, x: Tensor) -> Tensor:
        h = self.step(x)
        if self.crashes:
            raise Crash
        return self.b(h.relu())


MODELS: dict[str, type[Lazy]] = {}


def lazy(cls: type[Lazy]) -> type[Lazy]:
    MODELS[cls.__name__] = cls
    return cls


# Hooks that are installed by the first forward pass, with a flag beside them.


class Hooked(Lazy):
    ready = False

    def set_up(self) -> None:
        self.seen: list[Any] = []

    def install(self) -> None:
        raise NotImplementedError

    def step(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.install()
            self.ready = True
        self.seen.clear()
        h = self.a(x)
        return h + sum(self.seen) if self.seen else h


@lazy
class ForwardHook(Hooked):
    def install(self) -> None:
        self.a.register_forward_hook(lambda m, args, output: self.seen.append(output))


@lazy
class ForwardHookThatIsCounted(Hooked):
    def install(self) -> None:
        self.handles = [self.a.register_forward_hook(lambda m, i, output: output * 1.5)]


@lazy
class ForwardHookEveryTime(Hooked):
    def step(self, x: Tensor) -> Tensor:
        self.a.register_forward_hook(lambda m, args, output: output * 1.5)
        return self.a(x)


@lazy
class ForwardHookWithKwargs(Hooked):
    def install(self) -> None:
        self.a.register_forward_hook(lambda m, i, k, output: output * 2, with_kwargs=True)


@lazy
class ForwardHookAlwaysCalledAndFirst(Hooked):
    def set_up(self) -> None:
        super().set_up()
        self.a.register_forward_hook(lambda m, args, output: output.relu())

    def install(self) -> None:
        self.a.register_forward_hook(
            lambda m, args, output: output + 1, prepend=True, always_call=True
        )


@lazy
class ForwardPreHook(Hooked):
    def install(self) -> None:
        self.a.register_forward_pre_hook(lambda m, args: (args[0] * 2,))


@lazy
class ForwardPreHookWithKwargs(Hooked):
    def install(self) -> None:
        self.a.register_forward_pre_hook(
            lambda m, args, kwargs: ((args[0] * 2,), kwargs), with_kwargs=True
        )


@lazy
class HookThatRemovesItself(Hooked):
    def set_up(self) -> None:
        super().set_up()

        def once(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            self.handle.remove()
            return output * 3

        self.handle = self.a.register_forward_hook(once)

    def install(self) -> None:
        pass


@lazy
class StateDictHooks(Hooked):
    def install(self) -> None:
        self.a.register_state_dict_post_hook(lambda m, state, prefix, meta: None)
        self.a.register_state_dict_pre_hook(lambda m, prefix, keep: None)
        self.a.register_load_state_dict_post_hook(lambda m, keys: None)


@lazy
class ParameterHook(Hooked):
    def install(self) -> None:
        self.a.weight.register_hook(lambda grad: grad * 0)
        self.b.weight.register_post_accumulate_grad_hook(lambda p: None)


@lazy
class BoundMethodHook(Hooked):
    def install(self) -> None:
        self.a.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.append(output)


# Containers.


class Filling(Lazy):
    """How much it has kept changes what it computes."""

    def step(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return h * (1 + self.kept(h))

    def kept(self, h: Tensor) -> int:
        raise NotImplementedError


@lazy
class FilledList(Filling):
    def set_up(self) -> None:
        self.items: list[Tensor] = []

    def kept(self, h: Tensor) -> int:
        self.items.append(h)
        return len(self.items)


@lazy
class ReorderedList(Filling):
    def set_up(self) -> None:
        self.items = [1, 2, 3]

    def kept(self, h: Tensor) -> int:
        self.items.append(self.items.pop(0))
        return self.items[0]


@lazy
class NestedContainers(Filling):
    def set_up(self) -> None:
        self.items: dict[str, Any] = {"deep": ({"list": [[]]}, 3)}

    def kept(self, h: Tensor) -> int:
        self.items["deep"][0]["list"][0].append(h)
        return len(self.items["deep"][0]["list"][0])


@lazy
class ChangedDict(Filling):
    def set_up(self) -> None:
        self.items = {"n": 0, "old": 1}

    def kept(self, h: Tensor) -> int:
        self.items.pop("old", None)
        self.items["n"] += 1
        self.items["h"] = h
        return self.items["n"]


@lazy
class OrderOfOrderedDict(Filling):
    def set_up(self) -> None:
        self.items = collections.OrderedDict(a=1, b=2, c=3)

    def kept(self, h: Tensor) -> int:
        self.items.move_to_end("a")
        return next(iter(self.items.values()))


@lazy
class DefaultDict(Filling):
    def set_up(self) -> None:
        self.items: Any = collections.defaultdict(list)

    def kept(self, h: Tensor) -> int:
        self.items["h"].append(h)
        return len(self.items["h"])


@lazy
class CounterOfCalls(Filling):
    def set_up(self) -> None:
        self.items: Any = collections.Counter()

    def kept(self, h: Tensor) -> int:
        self.items["calls"] += 1
        return self.items["calls"]


@lazy
class GrowingSet(Filling):
    def set_up(self) -> None:
        self.items = {0}

    def kept(self, h: Tensor) -> int:
        self.items.add(len(self.items))
        self.items.discard(0)
        return len(self.items)


@lazy
class FullDeque(Filling):
    def set_up(self) -> None:
        self.items = collections.deque([1, 2, 3], maxlen=3)

    def kept(self, h: Tensor) -> int:
        self.items.append(self.items[-1] + 1)
        return self.items[0]


@lazy
class WeakKeys(Filling):
    def set_up(self) -> None:
        self.items: Any = weakref.WeakKeyDictionary({self.b: 1})

    def kept(self, h: Tensor) -> int:
        self.items[self.a] = h
        self.items[self.b] += 1
        return self.items[self.b]


class StubbornDict(dict[str, Any]):
    """A dict that counts, and refuses what is set twice."""

    def __init__(self) -> None:
        super().__init__()
        self.added = 0

    def __setitem__(self, key: str, value: Any) -> None:
        assert key not in self
        self.added += 1
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        raise TypeError("entries stay")


@lazy
class SubclassOfDict(Filling):
    def set_up(self) -> None:
        self.items = StubbornDict()

    def kept(self, h: Tensor) -> int:
        self.items[str(len(self.items))] = h
        return self.items.added


class Log(list[Any]):
    def append(self, item: Any) -> None:
        super().append(item)
        self.last = item


@lazy
class SubclassOfList(Filling):
    def set_up(self) -> None:
        self.items = Log()

    def kept(self, h: Tensor) -> int:
        self.items.append(h)
        return len(self.items)


@lazy
class UserDict(Filling):
    def set_up(self) -> None:
        self.items: Any = collections.UserDict(n=0)

    def kept(self, h: Tensor) -> int:
        self.items["n"] += 1
        return self.items["n"]


@lazy
class ContainersInCycles(Filling):
    def set_up(self) -> None:
        self.items: list[Any] = [self]
        self.items.append(self.items)
        self.a.owner = [self]

    def kept(self, h: Tensor) -> int:
        self.items.append(h)
        return len(self.items)


# Objects of the model's own.


class Cache:
    def __init__(self) -> None:
        self.entries: dict[str, Tensor] = {}
        self.calls = 0


class Slots:
    __slots__ = ("__private", "calls", "unset")

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.__private = 0

    def step(self) -> int:
        self.calls.append(1)
        self.__private += 1
        self.unset = 1
        return self.__private


@dataclass(frozen=True)
class Frozen:
    items: list[Tensor] = field(default_factory=list)


class Pair(NamedTuple):
    items: list[Tensor]
    caches: dict[str, Cache]


@lazy
class CacheObject(Filling):
    def set_up(self) -> None:
        self.cache = Cache()

    def kept(self, h: Tensor) -> int:
        self.cache.entries["h"] = h
        self.cache.calls += 1
        return self.cache.calls


@lazy
class ObjectWithSlots(Filling):
    def set_up(self) -> None:
        self.cache = Slots()

    def kept(self, h: Tensor) -> int:
        return self.cache.step()


@lazy
class FrozenDataclass(Filling):
    def set_up(self) -> None:
        self.cache = Frozen()

    def kept(self, h: Tensor) -> int:
        self.cache.items.append(h)
        return len(self.cache.items)


@lazy
class ObjectsInTuples(Filling):
    def set_up(self) -> None:
        self.pair = Pair([], {"c": Cache()})

    def kept(self, h: Tensor) -> int:
        self.pair.items.append(h)
        self.pair.caches["c"].calls += 1
        self.pair.caches["d"] = Cache()
        return self.pair.caches["c"].calls


@lazy
class Namespace(Filling):
    def set_up(self) -> None:
        self.cache = types.SimpleNamespace(calls=0)

    def kept(self, h: Tensor) -> int:
        self.cache.calls += 1
        self.cache.h = h
        return self.cache.calls


@lazy
class HookObject(Filling):
    class Hook:
        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
            self.calls += 1
            return output * self.calls

    def set_up(self) -> None:
        self.a.register_forward_hook(self.Hook())

    def kept(self, h: Tensor) -> int:
        return 0


# Values that are no tensors.


@lazy
class CountersAndFlags(Filling):
    def set_up(self) -> None:
        self.calls, self.first = 0, True

    def kept(self, h: Tensor) -> int:
        self.calls += 1
        self.first = False
        del self.first
        self.first = None
        return self.calls


@lazy
class ArrayOfNumpy(Filling):
    def set_up(self) -> None:
        self.counts = np.zeros(2)

    def kept(self, h: Tensor) -> int:
        self.counts[1] += 1
        return int(self.counts[1])


@lazy
class Bytes(Filling):
    def set_up(self) -> None:
        self.counts, self.numbers = bytearray(2), array.array("i", [0])

    def kept(self, h: Tensor) -> int:
        self.counts[0] += 1
        self.numbers[0] += 1
        return self.counts[0] + self.numbers[0]


@lazy
class RandomNumbers(Filling):
    def set_up(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.random = random.Random(0)
        self.numpy = np.random.default_rng(0)
        self.older = np.random.RandomState(0)

    def kept(self, h: Tensor) -> Any:
        drawn = torch.rand((), generator=self.generator)
        return drawn + self.random.random() + self.numpy.random() + self.older.rand()


# Modules.


@lazy
class ModuleAdded(Lazy):
    def step(self, x: Tensor) -> Tensor:
        if not hasattr(self, "extra"):
            torch.manual_seed(1)
            self.extra = nn.Linear(5, 5)
        return self.extra(self.a(x))


@lazy
class ModuleReplaced(Lazy):
    def step(self, x: Tensor) -> Tensor:
        self.a = nn.Sequential(self.a, nn.Tanh())
        return self.a(x)


@lazy
class ModuleInList(Lazy):
    def set_up(self) -> None:
        self.hidden = [nn.Linear(5, 5)]
        self.listed = nn.ModuleList()

    def step(self, x: Tensor) -> Tensor:
        self.hidden[0].calls = getattr(self.hidden[0], "calls", 0) + 1
        self.listed.append(nn.Identity())
        return self.hidden[0](self.a(x)) * self.hidden[0].calls


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


@lazy
class Parametrized(Lazy):
    def step(self, x: Tensor) -> Tensor:
        parametrize.register_parametrization(self.a, "weight", Doubled())
        return self.a(x)


@lazy
class WeightNormed(Lazy):
    def step(self, x: Tensor) -> Tensor:
        if not parametrize.is_parametrized(self.a):
            parametrizations.weight_norm(self.a)
        return self.a(x)


@lazy
class RegisteredLate(Lazy):
    def step(self, x: Tensor) -> Tensor:
        if "late" not in self._buffers:
            torch.manual_seed(1)
            self.register_buffer("late", torch.rand(5))
            self.register_parameter("scale", nn.Parameter(torch.rand(5)))
            del self.a.bias
            self.a.bias = None
        return self.a(x) * self.scale + self.late


@lazy
class Frozenly(Lazy):
    """It trains and freezes parts of itself."""

    def step(self, x: Tensor) -> Tensor:
        self.a.weight.requires_grad_(False)
        self.b.bias.requires_grad = False
        self.a.train()
        return self.a(x)


# Values of tensors.


class Cached(Lazy):
    def set_up(self) -> None:
        self.register_buffer("memory", torch.zeros(3, 5))
        self.plain = torch.zeros(3, 5)
        self.tensors = {"list": [torch.zeros(3, 5)]}
        self.view = self.tensors["list"][0][1:]


@lazy
class BufferWithHistory(Cached):
    def step(self, x: Tensor) -> Tensor:
        h = self.a(x) + self.memory.sum()
        self.memory[: len(h)] = h
        return self.memory[: len(h)] * 2


@lazy
class CopyIntoBuffer(Cached):
    def step(self, x: Tensor) -> Tensor:
        h = self.a(x) + self.memory.sum()
        self.memory[: len(h)].copy_(h)
        self.memory.data.add_(1)
        return h


@lazy
class PlainTensorWithHistory(Cached):
    def step(self, x: Tensor) -> Tensor:
        h = self.a(x) + self.plain.sum()
        self.plain[: len(h)] = h
        return self.plain[: len(h)]


@lazy
class PlainTensorAdded(Cached):
    def step(self, x: Tensor) -> Tensor:
        self.plain += 1
        self.tensors["list"][0].mul_(2).add_(1)
        return self.a(x) + self.plain.sum() + self.tensors["list"][0].sum()


@lazy
class TensorInContainers(Cached):
    def step(self, x: Tensor) -> Tensor:
        h = self.a(x) + self.tensors["list"][0].sum()
        self.tensors["list"][0][: len(h)] = h.detach()
        return h


@lazy
class ViewWithHistory(Cached):
    def step(self, x: Tensor) -> Tensor:
        h = self.a(x) + self.view.sum()
        self.view[: len(h)].copy_(h)
        return h


@lazy
class OutArgument(Cached):
    def step(self, x: Tensor) -> Tensor:
        torch.add(self.plain, 1, out=self.plain)
        return self.a(x) + self.plain.sum()


@lazy
class ForEach(Cached):
    def step(self, x: Tensor) -> Tensor:
        torch._foreach_add_([self.plain, self.a.weight.data], 1)
        return self.a(x) + self.plain.sum()


@lazy
class ThroughNumpy(Cached):
    def step(self, x: Tensor) -> Tensor:
        self.plain.numpy()[:] += 1
        np.asarray(self.tensors["list"][0])[:] += 1
        return self.a(x) + self.plain.sum() + self.tensors["list"][0].sum()


@lazy
class ResizedAndSet(Cached):
    def step(self, x: Tensor) -> Tensor:
        if self.plain.shape == (3, 5):
            self.plain.resize_(7, 9).fill_(1)
            self.tensors["list"][0].set_(torch.ones(2))
        return self.a(x) * self.plain.sum() * self.tensors["list"][0].sum()


@torch.library.custom_op("abslrp_tests::count", mutates_args={"calls"})
def count(by: Tensor, calls: Tensor) -> None:
    calls += by


@lazy
class CustomOperator(Cached):
    def step(self, x: Tensor) -> Tensor:
        count(torch.ones(1), self.plain)
        torch.ops.abslrp_tests.count(torch.ones(1), calls=self.tensors["list"][0])
        return self.a(x) + self.plain.sum() + self.tensors["list"][0].sum()


@lazy
class StatisticsOfPlainTensors(Cached):
    def step(self, x: Tensor) -> Tensor:
        h = self.a(x)
        with torch.no_grad():
            F.batch_norm(h.detach(), self.plain[0], self.tensors["list"][0][0], training=True)
        return h + self.plain.sum() + self.tensors["list"][0].sum()


@lazy
class ParametrizationRemoved(Lazy):
    """As a model does that is merged for inference the first time it runs."""

    def set_up(self) -> None:
        super().set_up()
        torch.nn.utils.parametrizations.weight_norm(self.a)
        self.merged = False

    def step(self, x: Tensor) -> Tensor:
        if not self.merged:
            torch.nn.utils.parametrize.remove_parametrizations(self.a, "weight")
            self.merged = True
        return self.a(x)


@lazy
class WeightChangedInPlace(Lazy):
    def step(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.a.weight *= 1.5
            self.b.weight.add_(1)
        return self.a(x)


@lazy
class DataChangedInPlace(Lazy):
    def step(self, x: Tensor) -> Tensor:
        self.a.weight.data.copy_(self.a.weight.data.roll(1, 0))
        self.b.bias.data[0] = 7
        return self.a(x)


@lazy
class DataReplaced(Lazy):
    def step(self, x: Tensor) -> Tensor:
        self.a.weight.data = self.a.weight.data * 2
        self.a.weight.data.add_(1)
        self.b.bias.data = torch.cat([self.b.bias.data] * 2)[:3]
        return self.a(x)


@lazy
class WeightDrawnAnew(Lazy):
    def step(self, x: Tensor) -> Tensor:
        nn.init.uniform_(self.a.weight, generator=torch.Generator().manual_seed(0))
        nn.init.ones_(tensor=self.a.bias)
        return self.a(x)


@lazy
class WeightClamped(Lazy):
    def step(self, x: Tensor) -> Tensor:
        nn.utils.vector_to_parameters(torch.ones(5), [self.a.bias])
        self.b.weight.detach().clamp_(min=0)
        return self.a(x)


@lazy
class EmbeddingWithMaxNorm(Lazy):
    def set_up(self) -> None:
        self.embedding = nn.Embedding(4, 5, max_norm=0.1)
        self.bag = nn.EmbeddingBag(4, 5, max_norm=0.1)
        self.register_buffer("index", torch.tensor([1, 2]))

    def step(self, x: Tensor) -> Tensor:
        h = self.a(x) + self.embedding.weight.square().sum() + self.bag.weight.square().sum()
        return h + self.embedding(self.index).sum() + self.bag(self.index[None]).sum()


@lazy
class Cast(Lazy):
    def step(self, x: Tensor) -> Tensor:
        self.b.double().float()
        self.b.weight.data = self.b.weight.data.double().float().neg()
        return self.a(x)


@lazy
class GradientsCleared(Lazy):
    def set_up(self) -> None:
        self.a.weight.grad = torch.ones(5, 6)
        self.b.weight.grad = torch.ones(3, 5)

    def step(self, x: Tensor) -> Tensor:
        self.a.weight.grad = None
        self.b.weight.grad.zero_()
        self.b.bias.grad = torch.ones(3)
        return self.a(x)


@lazy
class AttributesOfParameters(Lazy):
    def set_up(self) -> None:
        self.a.weight.tags = []

    def step(self, x: Tensor) -> Tensor:
        self.a.weight.tags.append(1)
        self.b.weight.seen = x
        return self.a(x) * len(self.a.weight.tags)


X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


def check_put_back(name: str, run: Callable[[Lazy], Any]) -> Lazy:
    """Run something on a model: its state is as before, and so is what it predicts from then on."""
    model, untouched = MODELS[name]().eval(), MODELS[name]().eval()
    versions = name not in ("Parametrized", "ResizedAndSet")  # `Tensor.set_` shows itself to nobody
    before = state_of(model, versions=versions)
    run(model)
    after = state_of(model, versions=versions)
    assert [key for key in {**before, **after} if before.get(key) != after.get(key)] == []
    model.crashes = False
    for _ in range(2):  # in the first one a lazy model does what it has not done yet
        with torch.no_grad():
            assert torch.equal(model(X), untouched(X))
    return model


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_lazy_models_change_as_they_run(name: str) -> None:
    """Otherwise the tests below could not fail."""
    model = MODELS[name]().eval()
    before = state_of(model)
    with torch.no_grad():
        model(X)
    assert state_of(model) != before


def test_lazy_models_are_put_back(name: str) -> None:
    maps: list[Tensor] = []

    def explain(model: Lazy) -> None:
        maps.extend(AbsLRP(model).attribute(X, 1) for _ in range(2))

    check_put_back(name, explain)
    assert torch.equal(*maps)
    assert bool(maps[0].any())


def test_lazy_models_are_put_back_after_a_crash(name: str) -> None:
    def explain(model: Lazy) -> None:
        model.crashes = True
        try:
            with pytest.raises(Crash):
                AbsLRP(model).attribute(X, 1)
        finally:
            del model.crashes

    check_put_back(name, explain)


ENTRIES: dict[str, Callable[[Lazy], Any]] = {
    "inspect_rules": lambda model: inspect_rules(model, X),
    "trace_relevance": lambda model: trace_relevance(model, X, 1),
    "layer": lambda model: LayerAbsLRP(model, model.b).attribute(X, 1),
    "input of a layer": lambda model: LayerAbsLRP(model, model.b).attribute(
        X, 1, attribute_to_layer_input=True
    ),
    "as many as fit": lambda model: AbsLRP(model).attribute(X, 1, internal_batch_size="auto"),
    "one at a time": lambda model: AbsLRP(model).attribute(X, 1, internal_batch_size=1),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    "name", ["ForwardHook", "NestedContainers", "Parametrized", "DataReplaced", "BufferWithHistory"]
)
def test_every_entry_puts_lazy_models_back(name: str, entry: str) -> None:
    check_put_back(name, ENTRIES[entry])


class BackwardHooked(Hooked):
    def install(self) -> None:
        self.a.register_full_backward_hook(lambda m, given, made: None)
        self.b.register_full_backward_pre_hook(lambda m, made: None)
        self.a.register_forward_hook(lambda m, args, output: output * 2)


def test_backward_hooks_that_are_installed_are_removed() -> None:
    model, untouched = BackwardHooked().eval(), BackwardHooked().eval()
    before = state_of(model)
    try:
        AbsLRP(model).attribute(X, 1)
    except NotImplementedError:  # which hooks are answered is no matter here
        pass
    assert state_of(model) == before
    assert torch.equal(model(X), untouched(X))


def test_layers_that_have_not_run_yet_are_as_before() -> None:
    model = nn.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.LazyBatchNorm1d())
    before = state_of(model, versions=False)
    with unchanged(model):
        model(X)
    assert state_of(model, versions=False) == before
    assert model(X[:, :3]).shape == (2, 5)


# What is not the model's.


class Trainer:
    def __init__(self) -> None:
        self.steps, self.log = 0, []


Trainer.__module__ = "another_package.trainer"


def test_objects_of_other_packages_are_left_alone() -> None:
    class Trained(Lazy):
        def set_up(self) -> None:
            self.trainer = Trainer()
            self.lock = threading.Lock()

        def step(self, x: Tensor) -> Tensor:
            self.trainer.steps += 1
            self.trainer.log.append(1)
            return self.a(x)

    model = Trained().eval()
    AbsLRP(model).attribute(X, 1)
    assert model.trainer.steps == len(model.trainer.log) == 1


def test_hooks_of_the_user_may_record() -> None:
    model, seen = Lazy().eval(), []
    model.a.register_forward_hook(lambda m, args, output: seen.append(output.detach()))
    AbsLRP(model).attribute(X, 1)
    assert len(seen) == 1


# Training goes on.


def test_a_cache_of_parametrizations_that_is_filled_meanwhile_is_emptied() -> None:
    model = Lazy()
    parametrize.register_parametrization(model.a, "weight", Doubled())
    weight = model.a.parametrizations.weight.original
    with parametrize.cached():
        AbsLRP(model).attribute(X, 1)
        model(X).sum().backward()
    assert weight.grad is not None
    assert bool(weight.grad.any())


def test_a_cache_of_parametrizations_that_is_filled_before_is_kept() -> None:
    model = Lazy()
    parametrize.register_parametrization(model.b, "weight", Doubled())
    with parametrize.cached():
        cached = model.b.weight
        AbsLRP(MODELS["Parametrized"]()).attribute(X, 1)
        assert model.b.weight is cached


@pytest.mark.parametrize(
    "name", ["PlainTensorAdded", "WeightChangedInPlace", "CopyIntoBuffer", "EmbeddingWithMaxNorm"]
)
def test_a_backward_pass_of_before_still_runs(name: str) -> None:
    model = MODELS[name]()
    held = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    held += [t for t in vars(model).values() if isinstance(t, Tensor)]
    x = torch.ones((), requires_grad=True)
    loss = sum((t * x * x).sum() for t in held)
    AbsLRP(model).attribute(X, 1)
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * sum(t.detach().sum() for t in held))


def test_a_history_that_a_tensor_had_is_put_back() -> None:
    class Remembering(Lazy):
        def set_up(self) -> None:
            self.memory = torch.zeros(5)

        def step(self, x: Tensor) -> Tensor:
            h = self.a(x)
            self.memory.detach_().copy_(h[0])
            return h

    model = Remembering().eval()
    start = torch.ones(5, requires_grad=True)
    model.memory = start * 3
    AbsLRP(model).attribute(X, 1)
    assert torch.equal(model.memory, torch.full((5,), 3.0))
    model.memory.sum().backward()
    assert torch.equal(start.grad, torch.full((5,), 3.0))


@pytest.mark.parametrize("written", ["whole", "part"])
def test_a_history_of_a_tensor_and_a_view_of_it_is_put_back(written: str) -> None:
    class Remembering(Lazy):
        def step(self, x: Tensor) -> Tensor:
            h = self.a(x)
            getattr(self, written).mul_(h[0].mean())
            return h

    model = Remembering().eval()
    start = torch.ones(6, requires_grad=True)
    model.whole = start * 3
    model.part = model.whole[:3]
    AbsLRP(model).attribute(X, 1)
    (model.whole.sum() + model.part.sum()).backward()
    assert torch.equal(start.grad, torch.tensor([6.0, 6, 6, 3, 3, 3]))


def test_values_are_not_copied_where_nothing_changes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from captum_abslrp.engine import state

    def copied(tensors: Any) -> Any:
        raise AssertionError("copied")

    monkeypatch.setattr(state, "Memory", copied)
    AbsLRP(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(True)).eval()).attribute(X, 1)
    with pytest.raises(AssertionError, match="copied"):
        AbsLRP(MODELS["WeightChangedInPlace"]().eval()).attribute(X, 1)


# What cannot be put back.


def test_what_cannot_change_is_no_matter() -> None:
    model = Lazy().eval()
    model.array, model.random = np.zeros(3), random.SystemRandom()
    model.array.flags.writeable = False
    model.expanded = torch.zeros(1).expand(4)
    model.register_buffer("broadcast", torch.zeros(1).expand(4))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    model.nothing = torch.zeros(3, device="meta")
    with torch.inference_mode():
        model.register_buffer("made_in_inference", torch.zeros(3))
    AbsLRP(model.train()).attribute(X, 1)


class Rigid(dict[str, int]):
    """A dict whose keys cannot be looked up any more."""

    class Key(str):
        broken = False

        def __hash__(self) -> int:
            if self.broken:
                raise ValueError("no hash")
            return 0


def test_what_cannot_be_put_back_is_named_and_all_else_is_put_back() -> None:
    class Odd(Lazy):
        def set_up(self) -> None:
            self.first, self.odd, self.last = [0], Rigid(), {"n": 0}
            self.key = Rigid.Key("key")
            self.odd[self.key] = 1

        def step(self, x: Tensor) -> Tensor:
            self.first.append(1)
            self.last["n"] = 1
            self.odd["added"] = 2
            Rigid.Key.broken = True
            return self.a(x)

    model = Odd().eval()
    try:
        with pytest.warns(UserWarning, match=r"an error for `.*Rigid`: ValueError"):
            AbsLRP(model).attribute(X, 1)
    finally:
        Rigid.Key.broken = False
    assert model.first == [0] and model.last == {"n": 0}


# Threads.


def test_threads_share_the_state_before_the_first_and_the_last_puts_it_back() -> None:
    inside, leave = threading.Barrier(3), threading.Barrier(3)
    passes: list[int] = []

    class Waiting(Filling):
        def set_up(self) -> None:
            self.items: list[Tensor] = []

        def kept(self, h: Tensor) -> int:
            self.items.append(h)
            with torch.no_grad():
                self.a.weight += 1
            passes.append(threading.get_ident())
            if passes.count(passes[-1]) == 1:  # a map of zeros is looked at twice
                inside.wait()
                leave.wait()
            return 1

    model = Waiting().eval()
    before = state_of(model)
    threads = [threading.Thread(target=AbsLRP(model).attribute, args=(X, 1)) for _ in range(2)]
    for thread in threads:
        thread.start()
    inside.wait()
    assert len(model.items) == 2
    leave.wait()
    for thread in threads:
        thread.join()
    assert state_of(model) == before


@pytest.mark.parametrize("of_input", [False, True])
def test_hooks_of_ours_in_another_thread_are_no_part_of_the_state(of_input: bool) -> None:
    """A layer is explained in a whole model, while a part of the model is explained by itself."""
    running, done = threading.Event(), threading.Event()

    class Waiting(Lazy):
        def step(self, x: Tensor) -> Tensor:
            running.set()
            assert done.wait(60)
            return self.a(x)

    model = Waiting().eval()
    maps: list[Tensor] = []
    attributor = LayerAbsLRP(model, model.b)

    def explain() -> None:
        maps.append(attributor.attribute(X, 1, attribute_to_layer_input=of_input))

    thread = threading.Thread(target=explain)
    before = state_of(model)
    thread.start()
    assert running.wait(60)
    with unchanged(model.b):  # taken and put back while the hooks are there
        pass
    with unchanged(model.b):  # put back when they are gone
        done.set()
        thread.join()
    assert state_of(model) == before
    assert torch.equal(maps[0], attributor.attribute(X, 1, attribute_to_layer_input=of_input))


def test_a_snapshot_keeps_nothing_alive() -> None:
    gc.disable()
    try:
        model = MODELS["WeightChangedInPlace"]().eval()
        gc.collect()
        AbsLRP(model).attribute(X, 1)
        reference = weakref.ref(model)
        del model
        assert reference() is None
    finally:
        gc.enable()


def test_a_deep_copy_of_a_lazy_model_is_as_lazy() -> None:
    model = MODELS["FilledList"]().eval()
    AbsLRP(model).attribute(X, 1)
    clone = copy.deepcopy(model)  # no tensor in it has a history, which cannot be copied
    with no_trace(clone):
        AbsLRP(clone).attribute(X, 1)
