"""The page of checkpoints in gradio, and what serves it."""

import errno
import os
import pathlib
import random
import re
import socket
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import fastapi
import gradio as gr
import uvicorn

from dico_jax.errors import TrainingStopped, UsageError
from dico_jax.playground import pictures
from dico_jax.playground.player import MODES, SETTINGS, Player, Values

_CSS = pathlib.Path(__file__).with_name("page.css")
_HINT = "Make shows pictures here, which become clear while they are made."
_LONGEST_QUEUE = 64
_MOST_BYTES, _MOST_READ = 1 << 16, 1 << 24  # of a request; those of the page have some hundreds
# gradio's ways to files and other servers.
_CLOSED = re.compile("/(upload|file=|proxy=|stream|deep_link|openapi)")
# What controls are called: of a mode but "walk", of that one, and of the end of a walk.
_LABELS = {
    "classes": ("Classes (none: all in turn)", "From class", "To class"),
    "prompts": ("Prompt", "From prompt", "To prompt"),
}
_SETTINGS = dict(zip(SETTINGS, ("Checkpoint", "Guidance scale", "Solver", "Steps"), strict=True))


def make_page(player: Player, title: str) -> gr.Blocks:
    """The page: controls on the left, what they make on the right."""
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.Markdown(f"# {title}", sanitize_html=True)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                controls, buttons = _controls(player)
            with gr.Column(scale=5, min_width=300):
                shown = gr.HTML(pictures.page([], _HINT), elem_id="shown", show_label=False)
        linked = gr.State(None)  # what is to be said of an address that asks for pictures
        _connect(player, page, controls, buttons, shown, linked)
    return page


def _controls(player: Player) -> tuple[dict[str, Any], dict[str, gr.Button]]:
    first, most = player.first, max(2, player.most)

    def slider(low: int, name: str, label: str) -> gr.Slider:
        return gr.Slider(low, most, first[name], step=1, label=label, elem_id=name)

    def number(name: str, label: str) -> gr.Number:
        return gr.Number(first[name], label=label, precision=0, elem_id=name)

    names = [mode.capitalize() for mode in MODES]
    mode = gr.Radio(names, value=names[MODES.index(first["do"])], label="What", elem_id="do")
    found: dict[str, Any] = {
        "do": mode,
        "told": _told(player, "told", first),
        "number": slider(1, "number", "Pictures"),
        "seed": number("seed", "Seed"),
    }
    with gr.Row():
        how: Any = {"make": {"variant": "primary"}}
        named = {"make": "Make", "again": "New seed", "stop": "Stop"}
        buttons = {
            name: gr.Button(label, elem_id=name, min_width=80, **how.get(name, {}))
            for name, label in named.items()
        }
    found |= _settings(player, "")
    with gr.Group(visible=first["do"] == "compare") as compare:
        gr.Markdown("**Beside it**, from the same noise", elem_classes="beside")
        found |= _settings(player, "_2")
    with gr.Group(visible=first["do"] == "walk") as walk:
        found["to"] = _told(player, "to", first)
        found["to_seed"] = number("to_seed", "To seed")
        found["frames"] = slider(2, "frames", "Pictures on the way")

    def show(chosen: str) -> list[Any]:
        visible = chosen == "Compare", chosen == "Walk", chosen != "Walk"
        label = gr.update(label=_LABELS[player.asked_by][chosen == "Walk"])
        return [*(gr.update(visible=v) for v in visible), label]

    changed = [compare, walk, found["number"], found["told"]]
    mode.change(show, mode, changed, queue=False, api_visibility="private")
    return found, buttons


def _told(player: Player, name: str, first: Values) -> Any:
    several = name == "told"
    label = _LABELS[player.asked_by][0 if several else 2]
    how: Any = {"value": first[name], "label": label, "elem_id": name}
    if player.asked_by == "prompts":
        return gr.Textbox(lines=2, max_lines=6, **how)
    return gr.Dropdown(player.choices, multiselect=several, filterable=True, **how)


def _settings(player: Player, end: str) -> dict[str, Any]:
    first, names, found = player.first, [*player.samplers], {}
    kinds: dict[str, Callable[..., Any]] = {
        "checkpoint": lambda **how: gr.Dropdown(names, visible=len(names) > 1, **how),
        "cfg_scale": lambda **how: gr.Slider(0, player.most_scale, step=0.05, **how),
        "solver": lambda **how: gr.Dropdown(player.solvers, **how),
        "steps": lambda **how: gr.Slider(1, player.most_steps, step=1, **how),
    }
    for name in SETTINGS:
        how = {"value": first[name + end], "label": _SETTINGS[name], "elem_id": name + end}
        found[name + end] = kinds[name](**how)
    return found


def _connect(player, page, controls, buttons, shown, linked) -> None:
    names, inputs = [*controls], [*controls.values()]

    def values_of(given: Any) -> Values:
        values = dict(zip(names, given, strict=True))
        return values | {"do": str(values["do"]).lower()}

    def make(*given: Any) -> Iterator[str]:
        yield from _said(player, values_of(given))

    def make_linked(note: str | None, *given: Any) -> Iterator[Any]:
        if note is None:  # the address asks for nothing
            yield gr.skip()
        else:
            above = pictures.wrong(note) if note else ""
            yield from (above + html for html in _said(player, values_of(given)))

    def read_link(request: gr.Request) -> list[Any]:
        query = dict(request.query_params)
        if not player.first.keys() & query.keys():
            return [gr.skip()] * (len(names) + 2)  # what a hand has done meanwhile stays
        try:
            values, note = player.from_link(query)
        except UsageError as error:
            said = pictures.wrong(f"This address cannot be used: {error}")
            return [*[gr.skip()] * len(names), None, said]
        mode = str(values["do"]).capitalize()
        return [mode, *(values[name] for name in names[1:]), note, gr.skip()]

    # One at a time, in the order of the clicks: the device has room for one.
    one: Any = {"concurrency_id": "device", "concurrency_limit": 1, "show_progress": "hidden"}
    one |= {"api_visibility": "private"}
    free: Any = {"queue": False, "api_visibility": "private"}
    events = [buttons["make"].click(make, inputs, shown, **one)]
    if player.asked_by == "prompts":
        events += [controls[name].submit(make, inputs, shown, **one) for name in ("told", "to")]
    other = buttons["again"].click(lambda: random.randrange(2**31), None, controls["seed"], **free)
    events.append(other.then(make, inputs, shown, **one))
    found = page.load(read_link, None, [*inputs, linked, shown], **free)
    events.append(found.then(make_linked, [linked, *inputs], shown, **one))
    buttons["stop"].click(None, cancels=events, **free)


def _said(player: Player, values: Values) -> Iterator[str]:
    """The pictures, or what is wrong: a page stays whatever it is asked for."""
    try:
        yield from player.stream(values)
    except (UsageError, TrainingStopped) as error:
        yield pictures.wrong(str(error))
    except Exception as error:
        if re.search("(?i)RESOURCE_EXHAUSTED|out of memory", str(error)):
            yield pictures.wrong("The memory does not suffice: ask for fewer pictures at once.")
        else:
            traceback.print_exc()
            yield pictures.wrong(f"{type(error).__name__}: the terminal of the page says more.")


class _SmallRequests:
    """Refuses what no page of ours sends: files, other servers' addresses, long bodies."""

    def __init__(self, app: Any):
        self._app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if _CLOSED.search(scope["path"]):
            return await _refuse(send, 404)
        if not length.isdigit() or int(length) > _MOST_BYTES:
            read = 0
            while read < _MOST_READ and (message := await receive()).get("more_body"):
                read += len(message["body"])  # so that who still sends gets an answer
            return await _refuse(send, 413)
        left = _MOST_BYTES

        async def counted():
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            return message if left >= 0 else {"type": "http.disconnect"}

        await self._app(scope, counted, send)


async def _refuse(send, status: int) -> None:
    kind = [(b"content-type", b"text/plain"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": kind})
    await send({"type": "http.response.body", "body": b"refused\n"})


def serve(player: Player, title: str, host: str, port: int) -> None:
    """Serves until ^C; UsageError where the port or the address is not to be had."""
    try:
        made = socket.create_server((host, port), family=_family(host), backlog=128)
    except (OSError, UnicodeError) as error:
        number = getattr(error, "errno", None) or -1
        if number < 0 or number == errno.EADDRNOTAVAIL:  # below 0: of a name that is none
            fix = "is no address of this machine: use 127.0.0.1, or 0.0.0.0 for all of them"
            raise UsageError("--host", host, fix) from error
        fix = f"cannot be used on {host} ({os.strerror(number)}): give another, or 0 for a free one"
        raise UsageError("--port", port, fix) from error
    page = make_page(player, title)
    page.queue(max_size=_LONGEST_QUEUE, default_concurrency_limit=1, api_open=False)
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_SmallRequests)
    fonts = ["system-ui", "sans-serif"]
    theme = gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"])
    how: Any = {"ssr_mode": False, "footer_links": [], "max_file_size": 1, "show_error": True}
    how |= {"theme": theme, "css_paths": [_CSS], "run_history": False}
    app = gr.mount_gradio_app(app, page, path="/", **how)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    config_of = made.getsockname()[:2]
    alone = "this machine alone can see it" if host in ("127.0.0.1", "::1", "localhost") else (
        "whoever reaches this machine can see it"
    )  # fmt: skip
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{config_of[1]}/ until ^C; {alone}", flush=True)
    uvicorn.Server(config).run(sockets=[made])


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
