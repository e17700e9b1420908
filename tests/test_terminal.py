"""Bars on a terminal and in a log."""

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from dico_jax import terminal
from dico_jax.terminal import Bar
from tests.commands import ROOT


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests set."""
    now = [1000.0]
    monkeypatch.setattr(terminal.time, "time", lambda: now[0])
    made = Bar.__init__

    def with_clock(self, *args, **how):
        made(self, *args, **how)
        self._time = lambda: now[0]
        self.start_t = self.last_print_t = now[0]

    monkeypatch.setattr(Bar, "__init__", with_clock)
    return now


def test_a_log_gets_a_line_now_and_then(capfd, clock):
    with Bar(total=100, desc="making", unit="image") as bar:
        for _ in range(100):
            clock[0] += 1.0
            bar.update(1)
            bar.write("something else")
    lines = capfd.readouterr().err.splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["making:", f"{n}%", f"{n}/100"] for n in (30, 60, 90, 100)
    ]
    assert "[00:30<01:10,  1.00image/s]" in lines[0]
    assert not any("\r" in line for line in lines)


def test_time_left_is_of_measured_steps_alone(capfd, clock):
    """What compiles counts for no rate, and nothing is said of the time left before."""
    with Bar(total=1001, unit="step", compiles=True) as bar:
        clock[0] += 100.0
        bar.set_postfix({"loss": "1.5"}, refresh=False)
        bar.update(1)
        for _ in range(40):
            clock[0] += 1.0
            bar.update(1)
        clock[0] += 500.0  # a grid
        bar.skip()
        clock[0] += 30.0
        bar.update(30)
    first, second, third, *_ = capfd.readouterr().err.splitlines()
    assert first == "0% 1/1001 [00:00<?, ?step/s, loss=1.5]"
    assert "31/1001 [00:30<16:10,  1.00step/s" in second
    assert "71/1001 " in third
    assert "<15:30,  1.00step/s" in third


def test_parts_move_the_bar_and_are_not_counted(capfd, clock):
    with Bar(total=2, unit="image", compiles=True) as bar:
        for _ in range(20):
            clock[0] += 10.0
            bar.update(2 / 20)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("5% 0/2 [00:00<?, ?image/s]")
    assert "20% 0/2 [00:30<02:40, 100.00s/image]" in lines[1]
    assert "50% 1/2 " in lines[3]
    assert "100% 2/2 [03:10<00:00, " in lines[-1]


def test_what_does_not_stay_is_said_when_it_lasts(capfd, clock):
    with Bar(total=3, desc="samples", leave=False, compiles=True) as bar:
        bar.update(3)
    assert capfd.readouterr().err == ""
    with Bar(total=3, desc="samples", leave=False, compiles=True) as bar:
        clock[0] += 40.0
        bar.update(1)
    assert capfd.readouterr().err == "samples: 33% 1/3 [00:00<?, ?it/s]\n"


def test_what_ends_before_its_delay_says_nothing(capfd, clock):
    for seconds in (1.0, 3.0):
        with contextlib.suppress(ValueError), Bar(total=3, desc="checksums", delay=2) as bar:
            bar.update(1)
            clock[0] += seconds
            raise ValueError
    assert capfd.readouterr().err == "checksums: 33% 1/3 [00:03<00:06,  3.00s/it]\n"


def test_iterables_and_disabled_bars(capfd):
    assert list(Bar(range(3), "all")) == [0, 1, 2]
    assert "all: 100% 3/3" in capfd.readouterr().err
    with Bar(total=3, disable=True) as bar:
        bar.update(1)
        bar.skip(1, show=True)
    assert capfd.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_of_its_width():
    code = "from dico_jax.terminal import Bar; import time\n"
    code += "with Bar(total=9, desc='samples', unit='image', compiles=True) as bar:\n"
    code += "    for _ in range(9): time.sleep(0.05); bar.update(1)"
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=theirs, check=True)
    text = os.read(ours, 1 << 16).decode()
    for end in (ours, theirs):
        os.close(end)
    lines = text.split("\r")
    assert "samples: 100%|" in text
    assert len(lines) > 2
    assert max(map(len, lines)) <= 81


def test_what_compiles_is_said_before(capfd):
    with Bar(total=2, compiles="compiling the sampler") as bar:
        bar.update(2)
    with Bar(total=2, initial=2, compiles="compiling the sampler"):  # nothing is left to do
        pass
    assert capfd.readouterr().err.splitlines() == [
        "compiling the sampler ...",
        "100% 2/2 [00:00<?, ?it/s]",
    ]
