"""Where a model keeps its adapters, and how a wrapper's verbs find them."""

import pytest
from torch import nn

import randlora
from randlora.errors import AdapterError
from randlora.state import adapted_root, attached_state, is_adapted
from tests.kit import same_bits
from tests.laws import TOKENS, Mixed


def test_the_state_stays_out_of_the_models_own_books() -> None:
    model = Mixed()
    modules, tensors = set(dict(model.named_modules())), set(model.state_dict())
    randlora.inject(model, r=4, targets=["q"])
    assert set(dict(model.named_modules())) - modules == {"q.randlora_lambda", "q.randlora_gamma"}
    assert {name for name in model.state_dict() if not name.startswith("q.")} == {n for n in tensors if n[:2] != "q."}
    assert attached_state(model) is not None


def test_a_wrapper_shows_the_adapters_inside_it() -> None:
    model = Mixed()
    wrapper = nn.Sequential(nn.Sequential(model))
    assert not is_adapted(wrapper)
    randlora.inject(model, r=4)
    assert is_adapted(wrapper)
    assert adapted_root(wrapper)[0] is model


def test_two_parts_with_adapters_of_their_own_cannot_be_told_apart() -> None:
    model = nn.Sequential(Mixed(), Mixed())
    for part in model:
        randlora.inject(part, r=4)
    with pytest.raises(AdapterError, match=r"several submodules have adapters \(0, 1\): call this on one of them"):
        randlora.merge(model)


def test_an_adapted_models_state_dict_loads_into_its_twin() -> None:
    model, twin = Mixed(), Mixed()
    for each in (model, twin):
        randlora.inject(each, r=4, train_also=["head"])
    twin.load_state_dict(model.state_dict())
    assert same_bits(twin(TOKENS), model(TOKENS))


@pytest.mark.parametrize("name", [None, "default"])
def test_the_only_adapter_needs_no_name(name: str | None) -> None:
    model = Mixed()
    randlora.inject(model, r=4)
    assert adapted_root(model)[1].adapter(name).name == "default"


def test_one_of_several_adapters_must_be_named() -> None:
    model = Mixed()
    randlora.inject(model, r=4)
    randlora.inject(model, r=4, name="b")
    with pytest.raises(AdapterError, match=r"several adapters \(default, b\): give name= to choose one"):
        adapted_root(model)[1].adapter(None)


def test_what_is_trained_beside_survives_an_assigning_load() -> None:
    """``load_state_dict(assign=True)`` puts new Parameter objects in place of the ones an adapter holds."""
    model = Mixed()
    own = model.head.weight.detach().clone()
    randlora.inject(model, r=4, train_also=["head"])
    for _ in range(2):
        values = {name: tensor.detach() + 1 for name, tensor in model.state_dict().items()}
        model.load_state_dict(values, assign=True)
        assert any(parameter is model.head.weight for parameter in randlora.trainable_parameters(model))
    with randlora.disabled(model):
        assert same_bits(model.head.weight, own)
    assert same_bits(model.head.weight, values["head.weight"])
