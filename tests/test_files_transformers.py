"""What is planned and merged from files agrees with the model in memory, for every class that transformers has."""

import json
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import randlora
from randlora.errors import CheckpointError, ConfigError, TargetError
from randlora.files.model_directory import read_model_directory
from randlora.files.transformers_model import build_model
from randlora.report import Report
from randlora.targets.census import Census
from tests.checkpoint_files import TENSORS_FILE, edit_fields, read_fields, reseal
from tests.kit import fill, same_bits
from tests.model_directories import assert_same_tensors, contents, save_adapter, save_model, stored, write
from tests.models import BERT, GPT2, LLAMA, VIT
from tests.transformers_zoo import TASKS, classes, tiny

AGREEING = (
    *("MixtralForCausalLM", "Qwen3MoeForCausalLM", "Phi3ForCausalLM", "T5ForConditionalGeneration", "GteForMaskedLM"),
    *("HrmTextForCausalLM", "Dinov2ForImageClassification", "DeepseekV3ForCausalLM", "BartForSequenceClassification"),
)
"""Classes for the quick run: experts in one tensor, renamed layers, fused projections, tied heads."""

LEAST = {"causal LM": 140, "masked LM": 40, "sequence classification": 105, "vision": 20, "encoder and decoder": 30}
"""How many classes of a task are at least built and compared."""


def outcome(plan: Callable[..., Report], model: object, targets: str | None) -> Report | str:
    """Return the report; or the error, which some models with tied layers or none to adapt come to."""
    try:
        return plan(model, r=4, targets=targets)
    except TargetError as error:
        return str(error)


def assert_files_agree(name: str, model: nn.Module, directory: Path) -> None:
    """Plan, and adapt the attention and the experts of a model on disk and in memory, and compare."""
    base, model_class = write(model, directory / "base"), getattr(transformers, name)
    before = contents(base)
    for targets in (None, "all-linear"):
        planned = outcome(randlora.plan, model, targets)
        assert outcome(randlora.files.plan, base, targets) == planned
    if isinstance(planned, str):
        return
    experts = [site.fqn for site in Census.of(model).sites if site.layer_class.kind == "experts"]
    chosen = [fqn for fqn in (*planned.targets, *experts) if re.search("attn|attention|expert", fqn, re.IGNORECASE)]
    randlora.inject(model, r=4, targets=chosen or list(planned.targets))
    randlora.save(fill(model), directory / "adapter")
    assert randlora.files.verify(directory / "adapter", base).passed
    report = randlora.files.merge(directory / "adapter", directory / "out", base=base)
    assert contents(base) == before
    loaded = model_class.from_pretrained(base)
    randlora.load(loaded, directory / "adapter")
    randlora.merge(loaded)
    assert_same_tensors(report.out, write(loaded, directory / "expected"))
    found, own = stored(report.out), stored(base)
    assert {name for name in found if not same_bits(found[name], own[name])} == set(report.merged) != set()


@pytest.mark.parametrize(
    ("model_type", "name"), [pytest.param(kind, name, id=name) for _, kind, name in classes() if name in AGREEING]
)
def test_a_class_is_planned_and_merged_as_in_memory(model_type: str, name: str, tmp_path: Path) -> None:
    model = tiny(model_type, name)
    assert model is not None
    assert_files_agree(name, model, tmp_path)


@pytest.mark.filterwarnings("ignore:the default adapts only:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_every_class_is_planned_and_merged_as_in_memory(task: str, tmp_path: Path) -> None:
    compared, unlike = 0, {}
    for _, model_type, name in (entry for entry in classes() if entry[0] == task):
        if (model := tiny(model_type, name)) is None:
            continue
        compared += 1
        try:
            assert_files_agree(name, model, tmp_path / name)
        except (AssertionError, randlora.errors.RandLoRAError) as error:
            unlike[name] = str(error)[:500]
    assert unlike == {}
    assert compared >= LEAST[task]


def test_without_transformers_names_that_agree_are_merged_and_others_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = save_model(LLAMA, tmp_path / "base"), save_adapter(LLAMA, tmp_path / "adapter", train_also=["norm"])
    transformers.LlamaForCausalLM.from_pretrained(base).model.save_pretrained(tmp_path / "bare")
    vit, of_vit = save_model(VIT, tmp_path / "vit"), save_adapter(VIT, tmp_path / "of vit")
    expected = randlora.files.merge(adapter, tmp_path / "expected", base=base).out
    reseal(earlier := save_adapter(LLAMA, tmp_path / "earlier", targets=["up_proj"]), transposed=None)
    of_earlier = randlora.files.merge(earlier, tmp_path / "of earlier", base=base).out
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert contents(randlora.files.merge(adapter, tmp_path / "merged", base=base).out) == contents(expected)
    again = randlora.files.merge(earlier, tmp_path / "again", base=base).out  # a weight's shape says how it is stored
    assert contents(again) == contents(of_earlier)
    assert randlora.files.verify(adapter, base).passed
    with pytest.raises(CheckpointError, match="differ by the prefix 'model': give prefix=\"model\""):
        randlora.files.merge(adapter, tmp_path / "out", base=tmp_path / "bare")
    with pytest.raises(CheckpointError, match=r"has no layer vit.layers.0.* under this name \(transformers, "):
        randlora.files.merge(of_vit, tmp_path / "out", base=vit)
    assert not (tmp_path / "out").exists()
    found = stored(randlora.files.merge(adapter, tmp_path / "out", base=tmp_path / "bare", prefix="model").out)
    own = stored(expected)
    assert all(same_bits(found[name], own[f"model.{name}"]) for name in found)


def test_without_transformers_our_files_say_which_weights_are_transposed_and_others_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of square ``Conv1D`` layers and of an `nn.Linear` that is not square."""
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 20, "num_labels": 2, "pad_token_id": 0}
    model, adapter = transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**sizes)), tmp_path / "adapter"
    base = write(model, tmp_path / "base")
    randlora.inject(model, r=4, targets=["attn.c_proj", "score"])
    randlora.save(fill(model, seed=0), adapter)
    for name in ("an earlier version", "PEFT"):
        shutil.copytree(adapter, tmp_path / name)
    reseal(tmp_path / "an earlier version", transposed=None)
    save_file(load_file(adapter / TENSORS_FILE), tmp_path / "PEFT" / TENSORS_FILE)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert randlora.files.verify(adapter, base).passed
    merged = stored(randlora.files.merge(adapter, tmp_path / "merged", base=base).out)
    randlora.merge(model)
    assert all(same_bits(merged[name], tensor) for name, tensor in model.state_dict().items())
    for name in ("an earlier version", "PEFT"):
        with pytest.raises(CheckpointError, match=r"h\.0\.attn\.c_proj may be stored transposed or not.*pip install"):
            randlora.files.merge(tmp_path / name, tmp_path / "out", base=base)
        assert not randlora.files.verify(tmp_path / name, base).passed
    assert not (tmp_path / "out").exists()


@pytest.fixture
def both(tmp_path: Path) -> dict[str, tuple[nn.Module, Path, Path]]:
    """A model with a head and its bare one, each with its checkpoint and an adapter of the same values."""
    full = BERT.build()
    found = {}
    for name, model in (("full", full), ("bare", full.get_submodule("bert"))):
        model.save_pretrained(tmp_path / name)  # type: ignore[operator]
        randlora.inject(model, r=4, targets=["query"], train_also=["embeddings.LayerNorm"])
        fill(model, seed=0)
        randlora.save(model, tmp_path / f"of {name}")
        randlora.eject(model)
        found[name] = model, tmp_path / name, tmp_path / f"of {name}"
    return found


@pytest.mark.parametrize(("one", "other"), [("full", "bare"), ("bare", "full")])
def test_load_merge_and_verify_name_the_prefix_that_differs_and_take_it(
    one: str, other: str, both: dict[str, tuple[nn.Module, Path, Path]], tmp_path: Path
) -> None:
    model, base, own = both[one]
    adapter, class_of_peft = both[other][2], {"auto_mapping": {"base_model_class": "X"}, "task_type": "CAUSAL_LM"}
    edit_fields(adapter, class_of_peft)
    named = "differ by the prefix 'bert': give prefix=\"bert\""
    for wrong in (None, "ber", "bert.encoder"):
        with pytest.raises(CheckpointError, match=named):
            randlora.load(model, adapter, prefix=wrong)
        with pytest.raises(CheckpointError, match=named):
            randlora.files.merge(adapter, tmp_path / "out", base=base, prefix=wrong)
        assert named in str(randlora.files.verify(adapter, base, prefix=wrong))
    no_names: list[Any] = ["", ".", 3]
    for no_name in no_names:
        with pytest.raises(ConfigError, match=r"prefix must be (the name of a module|a string or None)"):
            randlora.load(model, adapter, prefix=no_name)
    with pytest.raises(CheckpointError, match="fit as they are: leave it out"):
        randlora.load(model, own, prefix="bert")
    assert randlora.files.verify(adapter, base, prefix="bert").passed
    merged = randlora.files.merge(adapter, tmp_path / "out", base=base, prefix="bert").out
    expected = randlora.files.merge(own, tmp_path / "expected", base=base).out
    assert_same_tensors(merged, expected)
    report = randlora.load(model, adapter, prefix="bert")
    assert re.search(r"with 'bert\.' (added|removed)$", report.rule)
    randlora.save(model, tmp_path / "again")  # under the names of the model that carries it now
    assert_same_tensors(tmp_path / "again", own)
    assert class_of_peft.keys() & {name for name, value in read_fields(tmp_path / "again").items() if value} == set()


def test_a_prefix_must_fit_one_way_and_no_trained_parameter_is_taken_for_another(tmp_path: Path) -> None:
    def layer() -> nn.ModuleDict:
        return nn.ModuleDict({"q": nn.Linear(8, 8)})

    base = nn.ModuleDict({"q": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})
    head = nn.ModuleDict({"base": base, "norm": nn.LayerNorm(8)})  # with norms of one name
    randlora.inject(head, r=2, targets=["q"], train_also=["norm"])
    randlora.save(head, tmp_path / "of head")
    randlora.eject(head)
    with pytest.raises(CheckpointError, match=r"the model has no parameter norm\.weight, which was trained"):
        randlora.load(base, tmp_path / "of head", prefix="base")
    nested = nn.ModuleDict({**layer(), "m": layer()})
    randlora.inject(nested, r=2, targets=r"m\.q")
    randlora.save(nested, tmp_path / "adapter")
    both = nn.ModuleDict({**layer(), "m": nn.ModuleDict({"m": layer()})})
    with pytest.raises(CheckpointError, match="both with and without it"):
        randlora.load(both, tmp_path / "adapter", prefix="m")
    with pytest.raises(CheckpointError, match=r"the model has no layer m\.q"):  # and names no prefix
        randlora.load(both, tmp_path / "adapter")
    randlora.eject(nested)
    draft = nn.ModuleDict({"m": layer(), "draft": nested})
    assert randlora.load(draft, tmp_path / "adapter", prefix="draft").targets == ("draft.m.q",)


@pytest.mark.filterwarnings(
    "ignore:Model has .tie_word_embeddings:UserWarning", "ignore:fan_in_fan_out:UserWarning", "ignore::FutureWarning"
)
def test_a_parameter_that_is_tied_is_refused_by_load_merge_and_verify(tmp_path: Path) -> None:
    model, _ = GPT2.build(), save_model(GPT2, tmp_path / "base")
    theirs = peft.get_peft_model(
        model, peft.RandLoraConfig(r=4, target_modules=["c_attn"], modules_to_save=["lm_head"])
    )
    theirs.save_pretrained(tmp_path / "adapter")
    tied = r"lm_head\.weight is tied to transformer\.wte\.weight here"
    with pytest.raises(CheckpointError, match=tied):
        randlora.load(GPT2.build(), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=tied):
        randlora.files.merge(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base")
    assert re.search(tied, str(randlora.files.verify(tmp_path / "adapter", tmp_path / "base")))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_prefix_gives_a_file_of_peft_its_shapes_and_leaves_its_names(tmp_path: Path) -> None:
    full = BERT.build()
    full.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    theirs = peft.get_peft_model(full.get_submodule("bert"), peft.RandLoraConfig(r=4, target_modules=["query"]))
    theirs.save_pretrained(tmp_path / "adapter")
    paths = tmp_path / "adapter", tmp_path / "out"
    with pytest.raises(CheckpointError, match='give prefix="bert"'):
        randlora.files.convert(*paths, "native", base=tmp_path / "base")
    randlora.files.convert(*paths, "native", base=tmp_path / "base", prefix="bert")
    summary = randlora.files.inspect(tmp_path / "adapter", tmp_path / "base", prefix="bert")
    assert [layer.fqn for layer in summary.layers] == [f"encoder.layer.{n}.attention.self.query" for n in (0, 1)]
    assert all(layer.frobenius is not None for layer in summary.layers)
    bare = BERT.build().get_submodule("bert")
    assert randlora.load(bare, tmp_path / "out").targets == tuple(layer.fqn for layer in summary.layers)


def test_a_parameter_that_a_class_lacks_is_missing_for_load_merge_and_verify(tmp_path: Path) -> None:
    full = BERT.build()
    full.get_submodule("bert").save_pretrained(tmp_path / "bare")  # type: ignore[operator]
    randlora.inject(full, r=4, targets=["query"], train_also=["classifier"])
    randlora.save(full, tmp_path / "adapter")
    bare = transformers.BertModel.from_pretrained(tmp_path / "bare")
    missing = "the model has no parameter classifier.weight, which was trained with the adapter"
    with pytest.raises(CheckpointError, match=missing):
        randlora.load(bare, tmp_path / "adapter", prefix="bert")
    lacking = r"differ by the prefix 'bert', and the model has no parameter classifier\.weight.*, which was trained"
    with pytest.raises(CheckpointError, match=f"{lacking}.* as it was trained, a BertForSequenceClassification"):
        randlora.load(bare, tmp_path / "adapter")
    reseal(tmp_path / "adapter", model_class=None)  # as version 0.2 wrote it
    with pytest.raises(CheckpointError, match=f"{lacking} with the adapter$"):
        randlora.load(bare, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=missing):
        randlora.files.merge(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "bare", prefix="bert")
    assert missing in str(randlora.files.verify(tmp_path / "adapter", tmp_path / "bare", prefix="bert"))


def edit_json(path: Path, changes: dict[str, Any]) -> None:
    """Change some fields of a JSON file."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**fields, **changes}), encoding="utf-8")


def test_no_code_is_loaded_and_no_network_asked_whatever_a_config_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(LLAMA, tmp_path)
    plain = randlora.files.plan(tmp_path, r=4)
    (tmp_path / "modeling_own.py").write_text("raise SystemExit('code of the checkpoint was run')", encoding="utf-8")
    names = ("attn_implementation", "_attn_implementation", "experts_implementation")
    code = {"auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}}
    edit_json(tmp_path / "config.json", code | dict.fromkeys(names, "kernels-community/flash-attn"))
    monkeypatch.setattr(socket, "socket", None)
    assert randlora.files.plan(tmp_path, r=4) == plain


ASKING = {
    "layers": {"num_hidden_layers": 50_000},
    "layers-beyond-memory": {"num_hidden_layers": 10**12},
    "layers-of-a-part": {
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": {"num_hidden_layers": 10**12},
    },
    "weights-of-timm": {
        "architectures": ["TimmWrapperModel"],
        "architecture": "resnet18",
        "model_args": {"checkpoint_path": "weights.pth"},
    },
    "repository-of-timm": {"architectures": ["TimmWrapperModel"], "architecture": "hf-hub:user/repo"},
    "directory-of-timm": {"architectures": ["TimmWrapperModel"], "architecture": "local-dir:/tmp"},
    "backbone": {
        "architectures": ["DepthAnythingForDepthEstimation"],
        "backbone": "user/repo",
        "backbone_config": None,
        "use_timm_backbone": False,
    },
}


@pytest.mark.parametrize("changes", ASKING.values(), ids=ASKING)
def test_a_class_that_asks_for_what_its_files_do_not_have_is_not_built(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    asked: list[str] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: asked.append(host))
    monkeypatch.setattr(timm.models._factory, "load_checkpoint", lambda *_, **__: asked.append("load_checkpoint"))
    monkeypatch.setattr(timm.models._factory, "load_model_config_from_path", lambda *_: asked.append("local-dir"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    save_model(LLAMA, tmp_path)
    edit_json(tmp_path / "config.json", changes)
    begin = time.process_time()
    reason = build_model(read_model_directory(tmp_path))
    assert isinstance(reason, str)
    assert re.search("modules and parameters|_layers is|names (other files|a different)|[Oo]ffline", reason), reason
    assert time.process_time() - begin < 10
    assert asked == []
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    assert not nn.modules.module._global_module_registration_hooks
