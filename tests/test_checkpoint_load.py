"""`load`: where it reads, what it adds, what it leaves alone, and every model it refuses without a trace."""

import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import randlora
from randlora.errors import AdapterError, CheckpointError
from tests.checkpoint_files import (
    CASES,
    CONFIG_FILE,
    HEADED,
    LINEAR,
    TENSORS_FILE,
    Case,
    Headed,
    basis_of,
    refused,
    trained,
)
from tests.kit import adapter_values, all_bits, bits, fill, on_one_line
from tests.strategies import KINDS_AND_STREAMS


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory with an adapter of ``LINEAR``."""
    randlora.save(trained(LINEAR), tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def headed(tmp_path: Path) -> Path:
    """A directory with an adapter of ``HEADED``, its head and one bias."""
    randlora.save(trained(HEADED), tmp_path / "headed")
    return tmp_path / "headed"


def test_a_loaded_adapter_is_active_and_frozen_where_it_is_the_first(headed: Path) -> None:
    model = HEADED.build()
    randlora.load(model, headed)
    (info,) = randlora.adapters(model)
    assert (info.name, info.weight, info.is_trainable) == ("default", 1.0, False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(AdapterError, match=r"would have nothing to do \(default\): call randlora.set_trainable"):
        list(randlora.trainable_parameters(model))


def test_load_can_leave_the_first_adapter_inactive(saved: Path) -> None:
    model = LINEAR.build()
    plain = LINEAR.output(model)
    randlora.load(model, saved, active=False)
    assert randlora.adapters(model)[0].weight is None
    assert torch.equal(LINEAR.output(model), plain)


def test_a_trainable_adapter_trains_its_own_parameters_and_nothing_else(headed: Path) -> None:
    model = HEADED.build()
    randlora.load(model, headed, trainable=True)
    expected = {id(parameter) for parameter in adapter_values(model).values()}
    assert {id(parameter) for parameter in randlora.trainable_parameters(model)} == expected
    assert {id(parameter) for parameter in model.parameters() if parameter.requires_grad} == expected


def test_an_adapter_loaded_in_inference_mode_can_be_trained(headed: Path) -> None:
    model = HEADED.build()
    with torch.inference_mode():
        randlora.load(model, headed, trainable=True)
    model(torch.ones(2, 6)).sum().backward()
    assert all(parameter.grad is not None for parameter in randlora.trainable_parameters(model))


def test_load_reports_what_it_added_and_the_report_prints(headed: Path) -> None:
    model = HEADED.build()
    report = randlora.load(model, headed, name="mine")
    assert report.name == "mine"
    assert report.targets == ("body.0", "body.2")
    assert set(report.train_also) == {"head.weight", "head.bias", "norm.bias"}
    assert report.trainable_parameters == 3 * (2 + 6) + 4 * (2 + 7) + 3 * 7 + 3 + 7
    assert report.notes == ()
    assert f"targets: the names in {headed}" in on_one_line(report)


def test_the_models_own_values_of_what_was_trained_beside_are_kept(headed: Path) -> None:
    model = HEADED.build()
    own = bits(model.get_parameter("head.weight"))
    randlora.load(model, headed)
    assert bits(model.get_parameter("head.weight")) == bits(adapter_values(model)["head.weight"]) != own
    with randlora.disabled(model):
        assert bits(model.get_parameter("head.weight")) == own


# Beside other adapters


@st.composite
def bases(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a rank, a kind and a seed that two adapters may or may not have in common."""
    kind, stream = draw(st.sampled_from(KINDS_AND_STREAMS))
    return {"basis": kind, "stream": stream, "r": draw(st.sampled_from([8, 12])), "seed": draw(st.integers(0, 1))}


@given(st.sampled_from(CASES), bases(), bases())
def test_loading_a_second_adapter_changes_no_bit_of_the_first(
    case: Case, first: dict[str, Any], second: dict[str, Any]
) -> None:
    model = trained(case, **first, name="first")
    output, values = case.output(model), all_bits(adapter_values(model, "first"))
    parameters = {id(parameter) for parameter in randlora.trainable_parameters(model)}
    with tempfile.TemporaryDirectory() as directory:
        randlora.save(trained(case, **second), directory)
        randlora.load(model, directory, name="second")
    assert torch.equal(case.output(model), output)
    assert all_bits(adapter_values(model, "first")) == values
    assert {id(parameter) for parameter in randlora.trainable_parameters(model)} == parameters
    infos = {info.name: info for info in randlora.adapters(model)}
    assert (infos["second"].weight, infos["second"].is_trainable) == (None, False)
    assert (infos["first"].weight, infos["first"].is_trainable) == (1.0, True)


def test_load_can_make_the_second_adapter_the_only_active_one(saved: Path) -> None:
    alone, model = LINEAR.build(), trained(LINEAR, name="first")
    fill(model, "first", seed=4)
    randlora.load(alone, saved)
    randlora.load(model, saved, name="second", active=True)
    assert [info.weight for info in randlora.adapters(model)] == [None, 1.0]
    assert torch.equal(LINEAR.output(model), LINEAR.output(alone))


def test_adapters_of_equal_bases_share_them(saved: Path) -> None:
    model = LINEAR.build()
    randlora.load(model, saved, name="one")
    randlora.load(model, saved, name="two")
    assert basis_of(model, "one") is basis_of(model, "two")


def test_a_portable_basis_grows_for_a_larger_adapter_and_serves_both(tmp_path: Path) -> None:
    options: dict[str, Any] = {"r": 2, "stream": "portable"}
    small = Case("small", Headed, {"targets": ["head"]})
    large = Case("large", Headed, {"targets": ["0", "2"]})
    randlora.save(trained(large, **options), tmp_path)
    model, alone = trained(small, **options, name="small"), large.build()
    output = small.output(model)
    randlora.load(model, tmp_path, name="large")
    randlora.load(alone, tmp_path)
    assert basis_of(model, "small") is basis_of(model, "large")
    assert torch.equal(small.output(model), output)
    randlora.activate(model, "large")
    assert torch.equal(large.output(model), large.output(alone))


def test_an_adapter_trained_on_wider_torch_bases_brings_its_own(tmp_path: Path) -> None:
    narrow, wide = Case("narrow", Headed, {"targets": ["head"]}), Case("wide", Headed, {"targets": ["0", "head"]})
    randlora.save(trained(wide), tmp_path)
    model = trained(narrow, name="narrow")
    randlora.load(model, tmp_path, name="wide")
    assert basis_of(model, "narrow") is not basis_of(model, "wide")
    assert [info.specs[0].max_dim for info in randlora.adapters(model)] == [7, 9]


def test_a_name_that_is_taken_is_refused(saved: Path) -> None:
    refused(trained(LINEAR), saved, "the model has an adapter of that name", error=AdapterError)


@pytest.mark.parametrize("name", ["", "a.b", "keys", 3], ids=repr)
def test_a_name_that_cannot_be_used_is_refused(name: Any, saved: Path) -> None:
    refused(LINEAR.build(), saved, f"an adapter named {name!r}", error=AdapterError, name=name)


def test_load_while_merged_is_refused(saved: Path) -> None:
    model = trained(LINEAR, name="first")
    randlora.merge(model, reversible=True)
    refused(model, saved, "while the adapters are merged", error=AdapterError, name="second")


def test_load_into_a_part_of_an_adapted_model_is_refused(saved: Path) -> None:
    model = nn.ModuleDict({"inner": LINEAR.build()})
    randlora.inject(model, r=2)
    refused(model["inner"], saved, "has adapters that were added to a different module", error=AdapterError, name="x")


# Models that do not fit


class Computed(nn.Module):
    """Something of another kind in the place of a linear layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


def _with(index: int, layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 5))
        model[index] = layer()
        return model

    return make


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 5), nn.Linear(6, 4))
    model[3].weight = model[0].weight
    return model


def _integers() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 5))
    model[0].weight = nn.Parameter(torch.ones(4, 6, dtype=torch.int8), requires_grad=False)
    return model


def _twice() -> nn.Module:
    layer = nn.Linear(6, 4)
    return nn.Sequential(layer, nn.Tanh(), layer)


MISFITS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "missing-layer": (lambda: nn.Sequential(nn.Linear(6, 4)), "the model has no layer 2"),
    "other-names": (lambda: nn.ModuleDict({"a": nn.Linear(6, 4)}), "the model has no layer 0"),
    "bare-layer": (lambda: nn.Linear(6, 4), "the model has no layer 0"),
    "wider": (_with(2, lambda: nn.Linear(4, 6)), "2 is 6 x 4 here, the adapter was trained on out x in = 5 x 4"),
    "longer-input": (_with(0, lambda: nn.Linear(7, 4)), "0 is 4 x 7 here, the adapter was trained on out x in = 4 x 6"),
    "transposed": (_with(0, lambda: nn.Linear(4, 6)), "0 is 6 x 4 here, the adapter was trained on out x in = 4 x 6"),
    "transposed-Conv1D": (_with(0, lambda: Conv1D(6, 4)), "0 is 6 x 4 here"),
    "not-linear": (_with(0, lambda: nn.LayerNorm(6)), "0 (LayerNorm) has no weight that can be adapted"),
    "a-bag": (_with(0, lambda: nn.EmbeddingBag(6, 4)), "0 (EmbeddingBag) has no weight that can be adapted"),
    "an-embedding": (
        _with(0, lambda: nn.Embedding(6, 4)),
        "0 is 6 x 4 here, the adapter was trained on out x in = 4 x 6",
    ),
    "a-container": (
        _with(0, lambda: Computed(nn.Linear(6, 4))),
        "0 (Computed) has no weight",
    ),
    "attention": (_with(0, lambda: nn.MultiheadAttention(6, 2).out_proj), "0 is 6 x 6 here, the adapter was trained"),
    "parametrized": (
        _with(0, lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))),
        "0 computes its weight from other parameters",
    ),
    "lazy": (_with(0, lambda: nn.LazyLinear(4)), "0 has no shape yet"),
    "tied": (_tied, "the weight of 0 is tied to 3.weight"),
    "integers": (_integers, "0 has a weight of torch.int8"),
    "meta": (_with(0, lambda: nn.Linear(6, 4, device="meta")), "0 holds no values yet (meta)"),
    "two-names-of-one-layer": (_twice, "2 and 0 are the same layer in this model, which cannot hold both"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize(("make", "message"), MISFITS.values(), ids=MISFITS)
def test_a_model_that_does_not_fit_is_refused(make: Callable[[], nn.Module], message: str, saved: Path) -> None:
    refused(make(), saved, message)


def test_every_misfit_is_named_at_once(saved: Path) -> None:
    model = nn.Sequential(nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 6))
    with pytest.raises(CheckpointError, match="2 problems") as caught:
        randlora.load(model, saved)
    assert "0 is 4 x 7 here" in str(caught.value)
    assert "2 is 6 x 4 here" in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"norm": nn.Identity()}, "the model has no parameter norm.bias, which was trained with the adapter"),
        ({"head": nn.Linear(7, 4)}, "head.weight has shape (4, 7) here, (3, 7) in the file"),
        ({"head": nn.Linear(7, 3, bias=False)}, "the model has no parameter head.bias"),
    ],
    ids=["missing-module", "other-shape", "missing-bias"],
)
def test_a_model_without_room_for_what_was_trained_beside_is_refused(
    changed: dict[str, nn.Module], message: str, headed: Path
) -> None:
    model = HEADED.build()
    for name, module in changed.items():
        setattr(model, name, module)
    refused(model, headed, message)


def test_a_parameter_of_integers_is_not_overwritten_with_rounded_numbers(headed: Path) -> None:
    model = HEADED.build()
    model.get_submodule("norm").bias = nn.Parameter(torch.ones(7, dtype=torch.int8), requires_grad=False)
    refused(model, headed, "norm.bias holds torch.int8 here")


@pytest.mark.parametrize("make", [lambda: trained(HEADED, name="first", r=4), HEADED.build], ids=["adapted", "plain"])
def test_a_misfit_leaves_a_model_with_or_without_adapters_alone(make: Callable[[], nn.Module], saved: Path) -> None:
    refused(make(), saved, 'give prefix="body"', name="second")


@pytest.mark.parametrize(
    "step", ["file_bases", "prepare", "adapter_report", "replacements"], ids=lambda step: f"{step}-fails"
)
@pytest.mark.parametrize("name", ["default", "second"])
def test_a_failure_at_any_step_leaves_the_model_alone(
    step: str, name: str, headed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(importlib.import_module("randlora.checkpoint.load"), step, fail)
    model = HEADED.build() if name == "default" else trained(HEADED, name="first", r=4)
    refused(model, headed, "no room", error=MemoryError, name=name)


def test_a_layer_of_another_kind_with_the_same_shape_takes_the_adapter(saved: Path) -> None:
    model = nn.Sequential(Conv1D(4, 6), nn.Tanh(), nn.Linear(4, 5))
    twin = LINEAR.build()
    randlora.load(model, saved)
    randlora.load(twin, saved)
    assert torch.equal(randlora.delta_weight(model, "0"), randlora.delta_weight(twin, "0"))


@pytest.fixture
def saved_headed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with an adapter of ``HEADED``, two levels below the working directory."""
    randlora.save(trained(HEADED), tmp_path / "user" / "repo")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "user" / "repo"


@pytest.mark.parametrize(
    "place", ["user/repo", "user/repo/", "./user/repo", f"user/repo/{TENSORS_FILE}", f"./user/repo/{TENSORS_FILE}"]
)
@pytest.mark.parametrize("kind", [str, Path], ids=lambda kind: kind.__name__)
@pytest.mark.usefixtures("saved_headed")
def test_a_path_that_exists_is_loaded_whatever_it_looks_like(place: str, kind: type[str] | type[Path]) -> None:
    twin = HEADED.build()
    randlora.load(twin, kind(place))
    assert all_bits(adapter_values(twin)) == all_bits(adapter_values(trained(HEADED)))


def test_the_file_alone_is_loaded_from_its_own_directory(saved_headed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved_headed)
    twin = HEADED.build()
    randlora.load(twin, TENSORS_FILE)
    assert all_bits(adapter_values(twin)) == all_bits(adapter_values(trained(HEADED)))


def test_another_file_of_the_directory_is_refused(saved_headed: Path) -> None:
    refused(HEADED.build(), saved_headed / CONFIG_FILE, f"expected a directory, or the file {TENSORS_FILE} in one")


@pytest.mark.parametrize("place", ["user/repo", f"user/repo/{TENSORS_FILE}", "./nowhere", "nowhere", "a/b/c"])
@pytest.mark.usefixtures("saved_headed")
def test_a_path_has_no_revision(place: str) -> None:
    refused(HEADED.build(), place, "a path has no revision, got 'main'", revision="main")


@pytest.mark.parametrize("place", ["nowhere", "./no/where", "/no/where", "a/b/c", "../a/b", "~/a"])
@pytest.mark.usefixtures("saved_headed")
def test_a_name_that_is_neither_path_nor_repository_is_refused(place: str) -> None:
    refused(LINEAR.build(), place, f"expected a directory with {CONFIG_FILE} and {TENSORS_FILE}")


@pytest.mark.usefixtures("saved_headed")
def test_a_path_object_never_means_a_repository() -> None:
    refused(LINEAR.build(), Path("user/none"), f"expected a directory with {CONFIG_FILE} and {TENSORS_FILE}")
