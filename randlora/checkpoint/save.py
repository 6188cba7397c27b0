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
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from randlora.checkpoint.contents import AdapterToSave, StoredAs, given_values, to_save
from randlora.checkpoint.fit import untied_by_peft
from randlora.checkpoint.load import IN_ROOT
from randlora.checkpoint.peft_layout import BASE_FIELD, CONFIG_FILE, TENSORS_FILE, repo_of
from randlora.config import described
from randlora.disk.formats import TensorFile
from randlora.disk.hub import is_repo_id, require_hub, upload
from randlora.disk.replace import Files, staged_files
from randlora.errors import CheckpointError, raise_collected
from randlora.hints import require_types, shortly
from randlora.model.instance_methods import WRITERS
from randlora.model.train_also import moved_note, untrained_notes
from randlora.model.view import collective
from randlora.ranks import agree, on_first_rank, run_collectives
from randlora.report import Report, adapter_report, as_bytes, rows_in_words
from randlora.state import ModelState, adapted_root
from randlora.targets.census import Census
from randlora.targets.match import shortened

CARD_FILE = "README.md"
MARK = "<!-- Written by randlora.save, which writes it anew at each save unless this line is gone. -->"
RESULTS = "## Results"

Results: TypeAlias = Mapping[str, float | str] | None  # that a user measured, by the name of the metric


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
        lines = [f"saved {self.name!r} to {self.directory}, {as_bytes(self.nbytes)}"]
        return "\n".join([*lines, *([f"pushed to {self.url}"] if self.url else []), *self.notes])


@collective(writes=False)
def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    name: str | None = None,
    bases: StoredAs = "seed",
    dtype: torch.dtype | None = None,
    push_to_hub: str | None = None,
    results: Mapping[str, float | str] | None = None,
) -> SaveReport:
    """Save one adapter to a directory, atomically: Λ, Γ, the parameters of ``train_also`` and the spec of the bases.

    A model card, ``README.md``, is also written, unless the directory has one that was not generated. If the model is
    sharded, for example by `fully_shard`, every process calls this, one writes the files, and all get the same report.

    Args:
        model: A model with adapters.
        directory: The directory, created if it does not exist. An adapter already in it is replaced.
        name: The adapter's name; ``None`` means the only one.
        bases: ``"seed"`` stores no bases: the spec reproduces them, and a SHA-256 verifies them. ``"stored"`` stores A
            and B in float32, once. PEFT needs this for ``block`` bases and for ``stream="portable"``, and for
            ``"torch-2.11"`` under a newer torch.
        dtype: The dtype of Λ and Γ: ``torch.bfloat16`` and ``torch.float16`` halve the files. `randlora.load` widens
            them again. ``None`` means float32, or float64 if they are in float64.
        push_to_hub: A repository on the Hub, ``"user/repo"``, to upload the files to, created if it does not exist.
            huggingface_hub must be installed (the extra ``hub``).
        results: A table for the model card, such as ``{"accuracy": 0.81}``. Each save writes a new card: without
            results, the card has no table, and the report says so.

    Returns:
        The directory, the size and notes.

    Raises:
        AdapterError: If the model has no adapter, or several and no ``name`` is given.
        CheckpointError: If a value is missing, not whole (meta, sharded), not floating, not finite or outside the range
            of ``dtype``, a module was removed or changed shape, or no seed reproduces the bases; nothing is written.
            Also if the Hub refuses.
        OSError: If the disk refuses. Existing files remain unchanged.
    """
    require_types(save, locals())
    root = Path(directory)
    adapters = to_save(model, [name], bases, dtype, doing=_saving_to(root))
    (report,) = _Writing(adapters, [root], root, push_to_hub, results).run()
    return report


@collective(writes=False)
def save_all(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    names: Sequence[str] | None = None,
    bases: StoredAs = "seed",
    dtype: torch.dtype | None = None,
    push_to_hub: str | None = None,
) -> list[SaveReport]:
    """Save several adapters in one call, each to a subdirectory with its name, and ``default`` to ``directory`` itself.

    This is as PEFT does. All adapters are checked, and their files, the same as from `randlora.save`, are on disk,
    before the first file appears.

    Args:
        model: A model with adapters.
        directory: The directory, created if it does not exist. Adapters already in it are replaced if they are named.
        names: The adapters; ``None`` means all.
        bases: As for `randlora.save`.
        dtype: As for `randlora.save`.
        push_to_hub: A repository on the Hub, ``"user/repo"``, to upload all files to, in the same directories.

    Returns:
        A report for each, as from `randlora.save`.

    Raises:
        AdapterError: If the model has no adapter of a name.
        CheckpointError: If an adapter cannot be saved, or its name cannot be a directory's. Nothing is written then.
        OSError: If the disk refuses. Existing files remain unchanged; if a rename fails, adapters in place remain.
    """
    require_types(save_all, locals())
    root = Path(directory)
    _, state = adapted_root(model)
    chosen = list(dict.fromkeys(state.adapters if names is None else names))
    problems = [
        f"{name!r} cannot be the name of a directory: save it by itself, with randlora.save(model, directory, {name=})"
        for name in chosen
        if Path(name).name != name
    ]
    if not chosen:
        problems.append("no adapter is named")
    raise_collected(CheckpointError, problems, doing=_saving_to(root))
    directories = [root if name == IN_ROOT else root / name for name in chosen]
    adapters = to_save(model, chosen, bases, dtype, doing=_saving_to(root))
    return _Writing(adapters, directories, root, push_to_hub).run()


def _saving_to(root: Path) -> str:
    return f"save to {str(root)!r}"


@dataclass
class _Writing:
    """The writing of some adapters, of which one process has the ``tensors``: their files, in the same order."""

    adapters: Sequence[AdapterToSave]
    directories: Sequence[Path]
    root: Path
    hub: str | None = None
    results: Results = None
    tensors: list[TensorFile] = field(default_factory=list)
    cards: list[Callable[[], object]] = field(default_factory=list)  # which write what is known once all is gathered
    notes: list[tuple[str, ...]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def run(self) -> list[SaveReport]:
        """Write the files, one value after the other; a collective if there are several processes."""
        with ExitStack() as hidden, ExitStack() as being_written:
            on_first_rank(partial(self.begin, hidden))
            steps = [*self.steps(being_written)]
            agree()  # before anything is gathered
            run_collectives(steps)
            return on_first_rank(partial(self.end, hidden))

    def begin(self, hidden: ExitStack) -> None:
        """Check what can be checked before a value is gathered, and begin all files, in hidden directories."""
        problems = []
        if self.hub is not None:
            if not is_repo_id(self.hub):
                problems.append(f"push_to_hub must be a repository on the Hub, 'user/repo', got {shortly(self.hub)}")
            require_hub(self.hub)
        if self.root.suffix in (".safetensors", ".bin", ".pt", ".pth") and not self.root.is_dir():
            suggested = self.root.parent if self.root.name == TENSORS_FILE else self.root.with_suffix("")
            problems.append(f"expected the name of a directory, got a file's: give {str(suggested)!r}")
        problems += [
            f"{str(directory)!r} is a file or a broken link: expected the name of a directory"
            for directory in dict.fromkeys((self.root, *self.directories))
            if os.path.lexists(directory) and not directory.is_dir()
        ]
        raise_collected(CheckpointError, problems, doing=_saving_to(self.root))
        self.sizes = hidden.enter_context(staged_files(*map(self._plan, self.adapters, self.directories)))

    def _plan(self, adapter: AdapterToSave, directory: Path) -> Files:
        """Plan the files of one adapter: all but the values in them is known before a value is gathered."""

        def begin_tensors(path: Path) -> None:
            self.tensors.append(TensorFile(path, adapter.tensors, lambda: adapter.seal.metadata))

        def begin_card(path: Path) -> None:
            subfolder = f', subfolder="{directory.name}"' if self.hub and directory != self.root else ""
            place = f'"{self.hub or "path/to/this/directory"}"{subfolder}'
            self.cards.append(lambda: _write_card(path, adapter, self.results, place))

        card, writers, of_results = directory / CARD_FILE, {TENSORS_FILE: begin_tensors}, list[str]()
        if not os.path.lexists(card) or is_generated(card):
            writers[CARD_FILE] = begin_card
            if not self.results and RESULTS in _lines(card):
                lost = "README.md had results of the replaced adapter, and has none now"
                of_results.append(f"{lost}: pass results= to save for this one")
        elif self.results:  # the user has written it
            of_results.append("README.md is not a generated model card, so the results are not written into it")
        census, state, own = adapter.census, adapter.state, adapter.adapter
        elsewhere = "they are not in the files, so a model that loads the adapter computes something different"
        self.notes.append((
            *adapter.peft_notes(),
            *untied_by_peft(census, own.trained),
            *_left_out(census, state),
            *moved_note(census, state, [own], elsewhere),
            *of_results,
        ))
        return files_of(directory, writers, adapter.fields, has_header=True)

    def steps(self, being_written: ExitStack) -> Iterator[Callable[[], object]]:
        """Yield what gathers and writes each value in turn. A process without files takes part in gathering."""
        for adapter, tensors in zip_longest(self.adapters, self.tensors):
            if tensors is None:
                yield from adapter.gather(None)
                continue
            yield partial(being_written.enter_context, tensors)
            yield from adapter.gather(tensors.write)
            yield being_written.close

    def end(self, hidden: ExitStack) -> list[SaveReport]:
        """Move the files to their places if all values could be saved, push them, and return the reports."""
        problems = [problem for adapter in self.adapters for problem in adapter.problems]
        raise_collected(CheckpointError, problems, doing=_saving_to(self.root))
        for write in self.cards:
            write()
        hidden.close()
        url = _push(self.root, self.directories, self.hub) if self.hub else None
        reports = []
        for own, directory, size, notes in zip(self.adapters, self.directories, self.sizes, self.notes, strict=True):
            rounding = [f"Λ and Γ are in {own.rounding}"] if own.rounding else []
            more = *rounding, *untrained_notes(own.census, own.state, [own.adapter])
            reports.append(SaveReport(directory, own.adapter.name, size, (*notes, *more), url))
        return reports


def _push(root: Path, directories: Sequence[Path], hub: str) -> str:
    """Upload adapters; a generated card replaces none in the repository that was not generated."""
    files, generated = list[str](), list[str]()
    for directory in directories:
        within = directory.relative_to(root)
        files += [(within / name).as_posix() for name in (CONFIG_FILE, TENSORS_FILE)]
        cards = generated if is_generated(directory / CARD_FILE) else files
        cards.append((within / CARD_FILE).as_posix())
    return upload(root, hub, files, generated, is_generated)


def _save_only(model: nn.Module, directory: Path, values: Mapping[str, Tensor] | None) -> SaveReport:
    """Save the only adapter of a model, or of a sharded one from gathered values, in the process that has them."""
    if values is None:
        return save(model, directory)
    own = given_values(model, values)
    raise_collected(CheckpointError, own.problems, doing=_saving_to(directory))
    (report,) = _Writing([own], [directory], directory).run()
    return report


WRITERS.append(_save_only)


def _left_out(census: Census, state: ModelState) -> list[str]:
    """Return a note on parameters that require grad and belong to no adapter, such as in a module added later."""
    trained = {id(copy) for adapter in state.adapters.values() for copy in adapter.trained.values()}
    left = [held.fqn for held in census.parameters if held.tensor.requires_grad and id(held.tensor) not in trained]
    if not left or state.is_merged:  # when a quantized layer may have others
        return []
    return [f"{shortened(left)} requires grad and belongs to no adapter, so it is not in the files: see train_also"]


def files_of(
    directory: Path,
    tensors: Mapping[str, Callable[[Path], object]],
    fields: Mapping[str, Any] | None,
    *,
    has_header: bool = False,
) -> Files:
    """Return a file of tensors, and perhaps a model card, by name with what begins to write it, and a JSON.

    Our header makes the file of the tensors complete in itself: it decides, and the JSON after it is a copy of its
    options for PEFT. Beside tensors without our header readers need the JSON, so it is gone while the tensors change.
    """
    if fields is None:
        return Files(directory, tensors)
    text = json.dumps(dict(fields), indent=2) + "\n"
    write: Callable[[Path], object] = partial(Path.write_text, data=text, encoding="utf-8")
    return Files(directory, {**tensors, CONFIG_FILE: write}, withdrawn=None if has_header else CONFIG_FILE)


def _write_card(path: Path, adapter: AdapterToSave, results: Results, place: str) -> None:
    """Write a model card, in which ``place`` is given to `load`."""
    base, notes = repo_of(adapter.fields[BASE_FIELD]), adapter.peft_notes()
    figures = _figures(adapter_report(adapter.census, adapter.adapter, adapter.header.shapes), adapter)
    # what the Hub reads, in YAML, of which JSON strings are a part
    of_base = [f"base_model: {json.dumps(base)}", "base_model_relation: adapter"] if base else []
    front_matter = ["---", *of_base, "library_name: randlora", "tags:", "- randlora", "---"]
    here = f"import randlora\n\nrandlora.load(model, {place})  # model: the base model as it was before training"
    there = f"from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(model, {place})"
    sections = [
        "\n".join(front_matter),
        MARK,
        f"# RandLoRA adapter of {base}" if base else "# RandLoRA adapter",
        "An adapter of the method [RandLoRA](https://arxiv.org/abs/2502.00987): trained scalings of random bases.",
        _table("| | |", {name: value for name, value in figures.items() if value}),
        *([RESULTS, _table("| metric | value |", results)] if results else ()),
        "## Loading it",
        f"```python\n{here}\n```",
        "PEFT 0.21.2 does not load these files:" if notes else "With PEFT:",
        "\n".join(f"- {note}" for note in notes) or f"```python\n{there}\n```",
    ]
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def is_generated(path: Path) -> bool:
    """Whether a README.md is a generated model card that still has its mark."""
    return MARK in _lines(path)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def _table(head: str, rows: Mapping[str, object]) -> str:
    cells = (tuple(" ".join(str(cell).split()).replace("|", r"\|") for cell in row) for row in rows.items())
    return "\n".join([head, "|---|---|", *(f"| {name} | {value} |" for name, value in cells)])


def _figures(report: Report, adapter: AdapterToSave) -> dict[str, object]:
    header, spec = adapter.header, report.specs[0]  # all have the same, except for r and blocks
    blocks = {r: record.spec.blocks for r, record in header.bases.items() if record.spec.blocks}
    digests = {r: f"`{record.digest}`" for r, record in header.bases.items()}
    names, also = sorted({fqn.rpartition(".")[2] for fqn in report.targets}), rows_in_words(report.train_rows)
    return {
        **described(header.options),
        "bases": spec.kind,
        "blocks": _by_rank(blocks),
        "stream of the bases": spec.stream,
        "seed of the bases": f"{spec.seed}" if header.is_reproducible else "none reproduces them: they are in the file",
        "SHA-256 of the bases": _by_rank(digests),
        "adapted layers": f"{len(report.targets)}, called {', '.join(f'`{name}`' for name in names)}",
        "trained parameters": f"{report.trainable_parameters:,} of {report.total_parameters:,} ({report.share:.2%})",
        "trained with the adapter": ", ".join([*map("`{}`".format, report.train_also), *also]),
        "Λ and Γ": adapter.rounding,
        "left out": "; ".join(line.removeprefix("left out: ") for line in adapter.adapter.left_out),
    }


def _by_rank(values: Mapping[int, object]) -> str:
    return ", ".join(f"{value} (r={r})" if len(values) > 1 else f"{value}" for r, value in values.items())
