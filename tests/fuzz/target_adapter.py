"""The two files of an adapter, as anyone may have written them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import randlora
from randlora.bases.spec import Shape
from randlora.checkpoint.read import AdapterFile, read_adapter
from randlora.checkpoint.save import adapter_files
from randlora.checkpoint.tensors import adapter_tensors, basis_keys
from randlora.disk.replace import write_files
from randlora.errors import RandLoRAError
from tests.fuzz.files import laid_out, tree, unpack
from tests.fuzz.limits import bounded
from tests.fuzz.outcome import outcome
from tests.kit import all_bits, bits, untouched

READING, REST = (2.0, 150), (10.0, 600)
"""Seconds and MiB. Reading is promised within 1 s and 100 MB; a process that counts branches is slower."""

DRAWN = 2**22
"""Entries of bases up to which they are drawn: a file of few bytes may state layers of any width."""


def target(data: bytes) -> None:
    """Read, verify, inspect, rewrite, convert and load the adapter in the folder ``adapter`` of an archive."""
    files = unpack(data)
    if files is None:
        return
    with laid_out(files) as root:
        source, before = root / "adapter", tree(root)
        with bounded(*READING):
            file = outcome(partial(read_adapter, source))
        if isinstance(file, AdapterFile) and _drawn(file) > DRAWN:
            return
        with bounded(*REST):
            verified = outcome(partial(randlora.files.verify, source))
            passed = not isinstance(verified, RandLoRAError) and verified.passed
            summary = outcome(partial(randlora.files.inspect, source))
            converted = outcome(partial(randlora.files.convert, source, root / "native", "native"))
            assert tree(source) == {name[8:]: held for name, held in before.items() if name.startswith("adapter/")}
            if not isinstance(file, AdapterFile):
                assert not passed, f"verify passes what cannot be read: {file}"
                assert isinstance(summary, RandLoRAError), "inspect reads what cannot be read"
                assert isinstance(converted, RandLoRAError), "convert reads what cannot be read"
                return
            if isinstance(summary, RandLoRAError):
                assert not passed or "too large" in str(summary), f"verify passes what inspect refuses: {summary}"
            else:
                assert str(summary).encode("utf-8", "backslashreplace")
            check_values(file)
            check_rewritten(file, root)
            if not isinstance(converted, RandLoRAError):
                _check_same(file, read_adapter(root / "native"))
            _check_loaded(file, source, root)


def _drawn(file: AdapterFile) -> int:
    shapes = [shape[-2:] for shape in file.header.shapes.values()] if file.header else []
    dims = [(record.spec.max_dim, record.spec.min_dim) for record in file.header.bases.values()] if file.header else []
    ranks = [options.r for options in file.options.values()]
    return max([gamma.shape[-1] for _, gamma in file.values.values()] + [a * b for a, b in [*shapes, *dims]] + ranks)


def check_values(file: AdapterFile) -> None:
    """Check that all values are finite, and that Λ and Γ have shapes that belong together."""
    tensors = [*file.trained.values(), *(tensor for pair in file.bases.values() for tensor in pair)]
    for fqn, (lam, gamma) in file.values.items():
        r = file.options[fqn].r
        *stack, num_bases, min_dim = gamma.shape
        assert tuple(lam.shape) == (*stack, r, num_bases)
        assert 0 < min_dim <= r * num_bases < min_dim + r
        tensors += [lam, gamma]
    assert all(tensor.isfinite().all() for tensor in tensors)


def check_rewritten(file: AdapterFile, root: Path) -> None:
    """Check that what was read, written by this library, reads equal."""
    tensors = adapter_tensors(file.values, file.trained)
    for r, pair in file.bases.items():
        tensors |= zip(basis_keys(r, (file.header.bases if file.header else file.bases).keys()), pair, strict=True)
    write_files(adapter_files(root / "again", file.fields, tensors, file.header))
    again = read_adapter(root / "again")
    assert again.header == file.header
    assert json.dumps(again.fields) == json.dumps(file.fields)
    _check_same(file, again)
    assert _bases_bits(again) == _bases_bits(file)


def _bases_bits(file: AdapterFile) -> object:
    return {r: tuple(map(bits, pair)) for r, pair in file.bases.items()}


def _check_same(file: AdapterFile, again: AdapterFile) -> None:
    assert again.options == file.options
    assert (again.config.seed, again.config.dropout) == (file.config.seed, file.config.dropout)
    assert adapter_bits(again) == adapter_bits(file)


def adapter_bits(file: AdapterFile) -> object:
    """Return all values of an adapter as they are written."""
    return all_bits(adapter_tensors(file.values, file.trained))


def _check_loaded(file: AdapterFile, source: Path, root: Path) -> None:
    """Check that loading into a model of these layers works or leaves it as it was, and that saving it reads equal."""
    if file.header is not None:
        shapes: Mapping[str, Shape] = file.header.shapes
    else:
        shapes = {fqn: (gamma.shape[-1],) * 2 for fqn, (_, gamma) in file.values.items()}
    model = model_of(shapes, file.trained)
    with untouched(model):
        loaded = outcome(partial(randlora.load, model, source))
        if isinstance(loaded, RandLoRAError):
            return
        randlora.eject(model)
    randlora.load(model, source)
    if isinstance(outcome(partial(randlora.save, model, root / "saved")), RandLoRAError):
        return
    saved = read_adapter(root / "saved")
    assert saved.header is not None
    trained = {
        fqn: each.float() if each.dtype.is_floating_point and each.itemsize == 2 else each
        for fqn, each in file.trained.items()
    }
    _check_same(replace(file, trained=trained), saved)  # copies of 16 bits are trained in float32


def model_of(shapes: Mapping[str, Shape], parameters: Mapping[str, Tensor]) -> nn.Module:
    """Build a model with linear layers and further parameters of these names, as far as torch allows them."""
    model = nn.Module()
    for fqn, shape in shapes.items():
        *path, last = fqn.split(".")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layer = nn.Linear(shape[-1], shape[-2]) if len(shape) == 2 else nn.Parameter(torch.ones(shape))
        _place(model, path, last, layer)
    for fqn, tensor in parameters.items():
        *path, last = fqn.split(".")
        _place(model, path, last, nn.Parameter(torch.ones_like(tensor)))
    return model


def _place(model: nn.Module, path: list[str], last: str, part: nn.Module | nn.Parameter) -> None:
    try:
        for name in path:
            if name not in model._modules:
                model.add_module(name, nn.Module())
            model = model.get_submodule(name)
        if isinstance(part, nn.Parameter):
            model.register_parameter(last, part)
        else:
            model.add_module(last, part)
    except (AttributeError, KeyError):  # a name that no module can have
        return
