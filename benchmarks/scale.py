"""The tables of docs/scale.md: the memory of training adapters of large models, which are built on the meta device.

``python -m benchmarks.scale`` writes them anew. Nothing is downloaded: the sizes of the models are here.
"""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

import randlora
from randlora.model.memory import TrainingMemory

PAGE = Path(__file__).parent.parent / "docs" / "scale.md"
TABLE = re.compile(r"<!-- (?P<name>\w+) -->\n.*?<!-- end -->\n", re.DOTALL)
R = 32
TOKENS = 4096
ROOM = 80 * 10**9
"""Bytes of a device."""
BASES = "dense", "block"
GB = 10**9


class Setting(NamedTuple):
    """Devices and how the model is divided among them."""

    devices: int
    strategy: Any


SETTINGS = (Setting(1, "ddp"), Setting(8, "ddp"), Setting(8, "fsdp2"), Setting(64, "fsdp2"))


class Shape(NamedTuple):
    """A model by its configuration, and whether its experts are adapted too."""

    config: str
    sizes: dict[str, int]
    adapts_experts: bool = False

    def build(self) -> nn.Module:
        """Build the model in bfloat16, without values."""
        config = getattr(transformers, f"{self.config}Config")(**self.sizes)
        with torch.device("meta"):
            model: nn.Module = getattr(transformers, f"{self.config}ForCausalLM")(config)
        return model.to(torch.bfloat16)


def _llama(hidden: int, intermediate: int, layers: int, heads: int) -> Shape:
    sizes = {"vocab_size": 128256, "hidden_size": hidden, "intermediate_size": intermediate}
    return Shape(
        "Llama", {**sizes, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8}
    )


QWEN3 = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
PLAIN = {
    "Llama-3 8B": _llama(4096, 14336, 32, 32),
    "Llama-3 70B": _llama(8192, 28672, 80, 64),
    "Llama-3 405B": _llama(16384, 53248, 126, 128),
    "Mixtral-8x7B": Shape("Mixtral", {}),
    "Qwen3-235B-A22B": Shape("Qwen3Moe", QWEN3),
    "DeepSeek-V3": Shape("DeepseekV3", {}),
}
WITH_EXPERTS = {
    f"{name}, experts too": shape._replace(adapts_experts=True)
    for name, shape in PLAIN.items()
    if shape.config != "Llama"
}
MODELS = {**PLAIN, **WITH_EXPERTS}


def targets_of(shape: Shape, model: nn.Module) -> Any:
    """Return what is adapted: all linear layers, and the experts if they are too."""
    if not shape.adapts_experts:
        return "all-linear"
    linear = randlora.plan(model, R, targets="all-linear").targets
    return [*linear, "experts.gate_up_proj", "experts.down_proj"]


def sizes_row(name: str, shape: Shape) -> str:
    """Return a row about the adapter and its bases."""
    model = shape.build()
    dense, block = (randlora.plan(model, R, targets=targets_of(shape, model), basis=basis) for basis in BASES)  # type: ignore[arg-type]
    numbers = (dense.checkpoint_bytes, dense.basis_bytes, block.basis_bytes)
    shown = " | ".join(f"{number / GB:.2f} GB" for number in numbers)
    own = dense.total_parameters - dense.trainable_parameters
    return f"| {name} | {own / 1e9:.0f} B | {dense.trainable_parameters / own:.2%} | {shown} |"


def memory(shape: Shape, model: nn.Module, setting: Setting, basis: Any) -> TrainingMemory:
    """Return the memory of training on each device."""
    return randlora.training_memory(
        model,
        R,
        targets=targets_of(shape, model),
        basis=basis,
        tokens=TOKENS,
        checkpointing=True,
        **setting._asdict(),
    )


def totals_row(name: str, shape: Shape) -> str:
    """Return a row with the sum for each setting, bold where a device has room for it."""
    model = shape.build()
    cells = []
    for setting in SETTINGS:
        totals = [memory(shape, model, setting, basis).total for basis in BASES]
        each = [f"**{total / GB:.1f}**" if total <= ROOM else f"{total / GB:.0f}" for total in totals]
        cells.append(" / ".join(each))
    return f"| {name} | {' | '.join(cells)} |"


HEADS = {
    "sizes": ("model", "parameters", "trained", "checkpoint", "dense bases", "block bases"),
    "totals": ("model", *(f"{devices} × {strategy}" if devices > 1 else "1" for devices, strategy in SETTINGS)),
}
ROWS: dict[str, Callable[[], list[str]]] = {
    "sizes": lambda: [sizes_row(*item) for item in MODELS.items()],
    "totals": lambda: [totals_row(*item) for item in MODELS.items()],
}


def written(page: str) -> str:
    """Return the page with its tables as they are now."""

    def again(table: re.Match[str]) -> str:
        heads = HEADS[table["name"]]
        lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *ROWS[table["name"]]()]
        return f"<!-- {table['name']} -->\n" + "".join(f"{line}\n" for line in lines) + "<!-- end -->\n"

    return TABLE.sub(again, page)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
