"""Tensor parallelism by transformers' plans, and together with `fully_shard` on a mesh of two dimensions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import randlora
from tests.distributed.processes import Processes
from tests.distributed.test_tensor_parallel import Drawn, close, outputs_of, plain
from tests.kit import fill

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen3": {"head_dim": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def planned(kind: str, place: Path) -> None:
    """Train, save, load and merge a model of transformers that its own plan splits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    config = AutoConfig.for_model(kind, **sizes, **heads, **CONFIGS[kind])
    torch.manual_seed(0)
    one = AutoModelForCausalLM.from_config(config)
    if dist.get_rank() == 0:
        one.save_pretrained(place / "base")
    dist.barrier()
    one = AutoModelForCausalLM.from_pretrained(place / "base")
    model = AutoModelForCausalLM.from_pretrained(
        place / "base", tp_plan="auto", device_mesh=init_device_mesh("cpu", (2,))
    )
    assert any(isinstance(parameter, DTensor) for parameter in model.parameters())
    for each in (one, model):
        each.eval()
        randlora.inject(each, r=4, targets="all-linear")
        fill(each)
    ids = torch.arange(12).view(2, 6)
    optimizers = [torch.optim.SGD(randlora.trainable_parameters(each), lr=1e-3) for each in (one, model)]
    for _ in range(2):
        losses = [each(input_ids=ids, labels=ids).loss for each in (one, model)]
        close(losses[1], losses[0])
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
        for ours, expected in zip(*map(randlora.trainable_parameters, (model, one)), strict=True):
            assert ours.grad is not None
            assert expected.grad is not None
            close(ours.grad, expected.grad)
        for optimizer in optimizers:
            optimizer.step()
    with torch.no_grad():
        written = [each.generate(input_ids=ids[:, :3], max_new_tokens=3, do_sample=False) for each in (one, model)]
        assert torch.equal(*written)
        randlora.save(model, place / f"adapter_{dist.get_rank()}")
        expected = one(input_ids=ids).logits
        randlora.eject(model)
        randlora.load(model, place / f"adapter_{dist.get_rank()}")
        close(model(input_ids=ids).logits, expected)
        with randlora.merged(model):
            close(model(input_ids=ids).logits, expected)


@pytest.mark.medium
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_of_transformers_that_its_plan_splits(pair: Processes, kind: str, tmp_path: Path) -> None:
    pair.run(planned, kind, tmp_path)


def on_two_dimensions(first: bool, place: Path) -> None:
    """Train on a mesh of two data-parallel times two tensor-parallel processes."""
    drawn = Drawn(8, 16, 30, first, "whole", {"r": 4, "targets": ["up", "down"]})
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    one, model = plain(drawn), plain(drawn)
    randlora.inject(one, **drawn.options)
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if first:
        parallelize_module(model, mesh["tp"], plan)
    randlora.inject(model, **drawn.options)
    if not first:
        parallelize_module(model, mesh["tp"], plan)
    fill(one), fill(model)
    fully_shard(model, mesh=mesh["dp"])
    ids = torch.arange(16).view(4, 4) + 1
    mine = ids.chunk(2)[mesh["dp"].get_local_rank()]
    optimizers = [torch.optim.SGD(randlora.trainable_parameters(each), lr=1e-2) for each in (one, model)]
    for _ in range(2):
        norms = []
        for each, batch, optimizer in zip((one, model), (ids, mine), optimizers, strict=True):
            optimizer.zero_grad()
            each(batch).square().mean().backward()
            norm = torch.nn.utils.clip_grad_norm_(randlora.trainable_parameters(each), 1e-2)
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
            optimizer.step()
        close(norms[1], norms[0])
    close(outputs_of(model, ids), outputs_of(one, ids))
    for fqn in ("up", "down"):
        close(randlora.delta_weight(model, fqn), randlora.delta_weight(one, fqn))
    randlora.save(model, place / "adapter")
    dist.barrier()
    other = plain(drawn)
    randlora.load(other, place / "adapter")
    close(outputs_of(other, ids), outputs_of(one, ids))
    with torch.no_grad(), randlora.merged(model):
        close(outputs_of(model, ids), outputs_of(one, ids))


@pytest.mark.medium
@pytest.mark.parametrize("first", [True, False])
def test_a_mesh_of_two_dimensions(four: Processes, first: bool, tmp_path: Path) -> None:
    four.run(on_two_dimensions, first, tmp_path)
