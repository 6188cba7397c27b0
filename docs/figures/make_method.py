"""Draw docs/figures/method.svg: what is frozen and what is trained in RandLoRA and in LoRA.

Run `python docs/figures/make_method.py` from the root of the repository.
"""

from pathlib import Path

GREY, TRAINED, INK = "#c9ccd1", "#3f51b5", "#222222"
SIDE, THIN = 92, 22  # of the weight, and the small side of a basis
J = '<tspan dy="4" font-size="10">j</tspan>'


def box(x: float, y: float, width: float, height: float, name: str, *, is_trained: bool) -> str:
    """Return a matrix with its name."""
    fill, ink = (TRAINED, "white") if is_trained else (GREY, INK)
    middle = f'x="{x + width / 2}" y="{y + height / 2 + 5}" fill="{ink}"'
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="3" fill="{fill}"/>'
        f'<text {middle} text-anchor="middle">{name}</text>'
    )


def diagonal(x: float, y: float, side: float, name: str) -> str:
    """Return a diagonal matrix, of which only the diagonal is trained, with its name below."""
    steps = 6
    step = side / steps
    size = f'width="{step:.2f}" height="{step:.2f}" fill="{TRAINED}"'
    corners = ((x + at * step, y + at * step) for at in range(steps))
    cells = "".join(f'<rect x="{left:.2f}" y="{top:.2f}" {size}/>' for left, top in corners)
    frame = f'<rect x="{x}" y="{y}" width="{side}" height="{side}" fill="none" stroke="{GREY}"/>'
    return f'{frame}{cells}<text x="{x + side / 2}" y="{y + side + 16}" text-anchor="middle" fill="{INK}">{name}</text>'


def words(x: float, y: float, text: str, *, size: int = 15, anchor: str = "middle") -> str:
    """Return a line of text."""
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{INK}">{text}</text>'


def randlora(y: float) -> list[str]:
    """Return the row of RandLoRA."""
    middle = y + SIDE / 2
    return [
        words(14, y - 14, "RandLoRA: full rank, and only diagonals are trained", anchor="start"),
        box(14, y, SIDE, SIDE, "W", is_trained=False),
        words(126, middle + 6, "+", size=22),
        words(158, middle + 9, "Σ", size=30),
        words(158, middle + 28, "j", size=13),
        box(184, y, THIN, SIDE, f"B{J}", is_trained=False),
        diagonal(218, middle - THIN / 2, THIN, f"Λ{J}"),
        box(252, middle - THIN / 2, SIDE, THIN, "A", is_trained=False),
        diagonal(356, y, SIDE, f"Γ{J}"),
        words(14, y + SIDE + 36, "B and A come from a seed, and all layers share them", size=13, anchor="start"),
    ]


def lora(y: float) -> list[str]:
    """Return the row of LoRA."""
    middle = y + SIDE / 2
    return [
        words(14, y - 14, "LoRA: rank r, and both factors are trained", anchor="start"),
        box(14, y, SIDE, SIDE, "W", is_trained=False),
        words(126, middle + 6, "+", size=22),
        box(184, y, THIN, SIDE, "B", is_trained=True),
        box(218, middle - THIN / 2, SIDE, THIN, "A", is_trained=True),
        box(356, middle - 20, 18, 14, "", is_trained=False),
        words(382, middle - 8, "frozen", size=13, anchor="start"),
        box(356, middle + 4, 18, 14, "", is_trained=True),
        words(382, middle + 16, "trained", size=13, anchor="start"),
    ]


def main() -> None:
    """Write the figure, narrow enough that its letters can be read on a phone."""
    size = 'width="462" height="330" viewBox="0 0 462 330"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="15">'
    background = '<rect width="462" height="330" fill="white"/>'
    lines = [head, background, *randlora(40), *lora(224), "</svg>"]
    Path("docs/figures/method.svg").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
