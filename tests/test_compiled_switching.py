"""Compiled programs go by the spec of an adapter, not by its name, and never by a parameter that was replaced."""

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import randlora
from randlora.layers.diagonals import Diagonal
from tests.further import further
from tests.kit import fill
from tests.laws import assert_close, needs_compiler

pytestmark = pytest.mark.medium
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


def test_mixes_of_as_many_adapters_share_a_graph() -> None:
    model = model_with("a", "b", "c", "d", targets=["0"])
    run = Compiled(model)
    randlora.activate(model, {"a": 0.5, "c": 0.25})
    assert run.graphs() == 1
    randlora.activate(model, {"b": 0.75, "c": 1.5})
    assert run.graphs() == 2  # factors become numbers of the graph
    for mix in ({"d": 0.1, "c": 0.2}, {"a": -0.5, "b": 0.3}, {"b": 7.0, "d": 2.0}):
        randlora.activate(model, mix)
        assert run.graphs() == 2
    randlora.activate(model, {"a": 0.5, "c": 0.25, "d": 0.1})
    assert run.graphs() == 3


@needs_compiler
def test_adapters_of_another_alpha_share_a_graph() -> None:
    model = model_with("a", targets=["0"])
    run = Compiled(model)
    assert run.graphs() == 1
    for alpha, graphs in ((3, 2), (5, 2), (7, 2)):
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
    for name in ("a", "first", "last", "a", "last", "first"):
        randlora.activate(model, name)
        graphs.add(run.graphs())
    assert max(graphs) == 3


def test_factors_of_single_layers_share_a_graph_if_the_same_layers_act() -> None:
    model = model_with("a", "b")
    run = Compiled(model)
    graphs = []
    for names in (
        {"a": {"0": 0.5, "2": 2.0}},
        {"a": {"0": 0.25, "2": -1.0}},
        {"b": {"0": -3.0, "2": 0.75}},
        {"a": {"0": 0.0, "2": 0.3}},
        {"b": {"0": 0.0, "2": 0.7}},
        {"a": {"0": 0.1, "2": 0.6}},
    ):
        randlora.activate(model, names)
        graphs.append(run.graphs())
    assert graphs == [1, 2, 2, 3, 3, 3]


# Parameters that are replaced


def replace_by_assignment(model: nn.Module) -> None:
    held = model.get_submodule("0.randlora_lambda")
    held.b = nn.Parameter(torch.randn(4, 2))


def replace_in_dict(model: nn.Module) -> None:
    model.get_submodule("0.randlora_lambda")._parameters["b"] = nn.Parameter(torch.randn(4, 2))


def replace_by_key(model: nn.Module) -> None:
    held: Any = model.get_submodule("0.randlora_gamma")
    held["b"] = nn.Parameter(torch.randn(2, 8))


def update_dict(model: nn.Module) -> None:
    model.get_submodule("0.randlora_lambda")._parameters.update(b=nn.Parameter(torch.randn(4, 2)))


def pop_and_put_back(model: nn.Module) -> None:
    held: Any = model.get_submodule("0.randlora_lambda")
    held.pop("b")
    held["b"] = nn.Parameter(torch.randn(4, 2))


def assign_state_dict(model: nn.Module) -> None:
    values = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(values, assign=True)


def move(model: nn.Module) -> None:
    model.double().float()


def exchange_the_dict(model: nn.Module) -> None:
    """Replace it as DeepSpeed's ZeRO-3 does."""
    held: Any = model.get_submodule("0.randlora_lambda")
    held._parameters = dict(held._parameters)
    held._parameters["b"] = nn.Parameter(torch.randn(4, 2))


REPLACE = [
    replace_by_assignment,
    replace_in_dict,
    replace_by_key,
    update_dict,
    pop_and_put_back,
    assign_state_dict,
    move,
    exchange_the_dict,
]


def test_a_replaced_parameter_is_read_at_once() -> None:
    model = model_with("a", "b")
    run = Compiled(model)
    for replace in REPLACE:
        before, graphs = run.compiled(X), run.graphs()
        replace(model)
        assert run.graphs() == graphs + (replace is exchange_the_dict), replace.__name__
        assert torch.equal(run.compiled(X), before) == (replace is move), replace.__name__
    for name in ("a", "b"):
        randlora.activate(model, name)
        run.graphs()


@pytest.mark.parametrize("name", ["slots", "seat", further("at"), further("acting")])
def test_an_adapter_may_have_the_name_of_a_part_of_ours(name: str) -> None:
    model = model_with("a", name, targets=["0"])
    assert Compiled(model).graphs() == 1


def pickled(model: nn.Module) -> nn.Module:
    """Return a copy by way of bytes."""
    twin: nn.Module = pickle.loads(pickle.dumps(model))
    return twin


@pytest.mark.parametrize(
    ("copied", "inside"), [(copy.deepcopy, None), further(pickled, None), (pickled, randlora.disabled)]
)
def test_a_copy_reads_its_own_parameters(copied: Callable[[nn.Module], nn.Module], inside: Any) -> None:
    model = model_with("a", "b")
    if inside is None:
        twin = copied(model)
    else:
        with inside(model):
            twin = copied(model)
    run = Compiled(twin)
    assert run.graphs() == 1
    assert torch.allclose(run.compiled(X), model(X), rtol=1e-3) == (inside is None)
    randlora.activate(model, "a")  # of which the copy knows nothing
    assert run.graphs() == 1
    with torch.no_grad():
        for name in ("a", "b"):
            randlora.activate(twin, name)
            before = run.compiled(X)
            twin.get_parameter(f"0.randlora_lambda.{name}").add_(1)
            run.graphs()
            assert not torch.equal(run.compiled(X), before)


@contextmanager
def without_layer(model: nn.Sequential) -> Iterator[nn.Module]:
    """Yield a layer that is not in the model inside the block."""
    layer, model[0] = model[0], nn.Linear(8, 12)
    yield layer
    model[0] = layer


def test_a_layer_that_was_away_from_a_switch_follows_it_nevertheless() -> None:
    model = model_with("a", "b")
    randlora.activate(model, {"a": 2.0})
    expected = model[0](X)
    randlora.activate(model, "b")
    run = Compiled(model[0])
    run.graphs()
    with without_layer(model) as layer:
        randlora.state.adapted_root(model)[1].activate({"a": 2.0})  # `activate` would refuse
        run.graphs()
        assert torch.equal(layer(X), expected)
    run.graphs()


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
    for _ in range(3):
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
    model = model_with("a", "b")
    run = Compiled(model)
    optimizer = torch.optim.Adam(randlora.trainable_parameters(model), lr=0.1)
    for name in ("a", "b", "a"):
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
    with torch._dynamo.config.patch(cache_size_limit=32):  # recompile_limit, under the name that torch 2.6 has too
        for seed in range(3):
            randlora.inject(model, r=4, targets=["0"], seed=seed, trainable=True)
            fill(model, spread=0.5)
            run.graphs()
            outputs.add(run.compiled(X).sum().item())
            randlora.eject(model)
            gc.collect()
    assert len(outputs) == 3
