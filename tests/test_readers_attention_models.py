"""Attention inside of models: torch's encoders with their fast paths, open_clip's, checkpoints on disk, refusals."""

import copy
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers
from accelerate import cpu_offload  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn.utils import parametrize

import randlora
from randlora.checkpoint.header import HEADER_KEY
from randlora.disk.formats import read_shard
from randlora.errors import TargetError
from tests.attention_kinds import ATTENTION_KINDS, Attending, Subclass
from tests.kit import all_bits, fill, same_bits, untouched
from tests.laws import assert_close
from tests.models import clip, clip_attention, reproducible

nested_tensors = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
X = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(1))
PADDING = torch.zeros(3, 7, dtype=torch.bool)
PADDING[1, 5:] = True


def encoder(**options: Any) -> nn.TransformerEncoder:
    """Build an encoder of two layers."""

    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, dropout=0.0, **options)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not options)

    made = reproducible(build)
    assert isinstance(made, nn.TransformerEncoder)
    return made


def decoder() -> nn.Module:
    """Build a decoder layer, whose second attention has the encoder's output for keys and values."""
    return reproducible(lambda: nn.TransformerDecoderLayer(16, 4, 24, batch_first=True, dropout=0.0))


def merged_copy(model: nn.Module) -> nn.Module:
    """Return a plain copy with the weights that the adapters make."""
    twin = copy.deepcopy(model)
    randlora.merge(twin)
    return twin


@nested_tensors
@pytest.mark.parametrize("options", [{}, {"norm_first": True}], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize(
    "targets",
    [["in_proj_weight"], ["out_proj"], ["layers.1.self_attn"], ["linear1"], "all-linear"],
    ids=str,
)
@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_an_encoder_computes_as_one_whose_weights_were_changed(
    targets: Any, options: dict[str, Any], padding: Tensor | None, training: bool
) -> None:
    model, x = encoder(**options).train(training).double(), X.double()  # its norms multiply roundings
    base = copy.deepcopy(model)
    randlora.inject(model, r=4, targets=targets, in_proj="split")
    fill(model, spread=0.2)
    kept = slice(None) if padding is None else ~padding
    with torch.set_grad_enabled(training):
        output = model(x, src_key_padding_mask=padding)[kept]
        expected = merged_copy(model)(x, src_key_padding_mask=padding)[kept]
        assert_close(output, expected, torch.float64)
        assert (output - base(x, src_key_padding_mask=padding)[kept]).abs().max() > 0.01


def test_an_encoder_in_evaluation_gives_gradients_to_every_adapter() -> None:
    model = encoder()
    randlora.inject(model, r=4)
    fill(model)
    model(X, src_key_padding_mask=PADDING)[~PADDING].square().sum().backward()
    gradients = [parameter.grad for parameter in randlora.trainable_parameters(model)]
    assert len(gradients) == 2 * 2 * 4
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


@nested_tensors
@pytest.mark.parametrize("targets", [["linear1"], ["layers.1.self_attn"]], ids=str)
def test_where_torch_takes_nested_tensors_for_a_gradient_it_says_so_and_they_can_be_turned_off(targets: Any) -> None:
    model = encoder()
    randlora.inject(model, r=4, targets=targets)
    fill(model)
    with pytest.raises(AssertionError, match="does not support NestedTensor outside of its fast path"):
        model(X, src_key_padding_mask=PADDING)
    model.use_nested_tensor = False
    model(X, src_key_padding_mask=PADDING)[~PADDING].square().sum().backward()
    assert all(parameter.grad is not None for parameter in randlora.trainable_parameters(model))


def test_attention_across_sequences_is_adapted() -> None:
    model, memory = decoder(), X.flip(1)
    base = copy.deepcopy(model)
    report = randlora.inject(model, r=4, targets=["multihead_attn"])
    assert report.targets == ("multihead_attn.in_proj_weight", "multihead_attn.out_proj")
    fill(model, spread=0.2)
    assert_close(model(X, memory), merged_copy(model)(X, memory), torch.float32)
    assert (model(X, memory) - base(X, memory)).abs().max() > 0.01


# open_clip


def clip_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(2, 3, 16, 16, generator=generator)
    return {"image": images, "text": torch.randint(1, 40, (2, 8), generator=generator)}


@pytest.mark.parametrize("in_proj", ["packed", "split"])
def test_both_encoders_of_a_clip_train_and_merge(in_proj: Any) -> None:
    model, inputs = clip(), clip_inputs()
    base = copy.deepcopy(model)
    report = randlora.inject(model, r=6, targets=["in_proj_weight", "c_fc", "c_proj"], in_proj=in_proj)
    assert len(report.targets) == 2 * 2 * 3
    fill(model, spread=0.2)
    found, plain = model(**inputs), base(**inputs)
    for place in (0, 1):
        assert (found[place] - plain[place]).abs().max() > 1e-3
    (found[0] * found[1]).sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in randlora.trainable_parameters(model))  # type: ignore[union-attr]
    assert all(parameter.grad is None for fqn, parameter in model.named_parameters() if "randlora" not in fqn)
    twin = merged_copy(model)
    assert {type(module) for module in twin.modules()} == {type(module) for module in base.modules()}
    for place, expected in enumerate(twin(**inputs)):
        assert_close(found[place], expected, torch.float32)


def test_open_clips_own_attention_is_adapted_too() -> None:
    model = nn.ModuleDict({"attn": clip_attention()})
    base = copy.deepcopy(model)
    report = randlora.inject(model, r=4, in_proj="split")
    assert report.targets == ("attn.in_proj_weight", "attn.out_proj")
    assert torch.equal(model["attn"](X), base["attn"](X))
    fill(model, spread=0.2)
    assert_close(model["attn"](X), merged_copy(model)["attn"](X), torch.float32)  # type: ignore[index]
    assert (model["attn"](X) - base["attn"](X)).abs().max() > 0.01


# Refusals


def refused(model: nn.Module, match: str, **options: Any) -> None:
    with untouched(model), pytest.raises(TargetError, match=match):
        randlora.inject(model, r=3, **options)


def test_what_cannot_be_adapted_is_refused_with_the_reason() -> None:
    plain = ATTENTION_KINDS[0].plain
    refused(plain(), r"attn\.in_proj_weight is a weight that other code reads.*dropout=0\.1", dropout=0.1)
    refused(plain().attn, r"the model itself is a layer \(MultiheadAttention\)")
    odd = plain()
    odd.attn.in_proj_weight = nn.Parameter(torch.ones(35, 12))
    refused(odd, r"attn\.in_proj_weight has 35 rows, expected equally many for query, key and value")
    computed = plain()
    parametrize.register_parametrization(computed.attn, "in_proj_weight", nn.Identity())
    refused(
        computed,
        r"attn\.in_proj_weight computes its weight from other parameters",
        targets=r".*in_proj_weight",
        exclude=["parametrizations"],
    )
    tied = nn.ModuleDict({"first": plain(), "second": plain()})
    tied["second"].attn.in_proj_weight = tied["first"].attn.in_proj_weight  # type: ignore[union-attr]
    refused(
        tied,
        r"the weight of first\.attn\.in_proj_weight is tied to second\.attn\.in_proj_weight",
        targets=["in_proj_weight"],
    )


@pytest.mark.parametrize("kind", [nn.MultiheadAttention, Subclass])
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_in_the_place_of_out_proj_that_attention_never_calls_is_adapted_as_it_is_read(
    kind: type[nn.MultiheadAttention], training: bool
) -> None:
    attention = kind(12, 2, dtype=torch.float64)
    attention.out_proj = nn.Linear(12, 12, dtype=torch.float64)  # type: ignore[assignment]
    model, x = Attending(attention).train(training), torch.randn(2, 5, 12, dtype=torch.float64)
    base = model(x)
    randlora.inject(model, r=3, targets=["out_proj"])
    fill(model)
    adapted = model(x)
    assert (adapted - base).abs().max() > 0.01
    adapted.sum().backward()
    assert all(each.grad is not None and each.grad.any() for each in randlora.trainable_parameters(model))
    randlora.merge(model)
    torch.testing.assert_close(model(x), adapted)


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


@pytest.mark.parametrize("forms", [["packed"], ["split"], ["packed", "split"], ["split", "packed"]], ids="-".join)
@pytest.mark.parametrize(
    ("build", "write"), [(lambda: nn.Sequential(encoder()), by_name), (siglip, by_class)], ids=["by name", "by class"]
)
def test_merging_files_gives_what_merging_in_memory_gives(
    build: Callable[[], nn.Module],
    write: Callable[[nn.Module, Path], None],
    forms: Sequence[Any],
    tmp_path: Path,
) -> None:
    write(build(), tmp_path / "base")
    model = build()
    for form in forms:
        randlora.inject(model, r=4, targets=["in_proj_weight", "out_proj"], in_proj=form, name=form)
        fill(model, form, spread=0.2, seed=len(form))
        randlora.save(model, tmp_path / form, name=form)
        inspected = randlora.files.inspect(tmp_path / form)
        assert inspected.config.in_proj == form
        assert randlora.files.verify(tmp_path / form, base=tmp_path / "base").passed
    randlora.activate(model, [*forms])
    randlora.merge(model)
    adapters = {tmp_path / form: 1.0 for form in forms}
    randlora.files.merge(adapters, tmp_path / "out", base=tmp_path / "base")
    found = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name, value in build().state_dict().items() if not same_bits(value, found[name])}
    assert {name.rsplit("_", 1)[0].rsplit(".", 1)[-1] for name in changed} >= {"in_proj"}
    assert all_bits(found) == all_bits(model.state_dict())


def test_a_file_says_that_peft_leaves_out_what_attention_reads(tmp_path: Path) -> None:
    model = ATTENTION_KINDS[0].plain(torch.float32)
    base, x = copy.deepcopy(model).eval(), ATTENTION_KINDS[0].inputs(torch.float32)[0]
    randlora.inject(model, r=3, targets=["out_proj"])
    fill(model, spread=0.2)
    notes = randlora.save(model, tmp_path).notes
    assert any("PEFT cannot load this adapter" in note and "attn.out_proj (attention)" in note for note in notes)
    expected = base(x)
    with pytest.warns(UserWarning, match="basis_A"):
        theirs = peft.PeftModel.from_pretrained(base, str(tmp_path))
    assert_close(theirs(x), expected, torch.float32)
    randlora.inject(linear := nn.Sequential(nn.Linear(4, 4)), r=2)
    assert randlora.save(fill(linear), tmp_path / "linear", bases="stored").notes == ()


@pytest.mark.parametrize(("in_proj", "version"), [("packed", 1), ("split", 2)])
def test_only_a_split_projection_needs_the_second_format(in_proj: Any, version: int, tmp_path: Path) -> None:
    model = ATTENTION_KINDS[0].plain()
    randlora.inject(model, r=3, in_proj=in_proj)
    randlora.save(model, tmp_path)
    header = read_shard(tmp_path / "adapter_model.safetensors").metadata[HEADER_KEY]
    assert f'"format_version": {version}' in header
    assert ("in_proj" in re.sub("in_proj_weight", "", header)) == (version == 2)


# accelerate


def test_accelerate_brings_in_what_it_offloaded() -> None:
    kind = ATTENTION_KINDS[0]
    model = kind.adapted(torch.float32)
    expected = model(*kind.inputs(torch.float32))
    classes = ["MultiheadAttention", type(model.attn).__name__]  # it reads `out_proj.weight` and calls no `out_proj`
    cpu_offload(model, "cpu", preload_module_classes=classes)
    assert model.attn._parameters["in_proj_weight"].is_meta  # type: ignore[union-attr]
    assert_close(model(*kind.inputs(torch.float32)), expected, torch.float32)
