"""`randlora convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

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
from randlora.files.convert import Format

Out = Annotated[Path, Argument(help="The directory to write.")]
To = Annotated[Format, Option(help="What to write.")]
Rank = Annotated[int | None, Option(help="For `lora`: the rank of every layer.")]
Tolerance = Annotated[
    float | None, Option(help="For `lora`: the largest relative error of a layer's update.  [default: 0.05]")
]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace an adapter in OUT.")]


def convert(
    adapter_dir: AdapterDir,
    out: Out,
    to: To,
    rank: Rank = None,
    tolerance: Tolerance = None,
    base: BaseForShapes = None,
    prefix: Prefix = None,
    stream: FileStream = None,
    overwrite: Overwrite = False,  # noqa: FBT002
    as_json: AsJson = False,  # noqa: FBT002
) -> None:
    """Write an adapter in another format: `peft`, `native` or `lora`.

    PEFT can load `peft`; the file holds the bases if PEFT would draw others. `native` has checksums, and the bases only
    if no seed reproduces them. Both are exact.

    `lora` is a PEFT LoRA, for servers that read nothing else: a low-rank approximation of each layer's update. Every
    layer's error is printed. If one exceeds the tolerance, nothing is written. With `--rank`, every layer has that
    rank, without it the smallest within the tolerance.

    **Examples**

    `randlora convert my-adapter for-peft --to peft`

    `randlora convert from-peft mine --to native --base Llama-3-8B`

    `randlora convert my-adapter a-lora --to lora --rank 64 --tolerance 0.3`
    """
    with progress_bar() as progress:
        report = files.convert(
            adapter_dir,
            out,
            to,
            rank=rank,
            tolerance=tolerance,
            base=base,
            prefix=prefix,
            stream=stream,
            overwrite=overwrite,
            progress=progress,
        )
    show_json({**plain(report), "relative_error": report.relative_error}) if as_json else show(report)
