"""Tensor parallelism by the plans of transformers' models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import randlora
from randlora.errors import RandLoRAError
from tests.distributed.processes import Processes
from tests.distributed.test_tensor_parallel import close
from tests.examples import snippet
from tests.kit import fill

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},  # of layers with a sum of outputs too, added once
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}

TARGETS = {
    "llama": ".*(_proj|embed_tokens|lm_head)",
    "mixtral": ".*([qkvo]_proj|embed_tokens|lm_head)",
}


def written(kind: str, place: Path) -> None:
    """Write a small model, in one process."""
    from transformers import AutoConfig, AutoModelForCausalLM  # which takes long to import, in the processes only

    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **heads, **CONFIGS[kind])).save_pretrained(
            place
        )
    dist.barrier()


def pair_of(place: Path) -> tuple[Any, Any]:
    """Return a model in float64, where sums in another order are no matter, and the same split by its plan."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    options = {"dtype": torch.float64, "experts_implementation": "eager"}  # of those that compute in float64
    one = AutoModelForCausalLM.from_pretrained(place, **options)
    split = DistributedConfig(tp_plan="auto", tp_size=dist.get_world_size())
    return one.eval(), AutoModelForCausalLM.from_pretrained(place, distributed_config=split, **options).eval()


def planned(kind: str, place: Path) -> None:
    """Train, generate, save, load, merge and eject a model that its own plan splits."""
    written(kind, place / "base")
    one, model = pair_of(place / "base")
    assert isinstance(model.model.layers[0].self_attn.q_proj.weight, DTensor)
    forwards = [each.__dict__.get("forward") for each in model.modules()]
    for each in (one, model):
        randlora.inject(each, r=4, targets=TARGETS[kind])
        fill(each)
    ids = torch.arange(12).view(2, 6)
    optimizers = [torch.optim.SGD(randlora.trainable_parameters(each), lr=1e-4) for each in (one, model)]
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
        expected = one(input_ids=ids).logits
        close(model(input_ids=ids).logits, expected)
        tokens = [each.generate(input_ids=ids[:, :3], max_new_tokens=3, do_sample=False) for each in (one, model)]
        assert torch.equal(*tokens)
        randlora.save(model, place / "adapter")
        dist.barrier()
        randlora.eject(model)
        assert [each.__dict__.get("forward") for each in model.modules()] == forwards
        randlora.load(model, place / "adapter")
        close(model(input_ids=ids).logits, expected)
        with randlora.merged(model):
            close(model(input_ids=ids).logits, expected)
        close(model(input_ids=ids).logits, expected)


@pytest.mark.medium
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_that_its_plan_splits(pair: Processes, kind: str, tmp_path: Path) -> None:
    pair.run(planned, kind, tmp_path)


def as_on_the_page(place: Path) -> None:
    """Load, split and adapt a model as docs/distributed.md does."""
    written("llama", place)
    code = snippet("distributed.md", "tp_plan").replace("meta-llama/Llama-3.1-8B", str(place))
    exec(code, found := {"randlora": randlora})
    model: Any = found["model"]
    assert isinstance(model.model.layers[0].self_attn.q_proj.weight, DTensor)
    assert len([*randlora.trainable_parameters(model)]) == 14
    model(input_ids=(ids := torch.arange(12).view(2, 6)), labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in randlora.trainable_parameters(model))


@pytest.mark.medium
def test_the_snippet_of_a_plan_runs(pair: Processes, tmp_path: Path) -> None:
    pair.run(as_on_the_page, tmp_path)


def refuse_experts(place: Path) -> None:
    """Name what the plan splits so that no adapter can be beside it."""
    written("mixtral", place)
    _, model = pair_of(place)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(RandLoRAError, match="gate_up_proj is split so that each process has several pieces"):
        randlora.inject(model, r=4, targets=["gate_up_proj"])
    with pytest.raises(RandLoRAError, match="down_proj is split by MoeExpertsParallel of transformers"):
        randlora.inject(model, r=4, targets=["down_proj"])
    assert before == {name: type(module) for name, module in model.named_modules()}


@pytest.mark.medium
def test_experts_that_a_plan_splits_are_refused(pair: Processes, tmp_path: Path) -> None:
    pair.run(refuse_experts, tmp_path)
