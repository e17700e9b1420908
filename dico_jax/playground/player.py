"""What the page of checkpoints makes: pictures as HTML, and links that make them again.

It knows no server. Values are those of the page's controls, by name, whoever sent them.
"""

import dataclasses
import itertools
import math
import os
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dico_jax.config import check_whole
from dico_jax.diffusion.solvers import SOLVERS
from dico_jax.errors import UsageError, one_line
from dico_jax.experiment import sampling_from_config
from dico_jax.models.class_names import ClassNames
from dico_jax.playground import pictures
from dico_jax.sampling.programs import steps_at_a_time
from dico_jax.sampling.sampler import Images, Sampler

Values = dict[str, Any]

MODES = "make", "compare", "walk"
SETTINGS = "checkpoint", "cfg_scale", "solver", "steps"
MOST_STEPS, MOST_SCALE = 250, 20.0
_LONGEST = 2000  # characters of a prompt
_PREVIEWS = 5  # of a picture at least, also where the steps that are left compile once more
_SEEDS = 2**32 - 1
_OF_MODES = {
    "make": ("number",),
    "compare": ("number", *(f"{name}_2" for name in SETTINGS)),
    "walk": ("frames", "to", "to_seed"),
}


@dataclasses.dataclass
class _Column:
    """Pictures of one checkpoint and settings while they are made."""

    title: str
    count: int  # steps
    parts: Iterator[tuple[int, Images]]
    captions: list[str]
    about: list[Values]  # of each picture
    done: int = 0
    images: Any = None

    def look(self) -> bool:
        """Waits for what is next; whether there was something."""
        if found := next(self.parts, None):
            self.done, self.images = found
        return found is not None

    def html(self) -> str:
        """The column as it is now."""
        about = self.about if self.done == self.count else None
        return pictures.column(self.title, self.done, self.count, self.images, self.captions, about)


class Player:
    """The checkpoints of a page.

    Attributes:
      asked_by: "classes" or "prompts", what all of them are told.
      choices: the classes, each as (its number and name, its number).
      solvers: those that fit a checkpoint.
      first: what the page's controls show at first.
    """

    def __init__(
        self,
        samplers: Mapping[str, Sampler],
        most: int,
        seed: int = 0,
        classes: str = "all",
        prompts: str = "",
    ):
        """Of checkpoints by name; `most` pictures at once; the others are what is shown at first.

        Raises:
          UsageError: the checkpoints are told different things, or none of them that.
        """
        self.samplers, self.most = samplers, most
        name, sampler = next(iter(samplers.items()))
        model = sampler.pretrained.experiment.model
        self.asked_by = model.asked_by
        for other, its in samplers.items():
            if its.pretrained.experiment.model.asked_by != self.asked_by:
                raise UsageError("--ckpt", other, f"is not told {self.asked_by}, as {name} is")
            if its.classes != sampler.classes:
                raise UsageError("--ckpt", other, f"has other classes than {name}")
        self.choices: list[tuple[str, int]] = []
        if self.asked_by == "classes":
            self._names = ClassNames(model.num_classes, sampler.pretrained.class_names)
            titles = enumerate(map(self._names.title, range(model.num_classes)))
            self.choices = [(t if t == str(n) else f"{n} {t}", n) for n, t in titles]
        self._fitting = {n: [s for s in SOLVERS if _fits(s, x)] for n, x in samplers.items()}
        self.solvers = [s for s in SOLVERS if any(s in fit for fit in self._fitting.values())]
        options = {n: x.pretrained.config.sampling for n, x in samplers.items()}
        own = [(n, o.cfg_scale, o.sampler, o.num_steps) for n, o in options.items()]
        self.most_scale = max(MOST_SCALE, *(o.cfg_scale for o in options.values()))
        self.most_steps = max(MOST_STEPS, *(o.num_steps for o in options.values()))
        self.first: Values = {
            "do": "make",
            "told": self._first_told(classes, prompts),
            "number": min(most, len(self.choices) or 4, 10),
            "seed": seed,
            **dict(zip(SETTINGS, own[0], strict=True)),
            **dict(zip((f"{s}_2" for s in SETTINGS), own[-1], strict=True)),
            "frames": min(most, 10),
            "to": len(self.choices) - 1 if self.choices else "",
            "to_seed": 1,
        }

    def _first_told(self, classes: str, prompts: str) -> Any:
        given = {"classes": classes if classes != "all" else "", "prompts": prompts}
        asked = given.pop(self.asked_by)
        for flag, value in given.items():
            if value:
                raise UsageError(f"--{flag}", value, f": use --{self.asked_by} of this checkpoint")
        if self.asked_by == "prompts":
            return asked
        if asked == "random":
            raise UsageError("--classes", asked, "is for sample: name some, or all")
        return self._names.numbers(asked) if asked else []

    def names(self, mode: str) -> list[str]:
        """The controls that decide what a mode makes."""
        return ["told", "seed", *SETTINGS, *_OF_MODES[mode]]

    def checked(self, values: Mapping[str, Any]) -> Values:
        """What decides, as it is to be; UsageError with the name of a control for what is not."""
        mode = _one_of("do", values.get("do"), MODES)
        found = {"do": mode} | {n: self._value(n, values.get(n)) for n in self.names(mode)}
        for end in ("", "_2") if mode == "compare" else ("",):
            name, solver = found[f"checkpoint{end}"], found[f"solver{end}"]
            if solver not in (fit := self._fitting[name]):
                fix = f"is not for {name}: use one of {', '.join(fit)}"
                raise UsageError(f"solver{end}", solver, fix)
            asked = {kind: found[f"{kind}{end}"] for kind in ("cfg_scale", "solver", "steps")}
            try:
                self.samplers[name].check(**asked)
            except UsageError as error:
                error.field += end
                raise
        return found

    def _value(self, name: str, value: Any) -> Any:
        kind = name.removesuffix("_2")
        if name in ("told", "to"):
            return self._told(name, value)
        if kind == "checkpoint":
            return _one_of(name, value, [*self.samplers])
        if kind == "solver":
            return _one_of(name, value, self.solvers)
        right = isinstance(value, int | float) and not isinstance(value, bool)
        if not right or not -(2**53) < value < 2**53:  # which NaN is not, either
            raise UsageError(name, one_line(value)[:40], "must be a number")
        if kind == "cfg_scale":
            if not 0 <= value <= self.most_scale:
                raise UsageError(name, value, f"must be from 0 to {self.most_scale:g}")
            return float(value)
        most = {"number": self.most, "frames": max(2, self.most), "steps": self.most_steps}
        low, high = (1 + (kind == "frames"), most[kind]) if kind in most else (0, _SEEDS)
        whole = int(value) if value == int(value) else value
        check_whole(name, whole, low, high)
        return whole

    def _told(self, name: str, value: Any) -> Any:
        if self.asked_by == "prompts":
            if not isinstance(value, str) or not (text := " ".join(value.split())):
                raise UsageError("the prompt is empty: write what the pictures are to show")
            if len(text) > _LONGEST:
                raise UsageError(f"the prompt has {len(text):,} characters: at most {_LONGEST:,}")
            return text
        numbers = value if isinstance(value, list) else [value]
        if len(numbers) > len(self.choices):
            raise UsageError(name, f"{len(numbers)} classes", "has some more than once")
        for number in numbers:
            check_whole(name, number, 0, len(self.choices) - 1)
        return numbers if name == "told" else numbers[0]

    def link(self, values: Mapping[str, Any]) -> str:
        """The query of an address that makes the same pictures, "?...", of checked values."""
        used = [values["checkpoint"], values.get("checkpoint_2", values["checkpoint"])]
        digests = [self._digest(name) for name in dict.fromkeys(used)]
        query = {**values, "weights": ".".join(digests)}
        if isinstance(query["told"], list):
            query["told"] = ",".join(map(str, query["told"]))
        return "?" + urllib.parse.urlencode(query)

    def _digest(self, checkpoint: str) -> str:
        return self.samplers[checkpoint].pretrained.settings["weights_digest"][:8]

    def from_link(self, query: Mapping[str, str]) -> tuple[Values, str]:
        """The controls of an address, and what is to be said of it; UsageError for a wrong one."""
        found: Values = {}
        for name in self.first.keys() & query.keys():
            text = query[name]
            if name in ("do", "told", "to", "solver", "solver_2", "checkpoint", "checkpoint_2"):
                found[name] = text
            else:
                found[name] = _number(name, text)
            if name in ("told", "to") and self.choices:
                numbers = [_number(name, part) for part in text.split(",") if part]
                found[name] = numbers if name == "told" else next(iter(numbers), None)
        values = self.first | found
        asked, note = self.checked(values), ""
        known = urllib.parse.parse_qs(self.link(asked)[1:])["weights"][0]
        if query.get("weights", known) != known:
            note = "The address was made with other weights than these: so are the pictures."
        return values | asked, note

    def stream(self, values: Mapping[str, Any]) -> Iterator[str]:
        """Makes what is asked for; HTML of all of it, again and again while it becomes clearer."""
        asked, started = self.checked(values), time.monotonic()
        columns = self._columns(asked)
        yield pictures.page(
            [one.html() for one in columns], "Started: what is asked for first compiles."
        )
        for which in itertools.cycle(range(len(columns))):
            columns[which].look()
            if all(column.done == column.count for column in columns):
                break
            if which == len(columns) - 1:
                yield pictures.page([one.html() for one in columns], "")
        said = f"{time.monotonic() - started:.1f} s."
        above = pictures.slider(columns[0].images) if asked["do"] == "walk" else ""
        yield pictures.page([one.html() for one in columns], said, self.link(asked), above)

    def _columns(self, asked: Values) -> list[_Column]:
        if asked["do"] != "compare":
            return [self._column(asked, [asked[name] for name in SETTINGS], "")]
        both = [[asked[f"{name}{end}"] for name in SETTINGS] for end in ("", "_2")]
        differ = [len({str(value) for value in pair}) > 1 for pair in zip(*both, strict=True)]
        titles = [", ".join(f"{n} {v}" for n, v, d in zip(SETTINGS, of, differ, strict=True) if d)
                  for of in both]  # fmt: skip
        return [
            self._column(asked, of, t or "the same") for of, t in zip(both, titles, strict=True)
        ]

    def _column(self, asked: Values, settings: Sequence[Any], title: str) -> _Column:
        name, scale, solver, steps = settings
        walks, told, seed = asked["do"] == "walk", asked["told"], asked["seed"]
        sampler, count = self.samplers[name], asked["frames" if walks else "number"]
        how: Any = {"cfg_scale": scale, "steps": steps, "solver": solver}
        every = min(steps_at_a_time(steps), math.ceil(steps / _PREVIEWS))
        how |= {"every": every, "num_images": count}
        if walks:
            start = (told or [0])[0] if self.choices else told
            ends: Any = {"seeds": (seed, asked["to_seed"])}
            parts = sampler.walk(start, asked["to"], **ends, **how)
            named = [self.title(start), *[""] * (count - 2), self.title(asked["to"])]
        else:
            how |= {"seed": seed, self.asked_by: told or "all"}
            parts = sampler.stream(**how)
            cycle = (told or range(len(self.choices))) if self.choices else [told]
            named = [self.title(cycle[i % len(cycle)]) for i in range(count)]
        about: list[Values] = []
        for i, of in enumerate(named):
            about.append(self._about(name, scale, solver, steps))
            if walks:
                about[i]["walk"] = {
                    **ends,
                    "from": start,
                    "to": asked["to"],
                    "share": i / (count - 1),
                }
            else:
                about[i] |= {"seed": seed, "image": i, "of": of}
        return _Column(title, steps, parts, named, about)

    def _about(self, name: str, scale: float, solver: str, steps: int) -> Values:
        """What a PNG file says of its weights and settings; it names no folder of this machine."""
        pretrained = self.samplers[name].pretrained
        options = pretrained.config.sampling.to_dict()
        options |= {"cfg_scale": scale, "sampler": solver, "num_steps": steps}
        options = {k: v for k, v in options.items() if k != "batch_size" and "grid" not in k}
        common = {k: pretrained.settings[k] for k in ("step", "weights", "weights_digest")}
        return {"checkpoint": name, **common, "sampling": options}

    def title(self, told: Any) -> str:
        """What a class or a prompt is called below its picture."""
        return self._names.title(told) if self.choices else told


def checkpoint_names(sources: Sequence[str]) -> list[str]:
    """Short names of checkpoints, each another, as no page needs to know folders."""
    names: list[str] = []
    for source in sources:
        plain = name = os.path.basename(source.rstrip("/")) or source
        for number in itertools.count(2):
            if name not in names:
                break
            name = f"{plain} ({number})"
        names.append(name)
    return names


def _fits(solver: str, sampler: Sampler) -> bool:
    config = sampler.pretrained.config.copy_and_resolve_references()
    config.sampling.update(sampler=solver, num_steps=4, ddim_eta=0.0, spacing="linear")
    try:
        sampling_from_config(config)
    except UsageError:
        return False
    return True


def _one_of(name: str, value: Any, choices: Sequence[str]) -> str:
    if value not in choices:
        said = one_line(value)[:80]
        raise UsageError(name, said, f"is unknown: use one of {', '.join(choices)}")
    return value


def _number(name: str, text: str) -> int | float:
    try:
        return int(text) if text.strip().isdecimal() else float(text)
    except ValueError:
        raise UsageError(name, text[:80], "must be a number") from None
