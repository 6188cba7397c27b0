"""`randlora.check` finds adapted weights that do not do what an adapter is for, and leaves no trace."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import randlora
from randlora.errors import AdapterError
from randlora.layers import registry
from randlora.layers.linear import LinearAdapter
from randlora.targets import census
from tests.further import further
from tests.kit import fill, untouched
from tests.models import bert, clip, image, llama, reproducible, tokens, torchvision_vit
from tests.test_probe import bit_linear, dory_head
from tests.test_readers_parents import PIXELS, swin, wavlm
from tests.transformers_zoo import tiny

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
MODES = ("evaluation mode", "training mode")
Run = Callable[[Any, Tensor], Any]


class Around(nn.Module):
    """Three layers, of which the code of a model uses the second in its own way."""

    def __init__(self, run: Run, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(6, 8), inner or nn.Linear(8, 8), nn.Linear(8, 5)
        self.run, self.is_halved = run, False

    def forward(self, x: Tensor) -> Any:
        return self.last(self.run(self, self.first(x).tanh()))


def reads(self: Any, h: Tensor) -> Tensor:
    return F.linear(h, self.inner.weight, self.inner.bias)


def reads_in_training(self: Any, h: Tensor) -> Tensor:
    return reads(self, h) if self.training else self.inner(h)


def drops(self: Any, h: Tensor) -> Tensor:
    self.inner(h)
    return h


def detaches(self: Any, h: Tensor) -> Tensor:
    return h + self.inner(h).detach()  # type: ignore[no-any-return]


def halves(self: Any, h: Tensor) -> Tensor:
    """Divide a weight in evaluation mode, in place, once, as RWKV does."""
    if self.training is self.is_halved:
        with torch.no_grad():
            self.inner.weight.mul_(2 if self.training else 0.5)
        self.is_halved = not self.training
    return self.inner(h)  # type: ignore[no-any-return]


def calls(self: Any, h: Tensor) -> Tensor:
    return self.inner(h)  # type: ignore[no-any-return]


def leaves_out(self: Any, h: Tensor) -> Tensor:
    return h


def checkpoints(*, use_reentrant: bool) -> Run:
    def run(self: Any, h: Tensor) -> Tensor:
        return checkpoint(self.inner, h.detach(), use_reentrant=use_reentrant)  # type: ignore[no-any-return]

    return run


def adapted(model: nn.Module, **options: Any) -> nn.Module:
    randlora.inject(model, **{"r": 2, "targets": ["first", "inner", "last"], **options})
    return model


def around(run: Run, inner: Callable[[], nn.Module] | None = None) -> nn.Module:
    return reproducible(lambda: Around(run, inner() if inner else None))


def found(report: Any) -> dict[str, tuple[str, tuple[str, ...]]]:
    return {problem.fqn: (problem.fault, problem.modes) for problem in report.problems}


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let whatever is known to be unfit be adapted."""
    known = {name: entry for name, entry in registry._layers.items() if not isinstance(entry, str)}
    monkeypatch.setattr(registry, "_layers", known)
    monkeypatch.setattr(LinearAdapter, "as_read", None)
    monkeypatch.setattr(census, "readings_in", lambda _: iter(()))


FAULTS: dict[str, tuple[Run, Callable[[], nn.Module] | None, str, tuple[str, ...]]] = {
    "read": (reads, None, "read past", MODES),
    "read in training": (reads_in_training, None, "read past", MODES[1:]),
    "dropped": (drops, None, "unused", MODES),
    "detached": (detaches, None, "no gradient", MODES),
    "checkpointed": (checkpoints(use_reentrant=True), None, "no gradient", MODES),
    "halved": (halves, None, "merged differs", MODES[:1]),
    "BitNet": (calls, lambda: nn.Sequential(nn.Linear(8, 16), bit_linear(), nn.Linear(12, 8)), "merged differs", MODES),
    "Dory": (calls, lambda: nn.Sequential(nn.Linear(8, 16), dory_head(), nn.Linear(12, 8)), "merged differs", MODES),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [further(name) if name == "BitNet" else name for name in FAULTS])
def test_each_fault_is_found_where_it_is_and_nowhere_else(name: str, training: bool, unknown: None) -> None:
    run, inner, fault, modes = FAULTS[name]
    target = "inner" if inner is None else "inner.1"
    model = adapted(around(run, inner).train(training), targets=["first", target, "last"])
    with untouched(model):
        report = randlora.check(model, X)
    assert bool(report)
    (problem,) = (problem for problem in report.problems if problem.fqn != "first")
    assert (problem.fqn, problem.fault, sorted(problem.modes)) == (target, fault, sorted(modes))
    assert (problem.difference is not None) == (fault == "merged differs")
    assert set(report.checked) == {"first", "last"} - {each.fqn for each in report.problems}
    assert str(problem).split(":")[0] == target


def test_a_model_without_fault_is_told_so() -> None:
    report = randlora.check(adapted(around(calls)), X)
    assert not report
    assert report.checked == ("first", "inner", "last")
    assert str(report) == "0 of 3 adapted weights are not as they should be; 3 are"


def test_what_an_input_does_not_reach_is_told_apart() -> None:
    report = randlora.check(adapted(around(leaves_out)), X)
    assert not report
    assert report.unchecked == {"inner": "this input does not reach it"}
    assert "not checked: inner (this input does not reach it)" in str(report)


def test_a_layer_that_is_called_with_nothing_is_not_reached() -> None:
    def masked(self: Any, h: Tensor) -> Tensor:
        return h.index_add(0, torch.arange(0), self.inner(h[:0]))

    assert set(randlora.check(adapted(around(masked)), X).unchecked) == {"inner"}


def test_a_model_that_casts_to_half_precision_is_checked_in_it() -> None:
    def casts(self: Any, h: Tensor) -> Tensor:
        return self.inner(h.to(torch.bfloat16))  # type: ignore[no-any-return]

    model = adapted(around(casts).to(torch.bfloat16))
    with untouched(model):
        report = randlora.check(model, X.to(torch.bfloat16))
    assert not report
    assert report.checked == ("first", "inner", "last")


def test_experts_that_no_token_visits_are_told_apart() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.experts[index](x) for index in (1, 3)])

    model = Routed()
    randlora.inject(model, r=2, targets="all")
    assert set(randlora.check(model, X).unchecked) == {"experts.0", "experts.2"}


def test_equal_faults_are_one_line() -> None:
    model = nn.ModuleDict({name: around(reads) for name in "abcdef"})
    model.forward = lambda x: [part(x) for part in model.values()]
    randlora.inject(model, r=2, targets=["inner"])
    report = randlora.check(model, X)
    assert len(report.problems) == 6
    text = " ".join(str(report).split())
    assert text.startswith("6 of 6 adapted weights are not as they should be; 0 are a.inner, b.inner, c.inner, d.inner")
    assert text.count("Exclude it (in training mode and evaluation mode)") == 1


def test_dropout_of_an_adapter_is_no_difference_from_merging() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).train()
    randlora.inject(model, r=2, dropout=0.5)
    assert found(randlora.check(fill(model), X)) == {}


def test_a_forward_that_takes_the_weight_from_elsewhere_is_named_once() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self._parameters["weight"], self.bias) * 2  # type: ignore[arg-type]

    model = nn.Sequential(Own(6, 6), nn.Linear(6, 6))
    randlora.inject(model, r=2)
    assert found(randlora.check(fill(model), X)) == {"0": ("read past", MODES[::-1])}


# Nothing remains


class Untidy(nn.Module):
    """Change whatever a forward can change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout, self.linear = nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 6)
        self.frozen = nn.Parameter(torch.zeros(6), requires_grad=False)
        self.register_buffer("calls", torch.zeros(()))
        self.history: list[int] = []
        self.fails_at: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("calls").add_(1)
        self.history.append(random.randrange(9) + int(np.random.rand() * 9))  # noqa: NPY002
        self.last = len(self.history)
        with torch.no_grad():
            self.frozen.add_(1)
            self.linear.weight.mul_(2)
            x.add_(0)
        if self.fails_at is not None and self.training:
            raise ValueError(self.fails_at)
        return self.linear(self.dropout(self.norm(x))) + torch.rand(())  # type: ignore[no-any-return]


def untidy() -> nn.Module:
    model = reproducible(Untidy).train()
    randlora.inject(model, r=2, targets=["linear"], dropout=0.5, train_also=["norm.weight"])
    fill(model)
    model.register_forward_hook(lambda *_: None)
    model(X.clone()).sum().backward()
    return model


def states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002


def test_everything_is_as_before() -> None:
    model, x = untidy(), X.clone()
    grads = {
        name: (each.grad, None if each.grad is None else each.grad.clone()) for name, each in model.named_parameters()
    }
    hooks, before = dict(model._forward_hooks), states()
    history, last = list(model.history), model.last  # type: ignore[arg-type]
    with untouched(model):
        report = randlora.check(model, x)
    assert found(report) == {"linear": ("merged differs", MODES[::-1])}  # its forward changes the weight
    assert states() == before
    assert torch.equal(x, X)
    assert (list(model.history), model.last) == (history, last)  # type: ignore[arg-type]
    assert dict(model._forward_hooks) == hooks
    for name, each in model.named_parameters():
        held, values = grads[name]
        assert each.grad is held
        assert held is None or (values is not None and torch.equal(held, values))


def test_a_forward_that_raises_is_undone() -> None:
    model = untidy()
    model.fails_at = 3  # type: ignore[assignment]
    before = states()
    with untouched(model), pytest.raises(ValueError, match="3"):
        randlora.check(model, X)
    model.eval()
    with untouched(model):
        (note,) = randlora.check(model, X).notes
    assert note == "not checked in training mode: ValueError: 3"
    assert states() == before


def test_a_dict_that_cannot_change_is_left_alone() -> None:
    class Frozen(dict[str, int]):
        def clear(self) -> None:
            raise TypeError("cannot change")

    model = adapted(around(calls))
    model.config = Frozen(size=6)  # type: ignore[assignment]  # as in models of diffusers
    assert not randlora.check(model, X)


def test_an_interrupt_is_undone() -> None:
    model = adapted(around(calls))
    counts = iter(range(100))

    def interrupt(*_: object) -> None:
        if next(counts) == 9:
            raise KeyboardInterrupt

    model.register_forward_hook(interrupt)
    with untouched(model), pytest.raises(KeyboardInterrupt):
        randlora.check(model, X)


# Models of every kind


@dataclass
class Held:
    inside: Any


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "dict": lambda y: {"logits": y, "ids": y.argmax(-1)},
    "tuple": lambda y: (None, [y], "name"),
    "dataclass": Held,
    "object": lambda y: SimpleNamespace(layers=[{"keys": y}]),
    "nested": lambda y: torch.nested.as_nested_tensor([y[:1], y[1:]], layout=torch.jagged),
    "masked": lambda y: torch.where(torch.arange(5) < 2, float("-inf"), y),
    "complex": lambda y: torch.complex(y, y.detach()),
    "half": lambda y: y.half(),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_of_every_form_are_compared(name: str) -> None:
    class Wrapped(Around):
        def forward(self, x: Tensor) -> Any:
            return OUTPUTS[name](super().forward(x))

    for run, fault in ((calls, None), (reads, "read past")):
        model = adapted(reproducible(partial(Wrapped, run)))
        report = randlora.check(model, X)
        assert {problem.fault for problem in report.problems} == ({fault} if fault else set())


def test_outputs_without_numbers_to_compare_are_an_error() -> None:
    class Chosen(Around):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x).argmax(-1)

    with pytest.raises(AdapterError, match="the forward returns no floating tensor, such as logits, to compare"):
        randlora.check(adapted(Chosen(calls)), X)


def mixtral() -> nn.Module:
    model = tiny("mixtral", "MixtralForCausalLM")
    assert model is not None
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]], tuple[str, ...]]] = {
    "clip": (clip, lambda: {"image": image()["x"][:1], "text": tokens()["input_ids"][:1, :4].repeat(1, 2) % 40}, ()),
    "vit": (torchvision_vit, image, ()),
    "mixtral": (mixtral, tokens, ()),
    "bert": (bert, tokens, ()),
    "llama": (llama, tokens, ()),
}
USUAL = ("mixtral", torch.bfloat16), ("llama", torch.float32)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype) if (name, dtype) in USUAL else further(name, dtype)
        for name in MODELS
        for dtype in (torch.float32, torch.bfloat16)
    ],
)
def test_nothing_is_found_in_models_that_are_as_they_should_be(name: str, dtype: torch.dtype) -> None:
    build, inputs, unreached = MODELS[name]
    model = build().to(dtype)
    randlora.inject(model, r=2, targets="all")
    given = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs().items()}
    report = randlora.check(model, **given)
    assert report.problems == ()
    assert tuple(report.unchecked) == unreached


@pytest.mark.usefixtures("unknown")
@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        pytest.param(swin, PIXELS, id="torchvision's Swin", marks=pytest.mark.slow),
        pytest.param(wavlm, torch.randn(1, 400), id="WavLM", marks=pytest.mark.slow),
    ],
)
def test_what_tables_name_is_what_is_found_without_them_alone(
    build: Callable[[], nn.Module], inputs: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    randlora.inject(model, r=2, targets="all-linear")
    report = randlora.check(model, inputs)
    assert {problem.fault for problem in report.problems} == {"read past"}
    monkeypatch.undo()
    known = build()
    randlora.inject(known, r=2, targets="all-linear")
    assert randlora.check(known, inputs).problems == ()


@pytest.mark.parametrize("quantized", ["nf4", "int8"])
def test_quantized_layers_are_compared_dequantized(quantized: str) -> None:
    import bitsandbytes as bnb

    def build() -> nn.Module:
        if quantized == "nf4":
            return bnb.nn.Linear4bit(8, 8, quant_type="nf4", compute_dtype=torch.float32).to("cpu")  # type: ignore[no-any-return]
        return bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=False).to("cpu")  # type: ignore[no-any-return]

    model = adapted(around(calls, build))
    with untouched(model):
        assert randlora.check(model, X).problems == ()


def test_active_adapters_are_checked_and_the_layers_of_others_named() -> None:
    model = adapted(around(calls), targets=["first", "inner"])
    randlora.inject(model, r=2, targets=["first"], name="b", seed=1)
    randlora.inject(model, r=2, targets=["last"], name="c", seed=1)
    randlora.activate(model, {"default": 0.5, "b": -1.0})
    with untouched(model):
        report = randlora.check(model, X)
    assert report.checked == ("first", "inner")
    assert report.unchecked == {"last": "only inactive adapters act on it: activate them, and check again"}


def test_a_gate_of_zeros_hides_nothing() -> None:
    def gated(self: Any, h: Tensor) -> Tensor:
        return h + self.gate * self.inner(h)  # type: ignore[no-any-return]

    model = around(gated)
    model.gate = nn.Parameter(torch.zeros(8))
    assert randlora.check(adapted(model), X).checked == ("first", "inner", "last")


@pytest.mark.medium
def test_a_compiled_model_is_checked_as_it_is_written() -> None:
    model = adapted(around(reads))
    compiled = torch.compile(model, backend="eager")
    compiled(X)
    assert found(randlora.check(compiled, X))["inner"][0] == "read past"  # type: ignore[arg-type]


@pytest.fixture
def merged_model() -> Iterator[nn.Module]:
    model = adapted(around(calls))
    with randlora.merged(model):
        yield model


def test_what_cannot_be_run_as_adapted_is_refused(merged_model: nn.Module) -> None:
    with pytest.raises(AdapterError, match="cannot check while the adapters are merged"):
        randlora.check(merged_model, X)
    model = adapted(around(calls))
    with randlora.disabled(model), pytest.raises(AdapterError, match="the adapters are disabled"):
        randlora.check(model, X)
    randlora.activate(model, [])
    with pytest.raises(AdapterError, match="no adapter is active: activate one of default"):
        randlora.check(model, X)
    with torch.device("meta"):
        empty = adapted(Around(calls))
    with pytest.raises(AdapterError, match="the weight of first is incomplete"):
        randlora.check(empty, X)
