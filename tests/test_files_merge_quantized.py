"""Merging into a quantized checkpoint writes a dense one: every code written out, every update added, rounded once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

import randlora
from tests.model_directories import contents, save_adapter
from tests.models import GPT2, LLAMA, RealModel, outputs
from tests.quantized_checkpoints import KINDS, QUANTIZATIONS, WIDE, load_quantized, quantize, stored, written_out

COMPANIONS = ("absmax", "quant_map", "quant_state", "SCB", "weight_format")

every_quantization = pytest.mark.parametrize("quantization", QUANTIZATIONS)
both_kinds = pytest.mark.parametrize("kind", [LLAMA, GPT2], ids=lambda kind: kind.name)
both_layouts = pytest.mark.parametrize("is_sharded", [False, True], ids=["one-file", "sharded"])


def merged(kind: RealModel, base: Path, adapter: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Write codes out, add the updates of a model that carries the adapter, and round."""
    carrier = kind.build()
    randlora.load(carrier, adapter)
    tensors = stored(base)
    expected = {name: tensor for name, tensor in tensors.items() if not any(part in name for part in COMPANIONS)}
    for name, weight in written_out(tensors).items():
        fqn = name.removesuffix(".weight")
        is_adapted = fqn in randlora.adapters(carrier)[0].targets
        summed = weight + randlora.delta_weight(carrier, fqn).detach() if is_adapted else weight
        expected[name] = summed.T if kind is GPT2 else summed
    return {name: tensor.to(dtype) for name, tensor in expected.items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Hold tensors against each other, to the last bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name], tensor), name


@both_kinds
@both_layouts
@every_quantization
def test_every_weight_is_what_its_codes_stand_for_and_the_update(
    quantization: str, is_sharded: bool, kind: RealModel, tmp_path: Path
) -> None:
    base = quantize(kind, quantization, tmp_path / "base", is_sharded=is_sharded)
    adapter = save_adapter(kind, tmp_path / "adapter", targets=list(kind.targets[::2]))
    assert (len(list(base.glob("*.safetensors"))) > 1) == is_sharded
    before = contents(base)
    report = randlora.files.merge(base, adapter, tmp_path / "out")
    expected = merged(kind, base, adapter)
    assert_equal(stored(report.out), expected)
    assert contents(base) == before
    model = transformers.AutoModelForCausalLM.from_pretrained(report.out)
    loaded = model.state_dict()
    assert_equal({name: loaded[name] for name in expected}, expected)
    assert report.dequantized == dict.fromkeys(written_out(stored(base)), KINDS[quantization])
    assert set(report.merged) < set(report.dequantized)


@both_layouts
@both_kinds
def test_the_files_are_those_of_the_dense_model(kind: RealModel, is_sharded: bool, tmp_path: Path) -> None:
    base = quantize(kind, "nf4 twice", tmp_path / "base", is_sharded=is_sharded)
    report = randlora.files.merge(base, save_adapter(kind, tmp_path / "adapter"), tmp_path / "out")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    assert config.pop("quantization_config")["load_in_4bit"]
    assert json.loads((report.out / "config.json").read_text(encoding="utf-8")) == config
    assert report.nbytes == sum(tensor.nbytes for tensor in stored(report.out).values())
    assert report.base_nbytes == sum(tensor.nbytes for tensor in stored(base).values())
    assert (report.out / "model.safetensors.index.json").is_file() == is_sharded
    if is_sharded:
        index = json.loads((report.out / "model.safetensors.index.json").read_text(encoding="utf-8"))
        assert index["metadata"]["total_size"] == report.nbytes
        shards = {path.name for path in report.out.glob("*.safetensors")}
        assert index["weight_map"].keys() == stored(report.out).keys()
        assert set(index["weight_map"].values()) == shards
        assert len(shards) == report.shards > 1


def test_a_file_with_nothing_but_what_stands_beside_codes_is_left_out(tmp_path: Path) -> None:
    base = quantize(LLAMA, "fp4", tmp_path / "base")
    split_off(base, [name for name in stored(base) if "absmax" in name])
    report = randlora.files.merge(base, save_adapter(LLAMA, tmp_path / "adapter"), tmp_path / "out")
    assert [path.name for path in report.out.glob("*.safetensors")] == ["model-00001-of-00002.safetensors"]
    assert report.notes == ()
    transformers.AutoModelForCausalLM.from_pretrained(report.out)


def split_off(base: Path, names: list[str]) -> None:
    """Put some tensors of a checkpoint in one file into a second file."""
    from safetensors.torch import save_file

    tensors = stored(base)
    places = {name: f"model-0000{1 + (name in names)}-of-00002.safetensors" for name in tensors}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == file}, base / file, {"format": "pt"})
    (base / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("quantization", ["nf4 twice", "8 bits"])
def test_another_dtype_is_rounded_to_from_float32(quantization: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = quantize(LLAMA, quantization, tmp_path / "base")
    adapter = save_adapter(LLAMA, tmp_path / "adapter")
    out = randlora.files.merge(base, adapter, tmp_path / "out", dtype=dtype).out
    assert_equal(stored(out), merged(LLAMA, base, adapter, dtype))
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["dtype"] == str(dtype).removeprefix("torch.")


@both_kinds
def test_the_dense_model_computes_what_the_quantized_one_does(kind: RealModel, tmp_path: Path) -> None:
    """That of GPT-2 has a square matrix, of which no shape tells whether it was to be transposed."""
    base = quantize(kind, "8 bits", tmp_path / "base")
    adapter = save_adapter(kind, tmp_path / "adapter")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, device_map="cpu")
    randlora.load(model, adapter)
    expected = outputs(model.eval(), kind.inputs()).float()
    dense = transformers.AutoModelForCausalLM.from_pretrained(randlora.files.merge(base, adapter, tmp_path / "out").out)
    found = outputs(dense.eval(), kind.inputs()).float()
    error = torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)
    assert error < 0.05


@pytest.mark.parametrize("quantization", ["nf4", "nf4 twice", "fp4", "8 bits"])
def test_what_is_written_is_what_merging_in_memory_leaves(quantization: str, tmp_path: Path) -> None:
    base = quantize(WIDE, quantization, tmp_path / "base")
    adapter = save_adapter(WIDE, tmp_path / "adapter")
    out = randlora.files.merge(base, adapter, tmp_path / "out").out
    model = transformers.AutoModelForCausalLM.from_pretrained(base, device_map="cpu")
    report = randlora.load(model, adapter)
    randlora.merge(model, quantized="dequantize", dtype=torch.bfloat16)
    assert report.targets
    for fqn in report.targets:
        assert torch.equal(model.get_submodule(fqn).weight, stored(out)[f"{fqn}.weight"]), fqn


def test_an_adapter_trained_on_the_quantized_model_fits_it(tmp_path: Path) -> None:
    base = quantize(GPT2, "8 bits", tmp_path / "base")
    model = load_quantized(tmp_path / "base dense", "8 bits")
    report = randlora.inject(model, r=4, targets=list(GPT2.targets))
    for number, parameter in enumerate(randlora.trainable_parameters(model)):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    randlora.save(model, tmp_path / "adapter")
    assert randlora.files.verify(tmp_path / "adapter", base).passed
    out = randlora.files.merge(base, tmp_path / "adapter", tmp_path / "out").out
    assert_equal(stored(out), merged(GPT2, base, tmp_path / "adapter"))
    assert len(report.targets) == len(randlora.files.inspect(tmp_path / "adapter", base, norms=False).layers)


MEASURED = """
import json, sys
from pathlib import Path
import randlora

def kibibytes(name):
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(name + ":"))

small, large = map(Path, sys.argv[1:])
randlora.files.merge(small / "base", small / "adapter", small / "out")  # what is used for the first time counts not
before = kibibytes("VmRSS")
randlora.files.merge(large / "base", large / "adapter", large / "out")
print(json.dumps({"peak": 1024 * (kibibytes("VmHWM") - before)}))
"""


def many(directory: Path, width: int, layers: int) -> Path:
    """Save a model of layers in codes of 4 bits, and an adapter of the first of them."""
    import bitsandbytes.functional as bnb
    from safetensors.torch import save_file

    tensors = {}
    for layer in range(layers):
        weight = torch.randn(width, width, generator=torch.Generator().manual_seed(layer))
        tensors[f"{layer}.weight"], state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        tensors |= {f"{layer}.weight.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
    (directory / "base").mkdir(parents=True)
    save_file(tensors, directory / "base" / "model.safetensors")
    model = nn.Sequential(nn.Linear(width, width, bias=False))
    randlora.inject(model, r=width // 2, targets=["0"])
    randlora.save(model, directory / "adapter")
    return directory


@pytest.mark.medium
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_holds_one_weight_at_a_time(tmp_path: Path, without_transformers: dict[str, str]) -> None:
    width, layers = 512, 56
    directories = (many(tmp_path / "small", 64, 1), many(tmp_path / "large", width, layers))
    command = [sys.executable, "-c", MEASURED, *map(str, directories)]
    done = subprocess.run(command, env=without_transformers, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    one, written = 4 * width * width, (directories[1] / "out" / "model.safetensors").stat().st_size
    assert written > 4 * layers * width * width
    assert json.loads(done.stdout)["peak"] < 8 * one + 8 * 2**20 < written / 3
