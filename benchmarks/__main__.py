"""The quick set: all benchmarks but those of merging and of quality, in one command; on a GPU, its laws first."""

from benchmarks import (
    compiled,
    decode,
    experts,
    growth,
    laws,
    memory,
    model,
    overhead,
    peft_faults,
    pool,
    quantized,
    routed,
    server,
    startup,
    step,
    tenants,
    traffic,
)
from benchmarks.command import main

main(
    ("laws", laws.run),
    ("peft_faults", peft_faults.run),
    ("step", step.run),
    ("traffic", traffic.run),
    ("overhead", overhead.run),
    ("compiled", compiled.run),
    ("model", model.run),
    ("memory", memory.run),
    ("quantized", quantized.run),
    ("experts", experts.run),
    ("startup", startup.run),
    ("growth", growth.run),
    ("decode", decode.run),
    ("routed", routed.run),
    ("tenants", tenants.run),
    ("pool", pool.run),
    ("server", server.run),
    # `make tests` runs the laws on a CPU; traffic is counted there; faults, starting, the pool and the server need no
    # device
    only_on={"laws": "cuda", **dict.fromkeys(("peft_faults", "traffic", "startup", "growth", "pool", "server"), "cpu")},
)
