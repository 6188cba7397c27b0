"""Tensor parallelism by the plans of transformers' models."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import randlora
from randlora.errors import RandLoRAError
from randlora.sharded.tensor_parallel import on_mesh
from tests.distributed.processes import LAW, in_four, in_two
from tests.distributed.test_tensor_parallel import close, gradients_alike
from tests.kit import fill
from tests.model_directories import contents
from tests.pages import snippet


class Case(NamedTuple):
    """A kind of model, and how it is split and adapted.

    Attributes:
        kind: The type of the model, as in its config.
        config: Options of the config.
        split: Options of `DistributedConfig`.
        options: Those of `randlora.inject`.
        experts: How transformers computes experts.
    """

    kind: str
    config: dict[str, Any]
    split: dict[str, Any]
    options: dict[str, Any]
    experts: str = "eager"

    @property
    def within(self) -> float:
        """How far values may be from those of one process. Mixtral weights parts of experts in float32."""
        return 5e-6 if self.kind == "mixtral" and "ep_size" not in self.split else 1e-12


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6, "head_dim": 4}
PACKED = {"model.layers.*.mlp.gate_up_proj": "packed_colwise", "model.layers.*.mlp.down_proj": "rowwise"}
BLOCK = {"basis": "block", "blocks": (2, 2)}

CASES = {
    # of layers with a sum of outputs too, added once
    "llama": Case("llama", {"attention_bias": True, "mlp_bias": True}, {"tp_plan": "auto"}, {}),
    "mixtral": Case("mixtral", EXPERTS, {"tp_plan": "auto"}, {}),
    "mixtral, blocks": Case("mixtral", EXPERTS, {"tp_plan": "auto"}, BLOCK, "batched_mm"),
    "qwen3_moe": Case("qwen3_moe", QWEN, {"tp_plan": "auto"}, {"experts": "shared"}),
    "packed": Case("phi3", {"pad_token_id": 0}, {"tp_plan": PACKED}, {}),
    "packed, narrow": Case("phi3", {"pad_token_id": 0, "intermediate_size": 6}, {"tp_plan": PACKED}, BLOCK),
    "whole experts": Case("mixtral", EXPERTS, {"tp_plan": "auto", "ep_size": 2}, {}),
    "whole experts, shared": Case("qwen3_moe", QWEN, {"tp_plan": "auto", "ep_size": 2}, {"experts": "shared"}),
}

TARGETS = ".*(_proj|embed_tokens|lm_head)"


def written(case: Case, place: Path) -> None:
    """Write a small model, in one process."""
    from transformers import AutoConfig, AutoModelForCausalLM  # which takes long to import, in the processes only

    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        config = AutoConfig.for_model(case.kind, **{**sizes, **heads, **case.config})
        AutoModelForCausalLM.from_config(config).save_pretrained(place)
    dist.barrier()


def pair_of(case: Case, place: Path) -> tuple[Any, Any]:
    """Return a model in float64, where sums in another order are no matter, and the same split by a plan."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    options = {"dtype": torch.float64, "experts_implementation": case.experts}
    one = AutoModelForCausalLM.from_pretrained(place, **options)
    split = DistributedConfig(**{"tp_size": dist.get_world_size(), **case.split})
    return one.eval(), AutoModelForCausalLM.from_pretrained(place, distributed_config=split, **options).eval()


def same_files(one: Any, saved: Path, place: Path, within: float) -> None:
    """Compare the files of an adapter with those that one process writes."""
    randlora.save(one, place)
    assert [each.name for each in sorted(saved.iterdir())] == [each.name for each in sorted(place.iterdir())]
    tensors, expected = (load_file(each / "adapter_model.safetensors") for each in (saved, place))
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        close(tensor, expected[name], within)
    assert (saved / "adapter_config.json").read_bytes() == (place / "adapter_config.json").read_bytes()


def models(case: Case, place: Path, targets: str = TARGETS) -> tuple[Any, Any]:
    """Return an adapted model and the same, split by a plan."""
    written(case, place)
    one, model = pair_of(case, place)
    adapt(one, model, case, targets)
    return one, model


def adapt(one: Any, model: Any, case: Case, targets: str = TARGETS) -> None:
    for each in (one, model):
        randlora.inject(each, r=4, targets=targets, **case.options)
        for parameter in randlora.trainable_parameters(fill(each)):
            parameter.data = parameter.data.double()


def planned(case: Case, place: Path) -> None:
    """Train, generate, save, load, merge and eject a model that its own plan splits."""
    alike = partial(close, within=case.within)
    written(case, place / "base")
    one, model = pair_of(case, place / "base")
    forwards = [each.__dict__.get("forward") for each in model.modules()]
    assert any(isinstance(each, DTensor) for each in model.parameters())
    adapt(one, model, case)
    randlora.files.save_merged(model, place / "merged", max_shard_size="8KB")
    if dist.get_rank() == 0:
        randlora.files.save_merged(one, place / "merged by one", max_shard_size="8KB")
        assert contents(place / "merged") == contents(place / "merged by one")
    ids = torch.arange(12).view(2, 6)
    optimizers = [torch.optim.SGD(randlora.trainable_parameters(each), lr=1e-4) for each in (one, model)]
    for _ in range(2):
        losses = [each(input_ids=ids, labels=ids).loss for each in (one, model)]
        alike(losses[1], losses[0])
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
        gradients_alike(one, model, case.within)
        for optimizer in optimizers:
            optimizer.step()
    with torch.no_grad():
        expected = one(input_ids=ids).logits
        alike(model(input_ids=ids).logits, expected)
        tokens = [each.generate(input_ids=ids[:, :3], max_new_tokens=3, do_sample=False) for each in (one, model)]
        assert torch.equal(*tokens)
        merged = dict(randlora.merged_tensors(model))
        for name, tensor in randlora.merged_tensors(one):
            alike(merged[name], tensor)
        randlora.save(model, place / "adapter")
        dist.barrier()
        same_files(one, place / "adapter", place / f"one {dist.get_rank()}", case.within)
        randlora.eject(model)
        assert [each.__dict__.get("forward") for each in model.modules()] == forwards
        randlora.load(model, place / "adapter")
        alike(model(input_ids=ids).logits, expected)
        with randlora.merged(model):
            alike(model(input_ids=ids).logits, expected)
        alike(model(input_ids=ids).logits, expected)


@in_two
@pytest.mark.parametrize("name", CASES)
def test_a_model_that_its_plan_splits(name: str, tmp_path: Path) -> None:
    planned(CASES[name], tmp_path)


def sized(kind: str, heads: int, inner: int, experts: int, options: dict[str, Any], parallel: dict[str, Any]) -> Case:
    """Return a case with other sizes: ``inner`` of an expert, or of the block of a model without any."""
    config: dict[str, Any] = {"hidden_size": 4 * heads, "num_attention_heads": heads, "intermediate_size": inner}
    if kind == "phi3":
        return Case(kind, {**config, "pad_token_id": 0}, {"tp_plan": PACKED}, {**options, "experts": "each"})
    counts = {"num_experts": experts, "num_local_experts": experts, "num_experts_per_tok": 2}
    return Case(kind, {**config, **counts, "moe_intermediate_size": inner, "head_dim": 4}, parallel, options)


drawn_cases = st.builds(
    sized,
    st.sampled_from(["mixtral", "qwen3_moe", "phi3"]),
    st.sampled_from([2, 4, 6]),
    st.sampled_from([4, 6, 20]),
    st.sampled_from([2, 4, 6]),
    st.fixed_dictionaries({
        "basis": st.sampled_from(["dense", "sparse", "block"]),
        "experts": st.sampled_from(["each", "shared"]),
    }),
    st.sampled_from([{"tp_plan": "auto"}, {"tp_plan": "auto", "ep_size": 2}]),
)


@settings(LAW, max_examples=3)
@given(case=drawn_cases)
@in_two
def test_models_of_other_sizes(case: Case, tmp_path: Path) -> None:
    planned(case, tmp_path)


@in_two
def test_each_stack_of_experts_sums_once(tmp_path: Path) -> None:
    _, model = models(CASES["mixtral"], tmp_path, ".*experts.*")
    with mock.patch("randlora.sharded.tensor_parallel.on_mesh", side_effect=on_mesh) as counted:
        model(input_ids=torch.arange(12).view(2, 6))
    assert counted.call_count == 2  # of one layer: gate_up_proj and down_proj, whose experts all have tokens


@in_two
def test_the_code_of_the_page_splits_and_adapts(tmp_path: Path) -> None:
    written(CASES["llama"], tmp_path)
    code = snippet("tensor_parallel.md", "tp_plan").replace("meta-llama/Llama-3.1-8B", str(tmp_path))
    exec(code, found := {"randlora": randlora})
    model: Any = found["model"]
    assert isinstance(model.model.layers[0].self_attn.q_proj.weight, DTensor)
    assert len([*randlora.trainable_parameters(model)]) == 14
    model(input_ids=(ids := torch.arange(12).view(2, 6)), labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in randlora.trainable_parameters(model))


@in_two
def test_processes_whose_experts_have_no_tokens_take_part(tmp_path: Path) -> None:
    case = Case("mixtral", {**EXPERTS, "num_experts_per_tok": 1}, {"tp_plan": "auto", "ep_size": 2}, {})
    one, model = models(case, tmp_path, ".*experts.*")
    for each in (one, model):
        each(input_ids=torch.tensor([[3]])).logits.square().mean().backward()
    gradients_alike(one, model, case.within)


@in_two
def test_what_a_plan_leaves_without_a_way_to_train_is_refused(tmp_path: Path) -> None:
    """Experts whose processes have different batches, and layers of bitsandbytes, which do not compute either."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.distributed import DistributedConfig

    case = Case("mixtral", EXPERTS, {"tp_size": 1, "fsdp_size": 2, "ep_size": 2}, {})
    written(case, tmp_path / "a")
    _, experts = pair_of(case, tmp_path / "a")
    written(CASES["llama"], tmp_path / "b")
    options = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True), "dtype": torch.float32}
    split = DistributedConfig(tp_plan="auto", tp_size=2)
    quantized: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "b", distributed_config=split, **options)
    with pytest.raises(AssertionError):  # of bitsandbytes
        quantized(input_ids=torch.arange(12).view(2, 6))
    for model, targets, said in (
        (experts, ["gate_up_proj"], "gate_up_proj is split by EpDispatchExpertsParallel"),
        (quantized, "all-linear", "q_proj is a quantized Linear4bit whose weight ColwiseParallel"),
    ):
        before = {name: type(module) for name, module in model.named_modules()}
        with pytest.raises(RandLoRAError, match=said):
            randlora.inject(model, r=4, targets=targets)
        assert before == {name: type(module) for name, module in model.named_modules()}


@pytest.mark.slow  # four processes that import transformers
@in_four
def test_a_plan_of_two_dimensions(tmp_path: Path) -> None:
    """Train a model that transformers splits over two processes, and shards over two times as many."""
    case = CASES["mixtral"]
    one, model = models(case._replace(split={**case.split, "tp_size": 2, "fsdp_size": 2}), tmp_path)
    ids = torch.arange(24).view(4, 6)
    mine = ids.chunk(2)[dist.get_rank() // 2]
    with torch.no_grad():
        close(model(input_ids=mine).logits, one(input_ids=mine).logits)
    for each, batch in ((one, ids), (model, mine)):
        each(input_ids=batch).logits.square().mean().backward()
    gradients_alike(one, model)
    with torch.no_grad(), randlora.merged(model):
        close(model(input_ids=mine).logits, one(input_ids=mine).logits)
