r"""A page of runs, and figures: losses, samples over time, evaluations, what happened.

python -m dico_jax.report WORKDIR [WORKDIR2 ...] [--out=report.html]
    One file that needs no network. Without --out it is report.html in the first workdir.
python -m dico_jax.report --live WORKDIR [WORKDIR2 ...]
    Serves the page on this machine, and shows what is new while the run goes on.
python -m dico_jax.report figures WORKDIR [WORKDIR2 ...] --out=DIR
    FID, losses against compute and samples as PDF and PNG.

docs/report.md shows a page. Needs pip install 'dico_jax[report]'.
"""

import sys
from typing import Any

from absl import flags

from dico_jax import cli
from dico_jax.errors import UsageError
from dico_jax.reporting import missing

_RUNS = flags.DEFINE_multi_string("run", [], "Workdir of a run; it needs no name.")
_OUT = flags.DEFINE_string(
    "out", None, "HTML file [report.html in the first workdir]; folder of figures."
)
_RESULTS = flags.DEFINE_list(
    "results", [], "JSON files of `evaluate --out`; those in a workdir are found."
)
_LIVE = flags.DEFINE_bool("live", False, "Serve the page and keep it new, until ^C.")
_PORT = flags.DEFINE_integer(
    "port", 8008, "--live: port of 127.0.0.1; 0: one that is free.", 0, 65535
)
flags.adopt_module_key_flags(cli)  # so that --help shows them


def main() -> None:
    """Reads runs; writes or serves the page, or draws the figures."""
    paths = _RUNS.value
    drawn = paths[:1] == ["figures"]
    if not paths[drawn:]:
        raise UsageError("what to report is missing: python -m dico_jax.report WORKDIR")
    if fix := missing(*(("matplotlib",) if drawn else ("bokeh", "jinja2"))):
        raise UsageError(f"a report {fix}")
    # Late imports: --help answers before NumPy and bokeh are there.
    from dico_jax.files import check_new, result_path
    from dico_jax.reporting.runs import find_workdir, read_runs

    folders = [find_workdir(path) for path in paths[drawn:]]
    if _LIVE.value:
        from dico_jax.reporting.live import serve

        if drawn or _OUT.value is not None:
            raise UsageError("--live serves a page: give no figures and no --out")
        return serve(folders, _RESULTS.value, _PORT.value)
    out: Any = _OUT.value
    if drawn and out is None:
        raise UsageError("figures needs --out: name a folder")
    if drawn:
        check_new(out, 0, exists=True)
    else:
        out = result_path(str(out or folders[0] / "report.html"), ".html", exists=True)
    runs, notes = read_runs(folders, _RESULTS.value)
    for text in [*notes, *(f"{run.name}: {note}" for run in runs for note in run.notes)]:
        print(f"warning: {text}", file=sys.stderr)
    if not runs:
        raise UsageError(notes[0])
    if drawn:
        from dico_jax.reporting.figures import draw

        print(*draw(runs, out), sep="\n")
        return
    from dico_jax.reporting.page import write_page

    print(write_page(runs, notes, out))


if __name__ == "__main__":
    cli.name_arguments("run")
    cli.run(main)
