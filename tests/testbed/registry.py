"""A real `docker-registry` on a loopback port, with a record of every request it answered.

The record is what proves single flight: count the GETs of a blob. From the shell, the registry outlives the command:

    python3 tests/testbed/registry.py serve --data DIR --pid-file F    prints HOST:PORT
    python3 tests/testbed/registry.py images --registry HOST:PORT --data DIR bb sci
    kill "$(cat F)"
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

if __name__ == "__main__":  # run by path: the checkout is not on sys.path yet
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if TYPE_CHECKING:
    from typing_extensions import Self

    from tests.testbed.tokens import TokenServer

START_SECONDS = 20.0
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
ACCESS_LINE = re.compile(r'"([A-Z]+) (\S+) HTTP/[0-9.]+" ([0-9]{3}) ')


class Request(NamedTuple):
    """One answered request, from the registry's own access log."""

    method: str
    path: str
    status: int


class Registry:
    """`docker-registry serve` over the directory `data`; `port` 0 takes a free one.

    `users` (name to password) turns on basic authentication, `tokens` the bearer-token one. Used as a context manager
    the registry also dies with the thread that started it; `start(detached=True)` leaves it running.
    """

    def __init__(
        self,
        data: str | Path,
        *,
        port: int = 0,
        log: str | Path | None = None,
        users: Mapping[str, str] | None = None,
        tokens: TokenServer | None = None,
    ) -> None:
        self.data = Path(data).resolve()
        self.port = port
        self.log = Path(log) if log else self.data / "registry.log"
        self.users = dict(users or {})
        self.tokens = tokens
        self._process: subprocess.Popen[bytes] | None = None
        self._start_of_record = 0

    @property
    def host(self) -> str:
        """`127.0.0.1:PORT`, as references name it."""
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The server's process id; only while it runs."""
        assert self._process, "the registry is not running"
        return self._process.pid

    def start(self, detached: bool = False) -> Self:
        """Start the server and return once it answers; a free port that was lost to another process is drawn again."""
        self.data.mkdir(parents=True, exist_ok=True)
        wanted = self.port
        for attempt in range(5):
            self.port = wanted or _free_port()
            if self._answers(self._spawn(detached)):
                self.forget()
                return self
            if wanted or b"address already in use" not in self.log.read_bytes()[-1000:] or attempt == 4:
                break
        self.stop()
        raise RuntimeError(f"docker-registry did not start on {self.host}:\n{self.log.read_text()[-1000:]}")

    def stop(self) -> None:
        """End the server; the data stays."""
        if self._process:
            self._process.terminate()
            self._process.wait(10)
            self._process = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def push(self, layout: str | Path, reference: str, tag: str = "1", *, v2s2: bool = False, creds: str = "") -> str:
        """Have skopeo copy `tag` of a layout, every platform of it, to `reference` (`test/bb:1`); return its URL.

        `v2s2` has it rewritten as Docker schema 2, which changes digests. `creds` is `user:password`. What skopeo
        would refuse or rewrite, `upload.upload` puts there as it stands.
        """
        return push(self.host, layout, reference, tag, v2s2=v2s2, creds=creds)

    def requests(self) -> list[Request]:
        """What was asked since the start or the last `forget`, oldest first."""
        self._flush()
        with self.log.open(errors="replace") as log:
            log.seek(self._start_of_record)
            found = [Request(m[1], m[2], int(m[3])) for m in map(ACCESS_LINE.search, log) if m]
        return [request for request in found if "?mark=" not in request.path]

    def forget(self) -> None:
        """Begin the record anew."""
        self._flush()
        self._start_of_record = self.log.stat().st_size

    def _flush(self) -> None:
        # A request is logged after its last byte was sent, so a client may be back before the line is there; by the
        # time a later request of our own is logged, it is.
        mark = self._ask_marked()
        deadline = time.monotonic() + START_SECONDS
        while mark not in self.log.read_text(errors="replace"):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.log} records no requests")
            time.sleep(0.005)

    def _ask_marked(self) -> str:
        mark = f"?mark={secrets.token_hex(8)}"
        with contextlib.suppress(OSError):  # refused while it starts; an HTTP error is an OSError too, and an answer
            DIRECT.open(f"http://{self.host}/v2/{mark}", timeout=5).close()
        return mark

    def _spawn(self, detached: bool) -> subprocess.Popen[bytes]:
        # Its configuration is YAML, of which JSON is a part.
        config = self.data / "config.json"
        config.write_text(json.dumps(self._config()))
        tether = [] if detached else ["setpriv", "--pdeathsig", "TERM"]  # no orphan when pytest is killed
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*tether, "docker-registry", "serve", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=detached,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "OTEL_TRACES_EXPORTER": "none"},
            )
        return self._process

    def _config(self) -> dict[str, Any]:
        auth: dict[str, Any] = {}
        if self.users:
            secret = self.data / "htpasswd"
            secret.write_text("".join(f"{name}:{_bcrypt(password)}\n" for name, password in self.users.items()))
            auth = {"htpasswd": {"realm": "testbed", "path": str(secret)}}
        elif self.tokens:
            auth = {"token": self.tokens.registry_settings()}
        return {
            "version": "0.1",
            "log": {"level": "warn", "accesslog": {"disabled": False}},
            "storage": {
                "filesystem": {"rootdirectory": str(self.data / "storage")},
                "delete": {"enabled": True},
            },
            "http": {"addr": self.host},
            **({"auth": auth} if auth else {}),
        }

    def _answers(self, process: subprocess.Popen[bytes]) -> bool:
        deadline = time.monotonic() + START_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            # only what our own process logs was answered by it, and not by another one on that port
            if self._ask_marked() in self.log.read_text(errors="replace"):
                return True
            time.sleep(0.02)
        return False


def push(host: str, layout: str | Path, reference: str, tag: str = "1", *, v2s2: bool = False, creds: str = "") -> str:
    """`Registry.push` to any registry at `host`, with no policy, credentials or temporary files but our own."""
    name = f"docker://{host}/{reference}"
    with tempfile.TemporaryDirectory(prefix="skopeo-") as scratch:
        argv = ["skopeo", "--insecure-policy", "--tmpdir", scratch, "copy", "--quiet", "--all"]
        argv += ["--format", "v2s2"] if v2s2 else []
        argv += ["--dest-creds", creds] if creds else ["--dest-no-creds"]
        argv += ["--dest-tls-verify=false", f"oci:{layout}:{tag}", name]
        done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"cannot push {layout}:{tag} to {name}: {done.stdout}")
    return name


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _bcrypt(password: str) -> str:
    """The only hash that docker-registry takes. The system's libcrypt has it; Python's crypt module is gone in 3.13."""
    libcrypt = ctypes.CDLL("libcrypt.so.1")
    libcrypt.crypt.restype = ctypes.c_char_p
    salt = "$2b$05$" + secrets.token_hex(11)
    hashed: bytes = libcrypt.crypt(password.encode(), salt.encode())
    return hashed.decode()


def _serve(options: argparse.Namespace) -> None:
    registry = Registry(options.data, port=options.port, log=options.log).start(detached=True)
    Path(options.pid_file).write_text(f"{registry.pid}\n")
    print(registry.host)


def _images(options: argparse.Namespace) -> None:
    from tests.testbed import bench

    for name in options.name or ["bb"]:
        for reference in bench.push(name, Path(options.data), options.registry):
            print(reference)


def main() -> None:
    """The shell's way in."""
    parser = argparse.ArgumentParser(description="a real registry on a loopback port, and images to put there")
    commands = parser.add_subparsers(required=True, metavar="serve|images")
    serve = commands.add_parser("serve", help="start a registry and leave it running")
    serve.add_argument("--data", required=True)
    serve.add_argument("--port", type=int, default=0)
    serve.add_argument("--pid-file", required=True)
    serve.add_argument("--log")
    serve.set_defaults(run=_serve)
    images = commands.add_parser("images", help="build what is not built yet, and push")
    images.add_argument("--registry", required=True, metavar="HOST:PORT")
    images.add_argument("--data", required=True, help="where built layouts are kept")
    images.add_argument("name", nargs="*", metavar="bb|sci")
    images.set_defaults(run=_images)
    options = parser.parse_args()
    os.umask(0o022)
    options.run(options)


if __name__ == "__main__":
    main()
