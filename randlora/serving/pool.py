"""`AdapterPool`: more adapters than fit in a model, loaded when they are needed; the least recently used go first."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from randlora.checkpoint.load import Found, Options, Source, adapters_in, add_all, read_source
from randlora.errors import AdapterError, ConfigError, raise_collected
from randlora.hints import require_types, shortly
from randlora.model.engines import together
from randlora.model.switch import remove
from randlora.ranks import agree, alone
from randlora.report import Report
from randlora.serving.routed import routed
from randlora.state import adapted_root, is_adapted
from randlora.targets.match import nearest_names


@dataclass(frozen=True)
class PoolStats:
    """Counters of an `AdapterPool` since it was made, and its current contents.

    Attributes:
        hits: How often the model already had a requested adapter.
        misses: How often it did not.
        loads: How many adapters were loaded.
        failures: How often loading failed.
        evictions: How many adapters were removed to make room.
        seconds_loading: How long callers waited for adapters to be read and added.
        loaded: The adapters that the model has now.
        nbytes: Bytes of their Λ and Γ and the parameters of ``train_also``, without the bases, which they share.
    """

    hits: int = 0
    misses: int = 0
    loads: int = 0
    failures: int = 0
    evictions: int = 0
    seconds_loading: float = 0.0
    loaded: int = 0
    nbytes: int = 0


class AdapterPool:
    """Loads adapters into a model when they are needed, and removes the least recently used ones.

    All calls of the model must go through the pool, in blocks of `routed` or `using`. One thread at a time is in a
    block; others wait. The pool does not touch other adapters of the model. If the model is sharded, all processes
    enter the blocks together, each with its own adapters.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> _ = randlora.inject(model, r=4)
        >>> state = randlora.adapter_state(model)
        >>> states = {"a": state, "b": state}
        >>> pool = randlora.serving.AdapterPool(model, states, max_loaded=2)
        >>> with pool.routed(["a", "b", None]):
        ...     y = model(torch.randn(3, 8))
        >>> pool.stats().loads
        2
    """

    def __init__(
        self,
        model: nn.Module,
        sources: Mapping[str, Source] | str | os.PathLike[str],
        *,
        max_loaded: int,
        prefix: str | None = None,
    ) -> None:
        """Make a pool, without loading anything.

        Args:
            model: The model that the adapters were trained on.
            sources: For each name a directory, a repository on the Hub, or what `randlora.adapter_state` returned. Or a
                directory of adapters in subdirectories with their names, as `randlora.save_all` writes them; it is read
                again for a name that was not there.
            max_loaded: The largest number of them in the model at once, including those being loaded.
            prefix: The prefix by which the names in the files and in the model differ, as for `randlora.load`.

        Raises:
            ConfigError: If an option has a wrong type, or ``max_loaded`` is less than 1.
            CheckpointError: If ``sources`` is a directory without adapters.
        """
        given = {"model": model, "sources": sources, "max_loaded": max_loaded, "prefix": prefix}
        require_types(AdapterPool.__init__, given)
        if max_loaded < 1:
            raise ConfigError(f"max_loaded must be at least 1, got {max_loaded}")
        self._model, self._max, self._prefix = model, max_loaded, prefix
        self._directory = None if isinstance(sources, Mapping) else Path(sources)
        self._sources: dict[str, Source] = {}
        self._sources.update(sources if isinstance(sources, Mapping) else adapters_in(Path(sources)))
        self._using = threading.RLock()
        self._pinned: list[str] = []
        self._loaded: OrderedDict[str, int] = OrderedDict()  # bytes by name, those used last at the end
        self._reading = threading.Lock()
        self._reader: ThreadPoolExecutor | None = None
        self._ahead: OrderedDict[str, Future[Found]] = OrderedDict()
        self._stats = PoolStats()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all adapters, loaded or not."""
        return tuple(self._sources)

    @property
    def loaded(self) -> tuple[str, ...]:
        """The names of the adapters that the model has, the most recently used last."""
        return tuple(self._loaded)

    def stats(self) -> PoolStats:
        """Return the counters. Any thread may call this, and it does not wait for a block to end."""
        return self._stats

    def prefetch(self, names: str | Sequence[str]) -> None:
        """Start reading adapters in a different thread, so that the next block that needs them waits less.

        This returns at once and does not touch the model. The contents are kept until a block needs them, for at most
        ``max_loaded`` adapters. If reading fails, that block raises the error.

        Args:
            names: The adapters' names. Adapters that are loaded or being read are skipped.

        Raises:
            AdapterError: If a name is unknown, or there are more than ``max_loaded`` names.
        """
        require_types(AdapterPool.prefetch, {"names": names})
        wanted = list(dict.fromkeys([names] if isinstance(names, str) else names))
        self._check(wanted, wanted, "prefetch")
        with self._reading:
            for name in wanted:
                if name in self._loaded or name in self._ahead:
                    continue
                if self._reader is None:
                    self._reader = ThreadPoolExecutor(1, thread_name_prefix="randlora-prefetch")
                self._ahead[name] = self._reader.submit(read_source, self._sources[name])
                while len(self._ahead) > self._max:
                    self._ahead.popitem(last=False)[1].cancel()

    @contextmanager
    def routed(self, names: Sequence[str | None] | Sequence[Sequence[str | None]]) -> Iterator[None]:
        """Run each row of a batch through its own adapter inside a ``with`` block. Missing adapters are loaded.

        Args:
            names: As for `randlora.serving.routed`.

        Raises:
            AdapterError: If a name is unknown, there are more adapters than ``max_loaded`` in all open blocks, or
                `randlora.serving.routed` refuses them. Nothing is loaded in the first two cases.
            CheckpointError: If an adapter cannot be loaded; the message names its files. The model then has the same
                adapters as before.
        """
        wanted = _named(names)
        with self.using(wanted), ExitStack() as block:
            with together(self._model, writes=True):
                has_adapters = bool(wanted) or is_adapted(self._model)
                with nullcontext() if all(agree(has_adapters)) else alone():
                    if has_adapters:
                        block.enter_context(routed(self._model, names))
            yield

    @contextmanager
    def using(self, names: str | Sequence[str]) -> Iterator[None]:
        """Keep adapters loaded inside a ``with`` block, for the caller to use, such as with `activate`.

        Use it for adapters that `randlora.serving.routed` does not support, such as those with ``train_also``. No other
        thread is in a block at the same time.

        Args:
            names: The adapters' names.

        Raises:
            AdapterError: If a name is unknown, or there are more adapters than ``max_loaded`` in all open blocks.
            CheckpointError: If an adapter cannot be loaded. The model then has the same adapters as before.
        """
        require_types(AdapterPool.using, {"names": names})
        wanted = list(dict.fromkeys([names] if isinstance(names, str) else names))
        with self._using:
            with together(self._model, writes=True):
                self._check(wanted, {*wanted, *self._pinned}, "use")
                self._forget_removed()
            self._pinned += wanted
            try:
                self._provide(wanted)
                self._make_room()
                yield
            finally:
                for name in wanted:
                    self._pinned.remove(name)

    def _check(self, names: Sequence[str], together: Iterable[str], doing: str) -> None:
        """Check that adapters are known, and not too many together; else raise `AdapterError`."""
        if self._directory is not None and any(name not in self._sources for name in names):
            self._sources.update(adapters_in(self._directory))
        problems = [
            f"the pool has no adapter named {shortly(name)}; the nearest are {nearest_names(str(name), self._sources)}"
            for name in names
            if name not in self._sources
        ]
        if (count := len({*together})) > self._max:
            problems.append(f"{count} adapters are asked for at once, and the pool loads {self._max}: raise max_loaded")
        raise_collected(AdapterError, problems, doing=f"{doing} adapters of the pool")

    def _forget_removed(self) -> None:
        """Forget the adapters that somebody else has removed from the model."""
        present = adapted_root(self._model)[1].adapters if is_adapted(self._model) else {}
        for name in [name for name in self._loaded if name not in present]:
            del self._loaded[name]

    def _provide(self, names: Sequence[str]) -> None:
        """Load the adapters that are missing, which may be others in each of several processes."""
        missing = [name for name in names if name not in self._loaded]
        self._count(hits=len(names) - len(missing), misses=len(missing))
        begin = time.perf_counter()
        try:
            self._load(missing)
        except BaseException:
            self._count(failures=bool(missing))
            raise
        finally:
            self._count(seconds_loading=time.perf_counter() - begin if missing else 0)
        for name in names:
            self._loaded.move_to_end(name)

    def _load(self, names: Sequence[str]) -> None:
        """Load some adapters, all or none, and none if a process that holds the model too cannot load its own."""
        reports: list[Report] = []
        try:
            with together(self._model, writes=True), alone():
                found = {name: self._read(name) for name in names}
                reports = add_all(self._model, found, Options(active=False, prefix=self._prefix)) if found else []
        except BaseException:
            with alone():
                for name in reversed(names[: len(reports)]):
                    remove(self._model, name)
            raise
        self._loaded |= {name: report.checkpoint_bytes for name, report in zip(names, reports, strict=True)}
        self._count(loads=len(reports))

    def _make_room(self) -> None:
        """Remove the adapters that are too many."""
        unused = [name for name in self._loaded if name not in self._pinned]
        with together(self._model, writes=True), alone():
            for name in unused[: max(0, len(self._loaded) - self._max)]:
                remove(self._model, name)
                del self._loaded[name]
                self._count(evictions=1)

    def _read(self, name: str) -> Found:
        """Return the contents of an adapter, which may have been read before."""
        with self._reading:
            ahead = self._ahead.pop(name, None)
        return read_source(self._sources[name]) if ahead is None else ahead.result()

    def _count(self, **added: float) -> None:
        """Add to some counters, and count what is loaded now."""
        sums = {name: getattr(self._stats, name) + number for name, number in added.items()}
        self._stats = replace(self._stats, **sums, loaded=len(self._loaded), nbytes=sum(self._loaded.values()))


def _named(names: object) -> list[str]:
    """Return the adapters named for rows or for their tokens. `routed` refuses anything that is not a name."""
    rows = [] if isinstance(names, str) or not isinstance(names, Sequence) else names
    flat = [name for row in rows for name in ([row] if isinstance(row, str) or not isinstance(row, Sequence) else row)]
    return list(dict.fromkeys(name for name in flat if isinstance(name, str)))
