"""Adapters of experts on disk: merged into the tensors that a checkpoint has, saved, loaded, inspected, converted."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

import randlora
from randlora.errors import CheckpointError
from randlora.readers.experts import Experts
from randlora.targets.census import Census
from tests.checkpoint_files import CARD_FILE, edit_tensors, read_tensors
from tests.kit import adapter_values, fill, same_bits
from tests.model_directories import assert_same_tensors, contents, stored, write
from tests.test_readers_experts import EXPERTS, each_or_shared, every_model, gpt_oss, made, mixtral
from tests.transformers_zoo import TASKS, classes, tiny

LEAST = {"causal LM": 35, "sequence classification": 12}
"""How many classes of a task have experts, at least."""


def adapted(model: nn.Module, directory: Path, **options: Any) -> Path:
    """Save an adapter of a model, and leave the model plain."""
    randlora.inject(model, **{"r": 3, "targets": EXPERTS, **options})
    fill(model)
    randlora.save(model, directory)
    randlora.eject(model)
    return directory


def read(directory: Path) -> nn.Module:
    """Let transformers load a model."""
    return cast("nn.Module", transformers.AutoModelForCausalLM.from_pretrained(directory))


def checkpoint(model: nn.Module, directory: Path, *, is_sharded: bool = False) -> Path:
    """Let transformers write a model as it is when it was loaded, with some parameters in float32."""
    write(model, directory / "made")
    return write(read(directory / "made"), directory / "base", is_sharded=is_sharded, shard="2KB")


def in_memory(base: Path, adapters: dict[Path, float], directory: Path) -> Path:
    """Load a model and adapters, merge and save: what merging on disk must equal."""
    loaded = read(base)
    for number, adapter in enumerate(adapters):
        randlora.load(loaded, adapter, name=f"adapter_{number}")
    randlora.activate(loaded, {f"adapter_{number}": factor for number, factor in enumerate(adapters.values())})
    randlora.merge(loaded)
    return write(loaded, directory)


@every_model
@each_or_shared
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.medium), torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_sharded", [False, True], ids=["one file", "many files"])
def test_merging_on_disk_is_loading_merging_and_saving(
    build: Callable[[], nn.Module], experts: Any, dtype: torch.dtype, is_sharded: bool, tmp_path: Path
) -> None:
    model = made(build, dtype=dtype)
    base = checkpoint(model, tmp_path, is_sharded=is_sharded)
    assert (len(list(base.glob("*.safetensors"))) > 4) is is_sharded
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
@pytest.mark.parametrize("dtype", [None, torch.float16], ids=str)
def test_adapters_of_both_forms_and_others_add_up_as_in_memory(dtype: torch.dtype | None, tmp_path: Path) -> None:
    model = made(mixtral, dtype=torch.bfloat16)
    base = checkpoint(model, tmp_path)
    adapters = {
        adapted(model, tmp_path / "each"): 0.5,
        adapted(model, tmp_path / "shared", experts="shared", r=4): 2.0,
        adapted(model, tmp_path / "others", targets=[*EXPERTS, "q_proj"], seed=3, train_also=["norm"]): -1.0,
    }
    report = randlora.files.merge(adapters, tmp_path / "out", base=base, dtype=dtype)
    assert report.replaced == ("model.norm.weight",)
    if dtype is None:
        assert_same_tensors(report.out, in_memory(base, adapters, tmp_path / "expected"))
    else:
        (tmp_path / "cast").mkdir()
        wide = read(base).to(torch.promote_types(torch.bfloat16, dtype))
        expected = stored(in_memory(write(wide, tmp_path / "wide"), adapters, tmp_path / "expected"))
        found = stored(report.out)
        assert [name for name in found if not same_bits(found[name], expected[name].to(dtype))] == []


@every_model
@pytest.mark.parametrize("is_sharded", [False, True], ids=["one file", "many files"])
def test_one_matrix_is_computed_at_a_time_and_each_once(
    build: Callable[[], nn.Module], is_sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(build, dtype=torch.float32)
    base = checkpoint(model, tmp_path, is_sharded=is_sharded)
    adapter = adapted(model, tmp_path / "adapter")
    computed: list[int] = []
    original = Experts.with_updates.__func__  # type: ignore[attr-defined]

    def counted(cls: type[Experts], weight: Tensor, updates: Any) -> Tensor:
        computed.append(len(weight))
        return cast("Tensor", original(cls, weight, updates))

    monkeypatch.setattr(Experts, "with_updates", classmethod(counted))
    randlora.files.merge(adapter, tmp_path / "out", base=base)
    assert computed == [1] * 4 * len(experts_of(model))  # each is a stack of four


def test_the_tensors_of_an_expert_may_be_in_any_files(tmp_path: Path) -> None:
    model = made(mixtral, dtype=torch.float32)
    base = checkpoint(model, tmp_path)
    adapter = adapted(model, tmp_path / "adapter")
    expected = randlora.files.merge(adapter, tmp_path / "expected", base=base).out
    tensors = stored(base)
    files: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        last = name.split(".")[-2]
        files.setdefault(f"model-{last}.safetensors", {})[name] = tensor
    for file, held in files.items():
        save_file(held, base / file, {"format": "pt"})
    (base / "model.safetensors").unlink()
    places = {name: file for file, held in files.items() for name in held}
    index = {"metadata": {}, "weight_map": places}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert_same_tensors(randlora.files.merge(adapter, tmp_path / "out", base=base).out, expected)


@pytest.mark.parametrize("change", ["is missing", "has another shape", "and all of its expert are missing"])
def test_a_tensor_of_an_expert_that_is_missing_or_of_another_shape_is_an_error_before_anything_is_written(
    change: str, tmp_path: Path
) -> None:
    model = made(mixtral, dtype=torch.float32)
    base = checkpoint(model, tmp_path)
    adapter = adapted(model, tmp_path / "adapter")
    tensors = stored(base)
    lost = tensors.pop("model.layers.1.block_sparse_moe.experts.2.w1.weight")
    if change == "has another shape":
        tensors["model.layers.1.block_sparse_moe.experts.2.w1.weight"] = lost[1:].clone()
    elif change == "and all of its expert are missing":
        tensors = {name: tensor for name, tensor in tensors.items() if "1.block_sparse_moe.experts.2." not in name}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    made_of = r"model\.layers\.1\.mlp\.experts\.gate_up_proj is made of .*experts\.0\.w1\.weight, .* and \d more when"
    with pytest.raises(CheckpointError, match=rf"{made_of} it is loaded, and .*merge in memory"):
        randlora.files.merge(adapter, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()
    assert not randlora.files.verify(adapter, base).passed


@pytest.mark.medium
@pytest.mark.parametrize("build", [mixtral, gpt_oss], ids=lambda build: build.__name__)
def test_stacks_trained_with_an_adapter_replace_what_they_are_made_of(
    build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    model = made(build, dtype=torch.float32)
    base = checkpoint(model, tmp_path)
    attention = ["o_proj"]
    adapter = adapted(model, tmp_path / "adapter", targets=attention, train_also=[r"mlp.experts.down_proj"])
    on_top = adapted(model, tmp_path / "on top", seed=1)
    assert randlora.files.verify(adapter, base).passed
    report = randlora.files.merge(adapter, tmp_path / "out", base=base)
    assert len(report.replaced) > 0
    assert all("down_proj" in name or "w2" in name for name in report.replaced)
    assert not set(report.replaced) & set(report.merged)
    assert_same_tensors(report.out, in_memory(base, {adapter: 1.0}, tmp_path / "expected"))
    both = {adapter: 1.0, on_top: 1.0}
    assert_same_tensors(
        randlora.files.merge(both, tmp_path / "both", base=base).out,
        in_memory(base, both, tmp_path / "expected of both"),
    )
    again = adapted(model, tmp_path / "again", targets=attention, train_also=["mlp.experts.down_proj"])
    with pytest.raises(CheckpointError, match=r"an adapter before it trained .*down_proj too"):
        randlora.files.merge([adapter, again], tmp_path / "twice", base=base)


def experts_of(model: nn.Module) -> list[str]:
    """Return the FQNs of a model's stacks of experts."""
    return [site.fqn for site in Census.of(model).sites if site.layer_class.kind == "experts"]


def merges_agree(model_class: Any, model: nn.Module, directory: Path, experts: Any) -> None:
    """Adapt the experts of a model on disk and in memory, and compare what is saved."""
    write(model, directory / "made")
    base = write(model_class.from_pretrained(directory / "made"), directory / "base")
    adapter = adapted(model, directory / "adapter", targets=experts_of(model), r=4, experts=experts)
    assert randlora.files.verify(adapter, base).passed
    report = randlora.files.merge(adapter, directory / "out", base=base)
    loaded = model_class.from_pretrained(base)
    randlora.load(loaded, adapter)
    randlora.merge(loaded)
    assert_same_tensors(report.out, write(loaded, directory / "expected"))
    before, after = stored(base), stored(report.out)
    assert {name for name in after if not same_bits(before[name], after[name])} == set(report.merged) != set()


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_experts_of_every_class_are_merged_as_in_memory(task: str, tmp_path: Path) -> None:
    compared, unlike = [], {}
    for _, model_type, name in (entry for entry in classes() if entry[0] == task):
        if (model := tiny(model_type, name)) is None or not experts_of(model):
            continue
        compared.append(name)
        for experts in ("each", "shared"):
            try:
                merges_agree(getattr(transformers, name), model, tmp_path / name / experts, experts)
            except (AssertionError, randlora.errors.RandLoRAError) as error:
                unlike[name, experts] = str(error)[:500]
    assert unlike == {}
    assert len(compared) >= LEAST.get(task, 0)


TRANSPOSED = "model.layers.0.mlp.experts.down_proj"


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
