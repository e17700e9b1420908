"""Serves the page of runs on this machine, and keeps it new while they go on."""

import http.server
import json
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from dico_jax.errors import UsageError, one_line
from dico_jax.reporting.page import make_page
from dico_jax.reporting.runs import read_runs, stamp

_EVERY = 2.0  # seconds between two looks at the files; a page is made anew when they have changed


class _Pages:
    """The newest page, which stays where the files of a run cannot be read any more."""

    def __init__(self, folders: Sequence[Any], results: Sequence[str]):
        self._given, self.stamp, self.page, self.said = (folders, results), "", b"", ""

    def look(self) -> None:
        """Makes the page anew, if files have changed; what goes wrong is said on it."""
        try:
            if (now := stamp(self._given[0])) != self.stamp:
                runs, notes = read_runs(*self._given)
                self.page, self.stamp = make_page(runs, notes, live=now).encode(), now
            self.said = ""
        except Exception as error:  # of many classes: a disk or a bucket may be away
            self.said = f"The files of the runs cannot be read ({one_line(error)}): this is older."

    def keep_looking(self) -> None:
        while True:
            started = time.monotonic()
            self.look()
            time.sleep(max(_EVERY, time.monotonic() - started))  # half of the time at most


def serve(folders: Sequence[Any], results: Sequence[str], port: int) -> None:
    """Serves until ^C; see `make_server`."""
    with make_server(folders, results, port) as server:
        print(f"http://127.0.0.1:{server.server_address[1]}/ until ^C", flush=True)
        server.serve_forever()


def make_server(
    folders: Sequence[Any], results: Sequence[str], port: int
) -> http.server.ThreadingHTTPServer:
    """What serves the page, and a thread that keeps it new.

    UsageError where the port is taken, or the first page cannot be made.
    """
    pages = _Pages(folders, results)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path.partition("?")[0] == "/stamp":
                answer = json.dumps({"stamp": pages.stamp, "said": pages.said}).encode()
                self._send(200, "application/json", answer)
            elif self.path.partition("?")[0] == "/":
                self._send(200, "text/html; charset=utf-8", pages.page)
            else:
                self._send(404, "text/plain", b"there is one page: /\n")

        def _send(self, status: int, kind: str, data: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *args):
            if not isinstance(sys.exception(), ConnectionError):  # a browser that has gone
                super().handle_error(*args)

    try:
        server = Server(("127.0.0.1", port), Handler)
    except OSError as error:
        fix = f"cannot be used ({error.strerror}): give another --port, or 0 for a free one"
        raise UsageError("--port", port, fix) from error
    pages.look()
    if pages.said:
        server.server_close()
        raise UsageError(pages.said)
    threading.Thread(target=pages.keep_looking, daemon=True).start()
    return server
