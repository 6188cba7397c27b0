"""Models that accelerate offloads: tied weights, the tensors of the merged model, and whole models of transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate  # type: ignore[import-untyped]
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules  # type: ignore[import-untyped]
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import randlora
from randlora.errors import AdapterError, CheckpointError, MergeError, TargetError
from tests.kit import all_bits, bits, fill
from tests.model_directories import contents
from tests.test_offloaded_weights import Placing, dispatched, in_ram, on_disk

CPU = torch.device("cpu")
NORM = ["norm.weight", "norm.bias"]
FILE = "adapter_model.safetensors"
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def llama(*, is_tied: bool = False) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=is_tied, **sizes)).eval()


def from_a_checkpoint(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, device_map={"": "disk"}, offload_folder=folder / "offloaded")


def preloaded(model: nn.Module, folder: Path) -> Any:
    return accelerate.cpu_offload(model, CPU, preload_module_classes=["Sequential"])


every_placement = pytest.mark.parametrize("place", [in_ram, on_disk, dispatched])


class Tied(nn.Module):
    """Two layers that share a weight, which only the model itself knows."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.alone = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.down.weight = self.up.weight


def from_one_file(model: nn.Module, folder: Path) -> Any:
    save_file({"up.weight": torch.ones(8, 8), "alone.weight": torch.ones(8, 8), "bias": torch.ones(8)}, folder / "file")
    tensors = {"down.weight": "up.weight"} | {f"{name}.bias": "bias" for name, _ in model.named_children()}
    index = {
        name: {"safetensors_file": str(folder / "file"), "weight_name": tensors.get(name, name)}
        for name in model.state_dict()
    }
    model.to("meta")  # as from_pretrained has it
    return accelerate.dispatch_model(model, {name: "disk" for name, _ in model.named_children()}, offload_index=index)


@pytest.mark.parametrize(
    ("build", "place", "targets"),
    [
        (Tied, in_ram, ["up", "down"]),
        (Tied, dispatched, ["up", "down"]),
        (Tied, from_one_file, ["up", "down"]),
        (lambda: llama(is_tied=True), on_disk, ["lm_head", "up_proj"]),
        (lambda: llama(is_tied=True), from_a_checkpoint, ["lm_head", "up_proj"]),
    ],
)
def test_weights_that_are_tied_are_refused_as_without_offloading(
    build: Callable[[], nn.Module], place: Placing, targets: list[str], tmp_path: Path
) -> None:
    with pytest.raises(TargetError) as plain:
        randlora.inject(build(), r=4, targets=targets)
    model = place(build(), tmp_path)
    with pytest.raises(TargetError) as there:
        randlora.inject(model, r=4, targets=targets)
    assert str(there.value) == str(plain.value)
    assert "randlora_lambda" not in str(model)
    if build is Tied:
        assert randlora.inject(model, r=4, targets="alone").targets == ("alone",)


@pytest.mark.parametrize("place", [on_disk, from_a_checkpoint])
def test_weights_that_are_equal_or_untied_are_not_taken_for_tied(place: Placing, tmp_path: Path) -> None:
    model, other = llama(), llama(is_tied=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    report = randlora.inject(place(model, tmp_path), r=4, targets=["lm_head", "up_proj", "gate_proj"])
    assert len(report.targets) == 5
    other.lm_head.weight = nn.Parameter(other.lm_head.weight.detach() + 1)
    assert randlora.inject(on_disk(other, tmp_path / "other"), r=4, targets=["lm_head"]).targets == ("lm_head",)


class Beside(nn.Module):
    """An adapted layer, one that is not, and a buffer that is in the state dict."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up, self.norm, self.down = nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 8)
        with torch.no_grad():
            for tensor in (*self.parameters(), self.norm.running_mean):
                assert tensor is not None
                tensor.copy_(torch.randn(tensor.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down(self.norm(self.up(x)))
        return output


def adapted(model: nn.Module, **options: Any) -> Any:
    randlora.inject(model, **{"r": 3, "targets": ["up"], **options})
    return fill(model, spread=0.3)


@every_placement
def test_the_tensors_of_the_merged_model_are_loaded_and_not_meta(place: Placing, tmp_path: Path) -> None:
    plain = adapted(Beside().eval())
    model = adapted(place(Beside().eval(), tmp_path)) if place is in_ram else place(adapted(Beside().eval()), tmp_path)
    expected = all_bits(dict(randlora.merged_tensors(plain)))
    assert all_bits(dict(randlora.merged_tensors(model))) == expected
    with randlora.merged(model):
        assert all_bits(dict(randlora.merged_tensors(model))) == expected
    assert (model.down.weight.is_meta, model.norm.running_mean.is_meta) == (True, True)
    randlora.merge(plain)
    assert all_bits(plain.state_dict()) == expected
    lacking = adapted(Beside())
    lacking.norm.running_mean = torch.empty(12, device="meta")
    with pytest.raises(MergeError, match=r"norm\.running_mean has no values here"):
        randlora.merged_tensors(lacking)


@every_placement
def test_offloaded_parameters_are_no_ones_to_train_copies_of(place: Placing, tmp_path: Path) -> None:
    randlora.save(adapted(Beside(), train_also=NORM), tmp_path / "adapter")
    model = place(Beside().eval(), tmp_path)
    expected = bits(model(X))
    with pytest.raises(TargetError, match=r"norm\.weight is offloaded by accelerate.*\n.*norm\.bias is"):
        adapted(model, train_also=NORM)
    with pytest.raises(CheckpointError, match=r"norm\.weight is offloaded by accelerate"):
        randlora.load(model, tmp_path / "adapter")
    assert not any("randlora" in name for name, _ in model.named_parameters())
    assert bits(model(X)) == expected


def test_parameters_beside_those_that_are_offloaded_are_trained_saved_switched_and_ejected(tmp_path: Path) -> None:
    def offloaded(model: Any) -> Any:
        return accelerate.dispatch_model(model, {"up": "disk", "norm": "cpu", "down": "disk"}, offload_dir=tmp_path)

    plain = adapted(Beside().eval(), train_also=NORM)
    expected, base = plain(X), Beside().eval()(X)
    for model in (
        adapted(offloaded(Beside().eval()), train_also=NORM),
        offloaded(adapted(Beside().eval(), train_also=NORM)),
    ):
        assert bits(model(X)) == bits(expected)
        model(X).sum().backward()
        assert all(parameter.grad is not None for parameter in randlora.trainable_parameters(model))
        with randlora.disabled(model):
            assert bits(model(X)) == bits(base)
        for each, name in ((model, "there"), (plain, "here")):
            randlora.save(each, tmp_path / name)
        assert (tmp_path / "there" / FILE).read_bytes() == (tmp_path / "here" / FILE).read_bytes()
        assert all_bits(dict(randlora.merged_tensors(model))) == all_bits(dict(randlora.merged_tensors(plain)))
        with randlora.merged(model), randlora.merged(plain):
            assert bits(model(X)) == bits(plain(X))
        randlora.eject(model)
        assert bits(model(X)) == bits(base)


@pytest.mark.parametrize(
    ("place", "is_active"),
    [(in_ram, True), (on_disk, False), (dispatched, True), (preloaded, True), (preloaded, False)],
)
def test_copies_that_are_offloaded_after_that_are_refused_until_the_hooks_are_removed(
    place: Placing, is_active: bool, tmp_path: Path
) -> None:
    model: Any = nn.Sequential(Beside().eval())
    adapted(model, targets="0.up", train_also=[f"0.{name}" for name in NORM])
    adapted(model, targets="0.down", name="other")
    if not is_active:
        randlora.activate(model, "other")
    randlora.save(model, tmp_path / "before", name="default")
    expected = model(X)
    place(model, tmp_path)
    if is_active:  # else nothing that is offloaded would be trained
        with pytest.raises(AdapterError, match=r"accelerate.*remove_hook_from_submodules"):
            model(X).sum().backward()
    for refused in (
        lambda: [*randlora.trainable_parameters(model)],
        lambda: randlora.save(model, tmp_path / "never", name="default"),
        lambda: randlora.activate(model, "other"),
        lambda: randlora.disabled(model).__enter__(),
        lambda: randlora.merge(model),
        lambda: randlora.merged_tensors(model),
        lambda: randlora.inject(model, r=2, targets="0.down", name="third"),
        lambda: randlora.eject(model),
    ):
        with pytest.raises(AdapterError, match=r"0\.norm\.weight.*remove_hook_from_submodules"):
            refused()
    assert bits(model(X)) == bits(expected)
    remove_hook_from_submodules(model)
    randlora.save(model, tmp_path / "after", name="default")
    assert (tmp_path / "after" / FILE).read_bytes() == (tmp_path / "before" / FILE).read_bytes()
    assert bits(model(X)) == bits(expected)
    with randlora.merged(model):
        torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-4)
    randlora.eject(model)
    assert bits(model(X)) == bits(Beside().eval()(X))


def test_copies_of_parameters_that_are_not_offloaded_are_switched_where_layers_are(tmp_path: Path) -> None:
    """A block of `disabled` may begin before the model is offloaded, and end after."""
    device_map = {"up": "disk", "norm": "cpu", "down": "disk"}
    model: Any = adapted(Beside().eval(), train_also=NORM)
    expected, base = model(X), Beside().eval()(X)
    optimizer = torch.optim.SGD(randlora.trainable_parameters(model), lr=0.1)
    with randlora.disabled(model):
        accelerate.dispatch_model(model, device_map, offload_dir=tmp_path)
        assert bits(model(X)) == bits(base)
    assert bits(model(X)) == bits(expected)
    model(X).sum().backward()
    optimizer.step()
    assert bits(model(X)) != bits(expected)
    trained = bits(model(X))
    with randlora.disabled(model):
        assert bits(model(X)) == bits(base)
    assert bits(model(X)) == trained


@pytest.mark.parametrize("place", [in_ram, preloaded])
def test_copies_that_are_offloaded_while_disabled_come_back_when_the_hooks_are_removed(
    place: Placing, tmp_path: Path
) -> None:
    model: Any = nn.Sequential(Beside().eval())
    adapted(model, targets=["0.up", "0.down"], train_also=[f"0.{name}" for name in NORM])
    expected, base = model(X), Beside().eval()(X)
    block = randlora.disabled(model)
    block.__enter__()
    place(model, tmp_path)
    assert bits(model(X)) == bits(base)
    with pytest.raises(AdapterError, match=r"norm\.weight.*remove_hook_from_submodules"):
        block.__exit__(None, None, None)
    assert bits(model(X)) == bits(base)
    with pytest.raises(AdapterError, match=r"norm\.weight.*remove_hook_from_submodules"):
        randlora.adapters(model)
    remove_hook_from_submodules(model)
    assert bits(model(X)) == bits(base)
    assert [info.name for info in randlora.adapters(model)] == ["default"]
    assert bits(model(X)) == bits(expected)
    with randlora.disabled(model):
        assert bits(model(X)) == bits(base)
    assert bits(model(X)) == bits(expected)


BESIDE_LAYERS = {f"model.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb")}
PARTLY = BESIDE_LAYERS | {"model.layers.0": "disk", "model.layers.1": "cpu", "lm_head": "disk"}


@pytest.mark.medium
@pytest.mark.parametrize("device_map", [{"": "disk"}, PARTLY], ids=["all on disk", "all but a layer on disk"])
def test_a_model_of_transformers_that_is_offloaded_as_it_is_loaded(device_map: dict[str, str], tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    before = contents(tmp_path / "base")

    def loaded(**options: Any) -> Any:
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base", **options).eval()
        return adapted(model, targets="all-linear", stream="portable")

    plain = loaded()
    model = loaded(device_map=device_map, offload_folder=tmp_path / "offloaded")
    tokens = torch.arange(6)[None]
    expected = plain(tokens).logits
    assert bits(model(tokens).logits) == bits(expected)
    for each, name in ((model, "there"), (plain, "here")):
        randlora.save(each, tmp_path / name)
    assert (tmp_path / "there" / FILE).read_bytes() == (tmp_path / "here" / FILE).read_bytes()
    assert all_bits(dict(randlora.merged_tensors(model))) == all_bits(dict(randlora.merged_tensors(plain)))
    with randlora.merged(model), randlora.merged(plain):
        assert bits(model(tokens).logits) == bits(plain(tokens).logits)
    assert bits(model(tokens).logits) == bits(expected)
    assert contents(tmp_path / "base") == before


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_layers_of_bitsandbytes_are_merged_where_they_are_and_refused_where_they_are_offloaded(
    kind: str, tmp_path: Path
) -> None:
    nn_of_bnb = pytest.importorskip("bitsandbytes").nn
    options: dict[str, Any] = {"compute_dtype": torch.float32} if kind == "Linear4bit" else {"has_fp16_weights": False}

    def built() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(getattr(nn_of_bnb, kind)(64, 64, **options) for _ in range(2))).to("cpu")

    def half(model: nn.Module) -> Any:
        return accelerate.dispatch_model(model, {"0": "cpu", "1": "disk"}, offload_dir=tmp_path)

    x = torch.randn(3, 64)
    plain = adapted(built(), targets="all-linear")
    model = adapted(accelerate.dispatch_model(built(), {"": "cpu"}, force_hooks=True), targets="all-linear")
    assert bits(model(x)) == bits(plain(x))
    with randlora.merged(model), randlora.merged(plain):
        assert bits(model(x)) == bits(plain(x))
    assert bits(model(x)) == bits(plain(x))
    with pytest.raises(TargetError, match="1 has no values"):
        adapted(half(built()), targets="all-linear")
    late = half(adapted(built(), targets="all-linear"))
    codes = bits(late[0].weight)
    for refused in (randlora.merge, randlora.merged_tensors):
        with pytest.raises(MergeError, match="the weight of 1 is incomplete"):
            refused(late)
    assert bits(late[0].weight) == codes


@pytest.mark.medium
@pytest.mark.parametrize("place", [in_ram, from_a_checkpoint])
def test_the_files_of_the_merged_model_are_those_without_offloading(place: Placing, tmp_path: Path) -> None:
    plain, model = llama(is_tied=True), place(llama(is_tied=True), tmp_path / "base")
    for each, name in ((plain, "plain"), (model, "offloaded")):
        randlora.inject(each, r=4, targets=["q_proj", "up_proj"])
        randlora.files.save_merged(fill(each), tmp_path / name)
    assert contents(tmp_path / "offloaded") == contents(tmp_path / "plain")
