"""docker:// images, from registries that speak the OCI distribution API, without credentials.

:class:`DockerSource` picks the scheme and asks for manifests and blobs; the functions below it judge what came back.

Source: distribution-spec 1.1 ("Pulling manifests", "Pulling blobs").
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, NoReturn, Optional

import requests

from .. import fetch, oci
from ..errors import AuthDenied, BadReference, DigestMismatch, RegistryError
from . import Resolved
from .bearer import Bearer
from .http import (
    MISCONFIGURED,
    TOO_LARGE,
    Http,
    HttpBody,
    distrust,
    explain,
    host_of,
    is_loopback,
    is_passing,
    length_of,
)

MAX_INDEX_DEPTH = 3

_API_HOSTS = {"docker.io": "registry-1.docker.io"}
_ACCEPT = ", ".join(sorted(oci.INDEX_TYPES) + sorted(oci.MANIFEST_TYPES))
_VAGUE_TYPES = frozenset({"", "text/plain", "application/json", "application/octet-stream"})  # say nothing
_SCHEMA_1 = "application/vnd.docker.distribution.manifest.v1+"
_RANGE_REFUSED = frozenset({206, 400, 416})  # 206: of another range; 400: some CDNs; 416: go-containerregistry
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)", re.ASCII | re.IGNORECASE)


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
        self._http = Http(settings, clock)
        self._netloc = _API_HOSTS.get(reference.registry, reference.registry)
        host = host_of(f"//{self._netloc}")
        marked = reference.registry in insecure or host in insecure
        plain_allowed = marked or is_loopback(host)
        self._base = "" if marked else f"{'http' if plain_allowed else 'https'}://{self._netloc}"
        self._base_lock = threading.Lock()
        self._bearer = Bearer(self._http, reference, self._netloc, plain_allowed=plain_allowed)

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
            raise RegistryError(f"{where}: indexes are nested deeper than {MAX_INDEX_DEPTH}", MISCONFIGURED)
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
        return HttpBody(response, begins, total)

    # ---- manifests and blobs

    def _head(self) -> str:
        """The digest by HEAD; "" where GET must tell, also why access is denied: some registries deny HEAD alone."""
        try:
            response = self._request("HEAD", f"manifests/{self.reference.name}", Accept=_ACCEPT)
        except AuthDenied:
            return ""
        with response:
            if is_passing(response.status_code):
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
            raise RegistryError(f"{self.reference}: config of {descriptor.size} bytes", TOO_LARGE)
        name = f"{self.reference}: config"
        return b"".join(
            fetch.download(self.open_range, descriptor, settings=self._settings, clock=self._clock, subject=name)
        )

    def _get_blob(self, descriptor: oci.Descriptor, start: int) -> requests.Response:
        ranged = {"Range": f"bytes={start}-{descriptor.size - 1}"} if start else {}
        return self._request("GET", f"blobs/{descriptor.digest}", **ranged)

    # ---- requests to the registry

    def _request(self, method: str, path: str, **headers: str) -> requests.Response:
        """The answer to a request for ``path`` of the repository."""
        url = f"{self._choose_base()}/v2/{self.reference.repository}/{path}"
        return self._bearer.send(method, url, headers)

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
                if distrust(exc):
                    break
        raise explain(failure, self._netloc) from None

    def _refuse_blob(self, response: requests.Response, descriptor: oci.Descriptor) -> NoReturn:
        if response.status_code == 404 and re.search("foreign|nondistributable", descriptor.media_type):
            response.close()
            raise RegistryError(
                f"{self.reference}: layer {descriptor.digest} is not distributed by registries",
                "layers that come from other places (urls) are not supported",
            )
        self._refuse(response, f"{self.reference}: blob {descriptor.digest}")

    def _refuse(self, response: requests.Response, what: str) -> NoReturn:
        self._http.refuse(response, what, self._netloc, self.reference.repository)


# ---- what an answer says


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
        raise RegistryError(f"{where} is a manifest and an index at once", MISCONFIGURED)
    for claim in sorted(claims):
        if claim not in oci.INDEX_TYPES | oci.MANIFEST_TYPES:
            raise RegistryError(f"{where} is not a container image but {claim}", "only container images can be run")
        if (claim in oci.INDEX_TYPES) != index:
            raise RegistryError(f"{where} is called {claim}, and is not", MISCONFIGURED)
    return index


def _extent(response: requests.Response) -> tuple[int, Optional[int]]:
    """The first byte that the body holds, -1 if that is unclear, and the size of the whole if told (RFC 9110, 14.4)."""
    if response.status_code == 200:
        return 0, length_of(response)
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if response.status_code != 206 or not match:
        return -1, None
    first, total = match.groups()
    return int(first), None if total == "*" else int(total)
