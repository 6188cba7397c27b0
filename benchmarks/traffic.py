"""The bytes that a training step of one layer moves between memory and a cache, counted rather than timed.

Every operator reads and writes its tensors past a simulated cache, which forgets first what was used longest ago. What
is not in it is counted. The inside of an operator is not seen: a product counts each of its matrices once.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.command import Settings, main
from benchmarks.layers import AUTOCAST_CONTESTANTS, CONTESTANTS, build, training_step
from benchmarks.memory import in_bytes
from benchmarks.results import Row
from benchmarks.step import Case, name_of
from randlora.functional.scratch import Observer

CORES, CACHE, LINE = 2, 2**22, 2**12
"""The cores, the bytes of the cache that they have beside them, and of what it takes at once."""
DTYPES, TOKENS, SIDES = (torch.bfloat16, torch.float32), (128, 512, 2048), (1024, 2048)
IN_FLOAT32 = ("full", "LoRA", "PEFT", "dense", "block")
IN_BFLOAT16 = ("full", *AUTOCAST_CONTESTANTS, "dense", "block")


class Counter(Observer):
    """Counts what is not in the cache."""

    def __init__(self) -> None:
        """Begin with nothing in the cache."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.nbytes = 0
        self._lines: OrderedDict[int, None] = OrderedDict()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operator, unless it only views."""
        result = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        if not all(each.alias_info is not None and not each.alias_info.is_write for each in returns):
            for tensor in tree_leaves((args, kwargs, result)):
                if isinstance(tensor, Tensor) and tensor.numel():
                    self._touch(tensor)
        return result

    def _touch(self, tensor: Tensor) -> None:
        dims = sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
        for first, entries in _pieces(dims):
            start = tensor.data_ptr() + first * tensor.itemsize
            for line in range(start // LINE, -(-(start + entries * tensor.itemsize) // LINE)):
                self.nbytes += 0 if line in self._lines else LINE
                self._lines[line] = None
                self._lines.move_to_end(line)
                if len(self._lines) > CACHE // LINE:
                    self._lines.popitem(last=False)


def _pieces(dims: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return start and length of the pieces of memory, without gaps, of a tensor with these strides and sizes."""
    pieces = [(0, 1)]
    for stride, size in dims:
        if len(pieces) == 1 and stride <= pieces[0][1]:
            pieces = [(0, pieces[0][1] + (size - 1) * stride)]
        else:
            pieces = [(index * stride + start, entries) for index in range(size) for start, entries in pieces]
    return pieces


def moved_by(step: Callable[[], None]) -> int:
    """Count the bytes that a step moves, after one that prepares what is made once."""
    step()
    counter = Counter()
    with counter:
        step()
    return counter.nbytes


def measure(case: Case, device: str) -> Row:
    """Count the step of one layer, adapted by each contestant."""
    dtype, tokens, in_features, out_features = case
    x = torch.randn(tokens, in_features, dtype=dtype, device=device, requires_grad=True)
    grad = torch.randn(tokens, out_features, dtype=dtype, device=device)
    contestants = {**CONTESTANTS, **AUTOCAST_CONTESTANTS}
    names = IN_BFLOAT16 if dtype == torch.bfloat16 else IN_FLOAT32
    layers = {name: build(contestants[name], in_features, out_features, dtype, device) for name in names}
    return Row(name_of(case), in_bytes({name: moved_by(training_step(each, x, grad)) for name, each in layers.items()}))


def run(settings: Settings) -> Sequence[Row]:
    """Count steps of square layers, as `CORES` threads make them."""
    sides = SIDES[:1] if settings.is_quick else SIDES
    threads = torch.get_num_threads()
    torch.set_num_threads(CORES)
    try:
        return [
            measure((dtype, tokens, side, side), settings.device)
            for dtype, side, tokens in product(DTYPES, sides, TOKENS)
        ]
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main(("traffic", run))
