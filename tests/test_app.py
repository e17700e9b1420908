"""The page of checkpoints: what it makes, what it refuses, and what serves it."""

import base64
import concurrent.futures
import contextlib
import functools
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import pytest
from PIL import Image

from dico_jax.errors import UsageError
from dico_jax.playground import pictures
from dico_jax.playground.player import MODES, Player, checkpoint_names
from dico_jax.sampling.sampler import Sampler
from tests.commands import ROOT, assert_refused, call
from tests.test_sampler import NAMES, write_checkpoint


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two networks of the same classes."""
    root = tmp_path_factory.mktemp("made")
    return write_checkpoint(root / "one"), write_checkpoint(root / "two", hidden_size=4)


@pytest.fixture(scope="module")
def player(checkpoints):
    return Player({path.name: Sampler.from_pretrained(path) for path in checkpoints}, most=6)


def made(player, **values):
    """The last of what a page shows."""
    return list(player.stream(player.first | values))[-1]


def files_in(html):
    """The PNG files of a page, as their texts and their pixels."""
    found = re.findall(r'<figure><img src="data:image/png;base64,([^"]+)', html)
    opened = [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]
    return [image.text for image in opened], np.array([np.asarray(image) for image in opened])


def test_pictures_become_those_of_the_sampler(player):
    values = player.first | {"told": [3, 7], "number": 3, "seed": 5, "steps": 20, "cfg_scale": 2.0}
    shown = list(player.stream(values))
    assert "compiles" in shown[0]
    assert [re.findall(r"step (\d+) of 20", html) for html in shown[1:-1]] == [
        [str(step)] for step in range(2, 20, 2)
    ]
    assert all("data:image/webp" in html for html in shown[1:-1])
    texts, images = files_in(shown[-1])
    asked = {"seed": 5, "num_images": 3, "steps": 20, "cfg_scale": 2.0}
    of_sampler = player.samplers["one"](classes=[3, 7], **asked)[..., 0]
    assert np.abs(images.astype(int) - of_sampler).max() <= 1
    about = [json.loads(text[pictures.KEY]) for text in texts]
    assert [(a["seed"], a["image"], a["of"]) for a in about] == [
        (5, 0, "kind 3"), (5, 1, "kind 7"), (5, 2, "kind 3")
    ]  # fmt: skip
    assert about[0]["checkpoint"] == "one"
    assert (
        about[0]["weights_digest"] == player.samplers["one"].pretrained.settings["weights_digest"]
    )
    assert about[0]["sampling"]["num_steps"] == 20
    assert "/" not in texts[0][pictures.KEY]  # no folder of the machine
    assert re.findall(r"<span>(.*?)</span>", shown[-1]) == ["kind 3", "kind 7", "kind 3"]


@pytest.mark.parametrize(("steps", "looks"), [(16, range(1, 16)), (17, (4, 8, 12, 16))])
def test_pictures_are_seen_becoming_whatever_the_steps(player, steps, looks):
    """Also where no small number divides these."""
    shown = list(player.stream(player.first | {"told": [3], "number": 1, "steps": steps}))
    found = [re.findall(r"step (\d+) of", html) for html in shown[1:-1]]
    assert found == [[str(step)] for step in looks]


def test_a_kept_file_says_how_it_was_made(player, tmp_path):
    html = made(player, told=[3], number=1)
    data = re.search('src="data:image/png;base64,([^"]+)', html)[1]
    (tmp_path / "one.png").write_bytes(base64.b64decode(data))
    done = call("dico_jax.show", tmp_path / "one.png")
    assert done.returncode == 0
    assert '"checkpoint": "one"' in done.stdout
    assert '"seed": 0' in done.stdout


def test_checkpoints_side_by_side_start_from_the_same_noise(player):
    asked = {"do": "compare", "number": 2, "checkpoint_2": "one"}
    _, images = files_in(made(player, **asked))
    np.testing.assert_array_equal(images[:2], images[2:])
    html = made(player, **asked, cfg_scale_2=5.0)
    assert re.findall("<h3>(.*?)</h3>", html) == ["cfg_scale 2.0", "cfg_scale 5.0"]
    _, others = files_in(html)
    np.testing.assert_array_equal(images[:2], others[:2])
    assert (others[2:] != images[2:]).any()
    # Of other checkpoints and numbers of steps, each to its end.
    html = made(player, **asked | {"checkpoint_2": "two", "steps_2": 7})
    assert re.findall("<h3>(.*?)</h3>", html) == [
        "checkpoint one, steps 3",
        "checkpoint two, steps 7",
    ]
    texts, _ = files_in(html)
    assert [json.loads(t[pictures.KEY])["checkpoint"] for t in texts] == ["one"] * 2 + ["two"] * 2


def test_a_walk_has_the_pictures_of_its_ends(player):
    html = made(player, do="walk", told=[2], seed=4, to=5, to_seed=9, frames=4)
    texts, images = files_in(html)
    ends = [player.samplers["one"]([of], seed=seed)[0, ..., 0] for of, seed in ((2, 4), (5, 9))]
    assert np.abs(images[[0, -1]].astype(int) - ends).max() <= 1
    assert [json.loads(t[pictures.KEY])["walk"]["share"] for t in texts] == [0, 1 / 3, 2 / 3, 1]
    assert 'type="range"' in html


@pytest.mark.parametrize("mode", MODES)
def test_a_link_makes_the_same_pictures(player, mode):
    more = {"do": mode, "told": [1, 4], "number": 2, "seed": 3, "to": 7, "frames": 3, "steps": 5}
    values = player.first | more | {"cfg_scale": 1.5, "checkpoint_2": "two"}
    html = made(player, **values)
    link = re.search('class="again" href="([^"]+)"', html)[1].replace("&amp;", "&")
    query = dict(urllib.parse.parse_qsl(link[1:]))
    assert query["told"] == "1,4"
    again, note = player.from_link(query)
    assert note == ""
    assert player.checked(again) == player.checked(values)
    np.testing.assert_array_equal(files_in(made(player, **again))[1], files_in(html)[1])
    _, note = player.from_link(query | {"weights": "12345678"})
    assert "other weights" in note


WRONG = [
    ({"seed": -1}, "seed=-1 must be at least 0"),
    ({"seed": 2**32}, "seed=4294967296 must be at most"),
    ({"seed": 1.5}, "seed=1.5 must be"),
    ({"seed": None}, "seed='None' must be a number"),
    ({"seed": True}, "seed='True' must be"),
    ({"steps": float("nan")}, "steps='nan' must be a number"),
    ({"steps": 0}, "steps=0 must be at least 1"),
    ({"steps": 10**9}, "steps=1000000000 must be at most 250"),
    ({"number": 7}, "number=7 must be at most 6"),
    ({"cfg_scale": -0.5}, "cfg_scale=-0.5 must be from 0 to 20"),
    ({"cfg_scale": float("inf")}, "cfg_scale='inf' must be"),
    ({"cfg_scale": "2"}, "cfg_scale='2' must be a number"),
    ({"solver": "magic"}, "solver='magic' is unknown: use one of ddpm"),
    ({"solver": ["ddpm"]}, "is unknown"),
    ({"checkpoint": "/etc/passwd"}, "checkpoint='/etc/passwd' is unknown: use one of one, two"),
    ({"told": [10]}, "told=10 must be at most 9"),
    ({"told": ["3"]}, "told='3' must be"),
    ({"told": [0] * 99}, "99 classes"),
    ({"told": None}, "told=None must be"),
    ({"do": "fly"}, "do='fly' is unknown: use one of make, compare, walk"),
    ({"do": "walk", "to": None}, "to=None must be"),
    ({"do": "walk", "frames": 1}, "frames=1 must be at least 2"),
    ({"do": "compare", "steps_2": 0}, "steps_2=0 must be at least 1"),
]


@pytest.mark.parametrize(("values", "said"), WRONG)
def test_wrong_values_are_said(player, values, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        next(player.stream(player.first | values))


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"seed": "x"}, "seed='x' must be a number"),
        ({"steps": "9" * 4000}, "steps='9999"),
        ({"told": "1,x"}, "told='x' must be a number"),
        ({"told": "77"}, "told=77 must be at most 9"),
        ({"do": "walk", "to": ""}, "to=None must be"),
        ({"checkpoint": "../three"}, "checkpoint='../three' is unknown"),
    ],
)
def test_wrong_links_are_said(player, query, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        player.from_link(query)


def test_controls_of_another_mode_do_not_matter(player):
    assert "steps_2" not in player.checked(player.first | {"steps_2": 0})
    assert player.from_link({"frames": "1"})[0]["frames"] == 1


def test_prompts_in_place_of_classes(tmp_path):
    sizes = {"depth": (1, 1, 1, 1, 1), "text_length": 5, "text_width": 8, "pooled_width": 8,
             "text_layers": 1}  # fmt: skip
    sizes |= dict.fromkeys(("num_classes", "num_heads", "patch_size"))  # which it has none of
    path = write_checkpoint(tmp_path / "c", words="a one <b>", name="TextDiCo", **sizes)
    sampler = Sampler.from_pretrained(path)
    player = Player({"c": sampler}, most=4, prompts="a one")
    assert (player.choices, player.first["told"]) == ([], "a one")
    html = made(player, told="one  <b>", number=2)
    assert re.findall("<span>(.*?)</span>", html) == ["one &lt;b&gt;"] * 2
    _, images = files_in(html)
    wanted = sampler(prompts="one <b>", num_images=2)[..., 0]
    assert np.abs(images.astype(int) - wanted).max() <= 1
    _, walked = files_in(made(player, do="walk", told="a", to="one", to_seed=0, frames=3))
    ends = [sampler(prompts=text)[0, ..., 0] for text in ("a", "one")]
    assert np.abs(walked[[0, -1]].astype(int) - ends).max() <= 1
    link = made(player, told="a; one", number=1)
    assert len(files_in(link)[1]) == 1  # one text, whatever it says
    for told, said in (
        ("", "the prompt is empty"), (None, "is empty"), ("x" * 10**6, "1,000,000 characters"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            made(player, told=told)
    with pytest.raises(UsageError, match="^--classes=3: use --prompts"):
        Player({"c": sampler}, most=4, classes="3")


def test_checkpoints_of_one_page_are_told_the_same(checkpoints, tmp_path):
    one = Sampler.from_pretrained(checkpoints[0])
    other = Sampler.from_pretrained(write_checkpoint(tmp_path / "c", NAMES[::-1]))
    with pytest.raises(UsageError, match="^--ckpt=other has other classes than one"):
        Player({"one": one, "other": other}, most=4)
    first = Player({"one": one}, most=4, seed=3, classes="kind 2,7").first
    assert (first["seed"], first["told"], first["number"]) == (3, [2, 7], 4)
    with pytest.raises(UsageError, match="^--classes=random"):
        Player({"one": one}, most=4, classes="random")


def test_each_checkpoint_begins_with_its_own_solver_and_scale(checkpoints, tmp_path):
    how = {"two_times": True, "plain_ops": True, "learn_sigma": False}
    how["sections"] = {"diffusion": {"objective": "mean_flow"}}
    path = write_checkpoint(tmp_path / "mean", **how)
    mean, one = Sampler.from_pretrained(path), Sampler.from_pretrained(checkpoints[0])
    mean.pretrained.config.sampling.update(sampler="jump", num_steps=1, cfg_scale=25.0)
    player = Player({"mean": mean, "one": one}, most=4)
    assert (player.first["solver"], player.first["steps"], player.first["steps_2"]) == (
        "jump",
        1,
        3,
    )
    assert player.checked(player.first)["cfg_scale"] == 25
    both = player.checked(player.first | {"do": "compare"})
    assert (both["solver"], both["solver_2"], both["cfg_scale_2"]) == ("jump", "ddpm", 2)
    for wrong in ({"checkpoint": "one"}, {"do": "compare", "solver_2": "jump"}):
        with pytest.raises(UsageError, match="^solver.*='jump' is not for one: use one of ddpm"):
            player.checked(player.first | wrong)


def test_what_a_checkpoint_cannot_is_said_before_anything_is_made(checkpoints, tmp_path):
    short = {"diffusion": {"diffusion_steps": 30}}
    few = Sampler.from_pretrained(write_checkpoint(tmp_path / "few", sections=short))
    player = Player({"one": Sampler.from_pretrained(checkpoints[0]), "few": few}, most=4)
    asked = player.first | {"steps": 3, "steps_2": 31}
    assert player.checked(asked)["steps"] == 3
    with pytest.raises(UsageError, match="^steps_2=31: .*30"):
        next(player.stream(asked | {"do": "compare"}))


def test_names_of_checkpoints_are_short_and_each_another():
    sources = ["/a/run", "/b/run/", "hf://me/net", "run (2)", "/"]
    assert checkpoint_names(sources) == ["run", "run (2)", "net", "run (2) (2)", "/"]


# What serves it.


@contextlib.contextmanager
def served(*args):
    """The address of a page of a process of its own."""
    command = [sys.executable, "-m", "dico_jax.app", *map(str, args), "--port=0"]
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # by a shell, perhaps
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    signal.signal(signal.SIGINT, ignored)
    try:
        line = process.stdout.readline()
        assert line.startswith(("http://127.0.0.1:", "http://[::1]:")), line
        assert "this machine alone can see it" in line
        yield line.split()[0]
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def address(checkpoints):
    pytest.importorskip("gradio")
    with served(*(f"--ckpt={path}" for path in checkpoints), "--max_images=4") as found:
        yield found


def post(address, path, data, **headers):
    body = data if isinstance(data, bytes) else json.dumps(data).encode()
    headers = {"Content-Type": "application/json", **headers}
    request = urllib.request.Request(address + path, body, headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


@functools.cache
def parts_of(address):
    """Of the page the number of Make's function, and the names and values of its controls."""
    with urllib.request.urlopen(f"{address}config", timeout=60) as answer:
        config = json.load(answer)
    by_id = {part["id"]: part["props"] for part in config["components"]}
    make = next(n for n, part in by_id.items() if part.get("elem_id") == "make")
    for function in config["dependencies"]:
        if [make, "click"] in function["targets"] and function["outputs"]:
            inputs = [by_id[n] for n in function["inputs"]]
            return function["id"], {p["elem_id"]: p.get("value") for p in inputs}
    raise AssertionError("no button Make")


def asked(address, session, **values):
    """All that the page is sent of a click on Make, until it is done."""
    number, controls = parts_of(address)
    data = {"data": [*(controls | values).values()], "fn_index": number, "session_hash": session}
    post(address, "gradio_api/queue/join", data)
    query = f"{address}gradio_api/queue/data?session_hash={session}"
    found = []
    with urllib.request.urlopen(query, timeout=300) as stream:
        for line in stream:
            if line.startswith(b"data:"):
                found.append(json.loads(line[5:]))
                if found[-1]["msg"] in ("process_completed", "close_stream"):
                    return found
    return found


def test_ten_people_at_once_each_have_their_pictures(address, player):
    alone = asked(address, "alone", told=[3], number=1, seed=5)  # which compiles
    assert alone[-1]["success"], alone
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        people = [
            pool.submit(asked, address, f"person{i}", told=[i], number=1, seed=i) for i in range(10)
        ]
        found = [person.result() for person in people]
    for i, messages in enumerate(found):
        assert messages[-1]["success"], messages[-1]
        assert f"kind {i}" in json.dumps(messages)
    # Each in turn: the times of work do not overlap.
    assert {m["msg"] for messages in found for m in messages} >= {"estimation", "process_starts"}


def test_wrong_values_leave_the_page_up(address):
    for values, said in (({"seed": -1}, "seed=-1"), ({"seed": None}, "must be a number")):
        messages = asked(address, f"wrong{values['seed']}", **values)
        assert said in json.dumps(messages), messages
    # gradio's own checks: of a choice that is none, of a slider.
    for values in ({"checkpoint": "/etc"}, {"told": [99]}, {"number": 10**9}, {"told": "x" * 9000}):
        messages = asked(address, f"worse{next(iter(values))}", **values)
        assert not messages[-1]["success"]
    assert asked(address, "right", told=[3], number=1, seed=5)[-1]["success"]


def test_long_requests_and_files_are_refused(address):
    for path, data, status in (
        ("gradio_api/queue/join", b'{"data": ["' + b"x" * 2**20 + b'"]}', 413),
        ("gradio_api/upload", b"file", 404),
        ("gradio_api/file=/etc/passwd", None, 404),
        ("gradio_api/proxy=http://127.0.0.1/", None, 404),
        ("gradio_api/deep_link?session_hash=alone", None, 404),  # which keeps files
    ):
        request = urllib.request.Request(address + path, data)
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(request, timeout=60)
        assert error.value.code == status
    # A body that does not say its length: a part is read, and the connection is closed.
    host, port = re.findall(r"//(.*):(\d+)/", address)[0]
    with socket.create_connection((host, int(port)), timeout=60) as link:
        head = (
            "POST /gradio_api/queue/join HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        link.sendall(head.encode())
        with contextlib.suppress(ConnectionError):
            for _ in range(64):
                link.sendall(b"4000\r\n" + b"x" * 0x4000 + b"\r\n")
        with contextlib.suppress(ConnectionError):
            assert not link.recv(1000).startswith(b"HTTP/1.1 200")
    assert asked(address, "after", told=[3], number=1, seed=5)[-1]["success"]


def test_wrong_usage_of_the_command(checkpoints, tmp_path):
    pytest.importorskip("gradio")
    from dico_jax.playground import page

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = call("dico_jax.app", f"--ckpt={checkpoints[0]}", f"--port={port}")
        assert_refused(done, f"--port={port} cannot be used on 127.0.0.1")
    for host in ("no.such.invalid", "a..b", "192.0.2.1"):
        with pytest.raises(UsageError, match=f"^--host={host} is no address of this machine"):
            page.serve(None, "", host, 0)
    assert_refused(call("dico_jax.app"), "--ckpt is missing")
    assert_refused(call("dico_jax.app", f"--ckpt={tmp_path}/no"), "--ckpt=", "no such folder")
    assert_refused(call("dico_jax.app", "--ckpt="), "--ckpt= is empty")
    wrong = call("dico_jax.app", f"--ckpt={checkpoints[0]}", "--cfg_schedule=no")
    assert_refused(wrong, "cfg_schedule=", "is unknown")


def test_a_checkpoint_may_be_deleted_while_its_page_is_up(checkpoints, tmp_path):
    pytest.importorskip("gradio")
    path = shutil.copytree(checkpoints[0], tmp_path / "gone")
    with served(f"--ckpt={path}", "--host=::1") as address:
        assert address.startswith("http://[::1]:")
        shutil.rmtree(path)
        messages = asked(address, "after", told=[3], number=1)
        assert "kind 3" in json.dumps(messages[-1]), messages[-1]
