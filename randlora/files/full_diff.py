"""An adapter as full-rank updates, which ComfyUI adds to a model's weights: exact, and as large as those weights."""

from __future__ import annotations

from collections import Counter
from functools import partial

import torch
from torch import Tensor

from randlora.disk.tensor_file import Planned
from randlora.errors import ConfigError, raise_collected, spelled
from randlora.files.adapter import OpenAdapter
from randlora.files.lora_layouts import DIFF_FILE, AdapterFiles, only_updates
from randlora.files.pipeline_parts import diff_keys
from randlora.files.to_lora import not_linear
from randlora.options import Component
from randlora.report import Progress


def full_diff(adapter: OpenAdapter, component: Component, progress: Progress) -> AdapterFiles:
    """Return a file with every update in float32, in the layout of its weight, each computed when it is written.

    Raises:
        ConfigError: If a layer is not linear, other parameters were trained, or two layers would have one key.
    """
    shapes = adapter.require_shapes()
    keys = diff_keys(component, tuple(shapes))
    twice = [key for key, count in Counter(keys.values()).items() if count > 1]
    problems = [*not_linear(adapter), *only_updates(adapter, spelled("to", "diff"))]
    problems += [f"two layers would have the key {key}: rename one" for key in twice]
    raise_collected(ConfigError, problems, doing="convert to 'diff'")
    done, transposed = iter(range(len(shapes))), frozenset(adapter.transposed or ())

    def pieces(fqn: str) -> tuple[Tensor]:
        progress(next(done), len(shapes), fqn)
        (update,) = adapter.delta_weights(fqn)
        return (update.float().T if fqn in transposed else update.float(),)

    tensors = [
        Planned(keys[fqn], torch.float32, shape[::-1] if fqn in transposed else shape, partial(pieces, fqn))
        for fqn, shape in shapes.items()
    ]
    return AdapterFiles(DIFF_FILE, tensors, notes=(f"for {component!r}: {spelled('component')} names another model",))
