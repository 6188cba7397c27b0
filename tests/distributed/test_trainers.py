"""Trainers of transformers, TRL, accelerate and Lightning, and the examples: runs resumed with the same bits."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import randlora
from tests.distributed.engines import STAGES, deepspeed
from tests.distributed.processes import FOUR, in_two, on_all
from tests.distributed.trained import optimizer_of
from tests.further import further
from tests.kit import all_bits
from tests.model_directories import contents
from tests.pages import ROOT, imported


@contextmanager
def launched(engine: str) -> Iterator[None]:
    """Have accelerate find what a launcher sets, and forget after that what it found.

    Without a GPU accelerate counts one process for DeepSpeed, and takes FSDP's plugin for DistributedDataParallel. Here
    it is told that it counts these processes, and for FSDP that they have devices and that these are the CPU.
    """
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "HF_HUB_OFFLINE": "1"}
    found |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "tests"}
    if engine.startswith("zero"):
        deepspeed()
    elif engine == "ddp":
        found["ACCELERATE_USE_CPU"] = "true"
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, found))
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        from accelerate.state import AcceleratorState, PartialState  # type: ignore[import-untyped]
        from accelerate.utils import DistributedType  # type: ignore[import-untyped]

        def on_cpu(state: Any) -> None:
            state.device = torch.device("cpu")

        kind = DistributedType.MULTI_CPU if engine.startswith("zero") else DistributedType.MULTI_GPU
        if engine != "ddp":
            stack.enter_context(mock.patch.object(PartialState, "_prepare_backend", return_value=("gloo", kind)))
        if engine.startswith("fsdp"):
            stack.enter_context(mock.patch.object(PartialState, "set_device", on_cpu))
        stack.callback(AcceleratorState._reset_state, reset_partial_state=True)
        yield


def options(engine: str) -> dict[str, Any]:
    name, _, kind = engine.partition(" ")
    given: dict[str, Any] = {"per_device_train_batch_size": 1}
    if name == "ddp":
        return given | {"ddp_backend": "gloo"}
    if name == "fsdp":
        config: dict[str, Any] = {"version": 2, "fsdp_version": 2, "state_dict_type": kind}
        config |= {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        config |= {"cpu_ram_efficient_loading": False, "sync_module_states": False}
        return given | {"fsdp": "full_shard auto_wrap", "fsdp_config": config, "use_cpu": False}
    engine_config: dict[str, Any] = dict.fromkeys(["train_micro_batch_size_per_gpu", "gradient_clipping"], "auto")
    engine_config |= {"zero_optimization": copy.deepcopy(STAGES[kind])}
    engine_config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return given | {"use_cpu": False, "deepspeed": engine_config}


def resumed_values(through: Any, rest: Any, checkpoint: Path) -> Any:
    """Return what a whole run has trained, which one that goes on from its checkpoint has too, in all processes."""
    rest.train(resume_from_checkpoint=str(checkpoint))
    losses, resumed = ([each.get("loss") for each in own.state.log_history] for own in (through, rest))
    assert losses == resumed
    found = [all_bits(randlora.adapter_state(each.model).tensors) for each in (through, rest)]
    assert all(each == found[0] for of_rank in on_all(found) for each in of_rank)
    return found[0]


@in_two
@pytest.mark.parametrize(
    "engine", ["ddp", "fsdp FULL_STATE_DICT", further("fsdp SHARDED_STATE_DICT"), further("zero 2"), "zero 3"]
)
def test_a_run_is_resumed_from_checkpoints_without_the_base(tmp_path: Path, engine: str) -> None:
    name = engine.split(maxsplit=1)[0]
    with launched(engine):
        from transformers import TrainingArguments

        from randlora.integrations.transformers import AdapterTrainer
        from tests.trainers import adapted_model, arguments, plain_model, rows

        def trainer() -> Any:
            given = arguments(TrainingArguments, tmp_path, **options(engine))
            return AdapterTrainer(adapted_model(train_also=["norm"], dropout=0.1), given, train_dataset=rows())

        through = trainer()
        with mock.patch.object(randlora, "save", side_effect=randlora.save) as saved:
            through.train()
        dist.barrier()
        found = resumed_values(through, trainer(), tmp_path / "checkpoint-2")
        loaded = plain_model()
        randlora.load(loaded, tmp_path / "checkpoint-4", trainable=True)
        assert all_bits(randlora.adapter_state(loaded).tensors) == found
    wrapped = {"ddp": "DistributedDataParallel", "fsdp": "FSDPLlamaForCausalLM", "zero": "DeepSpeedEngine"}
    assert wrapped[name] in {type(through.model_wrapped).__name__, type(through.model).__name__}
    assert name != "ddp" or on_all(saved.call_count) == [2, 0]
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    beside = {"ddp": {"optimizer.pt", "rng_state_1.pth"}, "fsdp": {"scheduler.pt"}, "zero": {"global_step2"}}
    assert {"adapter_model.safetensors", "rng_state_0.pth"} | beside[name] <= names
    assert not {each for each in names if "model_fsdp" in each or each.startswith("model")}
    if name == "zero":
        held = [torch.load(path, weights_only=False) for path in tmp_path.glob("checkpoint-2/*/*model_states.pt")]
        assert (keys := {fqn for each in held for fqn in each["module"]})
        assert all("randlora" in fqn or "norm" in fqn for fqn in keys)
        assert not any(each.get("frozen_param_fragments") for each in held)


@in_two
@pytest.mark.parametrize(
    ("split", "averages"), [("fsdp_size", False), further("fsdp_size", True), further("tp_size", False)]
)
def test_a_model_that_is_split_as_it_is_loaded_trains_one_adapter_of_all_batches(
    tmp_path: Path, split: str, averages: bool
) -> None:
    """FSDP2 has the model before the adapter is added; newer trainers average what it does not know, once more."""
    is_sharded = split == "fsdp_size"
    with launched("ddp" if is_sharded else "fsdp"), ExitStack() as stack:
        from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
        from transformers.distributed import DistributedConfig

        from randlora.integrations.transformers import AdapterTrainer
        from tests.trainers import adapted_model, arguments, plain_model, rows

        if not averages:
            stack.enter_context(mock.patch.object(Trainer, "_sync_replicated_trainable_parameters"))
        if dist.get_rank() == 0:
            plain_model().save_pretrained(tmp_path / "base")
        dist.barrier()
        parallel = DistributedConfig(**{split: 2})
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", distributed_config=parallel)
        randlora.inject(model, r=8)
        given: dict[str, Any] = {
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 1 if is_sharded else 2,
        }
        given |= {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
        given |= {"ddp_backend": "gloo", "use_cpu": is_sharded, "save_only_model": True}
        args = arguments(TrainingArguments, tmp_path / "run", **given)
        AdapterTrainer(model, args, train_dataset=rows()[:4]).train()
        one = adapted_model()
        optimizer = torch.optim.SGD(randlora.trainable_parameters(one), lr=1.0)
        ids = torch.stack([row["input_ids"] for row in rows()[:4]])
        for _ in range(4):
            optimizer.zero_grad()
            one(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        loaded = plain_model()
        randlora.load(loaded, tmp_path / "run/checkpoint-4", trainable=True)
        found, expected, start = (randlora.adapter_state(each).tensors for each in (model, one, adapted_model()))
        assert on_all(all_bits(found)) == [all_bits(randlora.adapter_state(loaded).tensors)] * 2
        assert max((found[name] - value).abs().max() for name, value in expected.items()) < 1e-5
        assert min((start[name] - value).abs().max() for name, value in expected.items()) > 1e-3


NOT_WRITTEN = (
    r"wrote no adapter to a checkpoint, .*set stage3_gather_16bit_weights_on_model_save to true in zero_optimization, "
    r"use AdapterTrainer .*, or call randlora\.save\(model, directory\) in all processes"
)


WITHOUT = "zero 3", "zero 3-persistent", "fsdp SHARDED_STATE_DICT"  # of the last, transformers asks for no files
WITH = "zero 3-gathered", "zero 2", "fsdp FULL_STATE_DICT"


@in_two
@pytest.mark.parametrize("engine", [WITHOUT[0], *map(further, WITHOUT[1:]), *WITH[:2], *map(further, WITH[2:])])
def test_a_stock_trainer_resumes_and_says_if_it_writes_no_adapter(tmp_path: Path, engine: str) -> None:
    has_adapter = engine in WITH
    with launched(engine):
        from transformers import Trainer, TrainingArguments

        from tests.trainers import adapted_model, arguments, plain_model, rows

        def trainer() -> Any:
            given = arguments(TrainingArguments, tmp_path / "run", **options(engine))
            return Trainer(adapted_model(train_also=["norm"], dropout=0.1), given, train_dataset=rows())

        through = trainer()
        with warnings.catch_warnings(record=True, action="always") as caught:
            through.train()
            through.save_model(str(tmp_path / "end"))
        dist.barrier()
        found = resumed_values(through, trainer(), tmp_path / "run/checkpoint-2")
        said = [str(each.message) for each in caught if "wrote no adapter" in str(each.message)]
        is_silent = has_adapter or dist.get_rank() or engine.startswith("fsdp")
        assert len(said) == (0 if is_silent else 3)
        if said:
            assert said[0] == said[1]  # so that Python shows it once
            assert re.search(NOT_WRITTEN, said[0])
            assert f"wrote no adapter to '{tmp_path / 'end'}'" in said[2]
        for directory in (tmp_path / "run/checkpoint-2", tmp_path / "end"):
            assert (directory / "adapter_model.safetensors").exists() == has_adapter
        if has_adapter:
            loaded = plain_model()
            randlora.load(loaded, tmp_path / "end", trainable=True)
            assert all_bits(randlora.adapter_state(loaded).tensors) == found


def make(kind: str, directory: Path, train_also: list[str], given: dict[str, Any]) -> Any:
    import trl

    from randlora.integrations.transformers import AdapterCheckpoints
    from tests.trainers import adapted_model, arguments, preferences, tokenizer

    given = {"max_steps": 2, "save_strategy": "no", "gradient_checkpointing": False, "bf16": False, **given}
    rewards: list[Any] = []
    if kind == "GRPO":
        given |= {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
        rewards = [lambda completions, **_: [sum(map(ord, text)) % 7 for text in completions]]
    args = arguments(getattr(trl, f"{kind}Config"), directory, **given)
    trainer: Any = type(kind, (AdapterCheckpoints, getattr(trl, f"{kind}Trainer")), {})
    model, own = adapted_model(train_also=train_also or None), {"processing_class": tokenizer()}
    module = f"trl.trainer.{kind.lower()}_trainer"
    with mock.patch(f"{module}.create_model_from_path", side_effect=AssertionError("a second model")):
        return trainer(model, *rewards, args=args, train_dataset=preferences(), **own)


SHARDED = "fsdp SHARDED_STATE_DICT"
FURTHER: list[tuple[str, str, list[str]]] = [("GRPO", SHARDED, []), ("GRPO", "zero 3", []), ("DPO", "zero 2", ["norm"])]
REFERENCES = [("DPO", SHARDED, ["norm"]), ("DPO", "zero 3", []), *(further(*each) for each in FURTHER)]


@in_two
@pytest.mark.parametrize(("kind", "engine", "train_also"), REFERENCES)
def test_the_reference_is_the_same_model_without_its_adapter(
    tmp_path: Path, kind: str, engine: str, train_also: list[str]
) -> None:
    with launched(engine):
        from tests.trainers import plain_model

        trainer = make(kind, tmp_path, train_also, options(engine))
        trainer.train()
        ids = torch.arange(8)[None]
        with torch.no_grad():
            base = plain_model()(ids).logits
            reference, model = trainer.ref_model(ids).logits, trainer.model(ids).logits
        assert trainer.args.beta == (trainer.beta if kind == "DPO" else 0.1)
        assert [info.is_active for info in randlora.adapters(trainer.model)] == [True]
        assert (reference - base).abs().max() < 1e-6 < (model - base).abs().max()


@in_two
@pytest.mark.parametrize("engine", ["zero 3-gathered", "fsdp FULL_STATE_DICT"])
def test_all_processes_save_what_accelerate_gathers_in_the_first(tmp_path: Path, engine: str) -> None:
    """The others have nothing, or no values, to give."""
    with launched(engine):
        from accelerate import Accelerator  # type: ignore[import-untyped]
        from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin

        from tests.trainers import adapted_model

        if engine.startswith("zero"):
            config = options(engine)["deepspeed"] | {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0}
            accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
        else:
            plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
            accelerator = Accelerator(fsdp_plugin=plugin)
        model = adapted_model(train_also=["norm"])
        wrapped, _ = accelerator.prepare(model, optimizer_of(model))
        accelerator.unwrap_model(wrapped).save_pretrained(
            tmp_path / "adapter",
            is_main_process=accelerator.is_main_process,
            save_function=accelerator.save,
            state_dict=accelerator.get_state_dict(wrapped),
        )
        randlora.save(accelerator.unwrap_model(wrapped), tmp_path / "own")
        assert contents(tmp_path / "adapter") == contents(tmp_path / "own")


def fitted(is_sharded: bool, out: Path, epochs: int, resume: Path | None = None) -> Any:
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
    from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy

    from randlora.integrations.lightning import AdapterCallback
    from tests.lightning_modules import Module, fit

    class Sharded(Module):
        def configure_model(self) -> None:
            if not getattr(self, "is_sharded", False):
                self.is_sharded = True
                mesh: Any = self.device_mesh
                for module in (self.model[0], self.model, self.head):  # not `self`, whose forward is not called
                    fully_shard(module, mesh=mesh["data_parallel"])

    strategy: Any = DDPStrategy(process_group_backend="gloo")
    if is_sharded:
        strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
    module = (Sharded if is_sharded else Module)(norm=not is_sharded)
    given: dict[str, Any] = {"callback": AdapterCallback(), "strategy": strategy}
    given |= {"devices": 2, "plugins": [TorchElasticEnvironment()], "resume": resume, "batch": 4}
    fit(module, out, epochs=epochs, **given)
    return module


@in_two
@pytest.mark.parametrize("is_sharded", [False, True], ids=["ddp", "fsdp2"])
def test_a_resumed_run_of_lightning_has_the_bits_of_a_whole_one(tmp_path: Path, *, is_sharded: bool) -> None:
    with launched("ddp"):
        whole = fitted(is_sharded, tmp_path / "whole", 2)
        fitted(is_sharded, tmp_path / "part", 1)
        rest = fitted(is_sharded, tmp_path / "part", 2, tmp_path / "part/epoch=0.ckpt")
    assert whole.losses[4:] == rest.losses
    assert len(set(rest.losses)) == 4
    first, second = on_all(rest.losses)
    assert first != second, "each process has other data"
    names = torch.load(tmp_path / "part/epoch=0.ckpt", weights_only=True)["state_dict"].keys()
    assert any("randlora_lambda" in name for name in names)
    assert "model.0.weight" not in names


def run(name: str, *args: Any) -> str:
    printed = StringIO()
    in_a_group = mock.patch.multiple(dist, init_process_group=mock.DEFAULT, destroy_process_group=mock.DEFAULT)
    with in_a_group, redirect_stdout(printed):
        imported(name).main(*args)
    return printed.getvalue()


def require_learned(name: str, printed: str, directory: Path, data: Any) -> None:
    assert printed.count("saved 'default'") == 1
    example = imported(name)
    model = example.pretrained()
    x, y = example.batch(*data)
    before = (model(x) - y).square().mean()
    randlora.load(model, directory)
    with torch.no_grad():
        assert (model(x) - y).square().mean() < before / 2


@in_two
@pytest.mark.parametrize(
    ("name", "engine"), [("data_parallel", "DDP"), ("tensor_parallel", ""), ("data_parallel", "ZeRO")]
)
def test_an_example_trains(tmp_path: Path, name: str, engine: str) -> None:
    stage = {"DDP": [0], "ZeRO": [3]}.get(engine, [])
    if engine == "ZeRO":
        deepspeed()
    printed = "".join(on_all(run(name, 40, tmp_path, *stage)))
    assert "step 40: loss" in printed
    require_learned(name, printed, tmp_path, [torch.Generator().manual_seed(9)])


@pytest.mark.slow
def test_an_example_is_launched_and_resumed_by_another_number_of_processes(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--steps", "20", "--checkpoints", str(tmp_path / "run"), "--out", str(tmp_path / "adapter")]
    command = [*torchrun, "docs/examples/fully_sharded.py", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    # gloo's threads outlive destroy_process_group, because what torch caches of shards holds the group, and may abort a
    # process that has come to its end (seen once)
    aborted_at_the_end = (
        "terminate called without an active exception" in done.stderr and "saved 'default'" in done.stdout
    )
    assert done.returncode == 0 or aborted_at_the_end, done.stderr[-4000:]
    assert "trains from step 0 on 2 processes" in done.stdout
    printed = "".join(FOUR.run(run, "fully_sharded", 120, tmp_path / "run", tmp_path / "adapter"))
    assert "trains from step 20 on 4 processes" in printed
    assert "step 120: loss" in printed
    require_learned("fully_sharded", printed, tmp_path / "adapter", [9, 9])
