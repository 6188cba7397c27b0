"""Training runs that are killed at random times: the newest complete checkpoint loads, and the losses are the same."""

import copy
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.pages import imported
from tests.torture import Row, share
from tests.torture.faults import FORK

KILLS, EVERY = 100, 4
WHOLE = 600.0  # seconds that no whole run takes

Train = Callable[[Path, int], None]
"""Trains up to a step, from the newest complete checkpoint in a directory if there is one, and notes losses there."""


def plain_loop() -> Train:
    plain: Any = imported("plain_pytorch")
    network: nn.Module = plain.pretrained()
    generator = torch.get_rng_state()

    def pretrained() -> nn.Module:
        torch.set_rng_state(generator)  # as after training it, which would take most of a short life
        return copy.deepcopy(network)

    def train(out: Path, steps: int) -> None:
        is_begun = any(out.glob(f"step-*/{plain.STATE_FILE}"))
        run = plain.resume(out, steps=steps) if is_begun else plain.begin(steps=steps)
        while run.done < steps:
            for loss in run.train(min(run.done + EVERY, steps)):
                note(out, run.done, loss)
            run.save(out)

    plain.pretrained = pretrained
    return train


def trainer() -> Train:
    program: Any = imported("transformers_trainer")
    from transformers.trainer_callback import ProgressCallback

    def train(out: Path, steps: int) -> None:
        made = program.make_trainer(out, steps=steps, every=EVERY)
        made.remove_callback(ProgressCallback)
        complete = [path for path in out.glob("checkpoint-*/trainer_state.json") if path.read_bytes().endswith(b"}\n")]
        made.model.register_forward_hook(lambda *call: note(out, made.state.global_step, call[-1].loss.item()))
        made.train(resume_from_checkpoint=bool(complete))

    return train


def note(out: Path, step: int, loss: float) -> None:
    with (out / "losses").open("a", encoding="ascii") as file:
        file.write(f"{json.dumps([step, loss])}\n")


def noted(out: Path) -> tuple[dict[int, set[float]], int]:
    found: dict[int, set[float]] = {}
    # the last line of a killed process may be cut
    lines = [line for line in (out / "losses").read_text(encoding="ascii").split("\n") if line.endswith("]")]
    for step, loss in map(json.loads, lines):
        found.setdefault(step, set()).add(loss)
    return found, len(lines)


def _silently(train: Train, out: Path, steps: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reports of each run
    train(out, steps)


def in_process(train: Train, out: Path, steps: int, life: float) -> bool:
    child = FORK.Process(target=_silently, args=(train, out, steps))
    child.start()
    child.join(life)
    child.kill()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL), "a resumed run raised"
    return child.exitcode != 0


def killed_training(train: Train, kills: int, steps: int, life: float) -> tuple[int, int, list[str]]:
    chance, failures = random.Random(0), list[str]()
    done = again = runs = 0
    with tempfile.TemporaryDirectory() as root:
        whole = Path(root, "whole")
        whole.mkdir()
        begun = time.monotonic()
        in_process(train, whole, steps, WHOLE)
        life = max(life, 0.7 * (time.monotonic() - begun))  # so that a slow machine trains before it kills
        expected, _ = noted(whole)
        while done < kills:
            out = Path(root, f"run-{runs}")
            out.mkdir()
            runs += 1
            while done < kills and in_process(train, out, steps, chance.uniform(0, life)):
                done += 1
            in_process(train, out, steps, WHOLE)
            found, count = noted(out)
            again += count - len(found)
            if found != expected:
                differing = [step for step in expected if found.get(step) != expected[step]]
                failures.append(f"run {runs}: other losses from step {min(differing, default=-1)} on")
    return done, again, failures


def killed(train: Callable[[], Train], steps: int, life: float, tried: str, scale: float) -> Row:
    done, again, failures = killed_training(train(), share(KILLS, scale), steps, life)
    return Row(f"{tried} killed and resumed", done, failures, f"{again:,} steps taken again, with the same losses")


killed_while_training = partial(killed, plain_loop, 400, 0.6, "training runs")  # of the loop of docs/training.md
# 50 steps are an epoch: in the middle of one, `Trainer` takes a step more if a finished run is resumed
killed_trainer = partial(killed, trainer, 50, 2.0, "runs of AdapterTrainer")
