"""``python -m randlora`` and the script `randlora`: the command line, or advice on how to install it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from randlora.errors import how_to_install


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; see `randlora.cli.app.main`."""
    try:
        from randlora.cli import app  # noqa: PLC0415 (the library itself works without typer and rich)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in ("rich", "typer"):
            raise
        sys.stderr.write(f"error: the command line needs {missing}: {how_to_install('cli')}\n")
        return 1
    return app.main(args)


if __name__ == "__main__":
    sys.exit(main())
