"""`inject`, `plan` and `eject`: what they change and refuse before anything changes, and what their reports say."""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import numpy as np
import peft
import pytest
import torch
from bitsandbytes.nn import Embedding4bit
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import randlora
from randlora import RandLoRAConfig
from randlora.config import LARGEST_FACTOR
from randlora.errors import AdapterError, CheckpointError, ConfigError, RandLoRAError, TargetError
from randlora.functional import Compute
from randlora.report import as_bytes, table
from tests.kit import adapt, adapter_values, all_bits, fill, on_one_line, same_bits, set_alpha, untouched
from tests.laws import TOKENS, Mixed
from tests.quantized import INT8, MODELS, NF4, Codes, of_4_bits, quantized_model
from tests.strategies import ranks

ADAPTED = ("q", "up", "down")


def test_inject_adds_only_diagonals_and_eject_gives_back_every_object_and_bit_also_in_inference_mode() -> None:
    model = Mixed().eval()
    model.norm.requires_grad_(False)
    expected, names = model(TOKENS), {*model.state_dict()}
    with untouched(model):
        with torch.inference_mode():
            assert randlora.inject(model, r=4, train_also=["norm", "q.bias"]).targets == ADAPTED
            for compute in get_args(Compute):
                randlora.set_compute(model, compute)
                randlora.activate(model, {"default": -LARGEST_FACTOR})
                assert same_bits(model(TOKENS), expected)
        added = {f"{fqn}.randlora_{part}.default" for fqn in ADAPTED for part in ("lambda", "gamma")}
        assert {*model.state_dict()} - names == added
        trained = {name for name, each in model.named_parameters() if each.requires_grad}
        assert trained == added | {"norm.weight", "norm.bias", "q.bias"}
        randlora.activate(model, "default")
        model(TOKENS).square().mean().backward()
        torch.optim.SGD(randlora.trainable_parameters(model), lr=0.1).step()
        assert not torch.allclose(model(TOKENS), expected)
        model.later = nn.Linear(12, 2)
        assert randlora.eject(model) == ADAPTED
        assert model.later.weight.requires_grad
        del model.later


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))


class OwnLoRA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.lora_A, self.lora_B = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)


def containing_itself() -> nn.Sequential:
    model = layers()
    model[0].add_module("around", model)
    return model


def lazy() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(4), nn.LazyBatchNorm1d())


def adapted() -> nn.Sequential:
    model = layers()
    model[2].requires_grad_(False)
    return adapt(model, r=2, targets=["0"], train_also=["1"])


def computed() -> nn.Sequential:
    model: Any = layers()
    model[0]._parameters["weight"] = model[0].weight * 2
    return model  # type: ignore[no-any-return]


NAMED = "expected a printable name without dots"
RESERVED = "not an attribute of ParameterDict or a keyword of Python"
REFUSED: list[tuple[Callable[[], nn.Module], dict[str, Any], type[RandLoRAError], str]] = [
    (containing_itself, {}, TargetError, r"contains itself: 0\.around is the model"),
    (computed, {"targets": ["2"]}, AdapterError, r"0\.weight is not a leaf tensor and cannot be frozen; detach it"),
    (layers, {"r": 1025}, ConfigError, "r=1025 is larger than its layers, which are at most 8"),
    (layers, {"targets": ["0"], "alpha": -0.0}, ConfigError, r"alpha must be positive, got -?0:"),
    (layers, {"targets": ["0"], "alpha": {"0": -1e-30, ".*": 8}}, ConfigError, r"alpha must be positive, got -1e-30"),
    (lazy, {"targets": ["0"], "train_also": ["1"]}, TargetError, r"includes 1\.weight, which has no shape yet"),
    (lazy, {"targets": ["1"]}, TargetError, "1 is of type LazyLinear|1 .*no shape yet"),
    (OwnLoRA, {"targets": ["lora_A"]}, TargetError, r"lora_A \(Linear\) cannot be adapted: by its name it is part"),
    (Mixed, {"r": 1, "basis": "very_sparse", "seed": 7, "targets": ["q"]}, ConfigError, "standard deviation of 0"),
    (Mixed, {"train_also": ["hed"]}, TargetError, r"train_also=.hed. matches no module .* are .*head"),
    (Mixed, {"targets": ["q"], "train_also": ["q", "hed"]}, TargetError, "2 problems"),
    (Mixed, {"config": RandLoRAConfig(), "r": None, "seed": 4}, ConfigError, "either config= or single options"),
    *((Mixed, {"name": name}, AdapterError, NAMED) for name in ("", "a.b", "a\nb", 3)),
    *((Mixed, {"name": name}, AdapterError, RESERVED) for name in ("class", "keys", "training", "randlora_layer")),
    (adapted, {"name": "default"}, AdapterError, "has an adapter of that name; remove it"),
]


@pytest.mark.parametrize(("build", "options", "error", "message"), REFUSED)
def test_what_cannot_work_is_refused_before_anything_changes(
    build: Callable[[], nn.Module], options: dict[str, Any], error: type[RandLoRAError], message: str
) -> None:
    model = build()
    verbs: list[Callable[..., object]] = [randlora.inject, randlora.plan, randlora.training_memory]
    for verb in verbs[:1] if build in (adapted, Mixed) else verbs:
        unchanged = nullcontext() if build is containing_itself else untouched(model)  # no state dict can be made of it
        with unchanged, pytest.raises(error, match=message):
            verb(model, **{"r": 2, **options})


VALUES: list[Any] = [1.0, -1, "yes", b"no", np.True_, (), {}, [[]], {"a": "b"}, {1: 1.0}, object(), None, torch.ones(2)]
VALUES += [10**400, 10**5000, float("nan"), {"default": 10**400}, [10**5000]]
VERBS: list[Callable[..., Any]] = [
    *(randlora.inject, randlora.eject, randlora.activate, randlora.remove, randlora.delta_weight),
    *(randlora.set_compute, randlora.merge, randlora.unmerge, randlora.adapters, randlora.prepare_quantized),
    *(randlora.find_targets, randlora.set_trainable, randlora.serving.combine),
    *(randlora.adapter_state, randlora.swap, randlora.update_norms, randlora.limit_norms),
]
REQUIRED: dict[str, Any] = {"names": "default", "name": "default", "fqn": "0", "to": "b", "limit": 0.5}
REQUIRED["adapters"] = {"default": 0.5}


@pytest.mark.medium
@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__name__)
def test_an_argument_of_any_type_is_used_or_refused_by_an_error_of_ours(verb: Callable[..., Any]) -> None:
    parameters = inspect.signature(verb).parameters
    without = [name for name, each in parameters.items() if each.default is inspect.Parameter.empty and name != "model"]
    known = REQUIRED | dict.fromkeys(("state", "source"), randlora.adapter_state(adapted()))
    required = {name: known[name] for name in without}
    required |= {"name": "other"} if verb in (randlora.inject, randlora.serving.combine) else {}
    model, refused = adapted(), ""
    for name in parameters:
        for value in VALUES:
            model = model if refused else adapted()  # a call that is refused leaves it as it was
            before = all_bits(model.state_dict())
            arguments: dict[str, Any] = {"model": model, **required, name: value}
            refused = ""
            try:
                verb(**arguments)
            except RandLoRAError as error:
                refused = str(error)
            except Exception as error:
                raise AssertionError(f"{verb.__name__}({name}={value!r})") from error
            assert len(refused) < 2000
            if refused:
                assert all_bits(model.state_dict()) == before
                assert [info.name for info in randlora.adapters(model)] == ["default"]


def test_a_model_built_in_inference_mode_is_adapted_merged_and_restored() -> None:
    with torch.inference_mode():
        model, x = layers(), torch.randn(2, 8)
    base = all_bits(model.state_dict())
    randlora.inject(model, r=2, train_also=["1"])
    randlora.eject(model)
    assert all_bits(model.state_dict()) == base
    adapt(model, r=2)
    with torch.inference_mode():
        expected = model(x)
        randlora.merge(model)
        torch.testing.assert_close(model(x), expected)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_uninitialized_layers_that_are_no_targets_do_not_matter(tmp_path: Path) -> None:
    for verb in (randlora.eject, randlora.merge):
        model = nn.Sequential(nn.Linear(4, 6), nn.LazyLinear(3), nn.LazyConv1d(2, 1))
        randlora.prepare_quantized(model)
        with untouched(model):
            planned = randlora.plan(model, r=2, targets="0")
        assert randlora.inject(model, r=2, targets="0") == planned
        randlora.activate(model, "default")
        randlora.save(fill(model), tmp_path / "adapter")
        with randlora.merged(model):
            model[:2](torch.ones(2, 4))  # the first forward initializes the second layer
        verb(model)
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_buffers_that_nothing_gives_values_are_noted() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"rope": nn.Linear(6, 6), "norm": nn.BatchNorm1d(6)})
        model["rope"].register_buffer("inv_freq", torch.ones(3), persistent=False)
    (note,) = (note for note in randlora.inject(model, r=2, targets=["rope"]).notes if "no values" in note)
    assert "rope.inv_freq on the meta device" in note


def test_an_alpha_of_a_file_is_loaded_whatever_it_is(tmp_path: Path) -> None:
    trained, model = adapted(), layers()
    set_alpha(trained, -3.0)
    randlora.save(trained, tmp_path)
    model.load_state_dict(trained.state_dict(), strict=False)
    randlora.load(model, tmp_path)
    assert torch.equal(randlora.delta_weight(model, "0"), randlora.delta_weight(trained, "0"))
    assert randlora.adapters(model)[0].options["0"].alpha == -3


@pytest.mark.parametrize("kind", [peft.LoraConfig, peft.RandLoraConfig, peft.VeraConfig, peft.IA3Config])
def test_a_model_with_adapters_of_peft_is_refused_by_name(kind: Any) -> None:
    options: dict[str, Any] = {"feedforward_modules": []} if kind is peft.IA3Config else {"r": 2}
    config = kind(target_modules=["q"], **options)
    also, is_mixed = "", kind is peft.LoraConfig
    if kind is peft.RandLoraConfig:  # as transformers' add_adapter does
        model: Any = peft.inject_adapter_in_model(config, Mixed())
    else:
        model = peft.get_peft_model(Mixed(), config, mixed=is_mixed)
    if is_mixed:
        model.add_adapter("other", peft.LoHaConfig(r=2, target_modules=["up"]))
        model.set_adapter(["default", "other"])
        also = r"up \(peft\.tuners\.loha\..*"
    said = rf"adapters of PEFT: .*q.*\(peft\.tuners\..*{also} merge or remove them first.*unload\(\)"
    targets: list[Any] = [None, "all", ["down"], ["q"], ["lora_A"]]
    for each in targets:
        with untouched(model), pytest.raises(AdapterError, match=said):
            randlora.inject(model, r=2, targets=each)
    with pytest.raises(AdapterError, match=r"cannot find targets: .* adapters of PEFT: .*peft\.tuners"):
        randlora.find_targets(model, "all")
    if hasattr(model, "unload"):
        assert {"q", "up"} <= {*randlora.inject(model.unload(), r=2, targets="all-linear").targets}


def test_what_peft_wraps_later_is_said_to_be_lost_until_peft_has_left(tmp_path: Path) -> None:
    randlora.inject(model := Mixed(), r=2, targets=["q", "up"])
    expected = fill(model)(TOKENS)
    wrapped: Any = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q"]))
    assert same_bits(wrapped(TOKENS), expected)
    with untouched(wrapped), pytest.raises(CheckpointError, match="q no longer has adapter 'default'"):
        randlora.save(wrapped, tmp_path / "adapter")
    with untouched(wrapped), pytest.raises(AdapterError, match="the model has adapters of PEFT"):
        randlora.inject(model, r=2, name="second")
    wrapped.unload()
    assert same_bits(model(TOKENS), expected)
    randlora.save(model, tmp_path / "adapter")


@pytest.mark.parametrize("targets", ["all", None, ["1"]])
def test_matrices_of_an_adapter_of_ones_own_are_skipped_with_the_reason(targets: Any) -> None:
    report = randlora.plan(nn.Sequential(nn.Linear(8, 8), OwnLoRA()), r=2, targets=targets)
    assert ("1.linear" in report.targets, {*report.skipped}) == (True, {"1.lora_A", "1.lora_B"})


@given(r=ranks, also=st.sampled_from([None, ["head"], ["norm.weight", "q.bias"]]))
def test_figures_are_those_counted_on_the_model(r: int, also: list[str] | None) -> None:
    model = Mixed()
    plain = sum(parameter.numel() for parameter in model.parameters())
    report = randlora.inject(model, r=r, train_also=also, stream="portable", targets=["q"])
    trainable = list(randlora.trainable_parameters(model))
    own = sum(value.numel() for name, value in adapter_values(model).items() if "randlora" in name)
    assert report.trainable_parameters == sum(parameter.numel() for parameter in trainable)
    assert report.total_parameters == plain + own
    assert report.share == report.trainable_parameters / report.total_parameters
    assert report.checkpoint_bytes == sum(parameter.nbytes for parameter in trainable)
    assert sum(row.count for row in report.rows) == len(report.targets) == 1
    assert report.basis_bytes == randlora.state.adapted_root(model)[1].bank.nbytes
    other: dict[str, Any] = {"r": r, "targets": ["up"], "stream": "portable", "name": "b"}
    planned = randlora.plan(model, **other)
    assert randlora.inject(model, **other) == planned
    assert planned.basis_bytes == randlora.state.adapted_root(model)[1].bank.nbytes, "of a basis that is shared"


@pytest.mark.parametrize(("codes", "is_adapted"), [(NF4, True), (INT8, False)])
def test_a_quantized_weight_counts_as_the_numbers_it_stands_for(codes: Codes, is_adapted: bool) -> None:
    dense, quantized = MODELS[0].build(), quantized_model(MODELS[0], codes)
    for model in (dense, quantized) if is_adapted else ():
        randlora.inject(model, r=8, targets="all-linear", name="first")
    expected, found = randlora.plan(dense, r=8, name="b"), randlora.plan(quantized, r=8, name="b")
    assert (found.total_parameters, found.share) == (expected.total_parameters, expected.share)
    for storage in (torch.uint8, torch.bfloat16):
        embedding = Embedding4bit(16, 64, quant_type="nf4", quant_storage=storage)
        model = nn.Sequential(of_4_bits(64, 31, quant_storage=storage), embedding).to("cpu")
        report = randlora.plan(model, r=8, targets=["0"])
        assert report.total_parameters - report.trainable_parameters == 64 * 31 + 31 + 16 * 64


def test_the_table_of_a_small_model_reads_so_fits_80_columns_and_breaks_no_name() -> None:
    model: nn.Module = Mixed()
    assert "\n1 layer adapted, about" in str(randlora.plan(model, r=4, targets=["up"]))
    report = randlora.plan(model, r=4, train_also=["head"])
    assert str(report).splitlines() == [
        "RandLoRA adapter 'default': alpha=80",
        "dense bases (stream=torch, seed=0, r=4, dims=20x20)",
        "targets: all linear layers but the output head",
        "count  in  out  r  num_bases  rank  trainable",
        "    1  12   12  4          3    12         48",
        "    1  12   20  4          3    12         48",
        "    1  20   12  4          3    12         48",
        "trainable 183 of 987 parameters (18.54%)",
        "3 layers adapted, about LoRA r = 1.6 in size, active, trainable",
        "bases 576 B in memory, checkpoint 732 B",
        "also trained: head.weight, head.bias",
        "learning rate to try first: 0.01, after a short warm-up; for long runs down to a",
        "  tenth (for layers of width 12, the median)",
        'left out: 1 embedding, 15.66% of the weights: targets="all" adapts it',
    ]
    assert str(randlora.merge(adapt(model, r=4))) == "merged default into 3 layers; the layers are plain again"
    texts = {0: "0 B", 999: "999 B", 1000: "1 kB", 347e6: "347 MB", 1.86e11: "186 GB"}
    assert {count: as_bytes(count) for count in texts} == texts
    assert table(("a", "number"), [(1, 1234), (1000000, 2)])[1:] == ["        1   1,234", "1,000,000       2"]
    model = nn.ModuleDict({letter * 30: nn.Linear(8, 8) for letter in "abcdef"})
    report = randlora.plan(model, r=4, basis="block", train_also=[f"{name}.bias" for name in model], trainable=False)
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 80
    assert all(any(f"{letter * 30}.bias" in line for line in lines) for letter in "abcd")


SMALL = [(12, 12), (12, 20), (20, 12)]
RATES: list[tuple[list[tuple[int, int]], dict[str, Any], float | None, int]] = [
    (SMALL, {"r": 4}, 1e-2, 12),
    (SMALL, {"r": 4, "alpha": {"0": 80, ".*": 8000}, "init": "gamma"}, 0.3 / 12 / 10, 12),
    (SMALL, {"r": 4, "trainable": False}, None, 12),
    ([(64, 64)] * 3 + [(256, 256)], {"r": 32}, 0.3 / 256, 256),  # which has four fifths of the parameters
    ([(512, 64)], {"r": 32}, 0.3 / 64, 64),
    ([(64, 64)], {"like_lora": 1, "train": "lambda"}, 0.5 / 64, 64),
    ([(64, 64)], {"like_lora": 4, "train": "lambda"}, 0.5 / 64 / 4, 64),
]


@pytest.mark.parametrize(("sides", "options", "expected", "median"), RATES)
def test_the_learning_rate_to_try_goes_by_the_width_in_which_most_is_trained_and_the_size_of_a_step(
    sides: list[tuple[int, int]], options: dict[str, Any], expected: float | None, median: int
) -> None:
    model = nn.Sequential(*(nn.Linear(*each) for each in sides))
    report = randlora.plan(model, targets="all-linear", **options)
    assert report.learning_rate == (expected if expected is None else pytest.approx(expected))
    assert ("learning rate to try first" in str(report)) == (expected is not None)
    assert (f"for layers of width {median}, the median" in on_one_line(report)) == (expected is not None)


@pytest.mark.parametrize(("width", "noted"), [(1024, 0.5), (4096, 0.4), (512, 0.6), (256, None)])
def test_the_report_of_dense_bases_names_block_bases_with_their_share_of_the_work(
    width: int, noted: float | None
) -> None:
    layers = nn.Linear(width, width, device="meta"), nn.Embedding(9 * width, width, device="meta")
    layer, said = nn.Sequential(*layers), "basis='block' would take about"
    report = str(randlora.plan(layer, r=32, targets=["0", "1"]))
    assert (f"{said} {noted} of the work" in report) == (noted is not None) == (said in report)
    c, b, tokens = 4, 8, 2048  # the defaults for r = 32; docs/method.md has the formulas
    dense = 6 * tokens + 6 * width if width < tokens else 14 * tokens
    block = (4 + 2 / c + 2 / b) * tokens + 4 * width / (c * b)
    assert noted is None or round(block / dense, 1) == noted
    for options in ({"basis": "block"}, {"basis": "sparse"}, {"trainable": False}):
        assert said not in str(randlora.plan(layer, r=32, targets=["0"], **options))


def test_a_head_that_is_left_frozen_is_told_of_with_how_to_train_it() -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "classifier": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))})
    note = 'frozen: classifier; if it is new, with random values, give train_also="classifier"'
    rows: list[dict[str, Any]] = [{}, {"targets": ["q_proj"]}, {"targets": ["classifier"]}, {"trainable": False}]
    told = [note in randlora.plan(model, r=4, **options).notes for options in (*rows, {"train_also": "classifier"})]
    assert told == [True, True, False, False, False]
