"""Training runs that are killed at random times: the newest complete checkpoint loads, and the losses are the same."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.examples import imported
from tests.torture.row import Row

KILLS = 100
STEPS, EVERY = 400, 4
TRAINER_STEPS = 50  # an epoch: in the middle of one, `Trainer` takes a step more if a finished run is resumed
LONGEST_LIFE = 0.6  # seconds that a process trains before it is killed

Train = Callable[[Path, int], None]
"""Trains up to a step, from the newest complete checkpoint in a directory if there is one, and notes losses there."""


def plain_loop() -> Train:
    """Return the training of the loop of one's own."""
    plain: Any = imported("plain_pytorch")
    network: nn.Module = plain.pretrained()
    generator = torch.get_rng_state()

    def pretrained() -> nn.Module:
        torch.set_rng_state(generator)  # as after training it, which would take most of a short life
        return copy.deepcopy(network)

    def train(out: Path, steps: int) -> None:
        is_begun = any(out.glob(f"step-*/{plain.STATE_FILE}"))
        run = plain.resume(out, steps=steps) if is_begun else plain.begin(steps=steps)
        with (out / "losses").open("a", encoding="ascii") as file:
            while run.done < steps:
                for loss in run.train(min(run.done + EVERY, steps)):
                    file.write(f"{json.dumps([run.done, loss])}\n")
                    file.flush()
                run.save(out)

    plain.pretrained = pretrained
    return train


def trainer() -> Train:
    """Return the training of `AdapterTrainer`."""
    program: Any = imported("transformers_trainer")
    from transformers.trainer_callback import ProgressCallback

    def train(out: Path, steps: int) -> None:
        made = program.make_trainer(out, steps=steps, every=EVERY)
        made.remove_callback(ProgressCallback)
        complete = [path for path in out.glob("checkpoint-*/trainer_state.json") if path.read_bytes().endswith(b"}\n")]
        with (out / "losses").open("a", encoding="ascii") as file:

            def note(_module: nn.Module, _inputs: object, output: Any) -> None:
                file.write(f"{json.dumps([made.state.global_step, output.loss.item()])}\n")
                file.flush()

            made.model.register_forward_hook(note)
            made.train(resume_from_checkpoint=bool(complete))

    return train


def in_process(train: Train, out: Path, steps: int, life: float) -> bool:
    """Train in another process until it has finished or its life ends; return whether it was killed.

    Raises:
        AssertionError: If training raised.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reports of each run
            train(out, steps)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    end = time.monotonic() + life
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert status == 0, "a resumed run raised"
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def noted(out: Path) -> tuple[dict[int, set[float]], int]:
    """Return the losses of each step, of all runs that took it, and how often steps were taken."""
    found: dict[int, set[float]] = {}
    count = 0
    for line in (out / "losses").read_text(encoding="ascii").split("\n"):
        if line.endswith("]"):  # the last of a killed process may be cut
            step, loss = json.loads(line)
            found.setdefault(step, set()).add(loss)
            count += 1
    return found, count


def killed_training(train: Train, kills: int, steps: int, life: float) -> tuple[int, int, list[str]]:
    """Kill training again and again; return the kills, the steps that were taken again, and failures."""
    chance, failures = random.Random(0), list[str]()
    done = again = runs = 0
    with tempfile.TemporaryDirectory() as root:
        whole = Path(root, "whole")
        whole.mkdir()
        begun = time.monotonic()
        in_process(train, whole, steps, 600)
        life = max(life, 0.7 * (time.monotonic() - begun))  # so that a slow machine trains before it kills
        expected, _ = noted(whole)
        while done < kills:
            out = Path(root, f"run-{runs}")
            out.mkdir()
            runs += 1
            while done < kills and in_process(train, out, steps, chance.uniform(0, life)):
                done += 1
            in_process(train, out, steps, 600)
            found, count = noted(out)
            again += count - len(found)
            differing = [step for step in expected if found.get(step) != expected[step]]
            if differing or found.keys() != expected.keys():
                failures.append(f"run {runs}: other losses from step {min(differing, default=-1)} on")
    return done, again, failures


def _campaign(name: str, tried: str, train: Train, kills: int, steps: int, life: float) -> Row:
    start = time.monotonic()
    done, again, failures = killed_training(train, kills, steps, life)
    notes = f"{again:,} steps taken again, with the same losses"
    return Row(name, tried, done, tuple(failures), time.monotonic() - start, notes)


def killed_while_training(scale: float) -> Row:
    """Kill the loop of docs/training.md at random times, and let it resume."""
    kills = max(1, round(KILLS * scale))
    return _campaign("training", "training runs killed and resumed", plain_loop(), kills, STEPS, LONGEST_LIFE)


def killed_trainer(scale: float) -> Row:
    """Kill `AdapterTrainer` at random times, and let it resume."""
    kills = max(1, round(KILLS * scale))
    return _campaign("trainer", "runs of AdapterTrainer killed and resumed", trainer(), kills, TRAINER_STEPS, 2.0)
