"""Trainers of transformers and TRL with each engine: resumed runs, checkpoints of the adapter alone, and references."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import randlora
from tests.distributed.engines import STAGES
from tests.distributed.launched import launched
from tests.distributed.processes import For
from tests.further import further
from tests.kit import Bits, all_bits


def options(engine: str) -> dict[str, Any]:
    """Return the arguments of a trainer with an engine."""
    name, _, kind = engine.partition(" ")
    given: dict[str, Any] = {"per_device_train_batch_size": 1}
    if name == "ddp":
        return given | {"ddp_backend": "gloo"}
    if name == "fsdp":
        config: dict[str, Any] = {"version": 2, "fsdp_version": 2, "state_dict_type": kind}
        config |= {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        config |= {"cpu_ram_efficient_loading": False, "sync_module_states": False}
        return given | {"fsdp": "full_shard auto_wrap", "fsdp_config": config, "use_cpu": False}
    stage, _, gathered = kind.partition(" ")
    engine_config: dict[str, Any] = dict.fromkeys(["train_micro_batch_size_per_gpu", "gradient_clipping"], "auto")
    engine_config["zero_optimization"] = copy.deepcopy(STAGES[stage])
    if gathered:
        engine_config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    engine_config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return given | {"use_cpu": False, "deepspeed": engine_config}


def trained(model: nn.Module) -> dict[str, Bits]:
    return all_bits(randlora.adapter_state(model).tensors)


def run(directory: Path, engine: str, is_stock: bool) -> tuple[dict[str, Bits], dict[str, Bits], int, str]:
    """Train, resume, and return the values after both, how often this process saved, and how the model was wrapped."""
    with launched(engine):
        from transformers import Trainer, TrainingArguments

        from randlora.integrations.transformers import AdapterTrainer
        from tests.trainers import adapted_model, arguments, plain_model, rows

        def trainer() -> Any:
            given = arguments(TrainingArguments, directory, **options(engine))
            model = adapted_model(train_also=["norm"], dropout=0.1)
            return (Trainer if is_stock else AdapterTrainer)(model, given, train_dataset=rows())

        through = trainer()
        with mock.patch.object(randlora, "save", side_effect=randlora.save) as saved:
            through.train()
        dist.barrier()
        rest = trainer()
        rest.train(resume_from_checkpoint=str(directory / "checkpoint-2"))
        losses, resumed = ([each.get("loss") for each in own.state.log_history] for own in (through, rest))
        assert losses == resumed
        if not (is_stock and engine == "zero 3"):  # which gathers nothing into its checkpoints
            loaded = plain_model()
            randlora.load(loaded, directory / "checkpoint-4", trainable=True)
            assert trained(loaded) == trained(through.model)
        kinds = {type(through.model_wrapped).__name__, type(through.model).__name__}
        return trained(through.model), trained(rest.model), saved.call_count, " ".join(sorted(kinds))


@pytest.mark.parametrize(
    ("engine", "is_stock"),
    [
        ("ddp", False),
        ("fsdp FULL_STATE_DICT", False),
        further("fsdp SHARDED_STATE_DICT", False),
        further("fsdp FULL_STATE_DICT", True),
        ("zero 2", False),
        ("zero 3", False),
        further("zero 3", True),
        further("zero 3 gathered", True),
    ],
)
def test_a_run_is_resumed_from_checkpoints_without_the_base(
    processes_of: For, tmp_path: Path, engine: str, is_stock: bool
) -> None:
    (first, resumed, saves, kinds), (other, also_resumed, more, _) = processes_of(engine).run(
        run, tmp_path, engine, is_stock
    )
    assert first == resumed == other == also_resumed
    if is_stock:
        return
    name = engine.split(maxsplit=1)[0]
    wrapped = {"ddp": "DistributedDataParallel", "fsdp": "FSDPLlamaForCausalLM", "zero": "DeepSpeedEngine"}
    assert wrapped[name] in kinds
    assert name != "ddp" or (saves, more) == (2, 0)
    found = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    beside = {"ddp": {"optimizer.pt", "rng_state_1.pth"}, "fsdp": {"scheduler.pt"}, "zero": {"global_step2"}}
    assert {"adapter_model.safetensors", "rng_state_0.pth"} | beside[name] <= found
    assert not {each for each in found if "model_fsdp" in each or each.startswith("model")}
    if name == "zero":
        held = [torch.load(path, weights_only=False) for path in tmp_path.glob("checkpoint-2/*/*model_states.pt")]
        names = {fqn for each in held for fqn in each["module"]}
        assert names
        assert all("randlora" in fqn or "norm" in fqn for fqn in names)
        assert not any(each.get("frozen_param_fragments") for each in held)


def rewards(completions: list[str], **_: Any) -> list[float]:
    return [sum(map(ord, text)) % 7 for text in completions]


def make(kind: str, directory: Path, train_also: list[str], given: dict[str, Any]) -> Any:
    """Make a trainer of TRL, which must not load a model."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

    from randlora.integrations.transformers import AdapterCheckpoints
    from tests.trainers import adapted_model, arguments, preferences, tokenizer

    model, own = adapted_model(train_also=train_also or None), {"processing_class": tokenizer()}
    given = {"max_steps": 2, "save_strategy": "no", "gradient_checkpointing": False, "bf16": False, **given}
    with mock.patch(
        f"trl.trainer.{kind.lower()}_trainer.create_model_from_path", side_effect=AssertionError("a second model")
    ):
        if kind == "DPO":
            dpo = type("DPO", (AdapterCheckpoints, DPOTrainer), {})
            return dpo(model, args=arguments(DPOConfig, directory, **given), train_dataset=preferences(), **own)
        prompts = Dataset.from_dict({"prompt": [f"{i} squared is" for i in range(16)]})
        sizes = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
        grpo = type("GRPO", (AdapterCheckpoints, GRPOTrainer), {})
        args = arguments(GRPOConfig, directory, **sizes, **given)
        return grpo(model, rewards, args=args, train_dataset=prompts, **own)


def refer(kind: str, engine: str, train_also: list[str], directory: Path) -> tuple[float, float]:
    """Train, and return how far the reference and the model are from the base's output."""
    with launched(engine):
        from tests.trainers import plain_model

        trainer = make(kind, directory, train_also, options(engine))
        trainer.train()
        ids = torch.arange(8)[None]
        with torch.no_grad():
            base = plain_model()(ids).logits
            reference, model = trainer.ref_model(ids).logits, trainer.model(ids).logits
        assert trainer.args.beta == (trainer.beta if kind == "DPO" else 0.1)
        assert [info.is_active for info in randlora.adapters(trainer.model)] == [True]
        return float((reference - base).abs().max()), float((model - base).abs().max())


@pytest.mark.parametrize(
    ("kind", "engine", "train_also"),
    [
        ("DPO", "fsdp SHARDED_STATE_DICT", ["norm"]),
        further("DPO", "fsdp SHARDED_STATE_DICT", []),
        further("GRPO", "fsdp SHARDED_STATE_DICT", []),
        ("DPO", "zero 3", []),
        further("DPO", "zero 2", ["norm"]),
        further("GRPO", "zero 2", ["norm"]),
        further("GRPO", "zero 3", []),
    ],
)
def test_the_reference_is_the_same_model_without_its_adapter(
    processes_of: For, tmp_path: Path, kind: str, engine: str, train_also: list[str]
) -> None:
    for reference, model in processes_of(engine).run(refer, kind, engine, train_also, tmp_path):
        assert reference < 1e-6 < model
