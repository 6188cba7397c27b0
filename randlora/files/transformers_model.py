"""Models of transformers: the one that a checkpoint's ``config.json`` describes, on the meta device, and `load_model`.

transformers builds a model and determines which parameter each tensor becomes, and which are made of several. Only code
of transformers is run. A config names in a few bytes how many layers there are, and for some vision models what timm is
to read: files, and repositories on the Hub. Therefore a class is restricted while it is built.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration

from randlora.checkpoint.header import ModelClass
from randlora.checkpoint.load import load
from randlora.checkpoint.peft_layout import BASE_FIELD
from randlora.checkpoint.read import AdapterFile, locate, read_adapter
from randlora.config import Stream
from randlora.disk.formats import open_regular, path_of
from randlora.errors import CheckpointError, ConfigError, raise_collected, spelled
from randlora.files.model_directory import MODEL_CONFIG_FILE, ModelDirectory
from randlora.hints import require_types, shortly
from randlora.targets.census import Census
from randlora.targets.match import shortened

INSTALL = "python -m pip install 'transformers>=5.0'"

COUNTED = re.compile("layer|depth|block|stage")
"""Names of fields whose numbers a config counts to, or makes lists of, before there is a module."""
MOST_COUNTED = 2**20
FOR_ANY_MODEL = 2**12  # modules and parameters that are made for any checkpoint, in about a second
OF_A_CONFIG = 2**10  # tensors that a config alone may mean. Of a checkpoint, they are known
FOR_EACH_TENSOR = 2**4  # those that are made for each tensor of the checkpoint: no class of transformers has four

TIMM_NAMES = frozenset({"architecture", "backbone"})
TIMM_READS = frozenset({"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"})
"""Arguments of ``timm.create_model`` by which it reads files and URLs."""


@dataclass(frozen=True, eq=False)
class TransformersModel:
    """A model on the meta device, and the tensors of its checkpoint that contain its parameters and buffers.

    ``names`` are of the tensors that contain one unchanged, by its id; several if files contain a tied one several
    times. ``converted`` are FQNs of parameters that transformers computes, such as a stack from each expert's tensors.
    """

    census: Census
    names: dict[int, tuple[str, ...]] = field(default_factory=dict)
    converted: set[str] = field(default_factory=set)

    def names_of(self, parameter: Tensor) -> tuple[str, ...]:
        """Return the names of the tensors that hold a parameter or buffer unchanged."""
        return self.names.get(id(parameter), ())

    @property
    def names_by_fqn(self) -> dict[str, tuple[str, ...]]:
        """Names of the tensors that hold a parameter or buffer unchanged, by its FQN."""
        return {held.fqn: self.names_of(held.tensor) for held in self.census.tensors}


def model_class_named(transformers: Any, name: str) -> Any:
    """Return the class of models that transformers exports under a name, or ``None``."""
    found = getattr(transformers, name, None) if name else None
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def build_model(directory: ModelDirectory) -> TransformersModel | str:
    """Return the model that ``config.json`` describes, on the meta device, or the reason why it cannot be built."""
    try:
        import transformers  # noqa: PLC0415 - optional
    except ImportError:
        return f"transformers, which has its class, is not installed: {INSTALL}"
    name = directory.architecture
    if (model_class := model_class_named(transformers, name)) is None:
        named = f"names {name}, which transformers {transformers.__version__} lacks" if name else "names no class"
        return f"its config.json {named}"
    path = directory.path / MODEL_CONFIG_FILE
    try:
        raise_collected(CheckpointError, [*_config_problems(directory.config)], doing="build it")
        with _bounded(len(directory.entries) or OF_A_CONFIG):
            with open_regular(path) as file:
                config = model_class.config_class.from_json_file(path_of(file, path))
            # either may name a kernel on the Hub, which is code; these also set those of the configs inside
            config._attn_implementation = config._experts_implementation = None
            with torch.device("meta"):
                model = model_class(config)
        if isinstance(config.dtype, torch.dtype):
            model.to(config.dtype)
        return _with_names(model, directory)
    except Exception as error:  # whatever a model's code raises for an unsuitable config, or names of tensors
        said = " ".join(str(error).split())
        return f"transformers {transformers.__version__} cannot build {name} from its config.json ({said})"


def _with_names(model: nn.Module, directory: ModelDirectory) -> TransformersModel:
    """Find the parameter or buffer that each tensor of a checkpoint becomes, as ``from_pretrained`` does."""
    from transformers import conversion_mapping, core_model_loading  # noqa: PLC0415 - optional

    entries = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [entry for entry in entries if isinstance(entry, core_model_loading.WeightRenaming)]
    converters = [entry for entry in entries if isinstance(entry, core_model_loading.WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    state, prefix, rename = model.state_dict(), model.base_model_prefix, core_model_loading.rename_source_key
    built = TransformersModel(Census.of(model))
    tensors = {held.fqn: held.tensor for held in built.census.tensors}
    for name in sorted(directory.entries, key=core_model_loading.dot_natural_key):  # some renamings rely on this order
        fqn, pattern = rename(name, renamings, converters, prefix, state)
        if fqn not in state and name in state:
            fqn, pattern = rename(name, [], [], prefix, state)
        if pattern is not None:
            first, *_ = targets = by_pattern[pattern].target_patterns
            built.converted.update(fqn.replace(first, target) for target in targets)
        elif (tensor := tensors.get(fqn)) is not None:
            built.names[id(tensor)] = (*built.names_of(tensor), name)
    return built


def _config_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a config asks for that no checkpoint can need, at any depth."""
    left: list[tuple[str, Any]] = [("", config)]
    while left:
        name, value = left.pop()
        if isinstance(value, dict):
            left += value.items()
            if name == "model_args" and (read := TIMM_READS & value.keys()):
                yield f"it names other files to be read: {', '.join(sorted(read))}"
        elif isinstance(value, list):
            left += [(name, entry) for entry in value]
        elif name in TIMM_NAMES and isinstance(value, str) and ":" in value:
            yield f"it names a different place to read {name} from: {value!r:.100}"
        elif isinstance(value, int | float) and abs(value) > MOST_COUNTED and COUNTED.search(name):
            yield f"{name} is {value!r:.40}"


HUB = threading.RLock()  # one block at a time: the last to end would else restore what the first had set


@contextmanager
def offline() -> Iterator[None]:
    """Within the block, keep all threads from contacting the Hub, if huggingface_hub is installed."""
    try:
        from huggingface_hub import constants  # noqa: PLC0415  (optional)
    except ImportError:
        yield
        return
    with HUB:
        before = constants.HF_HUB_OFFLINE
        constants.HF_HUB_OFFLINE = True
        try:
            yield
        finally:
            constants.HF_HUB_OFFLINE = before


@contextmanager
def _bounded(tensors: int) -> Iterator[None]:
    """Let a class be built in the block: without the Hub, and of no more modules than so many tensors can need."""
    most = FOR_ANY_MODEL + FOR_EACH_TENSOR * tensors
    left, thread = most, threading.get_ident()

    def count(*_: object) -> None:
        nonlocal left
        left -= threading.get_ident() == thread  # others may build what they like
        if left < 0:
            made = f"more than {most:,} modules and parameters"
            raise CheckpointError(f"it makes {made} for {tensors} tensors in the files")

    with offline(), ExitStack() as hooks:
        hooks.callback(registration.register_module_module_registration_hook(count).remove)
        hooks.callback(registration.register_module_parameter_registration_hook(count).remove)
        yield


SAFE = {"trust_remote_code": False, "use_safetensors": True}
"""Arguments of ``from_pretrained`` that callers may not change: code would be run, or files be unpickled."""

FIXED = ("config", "output_loading_info", "state_dict")
"""Arguments of ``from_pretrained`` that callers may not pass: they would change the model or the return value."""

BY_HAND = "create such a model yourself, then call randlora.load"

LABELS = ("num_labels", "id2label", "label2id", "problem_type")
"""Arguments of ``from_pretrained`` that change the config, such as the number of labels of a head."""


def load_model(
    source: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    model_class: type | None = None,
    name: str = "default",
    trainable: bool = False,
    revision: str | None = None,
    base_revision: str | None = None,
    prefix: str | None = None,
    stream: Stream | None = None,
    **options: Any,
) -> nn.Module:
    """Return the base model that an adapter names, with the adapter loaded into it.

    transformers creates the model by ``from_pretrained`` of the class that the adapter was trained on, with the same
    labels. A head that was trained with the adapter need not be in the base's files. Weights are read from safetensors
    files only, and no code from a repository is run.

    Args:
        source: The adapter: a directory, or a repository on the Hub, as for `load`.
        base: The base model, a directory or a repository, instead of the one that the adapter names.
        model_class: A class of transformers, such as ``AutoModelForSequenceClassification``. ``None`` means the class
            in the adapter's file if it fits the base's ``config.json``; otherwise the class there.
        name: The adapter's name in the model.
        trainable: Whether its parameters require grad.
        revision: Branch, tag or commit of the adapter's repository.
        base_revision: Branch, tag or commit of the base model's repository.
        prefix: See `load`.
        stream: See `load`.
        **options: Further arguments of ``from_pretrained``, such as ``dtype``, ``device_map``, ``quantization_config``
            or ``num_labels``.

    Returns:
        The model, in evaluation mode as ``from_pretrained`` returns it, with the adapter active.

    Raises:
        ConfigError: For ``trust_remote_code``, ``use_safetensors=False``, ``config``, ``state_dict`` or
            ``output_loading_info``.
        CheckpointError: If transformers is not installed, the adapter's files are damaged or name no base model, or
            the base model cannot be loaded, lacks values, or does not fit the adapter.
    """
    require_types(load_model, locals())
    refused = [name for name, value in SAFE.items() if options.get(name, value) is not value]
    if refused := [*refused, *(name for name in FIXED if name in options)]:
        raise ConfigError(f"{refused[0]} is not passed on: {BY_HAND}")
    try:
        import transformers  # noqa: PLC0415 - optional
    except ImportError as error:
        raise CheckpointError(
            f"load_model needs transformers, which is not installed: {INSTALL}, or {BY_HAND}"
        ) from error
    directory = locate(source, revision)
    file = read_adapter(directory, stream)  # before the base, which may be large
    chosen = named_base({str(source): file}) if base is None else os.fspath(base)
    known = None if file.header is None else file.header.model_class
    # a head may have other labels in the base's files; what else differs in shape is refused below
    options = {**options, **SAFE, "ignore_mismatched_sizes": True}
    if base_revision is not None:
        options["revision"] = base_revision
    model, found = _base_model(transformers, chosen, options, model_class or known, given=base is not None)
    dotted = f"{(prefix or '').removesuffix('.')}."
    trained = {name for fqn in file.trained for name in (fqn, dotted + fqn, fqn.removeprefix(dotted))}
    _require_complete(chosen, found, trained)
    load(model, directory, name=name, trainable=trainable, prefix=prefix, stream=stream)
    return model


def named_base(adapters: Mapping[str, AdapterFile]) -> str:
    """Return the base model that all adapters name. No name, or different names, raise a `CheckpointError`."""
    named = {adapter: file.fields.get(BASE_FIELD) for adapter, file in adapters.items()}
    give = f"give {spelled('base')}, a directory or a repository"
    for adapter, name in named.items():
        if not isinstance(name, str) or not name:
            raise CheckpointError(f"{adapter!r} names no base model ({BASE_FIELD} is {shortly(name)}): {give}")
    first, *others = dict.fromkeys(named.values())
    if others:
        raise CheckpointError(f"the adapters name different base models, {first!r} and {others[0]!r}: {give}")
    return str(first)


def _class_of(transformers: Any, config: Any, known: type | ModelClass | None) -> Any:
    if isinstance(known, type):
        return known
    if known is not None and known.library == "transformers":
        found = model_class_named(transformers, known.name)
        if found is not None and isinstance(config, found.config_class):
            return found
    architecture = next(iter(config.architectures or ()), None)
    if architecture is None:
        return transformers.AutoModel
    if (found := model_class_named(transformers, architecture)) is None:
        raise ValueError(f"transformers {transformers.__version__} has no class {architecture!r}")
    return found


def _base_model(
    transformers: Any, base: str, options: dict[str, Any], known: type | ModelClass | None, *, given: bool
) -> tuple[nn.Module, Mapping[str, Any]]:
    revision = {"revision": options["revision"]} if "revision" in options else {}
    labels = {name: options.pop(name) for name in LABELS if name in options}
    if not labels and isinstance(known, ModelClass):
        labels = {} if known.problem_type is None else {"problem_type": known.problem_type}
        if known.labels is not None:
            label2id = {label: index for index, label in enumerate(known.labels)}
            labels |= {"id2label": dict(enumerate(known.labels)), "label2id": label2id}
    try:
        config = transformers.AutoConfig.from_pretrained(base, **revision, **labels, trust_remote_code=False)
        model_class = _class_of(transformers, config, known)
        # either may name a kernel on the Hub, which is code; an argument of the caller is used nevertheless
        config._attn_implementation = config._experts_implementation = None
        model, found = model_class.from_pretrained(base, config=config, output_loading_info=True, **options)
    except Exception as error:  # whatever transformers and the Hub's client raise
        said = " ".join(str(error).split())[:300]
        fits = f" and that model_class={known.__name__} fits its config.json" if isinstance(known, type) else ""
        raise CheckpointError(
            f"cannot load the base model {base!r}{'' if given else ', which the adapter names'}: check that it is "
            f"there{fits}, or give base= ({type(error).__name__}: {said})"
        ) from error
    return model, found


def _require_complete(base: str, found: Mapping[str, Any], trained: Collection[str]) -> None:
    """Refuse a model some of whose values are neither from its files nor trained: transformers draws them at random."""
    missing = sorted(set(found["missing_keys"]).difference(trained))
    mismatched = sorted({name for name, *_ in found["mismatched_keys"]}.difference(trained))
    problems = [f"its files have no {shortened(missing)}"] if missing else []
    problems += [f"its files have a different shape of {shortened(mismatched)}"] if mismatched else []
    problems += found["error_msgs"]
    advice = "values would be random: give base= with complete files, or create the model yourself, then load"
    problems = [f"{problem} ({advice})" for problem in problems]
    raise_collected(CheckpointError, problems, doing=f"load the base model {base!r}")
