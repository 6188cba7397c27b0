"""Processes that hold parts of one model: they agree on whether a call succeeds, and one of them writes files.

If only one process raised an error, the others would wait for it forever.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from randlora.errors import RandLoRAError

Result = TypeVar("Result")


class Ranks(NamedTuple):
    """The processes that together hold a model.

    Attributes:
        groups: Process groups that connect them, one for each dimension of their mesh.
        is_first: Whether this is the process that writes files.
    """

    groups: tuple[Any, ...]
    is_first: bool

    def gathered(self, value: object) -> list[Any]:
        """Return the values given by all processes, in the same order everywhere; a collective."""
        found = [value]
        for group in self.groups:
            lists: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(lists, found, group=group)
            found = [each for part in lists for each in part]
        return found


@contextmanager
def raise_on_every_rank(ranks: Ranks | None) -> Iterator[None]:
    """Raise an error in every process if the block raised one in any; a collective at the end of the block.

    The block itself must not contain collectives that an error could skip: `run_collectives` skips none.
    """
    if ranks is None:
        yield
        return
    try:
        yield
    except Exception as error:
        ranks.gathered(_portable(error))
        raise
    raise_first(ranks.gathered(None))


def run_collectives(collectives: Iterable[Callable[[], Any]]) -> list[Any]:
    """Call functions that all processes call together, and return their results.

    If one raises, such as for lack of memory, the remaining ones are called before its error is raised. The other
    processes call them too, and would otherwise wait for this process or mix up its part in two collectives.
    """
    results: list[Any] = []
    failed: Exception | None = None
    for collective in collectives:
        try:
            results.append(collective())
        except Exception as error:
            failed = failed or error
    if failed is not None:
        raise failed
    return results


def on_first_rank(ranks: Ranks | None, write: Callable[[], Result]) -> Result:
    """Call a function in one process while the others wait. All return its result or raise its error; a collective."""
    if ranks is None:
        return write()
    results: list[Result] = []
    with raise_on_every_rank(ranks):
        if ranks.is_first:
            results.append(write())
    (result,) = [each for own in ranks.gathered(results) for each in own]
    return result  # type: ignore[no-any-return]


def raise_first(errors: list[Exception | None]) -> None:
    """Raise the first error that a process reports, if any."""
    for error in errors:
        if error is not None:
            error.add_note("This was raised in another process, which holds a part of the same model.")
            raise error


def _portable(error: Exception) -> Exception:
    """Return an error that can be sent to another process."""
    try:
        copy.copy(error)
        pickle.dumps(error)
    except Exception:  # a class may raise anything when it is pickled
        return RandLoRAError(f"{type(error).__name__}: {error}")
    return error
