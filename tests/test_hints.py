"""Values against type hints, names of other libraries that are answered with what is meant, and errors."""

import copy
import inspect
import operator
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import randlora
from randlora import errors
from randlora.config import OPTION_ADVICE, RandLoRAConfig
from randlora.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    OptionError,
    RandLoRAError,
    TargetError,
    raise_collected,
)
from randlora.hints import CALLS
from tests.checkpoint_files import LINEAR, TENSORS_FILE, trained
from tests.hostile_files import model_directory, our_adapter
from tests.kit import untouched
from tests.model_directories import contents, save_model
from tests.models import LLAMA

NO_PATHS: tuple[Any, ...] = (None, 7, "", "a\0b", "\ud800")
EVERY_NO_PATH: tuple[Any, ...] = (*NO_PATHS, b"bytes", ["a"], 10**5000, "a" * 300 + "/b")
NO_NUMBERS: tuple[Any, ...] = ("a", True, float("nan"), float("inf"), 10**400, None)

FUNCTIONS: dict[str, Callable[..., object]] = {"load": randlora.load, "save": randlora.save}
FUNCTIONS |= {name: getattr(randlora.files, name) for name in ("plan", "inspect", "verify", "convert", "merge")}
VALUES: list[tuple[tuple[Any, ...], tuple[str, ...]]] = [
    (EVERY_NO_PATH, ("load source", "plan directory")),
    (NO_PATHS, ("save directory", "inspect directory", "convert out", "merge out")),
    (NO_PATHS[1:], ("verify base", "merge base")),
    ((7, b"bytes", []), ("save name",)),
    ((7, b"bytes", [], None, "", "a.b", "keys"), ("load name",)),
    ((1, "yes", None), ("load trainable", "inspect norms")),
    ((None, 7, "gguf", []), ("convert to",)),
    ((0, -1, 1.5, True, "4", 10**6, 10**400, []), ("convert rank",)),
    ((*NO_NUMBERS[:-1], -0.1, 1.1), ("convert tolerance",)),
    ((None, 7, b"bytes", [], {}, [7], [None], {7: 1.0}, [""], {"": 1.0}), ("merge adapters",)),
    (("float32", 7, torch.int8), ("merge dtype",)),
]
"""What is no value of some functions' parameters; a plain object is none of any."""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("places")
    our_adapter(parent / "ours")
    model_directory(parent / "base")
    save_model(LLAMA, parent / "llama")
    return parent


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_bad_argument_is_our_error_and_nothing_is_written(name: str, places: Path) -> None:
    function, before, model = FUNCTIONS[name], contents(places), trained(LINEAR)
    of_verbs: dict[str, dict[str, Any]] = {
        "load": {"model": model, "source": places / "ours", "name": "b"},
        "save": {"model": model, "directory": places / "out"},
        "plan": {"directory": places / "llama"},
        "inspect": {"directory": places / "ours", "base": places / "base"},
        "verify": {"directory": places / "ours"},
        "convert": {"directory": places / "ours", "out": places / "out", "to": "lora", "tolerance": 1},
        "merge": {"adapters": places / "ours", "out": places / "out", "base": places / "base"},
    }
    good = of_verbs[name]
    function(**good)
    shutil.rmtree(places / "out", ignore_errors=True)
    if name == "load":
        randlora.remove(model, "b")
    values: dict[str, list[Any]] = {
        each: [object()] for each in inspect.signature(function).parameters if each != "options"
    }
    for bad, of in VALUES:
        for verb, parameter in map(str.split, of):
            if verb == name:
                values[parameter] += bad
    with untouched(model):
        for parameter, bad in ((parameter, each) for parameter, bad_values in values.items() for each in bad_values):
            with pytest.raises(RandLoRAError) as caught:
                function(**{**good, parameter: bad})
            assert len(str(caught.value)) < 1500
    for factor in NO_NUMBERS:
        with pytest.raises(RandLoRAError):
            randlora.files.merge({places / "ours": factor}, places / "out", base=places / "base")
    assert contents(places) == before


VERBS = (randlora.inject, randlora.plan, randlora.training_memory, randlora.files.plan, randlora.files.training_memory)


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8))


@pytest.mark.parametrize("verb", [*VERBS, RandLoRAConfig], ids=lambda verb: f"{verb.__module__}.{verb.__name__}")
def test_an_option_that_a_call_does_not_have_is_answered_in_its_own_name(verb: Any) -> None:
    given = OPTION_ADVICE.keys() - inspect.signature(verb).parameters.keys()
    arguments = () if verb is RandLoRAConfig else (small() if "model" in inspect.signature(verb).parameters else "x",)
    with pytest.raises(OptionError) as caught:
        verb(*arguments, **dict.fromkeys(given))
    first, *lines = str(caught.value).splitlines()
    assert first == f"cannot call {verb.__name__}, {len(given)} problems:"
    assert {*lines} == {f"  - unknown option {option}=: {OPTION_ADVICE[option]}" for option in given}


def test_every_option_of_pefts_configs_and_every_call_is_answered() -> None:
    own = inspect.signature(randlora.inject).parameters.keys()
    theirs = {field.name for config in (peft.LoraConfig, peft.RandLoraConfig) for field in fields(config)}
    assert theirs - own | {"lora_r", "lora_rank"} <= OPTION_ADVICE.keys()
    assert not OPTION_ADVICE.keys() & own
    with pytest.raises(OptionError) as caught:
        randlora.inject(small(), **peft.LoraConfig(target_modules=["0"], use_dora=True).to_dict())
    assert all(word in str(caught.value) for word in ("use targets=", "use alpha=", "use_dora=: leave it out"))
    known = {*own, *inspect.signature(randlora.save).parameters}
    for answer in OPTION_ADVICE.values():
        assert {*re.findall(r"(\w+)=", answer)} <= known | {"use_rslora"}
        assert answer.startswith(("use ", "leave it out"))
    in_reference = Path("docs/api/model.md").read_text("utf-8")
    assert {*re.findall(r"^::: randlora\.integrations\.\w+\.([A-Z]\w+)", in_reference, re.MULTILINE)} < CALLS.keys()
    for name in CALLS:
        with pytest.raises(AttributeError, match=f"'{name}': call ") as said:
            getattr(randlora, name)
        called = re.findall(r"randlora\.([\w.]+)\(", str(said.value))
        assert called
        for each in called:
            room, _, own = each.rpartition(".")
            if room.startswith("integrations."):  # which takes seconds to import
                assert f"class {own}(" in Path(*randlora.__path__, f"{room.replace('.', '/')}.py").read_text("utf-8")
            else:
                assert callable(operator.attrgetter(each)(randlora))


def test_a_name_that_a_room_has_is_answered_with_its_place_and_only_public_names_are_listed() -> None:
    public: Any = randlora
    for name in ("load_model", "convert", "routed", "AdapterPool", "ConfigError"):
        with pytest.raises(AttributeError, match=f"no attribute '{name}': it is ") as said:
            getattr(randlora, name)
        assert operator.attrgetter(str(said.value).split()[-1].removeprefix("randlora."))(randlora).__name__ == name
    for name in ("json", "Progress", "loads"):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'$"):
            getattr(randlora, name)
    assert [name for name in dir(randlora) if not name.startswith("__")] == sorted(public.__all__)


def test_options_that_adapters_or_optimizers_have_are_answered_by_what_loads() -> None:
    model: Any = small()
    of_file = "leave it out: files say how their adapter was made"
    verbs: tuple[Any, ...] = (randlora.load, randlora.load_all, randlora.swap)
    for verb in verbs:
        with pytest.raises(OptionError) as caught:
            verb(model, "x", r=16, target_modules=["0"], rank=4, lr=1e-3, learning_rate=1e-3, revisoin="main")
        first, *said = str(caught.value).splitlines()
        assert first == f"cannot call {verb.__name__}, 6 problems:"
        assert said[:3] == [f"  - unknown option {name}=: {of_file}" for name in ("r", "target_modules", "rank")]
        assert all("the optimizer or the trainer has it" in each for each in said[3:5])
        assert said[5] == "  - unknown option revisoin=: the nearest options are revision"
    with pytest.raises(OptionError, match=r"lr=: leave it out: .*report\.learning_rate"):
        randlora.inject(model, lr=1e-3)  # type: ignore[call-arg]


def test_injecting_before_loading_and_saving_to_the_name_of_a_file_are_answered(tmp_path: Path) -> None:
    model = small()
    randlora.inject(model, 2)
    folder = tmp_path / "a"
    file = folder / "adapter.safetensors"
    files = {folder / f"x{end}": folder / "x" for end in (".bin", ".pt", ".pth")} | {file: folder / "adapter"}
    verbs: tuple[Any, ...] = (randlora.save, randlora.save_all)
    for verb in verbs:
        for name, meant in (files | {folder / TENSORS_FILE: folder}).items():
            with pytest.raises(CheckpointError, match=f"a file's: give '{re.escape(str(meant))}'$"):
                verb(model, name)
    assert not [*tmp_path.iterdir()]
    file.mkdir(parents=True)  # a directory may have such a name
    randlora.save(model, file)
    for verb in (randlora.load, randlora.load_all):
        with untouched(model), pytest.raises(AdapterError, match=r"leave out inject, or call randlora\.swap for its"):
            verb(model, file)
    with pytest.raises(AdapterError, match="of that name; remove it, or"):
        randlora.inject(model, 2)


def test_a_report_that_is_taken_for_the_model_says_where_the_model_is() -> None:
    model: Any = small()
    report: Any = randlora.inject(model, 2)
    with untouched(model):
        for name in ("parameters", "train", "to", "generate"):
            with pytest.raises(AttributeError, match=r"write randlora\.inject\(model\), not model = "):
                getattr(report, name)
        with pytest.raises(TypeError, match=r"write randlora\.inject\(model\), not model = "):
            report(1)
        verbs = (randlora.merge, randlora.trainable_parameters, randlora.inject, randlora.adapters)
        with_path = (partial(verb, report, "x") for verb in (randlora.save, randlora.load))
        for call in (*with_path, *(partial(verb, report) for verb in verbs)):
            with pytest.raises(RandLoRAError, match=r"not model = randlora\.inject"):
                call()
    assert copy.deepcopy(report) == pickle.loads(pickle.dumps(report)) == report
    with pytest.raises(AttributeError, match="MergeReport has no 'eval'"):
        randlora.merge(model).eval()  # type: ignore[attr-defined]


def test_a_config_that_is_given_otherwise_is_answered_with_the_call_that_is_meant() -> None:
    model: Any = small()
    others = peft.RandLoraConfig(r=4, target_modules=["0"]), peft.LoraConfig(r=4, target_modules=["0"])
    wrong: list[tuple[dict[str, Any], str]] = [({"r": RandLoRAConfig(r=4)}, r"inject\(model, config=config\)")]
    wrong += [({name: each}, r"of PEFT: give its options by name") for each in others for name in ("r", "config")]
    for given, meant in wrong:
        with untouched(model), pytest.raises(ConfigError, match=meant):
            randlora.inject(model, **given)


def test_parameters_to_train_are_listed_again_and_again_and_half_precision_is_warned_of_with_the_way_back() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    randlora.inject(model, 2, train_also=["1"])
    parameters = randlora.trainable_parameters(model)
    assert [id(each) for each in parameters] == [id(each) for each in parameters]
    assert len(parameters) == 4
    assert nn.utils.clip_grad_norm_(parameters, 1.0) == 0
    model.half()  # which may be for inference
    with pytest.warns(UserWarning, match="where small steps are lost: convert the model before inject") as caught:
        randlora.trainable_parameters(model)
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(UserWarning, match="small steps are lost"):
        exec(str(caught[0].message).split("`")[1], {"randlora": randlora, "model": model})
    assert {each.dtype for each in randlora.trainable_parameters(model)} == {torch.float32}


def test_errors_are_ours_and_pythons_and_list_all_problems_up_to_a_number() -> None:
    assert all(issubclass(each, ValueError) for each in (ConfigError, TargetError, errors.CheckpointError))
    assert all(issubclass(each, RuntimeError) for each in (errors.AdapterError, errors.MergeError))
    assert all(issubclass(OptionError, each) for each in (TypeError, ConfigError))
    raise_collected(ConfigError, [], doing="inject")
    with pytest.raises(TargetError, match=r"^cannot inject: no such layer$"):
        raise_collected(TargetError, ["no such layer"], doing="inject")
    for error, most in ((TargetError, 5), (OptionError, 100)):
        for count in (most, most + 1):
            problems = [f"problem {index}" for index in range(count)]
            with pytest.raises(error, match=f"^cannot inject, {count} problems:\n") as caught:
                raise_collected(error, problems, doing="inject")
            rest = ["  - and 1 more"] if count > most else []
            assert str(caught.value).splitlines()[1:] == [*(f"  - {problem}" for problem in problems[:most]), *rest]
