"""What is trained since the model was wrapped: `DistributedDataParallel` does not know it, and users are told."""

import gc
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.nn.parallel import DistributedDataParallel

import randlora
from tests.distributed.processes import Processes
from tests.distributed.trained import Drawn, loss_of, optimizer_of, values_of

DRAWN = Drawn((6, 8, 6), 2, "block", 2.0)


def warned(call: Callable[[], object]) -> list[str]:
    """Return the messages that a call warns with."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(each.filename == __file__ for each in caught), [each.filename for each in caught]
    return [str(each.message) for each in caught]


def differs_after_training(ddp: nn.Module, model: nn.Module) -> bool:
    """Train one step on other rows in each process; return whether the processes then have different values."""
    optimizer = optimizer_of(model)
    loss_of(ddp(DRAWN.batch(dist.get_rank(), 0))).backward()
    optimizer.step()
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
    model = DRAWN.adapted()
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
    model = DRAWN.adapted()
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
    composed = DRAWN.adapted()
    replicate(composed)
    composed(DRAWN.batch(0, 0))  # it makes its wrapper in the first forward
    assert warned(lambda: randlora.set_trainable(composed, "default")) == []
    (message,) = warned(
        lambda: randlora.inject(composed, 2, targets="all-linear", name="b", active=True, trainable=True)
    )
    assert ".b" in message


def test_what_ddp_averages_is_not_warned_of(pair: Processes) -> None:
    pair.run(change_what_ddp_knows)


def raise_the_warning() -> None:
    """The model is unchanged where warnings are errors."""
    model = DRAWN.adapted()
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


def test_a_warning_that_is_raised_leaves_the_model_as_it_was(pair: Processes) -> None:
    pair.run(raise_the_warning)
