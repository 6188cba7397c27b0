"""What else is trained as in one process: statistics, 16 bits, norms, runs of DeepSpeed, stages and sequences."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor
from torch.nn.functional import mse_loss, scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

import randlora
from tests.distributed.engines import ENGINES, answering, around, config, deepspeed, sharded, trained, zero
from tests.distributed.processes import in_two, in_two_of_zero, on_all
from tests.distributed.test_engines import require_as_one_process
from tests.distributed.trained import (
    Drawn,
    Made,
    distance,
    drawn,
    filled,
    require_equal_on_ranks,
    trained_alone,
    values,
)
from tests.kit import adapt, all_bits, on_one_line
from tests.laws import Mixed
from tests.pages import DOCS, snippets

pytestmark = in_two

DRAWN, ALSO = Drawn(), Drawn(train_also=("norm", "head"))


NORMS = Made(
    lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6)),
    {"r": 2, "targets": ["0", "2"], "stream": "portable"},
    lambda rank, step: (drawn(8, 6, seed=2 * step + rank) + 1,),
    train_also=("1",),
)


@pytest.mark.parametrize("engine", ["DDP", "FSDP2", "FSDP2 first", "ZeRO-3"])
def test_an_adapter_has_the_statistics_of_the_first_process(engine: str, tmp_path: Path) -> None:
    case, own = NORMS, ENGINES[engine]
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
    output = run(x := torch.linspace(-1, 1, 12).view(2, 6))  # of all processes
    if dist.get_rank() == 0:
        for name in names:
            assert all_bits({name: fresh.get_buffer(name)}) == all_bits({name: model.get_buffer(name)})
            assert all_bits({name: fresh.get_buffer(name)}) != {name: before[name]}
        torch.testing.assert_close(output, fresh(x))


HALF = Made(
    lambda: Mixed(torch.float16),
    {"r": 3, "targets": ["q", "down"]},
    lambda rank, _: (torch.arange(4) + 4 * rank,),
    train_also=("head", "norm", "q.bias"),
    measure=lambda output, _: (output.float() - 1).square().mean() / 50,
)


@pytest.mark.parametrize("engine", ["FSDP2", "FSDP2, the head by itself", "DDP"])
def test_copies_in_float32_train_as_in_one_process(engine: str, tmp_path: Path) -> None:
    by_itself = replace(ENGINES["FSDP2"], make=around(lambda model: sharded(model, parts=("head",))))
    own = replace(ENGINES.get(engine, by_itself), within=5e-3, in_double=5e-3)
    run = own.make(HALF)
    assert {each.dtype for each in randlora.trainable_parameters(run)} == {torch.float32}
    require_as_one_process(own, HALF, tmp_path)
    if engine != "DDP":  # whose reducer has what was trained
        randlora.eject(run)
        HALF.adapt(run)(torch.arange(4)).float().mean().backward()
        assert {each.dtype for each in randlora.trainable_parameters(run)} == {torch.float32}


def test_what_is_sharded_already_keeps_its_dtype_and_the_report_says_so() -> None:
    model = sharded(HALF.build())
    report = randlora.inject(model, train_also=["head", "norm"], **HALF.options())
    model(torch.arange(8)).float().mean().backward()
    assert isinstance(own := model.get_parameter("head.weight"), DTensor)
    assert own.dtype == torch.float16
    assert "are trained in torch.float16" in on_one_line(report)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", ["2", "3"])
@in_two_of_zero
def test_engines_of_half_precision_train(tmp_path: Path, stage: str, dtype: str) -> None:
    """Λ and Γ are in the engine's dtype, and so is the file; float32 masters are the optimizer's."""
    case, scale = Drawn(train_also=("norm",)), {"loss_scale": 128} if dtype == "fp16" else {}  # else it looks for one
    with answering(knows_fp16=True):  # torch does in any case, slowly
        engine = zero(case.adapted(), stage, **{dtype: {"enabled": True, **scale}})
    losses = torch.tensor(on_all(trained(engine, case, dist.get_rank()))).mean(0)
    assert (losses - torch.tensor(trained_alone(case.adapted(), case, range(2)))).abs().max() < 0.02
    found = values(engine.module, only_trained=True)
    require_equal_on_ranks(found)
    randlora.save(engine.module, tmp_path / "adapter")
    dist.barrier()
    twin, rows = case.build(), case.batch(0, 5)
    randlora.load(twin, tmp_path / "adapter", trainable=True)
    assert distance(values(twin, only_trained=True), found) == 0
    twin.to(next(iter(found.values())).dtype)
    before = engine(*rows)
    assert torch.equal(before, twin(*rows))
    with randlora.merged(engine), randlora.merged(twin):
        assert torch.equal(engine(*rows), twin(*rows))
        torch.testing.assert_close(engine(*rows), before, rtol=0, atol=0.02)
    assert torch.equal(engine(*rows), before)


@pytest.mark.parametrize("knows_fp16", [True, False])
@in_two_of_zero
def test_a_model_in_float64_that_is_spread_is_adapted_whatever_the_processor_computes_in(*, knows_fp16: bool) -> None:
    """Also with copies, which ZeRO-3 manages then; `zero.Init` refuses float64 where the processor knows fp16."""
    case = Drawn(train_also=("norm",), dtype=torch.float64)
    with answering(knows_fp16=knows_fp16):
        model = case.build()
        deepspeed().zero.Init(module=model, config_dict_or_path=config("3"))
        found, expected = values(case.adapt(model)), values(case.adapted())
    assert all_bits(found) == all_bits(expected)
    assert {each.dtype for name, each in found.items() if "norm" in name} == {torch.float64}


@pytest.mark.parametrize("stage", ["2", "3"])
@in_two_of_zero
def test_a_checkpoint_of_deepspeed_without_the_base_resumes_a_run(tmp_path: Path, stage: str) -> None:
    case, rank = Drawn(train_also=("norm",)), dist.get_rank()
    through, rest = (zero(case.adapted(), stage) for _ in range(2))
    trained(through, case, rank, 1)
    through.save_checkpoint(str(tmp_path), exclude_frozen_parameters=True)
    expected = trained(through, case, rank, 2)
    path, _ = rest.load_checkpoint(str(tmp_path), load_module_strict=False)
    assert path is not None
    assert trained(rest, case, rank, 2) == expected
    assert distance(values(rest.module), values(through.module)) == 0


@pytest.mark.parametrize("engine", ["FSDP2 first", "tensor parallel first"])
def test_gradients_that_are_sharded_and_whole_are_clipped_by_the_norm_of_one_process(engine: str) -> None:
    (snippet,) = (each for each in snippets(DOCS / "distributed.md") if "def clip_grad_norm" in each.code)
    exec(snippet.code, documented := dict[str, Any]())
    one, model, own = ALSO.adapted(), ENGINES[engine].make(ALSO), ENGINES[engine]
    for rank in own.ranks():
        (ALSO.loss(one(*ALSO.batch(rank, 0)), rank) / len(own.ranks())).backward()
    ALSO.loss(model(*ALSO.batch(dist.get_rank() // own.sharing, 0)), 0).backward()
    trainable = randlora.trainable_parameters
    expected = clip_grad_norm_(trainable(one), 0.01)
    assert expected > 0.01
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        clip_grad_norm_(trainable(model), 0.01)
    torch.testing.assert_close(documented["clip_grad_norm"](trainable(model), 0.01), expected)
    for mine, theirs in zip(trainable(model), trainable(one), strict=True):
        grad: Any = mine.grad
        torch.testing.assert_close(grad.full_tensor() if hasattr(mine, "device_mesh") else grad, theirs.grad)


def with_penalty(run: nn.Module, ranks: Any, factor: float = 0.03) -> dict[str, Tensor]:
    model = getattr(run, "module", run)
    optimizer = torch.optim.SGD(randlora.trainable_parameters(model), lr=0.02)
    for step in range(3):
        for rank in ranks:
            penalty = sum(norm**2 for norm in randlora.update_norms(model).values())
            ((DRAWN.loss(run(*DRAWN.batch(rank, step)), rank) + factor * penalty) / len(ranks)).backward()
        optimizer.step()
        optimizer.zero_grad()
        randlora.limit_norms(model, {"blocks.0": 0.04, ".*": 1e3})
    return values(model)


@pytest.mark.parametrize("engine", ["DDP", "FSDP2", "FSDP2 first"])
def test_a_penalty_and_a_limit_of_norms_are_those_of_one_process(engine: str) -> None:
    one, model = DRAWN.adapted(), ENGINES[engine].make(DRAWN)
    own, expected = with_penalty(model, [dist.get_rank()]), with_penalty(one, range(2))
    assert distance(own, expected) <= 1e-6
    assert distance(with_penalty(DRAWN.adapted(), range(2), factor=0), expected) > 1e-4, "the penalty did nothing"
    limited = {fqn for fqn, norm in randlora.update_norms(one).items() if 0.0399 < norm < 0.0401}
    assert limited == {"blocks.0.up", "blocks.0.down"}


def test_joined_stages_are_what_one_process_saves(tmp_path: Path) -> None:
    options: dict[str, Any] = {"r": 2, "targets": "all-linear", "basis": "block", "blocks": (2, 2), "alpha": 2.0}
    rank = dist.get_rank()

    def adapted(*left_out: int) -> nn.Sequential:
        torch.manual_seed(3)
        model = nn.Sequential(*(each for _ in range(4) for each in (nn.Linear(8, 8), nn.Tanh())))
        for index in left_out:
            del model._modules[str(index)]
        randlora.inject(model, **options)
        return model

    def train(model: nn.Module, run: Any) -> None:
        optimizer = torch.optim.SGD(randlora.trainable_parameters(model), lr=0.05)
        for step in range(2):
            run(*torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(step)))
            optimizer.step()
            optimizer.zero_grad()

    part = adapted(*(range(4) if rank else range(4, 8)))
    randlora.check_ranks(part, group=dist.new_subgroups(1)[0])
    stage = PipelineStage(part, rank, dist.get_world_size(), torch.device("cpu"))
    schedule = ScheduleGPipe(stage, 2, loss_fn=mse_loss)
    train(part, lambda x, y: schedule.step(target=y) if rank else schedule.step(x))
    randlora.save(part, tmp_path / f"stage{rank}")
    dist.barrier()
    if rank == 0:
        randlora.files.join([tmp_path / "stage0", tmp_path / "stage1"], tmp_path / "joined")
        model, other = adapted(), adapted()
        before = model.get_parameter("6.randlora_gamma.default").clone()
        train(model, lambda x, y: mse_loss(model(x), y).backward())
        randlora.eject(other)
        randlora.load(other, tmp_path / "joined")
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(other.get_parameter(name), parameter, rtol=0, atol=1e-6)
        assert not torch.equal(model.get_parameter("6.randlora_gamma.default"), before)


class _Join(torch.autograd.Function):
    """The parts of a sequence of all processes. The gradient of a part is the sum of what all processes have of it."""

    @staticmethod
    def forward(_ctx: Any, part: Tensor) -> Tensor:
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> Tensor:
        dist.all_reduce(grad := grads[0].contiguous())
        return grad.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, *, is_part: bool) -> Tensor:
        key, value = self.k(x), self.v(x)
        if is_part:
            key, value = (_Join.apply(each) for each in (key, value))  # type: ignore[no-untyped-call]
        return scaled_dot_product_attention(self.q(x), key, value)


def test_gradients_of_parts_of_sequences_average_to_the_whole() -> None:
    model = Attention()
    adapt(model, r=2, targets="all")
    x = torch.randn(2, 8, 8)
    model(x, is_part=False).pow(2).mean().backward()
    expected = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    part = x.chunk(2, dim=1)[dist.get_rank()]
    wrapper = DistributedDataParallel(model)
    wrapper(part, is_part=True).pow(2).mean().backward()
    assert len(expected) == 6
    for name, grad in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(11, 12, 0), nn.Linear(12, 12), nn.Linear(12, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        output: Tensor = self.head(torch.tanh(self.body(self.embed(ids))))
        return output


class OfRows(Made):
    def adapt(self, model: Any, name: str = "default") -> Any:
        randlora.inject(model, train_rows={"embed": [3, 0, 10, 7, 5]}, **self.options())
        return filled(model, name)


@pytest.mark.parametrize(
    "engine",
    [
        *("FSDP2", "ZeRO-3"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("DDP", "FSDP2 first", "FSDP2, offloaded", "FSDP2 first, offloaded", "ZeRO-2", "ZeRO-3 first")
        ),
    ],
)
def test_rows_of_a_table_and_of_the_head_that_is_tied_to_it_train_as_in_one_process(
    engine: str, tmp_path: Path
) -> None:
    case = OfRows(Tied, {"r": 3, "targets": ["body"]}, Drawn().batch)
    require_as_one_process(ENGINES[engine], case, tmp_path)
