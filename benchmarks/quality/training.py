"""One run: a contestant trained on one seed of a task, at one learning rate."""

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from torch import Tensor, nn

import randlora
from benchmarks.machine import describe
from benchmarks.processes import forget_peak, peak_bytes
from benchmarks.quality.contestants import Contestant, weight_of
from benchmarks.quality.runs import Key, Run
from benchmarks.quality.task import Prepared, Size, Task

WARMUP = 0.1
LARGEST_NORM = 1.0


def make_run(task: Task, contestant: Contestant, key: Key, size: Size) -> Run:
    """Train a contestant and measure what came of it."""
    lr, seed = key.lr, key.seed
    torch.manual_seed(seed)
    prepared = task.prepare(seed, size)
    adapted, body, head = adapted_parts(prepared, contestant, seed)
    torch.manual_seed(seed)
    forget_peak()
    start = time.process_time()
    losses = train(prepared, contestant, body, head, lr, task.head_rate) if body or head else []
    seconds, peak = time.process_time() - start, peak_bytes()
    prepared.model.eval()
    with torch.no_grad():
        found = prepared.measure()
    last = losses[-max(1, len(losses) // 10) :]
    return Run(
        key,
        found,
        statistics.mean(last) if last else None,
        seconds,
        peak,
        sum(parameter.numel() for parameter in body),
        file_bytes(adapted, prepared.model, body),
        describe("cpu"),
    )


def adapted_parts(
    prepared: Prepared, contestant: Contestant, seed: int
) -> tuple[object, list[nn.Parameter], list[nn.Parameter]]:
    """Adapt a model, and return what its library made of it, what is trained of its body, and the head."""
    torch.manual_seed(seed)  # the same numbers for all, whatever was drawn so far
    adapted = contestant.adapt(prepared, seed)
    head = list(prepared.head.parameters()) if prepared.head is not None else []
    for parameter in head:
        parameter.requires_grad_()
    own = {id(parameter) for parameter in head}
    return adapted, [x for x in prepared.model.parameters() if x.requires_grad and id(x) not in own], head


def train(
    prepared: Prepared,
    contestant: Contestant,
    body: list[nn.Parameter],
    head: list[nn.Parameter],
    lr: float,
    head_lr: float,
) -> list[float]:
    """Train some parameters, and return the loss of each step, without any penalty."""
    of_body = [
        {"params": own, "lr": lr * share, "weight_decay": contestant.decay}
        for share, own in by_share(prepared.model, body, contestant.share).items()
    ]
    groups = [group for group in (*of_body, {"params": head, "lr": head_lr}) if group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    keeps_small = bool(contestant.penalty) or contestant.limit < math.inf
    sizes = norms_of_weights(prepared.model) if keeps_small else {}
    steps = len(prepared.batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, steps))
    prepared.model.train()
    losses = []
    for batch in prepared.batches:
        loss: Tensor = prepared.loss(batch)
        optimizer.zero_grad()
        (loss + contestant.penalty * penalty_of(prepared.model, sizes) if contestant.penalty else loss).backward()
        nn.utils.clip_grad_norm_([*body, *head], LARGEST_NORM)
        optimizer.step()
        schedule.step()
        if contestant.limit < math.inf:
            randlora.limit_norms(prepared.model, {fqn: contestant.limit * size for fqn, size in sizes.items()})
        losses.append(loss.item())
    return losses


def by_share(
    model: nn.Module, body: list[nn.Parameter], share_of: Callable[[str, nn.Parameter], float]
) -> dict[float, list[nn.Parameter]]:
    """Return parameters by the share of the learning rate that they have."""
    shares = {id(parameter): share_of(name, parameter) for name, parameter in model.named_parameters()}
    found: dict[float, list[nn.Parameter]] = {}
    for parameter in body:
        found.setdefault(shares[id(parameter)], []).append(parameter)
    return found


def norms_of_weights(model: nn.Module) -> dict[str, float]:
    """Return the norm of each adapted weight by FQN."""
    (adapter,) = randlora.adapters(model)
    return {fqn: float(weight_of(model, fqn).detach().norm()) for fqn in adapter.targets}


def penalty_of(model: nn.Module, sizes: dict[str, float]) -> Tensor:
    """Return the sum of the squares of the norms of all updates, each as a share of the norm of its weight."""
    norms = randlora.update_norms(model)
    return torch.stack([(norm / sizes[fqn]) ** 2 for fqn, norm in norms.items()]).sum()


def file_bytes(adapted: object, model: nn.Module, body: list[nn.Parameter]) -> int:
    """Return the size of what each library saves of an adapter; of plain parameters that of their values."""
    if not isinstance(adapted, peft.PeftModel) and not randlora.adapters(model):
        return sum(parameter.nbytes for parameter in body)
    with tempfile.TemporaryDirectory() as directory:
        if isinstance(adapted, peft.PeftModel):
            adapted.save_pretrained(directory)
        if randlora.adapters(model):
            if isinstance(adapted, peft.PeftModel):  # ours are inside of its layers
                adapted.unload()
            randlora.save(model, Path(directory) / "ours")
        return sum(file.stat().st_size for file in Path(directory).rglob("*") if file.is_file())


def rate_at(step: int, steps: int) -> float:
    """Return the learning rate of a step as a share of the largest: up over the first tenth, then down to zero."""
    warmup = max(1, round(WARMUP * steps))
    return (step + 1) / warmup if step < warmup else (steps - step) / (steps - warmup + 1)
