"""The model that a checkpoint's ``config.json`` describes: transformers' own class on the meta device.

transformers builds it and determines which parameter each tensor in the files becomes. Nothing is downloaded, and only
code of transformers is run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from randlora.checkpoint.base_model import ModelClass
from randlora.disk.untrusted import open_regular, path_of
from randlora.errors import CheckpointError, raise_collected
from randlora.files.config_limits import bounded, config_problems
from randlora.files.conversion import Conversion
from randlora.files.model_directory import MODEL_CONFIG_FILE, ModelDirectory
from randlora.targets.walk import Census

INSTALL = "python -m pip install 'transformers>=5.0'"


@dataclass(frozen=True, eq=False)
class TransformersModel:
    """A model on the meta device, and the parameters and buffers that the tensors of its checkpoint become.

    ``names`` are those of the tensors that hold one unchanged, by its id; there are several if
    files hold a tied one several times. ``conversions`` compute the other parameters, by FQN. ``unused`` are the names
    of tensors that the class has no place for, and ``prefixed`` are FQNs by names that lack only the class's prefix.
    ``model_class`` is the class if an adapter, and not ``config.json``, names it.
    """

    census: Census
    names: dict[int, tuple[str, ...]] = field(default_factory=dict)
    conversions: dict[str, Conversion] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    prefixed: dict[str, str] = field(default_factory=dict)
    model_class: ModelClass | None = None

    @property
    def missing(self) -> tuple[str, ...]:
        """FQNs of the parameters for which the checkpoint has no tensor, tied ones once."""
        found = {held.fqn for held in self.census.parameters if self.names_of(held.parameter)}
        named = {id(held.parameter): held.fqn for held in reversed(self.census.parameters)}
        return tuple(fqn for fqn in reversed(named.values()) if fqn not in found and fqn not in self.conversions)

    def names_of(self, parameter: Tensor | None) -> tuple[str, ...]:
        """Return the names of the tensors that hold a parameter or buffer unchanged."""
        return self.names.get(id(parameter), ())

    @property
    def names_by_fqn(self) -> dict[str, tuple[str, ...]]:
        """Names of the tensors that hold a parameter or buffer unchanged, by its FQN."""
        return {held.fqn: self.names_of(held.tensor) for held in self.census.tensors}

    @property
    def transposed(self) -> frozenset[str]:
        """Names of the tensors that hold a weight as ``(in_features, out_features)``."""
        sites = (site for site in self.census.sites if site.layer_class.is_transposed)
        return frozenset(name for site in sites for name in self.names_of(site.weight))


def build_model(directory: ModelDirectory, trained_on: ModelClass | None = None) -> TransformersModel | str:
    """Return the model that ``config.json`` describes, on the meta device, or the reason why it cannot be built.

    With ``trained_on`` it is a model of this class with these labels, if that is a class for such a config.
    """
    try:
        import transformers  # noqa: PLC0415 - optional
    except ImportError:
        return f"transformers, which has its class, is not installed: {INSTALL}"
    name = directory.architecture if trained_on is None else trained_on.name
    model_class: Any = getattr(transformers, name, None) if name else None
    is_model = isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
    if not is_model:
        named = f"names {name}, which transformers {transformers.__version__} lacks" if name else "names no class"
        return f"its config.json {named}"
    if trained_on is not None and model_class.config_class.model_type != directory.model_type:
        return f"its config.json describes no {name}"
    path, tensors = directory.path / MODEL_CONFIG_FILE, len(directory.entries)
    try:
        raise_collected(CheckpointError, [*config_problems(directory.config)], doing="build it")
        with bounded(tensors):
            with open_regular(path) as file:
                config = model_class.config_class.from_json_file(path_of(file, path))
            if trained_on is not None:
                config.update(trained_on.config_fields)
            # either may name a kernel on the Hub, which is code; these also set those of the configs inside
            config._attn_implementation = config._experts_implementation = None
            with torch.device("meta"):
                model = model_class(config)
        if isinstance(config.dtype, torch.dtype):
            model.to(config.dtype)
        return _with_names(model, directory, trained_on)
    except Exception as error:  # whatever a model's code raises for an unsuitable config, or names of tensors
        return f"transformers {transformers.__version__} cannot build {name} from its config.json ({error})"


def _with_names(model: nn.Module, directory: ModelDirectory, model_class: ModelClass | None) -> TransformersModel:
    """Find the parameter or buffer that each tensor of a checkpoint becomes, as ``from_pretrained`` does."""
    from transformers import conversion_mapping, core_model_loading  # noqa: PLC0415 - optional

    conversions = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, core_model_loading.WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, core_model_loading.WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix

    def renamed(name: str) -> tuple[str, str | None]:
        rename = core_model_loading.rename_source_key
        found: tuple[str, str | None] = rename(name, renamings, converters, prefix, state)
        if found[0] not in state and name in state:
            found = rename(name, [], [], prefix, state)
        return found

    undo = core_model_loading.revert_weight_conversion
    built = TransformersModel(Census.of(model), model_class=model_class)
    held_by = {held.fqn: held.tensor for held in built.census.tensors}
    for name in sorted(directory.entries, key=core_model_loading.dot_natural_key):  # some renamings rely on this order
        fqn, pattern = renamed(name)
        if fqn == f"{prefix}.{name}":
            built.prefixed[name] = fqn
        if pattern is not None:
            converter = by_pattern[pattern]
            conversion = built.conversions.setdefault(fqn, Conversion(model, converter, undo, fqn))
            conversion.sources[name] = pattern
            for target in converter.target_patterns[1:]:
                built.conversions[fqn.replace(converter.target_patterns[0], target)] = conversion
        elif (own := held_by.get(fqn)) is not None:
            built.names[id(own)] = (*built.names_of(own), name)
        elif fqn not in state:
            built.unused.append(name)
    return built
