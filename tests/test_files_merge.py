"""Merging on disk and from memory equals merging and saving, byte for byte; what fails leaves all as it was."""

import json
import os
import resource
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import randlora
from randlora import files
from randlora.__main__ import main
from randlora.disk.formats import write_tensor_file
from randlora.errors import AdapterError, CheckpointError, ConfigError, MergeError
from randlora.files.model_directory import INDEX_FILE, find_companions, read_model_directory
from randlora.files.save_merged import NAMES_IN_MEMORY
from tests import model_directories, quantized
from tests.checkpoint_files import read_tensors
from tests.hostile_files import sparse
from tests.kit import adapt, adapter_values, all_bits, fill, same_bits, untouched
from tests.model_directories import adapter_of, assert_same_tensors, contents, save_adapter, save_model, stored, write
from tests.models import BERT, GPT2, LLAMA, VIT, RealModel, llama, outputs
from tests.peer import THEIR_WARNINGS, their_directory
from tests.read_kinds import ReadKind, every_read_kind
from tests.test_readers_experts import EXPERTS, gpt_oss, made, mixtral
from tests.transformers_zoo import tiny

pytestmark = THEIR_WARNINGS

Q = "model.layers.0.self_attn.q_proj"
Weighted = list[tuple[float, dict[str, Any]]]


def of_every_kind(kind: RealModel) -> Weighted:
    """Options of adapters of every kind of bases, of which the second's are those of the first, which grow."""
    head = model_directories.HEADS[kind.name]
    first = {"targets": list(kind.targets[:1]), "train_also": [head], "stream": "portable"}
    others: Weighted = [
        (1.0, {"stream": "portable"}),
        (-0.3, {"r": 5, "seed": 1, "basis": "sparse"}),
        (2.0, {"basis": "block", "r": {kind.targets[-1]: 8, ".*": 4}, "alpha": {kind.targets[0]: 3, ".*": 16}}),
        (1.5, {"basis": "very_sparse"}),
    ]
    return [(0.7, first), *((weight, {"targets": list(kind.targets), **options}) for weight, options in others)]


WHOLE: Weighted = [(1.0, {"targets": ["v_proj"], "train_also": [Q]}), (0.5, {"targets": ["q_proj"]})]
"""Adapters of which one trained a weight whole that another adapts."""

STACKS: Weighted = [
    (-1.0, {"targets": ["o_proj"], "train_also": ["mlp.experts.down_proj", "norm"], "seed": 3}),
    (0.5, {"targets": EXPERTS}),
    (2.0, {"targets": EXPERTS, "experts": "shared"}),
]
MERGED: dict[str, tuple[Callable[[], nn.Module], torch.dtype, str, Weighted]] = {
    "llama": (LLAMA.build, torch.float32, "", of_every_kind(LLAMA)),
    "gpt2": (GPT2.build, torch.bfloat16, model_directories.SHARD, of_every_kind(GPT2)),
    "vit": (VIT.build, torch.float16, model_directories.SHARD, of_every_kind(VIT)),
    "whole-first": (LLAMA.build, torch.bfloat16, "", WHOLE),
    "whole-last": (LLAMA.build, torch.bfloat16, "", WHOLE[::-1]),
    "gpt_oss": (lambda: made(gpt_oss), torch.float32, "", STACKS),
}


@pytest.mark.parametrize("case", MERGED)
def test_several_adapters_and_what_was_trained_beside_them_are_merged_as_in_memory(case: str, tmp_path: Path) -> None:
    build, dtype, shard, weighted = MERGED[case]
    model = build().to(dtype)
    model_class: Any = type(model)
    loaded = model_class.from_pretrained(write(model, tmp_path / "made"))  # some parameters in float32
    base = write(loaded, tmp_path / "base", is_sharded=bool(shard), shard=shard)
    model = model_class.from_pretrained(base)
    adapters = {
        adapter_of(model, tmp_path / f"adapter {number}", values=number, **options): weight
        for number, (weight, options) in enumerate(weighted)
    }
    before = contents(tmp_path)
    report = files.merge(adapters, tmp_path / "out", base=base)
    carrying = model_directories.carrying(model_class.from_pretrained(base), adapters)
    with untouched(carrying):
        saved = files.save_merged(carrying, tmp_path / "saved", max_shard_size=shard or "5GB")
    randlora.merge(carrying)
    expected = write(carrying, tmp_path / "expected", is_sharded=bool(shard), shard=shard)
    assert contents(report.out) == contents(expected)
    assert_same_tensors(saved.out, expected)
    if shard:  # whose files are not cut at the same places
        own, theirs = (json.loads((each / INDEX_FILE).read_text(encoding="utf-8")) for each in (saved.out, expected))
        assert (own["metadata"], [*own["weight_map"]]) == (theirs["metadata"], [*theirs["weight_map"]])
    assert before.items() <= contents(tmp_path).items()
    for each in (report, saved):
        assert len([*each.out.glob("*.safetensors")]) == each.shards > bool(shard)
    assert report.adapters == {str(path): weight for path, weight in adapters.items()}
    found, own = stored(report.out), stored(base)
    changed = {name for name in own if not same_bits(found[name], own[name])}
    assert changed == {*report.merged, *report.replaced} > {*report.replaced}
    assert {*report.merged} & {*report.replaced} <= {f"{Q}.weight"} | {name for name in own if ".experts." in name}


def test_a_wider_dtype_is_that_of_the_model_while_merging_and_a_narrower_is_rounded_to_once(tmp_path: Path) -> None:
    base = save_model(BERT, tmp_path / "base", dtype=torch.bfloat16, is_sharded=True)
    adapter, held = their_directory(BERT, tmp_path, modules_to_save=["classifier"])[0], stored(base)
    for dtype in (torch.float32, torch.float16):
        report = files.merge(adapter, tmp_path / f"to {dtype}", base=base, dtype=dtype)
        model = BERT.build().to(torch.bfloat16).to(torch.promote_types(torch.bfloat16, dtype))
        expected = write(model_directories.merge_into(model, {adapter: 1.0}).to(dtype), tmp_path / f"expected {dtype}")
        assert_same_tensors(report.out, expected)
        assert (report.out / "config.json").read_bytes() == (expected / "config.json").read_bytes()
        assert report.replaced == ("classifier.bias", "classifier.weight")
        assert "replaced 2 tensors trained with the adapters" in str(report)
        index = json.loads((report.out / "model.safetensors.index.json").read_text(encoding="utf-8"))
        nbytes = sum(each.nbytes for each in stored(expected).values())
        assert (index["metadata"]["total_size"], report.nbytes, {*index["weight_map"]}) == (nbytes, nbytes, {*held})


def test_what_is_no_float_keeps_its_dtype_and_neither_codes_nor_8_bit_floats_are_merged_into(tmp_path: Path) -> None:
    base, adapter = save_model(LLAMA, tmp_path / "base"), save_adapter(LLAMA, tmp_path / "adapter")
    kept = {
        "position_ids": torch.arange(5),
        "empty": torch.empty(0, 3),
        "scalar": torch.ones((), dtype=torch.float8_e4m3fn),
    }
    model_directories.edit_model(base, kept)
    merged = stored(files.merge(adapter, tmp_path / "out", base=base, dtype=torch.bfloat16).out)
    assert same_bits(merged.pop("position_ids"), kept["position_ids"])
    assert (merged["empty"].shape, {tensor.dtype for tensor in merged.values()}) == ((0, 3), {torch.bfloat16})
    model_directories.edit_model(base, {name: tensor.to(torch.float8_e4m3fn) for name, tensor in stored(base).items()})
    for dtype in (None, torch.float32):
        with pytest.raises(MergeError, match=r"8-bit floats or integers: .*q_proj\.weight.* and \d+ more; convert"):
            files.merge(adapter, tmp_path / "again", base=base, dtype=dtype)
    model_directories.edit_model(base, {name: tensor.to(torch.int8) for name, tensor in stored(base).items()})
    with pytest.raises(MergeError, match=r"or integers: .*q_proj"):  # as codes whose scales have other names
        files.merge(adapter, tmp_path / "again", base=base)
    assert not (tmp_path / "again").exists()


@pytest.mark.product
@every_read_kind
def test_files_of_every_kind_are_inspected_and_merged_as_in_memory(kind: ReadKind, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in kind.model().state_dict().items()}
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    model, adapter = kind.adapted(), tmp_path / "adapter"
    randlora.save(model, adapter)
    summary = files.inspect(adapter, norms=True)
    (found,), update = summary.layers, randlora.delta_weight(model, kind.target).detach().double()
    *stack, out_features, in_features = kind.layer(model).adapters["default"].shape
    assert (found.fqn, found.out_features, found.in_features) == (kind.target, out_features, in_features)
    assert summary.trainable_parameters == sum(part.numel() for part in adapter_values(model).values())
    matrices = len(kind.diagonals(model)[0]) if stack and kind.diagonals(model)[0].dim() == 3 else 1
    assert found.matrices == matrices
    assert ("matrices" in str(summary)) == (matrices > 1)
    norms = float(update.norm()), float(torch.linalg.svdvals(update.reshape(*stack, out_features, in_features)).max())
    assert (found.frobenius, found.spectral) == pytest.approx(norms, rel=1e-5)
    assert files.verify(adapter, tmp_path / "base").passed
    if kind.kind != "linear":
        with pytest.raises(CheckpointError, match=rf"to 'peft': .* not {kind.target} \({kind.kind}\)"):
            files.convert(adapter, tmp_path / "out", "peft")
        what = rf"(of kind {kind.kind}|a stack of \d matrices)"
        with pytest.raises(ConfigError, match=rf"{kind.target} is {what}, and only linear layers"):
            files.convert(adapter, tmp_path / "out", "lora", tolerance=1.0)
        files.convert(adapter, tmp_path / "native", "native")
        (again, header), (own, expected) = read_tensors(tmp_path / "native"), read_tensors(adapter)
        assert (all_bits(again), header) == (all_bits(own), expected)
    files.merge(adapter, tmp_path / "out", base=tmp_path / "base")
    randlora.merge(model)
    assert all_bits(load_file(tmp_path / "out" / "model.safetensors")) == all_bits(model.state_dict())


CARRIED = {
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "vocab.txt", "README.md"),
    *("1_Pooling/config.json", "chat_template.jinja", "modeling_own.py", "vocabulary", "again.json"),
}
LEFT_OUT = {
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors", "tf_model.h5"),
    *("onnx/model.onnx", "original/consolidated.00.pth", "weights-in-a-new-format"),
}
PASSED_OVER = {
    *(".gitattributes", ".cache/x", "my-adapter/adapter_config.json", "my-adapter/notes.txt", "adapter_config.json")
}


def test_what_a_model_needs_goes_along_and_weights_in_other_forms_do_not(tmp_path: Path) -> None:
    model, snapshot = save_model(LLAMA, tmp_path / "model", is_sharded=True), tmp_path / "snapshots" / "0123abc"
    sparse(2**30)(model / "vocabulary")
    sparse(2**30 + 1)(model / "weights-in-a-new-format")  # as large as weights
    (model / "again.json").symlink_to("config.json")
    for path in (model / name for name in CARRIED | LEFT_OUT | PASSED_OVER):
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_text("x", encoding="utf-8")
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(path for path in model.rglob("*") if path.is_file()):
        link, blob = snapshot / path.relative_to(model), tmp_path / "blobs" / str(number)
        link.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, blob)
        link.symlink_to("config.json" if path.is_symlink() else blob)
    (tmp_path / "elsewhere").symlink_to(snapshot)
    for place in (model, tmp_path / "elsewhere"):
        companions = find_companions(read_model_directory(place))
        assert {path.as_posix() for path in companions.carried} == CARRIED
        assert {path.as_posix() for path in companions.left_out} == LEFT_OUT


@pytest.fixture
def root(tmp_path: Path) -> Path:
    save_model(LLAMA, tmp_path / "base", is_sharded=True)
    save_adapter(LLAMA, tmp_path / "adapter")
    return tmp_path


def merge(root: Path, **options: Any) -> Path:
    given: dict[str, Any] = {"base": root / "base", "adapters": root / "adapter", "out": root / "out", **options}
    return files.merge(**given).out


def refused(root: Path, match: str, error: type[Exception] = MergeError, **options: Any) -> None:
    before = contents(root)
    with pytest.raises(error, match=match):
        merge(root, **options)
    assert contents(root) == before
    assert not list(root.glob("**/.*"))


def test_an_output_is_replaced_as_a_whole_on_demand_and_nothing_else_is(root: Path) -> None:
    out, single = merge(root), save_model(LLAMA, root / "single")
    refused(root, "out exists and is not empty: choose a different name, or give overwrite=True")
    merge(root, base=single, overwrite=True)  # which has no index and no shards
    assert contents(out) == contents(merge(root, out=root / "expected", base=single))
    (out / "checkpoint-10").mkdir()
    (out / "checkpoint-10" / "model.safetensors").write_bytes(b"x")
    (out / "model_of_mine.safetensors").write_bytes(b"x")
    lost = r"checkpoint-10.*, model_of_mine.safetensors"
    refused(root, rf"out holds other files, which would be lost: {lost}", overwrite=True)
    for inside in (root / "base", root, root / "base" / "deep" / "out", root / "adapter" / "deep" / "out"):
        refused(root, "an input that must not change|would be lost", out=inside, overwrite=True)
    shutil.rmtree(out)
    out.symlink_to(root / "nowhere")
    for overwrite in (False, True):
        refused(root, "out is a file or a broken link", overwrite=overwrite)


def test_inputs_are_never_opened_for_writing() -> None:
    with tempfile.TemporaryDirectory() as made:  # pytest's own directories let nobody else in
        root, out = Path(made), Path(made) / "open"
        save_model(LLAMA, root / "base")
        save_adapter(LLAMA, root / "adapter")
        out.mkdir()
        for path in (root, *root.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        out.chmod(0o777)
        user = os.geteuid()
        os.seteuid(user or 65534)  # permissions do not apply to root
        try:
            merge(root, out=out / "merged")
        finally:
            os.seteuid(user)
        for path in (root, *root.rglob("*")):
            path.chmod(path.stat().st_mode | stat.S_IWUSR)


def test_a_disk_that_is_full_leaves_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Or, of a replacement, the model that was there."""
    words = ["merge", str(root / "adapter"), str(root / "out"), "--base", str(root / "base")]
    for more in ([], ["--overwrite"]):
        before, (soft, hard) = contents(root), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, hard))  # bytes of one file: less than a shard
        try:
            assert main([*words, *more]) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        out, err = capsys.readouterr()
        assert (out, contents(root)) == ("", before)
        assert err == f"error: File too large: {root / 'out'}\n"
        assert sorted(path.name for path in root.iterdir()) == ["adapter", "base", "out"][: 2 + len(more)]
        if not more:
            merge(root)


WRITER = "randlora.files.save_merged.write_tensor_file"


def adapted(model: nn.Module, **options: Any) -> Any:
    return adapt(model, **{"r": 4, "targets": "all-linear", **options})


MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "to bfloat16": (lambda: tiny("llava", "LlavaForConditionalGeneration"), {"dtype": torch.bfloat16}),
    "tied": (lambda: llama(tie_word_embeddings=True), {}),
    "masked, tied with a bias": (lambda: tiny("bert", "BertForMaskedLM"), {}),
    "experts one by one": (lambda: made(mixtral, dtype=torch.float32), {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_files_are_those_of_merging_and_saving(name: str, tmp_path: Path) -> None:
    build, options = MODELS[name]
    plain, dtype = build(), options.get("dtype")
    targets = EXPERTS if "experts" in name else "all-linear"
    made_again = type(plain).from_pretrained(write(plain, tmp_path / "plain"))  # whose inner configs name a dtype
    model = adapted(made_again, targets=targets)
    with untouched(model):
        report = files.save_merged(model, tmp_path / "out", **options)
    with randlora.merged(model):
        assert contents(files.save_merged(model, tmp_path / "again", **options).out) == contents(report.out)
    randlora.merge(model)
    again = type(plain).from_pretrained(write(model, tmp_path / "in memory"), dtype=dtype or "auto")
    assert contents(report.out) == contents(write(again, tmp_path / "expected"))
    assert ("as bfloat16" in str(report)) == (dtype is not None)
    assert report.nbytes == sum(tensor.nbytes for tensor in stored(report.out).values())
    _, kinds = type(model).from_pretrained(report.out, output_loading_info=True)
    assert not (kinds["missing_keys"])
    assert not (kinds["unexpected_keys"])


CONVERTED: dict[str, Callable[[], Any]] = {
    "gate_up_proj": MODELS["experts one by one"][0],
    "q_proj": lambda: tiny("nomic_bert", "NomicBertModel"),
}


@pytest.mark.parametrize("is_trained", [False, True], ids=["adapted", "trained"])
@pytest.mark.parametrize("name", CONVERTED)
def test_what_is_converted_as_it_is_loaded_is_not_merged_on_disk(name: str, is_trained: bool, tmp_path: Path) -> None:
    model, trained = CONVERTED[name](), {"targets": "all-linear", "exclude": [name], "train_also": [name]}
    base, adapter = write(model, tmp_path / "base"), tmp_path / "adapter"
    adapter_of(model, adapter, **trained if is_trained else {"targets": [name]})
    with pytest.raises(CheckpointError, match=rf"the files do not have \S+{name}\S*, .*load_model.*save_merged"):
        files.merge(adapter, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", quantized.MODELS[:2], ids=lambda kind: kind.name)
def test_a_quantized_model_is_written_as_the_plain_one_that_it_stands_for(kind: RealModel, tmp_path: Path) -> None:
    model: Any = adapted(quantized.quantized_model(kind, quantized.NF4), targets=kind.targets)
    report = files.save_merged(model, tmp_path / "out")
    loaded = type(model).from_pretrained(report.out).eval()
    assert getattr(loaded.config, "quantization_config", None) is None != model.config.quantization_config
    with randlora.merged(model, quantized="dequantize"):
        torch.testing.assert_close(outputs(loaded, kind.inputs()), outputs(model, kind.inputs()))


def test_what_cannot_be_renamed_one_by_one_keeps_its_names_in_memory_and_is_read(tmp_path: Path) -> None:
    model: Any = adapted(made(mixtral))
    with mock.patch("transformers.core_model_loading.revert_weight_conversion", side_effect=KeyError):
        report = files.save_merged(model, tmp_path / "out")
    assert report.notes == (NAMES_IN_MEMORY,)
    randlora.merge(model)
    for found in (stored(report.out), type(model).from_pretrained(report.out).state_dict()):
        assert all_bits(found) == all_bits(model.state_dict())


class Plain(nn.Module):
    """A model without a config, with a layer in two places, statistics, and what a file may not hold."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.again = self.first
        self.register_buffer("table", torch.zeros(2, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.again(self.norm(self.first(x)))
        return y


def test_a_model_without_a_config_has_its_state_dict_written_and_what_moved_or_did_not_is_noted(tmp_path: Path) -> None:
    model: Any = Plain()
    loaded, x = Plain(), torch.randn(4, 8)
    randlora.inject(model, r=4, targets=["first"])
    model(x)
    report = files.save_merged(model, tmp_path / "untrained")
    untrained, moved = report.notes
    assert "the update of 'default' is exactly zero in all layers" in untrained
    assert "moved since the model was adapted: the files have them as they are now" in moved
    fill(model)
    report = files.save_merged(model, tmp_path / "deep" / "out")
    assert [*contents(report.out)] == ["model.safetensors"]
    assert all_bits(stored(report.out)) == all_bits(dict(randlora.merged_tensors(model)))
    loaded.load_state_dict(stored(report.out))
    torch.testing.assert_close(loaded.eval()(x), model.eval()(x))
    model.config = {"width": 8}
    report = files.save_merged(model, tmp_path / "out")
    assert "no config was written: the config of a Plain has no save_pretrained" in str(report)
    model.config = transformers.PreTrainedConfig(auto_map={"AutoModel": "modeling_own.Own"})
    assert "names Python files of the model, which were not copied" in str(files.save_merged(model, tmp_path / "own"))


def poisoned() -> nn.Module:
    model: nn.Module = adapted(Plain())
    randlora.trainable_parameters(model)[0].data.fill_(torch.nan)
    return model


REFUSED: list[tuple[Callable[[], nn.Module], dict[str, Any], type[Exception], str]] = [
    (Plain, {}, AdapterError, "has no adapter"),
    (poisoned, {}, MergeError, "first.weight would not be finite"),
    (lambda: adapted(Plain(torch.complex128)), {}, MergeError, "table has torch.complex128, which safetensors files"),
    (lambda: adapted(Plain()), {"dtype": torch.int8}, ConfigError, "a floating dtype"),
    (lambda: adapted(Plain()), {"max_shard_size": "much"}, ConfigError, "like '5GB', got 'much'"),
    (lambda: adapted(Plain()), {"max_shard_size": 0}, ConfigError, "got 0"),
]


def test_what_is_refused_leaves_nothing_and_nothing_is_written_over(tmp_path: Path) -> None:
    for build, options, error, message in REFUSED:
        model = build()
        with untouched(model), pytest.raises(error, match=message):
            files.save_merged(model, tmp_path / "deep" / "out", **options)
    assert [*tmp_path.iterdir()] == []
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for place in (places := {*tmp_path.iterdir()}):
        with pytest.raises(MergeError, match=rf"{place.name} exists: choose a different name, or remove it"):
            files.save_merged(adapted(Plain()), place)
    assert {*tmp_path.iterdir()} == places


def test_at_most_the_tensors_of_one_file_are_held_and_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    held: list[int] = []

    def counting(path: Path, planned: Any, *others: Any) -> None:
        held.append(sum(each.nbytes for each in planned))
        write_tensor_file(path, planned, *others)

    model = adapted(LLAMA.build())
    with mock.patch(WRITER, counting):
        report = files.save_merged(model, tmp_path / "out", max_shard_size="0.00002GB")
    assert max(held) <= 20_000
    index = json.loads((report.out / INDEX_FILE).read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == report.nbytes == sum(held)
    written = mock.Mock(side_effect=[None, OSError(28, "No space left on device")])
    with mock.patch(WRITER, written), pytest.raises(OSError, match="No space"):
        files.save_merged(model, tmp_path / "full", max_shard_size=model_directories.SHARD)
    assert [*tmp_path.iterdir()] == [report.out]
