"""Subclasses of `nn.Linear` with another forward are adapted so that it reads weight + update, as once merged."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from sentence_transformers.cross_encoder.model import _Float32Linear
from timm.layers.linear import Linear as ConvertibleLinear
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.idefics.modeling_idefics import IdeficsDecoupledLinear

import randlora
from randlora.errors import TargetError
from randlora.layers.linear import LinearAdapter
from randlora.layers.registry import find_layer
from tests.kit import fill, same_bits
from tests.read_kinds import or_medium

Build = Callable[[], nn.Module]


def bit(*, online: bool) -> Build:
    def build() -> nn.Module:
        from transformers.integrations.bitnet import AutoBitLinear  # which imports the compiler

        layer = AutoBitLinear(8, 12, online_quant=online, use_rms_norm=online)
        if not online:
            layer.weight_scale.fill_(0.7)
        return layer  # type: ignore[no-any-return]

    return build


def scaled_head() -> nn.Module:
    from transformers.models.dory.modeling_dory import DoryLMHead

    layer = DoryLMHead(transformers.DoryConfig(hidden_size=8, vocab_size=12, initializer_range=0.5))
    nn.init.normal_(layer.logit_scale)
    return layer  # type: ignore[no-any-return]


READ = {
    "bit": bit(online=False),
    "bit online": bit(online=True),
    "Dory's head": scaled_head,
    "Idefics's head": lambda: IdeficsDecoupledLinear(8, 12, 3),
    "in float32": lambda: _Float32Linear(8, 12),
}
PRODUCTS = {"Falcon": lambda: FalconLinear(8, 12), "timm": lambda: ConvertibleLinear(8, 12)}


def model_of(build: Build) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(build())


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [or_medium(not name.startswith("bit"), name) for name in READ])
def test_another_forward_computes_with_the_update_as_if_it_were_merged(name: str, training: bool) -> None:
    if name == "Dory's head" and not hasattr(transformers, "DoryConfig"):
        pytest.skip("an older transformers does not have it")
    model = model_of(READ[name]).train(training)
    randlora.inject(model, r=2, targets="0")
    fill(model, spread=0.3)
    x = torch.randn(4, 8)
    with torch.compiler.set_stance("force_eager"):  # AutoBitLinear compiles how it rounds
        output = model(x)
        output.sum().backward()
        with torch.no_grad():
            with randlora.merged(model):
                assert same_bits(model(x), output.detach())
            with randlora.disabled(model):
                assert not torch.allclose(model(x), output, atol=0.01)
    trained = {
        name: value for name, value in model.named_parameters() if "randlora" in name and name.endswith("default")
    }
    assert len(trained) == 2
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in trained.values())


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_forward_that_is_known_to_be_the_product_is_added_to(name: str) -> None:
    model = model_of(PRODUCTS[name])
    assert find_layer(model[0]) is LinearAdapter
    randlora.inject(model, r=2, targets="0")
    fill(model, spread=0.3)
    x = torch.randn(4, 8)
    with torch.no_grad(), randlora.merged(model):
        merged = model(x)
    torch.testing.assert_close(model(x), merged, rtol=1e-4, atol=1e-4)


def test_dropout_cannot_reach_what_another_forward_reads() -> None:
    with pytest.raises(TargetError, match=r"0 is a weight that other code reads, and dropout=0.1 cannot reach"):
        randlora.inject(model_of(READ["in float32"]), r=2, targets="0", dropout=0.1)
    randlora.inject(model_of(PRODUCTS["timm"]), r=2, targets="0", dropout=0.1)


def test_a_class_with_its_own_state_dict_writes_the_adapters_parameters_and_not_copies() -> None:
    class Own(nn.Linear):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return super().state_dict(*args, **kwargs)

    model = nn.Sequential(Own(4, 6))
    randlora.inject(model, r=2, targets="all")
    state = model.state_dict(keep_vars=True)
    assert all(held is state[name] for name, held in model.named_parameters())
    assert model.state_dict().keys() == state.keys()
