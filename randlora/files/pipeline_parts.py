"""What a layer of a pipeline's model is called in the files of diffusers and of ComfyUI."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from randlora.options import Component

OWN_NAMES: Component = "diffusion_model"

BEGINNINGS: dict[Component, tuple[str, ...]] = {
    "unet": ("down_blocks", "mid_block", "up_blocks"),
    "transformer": ("transformer_blocks", "single_transformer_blocks"),
    "text_encoder": ("text_model", "encoder"),
}
"""The first parts of names that only such a component has."""


def recognized(fqns: Iterable[str], otherwise: Component) -> Component:
    """Return the component that layers with such names are in."""
    first = {fqn.partition(".")[0] for fqn in fqns}
    return next((part for part, beginnings in BEGINNINGS.items() if first & set(beginnings)), otherwise)


def diff_keys(component: Component, fqns: Sequence[str]) -> dict[str, str]:
    """Return ComfyUI's keys of the full updates of layers, by FQN."""
    if component == "unet":  # of which ComfyUI knows diffusers' names with underscores only
        return {fqn: f"lora_unet_{fqn.replace('.', '_')}.diff" for fqn in fqns}
    if component in {"text_encoder", "text_encoder_2"}:  # of which it knows those names that CLIP has had
        names = {fqn: f"text_model.{fqn.removeprefix('text_model.')}" for fqn in fqns}
        return {fqn: f"{component}.{name}.diff" for fqn, name in names.items()}
    return {fqn: f"{component}.{fqn}.diff" for fqn in fqns}
