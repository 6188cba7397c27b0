"""Made-up facts for a small language model: SmolLM2-135M learns which password each of many people has.

What is trained is the last projection of the model. All below it is frozen, so that what comes out of it is computed
once. A password is one of some words, drawn at random, and each is a single token.
"""

import copy
import itertools
import random
import re
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.quality.recall import recall, recall_task
from benchmarks.quality.task import Prepared, Size
from benchmarks.quality.words import pretrained

PEOPLE = 2048
WORDS = 64
BATCH_SIZE = 256
EPOCHS = 150
SYLLABLES = ("ba", "do", "fe", "ga", "hi", "ka", "lo", "mi", "na", "pe", "ro", "sa", "ti", "vu", "wa", "ze")


class LastProjection(nn.Module):
    """What of the model is not below its last projection: that, the norm, and the head's rows of some words."""

    def __init__(self, model: Any, words: Tensor) -> None:
        """Copy the parts of a model, in float32."""
        super().__init__()
        self.projection: nn.Linear = copy.deepcopy(model.model.layers[-1].mlp.down_proj).float()
        self.norm = copy.deepcopy(model.model.norm).float()
        weight = self.norm.weight
        del self.norm.weight
        self.norm.register_buffer("weight", weight.detach())  # the projection alone has parameters
        self.register_buffer("head", model.lm_head.weight[words].float())

    def forward(self, people: "Below") -> Tensor:
        """Return logits, ``(people, words)``."""
        logits: Tensor = self.norm(people.residual + self.projection(people.inputs)) @ self.head.T
        return logits


class Below(NamedTuple):
    """What the frozen part computes of the last token of each prompt, ``(people, features)``.

    Attributes:
        inputs: Those of the projection.
        residual: What its outputs are added to.
    """

    inputs: Tensor
    residual: Tensor

    def of(self, people: Tensor) -> "Below":
        """Choose some people."""
        return Below(self.inputs[people], self.residual[people])


class Start(NamedTuple):
    """What all begin with.

    Attributes:
        model: What is trained.
        people: What its frozen part computes of each.
        passwords: The number of each password among the words.
    """

    model: LastProjection
    people: Below
    passwords: Tensor


@cache
@torch.no_grad()
def start_of(seed: int, count: int) -> Start:
    """Make people up, run the frozen part on a prompt for each, and draw passwords."""
    tokenizer, model = pretrained()
    draw = random.Random(seed)
    names = draw.sample(["".join(each).capitalize() for each in itertools.product(SYLLABLES, repeat=3)], count)
    of_words = sorted(row for token, row in tokenizer.get_vocab().items() if re.fullmatch("Ġ[a-z]{4,8}", token))
    inputs, residuals = [], []
    layer = model.model.layers[-1]
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0])),
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: residuals.append(args[0])),
    ]
    for first in range(0, count, 64):
        texts = [f"The password of {name} is" for name in names[first : first + 64]]
        ids = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
        model.model(input_ids=nn.utils.rnn.pad_sequence(ids, batch_first=True))  # what stands behind is not seen
        last = torch.arange(len(ids)), torch.tensor([len(each) - 1 for each in ids])
        inputs[-1], residuals[-1] = inputs[-1][last].float(), residuals[-1][last].float()
    for hook in hooks:
        hook.remove()
    words = torch.tensor(draw.sample(of_words, WORDS))
    passwords = torch.tensor([draw.randrange(WORDS) for _ in names])
    return Start(LastProjection(model, words), Below(torch.cat(inputs), torch.cat(residuals)), passwords)


def prepare(seed: int, size: Size) -> Prepared:
    """Copy what is trained, and shuffle the people."""
    start = start_of(seed, 64 if size == "quick" else PEOPLE)
    model, people, passwords = copy.deepcopy(start.model), start.people, start.passwords
    with torch.no_grad():
        before = start.model.projection(people.inputs)

    def drift() -> float:
        return float((model.projection(people.inputs) - before).norm() / before.norm())

    return recall(
        model,
        "projection",
        lambda chosen: model(people.of(chosen)),
        passwords,
        WORDS,
        torch.Generator().manual_seed(seed),
        size=size,
        batch_size=BATCH_SIZE,
        epochs=EPOCHS,
        drift=drift,
    )


PASSWORDS_TASK = recall_task(
    "passwords", "norm of what the update adds, over that of the outputs before", (3e-3, 1e-2, 3e-2), prepare
)
