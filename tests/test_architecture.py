"""docs/architecture.md tells the truth about which room may import which."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_rooms_import_only_rooms_below_them():
    text = (ROOT / "docs" / "architecture.md").read_text()
    listing = text.split("dico_jax/\n", 1)[1].split("\nconfigs/ ", 1)[0]
    # A line may name several modules of one room, and its explanation some more of the same room.
    rank = {}
    for number, line in enumerate(listing.splitlines()):
        for name in re.findall(r"\b(\w+)(?:\.py|/)", line):
            rank.setdefault(name, number)
    entries = {p for p in (ROOT / "dico_jax").iterdir() if p.is_dir() or p.suffix == ".py"}
    rooms = {p.stem for p in entries if not p.name.startswith("_")}
    assert rooms <= set(rank), rooms - set(rank)
    for file in (ROOT / "dico_jax").rglob("*.py"):
        room = file.relative_to(ROOT / "dico_jax").parts[0].removesuffix(".py")
        for used in re.findall(r"^\s*from dico_jax\.(\w+)", file.read_text(), re.MULTILINE):
            if not room.startswith("__") and used != room:
                assert rank[used] > rank[room], f"{file}: {used}"
