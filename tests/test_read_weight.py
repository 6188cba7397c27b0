"""The laws of a weight that other code reads: it is adapted as it is read, and held as it is."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import randlora
from randlora.errors import CheckpointError, TargetError
from randlora.layers.base import AdapterLayer
from randlora.layers.in_place import adapter_layers_of
from randlora.targets.select import find_targets
from tests import reference
from tests.in_place_models import Reading, TableReader, Tables, X, register
from tests.kit import fill, read, same_bits, untouched
from tests.laws import adapted_names, assert_close, needs_compiler, needs_export

WEIGHTS = ("read.table", "read.turned", "called.table", "called.turned")
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True)
def _readers(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


def adapted(dtype: torch.dtype = torch.float32, *, filled: bool = True) -> tuple[Reading, Reading]:
    """Adapt the four weights and the layer; return the model, and a copy as it was before."""
    model = Reading(dtype)
    base = copy.deepcopy(model)
    randlora.inject(model, r=3, alpha=6, targets=[*WEIGHTS, "linear"], stream="portable")
    if filled:
        fill(model)
    return model, base


def owner_of(model: nn.Module, fqn: str) -> tuple[nn.Module, AdapterLayer]:
    owner_fqn, attribute = fqn.rsplit(".", 1)
    owner = model.get_submodule(owner_fqn)
    return owner, adapter_layers_of(owner)[attribute]


def changed(model: nn.Module, base: Reading) -> Reading:
    """Return a plain copy whose weights hold what reading the adapted ones gives."""
    twin = copy.deepcopy(base)
    with torch.no_grad():
        for fqn in WEIGHTS:
            twin.get_parameter(fqn).copy_(read(model, fqn))
        twin.linear.weight += randlora.delta_weight(model, "linear")
    return twin


@DTYPES
@pytest.mark.parametrize("fqn", WEIGHTS)
def test_reading_gives_the_weight_and_the_oracles_update(fqn: str, dtype: torch.dtype) -> None:
    model, base = adapted(dtype)
    owner, layer = owner_of(model, fqn)
    basis = layer.adapters["default"].basis
    lam, gamma = layer.diagonals_of(owner, "default")
    bases = basis.slices(max(layer.shape), min(layer.shape), device="cpu", dtype=torch.float64)
    out_features, in_features = layer.shape
    update = reference.delta_weight(*bases, lam, gamma, 2.0, in_features=in_features)
    assert update.shape == (out_features, in_features)
    expected = base.get_parameter(fqn).double() + layer.in_storage_layout(update)
    found = read(model, fqn)
    assert found.dtype == dtype
    assert found.shape == base.get_parameter(fqn).shape
    assert_close(found, expected, dtype)
    assert (found.double() - base.get_parameter(fqn).double()).abs().max() > 0.01


def test_the_model_computes_as_one_whose_weights_were_changed() -> None:
    model, base = adapted()
    assert_close(model(X), changed(model, base)(X), torch.float32)
    assert not torch.equal(model(X), base(X))


def test_a_fresh_adapter_changes_no_output() -> None:
    model, base = adapted(filled=False)
    assert torch.equal(model(X), base(X))


@pytest.mark.parametrize("fqn", WEIGHTS)
def test_reading_gives_the_parameter_itself_where_no_adapter_acts(fqn: str) -> None:
    model, base = adapted()
    own = owner_of(model, fqn)[0]._parameters[fqn.rsplit(".", 1)[1]]
    with randlora.disabled(model):
        assert read(model, fqn) is own
        assert torch.equal(model(X), base(X))
    assert read(model, fqn) is not own
    assert dict(model.named_parameters())[fqn] is own
    assert model.get_parameter(fqn) is own
    randlora.activate(model, [])
    assert read(model, fqn) is own
    randlora.eject(model)
    assert read(model, fqn) is own


def test_gradients_reach_the_diagonals_and_nothing_else() -> None:
    model, _ = adapted()
    model(X).square().sum().backward()
    reached = {fqn: parameter.grad for fqn, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached.keys() == {fqn for fqn, _ in model.named_parameters() if "randlora" in fqn}
    assert len(reached) == 2 * len([*WEIGHTS, "linear"])
    assert all(grad.abs().max() > 0 for grad in reached.values())


def test_gradients_are_those_of_finite_differences() -> None:
    model, _ = adapted(torch.float64)
    names = [fqn for fqn, _ in model.named_parameters() if "randlora" in fqn]
    values = [model.get_parameter(fqn).detach().double().requires_grad_() for fqn in names]

    def run(*given: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(model, dict(zip(names, given, strict=True)), (X.double(),))
        return output.square().sum()

    assert torch.autograd.gradcheck(run, values, fast_mode=True)


@DTYPES
def test_merging_puts_in_what_was_read_and_unmerging_every_bit(dtype: torch.dtype) -> None:
    model, base = adapted(dtype)
    seen = {fqn: read(model, fqn).detach().clone() for fqn in WEIGHTS}
    with randlora.merged(model):
        for fqn in WEIGHTS:
            assert same_bits(read(model, fqn), seen[fqn])
    for fqn in WEIGHTS:
        assert same_bits(dict(model.named_parameters())[fqn], base.get_parameter(fqn))
        assert same_bits(read(model, fqn), seen[fqn])
    report = randlora.merge(model)
    assert set(report.targets) == {*WEIGHTS, "linear"}
    assert type(model.read) is Tables
    for fqn in WEIGHTS:
        assert same_bits(model.get_parameter(fqn), seen[fqn])


def test_a_file_names_the_parameters_and_loads(tmp_path: Path) -> None:
    model, base = adapted()
    randlora.save(model, tmp_path)
    again = copy.deepcopy(base)
    report = randlora.load(again, tmp_path)
    assert set(report.targets) == {*WEIGHTS, "linear"}
    assert torch.equal(again(X), model(X))
    assert {fqn for fqn in again.state_dict() if "randlora" in fqn} == {
        fqn for fqn in model.state_dict() if "randlora" in fqn
    }


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["read.table"], {"read.table"}),
        (["table"], {"read.table", "called.table"}),
        (["read"], {"read.table", "read.turned"}),
        (r"called\.t\w+", {"called.table", "called.turned"}),
        ("all-linear", {*WEIGHTS, "linear"}),
    ],
    ids=["whole", "attribute", "owner", "regex", "all-linear"],
)
def test_a_weight_is_selected_by_its_name_and_counted(targets: str | list[str], expected: set[str]) -> None:
    model = Reading()
    plan = randlora.plan(model, r=3, targets=targets)
    report = randlora.inject(model, r=3, targets=targets)
    assert set(report.targets) == set(plan.targets) == adapted_names(model) == expected
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert report.trainable_parameters == plan.trainable_parameters == trained
    randlora.eject(model)


def test_a_parameter_of_no_kind_is_no_target() -> None:
    model = Reading()
    with untouched(model), pytest.raises(TargetError, match="scale"):
        randlora.inject(model, r=3, targets=["scale"])


@pytest.mark.parametrize("order", [("table", "turned"), ("turned", "table")], ids=str)
def test_two_weights_of_one_owner_are_given_up_one_after_the_other(order: tuple[str, str]) -> None:
    model = Reading()
    base = copy.deepcopy(model)
    for name in ("table", "turned"):
        randlora.inject(model, r=3, targets=[f"read.{name}"], name=f"on_{name}")
        fill(model, f"on_{name}", seed=len(name))
    randlora.activate(model, ["on_table", "on_turned"])
    first, second = order
    kept = read(model, f"read.{second}").detach().clone()
    randlora.remove(model, f"on_{first}")
    assert same_bits(read(model, f"read.{first}"), base.get_parameter(f"read.{first}"))
    assert same_bits(read(model, f"read.{second}"), kept)
    assert not [name for name in model.state_dict() if f"{first}_randlora" in name]
    randlora.remove(model, f"on_{second}")
    assert type(model.read) is Tables
    assert model.state_dict().keys() == base.state_dict().keys()
    assert torch.equal(model(X), base(X))


def test_a_second_adapter_of_one_weight_adds_to_the_first() -> None:
    model, base = adapted()
    randlora.inject(model, r=3, alpha=6, targets=["read.table"], name="further", stream="portable")
    fill(model, "further", seed=1)
    updates = [randlora.delta_weight(model, "read.table", name=name) for name in ("default", "further")]
    randlora.activate(model, {"default": 1.0, "further": 0.5})
    expected = base.read.table + updates[0] + 0.5 * updates[1]
    assert_close(read(model, "read.table"), expected, torch.float32)
    randlora.remove(model, "default")
    assert_close(read(model, "read.table"), base.read.table + 0.5 * updates[1], torch.float32)
    assert same_bits(read(model, "read.turned"), base.read.turned)


def test_dropout_is_refused_where_the_adapter_sees_no_input() -> None:
    model = Reading()
    with untouched(model), pytest.raises(TargetError, match=r"read\.table is a weight that other code reads.*dropout"):
        randlora.inject(model, r=3, targets=["read.table", "linear"], dropout=0.1)
    with pytest.raises(TargetError, match=r"called\.turned"):
        randlora.plan(model, r=3, targets=["called"], dropout=0.1)
    randlora.inject(model, r=3, targets=["linear"], dropout=0.1)


def test_what_goes_wrong_while_reading_is_not_answered_with_the_plain_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(delta: Tensor) -> Tensor:
        raise AttributeError("of the kind")

    model, _ = adapted()
    monkeypatch.setattr(TableReader, "in_storage_layout", staticmethod(broken))
    with pytest.raises(RuntimeError, match="cannot compute the adapted table: of the kind"):
        model(X)


def test_an_owner_in_two_places_is_adapted_once() -> None:
    shared = Tables()
    model = nn.ModuleDict({"first": shared, "second": shared})
    report = randlora.inject(model, r=3, targets=["second.table"])
    assert report.targets == ("first.table",)
    fill(model)
    assert torch.equal(model["first"](X), model["second"](X))
    assert {name for name in model.state_dict() if "randlora" in name} == {
        f"{place}.table_randlora_{which}.default" for place in ("first", "second") for which in ("lambda", "gamma")
    }
    randlora.eject(model)
    assert model["first"] is model["second"] is shared
    assert type(shared) is Tables


def test_excluding_a_weight_leaves_the_other_of_its_owner() -> None:
    model = Reading()
    report = randlora.inject(model, r=3, targets=["read", "called"], exclude=["turned"])
    assert set(report.targets) == {"read.table", "called.table"}


def test_a_state_dict_saved_while_merged_holds_the_weights_themselves() -> None:
    model, base = adapted()
    with randlora.merged(model):
        saved = model.state_dict()
    for fqn, tensor in base.state_dict().items():
        assert same_bits(saved[fqn], tensor)


def test_another_weight_of_an_owner_whose_class_was_changed_since_is_refused() -> None:
    model = Reading()
    randlora.inject(model, r=3, targets=["read.table"])
    changed_since = type("Sharded", (type(model.read),), {})
    model.read.__class__ = changed_since
    with untouched(model), pytest.raises(TargetError, match=r"read\.turned changed its class to Sharded after"):
        randlora.inject(model, r=3, targets=["read.turned"], name="second")
    assert type(model.read) is changed_since
    randlora.inject(model, r=3, targets=["read.table"], name="second")


@needs_compiler
@pytest.mark.medium
def test_compiling_gives_one_graph_and_the_same_values() -> None:
    model, _ = adapted()
    expected = model(X)
    expected.square().sum().backward()
    gradients = {fqn: p.grad for fqn, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(X)
    found.square().sum().backward()
    assert_close(found, expected, torch.float32)
    assert gradients
    for fqn, gradient in gradients.items():
        torch.testing.assert_close(dict(model.named_parameters())[fqn].grad, gradient)


@pytest.mark.medium
@needs_export
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_an_exported_program_computes_the_same(strict: bool) -> None:
    model, _ = adapted()
    program = torch.export.export(model, (X,), strict=strict)
    assert_close(program.module()(X), model(X), torch.float32)


def test_a_file_with_dropout_is_refused_where_the_adapter_sees_no_input(tmp_path: Path) -> None:
    model = Reading()
    out_features, in_features = next(site.shape for site in find_targets(model, ["read.table"]))
    trained = nn.ModuleDict({"read": nn.ModuleDict({"table": nn.Linear(in_features, out_features)})})
    randlora.inject(trained, r=3, targets=["read.table"], dropout=0.1)
    randlora.save(trained, tmp_path)
    with untouched(model), pytest.raises(CheckpointError, match=r"read\.table is a weight that .*dropout=0\.1"):
        randlora.load(model, tmp_path)
