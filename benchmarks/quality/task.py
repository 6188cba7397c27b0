"""What a task is: a pretrained model, data to train on, and what is measured afterwards."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

Family = Literal["frozen", "full", "adapter", "small adapter"]
"""What the learning rates of a task depend on: a LoRA of low rank, a small adapter, needs larger ones."""


Size = Literal["quick", "full"]
"""All of the data, or little of it for a quick look."""


@dataclass(frozen=True)
class Targets:
    """The layers that adapters change, as each library names them.

    Attributes:
        ours: ``targets`` of `randlora.inject`.
        lora: ``target_modules`` of PEFT's LoRA.
        linear: ``target_modules`` of PEFT's RandLoRA, which adapts linear layers alone.
        places: Some of them by the names of their places, ``"q and v"`` and ``"MLP"``, where a task compares these.
    """

    ours: Sequence[str] | str
    lora: Sequence[str] | str
    linear: Sequence[str] | str
    places: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """One seed of a task.

    Attributes:
        model: The pretrained model.
        head: What is trained in full beside any adapter, as a new head is; it has its own learning rate.
        targets: The layers that adapters change.
        batches: What to train on, one entry a step.
        loss: Returns the loss of a batch, with the model as it is.
        measure: Returns the task's metric, ``drift`` and whatever else is of interest, with the model as it is.
    """

    model: nn.Module
    head: nn.Module | None
    targets: Targets
    batches: Sequence[Any]
    loss: Callable[[Any], Tensor]
    measure: Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: For files and tables.
        metric: The name of what is to be learned, among what `Prepared.measure` returns.
        is_better_if_larger: Whether that is an accuracy, or a loss.
        drift: What ``drift`` is, in words.
        rates: The learning rates of each family.
        head_rate: That of the head.
        prepare: Makes the model, the data and what measures them, given a seed.
        width: The width m̃ of its layers, by which the rule for the learning rate goes, where there is one.
        in_percent: Whether tables have the metric in percent.
        decimals: How many of them tables have.
    """

    name: str
    metric: str
    is_better_if_larger: bool
    drift: str
    rates: Mapping[Family, tuple[float, ...]]
    head_rate: float
    prepare: Callable[[int, Size], Prepared]
    width: int = 0
    in_percent: bool = False
    decimals: int = 3
