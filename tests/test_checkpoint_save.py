"""`save`: what the files hold, what is refused, what the user is told; values are whole, floating and finite."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import randlora
from randlora.errors import AdapterError, CheckpointError
from tests.checkpoint_files import (
    HEADED,
    LINEAR,
    Case,
    Headed,
    Stored,
    read_tensors,
    trained,
)
from tests.kit import adapter_values, all_bits, fill
from tests.laws import Mixed
from tests.model_directories import contents
from tests.peer import PEFT_STREAM


def two_adapters() -> nn.Module:
    model = trained(LINEAR, name="one")
    randlora.inject(model, r=2, name="two")
    return model


def test_save_names_its_tensors_as_peft_does(tmp_path: Path) -> None:
    report = randlora.save(trained(HEADED, name="mine"), tmp_path, bases="stored")
    assert (report.name, report.nbytes) == ("mine", sum(path.stat().st_size for path in tmp_path.iterdir()))
    assert str(report).startswith(f"saved 'mine' to {tmp_path}, ")
    tensors, metadata = read_tensors(tmp_path)
    prefix = "base_model.model."
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        f"{prefix}body.0.randlora_lambda": (2, 3),
        f"{prefix}body.0.randlora_gamma": (3, 6),
        f"{prefix}body.2.randlora_lambda": (2, 4),
        f"{prefix}body.2.randlora_gamma": (4, 7),
        f"{prefix}norm.bias": (7,),
        f"{prefix}head.weight": (3, 7),
        f"{prefix}head.bias": (3,),
        "base_model.randlora_A": (2, 1, 9),  # over min(widest out, widest in), more than any layer uses
        "base_model.randlora_B": (9, 5, 2),
    }
    assert set(metadata) == {"format", "randlora"}
    assert metadata["format"] == "pt"


def nothing(_: Path) -> None:
    """Put nothing in the way."""


REFUSED: dict[str, tuple[Callable[[Path], object], dict[str, Any], type[Exception], str]] = {
    "no adapter": (nothing, {"model": LINEAR.build}, AdapterError, "the model has no adapter: call"),
    "ambiguous": (nothing, {"model": two_adapters}, AdapterError, r"has several adapters \(one, two\)"),
    "unknown": (
        nothing,
        {"model": two_adapters, "name": "three"},
        AdapterError,
        "no adapter named 'three': it has one",
    ),
    "bases": (nothing, {"bases": "both"}, CheckpointError, "bases must be 'seed' or 'stored', got 'both'"),
    "file": (Path.touch, {}, CheckpointError, "it is a file or a broken link: expected the name of a directory"),
    "broken link": (lambda out: out.symlink_to("nowhere"), {}, CheckpointError, "it is a file or a broken link"),
}


@pytest.mark.parametrize(("make", "options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_is_refused_before_anything_is_written(
    make: Callable[[Path], object], options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    make(tmp_path / "out")
    before = [*tmp_path.iterdir()]
    options = {"model": lambda: trained(LINEAR), **options}
    with pytest.raises(error, match=message):
        randlora.save(options.pop("model")(), tmp_path / "out", **options)
    assert [*tmp_path.iterdir()] == before


DRAWN = "PEFT draws stream='torch' under torch 2.12 and newer only: save with bases='stored' to load under any"
NOTES_OF_SEEDS = () if PEFT_STREAM == "torch" else (DRAWN,)
PORTABLE_NOTE = "PEFT cannot draw stream='portable': save with bases='stored' to load there"


@pytest.mark.parametrize(
    ("options", "seed_notes"),
    [
        ({}, NOTES_OF_SEEDS),
        ({"stream": "portable"}, (PORTABLE_NOTE,)),
        ({"basis": "block"}, (PORTABLE_NOTE,)),
        ({"train_also": ["head", "norm.bias"]}, NOTES_OF_SEEDS),
    ],
    ids=["torch", "portable", "block", "trained-beside"],
)
def test_save_says_what_peft_would_not_load(
    options: dict[str, Any], seed_notes: tuple[str, ...], tmp_path: Path
) -> None:
    model = trained(Case("body", Headed, {"targets": ["0", "2"]}), **options)
    saves: dict[Stored, tuple[str, ...]] = {"seed": seed_notes, "stored": ()}
    for bases, notes in saves.items():
        report = randlora.save(model, tmp_path, bases=bases)
        assert report.notes == notes
        assert str(report).splitlines()[1:] == list(notes)


ROOT = Path(__file__).parent.parent


def assert_nothing_is_written(model: nn.Module, message: str, place: Path) -> None:
    """Refused with this message, a new directory is not made, and an adapter that is there stays."""
    randlora.save(trained(HEADED), place / "old")
    before = contents(place)
    for directory in (place / "new", place / "old"):
        with pytest.raises(CheckpointError, match=message):
            randlora.save(model, directory)
    assert contents(place) == before
    assert not (place / "new").exists()


NAMES = {"Λ of body.0": "body.0.randlora_lambda.default", "Γ of body.0": "body.0.randlora_gamma.default"}
NAMES |= {"norm.bias": "norm.bias"}


def test_values_that_no_file_may_hold_are_refused(tmp_path: Path) -> None:
    for which, value in zip(NAMES, (float("inf"), -float("inf"), float("nan")), strict=True):
        model = trained(HEADED)
        with torch.no_grad():
            model.get_parameter(NAMES[which]).flatten()[-1:].fill_(value)
        assert_nothing_is_written(model, f"{which} holds NaN or infinite values, which cannot be loaded", tmp_path)
    meta = HEADED.build().to("meta")
    randlora.inject(meta, r=2, targets=["0"], train_also=["norm.bias"])
    assert_nothing_is_written(meta, r"body\.0 holds no values(.*\n)+.*norm\.bias holds no values", tmp_path)


def freed(held: Tensor) -> Tensor:
    held.untyped_storage().resize_(0)
    return held


NOT_WHOLE: dict[str, Callable[[Tensor], Tensor]] = {
    r"holds torch\.float8_e4m3fn: expected one of torch\.float32": lambda held: held.to(torch.float8_e4m3fn),
    r"has shape \(0,\) here, expected all of \(.*gather it if it is sharded": lambda _: torch.empty(0),
    r"has shape \(1, 1, \d+\) here, expected all of \(": lambda held: held.flatten()[None, None],
    r"has no memory here, expected all of \(": freed,
}


@pytest.mark.parametrize("which", NAMES)
def test_values_that_are_not_whole_are_refused(which: str, tmp_path: Path) -> None:
    for message, change in NOT_WHOLE.items():
        model = trained(HEADED)
        parameter = model.get_parameter(NAMES[which])
        parameter.data = change(parameter.data)
        assert_nothing_is_written(model, f"{which} {message}", tmp_path)


SHARDED = """
import sys, torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch import nn
import randlora
from randlora.errors import CheckpointError
from tests.kit import adapter_values, all_bits, fill
from tests.laws import Mixed

class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Mixed(), Mixed()]), nn.Linear(12, 3)

def sharded():
    model = Whole()
    randlora.inject(model, r=3, targets=["q", "up", "down"], train_also=["norm", "head.bias"])
    own = all_bits(adapter_values(fill(model)))
    wrap = {"device_id": torch.device("cpu"), "use_orig_params": True, "auto_wrap_policy": ModuleWrapPolicy({Mixed})}
    wrapped = FullyShardedDataParallel(model, **wrap)
    assert any("_fsdp_wrapped_module" in name for name, _ in model.named_modules())
    return wrapped, own

place = sys.argv[1]
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)  # half of each parameter is not there
try:
    randlora.save(sharded()[0], place + "/new")
except CheckpointError as error:
    print(error)
dist.destroy_process_group()
dist.init_process_group("gloo", init_method=f"file://{place}/rendezvous", rank=0, world_size=1)
model, own = sharded()
with FullyShardedDataParallel.summon_full_params(model, writeback=False):
    randlora.save(model, place + "/whole")
fresh = Whole()
randlora.load(fresh, place + "/whole")
assert all_bits(adapter_values(fresh)) == own
"""


@pytest.mark.medium
def test_a_model_that_torch_shards_is_refused_until_it_is_gathered(tmp_path: Path) -> None:
    """One process, to which a group of two is feigned."""
    command = [sys.executable, "-W", "ignore", "-c", SHARDED, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "it is sharded by FSDP: call this inside FullyShardedDataParallel.summon_full_params(model)" in done.stdout
    assert not (tmp_path / "new").exists()


def compiled(module: nn.Module) -> nn.Module:
    wrapper = torch.compile(module, backend="eager")
    assert isinstance(wrapper, nn.Module)
    return wrapper


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, compiled], ids=["checkpoint", "compile"])
@pytest.mark.parametrize("first", ["inject", "wrap"])
def test_wrappers_of_torch_change_no_names(wrap: Callable[[nn.Module], nn.Module], first: str, tmp_path: Path) -> None:
    body = nn.ModuleDict({"inner": Mixed()})
    if first == "wrap":
        body["inner"] = wrap(body["inner"])
    model = nn.Sequential(body)
    report = randlora.inject(model, r=3, targets=["q", "up"], train_also=["head"])
    fill(model)
    if first == "inject":
        body["inner"] = wrap(body["inner"])
    assert report.targets == ("0.inner.q", "0.inner.up")
    randlora.save(model, tmp_path)
    fresh = nn.Sequential(nn.ModuleDict({"inner": Mixed()}))
    randlora.load(fresh, tmp_path)
    assert all_bits(adapter_values(fresh)) == all_bits(adapter_values(model))
