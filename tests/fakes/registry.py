"""A small real registry on loopback that serves images held in memory, and misbehaves where it is told to.

    with Registry() as registry:
        reference = registry.add("lab/app", "1", image([tar_bytes], {"Cmd": ["sh"]}))   # docker://127.0.0.1:PORT/lab/app:1
        registry.fault("/blobs/", status(503), times=2)      # the next two requests for blobs get 503, then all is well
        registry.fault("/blobs/", truncated(1000))           # after that each blob breaks off after 1000 bytes
        ...
        assert registry.count("GET", "/manifests/") == 1     # what came in: registry.requests

A fault is a function of the request and of ``serve``, which gives the honest reply; the first one that matches a
request and has ``times`` left is used up for it. Everything else is plain data: bodies are bytes or iterators of
bytes, and a Reply says where to stop sending. Nothing sleeps: a stalled reply ends when the client or the test does.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import re
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Optional, Union
from urllib.parse import parse_qs, urlsplit

Json = dict[str, Any]

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
BLOCK = 64 << 10


# ---- images


class Image(NamedTuple):
    """A manifest or an index, and everything that hangs from it by digest: blobs and, for an index, manifests."""

    body: bytes
    media_type: str
    blobs: Mapping[str, bytes] = {}
    manifests: Mapping[str, tuple[str, bytes]] = {}

    @property
    def digest(self) -> str:
        return digest_of(self.body)

    @property
    def document(self) -> Json:
        value: Json = json.loads(self.body)
        return value

    def descriptor(self, **extra: Any) -> Json:
        return descriptor(self.media_type, self.body, **extra)


def digest_of(data: bytes, algorithm: str = "sha256") -> str:
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


def descriptor(media_type: str, data: bytes, **extra: Any) -> Json:
    return {"mediaType": media_type, "digest": digest_of(data), "size": len(data), **extra}


def image(
    layers: Sequence[bytes],
    config: Optional[Json] = None,
    *,
    platform: str = "linux/amd64",
    compress: bool = True,
    edit: Optional[Callable[[Json], None]] = None,
    edit_config: Optional[Callable[[Json], None]] = None,
) -> Image:
    """An OCI image of ``layers`` (tar bytes, bottom first); ``config`` holds Env, Cmd, Entrypoint and so on.

    ``edit`` and ``edit_config`` change the manifest's and the config's JSON before it is encoded and named.
    """
    system, architecture, *variant = platform.split("/")
    full: Json = {
        "os": system,
        "architecture": architecture,
        "config": config or {},
        "rootfs": {"type": "layers", "diff_ids": [digest_of(layer) for layer in layers]},
    }
    if variant:
        full["variant"] = variant[0]
    if edit_config:
        edit_config(full)
    stored = [gzip.compress(layer, 1, mtime=0) if compress else layer for layer in layers]
    return assemble(json.dumps(full).encode(), stored, f"{OCI_LAYER}{'+gzip' if compress else ''}", edit)


def assemble(config: bytes, blobs: Sequence[bytes], layer_type: str, edit: Optional[Callable[[Json], None]]) -> Image:
    """An image from the very bytes of its config and its blobs."""
    document: Json = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor(OCI_CONFIG, config),
        "layers": [descriptor(layer_type, blob) for blob in blobs],
    }
    if edit:
        edit(document)
    held = {digest_of(blob): blob for blob in (config, *blobs)}
    return Image(json.dumps(document).encode(), str(document.get("mediaType", OCI_MANIFEST)), held)


def index(entries: Sequence[tuple[str, Image]], edit: Optional[Callable[[Json], None]] = None) -> Image:
    """An image index over (platform, image) pairs; a platform of "" leaves it out."""
    document: Json = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}
    blobs: dict[str, bytes] = {}
    manifests: dict[str, tuple[str, bytes]] = {}
    for platform, child in entries:
        words = dict(zip(("os", "architecture", "variant"), platform.split("/"))) if platform else None
        document["manifests"].append(child.descriptor(**({"platform": words} if words else {})))
        blobs.update(child.blobs)
        manifests.update(child.manifests)
        manifests[child.digest] = (child.media_type, child.body)
    if edit:
        edit(document)
    return Image(json.dumps(document).encode(), str(document.get("mediaType", OCI_INDEX)), blobs, manifests)


# ---- requests, replies, faults


class Request(NamedTuple):
    """One request as it came in; header names are lower-case."""

    method: str
    path: str
    headers: Mapping[str, str]


class Reply(NamedTuple):
    """What to send. Without ``length`` a body of bytes is measured and an iterator is sent in chunks.

    After ``stop_after`` bytes of body the connection is closed, or, with ``stall``, just not used any more;
    ``reset`` sends nothing and drops the connection with a TCP reset.
    """

    status: int = 200
    headers: Mapping[str, str] = {}
    body: Union[bytes, Iterator[bytes]] = b""
    length: Optional[int] = None
    stop_after: Optional[int] = None
    stall: bool = False
    reset: bool = False


Serve = Callable[[Request], Reply]
Fault = Callable[[Request, Serve], Reply]


def instead(reply: Reply) -> Fault:
    """``reply``, whatever was asked."""
    return lambda request, serve: reply


def status(code: int, headers: Optional[Mapping[str, str]] = None, body: bytes = b"") -> Fault:
    """An answer with this status."""
    return instead(Reply(code, headers or {}, body))


def error(code: int, name: str, message: str = "") -> Fault:
    """An answer with an error body as the distribution-spec wants it."""
    body = json.dumps({"errors": [{"code": name, "message": message, "detail": {}}]}).encode()
    return status(code, {"Content-Type": "application/json"}, body)


def redirect(location: str, code: int = 307) -> Fault:
    """A redirect; ``{path}`` in the location stands for the path that was asked."""
    return lambda request, serve: Reply(code, {"Location": location.replace("{path}", request.path)})


def reset() -> Fault:
    """The connection is reset instead of an answer."""
    return instead(Reply(reset=True))


def changed(edit: Callable[[Reply], Reply]) -> Fault:
    """The honest reply, edited."""
    return lambda request, serve: edit(serve(request))


def truncated(after: int) -> Fault:
    """The connection is closed after ``after`` bytes of the body."""
    return changed(lambda reply: reply._replace(stop_after=after))


def stalled(after: int) -> Fault:
    """Nothing more comes after ``after`` bytes of the body, and the connection stays open."""
    return changed(lambda reply: reply._replace(stop_after=after, stall=True))


def headers(**values: Optional[str]) -> Fault:
    """The honest reply with headers set, or dropped by None; ``content_type`` means Content-Type."""

    def edit(reply: Reply) -> Reply:
        changes = {name.replace("_", "-").title(): value for name, value in values.items()}
        kept = {name: value for name, value in reply.headers.items() if name.title() not in changes}
        return reply._replace(headers={**kept, **{name: value for name, value in changes.items() if value is not None}})

    return changed(edit)


def body(edit: Callable[[bytes], bytes], *, chunked: bool = False) -> Fault:
    """The honest reply with another body, of its own length, or of a length that is not told."""

    def apply(reply: Reply) -> Reply:
        assert isinstance(reply.body, bytes)
        new = edit(reply.body)
        return reply._replace(body=iter([new]) if chunked else new)

    return changed(apply)


def no_ranges(request: Request, serve: Serve) -> Reply:
    """200 and the whole, whatever range was asked for."""
    return serve(request._replace(headers={k: v for k, v in request.headers.items() if k != "range"}))


def if_ranged(fault: Fault) -> Fault:
    """``fault`` for requests with a Range, and honesty for others."""
    return lambda request, serve: fault(request, serve) if "range" in request.headers else serve(request)


def zeros(length: int, media_type: str = OCI_MANIFEST) -> Fault:
    """``length`` bytes of zeros, made as they are sent."""

    def reply(request: Request, serve: Serve) -> Reply:
        blocks = (bytes(BLOCK) for _ in range(length // BLOCK))
        return Reply(200, {"Content-Type": media_type}, blocks, length=length)

    return reply


class _Armed:
    """A fault that waits for its requests."""

    def __init__(self, pattern: str, fault: Fault, times: Optional[int], method: str) -> None:
        self.pattern, self.fault, self.times, self.method = re.compile(pattern), fault, times, method

    def takes(self, request: Request) -> bool:
        if self.times == 0 or self.method not in ("", request.method) or not self.pattern.search(request.path):
            return False
        if self.times is not None:
            self.times -= 1
        return True


# ---- the server


class Registry:
    """The server; a context manager. ``host`` can be any address of 127.0.0.0/8; with ``tls`` it speaks https."""

    def __init__(self, host: str = "127.0.0.1", tls: Optional[ssl.SSLContext] = None) -> None:
        self.requests: list[Request] = []
        self.connections = 0
        self.bytes_sent = 0  # of bodies, as far as the kernel took them
        self.name = ""  # HOST:PORT as clients know it, where that is not the address
        self.challenges: list[str] = []  # not empty: a token is wanted; "{realm}" stands for our own token service
        self.token_key = "token"
        self._tokens_issued = 0
        self._contents: dict[str, tuple[str, bytes]] = {}  # path → (media type, bytes)
        self._faults: list[_Armed] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._server = _Server((host, 0), _Handler)
        self._server.registry = self
        self._server.tls = tls
        self._scheme = "https" if tls else "http"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self) -> Registry:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def address(self) -> str:
        """HOST:PORT"""
        host, port = self._server.server_address[:2]
        return f"{host!s}:{port}"

    def add(self, repository: str, tag: str, content: Image) -> str:
        """Serve ``content`` under a tag and its digests; returns its reference, by digest when ``tag`` is empty."""
        manifests = {**content.manifests, content.digest: (content.media_type, content.body)}
        if tag:
            manifests[tag] = (content.media_type, content.body)
        for name, stored in manifests.items():
            self._contents[f"/v2/{repository}/manifests/{name}"] = stored
        for digest, blob in content.blobs.items():
            self._contents[f"/v2/{repository}/blobs/{digest}"] = ("application/octet-stream", blob)
        where = f"docker://{self.name or self.address}/{repository}"
        return f"{where}:{tag}" if tag else f"{where}@{content.digest}"

    def fault(self, pattern: str, fault: Fault, times: Optional[int] = None, method: str = "") -> None:
        """Answer the next ``times`` requests (None: all) whose path ``pattern`` finds with ``fault``."""
        self._faults.append(_Armed(pattern, fault, times, method))

    def heal(self) -> None:
        """Forget all faults."""
        self._faults.clear()

    def require_token(self, *challenges: str) -> None:
        """Want a Bearer token on every request below /v2/; by default challenge as distribution does."""
        usual = 'Bearer realm="{realm}",service="fake registry",scope="repository:{repository}:pull"'
        self.challenges = list(challenges) or [usual]

    def expire_tokens(self) -> None:
        """Honour only tokens that are issued from now on."""
        with self._lock:
            self._tokens_issued += 1

    @property
    def token(self) -> str:
        """The token that is honoured now."""
        return f"token-{self._tokens_issued}"

    def asked(self, method: str, pattern: str) -> list[Request]:
        """The requests so far with that method ("": any) whose path ``pattern`` finds."""
        return [r for r in list(self.requests) if method in ("", r.method) and re.search(pattern, r.path)]

    def count(self, method: str, pattern: str) -> int:
        return len(self.asked(method, pattern))

    # ---- answering

    def _reply(self, request: Request) -> Reply:
        with self._lock:
            self.requests.append(request)
            armed = next((a for a in self._faults if a.takes(request)), None)
        return armed.fault(request, self._serve) if armed else self._serve(request)

    def _serve(self, request: Request) -> Reply:
        path = urlsplit(request.path).path
        if path == "/token":
            return self._issue(request)
        if self.challenges and request.headers.get("authorization") != f"Bearer {self.token}":
            return Reply(401, {"WWW-Authenticate": self._challenge(path)}, _error_body("UNAUTHORIZED"))
        if path == "/v2/":
            return Reply(200, {}, b"{}")
        if path not in self._contents:
            return Reply(404, {}, _error_body("MANIFEST_UNKNOWN" if "/manifests/" in path else "BLOB_UNKNOWN"))
        media_type, data = self._contents[path]
        about = {"Content-Type": media_type, "Docker-Content-Digest": digest_of(data)}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
        if not wanted:
            return Reply(200, about, data)
        first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
        if first > last:
            return Reply(416, {"Content-Range": f"bytes */{len(data)}"})
        return Reply(206, {**about, "Content-Range": f"bytes {first}-{last}/{len(data)}"}, data[first : last + 1])

    def _issue(self, request: Request) -> Reply:
        query = parse_qs(urlsplit(request.path).query)
        if not query.get("scope"):
            return Reply(400, {}, b"no scope")
        return Reply(200, {"Content-Type": "application/json"}, json.dumps({self.token_key: self.token}).encode())

    def _challenge(self, path: str) -> str:
        repository = path[len("/v2/") :].partition("/manifests/")[0].partition("/blobs/")[0]
        realm = f"{self._scheme}://{self.name or self.address}/token"
        return ", ".join(c.replace("{realm}", realm).replace("{repository}", repository) for c in self.challenges)


def _error_body(code: str) -> bytes:
    return json.dumps({"errors": [{"code": code, "message": code.lower().replace("_", " ")}]}).encode()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    registry: Registry
    tls: Optional[ssl.SSLContext]

    def finish_request(self, request: Any, client_address: Any) -> None:
        """In the connection's own thread, so that one handshake does not hold up the others."""
        if not self.tls:
            super().finish_request(request, client_address)
            return
        with self.tls.wrap_socket(request, server_side=True) as secured:
            super().finish_request(secured, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are the point of this."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    disable_nagle_algorithm = True

    def setup(self) -> None:
        with self.server.registry._lock:
            self.server.registry.connections += 1
        super().setup()

    def do_GET(self) -> None:
        asked = Request(self.command, self.path, {k.lower(): v for k, v in self.headers.items()})
        self._send(self.server.registry._reply(asked))

    do_HEAD = do_GET

    def _send(self, reply: Reply) -> None:
        if reply.reset:
            self._drop()
            return
        self.send_response_only(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        length = len(reply.body) if isinstance(reply.body, bytes) else reply.length
        lower = {name.lower() for name in reply.headers}
        chunked = length is None
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif "content-length" not in lower:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self._send_body(reply, chunked)

    def _drop(self) -> None:
        """Close with a TCP reset: SO_LINGER of zero seconds."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for stream in (self.rfile, self.wfile, self.connection):
            stream.close()

    def _send_body(self, reply: Reply, chunked: bool) -> None:
        blocks = _blocks(reply.body) if isinstance(reply.body, bytes) else reply.body
        left = reply.stop_after
        for block in blocks:
            part = block if left is None else block[:left]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part) if chunked and part else part)
            with self.server.registry._lock:
                self.server.registry.bytes_sent += len(part)
            if left is not None:
                left -= len(part)
                if left == 0:
                    self._stop(reply)
                    return
        if chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _stop(self, reply: Reply) -> None:
        self.close_connection = True
        self.wfile.flush()
        if reply.stall:
            self.server.registry._closing.wait(60)
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are recorded, not printed."""


def _blocks(data: bytes) -> Iterator[bytes]:
    return (data[start : start + BLOCK] for start in range(0, len(data), BLOCK))
