"""`AdapterPool`: more adapters than a model holds, loaded when they are asked for; the least recently used go first."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from randlora.checkpoint.load import Found, Options, Source, adapters_in, add_all, read_source
from randlora.errors import AdapterError, ConfigError, raise_collected
from randlora.hints import require_types, shortly
from randlora.model.switch import remove
from randlora.serving.routed import routed
from randlora.state import adapted_root, is_adapted
from randlora.targets.match import nearest_names


@dataclass(frozen=True)
class PoolStats:
    """What an `AdapterPool` has done since it was made, and what it holds now.

    Attributes:
        hits: How often an adapter was asked for that the model had.
        misses: How often one was asked for that it did not have.
        loads: How many were loaded.
        failures: How often loading failed.
        evictions: How many were removed for others.
        seconds_loading: How long callers waited for adapters to be read and added.
        loaded: The adapters that the model has now.
        nbytes: Bytes of their Λ and Γ, and of what they train besides, without the bases that they share.
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
    """Loads the adapters of a model when they are asked for, and removes those that were not used for the longest time.

    All calls of the model go through the pool, in blocks of `routed` or `using`, one thread at a time: others wait. The
    model may have further adapters, which the pool does not touch.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> _ = randlora.inject(model, r=4)
        >>> states = {"a": randlora.adapter_state(model), "b": randlora.adapter_state(model)}
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
                directory of adapters, each in a directory of its name, as `randlora.save_all` writes them; it is read
                again for a name that was not there.
            max_loaded: How many of them the model has at once, at most; while others are loaded, also these.
            prefix: The prefix by which the names in the files and in the model differ, as for `randlora.load`.

        Raises:
            ConfigError: If an option is of another type, or ``max_loaded`` is less than 1.
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
        """The names of those that the model has, those used last at the end."""
        return tuple(self._loaded)

    def stats(self) -> PoolStats:
        """Return the counters, from any thread, without waiting for a block to end."""
        return self._stats

    def prefetch(self, names: str | Sequence[str]) -> None:
        """Begin to read adapters in another thread, so that the next block that asks for them waits less.

        The model is not touched, and this does not wait. What was read is kept until it is asked for, for as many
        adapters as ``max_loaded``; an error is raised when it is asked for.

        Args:
            names: Their names; those that are loaded or being read are skipped.

        Raises:
            AdapterError: If a name is unknown, or they are more than ``max_loaded``.
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
        """Run each row of a batch through its own adapter inside a ``with`` block; those that are missing are loaded.

        Args:
            names: As for `randlora.serving.routed`.

        Raises:
            AdapterError: If a name is unknown, there are more adapters than ``max_loaded`` in all open blocks, or
                `randlora.serving.routed` refuses them. Nothing is loaded in the first two cases.
            CheckpointError: If an adapter cannot be loaded; the message names its files. The model then has those that
                it had.
        """
        wanted = _named(names)
        with self.using(wanted):
            all_are_base = not wanted and not is_adapted(self._model)
            with nullcontext() if all_are_base else routed(self._model, names):
                yield

    @contextmanager
    def using(self, names: str | Sequence[str]) -> Iterator[None]:
        """Have adapters loaded inside a ``with`` block, in which the caller says what they are for, as by `activate`.

        That is for those that `randlora.serving.routed` cannot take, as those with ``train_also``. No other thread is
        in a block at the same time.

        Args:
            names: Their names.

        Raises:
            AdapterError: If a name is unknown, or there are more adapters than ``max_loaded`` in all open blocks.
            CheckpointError: If one cannot be loaded. The model then has those that it had.
        """
        require_types(AdapterPool.using, {"names": names})
        wanted = list(dict.fromkeys([names] if isinstance(names, str) else names))
        with self._using:
            self._check(wanted, {*wanted, *self._pinned}, "use")
            self._pinned += wanted
            try:
                self._provide(wanted)
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

    def _provide(self, names: Sequence[str]) -> None:
        """Load the adapters that are missing, then remove those that are too many."""
        present = adapted_root(self._model)[1].adapters if is_adapted(self._model) else {}
        for name in [name for name in self._loaded if name not in present]:  # somebody else has removed it
            del self._loaded[name]
        missing = [name for name in names if name not in self._loaded]
        self._count(hits=len(names) - len(missing), misses=len(missing))
        if missing:
            begin = time.perf_counter()
            try:
                self._load(missing)
            except BaseException:
                self._count(failures=1)
                raise
            finally:
                self._count(seconds_loading=time.perf_counter() - begin)
        for name in names:
            self._loaded.move_to_end(name)
        for name in [name for name in self._loaded if name not in self._pinned][
            : max(0, len(self._loaded) - self._max)
        ]:
            remove(self._model, name)
            del self._loaded[name]
            self._count(evictions=1)

    def _load(self, names: Sequence[str]) -> None:
        """Load some adapters, all or none."""
        found = {name: self._read(name) for name in names}
        reports = add_all(self._model, found, Options(active=False, prefix=self._prefix))
        self._loaded |= {name: report.checkpoint_bytes for name, report in zip(found, reports, strict=True)}
        self._count(loads=len(reports))

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
    """Return the adapters that are named for rows, or for their tokens; `routed` refuses what is no name."""
    rows = [] if isinstance(names, str) or not isinstance(names, Sequence) else names
    flat = [name for row in rows for name in ([row] if isinstance(row, str) or not isinstance(row, Sequence) else row)]
    return list(dict.fromkeys(name for name in flat if isinstance(name, str)))
