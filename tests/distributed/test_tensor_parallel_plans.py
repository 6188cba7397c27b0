"""Tensor parallelism by the plans of transformers' models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor

import randlora
from randlora.errors import RandLoRAError
from randlora.sharded.tensor_parallel import on_mesh
from tests.distributed import test_tensor_parallel
from tests.distributed.processes import LAW, Processes
from tests.examples import snippet
from tests.kit import fill
from tests.model_directories import contents

close = partial(test_tensor_parallel.close, within=5e-6)  # routers compute in float32, also in a model in float64
gradients_alike = partial(test_tensor_parallel.require_gradients_alike, within=5e-6)


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


def same_files(one: Any, saved: Path, place: Path) -> None:
    """Compare the files of an adapter with those that one process writes."""
    from safetensors.torch import load_file

    randlora.save(one, place)
    assert [each.name for each in sorted(saved.iterdir())] == [each.name for each in sorted(place.iterdir())]
    tensors, expected = (load_file(each / "adapter_model.safetensors") for each in (saved, place))
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        close(tensor, expected[name])
    assert (saved / "adapter_config.json").read_bytes() == (place / "adapter_config.json").read_bytes()


def planned(case: Case, place: Path) -> None:
    """Train, generate, save, load, merge and eject a model that its own plan splits."""
    written(case, place / "base")
    one, model = pair_of(case, place / "base")
    assert any(isinstance(each, DTensor) for each in model.parameters())
    forwards = [each.__dict__.get("forward") for each in model.modules()]
    for each in (one, model):
        randlora.inject(each, r=4, targets=TARGETS, **case.options)
        test_tensor_parallel.in_float64(fill(each))
    randlora.files.save_merged(model, place / "merged", max_shard_size="8KB")
    if dist.get_rank() == 0:
        randlora.files.save_merged(one, place / "merged by one", max_shard_size="8KB")
        assert contents(place / "merged") == contents(place / "merged by one")
    ids = torch.arange(12).view(2, 6)
    optimizers = [torch.optim.SGD(randlora.trainable_parameters(each), lr=1e-4) for each in (one, model)]
    for _ in range(2):
        losses = [each(input_ids=ids, labels=ids).loss for each in (one, model)]
        close(losses[1], losses[0])
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
        gradients_alike(one, model)
        for optimizer in optimizers:
            optimizer.step()
    with torch.no_grad():
        expected = one(input_ids=ids).logits
        close(model(input_ids=ids).logits, expected)
        tokens = [each.generate(input_ids=ids[:, :3], max_new_tokens=3, do_sample=False) for each in (one, model)]
        assert torch.equal(*tokens)
        merged = dict(randlora.merged_tensors(model))
        for name, tensor in randlora.merged_tensors(one):
            close(merged[name], tensor)
        randlora.save(model, place / "adapter")
        dist.barrier()
        same_files(one, place / "adapter", place / f"one {dist.get_rank()}")
        randlora.eject(model)
        assert [each.__dict__.get("forward") for each in model.modules()] == forwards
        randlora.load(model, place / "adapter")
        close(model(input_ids=ids).logits, expected)
        with randlora.merged(model):
            close(model(input_ids=ids).logits, expected)
        close(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("case", CASES)
def test_a_model_that_its_plan_splits(pair: Processes, case: str, tmp_path: Path) -> None:
    pair.run(planned, CASES[case], tmp_path)


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


def test_models_of_other_sizes(pair: Processes, tmp_path_factory: pytest.TempPathFactory) -> None:
    @settings(LAW, max_examples=3)
    @given(drawn_cases)
    def law(case: Case) -> None:
        pair.run(planned, case, tmp_path_factory.mktemp("plan"))

    law()


def count_sums(place: Path) -> None:
    """Count how often Λ and Γ of experts are made to sum their gradients, of which each is two sums."""
    case = CASES["mixtral"]
    written(case, place)
    _, model = pair_of(case, place)
    randlora.inject(model, r=4, targets=".*experts.*")
    fill(model)
    with mock.patch("randlora.sharded.tensor_parallel.on_mesh", side_effect=on_mesh) as counted:
        model(input_ids=torch.arange(12).view(2, 6))
    assert counted.call_count == 2  # of one layer: gate_up_proj and down_proj, whose experts all have tokens


def as_on_the_page(place: Path) -> None:
    """Load, split and adapt a model as docs/tensor_parallel.md does."""
    written(CASES["llama"], place)
    code = snippet("tensor_parallel.md", "tp_plan").replace("meta-llama/Llama-3.1-8B", str(place))
    exec(code, found := {"randlora": randlora})
    model: Any = found["model"]
    assert isinstance(model.model.layers[0].self_attn.q_proj.weight, DTensor)
    assert len([*randlora.trainable_parameters(model)]) == 14
    model(input_ids=(ids := torch.arange(12).view(2, 6)), labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in randlora.trainable_parameters(model))


def one_token(place: Path) -> None:
    """Train experts alone with one token, which no expert of the other process sees."""
    case = Case("mixtral", {**EXPERTS, "num_experts_per_tok": 1}, {"tp_plan": "auto", "ep_size": 2}, {})
    written(case, place)
    one, model = pair_of(case, place)
    for each in (one, model):
        randlora.inject(each, r=4, targets=".*experts.*")
        test_tensor_parallel.in_float64(fill(each))
        each(input_ids=torch.tensor([[3]])).logits.square().mean().backward()
    gradients_alike(one, model)


def refuse_other_batches(place: Path) -> None:
    """Name experts whose processes have different batches, and change nothing."""
    case = Case("mixtral", EXPERTS, {"tp_size": 1, "fsdp_size": 2, "ep_size": 2}, {})
    written(case, place)
    _, model = pair_of(case, place)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(RandLoRAError, match="gate_up_proj is split by EpDispatchExpertsParallel"):
        randlora.inject(model, r=4, targets=["gate_up_proj"])
    assert before == {name: type(module) for name, module in model.named_modules()}


def refuse_quantized(place: Path) -> None:
    """Name layers of bitsandbytes that a plan splits, which do not compute without adapters either."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.distributed import DistributedConfig

    written(CASES["llama"], place)
    options = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True), "dtype": torch.float32}
    split = DistributedConfig(tp_plan="auto", tp_size=2)
    model: Any = AutoModelForCausalLM.from_pretrained(place, distributed_config=split, **options)
    with pytest.raises(AssertionError):  # of bitsandbytes
        model(input_ids=torch.arange(12).view(2, 6))
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(RandLoRAError, match="q_proj is a quantized Linear4bit whose weight ColwiseParallel"):
        randlora.inject(model, r=4, targets="all-linear")
    assert before == {name: type(module) for name, module in model.named_modules()}


@pytest.mark.parametrize("check", [count_sums, as_on_the_page, one_token, refuse_other_batches, refuse_quantized])
def test_what_else_a_plan_does(pair: Processes, tmp_path: Path, check: Callable[[Path], None]) -> None:
    pair.run(check, tmp_path, seconds=60)


def on_two_dimensions(case: Case, place: Path) -> None:
    """Train a model that transformers splits over two processes, and shards over two times as many."""
    written(case, place)
    one, model = pair_of(case, place)
    for each in (one, model):
        randlora.inject(each, r=4, targets=TARGETS)
        test_tensor_parallel.in_float64(fill(each))
    ids = torch.arange(24).view(4, 6)
    mine = ids.chunk(2)[dist.get_rank() // 2]
    with torch.no_grad():
        close(model(input_ids=mine).logits, one(input_ids=mine).logits)
    for each, batch in ((one, ids), (model, mine)):
        each(input_ids=batch).logits.square().mean().backward()
    gradients_alike(one, model)
    with torch.no_grad(), randlora.merged(model):
        merged = model(input_ids=mine).logits
    with torch.no_grad():
        close(merged, one(input_ids=mine).logits)


@pytest.mark.slow  # four processes that import transformers
def test_a_plan_of_two_dimensions(four: Processes, tmp_path: Path) -> None:
    case = CASES["mixtral"]
    four.run(on_two_dimensions, case._replace(split={**case.split, "tp_size": 2, "fsdp_size": 2}), tmp_path)
