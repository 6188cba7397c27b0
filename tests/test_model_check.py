"""`randlora.check` finds adapted weights that do not do what an adapter is for, and leaves no trace."""

import random
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import bitsandbytes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import randlora
from randlora.errors import AdapterError, TargetError
from randlora.layers.linear import LinearAdapter
from randlora.targets import census
from tests.kit import fill, untouched
from tests.models import reproducible, tokens
from tests.quantized import of_4_bits
from tests.rows_zoo import FAMILIES
from tests.transformers_zoo import tiny

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
Run = Callable[[Any, Tensor], Any]


class Around(nn.Module):
    """Three layers, of which the code of a model uses the second in its own way."""

    def __init__(self, run: Run, inner: nn.Module | None = None, form: Callable[[Tensor], Any] = Tensor.clone) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(6, 8), inner or nn.Linear(8, 8), nn.Linear(8, 5)
        self.gate = nn.Parameter(torch.zeros(8))
        self.run, self.form, self.is_halved = run, form, False

    def forward(self, x: Tensor) -> Any:
        return self.form(self.last(self.run(self, self.first(x).tanh())))


def halves(self: Any, h: Tensor) -> Tensor:
    """Divide a weight in evaluation mode, in place, once, as RWKV does."""
    if self.training is self.is_halved:
        with torch.no_grad():
            self.inner.weight.mul_(2 if self.training else 0.5)
        self.is_halved = not self.training
    return self.inner(h)  # type: ignore[no-any-return]


def raises(self: Any, h: Tensor) -> Tensor:
    """Compute what raises in backward."""
    if (output := self.inner(h)).requires_grad:
        output.register_hook(lambda _: 1 / 0)
    return output  # type: ignore[no-any-return]


def calls(self: Any, h: Tensor) -> Tensor:
    return self.inner(h)  # type: ignore[no-any-return]


class Rectified(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input).relu()


class Own(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return F.linear(input, self._parameters["weight"], self.bias) * 2  # type: ignore[arg-type]


def adapted(model: nn.Module, **options: Any) -> nn.Module:
    randlora.inject(model, **{"r": 2, "targets": ["first", "inner", "last"], **options})
    return model


def around(run: Run, inner: Callable[[], nn.Module] | None = None, **form: Any) -> nn.Module:
    return reproducible(lambda: Around(run, inner() if inner else None, **form))


def found(report: Any) -> dict[str, str]:
    return {problem.fqn: problem.fault for problem in report.problems}


FAULTS: dict[str, tuple[Run, Callable[[], nn.Module] | None, str]] = {
    "read": (lambda self, h: F.linear(h, self.inner.weight, self.inner.bias), None, "read past"),
    "dropped": (lambda self, h: (self.inner(h), h)[1], None, "unused"),
    "detached": (lambda self, h: h + self.inner(h).detach(), None, "no gradient"),
    "checkpointed": (lambda self, h: checkpoint(self.inner, h.detach(), use_reentrant=True), None, "no gradient"),
    "halved": (halves, None, "merged differs"),
    "rectified": (calls, lambda: Rectified(8, 8), "merged differs"),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found_where_it_is_and_nowhere_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LinearAdapter, "as_read", None)  # what is known to be read is adapted as what is called
    monkeypatch.setattr(census, "FINDERS", [])
    run, inner, fault = FAULTS[name]
    model = adapted(around(run, inner).train("d" in name))
    with untouched(model):
        report = randlora.check(model, X)
    assert bool(report)
    (problem,) = (problem for problem in report.problems if problem.fqn != "first")
    assert (problem.fqn, problem.fault) == ("inner", fault)
    assert (problem.difference is not None) == (fault == "merged differs")
    assert {*report.checked} == {"first", "last"} - {each.fqn for each in report.problems}
    assert str(problem).split(":")[0] == "inner"


SOUND: dict[str, tuple[Run, bool]] = {
    "called": (calls, True),
    "left out": (lambda _, h: h, False),
    "called with nothing": (lambda self, h: h.index_add(0, torch.arange(0), self.inner(h[:0])), False),
    "gated by zeros": (lambda self, h: h + self.gate * self.inner(h), True),
    "detached in evaluation": (lambda self, h: self.inner(h) if self.training else self.inner(h).detach(), True),
    "cast to half precision": (lambda self, h: self.inner(h.to(torch.bfloat16)), True),
    "of 4 bits": (calls, True),
    "of 8 bits": (calls, True),
}
QUANTIZED: dict[str, Callable[[], Any]] = {
    "of 4 bits": partial(of_4_bits, 8, 8),
    "of 8 bits": lambda: bitsandbytes.nn.Linear8bitLt(8, 8, has_fp16_weights=False).to("cpu"),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_model_without_fault_is_told_so_and_what_an_input_does_not_reach(name: str) -> None:
    run, is_reached = SOUND[name]
    dtype = torch.bfloat16 if "half" in name else torch.float32
    model = adapted(around(run, QUANTIZED.get(name)).to(dtype), dropout=0.5)
    with untouched(fill(model)):
        report = randlora.check(model, X.to(dtype))
    assert not report
    if is_reached:
        assert report.checked == ("first", "inner", "last")
        assert str(report) == "all 3 adapted weights work"
    else:
        assert report.unchecked == {"inner": "this input does not reach it"}
        assert "not checked: inner (this input does not reach it)" in str(report)


class Untidy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout, self.linear = nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 6)
        self.frozen = nn.Parameter(torch.zeros(6), requires_grad=False)
        self.register_buffer("calls", torch.zeros(()))
        self.history: list[int] = []
        self.error: Exception | None = None
        self.raises_in_training = False

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("calls").add_(1)
        self.history.append(random.randrange(9) + int(np.random.rand() * 9))  # noqa: NPY002
        self.last = len(self.history)
        with torch.no_grad():
            self.frozen.add_(1)
            self.linear.weight.mul_(2)
            x.add_(0)
        if self.error and self.training is self.raises_in_training:
            raise self.error
        return self.linear(self.dropout(self.norm(x))) + torch.rand(())  # type: ignore[no-any-return]


def test_everything_is_as_before_also_when_a_forward_raises_or_is_interrupted() -> None:
    class Frozen(dict[str, int]):  # as in models of diffusers
        def clear(self) -> None:
            raise TypeError("cannot change")

    model: Any = reproducible(Untidy).train()
    randlora.inject(model, r=2, targets=["linear"], dropout=0.5, train_also=["norm.weight"])
    fill(model).register_forward_hook(lambda *_: None)
    x, model.config = X.clone(), Frozen(size=6)
    model(x).sum().backward()

    def traces() -> Any:
        grads = {name: (id(each.grad), str(each.grad)) for name, each in model.named_parameters()}
        drawn = torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
        return grads, drawn, list(model.history), model.last, dict(model._forward_hooks), x.tolist()

    before = traces()
    with untouched(model):
        report = randlora.check(model, x)
    assert found(report) == {"linear": "merged differs"}  # its forward changes the weight
    model.error = ValueError("3")
    with untouched(model), pytest.raises(ValueError, match="3"):
        randlora.check(model, x)
    model.raises_in_training = True
    with untouched(model):
        assert randlora.check(model, x).notes == ("gradients were not checked in training mode: ValueError: 3",)
    assert traces() == before
    model, hook = adapted(around(calls)), Mock(side_effect=[*[None] * 9, KeyboardInterrupt])
    model.register_forward_hook(hook)  # in a forward, it would leave the thread inside of a call: see docs/limits.md
    with untouched(model), pytest.raises(KeyboardInterrupt):
        randlora.check(model, X)


def test_what_does_not_run_in_training_mode_is_judged_by_the_other_and_what_runs_there_alone_is_not() -> None:
    def stops(self: Any, h: Tensor) -> Tensor:
        if self.training:
            raise ValueError("as batch norm of one row")
        return h + self.inner(h).detach()  # type: ignore[no-any-return]

    assert found(randlora.check(adapted(around(stops)), X)) == {"inner": "no gradient"}
    report = randlora.check(adapted(around(lambda self, h: raises(self, h) if self.training else h)), X)
    assert (found(report), [*report.unchecked]) == ({}, ["inner"])


@dataclass
class Held:
    inside: Any


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "dict": lambda y: {"logits": y, "ids": y.argmax(-1)},
    "tuple": lambda y: (None, [y], "name"),
    "dataclass": Held,
    "object": lambda y: SimpleNamespace(layers=[{"keys": y}]),
    "masked": lambda y: torch.where(torch.arange(5) < 2, float("-inf"), y),
    "half": lambda y: y.half(),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_of_every_form_are_compared(name: str) -> None:
    for inner, faults in ((nn.Linear, set()), (Own, {"read past"})):
        model = adapted(around(calls, partial(inner, 8, 8), form=OUTPUTS[name]), targets=["inner"])
        assert {problem.fault for problem in randlora.check(model, X).problems} == faults


@pytest.mark.medium
def test_active_adapters_are_checked_and_the_layers_of_others_named_and_experts_are_right() -> None:
    model = adapted(around(calls), targets=["first", "inner"])
    randlora.inject(model, r=2, targets=["first"], name="b", seed=1)
    randlora.inject(model, r=2, targets=["last"], name="c", seed=1)
    randlora.activate(model, {"default": 0.5, "b": -1.0})
    with untouched(model):
        report = randlora.check(model, X)
    assert report.checked == ("first", "inner")
    assert report.unchecked == {"last": "only inactive adapters act on it: activate them, and check again"}
    report = randlora.check(adapted(around(raises)), X)
    assert (report.problems, len(report.notes)) == ((), 2)
    assert "gradients were not checked in training mode: ZeroDivisionError" in str(report)
    experts: Any = tiny("mixtral", "MixtralForCausalLM")
    randlora.inject(experts.bfloat16(), r=2, targets="all")
    report = randlora.check(experts, **tokens())
    assert (report.problems, report.unchecked) == ((), {})


@pytest.mark.medium
def test_a_compiled_model_is_checked_as_it_is_written() -> None:
    compiled: Any = torch.compile(adapted(around(calls, lambda: Own(8, 8))), backend="eager")
    compiled(X)
    assert found(randlora.check(compiled, X))["inner"] == "read past"


def test_what_cannot_be_run_as_adapted_is_refused() -> None:
    inactive, disabled, merged = (adapted(around(calls)) for _ in range(3))
    chosen = adapted(around(calls, form=lambda y: y.argmax(-1)))
    randlora.activate(inactive, [])
    with torch.device("meta"):
        empty = adapted(Around(calls))
    refused = {
        chosen: "the forward returns no dense floating tensor, such as logits, to compare",
        merged: "cannot check while the adapters are merged",
        disabled: "the adapters are disabled",
        inactive: "no adapter is active: activate one of default",
        empty: "the weight of first is incomplete",
    }
    with randlora.disabled(disabled), randlora.merged(merged):
        for each, message in refused.items():
            with pytest.raises(AdapterError, match=message):
                randlora.check(each, X)


UNUSED = re.compile(
    r"\S+ \S*pooler\S*|SiglipForImage\w+ vision_model\.head\..*"  # the model returns the states before it
    r"|\w+Transformer\w+ transformer_blocks\.1\.(attn1?\.(add_q_proj|to_add_out)|txt_mlp\..*)"  # of text, at the end
    r"|efficientvit_m0 stages\.2\..*\.dws\..*"  # of one pixel, which attends to itself alone
    r"|Mra\w+ mra\..*\.attention\..*"  # without its kernels for a GPU the attention returns zeros
    r"|LongformerForSequence\w+ .*layer\.1\.attention\.self\.(query|key|value)"  # of tokens but the first, at the end
)
"""By model and FQN, what models have and do not use."""


def runnable(family: str, name: str) -> tuple[nn.Module, list[Any], dict[str, Any]] | None:
    """Build a model with arguments that it takes; ``None`` where another release has other options or sizes."""
    torch.manual_seed(0)
    try:
        model, inputs = FAMILIES[family][0](name)
        given = inputs(2)
        args = [value for key, value in given.items() if isinstance(key, int)]
        kwargs = {key: value for key, value in given.items() if isinstance(key, str)}
        model(*args, **kwargs)
    except Exception:
        return None
    return model, args, kwargs


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of other libraries
@pytest.mark.parametrize("family", FAMILIES)
def test_in_models_of_libraries_nothing_is_found_but_what_they_do_not_use(family: str) -> None:
    num_run, found = 0, list[str]()
    for name in FAMILIES[family][1]:
        if (run := runnable(family, name)) is None:
            continue
        (model, args, kwargs), num_run = run, num_run + 1
        with suppress(TargetError):  # nothing can be adapted
            randlora.inject(model, r=4, targets="all")
            report = randlora.check(model, *args, **kwargs)
            assert report.checked, name
            found += [f"{name} {problem}" for problem in report.problems if not UNUSED.match(f"{name} {problem.fqn}")]
    assert found == []
    assert num_run > len(FAMILIES[family][1]) / 2
