"""The page of a run, and figures of runs: reading workdirs, curves, the page, figures."""

import importlib.util
import shlex
import sys
from typing import Any

from dico_jax.errors import one_line


def missing(*packages: str) -> str:
    """What a report needs and is not installed, in words; "" where all is there."""
    names = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"needs {' and '.join(names)}: pip install 'dico_jax[report]'" if names else ""


def page_at_end(workdir: Any) -> str:
    """Writes WORKDIR/report.html; where it is, or the command for it where that fails."""
    command, out = f"python -m dico_jax.report {shlex.quote(str(workdir))}", workdir / "report.html"
    if fix := missing("bokeh", "jinja2"):
        return f"{command} ({fix})"
    print("writing the page of the run ...", flush=True)
    try:
        from dico_jax.reporting.page import write_page
        from dico_jax.reporting.runs import read_runs

        write_page(*read_runs([workdir]), out)
    except Exception as error:  # of many classes; the run itself has ended well
        print(f"warning: {out} is not written ({one_line(error)})", file=sys.stderr)
        return command
    return str(out)
