"""The quick set: all benchmarks but those of merging and of quality, in one command; on a GPU, its laws first."""

from benchmarks import decode, laws, memory, model, overhead, quantized, startup, step
from benchmarks.command import main

main(
    ("laws", laws.run),
    ("step", step.run),
    ("overhead", overhead.run),
    ("model", model.run),
    ("memory", memory.run),
    ("quantized", quantized.run),
    ("startup", startup.run),
    ("decode", decode.run),
    only_on={"laws": "cuda", "startup": "cpu"},  # `make tests` runs the laws on a CPU, and starting knows no device
)
