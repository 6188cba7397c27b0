"""The gate of the benchmarks, and the pages of quality and scale; not what `make bench` itself would fail for."""

import re
import statistics
from pathlib import Path

import pytest

import randlora
from benchmarks import scale
from benchmarks.quality import __main__ as quality
from benchmarks.quality import optimizers, pages, prose, summary
from benchmarks.quality.pieces import OVERVIEW
from benchmarks.quality.runs import KEPT, read_runs
from benchmarks.results import Results, Row
from benchmarks.targets import TARGETS, faster, only_in_full, only_on, passed_over, verdicts, within
from benchmarks.timing import Figure
from randlora.targets.options import first_learning_rate
from tests.further import further


def row(case: str, sweep: tuple[str, float] | None = None, **seconds: float) -> Row:
    return Row(case, {name: Figure(value, 2 * value, "s") for name, value in seconds.items()}, sweep)


def test_a_target_is_met_or_missed_by_the_ratio_of_the_best_and_asked_of_its_devices_and_its_set_alone() -> None:
    results = Results("b", {}, [row("case", PEFT=6.0, dense=3.0, full=2.0)])
    asked = [faster("b", "case", "dense", ratio) for ratio in (2.0, 2.1)]
    asked += [within("b", "case", "dense", ratio) for ratio in (1.5, 1.4)]
    asked += [within("b", "another case", "dense", 1.5), faster("b", "case", "dense", 0.1, than="nobody")]
    assert [verdict.is_met for verdict in verdicts(results, asked)] == [True, False, True, False, False, False]
    both, cpu, cuda, full = (within("b", case, "dense", 1.0) for case in ("both", "cpu", "cuda", "full"))
    targets = (both, *only_on(("cpu",), cpu), *only_on(("cuda",), cuda), *only_in_full(full))
    for device, is_quick, judged in (("cpu", False, ["both", "cpu", "full"]), ("cuda", True, ["both", "cuda"])):
        results, other = (Results(name, {}, [], device, is_quick) for name in ("b", "other"))
        assert [each.words for each in verdicts(results, targets)] == [f"b, {case}: was not run" for case in judged]
        left = [f"1 targets of another device than {device}", *["1 targets of --full"] * is_quick]
        assert (passed_over(results, targets), passed_over(other, targets), verdicts(other, targets)) == (left, [], [])
    assert {target.benchmark for target in TARGETS} == {  # else nothing would ask for it
        *("laws", "peft_faults", "step", "overhead", "model", "memory", "quantized", "experts"),
        *("startup", "decode", "routed", "tenants", "pool", "server", "merge", "compiled", "traffic", "growth"),
    }
    assert all((target.at_least > 0) != (target.at_most < float("inf")) for target in TARGETS)


@pytest.mark.parametrize("page", pages.PAGES, ids=str)
def test_a_page_shows_the_runs_that_are_kept_whose_best_rates_are_inside_of_their_sweeps(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    places, claims = list(pages.PLACE.finditer(text)), list(prose.CLAIM.finditer(text))
    assert len(places) + len(claims) + text.count(prose.BY_OTHERS) == text.count("<!--") > 0
    assert pages.filled(text) == pages.filled(re.sub(r"(-->\n\n\|) ", r"\1 spoiled ", text)) == text
    assert prose.problems(text, pages.runs_of) == []
    for place in places:
        for task in pages.tasks_of(place):
            known = [*read_runs(KEPT / f"{quality.file_stem(task.name)}.jsonl")]  # of screened rates one is shown
            points = summary.points_of(task, pages.kept_runs(task, place["group"]))
            for contestant, own in summary.by_contestant(points).items():
                tried = {run.key.lr for run in known if run.key.contestant == contestant}
                is_swept = place["group"] != "rule" and contestant != "frozen"  # whose others have other names, or none
                assert not is_swept or min(tried) < summary.best(task, own).lr < max(tried), (task.name, contestant)
                if task.name in quality.TASKS:
                    seeds = 10 if contestant in OVERVIEW else 5
                    assert summary.best(task, own).seeds == seeds, (task.name, contestant)
                    assert {point.seeds for point in own} <= {5, 10}, (task.name, contestant)
                    fewest = {"curves": 4, "relatives": 4}.get(place["group"], 1 if contestant == "frozen" else 3)
                    assert len(tried) >= fewest, (task.name, contestant)


def test_numbers_of_sentences_are_made_of_runs_and_what_cannot_be_told_apart_is_said() -> None:
    better, level = (f"<!-- dense over {name} in clothes -->" for name in ("LoRA, equal size", "very_sparse"))
    half_done = f"It gains 9.9{better}\npoints, 1.0 ± 0.1<!-- dense at\n0.001 in clothes --> in all.\n"
    filled = prose.with_numbers(half_done, pages.runs_of)
    assert filled == (
        f"It gains 3.6 (2.0 to 5.2){better}\npoints, 73.8 ± 1.0<!-- dense at\n0.001 in clothes --> in all.\n"
    )
    assert prose.with_numbers(filled.replace("3.6 (2.0", "3.6\n(2.0"), pages.runs_of).startswith("It gains 3.6\n(2.0")
    drift = prose.with_numbers("0<!-- drift of dense at 0.001 over dense at 0.003 in clothes -->", pages.runs_of)
    assert drift.startswith("-0.1")
    loss = prose.with_numbers("0<!-- dense at 0.001 over dense at 0.003 in word problems -->", pages.runs_of)
    assert loss.startswith("0.0")  # less is better
    ratio, silent = "<!--size of LoRA per dense in clothes-->", "<!--dense\nover very_sparse in clothes, tweets-->"
    assert prose.with_numbers(f"9{ratio} times, level{silent}", pages.runs_of) == f"32{ratio} times, level{silent}"
    table = "<!-- rates of main of clothes -->\n\n| 1.0 ± 0.1 points |\n\n"
    told = [
        f"{table}- It gains 1{better} points. It loses 1{level}.",
        "It gains 2 points.",
        "They differ by 0.1 ± 0.1. ",
    ]
    told += ["| twice |\n| is 9 times as good |\n", f"They are level{level}.", f"It cannot be distinguished{better}.\n"]
    worse = better.replace("dense over LoRA, equal size", "LoRA, equal size over dense")
    told += [f"Neither can be distinguished{level}{better}.", f"It gains{worse}.", "RandLoRA beats LoRA everywhere."]
    assert [found.partition(":")[0] for found in prose.problems(" ".join(told), pages.runs_of)] == [
        "does not say that a difference is not distinguishable from none",
        *["no comment says what this number is of"] * 3,
        "does not say that a difference is not distinguishable from none",
        *["no comment says what cannot be distinguished"] * 2,
        "a comment names the worse one first",
        "no comment says by what methods are compared",
    ]
    unsaid = f"They cannot be distinguished, 1{level}. 5 points<!--by others-->.\n\n## What it rests on\n\n3 points.\n"
    assert prose.problems(unsaid, pages.runs_of) == []
    with pytest.raises(ValueError, match="a sentence names nothing in clothes, of which no run is kept"):
        prose.with_numbers("0<!-- nothing in clothes -->", pages.runs_of)


def test_the_rate_to_try_first_is_near_the_best_of_each_task() -> None:
    for name, width in {"film reviews": 384, "tweets": 384, "clothes": 96, "word problems": 576}.items():
        points = summary.points_of(quality.TASKS[name], pages.kept_runs(quality.TASKS[name], "main"))
        best = summary.best(quality.TASKS[name], [point for point in points if point.contestant == "dense"]).lr
        assert 0.5 <= first_learning_rate(20.0, width) / best <= 2, name


def test_the_reasons_for_the_first_rate_are_those_of_its_table() -> None:
    page = Path("docs/learning_rate.md").read_text(encoding="utf-8")
    table = page.partition("<!-- losses of rule of six tasks -->\n\n")[2].partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table if not line.startswith("| sums")]
    low, ours, high = (max(float(row[at]) for row in rows if "alone" not in row[0]) for at in (1, 2, 3))
    cliff = min(float(row[5]) for row in rows if row[5])
    words = " ".join(page.split())
    assert f"the lowest is {cliff / 0.3:.1f} times as high, and {cliff / 0.5:.1f} times as high as 0.5." in words
    assert f"In its worst row 0.3 loses {ours}, 0.5 loses {high} and 0.2 {low}, but for Λ alone." in words
    assert ours < high < low


def test_muon_has_one_rate_at_the_widths_of_the_page() -> None:
    found: dict[tuple[str, float], list[float]] = {}
    for run in read_runs(optimizers.FILE):
        if run.key.contestant == "Muon":
            found.setdefault((run.key.task, run.key.lr), []).append(run.found["residual"])
    assert {len(residuals) for residuals in found.values()} == {3}
    for task in optimizers.TASKS:
        means = {lr: statistics.mean(residuals) for (name, lr), residuals in found.items() if name == task.name}
        assert means[0.016] <= min(means.values()) + 0.002, task.name
        assert min(means, key=means.__getitem__) not in (min(means), max(means)), task.name
    page = Path("docs/learning_rate.md").read_text(encoding="utf-8")
    assert "| [both spectra](#width), by Muon | 64; 256; 512 | 20 | 1.6e-2 at each |" in page


def rows_of(table: str) -> list[str]:
    found = re.search(rf"<!-- {table} -->\n(.*?)<!-- end -->", scale.PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1].splitlines()


@pytest.mark.medium
@pytest.mark.parametrize("name", ["Llama-3 8B", *map(further, [*scale.MODELS][1:])])
def test_the_rows_of_a_model_are_what_the_formulas_give_and_no_rate_ruins_one_of_its_size(name: str) -> None:
    shape = scale.MODELS[name]
    model = shape.build()
    rate = randlora.plan(model, scale.R, targets=scale.targets_of(shape, model)).learning_rate
    assert rate is not None
    assert 1.2e-5 < rate <= 3e-4
    assert scale.sizes_row(name, shape) in rows_of("sizes")
    assert scale.totals_row(name, shape) in rows_of("totals")


def test_every_model_has_its_row_in_the_tables_of_memory() -> None:
    for table in ("sizes", "totals"):
        head, _, *rows = rows_of(table)
        assert head == f"| {' | '.join(scale.HEADS[table])} |"
        assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == list(scale.MODELS)
