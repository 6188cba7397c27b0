"""RandLoRA for PyTorch: full-rank fine-tuning from shared random bases.

>>> layers = torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64)
>>> model = torch.nn.Sequential(*layers)
>>> report = randlora.inject(model, r=8)
>>> report.trainable_parameters
1152
>>> report = randlora.merge(model)

Functions on a model in memory are here, functions on files in `randlora.files`, functions for many adapters at once in
`randlora.serving`, and exceptions in `randlora.errors`. The types of reports are in the modules of the functions that
return them.
"""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from types import ModuleType as _ModuleType
from typing import TYPE_CHECKING

__version__ = _version("randlora")

if TYPE_CHECKING:
    from randlora.api import *  # noqa: F403
else:

    def __getattr__(name: str) -> object:
        """Import everything when a name is first used: torch takes seconds, and `randlora --help` needs nothing."""
        public = _public()
        globals().update(public)
        if name == "__all__":
            return [*public]
        if name not in globals():  # which has the rooms that were imported just now
            rooms = [room for room in public.values() if isinstance(room, _ModuleType)]
            places = {f": it is {room.__name__}.{name}": vars(room).get(name) for room in rooms}
            said = [text for text, own in places.items() if getattr(own, "__module__", "").startswith("randlora.")]
            calls = _import_module("randlora.hints").CALLS
            advice = said[0] if said else f": call {calls[name]}" if name in calls else ""
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}{advice}")
        return globals()[name]

    def __dir__() -> list[str]:
        """List what can be used, as completion in a shell asks, rather than what has been."""
        return [*_public(), "__all__", *(name for name in globals() if name.startswith("__"))]

    def _public() -> dict[str, object]:
        names = vars(_import_module("randlora.api"))
        return {name: names[name] for name in sorted(names) if not name.startswith("_")}
