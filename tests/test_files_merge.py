"""Merging on disk equals loading, merging and saving, byte for byte, and a merge that fails leaves all as it was."""

import json
import os
import re
import resource
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import randlora
from randlora.__main__ import main
from randlora.errors import CheckpointError, ConfigError, MergeError
from randlora.readers.experts import Experts
from tests.checkpoint_files import TENSORS_FILE, edit_fields, read_tensors
from tests.directories import their_directory
from tests.kit import adapter_values, all_bits, same_bits
from tests.model_directories import (
    HEADS,
    SHARD,
    adapter_of,
    assert_same_tensors,
    contents,
    edit_model,
    merge_into,
    save_adapter,
    save_model,
    stored,
    write,
)
from tests.models import BERT, GPT2, LLAMA, VIT, RealModel, llama
from tests.peer import THEIR_WARNINGS
from tests.read_kinds import ReadKind, every_read_kind
from tests.test_readers_experts import EXPERTS, gpt_oss, made, mixtral

pytestmark = THEIR_WARNINGS

Q = "model.layers.0.self_attn.q_proj"
Weighted = list[tuple[float, dict[str, Any]]]


def of_every_kind(kind: RealModel) -> Weighted:
    """Options of adapters of every kind of bases, of which the second's are those of the first, which grow."""
    first = {"targets": list(kind.targets[:1]), "train_also": [HEADS[kind.name]], "stream": "portable"}
    others: Weighted = [
        (1.0, {"stream": "portable"}),
        (-0.3, {"r": 5, "seed": 1, "basis": "sparse"}),
        (2.0, {"basis": "block", "r": 8}),
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
    "gpt2": (GPT2.build, torch.bfloat16, SHARD, of_every_kind(GPT2)),
    "vit": (VIT.build, torch.float16, SHARD, of_every_kind(VIT)),
    "whole-first": (LLAMA.build, torch.bfloat16, "", WHOLE),
    "whole-last": (LLAMA.build, torch.bfloat16, "", WHOLE[::-1]),
    "mixtral": (lambda: made(mixtral), torch.bfloat16, "2KB", STACKS),
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
    report = randlora.files.merge(adapters, tmp_path / "out", base=base)
    expected = merge_into(model_class.from_pretrained(base), adapters)
    assert contents(report.out) == contents(write(expected, tmp_path / "expected", is_sharded=bool(shard), shard=shard))
    assert before.items() <= contents(tmp_path).items()
    assert (report.shards > 1) == bool(shard)
    assert report.adapters == {str(path): weight for path, weight in adapters.items()}
    found, own = stored(report.out), stored(base)
    changed = {name for name in own if not same_bits(found[name], own[name])}
    assert changed == {*report.merged, *report.replaced} > {*report.replaced}
    assert {*report.merged} & {*report.replaced} <= {f"{Q}.weight"} | {name for name in own if ".experts." in name}


def test_a_stack_is_merged_one_matrix_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(mixtral, dtype=torch.float32)
    base, adapter = write(model, tmp_path / "base"), adapter_of(model, tmp_path / "adapter", targets=EXPERTS)
    computed, compute = list[int](), Experts.with_updates.__func__  # type: ignore[attr-defined]

    def counted(cls: type[Experts], weight: Tensor, *args: Any) -> Tensor:
        computed.append(len(weight))
        return cast("Tensor", compute(cls, weight, *args))

    monkeypatch.setattr(Experts, "with_updates", classmethod(counted))
    randlora.files.merge(adapter, tmp_path / "out", base=base)
    assert computed == [1] * 16


def test_a_wider_dtype_is_that_of_the_model_while_merging_and_a_narrower_is_rounded_to_once(tmp_path: Path) -> None:
    base = save_model(BERT, tmp_path / "base", dtype=torch.bfloat16, is_sharded=True)
    adapter, _ = their_directory(BERT, tmp_path, modules_to_save=["classifier"])
    for dtype in (torch.float32, torch.float16):
        report = randlora.files.merge(adapter, tmp_path / f"to {dtype}", base=base, dtype=dtype)
        model = BERT.build().to(torch.bfloat16).to(torch.promote_types(torch.bfloat16, dtype))
        expected = write(merge_into(model, {adapter: 1.0}).to(dtype), tmp_path / f"expected {dtype}")
        assert_same_tensors(report.out, expected)
        assert (report.out / "config.json").read_bytes() == (expected / "config.json").read_bytes()
        assert report.replaced == ("classifier.bias", "classifier.weight")
        index = json.loads((report.out / "model.safetensors.index.json").read_text(encoding="utf-8"))
        assert (
            index["metadata"]["total_size"] == report.nbytes == sum(each.nbytes for each in stored(expected).values())
        )
        assert set(index["weight_map"]) == set(stored(base))


def test_what_is_no_float_keeps_its_dtype_and_floats_of_8_bits_are_merged_into_in_a_wider_one(tmp_path: Path) -> None:
    base, plain = save_model(LLAMA, tmp_path / "base"), save_model(LLAMA, tmp_path / "plain")
    adapter, narrow, bfloat16 = save_adapter(LLAMA, tmp_path / "adapter"), torch.float8_e4m3fn, torch.bfloat16
    others = {"position_ids": torch.arange(5), "empty": torch.empty(0, 3), "scalar": torch.tensor(1.5)}
    held = {name: tensor.to(narrow) for name, tensor in stored(base).items()}
    edit_model(base, held | others)
    edit_model(plain, {name: tensor.float() for name, tensor in held.items()} | others)
    with pytest.raises(MergeError, match=r"is torch\.float8_e4m3fn, which would lose most of an update: give a dtype"):
        randlora.files.merge(adapter, tmp_path / "out", base=base)
    for dtype in (torch.float32, bfloat16):
        found, expected = (
            randlora.files.merge(adapter, tmp_path / f"{of.name} {dtype}", base=of, dtype=dtype).out
            for of in (base, plain)
        )
        assert_same_tensors(found, expected)
    merged = stored(found)
    assert same_bits(merged.pop("position_ids"), torch.arange(5))
    assert merged["empty"].shape == (0, 3)
    assert {tensor.dtype for tensor in merged.values()} == {bfloat16}
    edit_model(base, {f"{Q}.scale_weight": torch.ones(())})
    with pytest.raises(MergeError, match=r"q_proj\.weight is torch\.float8_e4m3fn and has a scale, .*scale_weight"):
        randlora.files.merge(adapter, tmp_path / "out", base=base, dtype=bfloat16)
    assert not (tmp_path / "out").exists()


@every_read_kind
def test_files_of_every_kind_are_inspected_merged_as_in_memory_and_not_converted_for_peft(
    kind: ReadKind, tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in kind.model().state_dict().items()}
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    model, adapter = kind.adapted(), tmp_path / "adapter"
    randlora.save(model, adapter)
    summary = randlora.files.inspect(adapter, norms=True)
    (found,), update = summary.layers, randlora.delta_weight(model, kind.target).detach().double()
    *stack, out_features, in_features = kind.layer(model).adapters["default"].shape
    assert (found.fqn, found.out_features, found.in_features) == (kind.target, out_features, in_features)
    assert summary.trainable_parameters == sum(part.numel() for part in adapter_values(model).values())
    matrices = len(kind.diagonals(model)[0]) if stack and kind.diagonals(model)[0].dim() == 3 else 1
    assert found.matrices == matrices
    assert ("matrices" in str(summary)) == (matrices > 1)
    norms = float(update.norm()), float(torch.linalg.svdvals(update.reshape(*stack, out_features, in_features)).max())
    assert (found.frobenius, found.spectral) == pytest.approx(norms, rel=1e-5)
    assert randlora.files.verify(adapter, tmp_path / "base").passed
    if kind.kind != "linear":
        with pytest.raises(CheckpointError, match=rf"cannot convert for PEFT: .* not {kind.target} \({kind.kind}\)"):
            randlora.files.convert(adapter, tmp_path / "out", "peft")
        what = rf"(of kind {kind.kind}|a stack of \d matrices)"
        with pytest.raises(ConfigError, match=rf"{kind.target} is {what}, and only linear layers"):
            randlora.files.convert(adapter, tmp_path / "out", "lora", tolerance=1.0)
        randlora.files.convert(adapter, tmp_path / "native", "native")
        (again, header), (own, expected) = read_tensors(tmp_path / "native"), read_tensors(adapter)
        assert (all_bits(again), header) == (all_bits(own), expected)
    randlora.files.merge(adapter, tmp_path / "out", base=tmp_path / "base")
    randlora.merge(model)
    assert all_bits(load_file(tmp_path / "out" / "model.safetensors")) == all_bits(model.state_dict())


# What does not fit, or cannot be meant: refused, and nothing is written


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory with a base and an adapter."""
    save_model(LLAMA, tmp_path / "base", is_sharded=True)
    save_adapter(LLAMA, tmp_path / "adapter")
    return tmp_path


def merge(root: Path, **options: Any) -> Path:
    """Merge the adapter below a directory into the base there, or what is given."""
    return randlora.files.merge(**{
        "base": root / "base",
        "adapters": root / "adapter",
        "out": root / "out",
        **options,
    }).out


def refused(root: Path, match: str, error: type[Exception] = CheckpointError, **options: Any) -> None:
    """Check that merging is refused, and that nothing changed."""
    before = contents(root)
    with pytest.raises(error, match=match):
        merge(root, **options)
    assert contents(root) == before
    assert not list(root.glob("**/.*"))


def misfit(
    build: Callable[[], nn.Module],
    adapted: Callable[[], nn.Module] | None = None,
    changes: Callable[[dict[str, Tensor]], dict[str, Tensor | None]] = lambda _: {},
    **options: Any,
) -> Callable[[Path], object]:
    """Return what writes a base, with changes to its tensors, and an adapter of that or of another model."""

    def prepare(root: Path) -> None:
        model = build()
        if isinstance(model, nn.Sequential):
            (root / "base").mkdir()
            save_file(model.state_dict(), root / "base" / "model.safetensors")
        else:
            write(model, root / "base")
        edit_model(root / "base", changes(stored(root / "base")))
        adapter_of(adapted() if adapted else model, root / "adapter", **options)

    return prepare


def untied() -> nn.Module:
    config: Any = GPT2.build().config
    config.tie_word_embeddings = False
    return transformers.GPT2LMHeadModel(config)  # type: ignore[no-any-return]


def of_norm(root: Path) -> None:
    save_model(LLAMA, root / "base")
    held = load_file(save_adapter(LLAMA, root / "adapter") / TENSORS_FILE)
    renamed = {name.replace("layers.0.self_attn.q_proj", "norm"): tensor for name, tensor in held.items()}
    save_file(renamed, root / "adapter" / TENSORS_FILE)


def of_peft(root: Path) -> None:
    misfit(LLAMA.build, changes=lambda _: {f"{Q}.weight": torch.ones(34, 30)})(root)
    shutil.rmtree(root / "adapter")
    their_directory(LLAMA, root)[0].rename(root / "adapter")


def narrowed(held: dict[str, Tensor]) -> dict[str, Tensor | None]:
    return {name: each[:, :, :4].contiguous() for name, each in held.items() if name.endswith("projection.weight")}


def experts(change: Callable[[Tensor], Tensor | None], part: str = "w1") -> Callable[[Path], object]:
    """Change the tensors of an expert."""
    return misfit(
        lambda: made(mixtral, dtype=torch.float32),
        changes=lambda held: {name: change(each) for name, each in held.items() if f"1.{EXPERT}.{part}" in name},
        targets=EXPERTS,
    )


EXPERT = "block_sparse_moe.experts.2"
MADE_OF = r"model\.layers\.1\.mlp\.experts\.gate_up_proj is made of .*experts\.0\.w1\.weight, .* and \d more when it is"
MISFITS: dict[str, tuple[Callable[[Path], object], str]] = {
    "layer": (misfit(LLAMA.build, lambda: llama(num_hidden_layers=3)), r"no layer model\.layers\.2\.self_attn\.q_proj"),
    "tensor": (misfit(LLAMA.build, changes=lambda _: {f"{Q}.weight": None}), f"the model has no layer {Q}"),
    "shape": (
        misfit(LLAMA.build, lambda: llama(intermediate_size=40), targets=["up_proj"]),
        r"model\.layers\.0\.mlp\.up_proj is 48 x 32 here, the adapter was trained on out x in = 40 x 32",
    ),
    "shape-of-tensor": (
        misfit(LLAMA.build, changes=lambda _: {f"{Q}.weight": torch.ones(34, 30)}), f"{Q} is 34 x 30 here"
    ),
    "of-PEFT": (of_peft, f"{Q} is 34 x 30 here"),
    "tied": (misfit(GPT2.build, untied, targets=["lm_head"]), r"weight of lm_head is tied to transformer\.wte\.weight"),
    "norm": (of_norm, r"model\.norm \(LlamaRMSNorm\) has no weight that can be adapted"),
    "head": (
        misfit(BERT.build, changes=lambda _: {"classifier.weight": torch.ones(5, 32)}, train_also=["classifier"]),
        r"classifier\.weight has shape \(5, 32\) here",
    ),
    "kernel": (
        misfit(lambda: nn.Sequential(nn.Conv2d(3, 8, 5)), lambda: nn.Sequential(nn.Conv2d(3, 8, 3)), targets=["0"]),
        "0 is 8 x 75 here, the adapter was trained on out x in = 8 x 27",
    ),
    "kernel-of-a-class": (
        misfit(VIT.build, changes=narrowed, targets=["projection"]),
        "projection is 32 x 96 here, the adapter was trained on out x in = 32 x",
    ),
    "part-of-expert": (experts(lambda _: None), f"{MADE_OF} loaded, and .*merge in memory"),
    "expert": (experts(lambda _: None, part=""), f"{MADE_OF} loaded, and .*merge in memory"),
    "shape-of-expert": (experts(lambda each: each[1:].clone()), f"{MADE_OF} loaded, and .*merge in memory"),
}  # fmt: skip


@pytest.mark.parametrize(("prepare", "match"), MISFITS.values(), ids=MISFITS)
def test_an_adapter_that_does_not_fit_the_base_is_refused(
    prepare: Callable[[Path], object], match: str, tmp_path: Path
) -> None:
    """And is a failed check, beside which the bases are checked all the same."""
    prepare(tmp_path)
    refused(tmp_path, rf"cannot merge .*adapter(?s:.*){match}")
    verification = randlora.files.verify(tmp_path / "adapter", tmp_path / "base")
    outcomes = {check.name: check.outcome for check in verification.checks}
    assert (outcomes.pop("base"), "failed" in outcomes.values()) == ("failed", False)
    assert re.search(match, " ".join(check.words for check in verification.checks if check.outcome == "failed"))


def test_what_cannot_be_meant_or_computed_is_refused(root: Path) -> None:
    adapter, link = root / "adapter", root / "link"
    link.symlink_to(adapter)
    other = save_adapter(LLAMA, root / "other", train_also=["model.norm"])
    again = save_adapter(LLAMA, root / "again", train_also=["model.norm"])
    twice: tuple[Any, ...] = (
        *([adapter, adapter], {str(adapter): 0.5, f"{adapter}/": 0.25}, [adapter, link]),
        [adapter / ".." / adapter.name, adapter],
    )
    for adapters in twice:
        refused(root, "named twice", ConfigError, adapters=adapters)
    refused(root, "must be a finite number, got nan", ConfigError, adapters={adapter: float("nan")})
    refused(root, "dtype must be one of .*got torch.int8", ConfigError, dtype=torch.int8)
    refused(root, "there is no adapter", ConfigError, adapters=[])
    refused(root, "would not be finite in torch.float32", MergeError, adapters={adapter: 1e38})
    large = {"adapters": {adapter: 1e6}, "dtype": torch.float16}
    refused(root, "values that are too large for torch.float16", MergeError, **large)
    refused(root, r"cannot merge .*other.*trained model\.norm\.weight too", adapters=[again, other])
    refused(root, "adapter' names no base model .*give base=", base=None)
    edit_fields(again, {"base_model_name_or_path": "no/such/place"})
    refused(root, "'no/such/place', which the adapter names, is not there: give base=", base=None, adapters=again)
    edit_fields(adapter, {"base_model_name_or_path": str(root / "base")})
    refused(root, "the adapters name different base models", adapters=[adapter, again], base=None)
    assert contents(merge(root, base=None)) == contents(merge(root, out=root / "expected"))


def test_an_output_is_replaced_as_a_whole_on_demand_and_nothing_else_is(root: Path) -> None:
    out, single = merge(root), save_model(LLAMA, root / "single")
    refused(root, "out exists and is not empty: choose a different name, or give overwrite=True", MergeError)
    merge(root, base=single, overwrite=True)  # which has no index and no shards
    assert contents(out) == contents(merge(root, out=root / "expected", base=single))
    (out / "checkpoint-10").mkdir()
    (out / "checkpoint-10" / "model.safetensors").write_bytes(b"x")
    refused(root, r"out holds other files, which would be lost: checkpoint-10", MergeError, overwrite=True)
    for inside in (root / "base", root, root / "base" / "deep" / "out", root / "adapter" / "deep" / "out"):
        refused(root, "an input that must not change|would be lost", MergeError, out=inside, overwrite=True)
    shutil.rmtree(out)
    out.symlink_to(root / "nowhere")
    for overwrite in (False, True):
        refused(root, "out is a file or a broken link", MergeError, overwrite=overwrite)


# What goes wrong in the middle


@contextmanager
def without_rights() -> Iterator[None]:
    """Be a user to whom permissions apply, as they do not to root."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def test_inputs_are_never_opened_for_writing_and_a_locked_directory_is_refused() -> None:
    with tempfile.TemporaryDirectory() as made:  # pytest's own directories let nobody else in
        root, locked, out = Path(made), Path(made) / "locked", Path(made) / "open"
        save_model(LLAMA, root / "base")
        save_adapter(LLAMA, root / "adapter")
        locked.mkdir()
        out.mkdir()
        for path in (root, *root.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        out.chmod(0o777)
        with without_rights():
            refused(root, "Permission denied", PermissionError, out=locked / "out")
            merge(root, out=out / "merged")
        for path in (root, *root.rglob("*")):
            path.chmod(path.stat().st_mode | stat.S_IWUSR)


def test_what_the_disk_has_no_room_for_is_not_begun(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = sum(map(len, contents(root / "base").values()))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=int(0.9 * needed)))
    refused(root, r"it needs .*, .* are free", MergeError)


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
        shown = capsys.readouterr()
        assert shown.out == ""
        assert re.search(r"error: File too large: .*\.safetensors", shown.err)
        assert contents(root) == before
        assert sorted(path.name for path in root.iterdir()) == ["adapter", "base", "out"][: 2 + len(more)]
        if not more:
            merge(root)
