"""Writing an adapter's files, in the order in which they may be seen.

Our header makes the tensors' file complete in itself: it decides, and the JSON is a copy of its options for PEFT. A
file without our header, which others will read, needs its JSON. PEFT reads the JSON first and takes what it says for
true, so the JSON is withdrawn while the tensors are replaced: PEFT finds no adapter then, rather than the tensors of
one and the options of another. There is one exception. If tensors without our header are replaced by some with it, the
old JSON remains until the new one replaces it, because the old tensors could not be loaded without it, and the new ones
can.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from randlora.checkpoint.format import CARD_FILE, CONFIG_FILE, HEADER_KEY, TENSORS_FILE, Header, metadata_of
from randlora.disk.replace import Files, Writer, write_directories
from randlora.disk.tensor_file import Planned, read_shard, write_tensor_file
from randlora.errors import CheckpointError


def write_adapter(
    directory: Path, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], header: Header | None
) -> int:
    """Write an adapter's files and return their size in bytes."""
    (size,) = write_directories([adapter_files(directory, fields, tensors, header)])
    return size


def adapter_files(
    directory: Path,
    fields: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    header: Header | None,
    card: str | None = None,
) -> Files:
    """Return an adapter's files, to be written. Tensors must be contiguous and on the CPU."""
    planned, metadata = [Planned.whole(*item) for item in tensors.items()], metadata_of(header, tensors)
    config = json.dumps(dict(fields), indent=2) + "\n"
    texts = {CARD_FILE: card, CONFIG_FILE: config}
    writers: dict[str, Writer] = {TENSORS_FILE: lambda path: write_tensor_file(path, planned, metadata)}
    writers |= {name: _writer(text) for name, text in texts.items() if text is not None}
    is_kept = HEADER_KEY in metadata and _needs_json(directory / TENSORS_FILE)
    return Files(directory, writers, withdrawn=() if is_kept else (CONFIG_FILE,))


def _writer(text: str) -> Writer:
    return lambda path: path.write_text(text, encoding="utf-8")


def _needs_json(path: Path) -> bool:
    """Return whether there are tensors that cannot be loaded without a JSON file."""
    try:
        return HEADER_KEY not in read_shard(path).metadata
    except CheckpointError:  # there are none, or damaged ones
        return False
