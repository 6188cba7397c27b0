"""Compilers, tracers and exporters of torch compute the same, and go by the spec of an adapter, not by its name."""

import copy
import gc
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import randlora
from randlora.errors import AdapterError
from tests.further import further
from tests.kit import adapt, fill, same_bits, untouched
from tests.laws import assert_close, needs_compiler, needs_export
from tests.pages import snippet

pytestmark = [
    pytest.mark.medium,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # the compiler looks at it
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated"),  # of torch about itself
]
X = torch.linspace(-1, 1, 24).view(3, 8)


def model_with(*names: str, **options: Any) -> nn.Sequential:
    """Make a model with filled adapters of one spec, whose bases nothing has written out yet; the last is active."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))
    for seed, name in enumerate(names):
        randlora.inject(model, **{"r": 4, "targets": "all-linear", "name": name, "trainable": True, **options})
        randlora.activate(model, name)
        fill(model, name, seed=seed, spread=0.5)
    return model


def compare(compiled: Any, model: nn.Module, x: Tensor = X, dtype: torch.dtype = torch.float32) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        outputs = compiled(x), model(x)
    assert_close(outputs[0].detach(), outputs[1].detach(), dtype)
    if any(each.is_merged for each in randlora.adapters(model)):  # then backward raises our error, compiled torch's
        return
    assert outputs[0].requires_grad >= outputs[1].requires_grad
    if outputs[1].requires_grad:
        trained = [[each for each in (x, *of.parameters()) if each.requires_grad] for of in (compiled, model)]
        losses = zip((output.float().square().sum() for output in outputs), trained, strict=True)
        for ours, theirs in zip(*(torch.autograd.grad(*each, allow_unused=True) for each in losses), strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs is not None:
                assert_close(ours, theirs, dtype)


class Compiled:
    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.model, self.counter = model, CompileCounterWithBackend("eager")
        self.compiled = torch.compile(model, fullgraph=True, backend=self.counter, **options)

    def graphs(self) -> int:
        compare(self.compiled, self.model)
        count: int = self.counter.frame_count
        return count


def test_adapters_of_one_spec_share_a_graph_and_steps_of_an_optimizer_are_read_at_once() -> None:
    names = [*(f"a{index}" for index in range(7)), "slots", "seat"]  # the last two are names of parts of ours
    kept = torch._dynamo.config.cache_size_limit  # programs of one code; torch 2.6 does not know it as recompile_limit
    assert len(names) == kept + 1
    model = model_with(*names, targets=["0"])
    run, outputs = Compiled(model), set()
    optimizer = torch.optim.Adam(randlora.trainable_parameters(model), lr=0.1)
    for name in (*names, "slots"):
        randlora.activate(model, name)
        assert run.graphs() == 1
        outputs.add(run.compiled(X).sum().item())
        optimizer.zero_grad()
        run.compiled(X).square().sum().backward()
        optimizer.step()
        assert run.graphs() == 1
    assert len(outputs) == len(names) + 1
    for factor in (0.3, -0.7, 2.5):  # a factor is a number of the graph from the second one on
        randlora.activate(model, {"a3": factor})
        assert run.graphs() == 2
    for expected, block in ((3, randlora.disabled), (4, randlora.merged), (4, randlora.disabled)):
        with block(model):
            assert run.graphs() == expected
    randlora.activate(model, "a4")
    assert run.graphs() == 4
    randlora.remove(model, "a0")
    adapt(model, r=4, targets=["0"], name="later", trainable=True)
    randlora.activate(model, "later")
    assert run.graphs() == 4


def of_other_specs() -> nn.Module:
    model = model_with("a")
    for name, r, alpha, at in (("3", 4, 3, "02"), ("5", 4, 5, "02"), ("first", 4, 20, "0"), ("last", 2, 10, "2")):
        adapt(model, r=r, alpha=alpha, targets=[*at], name=name, trainable=True, spread=0.5)
    return model


MIXES: list[tuple[Any, int]] = [
    ({"a": 0.5, "c": 0.25}, 1),
    ({"b": 0.75, "c": 1.5}, 2),  # factors become numbers of the graph
    ({"a": {"0": 0.5, "2": 2.0}}, 3),
    ({"b": {"0": -3.0, "2": 0.75}}, 3),
    ({"a": {"0": 0.0, "2": 0.3}}, 4),
]
SPECS: list[tuple[Any, int]] = [("a", 1), ("3", 2), ("5", 2), ("first", 3), ("last", 4), ("a", 4)]


@pytest.mark.parametrize(
    ("make", "mixes"),
    [(lambda: model_with("a", "b", "c"), MIXES), pytest.param(of_other_specs, SPECS, marks=needs_compiler)],
    ids=["factors", "alphas and layers"],
)
def test_mixes_of_as_many_adapters_share_a_graph(make: Callable[[], nn.Module], mixes: list[tuple[Any, int]]) -> None:
    run = Compiled(model := make())
    for names, graphs in mixes:
        randlora.activate(model, names)
        assert run.graphs() == graphs, names


def test_a_replaced_parameter_is_read_at_once() -> None:
    model = model_with("a", "b")
    run, values = Compiled(model), cast("Any", model.get_submodule("0.randlora_lambda"))

    def new() -> nn.Parameter:
        return nn.Parameter(torch.randn(4, 2))

    def others() -> dict[str, Tensor]:
        return {name: torch.randn_like(value) for name, value in model.state_dict().items()}

    assert run.graphs() == 1
    for replace, graphs in (
        (lambda: setattr(values, "b", new()), 1),
        (lambda: values._parameters.update(b=new()), 1),  # for the others see tests/test_layers_forwards.py
        (lambda: model.load_state_dict(others(), assign=True), 1),
        (lambda: model.double().float().get_parameter("0.randlora_lambda.b").data.add_(1), 1),
        (lambda: setattr(values, "_parameters", {**values._parameters, "b": new()}), 2),  # as DeepSpeed's ZeRO-3
    ):
        before = run.compiled(X)
        replace()
        assert run.graphs() == graphs
        assert not torch.equal(run.compiled(X), before)
    for name in ("a", "b"):
        randlora.activate(model, name)
        run.graphs()


@needs_compiler
def test_functional_calls_read_what_they_are_given() -> None:
    model = model_with("a", "b", targets=["0"])
    run, name, call = Compiled(model), "0.randlora_lambda.b", torch.func.functional_call
    run.graphs()
    own = model.get_parameter(name)
    compiled: Any = run.compiled
    inside = torch.compile(lambda lam: call(model, {name: lam}, (X,)), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        lam = torch.randn(4, 2, requires_grad=True)
        outputs = call(model, {name: lam}, (X,)), call(compiled, {f"_orig_mod.{name}": lam}, (X,)), inside(lam)
        expected, *found = ((output.detach(), *torch.autograd.grad(output.sum(), lam)) for output in outputs)
        for each in found:
            torch.testing.assert_close(each, expected, rtol=1e-3, atol=1e-4)
        assert model.get_parameter(name) is own
        run.graphs()


def test_bases_that_grow_are_released_or_of_another_seed_leave_programs_right() -> None:
    model, outputs = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 20)), set()
    run = Compiled(model)
    for seed in range(3):  # objects are found again at addresses of others that were freed
        adapt(model, r=4, targets=["0"], stream="portable", seed=seed, trainable=True, spread=0.5)
        run.graphs()
        outputs.add(run.compiled(X).sum().item())
        if seed < 2:
            randlora.eject(model)
            gc.collect()
    assert len(outputs) == 3
    (basis,) = randlora.state.adapted_root(model)[1].bank
    basis.release()
    run.graphs()
    adapt(model, r=4, targets="all-linear", stream="portable", seed=2, name="larger", trainable=True, spread=0.5)
    assert basis.extent == (20, 12)
    run.graphs()
    randlora.activate(model, "larger")
    run.graphs()


class Block(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x + super().forward(x)  # type: ignore[no-untyped-call]
        return output


class Checkpointed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def test_blocks_compiled_one_by_one_take_as_many_graphs_as_plain_ones_and_checkpointed_ones_one() -> None:
    blocks = [Block(nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh()) for _ in range(2)]
    graphs, plain = [], nn.Sequential(*blocks)
    randlora.inject(adapted := copy.deepcopy(plain), r=2, targets="all-linear")
    for model in (plain, fill(adapted, spread=0.3)):
        torch._dynamo.reset()
        twin, counter = copy.deepcopy(model), CompileCounterWithBackend("eager")
        for block in model:
            block.compile(fullgraph=True, backend=counter)
        for tokens in (3, 7, 12):
            compare(model, twin, torch.randn(tokens, 8))
        graphs.append(counter.frame_count)
    assert graphs[1] <= graphs[0] + 1
    randlora.inject(model := Checkpointed(*blocks), r=2, targets="all-linear")
    compiled = torch.compile(fill(model, spread=0.3), fullgraph=True, backend="aot_eager")
    compare(compiled, model, torch.randn(5, 8), torch.bfloat16)


def compile_whole(model: nn.Module, x: Tensor) -> Any:
    return torch.compile(model, fullgraph=True, backend="aot_eager")(x)


def run_with_fake_tensors(model: nn.Module, x: Tensor) -> Any:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(x))
    return model(x)


def trace(model: nn.Module, x: Tensor) -> Any:
    """Check what torch checks, another trace without gradients that must have the same operators; and gradients."""
    traced: Any = torch.jit.trace(model, (x,))
    outputs, trained = (traced(x), model(x)), [*randlora.trainable_parameters(model)]
    found, expected = (torch.autograd.grad(out.square().sum(), trained, retain_graph=True) for out in outputs)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    return outputs[0]


def transform(model: nn.Module, x: Tensor) -> Any:
    """Differentiate twice by Λ, by transforms."""
    name = "0.randlora_lambda.default"

    def loss(lam: Tensor) -> Tensor:
        return torch.func.functional_call(model, {name: lam}, (x,)).square().sum()  # type: ignore[no-any-return]

    torch.func.jacrev(torch.func.jacrev(loss))(model.get_parameter(name).detach())
    return model(x)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace(_method)?. is deprecated")
@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean might")  # sizes, which are constants of it
@pytest.mark.parametrize(
    ("see", "basis"),
    [
        (compile_whole, "dense"),
        (lambda model, x: torch.inference_mode()(compile_whole)(model, x).clone(), "block"),
        (run_with_fake_tensors, "block"),
        *((see, basis) for see in (trace, transform) for basis in ("dense", "block")),
    ],
)
def test_a_tracer_that_comes_first_spoils_no_values(see: Callable[[nn.Module, Tensor], Any], basis: str) -> None:
    expected = model_with("default", basis=basis)(x := torch.randn(3, 8))
    model = pickle.loads(pickle.dumps(model_with("default", basis=basis)))  # without bases that a seed brings back
    assert_close(see(model, x).detach(), expected.detach(), torch.float32)
    assert same_bits(model(x), expected)
    model(x).sum().backward()
    assert model.get_parameter("0.randlora_lambda.default").grad is not None


@needs_compiler
@pytest.mark.parametrize("basis", ["dense", further("block")])
@pytest.mark.parametrize("is_each", [True, further(False)], ids=["of each row", "curvature"])
def test_transforms_are_compiled_with_the_model(is_each: bool, basis: str) -> None:
    model, call = model_with("default", basis=basis), torch.func.functional_call
    trained = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return call(model, values, (x,)).square().mean()  # type: ignore[no-any-return]

    def curvature(values: dict[str, Tensor], x: Tensor) -> Any:
        along = {name: value.sin() for name, value in values.items()}
        return torch.func.jvp(lambda values: torch.func.grad(loss)(values, x), (values,), (along,))[1]

    of_each_row = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))  # as for private training
    transformed: Callable[..., Any] = of_each_row if is_each else curvature
    found = torch.compile(transformed, fullgraph=True, backend="aot_eager")(trained, X)
    torch.testing.assert_close(found, transformed(trained, X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("basis", "dynamic", "most"), [("dense", None, 2), ("block", True, 1)])
def test_the_number_of_tokens_is_no_condition_of_a_graph(basis: Any, dynamic: bool | None, most: int) -> None:
    """The first number is taken for a constant unless told otherwise; every other shares one graph.

    So do adapters of other bases, of which every tensor is a constant with a name of its own.
    """
    model = nn.Sequential(nn.Linear(24, 32))  # cheaper factored for few tokens and materialized for many
    for seed, name in enumerate(("one", "other")):
        adapt(model, r=8, targets="all-linear", basis=basis, seed=seed, name=name)
    randlora.activate(model, ["one", "other"])
    run = Compiled(model, dynamic=dynamic)
    for tokens in (3, 16, 200, 5000):
        compare(run.compiled, model, torch.randn(tokens, 24, requires_grad=True))
    assert run.counter.frame_count == most


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_a_wrapper_is_not_adapted_under_the_names_it_gives(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    wrapped = wrap(model)
    with untouched(model), pytest.raises(AdapterError, match=r"call this on the wrapped model\.(_orig_mod|module)"):
        randlora.inject(wrapped, r=4)


@needs_export
@pytest.mark.parametrize(
    ("options", "strict"), [({}, False), further({"basis": "block"}, True)], ids=["dense", "block"]
)
def test_a_program_of_any_number_of_tokens_is_saved_loaded_and_trained_and_the_model_stays_as_it_was(
    options: dict[str, Any], strict: bool
) -> None:
    model, whole, file = model_with("default", **options), model_with("default", **options), io.BytesIO()
    sizes = ({0: torch.export.Dim("tokens", min=2, max=64)},)
    with untouched(model):
        torch.export.save(torch.export.export(model, (torch.randn(3, 8),), dynamic_shapes=sizes, strict=strict), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for tokens in (2, 64):
        x = torch.randn(tokens, 8)
        assert_close(loaded(x), whole(x), torch.float32)
        assert same_bits(model(x), whole(x))
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert len(trained) == 4
    with untouched(model):
        program = torch.export.export(model, (x,)).module()
    found = torch.autograd.grad(program(x).square().sum(), [program.get_parameter(name) for name in trained])
    expected = torch.autograd.grad(model(x).square().sum(), [*trained.values()])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        compare(torch.compile(twin, fullgraph=True, backend="eager"), model)


@needs_export
@pytest.mark.parametrize("block", ["torch.onnx", pytest.param("aoti", marks=pytest.mark.slow)])
def test_a_block_of_the_page_computes_the_same(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime", "onnxscript") if block == "torch.onnx" else ():
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    model, x = model_with("default", basis="block"), torch.randn(3, 8)
    exec(snippet("compiling.md", block), found := {"torch": torch, "model": model, "x": x})
    assert_close(torch.as_tensor(found["output"]), model(x), torch.float32)
    for x in (torch.randn(2, 8), torch.randn(7, 8)) if block == "aoti" else ():
        run: Any = found["run"]
        assert_close(run(x), model(x), torch.float32)
