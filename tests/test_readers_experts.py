"""Stacks of experts: every implementation computes as if each weight were changed, and no gradient is lost."""

import copy
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.integrations.moe import _grouped_mm as grouped_product
from transformers.models.llama4.modeling_llama4 import Llama4TextConfig, Llama4TextExperts

import randlora
from randlora.layers import registry
from randlora.readers import adapted_stack
from randlora.readers.adapted_stack import AdaptedStack, Own, Parts
from randlora.readers.experts import Experts
from tests.kit import adapt, fill, read, untouched
from tests.laws import TOLERANCES
from tests.test_functional import kept_by, storages

IDS = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))
TWO = "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "num_experts_per_tok"
SIZES = {"vocab_size": 40, "hidden_size": 16, "max_position_embeddings": 32, "num_local_experts": 4}
COMMON: dict[str, Any] = SIZES | dict.fromkeys(TWO, 2)
EXPERTS = ["mlp.experts"]
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
each_or_shared = pytest.mark.parametrize("experts", ["each", "shared"])


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**COMMON, intermediate_size=24))


def gpt_oss() -> Any:
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**COMMON, head_dim=8, intermediate_size=16))


def made(build: Callable[[], Any], implementation: str = "eager", dtype: torch.dtype = torch.float64) -> Any:
    """Make a model with random weights that matter: the initial ones of transformers are small."""
    torch.manual_seed(0)
    model = build().eval()
    for parameter in model.parameters():
        if parameter.dim() == 3:
            nn.init.normal_(parameter, std=0.3)
    model.set_experts_implementation(implementation)
    return model.to(dtype)


def gradients(model: Any) -> list[Any]:
    model(IDS).logits.square().sum().backward()
    found: list[Any] = [parameter.grad for parameter in randlora.trainable_parameters(model)]
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
    assert all(gradient is not None and gradient.any() for gradient in found)
    model.zero_grad()
    return found


@pytest.mark.parametrize("build", [mixtral, gpt_oss], ids=lambda build: build.__name__)
@each_or_shared
def test_every_implementation_computes_and_trains_as_if_the_experts_were_changed(build: Any, experts: Any) -> None:
    found = []
    for implementation in IMPLEMENTATIONS:
        dtype = torch.float32 if implementation == "grouped_mm" else torch.float64  # all that its kernel takes
        model = made(build, implementation, dtype)
        before, changed = model(IDS).logits, copy.deepcopy(model)
        targets = randlora.inject(model, r=3, alpha=3, targets=EXPERTS, experts=experts).targets
        assert torch.equal(model(IDS).logits, before)
        fill(model, spread=0.3)
        for fqn in targets:
            update = randlora.delta_weight(model, fqn)
            assert update.dim() == (3 if experts == "each" else 2)
            changed.get_parameter(fqn).data += update.mT if build is gpt_oss else update
        output, tolerance = model(IDS).logits, 10 * TOLERANCES[dtype]
        assert (output - before).abs().max() > 1e-3
        torch.testing.assert_close(output, changed(IDS).logits, rtol=tolerance, atol=tolerance)
        found.append(gradients(model))
        torch.testing.assert_close(found[-1], found[0], rtol=1e-3, atol=1e-4, check_dtype=False)
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # renamed
        enable({"use_reentrant": implementation == "eager"})
        model.train().enable_input_require_grads()
        torch.testing.assert_close(gradients(model), found[-1])


@each_or_shared
def test_the_experts_of_llama_4_are_transposed_and_do_not_say_so(experts: Any) -> None:
    config = Llama4TextConfig(hidden_size=6, intermediate_size=5, num_local_experts=2)
    model = nn.Sequential(Llama4TextExperts(config)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    changed, x = copy.deepcopy(model), torch.randn(8, 6, dtype=torch.float64)
    randlora.inject(model, r=2, alpha=2, targets=".*_proj", experts=experts)
    fill(model, spread=0.3)
    for name, (out, into) in {"0.gate_up_proj": (10, 6), "0.down_proj": (6, 5)}.items():
        update = randlora.delta_weight(model, name)
        assert update.shape[-2:] == (out, into)
        changed.get_parameter(name).data += update.mT
    torch.testing.assert_close(model(x), changed(x))


@each_or_shared
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_backward_keeps_nothing_of_the_size_of_all_updates(experts: Any, implementation: str) -> None:
    model = made(mixtral, implementation, torch.float32)
    randlora.inject(model, r=3, targets=EXPERTS, experts=experts)
    module = model.model.layers[0].mlp.experts
    given = torch.randn(2, 16, requires_grad=True), torch.tensor([[1, 3], [3, 1]]), torch.full((2, 2), 0.5)
    _, kept = kept_by(lambda: module(*given))
    known, one = storages([*module.parameters(), *module.buffers()]), module._parameters["gate_up_proj"][0].nbytes
    held = {storage.data_ptr(): storage.nbytes() for storage in map(Tensor.untyped_storage, kept)}
    sizes = [size for key, size in held.items() if key not in known]
    # a gathered product keeps the weights that it gathered, one for each token and expert, with or without adapters
    assert max(sizes) <= (4 * one if implementation == "batched_mm" else one)
    if implementation != "batched_mm":
        assert sum(size for size in sizes if size >= one // 2) <= 2 * one


@pytest.mark.parametrize(("stack", "basis"), [("gate_up_proj", "dense"), ("down_proj", "block")])
@pytest.mark.parametrize("counts", [[3, 0, 2, 1], [0, 1, 0, 0]], ids=str)
def test_a_grouped_product_all_at_once_equals_one_matrix_after_the_other(
    stack: str, basis: Any, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(mixtral, "grouped_mm", torch.float32)
    for experts in ("each", "shared"):
        adapt(model, spread=0.3, r=8, alpha=8, targets=EXPERTS, basis=basis, experts=experts, name=experts)
    randlora.activate(model, ["each", "shared"])
    module = model.model.layers[0].mlp.experts
    x, tokens = torch.randn(8, getattr(module, stack).shape[2]), sum(counts)  # the last rows have no matrix
    offs = torch.tensor(counts).cumsum(0).to(torch.int32)
    trained = [module.get_parameter(f"{stack}_randlora_{kind}.each") for kind in ("lambda", "gamma")]
    monkeypatch.setattr("randlora.readers.adapted_stack.ENTRIES", 1)  # several parts
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
    return adapt(model, r=3, targets=["up_proj"], experts=experts)


def up(model: nn.Module) -> Tensor:
    return read(model, "0.up_proj")


def summed(model: nn.Module) -> Tensor:
    return up(model) + 0


def of_first(x: Tensor, stack: Tensor) -> Tensor:
    return x @ stack[0].mT


X = torch.randn(3, IN, generator=torch.Generator().manual_seed(1))
EACH = torch.randn(COUNT, 3, IN, generator=torch.Generator().manual_seed(1))


OPAQUE: dict[str, tuple[Callable[[Tensor, Tensor], Any], Any]] = {
    "function": (PRODUCT, slice(None)),
    "of a matrix": (lambda x, stack: PRODUCT(x, stack[1]), 1),
    "checkpoint": (lambda x, stack: checkpoint(of_first, x, stack, use_reentrant=True), 0),
}


@each_or_shared
@pytest.mark.parametrize("name", OPAQUE)
def test_a_gradient_that_would_not_reach_the_adapters_is_an_error_unless_of_a_clone(name: str, experts: str) -> None:
    model, x, (run, used) = adapted(experts), X.clone().requires_grad_(), OPAQUE[name]
    with pytest.raises(RuntimeError, match=r"cannot reach its adapters.*Pass its \.clone\(\) instead"):
        run(x, up(model)).sum().backward()
    trained = [*randlora.trainable_parameters(model)]
    assert all(parameter.grad is None for parameter in trained)
    run(x, up(model).clone()).sum().backward()
    expected = torch.autograd.grad((x @ summed(model)[used].reshape(-1, IN).mT).sum(), trained)
    torch.testing.assert_close([parameter.grad for parameter in trained], [*expected])


def test_a_stack_requires_a_gradient_where_its_sum_does_and_works_where_none_is_needed() -> None:
    model = adapted()
    stack, trained = up(model), [*randlora.trainable_parameters(model)]
    assert (stack.requires_grad, stack[0].requires_grad, stack.mT.requires_grad) == (True, True, True)
    outputs = of_first(X, stack), checkpoint(of_first, X, stack, use_reentrant=False)
    torch.testing.assert_close(*(torch.autograd.grad(output.square().sum(), trained) for output in outputs))
    with torch.no_grad():
        assert not up(model).requires_grad
        torch.testing.assert_close(PRODUCT(X, up(model)), X @ summed(model).flatten(0, 1).mT)
        assert torch.equal(copy.deepcopy(up(model)), summed(model))
    randlora.set_trainable(model, "default", trainable=False)
    assert not up(model).requires_grad


def written_to(stack: Tensor) -> Tensor:
    out = torch.zeros(3, OUT)
    torch.matmul(X, stack[1].mT, out=out)
    return out


CALLS: dict[str, Callable[[Any], Tensor]] = {
    "linear-weight": lambda stack: F.linear(X, weight=stack[1]),
    "linear-input": lambda stack: F.linear(input=X, weight=stack[1], bias=torch.ones(OUT)),
    "linear-many": lambda stack: F.linear(X.repeat(20, 1), stack[1], torch.ones(OUT)),
    "matmul": lambda stack: torch.matmul(input=X, other=stack[1].mT),
    "matmul-other": lambda stack: X.matmul(other=stack[1].mT),
    "mm": lambda stack: torch.mm(X, mat2=stack[1].mT),
    "bmm-input": lambda stack: torch.bmm(input=EACH, mat2=stack.mT),
    "transpose": lambda stack: EACH.bmm(stack.transpose(dim0=1, dim1=2)),
    "transpose-input": lambda stack: EACH.bmm(torch.transpose(input=stack, dim0=1, dim1=2)),
    "t": lambda stack: X.mm(torch.t(input=stack[1])),
}
FORMED: dict[str, Callable[[Any], Any]] = {
    "out": written_to,
    "einsum": lambda stack: torch.einsum("ti,eoi->teo", X, stack),
    "left": lambda stack: torch.matmul(input=stack[1], other=X.mT),
    "copy_": lambda stack: torch.empty(COUNT, OUT, IN).copy_(stack),
    "addmm_": lambda stack: torch.zeros(3, OUT).addmm_(X, stack[1].mT),
    "setitem": lambda stack: torch.zeros(2, COUNT, OUT, IN).index_copy_(0, torch.tensor([1]), stack[None]),
}
WRITES: dict[str, Callable[[Any], Any]] = {
    "__setitem__": lambda stack: stack.__setitem__(0, torch.zeros(OUT, IN)),
    "add_": lambda stack: stack.__iadd__(1),
    "normal_": nn.init.normal_,
    "add": lambda stack: torch.add(torch.ones(COUNT, OUT, IN), 1, out=stack),
    "_foreach_add_": lambda stack: torch._foreach_add_([stack], 1),
}


@torch.no_grad()
@each_or_shared
@pytest.mark.parametrize("name", CALLS | FORMED)
def test_calls_see_the_sum_and_products_do_not_form_it(
    name: str, experts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, call = adapted(experts), (CALLS | FORMED)[name]
    expected = call(summed(model))
    if name in CALLS:
        monkeypatch.delattr(Parts, "formed")
    torch.testing.assert_close(call(up(model)), expected)


def test_matrices_at_no_index_are_an_empty_stack_and_unknown_arguments_torchs_own_error() -> None:
    model = adapted()
    none = up(model)[torch.tensor([], dtype=torch.int64)]
    assert none.shape == (0, OUT, IN)
    assert not isinstance(none, AdaptedStack)
    assert not any(each.any() for each in torch.autograd.grad(none.sum(), [*randlora.trainable_parameters(model)]))
    with pytest.raises(TypeError, match="linear"):
        F.linear(X, weights=up(model)[0])  # type: ignore[call-arg]


@torch.no_grad()
def test_writing_to_a_stack_and_what_is_no_stack_of_matrices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    for name, write in WRITES.items():
        said = f"cannot {name} an adapted stack of weights in place"
        with untouched(model), pytest.raises(RuntimeError, match=said):
            write(up(model))
    monkeypatch.setattr(registry, "_readers", dict(registry._readers))
    randlora.layers.register_layer(Flat)(type("W1", (Experts,), {"attribute": "w1"}))
    model, match = nn.Sequential(Flat()), r"0\.w1 has shape \(8, 4\), expected a stack"
    with untouched(model), pytest.raises(randlora.errors.TargetError, match=match):
        randlora.inject(model, r=2, targets=["w1"])


def test_a_sum_of_updates_that_was_formed_is_used_however_few_the_tokens() -> None:
    owner: Any = adapt(nn.Sequential(nn.Linear(512, 512)), r=8)[0]
    (layer,) = owner.randlora.values()
    shared = adapted_stack.Shared([layer.update(owner, *layer.active()[0])])
    place = torch.device("cpu"), torch.float32
    assert not shared.is_worth_forming(1, *place, "auto")
    shared.formed(*place)
    assert shared.is_worth_forming(1, *place, "auto")
