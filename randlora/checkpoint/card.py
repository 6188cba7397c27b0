"""The model card of an adapter: a README.md with its figures and how to load it, which the Hub reads too."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from randlora.checkpoint.contents import AdapterToSave
from randlora.checkpoint.header import Header
from randlora.checkpoint.peft_config import BASE_FIELD, repo_of
from randlora.config import described
from randlora.report import Report, adapter_report

CARD_FILE = "README.md"
MARK = "<!-- Written by randlora.save, which writes it anew at each save unless this line is gone. -->"
RESULTS = "## Results"

Results: TypeAlias = Mapping[str, float | str] | None
"""Results that a user measured, by the name of the metric."""


def write_card(own: AdapterToSave, results: Results, repo_id: str | None, subfolder: str | None) -> str:
    """Return the text of a model card. ``subfolder`` is the place of the files in the repository."""
    header, base, notes = own.header, repo_of(own.fields[BASE_FIELD]), own.notes
    report = adapter_report(own.census, own.adapter, header.shapes)
    place = f'"{repo_id or "path/to/this/directory"}"'
    place += f', subfolder="{subfolder}"' if repo_id and subfolder else ""
    # what the Hub reads, in YAML, of which JSON strings are a part
    of_base = [f"base_model: {json.dumps(base)}", "base_model_relation: adapter"] if base else []
    front_matter = ["---", *of_base, "library_name: randlora", "tags:", "- randlora", "---"]
    figures = _figures(report, header, own.adapter.left_out)
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


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def _table(head: str, rows: Mapping[str, object]) -> str:
    cells = (tuple(" ".join(str(cell).split()).replace("|", r"\|") for cell in row) for row in rows.items())
    return "\n".join([head, "|---|---|", *(f"| {name} | {value} |" for name, value in cells)])


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
