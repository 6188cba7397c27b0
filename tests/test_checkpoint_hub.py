"""What others read of an adapter: its card, PEFT's fields, the name of its base model, and all of it on a small Hub."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, constants
from peft import PeftModel
from torch import nn

import randlora
from randlora.checkpoint.peft_layout import base_model_name, mismatch, target_modules
from randlora.errors import CheckpointError, ConfigError, how_to_install
from randlora.targets.census import Census
from tests import checkpoint_files as stored
from tests import models
from tests.checkpoint_files import CARD_FILE, CONFIG_FILE, HEADED, LINEAR, TENSORS_FILE, read_fields, refused, trained
from tests.further import further
from tests.hub_server import Hub, Repository, point_client_at
from tests.kit import adapt, adapter_values, all_bits, fill, untouched
from tests.peer import THEIR_WARNINGS, as_peft_draws, peft_draw

FIELD = "base_model_name_or_path"


class Named(nn.Module):
    """A model with transformers' note of where it came from."""

    def __init__(self, origin: str | None) -> None:
        super().__init__()
        self.config = type("Config", (), {"_name_or_path": origin})()
        self.layer = nn.Linear(6, 4)


def card_of(directory: Path) -> str:
    return (directory / CARD_FILE).read_text(encoding="utf-8")


def rows(directory: Path) -> dict[str, str]:
    return dict(re.findall(r"^\| ([^|-][^|]*) \| (.*) \|$", card_of(directory), re.MULTILINE))


def test_the_card_says_what_the_report_of_inject_says_whatever_else_the_model_carries(tmp_path: Path) -> None:
    model, foreign = HEADED.build(), LINEAR.build()
    report = randlora.inject(model, r=2, alpha=7.5, seed=11, basis="block", blocks=(2, 2), **HEADED.options)
    notes = randlora.save(fill(model), tmp_path).notes
    assert rows(tmp_path) == {
        "r": "2",
        "alpha": "7.5",
        "bases": "block",
        "blocks": "(2, 2)",
        "stream of the bases": "portable",
        "seed of the bases": "11",
        "SHA-256 of the bases": f"`{stored.basis_of(model).digest(9, 7)}`",
        "adapted layers": "2, called `0`, `2`",
        "trained parameters": f"{report.trainable_parameters} of {report.total_parameters} ({report.share:.2%})",
        "trained with the adapter": ", ".join(f"`{fqn}`" for fqn in report.train_also),
    }
    assert len(report.train_also) == 3
    alone = card_of(tmp_path)
    assert f"PEFT 0.21.2 does not load these files:\n\n- {notes[0]}\n" in alone
    randlora.inject(model, r=4, name="two")
    with randlora.merged(model):
        randlora.save(model, tmp_path, name="default")
    assert card_of(tmp_path) == alone
    stored.edit_tensors(stored.peft_directory(tmp_path / "peft"), {stored.BASIS_B: torch.randn(6, 3, 2)})
    randlora.load(foreign, tmp_path / "peft")
    randlora.save(foreign, tmp_path / "ours", bases="stored")
    assert rows(tmp_path / "ours")["seed of the bases"] == "none reproduces them: they are in the file"
    assert "PeftModel" in card_of(tmp_path / "ours")


def test_the_hubs_own_library_reads_the_front_matter_which_has_no_path_of_this_machine(tmp_path: Path) -> None:
    model: Any = models.llama()
    randlora.inject(model, r=8)
    cached = "/home/me/.cache/huggingface/hub/models--org--tiny-llama/snapshots/0123"
    names = dict.fromkeys(["org/tiny: llama\"'", "model", str(tmp_path / "base")])
    for name, base in {**names, "org/tiny-llama": "org/tiny-llama", cached: "org/tiny-llama"}.items():
        model.config._name_or_path = name
        twin = models.llama()
        randlora.save(model, tmp_path / "one")
        randlora.load(twin, tmp_path / "one")
        randlora.save(twin, tmp_path / "two")
        for directory in (tmp_path / "one", tmp_path / "two"):
            data = ModelCard.load(directory / CARD_FILE).data
            assert (data.base_model, data.library_name, data.tags) == (base, "randlora", ["randlora"])
            assert str(tmp_path) not in card_of(directory)
    assert data.to_dict()["base_model_relation"] == "adapter"
    assert "pipeline_tag" not in data.to_dict()
    assert "# RandLoRA adapter of org/tiny-llama\n" in card_of(directory)


def test_results_are_a_table_until_a_save_without_them_which_says_so(tmp_path: Path) -> None:
    model = trained(LINEAR)
    before = randlora.save(model, tmp_path).notes
    results: Any = {"accuracy": 0.81, "loss |a|": 2, "F1": "0.79 ±\n0.01", "R": np.float32(0.3)}
    assert randlora.save(model, tmp_path, results=results).notes == before
    table = ["| metric | value |", "|---|---|", "| accuracy | 0.81 |", r"| loss \|a\| | 2 |", "| F1 | 0.79 ± 0.01 |"]
    assert "\n".join(["## Results", "", *table, "| R | 0.3 |", ""]) in card_of(tmp_path)
    (note,) = set(randlora.save(model, tmp_path).notes).difference(before)
    assert note.endswith("pass results= to save for this one")
    assert "Results" not in card_of(tmp_path)
    assert randlora.save(model, tmp_path).notes == before
    with pytest.raises(ConfigError, match=r"results\['accuracy'\] must be a finite number"):
        randlora.save(model, tmp_path, results={"accuracy": float("nan")})
    (tmp_path / CARD_FILE).write_text("# Mine\n")
    assert "not a generated model card" in randlora.save(model, tmp_path, results={"accuracy": 0.81}).notes[-1]
    assert card_of(tmp_path) == "# Mine\n"


@as_peft_draws
@pytest.mark.filterwarnings(*(mark.args[0] for mark in THEIR_WARNINGS))
def test_the_cards_snippets_load_the_adapter(tmp_path: Path) -> None:
    model = models.llama()
    randlora.save(adapt(model, r=8, stream=peft_draw("dense")), tmp_path)
    expected = models.outputs(model, models.tokens())
    snippets = re.findall(r"^```python\n(.*?)^```$", card_of(tmp_path), re.MULTILINE | re.DOTALL)
    spaces: list[dict[str, Any]] = [{"model": models.llama()} for _ in snippets]
    for snippet, space in zip(snippets, spaces, strict=True):
        exec(snippet.replace("path/to/this/directory", str(tmp_path)), space)
    ours, theirs = (space["model"].eval() for space in spaces)
    assert isinstance(theirs, PeftModel)
    assert torch.equal(models.outputs(ours, models.tokens()), expected)
    torch.testing.assert_close(models.outputs(theirs, models.tokens()), expected, rtol=1e-4, atol=1e-4)


def test_a_card_that_somebody_wrote_is_left_alone(tmp_path: Path) -> None:
    for r in (2, 3):
        randlora.save(trained(LINEAR, r=r), tmp_path)
        assert rows(tmp_path)["r"] == str(r)
    claimed = re.sub(r"<!-- Written by randlora.*\n", "", card_of(tmp_path))
    for text in ("# Mine\n", "", "caf\N{LATIN SMALL LETTER E WITH ACUTE}", claimed):
        (tmp_path / CARD_FILE).write_bytes(text.encode("latin-1"))
        report = randlora.save(trained(LINEAR, r=4), tmp_path)
        assert (tmp_path / CARD_FILE).read_bytes() == text.encode("latin-1")
        assert report.nbytes == sum(path.stat().st_size for path in tmp_path.iterdir() if path.name != CARD_FILE)
    (tmp_path / "directory" / CARD_FILE).mkdir(parents=True)
    randlora.save(trained(LINEAR), tmp_path / "directory")
    assert list((tmp_path / "directory" / CARD_FILE).iterdir()) == []
    (tmp_path / CARD_FILE).unlink()
    (tmp_path / CARD_FILE).symlink_to("nowhere")
    randlora.save(trained(LINEAR), tmp_path)
    assert os.readlink(tmp_path / CARD_FILE) == "nowhere"  # noqa: PTH115


FOREIGN: dict[str, Any] = {"a_field_of_tomorrow": [1, {"x": None}], "auto_mapping": {"base_model_class": "Bert"}}
FOREIGN |= {"bias": "lora_only", "init_weights": False, "layers_to_transform": [0], "revision": "main"}
FOREIGN |= {FIELD: "org/base"}


def test_fields_that_mean_nothing_here_are_written_back_and_those_of_the_arithmetic_anew(tmp_path: Path) -> None:
    directory = stored.peft_directory(tmp_path / "peft", r=4)
    before = read_fields(directory)
    others = {"target_modules": "nonsense", "inference_mode": False, "peft_version": "0.15.0"}
    stored.edit_fields(directory, {**FOREIGN, **others})
    model, again, swapped = LINEAR.build(), LINEAR.build(), trained(LINEAR, r=4)
    report = randlora.load(model, directory)
    assert report.notes == ("fields kept but not understood: a_field_of_tomorrow",)
    randlora.save(model, tmp_path / "ours", bases="stored")
    randlora.load(again, tmp_path / "ours")
    randlora.swap(swapped, tmp_path / "ours")
    for each in (model, again, swapped):
        randlora.save(each, tmp_path / "saved", bases="stored")
        assert read_fields(tmp_path / "saved") == {**before, **FOREIGN}


def test_target_modules_are_short_names_where_those_are_enough_for_peft_to_find_no_others() -> None:
    model = nn.ModuleDict({name: nn.ModuleDict({"q": nn.Linear(2, 2), "v": nn.Linear(2, 2)}) for name in "ab"})
    model["x+"] = nn.ModuleDict({"aq": nn.Linear(2, 2), "0": nn.Linear(2, 2)})
    expected: dict[str, object] = {"a.q b.q": ["q"], "a.q b.q a.v b.v": ["q", "v"], "x+.0 x+.aq": ["0", "aq"]}
    expected |= {"a.q": r"a\.q", "a.q b.v": r"a\.q|b\.v", "a.q x+.0": r"a\.q|x\+\.0"}
    assert {names: target_modules(Census.of(model), names.split()) for names in expected} == expected


def test_the_json_is_sorted_and_names_whole_modules_and_transposed_weights(tmp_path: Path) -> None:
    head = nn.ModuleDict({"dense": nn.Linear(2, 2), "out": nn.Linear(2, 2, bias=False)})
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), "head": head})
    whole: dict[str | None, list[str] | None] = {None: None, "head|body.1": ["body.1", "head"], "head.dense.bias": None}
    for also, expected in {**whole, r"head.out|body.1.bias": ["head.out"], "head.*|body.0.bias": ["head"]}.items():
        randlora.inject(model, r=2, targets=["body.0"], train_also=also)
        randlora.save(model, tmp_path)
        randlora.eject(model)
        assert read_fields(tmp_path)["modules_to_save"] == expected
    for case in stored.CASES:
        randlora.save(trained(case), tmp_path)
        assert read_fields(tmp_path)["fan_in_fan_out"] is (case.name == "Conv1D")
    text = (tmp_path / CONFIG_FILE).read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"


CACHED = "/home/me/.cache/huggingface/hub/models--{}--model/snapshots/0123456789"
PATHS = ["/data/model", "/data/model/", "./model", "model", "Org/Model"]
SAME = [*PATHS, r"C:\data\model", "", None, CACHED.format("org")]
OTHER = ["org/another", "another/model", "/data/another", CACHED.format("another")]


def test_a_load_into_another_model_warns_with_both_names_and_notes_it(tmp_path: Path) -> None:
    same = [(None, None), ("/data/model", "/mnt/model"), ("gpt2", "/cache/models--gpt2/snapshots/0123456789/")]
    for one, other in [*(("org/model", name) for name in SAME), *same]:
        assert (mismatch(Named(one), other), mismatch(Named(other), one)) == (None, None), (one, other)
    randlora.inject(adapted := Named("org/model"), r=2)
    randlora.save(adapted, tmp_path)
    assert randlora.load(Named("/data/model"), tmp_path).notes == ()
    for other in OTHER:
        model = Named(other)
        with warnings.catch_warnings(action="error"), untouched(model), pytest.raises(UserWarning, match="trained on"):
            randlora.load(model, tmp_path)
        both = re.escape(f"trained on 'org/model', but this model is {other!r}")
        with pytest.warns(UserWarning, match=both) as caught:
            report = randlora.load(model, tmp_path)
        (warning,) = caught
        assert report.notes == (str(warning.message),)
        assert warning.filename == __file__, "it points at the line that loads"


def test_the_name_written_is_the_models_unless_the_file_says_the_same(tmp_path: Path) -> None:
    names: list[Any] = [("org/model", None), ("org/another", "org/model"), ("/data/model", "org/model"), (None, 7)]
    expected = ["org/model", "org/another", "org/model", None]
    assert [base_model_name(Named(own), written) for own, written in names] == expected
    plain = trained(LINEAR)
    plain.name_or_path = "org/model"  # type: ignore[assignment]
    randlora.save(plain, tmp_path)
    assert read_fields(tmp_path)[FIELD] == "org/model"


def test_an_adapter_of_another_architecture_is_told_from_what_it_was_trained_on(tmp_path: Path) -> None:
    llama, gpt, fewer = models.LLAMA.build(), models.GPT2.build(), models.LLAMA.build()
    del fewer.model.layers[1]  # type: ignore[union-attr, operator]
    said = "fit the adapter, trained on LlamaForCausalLM, to this GPT2LMHeadModel, 4 problems:"
    randlora.inject(llama, r=4)
    with pytest.raises(CheckpointError, match=said):
        randlora.load(gpt, randlora.adapter_state(llama))
    for model, name in ((llama, "org/llama"), (gpt, "org/gpt"), (fewer, "org/llama")):
        model.config._name_or_path = name  # type: ignore[union-attr]
    randlora.save(llama, tmp_path / "adapter")
    gpt.save_pretrained(tmp_path / "gpt")  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=said):
        randlora.load(gpt, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"trained on LlamaForCausalLM.*, to this GPT2LMHeadModel"):
        randlora.files.merge(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "gpt")
    with pytest.raises(CheckpointError, match="fit the adapter to this model, 2 problems:"):
        randlora.load(fewer, tmp_path / "adapter")


NOBODY = "http://127.0.0.1:1"


@pytest.fixture
def pushed(hub: Hub, tmp_path: Path) -> Hub:
    randlora.save(trained(HEADED), tmp_path / "pushed", push_to_hub="user/repo")
    return hub


def loads(name: str, case: stored.Case, **options: Any) -> str:
    twin = case.build()
    report = randlora.load(twin, name, **options)
    assert all_bits(adapter_values(twin)) == all_bits(adapter_values(trained(case)))
    return report.rule


def test_only_the_two_files_are_downloaded(pushed: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(pushed.repositories) == {"user/repo"}
    pushed.repositories["user/repo"].commit({"optimizer.pt": b"large"})
    assert loads("user/repo", HEADED) == "the names in user/repo"
    (directory,) = (tmp_path / "cache" / "models--user--repo" / "snapshots").iterdir()
    assert {path.name for path in directory.iterdir()} == {CONFIG_FILE, TENSORS_FILE}
    pushed.requests.clear()
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        for revision in (None, "main", directory.name):
            loads("user/repo", HEADED, revision=revision)
    point_client_at(NOBODY, monkeypatch)
    loads("user/repo", HEADED)
    assert pushed.requests == []


@pytest.mark.medium
@pytest.mark.parametrize("is_known", [further(True), False])
def test_a_process_that_has_imported_nothing_of_the_hubs_library_downloads(
    pushed: Hub, tmp_path: Path, without_transformers: dict[str, str], is_known: bool
) -> None:
    apart = {"HF_ENDPOINT": pushed.url, "HF_HUB_CACHE": str(tmp_path / "apart"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "randlora", "inspect", "user/repo" if is_known else "user/none"]
    done = subprocess.run(command, env=without_transformers | apart, capture_output=True, text=True, check=False)
    said = "error: there is no such path, and the Hub's repository 'user/none' cannot be downloaded: check its name"
    assert (done.returncode == 0, said in done.stderr, "format" in done.stdout) == (is_known, not is_known, is_known)


def test_a_push_uploads_what_the_directory_holds_of_the_adapter_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "optimizer.pt").write_bytes(b"large")
    report = randlora.save(trained(LINEAR), tmp_path / "out", push_to_hub="user/repo")
    found = hub.repositories["user/repo"].files()
    assert set(found) == {".gitattributes", CARD_FILE, CONFIG_FILE, TENSORS_FILE}
    assert all(found[name] == (tmp_path / "out" / name).read_bytes() for name in set(found) - {".gitattributes"})
    assert report.url == f"{hub.url}/user/repo"
    assert str(report).splitlines()[1] == f"pushed to {hub.url}/user/repo"
    assert '"user/repo"' in found[CARD_FILE].decode()
    first = hub.repositories["user/repo"].refs["main"]
    randlora.save(trained(HEADED), tmp_path / "other", push_to_hub="user/repo")
    loads("user/repo", HEADED)
    assert loads("user/repo", LINEAR, revision=first) == f"the names in user/repo at {first}"


def test_a_card_that_somebody_wrote_survives_a_push_and_ones_own_wins(pushed: Hub, tmp_path: Path) -> None:
    repository = pushed.repositories["user/repo"]
    generated = repository.files()[CARD_FILE]
    for here, there in ((None, b"# There"), (b"# Here", b"# There"), (b"# Here", generated)):
        repository.commit({CARD_FILE: there})
        if here:
            (tmp_path / "pushed" / CARD_FILE).write_bytes(here)
        randlora.save(trained(HEADED, r=3), tmp_path / "pushed", push_to_hub="user/repo")
        assert repository.files()[CARD_FILE] == (here or there)
        assert repository.files()[TENSORS_FILE] == (tmp_path / "pushed" / TENSORS_FILE).read_bytes()


def test_several_adapters_are_pushed_in_one_commit_and_loaded_together_or_one_by_one(hub: Hub, tmp_path: Path) -> None:
    model, twin, one = trained(HEADED), HEADED.build(), HEADED.build()
    randlora.inject(model, r=3, targets=["0"], name="a")
    reports = randlora.save_all(fill(model, "a", seed=4), tmp_path / "out", push_to_hub="user/repo")
    assert [report.url for report in reports] == [f"{hub.url}/user/repo"] * 2
    found = hub.repositories["user/repo"].files()
    assert 'randlora.load(model, "user/repo", subfolder="a")' in found[f"a/{CARD_FILE}"].decode()
    assert [report.name for report in randlora.load_all(twin, "user/repo")] == ["default", "a"]
    assert randlora.load(one, "user/repo", subfolder="a", name="a").rule == "the names in a of user/repo"
    for each, name in ((twin, "default"), (twin, "a"), (one, "a")):
        assert all_bits(adapter_values(each, name)) == all_bits(adapter_values(model, name))


REFUSED: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("user/none", {}, "cannot load 'user/none': there is no such path, and the Hub's repository"),
    ("user/none", {}, "check its name; if it is private, log in with `hf auth login` (RepositoryNotFoundError"),
    ("user/gated", {}, "it is gated: ask for access on its page, then log in with `hf auth login` (GatedRepo"),
    ("user/repo", {"revision": "v9"}, "it has no such revision: name a branch, a tag or a commit of it (RevisionNot"),
    ("user/empty", {}, f"has no {CONFIG_FILE} and no {TENSORS_FILE}: name a different one"),
    ("user/repo", {"subfolder": "b"}, f"has no b/{CONFIG_FILE} and no b/{TENSORS_FILE}"),
    ("user/a--b", {}, "check the name, the connection, and HF_HUB_OFFLINE (HFValidationError"),
)


def test_what_the_hub_refuses_is_said_with_what_to_do(pushed: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("user/gated", "user/empty"):
        pushed.repositories[other] = Repository()
        pushed.repositories[other].commit({"optimizer.pt": b"large"})
    pushed.gated.add("user/gated")
    for name, options, message in REFUSED:
        refused(HEADED.build(), name, message, **options)
    with pytest.raises(CheckpointError, match=r"cannot load 'user/empty': .* has no adapters"):
        randlora.load_all(HEADED.build(), "user/empty")
    pushed.requests.clear()
    point_client_at(NOBODY, monkeypatch)
    for is_offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
        refused(LINEAR.build(), "user/new", "it is not in the cache: check the connection, and HF_HUB_OFFLINE")
    assert pushed.requests == []


def test_a_push_that_fails_leaves_the_save_whole(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.writable = False
    for number, said in enumerate(("with `hf auth login`, with a token that has", "the connection", "the connection")):
        out = tmp_path / str(number)
        message = rf"saved to '{out}' completely, but cannot push to 'user/repo': .*{said}"
        with pytest.raises(CheckpointError, match=message):
            randlora.save(trained(LINEAR), out, push_to_hub="user/repo")
        loads(str(out), LINEAR)
        assert (out / CARD_FILE).is_file()
        point_client_at(NOBODY, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", number == 1)


def test_a_push_that_cannot_work_is_refused_before_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = trained(LINEAR), tmp_path / "out"
    names = ("repo", "a/b/c", "../repo", "/user/repo", "")
    with untouched(model):
        for name in names:
            with pytest.raises(CheckpointError, match="push_to_hub must be a repository on the Hub, 'user/repo', got"):
                randlora.save(model, out, push_to_hub=name)
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # Python's own way to say that there is no such
        with pytest.raises(CheckpointError, match=re.escape(how_to_install("hub"))):
            randlora.save(model, out, push_to_hub="user/repo")
    refused(LINEAR.build(), "user/repo", how_to_install("hub"))
    assert not out.exists()
