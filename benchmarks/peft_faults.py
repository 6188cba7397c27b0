"""What goes wrong with RandLoRA in PEFT 0.21.2 and must not here: each fault is provoked in both, and seen or not."""

import json
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import bitsandbytes
import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import randlora
from benchmarks.command import Settings, main
from benchmarks.models import VOCABULARY, by_peft, llama
from benchmarks.results import Row
from benchmarks.timing import Figure

R = 6  # does not divide 64, the smaller side of the layers
ALPHA = 15
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
FIRST, LAST = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
SUM = "all faults"


class Seen(NamedTuple):
    """Whether a fault showed itself."""

    peft: bool
    randlora: bool


Fault = Callable[[Path], Seen]
"""Provokes a fault in both libraries; gets an empty directory."""


def _base() -> nn.Module:
    return llama(2, 64).eval()


def _config(**options: Any) -> peft.RandLoraConfig:
    return peft.RandLoraConfig(**{"r": R, "randlora_alpha": ALPHA, "target_modules": TARGETS, **options})


def _theirs(dtype: torch.dtype = torch.float32, **options: Any) -> peft.PeftModel:
    return _filled(by_peft(_base().to(dtype), _config(**options)).eval())


def _ours(dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    model = _base().to(dtype)
    _inject(model, **options)
    return model


def _inject(model: nn.Module, **options: Any) -> None:
    """Give a model an adapter of ours, the only active and trainable one, with values as after some training."""
    common = {"r": R, "alpha": ALPHA, "targets": TARGETS, "active": True, "trainable": True}
    randlora.inject(model, **{**common, **options})
    _filled(model)


def _filled(model: Any) -> Any:
    """Give all that is trained values as after some training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise / max(parameter.shape) ** 0.5)
    return model


def _in_peft(directory: Path) -> peft.PeftModel:
    return peft.PeftModel.from_pretrained(_base(), directory).eval()


def _loaded(directory: Path) -> nn.Module:
    model = _base()
    randlora.load(model, directory)
    return model


def _output(model: nn.Module) -> Tensor:
    tokens = torch.arange(12).reshape(2, 6) * 7 % VOCABULARY
    with torch.no_grad():
        found: Tensor = model(tokens).logits
    return found


def _differs(model: nn.Module, expected: Tensor) -> bool:
    """Return whether a model fails, or gives something else."""
    try:
        return not torch.equal(_output(model), expected)
    except RuntimeError:
        return True


def _raises(call: Callable[[], object], *errors: type[Exception]) -> bool:
    try:
        call()
    except errors:
        return True
    return False


def another_rank(_: Path, *, r: int) -> Seen:
    """Add an adapter of another rank, and ask the first for its output."""
    theirs = _theirs()
    expected = _output(theirs)
    _raises(lambda: theirs.add_adapter("b", _config(r=r)), ValueError)
    ours = _ours()
    wanted = _output(ours)
    randlora.inject(ours, r, targets=TARGETS, name="b")
    changed = _differs(ours, wanted)
    randlora.activate(ours, "b")
    return Seen(_differs(theirs, expected), changed or _differs(ours, _output(_base())))


def other_bases_loaded(directory: Path) -> Seen:
    """Load an adapter of sparse bases beside one of dense bases, and ask the first for its output."""
    _theirs().save_pretrained(directory / "dense")
    _theirs(sparse=True).save_pretrained(directory / "sparse")
    theirs, ours = _in_peft(directory / "dense"), _loaded(directory / "dense")
    expected, wanted = _output(theirs), _output(ours)
    theirs.load_adapter(directory / "sparse", "sparse")
    randlora.load(ours, directory / "sparse", name="sparse")
    changed = _differs(ours, wanted)
    randlora.activate(ours, "sparse")
    return Seen(_differs(theirs, expected), changed or _differs(ours, _output(_loaded(directory / "sparse"))))


def sparse_beside_dense(_: Path) -> Seen:
    """Add an adapter of sparse bases beside one of dense bases, and look at its bases, or at the update they give."""
    theirs, ours, alone = _theirs(), _ours(), _ours(basis="sparse")
    theirs.add_adapter("b", _config(sparse=True))
    _inject(ours, basis="sparse", name="b")
    with torch.no_grad():
        for part in ("lambda", "gamma"):
            values = ours.get_parameter(f"{LAST}.randlora_{part}.b")
            alone.get_parameter(f"{LAST}.randlora_{part}.default").copy_(values)
    update, wanted = randlora.delta_weight(ours, LAST, name="b"), randlora.delta_weight(alone, LAST)
    return Seen(not (theirs.base_model.randlora_A["b"] == 0).any(), not torch.equal(update, wanted))


def other_layers(directory: Path, *, order: tuple[str, str]) -> Seen:
    """Load two adapters of different layers, one after the other."""
    targets = {"narrow": ["q_proj"], "wide": ["q_proj", "down_proj"]}
    for name in order:
        _theirs(target_modules=targets[name]).save_pretrained(directory / name)
    theirs, ours = _in_peft(directory / order[0]), _base()
    for name in order:
        randlora.load(ours, directory / name, name=name)
    differ = []
    for name in order:
        randlora.activate(ours, name)
        differ.append(_differs(ours, _output(_loaded(directory / name))))
    return Seen(_raises(lambda: theirs.load_adapter(directory / order[1], order[1]), RuntimeError), any(differ))


def small_beside_large(directory: Path) -> Seen:
    """Train an adapter of narrow layers beside one of wide layers, save it, and load it alone."""
    theirs = _theirs(save_projection=False)
    theirs.add_adapter("small", _config(target_modules=["v_proj"], save_projection=False))
    theirs.set_adapter("small")
    _filled(theirs).save_pretrained(directory / "theirs")
    ours = _ours()
    _inject(ours, targets=["v_proj"], name="small")
    randlora.save(ours, directory / "ours", name="small")
    return Seen(
        _differs(_in_peft(directory / "theirs" / "small"), _output(theirs)),
        _differs(_loaded(directory / "ours"), _output(ours)),
    )


def unmerging(_: Path) -> Seen:
    """Merge into bfloat16 weights and unmerge again."""
    weight = _base().to(torch.bfloat16).get_parameter(f"{FIRST}.weight")
    theirs, ours = _theirs(torch.bfloat16), _ours(torch.bfloat16)
    theirs.merge_adapter()
    theirs.unmerge_adapter()
    randlora.merge(ours, reversible=True)
    unmoved = torch.equal(ours.get_parameter(f"{FIRST}.weight"), weight)
    randlora.unmerge(ours)
    found = theirs.base_model.model.get_parameter(f"{FIRST}.base_layer.weight")
    return Seen(
        not torch.equal(found, weight), unmoved or not torch.equal(ours.get_parameter(f"{FIRST}.weight"), weight)
    )


def merging_nan(_: Path) -> Seen:
    """Merge where the last layer would get NaN, which both refuse, and look at the first layer."""
    weight = _base().get_parameter(f"{FIRST}.weight")
    theirs, ours = _theirs(), _ours()
    with torch.no_grad():
        for model in (theirs.base_model.model, ours):
            model.get_parameter(f"{LAST}.randlora_lambda.default")[0, 0] = float("nan")
    _raises(lambda: theirs.merge_adapter(safe_merge=True), ValueError)
    refused = _raises(lambda: randlora.merge(ours), randlora.errors.MergeError)
    found = theirs.base_model.model.get_parameter(f"{FIRST}.base_layer.weight")
    return Seen(
        not torch.equal(found, weight), not refused or not torch.equal(ours.get_parameter(f"{FIRST}.weight"), weight)
    )


def edited_seed(directory: Path) -> Seen:
    """Edit the seed in a saved adapter's configuration, and load it."""
    theirs = _theirs(save_projection=False)
    theirs.save_pretrained(directory / "theirs")
    ours = _ours()
    randlora.save(ours, directory / "ours", bases="seed")
    for name in ("theirs", "ours"):
        file = directory / name / CONFIG_FILE
        file.write_text(json.dumps(json.loads(file.read_text()) | {"projection_prng_key": 4}))
    return Seen(
        _differs(_in_peft(directory / "theirs"), _output(theirs)), _differs(_loaded(directory / "ours"), _output(ours))
    )


def lost_tensor(directory: Path) -> Seen:
    """Take one Λ out of a file of PEFT, and load it."""
    theirs = _theirs()
    theirs.save_pretrained(directory)
    tensors = load_file(directory / TENSORS_FILE)
    del tensors[f"base_model.model.{LAST}.randlora_lambda"]
    save_file(tensors, directory / TENSORS_FILE)
    return Seen(_differs(_in_peft(directory), _output(theirs)), not _refused(directory))


def _refused(directory: Path) -> bool:
    """Return whether loading is refused with the model left as it was."""
    model = _base()
    refused = _raises(lambda: randlora.load(model, directory), randlora.errors.CheckpointError)
    return refused and not randlora.adapters(model) and torch.equal(_output(model), _output(_base()))


def repeated_bases(directory: Path) -> Seen:
    """Save the bases with an adapter, and count how often they are in the file."""
    _theirs().save_pretrained(directory / "theirs")
    randlora.save(_ours(), directory / "ours", bases="stored")
    copies = (
        sum(key.endswith("randlora_B") for key in load_file(directory / name / TENSORS_FILE))
        for name in ("theirs", "ours")
    )
    return Seen(*(count > 1 for count in copies))


def _quantized(bits: int, out_features: int) -> Any:
    """Quantize a layer of 64 inputs, always alike, in a model that says so, which is how PEFT knows."""
    torch.manual_seed(0)
    layer = (
        bitsandbytes.nn.Linear4bit(64, out_features, compute_dtype=torch.float32, quant_type="nf4")
        if bits == 4
        else bitsandbytes.nn.Linear8bitLt(64, out_features, has_fp16_weights=False)
    )
    layer.support_avx512bf16_for_cpu = False  # PEFT does not know the order that it leaves the codes in
    model: Any = nn.Sequential(layer.to("cpu")).eval()
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = bits == 4, bits == 8
    return model


def _quantized_in_both(bits: int, out_features: int) -> tuple[peft.PeftModel, nn.Module]:
    """Adapt a quantized layer; the rank divides 64, or PEFT's merge would raise for square layers of 8 bits too."""
    theirs = _filled(by_peft(_quantized(bits, out_features), _config(r=8, target_modules=["0"])).eval())
    ours = _quantized(bits, out_features)
    _inject(ours, r=8, targets=["0"])
    return theirs, ours


def quantized_merge(_: Path, *, bits: int, out_features: int, most: float) -> Seen:
    """Merge into a quantized layer, and measure how far the output moves."""
    theirs, ours = _quantized_in_both(bits, out_features)
    return Seen(
        _lost_by(theirs, theirs.merge_adapter) > most, not 0 < _lost_by(ours, lambda: randlora.merge(ours)) < most
    )


def _lost_by(model: nn.Module, merge: Callable[[], object]) -> float:
    """Measure how far merging moves a model's outputs, as a share of them; infinite where it fails."""
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(x)
        try:
            merge()
            return float((model(x) - expected).norm() / expected.norm())
        except RuntimeError:
            return float("inf")


def wrapped_twice(_: Path) -> Seen:
    """Add a second adapter to a quantized layer, and look for layers within layers."""
    theirs, ours = _quantized_in_both(8, 64)
    theirs.add_adapter("b", _config(r=8, target_modules=["0"]))
    randlora.inject(ours, 8, targets=["0"], name="b")
    return Seen(*(any("base_layer.base_layer" in key for key in model.state_dict()) for model in (theirs, ours)))


FAULTS: Mapping[str, Fault] = {
    "a second adapter of a smaller rank breaks the first": partial(another_rank, r=R // 2),
    "a second adapter of a larger rank breaks the first": partial(another_rank, r=2 * R),
    "a loaded adapter of other bases changes the first": other_bases_loaded,
    "a sparse adapter beside a dense one gets dense bases": sparse_beside_dense,
    "an adapter of more layers does not load beside one of fewer": partial(other_layers, order=("narrow", "wide")),
    "an adapter of fewer layers does not load beside one of more": partial(other_layers, order=("wide", "narrow")),
    "an adapter trained beside a larger one reloads as another": small_beside_large,
    "unmerging leaves bfloat16 weights changed": unmerging,
    "a merge that is refused for NaN has changed other layers": merging_nan,
    "a file whose seed was edited computes something else": edited_seed,
    "a file that lost a tensor loads": lost_tensor,
    "a file holds the bases once for every layer": repeated_bases,
    **{
        f"a merge into {bits} bits, 64→{out_features}, fails or loses more than rounding does": partial(
            quantized_merge, bits=bits, out_features=out_features, most=most
        )
        for bits, most in ((8, 0.03), (4, 0.25))
        for out_features in (64, 128)
    },
    "a second adapter of a quantized layer wraps the first": wrapped_twice,
}


def provoke(fault: Fault) -> Seen:
    """Look for one fault, without PEFT's warnings."""
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fault(Path(directory))


def run(_: Settings) -> Sequence[Row]:
    """Look for every fault: 1 where it was seen and 0 where not, and the sums."""
    seen = {words: provoke(fault) for words, fault in FAULTS.items()}
    rows = [_row(words, PEFT=found.peft, randlora=found.randlora) for words, found in seen.items()]
    both = (sum(found) for found in zip(*seen.values(), strict=True))
    return [*rows, _row(SUM, **dict(zip(("PEFT", "randlora"), both, strict=True)), tried=len(seen))]


def _row(case: str, **counts: int) -> Row:
    return Row(case, {name: Figure(float(count), float(count), "faults") for name, count in counts.items()})


if __name__ == "__main__":
    main(("peft_faults", run))
