"""Puts a layout into a registry exactly as it stands.

skopeo compresses plain layers on the way, and refuses Docker's media types in a layout. A test of what a registry may
serve needs every byte, and the digest, that it wrote.
"""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, urljoin

from tests.testbed.ocilayout import REF_NAME


def upload(host: str, layout: str | Path, reference: str, tag: str = "1", creds: str = "") -> str:
    """Upload what `tag` of `layout` names, and all that hangs from it, as `reference` (`test/bb:1`); return its URL."""
    root, (repository, _, name) = Path(layout), reference.rpartition(":")
    tagged = json.loads((root / "index.json").read_bytes())["manifests"]
    top = next(found for found in tagged if found["annotations"].get(REF_NAME) == tag)
    _Upload(f"http://{host}/v2/{repository}", root, creds).manifest(top, name)
    return f"docker://{host}/{reference}"


class _Upload:
    def __init__(self, base: str, layout: Path, creds: str) -> None:
        self.base, self.blobs = base, layout / "blobs" / "sha256"
        self.headers = {"Authorization": "Basic " + base64.b64encode(creds.encode()).decode()} if creds else {}
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def manifest(self, descriptor: dict[str, Any], name: str) -> None:
        """What it refers to first: the registry refuses a manifest whose parts it lacks."""
        data = self._path(descriptor).read_bytes()
        content = json.loads(data)
        for child in content.get("manifests", []):
            self.manifest(child, child["digest"])
        for part in [content["config"], *content["layers"]] if "config" in content else []:
            self._blob(part)
        self._ask("PUT", f"{self.base}/manifests/{name}", data, {"Content-Type": descriptor["mediaType"]})

    def _blob(self, descriptor: dict[str, Any]) -> None:
        try:
            self._ask("HEAD", f"{self.base}/blobs/{descriptor['digest']}")
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise
            begun = self._ask("POST", f"{self.base}/blobs/uploads/", b"")
            place = f"{urljoin(self.base, begun)}&digest={quote(descriptor['digest'])}"
            size = str(self._path(descriptor).stat().st_size)
            kind = {"Content-Type": "application/octet-stream", "Content-Length": size}
            with self._path(descriptor).open("rb") as data:
                self._ask("PUT", place, data, kind)

    def _path(self, descriptor: dict[str, Any]) -> Path:
        return self.blobs / str(descriptor["digest"]).partition(":")[2]

    def _ask(
        self, method: str, url: str, data: bytes | BinaryIO | None = None, headers: dict[str, str] | None = None
    ) -> str:
        request = urllib.request.Request(url, data, {**self.headers, **(headers or {})}, method=method)
        with self.opener.open(request, timeout=60) as answer:
            return str(answer.headers.get("Location", ""))
