"""The house rules: prints the package's size and exits with 1 where a bar is passed.

python .ci/house.py [ROOT]

Not counted: dico_jax/configs, a link to configs/, whose files are experiments and no code.
"""

import os
import pathlib
import sys

BARS = {
    "lines of dico_jax/": 27_400,  # 15,000, then text, solvers, buckets, plans, pages, evidence
    "lines of the longest file": 400,
    "files": 178,
    "modules at the top": 18,
}


def measure(package: pathlib.Path) -> tuple[dict[str, int], list[str]]:
    """The numbers that `BARS` limits, and which files are longer than one may be."""
    lines = {}
    for folder, _, names in os.walk(package):  # which does not go into links
        for name in names:
            if name.endswith(".py"):
                file = pathlib.Path(folder, name)
                lines[file] = file.read_bytes().count(b"\n")
    longest = BARS["lines of the longest file"]
    counts = (
        sum(lines.values()),
        max(lines.values()),
        len(lines),
        sum(f.parent == package and not f.name.startswith("__") for f in lines),
    )
    long = [f"{f.relative_to(package.parent)}: {n}" for f, n in lines.items() if n > longest]
    return dict(zip(BARS, counts, strict=True)), sorted(long)


def main(root: pathlib.Path) -> int:
    """Prints the numbers beside their bars; the exit status."""
    found, long = measure(root / "dico_jax")
    for name, bar in BARS.items():
        passed = "" if found[name] <= bar else " PASSED"
        print(f"{name}: {found[name]:,} (at most {bar:,}){passed}")
    for line in long:
        print(f"  {line}")
    return int(any(found[name] > bar for name, bar in BARS.items()))


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(*(sys.argv[1:] or [pathlib.Path(__file__).parents[1]]))))
