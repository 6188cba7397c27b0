"""Methods that an adapted model has instead of its class's, to save and to convert all of it.

``save_pretrained`` writes the adapter or refuses, and never the wrong model. A library's own method, found by its name,
would write the base weights, which load as the model without its adapters.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from randlora.errors import AdapterError, MergeError, warn
from randlora.layers.in_place import adapter_layers_of
from randlora.model.view import is_held_together
from randlora.state import ModelState, SavePretrained, attached_state
from randlora.targets.census import Census

METHODS = ("save_pretrained", "save")
"""Guarded methods. The second only if a module also has the first, which calls it, as in a SentenceTransformer."""

DIRECTORY = ("save_directory", "path", "output_path")  # names of the first argument in different libraries
DIAGONAL = "randlora_"  # what names of Λ and Γ have in common in a state dict
CHECKPOINT = re.compile(r"checkpoint-\d+")  # the name of a checkpoint's directory from transformers' `Trainer`

WRITERS: list[Callable[[nn.Module, Path, Mapping[str, Any] | None], object]] = []
"""The last one, of a room above, saves the only adapter of a model to a directory, perhaps from a whole state dict."""

INSTEAD = "call randlora.save(model, directory), or for the merged model randlora.files.save_merged(model, directory)"


class SaveGuard:
    """Replaces a method of a module, which it does not keep alive, while it has adapters."""

    def __init__(self, name: str, module: nn.Module, root: nn.Module | None, own: Callable[..., Any] | None) -> None:
        """Guard the method of a module in an adapted model, which may be unknown, or what it has in its place."""
        self.name, self.own = name, own
        self.module = weakref.ref(module)
        self.root: Callable[[], nn.Module | None] = weakref.ref(root) if root is not None else lambda: None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Write the adapter, or raise an error, as chosen when the adapter was added."""
        module, root = self.module(), self.root()
        if module is None:
            raise AdapterError(
                f"cannot {self.name} a model that was deleted, because nothing refers to it while its method is "
                f"called: assign it to a variable first, as in `model = ...; model.{self.name}(directory)`"
            )
        state = None if root is None else attached_state(root)
        if state is None and not any(map(adapter_layers_of, module.modules())):
            own = self.own or getattr(type(module), self.name).__get__(module)
            return own(*args, **kwargs)
        if root is None or state is None:
            raise AdapterError(f"cannot {self.name} a part of an adapted model that was copied or pickled: {INSTEAD}")
        if state.is_merged:
            raise MergeError(f"cannot {self.name} a model whose adapters are merged: {INSTEAD}")
        if state.save_pretrained == "error":
            raise AdapterError(f"{self.name} would write a model without its adapters: {INSTEAD}")
        return self._save_adapter(module, root, state, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the model around a part of it, because that may not be what is pickled."""
        module, root = self.module(), self.root()
        return SaveGuard, (self.name, module, module if root is module else None, self.own)

    def __deepcopy__(self, memo: dict[int, Any]) -> SaveGuard:
        """Guard the module's copy, with the model's copy if that is copied too."""
        module, root = self.module(), self.root()
        assert module is not None, "it is the module that is copied"
        return SaveGuard(self.name, memo.get(id(module), module), memo.get(id(root)), self.own)

    def _save_adapter(
        self, module: nn.Module, root: nn.Module, state: ModelState, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        given = [*args[:1], *(kwargs[name] for name in DIRECTORY if name in kwargs)]
        if not given:
            raise AdapterError(f"{self.name} writes the adapter, but was given no directory: {INSTEAD}")
        if kwargs.get("push_to_hub"):
            raise AdapterError(f"{self.name} does not push the adapter: randlora.save(…, push_to_hub='user/repo') does")
        if len(state.adapters) > 1:
            raise AdapterError(
                f"{self.name} would write one of several adapters ({', '.join(state.adapters)}): call "
                "randlora.save(model, directory, name=...)"
            )
        values, is_shared = kwargs.get("state_dict"), is_held_together(root)
        # an engine of ZeRO-3 gives its values to the main process, and None to the others
        is_gathered = getattr(getattr(module, "config", None), "distributed_config", None) is not None  # in all of them
        is_alone = values is not None or ("state_dict" in kwargs and not is_gathered)
        if not kwargs.get("is_main_process", True) and (is_alone or not is_shared):
            return
        is_checkpoint = CHECKPOINT.fullmatch(Path(given[0]).name) is not None
        if values is not None and not values and is_held_together(root, is_written=True):
            # a Trainer does this in one process, so neither values can be gathered nor an error raised
            warn(
                f"{self.name} wrote no adapter to {'a checkpoint' if is_checkpoint else repr(str(given[0]))}, because "
                "its state_dict is empty, as transformers' Trainer gives it with DeepSpeed's ZeRO-3: set "
                "stage3_gather_16bit_weights_on_model_save to true in zero_optimization, use AdapterTrainer of "
                "randlora.integrations.transformers, or call randlora.save(model, directory) in all processes"
            )
            return
        if values is not None and not is_shared:
            _require_own_values(module, values)
        WRITERS[-1](root, Path(given[0]), values if is_shared else None)
        if is_checkpoint and values is None and "is_main_process" in kwargs:  # engines have checkpoints that resume
            warn(  # the same words each time, so that Python shows them once
                f"{self.name} wrote the adapter into a checkpoint of transformers' Trainer, which can neither resume "
                "from it nor load the best checkpoint at the end: use AdapterTrainer of "
                "randlora.integrations.transformers, or put AdapterCheckpoints first among the bases of the trainer"
            )
        elif state.save_pretrained is None:
            warn(
                f"{self.name} wrote adapter {next(iter(state.adapters))!r} to {str(given[0])!r}, not the model: for "
                "that, call randlora.files.save_merged(model, directory). inject and load take "
                "save_pretrained='adapter', which does not warn, or 'error'"
            )


def _require_own_values(module: nn.Module, given: Mapping[str, Any]) -> None:
    """Refuse a state dict that has other values of Λ and Γ than the model, such as averages, which are not written."""
    for name, value in module.state_dict().items():
        if DIAGONAL in name and (name not in given or not torch.equal(value, given[name].to(value))):
            raise AdapterError(
                f"the state_dict has {'a different' if name in given else 'no'} {name}, but the model's would be "
                f"written: leave state_dict out, or load it into the model first; {INSTEAD}"
            )


def _having(method: str, modules: Iterable[nn.Module]) -> list[nn.Module]:
    return [each for each in modules if callable(vars(each).get(method)) or callable(getattr(type(each), method, None))]


def guard_saving(census: Census, state: ModelState, choice: SavePretrained | None) -> None:
    """Guard the methods of every module that contains an adapted one; a choice replaces the one of other adapters."""
    state.save_pretrained = choice or state.save_pretrained
    if state.save_pretrained == "model":
        unguard_saving(census)
        return
    savers = _having(METHODS[0], census.around_adapted)
    for name in METHODS:
        for module in _having(name, savers):
            if not isinstance(own := vars(module).get(name), SaveGuard):
                vars(module)[name] = SaveGuard(name, module, census.model, own)


def unguard_saving(census: Census) -> None:
    """Restore the original methods of every module."""
    for module in census.modules:
        for name in METHODS:
            if isinstance(guard := vars(module).get(name), SaveGuard):
                del vars(module)[name]
                if guard.own is not None:
                    vars(module)[name] = guard.own


CONVERT = "_apply"  # the method of torch that all conversions call, also those of every module around


class Converter:
    """Replaces the method of a model, which it does not keep alive, to convert the copies held aside like the model."""

    def __init__(self, model: nn.Module | None) -> None:
        """Replace the method of a model, ``None`` for one that is not known."""
        self.model: Callable[[], nn.Module | None] = weakref.ref(model) if model is not None else lambda: None

    def __call__(self, convert: Any, *args: Any, **kwargs: Any) -> Any:
        """Convert the model, then what is held aside."""
        model = self.model()
        if model is None:
            raise AdapterError(
                "cannot convert a shallow copy of an adapted model that is gone, or what was copied or pickled from a "
                "shallow copy: convert the model, or make its copy with copy.deepcopy"
            )
        result = getattr(type(model), CONVERT)(model, convert, *args, **kwargs)
        if (state := attached_state(model)) is not None:
            state.convert_aside(convert)
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        return Converter, (self.model(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> Converter:
        """Return one for the model's copy, which is not known if a shallow copy of the model is copied."""
        return Converter(memo.get(id(self.model())))


def watch_conversions(model: nn.Module, state: ModelState | None) -> None:
    """Have a model convert what is held aside if its adapters train copies of parameters, and else nothing more."""
    if state is not None and state.replaced:
        vars(model).setdefault(CONVERT, Converter(model))
    elif isinstance(vars(model).get(CONVERT), Converter):
        del vars(model)[CONVERT]
