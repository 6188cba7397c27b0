"""`make slow` checks a model of every type of transformers."""

import inspect
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import randlora
from randlora.errors import TargetError
from tests.transformers_zoo import CUTS, HEADS, LAYERS, SIDES, WIDE, built, every_type

PARTS = 24
"""In how many tests the types are checked, for several processes to share."""

_INDEXER = r"\.indexer\."
_CHOOSES = "it chooses tokens, and is trained by a loss that the model does not compute"
EXPECTED = {
    **dict.fromkeys(("minimax_m3_vl", "qwen4_exp"), (_INDEXER, _CHOOSES)),
    "deepseek_v4": (r"\.(indexer|compressor)\.", f"{_CHOOSES}; the inputs are too short for it to compress any"),
    **dict.fromkeys(
        ("fastspeech2_conformer", "fastspeech2_conformer_with_hifigan", "vits"),
        ("duration_predictor", "without labels its output is rounded to integers"),
    ),
    **dict.fromkeys(
        ("encoder-decoder", "vision-encoder-decoder"), (r"encoder\.pooler", "the decoder reads the states before it")
    ),
    "flava": ("text_to_mm_projection", "its output is used with images and text together"),
    **dict.fromkeys(("levit", "superglue"), ("(?!)", "cut down, it has no effects above rounding")),
    "lightglue": (
        r"keypoint_detector|matchability|token_confidence",
        "no gradient reaches the detector of the points, and the others decide which points are left out",
    ),
    "lilt": (r"encoder\.layer\.1\..*layout", "the layout after the last layer is not part of the output"),
    "pe_audio_encoder": (r"embedder\.(dac_encoder|bottleneck)", "it encodes the audio under no_grad"),
    "uvdoc_backbone": ("bridge", "of its feature maps it returns those that its config asks for"),
    "pocket_tts": ("audio_latent_proj", "the inputs tried here have no audio for it to embed"),
    "mra": ("attention", "without its kernels for a GPU the attention returns zeros"),
}
"""By type the weights, as a regex, in which something is found, and why that is no mistake of the library."""

LATENT = {
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "index_head_dim", "index_n_heads"), 8),
    **dict.fromkeys(("num_key_value_heads", "index_topk"), 4),
    "qk_head_dim": 24,
}
ALL_CUTS = (
    *CUTS,
    LAYERS | WIDE | SIDES | LATENT,
    LAYERS | WIDE | HEADS | LATENT,
    *(LAYERS | WIDE | SIDES | {"head_dim": size} for size in (64, 128)),
)


def attribute(config: Any, *names: str, default: Any = None) -> Any:
    """Return the first attribute of a config, or of one inside it, that is set."""
    inner = [each for each in vars(config).values() if hasattr(each, "to_dict")]
    found = (getattr(held, name, None) for held in (config, *inner) for name in names)
    return next((each for each in found if each is not None), default)


def drawn(*size: Any) -> Tensor:
    return torch.randn(*map(int, size), generator=torch.Generator().manual_seed(0))


def ids(config: Any, length: int = 8) -> Tensor:
    """Draw tokens that are no special ones."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = int(attribute(text, "vocab_size") or attribute(config, "vocab_size", default=32))
    least = min(3, most - 1)
    return torch.randint(least, max(most, least + 1), (2, length), generator=torch.Generator().manual_seed(0))


def images(config: Any, frames: tuple[int, ...]) -> Iterator[Tensor]:
    """Draw images of several sizes, that of the config first, or clips of them, unless they are large."""
    channels = attribute(config, "num_channels", "in_channels", "in_chans", default=3)
    own = attribute(config, "image_size", "img_size", "crop_size", default=64)
    for side in (own, 32, 64, 224):
        height, width = (side, side) if isinstance(side, int) else tuple(side)[-2:]
        if height * width * (frames or (1,))[0] <= 300_000:
            shape = channels if isinstance(channels, int) else 3, height, width
            yield drawn(2 if height < 100 else 1, *frames, *shape)


def sounds(config: Any) -> Iterator[Tensor]:
    """Draw spectrograms, as long as the model takes, and with time first, and waves."""
    bins = attribute(config, "num_mel_bins", "input_feat_per_channel", "feature_size", "n_mels", default=80)
    yield drawn(1, bins, 2 * int(attribute(config, "max_source_positions", default=32)))
    yield drawn(2, 64, attribute(config, "feature_projection_input_dim", default=bins))
    yield from (drawn(2, 4000), drawn(2, 1, 4000), drawn(1, 1, 1001, 64), drawn(1, 1, 1024, 128))


def drawings(config: Any) -> dict[str, Iterator[Tensor]]:
    """Return how to draw the input that a model needs, by its name: the likeliest first."""
    length, channels = attribute(config, "context_length", default=64), ("num_input_channels", "input_size")
    states, frames = attribute(config, "hidden_size", "d_model", default=64), attribute(config, "num_frames", default=2)
    return {
        "input_ids": (ids(config, length) for length in (8, 64)),
        "pixel_values": chain(images(config, ()), images(config, (frames,))),
        "pixel_values_videos": images(config, (frames,)),
        **{name: sounds(config) for name in ("input_features", "input_values", "waveform", "audio_values")},
        "inputs": chain([ids(config)], images(config, ()), [drawn(2, 8, states)]),
        "past_values": iter([drawn(2, length, attribute(config, *channels, default=1)), drawn(2, 64)]),
        **{name: iter([drawn(2, 8, states)]) for name in ("hidden_states", "inputs_embeds")},
    }


def inputs_of(model: Any) -> Iterator[dict[str, Any]]:
    """Go through inputs that the forward of a model may take, the likeliest first."""
    names, config = list(inspect.signature(type(model).forward).parameters), model.config
    boxes = torch.arange(64).view(2, 8, 4) % 40
    beside = {"decoder_input_ids": ids(config, 5), "use_cache": False, "bbox": boxes.sort(dim=-1).values}
    beside = {name: value for name, value in beside.items() if name in names}
    for name in dict.fromkeys([getattr(model, "main_input_name", "input_ids"), *names]):
        for found in drawings(config).get(name, ()) if name in names else ():
            yield {name: found, **beside}
            yield {name: found}
    if {"input_ids", "pixel_values"} <= {*names}:
        yield from ({"input_ids": ids(config), "pixel_values": each} for each in images(config, ()))


def runnable(model_type: str, names: list[str]) -> tuple[nn.Module, dict[str, Any]] | None:
    """Build the first of some classes that runs, with few weights, and inputs that it runs on; `None` without any."""
    for model in built(model_type, names[:3], ALL_CUTS, most=25_000_000):
        with suppress(ValueError):  # its config has several texts
            for inputs in inputs_of(model):
                with suppress(Exception), torch.no_grad():  # it wants other inputs
                    model(**inputs)
                    return model, inputs
    return None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(PARTS))
def test_nothing_is_found_in_any_type_of_transformers(part: int) -> None:
    """A third of the types run: no cut of a config gives a model of few weights, or it wants other inputs."""
    found: list[str] = []
    num_run = 0
    for model_type, names in list(every_type().items())[part::PARTS]:
        torch.manual_seed(0)
        if (run := runnable(model_type, names)) is None:
            continue
        (model, inputs), num_run = run, num_run + 1
        with suppress(TargetError):  # nothing can be adapted
            randlora.inject(model, r=4, targets="all")
            report, (expected, _) = randlora.check(model, **inputs), EXPECTED.get(model_type, ("(?!)", ""))
            assert report.checked or model_type in EXPECTED
            left = [problem for problem in report.problems if not re.search(expected, problem.fqn)]
            found += [f"{model_type}: {problem}" for problem in left]
    assert (found, num_run > 0) == ([], True)
