"""Models of every type of transformers, cut down until they run on small inputs made from their config."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.transformers_zoo import CUTS, HEADS, LAYERS, SIDES, WIDE, cut

TOKENS = 8
SAMPLES = 4000
FRAMES = 64

MOST = 3
LARGEST = 25_000_000

LATENT = {
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim", "qk_nope_head_dim", "qk_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "index_head_dim", "index_n_heads"), 8),
    "num_key_value_heads": 4,
    "qk_head_dim": 24,
    "index_topk": 4,
}
FURTHER = (
    LAYERS | WIDE | SIDES | LATENT,
    LAYERS | WIDE | HEADS | LATENT,
    LAYERS | WIDE | SIDES | {"head_dim": 64},
    LAYERS | WIDE | SIDES | {"head_dim": 128},
)
"""Further sizes, for models whose heads have several parts."""

Inputs = dict[str, Any]


class CannotRunError(Exception):
    """None of the classes of a type could be built, or none ran on the inputs tried."""


def runnable(model_type: str, names: list[str]) -> tuple[nn.Module, Inputs]:
    """Build the first of some classes that runs, with few weights, and inputs that it runs on."""
    tried: list[str] = []
    for name in names[:MOST]:
        for sizes in (*CUTS, *FURTHER):
            try:
                model_class, config = getattr(transformers, name), cut(CONFIG_MAPPING[model_type], sizes)
                with torch.device("meta"):
                    size = sum(parameter.numel() for parameter in model_class(config).parameters())
                if size > LARGEST:
                    tried.append(f"{size:,} weights")
                    continue
                model = model_class(config).eval()
            except Exception as error:  # some sizes do not go together
                tried.append(f"{type(error).__name__}: {error}")
                continue
            for inputs in inputs_of(model):
                try:
                    with torch.no_grad():
                        model(**inputs)
                except Exception as error:  # it wants other inputs
                    tried.append(f"{type(error).__name__}: {error}")
                else:
                    return model, inputs
    raise CannotRunError(
        "; ".join(dict.fromkeys(each[:200] for each in tried)) or "no class takes inputs that are known"
    )


def inputs_of(model: nn.Module) -> Iterator[Inputs]:
    """Go through inputs that the forward of a model may take, the likeliest first."""
    names = list(inspect.signature(type(model).forward).parameters)
    main = getattr(model, "main_input_name", "input_ids")
    config: Any = model.config
    beside = {name: make(config) for name, make in BESIDE.items() if name in names}
    for name in dict.fromkeys([main, *names]):
        for make in MAIN.get(name, ()) if name in names else ():
            found = make(config)
            if found is not None:
                yield {name: found, **beside}
                yield {name: found}
    if {"input_ids", "pixel_values"} <= {*names}:
        for make in MAIN["pixel_values"]:
            if (pixels := make(config)) is not None:
                yield {"input_ids": ids(config), "pixel_values": pixels}


def attribute(config: Any, *names: str, default: Any = None) -> Any:
    """Return the first attribute of a config, or of one inside it, that is set."""
    inner = [each for each in vars(config).values() if hasattr(each, "to_dict")]
    for held in (config, *inner):
        for name in names:
            if (found := getattr(held, name, None)) is not None:
                return found
    return default


def drawn(*size: int) -> Tensor:
    """Draw numbers."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(0))


def integers(most: int, *size: int, least: int = 0) -> Tensor:
    """Draw integers."""
    return torch.randint(least, max(most, least + 1), size, generator=torch.Generator().manual_seed(0))


def ids(config: Any, length: int = TOKENS) -> Tensor:
    """Draw tokens that are no special ones."""
    try:
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
    except ValueError:  # it has several
        text = config
    vocabulary = attribute(text, "vocab_size", default=None) or attribute(config, "vocab_size", default=32)
    return integers(int(vocabulary), 2, length, least=min(3, int(vocabulary) - 1))


def pixels(size: int | None = None, rank: int = 4) -> Callable[[Any], Tensor | None]:
    """Return a function that draws images of a size, by default that of the config, or clips of them."""

    def make(config: Any) -> Tensor | None:
        side = size or attribute(config, "image_size", "img_size", "crop_size", default=64)
        height, width = (side, side) if isinstance(side, int) else (tuple(side)[-2:])
        channels = attribute(config, "num_channels", "in_channels", "in_chans", default=3)
        channels = channels if isinstance(channels, int) else 3
        frames = attribute(config, "num_frames", default=2) if rank == 5 else None
        if height * width * (frames or 1) > 300_000:
            return None
        between = (frames,) if frames else ()
        return drawn(2 if height < 100 else 1, *between, channels, height, width)

    return make


def features(config: Any) -> Tensor:
    """Draw a spectrogram, as long as the model takes."""
    bins = attribute(config, "num_mel_bins", "input_feat_per_channel", "feature_size", "n_mels", default=80)
    most = attribute(config, "max_source_positions", default=FRAMES // 2)
    return drawn(1, int(bins), 2 * int(most))


def frames(config: Any) -> Tensor:
    """Draw a spectrogram with time first."""
    bins = attribute(config, "num_mel_bins", "input_feat_per_channel", "feature_size", "feature_projection_input_dim",
                     default=80)  # fmt: skip
    return drawn(2, FRAMES, int(bins))


def series(config: Any) -> Tensor:
    """Draw a time series."""
    length = attribute(config, "context_length", default=FRAMES)
    return drawn(2, int(length), int(attribute(config, "num_input_channels", "input_size", default=1)))


MAIN: dict[str, tuple[Callable[[Any], Any], ...]] = {
    "input_ids": (ids, lambda config: ids(config, 64)),
    "pixel_values": (pixels(), pixels(32), pixels(64), pixels(224), pixels(rank=5), pixels(32, rank=5)),
    "pixel_values_videos": (pixels(rank=5),),
    "input_features": (features, frames, lambda _: drawn(1, 1, 1001, 64)),
    "input_values": (lambda _: drawn(2, SAMPLES), lambda _: drawn(2, 1, SAMPLES), frames, features),
    "waveform": (lambda _: drawn(2, SAMPLES),),
    "audio_values": (frames, lambda _: drawn(1, 1, 1024, 128)),
    "inputs": (ids, pixels(), lambda config: drawn(2, TOKENS, int(attribute(config, "d_model", default=64)))),
    "past_values": (series, lambda _: drawn(2, FRAMES)),
    "hidden_states": (lambda config: drawn(2, TOKENS, int(attribute(config, "hidden_size", default=64))),),
    "inputs_embeds": (lambda config: drawn(2, TOKENS, int(attribute(config, "hidden_size", "d_model", default=64))),),
}
"""How to draw the input that a model needs, by its name: the likeliest first."""

BESIDE: dict[str, Callable[[Any], Any]] = {
    "decoder_input_ids": lambda config: ids(config, 5),
    "use_cache": lambda _: False,
    "bbox": lambda _: integers(40, 2, TOKENS, 4).sort(dim=-1).values,
}
"""What is given beside it, where the forward takes it."""
