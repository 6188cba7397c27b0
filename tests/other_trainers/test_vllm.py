"""`MergedSource` with vLLM's own classes: its trainer engine sends to its worker engine, which loads a plain model.

The engines are those of NCCL. gloo stands in for the communicator, which needs GPUs, and nothing for the rest of them.
"""

from __future__ import annotations

import copy
import hashlib
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-rollouts")

import torch
import torch.distributed as dist
from torch import Tensor, nn
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer import nccl_engine
from vllm.distributed.weight_transfer.base import ModuleSource, WeightSource

import randlora
from randlora.errors import AdapterError, MergeError
from randlora.integrations.vllm import MergedSource
from tests import quantized
from tests.distributed.engines import ENGINES, trained
from tests.distributed.processes import PAIR, ZERO_PAIR, Processes
from tests.distributed.trained import Drawn, close
from tests.kit import adapt, all_bits, bits, fill
from tests.model_directories import stored, write
from tests.models import llama
from tests.pages import snippet
from tests.test_files_merge import MODELS
from tests.test_readers_experts import EXPERTS, made, mixtral
from tests.transformers_zoo import tiny

ROUNDS = 50
SECONDS = 500
"""How long a call may take in two processes, each of which imports vLLM."""


def checked(source: WeightSource) -> dict[str, Tensor]:
    """Return what a source yields, by vLLM's groups, after comparing it with what it has declared."""
    groups = [*source.iter_groups()]
    pairs = [pair for names, tensors in groups for pair in zip(names, tensors, strict=True)]
    declared = [(each.name, each.dtype, each.shape) for each in source.metadata()]
    assert [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in pairs] == declared
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_a_source_yields_the_names_the_dtypes_and_the_bits_that_a_merged_model_is_saved_with(
    name: str, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    build, _ = MODELS[name]
    model: Any = adapt(build(), r=4, targets=EXPERTS if "experts" in name else "all-linear")
    source = MergedSource(nn.DataParallel(model), dtype=dtype)
    found = checked(source)
    again = checked(source)
    assert all_bits(again) == all_bits(found), "each pass is a new one"
    randlora.merge(model)
    expected = stored(write(model if dtype is None else model.to(dtype), tmp_path / "out"))
    assert all_bits(found) == all_bits(expected)
    if "tied" in name:  # transformers stores the others under different names
        assert [*found] == [each.name for each in ModuleSource(model).metadata()], "as vLLM's own"


def test_a_source_has_what_is_trained_whole_in_the_dtype_of_the_model_and_follows_the_adapter() -> None:
    model: Any = llama().bfloat16()
    randlora.inject(model, r=4, targets="all-linear", train_also=["lm_head"])
    source = MergedSource(model)
    before = checked(source)
    assert {tensor.dtype for tensor in before.values()} == {torch.bfloat16}
    with torch.no_grad():
        for parameter in randlora.trainable_parameters(model):
            parameter.add_(0.1)
    after = checked(source)
    changed = {name for name in before if bits(before[name]) != bits(after[name])}
    assert changed == {"lm_head.weight", *(f"{fqn}.weight" for fqn in randlora.adapters(model)[0].options)}
    with randlora.merged(model):
        assert all_bits(checked(source)) == all_bits(after)


@pytest.mark.parametrize("kind", quantized.MODELS[:2], ids=lambda kind: kind.name)
def test_a_quantized_model_is_sent_as_the_plain_one_that_it_stands_for(kind: Any) -> None:
    model: Any = quantized.quantized_model(kind, quantized.NF4)
    randlora.inject(model, r=4, targets=kind.targets)
    fill(model)
    found = checked(MergedSource(model))
    randlora.merge(model, quantized="dequantize")
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():  # a quantized one that is not adapted
            continue
        assert torch.equal(found[name], parameter) or torch.equal(found[name], parameter.T), name


def test_a_model_with_several_parameters_in_one_tensor_of_its_files_and_a_disabled_adapter_are_refused() -> None:
    model: Any = tiny("nomic_bert", "NomicBertModel")
    adapt(model, r=4, targets="all-linear")
    with pytest.raises(MergeError, match="they are sent one by one: write files with"):
        MergedSource(model)
    model = adapt(made(mixtral), r=4, targets=EXPERTS)
    source = MergedSource(model)
    with randlora.disabled(model), pytest.raises(MergeError, match="to vLLM: the adapters are disabled"):
        iter(source)
    randlora.eject(model)
    with pytest.raises(AdapterError, match="has no adapter: call"):
        iter(source)


class Gloo:
    """Has the one method of vLLM's communicator that its engines call."""

    def broadcast(self, tensor: Tensor, src: int, stream: object) -> None:  # noqa: ARG002
        dist.broadcast(tensor, src)


class Client:
    """Calls the methods of the worker's engine, in the other process, and waits until it has returned."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> None:
            answer = [None]
            dist.broadcast_object_list([(name, args)], 0, self.group)
            dist.broadcast_object_list(answer, 1, self.group)
            assert answer == [None], answer

        return call


class Plain(nn.Module):
    """A plain model, which takes weights as those of vLLM do."""

    def __init__(self) -> None:
        super().__init__()
        self.model = llama().bfloat16()

    def load_weights(self, weights: list[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            self.model.get_parameter(name).data.copy_(tensor)


def digest(model: nn.Module) -> str:
    return hashlib.sha256(repr(all_bits(model.state_dict())).encode()).hexdigest()


def send(client: Client) -> list[str]:
    model, sent = llama().bfloat16(), list[str]()
    base = all_bits(model.state_dict())
    randlora.inject(model, r=4, targets="all-linear")
    optimizer = torch.optim.AdamW(randlora.trainable_parameters(model), lr=1e-2)

    def train(ids: Tensor) -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        randlora.merge(own := copy.deepcopy(model))
        sent.append(digest(own))

    batches = [torch.randint(0, 30, (2, 6)) for _ in range(ROUNDS)]
    info = nccl_engine.NCCLTrainerInitInfo(rank=0, master_address="", master_port=0, world_size=2, packed=False)
    scope = {"init_info": info, "client": client, "model": model, "batches": batches, "train": train, "torch": torch}
    exec(snippet("rollouts.md", "MergedSource"), scope)
    assert {name: found for name, found in all_bits(model.state_dict()).items() if name in base} == base, "no drift"
    return sent


def serve(group: Any) -> list[str]:
    plain, received = Plain(), list[str]()
    config = SimpleNamespace(parallel_config=None, model_config=None)
    engine = nccl_engine.NCCLWeightTransferEngine(WeightTransferConfig("nccl"), config, torch.device("cpu"), plain)
    while len(received) < ROUNDS:
        request: list[Any] = [None]
        dist.broadcast_object_list(request, 0, group)
        name, args = request[0]
        problem = None
        try:
            if name == "init_weight_transfer_engine":
                engine.init_transfer_engine(engine.parse_init_info(*args))
            elif name == "update_weights":
                engine.update_weights(*args)
            elif name == "finish_weight_update":
                received.append(digest(plain.model))
        except Exception as error:
            problem = repr(error)
        dist.broadcast_object_list([problem], 1, group)
    return received


def without_gpus() -> ExitStack:
    stack = ExitStack()
    for name in ("open_trainer_endpoint", "worker_init_process_group"):
        stack.enter_context(mock.patch.object(nccl_engine, name, return_value=Gloo()))
    stack.enter_context(mock.patch("torch.cuda.current_stream"))
    stack.enter_context(mock.patch("torch.accelerator.synchronize"))
    return stack


def fifty_rounds() -> list[str]:
    group = dist.new_group()
    with without_gpus():
        return send(Client(group)) if dist.get_rank() == 0 else serve(group)


def test_a_plain_model_in_a_second_process_has_the_bits_of_the_merged_one_in_fifty_rounds() -> None:
    try:
        sent, received = PAIR.run(fifty_rounds, seconds=SECONDS)
    finally:
        PAIR.stop()
    assert sent == received
    assert len({*sent}) == len(sent) == ROUNDS, "each round trained"


def send_together(name: str) -> None:
    case, engine = Drawn(), ENGINES[name]
    run, one, client = engine.make(case), case.adapted(), mock.Mock()
    taken, is_sender = list[Tensor](), dist.get_rank() == 0
    sending = nccl_engine.NCCLTrainerWeightTransferEngine(
        client=client, source=MergedSource(run), is_sender=is_sender, packed=False
    )
    sending.model_update_group = mock.Mock(broadcast=lambda tensor, **_: taken.append(tensor.clone()))
    for steps in (1, 2):
        trained(run, case, dist.get_rank(), steps=steps)
        taken.clear()
        with mock.patch("torch.cuda.current_stream"):
            sending.send_weights()
        randlora.swap(one, randlora.adapter_state(run))
        randlora.merge(alone := copy.deepcopy(one))
        expected = dict(alone.named_parameters())
        assert len(taken) == (len(expected) if is_sender else 0)
        if is_sender:
            (info,) = client.update_weights.call_args.args
            assert info["names"] == [*expected]
            for tensor, value in zip(taken, expected.values(), strict=True):
                close(tensor, value) if engine.is_split else torch.testing.assert_close(tensor, value, rtol=0, atol=0)
    assert [call[0] for call in client.mock_calls] == [
        *["start_weight_update", "update_weights", "finish_weight_update"] * 2
    ] * is_sender


@pytest.mark.parametrize(("name", "group"), [("FSDP2", PAIR), ("FSDP2 first", PAIR), ("ZeRO-3", ZERO_PAIR)])
def test_processes_that_hold_the_model_together_send_in_lockstep(name: str, group: Processes) -> None:
    try:
        group.run(send_together, name, seconds=SECONDS)
    finally:
        group.stop()
