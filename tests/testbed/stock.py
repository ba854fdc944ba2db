"""A registry that has every image of the catalogue, each pushed when it is first asked for."""

from __future__ import annotations

from pathlib import Path

from tests.testbed.images import BUILDERS
from tests.testbed.ocilayout import write_layout
from tests.testbed.registry import Registry
from tests.testbed.upload import upload


class StockedRegistry(Registry):
    """The record of requests begins anew whenever an image is pushed, so that it holds what the test did."""

    def __init__(self, data: str | Path) -> None:
        super().__init__(data)
        self._stocked: set[str] = set()

    def image(self, name: str) -> str:
        """The reference of the catalogue's image `name`, byte for byte what its layout holds."""
        reference = f"test/{name}:1"
        if name not in self._stocked:
            upload(self.host, self.layout(name), reference)
            self._stocked.add(name)
            self.forget()
        return f"docker://{self.host}/{reference}"

    def layout(self, name: str) -> Path:
        """The OCI layout of the catalogue's image `name`, which is tagged 1."""
        path = self.data / "layouts" / name
        if not (path / "index.json").exists():
            write_layout(path, BUILDERS[name]())
        return path
