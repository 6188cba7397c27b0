"""`DistributedDataParallel`: training as in one process without sending bases, and what it does not know is told."""

import gc
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed._composable.replicate import replicate
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

DRAWN = Drawn((6, 8, 6), 2, "block", 2.0, ("norms",))
ALONE = replace(DRAWN, train_also=())
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


def train_compiled() -> None:
    model = DRAWN.adapted()
    compiled, optimizer = torch.compile(wrap(model), backend="aot_eager"), optimizer_of(model)
    for step in range(DRAWN.steps):
        train_step(compiled, optimizer, step)
    require_equal_on_ranks(values_of(model))
    assert distance(values_of(model), trained_alone(DRAWN)[1]) <= 1e-6


def train_step(ddp: Callable[..., Tensor], optimizer: torch.optim.Optimizer, step: int = 0) -> None:
    optimizer.zero_grad()
    loss_of(ddp(DRAWN.batch(dist.get_rank(), step))).backward()
    optimizer.step()


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


def join() -> None:
    model = DRAWN.adapted()
    ddp, optimizer = wrap(model), optimizer_of(model)
    before = values_of(model)
    with Join([ddp]):
        for step in range(DRAWN.steps + dist.get_rank()):
            train_step(ddp, optimizer, step)
    if dist.get_rank():  # DDP makes those of rank 1, which joins last, authoritative
        assert distance(values_of(model), before) > 0
    require_equal_on_ranks(values_of(model))


@pytest.mark.parametrize("check", [train_compiled, join])
def test_processes_that_compile_or_have_uneven_inputs_stay_equal(pair: Processes, check: Callable[[], None]) -> None:
    pair.run(check)


def save_and_load(directory: str, *, everywhere: bool) -> None:
    """Train, save on rank 0 or on all ranks at once, and load."""
    model = DRAWN.adapted()
    ddp = wrap(model)
    train_step(ddp, optimizer_of(model))
    if everywhere or dist.get_rank() == 0:
        randlora.save(ddp, directory)
    dist.barrier()
    other = DRAWN.build()
    randlora.load(other, directory, trainable=True)
    assert distance(values_of(other), values_of(model)) == 0
    rows = DRAWN.batch(0, 0)
    assert torch.equal(other(rows), model(rows))
    with randlora.merged(ddp):  # each process by itself
        torch.testing.assert_close(ddp(rows), other(rows))
    assert torch.equal(ddp(rows), other(rows))


@pytest.mark.parametrize("everywhere", [False, True], ids=["rank-0", "all-ranks"])
def test_an_adapter_is_saved_on_one_or_on_all_ranks(pair: Processes, tmp_path: Path, *, everywhere: bool) -> None:
    pair.run(save_and_load, str(tmp_path / "adapter"), everywhere=everywhere)


def warned(call: Callable[[], object]) -> list[str]:
    """Return the messages that a call warns with."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(each.filename == __file__ for each in caught), [each.filename for each in caught]
    return [str(each.message) for each in caught]


def differs_after_training(ddp: nn.Module, model: nn.Module) -> bool:
    """Train one step on other rows in each process; return whether the processes then have different values."""
    train_step(ddp, optimizer_of(model))
    flat = torch.cat([value.flatten() for value in values_of(model).values()])
    found = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(found, flat)
    return not torch.equal(*found)


def second_adapter(model: nn.Module, directory: str, how: str) -> Callable[[], object]:
    """Return a call that has the model train another adapter than before."""
    if how == "set_trainable":
        randlora.inject(model, 2, targets="all-linear", name="second", stream="portable", active=True)
        return lambda: randlora.set_trainable(model, "second")
    if how == "train_also":  # whose copies are not in the model before they are active
        randlora.inject(model, 2, targets="all-linear", train_also="norms", name="second", trainable=True)
        return lambda: randlora.activate(model, "second")
    if how == "inject":
        return lambda: randlora.inject(model, 2, targets="all-linear", name="second", active=True, trainable=True)
    return lambda: randlora.load(model, directory, name="second", active=True, trainable=True)


def train_another_after_wrapping(directory: str, how: str) -> None:
    model = ALONE.adapted()
    if dist.get_rank() == 0:
        randlora.save(model, directory)
    dist.barrier()
    change = second_adapter(model, directory, how)
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    (message,) = warned(change)
    assert "requires grad" in message
    assert "Wrap the model again" in message
    assert differs_after_training(ddp, model)
    del ddp
    gc.collect()
    assert warned(lambda: randlora.activate(model, "second")) == []
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    assert warned(lambda: randlora.set_trainable(model, "second")) == []
    assert not differs_after_training(ddp, model)


@pytest.mark.parametrize("how", ["set_trainable", "train_also", "inject", "load"])
def test_training_another_adapter_in_a_wrapped_model_warns(pair: Processes, tmp_path: Path, how: str) -> None:
    pair.run(train_another_after_wrapping, str(tmp_path / "adapter"), how)


def change_what_ddp_knows() -> None:
    """Nothing that DDP averages, was told to ignore, or that is not trained is warned of."""
    model = ALONE.adapted()
    randlora.inject(model, 2, targets="all-linear", name="second", stream="portable", trainable=True)
    randlora.inject(model, 2, targets="all-linear", name="fixed", stream="portable")
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    assert warned(lambda: randlora.set_trainable(model, "second")) == []
    assert warned(lambda: randlora.activate(model, "fixed")) == []
    assert warned(lambda: randlora.inject(model, 2, targets="all-linear", name="third")) == []
    del ddp
    ignored = [name for name, _ in model.named_parameters() if ".fixed" in name]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    assert warned(lambda: randlora.set_trainable(model, "fixed")) == []
    del ddp
    gc.collect()
    composed = ALONE.adapted()
    replicate(composed)
    composed(ALONE.batch(0, 0))  # it makes its wrapper in the first forward
    assert warned(lambda: randlora.set_trainable(composed, "default")) == []
    (message,) = warned(
        lambda: randlora.inject(composed, 2, targets="all-linear", name="b", active=True, trainable=True)
    )
    assert ".b" in message


def raise_the_warning() -> None:
    """The model is unchanged where warnings are errors."""
    model = ALONE.adapted()
    randlora.inject(model, 2, targets="all-linear", name="second", stream="portable")
    ddp = DistributedDataParallel(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="Wrap the model again"):
            randlora.set_trainable(model, "second")
        with pytest.raises(UserWarning, match="Wrap the model again"):
            randlora.inject(model, 2, targets="all-linear", name="third", active=True, trainable=True)
    assert [each.name for each in randlora.adapters(model) if each.is_active or each.is_trainable] == ["default"]
    assert len(randlora.adapters(model)) == 2
    assert not differs_after_training(ddp, model)


@pytest.mark.parametrize("check", [change_what_ddp_knows, raise_the_warning])
def test_what_ddp_averages_is_not_warned_of_and_a_raised_warning_changes_nothing(
    pair: Processes, check: Callable[[], None]
) -> None:
    pair.run(check)
