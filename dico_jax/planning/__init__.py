"""What a run needs and takes on devices that are not here; what `python -m dico_jax.plan` prints.

Every figure says where it comes from: "compiled" by the compiler of those devices, "analytic" from
sizes and data sheets, or "measured" by a run.
"""

from typing import Any


def analytic(value: Any, unit: str = "") -> dict[str, Any]:
    return {"value": value, "unit": unit, "by": "analytic"}


def compiled(value: Any, unit: str = "") -> dict[str, Any]:
    return {"value": value, "unit": unit, "by": "compiled"}


def measured(value: Any, unit: str = "") -> dict[str, Any]:
    return {"value": value, "unit": unit, "by": "measured"}
