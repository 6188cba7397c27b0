"""verl's engine with an adapter: what it trains, sends to a rollout, saves, and refuses because it would be silent."""

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

os.environ |= {"VERL_ENGINE_VENDOR": "randlora", "VERL_ENGINE_DEVICE": "cpu", "VERL_PLATFORM": "cpu"}
os.environ |= {"VERL_USE_EXTERNAL_MODULES": "tests.other_trainers.verl_cpu"}  # which verl reads when it is imported
pytest.importorskip("verl", reason="verl is not installed: make test-rollouts")

import hydra
import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, QATEngineConfig
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.utils.losses import sft_loss

import randlora
from randlora.errors import MergeError, RandLoRAError
from tests.other_trainers import write_inputs

FP32 = dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), "fp32")
MODEL = {
    "lora_rank": 4,
    "target_modules": "randlora",
    "lora": {"merge": True, "randlora": {"alpha": 8, "targets": "all-linear"}},
    "use_remove_padding": False,  # needs FlashAttention
    "override_config": {"attn_implementation": "sdpa"},
}
WITHOUT_MODEL = ["optimizer", "extra"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("verl"), "text") / "base"


@pytest.fixture(autouse=True, scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path_factory.mktemp('group')}/store", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def built(base: Path, engine_class: Any = None, saves: Any = (), config: Any = (), **model: Any) -> Any:
    """Return an engine as verl's worker makes it, of the class that its registry answers with."""
    engine_config = FSDPEngineConfig(**{
        "strategy": "fsdp2",
        "mixed_precision": FP32,
        "use_torch_compile": False,
        **dict(config),
    })
    engine_class = engine_class or partial(EngineRegistry.new, "language_model", engine_config.strategy)
    engine = engine_class(
        model_config=HFModelConfig(path=str(base), **MODEL | model),
        engine_config=engine_config,
        optimizer_config=FSDPOptimizerConfig(lr=1e-2, total_training_steps=8, lr_scheduler_type="cosine"),
        checkpoint_config=CheckpointConfig(**dict(saves)),
    )
    engine.initialize()
    return engine


def batch(step: int) -> TensorDict:
    rng = torch.Generator().manual_seed(step)
    rows = [torch.randint(4, 40, (length,), generator=rng) for length in (5, 9, 7, 6)]
    places = [torch.arange(len(row)) for row in rows]
    tensors = {"input_ids": rows, "position_ids": places, "loss_mask": [torch.ones_like(row) for row in rows]}
    nested = {name: torch.nested.as_nested_tensor(value, layout=torch.jagged) for name, value in tensors.items()}
    options = {"temperature": 1.0, "use_remove_padding": False, "use_dynamic_bsz": False, "micro_batch_size_per_gpu": 2}
    return tensordict_utils.get_tensordict(nested, non_tensor_dict=options)


def trained(engine: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        with engine.train_mode():
            losses.append(sum(engine.train_batch(batch(step), partial(sft_loss, config=None))["loss"]))
            engine.lr_scheduler_step()
    return losses


def log_probabilities(engine: Any) -> Tensor:
    with engine.eval_mode():
        found: Tensor = engine.infer_batch(batch(9))["model_output"]["log_probs"].values()
    return found


def sent(engine: Any) -> dict[str, Tensor]:
    tensors, peft_config = engine.get_per_tensor_param(layered_summon=False, base_sync_done=True)
    assert peft_config is None
    return {name: tensor.clone() for name, tensor in tensors}


def merged_weights(base: Path, dtype: torch.dtype, adapter: Path) -> dict[str, Tensor]:
    """Return the weights of a model that never saw verl, after `randlora.merge`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    randlora.load(model, adapter)
    randlora.merge(model)
    return dict(model.state_dict())


def saved(engine: Any, directory: Path) -> Path:
    engine.save_checkpoint(str(directory), global_step=1)
    return directory / "adapter"


@pytest.mark.parametrize("config", [{}, {"model_dtype": "bf16", "mixed_precision": None}], ids=["fp32", "bf16"])
def test_in_each_round_the_rollout_gets_the_weights_of_now_with_the_bits_of_merge(
    base: Path, config: Any, tmp_path: Path
) -> None:
    engine = built(base, config=config)
    merged = partial(merged_weights, base, torch.bfloat16 if config else torch.float32)
    rounds = [sent(engine)]
    assert all(map(torch.equal, rounds[0].values(), merged(saved(engine, tmp_path / "0")).values()))
    waiting, _ = engine.get_per_tensor_param()  # of which nothing is computed yet
    for number in range(1, 4):
        trained(engine, range(number, number + 1))
        log_probabilities(engine)  # after which FSDP2 may have whole parameters
        now, plain = sent(engine), merged(saved(engine, tmp_path / str(number)))
        assert now.keys() == plain.keys()
        assert [name for name in now if not torch.equal(now[name], plain[name])] == []
        changed = {name for name in now if not torch.equal(now[name], rounds[-1][name])}
        assert changed == {name for name in now if "_proj" in name}
        rounds.append(now)
    assert all(torch.equal(tensor, rounds[-1][name]) for name, tensor in waiting)


@pytest.mark.parametrize("kind", ["tied", "experts"])
def test_a_rollout_gets_the_names_shapes_and_dtypes_that_verl_sends_for_a_plain_model(
    base: Path, kind: str, tmp_path: Path
) -> None:
    sizes = {
        "vocab_size": 44,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "tie_word_embeddings": True,
    }
    if kind == "tied":
        model: Any = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=64))
    else:
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**sizes | {"tie_word_embeddings": False}, **experts, num_key_value_heads=2)
        )
    model.save_pretrained(tmp_path)
    options = {"load_tokenizer": False, "lora": {"merge": True, "randlora": {"targets": "all"}}}
    plain = sent(built(tmp_path, FSDPEngineWithLMHead, lora_rank=0, load_tokenizer=False))
    engine = built(tmp_path, **options)
    trained(engine, range(2))
    now = sent(engine)
    assert [(name, it.shape, it.dtype) for name, it in now.items()] == [
        (name, it.shape, it.dtype) for name, it in plain.items()
    ]
    changed = {name for name in now if not torch.equal(now[name], plain[name])}
    assert changed >= {name for name in now if "_proj" in name}


def test_the_reference_policy_is_the_base_model(base: Path) -> None:
    engine = built(base)
    first = log_probabilities(engine)
    trained(engine, range(2))
    with engine.disable_adapter():
        assert torch.equal(log_probabilities(engine), first)
    assert not torch.allclose(log_probabilities(engine), first, atol=1e-3)


@pytest.mark.parametrize("contents", [["model", *WITHOUT_MODEL], WITHOUT_MODEL], ids=" ".join)
def test_a_run_that_is_resumed_goes_on_with_the_same_losses(base: Path, contents: list[str], tmp_path: Path) -> None:
    saves = {"save_contents": contents, "load_contents": contents}
    engine = built(base, saves=saves)
    trained(engine, range(3))
    saved(engine, tmp_path)
    assert any(tmp_path.glob("model_world_size_*")) == ("model" in contents)
    losses, resumed = trained(engine, range(3, 6)), built(base, saves=saves)
    resumed.load_checkpoint(str(tmp_path))
    assert trained(resumed, range(3, 6)) == losses
    assert all(map(torch.equal, sent(resumed).values(), sent(engine).values()))


def test_shards_which_are_of_the_first_policy_are_not_sent(base: Path) -> None:
    engine = built(base)
    for call in (
        engine.get_per_tensor_param_shard,
        engine.prime_delta_snapshots,
        engine.get_per_tensor_param_delta_shard,
    ):
        with pytest.raises(MergeError, match="without the adapter; choose a backend"):
            call()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora": {"merge": False}}, "model.lora.merge is False"),
        ({"lora_rank": 0}, "verl trains the whole model"),
        ({"target_modules": "all-linear"}, "set it to randlora, with which verl's own engine raises an error"),
        ({"lora_alpha": 32, "exclude_modules": "q"}, "lora_alpha, exclude_modules would be ignored"),
        ({"lora_adapter_path": "saved"}, "merge an adapter to start from into the model"),
        ({"config": {"strategy": "fsdp"}}, "actor.strategy is fsdp, FSDP's first version: set it to fsdp2"),
        ({"config": {"qat": QATEngineConfig(enable=True)}}, "qat would replace"),
        ({"saves": {"save_contents": ["model", "hf_model"]}}, "would be the model without the adapter"),
        ({"saves": {"save_lora_only": True}}, "the adapter is always saved"),
        ({"lora": {"merge": True, "randlora": {"targets": "*.query"}}}, r"\*.query"),
        ({"lora": {"merge": True, "randlora": {"rank": 4}}}, "unknown option rank=: use r="),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_run_whose_adapter_would_train_nothing_or_reach_no_rollout_is_refused(
    base: Path, options: Any, said: str
) -> None:
    with pytest.raises(RandLoRAError, match=said):
        built(base, **options)


def test_the_config_on_the_page_is_one_of_verls(base: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/rollouts.md").read_text(encoding="utf-8")
    words = page[page.index("verl.trainer.main_ppo") :].split("```")[0].replace("\\", "").split()[1:]
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        config = hydra.compose("ppo_trainer", [*words, f"actor_rollout_ref.model.path={base}"])
    assert config.ray_kwargs.ray_init.runtime_env.env_vars.VERL_ENGINE_VENDOR == "randlora"
    actor = config.actor_rollout_ref.actor
    model = omega_conf_to_dataclass(config.actor_rollout_ref.model)
    options = {name: getattr(model, name) for name in ("lora_rank", "target_modules", "lora")}
    saves = {"save_contents": [*actor.checkpoint.save_contents], "load_contents": [*actor.checkpoint.load_contents]}
    engine = built(base, config={"strategy": actor.strategy}, saves=saves, **options)
    assert randlora.adapters(engine.module)[0].config.r == 32
    assert saves == {"save_contents": WITHOUT_MODEL, "load_contents": WITHOUT_MODEL}


def test_where_the_engine_is_not_loaded_verls_own_engine_refuses_the_config(base: Path) -> None:
    with pytest.raises(ValueError, match=r"Target modules .*randlora.* not found"):
        built(base, FSDPEngineWithLMHead)


@pytest.mark.parametrize(("vendor", "ends"), [("randlora", 1), ("", 0)])
def test_an_engine_that_is_named_and_cannot_be_imported_ends_the_process(vendor: str, ends: int) -> None:
    code = "import sys; sys.modules['verl.workers.engine.fsdp.transformer_impl'] = None; import verl"
    environment = os.environ | {"VERL_ENGINE_VENDOR": vendor}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, "VERL_ENGINE_VENDOR=randlora, but its engine" in done.stderr) == (ends, bool(ends)), done


def in_two_processes(rank: int, base: Path, directory: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    engine = built(base, config={"param_offload": True, "optimizer_offload": True})
    trained(engine, range(2))
    plain = merged_weights(base, torch.float32, saved(engine, directory / "saved"))
    for name, tensor in sent(engine).items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-6, atol=1e-8)
    losses, resumed = trained(engine, range(2, 4)), built(base)
    resumed.load_checkpoint(str(directory / "saved"))
    assert trained(resumed, range(2, 4)) == losses
    dist.destroy_process_group()


def test_two_processes_of_which_one_starts_without_values_train_send_save_and_resume(
    base: Path, tmp_path: Path
) -> None:
    spawn(in_two_processes, (base, tmp_path), nprocs=2)
