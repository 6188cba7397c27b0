"""The registry of kinds of bases."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import torch
from torch import nn

import randlora
from randlora.bases.basis import Basis
from randlora.bases.compact import CompactMatrix
from randlora.bases.kinds import DENSE
from randlora.bases.spec import KINDS, BasisSpec, count_bases
from randlora.config import OPTIONS, BasisKind
from randlora.errors import ConfigError
from tests.kit import fill, same_bits
from tests.laws import assert_close
from tests.strategies import KINDS_AND_STREAMS


def test_every_name_of_a_kind_is_registered_and_no_other() -> None:
    assert set(KINDS) == set(get_args(BasisKind))


def test_every_kind_is_tested_with_every_stream_that_it_has() -> None:
    assert {(name, stream) for name, kind in KINDS.items() for stream in kind.draws} == set(KINDS_AND_STREAMS)


def test_no_two_kinds_are_the_same_to_peft() -> None:
    flags = [kind.peft_flags for kind in KINDS.values() if kind.peft_flags is not None]
    assert len(flags) == len(set(flags))


@pytest.mark.parametrize("name", get_args(BasisKind))
def test_the_dtype_of_a_kind_is_that_of_its_draws(name: BasisKind) -> None:
    for stream in KINDS[name].draws:
        basis = Basis(BasisSpec(name, stream, 0, 8, 40, 24, KINDS[name].default_blocks(8, ())))
        basis.extend(40, 24)
        assert {matrix.values.dtype for matrix in basis.matrices()} == {KINDS[name].dtype}


@pytest.fixture
def new_kind(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Register a kind, as its one file would, and name it."""

    def draw(spec: BasisSpec, max_dim: int, min_dim: int) -> tuple[CompactMatrix, CompactMatrix]:
        columns_B = count_bases(min_dim, spec.r) * spec.r
        sizes = ((spec.r, min_dim), (max_dim, columns_B))
        drawn = [torch.outer(torch.arange(rows), torch.arange(columns)).sin().bfloat16() for rows, columns in sizes]
        return CompactMatrix(drawn[0], min_dim), CompactMatrix(drawn[1], columns_B)

    monkeypatch.setitem(KINDS, "sine", replace(DENSE, draws={"portable": draw}, peft_flags=None))  # type: ignore[misc]
    monkeypatch.setitem(OPTIONS, "basis", replace(OPTIONS["basis"], type=Literal["dense", "sparse", "block", "sine"]))
    return "sine"


def test_a_new_kind_is_an_entry_and_a_name(new_kind: Any, tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))
    model, x = nn.Sequential(*plain), torch.randn(3, 8)
    spec = randlora.inject(model, r=4, targets="all-linear", basis=new_kind).specs[0]
    assert (spec.kind, spec.stream) == ("sine", "portable")
    fill(model)
    adapted = model(x)
    randlora.save(model, tmp_path / "adapter")
    randlora.eject(model)
    assert not torch.allclose(model(x), adapted)
    randlora.load(model, tmp_path / "adapter")
    assert same_bits(model(x), adapted)
    randlora.merge(model)
    assert_close(model(x).detach(), adapted.detach(), torch.float32)


def test_a_stream_that_a_kind_does_not_have_is_refused(new_kind: Any) -> None:
    with pytest.raises(ConfigError, match="sine bases need stream=portable, got stream='torch'"):
        randlora.plan(nn.Sequential(nn.Linear(8, 12)), r=4, targets="all-linear", basis=new_kind, stream="torch")
