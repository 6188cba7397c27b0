"""Selecting the layers and weights to adapt: by pattern, or by names that models share if no targets are given."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from randlora.config import Pattern, RandLoRAConfig
from randlora.errors import AdapterError, TargetError, raise_collected, spelled
from randlora.layers.registry import Refusal
from randlora.targets.census import WEIGHT, Candidate, Census, Held, Key, Site
from randlora.targets.left_out import (
    ALL,
    ALL_LINEAR,
    LINEAR_KINDS,
    NOTHING,
    LeftOut,
    container_names,
    foreign_adapters,
    inventory,
    left_out,
    missed,
    obstacle,
    reason,
    refusal,
    tied_names,
)
from randlora.targets.match import is_names, matches, prefixes, shortened, unmatched

HEAD = "the output head"
TRAINED = "trained by train_also"


@dataclass(frozen=True)
class Selection:
    """The sites that a pattern selects, in the model's order, and the rule that chose them."""

    sites: tuple[Site, ...]
    rule: str
    skipped: Mapping[str, str]  # why, by FQN
    left_out: tuple[LeftOut, ...]  # all other matrices; empty if the user named or described the targets
    is_default: bool  # whether the user gave no targets


def find_targets(model: nn.Module, targets: Pattern | None = None, exclude: Pattern | None = None) -> list[Site]:
    """Return the layers that would be adapted, without changing the model.

    Args:
        model: Any module.
        targets: See `RandLoRAConfig.targets`.
        exclude: See `RandLoRAConfig.exclude`.

    Returns:
        One site for each weight, in the model's order.

    Raises:
        ConfigError: If ``targets`` or ``exclude`` is not a pattern.
        TargetError: If a pattern or a name matches nothing, or a match cannot be adapted.
        AdapterError: If the model has adapters of another library.
    """
    checked, census = RandLoRAConfig(targets=targets, exclude=exclude), Census.of(model)
    raise_collected(AdapterError, foreign_adapters(census), doing="find targets")
    return list(select(census, checked.targets, checked.exclude).sites)


def select(census: Census, given: Pattern | None, exclude: Pattern | None, trained: Collection[str] = ()) -> Selection:
    """Return the weights selected by a pattern. A rule leaves out parameters in ``trained``, by FQN."""
    own = census.kinds[id(census.model)]
    if (not census.candidates and own.called is not None) or own.read:
        raise TargetError(
            f"the model itself is a layer ({type(census.model).__name__}) and has no name within a model: "
            "wrap it in a module, as in torch.nn.Sequential(layer), and adapt that"
        )
    pattern, rule, must_match = _resolve(census, given)
    is_rule = pattern in (ALL, ALL_LINEAR)
    candidates = _candidates(census, pattern, must_match=must_match)
    excluded, problems = ([], []) if exclude is None else _excluded(census, candidates, exclude)
    excluded_keys = {visit.key for visit in excluded}
    kept = [visit for visit in candidates if visit.key not in excluded_keys]
    if is_rule:
        chosen, skipped = _by_rule(census, kept, pattern)
        rule += _beside_head(census, chosen, trained)
    else:
        chosen, skipped, refused = _by_pattern(census, kept, pattern)
        strays = _strays(census, candidates, pattern, exclude) if must_match else []
        problems += [refusal(census, visit) for visit in refused] + [refusal(census, held) for held in strays]
        if must_match:
            names = {name for visit in (*chosen, *excluded, *refused) for name in _names(visit, pattern)}
            names |= {held.fqn for held in strays}
            problems += missed(census, "targets", pattern, unmatched(pattern, names), _usual(census))
        else:
            skipped |= _reasons(chosen, census.useless)
        if not (chosen or excluded or problems):
            problems.append(f"{rule} {NOTHING}; {inventory(census)}")
    raise_collected(TargetError, problems, doing="find the targets")
    rule += "" if exclude is None else ", without the excluded"
    chosen = [visit for visit in chosen if visit.fqn not in skipped]
    left: tuple[LeftOut, ...] = ()
    if is_rule or not must_match:  # the user has not said what is adapted
        alone = _left_alone(census, chosen, trained)
        chosen = [visit for visit in chosen if visit.fqn not in alone]
        wanted = {visit.key for visit in chosen}
        skipped |= alone | _heads(census, wanted)
        left = left_out(census, wanted, skipped, excluded_keys, trained)
    if not chosen:
        found = f"give {spelled('targets')} that match a layer; {inventory(census)}"
        reasons = [f"skipped: {shortened([f'{fqn} ({why})' for fqn, why in skipped.items()])}"] if skipped else []
        raise TargetError("; ".join([f"{rule}: no layer is left to adapt", found, *reasons, *map(str, left)]))
    skipped = {fqn: why for fqn, why in skipped.items() if not {fqn, f"{fqn}.weight"} & {*trained}}
    return Selection(census.sites_of(chosen), rule, skipped, left, is_default=given is None)


def _resolve(census: Census, pattern: Pattern | None) -> tuple[Pattern, str, bool]:
    """Return the effective pattern, its description, and whether each of its entries must match."""
    if pattern is None and (default := default_targets(census)) is not None:
        names, rule = default
        return lambda fqn, module: matches(names, fqn, module), rule, False  # not what is inside of these
    if pattern is None or pattern == ALL_LINEAR:
        return ALL_LINEAR, "all linear layers", True
    if pattern == ALL:
        return ALL, "all layers and weights that can be adapted", True
    if callable(pattern):
        return pattern, f"the callable {getattr(pattern, '__name__', type(pattern).__name__)}", True
    if isinstance(pattern, str):
        return pattern, f"the regex '{pattern}'", True
    return tuple(pattern), f"the names {', '.join(pattern)}", True


def _candidates(census: Census, pattern: Pattern, *, must_match: bool) -> list[Candidate]:
    """Return what a rule is about or a pattern matches; a default matches no layers but linear ones."""
    visits = census.candidates
    if pattern in (ALL, ALL_LINEAR):
        return [visit for visit in visits if (pattern == ALL and visit.entry is not None) or is_linear(visit)]
    asked = visits if must_match else [visit for visit in visits if visit.entry is None or is_linear(visit)]
    return [visit for visit in asked if _is_matched(visit, pattern)]


def _names(visit: Candidate, pattern: Pattern) -> list[str]:
    """Return the names by which a pattern may match a module: its FQN and, if the pattern is names, its parents'."""
    return prefixes(visit.fqn) if is_names(pattern) else [visit.fqn]


def _is_matched(visit: Candidate, pattern: Pattern) -> bool:
    return any(matches(pattern, name, visit.module) for name in _names(visit, pattern))


def _by_pattern(
    census: Census, matched: Sequence[Candidate], pattern: Pattern
) -> tuple[list[Candidate], dict[str, str], list[Candidate]]:
    """Split matches into layers to adapt, others inside a named module (skipped, with reasons), and named others."""
    chosen, skipped, refused = [], {}, []
    containers = container_names(census) if is_names(pattern) else set()
    for visit in matched:
        if isinstance(visit.entry, type):
            chosen.append(visit)
        elif visit.fqn not in containers and (why := reason(census, visit)) is not None:
            if is_names(pattern) and not matches(pattern, visit.fqn, visit.module):
                skipped[visit.fqn] = why
            else:
                refused.append(visit)
    return chosen, skipped, refused


def _strays(census: Census, candidates: Sequence[Candidate], pattern: Pattern, exclude: Pattern | None) -> list[Held]:
    """Return the parameters without an adapter layer that a regex or a name matches, and that no module stands for."""
    told = {id(visit.module) for visit in candidates if visit.attribute == WEIGHT and reason(census, visit) is not None}
    return [
        held
        for held in census.unserved
        if id(held.module) not in told and not callable(pattern) and matches(pattern, held.fqn, held.module)
        if exclude is None or not _is_matched(Candidate(held.fqn, held.module, held.attribute, None), exclude)
    ]


def _by_rule(census: Census, visits: Sequence[Candidate], rule: Pattern) -> tuple[list[Candidate], dict[str, str]]:
    """Split what ``"all"`` or ``"all-linear"`` is about into what is adapted and what is skipped, with the reasons."""
    skipped = {visit.fqn: visit.entry.reason for visit in visits if isinstance(visit.entry, Refusal)}
    skipped |= _reasons(visits, census.useless)
    skipped |= _reasons(visits, {visit.key: HEAD for visit in visits if _is_in_head(census, visit)})
    if rule == ALL:  # "all-linear" refuses what cannot be adapted
        sites = census.sites_of(visit for visit in visits if visit.fqn not in skipped)
        skipped |= {site.fqn: why for site in sites if (why := obstacle(site)) is not None}
    passed = {visit.key for visit in visits if visit.fqn in skipped}
    return [visit for visit in visits if visit.key not in passed], skipped


def _reasons(visits: Sequence[Candidate], why: Mapping[Key, str]) -> dict[str, str]:
    """Return the reasons for some of these layers, by FQN, given those by key."""
    return {visit.fqn: why[visit.key] for visit in visits if visit.key in why}


def _left_alone(census: Census, visits: Sequence[Candidate], trained: Collection[str]) -> dict[str, str]:
    """Return which weights that a rule chose are not adapted: trained beside, or shared by modules."""
    sites = census.sites_of(visits)
    why = {key: f"tied to {', '.join(names)}" for key, names in tied_names(census, sites).items()}
    beside = {id(held.tensor) for held in census.parameters if held.fqn in trained}
    return _reasons(visits, why | {site.key: TRAINED for site in sites if id(site.weight) in beside})


def _heads(census: Census, chosen: Collection[Key]) -> dict[str, str]:
    """Return the weights of the output head that are not adapted, as skipped."""
    skipped = {}
    for places in census.matrices:
        sites = [site for held in places if (site := census.site_of(held)) is not None]
        inside = next((held for held in places if _is_in_head(census, held)), None)
        if inside is not None and not any(site.key in chosen for site in sites):
            site = census.site_of(inside)
            skipped[inside.fqn if site is None else site.fqn] = HEAD
    return skipped


def _beside_head(census: Census, chosen: Sequence[Candidate], trained: Collection[str]) -> str:
    """Return what a rule's description says of the output head: that it is left out, or not recognized and adapted."""
    if any(_is_in_head(census, visit) for visit in census.candidates):
        return " but the output head"
    last = [visit for visit in census.candidates if is_linear(visit)][-1:]
    if len(chosen) < 2 or chosen[-1:] != last or f"{chosen[-1].fqn}.weight" in trained:
        return ""
    return f" (no output head recognized: {spelled('train_also', [chosen[-1].fqn])} would train the last one whole)"


def _is_in_head(census: Census, held: Candidate | Held) -> bool:
    return held.module is census.head or held.fqn.partition(".")[0] in HEAD_NAMES


def _excluded(census: Census, candidates: Sequence[Candidate], exclude: Pattern) -> tuple[list[Candidate], list[str]]:
    """Return the modules that ``exclude`` matches, at all their places, and messages about entries without a match."""
    asked: Sequence[Candidate] = census.candidates
    if callable(exclude):
        layers = {visit.key for visit in candidates if visit.entry is not None or reason(census, visit)}
        asked = [visit for visit in asked if visit.key in layers]
    matched = {visit.key for visit in asked if _is_matched(visit, exclude)}
    closed = container_names(census) if isinstance(exclude, str) else set()
    known = [fqn for fqn, *_ in (*census.candidates, *census.unserved) if fqn not in closed]
    problems = missed(census, "exclude", exclude, unmatched(exclude, known), _usual(census))
    return [visit for visit in census.candidates if visit.key in matched], problems


TARGET_PRESETS: dict[str, str | tuple[str, ...]] = {
    **dict.fromkeys(("bart", "gemma", "gemma2", "gemma3_text", "gpt_neo", "gptj", "llama"), ("q_proj", "v_proj")),
    **dict.fromkeys(("llama4", "mistral", "mixtral", "opt", "qwen2", "qwen3", "stablelm"), ("q_proj", "v_proj")),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    **dict.fromkeys(("mt5", "t5"), ("q", "v")),
    **dict.fromkeys(("bert", "electra", "layoutlm", "roberta", "xlm-roberta"), ("query", "value")),
    **dict.fromkeys(("RefinedWeb", "RefinedWebModel", "bloom", "chatglm", "falcon", "gpt_neox"), ("query_key_value",)),
    **dict.fromkeys(  # as `LANGUAGE_MODEL`, under a name that the encoders of CLIP and its kin have too
        ("granite_docling", "idefics2", "idefics3", "kosmos-2", "kosmos-2.5", "smolvlm"),
        r".*text_model\..*\.(q_proj|v_proj)",
    ),
    "bark": ("att_proj",),
    "blip-2": ("q", "v", "q_proj", "v_proj"),
    "btlm": ("c_proj", "c_attn"),
    "codegen": ("qkv_proj",),
    "cpmant": ("project_q", "project_v"),
    "ctrl": ("Wq", "Wv"),
    "cvt": ("projection_query", "projection_value"),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "funnel": ("q_head", "v_head"),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "levit": r".*\.(queries|keys_values|queries_keys_values)\.linear",
    "mpt": ("Wqkv",),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "phi4_multimodal": ("qkv_proj",),  # of its language model
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
}
"""Suffixes (or a regex) of the layers adapted by default; an entry may name layers of only some variants."""

TRANSFORMERS_NAMES = (
    *("q_proj", "v_proj", "query", "value", "q", "v", "query_proj", "value_proj", "q_lin", "v_lin"),
    *("linear_q", "linear_v", "to_q", "to_v"),
    *("qkv_proj", "qkv", "query_key_value", "Wqkv", "c_attn", "kv_proj", "to_kv"),  # of several at once
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),  # each as a product of two
    *("in_proj_qkv", "in_proj_qkvz"),  # of linear attention
)
"""Names of query and value projections that two or more models of transformers share."""

DIFFUSERS_NAMES = (
    *("to_q", "to_k", "to_v", "to_out", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("to_qkv", "to_kv", "to_added_qkv", "to_qkv_mlp_proj", "to_query", "to_key", "to_value"),
    *("img_attn_qkv", "img_attn_proj", "txt_attn_qkv", "txt_attn_proj", "img_qkv_proj", "txt_kv_proj"),
    *("query", "key", "value", "proj_attn"),
)
"""Names of attention projections in diffusers' models, including outputs, as in its training scripts."""

LANGUAGE_MODEL = "language_model"  # in transformers' multimodal models, what reads the encoders' outputs

# names of a model's direct children that are output heads; those that are usually new, for the user's task
HEAD_NAMES = frozenset({"classifier", "embed_out", "head", "heads", "lm_head", "qa_outputs", "score"})
NEW_HEADS = HEAD_NAMES - {"embed_out", "lm_head"}


def default_targets(census: Census) -> tuple[Pattern, str] | None:
    """Return the pattern of the layers adapted by default, and what it selects; ``None`` without usable attention."""
    if (default := _by_names(census)) is None:
        return None
    visits = [visit for visit in census.candidates if matches(default[0], visit.fqn, visit.module) and visit.entry]
    unfit = census.uncalled.keys() | tied_names(census, census.sites_of(visits)).keys()
    return None if visits and all(visit.key in unfit for visit in visits) else default


def _usual(census: Census) -> Iterator[str]:
    """Yield the names of the layers that are adapted by default."""
    pattern, _ = default_targets(census) or ((), "")
    for fqn, module, _, entry in census.candidates:
        if entry is not None and matches(pattern, fqn, module):
            yield fqn


def _by_names(census: Census) -> tuple[Pattern, str] | None:
    """Return the default for models of transformers and of diffusers. Elsewhere, ``value`` may name any layer."""
    model_type = getattr(getattr(census.model, "config", None), "model_type", None)
    if model_type in TARGET_PRESETS:
        preset = TARGET_PRESETS[model_type]
        names = preset if isinstance(preset, str) else ", ".join(preset)
        return preset, f"the preset of model_type {model_type!r} ({names})"
    layers = [visit for visit in census.candidates if visit.attribute == WEIGHT]
    if isinstance(model_type, str):
        what = "the query and value projections"
        if within := [visit for visit in layers if LANGUAGE_MODEL in visit.fqn.split(".")]:
            return _named(within, TRANSFORMERS_NAMES, f"{what} of {LANGUAGE_MODEL}")
        return _named(layers, TRANSFORMERS_NAMES, what)
    if any(base.__module__.partition(".")[0] == "diffusers" for base in type(census.model).__mro__):
        outside = [visit for visit in layers if "time" not in visit.fqn]  # some embed it by attention
        return _named(outside, DIFFUSERS_NAMES, "the attention projections")
    return None


def is_linear(visit: Candidate) -> bool:
    """Whether a module or weight is, or looks like, a linear layer or a projection of attention."""
    entry = visit.entry
    return isinstance(entry, Refusal) or (entry is not None and entry.kind in LINEAR_KINDS)


def _named(visits: Iterable[Candidate], names: Sequence[str], what: str) -> tuple[Pattern, str] | None:
    """Return the pattern and the rule of the linear layers that have one of some names, or lie in a module that has."""
    found = {visit.fqn: visit.fqn.split(".")[-2:] for visit in visits if is_linear(visit)}
    chosen = {fqn for fqn, ending in found.items() if not set(names).isdisjoint(ending)}
    if not chosen:
        return None
    present = [name for name in names if any(name in found[fqn] for fqn in chosen)]
    return lambda fqn, _module: fqn in chosen, f"{what} ({', '.join(present)})"
