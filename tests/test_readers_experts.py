"""Stacks of experts in transformers' models: every implementation computes as if each expert's weight were changed."""

import copy
from collections.abc import Callable
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.moe import _grouped_mm as grouped_product

import randlora
from randlora.functional import stacks
from randlora.layers import registry
from randlora.layers.in_place import adapter_layers_of
from randlora.readers import adapted_stack
from randlora.readers.adapted_stack import Own, Parts
from randlora.readers.experts import Experts
from tests import reference
from tests.kit import fill, read, untouched
from tests.laws import TOLERANCES, needs_compiler

IDS = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))
COMMON: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
}
EXPERTS = ["mlp.experts"]
each_or_shared = pytest.mark.parametrize("experts", ["each", "shared"])
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def mixtral() -> nn.Module:
    return cast(
        "nn.Module", transformers.MixtralForCausalLM(transformers.MixtralConfig(**COMMON, intermediate_size=24))
    )


def gpt_oss() -> nn.Module:
    """Its stacks are transposed, one of them of squares, and have biases."""
    config = transformers.GptOssConfig(**COMMON, head_dim=8, intermediate_size=16)
    return cast("nn.Module", transformers.GptOssForCausalLM(config))


every_model = pytest.mark.parametrize("build", [mixtral, gpt_oss], ids=lambda build: build.__name__)


def made(
    build: Callable[[], nn.Module], implementation: str = "eager", dtype: torch.dtype = torch.float64
) -> nn.Module:
    """Make a model with random weights that matter: the initial ones of transformers are small."""
    torch.manual_seed(0)
    model: Any = build().eval()
    for parameter in model.parameters():
        if parameter.dim() == 3:
            nn.init.normal_(parameter, std=0.3)
    model.set_experts_implementation(implementation)
    return cast("nn.Module", model.to(dtype))


def logits(model: nn.Module) -> Tensor:
    """Compute the output for the same tokens."""
    output: Tensor = model(IDS).logits
    return output


def gradients(model: nn.Module) -> list[Tensor]:
    logits(model).square().sum().backward()
    found = [parameter.grad for parameter in randlora.trainable_parameters(model)]
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
    assert all(gradient is not None and gradient.any() for gradient in found)
    model.zero_grad()
    return cast("list[Tensor]", found)


def changed(model: nn.Module, experts: str) -> nn.Module:
    """Return a plain copy of an adapted model whose stacks have the oracle's updates added."""
    twin = copy.deepcopy(model)
    randlora.eject(twin)
    for fqn, module in model.named_modules():
        for attribute, layer in adapter_layers_of(module).items():
            part = layer.adapters["default"]
            lam, gamma = layer.diagonals_of(module, "default")
            out_features, in_features = part.shape[-2:]
            sides = max(part.shape[-2:]), min(part.shape[-2:])
            bases = part.basis.slices(*sides, device="cpu", dtype=torch.float64)
            weight = twin.get_submodule(fqn).get_parameter(attribute)
            assert len(part.shape) == (3 if experts == "each" else 2)
            for index in range(len(weight)):
                own = (lam[index], gamma[index]) if experts == "each" else (lam, gamma)
                update = reference.delta_weight(*bases, *own, part.scaling, in_features=in_features)
                assert update.shape == (out_features, in_features)
                weight.data[index] += update.T if getattr(module, "is_transposed", False) else update
    return twin


@every_model
@each_or_shared
def test_every_implementation_computes_as_one_whose_experts_were_changed_and_has_the_same_gradients(
    build: Callable[[], nn.Module], experts: Any
) -> None:
    found = []
    for implementation in IMPLEMENTATIONS:
        dtype = torch.float32 if implementation == "grouped_mm" else torch.float64  # all that its kernel takes
        model: Any = made(build, implementation, dtype)
        before = logits(model)
        randlora.inject(model, r=3, alpha=3, targets=EXPERTS, experts=experts)
        assert torch.equal(logits(model), before)
        fill(model, spread=0.3)
        output, expected = logits(model), logits(changed(model, experts))
        assert (output - before).abs().max() > 1e-3
        tolerance = 10 * TOLERANCES[dtype]
        torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
        found.append(gradients(model))
        torch.testing.assert_close(found[-1], found[0], rtol=1e-3, atol=1e-4, check_dtype=False)
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # renamed
        enable({"use_reentrant": implementation == "eager"})
        model.train().enable_input_require_grads()
        torch.testing.assert_close(gradients(model), found[-1])


def test_an_expert_that_no_token_visits_costs_nothing() -> None:
    model: Any = made(mixtral)
    randlora.inject(model, r=3, targets=EXPERTS)
    experts = model.model.layers[0].mlp.experts
    x, visited = torch.randn(3, 16, dtype=torch.float64), torch.tensor([[1, 3], [1, 3], [3, 1]])
    with patch.object(Parts, "at", autospec=True, side_effect=Parts.at) as at:
        experts(x, visited, torch.full((3, 2), 0.5, dtype=torch.float64)).sum().backward()
    assert {int(call.args[1]) for call in at.call_args_list} == {1, 3}
    gradient = experts.gate_up_proj_randlora_lambda["default"].grad
    assert gradient[[1, 3]].any()
    assert not gradient[[0, 2]].any()


@each_or_shared
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_backward_keeps_nothing_of_the_size_of_all_updates(experts: Any, implementation: str) -> None:
    model: Any = made(mixtral, implementation, torch.float32)
    randlora.inject(model, r=3, targets=EXPERTS, experts=experts)
    module = model.model.layers[0].mlp.experts
    known = {tensor.untyped_storage().data_ptr() for tensor in [*module.parameters(), *module.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(2, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(x, torch.tensor([[1, 3], [3, 1]]), torch.full((2, 2), 0.5))
    one = module._parameters["gate_up_proj"][0].nbytes
    # a gathered product keeps the weights that it gathered, one for each token and expert, with or without adapters
    assert max(kept.values()) <= (4 * one if implementation == "batched_mm" else one)
    if implementation != "batched_mm":
        assert sum(size for size in kept.values() if size >= one // 2) <= 2 * one


@pytest.mark.parametrize(("stack", "basis"), [("gate_up_proj", "dense"), ("down_proj", "block")])
@pytest.mark.parametrize("counts", [[3, 0, 2, 1], [0, 1, 0, 0]], ids=str)
def test_a_grouped_product_all_at_once_equals_one_matrix_after_the_other(
    stack: str, basis: Any, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = made(mixtral, "grouped_mm", torch.float32)
    randlora.inject(model, r=8, alpha=8, targets=EXPERTS, basis=basis)
    randlora.inject(model, r=8, alpha=8, targets=EXPERTS, basis=basis, experts="shared", name="shared")
    fill(fill(model, spread=0.3), "shared", spread=0.3)
    randlora.activate(model, ["default", "shared"])
    module = model.model.layers[0].mlp.experts
    x, tokens = torch.randn(8, getattr(module, stack).shape[2]), sum(counts)  # the last rows have no matrix
    offs = torch.tensor(counts).cumsum(0).to(torch.int32)
    trained = [module.get_parameter(f"{stack}_randlora_{kind}.default") for kind in ("lambda", "gamma")]
    monkeypatch.setattr(stacks, "ENTRIES", 1)  # several parts
    results = []
    for at_once in (True, False):
        monkeypatch.setattr(adapted_stack, "chosen_all_at_once", lambda *_, at_once=at_once, **__: at_once)
        rows = x.clone().requires_grad_()
        with patch.object(Own, "products", autospec=True, side_effect=Own.products) as products:
            output = grouped_product(rows, read(module, stack).mT, offs=offs)[:tokens]
        assert products.call_count == at_once
        of = torch.autograd.grad(output.square().sum(), [rows, *trained])
        results.append([output, of[0][:tokens], *of[1:]])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@needs_compiler
@each_or_shared
def test_a_compiled_model_computes_the_same(experts: Any) -> None:
    model = made(mixtral, "grouped_mm", torch.float32)
    randlora.inject(model, r=3, alpha=3, targets=EXPERTS, experts=experts)
    fill(model, spread=0.1)
    torch._dynamo.reset()
    expected = gradients(model)
    found = gradients(cast("nn.Module", torch.compile(model, backend="aot_eager")))
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)


def test_what_is_no_stack_of_matrices_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1 = nn.Parameter(torch.randn(8, 4))

    monkeypatch.setattr(registry, "_readers", dict(registry._readers))
    randlora.layers.register_layer(Flat)(type("W1", (Experts,), {"attribute": "w1"}))
    model = nn.Sequential(Flat())
    with (
        untouched(model),
        pytest.raises(randlora.errors.TargetError, match=r"0\.w1 has shape \(8, 4\), expected a stack"),
    ):
        randlora.inject(model, r=2, targets=["w1"])
