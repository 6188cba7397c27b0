"""`RowTracking`: a mode of torch that follows the rows of a batch through the operations of one forward."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils.weak import WeakIdKeyDictionary

from randlora.serving.labels import NONE, Label, fits, marked, merged, nothing, shrunk, tensors_of, unknown
from randlora.serving.rules import MOST, Call, Labels, labels_of

TAKES = {Tensor.tolist: "Tensor.tolist", Tensor.numpy: "Tensor.numpy", Tensor.__array__: "Tensor.__array__"}
"""Operations that take values out of torch, which may come back in a different order."""

READS = {*TAKES, Tensor.item, Tensor.__int__, Tensor.__index__, Tensor.__float__}
"""Operations that read values into Python, where they may become lengths or indices."""


class RowTracking(TorchDispatchMode):
    """Follows rows through operations, starting at tensors whose rows are known. Results do not change."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        """Know the rows of no tensor."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._labels: Any = WeakIdKeyDictionary()
        self._aliases: dict[int, list[weakref.ref[Tensor]]] = {}
        self._is_paused = self.has_read = False  # whether Python has read values of the batch
        self.taken_by = ""  # the operation that has taken such values out of torch
        self._reads = _Reads(self)

    def __enter__(self) -> Self:
        self._reads.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._reads.__exit__(*error)  # type: ignore[no-untyped-call]

    def label(self, value: Any) -> Label | None:
        """Return the label of a tensor, or ``None`` if it depends on no row."""
        return self._labels.get(value) if isinstance(value, Tensor) else None

    def set(self, value: Tensor, label: Label) -> None:
        """Set the label of a tensor."""
        self._labels[value] = label
        self._remember(value)

    def read(self, value: Tensor, taken_by: str = "") -> None:
        """Record that Python has read values of the batch, which may decide where rows are from now on."""
        if self.label(value) is not None:
            self.has_read |= value.dtype != torch.bool
            self.taken_by = taken_by or self.taken_by

    def stop(self) -> None:
        """Stop following, even if torch still calls this mode."""
        self._is_paused = True
        self._labels, self._aliases = WeakIdKeyDictionary(), {}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Follow nothing within the block; afterwards, `set` labels its results."""
        is_innermost = _get_current_dispatch_mode() is self and _get_current_function_mode() is self._reads
        if not is_innermost:
            before, self._is_paused = self._is_paused, True
        else:
            self.__exit__(None, None, None)  # what is computed as outside of modes is faster
        try:
            yield
        finally:
            if is_innermost:
                self.__enter__()
            else:
                self._is_paused = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and find the rows of what it returns."""
        kwargs = kwargs or {}
        if self._is_paused:
            return func(*args, **kwargs)
        if isinstance(func, torch._ops.OpOverload) and func._can_decompose():  # in inference mode
            with self, torch._C.DisableTorchFunction():
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        output = func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            self.read(args[0])
        outputs = tensors_of(output)
        given = tensors_of([*args, *kwargs.values()])
        if not any(map(self.label, given)):
            for each in outputs:
                self._remember(each)
        elif outputs:
            call = Call(*_bound(func, args, kwargs), output, self.label, self.has_read)
            self._label(given, outputs, labels_of(call), call.name)
        else:
            for each in _written(func, args, kwargs):
                self._label(given, [each], unknown(each.dim(), str(func)), str(func))
        return output

    def _label(self, given: list[Tensor], outputs: list[Tensor], labels: Labels, name: str) -> None:
        """Label what an operation has returned, and what else shares memory with what it has written into."""
        each = [labels] * len(outputs) if labels is None or isinstance(labels, Label) else [*labels]
        for output, label in zip(outputs, each, strict=False):
            if label is None or label.is_none:
                self._remember(output)
                continue
            has_its_form = label.rows.dim() == output.dim() and fits(label.rows, output.shape)
            if not has_its_form and output is not outputs[0]:  # kept for backward alone
                continue
            own = label if has_its_form else unknown(output.dim(), label.why or name)
            own = own._replace(why=name) if not own.why and own.is_mixed else own
            was = self.label(output)
            self.set(output, own)
            if any(output is one for one in given) and (was is None or not torch.equal(was.rows, own.rows)):
                for alias in self._alive(output):
                    if alias is not output:
                        self._write_through(alias, output, own)

    def _write_through(self, alias: Tensor, written: Tensor, label: Label) -> None:
        """Label a tensor again after a part of its memory got different rows."""
        was = self._labels.get(alias)
        old = nothing(alias.dim()).rows if was is None else was.rows
        marks = label if was is None else marked([label, was], label.rows)
        size = written.untyped_storage().nbytes() // max(written.element_size(), 1)
        if alias.dtype == written.dtype and size <= MOST:
            flat = torch.full((size,), NONE, device="cpu")
            for each, rows in ((alias, old), (written, label.rows)):
                flat.as_strided(each.shape, each.stride(), each.storage_offset()).copy_(rows.expand(each.shape))
            view = flat.as_strided(alias.shape, alias.stride(), alias.storage_offset())
            new = marks._replace(rows=shrunk(view))
        elif alias.dim() == written.dim() and label.rows.numel() > 1 and fits(label.rows, alias.shape):
            new = label if was is None else merged([was, label])
        else:
            new = unknown(alias.dim(), "a write into a part of it")
        if not new.is_none:
            self._labels[alias] = new

    def _remember(self, value: Tensor) -> None:
        """Remember what memory a tensor has."""
        alive = self._alive(value)
        if _has_memory(value) and all(each is not value for each in alive):
            self._aliases[value.untyped_storage()._cdata] = [*map(weakref.ref, [*alive, value])]

    def _alive(self, value: Tensor) -> list[Tensor]:
        """Return the tensors known to share the memory of one."""
        known = self._aliases.get(value.untyped_storage()._cdata, ()) if _has_memory(value) else ()
        return [tensor for each in known if (tensor := each()) is not None]


class _Reads(TorchFunctionMode):
    """Tells a `RowTracking` what Python reads."""

    def __init__(self, tracking: RowTracking) -> None:
        super().__init__()
        self._tracking = tracking

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            self._tracking.read(args[0], TAKES.get(func, ""))
        return func(*args, **(kwargs or {}))


def _has_memory(value: Tensor) -> bool:
    return type(value) in (Tensor, torch.nn.Parameter) and value.layout == torch.strided and not value.is_meta


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that an operation, which returns none, has written into, as those of ``torch._foreach``."""
    if not isinstance(func, torch._ops.OpOverload):
        return []
    _, _, given = _bound(func, args, kwargs)
    infos = [(given[argument.name], argument.alias_info) for argument in func._schema.arguments]
    return tensors_of([value for value, info in infos if info is not None and info.is_write])


def _bound(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Any, dict[str, Any]]:
    """Return the name of an operation, itself, and its arguments by name, with the defaults."""
    if not isinstance(func, torch._ops.OpOverload):
        name = getattr(func, "__name__", str(func))
        return name, func, {**{f"{index}": value for index, value in enumerate(args)}, **kwargs}
    arguments = func._schema.arguments
    given = {argument.name: value for argument, value in zip(arguments, args, strict=False)}
    defaults = {argument.name: argument.default_value for argument in arguments[len(args) :]}
    return func._schema.name, func, {**given, **defaults, **kwargs}
