"""What is particular to `nn.MultiheadAttention`: its ways to compute, models around it, files, refusals."""

import copy
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrize

import randlora
from randlora.checkpoint.header import HEADER_KEY
from randlora.disk.formats import read_shard
from randlora.errors import TargetError
from randlora.layers.scopes import forward_of
from randlora.readers.read_weight import ReadWeight
from tests.attention_kinds import ATTENTION_KINDS, Attending, AttentionKind, Subclass, changed, every_attention
from tests.kit import all_bits, fill, untouched
from tests.laws import adapted_names, assert_close
from tests.models import TORCHVISION_VIT, clip, clip_attention, reproducible, torchvision_vit

PACKED_KIND, SPLIT_KIND = ATTENTION_KINDS[:2]
nested_tensors = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
is_training = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
MASKS: tuple[dict[str, Any], ...] = (
    {},
    {"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])},
    {"attn_mask": torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)},
    {"attn_mask": torch.triu(torch.ones(5, 5, dtype=torch.bool), 1), "is_causal": True},
    {"need_weights": True},
    {"need_weights": True, "average_attn_weights": False},
)


@every_attention
@is_training
def test_attention_computes_as_one_whose_weights_were_changed(kind: AttentionKind, training: bool) -> None:
    model, plain, inputs = kind.adapted().train(training), kind.plain().train(training), kind.inputs()
    assert adapted_names(model) == {*kind.sites}
    merged = changed(kind, model).train(training)
    inputs = inputs if len(inputs) == 3 else (inputs[0],) * 3
    for options in MASKS:
        if kind.name == "sequence-first" and any("mask" in name for name in options):
            continue  # the first of the inputs' dims is then the sequence
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                (output, weights), (expected, by) = (each.attn(*inputs, **options) for each in (model, merged))
                base = plain(*inputs, **options)
            assert_close(output, expected, torch.float64)
            assert (output - base).abs().max() > 0.01
            assert (weights is None) == (by is None)
            if weights is not None:
                assert_close(weights, by, torch.float64)


@is_training
def test_the_fast_path_is_taken_and_each_update_computed_once(training: bool) -> None:
    for kind in (PACKED_KIND, SPLIT_KIND):
        model = kind.adapted().train(training)
        with (
            torch.set_grad_enabled(training),
            patch.object(torch, "_native_multi_head_attention", wraps=torch._native_multi_head_attention) as fast,
            patch.object(ReadWeight, "value", autospec=True, side_effect=ReadWeight.value) as value,
        ):
            model(*kind.inputs())
        assert fast.call_count == (0 if training else 1)
        assert len({call.args[0] for call in value.call_args_list}) == value.call_count == 2


def test_what_a_forward_reads_without_gradients_has_them_where_it_reads_with_them() -> None:
    attention = PACKED_KIND.adapted().attn
    with forward_of(attention):
        with torch.no_grad():
            assert not attention.in_proj_weight.requires_grad
        assert attention.in_proj_weight.requires_grad


@is_training
def test_a_layer_in_the_place_of_out_proj_is_adapted_as_it_is_read_and_one_of_its_type_as_it_is_called(
    training: bool,
) -> None:
    def assert_adapted(model: nn.Module, x: Tensor, name: str) -> None:
        base = model.train(training)(x)
        randlora.inject(model, r=3, targets=[name])
        fill(model)
        adapted = model(x)
        assert (adapted - base).abs().max() > 0.01
        adapted.sum().backward()
        assert all(each.grad is not None and each.grad.any() for each in randlora.trainable_parameters(model))
        randlora.merge(model)
        torch.testing.assert_close(model(x), adapted)

    x = torch.randn(2, 5, 12, dtype=torch.float64)
    for kind in (nn.MultiheadAttention, Subclass):
        attention = kind(12, 2, dtype=torch.float64)
        attention.out_proj = nn.Linear(12, 12, dtype=torch.float64)  # type: ignore[assignment]
        assert_adapted(Attending(attention), x, "out_proj")
    layer = nn.modules.linear.NonDynamicallyQuantizableLinear(12, 8, dtype=torch.float64)
    assert_adapted(nn.Sequential(layer), x, "0")


# Models

X = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(1))
PADDING = torch.zeros(3, 7, dtype=torch.bool)
PADDING[1, 5:] = True


def encoder(**options: Any) -> Any:
    """Build an encoder of two layers."""
    sizes: dict[str, Any] = {"batch_first": True, "dropout": 0.0, **options}
    return reproducible(
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 4, 24, **sizes), 2, enable_nested_tensor=not options
        )
    )


def merged_copy(model: nn.Module) -> nn.Module:
    """Return a plain copy with the weights that the adapters make."""
    twin = copy.deepcopy(model)
    randlora.merge(twin)
    return twin


@nested_tensors
@pytest.mark.parametrize(
    "targets",
    [["in_proj_weight"], ["out_proj"], ["layers.1.self_attn"], ["linear1"], "all-linear", None],
    ids=str,
)
@is_training
def test_an_encoder_computes_as_one_whose_weights_were_changed(targets: Any, training: bool) -> None:
    options = {"norm_first": True} if targets is None else {}
    model, x = encoder(**options).train(training).double(), X.double()  # its norms multiply roundings
    base = copy.deepcopy(model)
    randlora.inject(model, r=4, targets=targets, in_proj="split")
    fill(model, spread=0.2)
    merged = merged_copy(model)
    for padding in (None, PADDING):
        kept = slice(None) if padding is None else ~padding
        with torch.set_grad_enabled(training):
            output = model(x, src_key_padding_mask=padding)[kept]
            assert_close(output, merged(x, src_key_padding_mask=padding)[kept], torch.float64)
            assert (output - base(x, src_key_padding_mask=padding)[kept]).abs().max() > 0.01


@nested_tensors
@pytest.mark.parametrize("targets", [["linear1"], ["layers.1.self_attn"], None], ids=str)
def test_an_encoder_in_evaluation_gives_gradients_or_torch_says_that_nested_tensors_have_none(targets: Any) -> None:
    model = encoder()
    randlora.inject(model, r=4, targets=targets)
    fill(model)
    if targets is not None:
        with pytest.raises(AssertionError, match="does not support NestedTensor outside of its fast path"):
            model(X, src_key_padding_mask=PADDING)
        model.use_nested_tensor = False
    model(X, src_key_padding_mask=PADDING)[~PADDING].square().sum().backward()
    assert all(each.grad is not None and each.grad.any() for each in randlora.trainable_parameters(model))


def clip_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(2, 3, 16, 16, generator=generator)
    return {"image": images, "text": torch.randint(1, 40, (2, 8), generator=generator)}


def decoder() -> nn.Module:
    """Build a decoder layer, whose second attention has the encoder's output for keys and values."""
    return reproducible(lambda: nn.TransformerDecoderLayer(16, 4, 24, batch_first=True, dropout=0.0))


CLIP = ["in_proj_weight", "c_fc", "c_proj"]
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor], Any, int]] = {
    "clip": (clip, clip_inputs(), CLIP, 2 * 2 * 3),
    "clip's own attention": (lambda: nn.Sequential(clip_attention()), {"input": X}, "all-linear", 2),
    "decoder": (decoder, {"tgt": X, "memory": X.flip(1)}, ["multihead_attn"], 2),
    "torchvision": (torchvision_vit, TORCHVISION_VIT.inputs(), "all-linear", 2 * 4),
}


@pytest.mark.parametrize("in_proj", ["packed", "split"])
@pytest.mark.parametrize(("build", "inputs", "targets", "count"), MODELS.values(), ids=MODELS)
def test_a_model_is_trained_merged_and_ejected(
    build: Callable[[], nn.Module], inputs: dict[str, Tensor], targets: Any, count: int, in_proj: Any
) -> None:
    model, base = build(), build()
    report = randlora.inject(model, r=6, targets=targets, in_proj=in_proj)
    assert len(report.targets) == count
    fill(model, spread=0.2)
    found, plain, merged = (
        [output] if isinstance(output := each(**inputs), Tensor) else [*output][:2]
        for each in (model, base, merged_copy(model))
    )
    for ours, own, by in zip(found, plain, merged, strict=True):
        assert (ours - own).abs().max() > 1e-3
        assert_close(ours, by, torch.float32)
    torch.stack([(output * output.roll(1, 0)).sum() for output in found]).sum().backward()
    assert all(each.grad is not None and each.grad.any() for each in randlora.trainable_parameters(model))
    assert all(parameter.grad is None for fqn, parameter in model.named_parameters() if "randlora" not in fqn)
    randlora.eject(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]
    assert all_bits(model.state_dict()) == all_bits(base.state_dict())


# Refusals


def test_what_cannot_be_adapted_is_refused_with_the_reason() -> None:
    def refused(model: nn.Module, match: str, **options: Any) -> None:
        with untouched(model), pytest.raises(TargetError, match=match):
            randlora.inject(model, r=3, **options)

    plain = ATTENTION_KINDS[0].plain
    refused(plain(), r"attn\.in_proj_weight is a weight that other code reads.*dropout=0\.1", dropout=0.1)
    refused(plain().attn, r"the model itself is a layer \(MultiheadAttention\)")
    odd = plain()
    odd.attn.in_proj_weight = nn.Parameter(torch.ones(35, 12))
    refused(odd, r"attn\.in_proj_weight has 35 rows, expected equally many for query, key and value")
    computed = plain()
    parametrize.register_parametrization(computed.attn, "in_proj_weight", nn.Identity())
    reason = r"attn\.in_proj_weight computes its weight from other parameters"
    refused(computed, reason, targets=r".*in_proj_weight", exclude=["parametrizations"])


# Files


def siglip() -> nn.Module:
    """Build a tower of transformers' SigLIP, whose pooling is an `nn.MultiheadAttention`."""
    config = transformers.SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    return reproducible(lambda: transformers.SiglipVisionModel(config))


def by_name(model: nn.Module, directory: Path) -> None:
    """Write a checkpoint that no class is known of."""
    directory.mkdir()
    safetensors.torch.save_file(model.state_dict(), directory / "model.safetensors", {"format": "pt"})


def by_class(model: nn.Module, directory: Path) -> None:
    model.save_pretrained(directory)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("build", "write", "forms"),
    [(lambda: nn.Sequential(encoder()), by_name, ("packed", "split")), (siglip, by_class, ("split", "packed"))],
    ids=["by name", "by class"],
)
def test_merging_files_gives_what_merging_in_memory_gives_and_split_projections_have_the_second_format(
    build: Callable[[], nn.Module], write: Callable[[nn.Module, Path], None], forms: Sequence[Any], tmp_path: Path
) -> None:
    write(build(), tmp_path / "base")
    model = build()
    for form in forms:
        randlora.inject(model, r=4, targets=["in_proj_weight", "out_proj"], in_proj=form, name=form)
        fill(model, form, spread=0.2, seed=len(form))
        randlora.save(model, tmp_path / form, name=form)
        assert randlora.files.inspect(tmp_path / form).config.in_proj == form
        assert randlora.files.verify(tmp_path / form, base=tmp_path / "base").passed
        header = read_shard(tmp_path / form / "adapter_model.safetensors").metadata[HEADER_KEY]
        assert f'"format_version": {2 if form == "split" else 1}' in header
        assert ("in_proj" in re.sub("in_proj_weight", "", header)) == (form == "split")
    randlora.activate(model, [*forms])
    randlora.merge(model)
    adapters = {tmp_path / form: 1.0 for form in forms}
    randlora.files.merge(adapters, tmp_path / "out", base=tmp_path / "base")
    found = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert all_bits(found) == all_bits(model.state_dict()) != all_bits(build().state_dict())
