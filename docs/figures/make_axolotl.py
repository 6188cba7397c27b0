"""Draw ``axolotl.svg``: the loss of the run on the page on axolotl.

Run `python docs/figures/make_axolotl.py my-adapter/checkpoint-72/trainer_state.json` from the root of the repository.
"""

import json
import sys
from pathlib import Path

from matplotlib import rcParams
from matplotlib.figure import Figure

from benchmarks.quality.figures import INK, STYLES

OUTPUT = Path(__file__).with_name("axolotl.svg")
EPOCHS = 4


def main(state: str) -> None:
    """Draw the loss of each step, and its mean over each epoch."""
    history = json.loads(Path(state).read_text(encoding="utf-8"))["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    length = len(losses) // EPOCHS
    rcParams["svg.hashsalt"] = "axolotl"  # so that the same run gives the same file
    picture = Figure(figsize=(8.4, 3.2), layout="constrained")
    axes = picture.subplots()
    axes.plot(range(1, len(losses) + 1), losses, ".", color=INK, label="each step")
    for epoch in range(EPOCHS):
        mean = sum(losses[epoch * length : (epoch + 1) * length]) / length
        style = STYLES["dense"] | ({"label": "mean of an epoch"} if epoch == 0 else {})
        axes.plot([epoch * length + 1, (epoch + 1) * length], [mean, mean], **style)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("loss", color=INK)
    axes.grid(alpha=0.25)
    axes.tick_params(colors=INK)
    for spine in axes.spines.values():
        spine.set_color(INK)
    axes.legend(framealpha=0, labelcolor=INK)
    picture.savefig(OUTPUT, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main(sys.argv[1])
