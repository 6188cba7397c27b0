"""What is written and yielded of a model that any engine spreads: tensors and files of one process, one at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import randlora
from randlora.disk.formats import write_tensor_file
from randlora.errors import CheckpointError, MergeError
from randlora.sharded import places
from tests.distributed.engines import engine_around, engine_of
from tests.distributed.processes import For, Processes
from tests.distributed.test_fsdp_faults import failing_in_last
from tests.distributed.trained import Chain, Drawn
from tests.kit import Bits, all_bits, fill
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
    "ZeRO-2": lambda: engine_of(DRAWN, "2"),
    "ZeRO-3": lambda: engine_of(DRAWN, "3"),
    "ZeRO-3, init first": lambda: engine_of(DRAWN, "3", is_spread_first=True).module,
    "ZeRO-3, persistent": lambda: engine_of(DRAWN, "3-persistent").module,
    "ZeRO-3, offloaded": lambda: engine_of(DRAWN, "3-offload").module,
}
PARTS = "FSDP2", "FSDP2, offloaded", "tensor parallel"
"""Engines under which each process computes a part of a merged weight, which may round otherwise than all of it."""


def yield_and_write(name: str, place: Path) -> tuple[str, dict[str, Bits]]:
    one, model = DRAWN.adapted(), ENGINES[name]()
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
    return str(report), all_bits(found)


@pytest.mark.parametrize("name", ENGINES)
def test_tensors_and_files_are_those_of_one_process(processes_of: For, name: str, tmp_path: Path) -> None:
    (first, tensors), (second, others) = processes_of(name).run(yield_and_write, name, tmp_path)
    assert tensors == others
    wrote = randlora.files.save_merged(DRAWN.adapted(), tmp_path / "alone", max_shard_size=SHARD)
    assert wrote.shards > 2
    assert first == str(wrote).replace("alone", "out")
    left = f"another process, with a copy of the model, writes {tmp_path / 'out'}"
    assert second == (left if name in ("DDP", "FSDP, summoned", "ZeRO-2") else first)


@contextmanager
def watched(on: Any, name: str) -> Iterator[list[int]]:
    """Yield how many of the tensors that a function has returned are there whenever it returns another."""
    own, held, alive = getattr(on, name), list[Any](), list[int]()

    def watching(*args: Any, **options: Any) -> Tensor:
        found: Tensor = own(*args, **options)
        held.append(weakref.ref(found))
        alive.append(sum(each() is not None for each in held))
        return found

    with mock.patch.object(on, name, watching):
        yield alive


def write_and_count(name: str, place: Path) -> tuple[list[list[int]], int]:
    """Return how many gathered tensors there were at once in each call, and how many files this process wrote."""
    model = ENGINES[name]()
    on: tuple[Any, str] = (DTensor, "full_tensor") if name == "FSDP2" else (places, "gathered")
    written = mock.Mock(side_effect=write_tensor_file)
    counts: list[list[int]] = []
    verbs: list[Callable[[], object]] = [
        lambda: randlora.save(model, place / "adapter"),
        lambda: randlora.adapter_state(model),
        lambda: randlora.files.save_merged(model, place / "out", max_shard_size=SHARD),
    ]
    for verb in verbs:
        with watched(*on) as alive, mock.patch(f"{SAVING}.write_tensor_file", written):
            verb()
        counts.append(alive)
    return counts, written.call_count


@pytest.mark.parametrize("name", ["FSDP2", "ZeRO-3"])
def test_one_tensor_at_a_time_is_gathered(processes_of: For, name: str, tmp_path: Path) -> None:
    (of_first, files), (of_second, others) = processes_of(name).run(write_and_count, name, tmp_path)
    adapter = [1] * (3 * 2 + 2)  # Λ and Γ of three layers, and what is trained beside them
    assert of_first[:2] == of_second[:2] == [adapter, adapter]
    assert len(of_second[2]) > 10
    assert set(of_second[2]) == {1}, "the process that writes nothing holds one"
    assert (files > 2, others) == (True, 0)


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
    with pytest.raises(
        CheckpointError, match=r"it is sharded by FSDP: call this inside .*\.summon_full_params\(model\)"
    ):
        randlora.save(model, place / "out")
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        randlora.save(model, place / "summoned")
        with pytest.raises(MergeError, match="give the wrapper"):
            randlora.merged_tensors(inner)
    return errors


def test_a_model_that_is_flattened_is_refused_in_all_processes(pair: Processes, tmp_path: Path) -> None:
    first, second = pair.run(refuse, tmp_path)
    assert first == second
    for error in first[::2]:
        assert "call and iterate in a block of FullyShardedDataParallel.summon_full_params" in error
    assert not (tmp_path / "out").exists()
    randlora.save(DRAWN.adapted(), tmp_path / "one")
    assert contents(tmp_path / "summoned") == contents(tmp_path / "one")


def fail_in_one(name: str, place: Path) -> None:
    """Raise in one process at each place where it might, and find that all raise and nothing is left."""
    model = ENGINES[name]()
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


@pytest.mark.parametrize("name", ["FSDP2", "ZeRO-3"])
def test_what_fails_in_one_process_is_raised_in_all_and_leaves_nothing(
    processes_of: For, name: str, tmp_path: Path
) -> None:
    processes_of(name).run(fail_in_one, name, tmp_path, seconds=30)


def save_as_transformers_does(name: str, place: Path) -> None:
    """Call a model's own method in a block in which it writes the merged model, if that is whole."""
    own = mock.Mock(return_value="its own result")
    with mock.patch.object(Chain, "save_pretrained", lambda _, *args, **options: own(*args, **options), create=True):
        model: Any = ENGINES[name]()
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


@pytest.mark.parametrize("name", ["FSDP2", "ZeRO-3"])
def test_what_would_write_a_part_of_a_model_is_refused(processes_of: For, name: str, tmp_path: Path) -> None:
    processes_of(name).run(save_as_transformers_does, name, tmp_path)


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


@pytest.mark.parametrize(
    ("name", "engine"),
    [("tied Llama", "FSDP2"), ("Mixtral", "FSDP2"), ("tied Llama", "ZeRO-3"), ("Mixtral", "ZeRO-3")],
)
def test_a_model_of_transformers_is_written_for_it_to_load(
    processes_of: For, name: str, engine: str, tmp_path: Path
) -> None:
    processes_of(engine).run(write_language_model, name, engine, tmp_path)


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
