"""What a run needs and takes on devices that are not here; what `python -m dico_jax.plan` prints.

Every figure says where it comes from: "compiled" by the compiler of those devices, "analytic" from
sizes and data sheets, or "measured" by a run.
"""

import functools
from typing import Any


def _figure(by: str, value: Any, unit: str = "") -> dict[str, Any]:
    return {"value": value, "unit": unit, "by": by}


analytic, compiled, measured = (
    functools.partial(_figure, by) for by in ("analytic", "compiled", "measured")
)
