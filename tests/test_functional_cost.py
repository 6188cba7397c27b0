"""What the operation keeps for backward, how large its temporaries are, how many products, and which it chooses."""

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from randlora.functional import Compute, adapted_linear, delta_weight, scratch, update_rows
from randlora.functional.cost import (
    ON_CPU,
    ON_GPU,
    SMALL_WEIGHT,
    Sizes,
    Way,
    backward_ways,
    forward_way,
    is_small,
    pass_over,
)
from randlora.modes import Observer
from tests.pairs import Case, case, every_form

every_way = pytest.mark.parametrize("compute", get_args(Compute))
every_shape = pytest.mark.parametrize("shape", [(24, 24), (24, 40), (40, 24)], ids=["square", "down", "up"])


def kept_by(run: Callable[[], Any]) -> list[Tensor]:
    """Run forward and collect what autograd keeps."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return kept


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def prepared(form: str, shape: tuple[int, int], tokens: int, *, trains: bool = True) -> tuple[Case, Tensor, Tensor]:
    made = case(form, *shape, 4)
    x = torch.randn(tokens, shape[1], dtype=torch.float64, requires_grad=True)
    for tensor in made.diagonals[:2]:
        tensor.requires_grad_(trains)
    return made, x, torch.randn(shape, dtype=torch.float64)


class Watch(Observer):
    """Notes the largest tensor that operations make, and how many compute or copy.

    Of matrices of a shape that are multiplied into new memory, it notes which of some tensors live meanwhile.
    """

    def __init__(self, shape: tuple[int, int] = (0, 0)) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.entries, self.kernels = 0, 0
        self.shape, self.products, self.living = shape, 0, 0
        self.written: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at what it made."""
        result = func(*args, **(kwargs or {}))
        is_view = any(alias.alias_info is not None and not alias.alias_info.is_write for alias in func._schema.returns)
        self.kernels += not (is_view or func is torch.ops.aten._unsafe_view.default)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor._is_view():
                self.entries = max(self.entries, tensor.numel())
        if func is torch.ops.aten.mm.default and result.shape == self.shape:
            self.products += 1
            self.living += sum(reference() is not None for reference in self.written)
        return result


@every_form
@every_way
@every_shape
@pytest.mark.parametrize("tokens", [1, 100])
def test_backward_keeps_what_it_was_given_and_makes_nothing_larger(
    form: str, compute: Compute, shape: tuple[int, int], tokens: int
) -> None:
    """PEFT keeps ``min_dim²`` numbers a layer beside it."""
    made, x, weight = prepared(form, shape, tokens)
    given = {storage(tensor) for tensor in (x, weight, *made.diagonals[:2])}
    outputs: list[Tensor] = []

    def forward() -> None:
        outputs.append(adapted_linear(x, made.pair, made.diagonals, weight=weight, compute=compute))

    with Watch() as watch:
        kept = kept_by(forward)
        outputs[0].sum().backward()
    assert {storage(tensor) for tensor in kept} == given
    if form != "block(3,1)":  # whose blocks are filled up to a multiple of three
        assert watch.entries <= max(weight.numel(), tokens * max(shape))


@every_form
def test_nothing_is_kept_for_what_needs_no_gradient_and_of_updates_the_diagonals_alone(form: str) -> None:
    made, x, weight = prepared(form, (24, 24), 7, trains=False)
    kept = kept_by(lambda: adapted_linear(x, made.pair, made.diagonals, weight=weight))
    assert storage(x) not in {storage(tensor) for tensor in kept}
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert kept_by(lambda: adapted_linear(x, made.pair, made.diagonals, weight=weight)) == []
    trained = {storage(part.requires_grad_()) for part in made.diagonals[:2]}
    kept = kept_by(lambda: delta_weight(made.pair, made.diagonals, is_wide=True))
    assert {storage(tensor) for tensor in kept} == trained


@every_form
def test_rows_make_no_tensor_of_the_size_of_the_table_and_keep_the_diagonals_and_the_indices(form: str) -> None:
    made, ids, outputs = case(form, 400, 8, 4), torch.tensor([[7, 399, 7], [0, 12, 7]]), []
    given = {storage(tensor.requires_grad_()) for tensor in made.diagonals[:2]}

    def forward() -> None:
        outputs.append(update_rows(ids, made.pair, made.diagonals, num_rows=400, is_wide=True))

    with Watch() as before:
        kept = kept_by(forward)
    with Watch() as backward:
        outputs[0].sum().backward()
    assert 0 < before.entries < 400
    assert 0 < backward.entries < 400
    assert {storage(tensor) for tensor in kept} >= given
    assert all(storage(tensor) in given or not tensor.is_floating_point() for tensor in kept)


@pytest.mark.parametrize("form", ["dense", "block(2,4)"])
@every_way
@every_shape
def test_a_weight_that_was_written_out_is_summed_into_and_gone_before_a_gradient_of_its_size_comes(
    form: str, compute: Compute, shape: tuple[int, int]
) -> None:
    made, x, weight = prepared(form, shape, 200)

    def write_out(dtype: torch.dtype) -> Tensor:
        written = weight.to(dtype, copy=True)
        watch.written.append(weakref.ref(written))
        last.append(written)
        return written

    last: deque[Tensor] = deque(maxlen=0)
    with Watch(shape) as watch:
        adapted_linear(x, made.pair, made.diagonals, weight=write_out, compute=compute).sum().backward()
    assert len(watch.written) == 2
    assert watch.products > 0 or compute != "materialized"
    assert watch.living == 0
    last = deque()
    with torch.no_grad():
        update = delta_weight(made.pair, made.diagonals, is_wide=shape[1] == min(shape))
        adapted_linear(x, made.pair, made.diagonals, weight=write_out, compute="materialized")
    if form == "dense":
        torch.testing.assert_close(last[0], weight + update)


@pytest.mark.parametrize(
    ("form", "compute", "shape", "needs", "expected"),
    [
        # 2·(base twice, each factor in forward, input gradient and that of Λ and Γ: 6 less the one shared)
        ("dense", "factored", (32, 32), "all", lambda t: 2 * t * 32 * 32 * (2 + 5)),
        # forward, input gradient, weight gradient; the update twice and its gradient
        ("dense", "materialized", (32, 32), "all", lambda t: 2 * t * 32 * 32 * 3 + 2 * 32**3 * 3),
        ("block(2,4)", "factored", (32, 32), "all", lambda t: 2 * t * 32 * 32 * (2 + 3 / 2 + 2 / 4)),
        ("block(2,4)", "materialized", (32, 32), "all", lambda t: 2 * t * 32 * 32 * 3 + 2 * 32**3 * 3 / 8),
        # without a weight: two products in forward, two for the input, two for Λ and Γ
        *(
            ("dense", "factored", shape, needs, lambda t: 2 * t * 20 * (20 + 28) * 2)
            for shape in ((20, 28), (28, 20))
            for needs in ("input", "diagonals")
        ),
    ],
)
def test_a_step_makes_the_products_that_the_cost_model_says_for_what_is_asked_and_no_more(
    form: str, compute: Compute, shape: tuple[int, int], needs: str, expected: Callable[[int], float]
) -> None:
    made, x, weight = prepared(form, shape, tokens := 10, trains=needs != "input")
    x.requires_grad_(needs != "diagonals")
    with FlopCounterMode(display=False) as counter:
        base = weight if needs == "all" else None
        adapted_linear(x, made.pair, made.diagonals, weight=base, compute=compute).sum().backward()
    assert counter.get_total_flops() == expected(tokens)
    assert [each.grad is not None for each in (x, made.diagonals.lam)] == [needs != "diagonals", needs != "input"]


@every_shape
def test_gradients_summed_over_strips_of_tokens_are_those_of_all_tokens(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, x, weight = prepared("block(2,4)", shape, 1000)
    found, kernels = [], []
    for entries in (2**14, 2**20):
        monkeypatch.setattr(scratch, "STRIP", entries)
        output = adapted_linear(x.detach(), made.pair, made.diagonals, weight=weight, compute="factored")
        with Watch() as watch:
            found.append(torch.autograd.grad(output.sin().sum(), made.diagonals[:2]))
        kernels.append(watch.kernels)
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)
    assert kernels[0] > kernels[1]


# The choice among ways to compute: a pure function of sizes

BLOCK = (1 / 4, 1 / 8, 1 / 32)


def sizes(
    tokens: int, into: int = 1024, out: int = 1024, shares: Any = (1.0, 1.0, 1.0), *, has_weight: bool = True
) -> Sizes:
    max_dim, min_dim = max(into, out), min(into, out)
    num_bases = -(-min_dim // 32)
    return Sizes(tokens, max_dim, min_dim, 32 * num_bases, num_bases, shares, into <= out, has_weight)


@pytest.mark.parametrize(
    ("found", "forward", "backward"),
    [
        (sizes(1), "few_tokens", ("few_tokens", "few_tokens")),
        (sizes(128), "factored", ("factored", "factored")),
        (sizes(8192), "materialized", ("materialized", "materialized")),
        (sizes(1, shares=BLOCK), "few_tokens", ("few_tokens", "few_tokens")),
        (sizes(128, shares=BLOCK), "factored", ("factored", "factored")),
        (sizes(8192, shares=BLOCK), "materialized", ("materialized", "factored")),
        (sizes(1, 128, 128), "few_tokens", ("factored", "factored")),  # of fewer operators
        (sizes(1, 256, 256), "few_tokens", ("few_tokens", "few_tokens")),
    ],
    ids=str,
)
def test_a_square_layer_takes_the_ways_that_were_measured_fastest(
    found: Sizes, forward: Way, backward: tuple[Way, Way]
) -> None:
    assert forward_way(found) == forward
    assert backward_ways(found, needs_input=True, needs_diagonals=True) == backward


def test_an_update_without_a_weight_to_be_added_to_is_formed_later_and_where_passes_are_dear() -> None:
    """Then the tokens pass one product more. What a pass costs depends on the device and the dtype."""
    assert forward_way(sizes(900)) == "materialized"
    assert forward_way(sizes(900, has_weight=False)) == "factored"
    assert forward_way(sizes(1400, has_weight=False)) == "materialized"
    cheap, dear = (sizes(600, shares=BLOCK)._replace(entry=entry) for entry in (40, 400))
    assert (forward_way(cheap), forward_way(dear)) == ("materialized", "factored")
    for has_weight_gradient, way in ((False, "factored"), (True, "materialized")):  # which is not paid for again
        asked = {"needs_input": False, "needs_diagonals": True, "needs_weight": has_weight_gradient}
        assert backward_ways(sizes(800), **asked)[1] == way
    assert pass_over("cpu", torch.bfloat16) == ON_CPU
    assert pass_over("cuda", torch.bfloat16).multiply_adds > pass_over("cuda", torch.float32).multiply_adds
    assert pass_over("xpu", torch.float8_e4m3fn) == ON_GPU[torch.float32]
    assert [ON_CPU.is_measured, any(found.is_measured for found in ON_GPU.values())] == [True, False]
    small = [is_small(*work) for work in ((16, 256 * 256), (17, 256 * 256), (4, SMALL_WEIGHT), (1.0, 1))]
    assert small == [True, False, True, False]


@given(
    shape=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    tokens=st.integers(0, 100_000),
    shares=st.sampled_from([(1.0, 1.0, 1.0), BLOCK]),
)
def test_few_tokens_take_no_more_room_than_the_weight_and_more_lead_to_the_materialized_way(
    shape: tuple[int, int], tokens: int, shares: tuple[float, float, float]
) -> None:
    few, many = (sizes(count, *shape, shares) for count in (tokens, 2 * tokens + 1))
    assert forward_way(few) != "materialized" or forward_way(many) == "materialized"
    assert forward_way(few) != "few_tokens" or few.laid_out <= shape[0] * shape[1]
