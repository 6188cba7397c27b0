"""What a call did: its result, or an error of ours. Whatever else it raises is a broken promise and goes through."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

from randlora.errors import RandLoRAError

Result = TypeVar("Result")


def outcome(call: Callable[[], Result]) -> Result | RandLoRAError:
    """Return the result of a call, or the error of ours that it raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call()
        except RandLoRAError as error:
            str(error).encode("utf-8", "backslashreplace")
            return error
