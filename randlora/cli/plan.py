"""`randlora plan`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from randlora import config
from randlora.cli.shared import AsJson, plain, show_json, show_table
from randlora.files.base_fit import open_base
from randlora.files.plan import plan_checkpoint, training_memory
from randlora.report import as_bytes
from randlora.targets.left_out import DOUBT

Model = Annotated[Path, Argument(help="Directory with `model.safetensors`, or with shards and their index.")]
Rank = Annotated[int, Option(help="Rank of one random basis; a smaller one trains more parameters.")]
Targets = Annotated[
    list[str] | None, Option(help="A name of layers, weights or modules; or `all-linear`, or `all`. May be repeated.")
]
Regex = Annotated[str | None, Option(help="A regex that matches whole names, in place of `--targets`.")]
Exclude = Annotated[list[str] | None, Option(help="A layer, or a module with the layers in it, to leave out.")]
TrainAlso = Annotated[list[str] | None, Option(help="A module or parameter to train with the adapter.")]
Alpha = Annotated[float | None, Option(help="The update is scaled by alpha / r; 20 r unless given.")]
Basis = Annotated[config.BasisKind, Option(help="Kind of random bases.")]
Stream = Annotated[config.Stream | None, Option(help="The stream of random numbers.")]
Blocks = Annotated[tuple[int, int] | None, Option(help="Blocks of A and of B, for `--basis block`.")]
Seed = Annotated[int, Option(help="Seed of the bases.")]


def plan(
    model_dir: Model,
    r: Rank = 32,
    targets: Targets = None,
    targets_regex: Regex = None,
    exclude: Exclude = None,
    train_also: TrainAlso = None,
    alpha: Alpha = None,
    basis: Basis = "dense",
    stream: Stream = None,
    blocks: Blocks = None,
    seed: Seed = 0,
    as_json: AsJson = False,  # noqa: FBT002
) -> None:
    """Print what an adapter of a model would be: layers, counts, bytes, and the memory that training needs.

    Builds the class that `config.json` names with transformers, on the meta device, and reads the headers of the
    safetensors files, but no weights, and runs no code that came with them. Without `--targets`, the usual layers of
    this type of model are adapted, and the report says what is left out.

    **Examples**

    `randlora plan Llama-3-8B`

    `randlora plan Llama-3-8B --r 16 --targets q_proj --targets v_proj`

    `randlora plan gpt2 --targets all-linear --basis block --json`
    """
    if targets and targets_regex is not None:
        raise typer.BadParameter("give --targets or --targets-regex, not both")
    base = open_base(model_dir)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", DOUBT, UserWarning)  # the report says it
        report = plan_checkpoint(
            base,
            r,
            targets=targets_regex or (targets[0] if targets in (["all-linear"], ["all"]) else targets or None),
            exclude=exclude or None,
            train_also=train_also or None,
            alpha=alpha,
            basis=basis,
            stream=stream,
            blocks=blocks,
            seed=seed,
        )
    memory = training_memory(report, base.directory)
    if as_json:
        show_json({**plain(report), "share": report.share, "training_memory": {**plain(memory), "total": memory.total}})
        return
    typer.echo(report)
    typer.echo("\nmemory for training, without activations:")
    sizes = {
        "the model, as stored": memory.weights,
        "the adapter": memory.parameters,
        "its gradients": memory.gradients,
        "AdamW": memory.optimizer,
        "bases": memory.bases,
        "together": memory.total,
    }
    show_table((), [(name, as_bytes(size)) for name, size in sizes.items()])
