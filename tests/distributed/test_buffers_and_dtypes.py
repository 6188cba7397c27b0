"""Running statistics, and copies in float32 of 16 bits, in a model that several processes train."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import randlora
from tests.checkpoint_files import read_tensors
from tests.distributed.engines import ENGINES, around, sharded, trained
from tests.distributed.processes import in_two, on_all
from tests.distributed.trained import Case, trained_alone
from tests.kit import all_bits, on_one_line
from tests.laws import Mixed

X = torch.linspace(-1, 1, 12).view(2, 6)


@dataclass(frozen=True)
class Norms(Case):
    """A norm that is trained, and one that is not."""

    train_also: tuple[str, ...] = ("1",)

    def build(self) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6))

    def options(self) -> dict[str, Any]:
        return {"r": 2, "targets": ["0", "2"], "stream": "portable"}

    def batch(self, rank: int, step: int) -> tuple[Tensor]:
        return (torch.randn(8, 6, generator=torch.Generator().manual_seed(2 * step + rank)) + 1,)


@in_two
@pytest.mark.parametrize("engine", ["DDP", "FSDP2", "FSDP2 first", "ZeRO-2", "ZeRO-3"])
def test_an_adapter_has_the_statistics_of_the_first_process(engine: str, tmp_path: Path) -> None:
    case, own = Norms(), ENGINES[engine]
    run = own.make(case)
    model = getattr(run, "module", run)
    run.train()
    trained(run, case, dist.get_rank(), steps=2)
    run.eval()
    # where each process holds all of the model, it has statistics of its own
    place = tmp_path / str(dist.get_rank() if own.has_copies else 0)
    (note,) = (note for note in randlora.save(model, place).notes if "moved since" in note)
    assert "3.running_mean" in note
    assert "1.running_mean" not in note
    dist.barrier()
    fresh = case.build().eval()
    before = all_bits(dict(fresh.named_buffers()))
    randlora.load(fresh, place)
    names = randlora.adapters(model)[0].buffers
    assert set(names) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    for name in ("3.running_mean", "3.running_var"):  # of which no adapter has a copy
        fresh.get_buffer(name).copy_(model.get_buffer(name))
    output = run(X)  # of all processes
    if dist.get_rank() == 0:
        for name in names:
            assert all_bits({name: fresh.get_buffer(name)}) == all_bits({name: model.get_buffer(name)})
            assert all_bits({name: fresh.get_buffer(name)}) != {name: before[name]}
        torch.testing.assert_close(output, fresh(X))


@dataclass(frozen=True)
class Half(Case):
    """A model in float16, of which copies are trained."""

    train_also: tuple[str, ...] = ("head", "norm", "q.bias")

    def build(self) -> Any:
        torch.manual_seed(0)
        return Mixed(torch.float16)

    def options(self) -> dict[str, Any]:
        return {"r": 3, "targets": ["q", "down"]}

    def batch(self, rank: int, step: int) -> tuple[Tensor]:  # noqa: ARG002  # the same
        return (torch.arange(4) + 4 * rank,)

    def loss(self, output: Tensor, rank: int) -> Tensor:  # noqa: ARG002
        return (output.float() - 1).square().mean() / 50


def dtypes(tensors: Any) -> set[torch.dtype]:
    return {each.dtype for each in tensors}


@in_two
@pytest.mark.parametrize("engine", ["FSDP2", "FSDP2, the head by itself", "DDP"])
def test_copies_in_float32_train_as_in_one_process(engine: str, tmp_path: Path) -> None:
    case, (inputs,) = Half(), Half().batch(0, 0)
    make = ENGINES[engine].make if engine in ENGINES else around(lambda model: sharded(model, parts=("head",)))
    own, run, one = case.build()(inputs), make(case), case.adapted()
    expected = trained_alone(one, case, range(2), steps=8)
    losses = torch.tensor(on_all(trained(run, case, dist.get_rank(), steps=8))).mean(0)
    torch.testing.assert_close(losses, torch.tensor(expected), rtol=5e-3, atol=0)
    assert expected[-1] < expected[0]
    model = getattr(run, "module", run)
    assert dtypes(randlora.trainable_parameters(model)) == {torch.float32}
    randlora.save(model, tmp_path / "saved")
    dist.barrier()
    assert dtypes(read_tensors(tmp_path / "saved")[0].values()) == {torch.float32}
    loaded, again = case.build(), case.build()
    randlora.load(loaded, tmp_path / "saved")
    torch.testing.assert_close(model(inputs), loaded(inputs))
    entries = dict(randlora.merged_tensors(model))
    assert dtypes(entries.values()) == {torch.float16}
    with randlora.merged(loaded):
        again.load_state_dict(entries)
        torch.testing.assert_close(again(inputs), loaded(inputs))
    with randlora.disabled(model):
        torch.testing.assert_close(model(inputs), own)
    randlora.eject(model)
    torch.testing.assert_close(run(inputs), own)
    if engine != "DDP":  # whose reducer has what was trained
        case.adapt(model)
        run(inputs).float().mean().backward()
        assert dtypes(randlora.trainable_parameters(model)) == {torch.float32}


@in_two
def test_what_is_sharded_already_keeps_its_dtype_and_the_report_says_so() -> None:
    model = sharded(Half().build())
    report = randlora.inject(model, train_also=["head", "norm"], **Half().options())
    model(torch.arange(8)).float().mean().backward()
    assert isinstance(own := model.get_parameter("head.weight"), DTensor)
    assert own.dtype == torch.float16
    assert "are trained in torch.float16" in on_one_line(report)
