"""`merged_tensors` of a model sharded by FSDP2: what one process yields, with the same bits in every process."""

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import randlora
from tests.distributed.processes import Processes
from tests.kit import Bits, all_bits, fill

ADAPTED = ["0.weight", "1.weight", "3.weight"]


def sharded_as_whole(steps: int) -> tuple[list[str], list[dict[str, Bits]]]:
    """Train a sharded model; return where a whole one yields other values, and the bits of its merged weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 12), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 7), nn.BatchNorm1d(7))
    randlora.inject(model, r=4, targets=["0", "1", "3"], train_also=["4.weight"])
    whole = fill(copy.deepcopy(model))
    sharded = fill(model)
    for layer in (sharded[1], sharded[3], sharded):
        fully_shard(layer)
    optimizer = torch.optim.SGD(randlora.trainable_parameters(sharded), lr=0.1)
    differing: list[str] = []
    yielded: list[dict[str, Bits]] = []
    base: dict[str, Bits] = {}
    for step in range(steps):
        found = dict(randlora.merged_tensors(sharded))
        yielded.append(all_bits({name: found[name] for name in ADAPTED}))
        full = {name: value.full_tensor() if hasattr(value, "full_tensor") else value
                for name, value in sharded.state_dict().items()}  # fmt: skip
        values = {name: value for name, value in full.items() if name in whole.state_dict()}
        whole.load_state_dict(values)
        expected = dict(randlora.merged_tensors(whole))
        assert list(found) == list(expected)
        for name, value in expected.items():  # a part of a product may round otherwise than all of it
            tolerance = 1e-6 if name in ADAPTED else 0
            if not torch.allclose(found[name], value, rtol=0, atol=tolerance):
                differing.append(f"{step} {name}")
        frozen = {name: bits for name, bits in all_bits(values).items() if name in ("1.weight", "3.bias", "0.weight")}
        base = base or frozen
        assert frozen == base
        sharded(torch.arange(8) + dist.get_rank()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():  # after which the outermost module holds whole copies
            sharded.eval()(torch.arange(8))
            sharded.train()
    return differing, yielded


def test_a_sharded_model_yields_what_a_whole_one_does(pair: Processes) -> None:
    (differing, yielded), (also_differing, also_yielded) = pair.run(sharded_as_whole, 3)
    assert differing == also_differing == []
    assert yielded == also_yielded
