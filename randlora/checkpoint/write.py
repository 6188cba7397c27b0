"""Writing an adapter's files, in the order in which they may be seen.

Our header makes the tensors' file complete in itself: it decides, and the JSON, which comes after it, is a copy of its
options for PEFT. Beside tensors without our header readers need the JSON, so it is gone while the tensors change.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from randlora.checkpoint.card import CARD_FILE
from randlora.checkpoint.header import HEADER_KEY, Header, metadata_of
from randlora.checkpoint.peft_config import CONFIG_FILE
from randlora.checkpoint.tensors import TENSORS_FILE
from randlora.disk.replace import Files
from randlora.disk.tensor_file import Planned, write_tensor_file


def adapter_files(
    directory: Path,
    fields: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    header: Header | None,
    card: str | None = None,
) -> Files:
    """Return an adapter's files, to be written. Tensors must be contiguous and on the CPU."""
    planned = [Planned.whole(*item) for item in tensors.items()]
    return files_of(directory, TENSORS_FILE, planned, metadata_of(header, tensors), fields, card)


def files_of(
    directory: Path,
    tensors_file: str,
    tensors: Sequence[Planned],
    metadata: Mapping[str, str],
    fields: Mapping[str, Any] | None,
    card: str | None = None,
) -> Files:
    """Return a file of tensors, a JSON if there are ``fields``, and a model card if there is one, to be written."""
    config = None if fields is None else json.dumps(dict(fields), indent=2) + "\n"
    writers: dict[str, Callable[[Path], object]] = {
        tensors_file: lambda path: write_tensor_file(path, tensors, metadata)
    }
    for name, text in ((CARD_FILE, card), (CONFIG_FILE, config)):
        if text is not None:
            writers[name] = partial(Path.write_text, data=text, encoding="utf-8")
    is_needed = config is not None and HEADER_KEY not in metadata
    return Files(directory, writers, withdrawn=CONFIG_FILE if is_needed else None)
