"""`randlora plan`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar

import typer
from typer import Argument, Option

from randlora import options as choices
from randlora.cli.shared import AsJson, dtype_of, plain, show, show_json, show_table

_Number = TypeVar("_Number", int, float)

Model = Annotated[
    str, Argument(help="Directory with `model.safetensors` or with shards and their index, or `org/name` on the Hub.")
]
Revision = Annotated[str | None, Option(help="Branch, tag or commit of the repository on the Hub.")]
Rank = Annotated[
    list[str] | None,
    Option(
        help="Rank of one random basis; a smaller one trains more parameters. `PATTERN=RANK` is for the layers of a "
        "name or regex, and may be repeated: the first that matches applies.  [default: 32]"
    ),
]
LikeLora = Annotated[
    int | None, Option(help="Rank of a LoRA on the same layers, to choose `--r` with as many parameters.")
]
Targets = Annotated[
    list[str] | None,
    Option(help="Names of layers, weights, modules, with commas between; or `all-linear`, or `all`."),
]
Regex = Annotated[str | None, Option(help="A regex that matches whole names, in place of `--targets`.")]
Exclude = Annotated[list[str] | None, Option(help="Layers, or modules with the layers in them, to leave out.")]
TrainAlso = Annotated[list[str] | None, Option(help="Modules or parameters to train with the adapter.")]
Alpha = Annotated[
    list[str] | None,
    Option(help="The update is scaled by alpha / r; 20 r unless given. Or `PATTERN=ALPHA`, as for `--r`."),
]
Basis = Annotated[choices.BasisKind, Option(help="Kind of random bases.")]
Stream = Annotated[choices.Stream | None, Option(help="The stream of random numbers.")]
Blocks = Annotated[tuple[int, int] | None, Option(help="Blocks of A and of B, for `--basis block`.")]
Seed = Annotated[int, Option(help="Seed of the bases.")]
InProj = Annotated[choices.InProj, Option(help="Attention's `in_proj_weight` as one matrix, or split into three.")]
Experts = Annotated[choices.Experts, Option(help="A Λ and a Γ for each of a stack of experts, or shared by all.")]
Dropout = Annotated[float, Option(help="Dropout on the adapter's input in training.")]
Init = Annotated[choices.Init, Option(help="Which of Λ and Γ starts at zero and moves first.")]
Devices = Annotated[int, Option(help="Number of devices that train together.")]
Divided = Annotated[choices.Strategy, Option(help="How the model is divided among them: `ddp` not at all.")]
Tokens = Annotated[int, Option(help="Tokens of a step on each device, for what layers keep, logits and the work.")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    Option(help="The dtype to hold the model in and to compute in; as stored unless given."),
]
States = Annotated[int, Option(help="Numbers that the optimizer keeps for each trained one: 2 for AdamW.")]
Checkpointing = Annotated[bool, Option("--checkpointing", help="Blocks are computed again in backward.")]


def plan(
    model: Model,
    revision: Revision = None,
    r: Rank = None,
    like_lora: LikeLora = None,
    targets: Targets = None,
    targets_regex: Regex = None,
    exclude: Exclude = None,
    train_also: TrainAlso = None,
    alpha: Alpha = None,
    basis: Basis = "dense",
    stream: Stream = None,
    blocks: Blocks = None,
    seed: Seed = 0,
    in_proj: InProj = "packed",
    experts: Experts = "each",
    dropout: Dropout = 0.0,
    init: Init = "lambda",
    devices: Devices = 1,
    strategy: Divided = "ddp",
    tokens: Tokens = 0,
    dtype: Dtype = None,
    optimizer_states: States = 2,
    checkpointing: Checkpointing = False,  # noqa: FBT002
    as_json: AsJson = False,  # noqa: FBT002
) -> None:
    """Print what an adapter of a model would be: layers, counts, bytes, and the memory that training needs.

    Builds the class that `config.json` names with transformers, on the meta device, and reads the headers of the
    safetensors files, but no weights, and runs no code that came with them. Without `--targets`, the usual layers of
    this type of model are adapted, and the report says what is left out.

    **Examples**

    `randlora plan Llama-3-8B`

    `randlora plan meta-llama/Llama-3.2-1B --r 16 --targets q_proj,v_proj`

    `randlora plan gpt2 --targets all-linear --basis block --json`

    `randlora plan Llama-3-8B --like-lora 32`

    `randlora plan gpt2 --r c_attn=16 --r ".*=32"`

    `randlora plan Llama-3-70B --devices 8 --strategy fsdp2 --tokens 4096 --checkpointing`
    """
    # these import torch, which takes seconds, and `--help` should not
    from randlora.files.base_fit import open_base  # noqa: PLC0415
    from randlora.files.plan import checkpoint_memory, plan_checkpoint  # noqa: PLC0415
    from randlora.targets.left_out import DOUBT  # noqa: PLC0415

    if targets and targets_regex is not None:
        raise typer.BadParameter("give --targets or --targets-regex, not both")
    ranks, alphas = _by_pattern("--r", r, int), _by_pattern("--alpha", alpha, float)
    names = _names(targets)
    options: dict[str, Any] = {
        "like_lora": like_lora,
        "targets": targets_regex or (names[0] if names in (["all-linear"], ["all"]) else names),
        "exclude": _names(exclude),
        "train_also": _names(train_also),
        "alpha": alphas,
        "basis": basis,
        "stream": stream,
        "blocks": blocks,
        "seed": seed,
        "in_proj": in_proj,
        "experts": experts,
        "dropout": dropout,
    }
    setup = {
        "devices": devices,
        "strategy": strategy,
        "tokens": tokens,
        "dtype": dtype_of(dtype),
        "optimizer_states": optimizer_states,
        "checkpointing": checkpointing,
    }
    base = open_base(model, revision)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", DOUBT, UserWarning)  # the report says it
        report = plan_checkpoint(base, ranks, init=init, **options)
        memory = checkpoint_memory(base, ranks, **options, **setup)
    if as_json:
        show_json({**plain(report), "share": report.share, "training_memory": {**plain(memory), "total": memory.total}})
        return
    show(report)
    typer.echo(f"\n{memory.title}")
    show_table((), memory.lines)
    for note in memory.notes:
        show(note)


def _names(given: Sequence[str] | None) -> list[str] | None:
    """Return the names of an option that takes several, with commas between them or repeated."""
    return [name for text in given or () for name in text.split(",") if name] or None


def _by_pattern(
    option: str, given: Sequence[str] | None, number: Callable[[str], _Number]
) -> _Number | dict[str, _Number] | None:
    """Return the number given, or a dict of those given as ``PATTERN=NUMBER``, or ``None`` if none was given."""
    split = [text.rpartition("=") for text in given or ()]
    if len(split) > 1 and any(not separator for _, separator, _ in split):
        raise typer.BadParameter(f"{option} is given several times: expected PATTERN=NUMBER each time")
    if len({pattern for pattern, _, _ in split}) < len(split):
        raise typer.BadParameter(f"{option} is given twice for one pattern")
    try:
        numbers = {pattern: number(text) for pattern, _, text in split}
    except ValueError as error:
        raise typer.BadParameter(f"{option} must be a number or PATTERN=NUMBER: {error}") from error
    return numbers[""] if any(not separator for _, separator, _ in split) else numbers or None
