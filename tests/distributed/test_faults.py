"""What fails in one process is raised in all and changes nothing, what would let them differ is refused, one writes."""

from __future__ import annotations

import copy
import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

import randlora
from randlora.checkpoint.contents import Value
from randlora.disk.formats import TensorFile, write_tensor_file
from randlora.errors import AdapterError, CheckpointError, MergeError, RandLoRAError
from randlora.layers.base import AdapterLayer
from randlora.model import merge
from randlora.sharded import places
from tests.distributed.engines import ENGINES, built_spread, flattened, sharded, split
from tests.distributed.processes import in_four, in_two, in_two_of_zero, on_all
from tests.distributed.trained import Drawn, Net, gathered, held
from tests.model_directories import contents
from tests.pages import snippet

pytestmark = in_two

DRAWN, NARROW = Drawn(train_also=("norm",)), Drawn(train_also=("blocks.0.norm",))
SAVING, WRITER = "randlora.files.save_merged", "randlora.files.save_merged.write_tensor_file"
GATHER: dict[str, tuple[str, Any]] = {"FSDP2": ("full_tensor", DTensor), "ZeRO-3": ("gathered", places)}


@contextmanager
def failing_in_last(method: str, on: Any, call: int, error: BaseException | None = None) -> Iterator[None]:
    """Have one call of a method raise in the last process, once it has returned; all get an error of memory."""
    own, calls = getattr(on, method), count()

    def failing(*args: Any, **options: Any) -> Any:
        result = own(*args, **options)
        if next(calls) == call and dist.get_rank() == dist.get_world_size() - 1:
            raise error or MemoryError("no room")
        return result

    raised = nullcontext() if error else pytest.raises(MemoryError, match="no room")
    with mock.patch.object(on, method, failing), raised:
        yield


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    before = held(model)
    yield
    found = held(model)
    assert all(torch.equal(found[name], value) for name, value in before.items())


@pytest.mark.parametrize("engine", [*GATHER, "ZeRO-3, persistent"])
def test_a_merge_that_fails_in_one_process_is_undone_in_all(engine: str) -> None:
    run = ENGINES[engine].make(DRAWN)
    model, rows = getattr(run, "module", run), DRAWN.batch(dist.get_rank(), 5)
    expected = run(*rows).detach()
    gathers = GATHER[engine.partition(",")[0]]
    writes = "write", places.Sharded if engine == "FSDP2" else places.Spread
    faults: list[tuple[tuple[str, Any], int]] = [
        (gathers, 0),
        (gathers, 1),
        (("require_finite", merge), 2),
        (writes, 1),
    ]
    for reversible in (False, True):
        for failing, call in faults:
            with restored(model), failing_in_last(*failing, call):
                randlora.merge(run, reversible=reversible)
            assert torch.equal(run(*rows), expected)
    with randlora.merged(run):
        torch.testing.assert_close(run(*rows), expected)
    randlora.merge(model)


@pytest.mark.parametrize("engine", GATHER)
def test_what_fails_in_one_process_is_raised_in_all_and_leaves_nothing(engine: str, tmp_path: Path) -> None:
    model = ENGINES[engine].make(DRAWN)
    model, out = getattr(model, "module", model), tmp_path / "out"
    verbs: dict[Callable[[], object], tuple[int, ...]] = {
        lambda: randlora.save(model, out): (0, 1),
        lambda: dict(randlora.merged_tensors(model)): (0, 2, 5),  # Λ, the weight, and what has no adapter
        lambda: randlora.files.save_merged(model, out): (0, 2, 5),
    }
    with restored(model):
        for verb, calls in verbs.items():
            for call in calls:
                with failing_in_last(*GATHER[engine], call):
                    verb()
        full = OSError(28, "No space left on device")
        for step in (f"{SAVING}.new_directory", f"{SAVING}._write_config", WRITER):
            with mock.patch(step, side_effect=full), pytest.raises(OSError, match="No space"):
                randlora.files.save_merged(model, out, max_shard_size=1000)
        (tmp_path / "taken").mkdir(exist_ok=True)
        dist.barrier()
        with pytest.raises(MergeError, match="taken exists"):
            randlora.files.save_merged(model, tmp_path / "taken")
        dist.barrier()
        assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    randlora.files.save_merged(model, out)


@pytest.mark.parametrize("engine", GATHER)
def test_a_save_that_fails_half_way_leaves_the_files_that_were_there(engine: str, tmp_path: Path) -> None:
    run = ENGINES[engine].make(Drawn())
    model = getattr(run, "module", run)
    randlora.inject(model, r=2, targets=["up"], name="second", trainable=False)
    randlora.save_all(model, tmp_path / "old")
    dist.barrier()
    before, write = contents(tmp_path), TensorFile.write
    for out, full in (("old", "blocks.0.down"), ("new", "/second/")):  # in the middle of the first, and the second

        def fill_up(file: TensorFile, tensor: Any, full: str = full) -> None:
            if full in f"{file._path} {tensor.name}":
                raise OSError(28, "No space left on device")
            write(file, tensor)

        with mock.patch.object(TensorFile, "write", fill_up), pytest.raises(OSError, match="No space left") as caught:
            randlora.save_all(model, tmp_path / out)
        assert len(set(on_all(str(caught.value)))) == 1
        assert contents(tmp_path) == before
    for name, parameter in model.named_parameters():
        if "blocks.1" in name and "gamma" in name:
            with gathered([parameter]), torch.no_grad():
                (parameter._local_tensor if isinstance(parameter, DTensor) else parameter).fill_(torch.nan)
    said = r"3 problems:\n.*Γ of blocks\.1\.up holds NaN.*\n.*Γ of blocks\.1\.down holds NaN.*\n.*Γ of blocks\.1\.up"
    with pytest.raises(CheckpointError, match=said) as refused:
        randlora.save_all(model, tmp_path / "old")
    assert len(set(on_all(str(refused.value)))) == 1
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.rglob("*") if path.is_dir()] == ["old", "second"]


def test_a_wrong_argument_of_one_process_is_an_error_in_all(tmp_path: Path) -> None:
    model, is_last = sharded(DRAWN.adapted()), dist.get_rank() == 1
    randlora.inject(model, r=2, targets=["up"], name="second", active=False)
    wrong: Any = 2  # of a type that no argument has
    unknown: dict[str, Any] = {"alhpa": 2} if is_last else {}
    given: dict[Callable[[], object], str] = {
        lambda: randlora.save(model, wrong if is_last else tmp_path / "out", name="default"): "directory must be",
        lambda: randlora.inject(model, r=2, targets=["up"], name=wrong if is_last else "third"): "named 2",
        lambda: randlora.delta_weight(model, "head" if is_last else "blocks.0.up"): "'head' is not adapted",
        lambda: randlora.merge(model, reversible=True, dtype=wrong if is_last else None): "dtype",
        lambda: randlora.inject(model, r=2, name="third", **unknown): "unknown option alhpa=",
    }
    for verb, said in given.items():
        with restored(model), pytest.raises(RandLoRAError, match=said) as caught:
            verb()
        assert len({*on_all(str(caught.value))}) == 1
    assert [info.name for info in randlora.adapters(model)] == ["default", "second"]
    assert not (tmp_path / "out").exists()


def test_an_unmerge_that_fails_in_one_process_is_tried_again() -> None:
    model = sharded(DRAWN.adapted())
    with restored(model):
        randlora.merge(model, reversible=True)
        with failing_in_last("restore_original", AdapterLayer, 0):
            randlora.unmerge(model)
        randlora.unmerge(model)
        fails = pytest.raises(MemoryError) if dist.get_rank() else nullcontext()
        with fails, failing_in_last("restore_original", AdapterLayer, 0, MemoryError()), randlora.merged(model):
            pass  # whose end waits for nobody, and tries it again
        with pytest.raises(MergeError, match="not merged"):
            randlora.unmerge(model)
    randlora.merge(model)


def test_a_merge_that_is_interrupted_is_undone() -> None:
    for reversible, last in ((False, "detach_all"), (True, "MergeReport")):
        model = sharded(DRAWN.adapted())
        expected = model(*DRAWN.batch(0, 0))
        with mock.patch.object(merge, last, side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            randlora.merge(model, reversible=reversible)
        assert torch.equal(model(*DRAWN.batch(0, 0)), expected)


@pytest.mark.parametrize("engine", GATHER)
def test_blocks_of_merged_wait_for_no_other_at_their_end_and_none_is_entered_while_one_is_open(engine: str) -> None:
    run = ENGINES[engine].make(DRAWN)
    model, has_failed, first = getattr(run, "module", run), False, ExitStack()
    with restored(model):
        with suppress(ZeroDivisionError), randlora.merged(model):
            if dist.get_rank() == 0:
                dist.recv(torch.zeros(1), 1)  # of what is sent after the other's block
            raise ZeroDivisionError
        if dist.get_rank():
            dist.send(torch.zeros(1), 0)
        try:
            with randlora.merged(model):
                assert 1 / (1 - dist.get_rank())
        except ZeroDivisionError:
            has_failed = True
        assert on_all(has_failed) == [False, True], "which it may tell at once"
    with restored(model):
        first.enter_context(randlora.merged(model))
        if dist.get_rank() == 0:
            first.close()
        inside = held(model)
        with pytest.raises(MergeError, match="is open already, whose end would"), randlora.merged(model):
            pytest.fail("the block was entered")
        assert all(torch.equal(value, inside[name]) for name, value in held(model).items())
        first.close()
        with randlora.merged(model):
            pass


@pytest.mark.parametrize("engine", GATHER)
def test_a_consumer_of_merged_tensors_that_fails_in_one_process_is_told_to_all(engine: str) -> None:
    model, taken = ENGINES[engine].make(DRAWN), list[str]()

    def load_weight(name: str, tensor: Tensor) -> None:
        if dist.get_rank() == 1 and len(taken) == 3:
            raise ZeroDivisionError(f"{name} of {tensor.shape}")
        taken.append(name)

    code = snippet("rollouts.md", "all_gather_object")
    scope = {"dist": dist, "randlora": randlora, "model": model, "load_weight": load_weight}
    with pytest.raises(RuntimeError, match=r"not loaded: \[None, .ZeroDivisionError"):
        exec(code, scope)
    names = [name for name, _ in randlora.merged_tensors(model)]
    assert on_all(taken) == [names, names[:3]]


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, *used: int) -> Tensor:
        for expert in used:
            x = self.experts[expert](x)
        return x


def test_gradients_that_a_process_lacks_count_as_zero_and_one_collective_averages_all() -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = Experts()
    one = copy.deepcopy(model)
    fully_shard(model)
    for each in (model, one):
        randlora.inject(each, r=2, targets=r"experts\.\d")
    x = torch.randn(ranks, 2, 8)
    for expert, of_one in ((1, (1,) * ranks), (rank, range(ranks))):
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as collective:
            model(x[rank], expert).sum().backward()
        assert collective.call_count == 1
        sum(one(rows, own).sum() / ranks for rows, own in zip(x, of_one, strict=True)).backward()
    assert any(each.grad is None for each in randlora.trainable_parameters(one)), "of what no process uses"
    for found, expected in zip(randlora.trainable_parameters(model), randlora.trainable_parameters(one), strict=True):
        assert (found.grad is None) == (expected.grad is None)
        if expected.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad)


def test_copies_that_nothing_would_average_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8))
    fully_shard(model[0])
    refused = r"cannot train copies of 2\.weight, 2\.bias: they are not sharded"
    with pytest.raises(AdapterError, match=refused):
        randlora.inject(model, r=2, targets=["0", "1"], train_also=["2"])
    assert type(model[1]) is nn.Linear
    randlora.inject(model, r=2, targets=["0", "1"], train_also=["2"], trainable=False)
    randlora.activate(model, "default")
    randlora.set_trainable(model, "default", trainable=False)
    with pytest.raises(AdapterError, match=refused):
        randlora.set_trainable(model, "default")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    randlora.inject(model, r=2, targets=["0", "1"], trainable=False, name="second")
    randlora.activate(model, "second")
    randlora.set_trainable(model, "second")


def test_an_adapter_of_a_whole_weight_beside_those_of_several_meshes_is_refused() -> None:
    model, mesh = (
        nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))),
        init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b")),
    )
    for layer, name in zip(model, "ab", strict=False):
        fully_shard(layer, mesh=mesh[name])
    with pytest.raises(AdapterError, match=r"over several meshes, because .*: inject before fully_shard"):
        randlora.inject(model, r=2, targets=["2"])
    assert type(model[2]) is nn.Linear
    randlora.inject(model, r=2, targets=["0"])


def test_copies_of_sharded_parameters_are_made_without_gathering() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    fully_shard(model)
    with mock.patch.object(DTensor, "full_tensor", side_effect=AssertionError("gathers")):
        randlora.inject(model, r=2, targets=["0"])
        randlora.inject(model, r=2, targets=["0"], train_also=["1"], name="second", trainable=True)
        randlora.activate(model, "second")
    model(torch.randn(2, 8)).sum().backward()
    assert torch.equal(held(model)["1.weight"], torch.ones(4))
    assert model.get_parameter("1.weight").grad is not None


def test_a_torch_that_hides_what_is_sharded_is_missed_loudly() -> None:
    composable = vars(torch.distributed)["_composable_state"]
    model, plain, adapted = sharded(DRAWN.build()), DRAWN.build(), sharded(DRAWN.adapted())
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(composable, "_module_state_mapping")
        with pytest.raises(AdapterError, match="does not tell which modules fully_shard was called on"):
            DRAWN.adapt(model)
        assert not randlora.state.is_adapted(model)
        DRAWN.adapt(plain)
        with pytest.raises(AdapterError, match="use a different version of torch"):
            randlora.merge(adapted)
    DRAWN.adapt(model)


def test_a_flattened_model_is_refused_in_all_processes_but_for_what_is_whole(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Embedding(8, 6), nn.Linear(6, 6))
    randlora.inject(plain, r=2, train_rows={"0": [3, 5]})
    expected, model = randlora.adapter_state(plain), flattened(plain)
    with pytest.raises(CheckpointError, match=r"rows of 0\.weight has shape .*inside .*\.summon_full_params\(model\)"):
        randlora.adapter_state(model)
    with model.summon_full_params(model):
        assert randlora.adapter_state(model).metadata == expected.metadata
    model = flattened(Drawn().adapted())
    inner: Any = model.module
    for verb in (randlora.merged_tensors, lambda each: randlora.files.save_merged(each, tmp_path / "out")):
        for given, said in ((model, "call and iterate in a block of FullyShardedDataParallel.summon"), (inner, "")):
            with pytest.raises(MergeError, match=said) as caught:
                verb(given)
            first, second = on_all(str(caught.value))
            assert first == second
    with pytest.raises(CheckpointError, match=r"is sharded by FSDP: call this inside .*\.summon_full_params\(model\)"):
        randlora.save(model, tmp_path / "out")
    with model.summon_full_params(model), pytest.raises(MergeError, match="give the wrapper"):
        randlora.merged_tensors(inner)
    assert not (tmp_path / "out").exists()


@in_two_of_zero
def test_copies_that_cannot_be_made_in_one_process_raise_in_all() -> None:
    model = built_spread(DRAWN, "3")
    with failing_in_last("gathered", places, 0):
        DRAWN.adapt(model)
    assert randlora.adapters(model) == []
    DRAWN.adapt(model)


@in_two_of_zero
def test_in_a_block_that_gathers_all_parameters_one_process_saves_alone(tmp_path: Path) -> None:
    model = ENGINES["ZeRO-3"].make(DRAWN).module
    with gathered(model.parameters()):
        if dist.get_rank():
            randlora.save(model, tmp_path / "alone")
        dist.barrier()
    randlora.save(model, tmp_path / "all")
    dist.barrier()
    assert contents(tmp_path / "alone") == contents(tmp_path / "all")


@pytest.mark.parametrize("engine", ["ZeRO-3", "ZeRO-3, persistent"])
def test_norms_under_zero_3_are_neither_trained_nor_limited(engine: str) -> None:
    model = ENGINES[engine].make(DRAWN).module
    with pytest.raises(AdapterError, match=r"would give no gradients .* under torch\.no_grad"):
        randlora.update_norms(model)
    with pytest.raises(AdapterError, match="is partitioned by ZeRO-3, whose optimizer has copies"):
        randlora.limit_norms(model, 1.0)


@contextmanager
def watched(name: str, on: Any, at_most: int | None = None) -> Iterator[list[int]]:
    """Count the tensors alive at each call, once the thread of gloo has let go of what it gathered."""
    own, held, alive = getattr(on, name), list[StorageWeakRef](), list[int]()

    def watching(*args: Any, **options: Any) -> Tensor:
        found: Tensor = own(*args, **options)
        held.append(StorageWeakRef(found.untyped_storage()))
        deadline = time.monotonic() + (0 if at_most is None else 2)
        while (now := sum(not each.expired() for each in held)) > (at_most or 0) and time.monotonic() < deadline:
            time.sleep(0.001)
        alive.append(now)
        return found

    with mock.patch.object(on, name, watching):
        yield alive


@pytest.mark.parametrize("engine", GATHER)
def test_one_tensor_at_a_time_is_gathered(engine: str, tmp_path: Path) -> None:
    model, count = ENGINES[engine].make(NARROW), 5 * 2 + 2  # Λ and Γ of five layers, and what is trained beside them
    verbs: list[tuple[Callable[[], object], list[list[int]]]] = [
        (partial(randlora.save, model, tmp_path / "adapter"), [[1] * count, []]),  # by the process that writes
        (partial(randlora.adapter_state, model), [[*range(1, count + 1)]] * 2),
    ]
    for verb, expected in verbs:
        with watched(*GATHER[engine], at_most=1) as alive, watched("stored", Value) as copies:
            verb()
        assert alive == [1] * count
        assert on_all(copies) == expected
    written = mock.Mock(side_effect=write_tensor_file)
    with watched(*GATHER[engine], at_most=3 if dist.get_rank() else None) as alive, mock.patch(WRITER, written):
        randlora.files.save_merged(model, tmp_path / "out", max_shard_size=1000)
    files, others = on_all(written.call_count)
    assert (files > 2, others) == (True, 0)
    assert len(alive) > 10
    assert dist.get_rank() == 0 or max(alive) <= 3, "the process that writes nothing holds a weight, its Λ and its Γ"


class Saver(Net):
    def save_pretrained(self, save_directory: Path) -> None:
        raise AssertionError(f"writes {save_directory} without the adapter")


@pytest.mark.parametrize(
    "order", ["inject, shard", "split, inject", pytest.param("inject, split, shard", marks=[in_four, pytest.mark.slow])]
)
def test_one_process_writes_and_all_learn_of_errors(order: str, tmp_path: Path) -> None:
    model, world = Saver(8, 12, 11), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
    for step in order.split(", "):
        match step:
            case "inject":
                randlora.inject(model, r=3, targets=["up", "down"], save_pretrained="adapter")
            case "split":
                split(model, mesh["tensor"])
            case "shard":
                fully_shard(model, mesh=mesh["data" if "split" in order else "tensor"])
    (tmp_path / "file").touch()
    save_module = importlib.import_module("randlora.checkpoint.save")
    written = mock.Mock(side_effect=save_module.staged_files)
    with mock.patch.object(save_module, "staged_files", written):
        saved = randlora.save(model, tmp_path / "adapter")
        assert saved.nbytes > 0
        model.save_pretrained(tmp_path / "other")
        for write in (partial(randlora.save, model), model.save_pretrained):
            with pytest.raises(CheckpointError) as caught:
                write(tmp_path / "file")
            assert len(set(on_all(str(caught.value)))) == 1
    assert on_all(written.call_count) == [2] + [0] * (world - 1)
    assert any("nothing has trained it" in note for note in saved.notes) == (order == "split, inject")
    tensors = randlora.adapter_state(model).tensors
    assert {bool(value.any()) for name, value in tensors.items() if "lambda" in name} == {False}
    assert (tmp_path / "other" / "adapter_model.safetensors").exists()
