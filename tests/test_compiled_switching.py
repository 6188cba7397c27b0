"""Compiled programs go by the spec of an adapter, not by its name, and never by a parameter that was replaced."""

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import randlora
from randlora.layers.diagonals import Diagonal
from tests.kit import fill
from tests.laws import assert_close, needs_compiler

pytestmark = [
    pytest.mark.medium,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # the compiler looks at it
]
X = torch.linspace(-1, 1, 24).view(3, 8)


def model_with(*names: str, **options: Any) -> nn.Sequential:
    """Make a model with filled adapters of one spec; the last is active."""
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))
    for seed, name in enumerate(names):
        randlora.inject(model, **{"r": 4, "targets": "all-linear", "name": name, "trainable": True, **options})
        randlora.activate(model, name)
        fill(model, name, seed=seed, spread=0.5)
    return model


def compare(compiled: Any, model: nn.Module, x: Tensor = X, dtype: torch.dtype = torch.float32) -> None:
    """Hold outputs, and gradients where something is trained, against the model itself."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        outputs = compiled(x), model(x)
    assert_close(outputs[0].detach(), outputs[1].detach(), dtype)
    if outputs[0].requires_grad:
        trained = [[each for each in (x, *of.parameters()) if each.requires_grad] for of in (compiled, model)]
        losses = zip((output.float().square().sum() for output in outputs), trained, strict=True)
        for ours, theirs in zip(*(torch.autograd.grad(*each, allow_unused=True) for each in losses), strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs is not None:
                assert_close(ours, theirs, dtype)


class Compiled:
    """A compiled model, held against the model itself in every call."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.model, self.counter = model, CompileCounterWithBackend("eager")
        self.compiled = torch.compile(model, fullgraph=True, backend=self.counter, **options)

    def graphs(self) -> int:
        """Return the number of graphs so far, after a comparison."""
        compare(self.compiled, self.model)
        count: int = self.counter.frame_count
        return count


def test_adapters_of_one_spec_share_a_graph_and_steps_of_an_optimizer_are_read_at_once() -> None:
    names = [*(f"a{index}" for index in range(7)), "slots", "seat"]  # the last two are names of parts of ours
    assert len(names) == torch._dynamo.config.recompile_limit + 1  # programs of one code that the compiler keeps
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
    assert run.graphs() == 4
    randlora.inject(model, r=4, targets=["0"], name="later", trainable=True)
    fill(model, "later")
    randlora.activate(model, "later")
    assert run.graphs() == 4


def test_mixes_of_as_many_adapters_and_factors_of_the_same_layers_share_a_graph() -> None:
    model = model_with("a", "b", "c")
    run, graphs = Compiled(model), []
    mixes: tuple[dict[str, Any], ...] = (
        {"a": 0.5, "c": 0.25},
        {"b": 0.75, "c": 1.5},  # factors become numbers of the graph
        {"a": -0.5, "b": 0.3},
        {"a": {"0": 0.5, "2": 2.0}},
        {"a": {"0": 0.25, "2": -1.0}},
        {"b": {"0": -3.0, "2": 0.75}},
        {"a": {"0": 0.0, "2": 0.3}},
    )
    for names in mixes:
        randlora.activate(model, names)
        graphs.append(run.graphs())
    assert graphs == [1, 2, 2, 3, 3, 3, 4]


@needs_compiler
def test_adapters_of_another_alpha_share_a_graph_and_those_of_other_layers_are_told_apart() -> None:
    model, graphs = model_with("a"), []
    for name, r, alpha, layer in (("3", 4, 3, None), ("5", 4, 5, None), ("first", 4, 20, "0"), ("last", 2, 10, "2")):
        targets: Any = [layer] if layer else "all-linear"
        randlora.inject(model, r=r, alpha=alpha, targets=targets, name=name, trainable=True)
        fill(model, name, spread=0.5)
    run = Compiled(model)
    for name in ("a", "3", "5", "first", "last", "a", "first"):
        randlora.activate(model, name)
        graphs.append(run.graphs())
    assert graphs == [1, 2, 2, 3, 4, 4, 4]


# Parameters that are replaced


def replaces(model: nn.Module, values: Any) -> Iterator[tuple[Callable[[], object], bool]]:
    """Return ways to replace a parameter, all but the last of which keep the graph; whether values stay."""

    def new() -> nn.Parameter:
        return nn.Parameter(torch.randn(4, 2))

    def others() -> dict[str, Tensor]:
        return {name: torch.randn_like(value) for name, value in model.state_dict().items()}

    yield lambda: setattr(values, "b", new()), False
    yield lambda: values._parameters.update(b=new()), False
    yield lambda: (values.pop("b"), values.__setitem__("b", new())), False
    yield lambda: model.load_state_dict(others(), assign=True), False
    yield lambda: model.double().float(), True
    yield lambda: setattr(values, "_parameters", {**values._parameters, "b": new()}), False  # as DeepSpeed's ZeRO-3


def test_a_replaced_parameter_is_read_at_once() -> None:
    model = model_with("a", "b")
    run = Compiled(model)
    before, graphs = run.compiled(X), [run.graphs()]
    for replace, is_same in replaces(model, model.get_submodule("0.randlora_lambda")):
        replace()
        graphs.append(run.graphs())
        assert torch.equal(run.compiled(X), before) == is_same
        before = run.compiled(X)
    assert graphs == [1, 1, 1, 1, 1, 1, 2]
    for name in ("a", "b"):
        randlora.activate(model, name)
        run.graphs()


def test_a_copy_reads_its_own_parameters() -> None:
    model = model_with("a", "b")
    with randlora.disabled(model):
        pickled = pickle.loads(pickle.dumps(model))
    for twin, is_same in ((copy.deepcopy(model), True), (pickled, False)):
        run = Compiled(twin)
        assert run.graphs() == 1
        assert torch.allclose(run.compiled(X), model(X), rtol=1e-3) == is_same
        randlora.activate(model, "a")  # of which the copy knows nothing
        assert run.graphs() == 1
        with torch.no_grad():
            randlora.activate(twin, "a")
            before = run.compiled(X)
            twin.get_parameter("0.randlora_lambda.a").add_(1)
            run.graphs()
            assert not torch.equal(run.compiled(X), before)


@needs_compiler
def test_functional_calls_read_what_they_are_given() -> None:
    model = model_with("a", "b", targets=["0"])
    run = Compiled(model)
    run.graphs()
    name = "0.randlora_lambda.b"
    own = model.get_parameter(name)

    def call(lam: Tensor) -> Tensor:
        return torch.func.functional_call(model, {name: lam}, (X,))  # type: ignore[no-any-return]

    inside = torch.compile(call, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        lam = torch.randn(4, 2, requires_grad=True)
        expected = call(lam)
        compiled: Any = run.compiled
        outside = torch.func.functional_call(compiled, {f"_orig_mod.{name}": lam}, (X,))
        for found in (inside(lam), outside):
            assert_close(found.detach(), expected.detach(), torch.float32)
            ours, theirs = (torch.autograd.grad(out.sum(), lam, retain_graph=True)[0] for out in (found, expected))
            assert_close(ours, theirs, torch.float32)
        assert model.get_parameter(name) is own
        run.graphs()
    held = model.get_submodule("0.randlora_lambda")
    assert isinstance(held, Diagonal)
    assert held.randlora_slots == [own]


def test_bases_that_grow_are_released_or_of_another_seed_leave_programs_right() -> None:
    model, outputs = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 20)), set()
    run = Compiled(model)
    for seed in range(3):  # objects are found again at addresses of others that were freed
        randlora.inject(model, r=4, targets=["0"], stream="portable", seed=seed, trainable=True)
        fill(model, spread=0.5)
        run.graphs()
        outputs.add(run.compiled(X).sum().item())
        if seed < 2:
            randlora.eject(model)
            gc.collect()
    assert len(outputs) == 3
    (basis,) = randlora.state.adapted_root(model)[1].bank
    basis.release()
    run.graphs()
    randlora.inject(model, r=4, targets="all-linear", stream="portable", seed=2, name="larger", trainable=True)
    fill(model, "larger", spread=0.5)
    assert basis.extent == (20, 12)
    run.graphs()
    randlora.activate(model, "larger")
    run.graphs()


# Blocks, compiled one by one as plain ones are, and checkpointed under autocast


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.layer(self.norm(x)))


class Blocks(nn.Module):
    """Two blocks, which may be checkpointed."""

    def __init__(self, *, checkpointed: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


def test_blocks_compiled_one_by_one_take_as_many_graphs_as_plain_ones_and_checkpointed_ones_one() -> None:
    graphs, plain = [], Blocks(checkpointed=False)
    randlora.inject(adapted := copy.deepcopy(plain), r=2, targets="all-linear")
    for model in (plain, fill(adapted, spread=0.3)):
        torch._dynamo.reset()
        twin, counter = copy.deepcopy(model), CompileCounterWithBackend("eager")
        for block in model.blocks:
            block.compile(fullgraph=True, backend=counter)
        for tokens in (3, 7, 12):
            compare(model, twin, torch.randn(tokens, 8))
        graphs.append(counter.frame_count)
    assert graphs[1] <= graphs[0] + 1
    model = Blocks(checkpointed=True)
    randlora.inject(model, r=2, targets="all-linear")
    compiled = torch.compile(fill(model, spread=0.3), fullgraph=True, backend="aot_eager")
    compare(compiled, model, torch.randn(5, 8), torch.bfloat16)
