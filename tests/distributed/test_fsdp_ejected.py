"""A model that was sharded with its adapter and has none now: torch gathers what it sharded, and nothing else shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor

import randlora
from tests.distributed.processes import Processes
from tests.distributed.test_fsdp_training import TOKENS, Case, share_of, train, values
from tests.distributed.trained import distance


def use_after(end: Callable[[nn.Module], Any], place: Path) -> None:
    """End the adapter, then compute, train, load, and adapt again, as in one process."""
    case = Case(train_also=("norm",))
    one, model = case.adapt(case.base()), case.sharded()
    for each in (one, model):
        end(each)
    assert list(model.state_dict()) == list(one.state_dict())
    assert all(isinstance(value, DTensor) for value in model.state_dict().values())
    torch.testing.assert_close(model(TOKENS), one(TOKENS), rtol=0, atol=1e-6)
    assert distance(values(model), dict(one.named_parameters())) <= 1e-6
    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    assert list(gathered) == list(one.state_dict())
    set_model_state_dict(model, one.state_dict(), options=StateDictOptions(full_state_dict=True))
    for each, tokens in ((one, TOKENS), (model, share_of(TOKENS, 1))):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.01)
        each(tokens).pow(2).mean().backward()
        assert all(parameter.grad is not None for parameter in each.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert distance(values(model), dict(one.named_parameters())) <= 1e-6
    for each in (one, model):
        case.adapt(each)
    train(one, TOKENS)
    train(model, share_of(TOKENS, 1))
    found = values(model)
    assert distance(found, dict(one.named_parameters())) <= 1e-6
    own = torch.cat([value.flatten() for name, value in sorted(found.items()) if "randlora" in name])
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    assert all(torch.equal(each, own) for each in everyone), "the processes have other values"
    randlora.save(model, place)
    dist.barrier()
    loaded = case.base()
    randlora.load(loaded, place, trainable=True)
    saved: dict[str, Tensor] = {name: value for name, value in loaded.named_parameters() if value.requires_grad}
    assert distance(saved, {name: found[name] for name in saved}) == 0
    with randlora.merged(model), randlora.merged(one):
        torch.testing.assert_close(model(TOKENS), one(TOKENS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("end", [randlora.eject, randlora.merge])
def test_what_had_an_adapter_is_used_and_adapted_again(
    pair: Processes, tmp_path: Path, end: Callable[[nn.Module], Any]
) -> None:
    pair.run(use_after, end, tmp_path / "adapter")
