"""Who owns the files of a merged tree, and what of their metadata this machine is to believe."""

from __future__ import annotations

from typing import Optional

from .tree import BLOCK, CHARACTER, DIRECTORY, KIND_NAMES, SYMLINK, Node, show, walk

_DROPPED_XATTRS = (b"security.selinux", b"trusted.overlay.", b"user.overlay.", b"user.rootlesscontainers")
_SQUASHFS_XATTRS = (b"user.", b"trusted.", b"security.")  # squashfs has no other name spaces


def apply(root: Node, policy: str) -> list[str]:
    """Change the tree below ``root`` as ``policy`` says, and return what was dropped, for people.

    ``root``: everything belongs to root and is readable as after ``chmod a+rX``; no set-user-ID or set-group-ID bits,
    extended attributes or device nodes. ``keep``: as the layers say, but for the attributes that only mean something on
    the machine that made the image (F25).
    """
    warnings: list[str] = []
    {"root": _own_as_root, "keep": _own_as_layers}[policy](root, warnings)
    return warnings


def _own_as_root(root: Node, warnings: list[str]) -> None:
    for path, node in walk(root):
        if node.kind == DIRECTORY:
            node.mode = node.mode & 0o1777 | 0o555
            _drop_devices(path, node, (CHARACTER, BLOCK), warnings)
        elif node.kind != SYMLINK:
            node.mode = node.mode & 0o777 | (0o555 if node.mode & 0o111 else 0o444)
        node.uid = node.gid = 0
        node.xattrs = None


def _own_as_layers(root: Node, warnings: list[str]) -> None:
    for path, node in walk(root):
        if node.xattrs:
            node.xattrs = _portable(node.xattrs, path, warnings)
        if node.kind == DIRECTORY:
            _drop_devices(path, node, (), warnings)


def _drop_devices(path: bytes, directory: Node, kinds: tuple[int, ...], warnings: list[str]) -> None:
    """Drop device nodes of ``kinds``, and those of numbers beyond Linux' 12 and 20 bits (linux/kdev_t.h)."""
    for name, node in sorted(directory.children.items()):
        if node.kind in (CHARACTER, BLOCK):
            major, minor = node.rdev
            if node.kind in kinds or not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):
                del directory.children[name]
                where = path + b"/" + name if path else name
                warnings.append(f"dropped {KIND_NAMES[node.kind]} {show(where)} ({major}, {minor})")


def _portable(xattrs: dict[bytes, bytes], path: bytes, warnings: list[str]) -> Optional[dict[bytes, bytes]]:
    kept = {}
    for name, value in sorted(xattrs.items()):
        if name.startswith(_DROPPED_XATTRS):
            continue
        if name.startswith(_SQUASHFS_XATTRS):
            kept[name] = value
        else:
            warnings.append(f"dropped attribute {name.decode(errors='backslashreplace')} of {show(path)}")
    return kept or None
