"""What is planned and merged from files agrees with the model in memory, for every class that transformers has."""

import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

import randlora
from randlora import files
from randlora.errors import CheckpointError, ConfigError, RandLoRAError, TargetError
from randlora.files.model_directory import read_model_directory
from randlora.files.transformers_model import build_model, offline
from randlora.report import Report
from randlora.targets.census import Census
from tests import model_directories
from tests.checkpoint_files import edit_fields, edit_tensors, read_fields, reseal
from tests.kit import all_bits, same_bits
from tests.model_directories import adapter_of, assert_same_tensors, contents, edit_json, merge_into, save_model, stored
from tests.models import BERT, GPT2, LLAMA, VIT
from tests.test_readers_experts import EXPERTS, gpt_oss, made, mixtral
from tests.transformers_zoo import classes, tiny

AGREEING = {
    "mixtral": "MixtralForCausalLM",  # experts in one tensor
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "phi3": "Phi3ForCausalLM",  # fused projections
    "t5": "T5ForConditionalGeneration",  # tied heads
    "bart": "BartForSequenceClassification",
    "gte": "GteForMaskedLM",  # layers with other names in files
    "hrm_text": "HrmTextForCausalLM",
    "llava": "LlavaForConditionalGeneration",
    "segformer": "SegformerForSemanticSegmentation",
}
"""Classes for the quick run."""

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
    base, model_class = model_directories.write(model, directory / "base"), getattr(transformers, name)
    before = contents(base)
    for targets in (None, "all-linear"):
        planned = outcome(randlora.plan, model, targets)
        assert outcome(files.plan, base, targets) == planned
    if isinstance(planned, str):
        return
    experts = [site.fqn for site in Census.of(model).sites if site.layer_class.kind == "experts"]
    chosen = [fqn for fqn in (*planned.targets, *experts) if re.search("attn|attention|expert", fqn, re.IGNORECASE)]
    chosen, built = chosen or list(planned.targets), build_model(read_model_directory(base))
    assert not isinstance(built, str)
    converted = [fqn for fqn in chosen if built.converted & {fqn, f"{fqn}.weight"}]
    if converted:  # which is merged in memory alone
        adapter = adapter_of(model, directory / "converted", targets=converted)
        assert files.verify(adapter, base).passed
        with pytest.raises(CheckpointError, match=rf"do not have {re.escape(converted[0])}\b.* one tensor each: load"):
            files.merge(adapter, directory / "out", base=base)
    rest = [fqn for fqn in (*chosen, *planned.targets) if fqn not in converted]
    if not (chosen := [fqn for fqn in chosen if fqn in rest] or rest[:1]):
        return
    adapter = adapter_of(model, directory / "adapter", targets=chosen)
    assert files.verify(adapter, base).passed
    report = files.merge(adapter, directory / "out", base=base)
    assert contents(base) == before
    loaded = merge_into(model_class.from_pretrained(base), {adapter: 1.0})
    assert_same_tensors(report.out, model_directories.write(loaded, directory / "expected"))
    found, own = stored(report.out), stored(base)
    assert {name for name in found if not same_bits(found[name], own[name])} == set(report.merged) != set()


def zoo() -> Iterator[Any]:
    """Yield classes for the quick run one by one, and all of a task, with how many of them at least are built."""
    yield from (pytest.param({name: model_type}, 1, id=name) for model_type, name in AGREEING.items())
    for task, least in LEAST.items():
        names = {name: model_type for of, model_type, name in classes() if of == task}
        yield pytest.param(names, least, marks=pytest.mark.slow, id=task)


@pytest.mark.filterwarnings("ignore:the default adapts only:UserWarning")
@pytest.mark.parametrize(("names", "least"), [*zoo()])
def test_classes_are_planned_and_merged_as_in_memory(names: dict[str, str], least: int, tmp_path: Path) -> None:
    compared, unlike = 0, {}
    for name, model_type in names.items():
        if (model := tiny(model_type, name)) is not None:
            compared += 1
            try:
                assert_files_agree(name, model, tmp_path / name)
            except (AssertionError, RandLoRAError) as error:
                unlike[name] = str(error)[:500]
    assert unlike == {}
    assert compared >= least


def test_without_transformers_names_that_agree_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pair(name: str, model: nn.Module, **options: Any) -> tuple[Path, Path]:
        return adapter_of(model, tmp_path / f"of {name}", **options), model_directories.write(model, tmp_path / name)

    llama: Any = LLAMA.build()
    oss: Any = made(gpt_oss, dtype=torch.float32)  # one of its stacks is of squares, which do not show the layout
    both = [pair("llama", llama, train_also=["norm"]), pair("stacks", oss, targets=EXPERTS)]
    bare = [
        model_directories.write(model.model, tmp_path / f"bare {model.config.model_type}") for model in (llama, oss)
    ]
    earlier = [pair("earlier", llama, targets=["up_proj"]), pair("gpt2", GPT2.build(), targets=["c_attn"])]
    for adapter, _ in earlier:
        reseal(adapter, transposed=None)
    renamed = pair("vit", VIT.build()), pair("one by one", made(mixtral, dtype=torch.float32), targets=EXPERTS)

    def merged(adapter: Path, base: Path, **options: Any) -> Path:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return files.merge(adapter, tmp_path / "out", base=base, **options).out

    expected = [(contents(merged(*each)), stored(merged(*each))) for each in (*both, *earlier)]
    monkeypatch.setitem(sys.modules, "transformers", None)
    for each, (held, _) in zip((*both, *earlier), expected, strict=True):  # a weight's shape says how it is stored
        assert contents(merged(*each)) == held
        assert files.verify(*each).passed
    for each in renamed:
        with pytest.raises(CheckpointError, match=r"has no layer \S+ under this name \(transformers, "):
            merged(*each)
    for (adapter, _), base, (_, own) in zip(both, bare, expected[:2], strict=True):
        with pytest.raises(CheckpointError, match="differ by the prefix 'model': give prefix=\"model\""):
            merged(adapter, base)
        found = stored(merged(adapter, base, prefix="model"))
        assert all(same_bits(found[name], own[f"model.{name}"]) for name in found)


def test_without_transformers_our_files_say_what_is_transposed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 20, "num_labels": 2, "pad_token_id": 0}
    model = transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**sizes))
    base, adapter = model_directories.write(model, tmp_path / "base"), tmp_path / "adapter"
    adapter_of(model, adapter, targets=["attn.c_proj", "score"])
    others = [Path(shutil.copytree(adapter, tmp_path / name)) for name in ("an earlier version", "PEFT")]
    reseal(others[0], transposed=None)
    edit_tensors(others[1], {})
    expected = files.merge(adapter, tmp_path / "expected", base=base).out
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert files.verify(adapter, base).passed
    assert_same_tensors(files.merge(adapter, tmp_path / "merged", base=base).out, expected)
    for other in others:
        with pytest.raises(CheckpointError, match=r"h\.0\.attn\.c_proj may be stored transposed or not.*pip install"):
            files.merge(other, tmp_path / "out", base=base)
        assert not files.verify(other, base).passed
    assert not (tmp_path / "out").exists()


def test_matrices_one_above_the_other_are_merged_also_where_they_are_not_square(tmp_path: Path) -> None:
    model, base = nn.Sequential(attention := nn.MultiheadAttention(8, 2)), tmp_path / "base"
    attention.in_proj_weight = nn.Parameter(torch.randn(24, 6))
    base.mkdir()
    save_file(model.state_dict(), base / "model.safetensors")
    adapters = {
        adapter_of(model, tmp_path / form, values=seed, targets=["0.in_proj_weight"], in_proj=form): 1.0 + seed
        for seed, form in enumerate(("split", "packed"))
    }
    found = stored(files.merge(adapters, tmp_path / "out", base=base).out)
    assert all_bits(found) == all_bits(merge_into(model, adapters).state_dict())


@pytest.mark.parametrize(("one", "other"), [("full", "bare"), ("bare", "full")])
def test_load_merge_and_verify_name_the_prefix_that_differs_and_take_it(one: str, other: str, tmp_path: Path) -> None:
    full: Any = BERT.build()
    models = {"full": full, "bare": full.bert}
    adapters = {
        name: adapter_of(model, tmp_path / f"of {name}", targets=["query"], train_also=["embeddings.LayerNorm"])
        for name, model in models.items()
    }
    model, base = models[one], model_directories.write(models[one], tmp_path / "base")
    adapter, class_of_peft = adapters[other], {"auto_mapping": {"base_model_class": "X"}, "task_type": "CAUSAL_LM"}
    edit_fields(adapter, class_of_peft)
    named = "differ by the prefix 'bert': give prefix=\"bert\""
    for wrong in (None, "ber", "bert.encoder"):
        with pytest.raises(CheckpointError, match=named):
            randlora.load(model, adapter, prefix=wrong)
        with pytest.raises(CheckpointError, match=named):
            files.merge(adapter, tmp_path / "out", base=base, prefix=wrong)
        assert named in str(files.verify(adapter, base, prefix=wrong))
    assert not (tmp_path / "out").exists()
    for no_name in ("", "."):
        with pytest.raises(ConfigError, match=r"prefix must be the name of a module"):
            randlora.load(model, adapter, prefix=no_name)
    with pytest.raises(CheckpointError, match="leave it out if they fit as they are"):
        randlora.load(model, adapters[one], prefix="bert")
    assert files.verify(adapter, base, prefix="bert").passed
    merged = files.merge(adapter, tmp_path / "out", base=base, prefix="bert").out
    assert_same_tensors(merged, files.merge(adapters[one], tmp_path / "expected", base=base).out)
    report = randlora.load(model, adapter, prefix="bert")
    assert re.search(r"with 'bert\.' (added|removed)$", report.rule)
    randlora.save(model, tmp_path / "again")  # under the names of the model that carries it now
    assert_same_tensors(tmp_path / "again", adapters[one])
    fields, own = read_fields(tmp_path / "again"), {"base_model_class": type(model).__name__}
    assert (fields["task_type"], fields["auto_mapping"]) == (None, {**own, "parent_library": "transformers"})


def test_a_prefix_must_fit_one_way_and_no_trained_parameter_is_taken_for_another(tmp_path: Path) -> None:
    def layer() -> nn.ModuleDict:
        return nn.ModuleDict({"q": nn.Linear(8, 8)})

    base = nn.ModuleDict({"q": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})
    head = nn.ModuleDict({"base": base, "norm": nn.LayerNorm(8)})  # with norms of one name
    adapter_of(head, tmp_path / "of head", targets=["q"], train_also=["norm"])
    nested = nn.ModuleDict({**layer(), "m": layer()})
    adapter_of(nested, tmp_path / "adapter", targets=r"m\.q")
    both = nn.ModuleDict({**layer(), "m": nn.ModuleDict({"m": layer()})})
    misfits: list[tuple[nn.Module, str, str | None, str]] = [
        (base, "of head", "base", r"the model has no parameter norm\.weight, which was trained"),
        (both, "adapter", "m", "both with and without it"),
        (both, "adapter", None, r"the model has no layer m\.q"),  # and names no prefix
    ]
    for model, adapter, prefix, message in misfits:
        with pytest.raises(CheckpointError, match=message):
            randlora.load(model, tmp_path / adapter, prefix=prefix)
    draft = nn.ModuleDict({"m": layer(), "draft": nested})
    assert randlora.load(draft, tmp_path / "adapter", prefix="draft").targets == ("draft.m.q",)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_peft_trained_is_fitted_with_a_prefix(tmp_path: Path) -> None:
    full: Any = BERT.build()
    base, adapter, native = model_directories.write(full, tmp_path / "base"), tmp_path / "adapter", tmp_path / "native"
    config = peft.RandLoraConfig(r=4, target_modules=["query"])
    peft.get_peft_model(full.bert, config).save_pretrained(adapter)
    with pytest.raises(CheckpointError, match='give prefix="bert"'):
        files.convert(adapter, native, "native", base=base)
    files.convert(adapter, native, "native", base=base, prefix="bert")
    names = tuple(f"encoder.layer.{number}.attention.self.query" for number in (0, 1))
    assert tuple(layer.fqn for layer in files.inspect(adapter, base, prefix="bert").layers) == names
    assert randlora.load(BERT.build().get_submodule("bert"), native).targets == names


def test_a_config_loads_no_code_and_asks_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(LLAMA, tmp_path)
    plain = files.plan(tmp_path, r=4)
    (tmp_path / "modeling_own.py").write_text("raise SystemExit('code of the checkpoint was run')", encoding="utf-8")
    names = ("attn_implementation", "_attn_implementation", "experts_implementation")
    code = {"auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}}
    edit_json(tmp_path / "config.json", **code, **dict.fromkeys(names, "kernels-community/flash-attn"))
    monkeypatch.setattr(socket, "socket", None)
    assert files.plan(tmp_path, r=4) == plain


def test_two_threads_that_stay_offline_leave_the_hub_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    begun, may_end = Event(), Event()

    def plan_longer() -> None:
        with offline():
            begun.set()
            may_end.wait()

    other = Thread(target=plan_longer)
    with offline():
        other.start()
        begun.wait(0.2)
    may_end.set()
    other.join()
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


TIMM: dict[str, Any] = {"architectures": ["TimmWrapperModel"]}
DEPTH = {"architectures": ["DepthAnythingForDepthEstimation"], "backbone": "user/repo", "use_timm_backbone": False}
LLAVA, MANY = {"architectures": ["LlavaForConditionalGeneration"]}, {"num_hidden_layers": 10**12}
ASKING: list[dict[str, Any]] = [
    {"num_hidden_layers": 50_000},
    MANY,
    {**LLAVA, "text_config": MANY},
    {**TIMM, "architecture": "resnet18", "model_args": {"checkpoint_path": "weights.pth"}},
    {**TIMM, "architecture": "hf-hub:user/repo"},
    {**TIMM, "architecture": "local-dir:/tmp"},
    {**DEPTH, "backbone_config": None},
]


def test_a_class_that_asks_for_what_its_files_do_not_have_is_not_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    asked: list[Any] = []
    loading = (timm.models._factory, "load_checkpoint"), (timm.models._factory, "load_model_config_from_path")
    for module, name in ((socket, "getaddrinfo"), *loading):
        monkeypatch.setattr(module, name, lambda *asking, **_: asked.append(asking))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    few = save_model(LLAMA, tmp_path / "of one tensor")
    model_directories.edit_model(few, dict.fromkeys({*stored(few)} - {"model.norm.weight"}))
    assert not isinstance(build_model(read_model_directory(few)), str)
    for number, changes in enumerate(ASKING):
        directory = save_model(LLAMA, tmp_path / str(number))
        edit_json(directory / "config.json", **changes)
        begin = time.process_time()
        reason = build_model(read_model_directory(directory))
        assert isinstance(reason, str)
        said = "modules and parameters|_layers is|names (other files|a different)|[Oo]ffline"
        assert re.search(said, reason), reason
        assert time.process_time() - begin < 10
        assert asked == []
        assert not huggingface_hub.constants.HF_HUB_OFFLINE
        assert not nn.modules.module._global_module_registration_hooks
