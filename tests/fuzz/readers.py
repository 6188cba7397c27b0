"""Targets that read files as anyone may have written them: an adapter, the JSON of one of PEFT's, and a base model."""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import randlora
from randlora.bases.spec import Shape
from randlora.checkpoint.peft_layout import basis_keys
from randlora.checkpoint.read import AdapterFile, read_adapter
from randlora.disk.replace import write_files
from randlora.errors import RandLoRAError
from randlora.files import convert, inspect, merge, verify
from randlora.files.convert import adapter_files, tensors_of
from randlora.files.merge import FileMergeReport
from randlora.files.model_directory import read_model_directory
from tests.checkpoint_files import CONFIG_FILE, TENSORS_FILE
from tests.fuzz.files import HERE, laid_out, tree, unpack
from tests.fuzz.limits import bounded, outcome
from tests.kit import all_bits, bits, untouched

READING, REST, OF_MODELS = (2.0, 150), (10.0, 600), (20.0, 1000)
"""Seconds and MiB. Reading is promised within 1 s and 100 MiB; a process that counts branches is slower."""
DRAWN = 2**22
"""Entries of bases up to which they are drawn: a file of few bytes may state layers of any width."""
PREPARED = unpack((HERE / "prepared.zip").read_bytes()) or {}
"""Directories that the library, PEFT (with its bases in the file, and drawn), transformers and bitsandbytes wrote."""


def adapter(data: bytes) -> None:
    if (files := unpack(data)) is None:
        return
    with laid_out(files) as root:
        source, before = root / "adapter", tree(root)
        with bounded(*READING):
            file = outcome(read_adapter, source)
        if isinstance(file, AdapterFile) and _drawn(file) > DRAWN:
            return
        with bounded(*REST):
            verified, summary = outcome(verify, source), outcome(inspect, source)
            passed = not isinstance(verified, RandLoRAError) and verified.passed
            converted = outcome(convert, source, root / "native", "native")
            assert tree(source) == {name[8:]: held for name, held in before.items() if name.startswith("adapter/")}
            if not isinstance(file, AdapterFile):
                assert not passed, f"verify passes what cannot be read: {file}"
                assert isinstance(summary, RandLoRAError), "inspect reads what cannot be read"
                assert isinstance(converted, RandLoRAError), "convert reads what cannot be read"
                return
            assert str(summary).encode("utf-8", "backslashreplace")
            is_refused = isinstance(summary, RandLoRAError) and "too large" not in str(summary)
            assert not (passed and is_refused), f"verify passes what inspect refuses: {summary}"
            _check_values(file)
            _check_rewritten(file, root)
            if not isinstance(converted, RandLoRAError):
                _check_same(file, read_adapter(root / "native"))
            _check_loaded(file, source, root)


def _drawn(file: AdapterFile) -> int:
    sizes = [gamma.shape[-1] for _, gamma in file.values.values()] + [options.r for options in file.options.values()]
    if file.header:
        sizes += [math.prod(shape[-2:]) for shape in file.header.shapes.values()]
        sizes += [record.spec.max_dim * record.spec.min_dim for record in file.header.bases.values()]
    return max(sizes)


def _check_values(file: AdapterFile) -> None:
    tensors = [*file.trained.values(), *(tensor for pair in file.bases.values() for tensor in pair)]
    for fqn, (lam, gamma) in file.values.items():
        r = file.options[fqn].r
        *stack, num_bases, min_dim = gamma.shape
        assert tuple(lam.shape) == (*stack, r, num_bases)
        assert 0 < min_dim <= r * num_bases < min_dim + r
        tensors += [lam, gamma]
    assert all(tensor.isfinite().all() for tensor in tensors)


def _check_rewritten(file: AdapterFile, root: Path) -> None:
    tensors = tensors_of(file)
    for r, pair in file.bases.items():
        tensors |= zip(basis_keys(r, (file.header.bases if file.header else file.bases).keys()), pair, strict=True)
    write_files(adapter_files(root / "again", file.fields, tensors, file.header))
    again = read_adapter(root / "again")
    assert again.header == file.header
    assert json.dumps(again.fields) == json.dumps(file.fields)
    _check_same(file, again)
    for r, pair in file.bases.items():
        assert [*map(bits, again.bases[r])] == [*map(bits, pair)]


def _check_same(file: AdapterFile, again: AdapterFile) -> None:
    assert again.options == file.options
    assert (again.config.seed, again.config.dropout) == (file.config.seed, file.config.dropout)
    assert all_bits(tensors_of(again)) == all_bits(tensors_of(file))


def _check_loaded(file: AdapterFile, source: Path, root: Path) -> None:
    own = {fqn: (gamma.shape[-1],) * 2 for fqn, (_, gamma) in file.values.items()}
    model = _model_of(file.header.shapes if file.header else own, file.trained)
    with untouched(model):
        if isinstance(outcome(randlora.load, model, source), RandLoRAError):
            return
        randlora.eject(model)
    randlora.load(model, source)
    if isinstance(outcome(randlora.save, model, root / "saved"), RandLoRAError):
        return
    saved = read_adapter(root / "saved")
    assert saved.header is not None
    halves = {
        fqn: each.float() for fqn, each in file.trained.items() if each.is_floating_point() and each.itemsize == 2
    }
    values = {fqn: file.diagonals(fqn) for fqn in file.values}  # what has 16 bits is trained in float32
    _check_same(replace(file, values=values, trained=file.trained | halves), saved)


def _model_of(shapes: Mapping[str, Shape], parameters: Mapping[str, Tensor]) -> nn.Module:
    parts: dict[str, nn.Module | nn.Parameter] = {
        fqn: nn.Linear(shape[-1], shape[-2]) if len(shape) == 2 else nn.Parameter(torch.ones(shape))
        for fqn, shape in shapes.items()
    }
    parts |= {fqn: nn.Parameter(torch.ones_like(value)) for fqn, value in parameters.items() if fqn not in parts}
    root = nn.Module()
    for fqn, part in parts.items():
        *path, last = fqn.split(".")
        owner = root
        with suppress(AttributeError, KeyError):  # a name that no module can have
            for name in path:
                if name not in owner._modules:
                    owner.add_module(name, nn.Module())
                owner = owner.get_submodule(name)
            owner.register_parameter(last, part) if isinstance(part, nn.Parameter) else owner.add_module(last, part)
    return root


def peft_config(data: bytes) -> None:
    for folder in ("peft", "drawn"):
        files = {f"adapter/{CONFIG_FILE}": data, f"adapter/{TENSORS_FILE}": PREPARED[f"{folder}/{TENSORS_FILE}"]}
        with laid_out(files) as root:
            source = root / "adapter"
            with bounded(*READING):
                file = outcome(read_adapter, source)
            with bounded(*REST):
                found = verify(source)
                if not isinstance(file, AdapterFile):
                    assert not found.passed
                    continue
                _check_options(json.loads(data), file)
                _check_values(file)
                _check_rewritten(file, root)
                if not isinstance(outcome(convert, source, root / "peft", "peft"), RandLoRAError):
                    again = json.loads((root / "peft" / CONFIG_FILE).read_text(encoding="utf-8"))
                    assert json.dumps(again, sort_keys=True) == json.dumps(json.loads(data), sort_keys=True)
                _check_loaded(file, source, root)


def _check_options(fields: dict[str, Any], file: AdapterFile) -> None:
    assert fields["peft_type"] == "RANDLORA"
    assert type(fields["r"]) is int
    alpha = 20 * fields["r"] if fields["randlora_alpha"] is None else fields["randlora_alpha"]
    assert {(options.r, options.alpha) for options in file.options.values()} == {(fields["r"], float(alpha))}
    assert file.config.dropout == fields.get("randlora_dropout", 0)
    assert file.config.seed == fields["projection_prng_key"] % 2**64
    kinds = [kind for kind in ("very_sparse", "sparse") if fields.get(kind)]
    assert file.config.basis == [*kinds, "dense"][0]


def checkpoint(data: bytes) -> None:
    if (files := unpack(data)) is None:
        return
    with laid_out(files) as root:
        base, source = root / "base", root / "adapter"
        for folder in (base, source):
            folder.mkdir(exist_ok=True)  # one that is not there is a mistake of the caller
        before = tree(root)
        with bounded(*READING):
            directory = outcome(read_model_directory, base)
        with bounded(*OF_MODELS):
            found = verify(source, base)
            outcome(inspect, source, base)
            converted = outcome(lambda: convert(source, root / "native", "native", base=base))
            merged = outcome(lambda: merge(source, root / "merged", base=base))
            results = {"native": converted, "merged": merged}
            written = {name for name, result in results.items() if not isinstance(result, RandLoRAError)}
            assert {name: held for name, held in tree(root).items() if name.split("/")[0] not in written} == before
            if isinstance(directory, RandLoRAError):
                assert not found.passed
                assert isinstance(merged, RandLoRAError)
            elif isinstance(merged, FileMergeReport):
                failed = [check for check in found.checks if check.outcome == "failed"]
                said = "\n".join(merged.notes)  # such as that the JSON is of another save
                assert all(check.words in said for check in failed), f"merge takes what verify refuses: {failed}"
                # the result is whole, readable by the library of its format, and changed where the report says so
                result = read_model_directory(root / "merged")
                own, theirs = (
                    dict(entry for shard in each.shards for entry in load_file(shard.path).items())
                    for each in (result, directory)
                )
                changed = {*merged.merged, *merged.replaced}
                assert changed <= own.keys() == result.entries.keys() <= directory.entries.keys()
                assert all(bits(own[name]) == bits(theirs[name]) for name in own.keys() - changed)
