"""docker:// images, from registries that speak the OCI distribution API, without credentials.

Bottom up: :class:`_Http` makes one request and follows its redirects; :class:`DockerSource` picks the scheme, gets the
anonymous token and asks for manifests and blobs; the functions below them judge what came back. HTTP goes through
requests' adapter and not through a Session, which would keep cookies, read ``~/.netrc``, swallow the bodies of
redirects and is not safe to share between threads; the adapter's connection pool is.

Sources: distribution-spec 1.1 ("Pulling manifests", "Pulling blobs"), distribution's token authentication
specification, RFC 9110 (HTTP; challenges are its section 11, once RFC 7235), RFC 6750 (Bearer).
"""

from __future__ import annotations

import email.utils
import hashlib
import http.client
import ipaddress
import json
import os
import re
import socket
import ssl
import threading
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn, Optional, Union
from urllib.parse import urlencode, urljoin, urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter

from .. import __version__, fetch, oci
from ..errors import (
    AuthDenied,
    BadReference,
    ConfigError,
    DigestMismatch,
    Error,
    NotFound,
    RateLimited,
    RegistryError,
    Unreachable,
)
from ..fetch import Transient
from . import Resolved

MAX_INDEX_DEPTH = 3
MAX_REDIRECTS = 5
MAX_TOKEN_BYTES = 64 << 10  # of a token service's answer, and of an error message
POOL_SIZE = 16  # kept-alive connections per host

_API_HOSTS = {"docker.io": "registry-1.docker.io"}
_ACCEPT = ", ".join(sorted(oci.INDEX_TYPES) + sorted(oci.MANIFEST_TYPES))
_VAGUE_TYPES = frozenset({"", "text/plain", "application/json", "application/octet-stream"})  # say nothing
_SCHEMA_1 = "application/vnd.docker.distribution.manifest.v1+"
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_PASSING = frozenset({408, 425, 429})  # and all of 5xx: another attempt may be served
_RANGE_REFUSED = frozenset({206, 400, 416})  # 206: of another range; 400: some CDNs; 416: go-containerregistry
_BROKEN = (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError)  # what reading a body may raise
_NO_TLS = frozenset({"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNKNOWN_PROTOCOL", "HTTP_REQUEST"})
_CA_HINT = "install the certificate of the registry's CA on this node, or name it in REQUESTS_CA_BUNDLE"
_MISCONFIGURED = "the registry, or something that answers in its place, is misconfigured"

_TOO_LARGE = "no sound image needs as much; the image is broken or hostile"

_PARAMETER = re.compile(r"""([\w!#$%&'*+.^`|~-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]*))""", re.ASCII)
_SCHEME = re.compile(r"([\w!#$%&'*+.^`|~-]+)(?=[\s,]|$)", re.ASCII)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)", re.ASCII | re.IGNORECASE)

Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]
Challenge = tuple[str, dict[str, str]]


class _Document(NamedTuple):
    """A manifest or index as received."""

    body: bytes
    digest: str
    media_type: str


class DockerSource:
    """One repository of one registry. Any number of threads may use it; they share its connections and its token."""

    def __init__(
        self,
        reference: oci.Reference,
        *,
        insecure: Collection[str] = (),
        settings: fetch.Settings = fetch.DEFAULTS,
        clock: fetch.Clock = fetch.SYSTEM,
    ) -> None:
        """``insecure`` names registries, as HOST:PORT or as HOST for any port, that may be spoken to without TLS.

        They are tried with TLS first; only loopback is not. Certificates are verified wherever TLS is spoken.
        """
        self.reference = reference
        self._settings = settings
        self._clock = clock
        self._http = _Http(settings, clock)
        self._netloc = _API_HOSTS.get(reference.registry, reference.registry)
        host = _host(f"//{self._netloc}")
        marked = reference.registry in insecure or host in insecure
        self._plain_allowed = marked or _is_loopback(host)
        self._base = "" if marked else f"{'http' if self._plain_allowed else 'https'}://{self._netloc}"
        self._base_lock = threading.Lock()
        self._token = ""
        self._token_lock = threading.Lock()

    def close(self) -> None:
        """Close the connections that are kept alive."""
        self._http.close()

    # ---- what a source does

    def digest(self) -> str:
        """The digest that the reference names now, by a HEAD, which Docker Hub does not count against its limit.

        Registries that do not answer HEAD, or that leave Docker-Content-Digest out, are asked with GET.
        """
        if self.reference.digest:
            return self.reference.digest
        return fetch.attempt(self._head, settings=self._settings, clock=self._clock) or self._manifest().digest

    def resolve(self, platform: oci.Platform) -> Resolved:
        """The manifest and the config for ``platform``; RegistryError or one of its kinds says why there is none."""
        where = str(self.reference)
        top = found = self._manifest()
        claims = [top.media_type]
        for _ in range(MAX_INDEX_DEPTH + 1):
            document = oci.parse_json(found.body, f"{where}: what the registry sends as a manifest")
            if not _is_index(document, claims, where):
                break
            child = oci.choose_manifest(document, platform, where)
            found = self._manifest(child)
            claims = [child.media_type, found.media_type]
        else:
            raise RegistryError(f"{where}: indexes are nested deeper than {MAX_INDEX_DEPTH}", _MISCONFIGURED)
        manifest = oci.parse_manifest(document, found.digest, where)
        config = self._config(manifest.config)
        parsed = oci.parse_config(oci.parse_json(config, f"{where}: config"), len(manifest.layers), where)
        return Resolved(top.digest, manifest, parsed, found.body, config)

    def open_range(self, descriptor: oci.Descriptor, start: int) -> fetch.Body:
        """The blob from byte ``start`` on, or whole where the registry cannot do ranges; see fetch.OpenRange.

        Closed ranges only: registries answer 416 to open ones and 400 to ``bytes=0-``.
        """
        response = self._get_blob(descriptor, start)
        begins, total = _extent(response)
        if start and begins != start and response.status_code in _RANGE_REFUSED:
            response.close()
            response = self._get_blob(descriptor, 0)
            begins, total = _extent(response)
        if begins not in (0, start):
            self._refuse_blob(response, descriptor)
        return _HttpBody(response, begins, total)

    # ---- manifests and blobs

    def _head(self) -> str:
        """The digest by HEAD; "" where GET must tell, also why access is denied: some registries deny HEAD alone."""
        try:
            response = self._request("HEAD", f"manifests/{self.reference.name}", Accept=_ACCEPT)
        except AuthDenied:
            return ""
        with response:
            if _is_passing(response.status_code):
                self._refuse(response, str(self.reference))
            return _told_digest(response) if response.status_code == 200 else ""

    def _manifest(self, child: Optional[oci.Descriptor] = None) -> _Document:
        """The document that the reference names, or that ``child`` of an index names; verified."""
        name = child.digest if child else self.reference.name
        found = fetch.attempt(lambda: self._get_manifest(name), settings=self._settings, clock=self._clock)
        if child and len(found.body) != child.size:
            raise DigestMismatch(f"{self.reference}: {name} is {len(found.body)} bytes, the index says {child.size}")
        return found

    def _get_manifest(self, name: str) -> _Document:
        where = str(self.reference) if name == self.reference.name else f"{self.reference}: manifest {name}"
        with self._request("GET", f"manifests/{name}", Accept=_ACCEPT) as response:
            if response.status_code != 200:
                self._refuse(response, where)
            body = self._http.read(response, oci.MAX_MANIFEST_BYTES, where)
            told = _told_digest(response)
            media_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        pinned = name if ":" in name else ""
        for expected in (pinned, told):
            if expected and _digest_of(body, expected) != expected:
                raise DigestMismatch(f"{where}: what was received is {_digest_of(body, expected)}, not {expected}")
        return _Document(body, pinned or told or _digest_of(body), media_type)

    def _config(self, descriptor: oci.Descriptor) -> bytes:
        if descriptor.size > oci.MAX_CONFIG_BYTES:
            raise RegistryError(f"{self.reference}: config of {descriptor.size} bytes", _TOO_LARGE)
        name = f"{self.reference}: config"
        return b"".join(
            fetch.download(self.open_range, descriptor, settings=self._settings, clock=self._clock, subject=name)
        )

    def _get_blob(self, descriptor: oci.Descriptor, start: int) -> requests.Response:
        ranged = {"Range": f"bytes={start}-{descriptor.size - 1}"} if start else {}
        return self._request("GET", f"blobs/{descriptor.digest}", **ranged)

    # ---- requests to the registry

    def _request(self, method: str, path: str, **headers: str) -> requests.Response:
        """The answer to a request for ``path`` of the repository, after whatever the registry wants for a token."""
        base = self._choose_base()
        url = f"{base}/v2/{self.reference.repository}/{path}"
        token = self._token
        response = self._http.send(method, url, headers, token)
        if token and _is_challenge(response, base):
            # It expired. The challenge to an expired token can name another, useless service (nvcr.io): ask without.
            response.close()
            self._forget(token)
            response = self._http.send(method, url, headers)
        if _is_challenge(response, base):
            response.close()
            response = self._http.send(method, url, headers, self._get_token(response))
        return response

    def _choose_base(self) -> str:
        """``SCHEME://HOST[:PORT]`` of the registry; only for one marked insecure does that take a request."""
        with self._base_lock:
            if not self._base:
                self._base = self._probe_base()
            return self._base

    def _probe_base(self) -> str:
        """https where that is spoken, else http; a certificate that does not verify is never a reason for http."""
        for base in (f"https://{self._netloc}", f"http://{self._netloc}"):
            try:
                self._http.exchange("GET", f"{base}/v2/", {}).close()
                return base
            except requests.RequestException as exc:
                failure = exc
                if _distrust(exc):
                    break
        raise _explain(failure, self._netloc) from None

    def _get_token(self, challenged: requests.Response) -> str:
        """The token that all threads share; one of them fetches it while the others wait."""
        with self._token_lock:
            if not self._token:
                self._token = self._fetch_token(self._find_challenge(challenged))
            return self._token

    def _forget(self, token: str) -> None:
        with self._token_lock:
            if self._token == token:
                self._token = ""

    def _find_challenge(self, challenged: requests.Response) -> dict[str, str]:
        """The parameters of the Bearer challenge; AuthDenied when the registry wants something else.

        gcr.io challenges at ``/v2/`` only.
        """
        challenges = parse_challenges(challenged.headers.get("WWW-Authenticate", ""))
        if not challenges:
            with self._http.send("GET", f"{self._choose_base()}/v2/", {}) as ping:
                challenges = parse_challenges(ping.headers.get("WWW-Authenticate", ""))
        for scheme, parameters in challenges:
            if scheme == "bearer" and parameters.get("realm"):
                return parameters
        offered = ", ".join(scheme for scheme, _ in challenges) or "nothing"
        raise AuthDenied(
            f"{self.reference}: {self._netloc} wants credentials (it offers: {offered})",
            "credentials are not supported yet; the image must be public",
        )

    def _fetch_token(self, challenge: Mapping[str, str]) -> str:
        """An anonymous token to pull from this repository."""
        realm = self._checked_realm(challenge["realm"])
        ours = f"repository:{self.reference.repository}:pull"
        query = [("scope", scope) for scope in dict.fromkeys([challenge.get("scope", ""), ours]) if scope]
        if challenge.get("service"):  # nvcr.io leaves it out
            query.insert(0, ("service", challenge["service"]))
        url = f"{realm}{'&' if '?' in realm else '?'}{urlencode(query)}"
        what = f"{self.reference}: token"
        with self._http.send("GET", url, {}) as response:
            if response.status_code == 404:
                raise RegistryError(f"{what}: {_netloc(realm)} has no token service there", _MISCONFIGURED)
            if response.status_code != 200:
                self._refuse(response, what)
            answer = oci.parse_json(self._http.read(response, MAX_TOKEN_BYTES, what), what)
        token = answer.get("token") or answer.get("access_token")
        if not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]+", token):
            raise RegistryError(f"{what}: {_netloc(realm)} sends none", _MISCONFIGURED)
        return token

    def _checked_realm(self, realm: str) -> str:
        """``realm`` when it may be asked for a token: with TLS (CVE-2019-10214), and not on the inside of our network.

        The second is go-containerregistry's rule: a registry must not make a node send requests to its neighbours.
        """
        try:
            scheme, host, _ = _origin(realm)
        except ValueError:
            scheme, host = "", ""
        who = f"{self.reference}: {self._netloc} names"
        if not host or scheme not in ("http", "https") or not {"@", "#"}.isdisjoint(realm):
            raise RegistryError(f"{who} a token service without a usable address", _MISCONFIGURED)
        if scheme == "http" and not self._plain_allowed:
            raise RegistryError(f"{who} a token service without TLS, {host}", _MISCONFIGURED)
        registry = _host(self._choose_base())
        if host != registry and _is_inside(host) and not (_is_loopback(host) and _is_loopback(registry)):
            raise RegistryError(f"{who} a token service inside of this network, {host}", _MISCONFIGURED)
        return realm

    def _refuse_blob(self, response: requests.Response, descriptor: oci.Descriptor) -> NoReturn:
        if response.status_code == 404 and re.search("foreign|nondistributable", descriptor.media_type):
            response.close()
            raise RegistryError(
                f"{self.reference}: layer {descriptor.digest} is not distributed by registries",
                "layers that come from other places (urls) are not supported",
            )
        self._refuse(response, f"{self.reference}: blob {descriptor.digest}")

    def _refuse(self, response: requests.Response, what: str) -> NoReturn:
        """Raise what the status of ``response`` means, as Transient when it may pass."""
        status, host = response.status_code, _netloc(response.url)
        after = _retry_after(response.headers.get("Retry-After", ""), self._clock.wall())
        code, said = self._said(response)
        response.close()
        answer = f"{what}: {host} answers HTTP {status}{said}"
        if status == 429:
            wait = f", try again in {after:.0f} s" if after else ""
            raise Transient(RateLimited(f"{what}: {host} allows no more requests now (HTTP 429){said}{wait}"), after)
        if _is_passing(status):
            raise Transient(Unreachable(answer), after)
        if status in (401, 403) and host != _netloc(self._choose_base()):
            raise Transient(AuthDenied(answer, f"{host} is where the registry sends us; the link may have expired"))
        if status in (401, 403):
            raise AuthDenied(answer)
        if status == 404:
            why = f", which has no repository {self.reference.repository}" if code == "NAME_UNKNOWN" else ""
            raise NotFound(f"{what} is not in registry {host}{why}")
        raise RegistryError(answer, _MISCONFIGURED)

    def _said(self, response: requests.Response) -> tuple[str, str]:
        """The code of a registry's error answer, and its text in parentheses (distribution-spec, "Error Codes")."""
        try:
            first = json.loads(self._http.read(response, MAX_TOKEN_BYTES, ""))["errors"][0]
            return str(first["code"]), f" ({str(first['message'])[:200]})"
        except (Error, Transient, ValueError, LookupError, TypeError, RecursionError):
            return "", ""


class _Http:
    """GET and HEAD with time-outs, redirects followed by hand and never a secret for another host."""

    def __init__(self, settings: fetch.Settings, clock: fetch.Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._adapter = HTTPAdapter(pool_maxsize=POOL_SIZE)

    def close(self) -> None:
        self._adapter.close()

    def send(self, method: str, url: str, headers: Mapping[str, str], token: str = "") -> requests.Response:
        """The answer after up to MAX_REDIRECTS redirects; ``token`` goes to the host and port of ``url`` only."""
        origin = _origin(url)
        for _ in range(MAX_REDIRECTS + 1):
            bearer = {"Authorization": f"Bearer {token}"} if token else {}
            try:
                response = self.exchange(method, url, {**headers, **bearer})
            except requests.RequestException as exc:
                raise _explain(exc, _netloc(url)) from None
            target = response.headers.get("Location") if response.status_code in _REDIRECTS else None
            if not target:
                return response
            response.close()
            url = _redirected(url, target)
            if _origin(url) != origin:
                token = ""  # for good: a detour must not choose what is asked with it
        raise RegistryError(f"{_netloc(url)}: more than {MAX_REDIRECTS} redirects", _MISCONFIGURED)

    def exchange(self, method: str, url: str, headers: Mapping[str, str]) -> requests.Response:
        """One request, the body unread and undecoded; RequestException when there is no answer."""
        left = self._settings.deadline - self._clock.monotonic()
        if left <= 0:
            raise fetch.too_late(_netloc(url))
        always = {"User-Agent": f"shifterwrap/{__version__}", "Accept-Encoding": "identity"}
        request = requests.Request(method, url, headers={**always, **headers}).prepare()
        proxies = {} if _is_loopback(_host(url)) else requests.utils.get_environ_proxies(url)
        timeout = (min(self._settings.connect_seconds, left), min(self._settings.read_seconds, left))
        verify = _trust_store() if url.startswith("https:") else True
        return self._adapter.send(request, stream=True, timeout=timeout, verify=verify, proxies=proxies)

    def read(self, response: requests.Response, limit: int, what: str) -> bytes:
        """The whole body; RegistryError when it is longer than ``limit`` bytes, of which few more are read."""
        length = _length(response) or 0
        body = _HttpBody(response, 0, length)
        content = bytearray()
        while max(length, len(content)) <= limit and (data := body.read()):
            content += data
            if self._clock.monotonic() >= self._settings.deadline:
                raise fetch.too_late(what)
        if max(length, len(content)) > limit:
            raise RegistryError(f"{what}: an answer of more than {limit} bytes", _TOO_LARGE)
        if len(content) < length:
            raise Transient(Unreachable(f"{what}: the connection ended after {len(content)} of {length} bytes"))
        return bytes(content)


class _HttpBody:
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
            raise _explain(exc, _netloc(self._response.url)) from None

    def close(self) -> None:
        self._response.close()


# ---- what an answer says


def _is_passing(status: int) -> bool:
    return status in _PASSING or status >= 500


def _is_challenge(response: requests.Response, base: str) -> bool:
    """Whether the registry itself, and not storage that it redirects to, wants a token."""
    return response.status_code == 401 and _origin(response.url) == _origin(base)


def _told_digest(response: requests.Response) -> str:
    """Docker-Content-Digest; "" without one that we could check."""
    try:
        return oci.check_digest(response.headers.get("Docker-Content-Digest", ""))
    except BadReference:
        return ""


def _digest_of(body: bytes, like: str = "sha256:") -> str:
    algorithm = like.partition(":")[0]
    return f"{algorithm}:{hashlib.new(algorithm, body).hexdigest()}"


def _is_index(document: Mapping[str, Any], claims: Collection[str], where: str) -> bool:
    """Whether this is an index, else it is a manifest; RegistryError when fields and types do not all say the same.

    One document that is a manifest to one reader and an index to the next is CVE-2021-41190. ``claims`` are the media
    types that the HTTP answer and the index above give it; registries that do not know send text/plain or JSON's.
    """
    index = "manifests" in document
    claims = {str(claim) for claim in (*claims, document.get("mediaType", ""))} - _VAGUE_TYPES
    if document.get("schemaVersion") == 1 or "fsLayers" in document or any(c.startswith(_SCHEMA_1) for c in claims):
        raise RegistryError(f"{where} is in Docker's schema 1", "push it again with a Docker of 2017 or newer")
    if index and not {"layers", "config"}.isdisjoint(document):
        raise RegistryError(f"{where} is a manifest and an index at once", _MISCONFIGURED)
    for claim in sorted(claims):
        if claim not in oci.INDEX_TYPES | oci.MANIFEST_TYPES:
            raise RegistryError(f"{where} is not a container image but {claim}", "only container images can be run")
        if (claim in oci.INDEX_TYPES) != index:
            raise RegistryError(f"{where} is called {claim}, and is not", _MISCONFIGURED)
    return index


def _length(response: requests.Response) -> Optional[int]:
    """Content-Length; None when the body's end shows in another way."""
    value = response.headers.get("Content-Length", "")
    chunked = "Transfer-Encoding" in response.headers
    return int(value) if value.isascii() and value.isdigit() and not chunked else None


def _extent(response: requests.Response) -> tuple[int, Optional[int]]:
    """The first byte that the body holds, -1 if that is unclear, and the size of the whole if told (RFC 9110, 14.4)."""
    if response.status_code == 200:
        return 0, _length(response)
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if response.status_code != 206 or not match:
        return -1, None
    first, total = match.groups()
    return int(first), None if total == "*" else int(total)


def _retry_after(value: str, now: float) -> float:
    """Retry-After in seconds from ``now``, be it seconds or a date (RFC 9110, 10.2.3); 0.0 when it says nothing."""
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now)
    except (ValueError, TypeError, OverflowError):
        return 0.0


def parse_challenges(header: str) -> list[Challenge]:
    """The (scheme, parameters), lower-case names, of a WWW-Authenticate value that may hold several (RFC 9110, 11.6.1).

    Lenient: unquoted values may hold any character but comma, quote and space, as old registries send them.
    """
    found: list[Challenge] = []
    for scheme, name, value in _challenge_parts(header):
        if scheme:
            found.append((scheme.lower(), {}))
        elif found:
            found[-1][1].setdefault(name.lower(), value)
    return found


def _challenge_parts(header: str) -> Iterator[tuple[str, str, str]]:
    """(scheme, "", "") or ("", name, value), in order."""
    position = 0
    while position < len(header):
        if match := _PARAMETER.match(header, position):
            name, quoted, bare = match.groups()
            yield "", name, re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else bare
        elif match := _SCHEME.match(header, position):
            yield match[1], "", ""
        position = match.end() if match else position + 1


# ---- addresses


def _netloc(url: str) -> str:
    """HOST[:PORT], which is all of a URL that a message may show: the rest can be a signed secret."""
    return urlsplit(url).netloc


def _host(url: str) -> str:
    return urlsplit(url).hostname or ""


def _origin(url: str) -> tuple[str, str, int]:
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


def _is_loopback(host: str) -> bool:
    address = _address(host)
    return host == "localhost" or bool(address and address.is_loopback)


def _is_inside(host: str) -> bool:
    """Whether ``host`` is spelt as an address that means something else on every network."""
    address = _address(host)
    return host == "localhost" or bool(address and not address.is_global)


def _redirected(url: str, location: str) -> str:
    """Where ``location`` leads from ``url``; RegistryError when that is not to be followed."""
    here = _netloc(url)
    try:
        target = urljoin(url, location)
        parts = urlsplit(target)
        scheme, host, _ = _origin(target)
    except ValueError:
        raise RegistryError(f"{here} redirects to a malformed address", _MISCONFIGURED) from None
    if scheme not in ("https", urlsplit(url).scheme) or not host or "@" in parts.netloc:
        raise RegistryError(f"{here} redirects to {host or 'nowhere'} without TLS", _MISCONFIGURED)
    address = _address(host)
    if address and address.is_link_local:
        raise RegistryError(f"{here} redirects to {host}, an address of the inside", _MISCONFIGURED)
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


def _distrust(exc: BaseException) -> str:
    """Why the certificate of the other side is not valid; "" when that is not what failed."""
    root = _root(exc)
    if isinstance(root, ssl.SSLCertVerificationError):
        return str(root.verify_message)
    # urllib3 1 compares names itself and raises a class of its own, in which _root finds nothing.
    return "it is for another host" if root is exc and isinstance(exc, requests.exceptions.SSLError) else ""


def _explain(exc: BaseException, host: str) -> Exception:
    """What to raise for a request to, or a body from, ``host`` that failed with ``exc``.

    Never quotes requests' or urllib3's own text: it holds the URL.
    """
    root = _root(exc)
    if distrust := _distrust(exc):
        return Unreachable(f"{host}: the TLS certificate is not valid: {distrust}", _CA_HINT)
    if isinstance(root, ssl.SSLError) and root.reason in _NO_TLS:
        return Unreachable(f"{host} does not speak TLS", "plain http is for registries that are marked insecure")
    if isinstance(root, socket.gaierror) and root.errno == socket.EAI_NONAME:
        return Unreachable(f"there is no host {host}", "check the spelling of the registry")
    if isinstance(exc, (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema)):
        return RegistryError(f"{host}: bad address", _MISCONFIGURED)
    if isinstance(exc, requests.exceptions.ProxyError):
        return Transient(Unreachable(f"{host}: the proxy of the environment fails", "check HTTPS_PROXY and NO_PROXY"))
    if isinstance(exc, (requests.Timeout, urllib3.exceptions.TimeoutError, socket.timeout)):
        return Transient(Unreachable(f"{host} does not answer in time"))
    reason = getattr(root, "strerror", None) or "the connection broke"
    return Transient(Unreachable(f"{host}: {reason}"))
