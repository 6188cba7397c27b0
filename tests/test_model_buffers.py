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
from torch.torch_version import TorchVersion

import randlora
from randlora.errors import AdapterError, CheckpointError, TargetError
from randlora.report import Report
from tests.checkpoint_files import TENSORS_FILE, read_tensors
from tests.kit import adapter_values, all_bits, bits, on_one_line, same_bits, untouched

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
        """Map ``(n, 6)`` to ``(n, 6)``."""
        if self.training:
            self.steps += 1
            self.average = 0.5 * self.average + x.detach().mean(0)
        return self.gain * (x - self.average) + self.mask.exp()


def drawn(module: nn.Module) -> nn.Module:
    """Return a module with statistics that are not the first ones."""
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            if name.startswith("running"):
                buffer.add_(torch.linspace(0.1, 1, len(buffer)))
    return module


class Channels(nn.InstanceNorm1d):
    """An instance norm over ``(n, 6)``, each entry with a neighbor."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, 6)`` to ``(n, 6)``."""
        output: Tensor = super().forward(torch.stack([x, x.roll(1, 0)], -1))[..., 0]
        return output


KINDS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: drawn(nn.BatchNorm1d(6)),
    "plain-batch": lambda: drawn(nn.BatchNorm1d(6, affine=False)),
    "instance": lambda: drawn(Channels(6, affine=True, track_running_stats=True)),
    "spectral": lambda: parametrizations.spectral_norm(nn.Linear(6, 6)),
    "old-spectral": lambda: spectral_norm(nn.Linear(6, 6)),
    "own": Counter,
}
MOVES = [kind for kind in KINDS if kind != "own"]
MOVES_IN_EVAL = pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.11", reason="older versions of torch write rounded statistics in eval, too"
)
every_kind = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[MOVES_IN_EVAL] * (kind == "instance")) for kind in KINDS]
)


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


def train(model: nn.Module, steps: int = 2, x: Tensor = X) -> None:
    optimizer = torch.optim.SGD(randlora.trainable_parameters(model), lr=0.01)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    model.eval()


def said(report: object, word: str = "running statistics") -> bool:
    return word in (on_one_line(report) if isinstance(report, Report) else str(report))


@every_kind
def test_a_trained_module_is_saved_and_loaded_with_its_buffers(kind: str, tmp_path: Path) -> None:
    model, before = adapted(kind), build(kind).state_dict()
    train(model)
    report = randlora.save(model, tmp_path)
    assert not said(report, "moved")
    fresh = build(kind)
    buffers = randlora.load(fresh, tmp_path).buffers
    assert same_bits(fresh(X), model(X))
    assert buffers == randlora.adapters(model)[0].buffers
    assert buffers
    assert all(name in dict(build(kind).named_buffers()) for name in buffers)
    assert any(bits(adapter_values(model)[name]) != bits(before[name]) for name in buffers)
    assert randlora.files.verify(tmp_path).passed
    for each in (model, fresh):
        with randlora.disabled(each):
            assert all_bits({name: each.state_dict()[name] for name in before}) == all_bits(before)
        randlora.eject(each)
        assert all_bits(each.state_dict()) == all_bits(before)


@every_kind
def test_each_of_several_adapters_has_its_own(kind: str) -> None:
    model = adapted(kind)
    train(model)
    first = model(X)
    randlora.inject(model, r=2, name="b", targets=["first"], train_also=["norm"], active=True, trainable=True)
    buffers = randlora.adapters(model)[1].buffers
    own = {name: bits(value) for name, value in build(kind).state_dict().items()}
    assert {name: bits(adapter_values(model, "b")[name]) for name in buffers} == {name: own[name] for name in buffers}
    train(model, x=3 * X)
    second = model(X)
    assert not same_bits(first, second)
    for _ in range(2):
        randlora.activate(model, "default")
        assert same_bits(model(X), first)
        randlora.activate(model, "b")
        assert same_bits(model(X), second)
    with pytest.raises(AdapterError, match="each trained their own copy of norm"):
        randlora.activate(model, ["default", "b"])
    with untouched(model), pytest.raises(AdapterError, match=r"'b' has buffers \(norm.*which have no sum"):
        randlora.serving.combine(model, {"b": 0.5}, name="c")
    randlora.remove(model, "b")
    randlora.activate(model, "default")
    assert same_bits(model(X), first)


@every_kind
def test_a_merged_model_has_them(kind: str) -> None:
    model = adapted(kind)
    train(model)
    expected, buffers = model(X), {name: bits(adapter_values(model)[name]) for name in adapter_values(model)}
    tensors = dict(randlora.merged_tensors(model))
    plain = build(kind)
    plain.load_state_dict(tensors)
    torch.testing.assert_close(plain(X), expected)
    with randlora.merged(model):
        torch.testing.assert_close(model(X), expected)
    assert same_bits(model(X), expected)
    assert not said(randlora.merge(model), "moved")
    torch.testing.assert_close(model(X), expected)
    assert all(bits(value) == buffers.get(name, bits(value)) for name, value in model.state_dict().items())
    assert all_bits(model.state_dict()) == all_bits(tensors)


@every_kind
def test_states_swaps_and_restored_files_have_them(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    train(model)
    randlora.save(model, tmp_path)
    state, expected = randlora.adapter_state(model), model(X)
    live = {name: value for name, value in model.named_buffers() if name in randlora.adapters(model)[0].buffers}
    puts: list[Callable[[], None]] = [
        lambda: randlora.swap(model, tmp_path),
        lambda: randlora.swap(model, pickle.loads(pickle.dumps(state))),
    ]
    for put in puts:
        train(model, x=2 * X)
        assert not same_bits(model(X), expected)
        live = {name: dict(model.named_buffers())[name] for name in live}
        put()
        assert same_bits(model(X), expected)
        assert all(dict(model.named_buffers())[name] is value for name, value in live.items())
    fresh = build(kind)
    randlora.load(fresh, state)
    assert same_bits(fresh(X), expected)


@pytest.mark.parametrize("kind", ["batch", "own"])
def test_they_follow_a_model_that_is_copied_cast_or_filled(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    train(model)
    other = copy.deepcopy(model)
    train(other, x=2 * X)
    assert not same_bits(other(X), model(X))
    loaded = pickle.loads(pickle.dumps(model))
    assert same_bits(loaded(X), model(X))
    train(loaded)
    randlora.save(loaded, tmp_path)
    fresh = build(kind)
    randlora.load(fresh, tmp_path)
    assert same_bits(fresh(X), loaded(X))
    own = build(kind).double()
    fresh.double()
    randlora.activate(fresh, [])
    assert same_bits(fresh(X.double()), own(X.double()))
    randlora.activate(fresh, "default")
    fresh.load_state_dict(fresh.state_dict(), assign=True)
    randlora.set_trainable(fresh, "default")
    train(fresh, x=X.double())
    randlora.save(fresh, tmp_path)
    again = build(kind).double()
    randlora.load(again, tmp_path)
    assert same_bits(again(X.double()), fresh(X.double()))


def test_a_call_that_raises_leaves_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("batch")
    train(model)
    with untouched(model), pytest.raises(TargetError, match="matches no module"):
        randlora.inject(model, r=2, name="b", targets=["first"], train_also=["norm", "nrom"])
    monkeypatch.setattr("randlora.model.install.tell_changed", lambda _: 1 / 0)
    with untouched(model), pytest.raises(ZeroDivisionError):
        randlora.inject(model, r=2, name="b", targets=["first"], train_also=["norm"], active=True)
    with untouched(plain := build("batch")), pytest.raises(ZeroDivisionError):
        randlora.inject(plain, r=2, targets=["first"], train_also=["norm"])


@pytest.mark.parametrize(
    ("names", "buffers"),
    [
        (["norm"], True),
        (r"norm", True),
        (r".*orm.*", True),
        (["norm.weight"], False),
        (r"norm\..*", False),
    ],
    ids=str,
)
def test_modules_have_their_buffers_and_parameters_have_none(names: list[str] | str, buffers: bool) -> None:
    report = randlora.plan(build("batch"), r=2, targets=["first"], train_also=names)
    expected = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"} if buffers else set()
    assert {*report.buffers} == expected
    assert "norm.weight" in report.train_also


def test_an_adapters_options_name_the_same_again(tmp_path: Path) -> None:
    model = adapted("batch")
    randlora.save(model, tmp_path)
    fresh = build("batch")
    loaded = randlora.load(fresh, tmp_path)
    again = randlora.plan(build("batch"), config=loaded.config)
    assert (again.train_also, again.buffers) == (loaded.train_also, loaded.buffers)


@pytest.mark.parametrize("kind", MOVES)
def test_statistics_that_no_adapter_has_are_spoken_of(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    report = randlora.inject(model, r=2, targets=["first", "last"])
    assert said(report, "norm, other.1 have running statistics, which move in train mode")
    assert not said(randlora.save(model, tmp_path), "moved since")
    twin = copy.deepcopy(model).double()
    assert not said(randlora.save(twin, tmp_path), "moved since")
    for trainable in (True, False):
        assert said(randlora.load(build(kind), tmp_path, trainable=trainable)) == trainable
    train(model)
    assert said(randlora.save(model, tmp_path), "moved since the model was adapted: they are not in the files")
    for put in (pickle.loads(pickle.dumps(model)) if "spectral" not in kind else copy.deepcopy(model), model):
        assert said(randlora.merge(put, reversible=True), "moved since the model was adapted: the merged model")


@pytest.mark.parametrize("also", [["norm.weight", "norm.bias"], ["norm"]], ids=str)
def test_and_those_of_other_modules_are_when_some_have_a_copy(also: list[str], tmp_path: Path) -> None:
    model = build("batch")
    report = randlora.inject(model, r=2, targets=["first", "last"], train_also=also)
    assert said(report, "norm, other.1 have running" if "norm.bias" in also else "other.1 has running statistics")
    train(model)
    (note,) = (each for each in randlora.save(model, tmp_path).notes if "moved since" in each)
    assert ("norm.running_mean" in note) == ("norm.bias" in also)
    assert "other.1.running_mean" in note


@pytest.mark.parametrize("situation", ["eval", "owned", "frozen", "none"])
def test_nothing_is_said_where_nothing_moves(situation: str, tmp_path: Path) -> None:
    model = build("batch")
    if situation == "none":
        model.norm, model.other = nn.LayerNorm(6), nn.BatchNorm1d(3, track_running_stats=False)
    also = ["norm", "other"] if situation == "owned" else None
    trainable = False if situation == "frozen" else None
    report = randlora.inject(model, r=2, targets=["first", "last"], train_also=also, trainable=trainable)
    assert said(report) == (situation == "eval")
    model(X)
    assert not said(randlora.save(model, tmp_path), "moved")
    assert not said(randlora.merge(model), "moved")


def test_what_was_no_number_from_the_start_has_not_moved(tmp_path: Path) -> None:
    model = build("batch")
    for entry in range(2):
        model.norm.running_mean[entry] = torch.nan
        if entry == 0:
            randlora.inject(model, r=2, targets=["first", "last"])
        assert said(randlora.save(model, tmp_path), "norm.running_mean moved since") == (entry == 1)


def test_what_has_no_values_is_passed_over(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = build("batch")
    report = randlora.inject(model, r=2, targets=["first", "last"], train_also=["norm"])
    assert said(report, "other.1 has running statistics")
    model.to_empty(device="cpu")
    for parameter in (*model.parameters(), *model.buffers()):
        parameter.data.zero_()
    assert not said(randlora.save(model, tmp_path), "moved since")


class Chained(nn.Module):
    """Layers that PEFT adapts too."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
            self.norm, self.plain = nn.BatchNorm1d(6), nn.BatchNorm1d(6, affine=False)
            self.head = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, 6)`` to ``(n, 2)``."""
        output: Tensor = self.head(self.plain(self.last(self.norm(self.first(x)))))
        return output


WHOLE = ["norm", "plain", "head"]


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
def test_peft_loads_the_buffers_that_are_saved(tmp_path: Path) -> None:
    model = Chained()
    randlora.inject(model, r=2, targets=["first", "last"], train_also=WHOLE)
    train(model)
    assert randlora.save(model, tmp_path, bases="stored").notes == ()
    assert {*json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]} == {*WHOLE}
    theirs = peft.PeftModel.from_pretrained(Chained(), tmp_path).eval()
    torch.testing.assert_close(theirs(X), model(X))


def test_the_buffers_that_peft_saves_are_loaded(tmp_path: Path) -> None:
    config = peft.RandLoraConfig(r=2, target_modules=["first", "last"], modules_to_save=WHOLE, randlora_alpha=4)
    theirs = peft.get_peft_model(Chained(), config)
    optimizer = torch.optim.SGD([each for each in theirs.parameters() if each.requires_grad], lr=0.05)
    theirs.train()
    for _ in range(2):
        theirs(X).square().mean().backward()
        optimizer.step()
    theirs.eval().save_pretrained(tmp_path / "theirs")
    model = Chained()
    report = randlora.load(model, tmp_path / "theirs")
    assert len(report.buffers) == 9
    torch.testing.assert_close(model(X), theirs(X))
    randlora.save(model, tmp_path / "saved")
    randlora.files.convert(tmp_path / "saved", tmp_path / "native", to="native")
    for place in ("saved", "native"):
        fresh = Chained()
        randlora.load(fresh, tmp_path / place)
        assert same_bits(fresh(X), model(X))


def golden() -> nn.Sequential:
    """Return a model in float64 with an adapter whose values are those of formulas."""
    model = nn.Sequential(OrderedDict(layer=nn.Linear(4, 3), norm=nn.BatchNorm1d(3))).double().eval()
    with torch.no_grad():
        for start, value in enumerate(model.state_dict().values()):
            value.copy_(((torch.arange(value.numel()) + start) % 5 + 1).view(value.shape))
        randlora.inject(model, r=2, targets=["layer"], train_also=["norm"], stream="portable", seed=3)
        for start, value in enumerate(adapter_values(model).values()):
            value.copy_(((3 * torch.arange(value.numel()) + start) % 7 + 1).view(value.shape) / (1 + value.dim()))
    return model


def test_a_file_of_format_3_loads_for_ever(tmp_path: Path) -> None:
    """``python -m tests.test_model_buffers`` made it once."""
    header = json.loads(read_tensors(DATA)[1]["randlora"])
    assert header["format_version"] == 3
    assert header["buffers"] == ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
    model, expected = golden(), golden()
    randlora.eject(model)
    randlora.load(model, DATA)
    assert all_bits(adapter_values(model)) == all_bits(adapter_values(expected))
    randlora.save(model, tmp_path)
    assert all_bits(read_tensors(tmp_path)[0]) == all_bits(read_tensors(DATA)[0])


def test_counts_that_the_model_has_no_buffer_for_are_refused(tmp_path: Path) -> None:
    model = adapted("own")
    randlora.save(model, tmp_path)
    plain = build("own")
    del plain.norm._buffers["steps"]
    with untouched(plain), pytest.raises(CheckpointError, match=r"no buffer norm\.steps"):
        randlora.load(plain, tmp_path)
    plain.norm.steps = nn.Parameter(torch.zeros((), dtype=torch.int32), requires_grad=False)
    with untouched(plain), pytest.raises(CheckpointError, match=r"norm\.steps holds torch\.int32 here"):
        randlora.load(plain, tmp_path)
    wider = build("own")
    wider.norm.steps = wider.norm.steps.long()
    with untouched(wider), pytest.raises(CheckpointError, match=r"norm\.steps holds torch\.int64 here"):
        randlora.load(wider, tmp_path)


def test_statistics_that_are_not_numbers_are_not_saved(tmp_path: Path) -> None:
    model = adapted("batch")
    model.norm.running_var.fill_(torch.nan)
    with pytest.raises(CheckpointError, match=r"norm\.running_var holds NaN"):
        randlora.save(model, tmp_path)
    assert not (tmp_path / TENSORS_FILE).exists()


if __name__ == "__main__":
    assert not DATA.exists(), "a file of a release must load for ever"
    randlora.save(golden(), DATA)
    (DATA / "README.md").unlink()
