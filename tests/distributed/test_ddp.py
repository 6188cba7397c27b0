"""`DistributedDataParallel` sends no bases, and what it does not know is told."""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed._composable.replicate import replicate
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

import randlora
from tests.distributed.engines import trained, zero
from tests.distributed.processes import LAW, in_two, on_all
from tests.distributed.trained import Drawn, distance, drawn_models, optimizer_of, values

pytestmark = in_two

DRAWN = Drawn(basis="block")


@contextmanager
def counted_broadcasts() -> Iterator[list[int]]:
    sent, broadcast = list[int](), vars(dist)["_broadcast_coalesced"]

    def counting(group: Any, tensors: list[Tensor], *args: Any) -> None:
        sent.append(sum(tensor.nbytes for tensor in tensors))
        broadcast(group, tensors, *args)

    with mock.patch.object(dist, "_broadcast_coalesced", counting):
        yield sent


def train_step(ddp: Callable[..., Tensor], optimizer: torch.optim.Optimizer, step: int = 0) -> None:
    optimizer.zero_grad()
    DRAWN.loss(ddp(*DRAWN.batch(dist.get_rank(), step)), 0).backward()
    optimizer.step()


@LAW
@given(drawn=drawn_models)
def test_no_byte_of_bases_is_sent(drawn: Drawn) -> None:
    model = drawn.adapted()
    add(model, "second")
    with counted_broadcasts() as made:
        ddp = DistributedDataParallel(model)
    reduced: list[int] = []

    def count(state: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        reduced.append(bucket.buffer().nbytes)
        return default_hooks.allreduce_hook(state, bucket)

    ddp.register_comm_hook(None, count)
    with counted_broadcasts() as forward:
        output = ddp(*drawn.batch(dist.get_rank(), 0))
    drawn.loss(output, 0).backward()
    adapter = sum(p.nbytes for name, p in model.named_parameters() if "randlora" in name)
    assert sum(made) == adapter + sum(p.nbytes for p in drawn.build().parameters())
    assert sum(forward) == 0
    assert sum(reduced) == sum(p.nbytes for p in randlora.trainable_parameters(model))


def warned(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(each.filename == __file__ for each in caught), [each.filename for each in caught]
    return [str(each.message) for each in caught]


def differs_after_training(ddp: nn.Module, model: nn.Module) -> bool:
    train_step(ddp, optimizer_of(model))
    first, second = on_all(values(model))
    return distance(first, second) > 0


def add(model: nn.Module, name: str, **options: Any) -> None:
    randlora.inject(model, 2, targets=list(DRAWN.targets), name=name, stream="portable", **options)


HOW: dict[str, Callable[[Any, Path], object]] = {
    "set_trainable": lambda model, _: randlora.set_trainable(model, "second"),
    "train_also": lambda model, _: randlora.activate(model, "second"),
    "inject": lambda model, _: add(model, "second", active=True, trainable=True),
    "load": lambda model, place: randlora.load(model, place, name="second", active=True, trainable=True),
}


@pytest.mark.parametrize("how", HOW)
def test_training_another_adapter_in_a_wrapped_model_warns(tmp_path: Path, how: str) -> None:
    model = DRAWN.adapted()
    if dist.get_rank() == 0:  # which is enough
        randlora.save(model, tmp_path / "adapter")
    dist.barrier()
    if how == "set_trainable":
        add(model, "second", active=True)
    elif how == "train_also":  # whose copies are not in the model before they are active
        add(model, "second", train_also=["norm"], trainable=True)
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    before = randlora.adapters(model), [each.requires_grad for each in model.parameters()]
    with warnings.catch_warnings(action="error"), pytest.raises(UserWarning, match="Wrap the model again"):
        HOW[how](model, tmp_path / "adapter")
    assert before == (randlora.adapters(model), [each.requires_grad for each in model.parameters()])
    (message,) = warned(lambda: HOW[how](model, tmp_path / "adapter"))
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


def test_what_ddp_averages_was_told_to_ignore_or_is_not_trained_is_not_warned_of() -> None:
    model = DRAWN.adapted()
    add(model, "second", trainable=True)
    add(model, "fixed")
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    assert warned(lambda: randlora.set_trainable(model, "second")) == []
    assert warned(lambda: randlora.activate(model, "fixed")) == []
    assert warned(lambda: add(model, "third")) == []
    del ddp
    ignored = [name for name, _ in model.named_parameters() if ".fixed" in name]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    assert warned(lambda: randlora.set_trainable(model, "fixed")) == []
    del ddp
    gc.collect()
    composed = DRAWN.adapted()
    replicate(composed)
    composed(*DRAWN.batch(0, 0))  # it makes its wrapper in the first forward
    assert warned(lambda: randlora.set_trainable(composed, "default")) == []
    (message,) = warned(lambda: add(composed, "b", active=True, trainable=True))
    assert ".b" in message


@pytest.mark.parametrize("engine", ["ZeRO-2", "ZeRO-3"])
def test_training_another_adapter_than_an_engine_of_deepspeed_does_warns(engine: str) -> None:
    model = DRAWN.adapted()
    add(model, "second")
    trained(zero(model, engine[-1]), DRAWN, dist.get_rank(), 1)
    randlora.set_trainable(model, "default")  # which the engine trains
    changes: list[Callable[[], object]] = [
        lambda: randlora.set_trainable(model, ["default", "second"]),
        lambda: add(model, "third", trainable=True),
    ]
    for change in changes:
        with pytest.warns(UserWarning, match="requires grad, and the DeepSpeedEngine around the model was made before"):
            change()
