"""The quick set: all benchmarks but that of quality, in one command."""

from benchmarks import decode, memory, model, quantized, startup, step
from benchmarks.command import main

main(
    ("step", step.run),
    ("model", model.run),
    ("memory", memory.run),
    ("quantized", quantized.run),
    ("startup", startup.run),
    ("decode", decode.run),
)
