"""`save_merged`: the files of merging and ``save_pretrained``, byte for byte, of a model that stays as it is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import randlora
from randlora.disk.formats import write_tensor_file
from randlora.errors import AdapterError, ConfigError, MergeError
from randlora.files.model_directory import INDEX_FILE
from tests import quantized
from tests.kit import all_bits, fill, untouched
from tests.model_directories import SHARD, contents, stored, write
from tests.models import BERT, GPT2, LLAMA, RealModel, llama, outputs
from tests.test_readers_experts import made, mixtral
from tests.transformers_zoo import tiny

WRITER = "randlora.files.save_merged.write_tensor_file"


def adapted(model: nn.Module, **options: Any) -> Any:
    randlora.inject(model, **{"r": 4, "targets": "all-linear", **options})
    return fill(model)


MODELS: dict[str, Callable[[], Any]] = {
    "to bfloat16": LLAMA.build,
    "llama, sharded": lambda: LLAMA.build().to(torch.bfloat16),
    "gpt2": lambda: GPT2.build().to(torch.bfloat16),
    "bert": BERT.build,
    "tied": lambda: llama(tie_word_embeddings=True),
    "masked, tied with a bias": lambda: tiny("bert", "BertForMaskedLM"),
    "experts": lambda: made(mixtral, dtype=torch.float32),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_files_are_those_of_merging_and_saving(name: str, tmp_path: Path) -> None:
    model, is_sharded = adapted(MODELS[name]()), name == "llama, sharded"
    dtype = torch.bfloat16 if name == "to bfloat16" else None
    options: dict[str, Any] = {"dtype": dtype, **({"max_shard_size": SHARD} if is_sharded else {})}
    with untouched(model):
        report = randlora.files.save_merged(model, tmp_path / "out", **options)
    with randlora.merged(model):
        assert contents(randlora.files.save_merged(model, tmp_path / "again", **options).out) == contents(report.out)
    randlora.merge(model)
    files = contents(report.out)
    expected = write(model.to(dtype), tmp_path / "expected", is_sharded=is_sharded)
    assert ("as bfloat16" in str(report)) == (dtype is not None)
    assert report.nbytes == sum(tensor.nbytes for tensor in stored(report.out).values())
    assert report.shards == sum(file.endswith(".safetensors") for file in files)
    assert (report.shards > 1) == is_sharded
    assert all_bits(stored(report.out)) == all_bits(stored(expected))
    if is_sharded:
        own, theirs = (json.loads((each / INDEX_FILE).read_text(encoding="utf-8")) for each in (report.out, expected))
        assert own["metadata"] == theirs["metadata"]
        assert [*own["weight_map"]] == [*theirs["weight_map"]]
    else:
        assert files == contents(expected)
    _, kinds = type(model).from_pretrained(report.out, output_loading_info=True)
    assert not (kinds["missing_keys"])
    assert not (kinds["unexpected_keys"])


@pytest.mark.parametrize("kind", quantized.MODELS[:2], ids=lambda kind: kind.name)
def test_a_quantized_model_is_written_as_the_plain_one_that_it_stands_for(kind: RealModel, tmp_path: Path) -> None:
    model: Any = adapted(quantized.quantized_model(kind, quantized.NF4), targets=kind.targets)
    report = randlora.files.save_merged(model, tmp_path / "out")
    loaded = type(model).from_pretrained(report.out).eval()
    assert getattr(loaded.config, "quantization_config", None) is None != model.config.quantization_config
    with randlora.merged(model, quantized="dequantize"):
        torch.testing.assert_close(outputs(loaded, kind.inputs()), outputs(model, kind.inputs()))


class Plain(nn.Module):
    """A model without a config, with a layer in two places, statistics, and what a file may not hold."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.again = self.first
        self.register_buffer("table", torch.zeros(2, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., 8)`` to ``(..., 8)``."""
        y: Tensor = self.again(self.norm(self.first(x)))
        return y


def test_a_model_without_a_config_has_its_state_dict_written_and_what_moved_or_did_not_is_noted(tmp_path: Path) -> None:
    model: Any = Plain()
    loaded, x = Plain(), torch.randn(4, 8)
    randlora.inject(model, r=4, targets=["first"])
    model(x)
    report = randlora.files.save_merged(model, tmp_path / "untrained")
    untrained, moved = report.notes
    assert "the update of 'default' is exactly zero in all layers" in untrained
    assert "moved since the model was adapted: the files have them as they are now" in moved
    fill(model)
    report = randlora.files.save_merged(model, tmp_path / "deep" / "out")
    assert [*contents(report.out)] == ["model.safetensors"]
    assert all_bits(stored(report.out)) == all_bits(dict(randlora.merged_tensors(model)))
    loaded.load_state_dict(stored(report.out))
    torch.testing.assert_close(loaded.eval()(x), model.eval()(x))
    model.config = {"width": 8}
    report = randlora.files.save_merged(model, tmp_path / "out")
    assert "no config was written: the config of a Plain has no save_pretrained" in str(report)


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


@pytest.mark.parametrize(("build", "options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_leaves_nothing(
    build: Callable[[], nn.Module], options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    model = build()
    with untouched(model), pytest.raises(error, match=message):
        randlora.files.save_merged(model, tmp_path / "deep" / "out", **options)
    assert [*tmp_path.iterdir()] == []


def test_nothing_is_written_over(tmp_path: Path) -> None:
    places = {name: tmp_path / f"{name} out" for name in ("directory", "file", "broken link")}
    places["directory"].mkdir()
    places["file"].touch()
    places["broken link"].symlink_to("nowhere")
    for place in places.values():
        with pytest.raises(MergeError, match=r"out exists: choose a different name, or remove it"):
            randlora.files.save_merged(adapted(Plain()), place)
    assert {*tmp_path.iterdir()} == {*places.values()}


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
