"""What llama.cpp's and mlx-lm's converters take: a merged model has the base's names, and a LoRA those of its layers.

llama.cpp's rules are those of its package `gguf`, and of ``convert_hf_to_gguf.py`` and ``convert_lora_to_gguf.py``
(https://github.com/ggml-org/llama.cpp), which are written down here: a name without a place in GGUF is an error.
"""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

import randlora
from tests.directories import base_directory, our_directory
from tests.models import GPT2, LLAMA, RealModel
from tests.peer import PREFIX

gguf = pytest.importorskip("gguf")

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "gpt2": gguf.MODEL_ARCH.GPT2}
FACTORS = (".lora_A.weight", ".lora_B.weight")

both_kinds = pytest.mark.parametrize("kind", [LLAMA, GPT2], ids=lambda kind: kind.name)


def in_gguf(kind: RealModel, names: set[str]) -> set[str]:
    """Return what tensors are called in GGUF, each of them."""
    places = gguf.get_tensor_name_map(ARCHITECTURES[kind.name], n_blocks=2)
    found = {name: places.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    assert None not in found.values(), found
    assert len(set(found.values())) == len(names)
    return set(found.values())


@both_kinds
def test_a_merged_model_has_the_files_and_names_that_converters_of_the_base_take(
    kind: RealModel, tmp_path: Path
) -> None:
    base = base_directory(kind, tmp_path)
    source, model = our_directory(kind, tmp_path)
    merged = randlora.files.merge(source, tmp_path / "merged", base=base).out
    assert {path.name for path in merged.iterdir()} == {path.name for path in base.iterdir()}
    files = list(merged.glob("model*.safetensors"))  # those that mlx-lm reads
    names = {name for path in files for name in load_file(path)}
    assert names == {name for path in base.glob("*.safetensors") for name in load_file(path)}
    assert json.loads((merged / "config.json").read_text())["model_type"] == kind.name
    weights = {f"{fqn}.weight" for fqn in randlora.adapters(model)[0].targets}
    assert in_gguf(kind, names) > in_gguf(kind, weights)


@both_kinds
def test_a_lora_has_a_pair_of_factors_for_tensors_that_gguf_has_and_nothing_else(
    kind: RealModel, tmp_path: Path
) -> None:
    source, model = our_directory(kind, tmp_path)
    report = randlora.files.convert(source, tmp_path / "lora", "lora", rank=32)
    keys = set(load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    layers = {key.removeprefix(PREFIX).removesuffix(end) for key in keys for end in FACTORS if key.endswith(end)}
    assert layers == set(randlora.adapters(model)[0].targets)
    assert keys == {f"{PREFIX}{fqn}{end}" for fqn in layers for end in FACTORS}
    assert in_gguf(kind, {f"{fqn}.weight" for fqn in layers})
    # its converter transposes the weights of GPT-2's layers, and their factors with them, which are not transposed
    assert any("llama.cpp" in note for note in report.notes) == (kind is GPT2)
