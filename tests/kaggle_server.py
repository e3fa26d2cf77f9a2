"""Kaggle on loopback for its real clients, which use port 7777 if KAGGLE_API_ENVIRONMENT is TEST; archives to serve."""

import contextlib
import io
import json
import sys
import tarfile
import threading
import zipfile
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PORT = 7777
TOKEN = "KGAT_never-to-be-seen-4711"
ETAG = '"version-1"'


def pack_zip(files: dict[str, bytes]) -> bytes:
    """A zip of files by name."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def pack_tar(files: dict[str, bytes]) -> bytes:
    """A tar of files by name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@dataclass
class FakeKaggle:
    """What the server does; change it between requests.

    Attributes:
        archive: the zip it serves.
        status: answer to a request for the data set: 200, or an error.
        cuts: for each of the next GET requests, after how many bytes the connection breaks.
        stall_after: after how many bytes of a response to GET the server falls silent.
        silent: accept connections and never answer.
        token_status: answer to the question whether a token is valid.
        pushed: the notebooks that were pushed, as their requests said.
        push_answer: answer to a push.
        states: status of the pushed notebook, one per question, the last one forever; a number is an HTTP error.
        outputs: the files that the notebook leaves, by name; listed three a page.
        output_log: its log.
        requests: (method, path, Range header, Authorization header), as they came.
    """

    archive: bytes = b""
    status: int = 200
    cuts: list[int] = field(default_factory=list)
    stall_after: int | None = None
    silent: bool = False
    token_status: int = 200
    pushed: list[dict] = field(default_factory=list)
    push_answer: dict = field(default_factory=lambda: {"url": "https://kaggle/code/tester/it", "versionNumber": 1})
    states: list[str | int] = field(default_factory=lambda: ["COMPLETE"])
    outputs: dict[str, bytes] = field(default_factory=dict)
    output_log: str = ""
    requests: list[tuple[str, str, str | None, str | None]] = field(default_factory=list)

    def paths(self) -> list[str]:
        return [path for _, path, _, _ in self.requests]

    def ranges(self) -> list[str | None]:
        """The Range headers of the requests for the archive."""
        return [span for method, path, span, _ in self.requests if method == "GET" and path.startswith("/archive")]


def serve(fake: FakeKaggle) -> ThreadingHTTPServer:
    """Start serving in a thread; raise `OSError` if the port is taken. End it by `shutdown()` and `server_close()`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30

        def log_message(self, *_):
            pass

        def _note(self):
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fake.requests.append(
                (self.command, self.path, self.headers.get("Range"), self.headers.get("Authorization"))
            )
            if fake.silent:
                released.wait(30)
                self.close_connection = True
            return fake.silent

        def _json(self, content, status=200):
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_HEAD(self):
            if not self._note():
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

        def do_POST(self):
            if self._note():
                return
            call = self.path.rsplit("/", 1)[-1]
            if call == "IntrospectToken" and fake.token_status == 200:
                self._json({"active": True, "username": "tester"})
            elif call == "IntrospectToken":
                self._json({"code": fake.token_status, "message": "no"}, fake.token_status)
            elif fake.status != 200:
                self._json({"code": fake.status, "message": "no"}, fake.status)
            elif call == "SaveKernel":
                fake.pushed.append(json.loads(self.body))
                self._json(fake.push_answer)
            elif call == "GetKernelSessionStatus":
                state = fake.states.pop(0) if len(fake.states) > 1 else fake.states[0]
                if isinstance(state, int):
                    self._json({"code": state, "message": "no"}, state)
                else:
                    self._json({"status": state})
            elif call == "ListKernelSessionOutput":
                start = int(json.loads(self.body).get("pageToken") or 0)
                files = [
                    {"url": f"http://localhost:{PORT}/output/{name}?signature=signed", "fileName": name}
                    for name in list(fake.outputs)[start : start + 3]
                ]
                more = str(start + 3) if start + 3 < len(fake.outputs) else None
                self._json({"files": files, "log": fake.output_log, "nextPageToken": more})
            elif call == "GetDataset":
                self._json({"id": 1, "currentVersionNumber": 3})
            elif call == "DownloadDataset":
                self.send_response(302)
                self.send_header("Location", f"http://localhost:{PORT}/archive.zip?signature=signed")
                self.send_header("Content-Length", "0")
                self.end_headers()
            else:
                self._json({"code": 404, "message": f"no {call}"}, 404)

        def do_GET(self):
            if self._note():
                return
            name = self.path.partition("?")[0].removeprefix("/output/")
            content = fake.outputs.get(name, fake.archive)
            span = self.headers.get("Range")
            start = int(span.removeprefix("bytes=").removesuffix("-")) if span else 0
            body = content[start:]
            self.send_response(206 if span else 200)
            if span:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Type", "application/zip")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", ETAG)
            self.end_headers()
            cut = fake.cuts.pop(0) if fake.cuts else fake.stall_after
            with contextlib.suppress(
                ConnectionError
            ):  # a client that resumes drops its first request, which was for the whole
                self.wfile.write(body[:cut])
                if fake.stall_after is not None:
                    released.wait(30)
            self.close_connection = cut is not None

    released = threading.Event()

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *client):
            if not isinstance(sys.exception(), ConnectionError):  # a client that gives up is no fault of the server
                super().handle_error(*client)

        def server_close(self):
            released.set()
            super().server_close()

    server = Server(("127.0.0.1", PORT), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server
