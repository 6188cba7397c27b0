"""What a plan says of several devices is what each process holds: shards, parts of layers and optimizer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import randlora
from randlora.model.memory import TrainingMemory
from randlora.state import adapted_root
from tests.distributed.processes import LAW, Processes


class Drawn(NamedTuple):
    """A small model and an adapter of it."""

    hidden: int
    intermediate: int
    layers: int
    r: int
    basis: str
    targets: Any
    train_also: Any

    def build(self) -> Any:
        config = transformers.LlamaConfig(
            vocab_size=67,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        return transformers.LlamaForCausalLM(config)

    @property
    def options(self) -> dict[str, Any]:
        """The options of the adapter."""
        return {"basis": self.basis, "targets": self.targets, "train_also": self.train_also}


drawn = st.builds(
    Drawn,
    st.sampled_from([24, 32, 40]),
    st.integers(33, 60),
    st.integers(1, 3),
    st.integers(3, 9),
    st.sampled_from(["dense", "block", "sparse"]),
    st.sampled_from([["q_proj", "v_proj"], "all-linear"]),
    st.sampled_from([None, ["norm"]]),
)


class Held(NamedTuple):
    """Bytes of a process, with what the engine says that it holds beside."""

    weights: int
    parameters: int
    gradients: int
    optimizer: int
    bases: int
    communication: int


def storage(*tensors: Tensor) -> int:
    """Count the bytes of the memory behind some tensors, which includes the padding of a shard."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in local}.values())


def held(model: nn.Module, whole: Any, communication: Callable[[], int]) -> Held:
    """Train a step and count what this process holds of everything."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for _ in range(2):  # DDP makes its buckets anew after the first
        model(input_ids=torch.randint(67, (2, 5))).logits.sum().backward()
    optimizer.step()
    moments = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    state = adapted_root(whole)[1]
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    return Held(
        storage(*frozen, *model.buffers(), *(entry.original for entry in state.replaced.values())),
        storage(*trained),
        sum(storage(parameter.grad) for parameter in trained if parameter.grad is not None),
        storage(*moments),
        sum(basis.working_nbytes for basis in state.bank),
        communication(),
    )


def replicated(case: Drawn) -> Held:
    model = case.build()
    randlora.inject(model, case.r, **case.options)
    engine = DistributedDataParallel(model)

    def buckets() -> int:
        sizes = engine._get_ddp_logging_data()["bucket_sizes"]
        return sum(int(size) for size in str(sizes).split(","))

    return held(engine, model, buckets)


def sharded(case: Drawn) -> Held:
    model = case.build()
    randlora.inject(model, case.r, **case.options)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    gathered = [0]

    def look(*_: object) -> None:
        gathered.append(sum(p.nbytes for p in model.parameters() if not isinstance(p, DTensor)))

    for block in model.model.layers:
        block.mlp.register_forward_hook(look)  # inside of the block, which is gathered then
    found = held(model, model, lambda: max(gathered))
    local = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return found._replace(gradients=sum(p.grad.to_local().nbytes for p in local if isinstance(p.grad, DTensor)))


def split(case: Drawn) -> Held:
    """Divide the model as transformers does, and train."""
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism  # not in older ones

    model = case.build()
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    apply_tensor_parallelism(model, mesh, model._expand_parallel_plan(model.tp_plan))
    parts = [each.to_local() if isinstance(each, DTensor) else each for each in model.parameters()]
    weights = sum(part.nbytes for part in (*parts, *model.buffers()))  # not their memory: these are views of the whole
    randlora.inject(model, case.r, **case.options)
    return held(model, model, lambda: 0)._replace(weights=weights)


def planned(case: Drawn, strategy: Any) -> TrainingMemory:
    """Plan on the meta device for two processes."""
    with torch.device("meta"):
        model = case.build()
    return randlora.training_memory(model, case.r, devices=2, strategy=strategy, **case.options)


def expected(plan: TrainingMemory) -> Held:
    return Held(*(getattr(plan, name) for name in Held._fields))


@LAW
@given(drawn)
def test_each_process_of_ddp_holds_everything_and_buckets_as_large_as_the_gradients(
    pair: Processes, case: Drawn
) -> None:
    plan = planned(case, "ddp")
    found, second = pair.run(replicated, case)
    assert found == second
    assert found._replace(bases=0) == expected(plan)._replace(bases=0)
    if case.basis != "block":  # of which layers as small as these have dense copies
        assert found.bases == plan.bases


@LAW
@given(drawn)
def test_each_process_of_fsdp2_holds_shards_of_all_parameters_and_whole_bases(pair: Processes, case: Drawn) -> None:
    plan = planned(case, "fsdp2")
    first, second = pair.run(sharded, case)
    assert first[:4] == expected(plan)[:4]
    assert second[:2] == expected(plan)[:2]
    assert first.bases == second.bases
    assert second.gradients <= plan.gradients  # without the padding
    assert second.optimizer <= plan.optimizer
    root_and_block = first.communication
    assert root_and_block < plan.communication <= 2 * root_and_block + 2 * plan.parameters


@LAW
@given(drawn)
def test_each_process_of_tensor_parallelism_holds_parts_of_the_layers(pair: Processes, case: Drawn) -> None:
    plan = planned(case, "tp")
    found = Held(*(max(sizes) for sizes in zip(*pair.run(split, case), strict=True)))
    assert found._replace(weights=0, bases=0) == expected(plan)._replace(weights=0, bases=0)
    assert plan.weights == pytest.approx(found.weights, rel=0.15)  # where a side is odd, one process has more
