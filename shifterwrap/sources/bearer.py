"""Authentication: the anonymous token that a registry wants with each request, and the challenges that ask for it.

Sources: distribution's token authentication specification, RFC 9110 (challenges are its section 11, once RFC 7235),
RFC 6750 (Bearer).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from urllib.parse import urlencode

import requests

from .. import oci
from ..errors import AuthDenied, RegistryError
from .http import MISCONFIGURED, Http, host_of, is_inside, is_loopback, netloc_of, origin_of

MAX_TOKEN_BYTES = 64 << 10  # of a token service's answer

_PARAMETER = re.compile(r"""([\w!#$%&'*+.^`|~-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]*))""", re.ASCII)
_SCHEME = re.compile(r"([\w!#$%&'*+.^`|~-]+)(?=[\s,]|$)", re.ASCII)

Challenge = tuple[str, dict[str, str]]


class Bearer:
    """Requests to one repository with the token that all threads share."""

    def __init__(self, http: Http, reference: oci.Reference, netloc: str, *, plain_allowed: bool) -> None:
        """``netloc`` is the registry's HOST[:PORT]; ``plain_allowed``, whether its token service may lack TLS too."""
        self.reference = reference
        self._http = http
        self._netloc = netloc
        self._plain_allowed = plain_allowed
        self._token = ""
        self._token_lock = threading.Lock()

    def send(self, method: str, url: str, headers: Mapping[str, str]) -> requests.Response:
        """The answer to a request to the registry, after whatever that wants for a token."""
        token = self._token
        response = self._http.send(method, url, headers, token)
        if token and _is_challenge(response, url):
            # It expired. The challenge to an expired token can name another, useless service (nvcr.io): ask without.
            response.close()
            self._forget(token)
            response = self._http.send(method, url, headers)
        if _is_challenge(response, url):
            response.close()
            response = self._http.send(method, url, headers, self._get_token(response))
        return response

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
            used, _, _ = origin_of(challenged.url)
            with self._http.send("GET", f"{used}://{self._netloc}/v2/", {}) as ping:
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
                raise RegistryError(f"{what}: {netloc_of(realm)} has no token service there", MISCONFIGURED)
            if response.status_code != 200:
                self._http.refuse(response, what, self._netloc, self.reference.repository)
            answer = oci.parse_json(self._http.read(response, MAX_TOKEN_BYTES, what), what)
        token = answer.get("token") or answer.get("access_token")
        if not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]+", token):
            raise RegistryError(f"{what}: {netloc_of(realm)} sends none", MISCONFIGURED)
        return token

    def _checked_realm(self, realm: str) -> str:
        """``realm`` when it may be asked for a token: with TLS (CVE-2019-10214), and not on the inside of our network.

        The second is go-containerregistry's rule: a registry must not make a node send requests to its neighbours.
        """
        try:
            scheme, host, _ = origin_of(realm)
        except ValueError:
            scheme, host = "", ""
        who = f"{self.reference}: {self._netloc} names"
        if not host or scheme not in ("http", "https") or not {"@", "#"}.isdisjoint(realm):
            raise RegistryError(f"{who} a token service without a usable address", MISCONFIGURED)
        if scheme == "http" and not self._plain_allowed:
            raise RegistryError(f"{who} a token service without TLS, {host}", MISCONFIGURED)
        registry = host_of(f"//{self._netloc}")
        if host != registry and is_inside(host) and not (is_loopback(host) and is_loopback(registry)):
            raise RegistryError(f"{who} a token service inside of this network, {host}", MISCONFIGURED)
        return realm


def _is_challenge(response: requests.Response, url: str) -> bool:
    """Whether the registry itself, and not storage that it redirects to, wants a token."""
    return response.status_code == 401 and origin_of(response.url) == origin_of(url)


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
