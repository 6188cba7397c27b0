"""The tone of film reviews, two classes, or of tweets, three, by a pretrained sentence encoder with a linear head."""

import random
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from benchmarks.quality.task import Prepared, Size, Targets, Task
from benchmarks.texts import (
    FILM_REVIEWS,
    TWEETS,
    Classifier,
    Source,
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


class Start(NamedTuple):
    """Where all contestants of a seed start: texts, a head fitted to them, and similarities of other texts."""

    training: Texts
    test: Texts
    other: Texts
    head: dict[str, Tensor]
    before: Tensor


@cache
def start_of(source: Source, other: Source, seed: int, size: Size) -> Start:
    """Read the texts, and fit the head by logistic regression on the features of the encoder as it is."""
    train_size, test_size, other_size = (96, 100, 100) if size == "quick" else (512, 600, OTHER_TEXTS)
    training, test = read_parts(source, train_size, test_size, seed)
    model = load_classifier(source.num_classes)
    fit_head(model, training, HEAD_DECAY)
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder_directory())
    other_texts = tokenize(tokenizer, random.Random(seed).sample(other.read(), other_size))
    return Start(training, test, other_texts, model.head.state_dict(), similarities(model, other_texts))


def prepare(source: Source, other: Source, seed: int, size: Size) -> Prepared:
    """Load the encoder with the head that was fitted to it."""
    start = start_of(source, other, seed, size)
    model = load_classifier(source.num_classes)
    model.head.load_state_dict(start.head)

    def measure() -> dict[str, float]:
        after = similarities(model, start.other)
        together = float(torch.corrcoef(torch.stack([start.before, after]))[0, 1])
        return {"accuracy": accuracy(model, start.test), "drift": 1 - together}

    return Prepared(
        model,
        model.head,
        Targets(LAYERS, LAYERS, LAYERS, PLACES),
        start.training.shuffled_batches(BATCH_SIZE, 1 if size == "quick" else 2, seed),
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


def sentiment(name: str, source: Source, other: Source) -> Task:
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
        prepare=partial(prepare, source, other),
        in_percent=True,
        decimals=1,
    )


REVIEWS_TASK = sentiment("film reviews", FILM_REVIEWS, TWEETS)
TWEETS_TASK = sentiment("tweets", TWEETS, FILM_REVIEWS)
