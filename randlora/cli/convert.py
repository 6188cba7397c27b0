"""`randlora convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

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
from randlora.options import Component, Format, Layout

Out = Annotated[Path, Argument(help="The directory to write.")]
To = Annotated[Format, Option(help="What to write.")]
ForReader = Annotated[
    Layout | None,
    Option("--format", help="For `lora`: whose files to write.  [default: peft]"),
]
SameRank = Annotated[
    bool,
    Option("--same-rank", help="For `lora`: pad all factors with zeros to one rank: SGLang and llama.cpp need it."),
]
Part = Annotated[
    Component | None,
    Option(
        "--component",
        help="For `diffusers` and `diff`: the pipeline's model that the adapter is for.  [default: by its names]",
    ),
]
Rank = Annotated[int | None, Option(help="For `lora`: the rank of every layer.")]
Tolerance = Annotated[
    float | None, Option(help="For `lora`: the largest relative error of a layer's update.  [default: 0.05]")
]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace an adapter in OUT.")]


def convert(
    adapter: Adapter,
    out: Out,
    to: To,
    layout: ForReader = None,
    rank: Rank = None,
    tolerance: Tolerance = None,
    same_rank: SameRank = False,  # noqa: FBT002
    component: Part = None,
    base: BaseForShapes = None,
    revision: Revision = None,
    base_revision: BaseRevision = None,
    prefix: Prefix = None,
    stream: FileStream = None,
    overwrite: Overwrite = False,  # noqa: FBT002
    as_json: AsJson = False,  # noqa: FBT002
) -> None:
    """Write an adapter in another format: `peft`, `native`, `lora` or `diff`.

    PEFT can load `peft`; the file holds the bases if PEFT would draw others. `native` has checksums, and the bases only
    if no seed reproduces them. Both are exact.

    `lora` is for servers that read nothing else: a low-rank approximation of each layer's update. Every layer's error
    is printed. If one exceeds the tolerance, nothing is written. With `--rank`, every layer has that rank, without it
    the smallest within the tolerance. `--format` tells whose files to write: those of PEFT, which vLLM, SGLang and
    llama.cpp's converter read too, of diffusers or of mlx-lm.

    `diff` has every update in full, under ComfyUI's keys: exact, and as large as the weights.

    **Examples**

    `randlora convert my-adapter for-peft --to peft`

    `randlora convert from-peft mine --to native --base Llama-3-8B`

    `randlora convert my-adapter a-lora --to lora --rank 64 --tolerance 0.3`

    `randlora convert my-adapter for-pipeline --to lora --format diffusers`
    """
    with progress_bar() as progress:
        report = randlora.files.convert(
            adapter,
            out,
            to,
            format=layout,
            rank=rank,
            tolerance=tolerance,
            same_rank=same_rank,
            component=component,
            base=base,
            revision=revision,
            base_revision=base_revision,
            prefix=prefix,
            stream=stream,
            overwrite=overwrite,
            progress=progress,
        )
    show_json({**plain(report), "relative_error": report.relative_error}) if as_json else show(report)
