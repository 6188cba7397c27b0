"""`randlora verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from randlora import files
from randlora.cli.arguments import AdapterDir
from randlora.cli.output import AsJson, plain, progress_bar, show, show_json

FAILED = 1

Base = Annotated[Path | None, Option(help="Check also that this model has every layer, in the shape of the adapter.")]


def verify(adapter_dir: AdapterDir, base: Base = None, as_json: AsJson = False) -> None:  # noqa: FBT002
    """Check an adapter: names, shapes, values, checksums, and that the bases come out as they were.

    Of a base model headers are read, no weights. The exit code is 1 where a check failed. A file of PEFT's carries no
    checksum, and what nothing can be held against is said to be not checked.

    **Examples**

    `randlora verify my-adapter`

    `randlora verify my-adapter --base Llama-3-8B --json`
    """
    with progress_bar() as progress:
        verification = files.verify(adapter_dir, base, progress=progress)
    if as_json:
        show_json({**plain(verification), "passed": verification.passed})
    else:
        show(verification)
    if not verification.passed:
        raise typer.Exit(FAILED)
