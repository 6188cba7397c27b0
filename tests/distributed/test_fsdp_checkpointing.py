"""Activation checkpointing changes no training and no name under `fully_shard`, whenever it is switched on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import randlora
from tests.checkpoint_files import CONFIG_FILE, TENSORS_FILE
from tests.distributed.processes import Processes
from tests.distributed.test_fsdp_training import filled, values
from tests.distributed.trained import distance

WRAPPER = "_checkpoint_wrapped_module."
WAYS = ["reentrant", "non-reentrant", "wrapped-blocks", "wrapped-targets", "later"]


def llama() -> LlamaForCausalLM:
    """Return a model of two blocks with the same values in each call."""
    torch.manual_seed(0)
    sides = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    model: LlamaForCausalLM = LlamaForCausalLM(LlamaConfig(vocab_size=16, max_position_embeddings=16, **sides))
    return model


def checkpoint(model: LlamaForCausalLM, way: str) -> None:
    if way.endswith("reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": way == "reentrant"})
    else:
        kinds = type(model.model.layers[0]) if way == "wrapped-blocks" else nn.Linear | type(model.model.norm)
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, kinds))
    if way == "reentrant":
        model.enable_input_require_grads()


def shard(model: LlamaForCausalLM) -> None:
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)


def adapt(model: LlamaForCausalLM) -> None:
    randlora.inject(model, r=2, targets=["q_proj", "v_proj", "down_proj"], train_also=["norm"])
    filled(model, "default")


def train(model: LlamaForCausalLM, tokens: Tensor) -> None:
    optimizer = torch.optim.SGD(randlora.trainable_parameters(model), lr=0.1)
    for _ in range(3):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def train_and_save(way: str, directory: Path) -> None:
    one, tokens = llama(), torch.arange(24).view(4, 6) ** 2 % 13
    adapt(one)
    before = {name: value.detach().clone() for name, value in one.named_parameters()}
    train(one.train(), tokens)
    expected = dict(one.named_parameters())
    assert distance(expected, before) > 1e-3
    for first, second in ((adapt, shard), (shard, adapt)):
        model = llama()
        if way != "later":
            checkpoint(model, way)
        first(model)
        second(model)
        if way == "later":
            checkpoint(model, way)
        train(model.train(), tokens.view(2, 2, 6)[dist.get_rank()])
        found = {name.replace(WRAPPER, ""): value for name, value in values(model).items()}
        assert distance(found, expected) <= 1e-6
        place = directory / first.__name__
        randlora.save(model, place)
        assert not any("_checkpoint" in name for name in load_file(place / TENSORS_FILE))
        assert "_checkpoint" not in (place / CONFIG_FILE).read_text()
        loaded = llama()
        randlora.load(loaded, place)
        assert distance(found, dict(loaded.named_parameters())) == 0


@pytest.mark.parametrize("way", WAYS)
def test_checkpointing_changes_no_training_and_no_name(pair: Processes, tmp_path: Path, way: str) -> None:
    pair.run(train_and_save, way, tmp_path)
