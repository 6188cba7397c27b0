"""Training through what torchao rounds in a forward (QAT, float8), and what is quantized or replaced too late."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import randlora
from randlora.errors import AdapterError, MergeError, TargetError
from tests.kit import all_bits, fill, same_bits, untouched
from tests.laws import assert_close
from tests.layer_kinds import quantization

of_torchao = pytest.mark.skipif(quantization is None, reason="torchao is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of torchao
X = torch.linspace(-1, 1, 256).view(4, 64)


def plain() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32))


def adapted(model: nn.Sequential, **options: Any) -> nn.Sequential:
    randlora.inject(model, r=8, targets="all", stream="portable", **options)
    return model


def fitted(model: nn.Sequential) -> nn.Sequential:
    """Return it after some steps, in which the loss has fallen."""
    wanted, losses = torch.linspace(-1, 1, 128).view(4, 32).sin(), []
    optimizer = torch.optim.Adam(randlora.trainable_parameters(model), lr=3e-3)
    for _ in range(10):
        loss = (model(X) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    return model.eval()


def to_int4(model: nn.Module, step: str | None = None, *, rounds_inputs: bool = False) -> None:
    """Round weights to int4 for good, or by a step of QAT."""
    name = "Int8DynamicActivationIntxWeightConfig" if rounds_inputs else "IntxWeightOnlyConfig"
    config = getattr(quantization, name)(getattr(torch, "int4", None), quantization.granularity.PerGroup(32))
    quantization.quantize_(model, quantization.qat.QATConfig(config, step=step) if step else config)


def to_float8(model: nn.Module) -> None:
    float8 = pytest.importorskip("torchao.float8")
    float8.convert_to_float8_training(model, config=float8.Float8LinearConfig(emulate=True))  # on a CPU


@of_torchao
@pytest.mark.medium
@pytest.mark.parametrize("rounds_inputs", [False, True])
def test_after_qat_the_int4_model_computes_what_was_trained(rounds_inputs: bool, tmp_path: Path) -> None:
    model, twin = plain(), plain()
    for each in (model, twin):
        to_int4(each, "prepare", rounds_inputs=rounds_inputs)
    fitted(adapted(model))
    assert not randlora.check(model, X).problems
    randlora.save(model, tmp_path)
    randlora.load(twin, tmp_path)
    trained = model(X)
    assert same_bits(twin(X), trained)
    late = adapted(plain())
    randlora.swap(late, tmp_path)
    randlora.merge(late)
    to_int4(late, rounds_inputs=rounds_inputs)
    randlora.merge(model)
    to_int4(model, "convert", rounds_inputs=rounds_inputs)
    assert type(model[0]) is nn.Linear
    assert type(model[0].weight) is not nn.Parameter
    assert_close(model(X), trained, torch.float32)
    assert same_bits(late(X), model(X)), "int4 codes depend on the merged weights alone"


@of_torchao
@pytest.mark.medium
def test_float8_layers_are_trained_and_merged(tmp_path: Path) -> None:
    model = plain()
    to_float8(model)
    fitted(adapted(model))
    trained = model(X)
    randlora.save(model, tmp_path)
    randlora.merge(model)
    assert_close(model(X), trained, torch.float32)
    wide = plain()
    randlora.load(wide, tmp_path)
    assert 0 < (wide(X) - trained).norm() < 0.1 * trained.norm()


@of_torchao
def test_what_is_quantized_too_late_runs_and_is_saved_and_every_verb_says_what_to_do(tmp_path: Path) -> None:
    model, quantized = fill(adapted(plain())), plain()
    config = quantization.Int8WeightOnlyConfig()
    for each in (model, quantized):
        quantization.quantize_(each, config)
    said = re.escape(
        "the weight of 0 was quantized after it was adapted (a Int8Tensor now): save the adapter, and load"
    )
    calls: list[Callable[[], object]] = [
        lambda: randlora.merge(model),
        lambda: randlora.merge(model, quantized="dequantize"),
        lambda: randlora.merged(model).__enter__(),
        lambda: randlora.check(model, X),
    ]
    before = all_bits(model.state_dict())
    for call in calls:
        with pytest.raises((AdapterError, MergeError), match=said):
            call()
    assert all_bits(model.state_dict()) == before
    randlora.save(model, tmp_path)
    randlora.load(quantized, tmp_path)
    assert_close(model(X), quantized(X), torch.float32)
    ours, theirs = (dict(randlora.merged_tensors(each)) for each in (model, quantized))
    for fqn, tensor in ours.items():
        assert_close(tensor, theirs[fqn], torch.float32)
    assert randlora.merge(quantized, quantized="dequantize").targets == ("0", "2")


def gpt_oss() -> Any:
    """Return a model with the experts that transformers gives it, for which a CPU has no kernel."""
    library, mxfp4 = (pytest.importorskip(f"transformers.{name}") for name in ("models.gpt_oss", "integrations.mxfp4"))
    sizes = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 8, "vocab_size": 50, "num_local_experts": 4}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = library.GptOssForCausalLM(library.GptOssConfig(**sizes, **layers)).eval()
    for layer in model.model.layers:
        layer.mlp.experts = mxfp4.Mxfp4GptOssExperts(model.config)
    return model


REMEDY = r"through which no gradient passes: load the model with Mxfp4Config\(dequantize=True\), or without NVFP4Config"


def test_experts_in_mxfp4_are_refused_and_no_layer_before_them_is_trained_through_them() -> None:
    model, ids = gpt_oss(), torch.tensor([[1, 2, 3]])
    with untouched(model), pytest.raises(TargetError, match=rf"mlp\.experts .*cannot be adapted: has .*{REMEDY}"):
        randlora.inject(model, r=4, targets=["experts"])
    report = randlora.plan(model, r=4, targets="all-linear")
    assert {fqn for fqn, why in report.skipped.items() if re.search(REMEDY, why)} == {
        f"model.layers.{index}.mlp.experts" for index in range(2)
    }
    randlora.inject(model, r=4)
    with pytest.raises(AdapterError, match=f"cannot train a model with 4-bit floats, {REMEDY}"):
        model(ids)
    kernel: Any = pytest.raises(NameError, match="triton_kernels_hub")  # which a GPU has: all before it has run
    with torch.no_grad(), kernel:
        model(ids)
    randlora.set_trainable(model, "default", False)
    with kernel:
        model(ids)
    randlora.eject(model)
    model.lm_head.requires_grad_()
    with kernel:
        model(ids)


def test_layers_in_nvfp4_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    nvfp4 = pytest.importorskip("transformers.integrations.nvfp4")

    def shape(out_features: int, in_features: int) -> tuple[int, int]:
        return out_features, in_features // 64

    monkeypatch.setattr(nvfp4, "load_nvfp4_kernel", lambda: SimpleNamespace(swizzled_sf_shape=shape))  # of a Blackwell
    model = nn.Sequential(nn.Linear(64, 64), nvfp4.NVFP4Linear(64, 64))
    with untouched(model), pytest.raises(TargetError, match=rf"1 \(NVFP4Linear\) cannot be adapted: has .*{REMEDY}"):
        randlora.inject(model, r=4, targets=["1"])
    randlora.inject(model, r=4, targets=["0"])
    with pytest.raises(AdapterError, match=f"cannot train a model with 4-bit floats, {REMEDY}"):
        model(torch.randn(2, 64))
