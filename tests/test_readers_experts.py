"""Stacks of experts: every implementation computes as if each weight were changed, and no gradient is lost."""

import copy
from collections.abc import Callable
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.integrations.moe import _grouped_mm as grouped_product

import randlora
from randlora.functional import stacks
from randlora.layers import registry
from randlora.readers import adapted_stack
from randlora.readers.adapted_stack import AdaptedStack, Own, Parts
from randlora.readers.experts import Experts
from tests.kit import fill, read, untouched
from tests.laws import TOLERANCES

IDS = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))
TWO = "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "num_experts_per_tok"
SIZES = {"vocab_size": 40, "hidden_size": 16, "max_position_embeddings": 32, "num_local_experts": 4}
COMMON: dict[str, Any] = SIZES | dict.fromkeys(TWO, 2)
EXPERTS = ["mlp.experts"]
each_or_shared = pytest.mark.parametrize("experts", ["each", "shared"])
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**COMMON, intermediate_size=24)
    return cast("nn.Module", transformers.MixtralForCausalLM(config))


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
    output: Tensor = model(IDS).logits
    return output


def gradients(model: nn.Module) -> list[Tensor]:
    logits(model).square().sum().backward()
    found = [parameter.grad for parameter in randlora.trainable_parameters(model)]
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
    assert all(gradient is not None and gradient.any() for gradient in found)
    model.zero_grad()
    return cast("list[Tensor]", found)


@every_model
@each_or_shared
def test_every_implementation_computes_as_one_whose_experts_were_changed_and_has_the_same_gradients(
    build: Callable[[], nn.Module], experts: Any
) -> None:
    found = []
    for implementation in IMPLEMENTATIONS:
        dtype = torch.float32 if implementation == "grouped_mm" else torch.float64  # all that its kernel takes
        model: Any = made(build, implementation, dtype)
        before, changed = logits(model), copy.deepcopy(model)
        targets = randlora.inject(model, r=3, alpha=3, targets=EXPERTS, experts=experts).targets
        assert torch.equal(logits(model), before)
        fill(model, spread=0.3)
        for fqn in targets:
            update = randlora.delta_weight(model, fqn)
            assert update.dim() == (3 if experts == "each" else 2)
            changed.get_parameter(fqn).data += update.mT if build is gpt_oss else update
        output, expected = logits(model), logits(changed)
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
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(2, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(x, torch.tensor([[1, 3], [3, 1]]), torch.full((2, 2), 0.5))
    known = {tensor.untyped_storage().data_ptr() for tensor in [*module.parameters(), *module.buffers()]}
    sizes, one = [size for key, size in kept.items() if key not in known], module._parameters["gate_up_proj"][0].nbytes
    # a gathered product keeps the weights that it gathered, one for each token and expert, with or without adapters
    assert max(sizes) <= (4 * one if implementation == "batched_mm" else one)
    if implementation != "batched_mm":
        assert sum(size for size in sizes if size >= one // 2) <= 2 * one


@pytest.mark.parametrize(("stack", "basis"), [("gate_up_proj", "dense"), ("down_proj", "block")])
@pytest.mark.parametrize("counts", [[3, 0, 2, 1], [0, 1, 0, 0]], ids=str)
def test_a_grouped_product_all_at_once_equals_one_matrix_after_the_other(
    stack: str, basis: Any, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = made(mixtral, "grouped_mm", torch.float32)
    for experts in ("each", "shared"):
        randlora.inject(model, r=8, alpha=8, targets=EXPERTS, basis=basis, experts=experts, name=experts)
        fill(model, experts, spread=0.3)
    randlora.activate(model, ["each", "shared"])
    module = model.model.layers[0].mlp.experts
    x, tokens = torch.randn(8, getattr(module, stack).shape[2]), sum(counts)  # the last rows have no matrix
    offs = torch.tensor(counts).cumsum(0).to(torch.int32)
    trained = [module.get_parameter(f"{stack}_randlora_{kind}.each") for kind in ("lambda", "gamma")]
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


# A stack as an operand

COUNT, OUT, IN = 4, 6, 8


class Flat(nn.Module):
    """Holds parameters under a name of transformers, and under another."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(COUNT, OUT, IN, generator=torch.Generator().manual_seed(0)))
        self.w1 = nn.Parameter(torch.randn(8, 4))


class Product(torch.autograd.Function):
    """A product that torch does not ask `__torch_function__` about."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.reshape(-1, IN).mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight.reshape(-1, IN), (grad.mT @ x).view(weight.shape)


PRODUCT: Callable[[Tensor, Tensor], Tensor] = Product.apply


def adapted(experts: Any = "each") -> nn.Module:
    model = nn.Sequential(Flat())
    randlora.inject(model, r=3, targets=["up_proj"], experts=experts)
    return fill(model)


def up(model: nn.Module) -> Tensor:
    return read(model, "0.up_proj")


def summed(model: nn.Module) -> Tensor:
    return up(model) + 0


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def of_first(x: Tensor, stack: Tensor) -> Tensor:
    return x @ stack[0].mT


OPAQUE: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Tensor], Tensor]]] = {
    "function": (PRODUCT, lambda whole: whole.flatten(0, 1)),
    "of a matrix": (lambda x, stack: PRODUCT(x, stack[1]), lambda whole: whole[1]),
    "checkpoint": (lambda x, stack: checkpoint(of_first, x, stack, use_reentrant=True), lambda whole: whole[0]),
}


@each_or_shared
@pytest.mark.parametrize("name", OPAQUE)
def test_a_gradient_that_would_not_reach_the_adapters_is_an_error_and_that_of_a_clone_reaches_them(
    name: str, experts: str
) -> None:
    model, x = adapted(experts), tokens(3, IN).requires_grad_()
    run, used = OPAQUE[name]
    with pytest.raises(RuntimeError, match=r"cannot reach its adapters.*Pass its \.clone\(\) instead"):
        run(x, up(model)).sum().backward()
    trained = [*randlora.trainable_parameters(model)]
    assert all(parameter.grad is None for parameter in trained)
    run(x, up(model).clone()).sum().backward()
    expected = torch.autograd.grad((x @ used(summed(model)).mT).sum(), trained)
    torch.testing.assert_close([parameter.grad for parameter in trained], [*expected])


def test_a_stack_requires_a_gradient_where_its_sum_does_and_works_where_none_is_needed() -> None:
    model, x = adapted(), tokens(3, IN)
    stack, trained = up(model), [*randlora.trainable_parameters(model)]
    assert stack.requires_grad
    assert stack[0].requires_grad
    assert stack.mT.requires_grad
    outputs = of_first(x, stack), checkpoint(of_first, x, stack, use_reentrant=False)
    torch.testing.assert_close(*(torch.autograd.grad(output.square().sum(), trained) for output in outputs))
    with torch.no_grad():
        assert not up(model).requires_grad
        torch.testing.assert_close(PRODUCT(x, up(model)), x @ summed(model).flatten(0, 1).mT)
        assert torch.equal(copy.deepcopy(up(model)), summed(model))
    randlora.set_trainable(model, "default", trainable=False)
    assert not up(model).requires_grad


x_of, tokens_of = tokens(3, IN), tokens(COUNT, 3, IN)
CALLS: dict[str, Callable[[Any], Tensor]] = {
    "linear-weight": lambda stack: F.linear(x_of, weight=stack[1]),
    "linear-input": lambda stack: F.linear(input=x_of, weight=stack[1], bias=torch.ones(OUT)),
    "linear-many": lambda stack: F.linear(tokens(60, IN), stack[1], torch.ones(OUT)),
    "matmul": lambda stack: torch.matmul(input=x_of, other=stack[1].mT),
    "matmul-other": lambda stack: x_of.matmul(other=stack[1].mT),
    "mm": lambda stack: torch.mm(x_of, mat2=stack[1].mT),
    "bmm-input": lambda stack: torch.bmm(input=tokens_of, mat2=stack.mT),
    "transpose": lambda stack: tokens_of.bmm(stack.transpose(dim0=1, dim1=2)),
    "transpose-input": lambda stack: tokens_of.bmm(torch.transpose(input=stack, dim0=1, dim1=2)),
    "t": lambda stack: x_of.mm(torch.t(input=stack[1])),
}
FORMED: dict[str, Callable[[Any], Any]] = {
    "out": lambda stack: torch.matmul(x_of, stack[1].mT, out=torch.empty(3, OUT)),
    "einsum": lambda stack: torch.einsum("ti,eoi->teo", x_of, stack),
    "left": lambda stack: torch.matmul(input=stack[1], other=x_of.mT),
    "copy_": lambda stack: torch.empty(COUNT, OUT, IN).copy_(stack),
    "addmm_": lambda stack: torch.zeros(3, OUT).addmm_(x_of, stack[1].mT),
    "setitem": lambda stack: torch.zeros(2, COUNT, OUT, IN).index_copy_(0, torch.tensor([1]), stack[None]),
}


@torch.no_grad()
@each_or_shared
@pytest.mark.parametrize("name", CALLS | FORMED)
def test_calls_are_those_with_the_sum_which_products_do_not_form(
    name: str, experts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, call = adapted(experts), (CALLS | FORMED)[name]
    expected = call(summed(model))
    if name in CALLS:
        monkeypatch.delattr(Parts, "formed")
    torch.testing.assert_close(call(up(model)), expected)


@each_or_shared
def test_matrices_at_no_index_are_an_empty_stack_and_unknown_arguments_torchs_own_error(experts: str) -> None:
    model = adapted(experts)
    none = up(model)[torch.tensor([], dtype=torch.int64)]
    assert none.shape == (0, OUT, IN)
    assert not isinstance(none, AdaptedStack)
    for gradient in torch.autograd.grad(none.sum(), [*randlora.trainable_parameters(model)]):
        assert not gradient.any()
    with pytest.raises(TypeError, match="linear"):
        F.linear(x_of, weights=up(model)[0])  # type: ignore[call-arg]


WRITES: dict[str, Callable[[Any], Any]] = {
    "__setitem__": lambda stack: stack.__setitem__(0, torch.zeros(OUT, IN)),
    "add_": lambda stack: stack.__iadd__(1),
    "normal_": nn.init.normal_,
    "add": lambda stack: torch.add(torch.ones(COUNT, OUT, IN), 1, out=stack),
    "_foreach_add_": lambda stack: torch._foreach_add_([stack], 1),
}


@torch.no_grad()
@pytest.mark.parametrize(("name", "write"), WRITES.items(), ids=WRITES)
def test_writing_to_a_stack_is_refused(name: str, write: Callable[[Any], Any]) -> None:
    model = adapted()
    with untouched(model), pytest.raises(RuntimeError, match=f"cannot {name} an adapted stack of weights in place"):
        write(up(model))


def test_what_is_no_stack_of_matrices_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_readers", dict(registry._readers))
    randlora.layers.register_layer(Flat)(type("W1", (Experts,), {"attribute": "w1"}))
    model, match = nn.Sequential(Flat()), r"0\.w1 has shape \(8, 4\), expected a stack"
    with untouched(model), pytest.raises(randlora.errors.TargetError, match=match):
        randlora.inject(model, r=2, targets=["w1"])
