"""`routed`, pools and switched adapters in several processes, each of which has its own rows, and adapters."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import randlora
from randlora.errors import AdapterError, CheckpointError
from randlora.serving import AdapterPool, check_rows, routed
from tests.distributed.engines import ENGINES, sharded
from tests.distributed.processes import in_two, in_two_of_zero, on_all
from tests.distributed.trained import Drawn, distance, filled, optimizer_of, values
from tests.kit import Model

pytestmark = in_two

DRAWN = Drawn()


class Two(Drawn):
    def adapt(self, model: Model, name: str = "default") -> Model:
        super().adapt(model, name)
        randlora.inject(model, name="second", **self.options() | {"alpha": 6.0}, trainable=True)
        return filled(model, "second")


NAMES: dict[str, Callable[[int], list[str | None]]] = {
    "equal": lambda _: ["default", "second", None],
    "rotated": lambda rank: ["default", "second", None][rank:] + ["default", "second", None][:rank],
    "others": lambda rank: ["second" if rank else "default"] * 2 + [None],
    "none": lambda rank: [None if rank else "default"] * 3,
}


def require_trained_alike(one: Any, run: Any, case: Drawn, names: Callable[[int], list[str | None]]) -> None:
    before = values(one, only_trained=True)
    for each, ranks in ((one, range(2)), (run, [dist.get_rank()])):
        is_zero = hasattr(each, "backward")
        optimizer = each if is_zero else optimizer_of(each)
        for step in range(2):
            for own in ranks:
                with routed(each, names(own)):
                    loss = case.loss(each(*case.batch(own, step)), own) / len(ranks)
                    (each if is_zero else loss).backward(*[loss] if is_zero else [])
            optimizer.step()
            optimizer.zero_grad()
    found = values(getattr(run, "module", run), only_trained=True)
    assert distance(found, values(one, only_trained=True)) <= 1e-6
    assert distance(found, before) > 1e-3


EACH_ROUTED = (("FSDP2", "rotated"), ("FSDP2 first", "others"), ("DDP, unused", "others"), ("ZeRO-3", "equal"))


@pytest.mark.parametrize(("engine", "names"), EACH_ROUTED)
def test_rows_that_are_routed_run_with_the_bits_of_one_process_and_train_alike(engine: str, names: str) -> None:
    two, rank = Two(), dist.get_rank()
    one, model = two.adapted(), ENGINES[engine].make(two)
    with torch.no_grad():
        outputs = []
        for each in (one, model):
            with routed(each, NAMES[names](rank)):
                outputs.append([each(*two.batch(rank, step)) for step in (0, 1)])
        for expected, found in zip(*outputs, strict=True):
            assert torch.equal(found, expected)
            assert not torch.equal(found[0], found[2])
    require_trained_alike(one, model, two, NAMES[names])


def partly(case: Drawn) -> Any:
    model = case.adapted()
    fully_shard(model.blocks[1])
    return model


REFUSED = (
    ("FSDP2", "others", "after"),
    ("partly", "others", "after"),
    ("FSDP2 first", "none", "a row of any"),  # which would wait for gradients to average
    ("ZeRO-3", "rotated", "each row"),
    ("ZeRO-3", "none", "each row"),
)


@pytest.mark.parametrize(("engine", "names", "said"), REFUSED)
def test_rows_of_which_processes_would_mix_up_adapters_are_refused_in_all(engine: str, names: str, said: str) -> None:
    two, rank = Two(), dist.get_rank()
    one, model = two.adapted(), partly(two) if engine == "partly" else ENGINES[engine].make(two)
    refused = pytest.raises(AdapterError, match=f"have rows of different adapters.*{said}")
    for is_training in (True, False):
        is_mixed = is_training or engine == "ZeRO-3"
        with torch.set_grad_enabled(is_training), refused if is_mixed else nullcontext():
            with routed(model, NAMES[names](rank)):
                found = model(*two.batch(rank, 0))
            with routed(one, NAMES[names](rank)):
                assert torch.equal(found, one(*two.batch(rank, 0)))
    assert [each.is_active for each in randlora.adapters(getattr(model, "module", model))] == [True, False]


def test_a_pool_loads_other_adapters_in_each_process_with_the_bits_of_one(tmp_path: Path) -> None:
    rank = dist.get_rank()
    randlora.save_all(Two().adapted(), tmp_path / str(rank))
    sources = {"a": tmp_path / str(rank), "b": tmp_path / str(rank) / "second"}
    one, model = DRAWN.build(), sharded(DRAWN.build())
    with torch.no_grad():
        plain = one(*DRAWN.batch(rank, 0))
        pools = [AdapterPool(each, sources, max_loaded=1) for each in (one, model)]
        for name in "aba" if rank else "bbb":
            outputs = []
            for pool, each in zip(pools, (one, model), strict=True):
                with pool.routed([name, None, name]):
                    outputs.append(each(*DRAWN.batch(rank, 0)))
            assert torch.equal(*outputs)
            assert torch.equal(outputs[0][1], plain[1])
            assert not torch.equal(outputs[0][0], plain[0])
    assert [pool.loaded for pool in pools] == [("a",) if rank else ("b",)] * 2


def test_what_a_process_lacks_in_a_block_of_a_pool_stops_all_and_changes_nothing(tmp_path: Path) -> None:
    rank, model = dist.get_rank(), sharded(DRAWN.build())
    randlora.save(Two().adapted(), place := tmp_path / str(rank), name="second")
    sources = {"a": place, "lacking": tmp_path / "lacking"}
    pool, rows = AdapterPool(model, sources, max_loaded=1), DRAWN.batch(rank, 0)
    with torch.no_grad():
        plain = model(*rows)
        for names in ("a", None), ("lacking", "a"), ("a", "lacking"), (None, "a"):
            own = names[rank]
            before = randlora.adapters(model), pool.loaded
            refused = pytest.raises(CheckpointError, match=r"cannot load .*lacking")
            with refused if "lacking" in names else nullcontext(), pool.routed([own] * 3):
                assert torch.equal(model(*rows), plain) is (own is None)
            if "lacking" in names:
                assert (randlora.adapters(model), pool.loaded) == before
    assert on_all(pool.loaded) == [("a",)] * 2


def test_an_adapter_that_no_row_has_does_not_matter() -> None:
    """Such as one that is sharded, where the rows are of others that are whole in each process."""
    one, model = DRAWN.adapted(), sharded(DRAWN.adapted())
    for each in (one, model):
        for name in ("b", "c"):
            randlora.inject(each, name=name, **DRAWN.options(), trainable=True)
            filled(each, name)
    require_trained_alike(one, model, DRAWN, lambda own: ["c" if own else "b"] * 3)


@torch.no_grad()
def test_rows_are_checked_before_any_other_forward_has_made_weights_whole() -> None:
    two, rows = Two(), Two().batch(dist.get_rank(), 0)
    one, model = two.adapted(), sharded(two.adapted())
    check_rows(model, NAMES["equal"](0), *rows)
    assert torch.equal(model(*rows), one(*rows))


@in_two_of_zero
@torch.no_grad()
def test_adapters_of_an_engine_of_zero_3_are_switched_once_all_of_them_have_run() -> None:
    """As docs/limits.md says: DeepSpeed refuses those that it has not seen in its first forward."""
    two, rows = Two(), Two().batch(dist.get_rank(), 0)
    one, run = two.adapted(), ENGINES["ZeRO-3"].make(two)
    for names in (["default", "second"], "second", "second", "default", "default"):
        for each in (one, run.module):
            randlora.activate(each, names)
        torch.testing.assert_close(run(*rows), one(*rows))
        with randlora.disabled(run.module), randlora.disabled(one):
            torch.testing.assert_close(run(*rows), one(*rows))
