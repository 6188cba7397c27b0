"""Parameters of models of 16 bits that are trained with an adapter: their copies are float32, and cast in a forward."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import randlora
from randlora.errors import AdapterError
from tests.checkpoint_files import read_tensors, reseal
from tests.kit import adapt, all_bits, assert_unchanged, bits, fill, on_one_line, same_bits, snapshot, untouched
from tests.laws import TOKENS, Mixed, needs_compiler
from tests.test_model_replaced import IDS, llama, resize, step

HALVES = [torch.float16, torch.bfloat16]
ALSO = ["head", "norm", "embed", "q.bias"]
in_each_half = pytest.mark.parametrize("dtype", HALVES, ids=str)


def mixed(dtype: torch.dtype = torch.float16) -> Mixed:
    torch.manual_seed(0)
    return Mixed().to(dtype).eval()


def adapted(dtype: torch.dtype = torch.float16, seed: int = 0) -> Mixed:
    model = mixed(dtype)
    return adapt(model, r=4, targets=["q", "down"], train_also=ALSO, values=seed)


def kinds(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules()]


def test_training_follows_that_in_float32() -> None:
    """With a loss so small that Adam divides by zero in float16."""
    losses: dict[torch.dtype, list[float]] = {}
    for dtype in (torch.float32, *HALVES):
        model = mixed(dtype)
        randlora.inject(model, r=4, targets=["q"], train_also=ALSO)
        optimizer = torch.optim.AdamW(randlora.trainable_parameters(model), lr=1e-3)
        for _ in range(20):
            optimizer.zero_grad()
            loss = (model(TOKENS).float() - 1).square().mean() / 1e3
            loss.backward()
            optimizer.step()
            losses.setdefault(dtype, []).append(loss.item() * 1e3)
        close = 8 * torch.finfo(dtype).eps
        assert losses[dtype] == pytest.approx(losses[torch.float32], rel=close, abs=close)


def test_what_is_saved_is_float32_and_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model, loaded, old, whole = adapted(), mixed(), mixed(), mixed(torch.float32)
    assert [name for name in model.state_dict() if ".randlora_" not in name] == list(mixed().state_dict())
    randlora.save(model, tmp_path)
    saved, _ = read_tensors(tmp_path)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert "trained in" not in on_one_line(randlora.load(loaded, tmp_path, trainable=True))
    assert same_bits(loaded(TOKENS), model(TOKENS))
    assert all_bits(randlora.adapter_state(loaded).tensors) == all_bits(randlora.adapter_state(model).tensors)
    randlora.swap(loaded, randlora.adapter_state(adapted(seed=1)))
    assert same_bits(loaded(TOKENS), adapted(seed=1)(TOKENS))
    randlora.load(whole, tmp_path)
    assert same_bits(whole.head.weight, model.head.weight)
    reseal(tmp_path, {name: tensor.half() for name, tensor in saved.items() if "randlora" not in name})
    randlora.load(old, tmp_path, trainable=True)  # a file of an earlier version
    assert old.head.weight.dtype == torch.float32
    assert same_bits(old(TOKENS), model(TOKENS))


@in_each_half
def test_a_merged_model_is_rounded_once_also_where_another_adapter_adapts_a_copy(dtype: torch.dtype) -> None:
    model = adapted(dtype)
    alone = model(TOKENS)
    for is_adapted in (False, True):
        if is_adapted:
            adapt(model, r=2, targets=["head"], name="b")
            randlora.activate(model, {"default": 1.0, "b": 1.0})
        found, own = mixed(dtype), model(TOKENS)
        with randlora.merged(model):
            merged = model(TOKENS)
        torch.testing.assert_close(merged, own, rtol=0, atol=4 * torch.finfo(dtype).eps)
        found.load_state_dict(entries := dict(randlora.merged_tensors(model)))
        assert {value.dtype for value in entries.values()} == {dtype}
        assert same_bits(found(TOKENS), merged)
    randlora.remove(model, "b")
    assert same_bits(model(TOKENS), alone)
    head = model.head.weight.detach().clone()
    randlora.merge(model)
    assert same_bits(model.head.weight, head.to(dtype))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert kinds(model) == kinds(mixed())


@in_each_half
def test_the_base_is_there_in_between_and_at_the_end(dtype: torch.dtype) -> None:
    model = mixed(dtype)
    before, own_kinds, own = snapshot(model), kinds(model), model(TOKENS)
    options: dict[str, Any] = {"r": 4, "targets": ["q"], "train_also": ALSO}
    planned, entries = randlora.plan(model, **options, name="a"), randlora.training_memory(model, **options).parameters
    assert randlora.inject(model, **options, name="a") == planned
    assert planned.checkpoint_bytes == entries == 4 * sum(p.numel() for p in randlora.trainable_parameters(model))
    assert same_bits(model(TOKENS), own)
    outputs = {"a": fill(model, "a")(TOKENS)}
    with untouched(model), pytest.raises(AdapterError):
        randlora.inject(model, r=4, targets=["q"], train_also=["up"], name="a")
    randlora.inject(model, r=4, targets=["q"], train_also=["head", "q.bias"], name="b", active=True)
    assert same_bits(model(TOKENS), own)
    outputs["b"] = fill(model, "b", seed=1)(TOKENS)
    for name in ("a", "b", "a"):
        randlora.activate(model, name)
        assert same_bits(model(TOKENS), outputs[name])
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert same_bits(twin(TOKENS), outputs[name])
            randlora.activate(twin, "b" if name == "a" else "a")
            randlora.eject(twin)
            assert same_bits(twin(TOKENS), own)
    with randlora.disabled(model):
        assert same_bits(model(TOKENS), own)
    randlora.remove(model, "a")
    randlora.activate(model, "b")
    assert same_bits(model(TOKENS), outputs["b"])
    randlora.eject(model)
    assert_unchanged(model, before)
    assert kinds(model) == own_kinds


def test_code_outside_of_a_forward_has_the_parameter_itself() -> None:
    model, read = adapted(), []
    named = dict(model.named_parameters())
    hook = model.norm.register_forward_hook(lambda module, *_: read.append(module.weight.dtype))
    model(TOKENS).float().mean().backward()
    hook.remove()
    assert read == [torch.float16], "the hook runs in the model's forward"
    assert model.head.weight is named["head.weight"]
    assert model.head.weight.grad is not None
    assert model.head.weight.grad.dtype == torch.float32
    model.head.weight.data.zero_()
    nn.init.zeros_(model.head.bias)
    assert not model(TOKENS).any()
    del model.head.bias
    for name in ("wight", "bias"):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
            getattr(model.head, name)


@pytest.mark.parametrize("to", [torch.float64, torch.bfloat16], ids=str)
def test_a_model_that_is_converted_computes_in_its_new_dtype(to: torch.dtype) -> None:
    model, plain = adapted(), mixed().to(to)
    own = model(TOKENS)
    torch.testing.assert_close(model.to(to)(TOKENS), own.to(to), rtol=0, atol=0.02)
    with randlora.disabled(model):
        assert same_bits(model(TOKENS), plain(TOKENS))
    randlora.eject(model)
    assert same_bits(model(TOKENS), plain(TOKENS))


@pytest.mark.medium
@needs_compiler
def test_compiled_checkpointed_and_scaled() -> None:
    model = adapted()
    own = model(TOKENS)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(TOKENS), own)

    def run(x: Tensor) -> Tensor:
        output: Tensor = model.head(model.norm(x + model.q(x)))
        return output

    gradients, x = [], torch.randn(9, 12, dtype=torch.float16, requires_grad=True)
    for is_reentrant in (None, False, True):
        model.zero_grad()
        output = run(x) if is_reentrant is None else checkpoint(run, x, use_reentrant=is_reentrant)
        output.float().square().mean().backward()
        gradients.append({n: bits(p.grad) for n, p in model.named_parameters() if p.grad is not None})
    assert {"head.weight", "norm.bias", "q.bias"} <= gradients[0].keys()
    assert gradients[0] == gradients[1] == gradients[2]
    scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.AdamW(randlora.trainable_parameters(model))
    scaler.scale(model(TOKENS).float().square().mean()).backward()
    scaler.step(optimizer)  # which refuses gradients in float16
    assert not same_bits(model(TOKENS), own)


@pytest.mark.parametrize(("also", "is_tied"), [("embed_tokens", False), ("lm_head", True), ("lm_head", False)])
def test_embeddings_and_heads_of_language_models(also: str, is_tied: bool, tmp_path: Path) -> None:
    model = llama(is_tied=is_tied).half()
    own = model(IDS).logits
    randlora.inject(model, r=2, targets=["q_proj"], train_also=[also])
    assert same_bits(model(IDS).logits, own)
    step(model)
    with randlora.merged(model):
        merged = model(IDS).logits
    randlora.files.save_merged(model, tmp_path / "merged")
    back = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert back.dtype == torch.float16
    assert same_bits(back(IDS).logits, merged)
    resize(model, 44)
    if also == "lm_head" and not is_tied:  # transformers made another, of the dtype of the copy
        model.lm_head.half()
        with pytest.warns(UserWarning, match=r"lm_head\.weight: the trained copies were float32 .* load it again"):
            step(model)
    else:
        step(model)
    assert model(IDS).logits.dtype == torch.float16
    randlora.eject(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    model(IDS)


class Odd(nn.Module):
    """Parameters that a forward reads from a list, through a property, and from the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.rnn, self.scale = nn.Linear(4, 4), nn.LSTM(4, 4), nn.Parameter(torch.ones(4))
        self._parameters["gain"] = nn.Parameter(torch.ones(4))

    gain = property(lambda self: self._parameters["gain"])

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.rnn(self.a(x) * self.gain)[0] * self.scale
        return output


def test_what_cannot_be_cast_keeps_its_dtype_and_the_report_says_so(tmp_path: Path) -> None:
    x, model, other = torch.ones(2, 3, 4, dtype=torch.bfloat16), Odd().bfloat16(), Odd().bfloat16()
    own = model(x)
    report = randlora.inject(model, r=2, targets=["a"], train_also=["rnn", "gain", "scale"])
    assert same_bits(model(x), own)
    model(x).float().sum().backward()
    assert all(parameter.grad is not None for parameter in randlora.trainable_parameters(model))
    kept = {name for name in report.train_also if model.get_parameter(name).dtype == torch.bfloat16}
    assert kept == {name for name in report.train_also if "rnn" in name or "gain" in name}
    randlora.save(model, tmp_path)
    for each in (report, randlora.load(other, tmp_path, trainable=True)):
        assert "are trained in torch.bfloat16" in on_one_line(each)
    randlora.eject(model)
    assert type(model) is Odd
