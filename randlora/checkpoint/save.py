"""`save`: an adapter to a directory of two files that PEFT reads too, with a model card, and to the Hub."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

from torch import Tensor, nn

from randlora.checkpoint.card import is_ours, write_card
from randlora.checkpoint.fit import untied_by_peft
from randlora.checkpoint.format import (
    CARD_FILE,
    CONFIG_FILE,
    TENSORS_FILE,
    Header,
    adapter_tensors,
    stored_bases,
    stored_dims,
)
from randlora.checkpoint.peft_config import BASE_FIELD, drawing_note, peft_obstacle, to_peft_fields, unknown_to_peft
from randlora.checkpoint.values import Value, is_text, meta_problems, save_problems
from randlora.checkpoint.write import write_adapter
from randlora.disk.hub import is_repo_id, require_hub, upload
from randlora.errors import CheckpointError, raise_collected
from randlora.hints import require_types, shortly
from randlora.layers.diagonals import diagonal_shapes
from randlora.model.install import lost_sites, require_own
from randlora.model.ranks import ranks_holding
from randlora.model.save_guard import SaveGuard
from randlora.model.train_also import lost_parameters
from randlora.model.trainable import adapter_parameters
from randlora.placement.dtensor import reshard
from randlora.placement.place import whole
from randlora.placement.ranks import agreed, in_step, one_writes
from randlora.replaced import whole_shape
from randlora.report import adapter_report, as_bytes
from randlora.state import Adapter, ModelState, adapted_root
from randlora.targets.match import shortened
from randlora.targets.select import left_out_by
from randlora.targets.site import AdaptedSite, other_kinds, shapes_of
from randlora.targets.walk import Census


@dataclass(frozen=True)
class SaveReport:
    """What `save` wrote.

    Attributes:
        directory: Where the files are.
        name: The adapter saved.
        nbytes: Bytes of the files written.
        notes: What the user should know, such as that PEFT cannot load the files.
        url: The repository it was pushed to, if any.
    """

    directory: Path
    name: str
    nbytes: int
    notes: tuple[str, ...]
    url: str | None = None

    def __str__(self) -> str:
        """Return one line, and one more for the push and for each note."""
        pushed = [f"pushed to {self.url}"] if self.url else []
        return "\n".join([f"saved {self.name!r} to {self.directory}, {as_bytes(self.nbytes)}", *pushed, *self.notes])


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    name: str | None = None,
    bases: Literal["seed", "stored"] = "seed",
    push_to_hub: str | None = None,
) -> SaveReport:
    """Save one adapter to a directory, atomically: Λ, Γ, the parameters of ``train_also`` and the spec of the bases.

    A model card, ``README.md``, is written with them, unless the directory has one that was not generated. If any
    parameter of the model is sharded, as by `fully_shard`, this is a collective: every process calls it, one writes the
    files, and all get the same report or an error.

    Args:
        model: A model with adapters.
        directory: The directory, created if it does not exist. An adapter already in it is replaced.
        name: The adapter's name; ``None`` means the only one.
        bases: ``"seed"`` stores no bases: the spec reproduces them, and a SHA-256 checks it. ``"stored"`` stores A and
            B in float32, once, which PEFT needs for ``block`` bases and for ``stream="portable"``, and for
            ``"torch-2.11"`` under a newer torch.
        push_to_hub: A repository on the Hub, ``"user/repo"``, to upload the files to, created if it does not exist.
            huggingface_hub must be installed (the extra ``hub``).

    Returns:
        The directory, the size and notes.

    Raises:
        AdapterError: If the model has no adapter, or several and no ``name`` is given.
        CheckpointError: If a value is not here or not whole (meta, sharded), not floating or not finite, an adapted
            module or a trained parameter was removed or has another shape now, or no seed reproduces the bases: nothing
            is written then. Also if the files are saved and the Hub refuses them.
        OSError: If the disk refuses. Files already there remain as they were.
    """
    require_types(save, {"model": model, "directory": directory, "name": name})
    reshard(model)
    root, state = adapted_root(model)
    adapter = state.adapter(name)
    census = Census.of(root)
    sites = [site for site in census.adapted if adapter.name in site.layer.adapters]
    diagonals = {site.fqn: site.layer.diagonals_of(site.owner, adapter.name) for site in sites}
    ranks = ranks_holding(census, state)
    with agreed(ranks):
        require_own(census, state, "save")
        problems = [*lost_sites(census, [adapter]), *lost_parameters(state, [adapter]), *_problems(adapter, bases)]
        if ranks is not None:  # before anything is gathered
            problems += meta_problems(_values(_Whole(sites, diagonals, adapter.trained), state, adapter))
            raise_collected(CheckpointError, problems, doing=f"save to {str(directory)!r}")
    with agreed(ranks):
        flat = [*chain.from_iterable(diagonals.values()), *adapter.trained.values()]
        values = iter(in_step(partial(whole, each) for each in flat))
        pairs = {fqn: (next(values), next(values)) for fqn in diagonals}
        held = _Whole(sites, pairs, dict(zip(adapter.trained, values, strict=True)))
    return one_writes(
        ranks, lambda: _write(census, state, adapter, held, Path(directory), problems, bases=bases, hub=push_to_hub)
    )


class _Whole(NamedTuple):
    """An adapter's weights, with all values of their Λ and Γ by FQN, and of the parameters trained with it."""

    sites: Sequence[AdaptedSite]
    diagonals: Mapping[str, tuple[Tensor, Tensor]]
    trained: Mapping[str, Tensor]


def _write(
    census: Census,
    state: ModelState,
    adapter: Adapter,
    held: _Whole,
    directory: Path,
    problems: list[str],
    *,
    bases: str,
    hub: str | None,
) -> SaveReport:
    """Check the values of an adapter and write its files."""
    sites = held.sites
    problems += save_problems(_values(held, state, adapter))
    if hub is not None and not (isinstance(hub, str) and is_repo_id(hub)):
        problems.append(f"push_to_hub must be a repository on the Hub, 'user/repo', got {shortly(hub)}")
    elif hub is not None:
        require_hub(hub)
    if os.path.lexists(directory) and not directory.is_dir():
        problems.append("it is a file or a broken link: expected the name of a directory")
    raise_collected(CheckpointError, problems, doing=f"save to {str(directory)!r}")
    shapes = shapes_of(sites, adapter.config)
    # a module used in several places may have another name now, if one of them is gone or new
    adapter = replace(adapter, options={site.fqn: site.layer.adapters[adapter.name].options for site in sites})
    transposed = tuple(site.fqn for site in sites if site.layer_class.is_transposed)
    header = Header.of(
        adapter.config, adapter.options, adapter.bases, shapes, adapter.trained, transposed, other_kinds(sites)
    )
    notes = _peft_notes(adapter, header, bases)
    tensors = adapter_tensors(held.diagonals, held.trained)
    if bases == "stored":
        tensors |= stored_bases(adapter.bases, header)
    fields = to_peft_fields(census, adapter, stored=bases == "stored")
    card = None
    if is_ours(directory / CARD_FILE) or not os.path.lexists(directory / CARD_FILE):
        skipped, remaining = left_out_by(census, adapter.config, shapes)
        report = adapter_report(census, adapter, shapes, skipped=skipped, remaining=remaining)
        card = write_card(report, header, base_model=fields[BASE_FIELD], peft_notes=notes, repo_id=hub)
    size = write_adapter(directory, fields, tensors, header, card)
    url = None
    if hub:  # a generated card replaces none in the repository that was not generated
        generated = {CARD_FILE: is_ours} if is_ours(directory / CARD_FILE) else {}
        files = [name for name in (CONFIG_FILE, TENSORS_FILE, CARD_FILE) if name not in generated]
        url = upload(directory, hub, files, message="Upload a RandLoRA adapter", generated=generated)
    notes += [*untied_by_peft(census, adapter.trained), *_left_out(census, state)]
    return SaveReport(directory, adapter.name, size, tuple(notes), url)


SaveGuard.write_adapter = staticmethod(save)


def _values(held: _Whole, state: ModelState, adapter: Adapter) -> dict[str, Value]:
    """Return everything that is written of an adapter, except bases, and the shape that it must have."""
    values = {}
    for site in held.sites:
        part, (lam, gamma) = site.layer.adapters[adapter.name], held.diagonals[site.fqn]
        lam_shape, gamma_shape = diagonal_shapes(part.shape, part.options.r)
        values[f"Λ of {site.fqn}"] = Value(lam, lam_shape)
        values[f"Γ of {site.fqn}"] = Value(gamma, gamma_shape)
    for fqn, parameter in held.trained.items():
        values[fqn] = Value(parameter, whole_shape(state.replaced[fqn].original))
    return values


def _problems(adapter: Adapter, bases: str) -> list[str]:
    problems = []
    if bases not in ("seed", "stored"):
        problems.append(f"bases must be 'seed' or 'stored', got {shortly(bases)}")
    if bases == "seed" and any(basis.stored is not None for basis in adapter.bases.values()):
        problems.append("its bases came from a file and no seed reproduces them: save with bases='stored'")
    names = [*adapter.targets, *adapter.trained]
    problems += [f"{fqn!r} is no valid Unicode: rename the module" for fqn in names if not is_text(fqn)]
    return problems


def _left_out(census: Census, state: ModelState) -> list[str]:
    """Return a note on parameters that require grad and belong to no adapter, as of a module put in later."""
    if state.is_merged:  # when a quantized layer may have others
        return []
    own = {id(each) for adapter in state.adapters.values() for each in adapter_parameters(census, adapter)}
    left = [held.fqn for held in census.parameters if held.parameter.requires_grad and id(held.parameter) not in own]
    if not left:
        return []
    return [f"{shortened(left)} requires grad and belongs to no adapter, so it is not in the files: see train_also"]


def _peft_notes(adapter: Adapter, header: Header, bases: str) -> list[str]:
    """Return what PEFT 0.21.2 would not load, or would load wrongly."""
    if (reason := unknown_to_peft(header.kinds)) is not None:
        return [f"PEFT cannot load this adapter: {reason}"]
    if (reason := peft_obstacle(header.options)) is not None:
        return [reason]
    notes = []
    ((basis, rectangle),) = ((adapter.bases[r], rectangle) for r, rectangle in header.rectangles.items())
    spec = basis.spec
    if bases == "seed" and (spec.max_dim, spec.min_dim) != rectangle:
        notes.append("the bases were drawn for other layers too, so PEFT would draw others: save with bases='stored'")
    elif bases == "seed" and (reason := drawing_note(spec)) is not None:
        notes.append(reason)
    if stored_dims(basis, rectangle) != rectangle:
        notes.append(
            "the bases were drawn for other layers and are too narrow for PEFT, which cannot load this adapter"
        )
    return notes
