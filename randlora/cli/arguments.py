"""Arguments of several commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

AdapterDir = Annotated[Path, Argument(help="Directory that `randlora.save` or PEFT wrote.")]
BaseForShapes = Annotated[
    Path | None,
    Option("--base", help="The base model's directory, whose headers give the shapes that PEFT does not store."),
]
Prefix = Annotated[
    str | None, Option(help="The prefix by which the names in the adapter and in the model differ, such as `bert`.")
]
