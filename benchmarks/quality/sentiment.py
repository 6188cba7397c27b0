"""The tone of film reviews, two classes, or of tweets, three, by a pretrained sentence encoder with a linear head."""

import random
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from benchmarks.quality.task import Prepared, Size, Targets, Task
from benchmarks.texts import (
    FILM_REVIEWS,
    TWEETS,
    Classifier,
    Collection,
    Texts,
    accuracy,
    encoder_directory,
    fit_head,
    load_classifier,
    read_parts,
    tokenize,
)

LAYERS = r"encoder\..*\.(query|key|value|dense)"
PLACES = {
    "q and v": r"encoder\..*\.(query|value)",
    "MLP": r"encoder\..*\d\.(intermediate|output)\.dense",
}
BATCH_SIZE = 32
HEAD_DECAY = 1e-2  # the best of some in a cross-validation on the training texts of seed 0
OTHER_TEXTS = 200


class Amounts(NamedTuple):
    """How many texts there are for what, how often they are trained on, in batches of what size, and with what head.

    A head that is not fitted has orthogonal rows and stays as it is, so that all has to be learned below it.
    """

    training: int = 512
    test: int = 600
    validation: int = 0
    batch: int = 32
    epochs: int = 2
    is_head_fitted: bool = True


QUICK, FULL = Amounts(96, 100, 50, epochs=1), Amounts()


class Start(NamedTuple):
    """Where all contestants of a seed start: texts, a head fitted to them, and similarities of other texts."""

    training: Texts
    test: Texts
    validation: Texts
    other: Texts
    head: dict[str, Tensor]
    before: Tensor


@cache
def start_of(source: Collection, other: Collection, seed: int, size: Size, amounts: Amounts = FULL) -> Start:
    """Read the texts, and fit the head by logistic regression on the features of the encoder as it is."""
    count, other_size = (QUICK, 100) if size == "quick" else (amounts, OTHER_TEXTS)
    training, held_out = read_parts(source, count.training, count.test + count.validation, seed)
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(seed))  # they are sorted by length
    test = held_out[order[: count.test].sort().values]
    validation = held_out[order[count.test :].sort().values] if count.validation else test
    model = load_classifier(source.num_classes)
    if amounts.is_head_fitted:
        fit_head(model, training, HEAD_DECAY)
    else:
        nn.init.orthogonal_(model.head.weight, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(model.head.bias)
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder_directory())
    other_texts = tokenize(tokenizer, random.Random(seed).sample(other.read(), other_size))
    return Start(training, test, validation, other_texts, model.head.state_dict(), similarities(model, other_texts))


def prepare(
    source: Collection, other: Collection, amounts: Amounts, seed: int, size: Size, *, times: int = 1
) -> Prepared:
    """Load the encoder with the head that was fitted to it."""
    start = start_of(source, other, seed, size, amounts)
    model = load_classifier(source.num_classes)
    model.head.load_state_dict(start.head)
    count = QUICK if size == "quick" else amounts

    def measure() -> dict[str, float]:
        after = similarities(model, start.other)
        together = float(torch.corrcoef(torch.stack([start.before, after]))[0, 1])
        validation = {"validation": accuracy(model, start.validation)} if amounts.validation else {}
        return {"accuracy": accuracy(model, start.test), **validation, "drift": 1 - together}

    return Prepared(
        model,
        model.head if amounts.is_head_fitted else None,
        Targets(LAYERS, LAYERS, LAYERS, PLACES),
        start.training.shuffled_batches(count.batch, times * count.epochs, seed),
        lambda batch: F.cross_entropy(model(batch), batch.labels),
        measure,
    )


@torch.no_grad()
def similarities(model: Classifier, texts: Texts) -> Tensor:
    """Return the cosine of the features of each two texts, ``(pairs,)``."""
    model.eval()
    features = F.normalize(torch.cat([model.features(batch) for batch in texts.batches()]), dim=1)
    rows, columns = torch.triu_indices(len(texts), len(texts), offset=1)
    return (features @ features.T)[rows, columns]


def text_task(name: str, source: Collection, other: Collection, amounts: Amounts = FULL) -> Task:
    """Make the task of a collection of texts; those of the other are what the encoder should compare as it did."""
    return Task(
        name,
        metric="accuracy",
        is_better_if_larger=True,
        drift=f"1 − correlation of the similarities of {OTHER_TEXTS} other texts, before and after",
        rates={
            "frozen": (0.0,),
            "full": (3e-5, 1e-4, 3e-4),
            "adapter": (3e-4, 1e-3, 3e-3),
            "small adapter": (1e-3, 3e-3, 1e-2),
        },
        head_rate=5e-3,
        prepare=partial(prepare, source, other, amounts),
        width=384,
        in_percent=True,
        decimals=1,
    )


REVIEWS_TASK = text_task("film reviews", FILM_REVIEWS, TWEETS)
TWEETS_TASK = text_task("tweets", TWEETS, FILM_REVIEWS)
