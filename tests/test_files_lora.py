"""A LoRA made of an adapter: the nearest of its rank, as PEFT and other programs read it, and what that loses."""

import json
import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import randlora
from randlora.errors import CheckpointError, ConfigError
from randlora.files import layouts
from randlora.files.layouts import frobenius_norm, of_rank, spectral_norm, within
from tests import peer
from tests.checkpoint_files import TENSORS_FILE, read_fields
from tests.kit import adapt
from tests.model_directories import contents
from tests.models import BERT, GPT2, LLAMA, RealModel, flux, noise, outputs, patches, reproducible, unet
from tests.peer import PREFIX, THEIR_WARNINGS, assert_same_effect, in_peft, our_directory

pytestmark = [*THEIR_WARNINGS, pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias")]

FULL = 1e-5  # a tolerance that only a full rank is within


def updates(model: nn.Module) -> dict[str, Tensor]:
    return {fqn: randlora.delta_weight(model, fqn).detach().double() for fqn in randlora.adapters(model)[0].targets}


def assert_updates(found: dict[str, Tensor], model: nn.Module) -> None:
    assert found.keys() == updates(model).keys()
    for fqn, update in updates(model).items():
        assert torch.linalg.norm(found[fqn] - update) <= FULL * torch.linalg.norm(update), fqn


CUT: dict[str, tuple[RealModel, dict[str, Any]]] = {
    "llama": (LLAMA, {"rank": 5, "tolerance": 1}),
    "gpt2": (GPT2, {"rank": 5, "tolerance": 1}),
    "llama within 0.3": (LLAMA, {"tolerance": 0.3}),
    "gpt2 by default": (GPT2, {}),
}


@pytest.mark.parametrize(("kind", "options"), CUT.values(), ids=CUT)
def test_updates_are_cut_to_the_nearest_of_a_rank(kind: RealModel, options: dict[str, Any], tmp_path: Path) -> None:
    source, model = our_directory(kind, tmp_path)
    report = randlora.files.convert(source, tmp_path / "lora", "lora", **options)
    theirs: Any = in_peft(kind, tmp_path / "lora")
    cut, squares_lost, squares_held = kind.build(), 0.0, 0.0
    places = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, kind.name.upper()), n_blocks=2)
    for layer, (fqn, update) in zip(report.layers, updates(model).items(), strict=True):
        left, values, right = torch.linalg.svd(update)
        low = left[:, : layer.rank] * values[: layer.rank] @ right[: layer.rank]
        cut.get_parameter(f"{fqn}.weight").data += (low.T if kind is GPT2 else low).float()
        squares, size = values.square(), float(values.square().sum())
        tails = [math.sqrt(float(squares[rank:].sum()) / size) for rank in range(len(squares) + 1)]
        assert layer.relative_error == pytest.approx(tails[layer.rank], rel=1e-4, abs=FULL)
        if "rank" in options:
            assert layer.rank == 5
        else:
            assert layer.relative_error <= options.get("tolerance", 0.05) < tails[layer.rank - 1]
        module = theirs.base_model.model.get_submodule(layer.fqn)
        assert (module.r["default"], module.scaling["default"]) == (layer.rank, 1.0)
        assert places.get_name(layer.fqn) is not None, "llama.cpp finds no such layer"
        squares_lost += layer.relative_error**2 * size
        squares_held += size
    assert report.relative_error == pytest.approx(math.sqrt(squares_lost / squares_held), rel=1e-4)
    # llama.cpp's converter transposes the weights of GPT-2's layers, and with them their factors, which are not
    assert any("llama.cpp" in note for note in report.notes) == (kind is GPT2 or "rank" not in options)
    assert ("rank_pattern" in "".join(report.notes)) == (len({layer.rank for layer in report.layers}) > 1)
    assert_same_effect(cut, theirs, kind)


def test_ranks_reach_the_right_layers_whatever_their_names(tmp_path: Path) -> None:

    def build() -> nn.Module:
        inner: dict[str, nn.Module] = {"up": nn.Linear(30, 14), "a+b": nn.Linear(14, 20), "a_b": nn.Linear(20, 9)}
        return nn.Sequential(OrderedDict(up=nn.Linear(12, 30), body=nn.Sequential(OrderedDict(inner))))

    model = reproducible(build)
    randlora.save(adapt(model, r=4, alpha=8), tmp_path / "ours")
    report = randlora.files.convert(tmp_path / "ours", tmp_path / "lora", "lora", tolerance=FULL)
    assert len({layer.rank for layer in report.layers}) == 3
    theirs = PeftModel.from_pretrained(reproducible(build), tmp_path / "lora").eval()
    x = torch.randn(4, 12)
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_loss_beyond_the_tolerance_is_refused_and_nothing_written(tmp_path: Path) -> None:
    source, _ = our_directory(LLAMA, tmp_path)
    with pytest.raises(ConfigError) as refusal:
        randlora.files.convert(source, tmp_path / "lora", "lora", rank=2, tolerance=0.3)
    message = str(refusal.value)
    assert "with rank=2, 8 of 8 layers have a relative error above tolerance=0.3" in message
    for refused, said in (({"rank": 2}, r"above tolerance=0\.05"), ({"tolerance": 0}, "with the full rank")):
        with pytest.raises(ConfigError, match=said):
            randlora.files.convert(source, tmp_path / "lora", "lora", **refused)  # type: ignore[arg-type]
    assert not (tmp_path / "lora").exists()
    worst = float(message.split("the largest is ")[1].split(":", maxsplit=1)[0])
    report = randlora.files.convert(source, tmp_path / "lora", "lora", rank=2, tolerance=worst + 1e-4)
    assert max(layer.relative_error for layer in report.layers) == pytest.approx(worst, abs=1e-4)


def test_a_choice_of_layers_made_in_peft_is_kept_and_a_head(tmp_path: Path) -> None:
    options: dict[str, Any] = {"modules_to_save": ["classifier"], "bias": "randlora_only"}
    source, theirs = peer.their_directory(BERT, tmp_path, target_modules=r".*layer\.1.*(query|value)", **options)
    base = peer.base_directory(BERT, tmp_path)
    report = randlora.files.convert(source, tmp_path / "lora", "lora", tolerance=FULL, base=base)
    assert any("not every server reads them" in note for note in report.notes)
    lora = in_peft(BERT, tmp_path / "lora")
    names, own = ([name for name, _ in model.named_parameters()] for model in (lora, theirs))
    adapted = {name.split(".lora_A")[0] for name in names if ".lora_A" in name}
    assert adapted == {name.split(".randlora_gamma")[0] for name in own if "_gamma" in name}
    kept = ("modules_to_save", "query.base_layer.bias")
    assert sum(any(part in name for part in kept) for name in names) == 3
    torch.testing.assert_close(outputs(lora, BERT.inputs()), outputs(theirs, BERT.inputs()), rtol=1e-3, atol=1e-3)


def test_an_adapter_that_changes_nothing_becomes_a_lora_that_changes_nothing(tmp_path: Path) -> None:
    model = LLAMA.build()
    randlora.inject(model, r=4)
    randlora.save(model, tmp_path / "ours")
    report = randlora.files.convert(tmp_path / "ours", tmp_path / "lora", "lora")
    assert {(layer.rank, layer.relative_error) for layer in report.layers} == {(1, report.relative_error)} == {(1, 0)}
    found, expected = (outputs(each, LLAMA.inputs()) for each in (in_peft(LLAMA, tmp_path / "lora"), LLAMA.build()))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(400, 300), (300, 400)], ids=["tall", "wide"])
@pytest.mark.parametrize("decay", [0.0, 0.05], ids=["flat spectrum", "falling spectrum"])
def test_a_large_matrix_is_approximated(decay: float, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(shape) * torch.exp(-decay * torch.arange(shape[1]))
    values = torch.linalg.svdvals(matrix.double())
    tails = [float(values[rank:].norm() / values.norm()) for rank in range(len(values))]
    assert spectral_norm(matrix) == pytest.approx(float(values[0]), rel=1e-5)
    assert frobenius_norm(matrix) == pytest.approx(float(values.norm()), rel=1e-6)
    monkeypatch.setattr(layouts, "EXACT_UP_TO", 8)
    assert 0.95 * float(values[0]) <= spectral_norm(matrix) <= float(values[0]) * (1 + 1e-5)
    before = torch.get_rng_state()
    found = of_rank(matrix, 20)
    assert torch.equal(torch.get_rng_state(), before)
    distance = torch.linalg.norm(matrix.double() - found.left.double() @ found.right.double()) / values.norm()
    assert found.relative_error == pytest.approx(float(distance), rel=1e-3)
    assert tails[20] * (1 - 1e-4) <= found.relative_error <= tails[20] * 1.02
    assert decay or found.relative_error > tails[20] * (1 + 1e-6), "it was the exact one"
    near, smallest = within(matrix, 0.1), next(rank for rank, error in enumerate([*tails, 0.0]) if error <= 0.1)
    assert near.relative_error <= 0.1
    assert smallest <= near.left.shape[1] <= smallest + 2


def test_servers_of_one_rank_add_the_update_and_a_note_says_where_ranks_differ(tmp_path: Path) -> None:
    # vLLM scales every layer by `lora_alpha / r` and pads its factors to r, SGLang copies them into room for exactly r
    # and reads names from a list, and llama.cpp divides `lora_alpha` by the rank of each tensor
    source, model = our_directory(LLAMA, tmp_path)
    options: dict[str, dict[str, Any]] = {"one": {"rank": 32}, "padded": {"same_rank": True}, "mixed": {}}
    notes, layers = {}, {}
    for name, given in options.items():
        report = randlora.files.convert(source, tmp_path / name, "lora", tolerance=FULL, **given)
        notes[name], layers[name] = report.notes, report.layers
        fields, tensors = read_fields(tmp_path / name), load_file(tmp_path / name / TENSORS_FILE)
        assert not any(fields[name] for name in ("modules_to_save", "use_dora")), "which none of them reads"
        assert isinstance(fields["target_modules"], list)
        fqns = [layer.fqn for layer in report.layers]
        assert tensors.keys() == {f"{PREFIX}{fqn}.lora_{part}.weight" for fqn in fqns for part in "AB"}
        ranks = {len(tensor) for key, tensor in tensors.items() if ".lora_A." in key}
        assert (ranks == {fields["r"]}) == (name != "mixed")
        assert max(ranks) <= fields["r"] == fields["lora_alpha"]
        factors = {fqn: [tensors[f"{PREFIX}{fqn}.lora_{part}.weight"].double() for part in "BA"] for fqn in fqns}
        assert_updates({fqn: lora_B @ lora_A for fqn, (lora_B, lora_A) in factors.items()}, model)
        if name != "mixed":
            assert (fields["r"], fields["rank_pattern"], fields["alpha_pattern"]) == (32, {}, {})
            assert_same_effect(model, in_peft(LLAMA, tmp_path / name), LLAMA)
    assert layers["mixed"] == layers["padded"]
    assert notes["one"] == ()
    assert notes["padded"][-1].endswith("padded with zeros to rank 32, which changes no update")
    assert "SGLang does not, and llama.cpp would scale layers wrongly; same_rank=True" in notes["mixed"][-1]


@pytest.mark.parametrize("kind", [LLAMA, GPT2], ids=lambda kind: kind.name)
def test_files_for_diffusers_are_the_same_each_time_and_stand_beside_no_other(kind: RealModel, tmp_path: Path) -> None:
    options: dict[str, Any] = {"to": "lora", "format": "diffusers"}  # which diffusers reads below
    source, _ = our_directory(kind, tmp_path)
    first, second = (randlora.files.convert(source, tmp_path / "again", overwrite=True, **options) for _ in range(2))
    assert first == second
    assert first.nbytes == sum(map(len, contents(first.out).values()))
    randlora.files.convert(source, tmp_path / "out", "peft")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds adapter_model\S+, of a different format"):
        randlora.files.convert(source, tmp_path / "out", overwrite=True, **options)
    assert contents(tmp_path) == before


def clip() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=50, max_position_embeddings=8, bos_token_id=0, eos_token_id=1, **sizes)
    return reproducible(lambda: CLIPTextModel(config))


PARTS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]], Any]] = {
    "unet": (unet, noise, None),
    "transformer": (flux, patches, r".*\.to_q|proj_out|.*\.proj_mlp"),  # of `proj_out` not those within a block
    "text_encoder": (clip, lambda: {"input_ids": torch.arange(12).reshape(2, 6)}, None),
}


def pipeline(component: str, model: nn.Module) -> Any:
    import diffusers

    others = ["scheduler", "vae", "text_encoder", "tokenizer"]
    if component == "transformer":
        parts = dict.fromkeys([*others, "text_encoder_2", "tokenizer_2"])
        return diffusers.FluxPipeline(**parts, transformer=model)
    parts = dict.fromkeys([*others, "safety_checker", "feature_extractor"]) | {"unet": unet()} | {component: model}
    return diffusers.StableDiffusionPipeline(requires_safety_checker=False, **parts)


def output(model: nn.Module, inputs: Callable[[], dict[str, Any]]) -> Tensor:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        found: Tensor = model(**inputs())[0]
    return found


@pytest.mark.medium
@pytest.mark.parametrize("component", PARTS)
def test_a_pipeline_of_diffusers_loads_the_update_as_it_is(component: str, tmp_path: Path) -> None:
    build, inputs, chosen = PARTS[component]
    model = build().eval()
    randlora.save(adapt(model, r=4, alpha=8, targets=chosen), tmp_path / "ours")
    report = randlora.files.convert(tmp_path / "ours", tmp_path / "lora", "lora", format="diffusers", tolerance=FULL)
    (file,) = (tmp_path / "lora").iterdir()
    assert file.name == "pytorch_lora_weights.safetensors"
    assert report.notes[0].startswith(f"for {component!r} of a pipeline")
    assert len({layer.rank for layer in report.layers}) > 1
    pipe = pipeline(component, build().eval())
    pipe.load_lora_weights(tmp_path / "lora")
    served = getattr(pipe, component)
    expected, base = output(model, inputs), output(build().eval(), inputs)
    assert (output(served, inputs) - expected).abs().max() < 1e-4 * (expected - base).abs().max()
    targets = randlora.adapters(model)[0].targets
    assert {name.split(".lora_A")[0] for name, _ in served.named_parameters() if ".lora_A" in name} == {*targets}
    with safe_open(file, "pt") as opened:  # versions that read no metadata get the same scaling
        packed = json.loads(opened.metadata()["lora_adapter_metadata"])
    config = LoraConfig(**{name.removeprefix(f"{component}."): value for name, value in packed.items()})
    ranks = {each.shape[1] for key, each in load_file(file).items() if "lora_B" in key}
    assert ranks == {config.r} == {config.lora_alpha}
