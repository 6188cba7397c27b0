"""The commands, each of which calls the verb of its name in `randlora.files`, and what the command line adds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from inspect import Parameter as Signed
from inspect import Signature
from typing import Annotated, Any, NamedTuple

import typer

import randlora
from randlora.cli.output import plain, progress_bar, show, show_json
from randlora.cli.verb import Parameter, read_verb
from randlora.errors import ConfigError, spelled

FAILED = 1
"""The exit code of checks that failed, as of errors with files."""

AS_JSON = Signed(
    "as_json",
    Signed.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")],
)

Printed = tuple[str, dict[str, Any]]
"""A result as text and as JSON."""


class Command(NamedTuple):
    """A command: the verb of its name.

    Attributes:
        examples: Command lines, each without the program and the command.
        action: What it calls with the values of its parameters, if not the verb alone.
        file: Where the verb is, if not in the file of its name in ``files/``.
        others: Files and names of functions of which it has the parameters too, with their descriptions.
        own: Parameters that are others on a command line, or that only it has.
    """

    examples: tuple[str, ...]
    action: Callable[..., Printed] | None = None
    file: str = ""
    others: tuple[tuple[str, str], ...] = ()
    own: tuple[Parameter, ...] = ()

    def callback(self, name: str) -> Callable[..., None]:
        """Return the function that typer calls."""
        verb = self.file or f"files/{name}", name
        action = self.action or partial(_call, name)
        parameters = {parameter.name: parameter for parameter in self.own}
        for each in (*self.others, verb):
            for parameter in read_verb(*each)[1].values():
                parameters.setdefault(parameter.name, parameter)

        def run(*, as_json: bool, **given: Any) -> None:
            text, facts = action(**{option: parameters[option].value(words) for option, words in given.items()})
            show_json(facts) if as_json else show(text)
            if facts.get("passed") is False:
                raise typer.Exit(FAILED)

        about, _ = read_verb(*verb)
        described = f"Print{about.removeprefix('Return')}" if about.startswith("Return ") else about
        examples = (f"`randlora {name} {example}`" for example in self.examples)
        run.__doc__ = "\n\n".join([described, "**Examples**", *examples])
        signed = [*(parameter.signed() for parameter in parameters.values()), AS_JSON]
        vars(run)["__signature__"] = Signature(signed)
        run.__annotations__ = {each.name: each.annotation for each in signed}
        return run


def _call(name: str, **given: Any) -> Printed:
    """Call a verb, and return its report."""
    with progress_bar() as progress:
        report = getattr(randlora.files, name)(**given, progress=progress)
    return str(report), plain(report)


def _merge(adapters: Sequence[str], scale: Sequence[float] | None, **given: Any) -> Printed:
    if scale is None:
        return _call("merge", adapters=adapters, **given)
    if len(scale) != len(adapters):
        raise ConfigError(f"expected one {spelled('scale')} for each adapter, got {len(scale)} for {len(adapters)}")
    scales = dict(zip(adapters, scale, strict=True))
    if len(scales) < len(adapters):
        raise ConfigError(f"an adapter is given twice: give it a larger {spelled('scale')}")
    return _call("merge", adapters=scales, **given)


def _plan(**given: Any) -> Printed:
    # these import torch, which takes seconds, and `--help` should not
    from randlora.files.plan import checkpoint_memory, open_to_plan, plan_checkpoint  # noqa: PLC0415
    from randlora.targets.left_out import DOUBT  # noqa: PLC0415

    setup = {name: given.pop(name) for name in read_verb(*MEMORY)[1].keys() & given.keys() - {"r", "like_lora"}}
    base = open_to_plan(*(given.pop(name) for name in ("directory", "revision", "model_class", "num_labels")))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", DOUBT, UserWarning)  # the report says it
        report, memory = plan_checkpoint(base, **given), checkpoint_memory(base, **given, **setup)
    return f"{report}\n\n{memory}", {**plain(report), "training_memory": plain(memory)}


def _demo(**given: Any) -> Printed:
    from randlora.cli.demo import demo  # noqa: PLC0415 - it imports torch, too

    return demo(**given)


MEMORY = "model/memory", "training_memory"

COMMANDS = {
    "plan": Command(
        (
            "Llama-3-8B",
            "meta-llama/Llama-3.2-1B --r 16 --targets q_proj,v_proj",
            "gpt2 --targets all-linear --basis block --json",
            "Llama-3-8B --like-lora 32",
            'gpt2 --r c_attn=16 --r ".*=32"',
            "Llama-3-70B --devices 8 --strategy fsdp2 --tokens 4096 --checkpointing",
        ),
        _plan,
        others=(("model/inject", "inject"), MEMORY),
    ),
    "merge": Command(
        (
            "my-adapter merged --base Llama-3-8B",
            "user/adapter merged --base meta-llama/Llama-3.2-1B",
            "my-adapter merged --overwrite",
            "a b merged --base Llama-3-8B --scale 0.7 --scale 0.3 --dtype bfloat16",
        ),
        _merge,
        own=(
            Parameter(
                "adapters",
                Sequence[str],
                Signed.empty,
                "Directories of adapters, or `user/repo` on the Hub. Updates add.",
                is_option=False,
            ),
            Parameter("scale", Sequence[float] | None, None, "Factor of the update, one for each adapter, in order."),
        ),
    ),
    "inspect": Command(("my-adapter", "from-peft --base Llama-3-8B", "my-adapter --no-norms --json")),
    "verify": Command((
        "my-adapter",
        "my-adapter --base Llama-3-8B --json",
        "user/adapter --base meta-llama/Llama-3.2-1B",
    )),
    "convert": Command((
        "my-adapter for-peft --to peft",
        "from-peft mine --to native --base Llama-3-8B",
        "my-adapter a-lora --to lora --rank 64 --tolerance 0.3",
        "my-adapter for-pipeline --to lora --format diffusers",
    )),
    "demo": Command(("--keep first-adapter", "--json"), _demo, "cli/demo"),
}
