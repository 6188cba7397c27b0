"""Models that accelerate offloads to RAM or to disk: merged and unmerged there, trained, adapted before and after."""

import copy
import gc
import json
import pickle
import re
import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import accelerate  # type: ignore[import-untyped]
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file  # type: ignore[import-untyped]
from accelerate.hooks import (  # type: ignore[import-untyped]
    AlignDevicesHook,
    add_hook_to_module,
    remove_hook_from_submodules,
)
from accelerate.utils import DistributedType, align_module_device, modeling  # type: ignore[import-untyped]
from safetensors.torch import save_file
from torch import Tensor, nn

import randlora
from randlora import offloaded as offloaded_module
from randlora.errors import AdapterError, CheckpointError, MergeError
from randlora.offloaded import MergedFile, Offloaded
from randlora.places import Plain, place_of
from tests.kit import adapter_values, bits, fill
from tests.model_directories import contents
from tests.models import LLAMA, outputs

CPU = torch.device("cpu")
WIDTHS = 12, 20, 12


class Small(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32, *, shared: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up, self.down = (nn.Linear(a, b, dtype=dtype) for a, b in pairwise(WIDTHS))
        if shared:
            self.again = self.up
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.down(torch.tanh(self.up(x))))
        return torch.tanh(self.again(hidden)) if hasattr(self, "again") else hidden


def in_ram(model: nn.Module, folder: Path) -> Any:
    return accelerate.cpu_offload(model, execution_device=CPU, offload_buffers=True)


def on_disk(model: nn.Module, folder: Path) -> Any:
    return accelerate.disk_offload(model, folder / "offloaded", execution_device=CPU, offload_buffers=True)


def dispatched(model: nn.Module, folder: Path) -> Any:
    device_map = {name: "disk" for name, _ in model.named_children()}
    return accelerate.dispatch_model(model, device_map, offload_dir=folder / "offloaded", offload_buffers=True)


def partly_on_disk(model: nn.Module, folder: Path) -> Any:
    device_map = {name: "disk" if name == "down" else "cpu" for name, _ in model.named_children()}
    return accelerate.dispatch_model(model, device_map, offload_dir=folder / "offloaded")


def in_a_checkpoint(model: nn.Module, folder: Path) -> Any:
    """Dispatch a model whose weights stay in a file of safetensors, as ``from_pretrained`` does."""
    plain = {name: value.clone() for name, value in model.state_dict().items() if "randlora" not in name}
    save_file(plain, path := folder / "model.safetensors")
    index = {name: {"safetensors_file": str(path), "weight_name": name} for name in plain}
    return accelerate.dispatch_model(model, {name: "disk" for name, _ in model.named_children()}, offload_index=index)


Placing = Callable[[nn.Module, Path], Any]


def adapted(model: nn.Module, **options: Any) -> Any:
    randlora.inject(model, **{"r": 3, "targets": "all-linear", **options})
    return fill(model, spread=0.3)


@pytest.mark.parametrize(
    ("place", "is_adapted_first", "dtype"),
    [
        (in_ram, True, torch.float32),
        (in_ram, False, torch.float64),
        (on_disk, False, torch.bfloat16),
        (partly_on_disk, True, torch.float64),
        (in_a_checkpoint, False, torch.float32),
        (in_a_checkpoint, True, torch.bfloat16),
    ],
)
def test_an_offloaded_model_computes_trains_saves_and_merges_as_one_that_is_not(
    place: Placing, is_adapted_first: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    here = adapted(Small(dtype))
    there = place(adapted(Small(dtype)), tmp_path) if is_adapted_first else adapted(place(Small(dtype), tmp_path))
    before, x = contents(tmp_path), torch.randn(3, WIDTHS[0], dtype=dtype)
    plain = here(x)
    assert bits(there(x)) == bits(plain)
    for model, name in ((here, "here"), (there, "there")):
        model(x).float().square().sum().backward()
        randlora.save(model, tmp_path / name)
    assert contents(tmp_path / "here") == contents(tmp_path / "there")
    for value, expected in zip(adapter_values(there).values(), adapter_values(here).values(), strict=True):
        assert value.grad is not None
        assert bits(value.grad) == bits(expected.grad)  # type: ignore[arg-type]
    with randlora.merged(here), randlora.merged(there):
        merged = here(x)
        assert bits(there(x)) == bits(merged)
    assert {name: value for name, value in contents(tmp_path).items() if "here" not in name} == before
    assert bits(there(x)) == bits(plain)
    randlora.merge(here)
    randlora.merge(there)
    gc.collect()
    assert bits(there(x)) == bits(merged)
    assert {name: contents(tmp_path)[name] for name in before} == before
    assert not any("randlora" in name for name, _ in there.named_parameters())
    remove_hook_from_submodules(there)
    assert bits(there(x)) == bits(merged)
    assert not any(parameter.is_meta for parameter in there.parameters())


def test_what_was_merged_is_unmerged_wherever_it_is_offloaded_since(tmp_path: Path) -> None:
    model, x = adapted(Small()), torch.randn(3, WIDTHS[0])
    plain = model(x)
    for change in (in_ram, lambda model, _: remove_hook_from_submodules(model), on_disk):
        randlora.merge(model, reversible=True)
        change(model, tmp_path)
        randlora.unmerge(model)
        assert bits(model(x)) == bits(plain)
    randlora.merge(model, reversible=True)
    remove_hook_from_submodules(model)
    in_ram(model, tmp_path)
    randlora.unmerge(model)
    assert bits(model(x)) == bits(plain)


@pytest.mark.parametrize(("place", "reversible"), [(in_ram, True), (on_disk, False), (partly_on_disk, False)])
def test_a_merge_that_fails_leaves_the_maps_and_files_as_they_were(
    place: Placing, reversible: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = adapted(place(Small(), tmp_path)), torch.randn(3, WIDTHS[0])
    plain, before = model(x), contents(tmp_path)
    write, calls = Offloaded.write, []

    def fail_late(self: Offloaded, value: Tensor) -> None:
        calls.append(value)
        write(self, value)
        if len(calls) == 2 or place is partly_on_disk:
            raise OSError("the disk is full")

    monkeypatch.setattr(Offloaded, "write", fail_late)
    with pytest.raises(OSError, match="disk is full"):
        randlora.merge(model, reversible=reversible)
    gc.collect()
    assert bits(model(x)) == bits(plain)
    assert contents(tmp_path) == before


def test_a_merge_into_files_says_where_they_are_and_deletes_them_with_the_model(tmp_path: Path) -> None:
    model, x = adapted(on_disk(Small(), tmp_path)), torch.randn(3, WIDTHS[0])
    before = contents(tmp_path)
    report = randlora.merge(model)
    assert any(str(tmp_path / "offloaded") in note and "up, down" in note for note in report.notes)
    added = contents(tmp_path).keys() - before.keys()
    assert len(added) == 2
    assert json.loads((tmp_path / "offloaded" / "index.json").read_text()).keys() == Small().state_dict().keys()
    another = on_disk(Small(), tmp_path)
    assert bits(another(x)) == bits(Small()(x))  # another model of that folder is not merged
    twin, merged = copy.deepcopy(model), model(x)
    del model, report
    gc.collect()
    assert bits(twin(x)) == bits(merged)
    for path in added:  # only the process that wrote them deletes them
        offloaded_module._delete(tmp_path / path, -1)
    assert type(pickle.loads(pickle.dumps(MergedFile(str(tmp_path / "other"))))) is str
    assert contents(tmp_path).keys() == before.keys() | added
    del twin
    gc.collect()
    assert contents(tmp_path) == before


def test_one_layer_at_a_time_is_loaded_to_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(on_disk(Small(), tmp_path))
    read = Offloaded.read
    alive: list[weakref.ref[Tensor]] = []

    def counted(self: Offloaded) -> Tensor:
        gc.collect()
        assert not any(is_alive() is not None for is_alive in alive)
        value = read(self)
        alive.append(weakref.ref(value))
        return value

    monkeypatch.setattr(Offloaded, "read", counted)
    randlora.merge(model, reversible=True)
    assert len(alive) == 2
    randlora.unmerge(model)


def test_a_layer_used_twice_is_merged_at_both_of_its_places_and_values_that_are_loaded_at_present(
    tmp_path: Path,
) -> None:
    model, here = in_ram(Small(shared=True), tmp_path), adapted(Small(shared=True))
    adapted(model)
    x = torch.randn(3, WIDTHS[0])
    assert bits(model(x)) == bits(here(x))
    with align_module_device(model.down):
        own = bits(model.down.weight)
        with randlora.merged(model):
            assert bits(model.down.weight) != own
            assert bits(model.down.state_dict()["weight"]) == own  # beside Λ and Γ it is the original
        assert bits(model.down.weight) == own
        randlora.merge(model)
    randlora.merge(here)
    assert bits(model(x)) == bits(here(x))
    remove_hook_from_submodules(model)
    assert bits(model(x)) == bits(here(x))


def test_accelerate_decides_without_diagonals_which_modules_to_offload(tmp_path: Path) -> None:
    model = adapted(Small())
    values = adapter_values(model)
    in_ram(model, tmp_path)
    now = adapter_values(model)
    assert all(now[name] is value for name, value in values.items())
    sizes = modeling.compute_module_sizes(model)
    assert sizes[""] == sum(value.nbytes for value in [*Small().parameters(), *values.values()])


def test_offloaded_diagonals_refuse_gradients_that_would_be_lost(tmp_path: Path) -> None:
    model: Any = adapted(Small())
    x = torch.randn(3, WIDTHS[0])
    expected = model(x).detach()
    for held in (model.up.randlora_lambda, model.up.randlora_gamma):
        add_hook_to_module(held, AlignDevicesHook(execution_device=CPU, offload=True))
    output = model(x)
    assert bits(output) == bits(expected)
    with pytest.raises(AdapterError, match="hooks on Λ and Γ themselves"):
        output.sum().backward()
    randlora.save(model, tmp_path)
    with randlora.merged(model):
        torch.testing.assert_close(model(x), expected)


def test_what_is_offloaded_with_all_around_it_runs_and_is_refused_elsewhere(tmp_path: Path) -> None:
    model = adapted(LLAMA.build(), targets=LLAMA.targets)
    expected = outputs(model, LLAMA.inputs())
    accelerate.cpu_offload(model, execution_device=CPU, preload_module_classes=["LlamaDecoderLayer"])
    assert torch.equal(outputs(model, LLAMA.inputs()), expected)
    for refused, error in (
        (lambda: list(randlora.trainable_parameters(model)), AdapterError),
        (lambda: randlora.delta_weight(model, "model.layers.0.mlp.up_proj"), AdapterError),
        (lambda: randlora.merge(model), MergeError),
        (lambda: randlora.save(model, tmp_path), CheckpointError),
        (lambda: randlora.eject(model), AdapterError),
    ):
        with pytest.raises(error, match=r"offloaded|meta"):
            refused()
    remove_hook_from_submodules(model)
    assert torch.equal(outputs(model, LLAMA.inputs()), expected)
    randlora.merge(model)


def test_a_checkpoint_is_dispatched_before_it_is_adapted_unless_the_model_has_values(tmp_path: Path) -> None:
    path, x = tmp_path / "model.safetensors", torch.randn(3, WIDTHS[0])
    save_file(Small().state_dict(), path)

    def dispatch(model: nn.Module) -> Any:
        options = {"device_map": {"up": "cpu", "down": "disk"}, "offload_folder": tmp_path / "offloaded"}
        return accelerate.load_checkpoint_and_dispatch(model, str(path), force_hooks=True, **options)

    expected = adapted(Small())(x)
    with accelerate.init_empty_weights():
        empty, injected = Small(), Small()
    assert bits(adapted(dispatch(empty))(x)) == bits(expected)
    assert bits(dispatch(adapted(Small()))(x)) == bits(expected)
    randlora.inject(injected, r=3, targets="all-linear")
    with pytest.raises(ValueError, match="is on the meta device, we need a `value`"):
        dispatch(injected)


def test_a_map_that_cannot_be_written_to_is_no_place_to_merge_into() -> None:
    from types import MappingProxyType

    model: Any = Small()
    values = MappingProxyType({name: value.detach() for name, value in model.up.named_parameters()})
    add_hook_to_module(model.up, AlignDevicesHook(execution_device=CPU, offload=True, weights_map=values))
    assert isinstance(place_of(model.up, "weight"), Plain)
    adapted(model)
    with pytest.raises(MergeError, match="up is incomplete"):
        randlora.merge(model)


def test_weights_are_loaded_in_the_dtype_of_the_model(tmp_path: Path) -> None:
    dtype = torch.bfloat16
    save_file(Small(torch.float64).state_dict(), path := tmp_path / "model.safetensors")
    index = {name: {"safetensors_file": str(path), "weight_name": name} for name in Small().state_dict()}
    given = copy.deepcopy(index)  # which other models may be given, too
    placed = accelerate.dispatch_model(Small(dtype), {"up": "disk", "down": "disk"}, offload_index=index)
    there, here = adapted(placed), adapted(Small(torch.float64).to(dtype))
    x = torch.randn(3, WIDTHS[0], dtype=dtype)
    plain = there(x)
    assert bits(plain) == bits(here(x))
    for model in (there, here):
        randlora.merge(model, reversible=True)
    assert bits(there(x)) == bits(here(x))
    for name in ("up", "down"):
        place = place_of(there.get_submodule(name), "weight")
        assert place is not None
        assert bits(place.read()) == bits(here.get_parameter(f"{name}.weight"))
    assert index == given
    randlora.unmerge(there)
    assert bits(there(x)) == bits(plain)


def with_a_hook_on_every_layer(model: nn.Module, folder: Path) -> nn.Module:
    for module in [module for module in model.modules() if isinstance(module, nn.Linear)]:
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    return model


def with_forced_hooks(model: nn.Module, folder: Path) -> Any:
    return accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)


@pytest.mark.parametrize(
    ("is_before", "place"),
    [(True, with_a_hook_on_every_layer), (False, with_forced_hooks), (True, in_ram), (False, in_ram)],
)
def test_a_model_with_hooks_is_adapted_loaded_merged_and_ejected(
    is_before: bool, place: Placing, tmp_path: Path
) -> None:
    inputs = LLAMA.inputs()
    plain, trained = outputs(LLAMA.build(), inputs), adapted(LLAMA.build(), targets=LLAMA.targets)
    model = place(LLAMA.build(), tmp_path) if is_before else LLAMA.build()
    randlora.inject(model, r=3, targets=LLAMA.targets)
    assert torch.equal(outputs(model, inputs), plain)
    fill(model, spread=0.3)
    model = model if is_before else place(model, tmp_path)
    expected = outputs(trained, inputs)
    assert torch.equal(outputs(model, inputs), expected)
    with randlora.disabled(model):
        assert torch.equal(outputs(model, inputs), plain)
    with randlora.merged(model):
        torch.testing.assert_close(outputs(model, inputs), expected, rtol=1e-4, atol=1e-4)
    randlora.eject(model)
    assert torch.equal(outputs(model, inputs), plain)
    randlora.save(trained, tmp_path / "adapter")
    randlora.load(model, tmp_path / "adapter")
    assert torch.equal(outputs(model, inputs), expected)
    remove_hook_from_submodules(model)
    assert not any("_hf_hook" in vars(module) for module in model.modules())
    assert torch.equal(outputs(model, inputs), expected)
    randlora.eject(model)
    assert torch.equal(outputs(model, inputs), plain)
    assert not any("Adapted" in type(module).__name__ for module in model.modules())


def test_accelerate_reads_the_configs_of_the_docs(tmp_path: Path) -> None:
    page = Path(__file__).parent.parent / "docs" / "accelerate.md"
    kinds = {}
    for text in re.findall(r"^```yaml\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
        config = load_config_from_file(str(tmp_path / "config.yaml"))
        kinds[config.distributed_type] = config
    assert kinds.keys() >= {DistributedType.FSDP, DistributedType.MULTI_GPU, DistributedType.DEEPSPEED}
    assert kinds[DistributedType.FSDP].fsdp_config["fsdp_version"] == 2
    assert kinds[DistributedType.MULTI_GPU].parallelism_config["parallelism_config_tp_size"] == 8
    assert kinds[DistributedType.DEEPSPEED].deepspeed_config["zero_stage"] == 3
