"""What a plan says of several devices is what each process holds: shards, parts of layers and optimizer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import randlora
from randlora.state import adapted_root
from tests.distributed.processes import LAW, in_two, on_all
from tests.kit import working_nbytes
from tests.models import VOCABULARY, llama

pytestmark = in_two

models = st.fixed_dictionaries({
    "hidden_size": st.sampled_from([24, 32, 40]),
    "intermediate_size": st.integers(33, 60),
    "num_hidden_layers": st.integers(1, 3),
})
adapters = st.fixed_dictionaries({
    "r": st.integers(3, 9),
    "basis": st.sampled_from(["dense", "block", "sparse"]),
    "targets": st.sampled_from([["q_proj", "v_proj"], "all-linear"]),
    "train_also": st.sampled_from([None, ["norm"]]),
})


class Held(NamedTuple):
    weights: int
    parameters: int
    gradients: int
    optimizer: int
    bases: int
    communication: int


def planned(sizes: dict[str, int], options: dict[str, Any], strategy: Any) -> tuple[Any, Held]:
    with torch.device("meta"):
        plan = randlora.training_memory(llama(**sizes), devices=2, strategy=strategy, **options)
    return llama(**sizes), Held(*(getattr(plan, name) for name in Held._fields))


def storage(*tensors: Tensor) -> int:
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in local}.values())


def held(model: nn.Module, whole: Any, communication: Callable[[], int] = lambda: 0) -> Held:
    frozen, trained = ([each for each in model.parameters() if each.requires_grad is own] for own in (False, True))
    optimizer = torch.optim.AdamW(trained)
    for _ in range(2):  # DDP makes its buckets anew after the first
        model(input_ids=torch.randint(VOCABULARY, (2, 5))).logits.sum().backward()
    optimizer.step()
    moments = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    state = adapted_root(whole)[1]
    return Held(
        storage(*frozen, *model.buffers(), *(entry.original for entry in state.replaced.values())),
        storage(*trained),
        sum(storage(parameter.grad) for parameter in trained if parameter.grad is not None),
        storage(*moments),
        working_nbytes(whole),
        communication(),
    )


@LAW
@given(sizes=models, options=adapters)
def test_each_process_of_ddp_holds_everything_and_buckets_as_large_as_the_gradients(
    sizes: dict[str, int], options: dict[str, Any]
) -> None:
    model, plan = planned(sizes, options, "ddp")
    randlora.inject(model, **options)
    engine = DistributedDataParallel(model)

    def buckets() -> int:
        return sum(int(size) for size in str(engine._get_ddp_logging_data()["bucket_sizes"]).split(","))

    found = held(engine, model, buckets)
    assert found._replace(bases=0) == plan._replace(bases=0)
    if options["basis"] != "block":  # of which layers as small as these have dense copies
        assert found.bases == plan.bases


@LAW
@given(sizes=models, options=adapters)
def test_each_process_of_fsdp2_holds_shards_of_all_parameters_and_whole_bases(
    sizes: dict[str, int], options: dict[str, Any]
) -> None:
    model, plan = planned(sizes, options, "fsdp2")
    randlora.inject(model, **options)
    gathered = [0]

    def look(*_: object) -> None:
        gathered.append(sum(p.nbytes for p in model.parameters() if not isinstance(p, DTensor)))

    for block in model.model.layers:
        fully_shard(block)
        block.mlp.register_forward_hook(look)  # inside of the block, which is gathered then
    found = held(fully_shard(model), model, lambda: max(gathered))
    grads = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    own = sum(grad.to_local().nbytes for grad in grads if isinstance(grad, DTensor))
    first, second = on_all(found._replace(gradients=own))
    assert first[:4] == plan[:4]
    assert second[:2] == plan[:2]
    assert first.bases == second.bases
    assert second.gradients <= plan.gradients  # without the padding
    assert second.optimizer <= plan.optimizer
    root_and_block = first.communication
    assert root_and_block < plan.communication <= 2 * root_and_block + 2 * plan.parameters
