"""`DistributedDataParallel`: the same training as in one process, without sending bases."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import randlora
from tests.distributed.processes import LAW, Processes
from tests.distributed.trained import (
    Drawn,
    counted_broadcasts,
    distance,
    drawn_models,
    loss_of,
    mean_over_ranks,
    optimizer_of,
    require_equal_on_ranks,
    trained_alone,
    values_of,
)

OPTIONS = st.fixed_dictionaries({
    "static_graph": st.booleans(),
    "find_unused_parameters": st.booleans(),
    "gradient_as_bucket_view": st.booleans(),
})


def wrap(model: nn.Module, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(model, **options)


def train_in_parts(drawn: Drawn, options: dict[str, bool], accumulated: int) -> tuple[float, float]:
    """Train with DDP; return how far the losses and the values are from those of one process.

    With ``accumulated`` steps for each step of the optimizer, those before the last are in `no_sync`.
    """
    model = drawn.adapted()
    ddp = wrap(model, **options)
    optimizer, losses = optimizer_of(model), []
    for step in range(drawn.steps):
        optimizer.zero_grad()
        rows = drawn.batch(dist.get_rank(), step)
        parts = rows.chunk(accumulated)
        total = 0.0
        for index, part in enumerate(parts):
            with ddp.no_sync() if index + 1 < len(parts) else nullcontext():
                loss = loss_of(ddp(part)) * (len(part) / len(rows))
                loss.backward()
            total += loss.item()
        optimizer.step()
        losses.append(mean_over_ranks(total))
    values = values_of(model)
    require_equal_on_ranks(values)
    expected_losses, expected = trained_alone(drawn)
    return max(abs(a - b) for a, b in zip(losses, expected_losses, strict=True)), distance(values, expected)


@settings(LAW, max_examples=10)
@given(drawn=drawn_models(checkpointed=st.booleans()), options=OPTIONS, accumulated=st.sampled_from([1, 1, 3]))
def test_training_equals_that_of_one_process(
    pair: Processes, drawn: Drawn, options: dict[str, bool], accumulated: int
) -> None:
    if options["static_graph"]:  # torch counts a pass in no_sync as one of the first, and unused ones by itself
        accumulated, options = 1, options | {"find_unused_parameters": False}
    for loss, value in pair.run(train_in_parts, drawn, options, accumulated):
        assert loss <= 1e-6
        assert value <= 1e-6


def train_compiled(drawn: Drawn) -> float:
    """Train a compiled model with DDP; return how far the values are from those of one process."""
    model = drawn.adapted()
    compiled, optimizer = torch.compile(wrap(model), backend="aot_eager"), optimizer_of(model)
    for step in range(drawn.steps):
        optimizer.zero_grad()
        loss_of(compiled(drawn.batch(dist.get_rank(), step))).backward()
        optimizer.step()
    require_equal_on_ranks(values_of(model))
    return distance(values_of(model), trained_alone(drawn)[1])


def test_compiled_training_equals_that_of_one_process(pair: Processes) -> None:
    assert max(pair.run(train_compiled, Drawn((6, 8, 6), 2, "block", 2.0, ("norms",)))) <= 1e-6


def bytes_sent(drawn: Drawn) -> dict[str, int]:
    """Return the bytes that DDP sends when it is made, in a forward and in a backward, and those that it has to."""
    model = drawn.adapted()
    with counted_broadcasts() as made:
        ddp = wrap(model)
    reduced: list[int] = []

    def count(state: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        reduced.append(bucket.buffer().nbytes)
        return default_hooks.allreduce_hook(state, bucket)

    ddp.register_comm_hook(None, count)
    with counted_broadcasts() as forward:
        loss = loss_of(ddp(drawn.batch(dist.get_rank(), 0)))
    loss.backward()
    return {
        "made": sum(made),
        "plain model": sum(p.nbytes for p in drawn.build().parameters()),
        "forward": sum(forward),
        "backward": sum(reduced),
        "trained": sum(p.nbytes for p in randlora.trainable_parameters(model)),
        "adapter": sum(p.nbytes for name, p in model.named_parameters() if "randlora" in name),
    }


@LAW
@given(drawn=drawn_models(others=st.sampled_from([0, 2])))
def test_no_byte_of_bases_is_sent(pair: Processes, drawn: Drawn) -> None:
    for sent in pair.run(bytes_sent, drawn):
        assert sent["made"] == sent["plain model"] + sent["adapter"]
        assert sent["forward"] == 0
        assert sent["backward"] == sent["trained"]


def bytes_of_peft() -> int:
    """Return the bytes that PEFT's RandLoRA has DDP send in each forward."""
    from peft import RandLoraConfig, get_peft_model

    model = Drawn((12, 12, 12), 4, "dense", 1.0).build()
    adapted = get_peft_model(model, RandLoraConfig(r=4, target_modules=r"layers\.\d", randlora_alpha=1))
    ddp = wrap(adapted)
    ddp(torch.ones(3, 12))  # the first forward follows the constructor, which made all equal
    with counted_broadcasts() as sent:
        ddp(torch.ones(3, 12))
    return sum(sent)


@pytest.mark.slow
def test_peft_sends_its_bases_in_every_forward(pair: Processes) -> None:
    """What is compared with: once this fails, docs/distributed.md is to be corrected."""
    pytest.importorskip("peft")
    largest = 12 * 12 * 4
    assert all(sent >= largest for sent in pair.run(bytes_of_peft))


def join(drawn: Drawn) -> None:
    model = drawn.adapted()
    ddp, optimizer = wrap(model), optimizer_of(model)
    before = values_of(model)
    with Join([ddp]):
        for step in range(drawn.steps + dist.get_rank()):
            optimizer.zero_grad()
            loss_of(ddp(drawn.batch(dist.get_rank(), step))).backward()
            optimizer.step()
    if dist.get_rank():  # DDP makes those of rank 1, which joins last, authoritative
        assert distance(values_of(model), before) > 0
    require_equal_on_ranks(values_of(model))


def test_uneven_inputs_are_joined(pair: Processes) -> None:
    pair.run(join, Drawn((6, 8, 6), 2, "block", 2.0, ("norms",)))


def save_and_load(drawn: Drawn, directory: str, *, everywhere: bool) -> None:
    """Train, save on rank 0 or on all ranks at once, and load."""
    model = drawn.adapted()
    ddp, optimizer = wrap(model), optimizer_of(model)
    loss_of(ddp(drawn.batch(dist.get_rank(), 0))).backward()
    optimizer.step()
    if everywhere or dist.get_rank() == 0:
        randlora.save(ddp, directory)
    dist.barrier()
    other = drawn.build()
    randlora.load(other, directory, trainable=True)
    assert distance(values_of(other), values_of(model)) == 0
    rows = drawn.batch(0, 0)
    assert torch.equal(other(rows), model(rows))
    with randlora.merged(ddp):  # each process by itself
        torch.testing.assert_close(ddp(rows), other(rows))
    assert torch.equal(ddp(rows), other(rows))


@pytest.mark.parametrize("everywhere", [False, True], ids=["rank-0", "all-ranks"])
def test_an_adapter_is_saved_on_one_or_on_all_ranks(pair: Processes, tmp_path: Path, *, everywhere: bool) -> None:
    drawn = Drawn((6, 8, 6), 2, "dense", 2.0, ("norms",))
    pair.run(save_and_load, drawn, str(tmp_path / "adapter"), everywhere=everywhere)
