"""`save` and `save_all`: adapters to directories of two files that PEFT reads too, with a model card; the Hub.

The card is a README.md with an adapter's figures and how to load it, which the Hub reads too.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn

from randlora.checkpoint.contents import (
    Contents,
    Gathered,
    StoredAs,
    contents_of,
    gathered,
    given_values,
    value_problems,
)
from randlora.checkpoint.fit import untied_by_peft
from randlora.checkpoint.header import HEADER_KEY, Header, metadata_of
from randlora.checkpoint.load import IN_ROOT
from randlora.checkpoint.peft_config import BASE_FIELD, CONFIG_FILE, is_own_directory, repo_of
from randlora.checkpoint.tensors import TENSORS_FILE
from randlora.config import described
from randlora.disk.formats import Planned, write_tensor_file
from randlora.disk.hub import is_repo_id, require_hub, upload
from randlora.disk.replace import Files, write_files
from randlora.errors import CheckpointError, raise_collected, warn
from randlora.hints import require_types, shortly
from randlora.layers.in_place import plain_class
from randlora.model.engines import collective
from randlora.model.listing import adapter_parameters
from randlora.model.save_guard import SaveGuard
from randlora.model.train_also import moved_note, untrained_note
from randlora.ranks import on_first_rank
from randlora.report import Report, adapter_report, as_bytes
from randlora.state import ModelState, adapted_root
from randlora.targets.census import Census
from randlora.targets.match import shortened

CARD_FILE = "README.md"
MARK = "<!-- Written by randlora.save, which writes it anew at each save unless this line is gone. -->"
RESULTS = "## Results"

Results: TypeAlias = Mapping[str, float | str] | None
"""Results that a user measured, by the name of the metric."""

TASKS = {
    "WithLMHeadModel": None,  # of XLM and Flaubert, masked or causal
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
}
"""The Hub's names of tasks, by the ends of the names of transformers' classes."""

NOT_TEXT = re.compile("pixel|image|visual|bbox|audio|feature|table")
"""Names of arguments by which a forward takes more than text."""


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
    (report,) = write_each(model, {name: root}, root, bases=bases, push_to_hub=push_to_hub, results=results)
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
        f"{name!r} cannot be the name of a directory: rename the adapter" for name in chosen if Path(name).name != name
    ]
    if not chosen:
        problems.append("no adapter is named")
    raise_collected(CheckpointError, problems, doing=f"save to {str(root)!r}")
    directories = {name: root if name == IN_ROOT else root / name for name in chosen}
    return write_each(model, directories, root, bases=bases, push_to_hub=push_to_hub)


def write_each(
    model: nn.Module,
    directories: Mapping[str, Path] | Mapping[str | None, Path],
    root: Path,
    *,
    bases: StoredAs,
    push_to_hub: str | None,
    results: Results = None,
) -> list[SaveReport]:
    """Save adapters by name, each to its directory, which is ``root`` or inside it, after checking all of them."""
    doing = f"save to {str(root)!r}"
    held = gathered(model, [*directories], bases, doing=doing, is_for_all=False)
    write = partial(_write_each, held, [*directories.values()], root, hub=push_to_hub, results=results, doing=doing)
    return on_first_rank(write)


def _write_each(
    held: Sequence[Gathered],
    directories: Sequence[Path],
    root: Path,
    *,
    hub: str | None,
    results: Results,
    doing: str,
) -> list[SaveReport]:
    """Check the values of some adapters and write their files."""
    problems = [problem for each in held for problem in value_problems(each)]
    if hub is not None and not (isinstance(hub, str) and is_repo_id(hub)):
        problems.append(f"push_to_hub must be a repository on the Hub, 'user/repo', got {shortly(hub)}")
    elif hub is not None:
        require_hub(hub)
    problems += [
        f"{'it' if directory == root else repr(str(directory))} is a file or a broken link: expected the name of a "
        "directory"
        for directory in dict.fromkeys((root, *directories))
        if os.path.lexists(directory) and not directory.is_dir()
    ]
    raise_collected(CheckpointError, problems, doing=doing)
    planned, notes = [], []
    for each, directory in zip(held, directories, strict=True):
        beside = _beside_the_base(each.census, directory)
        contents, card = contents_of(each), directory / CARD_FILE
        subfolder = None if directory == root else directory.name
        is_kept = os.path.lexists(card) and not is_ours(card)  # the user's own
        text = None if is_kept else write_card(each, contents, results, hub, subfolder)
        planned.append(adapter_files(directory, contents.fields, contents.tensors, contents.header, text))
        notes.append([*contents.notes, *_training_notes(each), *beside, *results_note(card, results)])
    sizes = write_files(*planned)
    url, kept = _push(root, directories, hub) if hub else (None, [])
    for card_file in kept:
        notes[directories.index((root / card_file).parent)] += [
            f"{card_file} of {hub} is not a generated card, so it stays"
        ]
    return [
        SaveReport(directory, each.adapter.name, size, tuple(own), url)
        for each, directory, size, own in zip(held, directories, sizes, notes, strict=True)
    ]


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


def save_given(model: nn.Module, directory: Path, values: Mapping[str, Tensor]) -> SaveReport:
    """Save the only adapter of a sharded model from gathered values. Only the process that has them calls this."""
    held, doing = given_values(model, values), f"save to {str(directory)!r}"
    raise_collected(CheckpointError, held.problems, doing=doing)
    (report,) = _write_each([held], [directory], directory, hub=None, results=None, doing=doing)
    return report


SaveGuard.write_adapter = staticmethod(save)
SaveGuard.write_given = staticmethod(save_given)


def _training_notes(held: Gathered) -> list[str]:
    """Return notes on what of the training the files do not have."""
    census, state, adapter = held.census, held.state, held.adapter
    elsewhere = "they are not in the files, so a model that loads the adapter computes something different"
    return [
        *untrained_note(state, adapter, held.diagonals.values(), held.trained),
        *untied_by_peft(census, adapter.trained),
        *_left_out(census, state),
        *moved_note(census, state, [adapter], elsewhere),
    ]


def _left_out(census: Census, state: ModelState) -> list[str]:
    """Return a note on parameters that require grad and belong to no adapter, such as in a module added later."""
    if state.is_merged:  # when a quantized layer may have others
        return []
    own = {id(each) for adapter in state.adapters.values() for each in adapter_parameters(census, adapter)}
    left = [held.fqn for held in census.parameters if held.parameter.requires_grad and id(held.parameter) not in own]
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
    return files_of(directory, TENSORS_FILE, planned, metadata_of(header, tensors), fields, card)


def files_of(
    directory: Path,
    tensors_file: str,
    tensors: Sequence[Planned],
    metadata: Mapping[str, str],
    fields: Mapping[str, Any] | None,
    card: str | None = None,
) -> Files:
    """Return a file of tensors, a JSON if there are ``fields``, and a model card if there is one, to be written.

    Our header makes the file of the tensors complete in itself: it decides, and the JSON after it is a copy of its
    options for PEFT. Beside tensors without our header readers need the JSON, so it is gone while the tensors change.
    """
    config = None if fields is None else json.dumps(dict(fields), indent=2) + "\n"
    writers: dict[str, Callable[[Path], object]] = {
        tensors_file: lambda path: write_tensor_file(path, tensors, metadata)
    }
    for name, text in ((CARD_FILE, card), (CONFIG_FILE, config)):
        if text is not None:
            writers[name] = partial(Path.write_text, data=text, encoding="utf-8")
    is_needed = config is not None and HEADER_KEY not in metadata
    return Files(directory, writers, withdrawn=CONFIG_FILE if is_needed else None)


def write_card(held: Gathered, contents: Contents, results: Results, repo_id: str | None, subfolder: str | None) -> str:
    """Return the text of a model card. ``subfolder`` is the place of the files in the repository."""
    census, header, adapter = held.census, contents.header, contents.adapter
    report = adapter_report(census, adapter, header.shapes)
    task, base = task_of(census.model), repo_of(contents.fields[BASE_FIELD])
    place = f'"{repo_id or "path/to/this/directory"}"'
    place += f', subfolder="{subfolder}"' if repo_id and subfolder else ""
    # what the Hub reads, in YAML, of which JSON strings are a part
    of_base = [f"base_model: {json.dumps(base)}", "base_model_relation: adapter"] if base else []
    of_task = [f"pipeline_tag: {task}"] if task else []
    front_matter = ["---", *of_base, "library_name: randlora", *of_task, "tags:", "- randlora", "---"]
    figures = (f"| {name} | {value} |" for name, value in _figures(report, header, adapter.left_out).items() if value)
    here = f"import randlora\n\nrandlora.load(model, {place})  # model: the base model as it was before training"
    there = f"from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(model, {place})"
    sections = [
        "\n".join(front_matter),
        MARK,
        f"# RandLoRA adapter of {base}" if base else "# RandLoRA adapter",
        "An adapter of the method [RandLoRA](https://arxiv.org/abs/2502.00987): trained scalings of random bases.",
        "\n".join(["| | |", "|---|---|", *figures]),
        *([RESULTS, _results_table(results)] if results else ()),
        "## Loading it",
        f"```python\n{here}\n```",
        "PEFT 0.21.2 does not load these files:" if contents.notes else "With PEFT:",
        "\n".join(f"- {note}" for note in contents.notes) or f"```python\n{there}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def is_ours(path: Path) -> bool:
    """Whether a README.md is a generated model card that still has its mark."""
    return MARK in _lines(path)


def results_note(path: Path, results: Results) -> list[str]:
    """Return a note if a save with these results does not write them into the model card, or removes earlier ones."""
    if results and os.path.lexists(path) and not is_ours(path):
        return ["README.md is not a generated model card, so the results are not written into it"]
    if not results and is_ours(path) and RESULTS in _lines(path):
        return ["README.md had results of the replaced adapter, and has none now: pass results= to save for this one"]
    return []


def task_of(model: nn.Module) -> str | None:
    """Return the Hub's name of a model's task if its class, such as `LlamaForCausalLM`, tells it.

    For a class that takes more than text, or makes something else, such as audio, the result is ``None``.
    """
    kind = plain_class(model)
    task = next((task for end, task in TASKS.items() if kind.__name__.endswith(end)), None)
    if task is None or task == "image-classification":
        return task
    taken = " ".join(inspect.signature(kind.forward).parameters)
    is_text = "input_ids" in taken and not NOT_TEXT.search(taken)
    return task if is_text and "audio" not in (getattr(model, "output_modalities", None) or ()) else None


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def _results_table(results: Mapping[str, float | str]) -> str:
    cells = (tuple(" ".join(str(cell).split()).replace("|", r"\|") for cell in row) for row in results.items())
    return "\n".join(["| metric | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells)])


def _figures(report: Report, header: Header, left_out: Sequence[str]) -> dict[str, object]:
    spec = report.specs[0]  # all have the same, except for r and blocks
    blocks = {r: record.spec.blocks for r, record in header.bases.items() if record.spec.blocks}
    digests = {r: f"`{record.digest}`" for r, record in header.bases.items()}
    kinds = sorted({fqn.rsplit(".", 1)[-1] for fqn in report.targets})
    return {
        **described(header.options),
        "bases": spec.kind,
        "blocks": _by_rank(blocks),
        "stream of the bases": spec.stream,
        "seed of the bases": f"{spec.seed}" if header.is_reproducible else "none reproduces them: they are in the file",
        "SHA-256 of the bases": _by_rank(digests),
        "adapted layers": f"{len(report.targets)}, called {_names(kinds)}",
        "trained parameters": f"{report.trainable_parameters:,} of {report.total_parameters:,} ({report.share:.2%})",
        "trained with the adapter": _names(report.train_also),
        "left out": "; ".join(line.removeprefix("left out: ") for line in left_out),
    }


def _by_rank(values: Mapping[int, object]) -> str:
    """Return the only value, or each with its r."""
    return ", ".join(f"{value} (r={r})" if len(values) > 1 else f"{value}" for r, value in values.items())


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
