"""Buffers of modules that train with an adapter, such as running statistics, and what is said of those that do not."""

import copy
import json
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm

import randlora
from randlora.errors import AdapterError, CheckpointError
from randlora.report import Report
from tests.checkpoint_files import TENSORS_FILE, read_tensors
from tests.kit import adapter_values, all_bits, on_one_line, same_bits, untouched

X = torch.linspace(-1, 3, 7 * 6).view(7, 6).sin() + 1
DATA = Path(__file__).parent / "data" / "golden_v3_buffers"


class Counter(nn.Module):
    """A module of a user's own, with a count, a mask and an average that code assigns anew."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(6))
        self.steps: Tensor
        self.mask: Tensor
        self.average: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.int32))
        self.register_buffer("mask", torch.tensor([0.0] * 5 + [-torch.inf]))
        self.register_buffer("average", torch.zeros(6))
        self.register_buffer("scratch", torch.zeros(6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
            self.average = 0.5 * self.average + x.detach().mean(0)
        return self.gain * (x - self.average) + self.mask.exp()


def drawn(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            if name.startswith("running"):
                buffer.add_(torch.linspace(0.1, 1, len(buffer)))
    return module


KINDS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: drawn(nn.BatchNorm1d(6)),
    "plain-batch": lambda: drawn(nn.BatchNorm1d(6, affine=False)),
    "spectral": lambda: parametrizations.spectral_norm(nn.Linear(6, 6)),
    "old-spectral": lambda: spectral_norm(nn.Linear(6, 6)),
    "own": Counter,
}


def build(kind: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = {"first": nn.Linear(6, 6), "norm": KINDS[kind](), "last": nn.Linear(6, 3), "other": KINDS[kind]()}
        parts["other"] = nn.Sequential(nn.Linear(3, 6), parts["other"])
        return nn.Sequential(OrderedDict(parts)).eval()


def adapted(kind: str) -> Any:
    model = build(kind)
    randlora.inject(model, r=2, targets=["first", "last"], train_also=["norm", "other"])
    return model


def loaded(kind: str, source: Any, dtype: torch.dtype = torch.float32) -> Any:
    model = build(kind).to(dtype)
    randlora.load(model, source)
    return model


def train(model: nn.Module, x: Tensor = X) -> nn.Module:
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.01)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model.eval()


def said(report: object, word: str = "running statistics") -> bool:
    return word in (on_one_line(report) if isinstance(report, Report) else str(report))


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_module_is_saved_loaded_swapped_and_merged_with_its_buffers(kind: str, tmp_path: Path) -> None:
    model, fresh, plain, before = train(adapted(kind)), build(kind), build(kind), all_bits(build(kind).state_dict())
    expected, state, values = model(X), randlora.adapter_state(model), all_bits(adapter_values(model))
    assert not said(randlora.save(model, tmp_path), "moved")
    assert randlora.files.verify(tmp_path).passed
    report = randlora.load(fresh, tmp_path)
    buffers = report.buffers
    assert buffers == randlora.adapters(model)[0].buffers == randlora.plan(build(kind), config=report.config).buffers
    assert {*buffers} <= {name for name, _ in plain.named_buffers()}
    assert any(values[name] != before[name] for name in buffers)
    assert same_bits(fresh(X), expected)
    assert same_bits(loaded(kind, state)(X), expected)
    for source in (tmp_path, pickle.loads(pickle.dumps(state))):
        assert not same_bits(train(model, x=2 * X)(X), expected)
        live = {name: value for name, value in model.named_buffers() if name in buffers}
        randlora.swap(model, source)
        assert same_bits(model(X), expected)
        assert all(dict(model.named_buffers())[name] is value for name, value in live.items())
    with randlora.disabled(model):
        assert all_bits({name: model.state_dict()[name] for name in before}) == before
    randlora.eject(model)
    assert all_bits(model.state_dict()) == before
    tensors = dict(randlora.merged_tensors(fresh))
    plain.load_state_dict(tensors)
    with randlora.merged(fresh):
        torch.testing.assert_close(fresh(X), expected)
    assert same_bits(fresh(X), expected)
    assert not said(randlora.merge(fresh), "moved")
    for each in (plain, fresh):
        torch.testing.assert_close(each(X), expected)
    found = all_bits(fresh.state_dict())
    assert found == all_bits(tensors) == found | {name: values[name] for name in values if name in found}


@pytest.mark.parametrize("kind", ["batch", "old-spectral", "own"])
def test_each_of_several_adapters_has_its_own(kind: str) -> None:
    model = train(adapted(kind))
    first = model(X)
    randlora.inject(model, r=2, name="b", targets=["first"], train_also=["norm"], active=True, trainable=True)
    own = build(kind).state_dict()
    values = adapter_values(model, "b")
    assert all(same_bits(values[name], own[name]) for name in randlora.adapters(model)[1].buffers)
    second = train(model, x=3 * X)(X)
    assert not same_bits(first, second)
    for _ in range(2):
        randlora.activate(model, "default")
        assert same_bits(model(X), first)
        randlora.activate(model, "b")
        assert same_bits(model(X), second)
    with untouched(model), pytest.raises(AdapterError, match="each trained their own copy of norm"):
        randlora.activate(model, ["default", "b"])
    with untouched(model), pytest.raises(AdapterError, match=r"'b' trained .*norm.* with train_also or train_rows"):
        randlora.serving.combine(model, {"b": 0.5}, name="c")
    randlora.remove(model, "b")
    randlora.activate(model, "default")
    assert same_bits(model(X), first)


@pytest.mark.parametrize("kind", ["batch", "own"])
def test_they_follow_a_model_that_is_copied_cast_or_filled(kind: str, tmp_path: Path) -> None:
    model = train(adapted(kind))
    assert not same_bits(train(copy.deepcopy(model), x=2 * X)(X), model(X))
    pickled = pickle.loads(pickle.dumps(model))
    assert same_bits(pickled(X), model(X))
    randlora.save(train(pickled), tmp_path)
    fresh = loaded(kind, tmp_path)
    assert same_bits(fresh(X), pickled(X))
    randlora.activate(fresh.double(), [])
    assert same_bits(fresh(X.double()), build(kind).double()(X.double()))
    randlora.activate(fresh, "default")
    fresh.load_state_dict(fresh.state_dict(), assign=True)
    randlora.set_trainable(fresh, "default")
    randlora.save(train(fresh, x=X.double()), tmp_path)
    assert same_bits(loaded(kind, tmp_path, torch.float64)(X.double()), fresh(X.double()))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "own"])
def test_statistics_that_no_adapter_has_are_spoken_of(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    report = randlora.inject(model, r=2, targets=["first", "last"])
    is_torchs = "spectral" not in kind  # the statistics of other modules are only seen to have moved
    assert said(report, "norm, other.1 have running statistics, which move in train mode") is is_torchs
    for each in (model, copy.deepcopy(model).double()):
        assert not said(randlora.save(each, tmp_path), "moved since")
    assert said(randlora.load(build(kind), tmp_path, trainable=True)) is is_torchs
    assert said(randlora.save(train(model), tmp_path), "moved since the model was adapted: they are not in the files")
    for put in (pickle.loads(pickle.dumps(model)) if is_torchs else copy.deepcopy(model), model):
        assert said(randlora.merge(put, reversible=True), "moved since the model was adapted: the merged model")


def test_only_statistics_that_move_and_belong_to_no_adapter_are_said_to_have_moved(tmp_path: Path) -> None:
    targets, own = ["first", "last"], {f"norm.{name}" for name, _ in nn.BatchNorm1d(6).named_buffers()}
    for also in (["norm.weight"], r"norm\..*", ["norm"], r"n\w*"):
        has_copy, model = "." not in str(also), build("batch")
        report = randlora.inject(model, r=2, targets=targets, train_also=also)
        assert ({*report.buffers}, "norm.weight" in report.train_also) == (own if has_copy else set(), True)
        assert said(report, "other.1 has running statistics" if has_copy else "norm, other.1 have running")
        (note,) = (each for each in randlora.save(train(model), tmp_path).notes if "moved since" in each)
        assert ("norm.running_mean" in note, "other.1.running_mean" in note) == (not has_copy, True)
    model = build("batch")
    assert not said(randlora.inject(model, r=2, targets=targets, trainable=False))
    assert not said(randlora.save(model, tmp_path), "moved")
    model = build("batch")
    model.norm.running_mean[0] = torch.nan
    randlora.inject(model, r=2, targets=targets)
    assert not said(randlora.save(model, tmp_path), "moved since")
    model.norm.running_mean[1] = torch.nan
    assert said(randlora.save(model, tmp_path), "norm.running_mean moved since")


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
def test_buffers_are_saved_for_peft_and_loaded_from_it(tmp_path: Path) -> None:
    kind = "batch"
    model = train(adapted(kind))
    assert randlora.save(model, tmp_path / "ours", bases="stored").notes == ()
    fields = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert {*fields["modules_to_save"]} == {"norm", "other"}
    theirs: Any = peft.PeftModel.from_pretrained(build(kind), tmp_path / "ours", is_trainable=True).eval()
    torch.testing.assert_close(theirs(X), model(X))
    train(theirs).save_pretrained(tmp_path / "theirs")  # type: ignore[operator]
    model = build(kind)
    report = randlora.load(model, tmp_path / "theirs")
    assert len(report.buffers) == 6
    torch.testing.assert_close(model(X), theirs(X))
    randlora.save(model, tmp_path / "saved")
    randlora.files.convert(tmp_path / "saved", tmp_path / "native", to="native")
    for place in ("saved", "native"):
        assert same_bits(loaded(kind, tmp_path / place)(X), model(X))


def golden() -> nn.Sequential:
    model = nn.Sequential(OrderedDict(layer=nn.Linear(4, 3), norm=nn.BatchNorm1d(3))).double().eval()
    with torch.no_grad():
        for start, value in enumerate(model.state_dict().values()):
            value.copy_(((torch.arange(value.numel()) + start) % 5 + 1).view(value.shape))
        randlora.inject(model, r=2, targets=["layer"], train_also=["norm"], stream="portable", seed=3)
        for start, value in enumerate(adapter_values(model).values()):
            value.copy_(((3 * torch.arange(value.numel()) + start) % 7 + 1).view(value.shape) / (1 + value.dim()))
    return model


def test_a_file_of_format_3_loads_for_ever(tmp_path: Path) -> None:
    """`randlora.save` wrote it once, of the adapter of `golden`."""
    header = json.loads(read_tensors(DATA)[1]["randlora"])
    assert header["format_version"] == 3
    assert header["buffers"] == ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
    model, expected = golden(), golden()
    randlora.eject(model)
    randlora.load(model, DATA)
    assert all_bits(adapter_values(model)) == all_bits(adapter_values(expected))
    randlora.save(model, tmp_path)
    assert all_bits(read_tensors(tmp_path)[0]) == all_bits(read_tensors(DATA)[0])


def test_buffers_that_do_not_fit_or_are_no_numbers_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    randlora.save(adapted("own"), tmp_path)
    lacking, trained, wider = (build("own") for _ in range(3))
    del lacking.norm._buffers["steps"], trained.norm._buffers["steps"]
    trained.norm.steps = nn.Parameter(torch.zeros((), dtype=torch.int32), requires_grad=False)
    wider.norm.steps = wider.norm.steps.long()
    own, other = (rf"norm\.steps holds torch\.int{bits} here" for bits in (32, 64))
    for model, message in ((lacking, r"no buffer norm\.steps"), (trained, own), (wider, other)):
        with untouched(model), pytest.raises(CheckpointError, match=message):
            randlora.load(model, tmp_path)
    model, plain = adapted("batch"), build("batch")
    model.norm.running_var.fill_(torch.nan)
    with pytest.raises(CheckpointError, match=r"norm\.running_var holds NaN"):
        randlora.save(model, tmp_path / "new")
    assert not (tmp_path / "new" / TENSORS_FILE).exists()
    monkeypatch.setattr("randlora.model.install.Engine.changed", lambda *_: 1 / 0)
    for each in (model, plain):
        with untouched(each), pytest.raises(ZeroDivisionError):
            randlora.inject(each, r=2, name="b", targets=["first"], train_also=["norm"], active=True)
