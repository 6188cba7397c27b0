"""Under every engine a model is trained, saved, merged, switched and ejected as in one process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers.pytorch_utils import Conv1D

import randlora
from randlora.errors import AdapterError, CheckpointError
from randlora.sharded.places import is_managed
from tests.distributed.engines import ENGINES, IN_FOUR, IN_TWO, OF_EXPERTS, SPLIT, Engine, around, trained, within
from tests.distributed.processes import LAW, in_four, in_two, on_all
from tests.distributed.trained import (
    Block,
    Case,
    Drawn,
    Made,
    close,
    distance,
    drawn,
    drawn_models,
    filled,
    held,
    require_equal_on_ranks,
    reshard,
    trained_alone,
    values,
)
from tests.further import further
from tests.kit import all_bits, fill
from tests.model_directories import contents
from tests.read_kinds import READ_KINDS, ReadKind, output_of, weighted

pytestmark = in_two

SIZE = 1000


def require_as_one_process(engine: Engine, case: Case, place: Path) -> None:
    one, run = case.adapted(), engine.make(case)
    model = getattr(run, "module", run)
    before = values(one, only_trained=True)
    if engine.is_trained:
        batch = dist.get_rank() // engine.sharing
        losses = torch.tensor(on_all(trained(run, case, batch))).mean(0)
        expected = torch.tensor(trained_alone(one, case, engine.ranks()))
        torch.testing.assert_close(losses, expected, rtol=engine.within, atol=engine.within)
        found = values(model, only_trained=True)
        require_equal_on_ranks(found)
        apart = distance(found, values(one, only_trained=True))
        assert apart <= engine.within, apart
        assert distance(found, before) > 1e-4, "nothing was trained"
        give(one, found)
    with torch.no_grad():  # after which the outermost module of FSDP2 holds whole parameters, and ZeRO-3 small ones
        run(*case.batch(0, 9))
    with engine.whole(run):
        same_files(engine, case, one, run, place)
    if engine.is_trained:
        merge_and_back(engine, case, one, run)
        switch_and_end(engine, case, one, run)


@torch.no_grad()
def give(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        model.get_parameter(name).copy_(value)


def same_files(engine: Engine, case: Case, one: Any, run: Any, place: Path) -> None:
    if engine.is_trained:
        mine, state = randlora.adapter_state(run), randlora.adapter_state(one)
        assert (mine.metadata, all_bits(mine.tensors)) == (state.metadata, all_bits(state.tensors))
    assert randlora.save(run, place / "adapter").nbytes > 0
    tensors, entries = dict(randlora.merged_tensors(run)), dict(randlora.merged_tensors(one))
    assert [*tensors] == [*entries]
    for name, tensor in entries.items():
        if engine.is_split:
            alike(engine, tensors[name], tensor)
        else:
            assert all_bits({name: tensors[name]}) == all_bits({name: tensor})
    report = str(randlora.files.save_merged(run, place / "out", max_shard_size=SIZE))
    dist.barrier()
    if dist.get_rank() == 0:
        wrote = randlora.files.save_merged(one, place / "alone", max_shard_size=SIZE)
        assert report == str(wrote).replace("alone", "out")
        assert contents(place / "out") == contents(place / "alone")
        randlora.save(one, place / "own")
        saved, expected = contents(place / "adapter"), contents(place / "own")
        assert [name for name in expected if saved.get(name) != expected[name]] == []
    elif engine.has_copies:
        assert report == f"another process, with a copy of the model, writes {place / 'out'}"
    dist.barrier()
    loaded = case.build()
    randlora.load(loaded, place / "adapter", trainable=True)
    assert distance(values(loaded, only_trained=True), values(one, only_trained=True)) == 0


def merge_and_back(engine: Engine, case: Case, one: Any, run: Any) -> None:
    model, inputs = getattr(run, "module", run), case.batch(dist.get_rank() // engine.sharing, 9)
    output, kept = run(*inputs).detach(), held(model)
    alike(engine, output, one(*inputs))
    for fqn in randlora.adapters(one)[0].options:
        alike(engine, randlora.delta_weight(model, fqn), randlora.delta_weight(one, fqn))
    with torch.no_grad():
        norms, expected_norms = randlora.update_norms(model), randlora.update_norms(one)
        assert norms.keys() == expected_norms.keys()
        for fqn, norm in norms.items():
            alike(engine, norm, expected_norms[fqn])
        with randlora.merged(one):
            expected = one(*inputs)
    with torch.no_grad(), randlora.merged(run):
        reshard(model)
        alike(engine, run(*inputs), expected)
    assert torch.equal(run(*inputs), output)
    randlora.merge(model, reversible=True)
    reshard(model)
    alike(engine, run(*inputs), expected)
    randlora.unmerge(model)
    assert all(torch.equal(value, kept[name]) for name, value in held(model).items())
    assert torch.equal(run(*inputs), output)


def alike(engine: Engine, found: Tensor, expected: Tensor) -> None:
    close(found, expected, engine.within if torch.float32 in (found.dtype, expected.dtype) else engine.in_double)


def switch_and_end(engine: Engine, case: Case, one: Any, run: Any) -> None:
    model, plain = getattr(run, "module", run), case.build()
    inputs = case.batch(dist.get_rank() // engine.sharing, 9)
    output = run(*inputs).detach()
    swapped = randlora.adapter_state(fill(one, seed=7))
    is_spread = any(map(is_managed, model.parameters()))  # then the engine's optimizer has copies of all parameters
    if is_spread:
        with pytest.raises(CheckpointError, match=r"engine\.load_checkpoint"):
            randlora.swap(model, swapped)
    else:
        reshard(model)
        objects = [*map(id, model.parameters())]
        randlora.swap(model, swapped)
        reshard(model)
        assert [*map(id, model.parameters())] == objects
        output = run(*inputs).detach()
        alike(engine, output, one(*inputs))
    keeps_copies = is_spread and case.train_also != ()
    if keeps_copies:
        for call in (lambda: randlora.activate(model, []), lambda: randlora.disabled(model).__enter__()):
            with pytest.raises(AdapterError, match=r"norm\.\w+ would have to become a different parameter object"):
                call()
    else:
        with torch.no_grad(), randlora.disabled(model):
            alike(engine, run(*inputs), plain(*inputs))
    assert torch.equal(run(*inputs), output)
    trained(run, case, dist.get_rank() // engine.sharing, 1)
    found = values(model, only_trained=True)
    require_equal_on_ranks(found)
    give(one, found)
    with torch.no_grad():
        for each in (one, model):
            randlora.inject(each, name="second", **case.options())
            randlora.activate(filled(each, "second"), {"default": 0.5, "second": 0.25})
        alike(engine, run(*inputs), one(*inputs))
        for each in (one, model):
            randlora.remove(each, "second" if keeps_copies else "default")
        alike(engine, run(*inputs), one(*inputs))
        randlora.eject(model)
        alike(engine, run(*inputs), plain(*inputs))
    assert distance(values(model), values(plain)) == 0


LIKE_OTHERS = ("DDP, static", "FSDP2, offloaded", "FSDP2 first, offloaded", "ZeRO-3, persistent")
"""Engines that another one stands for."""


@settings(LAW, max_examples=1)
@given(drawn=drawn_models)
@example(drawn=Drawn(hidden=1, rows=9, r=4, basis="block", train_also=("norm",)))
@pytest.mark.parametrize("engine", [further(name) if name in LIKE_OTHERS else name for name in IN_TWO])
def test_a_model_is_trained_saved_merged_and_ejected_as_in_one_process(
    engine: str, drawn: Drawn, tmp_path: Path
) -> None:
    require_as_one_process(ENGINES[engine], replace(drawn, **ENGINES[engine].fixed), tmp_path)


@in_four
@pytest.mark.slow  # to start four processes on two cores takes a quarter of a minute
@pytest.mark.parametrize("engine", IN_FOUR)
def test_a_mesh_of_two_dimensions(engine: str, tmp_path: Path) -> None:
    require_as_one_process(ENGINES[engine], Drawn(train_also=("norm",)), tmp_path)


CONV1D = ReadKind("Conv1D", "linear", lambda: Conv1D(20, 12), lambda: (torch.randn(5, 12),), options={"targets": ["0"]})
KINDS = {kind.name: kind for kind in (*READ_KINDS, CONV1D)}


class Run(nn.Module):
    def __init__(self, kind: ReadKind) -> None:
        super().__init__()
        self.add_module("0", kind.model()[0])

    def forward(self, *args: Tensor) -> Tensor:
        return output_of(self.get_submodule("0")(*args))


EACH_KIND = {
    "FSDP2": ("Conv1D", "ConvTranspose1d", "attention-in_proj", "experts-gate_up"),
    "FSDP2 first": ("Conv2d-groups", "attention-in_proj-split", "attention-out_proj", "experts-down-shared-batched"),
    "ZeRO-3": ("Conv2d-stride", "attention-in_proj", "attention-out_proj"),
    OF_EXPERTS: ("experts-gate_up",),
}


@pytest.mark.parametrize(("engine", "name"), [(engine, name) for engine, names in EACH_KIND.items() for name in names])
def test_each_kind_trains_is_saved_and_merged(engine: str, name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    case = Made(
        lambda: Run(kind),
        kind.adapter_options,
        lambda *_: kind.arguments(),
        measure=lambda output, rank: weighted(output) * (rank + 1) / 50,
    )
    require_as_one_process(ENGINES[engine], case, tmp_path)


def split_tokens(model: Any) -> Any:
    plan = {
        "0": SequenceParallel(),
        "1.up": ColwiseParallel(input_layouts=Shard(1)),
        "1.down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        "1.norm": SequenceParallel(),
        "2": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(model, mesh, PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1)))
    parallelize_module(model, mesh, plan)
    for part in (model[0], model[1].norm):
        part.requires_grad_(False)  # whose parameters are others then
    return model


@pytest.mark.parametrize(("order", "first"), [(around, ()), (within, ("0",))])
def test_a_model_whose_tokens_are_split_between_its_layers(order: Any, first: tuple[str, ...], tmp_path: Path) -> None:
    case = Made(
        lambda: nn.Sequential(nn.Linear(6, 8), Block(8, 12), nn.Linear(8, 10, bias=False)),
        {"r": 4, "targets": [*first, "1.up", "1.down", "2"]},
        lambda rank, step: (drawn(2, 4, 6, seed=step + rank),),
    )
    require_as_one_process(Engine(order(split_tokens), **SPLIT), case, tmp_path)


@dataclass(frozen=True)
class Planned(Case):
    """A kind of model of transformers, which its own plan splits, with options of its config, the plan and `inject`."""

    kind: str
    config: dict[str, Any]
    parallel: dict[str, Any]
    adapter: dict[str, Any]
    experts: str = "eager"
    place: Path = Path()
    dtype: torch.dtype = torch.float64  # where sums in another order are no matter

    def written(self, place: Path) -> Planned:
        from transformers import AutoConfig, AutoModelForCausalLM  # which takes long to import, in the processes only

        sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
        if dist.get_rank() == 0:
            torch.manual_seed(0)
            config = AutoConfig.for_model(self.kind, **{**sizes, **heads, **self.config})
            AutoModelForCausalLM.from_config(config).save_pretrained(place)
        dist.barrier()
        return replace(self, place=place)

    def build(self, **options: Any) -> Any:
        from transformers import AutoModelForCausalLM

        options = {"dtype": self.dtype, "experts_implementation": self.experts} | options
        model = AutoModelForCausalLM.from_pretrained(self.place, **options).eval()
        model.register_forward_hook(lambda *call: call[-1].logits)
        return model

    def split(self, **options: Any) -> Any:
        from transformers.distributed import DistributedConfig

        parallel = DistributedConfig(**{"tp_size": dist.get_world_size(), **self.parallel})
        return self.build(distributed_config=parallel, **options)

    def adapt(self, model: Any, name: str = "default") -> Any:
        for parameter in randlora.trainable_parameters(super().adapt(model, name)):
            parameter.data = parameter.data.to(self.dtype)
        return model

    def options(self) -> dict[str, Any]:
        return {"r": 4, "targets": ".*(_proj|embed_tokens|lm_head)", **self.adapter}

    def batch(self, rank: int, step: int) -> tuple[Tensor]:
        return ((torch.arange(12).view(2, 6) + 12 * rank + step) % 30,)

    def loss(self, output: Tensor, rank: int) -> Tensor:  # noqa: ARG002
        return (output - 0.3).square().mean() / 10

    def engine(self) -> Engine:
        """Return the engine that the plan is. Mixtral weights parts of experts in float32."""
        in_double = 5e-6 if self.kind == "mixtral" and "ep_size" not in self.parallel else 1e-12
        return Engine(lambda case: case.adapt(case.split()), **SPLIT, in_double=in_double)


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6, "head_dim": 4}
PACKED = {"model.layers.*.mlp.gate_up_proj": "packed_colwise", "model.layers.*.mlp.down_proj": "rowwise"}
AUTO, WHOLE = {"tp_plan": "auto"}, {"tp_plan": "auto", "ep_size": 2}
ATTENTION = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "colwise") | {"o_proj": "rowwise"}
STACKS = {".gate_up_proj": "packed_colwise", ".down_proj": "rowwise", "": "moe_tp_experts"}
PARTS = {  # of every expert; as of transformers 5.25 no model's own plan is this
    "tp_plan": {f"model.layers.*.self_attn.{name}": style for name, style in ATTENTION.items()}
    | {f"model.layers.*.mlp.experts{name}": style for name, style in STACKS.items()}
}
BLOCK = {"basis": "block", "blocks": (2, 2)}
RANKS = ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
LATENT = dict.fromkeys((*RANKS, "num_key_value_heads"), 4)
WIDER = {"hidden_size": 24, "num_attention_heads": 6, "intermediate_size": 20}
PLANS = {
    # of layers with a sum of outputs too, added once
    "llama": Planned("llama", {"attention_bias": True, "mlp_bias": True}, AUTO, {}),
    "latent": Planned("minicpm3", LATENT, AUTO, {"targets": ".*(_proj|_mqa)"}),  # keys of all heads come from one layer
    "mixtral": Planned("mixtral", EXPERTS, PARTS, {}),
    "mixtral, blocks": Planned("mixtral", EXPERTS, PARTS, BLOCK, "batched_mm"),
    "qwen3_moe": Planned("qwen3_moe", QWEN | {"hidden_size": 8}, PARTS, {"experts": "shared"}),
    "packed": Planned("phi3", {"pad_token_id": 0}, {"tp_plan": PACKED}, {}),
    "packed, narrow": Planned("phi3", {"pad_token_id": 0, "intermediate_size": 6}, {"tp_plan": PACKED}, BLOCK),
    "whole experts": Planned("mixtral", EXPERTS | WIDER | {"num_local_experts": 6}, WHOLE, {"basis": "sparse"}),
    "whole experts, shared": Planned("qwen3_moe", QWEN | {"num_experts": 2}, WHOLE, {"experts": "shared"}),
}
ON_TWO_DIMENSIONS = pytest.param(
    Planned("mixtral", EXPERTS, PARTS | {"tp_size": 2, "fsdp_size": 2}, {}),
    marks=[in_four, pytest.mark.slow],  # each process imports transformers
)


FURTHER = ("qwen3_moe", "mixtral, blocks", "whole experts, shared", "packed, narrow")


@pytest.mark.parametrize(
    "plan",
    [*(further(plan) if name in FURTHER else plan for name, plan in PLANS.items()), ON_TWO_DIMENSIONS],
    ids=[*PLANS, "two dimensions"],
)
def test_a_model_that_its_plan_splits(plan: Planned, tmp_path: Path) -> None:
    case = plan.written(tmp_path / "base")
    assert any(isinstance(each, DTensor) for each in case.split().parameters())
    require_as_one_process(case.engine(), case, tmp_path)


@pytest.mark.parametrize(("name", "engine"), [("llama", "ZeRO-3"), ("mixtral", OF_EXPERTS), ("llama", "FSDP2")])
def test_a_model_of_transformers(name: str, engine: str, tmp_path: Path) -> None:
    config = PLANS[name].config | {"tie_word_embeddings": name == "llama"}
    case = replace(PLANS[name], config=config, adapter={"targets": "all-linear"}).written(tmp_path / "base")
    case = replace(case, dtype=torch.float32)  # ZeRO-3 refuses float64 where the processor computes in fp16
    require_as_one_process(ENGINES[engine], case, tmp_path)
