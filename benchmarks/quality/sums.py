"""Reinforcement learning on sums: a small language model that knows sums badly is rewarded for right ones.

The model, of Llama's kind with two layers, is trained on sums and differences of two numbers of two digits, and stopped
as soon as it gets a third of the sums right. Then it learns by REINFORCE (Williams, 1992): of each sum of a batch it
draws several answers, a checker tells which are right, and the loss weighs the log-likelihood of each answer by its
reward less the mean of its group. There is one step for each batch, no penalty for leaving the first model, and no
clipping of ratios.
"""

import copy
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from benchmarks.quality.task import Prepared, Size, Targets, Task

PLUS, MINUS, EQUALS = 10, 11, 12
"""Tokens after those of the digits. A problem is ``37+58=``, an answer ``095``, and that of a difference its size."""
PROMPT, ANSWER = 6, 3  # tokens
LAYERS = r"model\.layers\..*_proj"
WIDTH = 96
PRETRAINING_BATCH = 256
PRETRAINING_LR = 2e-3
KNOWN = 1 / 3  # of sums, where pretraining stops
STEPS = 200
PROMPTS = 16  # of a batch
SAMPLES = 8  # of each
TESTS = 2000


def make_problems(operator: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw problems with their right answers, ``(problems, PROMPT + ANSWER)``."""
    first, second = torch.randint(100, (2, count), generator=generator)
    answers = first + second if operator == PLUS else (first - second).abs()
    parts = (first // 10, first % 10, second // 10, second % 10, answers // 100, answers // 10 % 10, answers % 10)
    digits = torch.stack(parts, dim=1)
    signs = torch.full((count, 1), operator), torch.full((count, 1), EQUALS)
    return torch.cat([digits[:, :2], signs[0], digits[:, 2:4], signs[1], digits[:, 4:]], dim=1)


def answer_loss(model: Any, problems: Tensor) -> Tensor:
    """Return the mean loss of the digits of the answers."""
    logits = model(input_ids=problems[:, :-1]).logits[:, PROMPT - 1 :]
    return F.cross_entropy(logits.flatten(0, 1), problems[:, PROMPT:].flatten())


@torch.no_grad()
def with_answers(model: Any, prompts: Tensor, generator: torch.Generator) -> Tensor:
    """Draw an answer for each prompt, ``(prompts, PROMPT + ANSWER)``."""
    tokens = prompts
    for _ in range(ANSWER):
        chances = model(input_ids=tokens, logits_to_keep=1).logits[:, -1].softmax(1)
        tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator)], dim=1)
    return tokens


def rewards_of(answered: Tensor, right: Tensor) -> Tensor:
    """Return 1 for each answer that is right, and else 0."""
    return (answered[:, PROMPT:] == right[:, PROMPT:]).all(1).float()


def mean_reward(model: Any, problems: Tensor, generator: torch.Generator) -> float:
    """Return the share of problems whose answer is right, drawn once for each."""
    return float(rewards_of(with_answers(model, problems[:, :PROMPT], generator), problems).mean())


def reinforce_loss(model: Any, problems: Tensor, generator: torch.Generator) -> Tensor:
    """Return the loss of answers that are drawn for it, over all of their digits."""
    right = problems.repeat_interleave(SAMPLES, dim=0)
    answered = with_answers(model, right[:, :PROMPT], generator)
    rewards = rewards_of(answered, right).unflatten(0, (-1, SAMPLES))
    advantages = (rewards - rewards.mean(1, keepdim=True)).flatten()
    logits = model(input_ids=answered[:, :-1]).logits[:, PROMPT - 1 :]
    losses = F.cross_entropy(logits.flatten(0, 1), answered[:, PROMPT:].flatten(), reduction="none")
    weighed: Tensor = losses.unflatten(0, (-1, ANSWER)) * advantages.unsqueeze(1)
    return weighed.mean()


@cache
def pretrained(seed: int, size: Size) -> Any:
    """Return a model trained on sums and differences, and stopped early."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=EQUALS + 1,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    tests = make_problems(PLUS, 500, generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAINING_LR)
    while mean_reward(model, tests, generator) < (0 if size == "quick" else KNOWN):
        for _ in range(10):
            batch = [make_problems(sign, PRETRAINING_BATCH // 2, generator) for sign in (PLUS, MINUS)]
            optimizer.zero_grad()
            answer_loss(model, torch.cat(batch)).backward()
            optimizer.step()
    return model


def prepare(seed: int, size: Size) -> Prepared:
    """Copy the model and draw sums."""
    model = copy.deepcopy(pretrained(seed, size))
    generator = torch.Generator().manual_seed(seed)
    steps, tests = (5, 100) if size == "quick" else (STEPS, TESTS)
    batches = make_problems(PLUS, steps * PROMPTS, generator).split(PROMPTS)
    sums, differences = (make_problems(sign, tests, generator) for sign in (PLUS, MINUS))
    drawn = torch.Generator().manual_seed(seed)  # for all alike

    with torch.no_grad():
        loss_before = float(answer_loss(model, differences))

    def measure() -> dict[str, float]:
        return {
            "reward": mean_reward(model, sums, torch.Generator().manual_seed(seed)),
            "drift": float(answer_loss(model, differences)) - loss_before,
        }

    targets = Targets(LAYERS, LAYERS, LAYERS)
    return Prepared(model, None, targets, batches, lambda batch: reinforce_loss(model, batch, drawn), measure)


RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SUMS_TASK = Task(
    "sums",
    metric="reward",
    is_better_if_larger=True,
    drift="mean token loss on differences, after minus before",
    rates={"frozen": (0.0,), "full": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3), "adapter": RATES, "small adapter": RATES},
    head_rate=0.0,
    prepare=prepare,
    width=WIDTH,
    in_percent=True,
    decimals=1,
)
