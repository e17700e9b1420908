"""A plan as text: a line per figure, with where it comes from."""

from collections.abc import Iterator, Mapping
from typing import Any


def plan_text(plan: Mapping[str, Any]) -> str:
    """What `python -m dico_jax.plan` prints of a plan."""
    return "\n".join(_lines(plan))


def _lines(plan: Mapping[str, Any]) -> Iterator[str]:
    verdict = "fits" if plan["fits"] else "DOES NOT FIT"
    yield f"{plan['config']['model.name']} on {plan['topology']}: {verdict}"
    rows = {name: list(figures.items()) for name, figures in plan["sections"].items()}
    width = max(len(name) for figures in rows.values() for name, _ in figures)
    for section, figures in rows.items():
        if figures:
            yield section
        for name, figure in figures:
            text = _shown(figure["value"], figure["unit"])
            yield f"  {name.ljust(width)}  {text:>24}  {figure['by']}"
    if found := plan.get("search"):
        yield f"other settings, {found['candidates']} tried, the fastest that fit first"
        for row in found["ranked"]:
            memory, images = _shown(row["memory_bytes"], "bytes"), row["images_per_second"]
            fits = "fits" if row["fits"] else "does not fit"
            speed = f"{images[0]:,.0f} to {images[1]:,.0f} images/s"
            yield f"  {fits:12}  {memory} {row['memory_by']}  {speed}  {row['flags']}"
        yield f"best: {found['best'] or 'none of them fits: take a larger slice'}"
    for note in plan["notes"]:
        yield f"note: {note}"


def _shown(value: Any, unit: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return f"{_shown(value[0], unit)} to {_shown(value[1], unit)}"
    if unit in ("bytes", "bytes/s", "FLOP"):
        scale, prefix = next(
            ((s, p) for s, p in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if abs(value) >= s),
            (1e3, "k"),
        )
        return f"{value / scale:.3f} {prefix}{unit.replace('bytes', 'B')}"
    number = f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
    if isinstance(value, float) and abs(value) >= 1000:
        number = f"{value:,.0f}"
    return f"{number} {unit}".strip()
