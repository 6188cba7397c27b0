"""The directory of a base model: its index, its headers, and what quantization adds to it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

import randlora
from randlora.errors import RandLoRAError
from randlora.files.merge import FileMergeReport
from randlora.files.model_directory import ModelDirectory, read_model_directory
from tests.fuzz.files import laid_out, tree, unpack
from tests.fuzz.limits import bounded
from tests.fuzz.outcome import outcome
from tests.fuzz.target_adapter import READING
from tests.kit import all_bits

REST = (20.0, 1000)


def target(data: bytes) -> None:
    """Verify, convert and merge the adapter in the folder ``adapter`` of an archive with the base in ``base``."""
    files = unpack(data)
    if files is None:
        return
    with laid_out(files) as root:
        base, adapter = root / "base", root / "adapter"
        for folder in (base, adapter):
            folder.mkdir(exist_ok=True)  # one that is not there is a mistake of the caller
        before = tree(root)
        with bounded(*READING):
            directory = outcome(partial(read_model_directory, base))
        with bounded(*REST):
            found = randlora.files.verify(adapter, base)
            outcome(partial(randlora.files.inspect, adapter, base))
            converted = outcome(partial(randlora.files.convert, adapter, root / "native", "native", base=base))
            merged = outcome(partial(randlora.files.merge, adapter, root / "merged", base=base))
            written = {"native"} if not isinstance(converted, RandLoRAError) else set[str]()
            written |= {"merged"} if isinstance(merged, FileMergeReport) else set()
            after = tree(root)
            assert {name: held for name, held in after.items() if name.split("/")[0] not in written} == before
            if isinstance(directory, RandLoRAError):
                assert not found.passed
                assert isinstance(merged, RandLoRAError)
            elif isinstance(merged, FileMergeReport):
                failed = [check for check in found.checks if check.outcome == "failed"]
                said = "\n".join(merged.notes)  # such as that the JSON is of another save
                assert all(check.words in said for check in failed), f"merge takes what verify refuses: {failed}"
                _check_merged(directory, merged, root / "merged")


def _check_merged(directory: ModelDirectory, report: FileMergeReport, out: Path) -> None:
    """Check that the result is whole, readable by the library of its format, and changed where the report says so."""
    merged = read_model_directory(out)
    assert merged.entries.keys() <= directory.entries.keys()
    own, theirs = _values(merged), _values(directory)
    assert own.keys() == merged.entries.keys()
    changed = {*report.merged, *report.replaced}
    copied = own.keys() - changed
    assert all_bits({name: own[name] for name in copied}) == all_bits({name: theirs[name] for name in copied})
    assert changed <= own.keys()


def _values(directory: ModelDirectory) -> Mapping[str, Tensor]:
    found: dict[str, Any] = {}
    for shard in directory.shards:
        found |= load_file(shard.path)
    return found
