"""`load`: where it reads, what it adds, what it leaves alone, and every model it refuses without a trace."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import randlora
from randlora.errors import AdapterError
from tests.checkpoint_files import (
    CONFIG_FILE,
    HEADED,
    LINEAR,
    TENSORS_FILE,
    basis_of,
    refused,
    trained,
)
from tests.kit import adapter_values, all_bits, bits, fill, on_one_line


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
    plain, own = HEADED.output(model), bits(model.get_parameter("head.weight"))
    report = randlora.load(model, headed, name="mine", active=False)
    assert randlora.adapters(model)[0].weight is None
    assert torch.equal(HEADED.output(model), plain)
    assert (report.name, report.targets) == ("mine", ("body.0", "body.2"))
    assert report.notes == ("inactive: call randlora.activate(model, 'mine') to add its update",)
    assert set(report.train_also) == {"head.weight", "head.bias", "norm.bias"}
    assert report.trainable_parameters == 3 * (2 + 6) + 4 * (2 + 7) + 3 * 7 + 3 + 7
    assert f"targets: the names in {headed}" in on_one_line(report)
    randlora.eject(model)
    randlora.load(model, headed)
    (info,) = randlora.adapters(model)
    assert (info.name, info.weight, info.is_trainable) == ("default", 1.0, False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(AdapterError, match=r"would have nothing to do \(default\): call randlora.set_trainable"):
        list(randlora.trainable_parameters(model))
    assert bits(model.get_parameter("head.weight")) == bits(adapter_values(model)["head.weight"]) != own
    with randlora.disabled(model):
        assert bits(model.get_parameter("head.weight")) == own


def test_a_trainable_adapter_trains_its_own_parameters_and_nothing_else(headed: Path) -> None:
    model = HEADED.build()
    with torch.inference_mode():
        randlora.load(model, headed, trainable=True)
    expected = {id(parameter) for parameter in adapter_values(model).values()}
    assert {id(parameter) for parameter in randlora.trainable_parameters(model)} == expected
    assert {id(parameter) for parameter in model.parameters() if parameter.requires_grad} == expected
    model(torch.ones(2, 6)).sum().backward()
    assert all(parameter.grad is not None for parameter in randlora.trainable_parameters(model))


def test_load_can_make_the_second_adapter_the_only_active_one_and_share_its_bases(saved: Path) -> None:
    alone, model = LINEAR.build(), trained(LINEAR, name="first")
    fill(model, "first", seed=4)
    randlora.load(alone, saved)
    randlora.load(model, saved, name="second", active=True)
    assert [info.weight for info in randlora.adapters(model)] == [None, 1.0]
    assert torch.equal(LINEAR.output(model), LINEAR.output(alone))
    assert basis_of(model, "first") is basis_of(model, "second")


def test_a_model_that_can_take_no_adapter_of_that_name_or_none_now_is_refused(saved: Path) -> None:
    model = trained(LINEAR, name="first")
    refused(model, saved, "the model has an adapter of that name", error=AdapterError, name="first")
    for name in ("", "a.b", "keys", 3):
        refused(LINEAR.build(), saved, f"an adapter named {name!r}", error=AdapterError, name=name)
    whole = nn.ModuleDict({"inner": LINEAR.build()})
    randlora.inject(whole, r=2)
    refused(whole["inner"], saved, "has adapters that were added to a different module", error=AdapterError, name="x")
    randlora.merge(model, reversible=True)
    refused(model, saved, "while the adapters are merged", error=AdapterError, name="second")


# Models that do not fit


def _with(layer: Callable[[], nn.Module], index: int = 0) -> Callable[[], nn.Module]:
    """Make LINEAR with another layer in the place of one."""

    def make() -> nn.Module:
        model = LINEAR.make()
        assert isinstance(model, nn.Sequential)
        model[index] = layer()
        return model

    return make


def _tied() -> nn.Module:
    model = nn.Sequential(*_with(nn.Tanh, 1)().children(), nn.Linear(6, 4))
    model[3].weight = model[0].weight
    return model


def _integers() -> nn.Module:
    layer = nn.Linear(6, 4)
    layer.weight = nn.Parameter(torch.ones(4, 6, dtype=torch.int8), requires_grad=False)
    return layer


def _twice() -> nn.Module:
    layer = nn.Linear(6, 4)
    return nn.Sequential(layer, nn.Tanh(), layer)


TRAINED_ON = "here, the adapter was trained on out x in = 4 x 6"
NO_WEIGHT = "has no weight that can be adapted"
MISFITS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "missing-layer": (lambda: nn.Sequential(nn.Linear(6, 4)), "the model has no layer 2"),
    "bare-layer": (lambda: nn.Linear(6, 4), "the model has no layer 0"),
    "longer-input": (_with(lambda: nn.Linear(7, 4)), f"0 is 4 x 7 {TRAINED_ON}"),
    "transposed": (_with(lambda: nn.Linear(4, 6)), f"0 is 6 x 4 {TRAINED_ON}"),
    "transposed-Conv1D": (_with(lambda: Conv1D(6, 4)), "0 is 6 x 4 here"),
    "not-linear": (_with(lambda: nn.LayerNorm(6)), f"0 (LayerNorm) {NO_WEIGHT}"),
    "a-bag": (_with(lambda: nn.EmbeddingBag(6, 4)), f"0 (EmbeddingBag) {NO_WEIGHT}"),
    "an-embedding": (_with(lambda: nn.Embedding(6, 4)), f"0 is 6 x 4 {TRAINED_ON}"),
    "a-container": (_with(lambda: nn.ModuleDict({"a": nn.Linear(6, 4)})), "0 (ModuleDict) has no weight"),
    "attention": (_with(lambda: nn.MultiheadAttention(6, 2).out_proj), "0 is 6 x 6 here, the adapter was trained"),
    "parametrized": (
        _with(lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))),
        "0 computes its weight from other parameters",
    ),
    "lazy": (_with(lambda: nn.LazyLinear(4)), "0 has no shape yet"),
    "tied": (_tied, "the weight of 0 is tied to 3.weight"),
    "integers": (_with(_integers), "0 has a weight of torch.int8"),
    "meta": (_with(lambda: nn.Linear(6, 4, device="meta")), "0 holds no values yet (meta)"),
    "two-names-of-one-layer": (_twice, "2 and 0 are the same layer in this model, which cannot hold both"),
    "both-layers": (_with(lambda: nn.Linear(4, 6), 2), "2 is 6 x 4 here, the adapter was trained on out x in = 5 x 4"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize(("make", "message"), MISFITS.values(), ids=MISFITS)
def test_a_model_that_does_not_fit_is_refused(make: Callable[[], nn.Module], message: str, saved: Path) -> None:
    refused(make(), saved, message)


def test_every_misfit_is_named_at_once_and_leaves_adapters_alone(saved: Path) -> None:
    both = nn.Sequential(nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 6))
    for part in ("2 problems", "0 is 4 x 7 here", "2 is 6 x 4 here"):
        refused(both, saved, part)
    for model in (HEADED.build(), trained(HEADED, name="first", r=4)):
        refused(model, saved, 'give prefix="body"', name="second")


@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        ("norm", nn.Identity(), "the model has no parameter norm.bias, which was trained with the adapter"),
        ("head", nn.Linear(7, 4), "head.weight has shape (4, 7) here, (3, 7) in the file"),
        ("head", nn.Linear(7, 3, bias=False), "the model has no parameter head.bias"),
        ("norm", _integers(), "norm.bias has shape (4,) here"),
    ],
    ids=["missing-module", "other-shape", "missing-bias", "other-norm"],
)
def test_a_model_without_room_for_what_was_trained_beside_is_refused(
    name: str, module: nn.Module, message: str, headed: Path
) -> None:
    model = HEADED.build()
    setattr(model, name, module)
    refused(model, headed, message)
    model = HEADED.build()  # where rounded numbers would be written
    model.get_submodule("norm").bias = nn.Parameter(torch.ones(7, dtype=torch.int8), requires_grad=False)
    refused(model, headed, "norm.bias holds torch.int8 here")


def test_a_layer_of_another_kind_with_the_same_shape_takes_the_adapter(saved: Path) -> None:
    model, twin = nn.Sequential(Conv1D(4, 6), nn.Tanh(), nn.Linear(4, 5)), LINEAR.build()
    for each in (model, twin):
        randlora.load(each, saved)
    assert torch.equal(randlora.delta_weight(model, "0"), randlora.delta_weight(twin, "0"))


def test_a_path_that_exists_is_loaded_whatever_it_looks_like(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is neither path nor repository is refused; a path object never means a repository."""
    randlora.save(trained(HEADED), tmp_path / "user" / "repo")
    monkeypatch.chdir(tmp_path)

    def loads(place: str | Path) -> None:
        twin = HEADED.build()
        randlora.load(twin, place)
        assert all_bits(adapter_values(twin)) == all_bits(adapter_values(trained(HEADED)))

    file = f"user/repo/{TENSORS_FILE}"
    for place in ("user/repo", "user/repo/", "./user/repo", file, f"./{file}", Path("user/repo"), Path(file)):
        loads(place)
    for nowhere in ("nowhere", "./no/where", "/no/where", "a/b/c", "../a/b", "~/a", Path("user/none")):
        refused(LINEAR.build(), nowhere, f"expected a directory with {CONFIG_FILE} and {TENSORS_FILE}")
    other = Path("user", "repo", CONFIG_FILE)
    refused(LINEAR.build(), other, f"expected a directory, or the file {TENSORS_FILE} in one")
    for place in ("user/repo", file, "./nowhere", "nowhere", "a/b/c"):
        refused(HEADED.build(), place, "a path has no revision, got 'main'", revision="main")
    monkeypatch.chdir(tmp_path / "user" / "repo")
    loads(TENSORS_FILE)
