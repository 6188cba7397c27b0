"""The tensors of the merged model and its files, of whatever engine spreads the model: those of one process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import randlora
from randlora.disk.formats import write_tensor_file
from randlora.errors import MergeError
from randlora.sharded import places
from tests.distributed.engines import engine_around, engine_of, needs_deepspeed
from tests.distributed.processes import Processes
from tests.distributed.test_fsdp_faults import failing_in_last
from tests.distributed.test_gathered import watched
from tests.distributed.trained import Chain, Drawn
from tests.kit import all_bits, fill
from tests.model_directories import contents

DRAWN = Drawn((12, 16, 8, 12), 4, "dense", 2.0, ("norms.0",))
SAVING = "randlora.files.save_merged"
SHARD = 1000
"""Bytes of a file, which are a few of the tensors."""


def split(model: nn.Module) -> nn.Module:
    plan = {"layers.0": ColwiseParallel(), "layers.1": RowwiseParallel()}
    return parallelize_module(model, init_device_mesh("cpu", (2,)), plan)


def fully_sharded(model: nn.Module, **options: Any) -> nn.Module:
    fully_shard(model, **options)
    model(DRAWN.batch(0, 0))  # after which the root holds whole parameters
    return model


def flattened(model: nn.Module) -> FullyShardedDataParallel:
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


ENGINES: dict[str, Callable[[], nn.Module]] = {
    "DDP": lambda: DistributedDataParallel(DRAWN.adapted()),
    "FSDP, summoned": lambda: flattened(DRAWN.adapted()),
    "FSDP2": lambda: fully_sharded(DRAWN.adapted()),
    "FSDP2, offloaded": lambda: fully_sharded(DRAWN.adapted(), offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "tensor parallel": lambda: split(DRAWN.adapted()),
}
ZERO: dict[str, Callable[[], nn.Module]] = {
    "ZeRO-2": lambda: engine_of(DRAWN, "2"),
    "ZeRO-3": lambda: engine_of(DRAWN, "3"),
    "ZeRO-3, init first": lambda: engine_of(DRAWN, "3", is_spread_first=True).module,
    "ZeRO-3, persistent": lambda: engine_of(DRAWN, "3-persistent").module,
    "ZeRO-3, offloaded": lambda: engine_of(DRAWN, "3-offload").module,
}
PARTS = "FSDP2", "FSDP2, offloaded", "tensor parallel"
"""Engines under which each process computes a part of a merged weight, which may round otherwise than all of it."""


def yield_and_write(name: str, place: Path) -> str:
    one, model = DRAWN.adapted(), {**ENGINES, **ZERO}[name]()
    is_summoned = name == "FSDP, summoned"
    here: AbstractContextManager[object] = (
        FullyShardedDataParallel.summon_full_params(model) if is_summoned else nullcontext()
    )
    with here:
        found, expected = dict(randlora.merged_tensors(model)), dict(randlora.merged_tensors(one))
        assert [*found] == [*expected]
        for fqn, tensor in expected.items():
            if name in PARTS and fqn.startswith("layers") and fqn.endswith("weight"):
                torch.testing.assert_close(found[fqn], tensor, rtol=0, atol=1e-6)
            else:
                assert all_bits({fqn: found[fqn]}) == all_bits({fqn: tensor})
        report = randlora.files.save_merged(model, place / "out", max_shard_size=SHARD)
    dist.barrier()
    if dist.get_rank() == 0:
        randlora.files.save_merged(DRAWN.adapted(), place / "one", max_shard_size=SHARD)
        assert contents(place / "out") == contents(place / "one")
    return str(report)


def of_one(place: Path) -> tuple[str, str]:
    """Return what the reports of two processes are where the first writes for both."""
    wrote = randlora.files.save_merged(DRAWN.adapted(), place / "alone", max_shard_size=SHARD)
    assert wrote.shards > 2
    return str(wrote).replace("alone", "out"), f"another process, with a copy of the model, writes {place / 'out'}"


@pytest.mark.parametrize("name", ENGINES)
def test_tensors_and_files_are_those_of_one_process(pair: Processes, name: str, tmp_path: Path) -> None:
    reports = pair.run(yield_and_write, name, tmp_path)
    wrote, left = of_one(tmp_path)
    assert reports == [wrote, left if name in ("DDP", "FSDP, summoned") else wrote]


@needs_deepspeed
@pytest.mark.parametrize("name", ZERO)
def test_tensors_and_files_are_those_of_one_process_under_zero(zero_pair: Processes, name: str, tmp_path: Path) -> None:
    reports = zero_pair.run(yield_and_write, name, tmp_path)
    wrote, left = of_one(tmp_path)
    assert reports == [wrote, left if name == "ZeRO-2" else wrote]


def write_and_count(name: str, place: Path) -> tuple[list[int], int]:
    """Return how many gathered tensors there were at once, and how many files this process wrote."""
    model = {**ENGINES, **ZERO}[name]()
    on: tuple[Any, str] = (DTensor, "full_tensor") if name == "FSDP2" else (places, "gathered")
    written = mock.Mock(side_effect=write_tensor_file)
    with watched(*on) as alive, mock.patch(f"{SAVING}.write_tensor_file", written):
        randlora.files.save_merged(model, place / "out", max_shard_size=SHARD)
    return alive, written.call_count


def require_bounded(found: list[tuple[list[int], int]]) -> None:
    (_, files), (alive, others) = found
    assert (files > 2, others) == (True, 0)
    assert len(alive) > 10
    assert set(alive) == {1}


def test_a_process_that_writes_nothing_holds_one_tensor(pair: Processes, tmp_path: Path) -> None:
    require_bounded(pair.run(write_and_count, "FSDP2", tmp_path))


@needs_deepspeed
def test_a_process_that_writes_nothing_holds_one_tensor_under_zero(zero_pair: Processes, tmp_path: Path) -> None:
    require_bounded(zero_pair.run(write_and_count, "ZeRO-3", tmp_path))


def refuse(place: Path) -> list[str]:
    model, errors = flattened(DRAWN.adapted()), []
    (place / "file").touch()
    inner: Any = model.module
    verbs: list[Callable[[Any], object]] = [
        randlora.merged_tensors,
        lambda each: randlora.files.save_merged(each, place / "out"),
    ]
    for verb in verbs:
        for given in (model, inner):
            with pytest.raises(MergeError) as caught:
                verb(given)
            errors.append(str(caught.value))
    with FullyShardedDataParallel.summon_full_params(model), pytest.raises(MergeError, match="give the wrapper"):
        randlora.merged_tensors(inner)
    return errors


def test_a_model_that_is_flattened_is_refused_in_all_processes(pair: Processes, tmp_path: Path) -> None:
    first, second = pair.run(refuse, tmp_path)
    assert first == second
    for error in first[::2]:
        assert "call and iterate in a block of FullyShardedDataParallel.summon_full_params" in error
    assert not (tmp_path / "out").exists()


def fail_in_one(name: str, place: Path) -> None:
    """Raise in one process at each place where it might, and find that all raise and nothing is left."""
    model = {**ENGINES, **ZERO}[name]()
    gather: tuple[str, Any] = ("full_tensor", DTensor) if name == "FSDP2" else ("gathered", places)
    out, no_room = place / "out", MemoryError("no room")
    for call in (0, 2, 5):  # Λ, the weight, and what has no adapter
        for verb in (lambda: dict(randlora.merged_tensors(model)), lambda: randlora.files.save_merged(model, out)):
            with failing_in_last(*gather, call, no_room), pytest.raises(MemoryError, match="no room"):
                verb()
    full = OSError(28, "No space left on device")
    for step in ("new_directory", "_write_config", "write_tensor_file"):
        with mock.patch(f"{SAVING}.{step}", side_effect=full), pytest.raises(OSError, match="No space"):
            randlora.files.save_merged(model, out, max_shard_size=SHARD)
    (place / "taken").mkdir(exist_ok=True)
    dist.barrier()
    with pytest.raises(MergeError, match="taken exists"):
        randlora.files.save_merged(model, place / "taken")
    dist.barrier()
    assert [path.name for path in place.iterdir()] == ["taken"]
    randlora.files.save_merged(model, out)


def test_what_fails_in_one_process_is_raised_in_all_and_leaves_nothing(pair: Processes, tmp_path: Path) -> None:
    pair.run(fail_in_one, "FSDP2", tmp_path, seconds=30)


@needs_deepspeed
def test_what_fails_in_one_process_under_zero_is_raised_in_all(zero_pair: Processes, tmp_path: Path) -> None:
    zero_pair.run(fail_in_one, "ZeRO-3", tmp_path, seconds=30)


def save_as_transformers_does(name: str, place: Path) -> None:
    """Call a model's own method in a block in which it writes the merged model, if that is whole."""
    own = mock.Mock(return_value="its own result")
    with mock.patch.object(Chain, "save_pretrained", lambda _, *args, **options: own(*args, **options), create=True):
        model: Any = {**ENGINES, **ZERO}[name]()
        inner = getattr(model, "module", model)
        with pytest.warns(UserWarning, match=r"for that, call randlora.files.save_merged\(model, directory\)"):
            inner.save_pretrained(place / "adapter")
        whole = dict(randlora.merged_tensors(model))
        with randlora.merged(model):
            with pytest.raises(MergeError, match=r"of a sharded model: call .*save_merged.* in all processes"):
                inner.save_pretrained(place / "merged")
            assert inner.save_pretrained(place / "merged", state_dict=whole) == "its own result"
    own.assert_called_once_with(place / "merged", state_dict=whole)
    assert not (place / "merged").exists()


def test_what_would_write_a_part_of_a_model_is_refused(pair: Processes, tmp_path: Path) -> None:
    pair.run(save_as_transformers_does, "FSDP2", tmp_path)


@needs_deepspeed
def test_what_would_write_a_part_of_a_model_under_zero_is_refused(zero_pair: Processes, tmp_path: Path) -> None:
    zero_pair.run(save_as_transformers_does, "ZeRO-3", tmp_path)


def language_model(name: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM  # which take long

    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    if name == "Mixtral":
        model: Any = MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=4))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True))
    randlora.inject(model, r=4, targets="all-linear")
    return fill(model)


def write_language_model(name: str, engine: str, place: Path) -> None:
    """Write a model of transformers that an engine spreads, its configs too, and load it with transformers."""
    model, one = language_model(name), language_model(name)
    if engine == "FSDP2":
        fully_shard(model.model.layers[0])
        fully_shard(model)
    else:
        model = engine_around(model, "3-experts" if name == "Mixtral" else "3")
    randlora.files.save_merged(model, place / "out", max_shard_size=4000)
    if dist.get_rank() == 0:
        randlora.files.save_merged(one, place / "one", max_shard_size=4000)
        assert contents(place / "out") == contents(place / "one")
        loaded = type(one).from_pretrained(place / "out").eval()
        ids = torch.arange(8)[None]
        with torch.no_grad(), randlora.merged(one):
            assert torch.equal(loaded(ids).logits, one.eval()(ids).logits)
    dist.barrier()


@pytest.mark.parametrize("name", ["tied Llama", "Mixtral"])
def test_a_model_of_transformers_is_written_for_it_to_load(pair: Processes, name: str, tmp_path: Path) -> None:
    pair.run(write_language_model, name, "FSDP2", tmp_path)


@needs_deepspeed
@pytest.mark.parametrize("name", ["tied Llama", "Mixtral"])
def test_a_model_of_transformers_under_zero_is_written_for_it_to_load(
    zero_pair: Processes, name: str, tmp_path: Path
) -> None:
    zero_pair.run(write_language_model, name, "ZeRO-3", tmp_path)


def write_from_a_mesh(kind: str, place: Path) -> None:
    model, mesh = DRAWN.adapted(), init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    if kind == "both":
        parallelize_module(model, mesh["tensor"], {"layers.0": ColwiseParallel(), "layers.1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"] if kind == "both" else mesh)
    randlora.files.save_merged(model, place / "out", max_shard_size=SHARD)
    if dist.get_rank() == 0:
        randlora.files.save_merged(DRAWN.adapted(), place / "one", max_shard_size=SHARD)
        assert contents(place / "out") == contents(place / "one")
    dist.barrier()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["replicated", "both"])
def test_files_of_a_mesh_of_two_dimensions_are_those_of_one_process(four: Processes, kind: str, tmp_path: Path) -> None:
    four.run(write_from_a_mesh, kind, tmp_path)
