"""A bucket on this machine: gcp-storage-emulator with what it lacks, and with faults on request.

It lacks preconditions on generations, their header, threads, and a second answer to the end of an
upload. The libraries under test find it by STORAGE_EMULATOR_HOST (gcsfs, google-cloud-storage) and
TENSORSTORE_GCS_HTTP_URL (TensorStore).
"""

import collections
import contextlib
import functools
import http.server
import json
import logging
import os
import threading
import urllib.parse

import pytest

from dico_jax import files

files._set_up_clients()  # before gcsfs is imported
emulator = pytest.importorskip("gcp_storage_emulator.server")
pytest.importorskip("gcsfs")

from gcp_storage_emulator import storage  # noqa: E402
from gcp_storage_emulator.exceptions import NotFound  # noqa: E402
from gcp_storage_emulator.handlers import buckets, objects  # noqa: E402

NAME = "bkt"
for _name in ("gcp_storage_emulator", "api.object"):  # which tell of every object that is not there
    logging.getLogger(_name).setLevel(logging.CRITICAL)


class _PreconditionFailedError(Exception):
    pass


class _Storage(storage.Storage):
    """Checks the generation that the request of this thread asks for."""

    def __init__(self):
        super().__init__(use_memory_fs=True)
        self.asked, self.finished = threading.local(), {}

    def generation(self, bucket, name):
        try:
            return self.get_file_obj(bucket, name)["generation"]
        except NotFound:
            return "0"

    def _check(self, bucket, name):
        wanted = getattr(self.asked, "generation", None)
        if wanted not in (None, self.generation(bucket, name)):
            raise _PreconditionFailedError

    def create_file(self, bucket_name, file_name, content, file_obj, file_id=None):
        self._check(bucket_name, file_name)
        super().create_file(bucket_name, file_name, content, file_obj, file_id)
        self.finished[file_id] = file_obj

    def delete_file(self, bucket_name, file_name):
        self._check(bucket_name, file_name)
        return super().delete_file(bucket_name, file_name)


class _Handler(emulator.RequestHandler):
    protocol_version, wbufsize = "HTTP/1.1", 1 << 20  # head and body in one packet

    def _serve(self, method):
        bucket = self.server.bucket
        url = urllib.parse.urlparse(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        bucket.count(method, url.path, query)
        fault = bucket.fault(method, self.path)
        if fault == "cut":  # before anything is done
            return self._cut()
        if isinstance(fault, int):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return self._answer(fault, {"error": {"code": fault, "message": "as the test says"}})
        with bucket.lock:
            self.storage.asked.generation = query.get("ifGenerationMatch")
            if fault == "cut after":  # it is done, and nobody hears of it
                self.wfile = open(os.devnull, "wb")  # noqa: SIM115
            try:
                if (found := self.storage.finished.get(query.get("upload_id", ""))) is not None:
                    self.rfile.read(int(self.headers.get("Content-Length") or 0))
                    self._answer(200, found)  # asked again, after an answer that was lost
                elif method == "GET" and query.get("alt") == "media":
                    self._download(urllib.parse.unquote(url.path), query)
                else:
                    emulator.Router(self).handle(method)
            except _PreconditionFailedError:
                self._answer(412, {"error": {"code": 412, "message": "conditionNotMet"}})
            if fault == "cut after":
                self._cut()

    def _cut(self):
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(2)

    def _answer(self, status, body, headers=()):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _download(self, path, query):
        bucket, name = path.partition("/b/")[2].split("/o/", 1)
        try:
            data, found = (
                self.storage.get_file(bucket, name),
                self.storage.get_file_obj(bucket, name),
            )
        except NotFound:
            return self._answer(404, {"error": {"code": 404, "message": "no such object"}})
        generation, asked = found["generation"], self.headers.get("Range")
        if query.get("ifGenerationNotMatch") == generation:
            return self._answer(304, b"")
        headers = {"x-goog-generation": generation, "x-goog-hash": f"crc32c={found['crc32c']}"}
        if not asked:
            return self._answer(200, data, headers)
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start = int(first) if first else len(data) - int(last)
        stop = min(int(last) + 1, len(data)) if first and last else len(data)
        if start >= len(data):
            return self._answer(416, b"")
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return self._answer(206, data[start:stop], headers)

    def log_message(self, *args):
        pass


for _method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
    setattr(_Handler, f"do_{_method}", functools.partialmethod(_Handler._serve, _method))


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        pass  # a client that is gone


class Bucket(contextlib.AbstractContextManager):
    """gs://bkt while it lasts, served by a thread; `env` tells other processes where it is."""

    def __init__(self):
        self.lock, self.requests = threading.Lock(), collections.Counter()
        self.fault = lambda method, path: None  # "cut", "cut after" or a status
        self.storage = _Storage()
        buckets.create_bucket(NAME, self.storage)
        handler = functools.partial(_Handler, self.storage)
        self._server = _Server(("127.0.0.1", 0), handler)
        self._server.bucket = self
        url = f"http://127.0.0.1:{self._server.server_port}"
        self.env = {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}
        self.env["GOOGLE_AUTH_TOKEN_FOR_TESTING"] = (
            "none"  # or TensorStore tells of looking for one
        )
        threading.Thread(target=self._server.serve_forever, args=[0.05], daemon=True).start()

    def __exit__(self, *exc):
        self._server.shutdown()
        self._server.server_close()

    def count(self, method, path, query):
        self.requests[f"{method} {'media' if query.get('alt') == 'media' else ''}".strip()] += 1

    def names(self, prefix=""):
        """The names of the objects below a prefix."""
        with self.lock:
            found = self.storage.get_file_list(NAME, prefix=prefix)
            return sorted(
                item["name"] for item in (found[0] if isinstance(found, tuple) else found)
            )

    def read(self, name):
        with self.lock:
            return self.storage.get_file(NAME, name)

    def write(self, name, data):
        """Puts an object there, in place of one that was."""
        about = objects._make_object_resource("", NAME, name, "", str(len(data)))
        with self.lock:
            self.storage.asked.generation = None
            self.storage.create_file(NAME, name, data, objects._checksums(data, about))

    def remove(self, name):
        with self.lock:
            self.storage.asked.generation = None
            self.storage.delete_file(NAME, name)


@functools.cache
def shared():
    """The one bucket of this process, which its libraries are told of for good."""
    os.environ.update((bucket := Bucket()).env)
    return bucket
