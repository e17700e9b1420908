"""The page of a run, and figures of runs: reading workdirs, curves, the page, figures."""

import importlib.util
from typing import Any

from dico_jax.errors import one_line


def report_at_end(workdir: Any) -> str:
    """Writes WORKDIR/report.html for a run that is done; the line to say. It never fails."""
    how = f"python -m dico_jax.report {workdir}"
    if importlib.util.find_spec("bokeh") is None:
        return f"a page of this run: pip install 'dico_jax[report]', then {how}"
    try:
        from dico_jax.files import as_path
        from dico_jax.reporting.page import write_page  # late: bokeh is an extra
        from dico_jax.reporting.runs import read_runs

        folder = as_path(workdir)
        return write_page(*read_runs([folder]), folder / "report.html")
    except Exception as error:  # a full disk, say: the run itself is done
        return f"warning: no report was written ({one_line(error)}): {how}"
