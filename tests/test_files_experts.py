"""Adapters of experts on disk: merged into the tensors that a checkpoint has, saved, loaded, inspected, converted."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

import randlora
from randlora.errors import CheckpointError
from randlora.readers.experts import Experts
from tests.checkpoint_files import CARD_FILE
from tests.kit import adapter_values, fill, same_bits
from tests.model_directories import assert_same_tensors, contents, stored, write
from tests.test_readers_experts import EXPERTS, every_model, gpt_oss, made, mixtral


def adapted(model: nn.Module, directory: Path, **options: Any) -> Path:
    """Save an adapter of a model, and leave the model plain."""
    randlora.inject(model, **{"r": 3, "targets": EXPERTS, **options})
    randlora.save(fill(model), directory)
    randlora.eject(model)
    return directory


def checkpoint(model: nn.Module, directory: Path, *, is_sharded: bool = False) -> Path:
    """Let transformers write a model as it is when it was loaded, with some parameters in float32."""
    write(model, directory / "made")
    return write(read(directory / "made"), directory / "base", is_sharded=is_sharded, shard="2KB")


def read(directory: Path) -> nn.Module:
    """Let transformers load a model."""
    return cast("nn.Module", transformers.AutoModelForCausalLM.from_pretrained(directory))


def in_memory(base: Path, adapters: dict[Path, float], directory: Path) -> Path:
    """Load a model and adapters, merge and save: what merging on disk must equal."""
    loaded = read(base)
    for number, adapter in enumerate(adapters):
        randlora.load(loaded, adapter, name=f"adapter_{number}")
    randlora.activate(loaded, {f"adapter_{number}": factor for number, factor in enumerate(adapters.values())})
    randlora.merge(loaded)
    return write(loaded, directory)


@every_model
@pytest.mark.parametrize(
    ("experts", "dtype"), [("each", torch.bfloat16), ("shared", torch.float32)], ids=["each", "shared"]
)
def test_merging_on_disk_is_loading_merging_and_saving(
    build: Callable[[], nn.Module], experts: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = made(build, dtype=dtype)
    base = checkpoint(model, tmp_path, is_sharded=experts == "each")
    assert (len(list(base.glob("*.safetensors"))) > 4) is (experts == "each")
    adapter = adapted(model, tmp_path / "adapter", experts=experts)
    assert randlora.files.verify(adapter, base).passed
    report = randlora.files.merge(adapter, tmp_path / "out", base=base)
    assert_same_tensors(report.out, in_memory(base, {adapter: 1.0}, tmp_path / "expected"))
    before, after = stored(base), stored(report.out)
    changed = {name for name in after if not same_bits(before[name], after[name])}
    assert changed == set(report.merged)
    assert all("experts." in name for name in changed)
    assert report.replaced == ()


@pytest.mark.medium
@pytest.mark.parametrize("build", [mixtral, gpt_oss], ids=lambda build: build.__name__)
def test_adapters_of_both_forms_and_stacks_trained_with_one_add_up_as_in_memory(
    build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    model = made(build, dtype=torch.bfloat16)
    base, others = (
        checkpoint(model, tmp_path),
        {"targets": ["o_proj"], "train_also": [r"mlp.experts.down_proj", "norm"]},
    )
    trained = adapted(model, tmp_path / "trained", seed=3, **others)
    adapters = {
        trained: -1.0,
        adapted(model, tmp_path / "each"): 0.5,
        adapted(model, tmp_path / "shared", experts="shared", r=4): 2.0,
    }
    report = randlora.files.merge(adapters, tmp_path / "out", base=base)
    assert_same_tensors(report.out, in_memory(base, adapters, tmp_path / "expected"))
    alone = randlora.files.merge(trained, tmp_path / "alone", base=base)
    assert_same_tensors(alone.out, in_memory(base, {trained: 1.0}, tmp_path / "expected alone"))
    assert all(any(part in name for part in ("down_proj", "w2", "norm")) for name in alone.replaced)
    assert len(alone.replaced) > 1
    assert not set(alone.replaced) & set(alone.merged)
    again = adapted(model, tmp_path / "again", **others)
    with pytest.raises(CheckpointError, match=r"an adapter before it trained .*down_proj.* too"):
        randlora.files.merge([trained, again], tmp_path / "twice", base=base)


def test_the_tensors_of_an_expert_may_be_in_any_files_but_must_be_there_in_their_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(mixtral, dtype=torch.float32)
    base, adapter = checkpoint(model, tmp_path), adapted(model, tmp_path / "adapter")
    computed, compute = list[int](), Experts.with_updates.__func__  # type: ignore[attr-defined]

    def counted(cls: type[Experts], weight: Tensor, *args: Any) -> Tensor:
        computed.append(len(weight))
        return cast("Tensor", compute(cls, weight, *args))

    monkeypatch.setattr(Experts, "with_updates", classmethod(counted))
    expected = randlora.files.merge(adapter, tmp_path / "expected", base=base).out
    assert computed == [1] * 16  # one matrix at a time, and each once
    tensors = stored(base)
    spread = write(model, tmp_path / "spread")
    (spread / "model.safetensors").unlink()
    files: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        files.setdefault(f"model-{name.split('.')[-2]}.safetensors", {})[name] = tensor
    for file, held in files.items():
        save_file(held, spread / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    (spread / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert_same_tensors(randlora.files.merge(adapter, tmp_path / "out", base=spread).out, expected)

    lost = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    made_of = r"model\.layers\.1\.mlp\.experts\.gate_up_proj is made of .*experts\.0\.w1\.weight, .* and \d more when"
    for changed in (
        {name: tensor for name, tensor in tensors.items() if name != lost},
        {name: tensor for name, tensor in tensors.items() if "1.block_sparse_moe.experts.2." not in name},
        tensors | {lost: tensors[lost][1:].clone()},
    ):
        save_file(changed, base / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=rf"{made_of} it is loaded, and .*merge in memory"):
            randlora.files.merge(adapter, tmp_path / "none", base=base)
        assert not (tmp_path / "none").exists()
        assert not randlora.files.verify(adapter, base).passed


def test_save_and_its_card_say_that_peft_has_no_place_for_experts(tmp_path: Path) -> None:
    model = made(mixtral, dtype=torch.float32)
    randlora.inject(model, r=3, targets=[*EXPERTS, "o_proj"])
    (note,) = randlora.save(fill(model), tmp_path).notes
    assert "adapts linear layers only, not model.layers.0.mlp.experts.gate_up_proj" in note
    assert "o_proj" not in note
    card = (tmp_path / CARD_FILE).read_text(encoding="utf-8")
    assert f"- {note}" in card
    assert "PeftModel" not in card


@every_model
def test_inspecting_and_verifying_count_matrices(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    model, experts = made(build, dtype=torch.float32), "shared" if build is mixtral else "each"
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
    heading = next(line for line in str(summary).splitlines() if line.split()[:1] == ["layer"])
    assert ("matrices" in heading) is (experts == "each")
    with_base = randlora.files.inspect(adapter, checkpoint(made(build, dtype=torch.float32), tmp_path))
    assert with_base.layers == summary.layers


def test_without_transformers_a_stack_is_found_by_its_name_alone_and_a_prefix_may_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = made(mixtral, dtype=torch.float32)
    one_by_one, of_bare = checkpoint(model, tmp_path / "one by one"), adapted(model.model, tmp_path / "of bare")
    oss: Any = made(gpt_oss, dtype=torch.float32)  # one of its stacks is of squares, which do not show the layout
    base, bare = checkpoint(oss, tmp_path), write(oss.model, tmp_path / "bare")
    adapter, of_mixtral = adapted(oss, tmp_path / "adapter"), adapted(model, tmp_path / "of mixtral")
    expected = contents(randlora.files.merge(adapter, tmp_path / "expected", base=base).out)
    parts = contents(randlora.files.merge(of_mixtral, tmp_path / "parts", base=one_by_one).out)
    with pytest.raises(CheckpointError, match="differ by the prefix 'model'"):
        randlora.files.merge(of_bare, tmp_path / "out", base=one_by_one)
    assert contents(randlora.files.merge(of_bare, tmp_path / "out", base=one_by_one, prefix="model").out) == parts

    monkeypatch.setitem(sys.modules, "transformers", None)
    assert contents(randlora.files.merge(adapter, tmp_path / "again", base=base).out) == expected
    assert randlora.files.verify(adapter, base).passed
    with pytest.raises(CheckpointError, match=r"no layer model\.layers\.0\.mlp\.experts\.gate_up_proj under this name"):
        randlora.files.merge(of_mixtral, tmp_path / "none", base=one_by_one)
    with pytest.raises(CheckpointError, match="differ by the prefix 'model'"):
        randlora.files.merge(adapter, tmp_path / "none", base=bare)
    assert len(randlora.files.merge(adapter, tmp_path / "merged", base=bare, prefix="model").merged) == 4
