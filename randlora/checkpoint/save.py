"""`save` and `save_all`: adapters to directories of two files that PEFT reads too, with a model card; the Hub.

One value after the other is gathered, copied to the CPU, hashed and written, so that memory holds no second adapter.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from randlora.checkpoint.card import CARD_FILE, Results, is_ours, results_note, write_card
from randlora.checkpoint.contents import AdapterToSave, StoredAs, given_values, to_save
from randlora.checkpoint.fit import untied_by_peft
from randlora.checkpoint.header import Header, metadata_of
from randlora.checkpoint.load import IN_ROOT
from randlora.checkpoint.peft_config import CONFIG_FILE, is_own_directory
from randlora.checkpoint.tensors import TENSORS_FILE
from randlora.disk.formats import Planned, TensorFile, write_tensor_file
from randlora.disk.hub import is_repo_id, require_hub, upload
from randlora.disk.replace import Files, staged_files
from randlora.errors import CheckpointError, raise_collected, warn
from randlora.hints import require_types, shortly
from randlora.model.save_guard import register_writer
from randlora.model.train_also import moved_note, untrained_note
from randlora.model.view import collective
from randlora.ranks import agree, agreeing, on_first_rank, run_collectives
from randlora.report import as_bytes
from randlora.state import ModelState, adapted_root
from randlora.targets.census import Census
from randlora.targets.match import shortened


@dataclass(frozen=True)
class SaveReport:
    """The report of `save`.

    Attributes:
        directory: The directory of the files.
        name: The adapter saved.
        nbytes: Bytes of the files written.
        notes: Notes for the user, such as that PEFT cannot load the files.
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


@collective(writes=False)
def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    name: str | None = None,
    bases: StoredAs = "seed",
    push_to_hub: str | None = None,
    results: Mapping[str, float | str] | None = None,
) -> SaveReport:
    """Save one adapter to a directory, atomically: Λ, Γ, the parameters of ``train_also`` and the spec of the bases.

    A model card, ``README.md``, is also written, unless the directory has one that was not generated. If any parameter
    of the model is sharded, for example by `fully_shard`, this is a collective: every process calls it, one writes the
    files, and all get the same report or an error.

    Args:
        model: A model with adapters.
        directory: The directory, created if it does not exist. An adapter already in it is replaced.
        name: The adapter's name; ``None`` means the only one.
        bases: ``"seed"`` stores no bases: the spec reproduces them, and a SHA-256 verifies them. ``"stored"`` stores A
            and B in float32, once. PEFT needs this for ``block`` bases and for ``stream="portable"``, and for
            ``"torch-2.11"`` under a newer torch.
        push_to_hub: A repository on the Hub, ``"user/repo"``, to upload the files to, created if it does not exist.
            huggingface_hub must be installed (the extra ``hub``).
        results: A table for the model card, such as ``{"accuracy": 0.81}``. Each save writes a new card: without
            results, the card has no table, and the report says so.

    Returns:
        The directory, the size and notes.

    Raises:
        AdapterError: If the model has no adapter, or several and no ``name`` is given.
        CheckpointError: If a value is missing or not whole (meta, sharded), not floating or not finite, an adapted
            module or a trained parameter was removed or changed shape, or no seed reproduces the bases. Nothing is
            written then. Also if the files are saved and the Hub refuses them.
        OSError: If the disk refuses. Existing files remain unchanged.
    """
    require_types(save, {"model": model, "directory": directory, "name": name, "results": results})
    root = Path(directory)
    adapters = to_save(model, [name], bases, doing=_saving_to(root))
    (report,) = _write_each(adapters, [root], root, hub=push_to_hub, results=results)
    return report


@collective(writes=False)
def save_all(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    names: Sequence[str] | None = None,
    bases: StoredAs = "seed",
    push_to_hub: str | None = None,
) -> list[SaveReport]:
    """Save several adapters in one call, each to a subdirectory with its name, as PEFT does.

    The adapter named ``default`` is written to ``directory`` itself, as PEFT does. All adapters are checked, and their
    files are on disk, before the first file appears. The files of each adapter are the same as from `randlora.save`.

    Args:
        model: A model with adapters.
        directory: The directory, created if it does not exist. Adapters already in it are replaced if they are named.
        names: The adapters; ``None`` means all.
        bases: As for `randlora.save`.
        push_to_hub: A repository on the Hub, ``"user/repo"``, to upload all files to, in the same directories.

    Returns:
        A report for each, as from `randlora.save`.

    Raises:
        AdapterError: If the model has no adapter of a name.
        CheckpointError: If an adapter cannot be saved, or its name cannot be the name of a directory. Nothing is
            written then.
        OSError: If the disk refuses. Existing files remain unchanged; but if a rename fails, adapters that were already
            renamed into place remain.
    """
    require_types(save_all, {"model": model, "directory": directory, "names": names, "push_to_hub": push_to_hub})
    root = Path(directory)
    _, state = adapted_root(model)
    chosen = list(state.adapters if names is None else names)
    problems = [f"{name!r} is named twice" for name in dict.fromkeys(chosen) if chosen.count(name) > 1]
    problems += [
        f"{name!r} cannot be the name of a directory: save it by itself, with randlora.save(model, directory, {name=})"
        for name in chosen
        if Path(name).name != name
    ]
    if not chosen:
        problems.append("no adapter is named")
    raise_collected(CheckpointError, problems, doing=_saving_to(root))
    directories = [root if name == IN_ROOT else root / name for name in chosen]
    return _write_each(to_save(model, chosen, bases, doing=_saving_to(root)), directories, root, hub=push_to_hub)


def _saving_to(root: Path) -> str:
    return f"save to {str(root)!r}"


def _write_each(
    adapters: Sequence[AdapterToSave],
    directories: Sequence[Path],
    root: Path,
    *,
    hub: str | None = None,
    results: Results = None,
) -> list[SaveReport]:
    """Write the files of some adapters, one value after the other; a collective if there are several processes."""
    with ExitStack() as hidden, ExitStack() as being_written:
        writing = _Writing(adapters, directories, root, hub, results, are_here=agreeing() is None)
        on_first_rank(partial(writing.begin, hidden))
        steps = [*writing.steps(being_written)]
        agree()  # before anything is gathered
        run_collectives(steps)
        return on_first_rank(partial(writing.end, hidden))


@dataclass
class _Writing:
    """The writing of some adapters, of which one process has the ``files``. All values ``are_here`` at once, or not."""

    adapters: Sequence[AdapterToSave]
    directories: Sequence[Path]
    root: Path
    hub: str | None
    results: Results
    are_here: bool
    files: list[_Files] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def begin(self, hidden: ExitStack) -> None:
        """Check what can be checked before a value is gathered, and begin all files, in hidden directories."""
        problems = [problem for own in self.adapters for problem in own.value_problems()] if self.are_here else []
        if self.hub is not None and not (isinstance(self.hub, str) and is_repo_id(self.hub)):
            problems.append(f"push_to_hub must be a repository on the Hub, 'user/repo', got {shortly(self.hub)}")
        elif self.hub is not None:
            require_hub(self.hub)
        problems += [
            f"{'it' if directory == self.root else repr(str(directory))} is a file or a broken link: expected the name "
            "of a directory"
            for directory in dict.fromkeys((self.root, *self.directories))
            if os.path.lexists(directory) and not directory.is_dir()
        ]
        raise_collected(CheckpointError, problems, doing=_saving_to(self.root))
        for own, directory in zip(self.adapters, self.directories, strict=True):
            subfolder = None if directory == self.root else directory.name
            self.files.append(_Files(own, directory, subfolder, self.hub, self.results))
        self.sizes = hidden.enter_context(staged_files(*(files.files for files in self.files)))

    def steps(self, being_written: ExitStack) -> Iterator[Callable[[], object]]:
        """Yield what gathers and writes each value in turn. A process without files takes part in gathering."""
        for own, files in zip_longest(self.adapters, self.files):
            if files is None:
                yield from own.gather(None)
                continue
            yield partial(being_written.enter_context, files.tensors)
            yield from own.gather(files.tensors.write)
            yield being_written.close

    def end(self, hidden: ExitStack) -> list[SaveReport]:
        """Move the files to their places if all values could be saved, push them, and return the reports."""
        problems = [problem for own in self.adapters for problem in own.problems]
        raise_collected(CheckpointError, problems, doing=_saving_to(self.root))
        hidden.close()
        url, kept = _push(self.root, self.directories, self.hub) if self.hub else (None, [])
        reports = []
        for files, size in zip(self.files, self.sizes, strict=True):
            notes = files.notes() + [
                f"{card} of {self.hub} is not a generated card, so it stays"
                for card in kept
                if (self.root / card).parent == files.directory
            ]
            reports.append(SaveReport(files.directory, files.own.adapter.name, size, tuple(notes), url))
        return reports


class _Files:
    """The files of one adapter. All but the values in them is known before a value is gathered."""

    tensors: TensorFile

    def __init__(
        self, own: AdapterToSave, directory: Path, subfolder: str | None, hub: str | None, results: Results
    ) -> None:
        """Plan them."""
        beside, card = _beside_the_base(own.census, directory), directory / CARD_FILE
        self.own, self.directory = own, directory
        is_kept = os.path.lexists(card) and not is_ours(card)  # the user's own
        text = None if is_kept else write_card(own, results, hub, subfolder)
        self.files = files_of(directory, {TENSORS_FILE: self._begin}, own.fields, text, has_header=True)
        self._notes = [*_training_notes(own), *beside, *results_note(card, results)]

    def _begin(self, path: Path) -> None:
        self.tensors = TensorFile(path, self.own.tensors, lambda: self.own.seal.metadata)

    def notes(self) -> list[str]:
        """Return the notes of the report, once all values have been written."""
        untrained = [] if self.own.has_effect else untrained_note(self.own.adapter)
        return [*self.own.notes, *untrained, *self._notes]


def _beside_the_base(census: Census, directory: Path) -> list[str]:
    """Warn of a directory that the model itself was loaded from, and return the warning."""
    if not is_own_directory(census.model, directory):
        return []
    warning = (
        f"{str(directory)!r} contains the base model itself: with an adapter beside it, transformers would load both, "
        "through PEFT; save the adapter to a separate directory"
    )
    warn(warning)
    return [warning]


def _push(root: Path, directories: Sequence[Path], hub: str) -> tuple[str, list[str]]:
    """Upload adapters; a generated card replaces none in the repository that was not generated, which are returned."""
    files, generated = [], {}
    for directory in directories:
        within = directory.relative_to(root)
        files += [(within / name).as_posix() for name in (CONFIG_FILE, TENSORS_FILE)]
        card = (within / CARD_FILE).as_posix()
        if is_ours(directory / CARD_FILE):
            generated[card] = is_ours
        else:
            files.append(card)
    return upload(root, hub, files, message="Upload a RandLoRA adapter", generated=generated)


@register_writer
def _save_only(model: nn.Module, directory: Path, values: Mapping[str, Tensor] | None) -> SaveReport:
    """Save the only adapter of a model, or of a sharded one from gathered values, in the process that has them."""
    if values is None:
        return save(model, directory)
    own = given_values(model, values)
    raise_collected(CheckpointError, own.problems, doing=_saving_to(directory))
    (report,) = _write_each([own], [directory], directory)
    return report


def _training_notes(own: AdapterToSave) -> list[str]:
    """Return notes on what of the training the files do not have."""
    census, state, adapter = own.census, own.state, own.adapter
    elsewhere = "they are not in the files, so a model that loads the adapter computes something different"
    return [
        *untied_by_peft(census, adapter.trained),
        *_left_out(census, state),
        *moved_note(census, state, [adapter], elsewhere),
    ]


def _left_out(census: Census, state: ModelState) -> list[str]:
    """Return a note on parameters that require grad and belong to no adapter, such as in a module added later."""
    if state.is_merged:  # when a quantized layer may have others
        return []
    own = {id(copy) for adapter in state.adapters.values() for copy in adapter.trained.values()}
    left = [held.fqn for held in census.parameters if held.tensor.requires_grad and id(held.tensor) not in own]
    if not left:
        return []
    return [f"{shortened(left)} requires grad and belongs to no adapter, so it is not in the files: see train_also"]


def adapter_files(
    directory: Path,
    fields: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    header: Header | None,
    card: str | None = None,
) -> Files:
    """Return an adapter's files, to be written. Tensors must be contiguous and on the CPU."""
    planned = [Planned.whole(*item) for item in tensors.items()]
    write = partial(write_tensor_file, tensors=planned, metadata=metadata_of(header, tensors))
    return files_of(directory, {TENSORS_FILE: write}, fields, card, has_header=header is not None)


def files_of(
    directory: Path,
    tensors: Mapping[str, Callable[[Path], object]],
    fields: Mapping[str, Any] | None,
    card: str | None = None,
    *,
    has_header: bool = False,
) -> Files:
    """Return a file of tensors, a JSON if there are ``fields``, and a model card if there is one, to be written.

    Our header makes the file of the tensors complete in itself: it decides, and the JSON after it is a copy of its
    options for PEFT. Beside tensors without our header readers need the JSON, so it is gone while the tensors change.

    Args:
        directory: The directory to write into.
        tensors: The name of the file of tensors, and what writes it, or begins to.
        fields: The contents of the JSON.
        card: The text of the model card.
        has_header: Whether the file of tensors has our header.
    """
    config = None if fields is None else json.dumps(dict(fields), indent=2) + "\n"
    writers = dict(tensors)
    for name, text in ((CARD_FILE, card), (CONFIG_FILE, config)):
        if text is not None:
            writers[name] = partial(Path.write_text, data=text, encoding="utf-8")
    is_needed = config is not None and not has_header
    return Files(directory, writers, withdrawn=CONFIG_FILE if is_needed else None)
