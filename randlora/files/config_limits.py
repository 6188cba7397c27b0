"""What a ``config.json`` may have a class do while it is built: ask no network, read no file, and end.

A config names in a few bytes how many layers there are, for which the checkpoint has tensors if it is whole, and for
some vision models what timm is to read: files, and repositories on the Hub.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch.nn.modules import module as registration

from randlora.disk.hub import offline
from randlora.errors import CheckpointError

COUNTED = re.compile("layer|depth|block|stage")
"""Names of fields whose numbers a config counts to, or makes lists of, before there is a module."""
MOST_COUNTED = 2**20
FOR_ANY_MODEL = 2**12
"""Modules and parameters that are made for any checkpoint, in about a second."""
FOR_EACH_TENSOR = 2**4
"""Those that are made for each tensor of the checkpoint: no class of transformers has four."""

TIMM_NAMES = frozenset({"architecture", "backbone"})
TIMM_READS = frozenset({"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"})
"""Arguments of ``timm.create_model`` by which it reads files and URLs."""


def config_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a config asks for that no checkpoint can need, at any depth."""
    left: list[tuple[str, Any]] = [("", config)]
    while left:
        name, value = left.pop()
        if isinstance(value, dict):
            left += value.items()
            if name == "model_args" and (read := TIMM_READS & value.keys()):
                yield f"it names other files to be read: {', '.join(sorted(read))}"
        elif isinstance(value, list):
            left += [(name, entry) for entry in value]
        elif name in TIMM_NAMES and isinstance(value, str) and ":" in value:
            yield f"it names another place to read {name} from: {value!r:.100}"
        elif isinstance(value, int | float) and abs(value) > MOST_COUNTED and COUNTED.search(name):
            yield f"{name} is {value!r:.40}"


@contextmanager
def bounded(tensors: int) -> Iterator[None]:
    """Let a class be built in the block: without the Hub, and of no more modules than so many tensors can need."""
    most = FOR_ANY_MODEL + FOR_EACH_TENSOR * tensors
    left, thread = most, threading.get_ident()

    def count(*_: object) -> None:
        nonlocal left
        left -= threading.get_ident() == thread  # others may build what they like
        if left < 0:
            raise CheckpointError(
                f"it makes more than {most:,} modules and parameters for {tensors} tensors in the files"
            )

    with offline(), ExitStack() as held:
        held.callback(registration.register_module_module_registration_hook(count).remove)
        held.callback(registration.register_module_parameter_registration_hook(count).remove)
        yield
