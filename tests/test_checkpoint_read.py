"""What `load` makes of files: ours, PEFT's in every layout, bases of any seed or none, and two files that disagree."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import randlora
from randlora.bases import BasisSpec
from randlora.bases.basis import Basis
from randlora.checkpoint import read
from randlora.disk.formats import open_shard
from randlora.errors import AdapterError
from tests.checkpoint_files import (
    BASIS_A,
    BASIS_B,
    CONFIG_FILE,
    HEADED,
    LAMBDA,
    LINEAR,
    PREFIX,
    TENSORS_FILE,
    Case,
    Twice,
    basis_of,
    doubted,
    edit_fields,
    edit_tensors,
    foreign,
    peft_directory,
    read_fields,
    read_tensors,
    refused,
    trained,
    understood,
)
from tests.fuzz.limits import bounded
from tests.hostile_files import our_adapter
from tests.kit import adapter_values, all_bits, bits, fill, on_one_line


def output(model: nn.Module, name: str = "a0") -> Tensor:
    randlora.activate(model, name)
    return LINEAR.output(model)


def loaded(*directories: Path | str) -> nn.Module:
    model = LINEAR.build()
    for index, directory in enumerate(directories):
        randlora.load(model, directory, name=f"a{index}")
    return model


def test_a_loaded_adapter_is_active_and_frozen_where_it_is_the_first(tmp_path: Path) -> None:
    """What the model computes with it and trains is up to `tests.state_machine`."""
    randlora.save(trained(HEADED), tmp_path)
    model = HEADED.build()
    report = randlora.load(model, tmp_path, name="mine", active=False)
    assert (report.name, report.targets) == ("mine", ("body.0", "body.2"))
    assert report.notes == ("inactive: call randlora.activate(model, 'mine') to add its update",)
    assert set(report.train_also) == {"head.weight", "head.bias", "norm.bias"}
    assert report.trainable_parameters == 3 * (2 + 6) + 4 * (2 + 7) + 3 * 7 + 3 + 7
    assert f"targets: the names in {tmp_path}" in on_one_line(report)
    randlora.eject(model)
    randlora.load(model, tmp_path)
    (info,) = randlora.adapters(model)
    assert (info.name, info.weight, info.is_trainable) == ("default", 1.0, False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(AdapterError, match=r"would have nothing to do \(default\): call randlora.set_trainable"):
        list(randlora.trainable_parameters(model))
    randlora.eject(model)
    with torch.inference_mode():
        randlora.load(model, tmp_path, trainable=True)
    model(torch.ones(2, 6)).sum().backward()
    assert all(parameter.grad is not None for parameter in randlora.trainable_parameters(model))


def test_a_path_that_exists_is_loaded_whatever_it_looks_like(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    our_adapter(tmp_path / "user" / "repo")
    monkeypatch.chdir(tmp_path)
    file = f"user/repo/{TENSORS_FILE}"
    for place in ("user/repo", "user/repo/", "./user/repo", file, Path("user/repo"), Path(file)):
        assert all_bits(adapter_values(loaded(place), "a0")) == all_bits(adapter_values(trained(LINEAR)))
    for nowhere in ("nowhere", "./no/where", "/no/where", "a/b/c", "../a/b", "~/a", Path("user/none")):
        refused(LINEAR.build(), nowhere, f"expected a directory with {CONFIG_FILE} and {TENSORS_FILE}")
    other = Path("user", "repo", CONFIG_FILE)
    refused(LINEAR.build(), other, f"expected a directory, or the file {TENSORS_FILE} in one")
    for place in ("user/repo", file, "nowhere", "a/b/c"):
        refused(LINEAR.build(), place, "a path has no revision, got 'main'", revision="main")
    monkeypatch.chdir("user/repo")
    assert loaded(TENSORS_FILE)


def test_a_shared_layer_is_found_by_whichever_of_its_names_the_file_holds(tmp_path: Path) -> None:
    case = Case("twice", Twice, {"targets": "all-linear"})
    model, other, twin = trained(case), case.build(), case.build()
    del other.first
    other.first = other.again  # by now the second of the two
    for saved, loading in ((model, other), (other, twin)):
        randlora.save(saved, tmp_path)
        randlora.load(loading, tmp_path)
        assert torch.equal(case.output(loading), case.output(model))
    assert other.first is other.again


@pytest.mark.parametrize("pattern", ["(a+)+$", "("])
@pytest.mark.parametrize("make", [our_adapter, peft_directory])
def test_target_modules_of_a_file_is_never_run(pattern: str, make: Callable[..., Path], tmp_path: Path) -> None:
    case = Case("slow to match", lambda: nn.ModuleDict({"a" * 60 + "b": nn.Linear(6, 4)}))
    twin = case.build()
    make(tmp_path, case)
    edit_fields(tmp_path, {"target_modules": pattern})
    with bounded(2, 1000):
        randlora.load(twin, tmp_path)
        assert randlora.files.inspect(tmp_path).layers
    assert randlora.adapters(twin)[0].targets == ("a" * 60 + "b",)
    randlora.save(twin, tmp_path)
    assert read_fields(tmp_path)["target_modules"] == ["a" * 60 + "b"]


LAYOUTS = (("", True, 0, 1e15), ("", False, 0, 7), ("0 2", True, 0, 7.0), ("0 2", False, 0, 0.1), ("2", False, 0, 7))


@pytest.mark.parametrize(("copies", "is_at_the_top", "key", "alpha"), [*LAYOUTS, ("", True, 9, 7)])
def test_every_layout_of_pefts_bases(copies: str, is_at_the_top: bool, key: int, alpha: float, tmp_path: Path) -> None:
    """For each layer, at the top or both; bases in the file win over its key."""
    model, twin = trained(LINEAR, alpha=alpha), LINEAR.build()
    peft_directory(tmp_path, alpha=alpha)
    bases = {part: read_tensors(tmp_path)[0][part] for part in (BASIS_A, BASIS_B)}
    repeated = {
        part.replace("base_model", f"{PREFIX}{fqn}"): value for fqn in copies.split() for part, value in bases.items()
    }
    edit_tensors(tmp_path, repeated, drop=() if is_at_the_top else [*bases])
    edit_fields(tmp_path, {"projection_prng_key": key})
    randlora.load(twin, tmp_path)
    assert (basis_of(twin).stored is not None) == bool(key)
    assert basis_of(twin).spec == basis_of(model).spec or key
    assert all_bits(adapter_values(twin)) == all_bits(adapter_values(model))
    assert torch.equal(LINEAR.output(twin), LINEAR.output(model))
    if copies:  # of which none may differ in a bit, or in dtype
        last = f"{PREFIX}{copies[-1]}.{BASIS_B.rpartition('.')[2]}"
        for other in (bases[BASIS_B].nextafter(bases[BASIS_B] + 1), bases[BASIS_B].double()):
            edit_tensors(tmp_path, {BASIS_B: bases[BASIS_B], last: other})
            refused(LINEAR.build(), tmp_path, f"copies of {BASIS_B} that differ")
    written = read_fields(tmp_path)["randlora_alpha"]
    assert (written, type(written)) == (alpha, int if alpha == int(alpha) else float)


def test_pefts_two_booleans_are_read_as_one_kind_and_other_floating_dtypes_never_narrowed(tmp_path: Path) -> None:
    edit_tensors(peft_directory(tmp_path, r=8), {}, drop=(BASIS_A, BASIS_B))
    for kind, sparse, very in (("sparse", 1, 0), ("very_sparse", 0, 1), ("very_sparse", 1, 1), ("dense", 0, 0)):
        edit_fields(tmp_path, {"sparse": bool(sparse), "very_sparse": bool(very)})
        assert basis_of(loaded(tmp_path), "a0").spec.kind == kind
    edit_fields(tmp_path, {}, drop=("sparse", "very_sparse"))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        written = read_tensors(tmp_path)[0][LAMBDA].to(dtype)
        edit_tensors(tmp_path, {LAMBDA: written})
        model = loaded(tmp_path)
        assert basis_of(model, "a0").spec.kind == "dense"
        wide = written.to(torch.promote_types(dtype, torch.float32))
        assert bits(adapter_values(model, "a0")["0.randlora_lambda"]) == bits(wide)


SMALLEST: dict[torch.dtype, Callable[[Tensor], Tensor]] = {
    torch.float32: lambda drawn: drawn,
    torch.bfloat16: lambda drawn: drawn.bfloat16().float(),
    torch.int8: lambda drawn: drawn.sign() * 1.5,
    torch.float64: lambda drawn: drawn.double() / 3,
}


@pytest.mark.parametrize("dtype", SMALLEST, ids=str)
def test_bases_of_no_seed_are_kept_in_the_smallest_form_that_loses_nothing(dtype: torch.dtype, tmp_path: Path) -> None:
    changes = {BASIS_A: SMALLEST[dtype](torch.randn(2, 1, 8)), BASIS_B: SMALLEST[dtype](torch.randn(12, 4, 2))}
    edit_tensors(peft_directory(tmp_path), changes)
    edit_fields(tmp_path, {"projection_prng_key": 77})
    model = loaded(tmp_path)
    randlora.save(model, tmp_path / "ours", bases="stored")
    twin = loaded(tmp_path / "ours")
    for each in (model, twin):
        basis = basis_of(each, "a0")
        assert basis.spec.seed == 77
        assert {matrix.values.dtype for matrix in basis.matrices()} == {dtype} or each is twin
        kept = basis.slices(6, 5, device="cpu", dtype=torch.float64)
        assert torch.equal(kept.A.float(), changes[BASIS_A][..., :5].float())
        assert torch.equal(kept.B.float(), changes[BASIS_B][:6, :3].float())
    assert dtype == torch.float64 or torch.equal(output(twin), output(model))


def test_bases_of_no_seed_are_shared_by_files_that_hold_the_same_and_by_nothing_else(tmp_path: Path) -> None:
    places = [foreign(tmp_path / "one"), foreign(tmp_path / "two", 1), peft_directory(tmp_path / "drawn")]
    same = loaded(places[0], foreign(tmp_path / "again"))
    assert basis_of(same, "a0") is basis_of(same, "a1")
    for pair in ((0, 1), (0, 2), (2, 0)):
        both = loaded(*(places[index] for index in pair))
        assert basis_of(both, "a0").spec == basis_of(both, "a1").spec
        for name, index in zip(("a0", "a1"), pair, strict=True):
            assert torch.equal(output(both, name), output(loaded(places[index])))
    model, alone = loaded(places[0]), LINEAR.build()
    for each in (model, alone):
        randlora.inject(each, r=2, name="ours")
    assert torch.equal(output(fill(model, "ours"), "ours"), output(fill(alone, "ours"), "ours"))


def test_stored_bases_are_kept_unless_their_key_brings_back_every_number(tmp_path: Path) -> None:
    drawn = Basis(BasisSpec("dense", "torch", seed=0, r=2, max_dim=9, min_dim=7))
    bases = drawn.slices(9, 7, device="cpu", dtype=torch.float32)
    edit_tensors(peft_directory(tmp_path), {BASIS_A: bases.A, BASIS_B: bases.B})
    basis = basis_of(loaded(tmp_path), "a0")
    assert (basis.stored, basis.spec.max_dim, basis.spec.min_dim) == (None, 9, 7)
    assert randlora.files.inspect(tmp_path).bases[0].source == "seed"
    for part, own in ((BASIS_A, bases.A), (BASIS_B, bases.B)):
        changed = own.clone()
        changed[0].view(-1)[3] += 2**-9  # of those that layers use
        edit_tensors(tmp_path, {BASIS_A: bases.A, BASIS_B: bases.B, part: changed})
        assert randlora.files.inspect(tmp_path).bases[0].source == "file"
        kept = basis_of(loaded(tmp_path), "a0").slices(9, 7, device="cpu", dtype=torch.float32)
        assert torch.equal(kept.A if part == BASIS_A else kept.B, changed)


def test_stored_bases_are_used_where_a_seed_draws_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin, other = trained(LINEAR), LINEAR.build(), LINEAR.build()
    randlora.save(model, tmp_path / "stored", bases="stored")
    randlora.save(model, tmp_path / "seed")
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *size, **options: rand(*size, **options).flip(0))
    randlora.load(twin, tmp_path / "stored")
    assert torch.equal(LINEAR.output(twin), LINEAR.output(model))
    assert randlora.files.verify(tmp_path / "stored").passed
    refused(other, tmp_path / "seed", "save it there with bases='stored'")


OPTIONS: dict[str, Any] = {"stream": "portable", "seed": 5, "alpha": 3, "dropout": 0.25}
DISAGREEING: dict[str, dict[str, Any]] = {
    "says r=2, the tensors were saved with 1": {"r": 1, "alpha": 3.5},
    "says randlora_alpha=3, the tensors were saved with 3.5": {"alpha": 3.5},
    "says randlora_dropout=0.25, the tensors were saved with 0.5": {"dropout": 0.5},
    "says projection_prng_key=5, the tensors were saved with 6": {"seed": 6},
    "kind of basis='dense', the tensors were saved with 'sparse'": {"basis": "sparse", "r": 8},
}


@pytest.mark.parametrize("said", DISAGREEING)
def test_tensors_beside_the_json_of_another_save_decide(said: str, tmp_path: Path) -> None:
    other, model, again = trained(LINEAR, **{**OPTIONS, **DISAGREEING[said]}), LINEAR.build(), LINEAR.build()
    ours = our_adapter(tmp_path / "ours", **OPTIONS)
    randlora.save(other, tmp_path / "other")
    shutil.copy(tmp_path / "other" / TENSORS_FILE, ours)
    doubted(model, ours, said)
    for report in (randlora.files.inspect(ours), randlora.files.convert(ours, tmp_path / "native", "native")):
        assert any(said in note and "the files come from different saves" in note for note in report.notes)
    assert not randlora.files.verify(ours).passed
    randlora.load(again, tmp_path / "native")
    assert understood(again, LINEAR) == understood(model, LINEAR) == understood(other, LINEAR)


def test_the_other_file_of_a_save_with_equal_options_says_nothing_else_and_none_is_needed(tmp_path: Path) -> None:
    our_adapter(tmp_path, **OPTIONS, train_also=["2.bias"])
    fewer = our_adapter(tmp_path / "other", **OPTIONS, targets=["0"])
    shutil.copy(fewer / TENSORS_FILE, tmp_path)
    (info,) = randlora.adapters(loaded(tmp_path))
    assert (info.targets, info.train_also) == (("0",), ())
    for bases in ("seed", "stored"):
        model, twin = trained(LINEAR, **OPTIONS), LINEAR.build()
        randlora.save(model, fewer, bases=bases)
        (fewer / CONFIG_FILE).unlink()
        doubted(twin, fewer, f"there is no {CONFIG_FILE}")
        assert understood(twin, LINEAR) == understood(model, LINEAR)
        assert randlora.files.inspect(fewer).nbytes == (fewer / TENSORS_FILE).stat().st_size


def test_files_replaced_while_they_are_read_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The options of one adapter and the tensors of another would load silently: their shapes are equal."""
    peft_directory(tmp_path / "new", alpha=5.0)
    peft_directory(tmp_path / "there", alpha=3.0)

    def replaced(path: Path) -> Any:
        for name in (TENSORS_FILE, CONFIG_FILE):
            shutil.copy(tmp_path / "new" / name, path.parent / name)
        return open_shard(path)

    monkeypatch.setattr(read, "open_shard", replaced)
    refused(LINEAR.build(), tmp_path / "there", "was replaced while it was read: load it again")
    assert torch.equal(output(loaded(tmp_path / "there")), LINEAR.output(trained(LINEAR, alpha=5.0)))
