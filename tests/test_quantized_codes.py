"""The codes of bitsandbytes: what they are written out as, and how weights are rounded to them."""

import re
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, Params4bit
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from randlora.errors import how_to_install
from randlora.quantized import bnb
from tests.codes import assert_rounded_to_nearest, step, written_out
from tests.kit import same_bits

quant_types = st.sampled_from(bnb.QUANT_TYPES)
blocksizes = st.sampled_from([32, 64, 128])
shapes = st.tuples(st.integers(1, 40), st.integers(1, 40))
storages = st.sampled_from([torch.uint8, torch.bfloat16, torch.float32])


def quantized(weight: Tensor, quant_type: str, blocksize: int, nested: bool, storage: torch.dtype) -> Linear4bit:
    layer = Linear4bit(weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.float32)
    layer.weight = Params4bit(
        weight, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type, quant_storage=storage
    )
    layer.to("cpu")
    return layer


@given(shape=shapes, quant_type=quant_types, blocksize=blocksizes, nested=st.booleans(), storage=storages)
def test_4_bit_codes_are_written_out_as_their_tables_say(
    shape: tuple[int, int], quant_type: str, blocksize: int, nested: bool, storage: torch.dtype
) -> None:
    assume(shape[0] * shape[1] % 8 == 0 or storage == torch.uint8)
    layer = quantized(torch.randn(shape), quant_type, blocksize, nested, storage)
    found, expected = bnb.write_out_4bit(layer.weight.data, layer.weight.quant_state), written_out(layer)
    is_misread = not torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert bnb.is_misread(layer.weight.data, layer.weight.quant_state) == is_misread
    assert not is_misread or shape[1] % blocksize  # rows that blocks divide are always read right


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_codes_are_written_out_in_any_dtype_rounded_once(dtype: torch.dtype) -> None:
    layer = quantized(torch.randn(20, 64), "nf4", 64, True, torch.uint8)
    exact = bnb.write_out_4bit(layer.weight.data, layer.weight.quant_state)
    assert same_bits(bnb.write_out_4bit(layer.weight.data, layer.weight.quant_state, dtype), exact.to(dtype))


@given(shape=shapes, quant_type=quant_types, blocksize=blocksizes, storage=storages)
def test_rounding_what_codes_stand_for_gives_the_codes(
    shape: tuple[int, int], quant_type: str, blocksize: int, storage: torch.dtype
) -> None:
    assume(shape[0] * shape[1] % 8 == 0 or storage == torch.uint8)
    layer = quantized(torch.randn(shape), quant_type, blocksize, False, storage)
    state = layer.weight.quant_state
    meant = written_out(layer)
    codes, found = bnb.round_to_4bit(meant.float(), state, storage)
    assert codes.dtype == storage
    layer.weight = Params4bit(codes, quant_state=found, bnb_quantized=True)
    torch.testing.assert_close(written_out(layer), meant)  # not the codes: FP4 has two for zero
    assert (found.blocksize, found.quant_type, found.dtype, found.shape) == (
        blocksize,
        quant_type,
        torch.float32,
        shape,
    )


@given(shape=shapes, quant_type=quant_types, blocksize=blocksizes, nested=st.booleans(), scale=st.floats(1e-3, 1e3))
def test_4_bit_rounding_goes_to_the_nearest_level(
    shape: tuple[int, int], quant_type: str, blocksize: int, nested: bool, scale: float
) -> None:
    like = quantized(torch.randn(shape), quant_type, blocksize, nested, torch.uint8)
    weight = torch.randn(shape) * scale
    codes, state = bnb.round_to_4bit(weight, like.weight.quant_state, torch.uint8)
    like.weight = Params4bit(codes, quant_state=state, bnb_quantized=True)
    assert_rounded_to_nearest(like, weight)
    assert bnb.step_4bit(state) == pytest.approx(step(like).max().item(), rel=1e-5)


def test_the_dtype_that_codes_came_from_is_kept() -> None:
    layer = quantized(torch.randn(20, 64, dtype=torch.bfloat16), "nf4", 64, True, torch.uint8)
    _, state = bnb.round_to_4bit(torch.randn(20, 64), layer.weight.quant_state, torch.uint8)
    assert state.dtype == torch.bfloat16


@given(shape=shapes, scale=st.floats(1e-6, 1e6))
def test_8_bit_rounding_goes_to_the_nearest_level(shape: tuple[int, int], scale: float) -> None:
    weight = torch.randn(shape) * scale
    weight[0] = 0
    codes, scales = bnb.round_to_8bit(weight)
    error = (bnb.write_out_8bit(codes, scales) - weight).abs()
    assert codes.dtype == torch.int8
    assert (codes[0] == 0).all()
    assert (error <= (scales / 127 / 2).unsqueeze(1) * (1 + 1e-4)).all()
    again, same = bnb.round_to_8bit(bnb.write_out_8bit(codes, scales))
    assert torch.equal(again, codes)
    torch.testing.assert_close(same, scales)


def test_8_bit_rounding_is_finer_than_the_way_through_float16() -> None:
    weight = torch.randn(64, 64)
    codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
    theirs = (bnb.write_out_8bit(codes, scales) - weight).abs().max()
    ours = (bnb.write_out_8bit(*bnb.round_to_8bit(weight)) - weight).abs().max()
    assert ours < theirs


@pytest.fixture
def _ask_anew() -> object:
    bnb.missing.cache_clear()
    yield
    bnb.missing.cache_clear()


@pytest.mark.usefixtures("_ask_anew")
@pytest.mark.parametrize(
    ("found", "said"),
    [
        ("0.45.5", r"needs bitsandbytes 0\.50 or newer, found 0\.45\.5: python -m pip install --upgrade bitsandbytes"),
        (None, re.escape(f"needs bitsandbytes, which is not installed: {how_to_install('bnb')}")),
    ],
)
def test_a_bitsandbytes_that_is_missing_or_too_old_is_named_with_the_extra(
    found: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(_name: str) -> str:
        if found is None:
            raise PackageNotFoundError
        return found

    monkeypatch.setattr(bnb, "version", version)
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(bnb.missing())


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_what_bitsandbytes_repacks_has_the_private_names_that_are_read_here(storage: torch.dtype, nested: bool) -> None:
    """On every CPU, because packing itself is plain torch. See randlora/quantized/bnb.py."""
    layer = quantized(torch.randn(32, 64), "nf4", 64, nested, storage)
    assert hasattr(layer, bnb.MAY_REPACK)
    codes, state, wanted = layer.weight.data.clone(), layer.weight.quant_state, written_out(layer)
    assert bnb.quantization(state, storage) == (nested, torch.float32, storage)
    layer.weight.data, layer.quant_state = functional._convert_weight_packed_for_cpu(layer.weight.data, state)
    assert state.packing_format_for_cpu
    assert bnb.is_out_of_order(state)
    assert not bnb.is_out_of_order(state, repacked=False)
    assert bnb.quantization(state, torch.uint8) == (nested, torch.float32, storage)
    found = bnb.write_out_4bit(layer.weight.data, state)
    torch.testing.assert_close(found.double(), wanted, rtol=0.01, atol=0)  # the scales are rounded
    bnb.restore_order(layer.weight, state)
    assert torch.equal(layer.weight.data.view(torch.uint8), codes.view(torch.uint8))
    assert not bnb.is_out_of_order(state)
    torch.testing.assert_close(written_out(layer), wanted, rtol=0.01, atol=0)


def test_the_state_of_codes_is_found_at_the_layer_where_the_weight_lost_it() -> None:
    """As sharding leaves it."""
    layer = quantized(torch.randn(8, 64), "nf4", 64, False, torch.uint8)
    state, bare = layer.weight.quant_state, nn.Parameter(layer.weight.data, requires_grad=False)
    layer.quant_state = state
    assert bnb.quant_state(layer, bare) is state
