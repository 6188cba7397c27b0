"""One process writes the files of a spread model, all learn of errors, and one tensor at a time is gathered."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import randlora
from randlora.disk.formats import write_tensor_file
from randlora.errors import CheckpointError, MergeError
from tests.distributed.engines import ENGINES, split
from tests.distributed.processes import in_four, in_two, on_all
from tests.distributed.test_engines import PLANS
from tests.distributed.test_faults import GATHER, SAVING
from tests.distributed.trained import Drawn, Net
from tests.model_directories import contents

DRAWN = Drawn(train_also=("blocks.0.norm",))


@contextmanager
def watched(name: str, on: Any) -> Iterator[list[int]]:
    """Yield how many of the tensors that a function has returned are there whenever it returns another."""
    own, held, alive = getattr(on, name), list[Any](), list[int]()

    def watching(*args: Any, **options: Any) -> Tensor:
        found: Tensor = own(*args, **options)
        held.append(weakref.ref(found))
        alive.append(sum(each() is not None for each in held))
        return found

    with mock.patch.object(on, name, watching):
        yield alive


@in_two
@pytest.mark.parametrize("engine", GATHER)
def test_one_tensor_at_a_time_is_gathered(engine: str, tmp_path: Path) -> None:
    model = ENGINES[engine].make(DRAWN)
    for verb in (partial(randlora.save, model, tmp_path / "adapter"), partial(randlora.adapter_state, model)):
        with watched(*GATHER[engine]) as alive:
            verb()
        assert alive == [1] * (5 * 2 + 2)  # Λ and Γ of five layers, and what is trained beside them
    written = mock.Mock(side_effect=write_tensor_file)
    with watched(*GATHER[engine]) as alive, mock.patch(f"{SAVING}.write_tensor_file", written):
        randlora.files.save_merged(model, tmp_path / "out", max_shard_size=1000)
    files, others = on_all(written.call_count)
    assert (files > 2, others) == (True, 0)
    assert len(alive) > 10
    assert dist.get_rank() == 0 or set(alive) == {1}, "the process that writes nothing holds one"


class Saver(Net):
    """A model with the method of transformers' models."""

    def save_pretrained(self, save_directory: Path) -> None:
        raise AssertionError(f"writes {save_directory} without the adapter")


def save_in_each(order: str, place: Path) -> None:
    """Save by each way that there is: the first process writes, and all get the errors where none could."""
    model, world = Saver(8, 12, 11), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
    steps: dict[str, Callable[[], object]] = {
        "inject": lambda: randlora.inject(model, r=3, targets=["up", "down"], save_pretrained="adapter"),
        "shard": lambda: fully_shard(model, mesh=mesh["data" if "split" in order else "tensor"]),
        "split": lambda: split(model, mesh["tensor"]),
    }
    for step in order.split(", "):
        steps[step]()
    (place / "file").touch()
    save_module = importlib.import_module("randlora.checkpoint.save")  # the package has a function of this name
    written = mock.Mock(side_effect=save_module.write_files)
    with mock.patch.object(save_module, "write_files", written):
        assert randlora.save(model, place / "adapter").nbytes > 0
        model.save_pretrained(place / "other")
        for write in (partial(randlora.save, model), model.save_pretrained):
            with pytest.raises(CheckpointError) as caught:
                write(place / "file")
            assert len(set(on_all(str(caught.value)))) == 1
    assert on_all(written.call_count) == [2] + [0] * (world - 1)
    assert (place / "other" / "adapter_model.safetensors").exists()


@in_two
@pytest.mark.parametrize("order", ["inject, shard", "split, inject"])
def test_one_process_writes_and_all_learn_of_errors(order: str, tmp_path: Path) -> None:
    save_in_each(order, tmp_path)


@in_four
def test_one_process_of_a_mesh_of_two_dimensions_writes(tmp_path: Path) -> None:
    save_in_each("inject, split, shard", tmp_path)


@in_two
@pytest.mark.parametrize("engine", GATHER)
def test_what_would_write_a_part_of_a_model_is_refused(engine: str, tmp_path: Path) -> None:
    """A model's own method in a block of `merged` would write the merged model, if that were whole."""
    own = mock.Mock(return_value="its own result")
    with mock.patch.object(Net, "save_pretrained", lambda _, *args, **options: own(*args, **options), create=True):
        model: Any = ENGINES[engine].make(DRAWN)
        inner = getattr(model, "module", model)
        with pytest.warns(UserWarning, match=r"for that, call randlora.files.save_merged\(model, directory\)"):
            inner.save_pretrained(tmp_path / "adapter")
        whole = dict(randlora.merged_tensors(model))
        with randlora.merged(model):
            with pytest.raises(MergeError, match=r"of a sharded model: call .*save_merged.* in all processes"):
                inner.save_pretrained(tmp_path / "merged")
            assert inner.save_pretrained(tmp_path / "merged", state_dict=whole) == "its own result"
    own.assert_called_once_with(tmp_path / "merged", state_dict=whole)


@in_two
@pytest.mark.parametrize(("name", "engine"), [("llama", "ZeRO-3"), ("mixtral", "ZeRO-3, experts"), ("llama", "FSDP2")])
def test_a_model_of_transformers_is_written_for_it_to_load(name: str, engine: str, tmp_path: Path) -> None:
    """With its configs, as one process does, also of tied weights."""
    config = PLANS[name].config | {"tie_word_embeddings": name == "llama"}
    case = replace(PLANS[name], config=config, adapter={"targets": "all-linear"}).written(tmp_path / "base")
    one, model = case.adapted(), ENGINES[engine].make(case)
    randlora.files.save_merged(model, tmp_path / "out", max_shard_size=4000)
    if dist.get_rank() == 0:
        randlora.files.save_merged(one, tmp_path / "one", max_shard_size=4000)
        assert contents(tmp_path / "out") == contents(tmp_path / "one")
        loaded, inputs = replace(case, place=tmp_path / "out").build(), case.batch(0, 0)
        with torch.no_grad(), randlora.merged(one):
            assert torch.equal(loaded(*inputs), one(*inputs))
    dist.barrier()
