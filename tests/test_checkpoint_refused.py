"""What `load` refuses without a trace: files that are damaged or no adapter's, and models that they do not fit."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import randlora
from randlora.checkpoint import read
from randlora.errors import AdapterError, CheckpointError
from tests.checkpoint_files import (
    BASIS_A,
    BASIS_B,
    CONFIG_FILE,
    GAMMA,
    HEADED,
    LAMBDA,
    LINEAR,
    PREFIX,
    TENSORS_FILE,
    Case,
    Headed,
    basis_of,
    edit_fields,
    edit_tensors,
    peft_directory,
    read_tensors,
    refused,
    reseal,
    trained,
    write_tensors,
)
from tests.hostile_files import Damage, fields, our_adapter
from tests.kit import adapter_values, all_bits, bits, snapshot

Build = Callable[[], nn.Module]
SMALL = Case("small", lambda: nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 3)), {"train_also": ["1.bias"]})


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "PATIENCE", 0)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


def tensors(changes: Mapping[str, Tensor], *drop: str) -> Damage:
    return lambda directory: edit_tensors(directory, changes, drop=drop)


def text(contents: bytes) -> Damage:
    return lambda directory: (directory / CONFIG_FILE).write_bytes(contents)


def renamed_header(directory: Path) -> None:
    held, metadata = read_tensors(directory)
    write_tensors(directory, held, {"format": "pt", "sandlora": metadata["randlora"]})


def named(fqn: str) -> Damage:
    """Give a layer another name, letter by letter."""

    def rename(directory: Path) -> None:
        held = read_tensors(directory)[0]
        others = {key.replace("model.0.", f"model.{fqn}."): tensor for key, tensor in held.items()}
        edit_tensors(directory, others, drop=[key for key in held if key not in others])

    return rename


NO_ADAPTER = "describes no RandLoRA adapter: expected peft_type='RANDLORA', got "
LARGER = "0 is 4 x 6, larger than the bases in the file"
OF_PEFT: dict[str, tuple[Damage, str]] = {
    "lambda-without-gamma": (tensors({}, GAMMA), "0 has one of randlora_lambda and randlora_gamma: expected both"),
    "A-without-B": (tensors({}, BASIS_B), "the file holds one of the two bases: expected both or none"),
    "nothing": (
        tensors({f"{PREFIX}0.bias": ones(4)}, *(key.replace("0", n) for key in (LAMBDA, GAMMA) for n in "02")),
        "the file holds no randlora_lambda and randlora_gamma",
    ),
    "stray-name": (tensors({"0.randlora_lambda": ones(1)}), "'0.randlora_lambda' is not the name of an adapter's"),
    "adapter-name": (tensors({f"{LAMBDA}.default": ones(2)}), "the model has no parameter 0.randlora_lambda.default"),
    "a-regex": (named(".*"), "the model has no layer .*"),
    "of-other-rank": (tensors({LAMBDA: ones(3, 2)}), "randlora_lambda (3, 2)"),
    "scalar": (tensors({LAMBDA: torch.tensor(1.0)}), "randlora_lambda ()"),
    "gamma-of-three-dims": (tensors({GAMMA: ones(2, 4, 1)}), "randlora_gamma (2, 4, 1)"),
    "one-basis-more": (tensors({LAMBDA: ones(2, 3), GAMMA: ones(3, 4)}), "randlora_gamma (3, 4)"),
    "stacks-of-stacks": (tensors({LAMBDA: ones(1, 1, 2, 2), GAMMA: ones(1, 1, 2, 4)}), "lambda (1, 1, 2, 2)"),
    "narrower": (tensors({GAMMA: ones(2, 3)}), "0 is 4 x 6 here, the adapter was trained on a smaller side of 3"),
    "empty": (tensors({LAMBDA: ones(2, 0), GAMMA: ones(0, 0)}), "randlora_gamma (0, 0): expected (2, num_bases)"),
    "A-scalar": (tensors({BASIS_A: torch.tensor(1.0)}), "the bases have shapes () and"),
    "A-of-other-rank": (tensors({BASIS_A: ones(3, 1, 5)}), "the bases have shapes (3, 1, 5)"),
    "B-of-other-length": (tensors({BASIS_B: ones(6, 2, 2)}), "and (6, 2, 2), which do not fit r=2"),
    "B-too-short": (tensors({BASIS_B: ones(5, 3, 2)}), LARGER),
    "A-and-B-too-narrow": (tensors({BASIS_A: ones(2, 1, 3), BASIS_B: ones(6, 2, 2)}), LARGER),
    "two-of-one-name": (
        tensors({f"{PREFIX}0.bias": ones(4), f"{PREFIX}0.base_layer.bias": ones(4)}),
        "expected the parameters trained with it (0.bias), got",
    ),
    "copies-that-differ": (tensors({f"{PREFIX}0.randlora_A": ones(2, 1, 5)}), "copies of base_model.randlora_A that"),
    "float8": (tensors({LAMBDA: ones(2, 2).to(torch.float8_e4m3fn)}), "0.randlora_lambda holds torch.float8_e4m3fn"),
    "bool": (tensors({BASIS_B: ones(6, 3, 2).bool()}), "randlora_B holds torch.bool"),
    "two-at-once": (tensors({LAMBDA: ones(2, 2) / 0, GAMMA: ones(2, 4).long()}), "2 problems:\n  - 0.randlora_lambda"),
    "no-options": (
        lambda directory: edit_fields(directory, {}, drop=["r", "randlora_alpha", "projection_prng_key"]),
        "lacks r, randlora_alpha, projection_prng_key",
    ),
    "r-of-no-lambda": (fields(r=3), "expected (3, num_bases)"),
    "alpha-nan": (fields(randlora_alpha=float("nan")), "it has NaN, which is not JSON"),
    "alpha-text": (fields(randlora_alpha="640"), "alpha must be a finite number"),
    "key": (fields(projection_prng_key=0.5), "projection_prng_key must be an integer, got 0.5"),
    "no-json": (lambda directory: (directory / CONFIG_FILE).unlink(), f"{CONFIG_FILE} and {TENSORS_FILE}"),
    "no-tensors": (lambda directory: (directory / TENSORS_FILE).unlink(), "nothing is unpickled"),
    "not-json": (text(b"{"), "is damaged"),
    "null": (text(b"null"), f"{NO_ADAPTER}None"),
    "lora": (text(b'{"peft_type": "LORA"}'), f"{NO_ADAPTER}'LORA'"),
}


def _with(layer: Build, index: int = 0) -> Build:
    """Make LINEAR with another layer in the place of one."""

    def make() -> nn.Module:
        layers = [*LINEAR.make().children()]
        layers[index] = layer()
        return nn.Sequential(*layers)

    return make


def _twice() -> nn.Module:
    layer = nn.Linear(6, 4)
    return nn.Sequential(layer, nn.Tanh(), layer)


def _headed(name: str, module: nn.Module) -> Build:
    """Make HEADED with another module."""

    def make() -> nn.Module:
        model = HEADED.build()
        setattr(model, name, module)
        return model

    return make


def _rounded() -> nn.Module:
    """Make HEADED with a bias for which rounded numbers would be written."""
    model = HEADED.build()
    model.get_submodule("norm").bias = nn.Parameter(torch.ones(7, dtype=torch.int8), requires_grad=False)
    return model


TRAINED_ON = "here, the adapter was trained on out x in = "
MISFITS: dict[str, tuple[Build, str]] = {
    "missing-layer": (lambda: nn.Sequential(nn.Linear(6, 4)), "the model has no layer 2"),
    "bare-layer": (lambda: nn.Linear(6, 4), "the model has no layer 0"),
    "longer-input": (_with(lambda: nn.Linear(7, 4)), f"0 is 4 x 7 {TRAINED_ON}4 x 6"),
    "transposed-Conv1D": (_with(lambda: Conv1D(6, 4)), f"0 is 6 x 4 {TRAINED_ON}4 x 6"),
    "both": (lambda: nn.Sequential(nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 6)), f"2 is 6 x 4 {TRAINED_ON}5 x 4"),
    "both-at-once": (lambda: nn.Sequential(nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 6)), "2 problems:\n  - 0 is 4 x 7"),
    "not-linear": (_with(lambda: nn.LayerNorm(6)), "0 (LayerNorm) has no weight that can be adapted"),
    "an-embedding": (_with(lambda: nn.Embedding(6, 4)), f"0 is 6 x 4 {TRAINED_ON}4 x 6"),
    "parametrized": (
        _with(lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))),
        "0 computes its weight from other parameters",
    ),
    "meta": (_with(lambda: nn.Linear(6, 4, device="meta")), "0 holds no values yet (meta)"),
    "two-names": (_twice, "2 and 0 are the same layer in this model, which cannot hold both"),
    "prefix": (lambda: nn.ModuleDict({"body": LINEAR.make()}), 'give prefix="body"'),
}
TRAINED_MISFITS: dict[str, tuple[Build, str]] = {
    "no-norm": (_headed("norm", nn.Identity()), "the model has no parameter norm.bias, which was trained with the"),
    "other-head": (_headed("head", nn.Linear(7, 4)), "head.weight has shape (4, 7) here, (3, 7) in the file"),
    "no-bias": (_headed("head", nn.Linear(7, 3, bias=False)), "the model has no parameter head.bias"),
    "integer-bias": (_rounded, "norm.bias holds torch.int8 here"),
}


def _headed_adapter(directory: Path) -> None:
    randlora.save(trained(HEADED), directory)


def nothing(_: Path) -> None:
    """Leave a directory as it is."""


REFUSED: dict[str, tuple[Callable[[Path], object], Damage, Build, str]] = {
    **{f"peft-{name}": (peft_directory, damage, LINEAR.build, said) for name, (damage, said) in OF_PEFT.items()},
    **{f"model-{name}": (our_adapter, nothing, build, said) for name, (build, said) in MISFITS.items()},
    **{f"model-{name}": (_headed_adapter, nothing, build, said) for name, (build, said) in TRAINED_MISFITS.items()},
    "renamed-header": (our_adapter, renamed_header, LINEAR.build, "has a header under a damaged name"),
    "beside-others": (our_adapter, renamed_header, lambda: trained(HEADED, name="a"), "under a damaged name"),
    "fits-no-other": (our_adapter, nothing, lambda: trained(HEADED, name="a", r=4), 'give prefix="body"'),
}


@pytest.mark.parametrize(("make", "damage", "build", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_damaged_or_no_adapter_or_does_not_fit_is_refused_and_leaves_a_model_alone(
    make: Callable[[Path], object], damage: Damage, build: Build, said: str, tmp_path: Path
) -> None:
    make(tmp_path)
    damage(tmp_path)
    refused(build(), tmp_path, said)


def facts(model: nn.Module, case: Case) -> tuple[object, ...]:
    """All that a file says about an adapter, as a model understood it."""
    (info,) = randlora.adapters(model)
    return info, all_bits(adapter_values(model)), basis_of(model).digest(6, 2), bits(case.output(model))


def damaged(raw: bytes) -> Iterator[bytes]:
    """Flip each bit of the length and of our key, and one of every fifth byte; and cut the bytes short."""
    key = raw.find(b'"randlora"')
    exact = {*range(8), *range(key - 2, key + 12)} if key >= 0 else set[int]()
    for place, byte in enumerate(raw):
        for bit in range(8) if place in exact else [place // 5 % 8] * (place % 5 == 0):
            yield raw[:place] + bytes([byte ^ 1 << bit]) + raw[place + 1 :]
    yield from (raw[:length] for length in range(len(raw)) if length % 9 == 0 or length > len(raw) - 8)


@pytest.mark.filterwarnings(f"ignore:{CONFIG_FILE} says:UserWarning")
@pytest.mark.parametrize("name", [TENSORS_FILE, CONFIG_FILE])
def test_a_file_with_a_flipped_bit_or_cut_short_is_refused_or_changes_nothing(name: str, tmp_path: Path) -> None:
    """The options are such that no seed of torch's stands for them."""
    randlora.save(trained(SMALL, stream="portable", seed=5, alpha=3, dropout=0.25), tmp_path)
    model, raw = SMALL.build(), (tmp_path / name).read_bytes()
    before = snapshot(model)
    randlora.load(model, tmp_path)
    expected = facts(model, SMALL)
    randlora.eject(model)
    for contents in damaged(raw):
        (tmp_path / name).write_bytes(contents)
        try:
            randlora.load(model, tmp_path)
        except CheckpointError:
            continue
        assert facts(model, SMALL) == expected, contents
        randlora.eject(model)
    assert snapshot(model) == before
    for contents in (raw[:-1], raw + b"\0") if name == TENSORS_FILE else ():
        (tmp_path / name).write_bytes(contents)
        refused(SMALL.build(), tmp_path, "truncated or damaged")


def test_a_pickle_in_place_of_the_tensors_is_refused_and_never_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    peft_directory(tmp_path)
    torch.save({"weight": Bomb()}, tmp_path / "adapter_model.bin")
    shutil.copy(tmp_path / "adapter_model.bin", tmp_path / TENSORS_FILE)
    refused(LINEAR.build(), tmp_path, "truncated or damaged")
    (tmp_path / TENSORS_FILE).unlink()
    refused(LINEAR.build(), tmp_path, "only safetensors files are read, nothing is unpickled")
    assert not (tmp_path / "exploded").exists()


def test_values_that_are_not_finite_are_refused_though_the_seal_is_whole(tmp_path: Path) -> None:
    """And by name in files of PEFT, which have no seal."""
    case = Case("body", Headed, {"targets": ["0"], "train_also": ["norm.bias"]})
    lam, gamma, bias = (f"{PREFIX}{name}" for name in ("body.0.randlora_lambda", "body.0.randlora_gamma", "norm.bias"))
    wrong = [*((key, float("nan")) for key in (lam, gamma, bias, BASIS_A, BASIS_B)), (lam, 1e999), (gamma, -1e999)]
    for make in (peft_directory, lambda directory, case: randlora.save(trained(case), directory, bases="stored")):
        for key, value in wrong:
            make(tmp_path, case)
            changed = read_tensors(tmp_path)[0][key]
            changed.view(-1)[-1] = value
            (edit_tensors if make is peft_directory else reseal)(tmp_path, {key: changed})
            name = key.removeprefix(PREFIX).removeprefix("base_model.")
            refused(case.build(), tmp_path, f"{name} holds NaN or infinite values")


def test_tensors_that_the_header_does_not_name_are_refused_though_the_seal_is_whole(tmp_path: Path) -> None:
    trained_too = f"{PREFIX}1.base_layer.bias"
    changes: list[tuple[Mapping[str, Tensor], tuple[str, ...]]] = [
        ({f"{PREFIX}0.bias": ones(2)}, ()),
        ({}, (trained_too,)),
        ({f"{PREFIX}1.bias": ones(3)}, (trained_too,)),
        ({}, (LAMBDA, GAMMA)),
        ({f"{PREFIX}2.randlora_lambda": ones(2, 1), f"{PREFIX}2.randlora_gamma": ones(1, 2)}, ()),
    ]
    for more, fewer in changes:
        randlora.save(trained(SMALL), tmp_path)
        reseal(tmp_path, more, drop=fewer)
        refused(SMALL.build(), tmp_path, "cannot read")


@pytest.mark.parametrize("basis", ["block", "dense"])
def test_tensors_that_lost_their_header_are_not_taken_for_pefts(tmp_path: Path, basis: Any) -> None:
    """Some tools write safetensors anew without the metadata; PEFT's way of drawing would give other bases."""
    our_adapter(tmp_path, basis=basis, stream="portable")
    save_file(load_file(tmp_path / TENSORS_FILE), tmp_path / TENSORS_FILE)
    refused(LINEAR.build(), tmp_path, "have lost the header that goes with randlora_stream")


def test_a_model_that_can_take_no_adapter_of_that_name_or_none_now_is_refused(tmp_path: Path) -> None:
    our_adapter(tmp_path)
    model, whole = trained(LINEAR, name="first"), nn.ModuleDict({"inner": LINEAR.build()})
    refused(model, tmp_path, "the model has an adapter of that name", error=AdapterError, name="first")
    for name in ("", "a.b", "keys", 3):
        refused(LINEAR.build(), tmp_path, f"an adapter named {name!r}", error=AdapterError, name=name)
    randlora.inject(whole, r=2)
    refused(
        whole["inner"], tmp_path, "has adapters that were added to a different module", error=AdapterError, name="x"
    )
    randlora.merge(model, reversible=True)
    refused(model, tmp_path, "while the adapters are merged", error=AdapterError, name="second")
