"""Models that accelerate offloads or hooks: adapted before and after, trained, saved, switched, refused."""

import copy
import re
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import accelerate  # type: ignore[import-untyped]
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file  # type: ignore[import-untyped]
from accelerate.utils import DistributedType, modeling  # type: ignore[import-untyped]
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import randlora
from randlora.errors import AdapterError, CheckpointError, MergeError, TargetError
from randlora.places import Plain, place_of
from tests.kit import adapt, adapter_values, all_bits, bits, same_bits
from tests.model_directories import contents
from tests.models import llama, outputs, tokens
from tests.quantized import of_4_bits

CPU = torch.device("cpu")
NORM = ["norm.weight", "norm.bias"]
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


class Small(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32, *, shared: bool = False) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 8)
        self.again = nn.Sequential(self.up) if shared else None
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for tensor in (*self.parameters(), self.norm.get_buffer("running_mean")):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / 2)
        self.to(dtype).eval()

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.down(self.norm(self.up(x)))
        return hidden if self.again is None else self.again(hidden)


def adapted(model: nn.Module, **options: Any) -> Any:
    return adapt(model, spread=0.3, **{"r": 3, "targets": "all-linear", "stream": "portable", **options})


def save(model: nn.Module, folder: Path) -> bytes:
    randlora.save(model, folder, name="default")
    return (folder / "adapter_model.safetensors").read_bytes()


def put(model: nn.Module, where: str, folder: Path) -> Any:
    names, into = [name for name, _ in model.named_children()], {"offload_dir": folder / "offloaded"}
    match where:
        case "ram":
            return accelerate.cpu_offload(model, execution_device=CPU, offload_buffers=True)
        case "ram, some whole":
            return accelerate.cpu_offload(model, CPU, preload_module_classes=["Sequential"])
        case "disk":
            return accelerate.disk_offload(model, folder / "offloaded", execution_device=CPU, offload_buffers=True)
        case "disk by a map":
            return accelerate.dispatch_model(model, dict.fromkeys(names, "disk"), **into)
        case "partly disk":
            return accelerate.dispatch_model(model, dict.fromkeys(names, "cpu") | {"down": "disk"}, **into)
        case "checkpoint":
            return in_a_checkpoint(model, folder)
    return accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)  # "here"


def in_a_checkpoint(model: nn.Module, folder: Path, of: nn.Module | None = None, index: Any = None) -> Any:
    plain = {name: value.clone() for name, value in (of or model).state_dict().items() if "randlora" not in name}
    save_file(plain, path := folder / "model.safetensors")
    index = {} if index is None else index
    index |= {name: {"safetensors_file": str(path), "weight_name": name} for name in plain}
    return accelerate.dispatch_model(model, {name: "disk" for name, _ in model.named_children()}, offload_index=index)


@pytest.mark.parametrize(
    ("where", "is_adapted_first", "options", "beside"),
    [
        ("ram", True, {"shared": True}, None),
        ("disk", False, {"dtype": torch.bfloat16}, None),
        ("partly disk", True, {"dtype": torch.float64}, NORM),  # which is not offloaded
        ("partly disk", False, {}, NORM),
        ("checkpoint", False, {}, None),
        ("checkpoint", True, {"dtype": torch.bfloat16}, None),
        ("here", False, {}, None),
    ],
)
def test_an_offloaded_model_computes_trains_and_saves_as_one_that_is_not_and_is_not_merged_into(
    where: str, is_adapted_first: bool, options: dict[str, Any], beside: Any, tmp_path: Path
) -> None:
    here, base, there = adapted(Small(**options), train_also=beside), Small(**options), Small(**options)
    if is_adapted_first:
        adapted(there, train_also=beside)
    with randlora.disabled(there) if is_adapted_first else nullcontext():  # a block may begin before, and end after
        put(there, where, tmp_path)
    if not is_adapted_first:
        adapted(there, train_also=beside)
    plain = here(x := X.to(base.up.weight.dtype))
    assert same_bits(there(x), plain)
    with randlora.disabled(there):
        assert same_bits(there(x), base(x))
    for model in (here, there):
        model(x).float().square().sum().backward()
    assert save(here, tmp_path / "here") == save(there, tmp_path / "there")
    for value, own in zip(adapter_values(there).values(), adapter_values(here).values(), strict=True):
        assert value.grad is not None
        assert same_bits(value.grad, own.grad)  # type: ignore[arg-type]
    torch.optim.SGD(randlora.trainable_parameters(there), lr=0.1).step()
    assert not same_bits(there(x), plain)
    randlora.eject(there)
    assert same_bits(there(x), base(x))
    assert not any("randlora" in name for name, _ in there.named_parameters())
    randlora.load(there, tmp_path / "here")
    before, expected = contents(tmp_path), all_bits(dict(randlora.merged_tensors(here)))
    assert all_bits(dict(randlora.merged_tensors(there))) == expected
    for reversible in (False, True) if where != "here" else ():
        with pytest.raises(MergeError, match=r"accelerate offloads the weights of .*down.*save_merged.*files\.merge"):
            randlora.merge(there, reversible=reversible)
        assert same_bits(there(x), plain)
        accelerate.hooks.remove_hook_from_submodules(there) if reversible else None
    assert contents(tmp_path) == before
    randlora.merge(there)
    accelerate.hooks.remove_hook_from_submodules(there)
    assert all_bits(there.state_dict()) == expected
    assert not any("_hf_hook" in vars(each) or "Adapted" in type(each).__name__ for each in there.modules())


AWAY = {
    "ram": lambda model: accelerate.cpu_offload(model, CPU),
    "whole": lambda model: accelerate.cpu_offload(model, CPU, preload_module_classes=["Sequential"]),
    "a part": lambda model: accelerate.cpu_offload(model[0].up, CPU),
    "hooks removed": lambda model: accelerate.hooks.remove_hook_from_submodules(accelerate.cpu_offload(model, CPU)),
}


@pytest.mark.parametrize("way", AWAY)
def test_a_model_that_is_offloaded_while_it_is_merged_raises_an_error_until_it_is_unmerged(way: str) -> None:
    model: Any = adapted(nn.Sequential(Small()))
    randlora.inject(model, r=2, targets="0.down", name="other")
    randlora.activate(model, ["default", "other"])
    plain = bits(model(X))
    randlora.merge(model, adapters="default", reversible=True)
    AWAY[way](model)
    for refused in (
        lambda: model(X),
        lambda: randlora.merged_tensors(model),
        lambda: randlora.merge(model, reversible=True),
        lambda: randlora.merged(model).__enter__(),
    ):
        with pytest.raises(MergeError, match=r"took the original weights of 0\.up.*hook.*then randlora\.unmerge"):
            refused()
    for undo in (randlora.unmerge, randlora.eject) if way != "hooks removed" else ():
        with pytest.raises((AdapterError, MergeError), match=r"offloaded .*(since the merge|together).*: .*hook"):
            undo(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    randlora.unmerge(model)
    assert bits(model(X)) == plain
    if way == "ram":
        with pytest.raises(MergeError, match="since the merge"), randlora.merged(model):
            AWAY[way](model)
        with pytest.raises(MergeError, match=r"took the original weights of 0\.up, 0\.down"):
            model(X)
        accelerate.hooks.remove_hook_from_submodules(model)
        randlora.unmerge(model)
        assert bits(model(X)) == plain


def test_layers_that_are_not_offloaded_are_merged_beside_those_that_are(tmp_path: Path) -> None:
    model, here = (adapted(each, targets="up") for each in (put(Small(), "partly disk", tmp_path), Small()))
    before = contents(tmp_path)
    with randlora.merged(model), randlora.merged(here):
        merged = here(X)
        assert same_bits(model(X), merged)
    assert same_bits(model(X), here(X))
    randlora.inject(model, r=2, targets="down", name="other")
    randlora.activate(model, ["default", "other"])
    own, plain = bits(model.up.weight), bits(model(X))
    with pytest.raises(MergeError, match="offloads the weights of down, which"):
        randlora.merge(model)
    assert (bits(model.up.weight), bits(model(X))) == (own, plain)
    randlora.remove(model, "other")
    randlora.merge(model)
    assert same_bits(model(X), merged)
    assert contents(tmp_path) == before


def test_diagonals_are_neither_offloaded_nor_counted_and_refuse_gradients_that_would_be_lost(tmp_path: Path) -> None:
    model = adapted(Small())
    values, expected = adapter_values(model), model(X).detach()
    sizes = modeling.compute_module_sizes(model)
    assert sizes[""] == sum(value.nbytes for value in [*Small().state_dict().values(), *values.values()])
    put(model, "ram", tmp_path)
    assert all(adapter_values(model)[name] is value for name, value in values.items())
    accelerate.hooks.remove_hook_from_submodules(model)
    for held in (model.up.randlora_lambda, model.up.randlora_gamma):
        accelerate.hooks.add_hook_to_module(held, accelerate.hooks.AlignDevicesHook(execution_device=CPU, offload=True))
    output = model(X)
    assert same_bits(output, expected)
    with pytest.raises(AdapterError, match="hooks on Λ and Γ themselves"):
        output.sum().backward()
    save(model, tmp_path)
    with randlora.merged(model):
        torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-3)


def test_a_checkpoint_is_dispatched_before_it_is_adapted_and_loaded_in_the_dtype_of_the_model(tmp_path: Path) -> None:
    save_file(Small().state_dict(), path := tmp_path / "model.safetensors")
    options: dict[str, Any] = {"device_map": {"up": "cpu", "norm": "cpu", "down": "disk"}, "force_hooks": True}
    options |= {"checkpoint": str(path), "offload_folder": tmp_path / "offloaded"}
    with accelerate.init_empty_weights():
        empty, injected = Small(), Small()
    assert same_bits(adapted(accelerate.load_checkpoint_and_dispatch(empty, **options))(X), adapted(Small())(X))
    randlora.inject(injected, r=3, targets="all-linear")
    with pytest.raises(ValueError, match="is on the meta device, we need a `value`"):
        accelerate.load_checkpoint_and_dispatch(injected, **options | {"device_map": {"": "cpu"}})
    wide, x, index = Small(torch.float64), X.bfloat16(), dict[str, Any]()
    there = adapted(in_a_checkpoint(Small(torch.bfloat16), tmp_path, wide, index))
    given = copy.deepcopy(index)
    here = adapted(wide.bfloat16())
    assert same_bits(there(x), here(x))
    place = place_of(there.down, "weight")
    assert same_bits(place.read(), here.down.weight)
    with pytest.raises(MergeError, match="accelerate offloads the weight"):
        place.write(here.down.weight)
    assert index == given


@pytest.mark.parametrize("where", ["ram", "disk by a map", "from_pretrained"])
def test_weights_that_are_tied_are_refused_as_without_offloading_and_equal_ones_are_not(
    where: str, tmp_path: Path
) -> None:
    def tied() -> nn.Module:
        if where == "from_pretrained":
            return llama(tie_word_embeddings=True)
        model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("embed", "lm_head", "up_proj")})
        model["lm_head"].weight = model["embed"].weight
        return model

    refused: dict[str, Any] = {"r": 4, "targets": ["lm_head", "up_proj"]}
    with pytest.raises(TargetError) as plain:
        randlora.inject(model := tied(), **refused)
    if where == "from_pretrained":
        model.save_pretrained(tmp_path)  # type: ignore[operator]
        folders = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offloaded"}
        model = LlamaForCausalLM.from_pretrained(tmp_path, **folders)
    else:
        put(model, where, tmp_path)
    with pytest.raises(TargetError) as there:
        randlora.inject(model, **refused)
    assert str(there.value) == str(plain.value)
    assert "randlora_lambda" not in str(model)
    model, move = tied(), float(where == "from_pretrained")  # which ties what is equal
    model.get_submodule("lm_head").weight = nn.Parameter(model.get_parameter("lm_head.weight").detach() + move)
    assert len(randlora.inject(put(model, "disk", tmp_path / "equal"), **refused).targets) > 1


def test_what_is_not_in_memory_is_refused_where_values_are_needed(tmp_path: Path) -> None:
    model: Any = adapted(nn.Sequential(Small()))
    expected = bits(model(X))
    put(model, "ram, some whole", tmp_path)
    assert bits(model(X)) == expected
    for refused in (
        lambda: list(randlora.trainable_parameters(model)),
        lambda: randlora.delta_weight(model, "0.up"),
        lambda: randlora.merge(model),
        lambda: randlora.save(model, tmp_path),
        lambda: randlora.eject(model),
    ):
        with pytest.raises((AdapterError, CheckpointError, MergeError), match=r"offloaded|meta"):
            refused()
    accelerate.hooks.remove_hook_from_submodules(model)
    assert bits(model(X)) == expected
    randlora.merge(model)
    model = Small()
    values = MappingProxyType({name: value.detach() for name, value in model.up.named_parameters()})  # is not written
    accelerate.hooks.add_hook_to_module(
        model.up, accelerate.hooks.AlignDevicesHook(execution_device=CPU, offload=True, weights_map=values)
    )
    assert isinstance(place_of(model.up, "weight"), Plain)
    with pytest.raises(MergeError, match="up is incomplete"):
        randlora.merge(adapted(model))
    model = adapted(Small())
    model.norm.running_mean = torch.empty(12, device="meta")
    with pytest.raises(MergeError, match=r"norm\.running_mean has no values here"):
        randlora.merged_tensors(model)


def test_offloaded_parameters_are_no_ones_to_train_copies_of(tmp_path: Path) -> None:
    save(adapted(Small(), train_also=NORM), tmp_path / "here")
    for where in ("ram", "checkpoint"):
        model = put(Small(), where, tmp_path)
        with pytest.raises(TargetError, match=r"norm\.weight is offloaded by accelerate.*\n.*norm\.bias is"):
            adapted(model, train_also=NORM)
        with pytest.raises(CheckpointError, match=r"norm\.weight is offloaded by accelerate"):
            randlora.load(model, tmp_path / "here")
        assert not any("randlora" in name for name, _ in model.named_parameters())
        assert same_bits(model(X), Small()(X))


@pytest.mark.parametrize(("where", "is_active"), [("ram", True), ("disk", False), ("ram, some whole", True)])
def test_copies_that_are_offloaded_after_that_are_refused_until_the_hooks_are_removed(
    where: str, is_active: bool, tmp_path: Path
) -> None:
    model: Any = nn.Sequential(Small())
    adapted(model, targets="0.up", train_also=[f"0.{name}" for name in NORM])
    adapted(model, targets="0.down", name="other")
    if not is_active:
        randlora.activate(model, "other")
    before, expected = save(model, tmp_path / "before"), model(X)
    put(model, where, tmp_path)
    calls: list[Callable[[], object]] = [
        lambda: [*randlora.trainable_parameters(model)],
        lambda: randlora.save(model, tmp_path / "never", name="default"),
        lambda: randlora.activate(model, "other"),
        lambda: randlora.disabled(model).__enter__(),
        lambda: randlora.merge(model),
        lambda: randlora.merged_tensors(model),
        lambda: randlora.inject(model, r=2, targets="0.down", name="third"),
        lambda: randlora.eject(model),
    ]
    for refused in calls:
        with pytest.raises(AdapterError, match=r"(0\.norm\.weight|accelerate).*remove_hook_from_submodules"):
            refused()
    assert same_bits(model(X), expected)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert save(model, tmp_path / "after") == before
    block = randlora.disabled(model)  # offloaded while disabled, copies come back when the hooks are removed
    block.__enter__()
    base = put(model, where, tmp_path)(X)
    for refused in (lambda: block.__exit__(None, None, None), lambda: randlora.adapters(model)):
        with pytest.raises(AdapterError, match=r"norm\.weight.*remove_hook_from_submodules"):
            refused()
        assert same_bits(model(X), base)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert [info.name for info in randlora.adapters(model)] == ["default", "other"]
    assert same_bits(model(X), expected)
    with randlora.merged(model):
        torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-4)
    randlora.eject(model)
    assert same_bits(model(X), base)
    assert same_bits(base, Small()(X))


def test_backward_raises_nothing_and_gives_copies_that_were_offloaded_no_gradients(tmp_path: Path) -> None:
    model: Any = nn.Sequential(Small())
    adapted(model, targets="0.up", train_also=[f"0.{name}" for name in NORM])
    copies = [parameter for name, parameter in model.named_parameters() if "norm" in name]
    put(model, "ram", tmp_path)
    model(X).sum().backward()
    now = [parameter for name, parameter in model.named_parameters() if "norm" in name]
    assert [parameter.grad for parameter in (*copies, *now)] == [None] * 4
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "randlora" in name)


BESIDE = {f"model.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb", "layers.1")} | {"lm_head": "cpu"}


@pytest.mark.medium
@pytest.mark.parametrize("device_map", [{"": "disk"}, BESIDE | {"model.layers.0": "disk"}])
def test_a_model_of_transformers_that_is_offloaded_as_it_is_loaded(device_map: dict[str, str], tmp_path: Path) -> None:
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    before, placed = contents(tmp_path / "base"), {"device_map": device_map, "offload_folder": tmp_path / "offloaded"}
    plain, model = (
        adapted(LlamaForCausalLM.from_pretrained(tmp_path / "base", **options).eval()) for options in ({}, placed)
    )
    expected = outputs(plain, tokens())
    assert same_bits(outputs(model, tokens()), expected)
    assert save(model, tmp_path / "there") == save(plain, tmp_path / "here")
    for each, name in ((plain, "plain"), (model, "merged")):
        randlora.files.save_merged(each, tmp_path / name)
    assert contents(tmp_path / "merged") == contents(tmp_path / "plain")
    assert contents(tmp_path / "base") == before
    randlora.merge(plain, reversible=True)
    accelerate.cpu_offload(plain, CPU)
    with pytest.raises(MergeError, match="cannot save_pretrained a model whose adapters are merged"):
        plain.save_pretrained(tmp_path / "never")
    assert not (tmp_path / "never").exists()


@pytest.mark.medium
def test_layers_of_bitsandbytes_are_merged_where_they_are_and_refused_where_they_are_offloaded(tmp_path: Path) -> None:
    built = nn.Sequential(OrderedDict({name: of_4_bits(64, 64) for name in ("up", "down")}))
    x, plain = torch.randn(3, 64), adapted(copy.deepcopy(built))
    model = adapted(put(copy.deepcopy(built), "here", tmp_path))
    assert same_bits(model(x), plain(x))
    with randlora.merged(model), randlora.merged(plain):
        assert same_bits(model(x), plain(x))
    late = put(adapted(copy.deepcopy(built)), "partly disk", tmp_path)
    codes = bits(late.up.weight)
    with pytest.raises(MergeError, match="accelerate offloads the weights of down"):
        randlora.merge(late)
    assert bits(late.up.weight) == codes
    with pytest.raises(TargetError, match="down has no values"):
        adapted(put(built, "partly disk", tmp_path))


def test_accelerate_reads_the_configs_of_the_docs(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "accelerate.md").read_text(encoding="utf-8")
    kinds = {}
    for text in re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
        config = load_config_from_file(str(tmp_path / "config.yaml"))
        kinds[config.distributed_type] = config
    assert kinds[DistributedType.FSDP].fsdp_config["fsdp_version"] == 2
    assert kinds[DistributedType.MULTI_GPU].parallelism_config["parallelism_config_tp_size"] == 8
    assert kinds[DistributedType.DEEPSPEED].deepspeed_config["zero_stage"] == 3
