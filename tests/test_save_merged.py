"""`save_merged`: the files of merging and ``save_pretrained``, byte for byte, of a model that stays as it is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertForMaskedLM

import randlora
from randlora.disk.formats import write_tensor_file
from randlora.errors import AdapterError, ConfigError, MergeError
from randlora.files.model_directory import INDEX_FILE
from tests import quantized
from tests.kit import all_bits, fill, untouched
from tests.model_directories import SHARD, contents, merge_in_memory, save_adapter, write
from tests.models import BERT, GPT2, LLAMA, RealModel, outputs, reproducible, tokens

WRITER = "randlora.files.save_merged.write_tensor_file"
SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}


def causal(kind: str, **options: Any) -> Any:
    return reproducible(
        lambda: AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **HEADS, **options))
    )


def adapted(model: nn.Module, **options: Any) -> Any:
    randlora.inject(model, **{"r": 4, "targets": "all-linear", **options})
    return fill(model)


@pytest.mark.parametrize(("kind", "is_sharded"), [(LLAMA, True), (GPT2, False), (BERT, False)])
def test_the_files_are_those_of_merging_and_saving(kind: RealModel, is_sharded: bool, tmp_path: Path) -> None:
    adapter = save_adapter(kind, tmp_path / "adapter", dtype=torch.bfloat16)
    model = kind.build().to(torch.bfloat16)
    randlora.load(model, adapter)
    with untouched(model):
        report = randlora.files.save_merged(model, tmp_path / "out", max_shard_size=SHARD if is_sharded else "5GB")
    merged = merge_in_memory(kind, {adapter: 1.0}, dtype=torch.bfloat16)
    expected = write(merged, tmp_path / "expected", is_sharded=is_sharded)
    files = contents(report.out)
    assert report.nbytes == sum(tensor.nbytes for tensor in tensors(report.out).values())
    assert report.shards == sum(name.endswith(".safetensors") for name in files)
    assert (report.shards > 1) == is_sharded
    if not is_sharded:
        assert files == contents(expected)
        return
    assert all_bits(tensors(report.out)) == all_bits(tensors(expected))
    own, theirs = (json.loads((each / INDEX_FILE).read_text(encoding="utf-8")) for each in (report.out, expected))
    assert own["metadata"] == theirs["metadata"]
    assert [*own["weight_map"]] == [*theirs["weight_map"]]
    assert all([*load_file(report.out / file)].count(name) for name, file in own["weight_map"].items())


def tensors(directory: Path) -> dict[str, Tensor]:
    return {name: each for path in directory.glob("*.safetensors") for name, each in load_file(path).items()}


MODELS: dict[str, Callable[[], Any]] = {
    "tied": lambda: causal("llama", tie_word_embeddings=True),
    "masked, tied with a bias": lambda: reproducible(
        lambda: BertForMaskedLM(BertConfig(**SIZES, num_attention_heads=2))
    ),
    "experts": lambda: causal("mixtral", num_local_experts=4),
}


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_the_merged_model_from_the_files_that_it_would_write(name: str, tmp_path: Path) -> None:
    model = adapted(MODELS[name]())
    report = randlora.files.save_merged(model, tmp_path / "out")
    loaded, kinds = type(model).from_pretrained(report.out, output_loading_info=True)
    assert not kinds["missing_keys"]
    assert not kinds["unexpected_keys"]
    with randlora.merged(model):
        assert contents(randlora.files.save_merged(model, tmp_path / "again").out) == contents(report.out)
    randlora.merge(model)
    assert torch.equal(outputs(loaded.eval(), tokens()), outputs(model, tokens()))
    model.save_pretrained(tmp_path / "expected")
    assert contents(report.out) == contents(tmp_path / "expected")


@pytest.mark.parametrize("kind", quantized.MODELS[:2], ids=lambda kind: kind.name)
def test_a_quantized_model_is_written_as_the_plain_one_that_it_stands_for(kind: RealModel, tmp_path: Path) -> None:
    model: Any = adapted(quantized.quantized_model(kind, quantized.NF4), targets=kind.targets)
    report = randlora.files.save_merged(model, tmp_path / "out")
    loaded = type(model).from_pretrained(report.out).eval()
    assert getattr(loaded.config, "quantization_config", None) is None != model.config.quantization_config
    with randlora.merged(model, quantized="dequantize"):
        torch.testing.assert_close(outputs(loaded, kind.inputs()), outputs(model, kind.inputs()))


def test_a_config_says_the_dtype_that_is_given(tmp_path: Path) -> None:
    model = adapted(LLAMA.build())
    report = randlora.files.save_merged(model, tmp_path / "out", dtype=torch.bfloat16)
    assert "as bfloat16" in str(report)
    loaded = AutoModelForCausalLM.from_pretrained(report.out)
    assert loaded.dtype == torch.bfloat16 != model.dtype
    expected = dict(randlora.merged_tensors(model, dtype=torch.bfloat16))
    assert all_bits(tensors(report.out)) == all_bits({name: expected[name] for name in tensors(report.out)})


class Plain(nn.Module):
    """A model without a config, with a layer in two places and what a file does not hold."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.again = self.first
        self.register_buffer("table", torch.zeros(2, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., 8)`` to ``(..., 8)``."""
        y: Tensor = self.again(self.first(x))
        return y


def test_a_model_without_a_config_has_its_state_dict_written(tmp_path: Path) -> None:
    model = adapted(Plain())
    expected = all_bits(dict(randlora.merged_tensors(model)))
    report = randlora.files.save_merged(model, tmp_path / "deep" / "out")
    assert [*contents(report.out)] == ["model.safetensors"]
    assert all_bits(tensors(report.out)) == expected
    Plain().load_state_dict(tensors(report.out))
    model.config = {"width": 8}
    report = randlora.files.save_merged(model, tmp_path / "out")
    assert "no config was written: the config of a Plain has no save_pretrained" in str(report)


def test_an_adapter_that_nothing_has_trained_and_statistics_that_moved_are_noted(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    randlora.inject(model, r=4, targets=["0"])
    model(torch.randn(4, 8))
    report = randlora.files.save_merged(model, tmp_path / "out")
    untrained, moved = report.notes
    assert "the update of 'default' is exactly zero in all layers" in untrained
    assert "moved since the model was adapted: the files have them as they are now" in moved
    loaded = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    loaded.load_state_dict(tensors(report.out))
    x = torch.randn(4, 8)
    assert torch.equal(loaded.eval()(x), model.eval()(x))


def poisoned() -> nn.Module:
    model: nn.Module = adapted(Plain())
    with torch.no_grad():
        randlora.trainable_parameters(model)[0].fill_(torch.nan)
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], type[Exception], str]] = {
    "no adapter": (Plain, {}, AdapterError, "has no adapter"),
    "not finite": (poisoned, {}, MergeError, "first.weight would not be finite"),
    "a dtype that no file holds": (
        lambda: adapted(Plain(torch.complex128)), {}, MergeError, "table has torch.complex128, which safetensors files"
    ),
    "a dtype that is not floating": (lambda: adapted(Plain()), {"dtype": torch.int8}, ConfigError, "a floating dtype"),
    "a size in words": (lambda: adapted(Plain()), {"max_shard_size": "much"}, ConfigError, "like '5GB', got 'much'"),
    "no size": (lambda: adapted(Plain()), {"max_shard_size": 0}, ConfigError, "got 0"),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_refused_leaves_nothing(why: str, tmp_path: Path) -> None:
    build, options, error, message = REFUSED[why]
    model = build()
    with untouched(model), pytest.raises(error, match=message):
        randlora.files.save_merged(model, tmp_path / "deep" / "out", **options)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("what", ["directory", "file", "broken link"])
def test_nothing_is_written_over(what: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make: dict[str, Callable[[], object]] = {
        "directory": out.mkdir, "file": out.touch, "broken link": lambda: out.symlink_to("nowhere")
    }  # fmt: skip
    make[what]()
    with pytest.raises(MergeError, match=r"out exists: choose a different name, or remove it"):
        randlora.files.save_merged(adapted(Plain()), out)
    assert [*tmp_path.iterdir()] == [out]


def test_at_most_the_tensors_of_one_file_are_held_and_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    held: list[int] = []

    def counting(path: Path, planned: Any, metadata: Any) -> None:
        held.append(sum(each.nbytes for each in planned))
        write_tensor_file(path, planned, metadata)

    model = adapted(LLAMA.build())
    with mock.patch(WRITER, counting):
        report = randlora.files.save_merged(model, tmp_path / "out", max_shard_size=20_000)
    assert max(held) <= 20_000
    index = json.loads((report.out / INDEX_FILE).read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == report.nbytes == sum(held)
    written = mock.Mock(side_effect=[None, OSError(28, "No space left on device")])
    with mock.patch(WRITER, written), pytest.raises(OSError, match="No space"):
        randlora.files.save_merged(model, tmp_path / "full", max_shard_size=SHARD)
    assert [*tmp_path.iterdir()] == [report.out]
