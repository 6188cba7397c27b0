"""What a LoRA of a trained adapter is worth: its error, its size and its loss on texts of other tales, rank by rank.

A small Llama learns some of the Grimms' tales letter by letter, in full; an adapter then learns others. Random values
would tell nothing: their updates have a flat spectrum, which no low rank comes near.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import randlora
from benchmarks.command import Settings, main
from benchmarks.models import LLAMA_TARGETS
from benchmarks.results import Row
from benchmarks.timing import Figure

TALES = Path(__file__).parents[1] / "docs" / "examples" / "data" / "grimm.txt"
LAYERS, SIDE, STEPS, ROWS, LENGTH = 2, 128, 150, 8, 96
R = 8
RANKS = (2, 4, 8, 16, 32, 64)
TOLERANCES = (0.3, 0.1)


def model() -> Any:
    """Make a language model of bytes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": SIDE, "intermediate_size": 2 * SIDE, "num_hidden_layers": LAYERS}
    config = transformers.LlamaConfig(vocab_size=128, num_attention_heads=SIDE // 32, **sizes)
    return transformers.LlamaForCausalLM(config)


def text() -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens to learn in full, to learn with the adapter, and to measure the loss on."""
    letters = torch.tensor([min(byte, 127) for byte in TALES.read_bytes()])
    first, second = len(letters) // 2, len(letters) * 9 // 10
    return letters[:first], letters[first:second], letters[second:]


def train(network: Any, parameters: list[nn.Parameter], tokens: Tensor, rate: float) -> None:
    """Take some steps on random windows of a text."""
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    generator = torch.Generator().manual_seed(0)
    network.train()
    for _ in range(STEPS):
        starts = torch.randint(len(tokens) - LENGTH, (ROWS,), generator=generator)
        ids = torch.stack([tokens[start : start + LENGTH] for start in starts])
        optimizer.zero_grad()
        network(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    network.eval()


@torch.no_grad()
def loss(network: Any, tokens: Tensor) -> float:
    """Return the mean loss on a text, of at most 16 KB."""
    ids = tokens[: min(len(tokens), 2**14) // LENGTH * LENGTH].reshape(-1, LENGTH)
    return float(torch.stack([network(input_ids=part, labels=part).loss for part in ids.split(ROWS)]).mean())


def run(_: Settings) -> Sequence[Row]:
    """Convert the adapter to LoRAs, and measure them beside it and the base."""
    in_full, by_adapter, held_out = text()
    base = model()
    train(base, list(base.parameters()), in_full, 2e-3)
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    losses = {"base": loss(base, held_out)}
    randlora.inject(base, r=R, alpha=2 * R, targets=LLAMA_TARGETS)
    train(base, list(randlora.trainable_parameters(base)), by_adapter, 1e-2)
    losses["adapter"] = loss(base, held_out)
    with tempfile.TemporaryDirectory() as directory:
        adapter = Path(directory) / "adapter"
        randlora.save(base, adapter)
        nbytes = (adapter / "adapter_model.safetensors").stat().st_size
        rows = [_row("adapter", 0.0, nbytes, losses["adapter"], losses)]
        options: list[tuple[str, dict[str, Any]]] = [(f"rank {rank}", {"rank": rank}) for rank in RANKS]
        options += [(f"tolerance {most}, padded", {"tolerance": most, "same_rank": True}) for most in TOLERANCES]
        for words, own in options:
            out = Path(directory) / words
            report = randlora.files.convert(adapter, out, "lora", **{"tolerance": 1.0, **own})
            network = model()
            network.load_state_dict(weights)
            served = loss(peft.PeftModel.from_pretrained(network, out).eval(), held_out)
            rank = max(layer.rank for layer in report.layers)
            case = words if words.startswith("rank") else f"{words} to rank {rank}"
            rows.append(_row(case, report.relative_error, report.nbytes, served, losses))
    return rows


def _row(case: str, error: float, nbytes: int, served: float, losses: dict[str, float]) -> Row:
    gained = (losses["base"] - served) / (losses["base"] - losses["adapter"])
    figures = {"relative error": 100 * error, "what the adapter gains in loss": 100 * gained}
    written = {name: Figure.of([value], "%") for name, value in figures.items()}
    return Row(case, {**written, "file": Figure.of([float(nbytes)], "B")})


if __name__ == "__main__":
    main(("low_rank", run))
