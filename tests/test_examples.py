"""The examples in docs/examples: what they do with data, and each of them whole on a tiny model; no file is fetched."""

import copy
import io
import runpy
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import typer

import randlora
from tests import models
from tests.examples import EXAMPLES, imported
from tests.peer import TRAINERS_WARNINGS
from tests.torture.training import killed_training, plain_loop
from tests.trainers import ADAPTER_FILES, files, trained_bits

pytestmark = TRAINERS_WARNINGS


def test_reviews_keep_clear_ratings_and_no_text_twice_and_are_split(tmp_path: Path) -> None:
    sentiment = imported("sentiment")
    table = "1\t2.1\tGood.\r\n2\t-1.5\tBad…\r\n3\t0.5\tUnclear.\r\n4\t-0.2\tUnclear, too.\r\n5\t3.0\tGood.\r\n".encode()
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        info = tarfile.TarInfo("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        info.size = len(table)
        tar.addfile(info, io.BytesIO(table))
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    assert sentiment.read_reviews(tmp_path / "archive.zip") == [("Good.", True), ("Bad…", False)]
    with pytest.raises(typer.BadParameter, match="make demo"):
        sentiment.read_reviews(tmp_path / "absent.zip")
    reviews = [sentiment.Review(str(number), number % 2 == 0) for number in range(50)]
    training, test = sentiment.split(reviews, 30, 15, 0)
    assert (len(training), len(test), len({*training, *test})) == (30, 15, 45)
    assert sentiment.split(reviews, 30, 15, 0) == (training, test) != sentiment.split(reviews, 30, 15, 1)
    with pytest.raises(typer.BadParameter, match="too many"):
        sentiment.split(reviews, 30, 21, 0)


def test_a_classifier_learns_again_the_same_reloads_merges_and_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From texts of 3 to 7 tokens whose first token says whether they are good."""
    sentiment, encoder = imported("sentiment"), cast("Any", models.bert()).bert
    model = sentiment.SentimentClassifier(encoder, encoder.config.hidden_size)
    mask = (torch.arange(7) < torch.arange(24)[:, None] % 5 + 3).long()
    ids, labels = torch.randint(10, models.VOCABULARY, (24, 7)) * mask, torch.arange(24) % 2
    ids[:, 0] = 1 + labels
    texts = sentiment.Texts(ids, mask, labels.float())
    fresh = copy.deepcopy(model)
    monkeypatch.setattr(sentiment, "load_classifier", lambda: copy.deepcopy(fresh))
    monkeypatch.setattr(sentiment, "SHOWN_LAYER", "encoder.encoder.layer.1.attention.self.value")

    def trained(model: Any) -> list[float]:
        randlora.inject(model, r=8, alpha=16, targets=sentiment.TARGETS, train_also="head")
        losses: list[float] = sentiment.train_with_progress(model, texts, epochs=20, lr=1e-2, seed=0)
        return losses

    losses = trained(model)
    assert losses[-1] < 0.5 * losses[0]
    assert sentiment.accuracy(sentiment.predict(model, texts), texts) > 0.9
    assert trained(copy.deepcopy(fresh)) == losses
    randlora.save(model, tmp_path)
    rows, is_right = sentiment.check_reloading(model, tmp_path, texts)
    assert is_right
    assert all(found.startswith("24 of 24 predictions equal") for _, found in rows[:2])
    _, found = sentiment.draw(model, losses, tmp_path / "picture.png")
    assert found == "32 of 32; a LoRA of equal size has 2 at most"  # 4 · (8 + 32) numbers, 64 for each rank of a LoRA
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    with torch.no_grad():
        model.get_submodule(sentiment.SHOWN_LAYER).randlora_lambda["default"].add_(0.1)
    assert not sentiment.check_reloading(model, tmp_path, texts)[1]


def test_tales_are_read_by_their_titles_and_a_language_model_learns_some(tmp_path: Path) -> None:
    causal_lm = imported("causal_lm")
    (tmp_path / "tales.txt").write_text("# One\n\nOnce.\n\nTwice.\n\n# Two\n\nThrice.\n", encoding="utf-8")
    assert causal_lm.read_tales(tmp_path / "tales.txt") == [("One", "Once.\n\nTwice."), ("Two", "Thrice.")]
    tales = causal_lm.read_tales(causal_lm.TALES)
    training, held_out = causal_lm.split(tales)
    assert (len(training), len(held_out)) == (13, 4)
    assert {*training, *held_out} == set(tales)
    model, rows = models.llama(), torch.arange(32).repeat(6, 1)
    randlora.inject(model, r=8, targets=causal_lm.TARGETS)
    before = causal_lm.mean_loss(model, rows)
    assert len(list(causal_lm.train(model, rows, steps=20, batch_size=3, lr=2e-2, seed=0))) == 20
    with randlora.merged(model):
        assert causal_lm.mean_loss(model, rows) < before - 0.1


@pytest.mark.medium
def test_a_resumed_plain_run_has_the_same_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And passes over a checkpoint that was not finished."""
    monkeypatch.chdir(tmp_path)
    plain = imported("plain_pytorch")
    whole = plain.begin(steps=40)
    expected = list(whole.train(40))
    assert sum(expected[-10:]) < 0.2 * sum(expected[:10])
    part = plain.begin(steps=40)
    before = list(part.train(25))
    part.save(Path("run"))
    list(part.train(28))
    part.save(Path("run"))
    assert files("run/step-000028") == {*ADAPTER_FILES, "training.pt"}
    Path("run/step-000028/training.pt").unlink()
    torch.manual_seed(99)
    rest = plain.resume(Path("run"), steps=40)
    assert before + list(rest.train(40)) == expected
    assert trained_bits(rest.model) == trained_bits(whole.model)
    Path("run/step-000025/training.pt").unlink()
    with pytest.raises(typer.BadParameter, match="there is no checkpoint in run"):
        plain.resume(Path("run"), steps=40)


@pytest.mark.medium
def test_training_that_is_killed_has_the_losses_of_training_that_is_not() -> None:
    done, again, failures = killed_training(plain_loop(), 3, steps=60, life=0.4)
    assert failures == []
    assert (done, again > 0) == (3, True)


LEFT = {
    "plain_pytorch": ["step-000002", "step-000004"],
    "transformers_trainer": ["adapter", "checkpoint-2", "checkpoint-4"],
    "trl_sft": ["README.md", "adapter", "checkpoint-2", "checkpoint-4"],
    "lightning_module": ["adapter", "epoch=0.ckpt", "epoch=1.ckpt", "last.ckpt"],
}


@pytest.mark.medium
@pytest.mark.parametrize("name", LEFT)
def test_an_example_of_training_runs_and_goes_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    is_by_epochs = name == "lightning_module"
    lengths = ["--epochs"] if is_by_epochs else ["--every", "2", "--steps"]
    for arguments in (["1"], ["2", "--resume"]) if is_by_epochs else (["2"], ["4", "--resume"]):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--out", "run", *lengths, *arguments])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        assert exit_.value.code == 0
    assert "RandLoRA adapter 'default'" in capsys.readouterr().out
    assert sorted(path.name for path in Path("run").iterdir()) == LEFT[name]
