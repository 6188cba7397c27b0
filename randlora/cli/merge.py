"""`randlora merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from typer import Option

from randlora import files
from randlora.cli.shared import AsJson, FileStream, Prefix, progress_bar, show, show_json

Base = Annotated[Path, Option(help="The model's directory, which does not change.")]
Adapters = Annotated[list[Path], Option("--adapter", help="An adapter's directory. May be repeated: updates add.")]
Out = Annotated[Path, Option(help="The directory to create; it must not exist.")]
Scales = Annotated[list[float] | None, Option("--scale", help="Factor of the update, one for each `--adapter`.")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16", "float64"] | None, Option(help="Cast every floating tensor.")
]


def merge(
    base: Base,
    adapters: Adapters,
    out: Out,
    scales: Scales = None,
    dtype: Dtype = None,
    prefix: Prefix = None,
    stream: FileStream = None,
    as_json: AsJson = False,  # noqa: FBT002
) -> None:
    """Merge adapters into a model's checkpoint, without loading the model.

    Reads the safetensors files tensor by tensor and writes a new directory, with a copy of index, config, tokenizer and
    other files. The weights are, bit for bit, those of loading, merging and saving. The directory appears when it is
    complete; after a kill, run the same command again.

    A model quantized by bitsandbytes is dequantized.

    **Examples**

    `randlora merge --base Llama-3-8B --adapter my-adapter --out merged`

    `randlora merge --base Llama-3-8B --adapter a --scale 0.7 --adapter b --scale 0.3 --out merged --dtype bfloat16`
    """
    scales = scales or [1.0] * len(adapters)
    if len(scales) != len(adapters):
        raise typer.BadParameter(f"expected one --scale for each --adapter, got {len(scales)} for {len(adapters)}")
    if len(set(adapters)) != len(adapters):
        raise typer.BadParameter("an --adapter is given twice: give it a larger --scale")
    with progress_bar() as progress:
        report = files.merge(
            base,
            dict(zip(adapters, scales, strict=True)),
            out,
            dtype=None if dtype is None else getattr(torch, dtype),
            prefix=prefix,
            stream=stream,
            progress=progress,
        )
    show_json(report) if as_json else show(report)
