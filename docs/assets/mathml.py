"""A hook of MkDocs: blocks of ``math``, in LaTeX, become MathML, which browsers draw with no script or font of ours."""

from typing import Any

from latex2mathml.converter import convert


def typeset(source: str, *_: object, **__: object) -> str:
    """Return one block as MathML."""
    return f'<div class="math">{convert(source, display="block")}</div>'


def on_config(config: Any) -> None:
    """Let superfences, which knows a block by its language, call `typeset`."""
    blocks = {"name": "math", "class": "math", "format": typeset}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [blocks]}
