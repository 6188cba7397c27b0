"""`randlora inspect`."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from randlora import files
from randlora.cli.shared import (
    AdapterDir,
    AsJson,
    BaseForShapes,
    FileStream,
    Prefix,
    plain,
    progress_bar,
    show,
    show_json,
)

Norms = Annotated[bool, Option(help="Compute every layer's update and its norms.")]


def inspect(
    adapter_dir: AdapterDir,
    base: BaseForShapes = None,
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
        summary = files.inspect(adapter_dir, base, prefix=prefix, stream=stream, norms=norms, progress=progress)
    if not as_json:
        show(summary)
        return
    layers = [{**plain(layer), "stable_rank": layer.stable_rank} for layer in summary.layers]  # which is not a field
    show_json({**plain(summary), "layers": layers})
