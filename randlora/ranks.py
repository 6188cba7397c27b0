"""Processes that hold parts of one model: they agree on whether a call succeeds, and one of them writes files.

If only one process raised an error, the others would wait for it forever.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from randlora.errors import RandLoRAError

Result = TypeVar("Result")


class Ranks(NamedTuple):
    """The processes that together hold a model, in a process group for each dimension of their mesh."""

    groups: tuple[Any, ...]
    is_first: bool  # whether this is the process that writes files

    def gathered(self, value: object) -> list[Any]:
        """Return the values given by all processes, in the same order everywhere; a collective."""
        found = [value]
        for group in self.groups:
            lists: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(lists, found, group=group)
            found = [value for values in lists for value in values]
        return found


class _Block(NamedTuple):
    """An open block of `raise_on_every_rank`: its processes, and the errors in it that all of them know."""

    ranks: Ranks
    known: list[Exception]

    def knows(self, error: BaseException | None) -> bool:
        """Whether all processes know an error, or one that it was raised for."""
        seen: list[BaseException] = []
        while error is not None and error not in seen:
            seen.append(error)
            error = error.__cause__ or error.__context__
        return any(one in self.known for one in seen)


_BLOCK: ContextVar[_Block | None] = ContextVar("_BLOCK", default=None)  # the outermost that is open in this thread


def agreeing() -> Ranks | None:
    """Return the processes that run the current block of `raise_on_every_rank` together, or ``None`` outside of one."""
    block = _BLOCK.get()
    return None if block is None else block.ranks


@contextmanager
def raise_on_every_rank(ranks: Ranks | None) -> Iterator[None]:
    """Raise an error in every process if the block raised one in any; a collective at the end of the block.

    A process may raise an error wherever the next thing that the others do together is to agree: by `agree`, or at the
    end of this block or of one inside it. So what they compute together comes right after `agree`, by
    `run_collectives`. An error that all know must leave the outermost block; on its way nobody is told again.
    """
    block = _BLOCK.get() or (None if ranks is None else _Block(ranks, []))
    if block is None:
        yield
        return
    token = _BLOCK.set(block)
    try:
        yield
        agree()
    except Exception as error:
        if not block.knows(error):
            block.known.append(error)
            block.ranks.gathered((_portable(error), None))
        raise
    finally:
        _BLOCK.reset(token)


@contextmanager
def alone() -> Iterator[None]:
    """Have the functions called in the block, which must gather nothing, agree with no other process."""
    token = _BLOCK.set(_Block(Ranks((), is_first=True), []))
    try:
        yield
    finally:
        _BLOCK.reset(token)


def agree(value: object = None) -> list[Any]:
    """Raise the first error that another process of the block has raised; else return all values; a collective."""
    if (block := _BLOCK.get()) is None:
        return [value]
    answers = block.ranks.gathered((None, value))
    for error, _ in answers:
        if error is not None:
            error.add_note("This was raised in another process, which holds a part of the same model.")
            block.known.append(error)
            raise error
    return [answer for _, answer in answers]


def run_collectives(collectives: Iterable[Callable[[], Any]]) -> list[Any]:
    """Call functions that all processes call together, and return their results, or raise the first error after all."""
    results: list[Any] = []
    failed: Exception | None = None
    for collective in collectives:
        try:
            results.append(collective())
        except Exception as error:
            if _BLOCK.get() is None:  # nobody waits
                raise
            failed = failed or error  # the other processes go on, and would mix up this one's part in two collectives
    if failed is not None:
        raise failed
    return results


def on_first_rank(write: Callable[[], Result]) -> Result:
    """Call a function in one process while the others wait. All return its result or raise its error; a collective."""
    ranks = agreeing()
    agree()  # before anything is written
    results = agree([write()] if ranks is None or ranks.is_first else [])
    (result,) = (result for written in results for result in written)
    return result  # type: ignore[no-any-return]


def _portable(error: Exception) -> Exception:
    """Return an error that can be sent to another process."""
    try:
        copy.copy(error)
        pickle.dumps(error)
    except Exception:  # a class may raise anything when it is pickled
        return RandLoRAError(f"{type(error).__name__}: {error}")
    return error
