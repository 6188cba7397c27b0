"""The norms of updates, as a part of a loss and with a limit, are in several processes those of one."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import randlora
from randlora.errors import AdapterError
from tests.distributed.engines import engine_of, needs_deepspeed, trained
from tests.distributed.processes import Processes
from tests.distributed.test_fsdp_training import TOKENS, Case, share_of, values
from tests.distributed.test_zero import DRAWN, alone


def with_penalty(model: nn.Module, tokens: Tensor, factor: float) -> None:
    """Train with a penalty and a limit, two backwards a step."""
    optimizer = torch.optim.SGD(randlora.trainable_parameters(model), lr=0.02)
    for _ in range(3):
        for part in tokens.view(2, -1):
            loss = model(part).pow(2).mean()
            norms = randlora.update_norms(model)
            (loss + factor * sum(norm**2 for norm in norms.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
        randlora.limit_norms(model, {"first": 0.25, ".*": 1e3})


def train(case: Case) -> None:
    one, model = case.adapt(case.base()), case.sharded()
    with_penalty(one, TOKENS, 1e-3)
    with_penalty(model, share_of(TOKENS, 2), 1e-3)
    found = values(model)
    for name, expected in one.named_parameters():
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-6, msg=name)
    expected_norms = randlora.update_norms(one)
    for fqn, norm in randlora.update_norms(model).items():
        torch.testing.assert_close(norm, expected_norms[fqn])
    limited = {fqn for fqn, norm in expected_norms.items() if 0.2499 < norm < 0.2501}
    assert limited == {fqn for fqn in expected_norms if fqn.startswith("first")}
    without = case.adapt(case.base())
    with_penalty(without, TOKENS, 0.0)
    ours, theirs = (each.get_parameter("second.q.randlora_gamma.default") for each in (one, without))
    assert (ours - theirs).abs().max() > 1e-4, "the penalty did nothing"


@pytest.mark.parametrize("is_sharded_first", [False, True])
def test_training_with_a_penalty_and_a_limit_is_that_of_one_process(
    pair: Processes,
    is_sharded_first: bool,
) -> None:
    pair.run(train, Case(is_sharded_first=is_sharded_first))


def train_replicas(case: Case) -> None:
    one, model = case.adapt(case.base()), DistributedDataParallel(case.adapt(case.base()))
    with_penalty(one, TOKENS, 1e-3)
    with_penalty(model, share_of(TOKENS, 2), 1e-3)
    for name, expected in one.named_parameters():
        torch.testing.assert_close(model.module.get_parameter(name), expected, rtol=0, atol=1e-6, msg=name)


def test_replicas_train_with_a_penalty_and_a_limit_as_one_process(pair: Processes) -> None:
    pair.run(train_replicas, Case())


def read_norms_of_an_engine(stage: str) -> None:
    engine = engine_of(DRAWN, stage, is_spread_first=False)
    trained(engine, DRAWN, dist.get_rank(), 0)
    twin = alone(DRAWN, engine)
    with torch.no_grad():
        assert randlora.update_norms(engine.module) == randlora.update_norms(twin)
    with pytest.raises(AdapterError, match=r"would give no gradients .* under torch\.no_grad"):
        randlora.update_norms(engine.module)
    with pytest.raises(AdapterError, match="is partitioned by ZeRO-3, whose optimizer has copies"):
        randlora.limit_norms(engine.module, 1.0)


@needs_deepspeed
@pytest.mark.parametrize("stage", ["3", "3-persistent"])
def test_under_zero_3_norms_are_read_and_neither_trained_nor_limited(zero_pair: Processes, stage: str) -> None:
    zero_pair.run(read_norms_of_an_engine, stage)
