"""`randlora.files.join`: one adapter from those of parts of a model, such as the stages of a pipeline."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from dataclasses import fields as fields_of
from pathlib import Path

import torch
from torch import Tensor

from randlora.bases.basis import Basis
from randlora.bases.spec import BasisSpec
from randlora.checkpoint.peft_config import BASE_FIELD
from randlora.checkpoint.write import adapter_files
from randlora.config import RandLoRAConfig
from randlora.disk.replace import write_files
from randlora.errors import CheckpointError, raise_collected
from randlora.files.adapter import OpenAdapter, open_adapter, out_problems
from randlora.files.convert import contents_as
from randlora.hints import require_types
from randlora.report import as_bytes
from randlora.targets.match import shortened
from randlora.targets.options import listed

OF_LAYERS = ("targets", "exclude", "train_also", "r", "alpha")
"""The options that parts have each for its own layers; all others must be equal."""


@dataclass(frozen=True)
class JoinReport:
    """The report of `randlora.files.join`.

    Attributes:
        out: The directory written.
        parts: The directories joined.
        layers: How many layers the adapter has.
        nbytes: Size of the files written, in bytes.
    """

    out: Path
    parts: tuple[Path, ...]
    layers: int
    nbytes: int

    def __str__(self) -> str:
        """Return the report on one line."""
        return f"wrote {self.out}, {self.layers} layers of {len(self.parts)} parts, {as_bytes(self.nbytes)}"


def join(
    parts: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], *, overwrite: bool = False
) -> JoinReport:
    """Write one adapter that consists of the layers of several, as the stages of a pipeline save them.

    The parts have the same options and different layers, under the names that the whole model gives them. The bases of
    each part must be what one process would have drawn for all layers: ``stream="portable"`` promises that, and
    ``"torch"`` only has it if the largest layers of each part have the same dims. The files are then the ones that
    `randlora.save` writes for the whole model, without a model card.

    Args:
        parts: Directories that `randlora.save` wrote, in the order of the layers, or repositories on the Hub.
        out: Another directory, to write to.
        overwrite: Whether to replace an adapter in ``out``.

    Returns:
        A report with the number of layers.

    Raises:
        CheckpointError: If a part cannot be read, or was written by PEFT, parts have a layer in common or differ in
            options or bases, no seed reproduces their bases, or ``out`` is not empty. Nothing is written then.
        OSError: If the disk refuses. Nothing is left half written.
    """
    require_types(join, locals())
    target, opened = Path(out), [open_adapter(part) for part in parts]
    directories = tuple(part.directory for part in opened)
    problems = [*_problems(opened), *out_problems(target, directories, overwrite=overwrite)]
    raise_collected(CheckpointError, problems, doing="join")
    whole = _joined(opened)
    fields, tensors, header, _ = contents_as("native", whole)
    (nbytes,) = write_files(adapter_files(target, fields, tensors, header))
    return JoinReport(target, directories, len(whole.file.values), nbytes)


def _problems(parts: Sequence[OpenAdapter]) -> list[str]:
    """Return why parts are not those of one adapter."""
    if len(parts) < 2:
        return [f"expected two or more parts, got {len(parts)}"]
    problems = []
    for part in parts:
        if part.file.header is None:
            problems.append(f"{part.directory} was written by PEFT: convert it to 'native' first")
        elif not part.file.header.is_reproducible:
            problems.append(f"the bases of {part.directory} came from a file, and no seed reproduces them")
    if problems:
        return problems
    first, held = _common(parts[0]), dict.fromkeys(parts[0].file.values, parts[0])
    for part in parts[1:]:
        if both := [fqn for fqn in part.file.values if fqn in held]:
            problems.append(f"{held[both[0]].directory} and {part.directory} both have {shortened(both)}")
        held |= dict.fromkeys(part.file.values, part)
        problems += [
            f"{name} is {first[name]!r} in {parts[0].directory} and {own!r} in {part.directory}"
            for name, own in _common(part).items()
            if own != first[name]
        ]
    specs: dict[int, tuple[OpenAdapter, BasisSpec]] = {}
    trained: dict[str, tuple[OpenAdapter, Tensor]] = {}
    for part in parts:
        for r, basis in part.bases.items():
            other, spec = specs.setdefault(r, (part, basis.spec))
            if spec != basis.spec and (spec.family != basis.spec.family or not spec.is_prefix_stable):
                problems.append(
                    f"{other.directory} has {spec} and {part.directory} {basis.spec}, of which no model has both at "
                    "once: train the parts with stream='portable', and block bases with the same blocks="
                )
        for fqn, tensor in part.file.trained.items():  # as an embedding tied to a head in another stage
            other, known = trained.setdefault(fqn, (part, tensor))
            if not torch.equal(tensor, known):
                problems.append(f"{fqn} has other values in {other.directory} than in {part.directory}")
    return problems


def _common(part: OpenAdapter) -> dict[str, object]:
    """Return what all parts have in common: options, by name, and the base model."""
    options = [field.name for field in fields_of(RandLoRAConfig) if field.name not in OF_LAYERS]
    own = {name: getattr(part.file.config, name) for name in options}
    return {**own, "the base model": part.file.fields.get(BASE_FIELD)}


def _joined(parts: Sequence[OpenAdapter]) -> OpenAdapter:
    """Return the adapter that has the layers of all parts."""
    files, first = [part.file for part in parts], parts[0].file
    options = {fqn: option for file in files for fqn, option in file.options.items()}
    shapes = {fqn: shape for part in parts for fqn, shape in part.require_shapes().items()}
    stored = [part.transposed for part in parts]
    specs = {r: basis.spec for part in parts for r, basis in part.bases.items()}
    known = [file.header.model_class for file in files if file.header is not None and file.header.model_class]
    is_one = len({(each.library, each.name) for each in known}) == 1
    assert first.header is not None, "parts of PEFT are refused"
    header = replace(
        first.header,
        kinds={fqn: kind for part in parts for fqn, kind in part.kinds.items()},
        model_class=max(known, key=lambda each: each.labels is not None) if is_one else None,  # one has the head
        buffers=tuple(dict.fromkeys(fqn for file in files for fqn in file.buffers)),
    )
    config = first.config
    if any(file.config.alpha != config.alpha for file in files):  # a part with one alpha does not list it by layer
        config = replace(config, alpha={fqn: option.alpha for fqn, option in options.items()})
    named = [file.fields.get("target_modules") for file in files]
    modules = [name for file in files for name in file.fields.get("modules_to_save") or ()]
    fields = {
        **first.fields,
        "fan_in_fan_out": all(file.fields.get("fan_in_fan_out") for file in files),
        "modules_to_save": list(dict.fromkeys(modules)) or None,
        # what all parts have, which is exact in each, else a regex of all layers
        "target_modules": named[0] if all(each == named[0] for each in named) else "|".join(map(re.escape, shapes)),
    }
    whole = replace(
        replace(first, fields=fields, config=listed(config, options), header=header),
        values={fqn: pair for file in files for fqn, pair in file.values.items()},
        trained={fqn: tensor for file in files for fqn, tensor in file.trained.items()},
    )
    bases = {r: Basis(spec) for r, spec in specs.items()}  # the header says what part of them the layers use
    transposed = None if None in stored else tuple(fqn for own in stored for fqn in own or ())
    return OpenAdapter(parts[0].directory, whole, shapes, bases, transposed)
