"""The benchmark of quantized layers: who is compared on what, and that no dense copy of the weight goes unseen."""

from collections.abc import Callable, Iterator

import bitsandbytes
import pytest
import torch
from torch import nn

from benchmarks import held, quantized
from benchmarks.layers import CONTESTANTS, UnderAutocast, training_step
from benchmarks.quantized import Case, refuse_a_dense_copy
from benchmarks.results import Row
from benchmarks.targets import TARGETS
from randlora.layers.in_place import InPlace
from tests.further import further

pytestmark = pytest.mark.medium

every_form = pytest.mark.parametrize("form", quantized.FORMS)
SMALL = {"in_features": 128, "out_features": 128}


@pytest.fixture(autouse=True)
def _without_what_other_tests_made() -> Iterator[None]:
    with held.among_new_objects():
        yield


def small(form: str, tokens: int = 4) -> Case:
    return Case(form, torch.float32, tokens, **SMALL)


def test_every_target_of_quantized_layers_has_its_row() -> None:
    rows = {f"{before}{case}" for case in quantized.GATED for before in ("", "held, ", "kept, ", "needed, ")}
    assert {target.case for target in TARGETS if target.benchmark == "quantized"} <= rows


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_contestants_adapt_the_same_codes(form: str, dtype: torch.dtype) -> None:
    case = Case(form, dtype, 4, **SMALL)
    codes = []
    for name, adapt in quantized.contestants(case, quantized.NAMES).items():
        layer = quantized.build(case, adapt, "cpu")
        assert layer.training
        base = layer.inner[0] if isinstance(layer, UnderAutocast) else layer[0]  # type: ignore[index]
        kind = type(base).__module__.split(".")[0]
        is_ours = name in {"dense", "block"}
        assert kind == ("bitsandbytes" if is_ours or name == "frozen" else "peft")
        assert isinstance(base, InPlace) == is_ours
        if kind == "peft":
            assert type(base).__module__.endswith(".bnb")
        base = getattr(base, "base_layer", base)
        assert isinstance(base, bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt)
        codes.append(base.weight.data)
    assert all(torch.equal(codes[0], others) for others in codes)


def test_the_scales_of_nf4_are_quantized_too() -> None:
    layer = quantized.build(small("NF4"), CONTESTANTS["frozen"], "cpu")[0]  # type: ignore[index]
    assert layer.weight.quant_state.nested


@every_form
def test_ours_keep_the_input_and_peft_a_square_matrix_beside_it(form: str) -> None:
    case = small(form)
    kept = {}
    for name in ("PEFT", "dense", "block"):
        x, _ = quantized.given(case, "cpu")
        layer = quantized.build(case, CONTESTANTS[name], "cpu")
        layer(x)  # the first time, ours copy the bases that all layers share
        kept[name] = held.kept_for_backward(layer, x)
    assert kept["dense"] == kept["block"] == x.nbytes
    assert kept["PEFT"] == x.nbytes + case.dense_bytes


@every_form
@pytest.mark.parametrize("name", ["dense", further("block")])
def test_a_further_layer_holds_codes_scales_and_what_is_trained(form: str, name: str) -> None:
    layer = quantized.build(small(form), CONTESTANTS[name], "cpu")[0]  # type: ignore[index]
    trained = sum(parameter.nbytes for parameter in layer.parameters() if parameter.requires_grad)
    if form == "NF4":
        state = layer.weight.quant_state
        parts = [state.absmax, state.offset, state.code, state.state2.absmax, state.state2.code]
    else:
        parts = [layer.weight.SCB]
    own = layer.weight.nbytes + sum(part.nbytes for part in parts)
    assert quantized.held(small(form), CONTESTANTS[name], "cpu") == own + trained


class Hoarder(nn.Module):
    """Keeps a matrix where autograd's hooks do not look."""

    def __init__(self, *, in_forward: bool) -> None:
        super().__init__()
        self.in_forward = in_forward
        self.weight = nn.Parameter(torch.ones(1))
        self.hidden: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a multiple of the input."""
        if self.in_forward or not self.hidden:
            self.hidden.append(torch.ones(128, 128))
        return x * self.weight


def test_a_copy_that_is_kept_outside_of_autograd_is_found_and_refused() -> None:
    case, layer = small("NF4"), Hoarder(in_forward=True)
    x, _ = quantized.given(case, "cpu")
    assert held.kept_for_backward(layer, x) == x.nbytes + case.dense_bytes
    with pytest.raises(RuntimeError, match=r"dense, NF4, float32, T = 4, 128→128: 65536 bytes stay"):
        refuse_a_dense_copy("dense", case, case.dense_bytes)
    refuse_a_dense_copy("dense", case, case.dense_bytes - 1)


@pytest.mark.parametrize("in_forward", [True, False])
def test_the_benchmark_stops_where_ours_hold_a_copy(in_forward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def hoard(model: nn.Sequential) -> nn.Module:
        return nn.Sequential(*(Hoarder(in_forward=in_forward) for _ in model))

    assert _rows(CONTESTANTS["dense"])
    with pytest.raises(RuntimeError, match="bytes stay"):
        _rows(hoard)


def _rows(adapt: Callable[[nn.Sequential], nn.Module]) -> list[Row]:
    return quantized.measured(small("NF4", tokens=2), {"dense": adapt}, "cpu")


def test_the_peak_of_a_step_is_the_most_that_lives_at_once() -> None:
    def step() -> None:
        one = torch.empty(1000)
        two = torch.empty(2000)
        del one, two
        torch.empty(2500)

    assert held.peak_of(step, "cpu") == pytest.approx(3000 * 4, abs=1000)


def test_what_lived_before_is_not_counted() -> None:
    before_all = torch.ones(10)
    before = held.alive()
    made = torch.ones(100)
    view = before_all[:5]
    assert held.bytes_since(before) == made.nbytes
    assert len(view) == 5


@every_form
def test_a_step_of_a_quantized_layer_gives_its_input_a_gradient(form: str) -> None:
    x, grad = quantized.given(small(form), "cpu")
    training_step(quantized.build(small(form), CONTESTANTS["dense"], "cpu"), x, grad)()
    assert x.grad is not None
