"""How time and memory of the functions on a model grow with its layers, and with its adapters.

Each function should take twice as long for twice as many: `targets.py` bounds the exponent of its growth.
"""

import gc
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import nn

import randlora
from benchmarks.command import Settings, main
from benchmarks.processes import in_own_process
from benchmarks.results import Row
from benchmarks.timing import Figure

SIDE, R, REPEATS = 16, 2, 3
LAYERS, ADAPTERS = (250, 1000, 2000, 5000), (10, 100, 300)
QUICK_LAYERS, QUICK_ADAPTERS, ADAPTED_LAYERS = (250, 1000), (10, 100), 20
Step = tuple[str, Callable[[], object]]


def plain(layers: int) -> nn.Module:
    """Build a model of small linear layers."""
    return nn.Sequential(*(nn.Linear(SIDE, SIDE) for _ in range(layers)))


def adapted(layers: int, names: Sequence[str] = ("default",)) -> nn.Module:
    """Build a model with adapters."""
    model = plain(layers)
    for name in names:
        randlora.inject(model, r=R, targets="all", name=name)
    return model


def by_layers(layers: int, directory: Path) -> Iterator[Step]:
    """Go through functions on a model of so many layers, each with its name."""
    model, half = plain(layers), [str(index) for index in range(0, layers, 2)]
    yield "inject", lambda: randlora.inject(model, r=R, targets="all")
    yield "adapter_state", lambda: randlora.adapter_state(model)
    yield "save", lambda: randlora.save(model, directory / "adapter")
    yield (
        "activate in half of the layers",
        lambda: randlora.activate(model, {"default": {**dict.fromkeys(half, 1.0), ".*": 0.0}}),
    )
    yield "activate", lambda: randlora.activate(model, "default")
    yield "check", lambda: randlora.check(model, model[0].weight.new_ones(1, SIDE))  # type: ignore[index]
    yield "save_merged", lambda: randlora.files.save_merged(model, directory / "merged")
    yield "merge", lambda: randlora.merge(model, reversible=True)
    yield "unmerge", lambda: randlora.unmerge(model)
    yield "eject", lambda: randlora.eject(model)
    yield "load", lambda: randlora.load(model, directory / "adapter")
    yield "merge for good", lambda: randlora.merge(model)
    yield "inject by names", lambda: randlora.inject(model, r=dict.fromkeys(half, R), targets=half)


def by_adapters(count: int, directory: Path) -> Iterator[Step]:
    """Go through functions on a model with so many adapters, each with its name."""
    model = adapted(ADAPTED_LAYERS, [f"adapter_{index}" for index in range(count)])
    yield "inject one more", lambda: randlora.inject(model, r=R, targets="all", name="more")
    yield "activate the last", lambda: randlora.activate(model, "more")
    yield "remove the last", lambda: randlora.remove(model, "more")
    yield "save_all", lambda: randlora.save_all(model, directory)
    fresh = plain(ADAPTED_LAYERS)
    yield "load_all", lambda: randlora.load_all(fresh, directory)


def grown(
    axis: str, steps: Callable[[int, Path], Iterator[Step]], sizes: Sequence[int], *, repeats: int
) -> Iterator[Row]:
    """Measure the time of each function at each size, and the memory that it takes at most beside the model's."""
    seconds: dict[str, dict[str, list[float]]] = {}
    nbytes: dict[str, dict[str, Figure]] = {}
    for size in sizes:
        for repeat in range(repeats + 1):
            gc.collect()  # of the models before
            with tempfile.TemporaryDirectory() as directory:
                for name, step in steps(size, Path(directory)):
                    if repeat < repeats:
                        seconds.setdefault(name, {}).setdefault(str(size), []).append(_seconds_of(step))
                    else:
                        peak = _peak_of(step)
                        nbytes.setdefault(name, {})[str(size)] = Figure(peak, peak, "B")
    for name, taken in seconds.items():
        yield Row(f"{axis}, {name}, time", {size: Figure.of(each, "s") for size, each in taken.items()})
        yield Row(f"{axis}, {name}, memory", nbytes[name])


def _seconds_of(step: Callable[[], object]) -> float:
    """Return how long a function takes without Python's collector, which goes through all that was imported."""
    gc.disable()
    try:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    finally:
        gc.enable()


def _peak_of(step: Callable[[], object]) -> int:
    """Return the memory of Python's objects that a function takes at most; that of tensors is in `memory`."""
    tracemalloc.start()
    try:
        step()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def run(settings: Settings) -> Sequence[Row]:
    """Measure two sizes, or all of them with --full, in a heap in which no other benchmark has left gaps."""
    return in_own_process(_rows, settings.is_quick)


def _rows(is_quick: bool) -> list[Row]:  # noqa: FBT001
    layers, adapters = (QUICK_LAYERS, QUICK_ADAPTERS) if is_quick else (LAYERS, ADAPTERS)
    return [
        *grown("layers", by_layers, layers, repeats=REPEATS),
        *grown("adapters", by_adapters, adapters, repeats=REPEATS),
    ]


if __name__ == "__main__":
    main(("growth", run))
