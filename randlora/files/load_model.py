"""`load_model`: a base model and an adapter of it in one call, by transformers' own classes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from randlora.checkpoint.load import load
from randlora.checkpoint.peft_config import BASE_FIELD
from randlora.checkpoint.read import locate, read_adapter
from randlora.config import Stream
from randlora.disk.hub import is_repo_id
from randlora.disk.regular import is_there
from randlora.errors import CheckpointError, ConfigError, raise_collected
from randlora.files.transformers_model import INSTALL
from randlora.hints import require_types, shortly
from randlora.targets.match import shortened

CODE = "trust_remote_code"
FIXED = ("config", "output_loading_info", "state_dict")
"""Arguments of ``from_pretrained`` that are not the caller's: they would make another model, or return more."""

OTHER_LIBRARIES = {
    "modules.json": ("sentence-transformers", "SentenceTransformer(base)"),
    "model_index.json": ("diffusers", "DiffusionPipeline.from_pretrained(base)"),
}
"""Files by which other libraries describe a model, the library, and what makes the model."""


def load_model(
    source: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    name: str = "default",
    trainable: bool = False,
    revision: str | None = None,
    base_revision: str | None = None,
    prefix: str | None = None,
    stream: Stream | None = None,
    **options: Any,
) -> nn.Module:
    """Return the base model that an adapter names, with the adapter.

    transformers makes the model, by the class that the base's ``config.json`` names and ``from_pretrained``. Unlike
    `load`, this follows the name in the adapter's file: it reads that directory, or downloads that repository. Weights
    are read from safetensors files only, and no code of a repository is run.

    Args:
        source: The adapter: a directory, or a repository on the Hub, as for `load`.
        base: The base model, a directory or a repository, in the place of the one that the adapter names.
        name: The adapter's name in the model.
        trainable: Whether its parameters require grad.
        revision: Branch, tag or commit of the adapter's repository.
        base_revision: Branch, tag or commit of the base model's repository.
        prefix: See `load`.
        stream: See `load`.
        **options: Further arguments of ``from_pretrained``, such as ``dtype``, ``device_map`` or
            ``quantization_config``.

    Returns:
        The model, in evaluation mode as ``from_pretrained`` returns it, with the adapter active.

    Raises:
        ConfigError: For ``trust_remote_code``, ``use_safetensors=False``, ``config``, ``state_dict`` or
            ``output_loading_info``.
        CheckpointError: If transformers is not installed, the adapter's files are damaged, they name no base model, it
            is not there or not one of transformers, its files lack values or have others than the model's shapes, or
            the adapter does not fit it.
    """
    require_types(load_model, {"source": source, "name": name, "trainable": trainable, "revision": revision})
    require_types(load_model, {"base": base, "base_revision": base_revision})
    if options.get(CODE):
        raise ConfigError(f"{CODE} is not passed on: create such a model yourself, then call randlora.load")
    if options.get("use_safetensors", True) is not True:
        raise ConfigError(
            "use_safetensors=False unpickles files: create such a model yourself, then call randlora.load"
        )
    if given := [option for option in FIXED if option in options]:
        raise ConfigError(f"{given[0]} is not passed on: create such a model yourself, then call randlora.load")
    transformers = _transformers()
    directory = locate(source, revision)
    file = read_adapter(directory, stream)  # before the base, which may be large
    written = file.fields.get(BASE_FIELD)
    chosen = os.fspath(base) if base is not None else written
    if not isinstance(chosen, str) or not chosen:
        raise CheckpointError(
            f"{str(source)!r} names no base model ({BASE_FIELD} is {shortly(written)}): give base=, a directory or a "
            "repository"
        )
    _require_transformers_model(chosen)
    options = {**options, CODE: False, "use_safetensors": True}
    if base_revision is not None:
        options["revision"] = base_revision
    model = _base_model(transformers, chosen, options, given=base is not None)
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


def _require_transformers_model(base: str) -> None:
    """Refuse a directory that is not there, or in which another library describes a model."""
    path = Path(base)
    if not is_there(path):
        if is_repo_id(base) or "/" not in base:
            return  # a repository, which transformers finds or says why not
        raise CheckpointError(f"the base model {base!r} is not there: give base=, a directory or a repository")
    for file, (library, call) in OTHER_LIBRARIES.items():
        if is_there(path / file):
            raise CheckpointError(
                f"the base model {base!r} is one of {library}: create it by {call}, then call randlora.load"
            )


def _is_model_class(transformers: Any, found: object) -> bool:
    return isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)


def _base_model(transformers: Any, base: str, options: dict[str, Any], *, given: bool) -> nn.Module:
    """Return the model of a directory or a repository, by the class that its ``config.json`` names."""
    revision = {"revision": options["revision"]} if "revision" in options else {}
    try:
        config = transformers.AutoConfig.from_pretrained(base, **revision, **{CODE: False})
        architecture = next(iter(config.architectures or ()), None)
        model_class: Any = getattr(transformers, architecture, None) if architecture else transformers.AutoModel
        if model_class is not transformers.AutoModel and not _is_model_class(transformers, model_class):
            raise ValueError(f"transformers {transformers.__version__} has no class {architecture!r}")
        # either may name a kernel on the Hub, which is code; an argument of the caller is used nevertheless
        config._attn_implementation = config._experts_implementation = None
        model, found = model_class.from_pretrained(base, config=config, output_loading_info=True, **options)
    except Exception as error:  # whatever transformers and the Hub's client raise
        said = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"cannot load the base model {base!r}{'' if given else ', which the adapter names'}: check that it is "
            f"there, or give base= ({type(error).__name__}: {said})"
        ) from error
    _require_complete(base, found)
    made: nn.Module = model
    return made


def _require_complete(base: str, found: Mapping[str, Any]) -> None:
    """Refuse a model some of whose values are not from its files: transformers draws them at random, and warns."""
    missing = sorted(found["missing_keys"])
    mismatched = sorted(name for name, *_ in found["mismatched_keys"])
    problems = [f"its files have no {shortened(missing)}"] if missing else []
    problems += [f"its files have another shape of {shortened(mismatched)}"] if mismatched else []
    problems += found["error_msgs"]
    advice = "values would be random: give base= with complete files, or create the model yourself, then load"
    raise_collected(
        CheckpointError, [f"{problem} ({advice})" for problem in problems], doing=f"load the base model {base!r}"
    )
