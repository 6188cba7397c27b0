"""`save`: one adapter to a directory of two files that PEFT reads too, with a model card, and to the Hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from randlora.checkpoint.card import may_write, write_card
from randlora.checkpoint.contents import describe, drawn_rectangle, file_writers, stored_bases
from randlora.checkpoint.header import Header
from randlora.checkpoint.hub import upload, upload_problems
from randlora.checkpoint.layout import CARD_FILE, GAMMA_SUFFIX, LAMBDA_SUFFIX, MODEL_PREFIX, master_copy, trained_key
from randlora.checkpoint.peft_config import BASE_FIELD, to_peft_fields
from randlora.checkpoint.tied import untied_by_peft
from randlora.checkpoint.write import write_together
from randlora.errors import CheckpointError, raise_collected
from randlora.model.install import lost_sites, require_own
from randlora.report import Report, adapter_report, as_bytes
from randlora.state import Adapter, adapted_root
from randlora.targets.site import Shapes
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
    """Write one adapter to a directory, atomically: Λ, Γ, what ``train_also`` named, and what brings the bases back.

    A model card, ``README.md``, is written with them, unless there is one that somebody else wrote.

    Args:
        model: A model that carries adapters.
        directory: Made if it is missing; an adapter already in it is replaced.
        name: Which adapter; ``None`` means the only one.
        bases: ``"seed"`` stores no basis: the spec brings them back and a SHA-256 proves it. ``"stored"`` writes A and
            B out in float32, once, which PEFT needs for ``block`` bases and for ``stream="portable"``.
        push_to_hub: A repository on the Hub, ``"user/repo"``, that the files are then uploaded to; it is made if it is
            missing. huggingface_hub must be installed (the extra ``hub``).

    Returns:
        Where, how large, and notes.

    Raises:
        AdapterError: When the model carries no adapter, or ``name`` does not say which.
        CheckpointError: When there are no values to save, or the bases cannot be had from a seed; or when everything is
            saved and the Hub does not take it.
        OSError: When the disk refuses. Files already there stay whole.
    """
    root, state = adapted_root(model)
    adapter = state.adapter(name)
    directory = Path(directory)
    census = Census.of(root)
    require_own(census, state, "save")
    diagonals = diagonals_by_fqn(census, adapter.name)
    problems = [*lost_sites(census, [adapter]), *_problems(adapter, diagonals, bases), *upload_problems(push_to_hub)]
    raise_collected(CheckpointError, problems, doing=f"save to {str(directory)!r}")
    shapes = {site.fqn: site.shape for site in census.adapted if site.fqn in diagonals}
    header = describe(adapter.config, adapter.basis, shapes, adapter.trained)
    notes = _peft_notes(adapter, header, bases)
    tensors = _tensors(adapter, diagonals) | (stored_bases(adapter.basis, header) if bases == "stored" else {})
    fields = to_peft_fields(census, adapter, stored=bases == "stored")
    writers = file_writers(fields, tensors, header)
    if may_write(directory / CARD_FILE):
        report = _report(census, adapter, shapes)
        card = write_card(report, header, base_model=fields[BASE_FIELD], peft_notes=notes, repo_id=push_to_hub)
        writers[CARD_FILE] = lambda path: path.write_text(card, encoding="utf-8")
    write_together(directory, writers)
    size = sum((directory / file).stat().st_size for file in writers)
    url = upload(directory, push_to_hub) if push_to_hub else None
    notes += untied_by_peft(census, adapter.trained)
    return SaveReport(directory, adapter.name, size, tuple(notes), url)


def diagonals_by_fqn(census: Census, name: str) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Return Λ and Γ of each weight that one adapter is on, by FQN."""
    return {
        site.fqn: site.layer.diagonals_of(site.owner, name) for site in census.adapted if name in site.layer.adapters
    }


def _report(census: Census, adapter: Adapter, shapes: Shapes) -> Report:
    """Count what is saved, for its model card."""
    return adapter_report(
        census,
        adapter.name,
        adapter.config,
        shapes,
        adapter.basis.spec,
        rule=adapter.rule,
        basis_bytes=adapter.basis.nbytes,
        train_also=tuple(adapter.trained),
    )


def _problems(adapter: Adapter, diagonals: Mapping[str, tuple[nn.Parameter, nn.Parameter]], bases: str) -> list[str]:
    problems = []
    if bases not in ("seed", "stored"):
        problems.append(f"bases must be 'seed' or 'stored', got {bases!r}")
    if bases == "seed" and adapter.basis.stored is not None:
        problems.append("its bases came from a file and no seed brings them back: save with bases='stored'")
    without = [fqn for fqn, (lam, _) in diagonals.items() if lam.is_meta]
    without += [fqn for fqn, parameter in adapter.trained.items() if parameter.is_meta]
    problems += [f"{fqn} holds no values to save (meta): materialize the model first" for fqn in without]
    sharded = [fqn for fqn, (lam, _) in diagonals.items() if type(lam.data) is not Tensor]
    problems += [f"the adapter of {fqn} is sharded: gather it first" for fqn in sharded]
    return problems


def _tensors(adapter: Adapter, diagonals: Mapping[str, tuple[nn.Parameter, nn.Parameter]]) -> dict[str, Tensor]:
    tensors = {}
    for fqn, (lam, gamma) in diagonals.items():
        tensors[f"{MODEL_PREFIX}{fqn}{LAMBDA_SUFFIX}"] = master_copy(lam, "cpu")
        tensors[f"{MODEL_PREFIX}{fqn}{GAMMA_SUFFIX}"] = master_copy(gamma, "cpu")
    for fqn, parameter in adapter.trained.items():
        tensors[trained_key(fqn, diagonals)] = parameter.detach().cpu().contiguous().clone()
    return tensors


def _peft_notes(adapter: Adapter, header: Header, bases: str) -> list[str]:
    """Return what PEFT 0.21.2 would not load, or would load wrongly."""
    notes = []
    spec = adapter.basis.spec
    if bases == "seed" and spec.stream != "torch":
        notes.append(f"PEFT cannot draw stream={spec.stream!r}: save with bases='stored' to load there")
    elif bases == "seed" and (spec.max_dim, spec.min_dim) != header.rectangle:
        notes.append("the bases were drawn for other layers too, so PEFT would draw others: save with bases='stored'")
    if drawn_rectangle(adapter.basis, header) != header.rectangle:
        notes.append(
            "the bases were drawn for other layers and are too narrow for PEFT, which cannot load this adapter"
        )
    return notes
