"""What files say without loading a model: inspected, verified and planned for, here and on the Hub, as by the model."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import nn

import randlora
from randlora import files
from randlora.__main__ import main
from randlora.errors import CheckpointError, TargetError
from randlora.files.adapter import open_base
from randlora.files.inspect import Verification
from randlora.targets.select import find_targets
from tests.checkpoint_files import CONFIG_FILE, TENSORS_FILE, basis_of, edit_fields, edit_tensors
from tests.hub_server import Hub, Repository
from tests.kit import adapt, fill
from tests.model_directories import HEADS, contents, edit_json, edit_model, save_adapter, save_model, stored, write
from tests.models import BERT, GPT2, LLAMA, VIT, RealModel
from tests.peer import ALPHA, THEIR_WARNINGS, R, base_directory, in_ours, our_directory, their_directory, told_stream
from tests.quantized import KINDS, every_quantization, load_quantized, quantize

pytestmark = THEIR_WARNINGS


def outcomes(verification: Verification) -> dict[str, str]:
    return {check.name: check.outcome for check in verification.checks}


@pytest.mark.parametrize(
    ("kind", "options"),
    [(LLAMA, {}), (GPT2, {"basis": "block"}), (VIT, {"basis": "sparse", "stream": "portable", "seed": 5})],
    ids=["llama", "gpt2", "vit"],
)
def test_what_we_saved_passes_and_is_as_in_the_model(kind: RealModel, options: dict[str, Any], tmp_path: Path) -> None:
    source, model = our_directory(kind, tmp_path, bases="stored" if kind is GPT2 else "seed", **options)
    told: list[tuple[int, int, str]] = []
    summary = files.inspect(source, progress=lambda *news: told.append(news))
    assert told == [(n, len(told) - 1, doing) for n, doing in enumerate([*(x.fqn for x in summary.layers), "done"])]
    assert summary.trainable_parameters == randlora.load(kind.build(), source).trainable_parameters
    sizes = [(site.fqn, *site.shape) for site in find_targets(model, list(kind.targets))]
    assert [(layer.fqn, layer.out_features, layer.in_features) for layer in summary.layers] == sizes
    for layer in summary.layers:
        values = torch.linalg.svdvals(randlora.delta_weight(model, layer.fqn).detach().double())
        assert layer.stable_rank == pytest.approx(float((values / values[0]).square().sum()), rel=1e-4)
        assert layer.num_bases == -(-layer.min_dim // R)
    basis, (bases,) = basis_of(model), summary.bases
    assert (bases.spec, bases.source, bases.digest) == (basis.spec, "seed", basis.digest(*basis.extent))
    assert (summary.config.r, summary.config.alpha) == (R, ALPHA)
    assert summary.writer == f"randlora {randlora.__version__}, format 1"
    assert summary.storage == ("stored in the file" if kind is GPT2 else "drawn from the seed")
    assert summary.nbytes == sum(len(contents(source)[name]) for name in (CONFIG_FILE, TENSORS_FILE))
    (head,) = (line for line in str(summary).splitlines() if "num_bases" in line)
    assert {*head.split()}.isdisjoint({"r", "alpha"}), "all layers have the same"
    assert "bases: " not in str(summary), "they are on lines of their own"
    source = source.rename(tmp_path / os.fsdecode(b"caf\xe9"))  # no UTF-8
    assert {(each.frobenius, each.stable_rank) for each in files.inspect(source, norms=False).layers} == {(None, None)}
    found = files.verify(source, progress=lambda *news: told.append(news))
    assert outcomes(found) == {"files": "passed", "checksum": "passed", "bases": "passed"}
    assert str(found).endswith("is sound")
    assert told[-1][0] == told[-1][1]


def test_layer_10_is_listed_after_layer_9(tmp_path: Path) -> None:
    randlora.save(adapt(nn.Sequential(*(nn.Linear(3, 3) for _ in range(11)))), tmp_path)
    edit_tensors(tmp_path, {})  # as of PEFT, without a list of layers
    assert [layer.fqn for layer in files.inspect(tmp_path).layers] == [*map(str, range(11))]


def test_what_was_trained_beside_it_its_base_and_strange_fields_are_named(tmp_path: Path) -> None:
    source, _ = our_directory(BERT, tmp_path, train_also=["classifier"])
    edit_model(base := base_directory(BERT, tmp_path), {"classifier.weight": None, "classifier.bias": None})
    edit_fields(source, {"use_quantum": 3, "base_model_name_or_path": "some/model"})
    summary = files.inspect(source)
    assert summary.trained == {"classifier.weight": (3, 32), "classifier.bias": (3,)}
    assert (summary.base_model, summary.unknown_fields) == ("some/model", ("use_quantum",))
    found = files.verify(source, base)
    assert not found.passed
    lacking = "the model's files have no classifier.weight, classifier.bias, which the adapter trained"
    said = "some/model", "trained with it: classifier.weight 3x32", "not understood: use_quantum", lacking
    assert [each in text for each, text in zip(said, [str(summary)] * 3 + [str(found)], strict=True)] == [True] * 4


@pytest.mark.parametrize("copies", ["per layer", "once", "none"])
def test_a_file_of_peft_says_all_but_the_shapes_and_with_its_base_all(copies: str, tmp_path: Path) -> None:
    source, _ = their_directory(LLAMA, tmp_path, save_projection=copies != "none")
    if copies == "once":
        top = {"base_model.randlora_A", "base_model.randlora_B"}
        tensors = load_file(source / TENSORS_FILE)
        edit_tensors(source, {}, drop=[key for key in tensors if key not in top and key[-2:] in ("_A", "_B")])
    summary, base, stream = files.inspect(source), base_directory(LLAMA, tmp_path), told_stream(source)
    assert summary.storage == ("drawn from the seed" if copies == "none" else "stored in the file")
    assert summary.writer == "PEFT 0.21.2"
    assert {(layer.out_features, layer.in_features, layer.frobenius) for layer in summary.layers} == {(None,) * 3}
    assert "give base=, the directory of its base model" in summary.notes[-1]
    assert "?" in str(summary)
    whole, model = files.inspect(source, base, stream=stream), in_ours(LLAMA, source)
    for layer in whole.layers:
        norm = torch.linalg.norm(randlora.delta_weight(model, layer.fqn).detach().double())
        assert layer.frobenius == pytest.approx(float(norm), rel=1e-5)
    basis = basis_of(model)
    assert whole.bases[0].digest == basis.digest(*basis.extent)
    all_of_them = basis.digest(basis.spec.max_dim, basis.spec.min_dim)
    assert [found.digest for found in summary.bases] == [all_of_them] * (copies != "none")
    assert len(whole.notes) == (copies == "none" and stream is None)  # of the stream assumed
    passed = {"files": "passed", "checksum": "not checked", "bases": "not checked" if copies == "none" else "passed"}
    alone, beside = (files.verify(source, of) for of in (None, base))
    assert (outcomes(alone), outcomes(beside)) == (passed, {**passed, "base": "passed"})
    assert (alone.passed, beside.passed) == (True, True)


REGEX = {"targets": r".*\.(1|0)\..*", "exclude": r".*\.(up_proj|c_fc)", "basis": "very_sparse", "alpha": 3.0}
BY_LAYER: dict[str, Any] = {"targets": "all-linear", "r": {"query": 8, ".*": 4}, "alpha": {"key": 2, ".*": 16}}
PLANNED: dict[str, tuple[RealModel, bool, dict[str, Any]]] = {
    "preset": (LLAMA, True, {}),
    "r and alpha by layer": (BERT, False, BY_LAYER),
    "block": (VIT, True, {"targets": "all-linear", "basis": "block", "r": 8, "seed": 5}),
    "regex": (GPT2, False, REGEX),
}


@pytest.mark.parametrize(("kind", "is_sharded", "options"), PLANNED.values(), ids=PLANNED)
def test_headers_plan_as_the_model(kind: RealModel, is_sharded: bool, options: dict[str, Any], tmp_path: Path) -> None:
    model = kind.build().to(torch.bfloat16)
    write(model, tmp_path, is_sharded=is_sharded)
    before = contents(tmp_path)
    asked: dict[str, Any] = {"r": 4, "train_also": [HEADS[kind.name]] if is_sharded else None, **options}
    assert files.plan(tmp_path, **asked) == randlora.plan(model, **asked)
    asked |= {"devices": 3, "strategy": "fsdp2" if is_sharded else "ddp", "tokens": 10}
    assert files.training_memory(tmp_path, **asked) == randlora.training_memory(model, **asked)
    assert contents(tmp_path) == before


UNPLANNED: dict[str, dict[str, Any]] = {
    "it makes more than 34 modules and parameters": {},
    "it is quantized, and only the headers of its files say how": {
        "quantization_config": {"quant_method": "bitsandbytes"}
    },
    "its config.json names NoneForCausalLM": {"architectures": ["NoneForCausalLM"], "quantization_config": None},
}


@pytest.mark.parametrize("is_on_hub", [False, True], ids=["here", "on the Hub"])
def test_a_config_alone_plans_as_the_model_and_says_that_nothing_else_was_read(
    hub: Hub, is_on_hub: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = GPT2.build()
    model.config.architectures = ["GPT2LMHeadModel"]
    model.config.save_pretrained(BASE)
    (BASE / "pytorch_model.bin").write_bytes(b"not read")
    put(hub, "org/model", contents(BASE))
    source, options = "org/model" if is_on_hub else BASE, dict[str, Any](r=4, targets="all-linear")
    expected = randlora.plan(model, **options)
    note = "planned from config.json alone: names, shapes and dtypes in a checkpoint were not checked"
    assert files.plan(source, **options) == replace(expected, notes=(*expected.notes, note))
    assert files.training_memory(source, **options) == randlora.training_memory(model, **options)
    assert not [request for request in hub.requests if ".bin" in request]
    with pytest.raises(CheckpointError, match="no such file" if is_on_hub else "holds no weights in safetensors files"):
        files.merge(save_adapter(GPT2, ADAPTER), "merged", base=source)
    for message, changes in UNPLANNED.items():
        edit_json(BASE / "config.json", **changes)
        put(hub, "org/model", contents(BASE))
        with monkeypatch.context() as patch:
            for name in ("OF_A_CONFIG", "FOR_ANY_MODEL") if not changes else ():
                patch.setattr(f"randlora.files.transformers_model.{name}", 2)
            with pytest.raises(CheckpointError, match=message):
                files.plan(source)


def test_a_plan_of_files_is_of_the_class_that_they_name_and_one_of_a_model_on_meta_of_any(tmp_path: Path) -> None:
    write(LLAMA.build(), tmp_path)
    with pytest.raises(TargetError, match=r"train_also=.score. matches no module or parameter"):
        files.plan(tmp_path, 4, train_also="score")
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    report = randlora.plan(model, 4, train_also="score")
    assert (report.train_also, report.targets) == (("score.weight",), files.plan(tmp_path, 4).targets)


def test_a_plan_may_be_of_other_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(gpt2 := GPT2.build(), first := tmp_path / "first")  # whose files have other names, and masks
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in stored(first).items()}
    masks = {"bias": torch.ones(1, 1, 64, 64), "masked_bias": torch.tensor(-1e4)}
    tensors |= {f"h.{block}.attn.{name}": mask.clone() for name, mask in masks.items() for block in range(2)}
    save_file(tensors, first / "model.safetensors", {"format": "pt"})
    assert files.plan(first, 4, targets="all-linear") == randlora.plan(gpt2, 4, targets="all-linear")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match=r"(?s)cannot plan for .*transformers, .* not installed: python -m pip"):
        files.plan(first)


@every_quantization
def test_a_quantized_model_is_planned_and_not_merged_into(kind: RealModel, quantization: str, tmp_path: Path) -> None:
    base, dense = quantize(kind, quantization, tmp_path / "base", is_sharded=True), tmp_path / "base dense"
    options: dict[str, Any] = {"r": 4, "targets": "all-linear", "train_also": [HEADS[kind.name]]}
    expected = files.plan(dense, **options)
    note = f"the model is quantized ({KINDS[quantization]}): parameters are counted as if it were not quantized"
    assert files.plan(base, **options) == replace(expected, notes=(*expected.notes, note))
    size = sum(tensor.nbytes for tensor in [*stored(base).values(), *kind.build().to(torch.bfloat16).buffers()])
    assert files.training_memory(base, **options).weights == size

    # adapters of codes of 4 bits in rows as short as these are refused
    model = load_quantized(dense, quantization) if quantization == "8 bits" else kind.build()
    report = randlora.inject(model, r=4, targets=list(kind.targets))
    randlora.save(fill(model), adapter := tmp_path / "adapter")
    message = rf"base', which is quantized \({KINDS[quantization]}\): load the model and merge in memory, or merge into"
    with pytest.raises(CheckpointError, match=message):
        files.merge(adapter, tmp_path / "out", base=base)
    assert all(files.verify(adapter, place).passed for place in (base, dense))
    assert tuple(layer.fqn for layer in files.inspect(adapter, base).layers) == report.targets
    assert len(files.merge(adapter, tmp_path / "out", base=dense).merged) == len(report.targets)


def test_what_the_first_versions_said_of_codes_suffices_and_they_cannot_be_trained(tmp_path: Path) -> None:
    base = quantize(LLAMA, "nf4", tmp_path / "base")
    with pytest.raises(TargetError, match=r"train_also includes model.layers.0.mlp.up_proj.weight, which is"):
        files.plan(base, 4, targets=["q_proj"], train_also=["up_proj"])
    adapter = save_adapter(LLAMA, tmp_path / "adapter", targets=["q_proj"], train_also=["up_proj"])
    with pytest.raises(CheckpointError, match=r"up_proj\.weight is quantized here, and was trained as"):
        files.inspect(adapter, base)
    expected = files.plan(base, 4)
    for said in ({"load_in_4bit": True}, None):
        edit_json(base / "config.json", quantization_config=said)
        assert files.plan(base, 4) == expected


BASE, ADAPTER = Path("base"), Path("adapter")


def put(hub: Hub, repo_id: str, files: dict[str, bytes]) -> Repository:
    hub.repositories[repo_id] = Repository()
    hub.repositories[repo_id].commit(files)
    return hub.repositories[repo_id]


@pytest.mark.medium
@pytest.mark.parametrize("layout", ["one file", "sharded", "nf4 twice", "8 bits"])
def test_a_plan_reads_headers_and_no_weights(hub: Hub, layout: str) -> None:
    is_dense = layout in ("one file", "sharded")
    if is_dense:
        save_model(LLAMA, BASE, is_sharded=layout == "sharded")
    else:
        quantize(LLAMA, layout, BASE, is_sharded=True)
    repository = put(hub, "org/model", contents(BASE))
    if layout == "one file":
        repository.commit({"model.safetensors": repository.files()["model.safetensors"] + bytes(10**6)})
    options: dict[str, Any] = {"r": 4, "tokens": 100}
    plan, memory = files.plan("org/model", r=4), files.training_memory("org/model", **options)
    assert plan == files.plan(BASE, r=4)
    assert str(memory) == str(files.training_memory(BASE, **options))
    assert 0 < hub.sent < 5 * 10**5
    if not is_dense:
        with pytest.raises(CheckpointError, match=r"cannot merge into 'org/model', which is quantized"):
            files.merge(save_adapter(LLAMA, ADAPTER), "merged", base="org/model")
    assert not [path for path in Path("cache").rglob("*.safetensors") if path.is_symlink()]


def test_a_merge_downloads_both_and_equals_that_of_directories(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(LLAMA, BASE, is_sharded=True)
    other = {"pytorch_model.bin": b"large", "consolidated.safetensors": b"large", "tokenizer.json": b"{}"}
    put(hub, "org/model", contents(BASE) | other)
    put(hub, "user/adapter", contents(save_adapter(LLAMA, ADAPTER)))
    (BASE / "tokenizer.json").write_bytes(b"{}")

    def open_before_a_push(*arguments: Any) -> Any:
        opened = open_base(*arguments)
        hub.repositories["org/model"].commit({"config.json": b"{}"})
        return opened

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["randlora.files.merge"], "open_base", open_before_a_push)
        report = files.merge({"user/adapter": 0.5}, "merged", base="org/model")
    for repository in ("user/adapter", "org/model"):  # whatever is pushed after that
        assert hub.requests.count(f"GET /api/models/{repository}/revision/main") == 1
    assert not [request for request in hub.requests if "consolidated" in request or ".bin" in request]
    expected = files.merge({ADAPTER: 0.5}, "expected", base=BASE)
    assert contents(Path("merged")) == contents(Path("expected"))
    assert report == replace(expected, out=Path("merged"), adapters={"user/adapter": 0.5})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert files.plan("org/model", r=4) == files.plan(BASE, r=4)


@pytest.mark.medium
def test_every_command_takes_revisions_and_says_what_is_nowhere(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    put(hub, "org/model", contents(save_model(LLAMA, BASE)))
    put(hub, "user/adapter", contents(save_adapter(LLAMA, ADAPTER)))
    assert main(["verify", "user/adapter", "--base", "org/model"]) == 0
    assert capsys.readouterr().out.endswith("user/adapter is sound\n")
    assert hub.requests.count("GET /api/models/org/model/revision/main") == 1
    for repository, damaged in (("org/model", "model.safetensors"), ("user/adapter", "adapter_model.safetensors")):
        hub.repositories[repository].refs["v1"] = hub.repositories[repository].refs["main"]
        hub.repositories[repository].commit({damaged: b"12345678"})
    both = ["--revision", "v1", "--base", "org/model", "--base-revision", "v1"]
    assert main(["plan", "org/model", "--revision", "v1", "--r", "4"]) == 0
    for command in (["inspect"], ["verify"], ["merge", "merged"], ["convert", "out", "--to", "native"]):
        name, *more = command
        assert main([name, "user/adapter", *more, *both]) == 0
        assert main([name, "user/adapter", *more, *both, "--revision", "main"]) == 1
        assert main([name, "user/adapter", *more, *both, "--base-revision", "main"]) == 1
    assert files.training_memory("org/model", 4, revision="v1") == files.training_memory(BASE, 4)

    hub.requests.clear()
    for words in (["plan", "base"], ["verify", "adapter"], ["merge", "adapter", "out", "--base", "org/model"]):
        assert main([*words, "--revision", "v1"]) == 1
        assert "a path has no revision, got 'v1' for '" in capsys.readouterr().err
    assert main(["inspect", "adapter", "--base-revision", "v1"]) == 2
    assert capsys.readouterr().err == "error: --base-revision is for a base model: give --base too\n"
    assert hub.requests == [], "before anything is downloaded"
    said = {"org/none": "there is no such path, and the Hub's repository 'org/none'", "x": "no such directory: x\n"}
    for name, message in said.items():
        for words in (["plan", name], ["verify", "adapter", "--base", name], ["verify", name]):
            assert main(words) == 1
            assert message in capsys.readouterr().err


@pytest.mark.medium
def test_what_headers_do_not_tell_is_an_error_that_names_it(hub: Hub) -> None:
    coded, no_class = contents(quantize(LLAMA, "nf4", BASE)), "cannot be read without its model: its config.json names"
    unread: dict[str, dict[str, bytes]] = {
        "config.json names no class": {},
        "the header of model.safetensors": {"model.safetensors": b"12345678"},
        f"{no_class} no class": coded | {"config.json": b"{}"},
        f"{no_class} None": coded | {"config.json": b'{"architectures": ["NoneForCausalLM"]}'},
    }
    for number, (message, held) in enumerate(unread.items()):
        put(hub, f"org/{number}", {"config.json": b"{}", **held})
        with pytest.raises(CheckpointError, match=message):
            files.plan(f"org/{number}", r=4)
