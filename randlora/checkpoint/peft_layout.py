"""PEFT's layout of an adapter: the keys of its tensors, and the fields of its JSON, as PEFT 0.21.2 writes them.

PEFT puts a module around each adapted layer and keeps the layer in it as ``base_layer``: so in a key the layer's own
parameters, such as its bias, are one level down. A child that is itself called ``base_layer`` is written one level down
too, so that no two keys collide.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn
from torch.torch_version import TorchVersion

from randlora.bases.spec import KINDS, BasisSpec, peft_streams
from randlora.checkpoint.header import ModelClass
from randlora.config import OPTIONS, BasisKind, LayerOptions, RandLoRAConfig, Stream, described
from randlora.disk.formats import is_there
from randlora.disk.hub import is_repo_id
from randlora.errors import CheckpointError, ConfigError
from randlora.layers.in_place import plain_class
from randlora.state import Adapter
from randlora.targets.census import Census
from randlora.targets.match import shortened

TENSORS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"

MODEL_PREFIX = "base_model.model."
BASE_LAYER = "base_layer"
BASES = {"randlora_A": "base_model.randlora_A", "randlora_B": "base_model.randlora_B"}
"""The keys of A and B, by the names that they have in each layer too, in files of PEFT 0.21.2 and older."""

PEFT_TYPE = "RANDLORA"
PEFT_VERSION = "0.21.2"  # whose fields these are

BASE_FIELD = "base_model_name_or_path"
CLASS_FIELDS = ("auto_mapping", "task_type")  # the class of the base model, or its task
STREAM_FIELD = "randlora_stream"  # ours, if PEFT would draw different bases from the seed: it warns of unknown fields
RANK_FIELD, ALPHA_FIELD = "rank_pattern", "alpha_pattern"  # of PEFT's LoRA: r or alpha by regex, if there are several
ROWS_FIELD, ROWS_KEY = "trainable_token_indices", ".token_adapter.trainable_tokens_delta"  # of PEFT's LoRA
UNREAD_FIELDS = (STREAM_FIELD, RANK_FIELD, ALPHA_FIELD)  # why PEFT cannot compute the same: we read our header

NEUTRAL_FIELDS: dict[str, Any] = {
    **dict.fromkeys((*CLASS_FIELDS, BASE_FIELD, "layers_pattern", "layers_to_transform", "revision")),
    "bias": "none",
    "init_weights": True,
}
"""Fields that do not affect the arithmetic. Their values in a file are kept and written back."""

OPTION_FIELDS = {name: option.peft for name, option in OPTIONS.items() if option.peft}  # by the option's name

# a path in the cache of huggingface_hub, which is the name of a model that was loaded from it
CACHED = re.compile(r"(?:^|[/\\])models--([^/\\]+)[/\\]snapshots[/\\]")


class PeftFields(TypedDict, total=False):
    """``adapter_config.json``, which may have further fields of any name."""

    alpha_pattern: dict[str, float] | None
    auto_mapping: dict[str, Any] | None
    base_model_name_or_path: str | None
    bias: str
    fan_in_fan_out: bool
    inference_mode: bool
    init_weights: bool
    layers_pattern: list[str] | str | None
    layers_to_transform: list[int] | int | None
    modules_to_save: list[str] | None
    peft_type: str
    peft_version: str | None
    projection_prng_key: int
    r: int
    randlora_alpha: float
    randlora_dropout: float
    randlora_stream: str
    rank_pattern: dict[str, int] | None
    revision: str | None
    save_projection: bool
    sparse: bool
    target_modules: list[str] | str | None
    task_type: str | None
    very_sparse: bool


OWN_FIELDS = PeftFields.__annotations__.keys() - NEUTRAL_FIELDS.keys()  # which every save computes from the adapter


def value_keys(fqn: str, targets: Container[str]) -> tuple[str, str]:
    """Return the keys of Λ and Γ of one of the targets."""
    path = MODEL_PREFIX + _descended(fqn, targets)
    return f"{path}.randlora_lambda", f"{path}.randlora_gamma"


def trained_key(fqn: str, targets: Container[str]) -> str:
    """Return the key of a parameter trained with an adapter."""
    module, _, attribute = fqn.rpartition(".")
    if module not in targets:
        return MODEL_PREFIX + _descended(fqn, targets)
    return f"{MODEL_PREFIX}{_descended(module, targets)}.{BASE_LAYER}.{attribute}"


def trained_fqn(key: str, targets: Container[str]) -> str:
    """Return the FQN for a key from `trained_key` or PEFT, which puts all children of a layer one level down."""
    parts, levels = list[str](), -1  # number of parts before the last one that was left out
    for part in key.removeprefix(MODEL_PREFIX).split("."):
        if part == BASE_LAYER and levels != len(parts) and ".".join(parts) in targets:
            levels = len(parts)
        else:
            parts.append(part)
    return ".".join(parts)


def _descended(fqn: str, targets: Container[str]) -> str:
    """Return a path with each child of a target that is called ``base_layer`` one level down."""
    parts, descended = fqn.split("."), list[str]()
    for index, part in enumerate(parts):
        if part == BASE_LAYER and ".".join(parts[:index]) in targets:
            descended.append(BASE_LAYER)
        descended.append(part)
    return ".".join(descended)


def basis_keys(r: int, ranks: AbstractSet[int]) -> tuple[str, str]:
    """Return the keys of A and B of rank r: PEFT's keys, followed by r if there are bases of several ranks."""
    suffix, (key_A, key_B) = "" if ranks == {r} else f".r{r}", BASES.values()
    return f"{key_A}{suffix}", f"{key_B}{suffix}"


def to_peft_fields(census: Census, adapter: Adapter, known: ModelClass | None, *, stored: bool) -> dict[str, Any]:
    """Return the fields of an adapter of a model of a known class as PEFT would write them, with or without bases."""
    classes = {plain_class(module).__name__ for fqn, module in census.visits if fqn in adapter.options}
    (stream,) = {basis.spec.stream for basis in adapter.bases.values()}
    fields = {
        **NEUTRAL_FIELDS,
        **adapter.peft_fields,
        BASE_FIELD: base_model_name(census.model, adapter.peft_fields.get(BASE_FIELD)),
        "fan_in_fan_out": classes == {"Conv1D"},  # PEFT's name for weights stored as (in_features, out_features)
        "inference_mode": True,
        **option_fields(adapter.config, adapter.options, stream, stored=stored),
        OPTION_FIELDS["train_also"]: whole_modules(census, adapter.trained) or None,
        OPTION_FIELDS["targets"]: target_modules(census, adapter.targets),
    }
    if known is not None and not any(fields[name] for name in CLASS_FIELDS):  # PEFT's AutoPeftModel refuses both
        fields["auto_mapping"] = {"base_model_class": known.name, "parent_library": known.library}
    return dict(sorted(fields.items()))


def option_fields(
    config: RandLoRAConfig, options: Mapping[str, LayerOptions], stream: Stream, *, stored: bool
) -> dict[str, Any]:
    """Return the fields that do not depend on a model; ``stored`` means that the file holds the bases."""
    common, (sparse, very_sparse) = most_common(options), KINDS[config.basis].peft_flags or (False, False)
    values = {"r": common.r, "alpha": _plain(common.alpha), "dropout": config.dropout, "seed": config.seed}
    fields: dict[str, Any] = {
        **{field: values[name] for name, field in OPTION_FIELDS.items() if name in values},
        "peft_type": PEFT_TYPE,
        "peft_version": PEFT_VERSION,
        "save_projection": stored,
        "sparse": sparse,
        "very_sparse": very_sparse,
    }
    own_stream = {} if stored or stream == "torch" else {STREAM_FIELD: stream}
    return fields | pattern_fields(options) | own_stream


def drawing_note(spec: BasisSpec) -> str | None:
    """Return why PEFT might draw different bases from a spec's seed, or ``None`` if it would draw the same here."""
    if spec.stream not in (streams := peft_streams(spec.kind)):
        return f"PEFT cannot draw stream={spec.stream!r}: save with bases='stored' to load there"
    is_new = TorchVersion(torch.__version__) >= "2.12"
    if len(streams) == 1 or (is_new and spec.stream == "torch"):
        return None
    those = "2.12 and newer" if spec.stream == "torch" else "2.11 and older"
    return f"PEFT draws stream={spec.stream!r} under torch {those} only: save with bases='stored' to load under any"


def pattern_fields(options: Mapping[str, LayerOptions]) -> dict[str, Any]:
    """Return the r and the alpha of each layer as PEFT writes them for LoRA; neither if all layers have the same."""
    # PEFT matches each regex with the ends of names too: the longest comes first
    ordered = sorted(options.items(), key=lambda item: (-len(item[0]), item[0]))
    ranks = {re.escape(fqn): own.r for fqn, own in ordered}
    alphas = {re.escape(fqn): _plain(own.alpha) for fqn, own in ordered}
    patterns: dict[str, dict[str, Any]] = {RANK_FIELD: ranks, ALPHA_FIELD: alphas}
    return {name: by_fqn for name, by_fqn in patterns.items() if len({*by_fqn.values()}) > 1}


def peft_obstacle(options: Mapping[str, LayerOptions], kinds: Mapping[str, str], rows: Iterable[str]) -> str | None:
    """Return why PEFT cannot represent an adapter of these options, with other kinds than linear layers, and rows."""
    if others := {**kinds, **dict.fromkeys(rows, "rows")}:
        named = shortened([f"{fqn} ({kind})" for fqn, kind in others.items()])
        return f"PEFT cannot load this adapter: its RandLoRA adapts linear layers only, not {named}"
    if pattern_fields(options):
        given = " and ".join(f"{name} = {values}" for name, values in described(options).items())
        return f"PEFT has one r and one alpha for all layers and cannot use this adapter, which has {given}"
    return None


def most_common(options: Mapping[str, LayerOptions]) -> LayerOptions:
    """Return the most common r and alpha of the layers; of equally common ones, those of the first layer."""
    (r, _), (alpha, _) = (Counter(values).most_common(1)[0] for values in zip(*options.values(), strict=True))
    return LayerOptions(r, alpha)


def _plain(alpha: float) -> float:
    """Return an alpha as PEFT writes it, an integer if it is one."""
    return int(alpha) if alpha.is_integer() else alpha


def from_peft_fields(
    fields: Mapping[str, Any], targets: Iterable[str], trained: Iterable[str], stream: Stream | None
) -> RandLoRAConfig:
    """Return the options of an adapter that PEFT wrote, which does not write the stream, with FQNs from the keys."""
    needed = [OPTION_FIELDS[name] for name in ("r", "alpha", "seed")]
    if missing := [name for name in needed if name not in fields]:
        raise CheckpointError(f"the adapter's JSON lacks {', '.join(missing)}, which PEFT writes for RandLoRA")
    kind = peft_kind(fields)
    drawn_from = stream or "torch"
    if drawn_from not in (streams := peft_streams(kind)):
        raise CheckpointError(f"PEFT draws {kind} bases from stream={' or '.join(map(repr, streams))}, got {stream!r}")
    values = {name: fields[field] for name, field in OPTION_FIELDS.items() if field in fields}
    values |= {"basis": kind, "stream": drawn_from, "targets": tuple(targets), "train_also": tuple(trained) or None}
    values["seed"] %= 2**64  # as torch takes a negative one
    try:
        return RandLoRAConfig(**values)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"the adapter's JSON has invalid options: {error.args[0]}", *error.args[1:]) from error


def peft_kind(fields: Mapping[str, Any]) -> BasisKind:
    """Return the kind of bases in PEFT's two booleans. If both are true, PEFT draws ``very_sparse``."""
    very_sparse = bool(fields.get("very_sparse"))
    flags = bool(fields.get("sparse")) and not very_sparse, very_sparse
    return next(name for name, kind in KINDS.items() if kind.peft_flags == flags)


def kept_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a file that are not used here, which the next save writes back."""
    return {name: value for name, value in fields.items() if name not in OWN_FIELDS}


def target_modules(census: Census, fqns: Sequence[str]) -> list[str] | str:
    """Return a value of ``target_modules`` for exactly these layers: last components if possible, else a regex."""
    wanted = set(fqns)
    suffixes = {fqn.rpartition(".")[2] for fqn in fqns}
    found = {fqn for fqn, _ in census.visits if fqn.rpartition(".")[2] in suffixes}
    return sorted(suffixes) if found == wanted else "|".join(re.escape(fqn) for fqn in fqns)


def whole_modules(census: Census, trained: Iterable[str]) -> list[str]:
    """Return the outermost modules whose parameters are all in ``trained``."""
    trained = set(trained)
    modules: dict[str, bool] = {}
    buffers = [held.fqn for held in census.buffers if held.fqn in trained]
    for fqn in (*(held.fqn for held in census.parameters), *buffers):
        parts = fqn.split(".")
        for length in range(1, len(parts)):
            prefix = ".".join(parts[:length])
            modules[prefix] = modules.get(prefix, True) and fqn in trained
    whole = [prefix for prefix, is_whole in modules.items() if is_whole]
    return [prefix for prefix in whole if prefix.rpartition(".")[0] not in whole]


def base_model_name(model: nn.Module, written: object = None) -> str | None:
    """Return the name of a model, or as its adapter's file has it, ``written``, if that means the same model."""
    known, own = written if isinstance(written, str) and written else None, name_of(model)
    return known if own is None or (known and is_same_model(known, own)) else own


def is_same_model(one: str, other: str) -> bool:
    """Whether two names may mean the same model. Of a path, only the last component counts."""
    first, second = ((repo_of(name) or name).rstrip("/\\").casefold() for name in (one, other))
    if is_repo_id(first) and is_repo_id(second):
        return first == second
    return re.split(r"[/\\]", first)[-1] == re.split(r"[/\\]", second)[-1]


def mismatch(model: nn.Module, written: object) -> str | None:
    """Return a warning if a model is not the one that an adapter was trained on; ``None`` if it is, or is unknown."""
    own = name_of(model)
    if own is None or not isinstance(written, str) or not written or is_same_model(written, own):
        return None
    return f"the adapter was trained on {written!r}, but this model is {own!r}: with other weights its outputs are off"


def repo_of(name: str | None) -> str | None:
    """Return the repository on the Hub that a base model's name means, or ``None`` for a local path."""
    if name is None:
        return None
    if found := CACHED.search(name):
        return found[1].replace("--", "/")
    return name if is_repo_id(name) and not is_there(Path(name)) else None


def name_of(model: nn.Module) -> str | None:
    """Return the name or the directory from which a model was loaded, if the model knows."""
    config_and_model = getattr(model, "config", None), model
    names = (getattr(each, field, None) for each in config_and_model for field in ("_name_or_path", "name_or_path"))
    return next((name for name in names if isinstance(name, str) and name), None)
