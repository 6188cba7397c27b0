"""Every value that `save` writes is whole, floating and finite, or nothing is written."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import randlora
from randlora.errors import CheckpointError
from tests.checkpoint_files import HEADED, TENSORS_FILE, read_tensors, trained
from tests.kit import adapter_values, all_bits, fill
from tests.laws import Mixed

ROOT = Path(__file__).parent.parent


def assert_nothing_is_written(model: nn.Module, message: str, place: Path) -> None:
    """Refused with this message, a new directory is not made, and an adapter that is there stays."""
    randlora.save(trained(HEADED), place / "old")
    before = {path.name: path.read_bytes() for path in (place / "old").iterdir()}
    for directory in (place / "new", place / "old"):
        with pytest.raises(CheckpointError, match=message):
            randlora.save(model, directory)
    assert not (place / "new").exists()
    assert {path.name: path.read_bytes() for path in (place / "old").iterdir()} == before


def parameter_of(model: nn.Module, which: str) -> nn.Parameter:
    part = {"Λ of body.0": "body.0.randlora_lambda.default", "Γ of body.0": "body.0.randlora_gamma.default"}
    return model.get_parameter(part.get(which, which))


@pytest.mark.parametrize("which", ["Λ of body.0", "Γ of body.0", "norm.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_no_file_may_hold_are_refused(which: str, value: float, tmp_path: Path) -> None:
    model = trained(HEADED)
    with torch.no_grad():
        parameter_of(model, which).flatten()[-1:].fill_(value)
    assert_nothing_is_written(model, f"{which} holds NaN or infinite values, which cannot be loaded", tmp_path)


def to_float8(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data.to(torch.float8_e4m3fn)


def to_empty(parameter: nn.Parameter) -> None:
    parameter.data = torch.empty(0)


def to_rows(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data.flatten()[None, None]


def to_freed(parameter: nn.Parameter) -> None:
    parameter.data.untyped_storage().resize_(0)


@pytest.mark.parametrize("which", ["Λ of body.0", "Γ of body.0", "norm.bias"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (to_float8, r"holds torch\.float8_e4m3fn: expected one of torch\.float32"),
        (to_empty, r"has shape \(0,\) here, expected all of \(.*gather it if it is sharded"),
        (to_rows, r"has shape \(1, 1, \d+\) here, expected all of \("),
        (to_freed, r"has no memory here, expected all of \("),
    ],
)
def test_values_that_are_not_whole_are_refused(
    which: str, change: Callable[[nn.Parameter], None], message: str, tmp_path: Path
) -> None:
    model = trained(HEADED)
    change(parameter_of(model, which))
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

place = sys.argv[1]
if sys.argv[2] == "1":
    dist.init_process_group("gloo", init_method=f"file://{place}/rendezvous", rank=0, world_size=1)
else:  # half of each parameter is not there
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
class Whole(nn.Module):
    "Blocks and a head."
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Mixed(), Mixed()]), nn.Linear(12, 3)
model = Whole()
randlora.inject(model, r=3, targets=["q", "up", "down"], train_also=["norm", "head.bias"])
own = all_bits(adapter_values(fill(model)))
def refused(model, message):
    try:
        randlora.save(model, place + "/new")
    except CheckpointError as error:
        assert message in str(error), error
    else:
        raise AssertionError("saved")
def again():
    fresh = Whole()
    randlora.load(fresh, place + "/whole")
    assert all_bits(adapter_values(fresh)) == own
"""
FSDP_1 = """
policy = ModuleWrapPolicy({Mixed})
sharded = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True, auto_wrap_policy=policy)
refused(sharded, "it is sharded by FSDP: call this inside FullyShardedDataParallel.summon_full_params(model)")
"""
WHOLE = """
policy = ModuleWrapPolicy({Mixed})
sharded = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True, auto_wrap_policy=policy)
assert any("_fsdp_wrapped_module" in name for name, _ in model.named_modules())
with FullyShardedDataParallel.summon_full_params(sharded, writeback=False):
    randlora.save(sharded, place + "/whole")
again()
"""


@pytest.mark.medium
@pytest.mark.parametrize(("script", "processes"), [(FSDP_1, 2), (WHOLE, 1)], ids=["FSDP1", "FSDP1-whole"])
def test_a_model_that_torch_shards_is_refused_until_it_is_gathered(script: str, processes: int, tmp_path: Path) -> None:
    """One process, to which a group of two is feigned."""
    code = f"{SHARDED}\n{script}\nprint('done')"
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path), str(processes)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["done"]), done.stderr[-4000:]
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


def test_the_keys_of_what_is_saved_are_those_of_the_plain_model(tmp_path: Path) -> None:
    model = nn.Sequential(checkpoint_wrapper(Mixed()))
    randlora.inject(model, r=3, targets=["q"], train_also=["head.bias"])
    randlora.save(model, tmp_path)
    assert (tmp_path / TENSORS_FILE).is_file()
    assert sorted(read_tensors(tmp_path)[0]) == [
        "base_model.model.0.head.bias",
        "base_model.model.0.q.randlora_gamma",
        "base_model.model.0.q.randlora_lambda",
    ]
