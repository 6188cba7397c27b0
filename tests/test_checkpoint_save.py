"""`save` and `save_all`: what they write, refuse and say; what is loaded again is the same adapter, bit for bit."""

import errno
import os
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import randlora
from randlora.disk import replace as replacing
from randlora.errors import AdapterError, CheckpointError, ConfigError, RandLoRAError
from tests import checkpoint_files as stored
from tests.checkpoint_files import HEADED, LINEAR, TENSORS_FILE, Case, Stored, basis_of, read_tensors, trained
from tests.kit import Bits, adapt, adapter_values, all_bits, fill, snapshot, untouched
from tests.laws import Mixed
from tests.model_directories import contents
from tests.strategies import KINDS_AND_STREAMS, seeds

FILES = {stored.CARD_FILE, stored.CONFIG_FILE, TENSORS_FILE}


def widened(model: nn.Module) -> dict[str, Bits]:
    values = adapter_values(model)
    return all_bits({
        name: value.to(torch.promote_types(value.dtype, torch.float32)) if "randlora_" in name else value
        for name, value in values.items()
    })


@st.composite
def inject_options(draw: st.DrawFn) -> dict[str, Any]:
    """Draw options for every kind of bases; a ternary rank is large enough that no basis is all zeros by bad luck."""
    kind, stream = draw(st.sampled_from(KINDS_AND_STREAMS))
    return {
        "r": draw(st.integers(8, 12) if "sparse" in kind else st.integers(1, 12)),
        "basis": kind,
        "stream": draw(st.sampled_from([stream, None])) if kind in ("dense", "block") else stream,
        "seed": draw(seeds),
        "alpha": draw(st.none() | st.integers(1, 10**6) | st.floats(1e-3, 1e3)),
        "dropout": draw(st.just(0.0) | st.floats(0, 1, exclude_max=True)),
    }


@pytest.mark.medium
@given(st.sampled_from(stored.CASES), inject_options(), st.sampled_from(["seed", "stored"]))
def test_save_then_load_is_the_identity_for_any_options(case: Case, options: dict[str, Any], bases: Stored) -> None:
    model, twin = trained(case, **options), case.build()
    before, fresh, generator = snapshot(model), snapshot(twin), torch.get_rng_state()
    with TemporaryDirectory() as name:
        place = Path(name)
        randlora.save(model, place / "first", bases=bases)
        with torch.inference_mode():
            randlora.save(nn.ModuleDict({"inner": model}), place / "again", bases=bases)  # its names are its own
        assert snapshot(model) == before
        randlora.load(twin, place / "first")
        assert torch.equal(torch.get_rng_state(), generator)
        randlora.save(twin, place / "second", bases=bases)
        assert contents(place / "second") == contents(place / "first") == contents(place / "again")
    (theirs,), (ours,) = randlora.adapters(model), randlora.adapters(twin)
    assert (ours.targets, ours.specs, ours.options) == (theirs.targets, theirs.specs, theirs.options)
    assert (ours.config.dropout, ours.train_also) == (theirs.config.dropout, theirs.train_also)
    assert all_bits(adapter_values(twin)) == widened(model)
    assert torch.equal(case.output(twin), case.output(model))
    randlora.eject(twin)
    assert snapshot(twin) == fresh


@stored.both_ways
def test_an_adapter_that_shared_larger_bases_than_its_own_reloads_alone(bases: Stored, tmp_path: Path) -> None:
    model, twin = HEADED.build(), HEADED.build()
    for name, targets in {"first": ["0", "2"], "second": ["head"]}.items():
        randlora.inject(model, r=2, targets=targets, name=name)
    assert basis_of(model, "first") is basis_of(model, "second")
    randlora.activate(fill(model, "second"), "second")
    report = randlora.save(model, tmp_path, name="second", bases=bases)
    randlora.load(twin, tmp_path)
    assert torch.equal(HEADED.output(twin), HEADED.output(model))
    assert randlora.adapters(twin)[0].specs == randlora.adapters(model)[1].specs
    assert any("bases='stored'" in note for note in report.notes) == (bases == "seed")
    alone = trained(HEADED, targets=["head"], stream="portable", train_also=None)
    randlora.save(alone, tmp_path / "alone", bases=bases)
    randlora.inject(alone, r=2, targets=["0", "2"], stream="portable", name="large")
    assert basis_of(alone, "default") is basis_of(alone, "large")
    randlora.save(alone, tmp_path / "beside", name="default", bases=bases)
    assert contents(tmp_path / "beside")[TENSORS_FILE] == contents(tmp_path / "alone")[TENSORS_FILE]


HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.mark.parametrize("case", [HEADED, stored.CASES[-1]], ids=["one r", "several"])
@HALVES
def test_what_is_rounded_is_loaded_swapped_verified_and_saved_again_as_it_is(
    dtype: torch.dtype, case: Case, tmp_path: Path
) -> None:
    model, twin, other = trained(case), case.build(), fill(trained(case), seed=3)
    randlora.save(model, tmp_path / "whole")
    report = randlora.save_all(model, tmp_path / "half", dtype=dtype)[0]
    (whole, _), (half, _) = (read_tensors(tmp_path / each) for each in ("whole", "half"))
    expected = {key: each.to(dtype) if "randlora_" in key else each for key, each in whole.items()}
    assert all_bits(half) == all_bits(expected)
    assert all_bits(randlora.adapter_state(model, dtype=dtype).tensors) == all_bits(half)
    assert report.nbytes == sum(path.stat().st_size for path in (tmp_path / "half").iterdir())
    assert str(report).startswith(f"saved 'default' to {tmp_path / 'half'}, ")
    assert randlora.files.verify(tmp_path / "half").passed
    randlora.load(twin, tmp_path / "half")
    randlora.swap(other, randlora.adapter_state(model, dtype=dtype))
    assert torch.equal(case.output(twin), case.output(other))
    values = {name: each for name, each in adapter_values(twin).items() if "randlora_" in name}
    assert {each.dtype for each in values.values()} == {torch.float32}
    randlora.save(twin, tmp_path / "again", dtype=dtype)
    randlora.files.convert(tmp_path / "half", tmp_path / "converted", "native")
    for again in ("again", "converted"):
        assert contents(tmp_path / again)[TENSORS_FILE] == contents(tmp_path / "half")[TENSORS_FILE]


@HALVES
@pytest.mark.parametrize("basis", ["dense", "block"])
def test_card_and_report_say_by_how_much_rounding_changes_an_update(
    basis: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    def built() -> nn.Sequential:
        return nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 128))

    model, twin = adapt(built(), r=8, targets="all", basis=basis), built()
    report = randlora.save(model, tmp_path, dtype=dtype)
    (said,) = (note for note in report.notes if note.startswith("Λ and Γ are in "))
    card = (tmp_path / stored.CARD_FILE).read_text()
    assert f"| Λ and Γ | {said.removeprefix('Λ and Γ are in ')} |" in card
    randlora.load(twin, tmp_path)
    updates = [[randlora.delta_weight(each, fqn) for fqn in "01"] for each in (model, twin)]
    most = max(float(((own - half).norm() / own.norm()).detach()) for own, half in zip(*updates, strict=True))
    assert said.startswith(f"Λ and Γ are in {str(dtype).removeprefix('torch.')}, which changes a layer's update by ")
    assert float(said.split()[-1].rstrip("%")) / 100 == pytest.approx(most, rel=0.1, abs=1e-4)
    report = randlora.save(model, tmp_path)
    assert not any("Λ and Γ are in" in note for note in report.notes)
    assert "| Λ and Γ |" not in (tmp_path / stored.CARD_FILE).read_text()


@pytest.mark.parametrize(("factor", "said"), [(1e6, "inf%"), (1e-8, "100.0%")])
def test_what_is_too_large_or_too_small_for_a_dtype_is_refused_before_it_is_written(
    factor: float, said: str, tmp_path: Path
) -> None:
    model = trained(LINEAR)
    for name, value in adapter_values(model).items():
        if name.startswith("0.randlora_lambda"):
            value.data.mul_(factor)
    said = f"would change by {said} in torch.float16, whose range is too narrow: choose a wider one, such as bfloat16"
    randlora.save(model, tmp_path / "whole", dtype=torch.bfloat16)
    before = contents(tmp_path)
    for call in (
        lambda: randlora.save(model, tmp_path / "new", dtype=torch.float16),
        lambda: randlora.save(model, tmp_path / "whole", dtype=torch.float16),
        lambda: randlora.adapter_state(model, dtype=torch.float16),
    ):
        with pytest.raises(CheckpointError, match=f"Λ of 0 {said}"):
            call()
    with pytest.raises(ConfigError, match=r"dtype must be one of torch.float32, .*, got torch.int8"):
        randlora.save(model, tmp_path / "new", dtype=torch.int8)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("first", ["inject", "wrap"])
def test_wrappers_of_torch_change_no_names(first: str, tmp_path: Path) -> None:
    wraps: list[Callable[[nn.Module], Any]] = [checkpoint_wrapper, partial(torch.compile, backend="eager")]
    for wrap in wraps:
        body = nn.ModuleDict({"inner": wrap(Mixed()) if first == "wrap" else Mixed()})
        model, fresh = nn.Sequential(body), nn.Sequential(nn.ModuleDict({"inner": Mixed()}))
        report = randlora.inject(model, r=3, targets=["q", "up"], train_also=["head"])
        if first == "inject":
            body["inner"] = wrap(body["inner"])
        assert report.targets == ("0.inner.q", "0.inner.up")
        randlora.save(fill(model), tmp_path)
        randlora.load(fresh, tmp_path)
        assert all_bits(adapter_values(fresh)) == all_bits(adapter_values(model))


Call = Callable[[Path], object]


def of_three() -> nn.Module:
    model = trained(HEADED)
    randlora.inject(model, r=3, targets=["0"], name="a", stream="portable")
    randlora.inject(model, r=2, targets=["2"], name="b", basis="block")
    return fill(fill(model, "a", seed=1), "b", seed=2)


def freed(held: Tensor) -> Tensor:
    held.untyped_storage().resize_(0)
    return held


def wrong(change: Callable[[Tensor], Tensor], fqn: str = "body.0.randlora_gamma.default") -> Call:

    def call(out: Path) -> None:
        model = of_three()
        parameter = model.get_parameter(fqn)
        parameter.data = change(parameter.data.clone())
        randlora.save_all(model, out) if "gamma" in fqn else randlora.save(model, out, name="default")

    return call


def meta(out: Path) -> None:
    model = HEADED.build().to("meta")
    randlora.inject(model, r=2, targets=["0"], train_also=["norm.bias"])
    randlora.save(model, out)


INFINITE = "holds NaN or infinite values, which cannot be loaded"
WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    INFINITE: lambda held: held / 0,
    r"holds torch\.float8_e4m3fn: expected one of torch\.float32": lambda held: held.to(torch.float8_e4m3fn),
    r"has shape \(0,\) here, expected all of \(.*gather it if it is sharded": lambda _: torch.empty(0),
    r"has shape \(1, 1, \d+\) here, expected all of \(": lambda held: held.flatten()[None, None],
    r"has no memory here, expected all of \(": freed,
}
UNNAMED = r"cannot be the name of a directory: save it by itself"
REFUSED: tuple[tuple[str, type[Exception], Call], ...] = (
    (r"has several adapters \(default, a, b\)", AdapterError, lambda out: randlora.save(of_three(), out)),
    ("named 'c'", AdapterError, lambda out: randlora.save_all(of_three(), out, names=["a", "c"])),
    ("names must be", RandLoRAError, lambda out: randlora.save_all(of_three(), out, names="aa")),
    ("no adapter is named", CheckpointError, lambda out: randlora.save_all(of_three(), out, names=[])),
    (UNNAMED, CheckpointError, lambda out: randlora.save_all(trained(LINEAR, name="a/b"), out)),
    (r"body\.0 holds no values(.*\n)+.*norm\.bias holds no values", CheckpointError, meta),
    (rf"Λ of body\.0 {INFINITE}", CheckpointError, wrong(lambda held: held / 0, "body.0.randlora_lambda.default")),
    (rf"norm\.bias {INFINITE}", CheckpointError, wrong(lambda held: held / 0, "norm.bias")),
    *((rf"Γ of body\.0 {said}", CheckpointError, wrong(change)) for said, change in WRONG.items()),
)


@pytest.mark.parametrize(("said", "error", "call"), REFUSED, ids=[said for said, *_ in REFUSED])
def test_what_is_refused_is_refused_before_anything_is_written(
    said: str, error: type[Exception], call: Call, tmp_path: Path
) -> None:
    randlora.save_all(of_three(), tmp_path / "old")
    before = contents(tmp_path)
    for directory in (tmp_path / "new", tmp_path / "old"):
        with pytest.raises(error, match=said):
            call(directory)
    assert contents(tmp_path) == before
    assert [*tmp_path.iterdir()] == [tmp_path / "old"]


def test_a_file_or_a_broken_link_in_place_of_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b").touch()
    (tmp_path / "link").symlink_to("nowhere")
    one, three = partial(randlora.save, trained(LINEAR)), partial(randlora.save_all, of_three())
    calls: list[tuple[str, Callable[[Path], object]]] = [("b", one), ("link", one), ("", three)]
    for name, save in calls:
        with pytest.raises(CheckpointError, match="is a file or a broken link: expected the name of a directory"):
            save(tmp_path / name)
    assert contents(tmp_path) == {"b": b""}


def test_each_is_in_a_directory_of_its_name_and_default_in_the_root_as_in_peft(tmp_path: Path) -> None:
    model, twin, one = of_three(), HEADED.build(), HEADED.build()
    with untouched(model):
        reports = randlora.save_all(model, tmp_path / "all")
    places = {"default": tmp_path / "all", "a": tmp_path / "all" / "a", "b": tmp_path / "all" / "b"}
    assert {report.name: report.directory for report in reports} == places
    assert {*contents(tmp_path / "all")} == {*FILES, *(f"{name}/{file}" for name in "ab" for file in FILES)}
    loaded = randlora.load_all(twin, tmp_path / "all")
    assert [(report.name, report.is_active) for report in loaded] == [("default", True), ("a", False), ("b", False)]
    assert [each.is_active for each in randlora.adapters(twin)] == [True, False, False]
    for name, place in places.items():
        randlora.save(model, tmp_path / "one", name=name)
        for file in FILES:
            assert (tmp_path / "one" / file).read_bytes() == (place / file).read_bytes()
        assert all_bits(adapter_values(twin, name)) == all_bits(adapter_values(model, name))
    randlora.save_all(model, tmp_path / "some", names=["b", "a"], bases="stored")
    assert {*contents(tmp_path / "some")} == {f"{name}/{file}" for name in "ab" for file in FILES}
    randlora.load_all(one, tmp_path / "some", names=["a"], trainable=True)
    assert [(each.name, each.is_trainable) for each in randlora.adapters(one)] == [("a", True)]
    randlora.load_all(one, str(tmp_path / "some"), names=["b"])
    assert [each.name for each in randlora.adapters(one)] == ["a", "b"]


def test_nothing_is_seen_if_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, old = of_three(), tmp_path / "old"
    randlora.save_all(trained(LINEAR), old)
    randlora.save_all(trained(LINEAR, name="a"), old)
    before = contents(tmp_path)
    for out, failing in product((old, tmp_path / "new"), (0, 4, 8)):
        full = Mock(side_effect=[*[None] * failing, OSError(errno.ENOSPC, "full"), *[None] * 99])
        monkeypatch.setattr(replacing, "flush", full)
        with pytest.raises(OSError, match="full"):
            randlora.save_all(model, out, names=("b", "default", "a"))
    assert contents(tmp_path) == before
    assert [*tmp_path.iterdir()] == [old]


DAMAGES: tuple[tuple[str, Callable[[Path], object]], ...] = (
    ("/b'.*truncated or damaged", lambda place: os.truncate(place / "b" / TENSORS_FILE, 1000)),
    ("/b'.*give prefix=", lambda place: randlora.save(trained(LINEAR), place / "b")),
    ("two adapters named 'default'", lambda place: (place / "b").rename(place / "default")),
)
named: Any = {"subfolder": "a", "name": "c"}
LOADS: tuple[tuple[str, Callable[[nn.Module, Path], object]], ...] = (
    ("no adapter named 'c'; the nearest are", lambda model, place: randlora.load_all(model, place, names=["a", "c"])),
    ("cannot load .*/a/b': .* has no adapters", lambda model, place: randlora.load_all(model, place / "a" / "b")),
    ("a path has no revision, got 'main'", lambda model, place: randlora.load_all(model, place, revision="main")),
    ("cannot load 'default': the model has an adapter of that name", randlora.load_all),
    (
        "it is a file: expected a directory, or the file",
        lambda model, place: randlora.load(model, place / TENSORS_FILE, **named),
    ),
)


def test_all_are_loaded_or_none(tmp_path: Path) -> None:
    for number, (message, damage) in enumerate(DAMAGES):
        place = tmp_path / str(number)
        randlora.save_all(of_three(), place)
        damage(place)
        for model in (trained(HEADED, name="own"), HEADED.build()):
            with untouched(model), pytest.raises(CheckpointError, match=message):
                randlora.load_all(model, place)
    randlora.save_all(of_three(), tmp_path / "all")
    model = trained(HEADED)
    for message, load in LOADS:
        with untouched(model), pytest.raises(RandLoRAError, match=message):
            load(model, tmp_path / "all")
