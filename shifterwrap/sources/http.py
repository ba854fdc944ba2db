"""HTTP to a registry and to where it redirects: one request and its answer, or the error that says why there is none.

Top down: :class:`Http` makes requests, follows their redirects and explains refusals; :class:`HttpBody` reads; the
functions below them tell what an answer's headers say, which addresses may be asked and why a connection failed. This
goes through requests' adapter and not through a Session, which would keep cookies, read ``~/.netrc``, swallow the
bodies of redirects and is not safe to share between threads; the adapter's connection pool is.

Sources: RFC 9110 (HTTP), distribution-spec 1.1 ("Error Codes").
"""

from __future__ import annotations

import email.utils
import http.client
import ipaddress
import json
import os
import socket
import ssl
from collections.abc import Mapping
from typing import Any, NoReturn, Optional, Union
from urllib.parse import urljoin, urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter

from .. import __version__, fetch
from ..errors import AuthDenied, ConfigError, Error, NotFound, RateLimited, RegistryError, Unreachable
from ..fetch import Transient

MAX_REDIRECTS = 5
MAX_ERROR_BYTES = 64 << 10  # of an error message
POOL_SIZE = 16  # kept-alive connections per host

MISCONFIGURED = "the registry, or something that answers in its place, is misconfigured"
TOO_LARGE = "no sound image needs as much; the image is broken or hostile"

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_PASSING = frozenset({408, 425, 429})  # and all of 5xx: another attempt may be served
_BROKEN = (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError)  # what reading a body may raise
_NO_TLS = frozenset({"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNKNOWN_PROTOCOL", "HTTP_REQUEST"})
_CA_HINT = "install the certificate of the registry's CA on this node, or name it in REQUESTS_CA_BUNDLE"

Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]


class Http:
    """GET and HEAD with time-outs, redirects followed by hand and never a secret for another host."""

    def __init__(self, settings: fetch.Settings, clock: fetch.Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._adapter = HTTPAdapter(pool_maxsize=POOL_SIZE)

    def close(self) -> None:
        self._adapter.close()

    def send(self, method: str, url: str, headers: Mapping[str, str], token: str = "") -> requests.Response:
        """The answer after up to MAX_REDIRECTS redirects; ``token`` goes to the host and port of ``url`` only."""
        origin = origin_of(url)
        for _ in range(MAX_REDIRECTS + 1):
            bearer = {"Authorization": f"Bearer {token}"} if token else {}
            try:
                response = self.exchange(method, url, {**headers, **bearer})
            except requests.RequestException as exc:
                raise explain(exc, netloc_of(url)) from None
            target = response.headers.get("Location") if response.status_code in _REDIRECTS else None
            if not target:
                return response
            response.close()
            url = _redirected(url, target)
            if origin_of(url) != origin:
                token = ""  # for good: a detour must not choose what is asked with it
        raise RegistryError(f"{netloc_of(url)}: more than {MAX_REDIRECTS} redirects", MISCONFIGURED)

    def exchange(self, method: str, url: str, headers: Mapping[str, str]) -> requests.Response:
        """One request, the body unread and undecoded; RequestException when there is no answer."""
        left = self._settings.deadline - self._clock.monotonic()
        if left <= 0:
            raise fetch.too_late(netloc_of(url))
        always = {"User-Agent": f"shifterwrap/{__version__}", "Accept-Encoding": "identity"}
        request = requests.Request(method, url, headers={**always, **headers}).prepare()
        proxies = {} if is_loopback(host_of(url)) else requests.utils.get_environ_proxies(url)
        timeout = (min(self._settings.connect_seconds, left), min(self._settings.read_seconds, left))
        verify = _trust_store() if url.startswith("https:") else True
        return self._adapter.send(request, stream=True, timeout=timeout, verify=verify, proxies=proxies)

    def read(self, response: requests.Response, limit: int, what: str) -> bytes:
        """The whole body; RegistryError when it is longer than ``limit`` bytes, of which few more are read."""
        length = length_of(response) or 0
        body = HttpBody(response, 0, length)
        content = bytearray()
        while max(length, len(content)) <= limit and (data := body.read()):
            content += data
            if self._clock.monotonic() >= self._settings.deadline:
                raise fetch.too_late(what)
        if max(length, len(content)) > limit:
            raise RegistryError(f"{what}: an answer of more than {limit} bytes", TOO_LARGE)
        if len(content) < length:
            raise Transient(Unreachable(f"{what}: the connection ended after {len(content)} of {length} bytes"))
        return bytes(content)

    def refuse(self, response: requests.Response, what: str, registry: str, repository: str) -> NoReturn:
        """Raise what the status of ``response`` means, as Transient when it may pass.

        ``registry``, HOST[:PORT], is what was asked first: other hosts are asked because it says so.
        """
        status, host = response.status_code, netloc_of(response.url)
        after = _retry_after(response.headers.get("Retry-After", ""), self._clock.wall())
        code, said = self._said(response)
        response.close()
        answer = f"{what}: {host} answers HTTP {status}{said}"
        if status == 429:
            wait = f", try again in {after:.0f} s" if after else ""
            raise Transient(RateLimited(f"{what}: {host} allows no more requests now (HTTP 429){said}{wait}"), after)
        if is_passing(status):
            raise Transient(Unreachable(answer), after)
        if status in (401, 403) and host != registry:
            raise Transient(AuthDenied(answer, f"{host} is where the registry sends us; the link may have expired"))
        if status in (401, 403):
            raise AuthDenied(answer)
        if status == 404:
            why = f", which has no repository {repository}" if code == "NAME_UNKNOWN" else ""
            raise NotFound(f"{what} is not in registry {host}{why}")
        raise RegistryError(answer, MISCONFIGURED)

    def _said(self, response: requests.Response) -> tuple[str, str]:
        """The code of a registry's error answer, and its text in parentheses (distribution-spec, "Error Codes")."""
        try:
            first = json.loads(self.read(response, MAX_ERROR_BYTES, ""))["errors"][0]
            return str(first["code"]), f" ({str(first['message'])[:200]})"
        except (Error, Transient, ValueError, LookupError, TypeError, RecursionError):
            return "", ""


class HttpBody:
    """A fetch.Body over a response: the bytes of the wire, whatever Content-Encoding claims."""

    def __init__(self, response: requests.Response, start: int, total: Optional[int]) -> None:
        self.start = start
        self.total = total
        self._response = response
        raw = response.raw
        # read1 returns what has arrived, so that a trickle meets the deadline; urllib3 1 can only fill whole pieces.
        self._read = getattr(raw, "read1", raw.read)

    def read(self) -> bytes:
        try:
            return self._read(fetch.CHUNK_BYTES, decode_content=False) or b""
        except _BROKEN as exc:
            raise explain(exc, netloc_of(self._response.url)) from None

    def close(self) -> None:
        self._response.close()


# ---- what an answer says


def is_passing(status: int) -> bool:
    return status in _PASSING or status >= 500


def length_of(response: requests.Response) -> Optional[int]:
    """Content-Length; None when the body's end shows in another way."""
    value = response.headers.get("Content-Length", "")
    chunked = "Transfer-Encoding" in response.headers
    return int(value) if value.isascii() and value.isdigit() and not chunked else None


def _retry_after(value: str, now: float) -> float:
    """Retry-After in seconds from ``now``, be it seconds or a date (RFC 9110, 10.2.3); 0.0 when it says nothing."""
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now)
    except (ValueError, TypeError, OverflowError):
        return 0.0


# ---- addresses


def netloc_of(url: str) -> str:
    """HOST[:PORT], which is all of a URL that a message may show: the rest can be a signed secret."""
    return urlsplit(url).netloc


def host_of(url: str) -> str:
    return urlsplit(url).hostname or ""


def origin_of(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def _address(host: str) -> Optional[Address]:
    """The address that ``host`` spells, in any of the ways that the C library reads (``127.1``, ``0x7f000001``)."""
    try:
        literal: Address = ipaddress.ip_address(host)
    except ValueError:
        try:
            return ipaddress.IPv4Address(socket.inet_aton(host))
        except (OSError, UnicodeError):
            return None
    return getattr(literal, "ipv4_mapped", None) or literal


def is_loopback(host: str) -> bool:
    address = _address(host)
    return host == "localhost" or bool(address and address.is_loopback)


def is_inside(host: str) -> bool:
    """Whether ``host`` is spelt as an address that means something else on every network."""
    address = _address(host)
    return host == "localhost" or bool(address and not address.is_global)


def _redirected(url: str, location: str) -> str:
    """Where ``location`` leads from ``url``; RegistryError when that is not to be followed."""
    here = netloc_of(url)
    try:
        target = urljoin(url, location)
        parts = urlsplit(target)
        scheme, host, _ = origin_of(target)
    except ValueError:
        raise RegistryError(f"{here} redirects to a malformed address", MISCONFIGURED) from None
    if scheme not in ("https", urlsplit(url).scheme) or not host or "@" in parts.netloc:
        raise RegistryError(f"{here} redirects to {host or 'nowhere'} without TLS", MISCONFIGURED)
    address = _address(host)
    if address and address.is_link_local:
        raise RegistryError(f"{here} redirects to {host}, an address of the inside", MISCONFIGURED)
    return target


def _trust_store() -> Union[str, bool]:
    """The certificates to trust: what the environment names, else the system's, else those that requests brings.

    A site puts its own CA into the system's; requests by itself would not look there.
    """
    for variable in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        if named := os.environ.get(variable):
            if not os.path.exists(named):
                raise ConfigError(f"{variable} names {named}, which does not exist", f"correct or unset {variable}")
            return named
    paths = ssl.get_default_verify_paths()  # honours SSL_CERT_FILE and SSL_CERT_DIR
    if paths.cafile:
        return paths.cafile
    return paths.capath if paths.capath and os.listdir(paths.capath) else True


# ---- failures of the connection


def _root(exc: BaseException) -> BaseException:
    """The system's or the TLS library's own exception inside of what requests and urllib3 wrap around it."""
    queue: list[Any] = [exc]
    seen: list[Any] = []
    while queue:
        item = queue.pop(0)
        if isinstance(item, (ssl.SSLError, socket.gaierror, ConnectionError)):
            return item
        if isinstance(item, BaseException) and item not in seen:
            seen.append(item)
            queue += [*item.args, getattr(item, "reason", None), item.__cause__, item.__context__]
    return exc


def distrust(exc: BaseException) -> str:
    """Why the certificate of the other side is not valid; "" when that is not what failed."""
    root = _root(exc)
    if isinstance(root, ssl.SSLCertVerificationError):
        return str(root.verify_message)
    # urllib3 1 compares names itself and raises a class of its own, in which _root finds nothing.
    return "it is for another host" if root is exc and isinstance(exc, requests.exceptions.SSLError) else ""


def explain(exc: BaseException, host: str) -> Exception:
    """What to raise for a request to, or a body from, ``host`` that failed with ``exc``.

    Never quotes requests' or urllib3's own text: it holds the URL.
    """
    root = _root(exc)
    if flaw := distrust(exc):
        return Unreachable(f"{host}: the TLS certificate is not valid: {flaw}", _CA_HINT)
    if isinstance(root, ssl.SSLError) and root.reason in _NO_TLS:
        return Unreachable(f"{host} does not speak TLS", "plain http is for registries that are marked insecure")
    if isinstance(root, socket.gaierror) and root.errno == socket.EAI_NONAME:
        return Unreachable(f"there is no host {host}", "check the spelling of the registry")
    if isinstance(exc, (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema)):
        return RegistryError(f"{host}: bad address", MISCONFIGURED)
    if isinstance(exc, requests.exceptions.ProxyError):
        return Transient(Unreachable(f"{host}: the proxy of the environment fails", "check HTTPS_PROXY and NO_PROXY"))
    if isinstance(exc, (requests.Timeout, urllib3.exceptions.TimeoutError, socket.timeout)):
        return Transient(Unreachable(f"{host} does not answer in time"))
    reason = getattr(root, "strerror", None) or "the connection broke"
    return Transient(Unreachable(f"{host}: {reason}"))
