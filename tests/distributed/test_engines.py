"""Under every engine a model is trained, saved, merged, switched and ejected as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

import randlora
from randlora.errors import AdapterError, CheckpointError
from tests.distributed.engines import ENGINES, IN_FOUR, IN_TWO, Engine, trained
from tests.distributed.processes import LAW, in_four, in_two, on_all
from tests.distributed.trained import (
    Case,
    Drawn,
    distance,
    drawn_models,
    held,
    require_equal_on_ranks,
    trained_alone,
    values,
)
from tests.kit import all_bits, fill
from tests.model_directories import contents

SIZE = 1000
"""Bytes of a file of a merged model, which are a few of the tensors."""


def as_one_process(engine: Engine, case: Case, place: Path) -> Any:
    """Assert that an engine does what one process does, but for ends of an adapter; return what is run, and the one."""
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
        assert distance(found, values(one, only_trained=True)) <= engine.within
        assert distance(found, before) > 1e-4, "nothing was trained"
        with torch.no_grad():
            for name, value in found.items():
                one.get_parameter(name).copy_(value)
    if isinstance(model, FSDPModule):
        run(*case.batch(0, 9))  # after which the outermost module holds whole parameters
    with engine.whole(run):
        same_files(engine, case, one, run, place)
    return one, run


def same_files(engine: Engine, case: Case, one: Any, run: Any, place: Path) -> None:
    """Compare what is saved with what one process with the same values saves."""
    if engine.is_trained:
        mine, state = randlora.adapter_state(run), randlora.adapter_state(one)
        assert (mine.metadata, all_bits(mine.tensors)) == (state.metadata, all_bits(state.tensors))
    assert randlora.save(run, place / "adapter").nbytes > 0
    tensors, entries = dict(randlora.merged_tensors(run)), dict(randlora.merged_tensors(one))
    assert [*tensors] == [*entries]
    for name, tensor in entries.items():
        if engine.is_split:
            close(engine, tensors[name], tensor)
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
    """Compare updates and merged models, and find that every bit of this process is restored."""
    model, inputs = getattr(run, "module", run), case.batch(dist.get_rank() // engine.sharing, 9)
    output, kept = run(*inputs).detach(), held(model)
    close(engine, output, one(*inputs))
    for fqn in randlora.adapters(one)[0].options:
        close(engine, randlora.delta_weight(model, fqn), randlora.delta_weight(one, fqn))
    with torch.no_grad(), randlora.merged(one):
        expected = one(*inputs)
    with torch.no_grad(), randlora.merged(run):
        assert held(model)  # from which whole parameters are gathered anew
        close(engine, run(*inputs), expected)
    assert torch.equal(run(*inputs), output)
    randlora.merge(model, reversible=True)
    assert held(model)
    close(engine, run(*inputs), expected)
    randlora.unmerge(model)
    assert all(torch.equal(value, kept[name]) for name, value in held(model).items())
    assert torch.equal(run(*inputs), output)


def close(engine: Engine, found: Tensor, expected: Tensor) -> None:
    """Assert equality but for sums in another order, as a share of the largest value."""
    within = engine.within if torch.float32 in (found.dtype, expected.dtype) else 1e-12
    scale = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=0, atol=within * scale)


def switch_and_end(engine: Engine, case: Case, one: Any, run: Any) -> None:
    """Exchange the values, disable the adapter and eject it, as far as an engine lets its parameters be replaced."""
    model, plain = getattr(run, "module", run), case.build()
    inputs = case.batch(dist.get_rank() // engine.sharing, 9)
    output = run(*inputs).detach()
    changed = randlora.adapter_state(fill(one, seed=7))
    is_spread = any(hasattr(each, "ds_id") for each in model.parameters())
    if is_spread:
        with pytest.raises(CheckpointError, match=r"engine\.load_checkpoint"):  # the optimizer would overwrite them
            randlora.swap(model, changed)
        assert torch.equal(run(*inputs), output)
    else:
        own = held(model) and [*map(id, model.parameters())]
        randlora.swap(model, changed)
        assert held(model)
        assert own == [*map(id, model.parameters())]
        close(engine, output := run(*inputs).detach(), one(*inputs))
    if is_spread and case.train_also:
        for call in (lambda: randlora.activate(model, []), lambda: randlora.disabled(model).__enter__()):
            with pytest.raises(AdapterError, match=r"norm\.\w+ would have to become a different parameter object"):
                call()
    else:
        with torch.no_grad(), randlora.disabled(model):
            close(engine, run(*inputs), plain(*inputs))
    assert torch.equal(run(*inputs), output)
    trained(run, case, dist.get_rank() // engine.sharing, 1)
    require_equal_on_ranks(values(model, only_trained=True))
    randlora.eject(model)
    with torch.no_grad():
        close(engine, run(*inputs), plain(*inputs))
    assert distance(values(model), values(plain)) == 0


def require_as_one_process(engine: Engine, case: Case, place: Path) -> None:
    """Assert all laws of an engine."""
    models = as_one_process(engine, case, place)
    if engine.is_trained:
        merge_and_back(engine, case, *models)
        switch_and_end(engine, case, *models)


@settings(LAW, max_examples=1)
@given(drawn=drawn_models)
@example(drawn=Drawn(hidden=1, rows=9, r=4, basis="block", train_also=("norm",)))
@in_two
@pytest.mark.parametrize("engine", IN_TWO)
def test_a_model_is_trained_saved_merged_and_ejected_as_in_one_process(
    engine: str, drawn: Drawn, tmp_path: Path
) -> None:
    require_as_one_process(ENGINES[engine], ENGINES[engine].suited(drawn), tmp_path)


@in_four
@pytest.mark.parametrize("engine", IN_FOUR)
def test_a_mesh_of_two_dimensions(engine: str, tmp_path: Path) -> None:
    require_as_one_process(ENGINES[engine], Drawn(train_also=("norm",)), tmp_path)
