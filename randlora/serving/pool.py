"""`AdapterPool`: more adapters than fit in a model, loaded when they are needed; the least recently used go first."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

from torch import nn

from randlora.checkpoint.load import Source, adapters_in, add_all, read_source
from randlora.errors import AdapterError, ConfigError, raise_collected
from randlora.hints import require_types, shortly
from randlora.model.switch import remove
from randlora.model.view import together
from randlora.ranks import agree, alone
from randlora.report import Report
from randlora.serving.routed import routed, routing_of
from randlora.state import Adapter, adapted_root, is_adapted
from randlora.targets.match import nearest_names


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
        >>> pool.loaded
        ('a', 'b')
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
        self._sources: dict[str, Source] = {**(sources if isinstance(sources, Mapping) else adapters_in(Path(sources)))}
        self._using = threading.RLock()
        self._pinned: list[str] = []
        self._loaded: dict[str, Adapter] = {}  # those used last at the end

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all adapters, loaded or not. A directory of them is read again each time."""
        if self._directory is not None:
            self._sources.update(adapters_in(self._directory))
        return tuple(self._sources)

    @property
    def loaded(self) -> tuple[str, ...]:
        """The names of the adapters that the model has, the most recently used last."""
        return tuple(self._loaded)

    @contextmanager
    def routed(self, names: Sequence[str | None]) -> Iterator[None]:
        """Run each row of a batch through its own adapter inside a ``with`` block. Missing adapters are loaded.

        Args:
            names: As for `randlora.serving.routed`.

        Raises:
            AdapterError: If a name is unknown, there are more adapters than ``max_loaded`` in all open blocks, or
                `randlora.serving.routed` refuses them. Nothing is loaded in the first two cases.
            CheckpointError: If an adapter cannot be loaded; the message names its files. The model then has the same
                adapters as before.
        """
        with together(self._model, writes=True):
            wanted = [*routing_of(names).adapters]
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
        wanted = list(dict.fromkeys([names] if isinstance(names, str) else names))
        with self._using:
            with together(self._model, writes=True):
                self._check(wanted)
                present = adapted_root(self._model)[1].adapters if is_adapted(self._model) else {}
                # somebody may have removed others, or put their own in their place
                self._loaded = {name: own for name, own in self._loaded.items() if present.get(name) is own}
            self._pinned += wanted
            try:
                self._load([name for name in wanted if name not in self._loaded])
                present = adapted_root(self._model)[1].adapters if wanted else {}
                self._loaded = {name: own for name, own in self._loaded.items() if name not in wanted}
                self._loaded |= {name: present[name] for name in wanted}
                unused = [name for name in self._loaded if name not in self._pinned]
                with together(self._model, writes=True), alone():
                    for name in unused[: max(0, len(self._loaded) - self._max)]:
                        remove(self._model, name)
                        del self._loaded[name]
                yield
            finally:
                for name in wanted:
                    self._pinned.remove(name)

    def _check(self, names: Sequence[str]) -> None:
        """Raise an `AdapterError` unless adapters are known, and not too many together with those in open blocks."""
        known = self._sources if all(name in self._sources for name in names) else self.names
        problems = [
            f"the pool has no adapter named {shortly(name)}; the nearest are {nearest_names(str(name), known)}"
            for name in names
            if name not in known
        ]
        if (count := len({*names, *self._pinned})) > self._max:
            problems.append(f"{count} adapters are asked for at once, and the pool loads {self._max}: raise max_loaded")
        raise_collected(AdapterError, problems, doing="use adapters of the pool")

    def _load(self, names: Sequence[str]) -> None:
        """Load some adapters, others in each process, all or none, and none if a process cannot load its own."""
        reports: list[Report] = []
        try:
            with together(self._model, writes=True), alone():
                found = {name: read_source(self._sources[name]) for name in names}
                reports = add_all(self._model, found, active=False, prefix=self._prefix) if found else []
        except BaseException:
            with alone():
                for name in reversed(names[: len(reports)]):
                    remove(self._model, name)
            raise
