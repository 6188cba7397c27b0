"""What docs/limits.md says of code that does not know of adapters, and what to do instead."""

import contextlib
import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from timm.models.byobnet import RepVggBlock
from timm.models.repvit import ConvNorm
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.ao import quantization
from torch.nn import functional as F
from torch.nn.utils import fusion, prune

import randlora
from randlora.errors import AdapterError
from tests.kit import adapt, same_bits
from tests.models import llama

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def two(first: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8) if first is None else first, nn.Linear(8, 8))


OF_TORCH = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning"
)  # torch.ao and jit warn of all


@OF_TORCH
def test_adapted_layers_are_not_quantized_until_they_are_merged() -> None:
    qat, model = quantization.get_default_qat_qconfig("x86"), two().train()
    model.qconfig = qat
    prepared = quantization.prepare_qat(model)
    for each, targets in ((model, ["0"]), (prepared, ["1"])):
        adapt(each, r=2, targets=targets)

    def quantized() -> list[bool]:
        made = quantization.quantize_dynamic(model, {nn.Linear}), quantization.convert(copy.deepcopy(prepared).eval())
        return [isinstance(layer, nn.Linear) for each in made for layer in each]

    assert quantized() == [True, False, False, True]
    for each in (model, prepared):
        randlora.merge(each)
    assert not any(quantized())


@OF_TORCH
def test_a_merged_model_is_scripted_and_an_adapted_one_is_not() -> None:
    model = adapt(two(), r=2, targets=["0"])
    expected = model(X)
    with pytest.raises(ValueError, match="Unknown type annotation"):
        torch.jit.script(model)
    randlora.merge(model)
    torch.testing.assert_close(torch.jit.script(model)(X), expected)


NORMED: dict[str, tuple[Callable[[], list[nn.Module]], Callable[[Any, Any], nn.Module], Tensor]] = {
    "Linear": (lambda: [nn.Linear(8, 4), nn.BatchNorm1d(4)], fusion.fuse_linear_bn_eval, X),
    "Conv2d": (lambda: [nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4)], fusion.fuse_conv_bn_eval, X[None, None]),
}


@pytest.mark.parametrize("kind", NORMED)
def test_a_layer_is_fused_with_a_norm_without_its_update_until_it_is_merged(kind: str) -> None:
    build, fuse, x = NORMED[kind]
    layer, norm = build()
    norm.get_buffer("running_var").fill_(9)
    model = adapt(nn.Sequential(layer, norm).eval(), spread=0.5, r=2, targets=["0"])
    expected = model(x)
    assert not torch.allclose(fuse(layer, norm)(x), expected, rtol=0.1, atol=0.1)
    randlora.merge(model)
    torch.testing.assert_close(fuse(layer, norm)(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [RepVggBlock, ConvNorm])
def test_timm_makes_layers_for_inference_without_updates_until_they_are_merged(block: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    x, model = torch.randn(2, 4, 5, 5), adapt(nn.Sequential(block(4, 4)).eval(), spread=0.5, r=2, targets="all")
    with randlora.disabled(model):
        plain = model(x)
    expected = model(x)
    assert not torch.allclose(plain, expected, rtol=0.1, atol=0.1)
    made: Any = reparameterize_model(model)
    torch.testing.assert_close(made[0](x), plain, rtol=1e-4, atol=1e-4)
    with pytest.raises(AdapterError, match="no longer has adapter"):
        made(x)
    randlora.merge(model)
    torch.testing.assert_close(reparameterize_model(model)(x), expected, rtol=1e-4, atol=1e-4)


def test_a_forward_set_on_an_adapted_layer_adds_updates_only_if_it_calls_the_one_that_was_there() -> None:
    model: Any = adapt(two(), r=2, targets=["0"])
    layer, expected = model[0], model(X)
    with randlora.disabled(model):
        plain = model(X)
    before = layer.forward
    layer.forward = lambda x: before(x)  # noqa: PLW0108  # it is another one
    assert same_bits(model(X), expected)
    layer.forward = partial(nn.Linear.forward, layer)
    assert same_bits(model(X), plain)
    assert not same_bits(plain, expected)


class Past(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._parameters["weight"], self.bias)  # type: ignore[arg-type]


def test_what_reads_past_the_attribute_is_merged_into_and_named_by_check() -> None:
    model = adapt(two(Past(8, 8)), r=2, targets=["0"])
    before = model(X)
    (problem,) = randlora.check(model, X).problems
    assert (problem.fqn, problem.fault) == ("0", "read past")
    assert randlora.merge(model).notes == ()
    assert not torch.allclose(model(X), before, atol=0.1)


class OwnPickling(nn.Linear):
    def __reduce__(self) -> Any:
        return OwnPickling, (self.in_features, self.out_features)


def test_a_layer_with_its_own_pickling_is_copied_once_it_is_ejected() -> None:
    model = adapt(two(OwnPickling(8, 8)), r=2, targets=["0"])
    copies: tuple[Callable[[object], object], ...] = copy.deepcopy, pickle.dumps
    for copied in copies:
        with pytest.raises(TypeError, match="OwnPickling defines its own pickling: eject its adapters first"):
            copied(model)
    randlora.eject(model)
    for copied in copies:
        copied(model)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(5, 8), nn.Identity()

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.inner(self.table(ids)), self.table.weight)


def interrupt(_: nn.Module) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("end", [interrupt, randlora.merge, randlora.eject])
def test_after_an_interrupt_or_an_end_within_a_call_its_thread_goes_on_reading_updates(end: Any) -> None:
    model, other = (adapt(Tied(), r=2, targets=["table"]) for _ in range(2))
    model.get_submodule("inner").register_forward_hook(lambda *_: (end(model), None)[1])
    parameter = other.get_parameter("table.weight")

    def call() -> tuple[bool, bool]:
        with contextlib.suppress(KeyboardInterrupt):
            model(torch.tensor([1]))
        return other.table.weight is parameter, dict(other.named_parameters())["table.weight"] is parameter

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(call).result() == (False, True)
    assert other.table.weight is parameter


def share(model: nn.Sequential) -> nn.Module:
    randlora.inject(other := nn.Sequential(nn.Linear(8, 8), model[1]), r=2, targets=["0"])
    return other


CHANGED: dict[str, tuple[Callable[[Any], Any], set[str]]] = {
    "not at all": (lambda _: None, set()),
    "pruned": (lambda model: prune.identity(model[1], "weight"), {"1.weight_orig"}),
    "moved": (lambda model: model.add_module("moved", model._modules.pop("1")), {"moved.weight", "moved.bias"}),
    "shared": (share, {"1.weight", "1.bias"}),
}


@pytest.mark.parametrize("how", CHANGED)
def test_flags_come_back_to_parameters_that_kept_their_names_and_are_in_no_other_adapted_model(how: str) -> None:
    change, frozen = CHANGED[how]
    model = two()
    randlora.inject(model, r=2, targets=["0"])
    other = change(model)
    randlora.eject(model)
    if how == "shared":
        randlora.eject(other)
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == frozen


@pytest.mark.parametrize("is_whole", [True, False], ids=["model", "part"])
def test_a_conversion_of_a_part_alone_does_not_round_what_is_held_aside(is_whole: bool) -> None:
    model: Any = two()
    own = model[1].weight.detach().clone()
    randlora.inject(model, r=2, targets=["0"], train_also=["1"])
    (model if is_whole else model[1]).half().float()
    randlora.eject(model)
    assert same_bits(model[1].weight, own.half().float() if is_whole else own)


def test_a_resized_head_of_a_model_in_16_bits_is_float32_until_it_is_converted() -> None:
    model: Any = llama(vocab_size=40, num_hidden_layers=1).bfloat16()
    ids = torch.arange(5)[None]
    randlora.inject(model, r=2, targets=["q_proj"], train_also=["lm_head"])
    model.resize_token_embeddings(44, mean_resizing=False)
    assert model.lm_head.weight.dtype == torch.float32
    with pytest.raises(RuntimeError, match="same dtype"):
        model(ids)
    model.lm_head.to(torch.bfloat16)
    assert model(ids).logits.shape == (1, 5, 44)
