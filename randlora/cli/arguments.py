"""What several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

AdapterDir = Annotated[Path, Argument(help="Directory that `randlora.save` or PEFT wrote.")]
BaseForShapes = Annotated[
    Path | None,
    Option("--base", help="The base model's directory, whose headers say the shapes that PEFT does not write."),
]
