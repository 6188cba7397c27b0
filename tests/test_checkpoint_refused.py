"""Files that are damaged or no adapter's, and models that they do not fit, are refused by one error without a trace."""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers.pytorch_utils import Conv1D

import randlora
from randlora.bases import BasisSpec
from randlora.bases.basis import Basis
from randlora.checkpoint import bases
from randlora.cli.app import main
from randlora.errors import AdapterError, CheckpointError
from tests import checkpoint_files as stored
from tests.checkpoint_files import BASIS_A, BASIS_B, CONFIG_FILE, HEADED, LINEAR, TENSORS_FILE, Case, refused, trained
from tests.fuzz.limits import bounded
from tests.hostile_files import MAKERS, NOT_SAME, Damage, facts, header, model_directory, ones, our_adapter, tensors
from tests.kit import snapshot, untouched


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of sound adapters, by the names of their makers, each read once, and of their model."""
    parent = tmp_path_factory.mktemp("sound")
    model_directory(parent / "base")
    for name, (make, _) in MAKERS.items():
        make(parent / name)
        for verb in verbs(parent / name, parent / "base", parent / "out"):
            with suppress(CheckpointError):  # of a file that PEFT wrote, which tells less
                verb()
            shutil.rmtree(parent / "out", ignore_errors=True)
    return parent


def verbs(directory: Path, base: Path, out: Path) -> list[Callable[[], object]]:
    """Everything that reads an adapter, for one directory; the last three with its model."""
    files = randlora.files
    return [
        lambda: randlora.load(LINEAR.build(), directory),
        lambda: files.inspect(directory),
        lambda: files.convert(directory, out, "peft"),
        lambda: files.convert(directory, out, "native"),
        lambda: files.inspect(directory, base),
        lambda: files.convert(directory, out, "lora", base=base, tolerance=1.0),
        lambda: files.merge(directory, out, base=base),
    ]


CASES = [(maker, said, damage) for maker, (_, rows) in MAKERS.items() for said, damage in rows]


@pytest.mark.parametrize(("maker", "said", "damage"), CASES, ids=[f"{maker}-{said[:50]}" for maker, said, _ in CASES])
def test_every_verb_refuses_a_hostile_file_and_touches_nothing(
    maker: str,
    said: str,
    damage: Damage,
    sound: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the same words, within a second and 100 MiB; every command ends with 1 and a message; nothing is unpickled."""
    monkeypatch.chdir(tmp_path)
    directory, base, out = Path("adapter"), sound / "base", Path("out")
    shutil.copytree(sound / maker, directory)
    damage(directory)
    names, model = sorted(directory.iterdir()), LINEAR.build()
    with untouched(model), pytest.raises(CheckpointError, match=re.escape(said)), bounded(1, 100):
        randlora.load(model, directory)
    for verb in verbs(directory, base, out):
        with pytest.raises(CheckpointError, match=re.escape(said)), bounded(1, 100):
            verb()
    with bounded(1, 100):
        verification = randlora.files.verify(directory)
    (failed,) = (each for each in verification.checks if each.outcome == "failed")
    assert said in failed.words
    for words in (["inspect", directory], ["convert", directory, out], ["merge", directory, out, "--base", base]):
        assert main([*map(str, words)]) == 1
        shown = capsys.readouterr()
        assert (shown.out, shown.err[:7]) == ("", "error: ")
    assert main(["verify", str(directory)]) == 1
    shown = capsys.readouterr()
    assert (shown.err, f"\n{shown.out}".count("\nfailed: ")) == ("", 1)
    assert sorted(directory.iterdir()) == names
    assert [*Path().iterdir()] == [directory]


def test_a_weight_under_two_names_is_refused_by_every_verb_that_has_its_model(sound: Path, tmp_path: Path) -> None:
    directory = our_adapter(tmp_path / "adapter")
    tensors, metadata = stored.read_tensors(directory)
    twice = {name.replace(".0.", ".0.weight."): tensor for name, tensor in tensors.items()}
    stored.write_tensors(directory, tensors | twice, metadata)
    targets = {"0": [4, 6], "0.weight": [4, 6], "2": [5, 4]}
    facts(targets=targets, config__targets=[*targets])(directory)
    refused(LINEAR.build(), directory, "the model has no layer 0.weight")
    for verb in verbs(directory, sound / "base", tmp_path / "out")[-3:]:
        with pytest.raises(CheckpointError, match=r"0 and 0\.weight are both 0\.weight"):
            verb()
    assert not randlora.files.verify(directory, sound / "base").passed


@pytest.mark.medium
def test_bases_as_large_as_peft_would_draw_them_are_not_written_needlessly(sound: Path, tmp_path: Path) -> None:
    spec = BasisSpec("dense", "portable", seed=0, r=2, max_dim=2**14, min_dim=4)
    directory = our_adapter(tmp_path / "adapter", stream="portable")
    facts(targets={"0": [4, 2**14], "2": [2**14, 4]}, basis_sha256=Basis(spec).digest(2**14, 4))(directory)
    with pytest.raises(CheckpointError, match="the file asks for bases of 16384 x 16384 with r=2"):
        randlora.files.convert(directory, tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("for_any_file", "most"), [(2**22, 59_916), (0, 349)])
def test_bases_of_up_to_four_million_entries_or_1024_for_each_value_are_drawn(
    for_any_file: int, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of B has 6 entries, and the time in which it begins is that of 64."""
    directory = our_adapter(tmp_path / "adapter", stream="portable")
    if not for_any_file:
        monkeypatch.setattr(bases, "FREE_ENTRIES", 0)
    for rows, said in ((most, "drawn here, by torch"), (most + 1, "has only 24 trained values")):
        facts(targets={"0": [4, rows], "2": [4, rows]})(directory)
        with pytest.raises(CheckpointError, match=said):
            randlora.files.inspect(directory)


def test_bases_of_all_r_count_together(tmp_path: Path) -> None:
    model = nn.ModuleDict({f"layer_{r}": nn.Linear(1, 30_000, bias=False) for r in range(64, 67)})
    randlora.inject(model, r={f"layer_{r}": r for r in range(64, 67)}, targets=[*model], stream="portable")
    randlora.save(model, tmp_path / "adapter")  # of 690 numbers, with bases of 20 million
    with pytest.raises(CheckpointError, match=r"asks for bases of 30000 x 1 with r=65.*has only"):
        randlora.files.inspect(tmp_path / "adapter")


def test_a_json_of_16_mib_is_read(tmp_path: Path) -> None:
    path = our_adapter(tmp_path) / CONFIG_FILE
    path.write_bytes(path.read_bytes().ljust(2**24))
    randlora.load(LINEAR.build(), tmp_path)


SMALL = Case("small", lambda: nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 3)), {"train_also": ["1.bias"]})


def damaged(raw: bytes) -> Iterator[bytes]:
    """Flip each bit of the length and of our key, and one of every fifth byte; and cut the bytes short."""
    key = raw.find(b'"randlora"')
    exact = {*range(8), *range(key - 2, key + 12)} if key >= 0 else set[int]()
    for place, byte in enumerate(raw):
        for bit in range(8) if place in exact else [place // 5 % 8] * (place % 5 == 0):
            yield raw[:place] + bytes([byte ^ 1 << bit]) + raw[place + 1 :]
    yield from (raw[:length] for length in range(len(raw)) if length % 9 == 0 or length > len(raw) - 8)


@pytest.mark.medium
@pytest.mark.filterwarnings(f"ignore:{CONFIG_FILE} says:UserWarning")
@pytest.mark.parametrize("name", [TENSORS_FILE, CONFIG_FILE])
def test_a_file_with_a_flipped_bit_or_cut_short_is_refused_or_changes_nothing(name: str, tmp_path: Path) -> None:
    """The options are such that no seed of torch's stands for them."""
    randlora.save(trained(SMALL, stream="portable", seed=5, alpha=3, dropout=0.25), tmp_path)
    model, raw = SMALL.build(), (tmp_path / name).read_bytes()
    before = snapshot(model)
    randlora.load(model, tmp_path)
    expected = randlora.adapters(model), stored.understood(model, SMALL)
    randlora.eject(model)
    for contents in damaged(raw):
        (tmp_path / name).write_bytes(contents)
        try:
            randlora.load(model, tmp_path)
        except CheckpointError:
            continue
        assert (randlora.adapters(model), stored.understood(model, SMALL)) == expected, contents
        randlora.eject(model)
    assert snapshot(model) == before
    for contents in (raw[:-1], raw + b"\0") if name == TENSORS_FILE else ():
        (tmp_path / name).write_bytes(contents)
        refused(SMALL.build(), tmp_path, "truncated or damaged")


Make = Callable[[Path], object]
Build = Callable[[], nn.Module]


def headed(directory: Path, digest: str | None = None) -> None:
    randlora.save(trained(HEADED), directory)
    stored.reseal(directory, digest=digest)


def peft(damage: Damage) -> Make:
    return lambda directory: damage(stored.peft_directory(directory))


def with_a_pattern(directory: Path) -> None:
    held = stored.read_tensors(stored.peft_directory(directory))[0]
    others = {key.replace("model.0.", "model..*."): tensor for key, tensor in held.items()}
    stored.edit_tensors(directory, others, drop=[key for key in held if key not in others])


def without_bases(directory: Path) -> None:
    randlora.save(trained(THIN, r=1, stream="portable"), directory, bases="stored")
    stored.edit_tensors(directory, {}, drop=[BASIS_A, BASIS_B])


def first(layer: Build) -> Build:
    return lambda: nn.Sequential(layer(), *[*LINEAR.make().children()][1:])


def twice() -> nn.Module:
    layer = nn.Linear(6, 4)
    return nn.Sequential(layer, nn.Tanh(), layer)


def other(name: str, part: Callable[[], nn.Module | nn.Parameter]) -> Build:

    def make() -> nn.Module:
        model = HEADED.build()
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, part())
        return model

    return make


def transposed() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 6))


THIN = Case("thin", lambda: nn.Sequential(nn.Linear(6, 1)))
NARROW = Case("narrow", stored.Headed, {"targets": ["head"]})
TRAINED_ON = "here, the adapter was trained on out x in = "
INTEGERS = nn.Parameter(torch.ones(7, dtype=torch.int8), requires_grad=False)
LARGER = "0 is 4 x 6, larger than the bases in the file"
REFUSED: tuple[tuple[str, Make, Build], ...] = (
    ("the model has no layer 2", our_adapter, lambda: nn.Sequential(nn.Linear(6, 4))),
    ("the model has no layer 0", our_adapter, lambda: nn.Linear(6, 4)),
    (f"0 is 4 x 7 {TRAINED_ON}4 x 6", our_adapter, first(lambda: nn.Linear(7, 4))),
    (f"0 is 6 x 4 {TRAINED_ON}4 x 6", our_adapter, first(lambda: Conv1D(6, 4))),
    (f"0 is 6 x 4 {TRAINED_ON}4 x 6", our_adapter, first(lambda: nn.Embedding(6, 4))),
    (f"2 is 6 x 4 {TRAINED_ON}5 x 4", our_adapter, transposed),
    ("2 problems:\n  - 0 is 4 x 7", our_adapter, transposed),
    ("0 (LayerNorm) has no weight that can be adapted", our_adapter, first(lambda: nn.LayerNorm(6))),
    ("0 computes its weight from other parameters", our_adapter, first(lambda: weight_norm(nn.Linear(6, 4)))),
    ("0 holds no values yet (meta)", our_adapter, first(lambda: nn.Linear(6, 4, device="meta"))),
    ("2 and 0 are the same layer in this model, which cannot hold both", our_adapter, twice),
    ('give prefix="body"', our_adapter, lambda: nn.ModuleDict({"body": LINEAR.make()})),
    ('give prefix="body"', our_adapter, lambda: trained(HEADED, name="a", r=4)),
    ("under a damaged name", lambda place: header("sandlora")(our_adapter(place)), lambda: trained(HEADED, name="a")),
    ("the model has no parameter norm.bias, which was trained with the", headed, other("norm", nn.Identity)),
    ("head.weight has shape (4, 7) here, (3, 7) in the file", headed, other("head", lambda: nn.Linear(7, 4))),
    ("the model has no parameter head.bias", headed, other("head", lambda: nn.Linear(7, 3, bias=False))),
    ("norm.bias holds torch.int8 here", headed, other("norm.bias", lambda: INTEGERS)),
    (NOT_SAME, partial(headed, digest="0" * 64), lambda: trained(NARROW, name="grows")),
    ("the bases that the file names cannot be drawn", without_bases, THIN.build),
    ("no parameter 0.randlora_lambda.default", peft(tensors({f"{stored.LAMBDA}.default": ones(2)})), LINEAR.build),
    ("the model has no layer .*", with_a_pattern, LINEAR.build),
    ("the adapter was trained on a smaller side of 3", peft(tensors({stored.GAMMA: ones(2, 3)})), LINEAR.build),
    (LARGER, peft(tensors({BASIS_B: ones(5, 3, 2)})), LINEAR.build),
    (LARGER, peft(tensors({BASIS_A: ones(2, 1, 3), BASIS_B: ones(6, 2, 2)})), LINEAR.build),
)


@pytest.mark.parametrize(("said", "make", "build"), REFUSED, ids=[said for said, *_ in REFUSED])
def test_what_does_not_fit_is_refused_and_leaves_a_model_alone(
    said: str, make: Make, build: Build, tmp_path: Path
) -> None:
    make(tmp_path)
    refused(build(), tmp_path, said)


def test_a_part_of_an_adapted_model_is_refused(tmp_path: Path) -> None:
    randlora.inject(whole := nn.ModuleDict({"inner": LINEAR.build()}), r=2)
    said = "has adapters that were added to a different module"
    refused(whole["inner"], our_adapter(tmp_path), said, error=AdapterError, name="x")
