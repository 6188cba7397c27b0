"""Telling quantised checkpoints, which hold no weight that anything could be added to."""

from randlora.errors import CheckpointError
from randlora.files.model_directory import ModelDirectory

MARKS = {
    ".quant_state.": "bitsandbytes, 4 bits",
    ".absmax": "bitsandbytes, 4 bits",
    ".SCB": "bitsandbytes, 8 bits",
    ".qweight": "GPTQ or AWQ",
    ".weight_scale_inv": "blocks of 8-bit floats",
    ".weight_packed": "compressed-tensors",
}
"""What the names of tensors contain that only quantised checkpoints have, and what wrote them."""


def refuse_quantised(directory: ModelDirectory) -> None:
    """Raise where weights are stored as codes with scales.

    Raises:
        CheckpointError: Naming a tensor that shows it, or the entry of ``config.json`` that says so.
    """
    advice = "an adapter cannot be added to codes: take the checkpoint in a floating dtype"
    for name in directory.entries:
        for mark, origin in MARKS.items():
            if mark in f"{name}.":
                raise CheckpointError(f"{directory.path} is quantised ({name} is of {origin}): {advice}")
    if isinstance(settings := directory.config.get("quantization_config"), dict):
        method = settings.get("quant_method", "an unnamed method")
        raise CheckpointError(f"{directory.path} is quantised (config.json says with {method}): {advice}")
