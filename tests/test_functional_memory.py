"""What the operation keeps for backward, how large its temporaries are, and how many products it makes."""

import weakref
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from randlora.functional import Compute, adapted_linear, delta_weight, scratch, update_rows
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
def test_nothing_is_kept_for_what_needs_no_gradient(form: str) -> None:
    made, x, weight = prepared(form, (24, 24), 7, trains=False)
    kept = kept_by(lambda: adapted_linear(x, made.pair, made.diagonals, weight=weight))
    assert storage(x) not in {storage(tensor) for tensor in kept}
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert kept_by(lambda: adapted_linear(x, made.pair, made.diagonals, weight=weight)) == []


@every_form
def test_rows_make_no_tensor_of_the_size_of_the_table(form: str) -> None:
    made, ids = case(form, 400, 8, 4), torch.tensor([[7, 399, 7], [0, 12, 7]])
    for tensor in made.diagonals[:2]:
        tensor.requires_grad_()
    with Watch() as forward:
        output = update_rows(ids, made.pair, made.diagonals, num_rows=400, is_wide=True)
    with Watch() as backward:
        output.sum().backward()
    assert 0 < forward.entries < 400
    assert 0 < backward.entries < 400


@every_shape
def test_the_sum_takes_the_memory_of_a_weight_that_was_written_out(shape: tuple[int, int]) -> None:
    made, x, weight = prepared("dense", shape, 7)
    update = delta_weight(made.pair, made.diagonals, is_wide=shape[1] == min(shape)).detach()
    written = weight.clone()
    with torch.no_grad():
        adapted_linear(x, made.pair, made.diagonals, weight=lambda _: written, compute="materialized")
    torch.testing.assert_close(written, weight + update)


@pytest.mark.parametrize("form", ["dense", "block(2,4)"])
@every_way
@every_shape
def test_a_weight_that_was_written_out_is_gone_before_a_gradient_of_its_size_comes(
    form: str, compute: Compute, shape: tuple[int, int]
) -> None:
    made, x, weight = prepared(form, shape, 200)

    def write_out(dtype: torch.dtype) -> Tensor:
        written = weight.to(dtype, copy=True)
        watch.written.append(weakref.ref(written))
        return written

    with Watch(shape) as watch:
        adapted_linear(x, made.pair, made.diagonals, weight=write_out, compute=compute).sum().backward()
    assert len(watch.written) == 2
    assert watch.products > 0 or compute != "materialized"
    assert watch.living == 0


@pytest.mark.parametrize("shape", [(5, 7), (7, 5)], ids=["down", "up"])
@pytest.mark.parametrize("needs", [(True, False, False), (False, True, True)], ids=["input", "adapter"])
def test_backward_makes_the_products_for_what_is_asked_and_no_more(
    shape: tuple[int, int], needs: tuple[bool, bool, bool]
) -> None:
    """Factored, without a weight: two products for the input, two for Λ and Γ."""
    made, x, _ = prepared("dense", shape, 6)
    lam, gamma, _ = made.diagonals
    for tensor, wanted in zip((x, lam, gamma), needs, strict=True):
        tensor.requires_grad_(wanted)
    output = adapted_linear(x, made.pair, made.diagonals, compute="factored")
    with FlopCounterMode(display=False) as counter:
        output.backward(torch.ones_like(output))
    assert tuple(tensor.grad is not None for tensor in (x, lam, gamma)) == needs
    assert counter.get_total_flops() == 2 * 6 * lam.numel() * sum(shape)


@pytest.mark.parametrize(
    ("form", "compute", "expected"),
    [
        # 2·(base twice, each factor in forward, input gradient and that of Λ and Γ: 6 less the one shared)
        ("dense", "factored", lambda t, d: 2 * t * d * d * (2 + 5)),
        # forward, input gradient, weight gradient; the update twice and its gradient
        ("dense", "materialized", lambda t, d: 2 * t * d * d * 3 + 2 * d**3 * 3),
        ("block(2,4)", "factored", lambda t, d: 2 * t * d * d * (2 + 3 / 2 + 2 / 4)),
        ("block(2,4)", "materialized", lambda t, d: 2 * t * d * d * 3 + 2 * d**3 * 3 / 8),
    ],
)
def test_a_step_of_a_square_layer_costs_what_the_cost_model_says(
    form: str, compute: Compute, expected: Callable[[int, int], float]
) -> None:
    tokens, side = 10, 32
    made, x, weight = prepared(form, (side, side), tokens)
    with FlopCounterMode(display=False) as counter:
        adapted_linear(x, made.pair, made.diagonals, weight=weight, compute=compute).sum().backward()
    assert counter.get_total_flops() == expected(tokens, side)


@pytest.mark.parametrize("shape", [(24, 24), (48, 24), (24, 48)], ids=str)
def test_gradients_summed_over_strips_of_tokens_are_those_of_all_tokens(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, x, weight = prepared("block(2,4)", shape, 1000)

    def gradients(entries: int) -> tuple[Tensor, ...]:
        monkeypatch.setattr(scratch, "STRIP", entries)
        output = adapted_linear(x.detach(), made.pair, made.diagonals, weight=weight, compute="factored")
        with Watch() as watch:
            found = torch.autograd.grad(output.sin().sum(), made.diagonals[:2])
        kernels.append(watch.kernels)
        return found

    kernels: list[int] = []
    torch.testing.assert_close(gradients(2**14), gradients(2**20), rtol=1e-10, atol=1e-10)
    assert kernels[0] > kernels[1]
