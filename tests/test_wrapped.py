"""Models in wrappers that compute the same, and parts that PyTorch runs in other ways than call by call."""

from __future__ import annotations

import shutil
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, set_checkpoint_early_stop

from captum_abslrp import AbsLRP, LayerAbsLRP, UnsupportedCallError
from tests.conftest import relative_error
from tests.test_no_trace import no_trace

Wrap = Callable[[nn.Module], nn.Module]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    part = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), part, nn.Flatten(), nn.Linear(4 * 4 * 4, 5)
    return nn.Sequential(*layers).double().eval()


def with_part(wrap: Wrap) -> nn.Sequential:
    """The network with one part wrapped."""
    model = network()
    model[2] = wrap(model[2])
    return model


def whole(wrap: Wrap) -> nn.Module:
    return wrap(network())


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def explained(model: nn.Module) -> Tensor:
    relevance: Tensor = AbsLRP(model).attribute(images(), 1)
    return relevance


def assert_explained_as_plain(model: nn.Module) -> None:
    with no_trace(model):
        relevance = explained(model)
    assert torch.equal(relevance, explained(network()))


@pytest.mark.parametrize("build", [whole, with_part])
def test_data_parallel_is_explained_as_the_module_inside(
    build: Callable[[Wrap], nn.Module],
) -> None:
    model = build(nn.DataParallel)
    assert isinstance(AbsLRP(model).model, nn.Sequential)
    assert_explained_as_plain(model)


@pytest.fixture
def one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of this process alone, which talks to no other machine."""
    distributed = pytest.importorskip("torch.distributed")
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("this PyTorch is built without gloo")
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", loopback)
    file = (tmp_path / "rendezvous").as_uri()
    distributed.init_process_group("gloo", init_method=file, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("build", [whole, with_part])
def test_distributed_data_parallel_is_explained_as_the_module_inside(
    build: Callable[[Wrap], nn.Module],
) -> None:
    model = build(nn.parallel.DistributedDataParallel)
    assert isinstance(AbsLRP(model).model, nn.Sequential)
    assert_explained_as_plain(model)
    model(images()).sum().backward()  # it is still ready to be trained
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_wrappers_in_each_other_are_all_taken_off() -> None:
    model = torch.compile(
        nn.DataParallel(torch.compile(network(), backend="eager")), backend="eager"
    )
    assert isinstance(AbsLRP(model).model, nn.Sequential)
    assert_explained_as_plain(model)


class Compiler:
    """A backend that needs no compiler and counts what it makes and how often that is run."""

    def __init__(self) -> None:
        torch.compiler.reset()  # it stops compiling a function that was compiled often
        self.made = self.run = 0

    def __call__(self, graph: Any, inputs: object) -> Callable[..., Any]:
        self.made += 1

        def run(*args: Any) -> Any:
            self.run += 1
            return graph(*args)

        return run

    def module(self, module: nn.Module) -> nn.Module:
        return torch.compile(module, backend=self)

    def in_place(self, module: nn.Module) -> nn.Module:
        module.compile(backend=self)
        return module

    def forward(self, module: nn.Module) -> nn.Module:
        module.forward = torch.compile(module.forward, backend=self)
        return module


class Calling(nn.Module):
    """Calls something that is not registered as a part of it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.functions = [function]

    def forward(self, x: Tensor) -> Tensor:
        return self.functions[0](x)


@pytest.mark.parametrize("build", [whole, with_part])
@pytest.mark.parametrize("way", [Compiler.module, Compiler.in_place, Compiler.forward])
@pytest.mark.parametrize("ran", [False, True], ids=["not run before", "run before"])
def test_compiled_models_and_parts_are_explained_as_the_original(
    way: Callable[[Compiler, nn.Module], nn.Module],
    build: Callable[[Wrap], nn.Module],
    ran: bool,
) -> None:
    alone = Compiler()
    with torch.no_grad():
        build(lambda module: way(alone, module))(images())
    if not alone.made:
        pytest.skip("this PyTorch runs such a module as it is written")
    compiler = Compiler()
    model = build(lambda module: way(compiler, module))
    assert isinstance(AbsLRP(model).model, nn.Sequential)
    with torch.no_grad():
        expected = model(images()) if ran else network()(images())
        so_far = compiler.made, compiler.run
        assert_explained_as_plain(model)
        assert (compiler.made, compiler.run) == so_far, "compiled code took part in the explanation"
        assert so_far == ((1, 1) if ran else (0, 0))
        assert torch.equal(model(images()), expected)
    assert (compiler.made, compiler.run) == (1, so_far[1] + 1), "the model is compiled no more"


def test_compiled_functions_are_explained_as_the_original() -> None:
    def function(x: Tensor) -> Tensor:
        return F.relu(x) * x.sigmoid()

    plain = nn.Sequential(network(), Calling(function))
    compiler = Compiler()
    model = nn.Sequential(network(), Calling(torch.compile(function, backend=compiler)))
    with torch.no_grad():
        model(images())
    assert torch.equal(explained(model), explained(plain))
    assert (compiler.made, compiler.run) == (1, 1)


def test_a_compiled_layer_is_explained_as_the_original() -> None:
    model, plain = with_part(Compiler().module), network()
    relevance = LayerAbsLRP(model, model[2]).attribute(images(), 1)
    assert torch.equal(relevance, LayerAbsLRP(plain, plain[2]).attribute(images(), 1))


def test_a_crash_in_a_compiled_model_leaves_the_compiler_as_it_was() -> None:
    compiler = Compiler()
    model = with_part(compiler.module)
    filters = list(warnings.filters)
    with pytest.raises(RuntimeError, match="shapes"):
        explained(nn.Sequential(model, nn.Linear(7, 7).double()))
    assert warnings.filters == filters
    with torch.no_grad():
        model(images())
    assert compiler.run == 1


def test_threads_share_the_compiler_until_the_last_one_is_done() -> None:
    """Of two passes that overlap the first ends before the second calls its compiled part."""
    compiler = Compiler()
    started, ended = threading.Event(), threading.Event()

    def first_part(x: Tensor) -> Tensor:
        started.wait(10)
        return x

    def last_part(x: Tensor) -> Tensor:
        started.set()
        ended.wait(10)
        return x

    quick = nn.Sequential(with_part(compiler.module), Calling(first_part))
    slow = nn.Sequential(Calling(last_part), with_part(compiler.module))
    results: dict[str, Tensor] = {}
    thread = threading.Thread(target=lambda: results.update(slow=explained(slow)))
    filters = list(warnings.filters)
    thread.start()
    results["quick"] = explained(quick)
    ended.set()
    thread.join()
    expected = explained(network())
    assert torch.equal(results["quick"], expected)
    assert torch.equal(results["slow"], expected)
    assert (compiler.made, compiler.run) == (0, 0)
    assert warnings.filters == filters
    with torch.no_grad():
        slow(images())
    assert compiler.run == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="the default backend needs a compiler")
@pytest.mark.parametrize("build", [whole, with_part])
def test_models_compiled_by_the_default_backend_are_explained(
    build: Callable[[Wrap], nn.Module],
) -> None:
    model = build(torch.compile)
    with torch.no_grad():
        torch.testing.assert_close(model(images()), network()(images()))
    assert_explained_as_plain(model)


@contextmanager
def deprecations_ignored() -> Iterator[None]:
    """PyTorch warns of these ways of making a model; what they have made is to be explained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def scripted(module: nn.Module) -> nn.Module:
    with deprecations_ignored():
        return torch.jit.script(module)


def traced(module: nn.Module) -> nn.Module:
    x = images() if len(module) > 2 else torch.randn(2, 4, 6, 6, dtype=torch.float64)
    with deprecations_ignored():
        return torch.jit.trace(module, x)


def frozen(module: nn.Module) -> nn.Module:
    with deprecations_ignored():
        return torch.jit.freeze(torch.jit.script(module))


@pytest.mark.parametrize("wrap", [scripted, traced, frozen])
@pytest.mark.parametrize(("build", "where"), [(whole, "`model`"), (with_part, "`2` of `model`")])
def test_scripted_models_and_parts_are_named(
    wrap: Wrap, build: Callable[[Wrap], nn.Module], where: str
) -> None:
    with pytest.raises(
        TypeError,
        match=rf"Expected {where} to be a plain module, but got a scripted module \(torch\.jit\..* Pass "
        rf"the original module, before scripting or tracing\.",
    ):
        AbsLRP(build(wrap))


def test_a_scripted_function_is_an_error() -> None:
    def function(x: Tensor) -> Tensor:
        return F.relu(x) * x

    with deprecations_ignored():
        model = nn.Sequential(network(), Calling(torch.jit.script(function)))
    with pytest.raises(
        UnsupportedCallError, match="from code whose calls cannot be intercepted: scripted"
    ):
        explained(model)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("func", [torch.neg, torch.t, torch.clone], ids=lambda f: f.__name__)
def test_calls_that_are_hidden_are_an_error(func: Callable[[Tensor], Tensor], last: bool) -> None:
    class Hiding(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch._C.DisableTorchFunction():
                return func(x)

    layers: list[nn.Module] = [nn.Linear(4, 4).double(), Hiding()]
    model = nn.Sequential(*layers, *[] if last else [nn.Linear(4, 4).double()])
    with pytest.raises(
        UnsupportedCallError,
        match=r"Backward0` in `1`.*\(Hiding, captum_abslrp\.rules\.TwinRule\(\)\)",
    ):
        AbsLRP(model).attribute(torch.rand(4, 4, dtype=torch.float64), target=0)


def test_a_view_of_what_is_overwritten_is_no_hidden_call() -> None:
    class Overwriting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            whole = torch.zeros(len(x), 2, x.shape[1], dtype=x.dtype)
            views = whole[:, 0], whole[:, 1]
            whole[:, 0] = x
            whole[:, 1] = x.relu()
            return views[0] + views[1]

    x = torch.rand(3, 4, dtype=torch.float64) - 0.5
    relevance = AbsLRP(Overwriting()).attribute(x, target=1, contrast=None)
    torch.testing.assert_close(relevance, torch.eye(4, dtype=torch.float64)[1].expand(3, 4))


def test_an_exported_or_traced_graph_is_explained() -> None:
    assert_explained_as_plain(torch.fx.symbolic_trace(network()))
    exported = torch.export.export(network(), (images(),)).module()
    assert torch.equal(explained(exported), explained(network()))


def quantized_dynamically() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(network().float(), {nn.Linear})


def quantized_statically() -> nn.Module:
    stubs = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
    model = nn.Sequential(stubs[0], network().float(), stubs[1]).eval()
    model.qconfig = torch.ao.quantization.default_qconfig
    prepared = torch.ao.quantization.prepare(model)
    prepared(images().float())
    return torch.ao.quantization.convert(prepared)


@pytest.mark.skipif(
    not set(torch.backends.quantized.supported_engines) - {"none"},
    reason="this PyTorch is built without quantisation",
)
@pytest.mark.parametrize(
    ("build", "where"), [(quantized_dynamically, "`4` of"), (quantized_statically, "`0` of")]
)
def test_quantized_parts_are_named(build: Callable[[], nn.Module], where: str) -> None:
    with deprecations_ignored():
        model = build()
    with pytest.raises(
        TypeError,
        match=rf"Expected {where} `model` to be a plain module, but got a quantized module "
        rf"\(torch\.ao\.nn\.quantized\..* Pass the float model, before quantization\.",
    ):
        AbsLRP(model)


class Mine(nn.Linear):
    """A layer of floats, of a package whose name says something else."""

    __module__ = "mine.quantized"


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.add = torch.ao.nn.quantized.FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        return self.add.add(x, x.tanh())


def test_layers_that_only_sound_quantized_are_explained() -> None:
    model = nn.Sequential(network(), Sum(), Mine(5, 5).double())
    plain = nn.Sequential(network(), Calling(lambda x: x + x.tanh()), model[2])
    assert torch.equal(explained(model), explained(plain))


def hooked_weight_norm(layer: nn.Module) -> None:
    with deprecations_ignored():
        nn.utils.weight_norm(layer)


PARAMETRIZATIONS = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight norm by a hook": hooked_weight_norm,
    "spectral norm by a hook": nn.utils.spectral_norm,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
}


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_weights_that_are_computed_are_weights(name: str) -> None:
    model, plain = network(), network()
    layers, same = ((m[0], m[2][0], m[4]) for m in (model, plain))
    for layer in layers:
        PARAMETRIZATIONS[name](layer)
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        model(images())  # what is done by a hook is done now
        for layer, ordinary in zip(layers, same, strict=True):
            ordinary.weight.copy_(layer.weight)
            ordinary.bias.copy_(layer.bias)
    with no_trace(model):
        relevance = explained(model)
    assert relative_error(relevance, explained(plain)) < 1e-12
    assert relative_error(relevance, explained(network())) > 0.01


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.inner, self.run = inner, run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.inner, x)


def all_kept(part: nn.Module, x: Tensor) -> Tensor:
    with set_checkpoint_early_stop(False):
        return checkpoint(part, x, use_reentrant=False)


CHECKPOINTS = {
    "checkpoint": lambda part, x: checkpoint(part, x, use_reentrant=False),
    "all kept": all_kept,
    "in parts": lambda part, x: checkpoint_sequential(part, 2, x, use_reentrant=False),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("build", [whole, with_part])
def test_checkpointed_parts_have_the_same_map(
    name: str, build: Callable[[Wrap], nn.Module]
) -> None:
    assert_explained_as_plain(build(lambda part: Checkpointed(part, CHECKPOINTS[name])))


def test_reentrant_checkpoints_are_named() -> None:
    def run(part: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(part, x, use_reentrant=True)

    with pytest.raises(UnsupportedCallError, match="Pass `use_reentrant=False`") as caught:
        explained(with_part(lambda part: Checkpointed(part, run)))
    assert "register" not in str(caught.value)  # the layer that is named is not the one to change


class Attention(nn.Module):
    """Attention between tokens and a classifier of their mean."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        if kind == "nn.MultiheadAttention":
            self.inner = nn.MultiheadAttention(16, 4, batch_first=True)
        else:
            self.inner = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
            if kind == "nn.TransformerEncoder":
                self.inner = nn.TransformerEncoder(self.inner, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor, padded: Tensor | None = None) -> Tensor:
        if isinstance(self.inner, nn.MultiheadAttention):
            y, _ = self.inner(x, x, x, key_padding_mask=padded, need_weights=False)
        else:
            y = self.inner(x, src_key_padding_mask=padded)
        return self.head(y.mean(1))


FUSED = {
    "nn.MultiheadAttention": "_native_multi_head_attention",
    "nn.TransformerEncoderLayer": "_transformer_encoder_layer_fwd",
    "nn.TransformerEncoder": "_transformer_encoder_layer_fwd",
}


@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize("is_padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=lambda c: c.__name__)
def test_the_fast_path_of_attention_is_not_taken(
    kind: str, is_padded: bool, context: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Attention(kind).double().eval()
    x = torch.randn(3, 6, 16, dtype=torch.float64)
    padded = torch.arange(6) >= torch.tensor([[6], [4], [3]]) if is_padded else None
    expected = AbsLRP(model).attribute(x, 1, padded)
    calls: list[str] = []
    fused = getattr(torch, FUSED[kind])

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kind)
        return fused(*args, **kwargs)

    monkeypatch.setattr(torch, FUSED[kind], counted)
    with context():
        model(x, padded)
        assert calls, "the model does not take the fast path: the test shows nothing"
        calls.clear()
        relevance = AbsLRP(model).attribute(x, 1, padded)
    assert not calls
    assert torch.equal(relevance.clone(), expected)


def test_messages_name_compiled_parts_by_the_paths_of_the_model() -> None:
    class Unsupported(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.erfinv(x.tanh())

    part = torch.compile(nn.Sequential(Unsupported()), backend=Compiler())
    with pytest.raises(UnsupportedCallError, match=r"in `1\.0` \(Unsupported\)"):
        explained(nn.Sequential(network(), part))
