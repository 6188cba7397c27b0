"""The update of a part of a weight: that part of the update of the whole weight, from a part of the bases."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from randlora.bases.basis import Basis
from randlora.bases.spec import BasisSpec
from randlora.errors import AdapterError
from randlora.functional import BlockPair, Compute, adapted_linear, delta_weight
from randlora.functional.region import Region, Sides, Spans, all_of, take_spans
from randlora.layers.weight import Update
from randlora.sharded.places import fewest_spans
from tests.further import further
from tests.read_kinds import READ_KINDS, ReadKind
from tests.strategies import specs

CPU = torch.device("cpu")


def partition(data: st.DataObject, size: int) -> list[Spans]:
    """Cut ``range(size)`` into pieces that are not empty, and make one to three parts of them."""
    cuts = data.draw(st.sets(st.integers(1, max(1, size - 1)), max_size=4)) if size > 1 else set()
    pieces = list(itertools.pairwise([0, *sorted(cuts), size]))
    parts = data.draw(st.lists(st.integers(0, 2), min_size=len(pieces), max_size=len(pieces)))
    return [
        fewest_spans(piece for piece, part in zip(pieces, parts, strict=True) if part == number)
        for number in sorted(set(parts))
    ]


def drawn(spec: BasisSpec, data: st.DataObject, *matrices: int) -> tuple[Update, list[Spans], list[Spans]]:
    max_dim = data.draw(st.integers(1, spec.max_dim))
    min_dim = data.draw(st.integers(1, min(max_dim, spec.min_dim)))
    out, into = (max_dim, min_dim) if data.draw(st.booleans()) else (min_dim, max_dim)
    basis = Basis(spec)
    basis.extend(spec.max_dim, spec.min_dim)
    num_bases = -(-min_dim // spec.r)
    lam, gamma = torch.randn(*matrices, spec.r, num_bases), torch.randn(*matrices, num_bases, min_dim)
    update = Update(basis, lam.double(), gamma.double(), 0.7, (*matrices, out, into))
    return update, partition(data, out), partition(data, into)


def formed(update: Update, dtype: torch.dtype = torch.float64) -> Tensor:
    return delta_weight(*update.parts(CPU, dtype), is_wide=update.is_wide)


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float64, 1e-12), further(torch.float32, 1e-6), (torch.bfloat16, 2**-6)]
)
@given(specs(), st.data(), st.sampled_from([(), (3,)]))
def test_the_update_of_a_region_is_that_part_of_the_whole_update(
    dtype: torch.dtype, most: float, spec: BasisSpec, data: st.DataObject, matrices: tuple[int, ...]
) -> None:
    update, rows, columns = drawn(spec, data, *matrices)
    whole = formed(update, dtype)
    assert all(part.is_meta for part in update.parts(torch.device("meta"), dtype)[1][:2]), "as where it is asked for"
    scale = whole.abs().max().clamp(min=1e-30)
    for one, other in itertools.product(rows, columns):
        for part in partition(data, 3)[:1] if matrices else [None]:
            region = Region(one, other) if part is None else Region(one, other, part)
            taken = [whole] if part is None else take_spans(whole, part, 0)
            expected = torch.stack([region.of(matrix) for matrix in taken])
            error = (formed(update.within(region), dtype) - (expected if matrices else expected[0])).abs().max() / scale
            assert error <= most


@pytest.mark.parametrize("compute", ["auto", "factored", "materialized"])
@given(specs(), st.data())
def test_gradients_of_parts_add_up_to_those_of_the_whole(
    compute: Compute, spec: BasisSpec, data: st.DataObject
) -> None:
    update, rows, columns = drawn(spec, data)
    out, into = update.shape
    trained = [update.lam.requires_grad_(), update.gamma.requires_grad_()]
    weight = torch.randn(out, into, dtype=torch.float64)
    x, upstream = (torch.randn(3, size, dtype=torch.float64) for size in (into, out))
    x.requires_grad_()
    output = adapted_linear(x, *update.parts(CPU, torch.float64), weight=weight, compute=compute)
    expected = torch.autograd.grad(output, [x, *trained], upstream)
    total = torch.zeros_like(output)
    for region in (Region(one, other) for one in rows for other in columns):
        part = adapted_linear(
            take_spans(x, region.columns, 1),
            *update.within(region).parts(CPU, torch.float64),
            weight=region.of(weight),
            compute=compute,
            is_wide=update.is_wide,
        )
        total = total.index_add(1, torch.tensor([row for span in region.rows for row in range(*span)]), part)
    torch.testing.assert_close(total, output)
    torch.testing.assert_close(torch.autograd.grad(total, [x, *trained], upstream), expected)


def test_a_part_of_the_bases_is_made_once_and_keeps_the_form_of_blocks_that_it_begins_with() -> None:
    basis = Basis(BasisSpec("block", "portable", 0, 8, 48, 32, (2, 4)))
    basis.extend(48, 32)
    ask: Any = {"device": CPU, "dtype": torch.float32}
    whole, kept = basis.pair(48, 32, **ask), basis.pair(48, 32, **ask, sides=Sides(((24, 48),), ((16, 32),)))
    assert basis.pair(48, 32, **ask, sides=Sides(((24, 48),), ((16, 32),))) is kept
    assert isinstance(kept, BlockPair)
    assert kept.B.untyped_storage().data_ptr() == whole.B.data_ptr()
    for sides in (Sides(((0, 12), (24, 38)), ((0, 8), (16, 32))), Sides(((0, 48),), ((2, 6), (8, 32)))):
        assert isinstance(basis.pair(48, 32, **ask, sides=sides), BlockPair)
    for sides in (Sides(((23, 48),), ((16, 32),)), Sides(((0, 10), (24, 36)), ((16, 32),))):
        part = basis.pair(48, 32, **ask, sides=sides)
        assert not isinstance(part, BlockPair)
        assert part.B.untyped_storage().nbytes() == part.B.nbytes, "and is no view of more"


LINEAR = ReadKind("Linear", "linear", lambda: nn.Linear(12, 20), lambda: (torch.randn(2, 12),))


@pytest.mark.product
@pytest.mark.parametrize("kind", [LINEAR, *READ_KINDS], ids=lambda kind: kind.name)
def test_a_part_of_a_weight_of_any_kind_is_merged_into_as_the_whole_is(kind: ReadKind) -> None:
    for basis in ("dense", "block"):
        model = kind.adapted(basis=basis)
        layer, weight = kind.layer(model), kind.weight(model).detach()
        updates = [layer.update(kind.owner(model), part, 1.0) for part in layer.adapters.values()]
        whole = layer.with_updates(weight, updates)
        for dim, size in enumerate(weight.shape[: 3 if kind.kind == "experts" else 2]):
            quarter = max(1, size // 4)
            for spans in (((0, size // 2),), ((size // 2, size),), ((0, quarter), (size - quarter, size))):
                held = [all_of(length) for length in weight.shape]
                held[dim] = spans
                local = take_spans(weight, spans, dim).clone()
                merged = layer.part_with_updates(local, tuple(held), tuple(weight.shape), updates)
                torch.testing.assert_close(merged, take_spans(whole, spans, dim), rtol=1e-6, atol=1e-6)
        if kind.kind == "convolution":
            inside = (*map(all_of, weight.shape[:-1]), ((0, weight.shape[-1] - 1),))
            with pytest.raises(AdapterError, match=r"is split inside, into .*: split its channels"):
                layer.region_of(tuple(weight.shape), inside)
