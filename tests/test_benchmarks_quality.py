"""Accuracy against drift: making runs, going on where they stopped, and summing them up. Little is trained."""

import copy
import gzip
import itertools
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
import typer
from torch import Tensor, nn

import randlora
from benchmarks.quality import __main__ as command
from benchmarks.quality import fashion, pages, passwords, spectrum, summary, sums, training, words
from benchmarks.quality.contestants import GROUPS, MAIN, equal_rank
from benchmarks.quality.facts import FACTS_TASK
from benchmarks.quality.khatri_rao import KhatriRao
from benchmarks.quality.other_bases import OTHER_BASES, Made, Update, add_updates
from benchmarks.quality.runs import Key, Run, add_run, read_runs
from benchmarks.quality.task import Prepared, Size, Targets, Task
from benchmarks.quality.training import make_run, rate_at, train
from benchmarks.texts import label_of
from randlora.start import first_learning_rate
from tests.peer import as_peft_draws

STEPS = 20


def prepare(seed: int, size: Size) -> Prepared:
    """Make a task of a second: rotate vectors."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    x, y = torch.randn(64, 16), torch.randn(64, 4)
    names = ["0"]
    return Prepared(
        model,
        model[2],
        Targets(names, names, names, dict.fromkeys(("q and v", "q", "v", "MLP"), "0")),
        [torch.arange(64)] * (STEPS if size == "full" else 2),
        lambda rows: F.mse_loss(model(x[rows]), y[rows]),
        lambda: {"loss": float(F.mse_loss(model(x), y)), "drift": float(model[0](x).square().mean())},
    )


TASK = Task(
    "tiny",
    metric="loss",
    is_better_if_larger=False,
    drift="none",
    rates={
        "frozen": (0.0,),
        "full": (1e-3, 1e-2),
        "adapter": (1e-3, 1e-2, 3e-2),
        "small adapter": (1e-2, 3e-2),
    },
    head_rate=1e-2,
    prepare=prepare,
)


def run(contestant: str, lr: float, seed: int, loss: float, drift: float) -> Run:
    seconds = 3.0 if contestant == "full" else 1.0
    found = {"loss": loss, "drift": drift}
    return Run(Key("tiny", contestant, lr, seed), found, None, seconds, 10**9, 1234, 2_500_000, {})


RUNS = [
    run("full", 1e-3, 0, 0.50, 0.1),
    run("full", 1e-3, 1, 0.70, 0.3),
    run("full", 1e-2, 0, 0.40, 0.9),
    run("full", 1e-2, 1, 0.40, 0.7),
    run("LoRA", 1e-3, 0, 0.55, 0.1),
    run("LoRA", 1e-3, 1, 0.75, 0.1),
]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if group is MAIN else pytest.mark.slow)
        for group in GROUPS.values()
        for name in group
    ],
)
def test_every_contestant_is_trained_and_nothing_else(name: str) -> None:
    contestant = next(group[name] for group in GROUPS.values() if name in group)
    first = make_run(TASK, name, contestant, 1e-2, 0, "full")
    assert make_run(TASK, name, contestant, 1e-2, 0, "full").found == first.found
    with torch.no_grad():
        before = prepare(0, "full").measure()
    assert first.found["loss"] < before["loss"]  # the head at least has learned
    moved = first.found["drift"] != before["drift"]
    assert moved == (name != "frozen") == (first.trained > 0) == (first.file_bytes > 0)


@as_peft_draws
def test_ours_and_that_of_peft_with_equal_options_learn_the_same() -> None:
    ours, theirs = (make_run(TASK, name, MAIN[name], 1e-2, 0, "full") for name in ("dense", "PEFT"))
    assert ours.trained == theirs.trained
    assert ours.found == pytest.approx(theirs.found, rel=1e-3)


@pytest.mark.parametrize("name", [name for name in GROUPS["sizes"] if name != "dense" and "decay" not in name])
def test_what_keeps_an_update_small_does_so(name: str) -> None:
    contestant = GROUPS["sizes"][name]
    prepared, free = prepare(0, "full"), prepare(0, "full")
    for each, kind in ((prepared, contestant), (free, MAIN["dense"])):
        kind.adapt(each, 0)
        train(each, kind, [*randlora.trainable_parameters(each.model)], [], 3e-2, 0.0)
    sizes = training.norms_of_weights(free.model)
    shares = [float(training.penalty_of(each.model, sizes).detach()) ** 0.5 for each in (prepared, free)]
    assert 0 < shares[0] < 0.9 * shares[1]
    assert shares[0] <= contestant.limit * 1.001


def test_a_scale_of_6_53_has_the_first_step_of_lora() -> None:
    found = {}
    others = {
        name: {**GROUPS["scales"], **GROUPS["starts"]}[name] for name in ("dense, s = 6.53", "gamma first, s = 6.53")
    }
    for name, contestant in {"LoRA": MAIN["LoRA"], **others}.items():
        prepared = prepare(0, "full")
        weight = prepared.model[0].weight.detach().clone()  # type: ignore[index]
        contestant.adapt(prepared, 0)
        body = [each for each in prepared.model.parameters() if each.requires_grad]
        one = replace(prepared, batches=prepared.batches[:1])
        train(one, contestant, body, [], 1e-3, 0.0)
        with torch.no_grad():
            found[name] = float((prepared.model[0](torch.eye(16)) - prepared.model[0].bias - weight.T).norm())  # type: ignore[index]
    lora = found.pop("LoRA")
    for name, size in found.items():
        assert 0.6 < size / lora < 1.6, name


def test_updates_with_the_bases_of_the_library_are_its_updates() -> None:
    torch.manual_seed(0)
    plain = fashion.VisionTransformer().eval()
    targets = Targets(fashion.OURS, fashion.LORA, fashion.LINEAR)
    ours, theirs = (replace(prepare(0, "quick"), model=copy.deepcopy(plain), targets=targets) for _ in range(2))
    randlora.inject(theirs.model, targets=fashion.OURS, seed=3)
    basis = randlora.BasisBank().acquire(randlora.adapters(theirs.model)[0].specs[0])

    def of_the_library(weight: torch.Tensor, _r: int, _seed: int) -> Made:
        basis_A, basis_B = basis.slices(*weight.shape, device="cpu", dtype=torch.float32)
        return basis_A, basis_B.flatten(1)

    add_updates(ours, 0, make=of_the_library, r=32)
    updates = {name: each for name, each in ours.model.named_modules() if isinstance(each, Update)}
    assert len(updates) == 16
    for name, parameter in theirs.model.named_parameters():
        if "randlora_" in name:
            layer, own = name.removesuffix(".default").split("randlora_")
            layer = layer.removesuffix("_") if "in_proj" in layer else layer + "weight"
            owner, _, weight = layer.rpartition(".")
            update = updates[f"{owner}.parametrizations.{weight}.0"]
            mine = update.lam if own == "lambda" else update.gamma
            torch.testing.assert_close(mine, parameter, rtol=0, atol=0)  # they start alike
            with torch.no_grad():
                mine.copy_(parameter.normal_(std=0.03))
    pixels = torch.randn(5, 28, 28)
    with torch.no_grad():
        found, wanted, before = (model(pixels) for model in (ours.model, theirs.model, plain))
    assert float((wanted - before).abs().max()) > 0.1
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", OTHER_BASES)
@pytest.mark.parametrize("shape", [(96, 96), (384, 96), (128, 72)])
def test_other_bases_take_first_steps_of_equal_size(name: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    update = Update(*OTHER_BASES[name](torch.randn(shape), 32, 0), 20.0, is_wide=False)
    zero = torch.zeros(shape)
    assert not update(zero).any()
    with torch.no_grad():
        update.lam.copy_(torch.randn(update.lam.shape).sign())
        size = update(zero).square().mean().sqrt() * shape[1] ** 0.5 / 20
        assert 0.99 < size < 1.01 * (update.lam.numel() / shape[1]) ** 0.5  # the latter is that of dense bases
        update.gamma.normal_()
        assert torch.linalg.matrix_rank(update(zero)) == shape[1]


def test_a_hybrid_trains_adapters_of_both_libraries() -> None:
    prepared = prepare(0, "quick")
    GROUPS["bases"]["hybrid"].adapt(prepared, 0)
    trained = {name.split(".")[-2] for name, each in prepared.model[0].named_parameters() if each.requires_grad}  # type: ignore[index]
    assert {name for name in trained if "randlora" in name} == {"randlora_lambda", "randlora_gamma"}
    assert {"lora_A", "lora_B"} < {part for name, _ in prepared.model.named_parameters() for part in name.split(".")}


@pytest.mark.parametrize("name", spectrum.SPECTRA)
def test_residual_and_drift_of_a_spectrum_are_apart(name: str) -> None:
    prepared = spectrum.prepare(name, 32, 20, 0, "full")
    inputs = torch.cat(list(prepared.batches))
    with torch.no_grad():
        assert prepared.measure() == pytest.approx({"residual": 1, "drift": 0, "stable rank": 0, "spectral norm": 0})
        assert torch.stack([prepared.loss(batch) for batch in prepared.batches]).mean() == pytest.approx(1, abs=0.1)
        assert torch.linalg.matrix_rank(inputs) == 24
        unseen = torch.linalg.svd(inputs)[2][24:]
        prepared.model[0].weight[:8] += unseen  # type: ignore[index]
        found = prepared.measure()
    assert found["residual"] == pytest.approx(1)
    assert found["drift"] == pytest.approx(8**0.5 / (0.2 * 32**0.5))
    assert found["stable rank"] == pytest.approx(8)
    assert found["spectral norm"] == pytest.approx(1 / (0.2 * 32**0.5))


def test_the_lora_of_equal_size_has_the_nearest_rank() -> None:
    prepared = prepare(0, "full")
    size = randlora.plan(prepared.model, r=32, targets=["0"]).trainable_parameters
    assert abs(equal_rank(prepared.model, prepared.targets) * 32 - size) <= 16


def test_the_learning_rate_rises_and_falls_to_almost_nothing() -> None:
    rates = [rate_at(step, 50) for step in range(50)]
    assert max(rates) == rates[4] == 1
    assert rates[:5] == sorted(rates[:5])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.03
    assert rate_at(0, 1) == 1


def test_a_restart_makes_only_the_runs_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Key] = []

    def counted(task: Task, name: str, _contestant: object, lr: float, seed: int, _size: Size) -> Run:
        made.append(Key(task.name, name, lr, seed))
        return run(name, lr, seed, abs(math.log(lr / 1e-2)) if lr else 1.0, 0.1)

    monkeypatch.setattr(command, "make_run", counted)
    chosen = {name: MAIN[name] for name in ("frozen", "dense")}
    first = command.runs_of(TASK, chosen, range(2), tmp_path, full=True)
    assert (
        [each.key for each in first]
        == made
        == [
            Key("tiny", name, lr, seed)
            for seed in (0, 1)
            for name, rates in (("frozen", (0.0,)), ("dense", (1e-3, 1e-2, 3e-2)))
            for lr in rates
        ]
    )
    assert command.runs_of(TASK, chosen, range(2), tmp_path, full=True) == first
    assert len(made) == 8
    assert [each.key.seed for each in command.runs_of(TASK, chosen, range(3), tmp_path, full=True)][-4:] == [2] * 4
    assert len(made) == 12
    assert len(command.runs_of(TASK, chosen, range(3), tmp_path / "quick", full=False)) == 2


def swept(
    losses: Callable[[float], float], directory: Path, monkeypatch: pytest.MonkeyPatch, seeds: int = 2
) -> tuple[list[float], list[Key]]:
    """Return the learning rates of dense beyond those of the task, in their order, and the runs that were made."""
    made: list[Key] = []

    def measured(task: Task, name: str, _contestant: object, lr: float, seed: int, _size: Size) -> Run:
        made.append(Key(task.name, name, lr, seed))
        return run(name, lr, seed, losses(lr) if lr else 1.0, 0.1)

    monkeypatch.setattr(command, "make_run", measured)
    found = command.runs_of(
        TASK, {name: MAIN[name] for name in ("frozen", "dense")}, range(seeds), directory, full=True
    )
    assert [each.key.lr for each in found if each.key.contestant == "frozen"] == [0.0] * seeds
    rates = dict.fromkeys(each.key.lr for each in found if each.key.contestant == "dense")
    assert len(found) == seeds * (1 + len(rates))
    return [*rates][3:], made


@pytest.mark.parametrize(
    ("losses", "further"),
    [
        (lambda lr: abs(math.log(lr / 1e-1)), [1e-1, 3e-1]),
        (lambda lr: abs(math.log(lr / 3e-4)), [3e-4, 1e-4]),
        (lambda lr: abs(math.log(lr / 3e-2)), [1e-1]),
        (lambda lr: abs(math.log(lr / 1e-2)), []),
        (lambda lr: lr, [3e-4, 1e-4, 3e-5, 1e-5]),
        (lambda _lr: 1.0, []),
        (lambda _lr: math.nan, []),
        (lambda lr: math.nan if lr > 0.02 else -lr, []),
        (lambda lr: math.nan if lr > 0.2 else -lr, [1e-1, 3e-1]),
        (lambda lr: math.nan if lr < 0.002 else abs(math.log(lr / 1e-2)), []),
    ],
    ids=[
        "above",
        "below",
        "at the end",
        "inside",
        "towards 0",
        "equal",
        "not a number",
        "at the end if finite",
        "above if finite",
        "inside if finite",
    ],
)
def test_a_sweep_goes_on_while_its_best_rate_is_at_an_end(
    losses: Callable[[float], float], further: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, made = swept(losses, tmp_path, monkeypatch)
    assert found == further
    assert len(made) == 2 * (4 + len(further))
    assert swept(losses, tmp_path, monkeypatch) == (further, [])


def test_a_sweep_that_went_on_is_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(swept(lambda lr: lr, tmp_path, monkeypatch, seeds=1)[1]) == 8
    further, made = swept(lambda lr: lr, tmp_path, monkeypatch)
    assert further == [3e-4, 1e-4, 3e-5, 1e-5]
    assert {key.seed for key in made} == {1}
    assert len(made) == 8


def test_a_rate_of_fewer_seeds_is_in_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "KEPT", tmp_path)
    for lr, seed in ((1e-3, 0), (1e-3, 1), (1e-2, 0), (1e-2, 1), (3e-2, 0)):
        add_run(tmp_path / "tiny.jsonl", run("dense", lr, seed, 0.5, 0.1))
    add_run(tmp_path / "tiny.jsonl", run("full", 1e-3, 0, 0.5, 0.1))
    found = [(each.key.contestant, each.key.lr, each.key.seed) for each in pages.kept_runs(TASK, "main")]
    assert found == [("full", 1e-3, 0), *(("dense", lr, seed) for lr in (1e-3, 1e-2) for seed in (0, 1))]


def test_what_is_not_a_number_is_neither_best_nor_on_the_front() -> None:
    runs = [run("dense", lr, 0, loss, 0.1) for lr, loss in ((1e-3, math.nan), (1e-2, 0.5), (3e-2, math.nan))]
    points = summary.points_of(TASK, runs)
    assert summary.best(TASK, points).lr == 1e-2
    assert [point.lr for point in summary.front(TASK, points)] == [1e-2]
    assert all(map(math.isnan, summary.mean_and_error([0.5, math.nan, 0.25])))


def test_a_task_without_its_data_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nowhere(_seed: int, _size: Size) -> Prepared:
        raise FileNotFoundError("there is no such data")

    monkeypatch.setattr(command, "TASKS", {"tiny": TASK, "absent": replace(TASK, name="absent", prepare=nowhere)})
    monkeypatch.setattr(command, "BUILD", tmp_path)
    command.main(contestant="frozen|dense")
    assert "skipped absent: there is no such data" in capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} == {"tiny.jsonl", "main_tiny.md", "main.svg"}
    with pytest.raises(typer.Exit):
        command.main(task="absent")


def test_a_line_that_a_kill_left_unfinished_is_made_again(tmp_path: Path) -> None:
    file = tmp_path / "new" / "runs.jsonl"
    assert [*read_runs(file)] == []
    for each in RUNS[:2]:
        add_run(file, each)
    file.write_text(file.read_text() + '{"key": {"task"')
    add_run(file, RUNS[2])
    assert [*read_runs(file)] == RUNS[:3]


def test_the_table_has_each_contestant_at_its_best_rate_with_standard_errors() -> None:
    titles, _, *lines = summary.table_of(TASK, RUNS).splitlines()
    assert titles == (
        "| contestant | parameters | file, MB | memory, MB | time | seeds | best rate | loss | drift | gain over LoRA |"
    )
    assert lines == [
        "| full | 1,234 | 2.50 | 1000 | 1.00 | 2 | 0.01 | 0.400 ± 0.000 | 0.800 ± 0.100 | 0.250 ± 0.100 |",
        "| LoRA | 1,234 | 2.50 | 1000 | 0.33 | 2 | 0.001 | 0.650 ± 0.100 | 0.100 ± 0.000 | 0.000 ± 0.000 |",
    ]


def test_times_of_two_processors_are_not_compared() -> None:
    moved = [
        replace(each, machine={"processor": "another"}) if each.key.contestant == "LoRA" else each for each in RUNS
    ]
    full, lora = summary.table_of(TASK, moved).splitlines()[2:]
    assert (full.split(" | ")[4], lora.split(" | ")[4]) == ("1.00", "")


def test_what_else_all_runs_have_measured_is_in_the_table_at_the_best_rate() -> None:
    more = [replace(run, found={**run.found, "solved": run.key.seed / 10 + run.key.lr}) for run in RUNS]
    titles, _, full, _ = summary.table_of(TASK, more).splitlines()
    assert titles.endswith("| gain over LoRA | solved |")
    assert full.endswith("| 0.250 ± 0.100 | 0.06 ± 0.05 |")
    assert "solved" not in summary.table_of(TASK, [*more[:-1], RUNS[-1]])


def test_the_overview_has_chosen_contestants_of_all_tasks_under_other_names() -> None:
    rows = {"LoRA": "LoRA, r = 32", "full": "full fine-tuning"}
    assert summary.overview([(TASK, RUNS), (replace(TASK, name="tinier"), RUNS[:4])], rows).splitlines() == [
        "|  | tiny, loss | tinier, loss |",
        "| --- | --: | --: |",
        "| LoRA, r = 32 | 0.650 ± 0.100 |  |",
        "| full fine-tuning | 0.400 ± 0.000 | 0.400 ± 0.000 |",
    ]


def test_the_other_table_has_each_learning_rate_with_the_front_in_bold() -> None:
    assert summary.rates_of(TASK, RUNS).splitlines() == [
        "| contestant | 0.001 | 0.01 |",
        "| --- | --: | --: |",
        "| full | **0.600 (0.200)** | **0.400 (0.800)** |",
        "| LoRA | **0.650 (0.100)** |  |",
    ]
    worse = [replace(each, found={"loss": 0.7, "drift": 0.2}) for each in RUNS[-2:]]
    assert "| LoRA | 0.700 (0.200) |  |" in summary.rates_of(TASK, [*RUNS[:-2], *worse]).splitlines()


def test_the_front_has_no_point_that_another_beats_in_both() -> None:
    points = summary.points_of(TASK, RUNS)
    found = [(point.contestant, point.lr) for point in summary.front(TASK, points)]
    assert found == [("LoRA", 1e-3), ("full", 1e-3), ("full", 1e-2)]


@pytest.mark.medium
@pytest.mark.parametrize(
    "draw",
    [summary.draw, lambda tasks, file: summary.draw_sizes(tasks, ("LoRA", "full"), file)],
    ids=["drift", "sizes"],
)
def test_the_same_runs_draw_the_same_figure(draw: Callable[[object, Path], None], tmp_path: Path) -> None:
    files = [tmp_path / f"{index}.svg" for index in range(3)]
    for file in files[:2]:
        draw([(TASK, RUNS), (TASK, RUNS[:2])], file)
    draw([(TASK, RUNS), (TASK, RUNS[:4])], files[2])
    first, second, other = (file.read_bytes() for file in files)
    assert first == second != other


def test_every_contestant_has_several_learning_rates_in_every_task() -> None:
    for task, contestant in itertools.product(command.TASKS.values(), MAIN.values()):
        assert len(task.rates[contestant.family]) >= (1 if contestant.family == "frozen" else 3)


WIDTHS = {"film reviews": 384, "tweets": 384, "clothes": 96, "word problems": 576}


@pytest.mark.parametrize("name", WIDTHS)
def test_the_rate_to_try_first_is_near_the_best_of_each_task(name: str) -> None:
    task = command.TASKS[name]
    points = summary.points_of(task, pages.kept_runs(task, "main"))
    best = summary.best(task, [point for point in points if point.contestant == "dense"]).lr
    assert 0.5 <= first_learning_rate(20.0, WIDTHS[name]) / best <= 2


def test_word_problems_are_solved_by_their_steps() -> None:
    draw = random.Random(0)
    for problem in (words.make_problem(draw) for _ in range(200)):
        has = int(re.search(r"has (\d+) ", problem.question)[1])  # type: ignore[index]
        steps = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)\.", problem.steps)
        assert len(steps) in (1, 2)
        assert [int(number) for _, _, number, _ in steps] == [int(each) for each in numbers(problem.question)][1:]
        for left, sign, right, result in steps:
            assert int(left) == has
            has = has + int(right) if sign == "+" else has - int(right)
            assert has == int(result) >= 0
        assert problem.answer == has
        assert problem.steps.endswith(f"The answer is {has}.")


def numbers(question: str) -> Iterator[str]:
    return (found[0] for found in re.finditer(r"\d+", question))


def test_only_steps_and_answer_of_a_problem_are_predicted() -> None:
    class Letters:
        eos_token_id = 1

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) for letter in text]}

    problems = [words.Problem("ab", "cde", 1), words.Problem("a", "b", 2)]
    rows = words.tokenized(Letters(), problems)
    assert rows.ids.tolist() == [[97, 98, 99, 100, 101, 1], [97, 98, 1, 0, 0, 0]]
    assert rows.mask.tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]
    assert rows.labels.tolist() == [[-100, -100, 99, 100, 101, 1], [-100, 98, 1, -100, -100, -100]]


def test_images_are_read_from_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion, "DIRECTORY", tmp_path)
    fashion.read_images.cache_clear()
    with pytest.raises(FileNotFoundError, match="make build/data/fashion-mnist"):
        fashion.read_images("t10k")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    labels = np.arange(20, dtype=np.uint8) % 10
    for what, head, values in (("images-idx3", 16, pixels), ("labels-idx1", 8, labels)):
        (tmp_path / f"t10k-{what}-ubyte.gz").write_bytes(gzip.compress(bytes(head) + values.tobytes()))
    known, new = fashion.read_images("t10k")
    assert known.labels.tolist() == [0, 1, 2, 3, 4] * 2
    assert new.labels.tolist() == [0, 1, 2, 3, 4] * 2
    wanted = torch.from_numpy(pixels[labels >= 5]).float()
    torch.testing.assert_close((new.pixels * 0.353 + 0.286) * 255, wanted, rtol=0, atol=1e-3)
    fashion.read_images.cache_clear()


@pytest.mark.parametrize(("rating", "label"), [(-4, 0), (-0.6, 0), (-0.5, 2), (0, 2), (0.5, 2), (0.6, 1), (4, 1)])
def test_ratings_in_between_are_neutral(rating: float, label: int) -> None:
    assert label_of(rating) == label


@pytest.mark.parametrize("page", pages.PAGES, ids=str)
def test_the_tables_of_a_page_are_those_of_the_kept_runs(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(pages.PLACE.findall(text)) == text.count("<!--") > 0
    assert pages.filled(text) == text
    assert pages.filled(text.replace("| dense |", "| denser |", 1)) == text


def curves_of(page: Path) -> Iterator[tuple[Task, dict[str, list[summary.Point]]]]:
    """Yield the task of each table of a page, and the points of each row."""
    tasks = {**command.TASKS, **{task.name: task for task in spectrum.WIDTH_TASKS}}
    for place in pages.PLACE.finditer(page.read_text(encoding="utf-8")):
        for name in pages.REAL if place["task"] == "all tasks" else (place["task"],):
            points = summary.points_of(tasks[name], pages.kept_runs(tasks[name], place["group"]))
            yield tasks[name], summary.by_contestant(points)


@pytest.mark.parametrize("page", pages.PAGES, ids=str)
def test_no_best_rate_in_a_table_is_at_an_end_of_its_sweep(page: Path) -> None:
    for task, curves in curves_of(page):
        beyond = {contestant: summary.rate_beyond(task, points) for contestant, points in curves.items()}
        assert not any(beyond.values()), (task.name, beyond)


@pytest.mark.parametrize("page", pages.PAGES, ids=str)
def test_every_best_rate_of_a_task_is_of_several_rates_and_five_seeds(page: Path) -> None:
    for task, curves in curves_of(page):
        for contestant, own in curves.items() if task.name in command.TASKS else ():
            assert {point.seeds for point in own} == {5}, (task.name, contestant)
            assert len(own) >= (1 if contestant == "frozen" else 3), (task.name, contestant)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7), (1, 3)])
def test_rows_of_kradapter_are_products_of_entries(shape: tuple[int, int]) -> None:
    update = KhatriRao(shape)
    nn.init.normal_(update.first)
    found, (low, high) = update(torch.zeros(shape)), sorted(shape)
    assert update.first.shape[1] * update.second.shape[1] >= high
    for i, j in itertools.product(range(low), range(high)):
        row, column = divmod(j, update.first.shape[1])
        expected = 2 * update.second[i, row] * update.first[i, column]
        torch.testing.assert_close(found[i, j] if shape[0] <= shape[1] else found[j, i], expected)
    torch.testing.assert_close(KhatriRao(shape)(weight := torch.randn(shape)), weight)


def test_bits_of_facts_are_those_that_are_known() -> None:
    prepared = FACTS_TASK.prepare(0, "quick")
    with torch.no_grad():
        nothing = prepared.measure()
    assert (nothing["drift"], round(nothing["bits"], 2)) == (0, 0)
    assert nothing["recalled"] < 0.03
    run = make_run(FACTS_TASK, "full", GROUPS["facts"]["full"], 1e-2, 0, "quick")
    assert run.found["bits"] > 0
    assert run.found["bits per parameter"] == run.found["bits"] / run.trained


def test_sums_and_their_checker_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    for sign, factor in ((sums.PLUS, 1), (sums.MINUS, -1)):
        for problem in sums.make_problems(sign, 200, generator).tolist():
            first, second = 10 * problem[0] + problem[1], 10 * problem[3] + problem[4]
            assert (problem[2], problem[5]) == (sign, sums.EQUALS)
            assert abs(first + factor * second) == 100 * problem[6] + 10 * problem[7] + problem[8]
    problems = sums.make_problems(sums.PLUS, 4, generator)
    assert sums.rewards_of(problems, problems).tolist() == [1] * 4
    wrong = problems.clone()
    wrong[1, -1] = (wrong[1, -1] + 1) % 10
    assert sums.rewards_of(wrong, problems).tolist() == [1, 0, 1, 1]


def test_the_gradient_of_a_reward_is_that_of_reinforce(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sums.pretrained(0, "quick").eval()
    problems = sums.make_problems(sums.PLUS, 2, torch.Generator().manual_seed(1))
    right = problems.repeat_interleave(sums.SAMPLES, dim=0)
    answered = sums.with_answers(model, right[:, : sums.PROMPT], torch.Generator().manual_seed(2))
    answered[::5] = right[::5]  # some are right
    monkeypatch.setattr(sums, "with_answers", lambda *_: answered)
    sums.reinforce_loss(model, problems, torch.Generator()).backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    rewards = (answered[:, sums.PROMPT :] == right[:, sums.PROMPT :]).all(1).float()
    assert 0 < rewards.mean() < 1
    expected = torch.zeros(())
    for row, tokens in enumerate(answered):
        group = rewards[row // sums.SAMPLES * sums.SAMPLES :][: sums.SAMPLES]
        chances = model(input_ids=tokens[None, :-1]).logits[0].log_softmax(1)
        chosen = sum(chances[place - 1, tokens[place]] for place in range(sums.PROMPT, len(tokens)))
        expected = expected - (rewards[row] - group.mean()) * chosen / (sums.ANSWER * len(answered))
    expected.backward()
    for parameter, own in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(own, parameter.grad)
    model.zero_grad()


def test_an_adapter_at_a_place_is_about_as_large_as_on_q_and_v() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.v = nn.Linear(192, 192), nn.Linear(192, 64)
            self.up, self.down = nn.Linear(192, 256), nn.Linear(256, 192)

    places = {"q and v": r"(q|v)", "MLP": r"(up|down)"}
    sizes = {}
    for name in ("dense, q and v", "LoRA, q and v", "dense, MLP", "LoRA, MLP"):
        prepared = replace(prepare(0, "quick"), model=Layers(), targets=Targets([], [], [], places))
        GROUPS["places"][name].adapt(prepared, 0)
        trained = {each: p for each, p in prepared.model.named_parameters() if p.requires_grad}
        sizes[name] = sum(p.numel() for p in trained.values())
        assert all(re.search(rf"\b{places[name.split(', ')[1]]}\b", each) for each in trained)
    assert sizes["dense, q and v"] == 6 * (32 + 192) + 2 * (32 + 64)
    assert all(0.7 < size / sizes["dense, q and v"] < 1.4 for size in sizes.values()), sizes


class Characters:
    """A tokenizer for which each character is a token, an "a" is two, and some numbers are words."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __call__(self, text: str) -> dict[str, list[int]]:
        self.asked.append([ord(letter) for letter in text.replace("a", "aa")])
        return {"input_ids": self.asked[-1]}

    def get_vocab(self) -> dict[str, int]:
        return {f"Ġ{'abcdefgh'[: 4 + number % 5]}{chr(97 + number)}"[:9]: 200 + number for number in range(20)}


def test_passwords_are_asked_of_what_the_whole_model_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model, tokenizer = transformers.LlamaForCausalLM(config).eval(), Characters()
    monkeypatch.setattr(passwords, "pretrained", lambda: (tokenizer, model))
    monkeypatch.setattr(passwords, "WORDS", 8)
    passwords.start_of.cache_clear()
    start = passwords.start_of(0, 70)  # more than a batch
    passwords.start_of.cache_clear()
    assert len(tokenizer.asked) == len(start.passwords) == 70
    assert len({len(ids) for ids in tokenizer.asked}) > 1
    assert [name for name, _ in start.model.named_parameters()] == ["projection.weight"]
    change = torch.randn(16, 32)
    for _ in range(2):
        with torch.no_grad():
            found = start.model(start.people)
            whole = torch.stack([model(input_ids=torch.tensor([ids])).logits[0, -1] for ids in tokenizer.asked])
            words = torch.cdist(cast("Tensor", start.model.head), model.lm_head.weight).argmin(1)
            torch.testing.assert_close(found, whole[:, words], rtol=1e-4, atol=1e-5)
            model.model.layers[-1].mlp.down_proj.weight += change
            start.model.projection.weight += change


def test_gamma_has_a_smaller_rate_in_wide_layers_alone() -> None:
    model = nn.ModuleDict({"narrow": nn.Linear(16, 16), "wide": nn.Linear(64, 80)})
    randlora.inject(model, r=8)
    groups = training.by_share(model, [*randlora.trainable_parameters(model)], 32)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {share: {names[id(each)] for each in own} for share, own in groups.items()}
    wide = {"wide.randlora_gamma.default"}
    assert found == {1.0: {names[id(each)] for each in randlora.trainable_parameters(model)} - wide, 0.5: wide}
