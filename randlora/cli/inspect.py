"""`randlora inspect`."""

from __future__ import annotations

from typing import Annotated

from typer import Option

import randlora
from randlora.cli.shared import (
    Adapter,
    AsJson,
    BaseForShapes,
    BaseRevision,
    FileStream,
    Prefix,
    Revision,
    plain,
    progress_bar,
    show,
    show_json,
)

Norms = Annotated[bool, Option(help="Compute every layer's update and its norms.")]


def inspect(
    adapter: Adapter,
    base: BaseForShapes = None,
    revision: Revision = None,
    base_revision: BaseRevision = None,
    prefix: Prefix = None,
    stream: FileStream = None,
    norms: Norms = True,  # noqa: FBT002
    as_json: AsJson = False,  # noqa: FBT002
) -> None:
    """Print what an adapter is: options, bases, layers, the norms of their updates, and which library wrote it.

    ‖ΔW‖F is the Frobenius norm of a layer's update, ‖ΔW‖2 its largest singular value, and the stable rank the square of
    their ratio, about the number of significant directions of the update.

    **Examples**

    `randlora inspect my-adapter`

    `randlora inspect from-peft --base Llama-3-8B`

    `randlora inspect my-adapter --no-norms --json`
    """
    with progress_bar() as progress:
        summary = randlora.files.inspect(
            adapter,
            base,
            revision=revision,
            base_revision=base_revision,
            prefix=prefix,
            stream=stream,
            norms=norms,
            progress=progress,
        )
    if not as_json:
        show(summary)
        return
    layers = [{**plain(layer), "stable_rank": layer.stable_rank} for layer in summary.layers]  # which is not a field
    show_json({**plain(summary), "layers": layers})
