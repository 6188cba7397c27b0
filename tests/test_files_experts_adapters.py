"""Files of adapters of experts: saved, loaded, inspected, converted, and fitted to files without transformers."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import nn

import randlora
from randlora.errors import CheckpointError
from tests.checkpoint_files import CARD_FILE, edit_tensors, read_tensors
from tests.kit import adapter_values, all_bits, fill
from tests.model_directories import assert_same_tensors, contents
from tests.test_experts import EXPERTS, IDS, each_or_shared, every_model, gpt_oss, made, mixtral
from tests.test_files_experts import adapted, checkpoint

TRANSPOSED = "model.layers.0.mlp.experts.down_proj"


@every_model
@each_or_shared
@pytest.mark.parametrize("bases", ["seed", "stored"])
def test_what_is_saved_is_loaded_bit_for_bit(
    build: Callable[[], nn.Module], experts: Any, bases: Any, tmp_path: Path
) -> None:
    model = made(build, dtype=torch.float32)
    randlora.inject(model, r=3, targets=[*EXPERTS, "o_proj"], experts=experts, train_also=["norm"])
    fill(model)
    randlora.save(model, tmp_path, bases=bases)
    fresh = made(build, dtype=torch.float32)
    report = randlora.load(fresh, tmp_path)
    assert report.targets == randlora.adapters(model)[0].targets
    assert randlora.adapters(fresh)[0].config.experts == experts
    assert all_bits(adapter_values(fresh)) == all_bits(adapter_values(model))
    assert all_bits({"": fresh(IDS).logits}) == all_bits({"": model(IDS).logits})
    randlora.save(fresh, tmp_path / "again", bases=bases)
    assert all_bits(read_tensors(tmp_path / "again")[0]) == all_bits(read_tensors(tmp_path)[0])
    header = json.loads(read_tensors(tmp_path)[1]["randlora"])
    assert header["format_version"] == 2
    assert header["kinds"] == {fqn: "experts" for fqn in report.targets if "experts" in fqn}
    assert (header["transposed"] == list(header["kinds"])) is (build is gpt_oss)


@pytest.mark.filterwarnings("ignore:Specified to not save basis_A and basis_B:UserWarning")
def test_save_and_its_card_say_that_peft_has_no_place_for_experts(tmp_path: Path) -> None:
    model = made(mixtral, dtype=torch.float32)
    randlora.inject(model, r=3, targets=[*EXPERTS, "o_proj"])
    (note,) = randlora.save(fill(model), tmp_path).notes
    assert "adapts linear layers only, not " in note
    assert all(f"model.layers.{layer}.mlp.experts.{name}" in note
               for layer in (0, 1) for name in ("gate_up_proj", "down_proj"))  # fmt: skip
    assert "o_proj" not in note
    card = (tmp_path / CARD_FILE).read_text(encoding="utf-8")
    assert f"- {note}" in card
    assert "PeftModel" not in card
    randlora.eject(model)
    adapted(model, tmp_path / "experts")
    with pytest.raises(ValueError, match="No layers types compatible"):
        PeftModel.from_pretrained(model, tmp_path / "experts")


@every_model
@each_or_shared
def test_inspecting_and_verifying_count_matrices(build: Callable[[], nn.Module], experts: Any, tmp_path: Path) -> None:
    model = made(build, dtype=torch.float32)
    adapter = adapted(model, tmp_path / "adapter", experts=experts, targets=[*EXPERTS, "o_proj"])
    assert randlora.files.verify(adapter).passed
    randlora.load(model, adapter)
    summary = randlora.files.inspect(adapter)
    assert {layer.matrices for layer in summary.layers} == ({1, 4} if experts == "each" else {1})
    assert summary.trainable_parameters == sum(part.numel() for part in adapter_values(model).values())
    for layer in summary.layers:
        update = randlora.delta_weight(model, layer.fqn).detach().double()
        assert (layer.out_features, layer.in_features) == tuple(update.shape[-2:])
        assert layer.frobenius == pytest.approx(float(update.norm()), rel=1e-5)
        assert layer.spectral == pytest.approx(float(torch.linalg.svdvals(update).max()), rel=1e-5)
    lines = str(summary).splitlines()
    heading = next(line for line in lines if line.split()[:1] == ["layer"])
    assert ("matrices" in heading) is (experts == "each")
    with_base = randlora.files.inspect(adapter, checkpoint(made(build, dtype=torch.float32), tmp_path))
    assert with_base.layers == summary.layers


def test_bases_of_no_seed_are_taken_from_the_file(tmp_path: Path) -> None:
    model = made(mixtral, dtype=torch.float32)
    base = checkpoint(model, tmp_path)
    randlora.inject(model, r=3, targets=EXPERTS)
    randlora.save(fill(model), tmp_path / "adapter", bases="stored")
    randlora.eject(model)
    tensors, _ = read_tensors(tmp_path / "adapter")
    edit_tensors(tmp_path / "adapter", {"base_model.randlora_A": tensors["base_model.randlora_A"] * 0.5})
    assert [bases.source for bases in randlora.files.inspect(tmp_path / "adapter").bases] == ["file"]
    merged = randlora.files.merge(tmp_path / "adapter", tmp_path / "out", base=base).out
    loaded = transformers.AutoModelForCausalLM.from_pretrained(base)
    randlora.load(loaded, tmp_path / "adapter")
    randlora.merge(loaded)
    loaded.save_pretrained(tmp_path / "expected")
    assert_same_tensors(merged, tmp_path / "expected")


@each_or_shared
def test_without_transformers_a_stack_is_found_by_its_name_in_the_layout_that_the_adapter_states(
    experts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(gpt_oss, dtype=torch.float32)  # one of its stacks is of squares, which do not show the layout
    base = checkpoint(model, tmp_path)
    adapter = adapted(model, tmp_path / "adapter", experts=experts)
    expected = contents(randlora.files.merge(adapter, tmp_path / "expected", base=base).out)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert contents(randlora.files.merge(adapter, tmp_path / "out", base=base).out) == expected
    assert randlora.files.verify(adapter, base).passed


def test_without_transformers_a_stack_under_other_names_is_an_error_and_a_prefix_may_be_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = made(mixtral, dtype=torch.float32)
    base = checkpoint(model, tmp_path)
    adapter = adapted(model, tmp_path / "adapter")
    oss: Any = made(gpt_oss, dtype=torch.float32)
    of_whole = adapted(oss, tmp_path / "of whole")
    oss.model.save_pretrained(tmp_path / "bare")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match=r"no layer model\.layers\.0\.mlp\.experts\.gate_up_proj under this name"):
        randlora.files.merge(adapter, tmp_path / "out", base=base)
    with pytest.raises(CheckpointError, match="differ by the prefix 'model'"):
        randlora.files.merge(of_whole, tmp_path / "out", base=tmp_path / "bare")
    assert len(randlora.files.merge(of_whole, tmp_path / "out", base=tmp_path / "bare", prefix="model").merged) == 4


def test_a_prefix_may_differ_for_experts_that_files_hold_one_by_one(tmp_path: Path) -> None:
    model: Any = made(mixtral, dtype=torch.float32)
    base = checkpoint(model, tmp_path)
    adapter = adapted(model, tmp_path / "adapter")
    of_bare = adapted(model.model, tmp_path / "of bare")
    expected = contents(randlora.files.merge(adapter, tmp_path / "expected", base=base).out)
    with pytest.raises(CheckpointError, match="differ by the prefix 'model'"):
        randlora.files.merge(of_bare, tmp_path / "out", base=base)
    assert contents(randlora.files.merge(of_bare, tmp_path / "out", base=base, prefix="model").out) == expected


@pytest.mark.medium
@every_model
@each_or_shared
def test_experts_train_so_that_only_adapters_move_and_go_the_whole_way(
    build: Callable[[], nn.Module], experts: Any, tmp_path: Path
) -> None:
    model = made(build, dtype=torch.float32).train()
    base = all_bits(model.state_dict())
    randlora.inject(model, r=3, targets=EXPERTS, experts=experts)
    before = all_bits(adapter_values(model))
    optimizer = torch.optim.AdamW(randlora.trainable_parameters(model), lr=2e-2)
    losses = []
    for _ in range(12):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    after = all_bits(adapter_values(model))
    assert all(after[name] != before[name] for name in before)
    plain = {name: value for name, value in all_bits(model.state_dict()).items() if "randlora" not in name}
    assert plain == base
    output = model.eval()(IDS).logits
    randlora.save(model, tmp_path / "adapter")
    with randlora.merged(model):
        torch.testing.assert_close(model(IDS).logits, output, rtol=1e-3, atol=1e-3)
    randlora.eject(model)
    assert all_bits(model.state_dict()) == base
    assert not torch.allclose(model(IDS).logits, output, atol=1e-2)
    randlora.load(model, tmp_path / "adapter")
    assert all_bits({"": model(IDS).logits}) == all_bits({"": output})
