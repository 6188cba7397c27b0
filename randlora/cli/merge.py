"""`randlora merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

import randlora
from randlora.cli.shared import (
    AsJson,
    BaseRevision,
    FileStream,
    Prefix,
    Revision,
    dtype_of,
    progress_bar,
    show,
    show_json,
)

Adapters = Annotated[
    list[str], Argument(metavar="ADAPTER...", help="Directories of adapters, or `user/repo` on the Hub. Updates add.")
]
Out = Annotated[Path, Argument(help="The directory to create; it must not exist.")]
Base = Annotated[str, Option(help="The model: a directory, which does not change, or `org/name` on the Hub.")]
Scales = Annotated[list[float] | None, Option("--scale", help="Factor of the update, one for each adapter, in order.")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16", "float64"] | None, Option(help="Cast every floating tensor.")
]


def merge(
    adapters: Adapters,
    out: Out,
    base: Base,
    scales: Scales = None,
    dtype: Dtype = None,
    revision: Revision = None,
    base_revision: BaseRevision = None,
    prefix: Prefix = None,
    stream: FileStream = None,
    as_json: AsJson = False,  # noqa: FBT002
) -> None:
    """Merge adapters into a model's checkpoint, without loading the model.

    Reads the safetensors files tensor by tensor and writes a new directory, with a copy of index, config, tokenizer and
    other files. The weights are, bit for bit, those of loading, merging and saving. The directory appears when it is
    complete; after a kill, run the same command again.

    A model quantized by bitsandbytes is dequantized. A new head that was trained with an adapter is written, too.

    **Examples**

    `randlora merge my-adapter merged --base Llama-3-8B`

    `randlora merge user/adapter merged --base meta-llama/Llama-3.2-1B`

    `randlora merge a b merged --base Llama-3-8B --scale 0.7 --scale 0.3 --dtype bfloat16`
    """
    scales = scales or [1.0] * len(adapters)
    if len(scales) != len(adapters):
        raise typer.BadParameter(f"expected one --scale for each adapter, got {len(scales)} for {len(adapters)}")
    if len(set(adapters)) != len(adapters):
        raise typer.BadParameter("an adapter is given twice: give it a larger --scale")
    with progress_bar() as progress:
        report = randlora.files.merge(
            base,
            dict(zip(adapters, scales, strict=True)),
            out,
            dtype=dtype_of(dtype),
            revision=revision,
            base_revision=base_revision,
            prefix=prefix,
            stream=stream,
            progress=progress,
        )
    show_json(report) if as_json else show(report)
