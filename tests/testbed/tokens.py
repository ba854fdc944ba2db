"""The token server of a registry with bearer authentication, as public registries run it.

It signs with a key made for the occasion (`openssl`), and records who asked for what.
"""

from __future__ import annotations

import base64
import json
import secrets
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

SERVICE = ISSUER = "shifterwrap-testbed"


class TokenRequest(NamedTuple):
    """One question: the user who proved who they are (or ""), the scopes asked for, and the answer's status."""

    user: str
    scopes: tuple[str, ...]
    status: int


class TokenServer:
    """Grants `users` whatever they ask for, and anyone `pull` of repositories that start with a `public` prefix."""

    def __init__(self, directory: str | Path, users: Mapping[str, str], public: Sequence[str] = ("test/",)) -> None:
        self.directory = Path(directory)
        self.users = dict(users)
        self.public = tuple(public)
        self.requests: list[TokenRequest] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))

    @property
    def realm(self) -> str:
        """The address that the registry sends clients to."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/token"

    def __enter__(self) -> TokenServer:
        self.directory.mkdir(parents=True, exist_ok=True)
        subject = ["-subj", f"/CN={ISSUER}", "-days", "2", "-keyout", "key.pem", "-out", "cert.pem"]
        _openssl(self.directory, "req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def registry_settings(self) -> dict[str, str]:
        """The `auth.token` section of the registry's configuration."""
        certificate = str((self.directory / "cert.pem").resolve())
        return {"realm": self.realm, "service": SERVICE, "issuer": ISSUER, "rootcertbundle": certificate}

    def answer(self, authorization: str, scopes: tuple[str, ...]) -> tuple[int, dict[str, Any]]:
        """Status and body for one request; wrong credentials are refused, never taken for none."""
        user = self._user(authorization)
        status = 401 if user is None else 200
        self.requests.append(TokenRequest(user or "", scopes, status))
        if user is None:
            return status, {"errors": [{"code": "UNAUTHORIZED", "message": "incorrect username or password"}]}
        token = self._sign(user, [grant for scope in scopes for grant in self._grants(user, scope)])
        return status, {"token": token, "access_token": token, "expires_in": 300}

    def _user(self, authorization: str) -> str | None:
        if not authorization:
            return ""
        kind, _, value = authorization.partition(" ")
        name, _, password = base64.b64decode(value).decode().partition(":")
        return name if kind == "Basic" and name and self.users.get(name) == password else None

    def _grants(self, user: str, scope: str) -> list[dict[str, Any]]:
        kind, _, rest = scope.partition(":")
        name, _, actions = rest.rpartition(":")
        wanted = actions.split(",")
        granted = wanted if user else [a for a in wanted if a == "pull" and name.startswith(self.public)]
        return [{"type": kind, "name": name, "actions": granted}] if granted else []

    def _sign(self, user: str, access: list[dict[str, Any]]) -> str:
        pem = (self.directory / "cert.pem").read_text()
        chain = ["".join(line for line in pem.splitlines() if not line.startswith("-----"))]
        now = int(time.time())
        times = {"exp": now + 300, "nbf": now - 10, "iat": now}
        claims = {"iss": ISSUER, "sub": user, "aud": SERVICE, "jti": secrets.token_hex(8), "access": access, **times}
        signed = f"{_base64url({'typ': 'JWT', 'alg': 'RS256', 'x5c': chain})}.{_base64url(claims)}"
        signature = _openssl(self.directory, "dgst", "-sha256", "-sign", "key.pem", stdin=signed.encode())
        return f"{signed}.{_base64url(signature)}"


def _handler(tokens: TokenServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            scopes = parse_qs(urlsplit(self.path).query).get("scope", [])
            split = tuple(scope for joined in scopes for scope in joined.split())
            status, body = tokens.answer(self.headers.get("Authorization", ""), split)
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *arguments: object) -> None:
            """The record is kept in `TokenServer.requests`."""

    return Handler


def _openssl(directory: Path, *argv: str, stdin: bytes = b"") -> bytes:
    done = subprocess.run(["openssl", *argv], cwd=directory, input=stdin, capture_output=True, check=True)
    return done.stdout


def _base64url(value: bytes | dict[str, Any]) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value, separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
