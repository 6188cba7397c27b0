"""`randlora verify`."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Option

import randlora
from randlora.cli.shared import (
    Adapter,
    AsJson,
    BaseRevision,
    FileStream,
    Prefix,
    Revision,
    plain,
    progress_bar,
    show,
    show_json,
)

FAILED = 1

Base = Annotated[
    str | None,
    Option(help="Check also that this model has every layer, in the shape of the adapter."),
]


def verify(
    adapter: Adapter,
    base: Base = None,
    revision: Revision = None,
    base_revision: BaseRevision = None,
    prefix: Prefix = None,
    stream: FileStream = None,
    as_json: AsJson = False,  # noqa: FBT002
) -> None:
    """Check an adapter: names, shapes, values, checksums, and that the bases are reproduced.

    Of a base model only headers are read. The exit code is 1 if a check failed. PEFT stores no checksums: what cannot
    be checked without them is reported as not checked.

    **Examples**

    `randlora verify my-adapter`

    `randlora verify my-adapter --base Llama-3-8B --json`

    `randlora verify user/adapter --base meta-llama/Llama-3.2-1B`
    """
    with progress_bar() as progress:
        verification = randlora.files.verify(
            adapter,
            base,
            revision=revision,
            base_revision=base_revision,
            prefix=prefix,
            stream=stream,
            progress=progress,
        )
    if as_json:
        show_json({**plain(verification), "passed": verification.passed})
    else:
        show(verification)
    if not verification.passed:
        raise typer.Exit(FAILED)
