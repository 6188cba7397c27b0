"""What goes wrong with several adapters, quantized layers and damaged files in PEFT 0.21.2, and does not here.

Each test holds for us first. Then it looks whether the peer still does otherwise, by what it does and not by its
version: where it no longer does, the test is skipped, and its claim about PEFT wants deleting.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, RandLoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import randlora
from randlora.checkpoint.format import CONFIG_FILE, TENSORS_FILE
from randlora.errors import CheckpointError, MergeError
from tests.models import LLAMA, assert_untouched, outputs, snapshot
from tests.peer import (
    ALPHA,
    THEIR_WARNINGS,
    R,
    copy_values,
    fill,
    in_ours,
    in_peft,
    our_model,
    peft_config,
    peft_model,
    their_values,
)
from tests.quantized import of_4_bits, of_8_bits

pytestmark = THEIR_WARNINGS
INPUTS = LLAMA.inputs()


def expect_in_peft(*, fault: bool) -> None:
    """Skip where the peer has been mended."""
    if not fault:
        pytest.skip("the PEFT installed does not have this fault")


def changes(model: nn.Module, expected: Tensor) -> bool:
    """Whether a model fails, or no longer gives what it gave."""
    try:
        return not torch.equal(outputs(model, INPUTS), expected)
    except RuntimeError:
        return True


def fails(call: Callable[[], object], error: type[Exception]) -> bool:
    try:
        call()
    except error:
        return True
    return False


@pytest.mark.parametrize("r", [R // 2, 2 * R], ids=["smaller", "larger"])
def test_a_second_adapter_of_another_rank_leaves_the_first_alone(r: int) -> None:
    ours = our_model(LLAMA)
    expected = outputs(ours, INPUTS)
    randlora.inject(ours, r, targets=LLAMA.targets, name="b")
    assert torch.equal(outputs(ours, INPUTS), expected)
    randlora.activate(ours, "b")
    assert torch.equal(outputs(ours, INPUTS), outputs(LLAMA.build(), INPUTS))

    theirs = peft_model(LLAMA)
    expected = outputs(theirs, INPUTS)
    fails(lambda: theirs.add_adapter("b", peft_config(LLAMA, r=r)), ValueError)
    expect_in_peft(fault=changes(theirs, expected))


def test_loading_an_adapter_with_other_bases_leaves_the_first_alone(tmp_path: Path) -> None:
    peft_model(LLAMA, "dense").save_pretrained(tmp_path / "dense")
    peft_model(LLAMA, "sparse").save_pretrained(tmp_path / "sparse")

    ours = in_ours(LLAMA, tmp_path / "dense")
    expected = outputs(ours, INPUTS)
    randlora.load(ours, tmp_path / "sparse", name="sparse")
    assert torch.equal(outputs(ours, INPUTS), expected)
    randlora.activate(ours, "sparse")
    assert torch.equal(outputs(ours, INPUTS), outputs(in_ours(LLAMA, tmp_path / "sparse"), INPUTS))

    theirs = in_peft(LLAMA, tmp_path / "dense")
    expected = outputs(theirs, INPUTS)
    theirs.load_adapter(tmp_path / "sparse", "sparse")
    expect_in_peft(fault=changes(theirs, expected))


def test_a_sparse_adapter_beside_a_dense_one_gets_sparse_bases() -> None:
    ours = our_model(LLAMA, "dense")
    randlora.inject(
        ours,
        R,
        alpha=ALPHA,
        targets=LLAMA.targets,
        basis="sparse",
        name="b",
        active=True,
        trainable=True,
    )
    assert [info.spec.kind for info in randlora.adapters(ours)] == ["dense", "sparse"]
    fill(ours)
    alone = our_model(LLAMA, "sparse")
    fqn = "model.layers.1.mlp.up_proj"
    for name in ("lambda", "gamma"):
        with torch.no_grad():
            alone.get_parameter(f"{fqn}.randlora_{name}.default").copy_(ours.get_parameter(f"{fqn}.randlora_{name}.b"))
    assert torch.equal(randlora.delta_weight(ours, fqn, name="b"), randlora.delta_weight(alone, fqn))

    theirs = peft_model(LLAMA, "dense")
    theirs.add_adapter("b", peft_config(LLAMA, "sparse"))
    expect_in_peft(fault=not (theirs.base_model.randlora_A["b"] == 0).any())


@pytest.mark.parametrize("order", [("narrow", "wide"), ("wide", "narrow")], ids=" then ".join)
def test_adapters_of_different_layers_load_together_in_either_order(order: tuple[str, str], tmp_path: Path) -> None:
    targets = {"narrow": ["q_proj"], "wide": ["q_proj", "down_proj"]}
    for name in order:
        peft_model(LLAMA, target_modules=targets[name]).save_pretrained(tmp_path / name)

    ours = LLAMA.build()
    for name in order:
        randlora.load(ours, tmp_path / name, name=name)
    for name in order:
        randlora.activate(ours, name)
        assert torch.equal(outputs(ours, INPUTS), outputs(in_ours(LLAMA, tmp_path / name), INPUTS))

    theirs = in_peft(LLAMA, tmp_path / order[0])
    expect_in_peft(fault=fails(lambda: theirs.load_adapter(tmp_path / order[1], order[1]), RuntimeError))


def test_an_adapter_trained_beside_a_larger_one_reloads_alone(tmp_path: Path) -> None:
    ours = our_model(LLAMA)
    randlora.inject(ours, R, targets=["v_proj"], name="small", active=True, trainable=True)
    fill(ours)
    randlora.save(ours, tmp_path / "ours", name="small")
    assert torch.equal(outputs(in_ours(LLAMA, tmp_path / "ours"), INPUTS), outputs(ours, INPUTS))

    theirs = peft_model(LLAMA, save_projection=False)
    theirs.add_adapter("small", peft_config(LLAMA, target_modules=["v_proj"], save_projection=False))
    theirs.set_adapter("small")
    fill(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    expect_in_peft(fault=changes(in_peft(LLAMA, tmp_path / "theirs" / "small"), outputs(theirs, INPUTS)))


def test_unmerging_restores_every_bit_of_a_bfloat16_weight() -> None:
    key = "model.layers.0.self_attn.q_proj.weight"
    ours = LLAMA.build().to(torch.bfloat16)
    randlora.inject(ours, R, targets=LLAMA.targets)
    fill(ours)
    before = ours.get_parameter(key).detach().clone()
    randlora.merge(ours, reversible=True)
    assert not torch.equal(ours.get_parameter(key), before)
    randlora.unmerge(ours)
    assert torch.equal(ours.get_parameter(key), before)

    theirs = peft_model(LLAMA, dtype=torch.bfloat16)
    theirs.merge_adapter()
    theirs.unmerge_adapter()
    expect_in_peft(
        fault=not torch.equal(theirs.base_model.model.get_parameter(key.replace("weight", "base_layer.weight")), before)
    )


def test_a_merge_that_would_give_nan_in_the_last_layer_changes_no_layer() -> None:
    last = "model.layers.1.mlp.down_proj"
    ours = our_model(LLAMA)
    spoil(ours.get_parameter(f"{last}.randlora_lambda.default"))
    before = snapshot(ours)
    with pytest.raises(MergeError, match=f"the merged weight of {last} would not be finite"):
        randlora.merge(ours)
    assert_untouched(ours, before)

    theirs = peft_model(LLAMA)
    spoil(theirs.base_model.model.get_parameter(f"{last}.randlora_lambda.default"))
    first = theirs.base_model.model.get_submodule("model.layers.0.self_attn.q_proj").base_layer
    weight = first.weight.detach().clone()
    fails(lambda: theirs.merge_adapter(safe_merge=True), ValueError)
    expect_in_peft(fault=not torch.equal(first.weight, weight))


def spoil(parameter: Tensor) -> None:
    with torch.no_grad():
        parameter[0, 0] = float("nan")


def test_a_file_whose_key_was_edited_is_refused(tmp_path: Path) -> None:
    randlora.save(our_model(LLAMA), tmp_path / "ours", bases="seed")
    edit_key(tmp_path / "ours")
    model = LLAMA.build()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match="projection_prng_key=4, the tensors were saved with 0"):
        randlora.load(model, tmp_path / "ours")
    assert_untouched(model, before)

    theirs = peft_model(LLAMA, save_projection=False)
    theirs.save_pretrained(tmp_path / "theirs")
    edit_key(tmp_path / "theirs")
    expect_in_peft(fault=changes(in_peft(LLAMA, tmp_path / "theirs"), outputs(theirs, INPUTS)))


def edit_key(directory: Path) -> None:
    fields = json.loads((directory / CONFIG_FILE).read_text())
    (directory / CONFIG_FILE).write_text(json.dumps(fields | {"projection_prng_key": 4}))


def test_a_file_that_lost_one_tensor_is_refused(tmp_path: Path) -> None:
    theirs = peft_model(LLAMA)
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / TENSORS_FILE)
    del tensors["base_model.model.model.layers.1.mlp.up_proj.randlora_lambda"]
    save_file(tensors, tmp_path / TENSORS_FILE)
    model = LLAMA.build()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj has one of randlora_lambda and randlora_gamma"):
        randlora.load(model, tmp_path)
    assert_untouched(model, before)

    expect_in_peft(fault=changes(in_peft(LLAMA, tmp_path), outputs(theirs, INPUTS)))


def test_the_bases_are_written_once(tmp_path: Path) -> None:
    randlora.save(our_model(LLAMA), tmp_path / "ours", bases="stored")
    assert len(copies_of_the_large_basis(tmp_path / "ours")) == 1

    theirs = peft_model(LLAMA)
    theirs.save_pretrained(tmp_path / "theirs")
    expect_in_peft(fault=len(copies_of_the_large_basis(tmp_path / "theirs")) == 1 + len(list(their_values(theirs))))


def copies_of_the_large_basis(directory: Path) -> list[str]:
    return [key for key in load_file(directory / TENSORS_FILE) if key.endswith("randlora_B")]


def quantized_layer(out_features: int, bits: int) -> Any:
    """Quantize a layer of 64 inputs, in a model that says so, which is how PEFT knows."""
    model: Any = nn.Sequential(of_4_bits(64, out_features) if bits == 4 else of_8_bits(64, out_features)).eval()
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = bits == 4, bits == 8
    return model


def quantized_in_both(out_features: int, bits: int) -> tuple[nn.Module, PeftModel]:
    """Build the same quantized layer with the same adapter, ours and PEFT's.

    The rank divides 64, or PEFT's merge would raise for square layers of 8 bits too.
    """
    config = RandLoraConfig(r=8, randlora_alpha=ALPHA, target_modules=["0"])
    torch.manual_seed(0)
    theirs = get_peft_model(quantized_layer(out_features, bits), config).eval()
    fill(theirs)
    torch.manual_seed(0)
    ours = quantized_layer(out_features, bits)
    randlora.inject(ours, 8, alpha=ALPHA, targets=["0"])
    copy_values(theirs, ours)
    return ours, theirs


def lost_by_merging(model: nn.Module, merge: Callable[[], object]) -> float:
    """Measure how far merging moves a model's outputs, as a share of them; infinite where it fails."""
    x = torch.randn(100, 64)
    expected = outputs(model, {"input": x})
    try:
        merge()
        return float((outputs(model, {"input": x}) - expected).norm() / expected.norm())
    except RuntimeError:
        return float("inf")


@pytest.mark.filterwarnings("ignore:Merge RandLora module to 8-bit linear may get different:UserWarning")
@pytest.mark.filterwarnings("ignore:Merge RandLora module to 4-bit linear may get different:UserWarning")
@pytest.mark.parametrize("out_features", [64, 128], ids=["square", "tall"])
@pytest.mark.parametrize(("bits", "most"), [(8, 0.03), (4, 0.25)])
def test_merging_into_a_quantized_layer_loses_no_more_than_rounding_does(
    bits: int, most: float, out_features: int
) -> None:
    ours, theirs = quantized_in_both(out_features, bits)
    x = {"input": torch.randn(9, 64)}
    torch.testing.assert_close(outputs(ours, x), outputs(theirs, x), rtol=1e-3, atol=1e-3)
    assert 0 < lost_by_merging(ours, lambda: randlora.merge(ours)) < most

    lost = lost_by_merging(theirs, theirs.merge_adapter)
    expect_in_peft(fault=0.8 < lost < 2 if (bits, out_features) == (8, 64) else lost == float("inf"))


def test_a_second_adapter_of_a_quantized_model_does_not_wrap_the_first() -> None:
    ours, theirs = quantized_in_both(64, 8)
    randlora.inject(ours, 8, targets=["0"], name="b")
    assert not any("base_layer.base_layer" in key for key in ours.state_dict())

    theirs.add_adapter("b", RandLoraConfig(r=8, randlora_alpha=ALPHA, target_modules=["0"]))
    expect_in_peft(fault=any("base_layer.base_layer" in key for key in theirs.state_dict()))
