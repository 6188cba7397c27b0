"""What the operation keeps for backward, how large its temporaries are, and how many products it makes."""

import weakref
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from randlora.functional import Compute, adapted_linear, delta_weight, scratch
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


@every_form
@every_way
@every_shape
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_backward_keeps_what_it_was_given_and_nothing_else(
    form: str, compute: Compute, shape: tuple[int, int], tokens: int
) -> None:
    """PEFT keeps ``min_dim²`` numbers a layer beside it."""
    made, x, weight = prepared(form, shape, tokens)
    given = {storage(tensor) for tensor in (x, weight, *made.diagonals[:2])}
    kept = kept_by(lambda: adapted_linear(x, made.pair, made.diagonals, weight=weight, compute=compute))
    assert {storage(tensor) for tensor in kept} == given


@every_form
def test_saving_on_the_cpu_leaves_the_bases_where_they_are(form: str) -> None:
    made, x, weight = prepared(form, (24, 40), 7)
    adapted_linear(x, made.pair, made.diagonals, weight=weight).sum().backward()
    expected, x.grad = x.grad, None
    with torch.autograd.graph.save_on_cpu():
        adapted_linear(x, made.pair, made.diagonals, weight=weight).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected)


@every_shape
def test_the_sum_takes_the_memory_of_a_weight_that_was_written_out(shape: tuple[int, int]) -> None:
    made, x, weight = prepared("dense", shape, 7)
    update = delta_weight(made.pair, made.diagonals, is_wide=shape[1] == min(shape)).detach()
    written: list[Tensor] = []

    def write_out(dtype: torch.dtype) -> Tensor:
        written.append(weight.to(dtype, copy=True))
        return written[-1]

    with torch.no_grad():
        adapted_linear(x, made.pair, made.diagonals, weight=write_out, compute="materialized")
    torch.testing.assert_close(written[0], weight + update)


class Later(Observer):
    """Notes which of some tensors live while matrices of a shape are multiplied into new memory."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shape, self.products, self.living = shape, 0, 0
        self.written: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation."""
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default and result.shape == self.shape:
            self.products += 1
            self.living += sum(reference() is not None for reference in self.written)
        return result


@pytest.mark.parametrize("form", ["dense", "block(2,4)"])
@every_way
@every_shape
def test_a_weight_that_was_written_out_is_gone_before_a_gradient_of_its_size_comes(
    form: str, compute: Compute, shape: tuple[int, int]
) -> None:
    made, x, weight = prepared(form, shape, 200)

    def write_out(dtype: torch.dtype) -> Tensor:
        written = weight.to(dtype, copy=True)
        later.written.append(weakref.ref(written))
        return written

    with Later(shape) as later:
        adapted_linear(x, made.pair, made.diagonals, weight=write_out, compute=compute).sum().backward()
    assert len(later.written) == 2
    assert later.products > 0 or compute != "materialized"
    assert later.living == 0


@every_form
def test_a_frozen_adapter_lets_the_input_go(form: str) -> None:
    made, x, weight = prepared(form, (24, 24), 7, trains=False)
    kept = kept_by(lambda: adapted_linear(x, made.pair, made.diagonals, weight=weight))
    assert storage(x) not in {storage(tensor) for tensor in kept}


@every_form
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_where_no_gradient_can_be_asked_for(form: str, mode: Callable[[], Any]) -> None:
    made, x, weight = prepared(form, (24, 24), 7)
    with mode():
        assert kept_by(lambda: adapted_linear(x, made.pair, made.diagonals, weight=weight)) == []


class Largest(Observer):
    """Notes the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at what it made."""
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and not tensor._is_view():
                self.entries = max(self.entries, tensor.numel())
        return result


@pytest.mark.parametrize("form", ["dense", "block(2,4)", "block(1,2)"])
@every_way
@every_shape
@pytest.mark.parametrize("tokens", [1, 5, 100])
def test_no_temporary_is_larger_than_weight_input_and_output(
    form: str, compute: Compute, shape: tuple[int, int], tokens: int
) -> None:
    made, x, weight = prepared(form, shape, tokens)
    with Largest() as largest:
        adapted_linear(x, made.pair, made.diagonals, weight=weight, compute=compute).sum().backward()
    assert largest.entries <= max(weight.numel(), tokens * max(shape))


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


class Kernels(Observer):
    """Counts the operations that compute or copy: about the kernels that a GPU would launch."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation."""
        is_view = any(alias.alias_info is not None and not alias.alias_info.is_write for alias in func._schema.returns)
        self.count += not (is_view or func is torch.ops.aten._unsafe_view.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("form", "most"), [("dense", 7), ("block(2,4)", 12)])
@pytest.mark.parametrize("shape", [(64, 64), (64, 96), (96, 64)], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 100])
def test_a_forward_is_few_operations(form: str, most: int, shape: tuple[int, int], tokens: int) -> None:
    made, x, weight = prepared(form, shape, tokens)
    with torch.no_grad(), Kernels() as kernels:
        adapted_linear(x, made.pair, made.diagonals, weight=weight)
    assert kernels.count <= most


@pytest.mark.parametrize("shape", [(24, 24), (48, 24), (24, 48)], ids=str)
def test_gradients_summed_over_strips_of_tokens_are_those_of_all_tokens(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, x, weight = prepared("block(2,4)", shape, 1000)
    x = x.detach()
    strips, taken = scratch.strips, list[int]()

    def counted(*matrices: Tensor, entries: int) -> list[tuple[Tensor, ...]]:
        found = list(strips(*matrices, entries=entries))
        taken.append(len(found))
        return found

    monkeypatch.setattr(scratch, "strips", counted)

    def gradients(entries: int) -> tuple[Tensor, ...]:
        monkeypatch.setattr(scratch, "STRIP", entries)
        output = adapted_linear(x, made.pair, made.diagonals, weight=weight, compute="factored")
        return torch.autograd.grad(output.sin().sum(), made.diagonals[:2])

    torch.testing.assert_close(gradients(1), gradients(2**20), rtol=1e-10, atol=1e-10)
    several, one = taken
    assert several > 5
    assert one == 1
