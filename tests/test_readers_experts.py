"""Stacks of experts in transformers' models: every implementation computes as if each expert's weight were changed."""

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.moe import _grouped_mm as grouped_product

import randlora
from randlora.functional import stacks
from randlora.layers.in_place import adapter_layers_of
from randlora.readers import adapted_stack
from randlora.readers.adapted_stack import AdaptedStack, Parts
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
}


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**COMMON, intermediate_size=24, num_local_experts=4)
    return cast("nn.Module", transformers.MixtralForCausalLM(config))


def qwen3_moe() -> nn.Module:
    config = transformers.Qwen3MoeConfig(**COMMON, head_dim=8, moe_intermediate_size=8, num_experts=4)
    return cast("nn.Module", transformers.Qwen3MoeForCausalLM(config))


def gpt_oss() -> nn.Module:
    """Its stacks are transposed, one of them of squares, and have biases."""
    config = transformers.GptOssConfig(**COMMON, head_dim=8, intermediate_size=16, num_local_experts=4)
    return cast("nn.Module", transformers.GptOssForCausalLM(config))


def deepseek_v3() -> nn.Module:
    config = transformers.DeepseekV3Config(
        **COMMON, intermediate_size=24, moe_intermediate_size=8, n_routed_experts=4, n_group=1, topk_group=1,
        first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    )  # fmt: skip
    return cast("nn.Module", transformers.DeepseekV3ForCausalLM(config))


MODELS = (mixtral, qwen3_moe, gpt_oss, deepseek_v3)
every_model = pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
every_implementation = pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
each_or_shared = pytest.mark.parametrize("experts", ["each", "shared"])
each_or_slowly_shared = pytest.mark.parametrize("experts", ["each", pytest.param("shared", marks=pytest.mark.slow)])
STACKS = ["gate_up_proj", "down_proj"]
EXPERTS = ["mlp.experts"]


def made(
    build: Callable[[], nn.Module], implementation: str = "eager", dtype: torch.dtype = torch.float64
) -> nn.Module:
    """Make a model with random weights that matter: the initial ones of transformers are small."""
    torch.manual_seed(0)
    model: Any = build().eval().to(dtype)
    for parameter in model.parameters():
        if parameter.dim() == 3:
            nn.init.normal_(parameter, std=0.3)
    model.set_experts_implementation(implementation)
    return cast("nn.Module", model)


def logits(model: nn.Module) -> Tensor:
    """Compute the output for the same tokens."""
    output: Tensor = model(IDS).logits
    return output


def changed(model: nn.Module, experts: str) -> nn.Module:
    """Return a plain copy of an adapted model whose stacks have the oracle's updates added."""
    twin = copy.deepcopy(model)
    randlora.eject(twin)
    for fqn, module in model.named_modules():
        for attribute, layer in adapter_layers_of(module).items():
            part = layer.adapters["default"]
            lam, gamma = layer.diagonals_of(module, "default")
            out_features, in_features = part.shape[-2:]
            dims = max(part.shape[-2:]), min(part.shape[-2:])
            bases = part.basis.slices(*dims, device="cpu", dtype=torch.float64)
            weight = twin.get_submodule(fqn).get_parameter(attribute)
            assert len(part.shape) == (3 if experts == "each" else 2)
            for index in range(len(weight)):
                own = (lam[index], gamma[index]) if experts == "each" else (lam, gamma)
                update = reference.delta_weight(*bases, *own, part.scaling, in_features=in_features)
                is_transposed = getattr(module, "is_transposed", False)
                weight.data[index] += update.T if is_transposed else update
            assert update.shape == (out_features, in_features)
    return twin


@every_model
@every_implementation
@each_or_shared
def test_a_model_computes_as_one_whose_experts_were_changed(
    build: Callable[[], nn.Module], implementation: str, experts: Any
) -> None:
    dtype = torch.float32 if implementation == "grouped_mm" else torch.float64  # all that its kernel takes
    model = made(build, implementation, dtype)
    before = logits(model)
    randlora.inject(model, r=3, alpha=3, targets=EXPERTS, experts=experts)
    assert torch.equal(logits(model), before)
    fill(model, spread=0.3)
    found, expected = logits(model), logits(changed(model, experts))
    assert (found - before).abs().max() > 1e-3
    tolerance = 10 * TOLERANCES[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@every_model
@each_or_shared
def test_every_implementation_has_the_same_gradients(build: Callable[[], nn.Module], experts: Any) -> None:
    gradients = []
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model = made(build, implementation, torch.float32)
        randlora.inject(model, r=3, alpha=3, targets=EXPERTS, experts=experts)
        fill(model, spread=0.3)
        logits(model).square().sum().backward()
        gradients.append([parameter.grad for parameter in randlora.trainable_parameters(model)])
        assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
    assert all(gradient is not None and gradient.any() for gradient in gradients[0])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-3, atol=1e-4)


def test_an_expert_that_no_token_visits_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = made(mixtral)
    randlora.inject(model, r=3, targets=EXPERTS)
    experts = model.model.layers[0].mlp.experts
    formed: list[Any] = []
    original = AdaptedStack.__new__

    def noting(cls: type[AdaptedStack], parts: Any) -> AdaptedStack:
        formed.append(parts.weight)
        return original(cls, parts)

    monkeypatch.setattr(AdaptedStack, "__new__", noting)
    x, visited = torch.randn(3, 16, dtype=torch.float64), torch.tensor([[1, 3], [1, 3], [3, 1]])
    output = experts(x, visited, torch.full((3, 2), 0.5, dtype=torch.float64))
    matrices = {(weight.data_ptr() - experts._parameters[name].data_ptr()) // weight.nbytes
                for weight in formed if weight.dim() == 2
                for name in STACKS if weight.shape == experts._parameters[name].shape[1:]}  # fmt: skip
    assert matrices == {1, 3}
    output.sum().backward()
    gradient = experts.gate_up_proj_randlora_lambda["default"].grad
    assert gradient[[1, 3]].any()
    assert not gradient[[0, 2]].any()


@each_or_shared
@every_implementation
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
    largest = max(kept.values())
    # a gathered product keeps the weights that it gathered, one for each token and expert, with or without adapters
    assert largest <= (4 * one if implementation == "batched_mm" else one)
    if implementation != "batched_mm":
        assert sum(size for size in kept.values() if size >= one // 2) <= 2 * one


@every_implementation
@each_or_shared
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(implementation: str, experts: Any, reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model: Any = made(mixtral, implementation, torch.float32).train()
        randlora.inject(model, r=3, targets=EXPERTS, experts=experts)
        fill(model, spread=0.3)
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # renamed
            enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        logits(model).square().sum().backward()
        gradients.append([parameter.grad for parameter in randlora.trainable_parameters(model)])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("basis", ["dense", "block"])
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
    results, names = [], []
    for at_once in (True, False):
        monkeypatch.setattr(adapted_stack, "chosen_all_at_once", lambda *_, at_once=at_once, **__: at_once)
        rows = x.clone().requires_grad_()
        output = grouped_product(rows, read(module, stack).mT, offs=offs)[:tokens]
        names.append(nodes_of(output))
        gradients = torch.autograd.grad(output.square().sum(), [rows, *trained])
        results.append([output, gradients[0][:tokens], *gradients[1:]])
    assert [found.count("_GroupedBackward") for found in names] == [1, 0]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def nodes_of(output: Tensor) -> list[str]:
    """Return the names of all nodes of a graph."""
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    return [type(node).__name__ for node in seen]


@every_implementation
def test_a_forward_reads_a_stack_once_and_the_next_sees_new_values(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = made(mixtral, implementation, torch.float32)
    randlora.inject(model, r=3, alpha=3, targets=EXPERTS, experts="shared")
    formed: list[Parts] = []
    original = Experts._parts

    def noting(*args: Any) -> Parts:
        formed.append(original(*args))
        return formed[-1]

    monkeypatch.setattr(Experts, "_parts", staticmethod(noting))
    before = logits(model)
    assert len(formed) == 2 * len(STACKS)
    fill(model, spread=0.3)
    assert not torch.equal(logits(model), before)
    assert len(formed) == 4 * len(STACKS)


def test_the_gradients_of_all_experts_are_stacked_once() -> None:
    model: Any = made(mixtral, dtype=torch.float32)
    randlora.inject(model, r=3, targets=EXPERTS)
    module = model.model.layers[0].mlp.experts
    output = module(torch.randn(8, 16), torch.tensor([[0, 1], [2, 3]] * 4), torch.full((8, 2), 0.5))
    names = nodes_of(output)
    assert names.count("UnbindBackward0") == 2 * len(STACKS)
    assert names.count("_AdaptedLinearBackward") == 4 * len(STACKS)


@each_or_slowly_shared
@needs_compiler
@pytest.mark.medium
def test_a_compiled_model_computes_the_same(experts: Any) -> None:
    model = made(mixtral, "grouped_mm", torch.float32)
    randlora.inject(model, r=3, alpha=3, targets=EXPERTS, experts=experts)
    fill(model, spread=0.1)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="aot_eager")
    found: Tensor = compiled(IDS).logits
    torch.testing.assert_close(found, logits(model), rtol=1e-4, atol=1e-4)
    found.square().sum().backward()
    gradients = [parameter.grad for parameter in randlora.trainable_parameters(model)]
    for parameter in randlora.trainable_parameters(model):
        parameter.grad = None
    logits(model).square().sum().backward()
    torch.testing.assert_close(
        gradients, [parameter.grad for parameter in randlora.trainable_parameters(model)], rtol=1e-2, atol=1e-3
    )


def test_all_linear_leaves_experts_out_and_names_reach_them() -> None:
    model = made(mixtral)
    assert not any("experts" in site.fqn for site in randlora.find_targets(model, "all-linear"))
    fqn = "model.layers.0.mlp.experts.down_proj"
    for targets in ([fqn], ["layers.0.mlp.experts.down_proj"], r".*layers\.0\..*experts\.down_proj"):
        (site,) = randlora.find_targets(model, targets)
        assert (site.fqn, site.shape) == (fqn, (4, 16, 24))


def test_changing_an_adapted_stack_in_place_is_refused() -> None:
    model: Any = made(mixtral)
    randlora.inject(model, r=3, targets=EXPERTS)
    experts = model.model.layers[0].mlp.experts
    with untouched(model), pytest.raises(RuntimeError, match="cannot zero_ an adapted stack of weights in place"):
        read(experts, "gate_up_proj").zero_()
    stack = read(experts, "gate_up_proj")
    assert stack.shape == (4, 48, 16)
    torch.testing.assert_close(stack + 0, experts.gate_up_proj.detach())


def test_what_is_no_stack_of_matrices_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from randlora.layers import registry

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1 = nn.Parameter(torch.randn(8, 4))

    class W1(Experts):
        attribute = "w1"

    monkeypatch.setattr(registry, "_readers", dict(registry._readers))
    randlora.layers.register_layer(Flat)(W1)
    model = nn.Sequential(Flat())
    with (
        untouched(model),
        pytest.raises(randlora.errors.TargetError, match=r"0\.w1 has shape \(8, 4\), expected a stack"),
    ):
        randlora.inject(model, r=2, targets=["w1"])
