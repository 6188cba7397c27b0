"""Names what was measured on, so that ratios can be compared with others'."""

import importlib.metadata
import platform
from pathlib import Path

import torch

CPU_INFO = Path("/proc/cpuinfo")
TELLING_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def describe(device: str) -> dict[str, str]:
    """Return what a reader must know of the machine: processor, threads, GPU and versions."""
    facts = {"processor": _processor(), "threads": str(torch.get_num_threads())}
    if device == "cuda":
        facts |= _gpu()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "peft", "transformers", "bitsandbytes")}
    return {**facts, "python": platform.python_version(), **versions}


def _gpu() -> dict[str, str]:
    card = torch.cuda.get_device_properties(0)
    return {
        "GPU": torch.cuda.get_device_name(),
        "GPU memory": f"{card.total_memory / 2**30:.0f} GiB",
        "compute capability": f"{card.major}.{card.minor}",
        "CUDA": str(torch.version.cuda),
        "float32 products": torch.get_float32_matmul_precision(),  # "highest" is without TF32
    }


def _processor() -> str:
    if not CPU_INFO.is_file():
        return platform.processor() or platform.machine()
    lines = [line.partition(":") for line in CPU_INFO.read_text(encoding="utf-8").splitlines()]
    facts = {name.strip(): value.strip() for name, _, value in lines}
    flags = [flag for flag in TELLING_FLAGS if flag in facts.get("flags", "").split()]
    return f"{facts.get('model name', platform.machine())} ({', '.join(flags)})"
