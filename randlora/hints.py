"""Checking values from callers and files against type hints, and suggestions for names from other libraries."""

from __future__ import annotations

import difflib
import functools
import math
import os
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints, is_typeddict

from randlora.errors import ConfigError, named, raise_collected, typed

UNIONS = (Union, types.UnionType)
WORDS: dict[Any, str] = {
    Callable: "a function",
    Mapping: "a mapping",
    Sequence: "a sequence",
    bool: "True or False",
    dict: "names with values",
    float: "a finite number",
    int: "an integer",
    list: "a list",
    os.PathLike: "a path",
    str: "a string",
    tuple: "a list",
    types.NoneType: "None",
}

_BY_PATTERN = 'use {}=, which takes a mapping from patterns: {}={{"q_proj": 64, ".*": 16}}'


def _by_name(advice: Mapping[str, str]) -> dict[str, str]:
    """Return advice for each name, given by several names at a time, with spaces between them."""
    return {name: text for names, text in advice.items() for name in names.split()}


ADVICE = _by_name({
    "adapter_name": "use name=",
    "alpha_pattern": _BY_PATTERN.format("alpha", "alpha"),
    "bias lora_bias": 'use train_also=, which takes the names of biases: train_also=r".*\\.bias"',
    "fan_in_fan_out": "leave it out: layers that store their weight transposed are recognized",
    "inference_mode": "use trainable=False",
    "init_lora_weights init_weights": 'use init="lambda" or init="gamma"',
    "layers_pattern layers_to_transform": "use targets=, which takes names and regexes of whole layers",
    "learning_rate lr": "leave it out: the optimizer or the trainer has it, and report.learning_rate is a first one",
    "lora_r lora_rank rank": "use r=, the rank of one basis: a smaller r trains more parameters",
    "rank_pattern": _BY_PATTERN.format("r", "r"),
    "revision": "leave it out, and give it to randlora.load",
    "save_projection": 'use the argument bases="stored" of save()',
    "sparse": 'use basis="sparse"',
    "target_parameters": "use targets=, which takes names of weights too",
    "use_dora": "leave it out: an update has full rank already",
    "use_rslora": "leave it out, and give alpha=: randlora.equivalent_alpha(…, use_rslora=True) computes it",
    "very_sparse": 'use basis="very_sparse"',
    "alora_invocation_tokens arrow_config auto_mapping autocast_adapter_dtype base_model_name_or_path corda_config "
    "ensure_weight_tying eva_config kasa_config layer_replication loftq_config lora_ga_config low_cpu_mem_usage "
    "megatron_config megatron_core monteclora_config peft_type peft_version qalora_group_size runtime_config task_type "
    "use_bdlora use_qalora velora_config": "leave it out: RandLoRA needs nothing like it",
})
"""Advice about options of PEFT and other libraries that have no entry in the table here."""

CALLS = _by_name({
    "AdapterCallback": "randlora.integrations.lightning.AdapterCallback(…)",
    "AdapterCheckpoints": "randlora.integrations.transformers.AdapterTrainer(…), or inherit AdapterCheckpoints there",
    "AdapterTrainer": "randlora.integrations.transformers.AdapterTrainer(…)",
    "AutoPeftModel AutoPeftModelForCausalLM": "randlora.files.load_model(directory)",
    "AutoPeftModelForSequenceClassification": "randlora.files.load_model(directory)",
    "LoraConfig RandLoraConfig": "randlora.inject(model, r=32, targets=…), or randlora.RandLoRAConfig",
    "PeftModel from_pretrained load_adapter load_peft_weights": "randlora.load(model, directory)",
    "TaskType": "randlora.inject(model), which needs no type of task",
    "add_adapter": "randlora.inject(model, name=…)",
    "add_weighted_adapter": "randlora.serving.combine(model, {…: 0.5, …: 0.5}, name=…)",
    "delete_adapter": "randlora.remove(model, name)",
    "disable_adapter disable_adapters": "with randlora.disabled(model):",
    "get_peft_model": "randlora.inject(model), which changes the model in place and returns a report",
    "get_peft_model_state_dict": "randlora.adapter_state(model)",
    "hotswap_adapter": "randlora.swap(model, source)",
    "inject_adapter_in_model": "randlora.inject(model)",
    "merge_adapter": "randlora.merge(model, reversible=True)",
    "merge_and_unload": "randlora.merge(model), which changes the model in place and returns a report",
    "prepare_model_for_kbit_training": "randlora.prepare_quantized(model)",
    "print_trainable_parameters": "print(report) with what inject returns, or print(*randlora.adapters(model))",
    "push_to_hub": "randlora.save(model, directory, push_to_hub=…)",
    "save_pretrained": "randlora.save(model, directory)",
    "set_adapter": "randlora.activate(model, name)",
    "set_peft_model_state_dict": "randlora.swap(model, state)",
    "set_requires_grad": "randlora.set_trainable(model, name)",
    "unload": "randlora.eject(model)",
    "unmerge_adapter": "randlora.unmerge(model)",
})
"""The calls to use instead of names that PEFT has and this library does not have."""

IN_PLACE = "calls change the model and return a report: write randlora.inject(model), not model = randlora.inject(…)"


def require_types(function: Callable[..., object], arguments: Mapping[str, object]) -> None:
    """Raise a `ConfigError` if arguments of a function do not have the types in its signature."""
    hints = _hints(function)
    given = [(value, hints[name], named(name)) for name, value in arguments.items() if name in hints]
    raise_collected(ConfigError, [problem for each in given for problem in mistyped(*each)], doing=function.__name__)


_hints: Callable[[Any], dict[str, Any]] = functools.cache(get_type_hints)

RIGHT = {(kind, kind) for kind in (bool, int, str)}  # classes and hints of which every value is right: no need to look


def mistyped(value: object, hint: Any, name: str) -> Iterator[str]:
    """Yield messages about the parts of a value that do not match a type hint, with their names and the expected type.

    The hint may be a class, a union, a literal, ``Any``, a `TypedDict` (unknown keys are allowed), or a container or
    path. Numbers must be finite, and a bool is not a number. A list may stand for a tuple, as in JSON.
    """
    choices = get_args(hint) if get_origin(hint) in UNIONS else (hint,)
    if type(value) in choices and not isinstance(value, str | float):  # which may be no path, or not finite
        return
    found = [(choice, [*_differences(value, choice, name)]) for choice in choices if _has_form(value, choice)]
    if not found:
        *words, last = dict.fromkeys(word for choice in choices for word in _words(choice).split(" or "))
        options = [word for choice in choices if get_origin(choice) is Literal for word in get_args(choice)]
        near = difflib.get_close_matches(value, options, n=1) if isinstance(value, str) else []
        suggestion = f": did you mean {typed(near[0])}?" if near else ""
        yield f"{name} must be {', '.join(words)}{' or ' if words else ''}{last}, got {shortly(value)}{suggestion}"
    elif all(problems for _, problems in found):
        yield from found[0][1]
    elif any(get_origin(choice) is os.PathLike for choice in choices) and _is_no_path(value):
        yield f"{name} must be a path, got {shortly(value)}"


def _has_form(value: object, hint: Any) -> bool:
    """Whether a value is of a class, whatever it contains."""
    form = dict if is_typeddict(hint) else get_origin(hint) or hint
    if form is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if form is Any:
        return True
    if form is None:
        return value is None
    if form is tuple:
        return isinstance(value, list | tuple)
    if form in (int, float):
        return isinstance(value, int if form is int else Real) and not isinstance(value, bool)
    return isinstance(value, form) and not (form is Sequence and isinstance(value, str | bytes))


def _differences(value: Any, hint: Any, name: str) -> Iterator[str]:
    """Yield what is wrong inside of a value of the right class."""
    form, args = get_origin(hint) or hint, get_args(hint)
    parts: Iterable[tuple[object, object, Any]] = ()  # where in the value, what is there, and its type
    if is_typeddict(hint):
        hints = _hints(hint)
        yield from (f"{name or 'it'} has no {field}" for field in sorted(hint.__required_keys__ - value.keys()))
        parts = [(field, value[field], hints[field]) for field in sorted(hints.keys() & value.keys())]
    elif form is tuple and ... not in args and len(value) != len(args):
        yield f"{name} must have {len(args)} entries, got {len(value)}"
    elif form in (tuple, list, Sequence):
        inner = args if form is tuple and ... not in args else args[:1] * len(value)
        parts = [(index, *part) for index, part in enumerate(zip(value, inner, strict=True))]
    elif form in (dict, Mapping):
        for key in value:
            if type(key) is not args[0]:
                yield from mistyped(key, args[0], f"a name in {name}")
        parts = [(key, entry, args[1]) for key, entry in value.items()]
    elif form is float and not is_finite(value):
        yield f"{name} must be a finite number, got {shortly(value)}"
    for place, part, part_hint in parts:
        if (type(part), part_hint) not in RIGHT:
            where = f"{name}.{place}".removeprefix(".") if is_typeddict(hint) else f"{name}[{shortly(place)}]"
            yield from mistyped(part, part_hint, where)


def _is_no_path(value: object) -> bool:
    """Whether a string or a path is one that no system has."""
    if not isinstance(value, str | os.PathLike):
        return False
    try:
        text = os.fsencode(value)
    except Exception:  # half of a character, or whatever an object's own code raises
        return True
    return not text or b"\0" in text


def listed(names: object) -> list[Any]:
    """Return names as a list, whatever was given instead of names, so that they can be checked."""
    return list(names) if isinstance(names, Iterable) and not isinstance(names, str) else [names]


def is_finite(value: Any) -> bool:
    """Whether a number is finite as a float. A very large integer is not."""
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def _words(hint: Any) -> str:
    form = dict if is_typeddict(hint) else get_origin(hint) or hint
    if form is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    return WORDS.get(types.NoneType if form is None else form, getattr(form, "__name__", str(form)))


def shortly(value: object) -> str:
    """Return a value of any kind and size in a few words."""
    if isinstance(value, NotTheModel):
        return f"a {type(value).__name__}: {IN_PLACE}"
    try:
        text = typed(value)
    except Exception:  # whatever an object's own code raises
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:60]}… ({type(value).__name__})"


class NotTheModel:
    """Base class of reports of calls that change a model in place. A report used as the model explains the mistake."""

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:  # noqa: ARG002  # of the model
        """Raise a `TypeError` that says what to write."""
        raise TypeError(f"a {type(self).__name__} cannot be called: {IN_PLACE}")

    if not TYPE_CHECKING:  # to which every name would then be one

        def __getattr__(self, name):
            advice = "" if name.startswith("_") else f": {IN_PLACE}"
            raise AttributeError(f"a {type(self).__name__} has no {name!r}{advice}")
