"""`load_model`: load a base model and its adapter in one call, with transformers' own classes."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from randlora.checkpoint.header import ModelClass
from randlora.checkpoint.load import load
from randlora.checkpoint.read import locate, read_adapter
from randlora.config import Stream
from randlora.disk.formats import is_there
from randlora.disk.hub import is_repo_id
from randlora.errors import CheckpointError, ConfigError, raise_collected
from randlora.files.adapter import named_base
from randlora.files.transformers_model import INSTALL, model_class_named
from randlora.hints import require_types, shortly
from randlora.targets.match import shortened

CODE = "trust_remote_code"
FIXED = ("config", "output_loading_info", "state_dict")
"""Arguments of ``from_pretrained`` that callers may not pass: they would change the model or the return value."""

BY_HAND = "create such a model yourself, then call randlora.load"

OTHER_LIBRARIES = {
    "modules.json": ("sentence-transformers", "SentenceTransformer(base)"),
    "model_index.json": ("diffusers", "DiffusionPipeline.from_pretrained(base)"),
}
"""Files by which other libraries describe a model, the library, and what makes the model."""

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
    labels. A head that was trained with the adapter need not be in the base's files. Unlike `load`, this follows the
    name in the adapter's file: it reads that directory, or downloads that repository. Weights are read from safetensors
    files only, and no code from a repository is run.

    Args:
        source: The adapter: a directory, or a repository on the Hub, as for `load`.
        base: The base model, a directory or a repository, instead of the one that the adapter names.
        model_class: A class of transformers, such as ``AutoModelForSequenceClassification``. ``None`` means the class
            in the adapter's file, if transformers exports it and it fits the base's ``config.json``; otherwise the
            class in ``config.json``. Version 0.2 wrote no class.
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
            ``output_loading_info``, or if ``model_class`` is not a class of transformers.
        CheckpointError: If transformers is not installed; if the adapter's files are damaged or name no base model; if
            the base model is missing, is not a transformers model, or its files lack values or have different shapes
            than the model; or if the adapter does not fit it.
    """
    require_types(load_model, {"source": source, "name": name, "trainable": trainable, "revision": revision})
    require_types(load_model, {"base": base, "base_revision": base_revision, "model_class": model_class})
    if options.get("use_safetensors", True) is not True:
        raise ConfigError(f"use_safetensors=False unpickles files: {BY_HAND}")
    if given := [*([CODE] if options.get(CODE) else []), *(option for option in FIXED if option in options)]:
        raise ConfigError(f"{given[0]} is not passed on: {BY_HAND}")
    transformers = _transformers()
    auto = transformers.models.auto.auto_factory._BaseAutoModelClass
    if model_class is not None and not issubclass(model_class, (transformers.PreTrainedModel, auto)):
        raise ConfigError(
            "model_class must be a class of transformers, such as AutoModelForSequenceClassification, got "
            f"{shortly(model_class)}"
        )
    directory = locate(source, revision)
    file = read_adapter(directory, stream)  # before the base, which may be large
    chosen = named_base({str(source): file}) if base is None else os.fspath(base)
    known = None if file.header is None else file.header.model_class
    is_known = model_class is not None or (known is not None and known.library == "transformers")
    _require_transformers_model(chosen, is_known=is_known)
    # a head may have other labels in the base's files; what else differs in shape is refused below
    options = {**options, CODE: False, "use_safetensors": True, "ignore_mismatched_sizes": True}
    if base_revision is not None:
        options["revision"] = base_revision
    model, found = _base_model(transformers, chosen, options, model_class or known, given=base is not None)
    _require_complete(chosen, found, [*file.trained, *(f"{prefix}.{fqn}" for fqn in file.trained)])
    load(model, directory, name=name, trainable=trainable, prefix=prefix, stream=stream)
    return model


def _transformers() -> Any:
    try:
        import transformers  # noqa: PLC0415 - optional
    except ImportError as error:
        raise CheckpointError(
            f"load_model needs transformers, which is not installed: {INSTALL}, or create the model "
            "yourself and call randlora.load(model, path)"
        ) from error
    return transformers


def _require_transformers_model(base: str, *, is_known: bool) -> None:
    """Refuse a missing directory, or one where a different library describes the model, if the class is not known."""
    path = Path(base)
    if not is_there(path):
        if is_repo_id(base) or "/" not in base:
            return  # a repository, which transformers finds or says why not
        raise CheckpointError(f"the base model {base!r} is not there: give base=, a directory or a repository")
    for file, (library, call) in OTHER_LIBRARIES.items():
        if is_there(path / file) and not is_known:
            raise CheckpointError(
                f"the base model {base!r} is a model of {library}: create it with {call}, then call randlora.load"
            )


def _class_of(transformers: Any, config: Any, known: type | ModelClass | None) -> Any:
    """Return the class to make: the caller's, the adapter's if it fits the config, or the one that the config names."""
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
    """Return the model of a directory or a repository, of a class, and what transformers says of its files."""
    revision = {"revision": options["revision"]} if "revision" in options else {}
    labels = {name: options.pop(name) for name in LABELS if name in options}
    if not labels and isinstance(known, ModelClass):
        labels = known.config_fields
    try:
        config = transformers.AutoConfig.from_pretrained(base, **revision, **labels, **{CODE: False})
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
    raise_collected(
        CheckpointError, [f"{problem} ({advice})" for problem in problems], doing=f"load the base model {base!r}"
    )
