"""Golden files load for ever, to the same bits and to what they mean, and `save` writes the same bytes again.

``python -m tests.test_golden`` makes the directories of `GOLDEN` that are missing, with values of formulas, and none
anew. Those of the first releases have numbers written down when they were made, exact in any order of summation.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import randlora
from randlora.bases.spec import KINDS, Shape
from randlora.config import BasisKind, Stream
from tests import reference
from tests.checkpoint_files import CARD_FILE, CASES, HEADED, Case, Stored, bases_of, read_fields, read_tensors, trained
from tests.kit import adapter_values, all_bits, snapshot
from tests.model_directories import contents

DATA = Path(__file__).parent / "data"
STACK = 2  # matrices of experts


class Attending(nn.Module):
    """Three layers with which both models begin."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.linear = nn.Linear(6, 4)
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True)

    def attended(self, tokens: Tensor) -> Tensor:
        x = self.linear(self.embed(tokens))
        output: Tensor = x + self.attn(x, x, x, need_weights=False)[0]
        return output


class Layers(Attending):
    """Every kind of layer that format 1 has a place for."""

    shapes: Mapping[str, Shape] = {
        "embed": (7, 6),
        "linear": (4, 6),
        "attn.in_proj_weight": (12, 4),
        "attn.out_proj": (4, 4),
        "conv1d": (5, 4),
        "conv": (3, 4),
        "deconv": (3, 8),
    }

    def __init__(self) -> None:
        super().__init__()
        self.conv1d = Conv1D(5, 4)
        self.conv = nn.Conv2d(1, 3, 2)
        self.deconv = nn.ConvTranspose2d(3, 2, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.deconv(self.conv(self.conv1d(self.attended(tokens)).unsqueeze(1)))
        return output


class Stack(nn.Module):
    """A stack of matrices (out, in) or (in, out); the latter says so as transformers' classes do."""

    def __init__(self, name: str, *shape: int, is_transposed: bool = False) -> None:
        super().__init__()
        self.name, self.is_transposed = name, is_transposed
        self.register_parameter(name, nn.Parameter(torch.ones(shape)))

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = getattr(self, self.name)  # (num_experts, …)
        return sum((x @ (each if self.is_transposed else each.T) for each in weight), torch.zeros(()))


class Stacks(Attending):
    """What format 2 was made for: stacks of experts, and attention whose projections are split."""

    shapes: Mapping[str, Shape] = {
        "linear": (4, 6),
        "attn.in_proj_weight": (3, 4, 4),
        "plain.gate_up_proj": (STACK, 6, 4),
        "turned.down_proj": (STACK, 5, 6),
    }

    def __init__(self) -> None:
        super().__init__()
        self.plain = Stack("gate_up_proj", STACK, 6, 4)
        self.turned = Stack("down_proj", STACK, 6, 5, is_transposed=True)

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.turned(self.plain(self.attended(tokens)))
        return output


class Body(NamedTuple):
    """A model for golden files, with the version of their format and the options that do not depend on the bases."""

    build: Callable[[], nn.Module]
    format_version: int
    options: Mapping[str, Any]
    shapes: Mapping[str, Shape]  # (out_features, in_features), after the number of matrices of a stack
    ranks: Mapping[str, int] = {}  # where r is not 2


_EACH = {"in_proj": "split", "r": {"linear": 4, ".*": 2}, "alpha": {"linear": 2.0, ".*": 4.0}}
_SHARED = {
    fqn: shape if fqn.startswith("attn") else shape[-2:] for fqn, shape in Stacks.shapes.items()
}  # one Λ and one Γ for all experts
BODIES = {
    "layers": Body(Layers, 1, {"r": 2, "alpha": 4.0}, Layers.shapes),
    "each": Body(Stacks, 2, _EACH, Stacks.shapes, {"linear": 4}),
    "shared": Body(Stacks, 2, {"in_proj": "split", "experts": "shared", "r": 2, "alpha": 4.0}, _SHARED),
}
TRAINED = "linear.bias"  # whose key differs from that of a parameter beside the adapted layers
TRANSPOSED = "conv1d", "turned.down_proj"
"""Targets that are stored as ``(in_features, out_features)``."""
SEED = 2**40 + 11


class Golden(NamedTuple):
    body: str
    kind: BasisKind
    stream: Stream
    stored: Stored

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.stream}-{self.stored}-{self.body}"

    @property
    def directory(self) -> Path:
        return DATA / "golden" / self.name


GOLDEN = tuple(
    Golden(body, kind, stream, stored)
    for kind in get_args(BasisKind)
    for stream in KINDS[kind].draws
    for stored in get_args(Stored)
    for body in BODIES
)


def ramp(shape: Shape, start: int, divisor: int) -> Tensor:
    indices = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return ((indices * 3 + start) % 11 - 5).div(divisor).reshape(shape)


def plain(body: Body) -> nn.Module:
    model = body.build().double().eval()
    with torch.no_grad():
        for start, parameter in enumerate(model.parameters()):
            parameter.copy_(ramp(tuple(parameter.shape), start, 4))
    return model


def expected_values(body: Body) -> dict[str, Tensor]:
    """Return Λ, Γ and what was trained beside them, as `adapter_values` names them."""
    values = {TRAINED: ramp((4,), 1, 2)}
    for start, (fqn, (*stack, out_features, in_features)) in enumerate(body.shapes.items()):
        r, min_dim = body.ranks.get(fqn, 2), min(out_features, in_features)
        num_bases = -(-min_dim // r)
        values[f"{fqn}.randlora_lambda"] = ramp((*stack, r, num_bases), start, 8).float()
        values[f"{fqn}.randlora_gamma"] = ramp((*stack, num_bases, min_dim), 2 * start, 4).float()
    return values


def build(golden: Golden) -> nn.Module:
    body = BODIES[golden.body]
    model, expected = plain(body), expected_values(body)
    options = {**body.options, "targets": [*body.shapes], "train_also": [TRAINED], "basis": golden.kind}
    blocks = (2, 2) if golden.kind == "block" else None
    randlora.inject(model, stream=golden.stream, seed=SEED, dropout=0.0, blocks=blocks, **options)
    for name, value in adapter_values(model).items():
        value.data.copy_(expected[name])
    return model


def header_of(directory: Path) -> dict[str, Any]:
    """Read the header of a file, but for what it says of the library that wrote it, and the seal over it."""
    facts: dict[str, Any] = json.loads(read_tensors(directory)[1]["randlora"])
    return {name: fact for name, fact in facts.items() if name not in ("library_version", "sha256", "torch_version")}


def assert_same_files(found: Path, expected: Path) -> None:
    """Compare all but versions, and facts that the first files do not have."""
    assert all_bits(read_tensors(found)[0]) == all_bits(read_tensors(expected)[0])
    ours, theirs = header_of(found), header_of(expected)
    assert {**ours, **theirs} == ours
    assert ours.keys() - theirs.keys() <= {"transposed"}
    assert read_fields(found) == read_fields(expected)


def saved(model: nn.Module, directory: Path, bases: Stored = "seed") -> dict[str, bytes]:
    randlora.save(model, directory, bases=bases)
    return contents(directory)


def digests(parent: Path) -> dict[str, str]:
    models = {golden.name: (build(golden), golden.stored) for golden in GOLDEN[::8]}
    models |= {case.name: (trained(case), "seed") for case in CASES}
    unordered = {"0", "2"}, {"head", "norm", "body.0.bias", "body.2.bias"}
    models["sets"] = trained(HEADED, targets=unordered[0], train_also=unordered[1]), "seed"
    return {
        f"{name}/{file}": hashlib.sha256(data).hexdigest()
        for name, (model, bases) in models.items()
        for file, data in saved(model, parent / name, bases).items()
    }


def oracle_update(golden: Golden, model: nn.Module, fqn: str) -> Tensor:
    """Compute one update in loops, from the values that the file should hold and the bases that it loaded with."""
    body = BODIES[golden.body]
    r, alpha = body.ranks.get(fqn, 2), 2.0 if fqn in body.ranks else 4.0
    *stack, out_features, in_features = body.shapes[fqn]
    sides = max(out_features, in_features), min(out_features, in_features)
    bases = bases_of(model)[r].slices(*sides, device="cpu", dtype=torch.float64)
    lam, gamma = (expected_values(body)[f"{fqn}.{part}"] for part in ("randlora_lambda", "randlora_gamma"))
    updates = [
        reference.delta_weight(*bases, own_lam, own_gamma, alpha / r, in_features=in_features)
        for own_lam, own_gamma in (zip(lam, gamma, strict=True) if stack else [(lam, gamma)])
    ]
    return torch.stack(updates) if stack else updates[0]


def changed(golden: Golden, adapted: nn.Module) -> nn.Module:
    model = plain(BODIES[golden.body])
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for fqn in BODIES[golden.body].shapes:
            update = oracle_update(golden, adapted, fqn)
            weight = parameters.get(fqn, parameters.get(f"{fqn}.weight", update))
            update = update.mT if fqn in TRANSPOSED else update
            weight.add_(update.reshape(weight.shape) if update.numel() == weight.numel() else update)
        parameters[TRAINED].copy_(expected_values(BODIES[golden.body])[TRAINED])
    return model


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden.name)
def test_a_golden_file_loads_to_its_values_and_options_and_is_what_a_save_of_today_holds(
    golden: Golden, tmp_path: Path
) -> None:
    model, body, built = plain(BODIES[golden.body]), BODIES[golden.body], build(golden)
    before = snapshot(model)
    randlora.load(model, golden.directory)
    assert all_bits(adapter_values(model)) == all_bits(expected_values(body))
    assert header_of(golden.directory)["format_version"] == body.format_version
    (info,) = randlora.adapters(model)
    assert (info.config.basis, info.config.seed, {*info.targets}) == (golden.kind, SEED, {*body.shapes})
    assert {spec.stream for spec in info.specs} == {golden.stream}
    first = saved(built, tmp_path / "first", golden.stored)
    assert_same_files(tmp_path / "first", golden.directory)
    assert saved(built, tmp_path / "first", golden.stored) == first
    assert saved(model, tmp_path / "second", golden.stored) == first
    randlora.eject(model)
    assert snapshot(model) == before
    assert randlora.files.verify(golden.directory).passed
    assert {layer.fqn for layer in randlora.files.inspect(golden.directory).layers} == {*body.shapes}


@pytest.mark.parametrize("golden", [each for each in GOLDEN if each.stored == "seed"], ids=lambda golden: golden.name)
def test_a_golden_file_computes_what_the_loops_compute_also_merged(golden: Golden) -> None:
    model = plain(BODIES[golden.body])
    randlora.load(model, golden.directory)
    for fqn in BODIES[golden.body].shapes:
        oracle = oracle_update(golden, model, fqn)
        torch.testing.assert_close(randlora.delta_weight(model, fqn).reshape(oracle.shape), oracle, rtol=0, atol=1e-12)
    tokens = torch.arange(10).reshape(2, 5) % 7
    with torch.no_grad():
        expected = changed(golden, model)(tokens)
        torch.testing.assert_close(model(tokens), expected, rtol=1e-12, atol=1e-12)
        randlora.merge(model)
        torch.testing.assert_close(model(tokens), expected, rtol=1e-12, atol=1e-12)


def test_every_directory_has_a_test() -> None:
    assert {path.name for path in (DATA / "golden").iterdir()} == {golden.name for golden in GOLDEN}
    elsewhere = {"golden_peft_torch_2_11", "golden_v1_torch_2_11", "golden_v3_buffers", "golden_v4_rows"}
    assert {path.name for path in DATA.glob("golden_*/")} == {*FIRST, *elsewhere}


@pytest.mark.medium
def test_two_processes_that_hash_differently_save_the_same_bytes(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"}
    command = [sys.executable, "-m", "tests.test_golden", str(tmp_path / "other")]
    run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=300)
    own = digests(tmp_path / "own")
    assert json.loads(run.stdout) == own
    assert len(own) == 3 * (len(GOLDEN[::8]) + len(CASES) + 1)


def first_body() -> nn.Module:
    return nn.Sequential(OrderedDict(wide=nn.Linear(6, 4), tall=nn.Linear(4, 5), norm=nn.LayerNorm(5)))


def first_stacks() -> nn.Module:
    turned = Stack("down_proj", 3, 4, 5, is_transposed=True)
    return nn.ModuleDict({"plain": Stack("gate_up_proj", 3, 4, 6), "turned": turned, "linear": nn.Linear(6, 3)})


CASE, STACKS = Case("golden", first_body, dtype=torch.float64), Case("stacks", first_stacks, dtype=torch.float64)
FIRST: dict[str, tuple[Case, Stored]] = {
    "golden_v1": (CASE, "seed"),
    "golden_v1_block": (CASE, "seed"),
    "golden_v1_torch": (CASE, "seed"),
    "golden_v1_stored": (CASE, "stored"),
    "golden_v2_options": (CASE, "seed"),
    "golden_v2_each": (STACKS, "seed"),
    "golden_v2_shared": (STACKS, "seed"),
}
"""Directories under tests/data: the model that each is for, and whether it holds bases, which no seed brings back."""


@pytest.mark.parametrize(("name", "case", "bases"), [(name, *how) for name, how in FIRST.items()])
def test_a_file_of_the_first_releases_loads_to_its_numbers(
    name: str, case: Case, bases: Stored, tmp_path: Path
) -> None:
    model = case.build()
    before = snapshot(model)
    randlora.load(model, DATA / name)
    (info,) = randlora.adapters(model)
    found = {
        **vars(info.config),
        "targets": list(info.targets),
        "train_also": sorted(info.train_also),
        "options": {fqn: list(own) for fqn, own in info.options.items()},
        "delta_weight": {fqn: randlora.delta_weight(model, fqn).tolist() for fqn in info.targets},
    }
    noted = json.loads((DATA / name / "expected.json").read_text(encoding="utf-8"))
    written = {fact for fact in noted if not fact.endswith("sha256")}  # these are in the header, which is compared
    assert {fact: found[fact] for fact in written} == {fact: noted[fact] for fact in written}
    assert {basis.stored is None for basis in bases_of(model).values()} == {bases == "seed"}
    randlora.save(model, tmp_path, bases=bases)
    assert_same_files(tmp_path, DATA / name)
    randlora.eject(model)
    assert snapshot(model) == before
    assert randlora.files.verify(DATA / name).passed


if __name__ == "__main__":
    if directories := sys.argv[1:]:
        sys.stdout.write(json.dumps(digests(Path(directories[0]))))
    for missing in (golden for golden in GOLDEN if not (directories or golden.directory.exists())):
        randlora.save(build(missing), missing.directory, bases=missing.stored)
        (missing.directory / CARD_FILE).unlink()  # text for readers, which no program reads
