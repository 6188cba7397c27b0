"""The model card: a README.md with an adapter's figures and how to load it, which the Hub reads too."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from randlora.checkpoint.base_model import repo_of
from randlora.checkpoint.format import Header
from randlora.layer_options import described
from randlora.report import Report, left_out_lines

MARK = "<!-- Written by randlora.save, which writes it anew at each save unless this line is gone. -->"


def write_card(
    report: Report,
    header: Header,
    *,
    base_model: str | None,
    peft_notes: Sequence[str],
    repo_id: str | None,
    subfolder: str | None = None,
) -> str:
    """Return the text of a model card.

    ``peft_notes`` are the reasons why PEFT cannot load the files; ``subfolder`` is where these are in the repository.
    """
    base = repo_of(base_model)
    place = f'"{repo_id or "path/to/this/directory"}"'
    place += f', subfolder="{subfolder}"' if repo_id and subfolder else ""
    # what the Hub reads, in YAML, of which JSON strings are a part
    of_base = [f"base_model: {json.dumps(base)}", "base_model_relation: adapter"] if base else []
    front_matter = ["---", *of_base, "library_name: randlora", "tags:", "- randlora", "---"]
    figures = (f"| {name} | {value} |" for name, value in _figures(report, header).items() if value)
    here = f"import randlora\n\nrandlora.load(model, {place})  # model: the base model as it was before training"
    there = f"from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(model, {place})"
    sections = [
        "\n".join(front_matter),
        MARK,
        f"# RandLoRA adapter of {base}" if base else "# RandLoRA adapter",
        "An adapter of the method [RandLoRA](https://arxiv.org/abs/2502.00987): trained scalings of random bases.",
        "\n".join(["| | |", "|---|---|", *figures]),
        "## Loading it",
        f"```python\n{here}\n```",
        "PEFT 0.21.2 does not load these files:" if peft_notes else "With PEFT:",
        "\n".join(f"- {note}" for note in peft_notes) or f"```python\n{there}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def is_ours(path: Path) -> bool:
    """Return whether a README.md is a generated model card that still has its mark."""
    return path.is_file() and MARK in path.read_text(encoding="utf-8", errors="replace").splitlines()


def _figures(report: Report, header: Header) -> dict[str, object]:
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
        "left out": "; ".join(line.removeprefix("left out: ") for line in left_out_lines(report)),
    }


def _by_rank(values: Mapping[int, object]) -> str:
    """Return the only value, or each with its r."""
    return ", ".join(f"{value} (r={r})" if len(values) > 1 else f"{value}" for r, value in values.items())


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
