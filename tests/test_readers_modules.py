"""What is particular to `nn.MultiheadAttention` and to embeddings: masks, the fast path, files, refusals."""

import copy
import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import bitsandbytes
import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

import randlora
from randlora.checkpoint.header import HEADER_KEY
from randlora.disk.formats import read_shard
from randlora.errors import AdapterError, TargetError
from randlora.layers.scopes import forward_of
from randlora.readers.read_weight import EmbeddingAdapter, ReadWeight
from tests.kit import all_bits, fill, read, untouched
from tests.laws import adapted_names, assert_close
from tests.models import GPT2, reproducible


class Subclass(nn.MultiheadAttention):
    """An attention of one's own, as many models have."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Attending(nn.Module):
    """Attention with random weights, always the same."""

    def __init__(self, kind: type[nn.MultiheadAttention] = nn.MultiheadAttention, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = kind(12, **{"num_heads": 2, "batch_first": True, "dtype": torch.float64, **options})
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.attn(x, x, x, need_weights=False)[0]
        return output


PACKED = {"attn.in_proj_weight", "attn.out_proj"}
SEPARATE = {"attn.q_proj_weight", "attn.k_proj_weight", "attn.v_proj_weight", "attn.out_proj"}
ATTENTION: dict[str, tuple[dict[str, Any], Any, set[str]]] = {
    "sequence-first": ({"batch_first": False, "num_heads": 3}, "split", PACKED),
    "bias-kv": ({"add_bias_kv": True, "add_zero_attn": True}, "packed", PACKED),
    "separate": ({"kdim": 8, "vdim": 20, "bias": False}, "packed", SEPARATE),
    "subclass": ({"kind": Subclass}, "packed", PACKED),
}
MASKS: tuple[dict[str, Any], ...] = (
    {},
    {"need_weights": True, "average_attn_weights": False},
    {"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])},
    {"attn_mask": torch.triu(torch.ones(5, 5, dtype=torch.bool), 1), "is_causal": True},
)


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_attention_computes_as_one_whose_weights_were_changed(name: str, training: bool) -> None:
    options, in_proj, fqns = ATTENTION[name]
    model, changed, plain = (Attending(**options).train(training) for _ in range(3))
    randlora.inject(model, r=3, alpha=6, in_proj=in_proj, stream="portable")
    fill(model, spread=0.2)
    assert adapted_names(model) == fqns
    inputs = [torch.randn(2, 5, options.get(width, 12), dtype=torch.float64) for width in ("", "kdim", "vdim")]
    with torch.no_grad():
        for fqn in fqns:
            weight = changed.get_parameter(fqn if fqn.endswith("_weight") else f"{fqn}.weight")
            weight.add_(randlora.delta_weight(model, fqn))
    for mask in MASKS[:2] if name == "sequence-first" else MASKS:  # its first dim is the sequence
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                (output, weights), (expected, by) = (each.attn(*inputs, **mask) for each in (model, changed))
                base = plain.attn(*inputs, **mask)[0]
            assert_close(output, expected, torch.float64)
            assert (output - base).abs().max() > 0.01
            assert (weights is None) == (by is None)
            if by is not None:
                assert_close(weights, by, torch.float64)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_the_fast_path_is_taken_and_each_update_computed_once_with_its_gradients(training: bool) -> None:
    for in_proj in ("packed", "split"):
        model = Attending().train(training)
        randlora.inject(model, r=3, in_proj=in_proj)
        with (
            torch.set_grad_enabled(training),
            patch.object(torch, "_native_multi_head_attention", wraps=torch._native_multi_head_attention) as fast,
            patch.object(ReadWeight, "value", autospec=True, side_effect=ReadWeight.value) as value,
        ):
            model(torch.randn(2, 5, 12, dtype=torch.float64))
        assert fast.call_count == (0 if training else 1)
        assert len({call.args[0] for call in value.call_args_list}) == value.call_count == 2
        with forward_of(model.attn):  # what it reads without gradients has them where it reads with them
            with torch.no_grad():
                assert not model.attn.in_proj_weight.requires_grad
            assert model.attn.in_proj_weight.requires_grad


def assert_all_have_gradients(model: nn.Module) -> None:
    assert all(each.grad is not None and each.grad.any() for each in randlora.trainable_parameters(model))


def test_a_linear_layer_in_the_place_of_out_proj_is_adapted_as_it_is_read_and_its_type_as_it_is_called() -> None:
    layer = nn.modules.linear.NonDynamicallyQuantizableLinear(12, 8, dtype=torch.float64)
    models: list[tuple[nn.Module, str]] = [(nn.Sequential(layer), "0")]
    for kind in (nn.MultiheadAttention, Subclass):
        models.append((attending := Attending(kind), "out_proj"))
        attending.attn.out_proj = nn.Linear(12, 12, dtype=torch.float64)  # type: ignore[assignment]
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    for model, name in models:
        base = model(x)
        randlora.inject(model, r=3, targets=[name])
        found = fill(model)(x)
        assert (found - base).abs().max() > 0.01
        found.sum().backward()
        assert_all_have_gradients(model)
        randlora.merge(model)
        torch.testing.assert_close(model(x), found)


def siglip() -> Any:
    """Build a tower of transformers' SigLIP, whose pooling is an `nn.MultiheadAttention`."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.SiglipVisionConfig(image_size=8, patch_size=4, **sizes)
    return reproducible(lambda: transformers.SiglipVisionModel(config))


def test_merging_files_gives_what_merging_in_memory_gives_and_split_projections_have_the_second_format(
    tmp_path: Path,
) -> None:
    """By the model's class; by names: tests/test_files_merge.py."""
    model, adapters = siglip(), {tmp_path / form: 1.0 for form in ("split", "packed")}
    model.save_pretrained(tmp_path / "base")
    for path in adapters:
        form: Any = path.name
        randlora.inject(model, r=4, targets=["in_proj_weight", "out_proj"], in_proj=form, name=form)
        fill(model, form, spread=0.2, seed=len(form))
        randlora.save(model, path, name=form)
        assert randlora.files.inspect(path).config.in_proj == form
        assert randlora.files.verify(path, base=tmp_path / "base").passed
        header = read_shard(path / "adapter_model.safetensors").metadata[HEADER_KEY]
        assert f'"format_version": {2 if form == "split" else 1}' in header
        assert ("in_proj" in re.sub("in_proj_weight", "", header)) == (form == "split")
    randlora.activate(model, ["split", "packed"])
    randlora.merge(model)
    randlora.files.merge(adapters, tmp_path / "out", base=tmp_path / "base")
    found = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert all_bits(found) == all_bits(model.state_dict()) != all_bits(siglip().state_dict())


# Embeddings


def embedding(module: nn.Module) -> nn.Sequential:
    model = nn.Sequential(module)
    randlora.inject(model, r=3, alpha=6, targets=["0"], stream="portable")
    return fill(model)


def test_the_update_of_the_table_is_not_formed_for_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.tensor([[1, 2], [2, 29]])
    tables = nn.Embedding(30, 12), nn.Embedding(30, 12, scale_grad_by_freq=True), nn.Embedding(30, 12, sparse=True)
    models = [embedding(table) for table in tables]
    expected = read(models[0], "0.weight")[ids]
    monkeypatch.setattr(EmbeddingAdapter, "read", lambda *_: pytest.fail("the whole table was read"))
    gradients = []
    for model in models:  # options that concern the gradient of the frozen table change nothing
        model[0].load_state_dict(models[0][0].state_dict())
        found = model(ids)
        assert_close(found, expected, torch.float32)
        found.square().sum().backward()
        gradients.append([parameter.grad for parameter in randlora.trainable_parameters(model)])
        torch.testing.assert_close(gradients[-1], gradients[0], rtol=0, atol=0)
        assert model[0].get_parameter("weight").grad is None
        with pytest.raises(IndexError, match="out of range"):
            model(torch.tensor([30]))


@pytest.mark.parametrize("name", ["gemma", "opt", "bitsandbytes"])
def test_a_forward_of_a_subclass_computes_with_the_adapted_table(name: str) -> None:
    plain, given = {
        "gemma": lambda: (Gemma3TextScaledWordEmbedding(20, 12, 0, embed_scale=3.5), torch.tensor([[1, 4]])),
        "opt": lambda: (OPTLearnedPositionalEmbedding(18, 12), torch.ones(1, 4, dtype=torch.int64)),
        "bitsandbytes": lambda: (bitsandbytes.nn.StableEmbedding(16, 12), torch.tensor([3, 9])),
    }[name]()
    model = embedding(copy.deepcopy(plain))
    with torch.no_grad():
        plain.weight.copy_(read(model, "0.weight"))
    found = model[0](given)
    assert_close(found, plain(given), torch.float32)
    found.square().sum().backward()
    assert_all_have_gradients(model)
    assert randlora.merge(model).notes == ()
    assert_close(model[0](given), found, torch.float32)


def test_what_cannot_be_adapted_is_refused_with_the_reason() -> None:
    odd, computed = Attending(), Attending()
    odd.attn.in_proj_weight = nn.Parameter(torch.ones(35, 12))
    parametrize.register_parametrization(computed.attn, "in_proj_weight", nn.Identity())
    by_regex = {"targets": r".*in_proj_weight", "exclude": ["parametrizations"]}
    normed = nn.Sequential(nn.Embedding(30, 12, max_norm=1.0))
    rows: list[tuple[nn.Module, dict[str, Any], str]] = [
        (Attending().attn, {}, r"the model itself is a layer \(MultiheadAttention\)"),
        (odd, {}, r"attn\.in_proj_weight has 35 rows, expected equally many for query, key and value"),
        (computed, by_regex, r"attn\.in_proj_weight computes its weight from other parameters"),
        (normed, {"targets": ["0"]}, r"0 has max_norm=1\.0, with which its forward changes the"),
        (GPT2.build(), {"targets": ["wte"]}, r"transformer\.wte is tied to lm_head\.weight"),
    ]
    for model, options, match in rows:
        with untouched(model), pytest.raises(TargetError, match=match):
            randlora.inject(model, r=3, **options)
    for kind in (bitsandbytes.nn.Embedding8bit, bitsandbytes.nn.EmbeddingNF4):  # which have no state dict
        for model in (nn.Sequential(kind(16, 64)), nn.Sequential(kind(16, 64)).to("cpu")):
            with pytest.raises(TargetError, match=rf"0 \({kind.__name__}\) cannot be adapted: its table is quantized"):
                randlora.inject(model, r=3, targets=["0"])
    resized = embedding(nn.Embedding(20, 12))  # not by transformers, which is refused: tests/test_model_replaced.py
    resized[0].get_parameter("weight").data = torch.randn(24, 12)
    resized[0].num_embeddings = 24  # type: ignore[assignment]
    with pytest.raises(AdapterError, match=r"\(24, 12\) had the shape \(20, 12\) when it was adapted"):
        resized(torch.tensor([[3]]))
