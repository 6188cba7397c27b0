"""The walk over a model, which layers a pattern means by which rule, r and alpha by pattern, and what is refused."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import randlora
from randlora import RandLoRAConfig
from randlora.config import LayerOptions
from randlora.errors import ConfigError, TargetError
from randlora.layers.registry import Reading
from randlora.targets.census import Census
from randlora.targets.left_out import obstacles
from randlora.targets.options import options_by_target, options_listed, r_like_lora, resolve
from randlora.targets.select import Selection, find_targets, select
from tests import models
from tests.kit import untouched
from tests.laws import Mixed
from tests.test_readers_experts import EXPERTS, mixtral


class Model(nn.Module):
    """Two blocks between a bag of embeddings, which no adapter layer adapts, and a head."""

    def __init__(self, model_type: str | None = None, head: str = "head") -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type=model_type)
        self.embed = nn.EmbeddingBag(10, 6)
        self.layers = nn.ModuleList()
        for _ in range(2):
            attention = {"q_proj": nn.Linear(6, 6), "v_proj": nn.Linear(6, 3), "proj": nn.Linear(6, 6)}
            block = {"attention": nn.ModuleDict(attention), "norm": nn.LayerNorm(6), "up": Conv1D(12, 6)}
            block["attention"].register_module("dropout", None)
            self.layers.append(nn.ModuleDict(block))
        self.add_module(head, nn.Linear(6, 10))


LINEAR = [f"layers.{i}.{name}" for i in (0, 1) for name in (*(f"attention.{p}proj" for p in ("q_", "v_", "")), "up")]
BODY, UP, OTHER = [LINEAR[i] for i in (0, 1, 4, 5)], LINEAR[3::4], [LINEAR[i] for i in (2, 3, 6, 7)]


def selected(model: nn.Module, pattern: Any = None, exclude: Any = None) -> Selection:
    return select(Census.of(model), pattern, exclude)


def found(model: nn.Module, pattern: Any = None, exclude: Any = None) -> list[str]:
    return [target.fqn for target in find_targets(model, pattern, exclude)]


def is_conv1d(fqn: str, module: nn.Module) -> bool:
    return isinstance(module, Conv1D)


def nothing(fqn: str, module: nn.Module) -> bool:
    return False


# The walk

linear = st.builds(lambda: nn.Linear(2, 2))
trees: st.SearchStrategy[nn.Module] = st.recursive(
    linear, lambda inner: st.dictionaries(st.sampled_from(["a", "b", "0"]), inner, max_size=3).map(nn.ModuleDict)
)


@given(trees)
def test_a_walk_comes_past_every_module_under_its_name_and_sees_an_adapted_model_as_it_was(tree: nn.Module) -> None:
    model = nn.ModuleDict({"top": tree, "more": nn.Linear(2, 2), "layer": nn.Linear(2, 2)})
    named = [(fqn, module) for fqn, module in model.named_modules() if fqn]
    model["layer"].bias = model["more"].bias
    plain = Census.of(model)
    assert [(visit.fqn, visit.module) for visit in plain.visits] == named
    assert plain.adapted == ()
    parameters = [(held.fqn, id(held.tensor)) for held in plain.parameters]
    assert parameters == [(fqn, id(value)) for fqn, value in model.named_parameters(remove_duplicate=False)]
    randlora.inject(model, r=1, targets="all-linear", exclude="layer")
    census = Census.of(model)
    assert [(visit.fqn, visit.module) for visit in census.visits] == named
    assert [(held.fqn, id(held.tensor)) for held in census.parameters] == parameters
    linear = {fqn for fqn, module in named if isinstance(module, nn.Linear)}
    assert {site.fqn for site in census.adapted} == linear - {"layer"}
    assert {site.fqn for site in find_targets(model, "all-linear") if site.adapter_layer} == linear - {"layer"}


# What a pattern means

BY_NAME = "all linear layers but the output head"
PATTERNS: list[tuple[str | None, Any, Any, str, list[str]]] = [
    ("llama", None, None, "the preset of model_type 'llama' (q_proj, v_proj)", BODY),
    ("blip-2", None, None, "the preset of model_type 'blip-2' (q, v, q_proj, v_proj)", BODY),  # q, v: of a variant
    ("unheard-of", None, None, "the query and value projections (q_proj, v_proj)", BODY),
    (None, None, None, BY_NAME, LINEAR),
    ("llama", "all-linear", None, BY_NAME, LINEAR),
    (None, {"up"}, None, "the names up", UP),
    (None, ["up", "proj"], None, "the names up, proj", OTHER),
    (None, "head", None, "the regex 'head'", ["head"]),
    (None, r".*\.(q|v)_proj", None, "the regex ", BODY),
    (None, r"layers\.\d\.(attention(\.proj)?|norm|up)", None, "the regex ", OTHER),
    (None, lambda fqn, _: fqn.startswith("layers.0") and fqn.endswith("q_proj"), None, "the callable ", LINEAR[:1]),
    (None, is_conv1d, None, "the callable is_conv1d", UP),
    (None, "all-linear", r".*\.attention\..*", BY_NAME, UP),
    (None, None, r"(?!.*\.up$).*", BY_NAME, UP),
    (None, None, lambda fqn, _: not fqn.endswith(".up"), BY_NAME, UP),
    (None, None, lambda _, module: module.bias.numel() != 12, BY_NAME, UP),  # it sees no module without a bias
    *[(None, None, anyway, BY_NAME, LINEAR) for anyway in (nothing, ["head"], ["norm"], r".*\.norm")],
    (None, None, ["embed", "layers.0"], BY_NAME, LINEAR[4:]),
]


@pytest.mark.parametrize(("model_type", "pattern", "exclude", "rule", "expected"), PATTERNS)
def test_a_pattern_means_these_layers_in_the_models_order_by_the_rule_that_is_told(
    model_type: str | None, pattern: Any, exclude: Any, rule: str, expected: list[str]
) -> None:
    model = Model(model_type)
    with untouched(model):
        selection = select(Census.of(model), pattern, exclude)
    assert [site.fqn for site in selection.sites] == found(model, pattern, exclude) == expected
    assert selection.rule.startswith(rule)
    assert selection.rule.endswith(", without the excluded") == (exclude is not None)


NAMES = sorted({
    ".".join(parts[start:])
    for fqn, _ in Model().named_modules()
    for parts in [fqn.split(".")]
    for start in range(len(parts) if fqn else 0)
})
HOLDING = [name for name in NAMES if any(f".{name}." in f".{fqn}." for fqn in [*LINEAR, "head"])]


@given(
    st.lists(st.sampled_from(HOLDING), min_size=1, max_size=3), st.none() | st.lists(st.sampled_from(NAMES), min_size=1)
)
def test_a_list_means_the_layers_and_the_modules_of_its_names(names: list[str], exclude: list[str] | None) -> None:
    def means(entries: list[str], fqn: str) -> bool:
        return any(f".{entry}." in f".{fqn}." for entry in entries)

    expected = [fqn for fqn in [*LINEAR, "head"] if means(names, fqn) and not means(exclude or [], fqn)]
    if expected:
        assert found(Model(), names, exclude) == expected
    else:
        with pytest.raises(TargetError, match="without the excluded: no layer is left to adapt"):
            find_targets(Model(), names, exclude)


def test_a_layer_of_two_names_goes_by_either_and_is_called_by_its_first_and_names_of_presets_mean_layers() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    model["b"] = model["a"]
    either: list[Any] = [["b"], "a", ["a", "b"]]
    for names in either:
        assert found(model, names) == ["a"]
        assert found(model, None, names) == found(model, ["a", "c"], names) == ["c"]
    shared = nn.ModuleDict({"x": model, "y": model})
    assert found(shared) == ["x.a", "x.c"]
    assert obstacles(Census.of(shared), find_targets(shared), 0.0) == []  # they are not tied to themselves
    model = nn.ModuleDict({"q": nn.ModuleDict({"inner": nn.Linear(2, 2)}), "v": nn.Linear(2, 2)})
    model.__dict__["config"] = SimpleNamespace(model_type="t5")  # q, v
    assert found(model) == ["v"]
    assert found(model, ["q", "v"]) == ["q.inner", "v"]


# What is left out


def test_a_head_is_left_out_where_the_model_says_which_it_is_under_all_names_unless_it_is_asked_for() -> None:
    model = Model(head="to_words")
    model.get_output_embeddings = lambda: model.get_submodule("to_words")  # type: ignore[assignment]
    model.add_module("again", model.get_submodule("to_words"))
    assert found(model) == LINEAR
    assert selected(model).skipped == {"to_words": "the output head", "again": "the output head"}
    body = nn.ModuleDict({"score": nn.Linear(2, 2)})
    by_name = nn.ModuleDict({"body": body, "score": nn.Sequential(nn.Linear(2, 2))})
    assert found(by_name) == ["body.score"]  # at the top alone
    assert selected(by_name).skipped == {"score.0": "the output head"}
    assert randlora.inject(model, r=2, targets=["to_words"]).targets == ("to_words",)
    assert found(model) == LINEAR


def test_what_is_excluded_is_not_refused_and_what_is_inside_of_what_was_named_is_left_out() -> None:
    """With timm's names, but the projection of patches is of a type without an adapter layer."""
    blocks = nn.ModuleList(nn.ModuleDict({"qkv": nn.Linear(4, 12), "proj": nn.Linear(4, 4)}) for _ in range(2))
    model = nn.ModuleDict({"patch_embed": nn.ModuleDict({"proj": nn.Bilinear(3, 4, 2)}), "blocks": blocks})
    in_blocks = [f"blocks.{index}.{name}" for index in (0, 1) for name in ("qkv", "proj")]
    named: list[tuple[Any, Any]] = [
        (["qkv", "proj"], r"patch_embed\..*"),
        (["qkv", "proj"], lambda _, module: isinstance(module, nn.Bilinear)),
        (r".*\.(qkv|proj)", ["patch_embed.proj"]),
        (lambda fqn, _: fqn.endswith(("qkv", "proj")), ["patch_embed"]),
    ]
    for targets, exclude in named:
        with pytest.raises(TargetError, match=r'Bilinear, for which .* exclude=\["patch_embed\.proj"\]'):
            find_targets(model, targets)
        assert found(model, targets, exclude) == in_blocks
    inside = selected(nn.ModuleDict({"body": model}), ["body"])
    assert [site.fqn for site in inside.sites] == [f"body.{fqn}" for fqn in in_blocks]
    assert inside.skipped == {"body.patch_embed.proj": "of type Bilinear, for which there is no adapter layer"}
    assert selected(nn.ModuleDict({"body": model}), ["body"], ["patch_embed"]).skipped == {}


# What is refused

NONE = "matches no layer or weight that can be adapted"
NO_EMBED = "embed is of type EmbeddingBag, for which there is no adapter layer"
LLAMA = models.llama()
ONLY = "; the model has no layer or weight that can be adapted, only"
OTHERS = nn.Sequential(nn.Bilinear(1, 1, 1), nn.Tanh())
NORMS = nn.ModuleDict({"up": nn.Linear(2, 2), "norms": nn.Sequential(nn.LayerNorm(2))})
MANY = nn.ModuleDict({f"up_{i}": nn.Linear(2, 2) for i in range(99)})
REFUSED: list[tuple[Any, Any, str]] = [
    ("q_prj", None, f'"q_prj" {NONE}; the model has q_proj, '),
    (["v_proj", "q_prj"], None, f'"q_prj" {NONE}; the model has q_proj, '),
    (["layers.2.up"], None, f'"layers.2.up" {NONE}; the nearest names are layers.1.up, layers.0.up'),
    (["norm", "up"], None, f'"norm" {NONE}'),
    (r".*\.norm", None, NONE),
    (["embed"], None, NO_EMBED),
    (".*", None, f"{NO_EMBED}: narrow the pattern"),
    (nothing, None, f"the callable nothing {NONE}; the model has"),
    (["up"], ["up"], "the names up, without the excluded: no layer is left to adapt"),
    (None, ["q_proj", "k_proj"], 'exclude="k_proj" matches no layer or weight'),
    (None, ["nrm"], 'exclude="nrm" matches no layer or weight; the model has norm, '),
    (["q_prj"], ["v_prj"], "2 problems"),
    ([f"q_{index}" for index in range(7)], None, "7 problems"),
    ("attention.q_proj", None, 'did you mean targets=["attention.q_proj"]?'),
    *[(joined, None, 'did you mean targets=["q_proj", "v_proj"]?') for joined in ("(q_proj|v_proj)", "q_proj, v_proj")],
    (("q_proj,v_proj",), None, 'did you mean targets=["q_proj", "v_proj"]?'),
    (r"layers\.0", None, 'did you mean targets=["layers.0"]?'),
    ([r".*\.q_proj"], None, r'did you mean targets=r".*\.q_proj"?'),
    *[
        (word, None, 'did you mean targets="all-linear"?')
        for word in ("all_linear", "All Linear", ["all_linear", "up"])
    ],
    (None, r"layers\.0", 'did you mean exclude=["layers.0"]?'),
    (None, "attention.proj|up", 'did you mean exclude=["attention.proj", "up"]?'),
    *[(targets, OTHERS, f"{ONLY} Bilinear, Tanh") for targets in ("q", ["q"], "all-linear", nothing)],
    ("q", nn.Sequential(), f"{ONLY} itself"),
    (["up", "norms"], NORMS, f'targets="norms" {NONE}, only norms (Sequential)'),
    (None, Conv1D(2, 2), "the model itself is a layer (Conv1D) and has no name within a model: wrap it in a module"),
    # all that a model has, those that are adapted by default first
    (["query"], LLAMA, "has q_proj, v_proj, embed_tokens, k_proj, o_proj, gate_proj, up_proj, down_proj, lm_head"),
    (["mpl"], LLAMA, "the model has mlp, q_proj, v_proj, "),
    (["layers.0.attn.q_proj"], LLAMA, "the nearest names are model.layers.0.self_attn.q_proj, "),
    (["q_proj"], models.bert(), "the model has query, value, "),
    (["q"], MANY, "up_19 and 79 more"),
]


@pytest.mark.parametrize(("targets", "exclude", "message"), REFUSED)
def test_a_pattern_that_means_nothing_is_refused_with_what_was_meant(targets: Any, exclude: Any, message: str) -> None:
    model, exclude = (exclude, None) if isinstance(exclude, nn.Module) else (Model(), exclude)
    with untouched(model), pytest.raises(TargetError, match=re.escape(message)):
        find_targets(model, targets, exclude)


# r and alpha by pattern, and the r that has as many parameters as a LoRA

TARGETS = ("layers.0.attn.q_proj", "layers.0.mlp.up_proj", "layers.1.attn.q_proj", "layers.1.attn.in_proj_weight")


def test_a_pattern_is_a_name_a_suffix_a_module_or_else_a_regex_in_full() -> None:
    rows: list[tuple[Any, list[int]]] = [
        ({"attn.q_proj": 1, ".*": 7}, [1, 7, 1, 7]),
        ({"attn": 1, ".*": 7}, [1, 7, 1, 1]),
        ({"1": 1, "layers.0.mlp.up_proj": 2, ".*": 7}, [7, 2, 1, 1]),
        ({r".*\.(q|up)_proj": 1, ".*": 7}, [1, 1, 1, 7]),
        ({"layers.1": 4, "q_proj": 8, ".*": 16}, [8, 16, 4, 4]),  # the first that matches applies
        ({"q_proj": 8, "attn": 4, "mlp|.*mlp.*": 2, ".*": 16}, [8, 2, 8, 4]),  # the last finds none left
        ({".*": 4, "q_proj": 4}, [4, 4, 4, 4]),
        ({"1": 4, "layers.1": 8, ".*": 16}, [16, 16, 4, 4]),  # two patterns for the same ones are no mistake
    ]
    for r, ranks in rows:
        found, problems = resolve(RandLoRAConfig(r=r), TARGETS)
        assert ([found[fqn].r for fqn in TARGETS], problems) == (ranks, [])
    # as a regex, "a.0" matches "a10" too, but not where it is the name of another target
    found, _ = resolve(RandLoRAConfig(r={"a.0": 1, ".*": 2}), ["a.0", "a10", "b.a.0"])
    assert [own.r for own in found.values()] == [1, 2, 1]
    r = {"attn": 4, ".*": 16}
    both, _ = resolve(RandLoRAConfig(r=r, alpha={"layers.0": 2, ".*": 3.5}), TARGETS)  # alpha has patterns of its own
    scaled = [(*own, own.scaling) for own in both.values()]
    assert scaled == [(4, 2.0, 0.5), (16, 2.0, 0.125), (4, 3.5, 0.875), (4, 3.5, 0.875)]
    default, _ = resolve(RandLoRAConfig(r=r), TARGETS)  # 20 r of each layer
    assert [*default.values()] == [(4, 80.0), (16, 320.0), (4, 80.0), (4, 80.0)]


UNFIT: tuple[tuple[dict[str, Any], list[str]], ...] = (
    ({"r": {"q_proj": 4}}, ["r= has no pattern for model.layers.0.self_attn.k_proj, ", " and 8 more: add '.*' as the"]),
    ({"r": {"q_prj": 4, ".*": 8}}, ["r={'q_prj': …} matches no target; the nearest names are q_proj"]),
    ({"alpha": {"layers.0.mpl": 4, ".*": 8}}, ["alpha={'layers.0.mpl': …} matches no target; ", " model.layers.0.mlp"]),
    ({"r": {"q_proj(": 4, ".*": 8}}, ["r={'q_proj(': …} is neither", "a regular expression: missing )"]),
    ({"r": {".*": 4, "q_proj": 8}}, ["r={'q_proj': …} matches only what '.*' took", "put it before '.*'"]),
    ({"r": {"x": 4, ".*": 8}, "alpha": {"q_proj": 1}}, ["2 problems", "r={'x': …}", "alpha= has no pattern"]),
)


@pytest.mark.parametrize(("options", "said"), UNFIT)
def test_what_fits_nothing_is_named_before_the_model_changes(options: Any, said: list[str]) -> None:
    model = models.llama()
    for verb in (randlora.plan, randlora.inject):
        with untouched(model), pytest.raises(TargetError) as refused:
            verb(model, targets="all-linear", **options)
        assert all(words in str(refused.value) for words in said)


parts = st.sampled_from(["a", "b", "0", "a.b"])
fqns = st.lists(st.lists(parts, min_size=1, max_size=3).map(".".join), min_size=1, max_size=6, unique=True)


@given(fqns, st.data())
def test_options_listed_by_fqn_are_those_of_each_target_however_read(names: list[str], data: st.DataObject) -> None:
    """A target's name may be a suffix of another's, or that of a module that another is inside."""
    draw = st.builds(LayerOptions, st.sampled_from([2, 4]), st.sampled_from([1.0, 2.5]))
    options = {fqn: data.draw(draw) for fqn in names}
    config = options_by_target(RandLoRAConfig(r={".*": 1}, alpha={".*": 1}), options)
    assert options_listed(config, names) == options
    assert resolve(config, names) == (options, [])
    config = RandLoRAConfig(r={"a": 4, ".*": 4}, alpha={"a": 2, ".*": 2})
    single = options_by_target(config, {"a": LayerOptions(4, 2.0), "b": LayerOptions(4, 2.0)})
    assert (single.r, single.alpha) == (4, 2.0)  # one value for all is listed as a number


SIDES = st.integers(1, 40)
SOME = ["q", "up", "down"]


@given(
    st.lists(st.tuples(SIDES, SIDES) | st.tuples(st.integers(1, 3), SIDES, SIDES), min_size=1, max_size=4),
    st.integers(1, 60),
)
def test_no_r_has_a_number_of_parameters_that_is_nearer(shapes: list[tuple[int, ...]], lora_r: int) -> None:
    matrices = [shape[-2:] for shape in shapes for _ in range(shape[0] if len(shape) == 3 else 1)]
    wanted = sum(lora_r * sum(matrix) for matrix in matrices)
    sizes = {  # Λ and Γ counted one by one
        r: sum((r + min(matrix)) * len(range(0, min(matrix), r)) for matrix in matrices)
        for r in range(1, 1 + max(map(min, matrices)))
    }
    nearest = min(abs(size - wanted) for size in sizes.values())
    weights: Any = [SimpleNamespace(shape=shape, shape_with=lambda _, shape=shape: shape) for shape in shapes]
    try:
        found = r_like_lora(weights, lora_r, randlora.RandLoRAConfig())
    except ConfigError:
        near = [size for size in sizes.values() if abs(size - wanted) == nearest]
        assert all(max(size, wanted) > 1.5 * min(size, wanted) for size in near)
    else:
        assert abs(sizes[found] - wanted) == nearest


def test_a_report_has_the_rank_of_a_lora_of_peft_with_as_many_parameters_or_on_all_experts() -> None:
    for experts in ("each", "shared"):
        model: Any = mixtral()
        report = randlora.plan(model, r=2, targets=EXPERTS, experts=experts)
        stacks = [parameter.shape for parameter in model.parameters() if parameter.dim() == 3]
        lora = sum(count * (rows + columns) for count, rows, columns in stacks)
        assert report.lora_rank == pytest.approx(report.trainable_parameters / lora)
    theirs = peft.get_peft_model(Mixed(), peft.LoraConfig(r=2, target_modules=SOME))
    size, _ = theirs.get_nb_trainable_parameters()
    report = randlora.plan(Mixed(), like_lora=2, targets=SOME)
    assert report.lora_rank == pytest.approx(report.trainable_parameters / (size / 2))
    assert abs(report.lora_rank / 2 - 1) < 0.3
    for r, words in {2: "256", 8: "64", 30: "18", 256: "2.5"}.items():
        told = randlora.plan(nn.ModuleDict({"a": nn.Linear(1024, 1024)}), r=r)
        assert f", about LoRA r = {words} in size," in str(told)


def test_the_r_that_is_chosen_is_divided_by_blocks_and_an_option_like_any_other(tmp_path: Path) -> None:
    block = {"basis": "block"}
    for like_lora, options, r in ((8, {}, 18), (8, block, 16), (8, {**block, "blocks": (5, 3)}, 15), (40, block, 3)):
        model: nn.Module = nn.ModuleDict({"a": nn.Linear(256, 256)})
        assert randlora.inject(model, like_lora=like_lora, **options).config.r == r  # 8 would be a size of 17
    model = Mixed()
    report = randlora.inject(model, like_lora=2, targets=SOME)
    assert report == randlora.plan(Mixed(), report.config.r, targets=SOME)
    randlora.save(model, tmp_path)
    assert randlora.load(Mixed(), tmp_path).config == report.config
    sizes: list[dict[str, Any]] = [{"like_lora": 2}, {"r": report.config.r}]
    memory = [randlora.training_memory(Mixed(), targets=SOME, **size) for size in sizes]
    assert memory[0] == memory[1]


WIDE, SIZED = nn.Linear(64, 64), {"like_lora": 2, "basis": "block", "blocks": (1000003, 999983)}
NO_SIZE: list[tuple[nn.Module, dict[str, Any], type[Exception], str]] = [
    (WIDE, {"like_lora": 1000}, ConfigError, "of rank 1 to 32, with r from 64 to 1"),
    (nn.Embedding(3200, 64), {"like_lora": 32}, ConfigError, "is out of reach"),
    (WIDE, SIZED, ConfigError, "an r that both blocks divide"),
    (WIDE, {**SIZED, "blocks": (128, 3)}, ConfigError, "with r from 384 to 384"),
    (WIDE, {"like_lora": 2, "r": 4}, ConfigError, "give like_lora= or r=, not both"),
    (WIDE, {"like_lora": 2, "config": RandLoRAConfig()}, ConfigError, "or config=, which has an r"),
    (WIDE, {"like_lora": 0}, ConfigError, "must be the rank of a LoRA, a positive integer, got 0"),
    (WIDE, {"like_lora": 2, "targets": ["norm"]}, TargetError, "norm"),
]


def test_a_size_that_no_r_has_or_that_is_given_twice_is_refused() -> None:
    for layer, options, kind, message in NO_SIZE:
        model = nn.ModuleDict({"a": layer})
        for verb in (randlora.inject, randlora.plan, randlora.training_memory):
            with untouched(model), pytest.raises(kind, match=message):
                verb(model, **{"targets": ["a"], **options})


@pytest.mark.parametrize("verdicts", [("only where read", "never"), ("never", "only where read")])
def test_a_layer_that_one_module_reads_and_a_second_one_misuses_is_refused(verdicts: Any, monkeypatch: Any) -> None:
    model: Any = nn.ModuleDict({"x": nn.Linear(2, 2)})
    readings = [Reading(model["x"], f"is {verdict}", verdict) for verdict in verdicts]
    monkeypatch.setattr("randlora.targets.census.FINDERS", [lambda owner: readings if owner is model else []])
    with untouched(model), pytest.raises(TargetError, match="is never: exclude it"):
        randlora.inject(model, r=1, targets=["x"])
