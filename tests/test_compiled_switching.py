"""Compiled programs go by the spec of an adapter, not by its name, and never by a parameter that was replaced."""

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import randlora
from randlora.layers.diagonals import Diagonal
from tests.further import further
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


class Compiled:
    """A compiled model, held against the model itself in every call."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.model, self.counter = model, CompileCounterWithBackend("eager")
        self.compiled = torch.compile(model, fullgraph=True, backend=self.counter, **options)

    def graphs(self) -> int:
        """Return the number of graphs so far, after comparing outputs, and gradients where something is trained."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        found, expected = self.compiled(X), self.model(X)
        assert_close(found.detach(), expected.detach(), torch.float32)
        if found.requires_grad:
            both = (torch.autograd.grad(out.square().sum(), trained, allow_unused=True) for out in (found, expected))
            for ours, theirs in zip(*both, strict=True):
                assert (ours is None) == (theirs is None)
                if ours is not None and theirs is not None:
                    assert_close(ours, theirs, torch.float32)
        count: int = self.counter.frame_count
        return count


def test_adapters_of_one_spec_share_a_graph() -> None:
    names = [f"a{index}" for index in range(9)]  # one more than programs of one code that the compiler keeps
    model = model_with(*names, targets=["0"])
    run, outputs = Compiled(model), set()
    for name in names:
        randlora.activate(model, name)
        assert run.graphs() == 1
        outputs.add(run.compiled(X).sum().item())
    assert len(outputs) == len(names)
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
def test_adapters_of_another_alpha_share_a_graph() -> None:
    model = model_with("a", targets=["0"])
    run = Compiled(model)
    assert run.graphs() == 1
    for alpha, graphs in ((3, 2), (5, 2)):
        randlora.inject(model, r=4, alpha=alpha, targets=["0"], name=f"of-{alpha}", trainable=True)
        fill(model, f"of-{alpha}", spread=0.5)
        randlora.activate(model, f"of-{alpha}")
        assert run.graphs() == graphs


def test_adapters_of_some_layers_each_are_told_apart() -> None:
    model = model_with("a")
    randlora.inject(model, r=4, targets=["0"], name="first")
    randlora.inject(model, r=2, targets=["2"], name="last")
    for name in ("first", "last"):
        fill(model, name, spread=0.5)
    run, graphs = Compiled(model), set()
    for name in ("a", "first", "last", "a", "first"):
        randlora.activate(model, name)
        graphs.add(run.graphs())
    assert max(graphs) == 3


# Parameters that are replaced


def lambdas(model: nn.Module) -> Any:
    return model.get_submodule("0.randlora_lambda")


def new() -> nn.Parameter:
    return nn.Parameter(torch.randn(4, 2))


def move(model: nn.Module) -> None:
    model.double().float()


def exchange_the_dict(model: nn.Module) -> None:
    """Replace it as DeepSpeed's ZeRO-3 does."""
    lambdas(model)._parameters = {**lambdas(model)._parameters, "b": new()}


def assign_state_dict(model: nn.Module) -> None:
    values = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(values, assign=True)


REPLACE: tuple[Callable[[nn.Module], object], ...] = (
    lambda model: setattr(lambdas(model), "b", new()),
    lambda model: lambdas(model)._parameters.__setitem__("b", new()),
    lambda model: lambdas(model).__setitem__("b", new()),
    lambda model: lambdas(model)._parameters.update(b=new()),
    lambda model: (lambdas(model).pop("b"), lambdas(model).__setitem__("b", new())),
    assign_state_dict,
    move,
    exchange_the_dict,
)


def test_a_replaced_parameter_is_read_at_once() -> None:
    model = model_with("a", "b")
    run = Compiled(model)
    for replace in REPLACE:
        before, graphs = run.compiled(X), run.graphs()
        replace(model)
        assert run.graphs() == graphs + (replace is exchange_the_dict)
        assert torch.equal(run.compiled(X), before) == (replace is move)
    for name in ("a", "b"):
        randlora.activate(model, name)
        run.graphs()


@pytest.mark.parametrize("inside", [None, randlora.disabled], ids=["deepcopy", "pickle"])
def test_a_copy_reads_its_own_parameters(inside: Any) -> None:
    model = model_with("a", "b")
    if inside is None:
        twin = copy.deepcopy(model)
    else:
        with inside(model):
            twin = pickle.loads(pickle.dumps(model))
    run = Compiled(twin)
    assert run.graphs() == 1
    assert torch.allclose(run.compiled(X), model(X), rtol=1e-3) == (inside is None)
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


def test_an_optimizer_step_is_read_at_once() -> None:
    model = model_with("slots", "seat")  # which parts of ours are called
    run = Compiled(model)
    optimizer = torch.optim.Adam(randlora.trainable_parameters(model), lr=0.1)
    for name in ("slots", "seat", "slots"):
        randlora.activate(model, name)
        optimizer.zero_grad()
        run.compiled(X).square().sum().backward()
        optimizer.step()
        assert run.graphs() == 1


def test_bases_that_grow_or_are_released_leave_programs_right() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 20))
    randlora.inject(model, r=4, targets=["0"], stream="portable", trainable=True)
    fill(model, spread=0.5)
    run = Compiled(model)
    assert run.graphs() == 1
    (basis,) = randlora.state.adapted_root(model)[1].bank
    basis.release()
    assert run.graphs() == 1
    randlora.inject(model, r=4, targets="all-linear", stream="portable", name="larger", trainable=True)
    fill(model, "larger", spread=0.5)
    assert basis.extent == (20, 12)
    run.graphs()
    randlora.activate(model, "larger")
    run.graphs()


def test_bases_of_another_seed_are_never_those_of_a_program_before() -> None:
    """Objects are found again at addresses of others that were freed."""
    model, outputs = nn.Sequential(nn.Linear(8, 8)), set()
    run = Compiled(model)
    for seed in range(3):
        randlora.inject(model, r=4, targets=["0"], seed=seed, trainable=True)
        fill(model, spread=0.5)
        run.graphs()
        outputs.add(run.compiled(X).sum().item())
        randlora.eject(model)
        gc.collect()
    assert len(outputs) == 3


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


@pytest.mark.parametrize("checkpointed", [False, further(True)])
def test_blocks_compiled_one_by_one_take_as_many_graphs_as_plain_ones(checkpointed: bool) -> None:
    graphs, plain = [], Blocks(checkpointed=checkpointed)
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


def compare(compiled: Any, model: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Hold outputs and gradients against the model itself."""
    trained = [[each for each in of.parameters() if each.requires_grad] for of in (compiled, model)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        outputs = compiled(x), model(x)
    assert_close(outputs[0].detach(), outputs[1].detach(), dtype)
    both = (torch.autograd.grad(out.float().square().mean(), of) for out, of in zip(outputs, trained, strict=True))
    for ours, theirs in zip(*both, strict=True):
        assert_close(ours, theirs, dtype)


def test_checkpointed_blocks_compile_to_one_graph_under_autocast() -> None:
    model = Blocks(checkpointed=True)
    randlora.inject(model, r=2, targets="all-linear")
    compiled = torch.compile(fill(model, spread=0.3), fullgraph=True, backend="aot_eager")
    compare(compiled, model, torch.randn(5, 8), torch.bfloat16)
