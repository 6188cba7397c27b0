"""A LoRA in the files of other programs: each gets the update that was measured, by its own rules for names and ranks.

diffusers and PEFT are the real ones. vLLM, SGLang, llama.cpp and mlx-lm are not installed with the tests; what they do
with names, ranks and scalings is written down here, and the test of mlx-lm runs where it is.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import randlora
from randlora.checkpoint.peft_config import CONFIG_FILE
from randlora.checkpoint.tensors import TENSORS_FILE
from randlora.errors import CheckpointError, ConfigError
from randlora.files.convert import ConversionReport
from tests.diffusion_models import flux, noise, patches, unet
from tests.directories import base_directory, our_directory
from tests.kit import fill, same_bits
from tests.model_directories import contents
from tests.models import BERT, GPT2, LLAMA, RealModel, outputs, reproducible
from tests.peer import PREFIX, THEIR_WARNINGS, assert_same_effect, in_peft

pytestmark = THEIR_WARNINGS

FULL = 1e-5  # a tolerance that only a full rank is within


def fields_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / CONFIG_FILE).read_text())
    return found


def updates(model: nn.Module) -> dict[str, Tensor]:
    """Compute the updates of a model's adapter in float64."""
    return {fqn: randlora.delta_weight(model, fqn).detach().double() for fqn in randlora.adapters(model)[0].targets}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], within: float = FULL) -> None:
    assert found.keys() == expected.keys()
    for fqn, update in expected.items():
        assert torch.linalg.norm(found[fqn] - update) <= within * torch.linalg.norm(update), fqn


# --- what other programs make of PEFT's layout -----------------------------------------------------------------------


def pairs(directory: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return B and A of every layer, by its name; any tensor of another name is an error, as to all of the servers."""
    tensors = load_file(directory / TENSORS_FILE)
    rule = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_(A|B)\.weight")
    names = {key: match.groups() for key in tensors if (match := rule.fullmatch(key))}
    assert names.keys() == tensors.keys()
    by_name = {found: tensors[key].double() for key, found in names.items()}
    return {fqn: (by_name[fqn, "B"], by_name[fqn, "A"]) for fqn, _ in names.values()}


def in_vllm(directory: Path) -> dict[str, Tensor]:
    """Scale every layer by one number, and pad its factors to the server's rank."""
    fields = fields_of(directory)
    assert not fields["modules_to_save"]
    assert not fields["use_dora"]
    assert isinstance(fields["target_modules"], str | list)
    assert all(len(lora_A) <= fields["r"] for _, lora_A in pairs(directory).values())
    scaling = fields["lora_alpha"] / fields["r"]
    return {fqn: scaling * lora_B @ lora_A for fqn, (lora_B, lora_A) in pairs(directory).items()}


def in_sglang(directory: Path) -> dict[str, Tensor]:
    """Copy factors into room for exactly r, and take names of modules from a list."""
    fields = fields_of(directory)
    assert isinstance(fields["target_modules"], list)
    for lora_B, lora_A in pairs(directory).values():
        if (len(lora_A), lora_B.shape[1]) != (fields["r"], fields["r"]):
            raise ValueError("shape mismatch")
    return in_vllm(directory)


def in_llama_cpp(directory: Path) -> dict[str, Tensor]:
    """Keep one alpha of the JSON, and divide it by the rank of each tensor."""
    alpha = fields_of(directory)["lora_alpha"]
    return {fqn: alpha / lora_B.shape[1] * lora_B @ lora_A for fqn, (lora_B, lora_A) in pairs(directory).items()}


SERVERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    "vllm": in_vllm,
    "sglang": in_sglang,
    "llama.cpp": in_llama_cpp,
}


@pytest.mark.parametrize("server", SERVERS.values(), ids=SERVERS)
@pytest.mark.parametrize("options", [{"rank": 32, "tolerance": FULL}, {"tolerance": FULL, "same_rank": True}], ids=str)
def test_every_server_of_one_rank_adds_the_update(
    server: Callable[[Path], dict[str, Tensor]], options: dict[str, Any], tmp_path: Path
) -> None:
    source, model = our_directory(LLAMA, tmp_path)
    randlora.files.convert(source, tmp_path / "lora", "lora", **options)
    assert_near(server(tmp_path / "lora"), updates(model))


def test_ranks_that_differ_are_for_peft_and_vllm_alone_and_a_note_says_so(tmp_path: Path) -> None:
    source, model = our_directory(LLAMA, tmp_path)
    report = randlora.files.convert(source, tmp_path / "lora", "lora", tolerance=FULL)
    assert "SGLang does not, and llama.cpp would scale layers wrongly; same_rank=True" in report.notes[-1]
    assert_near(in_vllm(tmp_path / "lora"), updates(model))
    with pytest.raises(ValueError, match="shape mismatch"):
        in_sglang(tmp_path / "lora")
    with pytest.raises(AssertionError):
        assert_near(in_llama_cpp(tmp_path / "lora"), updates(model))


def test_a_choice_of_layers_that_sglang_cannot_read_is_noted(tmp_path: Path) -> None:
    source, _ = our_directory(LLAMA, tmp_path)
    assert randlora.files.convert(source, tmp_path / "lora", "lora", rank=32).notes == ()
    regex = LLAMA.build()
    randlora.inject(regex, r=4, targets=r".*layers\.1\.mlp\.up_proj")
    randlora.save(fill(regex), tmp_path / "regex")
    report = randlora.files.convert(tmp_path / "regex", tmp_path / "by_regex", "lora", rank=32)
    assert fields_of(tmp_path / "by_regex")["target_modules"] == r"model\.layers\.1\.mlp\.up_proj"
    assert report.notes[0].endswith("SGLang reads only a list")


def test_padding_to_one_rank_changes_nothing_in_peft(tmp_path: Path) -> None:
    source, model = our_directory(LLAMA, tmp_path)
    padded = randlora.files.convert(source, tmp_path / "one", "lora", tolerance=FULL, same_rank=True)
    mixed = randlora.files.convert(source, tmp_path / "mixed", "lora", tolerance=FULL)
    assert padded.layers == mixed.layers
    assert padded.notes[-1].endswith("padded with zeros to rank 32, which changes no update")
    fields = fields_of(tmp_path / "one")
    assert (fields["r"], fields["lora_alpha"], fields["rank_pattern"], fields["alpha_pattern"]) == (32, 32, {}, {})
    assert_near(in_vllm(tmp_path / "one"), in_vllm(tmp_path / "mixed"), within=0)
    assert_same_effect(model, in_peft(LLAMA, tmp_path / "one"), LLAMA)


# --- diffusers -------------------------------------------------------------------------------------------------------


def pipeline(**parts: Any) -> Any:
    """Build a pipeline of Stable Diffusion or of Flux around one of its models."""
    import diffusers

    if "transformer" in parts:
        others = ["scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]
        return diffusers.FluxPipeline(**dict.fromkeys(others), **parts)
    others = ["vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor"]
    parts = dict.fromkeys(others) | {"unet": unet()} | parts
    return diffusers.StableDiffusionPipeline(requires_safety_checker=False, **parts)


def clip() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=50, max_position_embeddings=8, bos_token_id=0, eos_token_id=1, **sizes)
    return reproducible(lambda: CLIPTextModel(config))


def tokens() -> dict[str, Any]:
    return {"input_ids": torch.arange(12).reshape(2, 6)}


PARTS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]], Any]] = {
    "unet": (unet, noise, None),
    "transformer": (flux, patches, r".*\.to_q|proj_out|.*\.proj_mlp"),  # a `proj_out` within a block is not adapted
    "text_encoder": (clip, tokens, None),
}


def output(model: nn.Module, inputs: Callable[[], dict[str, Any]]) -> Tensor:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        found: Tensor = model(**inputs())[0]
    return found


def saved(component: str, parent: Path) -> tuple[Path, nn.Module]:
    build, _, targets = PARTS[component]
    model = build().eval()
    randlora.inject(model, r=4, alpha=8, targets=targets)
    fill(model)
    randlora.save(model, parent / "ours")
    return parent / "ours", model


@pytest.mark.medium
@pytest.mark.parametrize("component", PARTS)
def test_a_pipeline_loads_the_update_without_a_prefix_stripped_by_hand(component: str, tmp_path: Path) -> None:
    build, inputs, _ = PARTS[component]
    source, model = saved(component, tmp_path)
    report = randlora.files.convert(source, tmp_path / "lora", "lora", format="diffusers", tolerance=FULL)
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == ["pytorch_lora_weights.safetensors"]
    assert report.notes[0].startswith(f"for {component!r} of a pipeline")
    assert len({layer.rank for layer in report.layers}) > 1
    pipe = pipeline(**{component: build().eval()})
    pipe.load_lora_weights(tmp_path / "lora")
    served = getattr(pipe, component)
    expected, base = output(model, inputs), output(build().eval(), inputs)
    assert (output(served, inputs) - expected).abs().max() < 1e-4 * (expected - base).abs().max()
    adapted = {name.split(".lora_A")[0] for name, _ in served.named_parameters() if ".lora_A" in name}
    assert adapted == {layer.fqn for layer in report.layers}


@pytest.mark.medium
def test_a_model_alone_loads_it_with_the_name_of_its_part(tmp_path: Path) -> None:
    source, model = saved("unet", tmp_path)
    randlora.files.convert(source, tmp_path / "lora", "lora", format="diffusers", tolerance=FULL)
    alone: Any = unet().eval()
    alone.load_lora_adapter(tmp_path / "lora", prefix="unet", use_safetensors=True)
    torch.testing.assert_close(output(alone, noise), output(model, noise), rtol=1e-4, atol=1e-5)


def test_versions_of_diffusers_that_read_no_metadata_get_the_same_scaling(tmp_path: Path) -> None:
    source, _ = saved("transformer", tmp_path)
    randlora.files.convert(source, tmp_path / "lora", "lora", format="diffusers", tolerance=FULL)
    path = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    tensors = load_file(path)
    ranks = {tensor.shape[1] for key, tensor in tensors.items() if "lora_B" in key}
    with safe_open(path, "pt") as file:
        packed = json.loads(file.metadata()["lora_adapter_metadata"])
    config = LoraConfig(**{name.removeprefix("transformer."): value for name, value in packed.items()})
    assert ranks == {config.r} == {config.lora_alpha}


def test_another_part_of_a_pipeline_can_be_named(tmp_path: Path) -> None:
    source, _ = saved("text_encoder", tmp_path)
    options: dict[str, Any] = {"format": "diffusers", "rank": 16, "component": "text_encoder_2"}
    randlora.files.convert(source, tmp_path / "lora", "lora", **options)
    keys = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert all(key.startswith("text_encoder_2.encoder.layers.") for key in keys)


# --- mlx-lm ----------------------------------------------------------------------------------------------------------


def in_mlx(directory: Path) -> dict[str, Tensor]:
    """Compute ``scale · a b``, transposed, of the layers that the configuration names; all have its one rank."""
    found = fields_of(directory)
    options = found["lora_parameters"]
    assert (found["fine_tune_type"], options["dropout"]) == ("lora", 0.0)
    tensors = load_file(directory / "adapters.safetensors")
    assert tensors.keys() == {f"{fqn}.lora_{part}" for fqn in options["keys"] for part in "ab"}
    result = {}
    for fqn in options["keys"]:
        a, b = (tensors[f"{fqn}.lora_{part}"].double() for part in "ab")
        assert (a.shape[1], b.shape[0]) == (options["rank"], options["rank"])
        result[fqn] = options["scale"] * (a @ b).T
    return result


@pytest.mark.parametrize("kind", [LLAMA, GPT2], ids=lambda kind: kind.name)  # it has other names for GPT-2's layers
def test_mlx_lm_adds_the_update(kind: RealModel, tmp_path: Path) -> None:
    source, model = our_directory(kind, tmp_path)
    report = randlora.files.convert(source, tmp_path / "lora", "lora", format="mlx", tolerance=FULL)
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == [CONFIG_FILE, "adapters.safetensors"]
    assert_near(in_mlx(tmp_path / "lora"), updates(model))
    assert len(report.layers) == len(in_mlx(tmp_path / "lora"))


@pytest.mark.slow
def test_the_real_mlx_lm_computes_what_the_adapter_does(tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    tuner, loading = pytest.importorskip("mlx_lm.tuner.utils"), pytest.importorskip("mlx_lm.utils")
    source, model = our_directory(LLAMA, tmp_path)
    randlora.files.convert(source, tmp_path / "lora", "lora", format="mlx", tolerance=FULL)
    theirs, _ = loading.load_model(base_directory(LLAMA, tmp_path))
    tuner.load_adapters(theirs, str(tmp_path / "lora"))
    ids = LLAMA.inputs()["input_ids"]
    merged = randlora.files.merge(source, tmp_path / "merged", base=tmp_path / "base").out
    for each in (theirs, loading.load_model(merged)[0]):
        found = torch.from_numpy(np.array(each(mx.array(ids.numpy()))))
        torch.testing.assert_close(found, outputs(model, {"input_ids": ids}), rtol=1e-4, atol=1e-5)


# --- ComfyUI ---------------------------------------------------------------------------------------------------------

KEYS = {
    "unet": r"lora_unet_(down|up|mid)_block[s_]\w+_to_\w+\.diff",
    "transformer": r"transformer\.[\w.]+\.diff",
    "text_encoder": r"text_encoder\.text_model\.encoder\.layers\.\d\.self_attn\.[qv]_proj\.diff",
}


@pytest.mark.parametrize("component", PARTS)
def test_full_updates_are_exact_under_keys_that_comfyui_knows(component: str, tmp_path: Path) -> None:
    source, model = saved(component, tmp_path)
    told: list[tuple[int, int, str]] = []
    report = randlora.files.convert(source, tmp_path / "diff", "diff", progress=lambda *news: told.append(news))
    tensors = load_file(tmp_path / "diff" / "diff.safetensors")
    assert report.relative_error == 0
    assert all(re.fullmatch(KEYS[component], key) for key in tensors)
    targets = randlora.adapters(model)[0].targets
    expected = {fqn: randlora.delta_weight(model, fqn).detach() for fqn in targets}
    found = {key.removesuffix(".diff").replace(".", "_"): tensor for key, tensor in tensors.items()}
    assert len(found) == len(targets)
    for fqn, update in expected.items():
        (tensor,) = (found[key] for key in found if key.endswith(f"_{fqn.replace('.', '_')}") and _is_whole(key, fqn))
        assert same_bits(tensor, update), fqn
    assert [done for done, _, _ in told] == [*range(len(targets)), len(targets)]


def _is_whole(key: str, fqn: str) -> bool:
    beginnings = ("lora_unet_", "transformer_", "text_encoder_text_model_")
    return key in {f"{beginning}{fqn.replace('.', '_')}" for beginning in beginnings}


@pytest.mark.parametrize("kind", [LLAMA, GPT2], ids=lambda kind: kind.name)
def test_a_full_update_has_the_layout_of_the_weight_that_it_is_added_to(kind: RealModel, tmp_path: Path) -> None:
    source, model = our_directory(kind, tmp_path)
    randlora.files.convert(source, tmp_path / "diff", "diff")
    before, targets = kind.build().state_dict(), randlora.adapters(model)[0].targets
    randlora.merge(model)
    for fqn in targets:
        diff = load_file(tmp_path / "diff" / "diff.safetensors")[f"diffusion_model.{fqn}.diff"]
        torch.testing.assert_close(before[f"{fqn}.weight"] + diff, model.get_parameter(f"{fqn}.weight").data)


def test_names_that_authors_gave_have_the_generic_key(tmp_path: Path) -> None:
    model = nn.ModuleDict({"double_blocks": nn.ModuleList([nn.ModuleDict({"qkv": nn.Linear(8, 24)})])})
    randlora.inject(model, r=4)
    randlora.save(model, tmp_path / "ours")
    report = randlora.files.convert(tmp_path / "ours", tmp_path / "diff", "diff")
    assert load_file(tmp_path / "diff" / "diff.safetensors").keys() == {"diffusion_model.double_blocks.0.qkv.diff"}
    assert "for 'diffusion_model'" in report.notes[-1]


# --- what is refused, before anything is written ---------------------------------------------------------------------


def refused(parent: Path, message: str, **options: Any) -> None:
    """Assert that a conversion is an error, and that nothing is written."""
    with pytest.raises((ConfigError, CheckpointError), match=message):
        randlora.files.convert(parent / "ours", parent / "out", **options)
    assert not (parent / "out").exists()


WRONG: dict[str, dict[str, Any]] = {
    "format= and same_rank= are for to=\"lora\", not 'peft'": {"to": "peft", "format": "peft"},
    "format= and same_rank= are for to=\"lora\", not 'diff'": {"to": "diff", "same_rank": True},
    "rank= and tolerance= are for to=\"lora\": 'diff' is exact": {"to": "diff", "rank": 3},
    "rank= and tolerance= are for to=\"lora\": 'peft' is exact": {"rank": 4},
    'component= is for to="diff", and': {"to": "lora", "component": "unet"},
    'component="diffusion_model" is for to="diff"': {
        "to": "lora",
        "format": "diffusers",
        "component": "diffusion_model",
    },
    "format": {"to": "lora", "format": "gguf"},
    "to must be one of peft, native, lora, diff, got 'gguf'": {"to": "gguf"},
    "rank must be a positive integer, got 0": {"to": "lora", "rank": 0},
    "tolerance must be a finite number, got nan": {"to": "lora", "tolerance": float("nan")},
    "tolerance must be a finite number or None": {"to": "lora", "tolerance": "a"},
}


@pytest.mark.parametrize(("message", "options"), WRONG.items(), ids=WRONG)
def test_options_that_mean_nothing_are_errors(message: str, options: dict[str, Any], tmp_path: Path) -> None:
    our_directory(LLAMA, tmp_path)
    refused(tmp_path, message, **options)


ALONE: dict[str, dict[str, Any]] = {
    "diffusers": {"to": "lora", "format": "diffusers"},
    "mlx": {"to": "lora", "format": "mlx"},
    "diff": {"to": "diff"},
}
updates_alone = pytest.mark.parametrize("options", ALONE.values(), ids=ALONE)


@updates_alone
def test_parameters_trained_too_are_for_peft_alone(options: dict[str, Any], tmp_path: Path) -> None:
    model = BERT.build()
    randlora.inject(model, r=4, train_also=["classifier"])
    randlora.save(model, tmp_path / "ours")
    refused(
        tmp_path, r"holds only updates, but the adapter has trained classifier\.bias, classifier\.weight", **options
    )


@updates_alone
def test_layers_that_are_not_linear_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 8))
    randlora.inject(model, r=4, targets="all")
    randlora.save(model, tmp_path / "ours")
    refused(tmp_path, "0 is of kind convolution, and only linear layers", **options)


def test_two_names_that_comfyui_does_not_tell_apart_are_refused(tmp_path: Path) -> None:
    model = nn.ModuleDict({
        "down_blocks": nn.ModuleDict({"a_b": nn.Linear(4, 4), "a": nn.ModuleDict({"b": nn.Linear(4, 4)})})
    })
    randlora.inject(model, r=2)
    randlora.save(model, tmp_path / "ours")
    refused(tmp_path, r"two layers would have the key lora_unet_down_blocks_a_b\.diff", to="diff")


@updates_alone
def test_files_of_another_format_are_not_left_beside_the_new_ones(options: dict[str, Any], tmp_path: Path) -> None:
    our_directory(LLAMA, tmp_path)
    randlora.files.convert(tmp_path / "ours", tmp_path / "out", "peft")
    before = contents(tmp_path / "out")
    with pytest.raises(CheckpointError, match="holds files of a different format, such as adapter_model"):
        randlora.files.convert(tmp_path / "ours", tmp_path / "out", overwrite=True, **options)
    assert contents(tmp_path / "out") == before


@updates_alone
def test_files_of_the_same_format_are_replaced(options: dict[str, Any], tmp_path: Path) -> None:
    our_directory(LLAMA, tmp_path)
    reports: list[ConversionReport] = [
        randlora.files.convert(tmp_path / "ours", tmp_path / "out", overwrite=True, **options) for _ in range(2)
    ]
    assert reports[0] == reports[1]
    assert reports[0].nbytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
