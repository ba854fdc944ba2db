"""Layers merged into one tree, bottom up, in memory; no file is touched, so no member can reach outside the root.

The rules are those of the OCI image-spec (layer.md) as Docker and containerd apply them; F-numbers name them in the
tests. Members apply in their order. What tells a whiteout's victims (lower layers only, F4, F5) from the layer's own
entries is that each layer's names are remembered while it is applied: see :class:`_Layering`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

from ..errors import ConvertError, LimitExceeded
from .layer import Layer
from .policy import apply
from .tar import HARD_LINK, Member
from .tree import DIRECTORY, FILE, KIND_NAMES, MAX_PATH, SYMLINK, Node, Tree, show, walk

WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
AUFS = b".wh..wh."  # AUFS' own names; its directory of hard links is the only one that old Docker layers refer to
AUFS_LINKS = b".wh..wh.plnk/"
MAX_SYMLINKS = 40  # in one lookup, as Linux (path_resolution(7))
MAX_DEPTH = MAX_PATH // 2
MAX_EXPANSION = 10_000_000  # path components that symlinks may add to all lookups of an image (F37)

def flatten(layers: Sequence[Layer], policy: str) -> Tree:
    """The file system that ``layers``, bottom first, make together.

    ``policy`` is "root" or "keep", see :func:`~shifterwrap.convert.policy.apply`. ConvertError names the member that
    breaks a rule; LimitExceeded when symlinks make it too much work.
    """
    merge = _Merge()
    for layer in layers:
        merge.apply(layer)
    return _finished(merge.root, apply(merge.root, policy))


class _Merge:
    """The tree so far. All lookups stay inside its root: ``..`` stops there and symlinks are followed from there."""

    def __init__(self) -> None:
        self.root = Node(DIRECTORY)
        self._expansion = 0

    def apply(self, layer: Layer) -> None:
        _Layering(self, layer.index).apply(layer.members)

    def directory(self, path: bytes, create: bool) -> Optional[Node]:
        """The directory that ``path`` leads to. A missing one is made, 0755 root (F16); None without ``create``."""
        here, above = self.root, list[Node]()
        names = path.split(b"/")[::-1] if path else []
        symlinks = 0
        while names:
            name = names.pop()
            if name == b"..":
                here = above.pop() if above else here
                continue
            if not name or name == b".":
                continue
            child = here.children.get(name)
            if child is None:
                if not create:
                    return None
                child = here.children[name] = Node(DIRECTORY)
            if child.kind == DIRECTORY:
                above.append(here)
                here = child
            elif child.kind == SYMLINK:
                symlinks += 1
                if child.target.startswith(b"/"):
                    here, above = self.root, []
                names += self._expanded(child.target, symlinks, path)
            elif create:
                raise ConvertError(f"a layer puts {show(path)} below a {KIND_NAMES[child.kind]}")
            else:
                return None
        if len(above) >= MAX_DEPTH:
            raise ConvertError(f"a layer nests directories too deeply: {show(path)[:200]}…")
        return here

    def _expanded(self, target: bytes, symlinks: int, path: bytes) -> list[bytes]:
        if symlinks > MAX_SYMLINKS:
            raise ConvertError(f"a layer puts something below a loop of symlinks: {show(path)}")
        names = target.split(b"/")[::-1]
        self._expansion += len(names)
        if self._expansion > MAX_EXPANSION:
            raise LimitExceeded("the image needs too many symlinks to be followed")
        return names


class _Layering:
    """One layer being applied: ``_put`` are the names that this layer itself has put into each directory."""

    def __init__(self, merge: _Merge, index: int) -> None:
        self._merge = merge
        self._index = index
        self._put: dict[Node, set[bytes]] = {}
        self._hidden: set[Node] = set()  # directories below which nothing of a lower layer is left
        self._waiting: dict[bytes, Member] = {}  # hard links whose target has not appeared yet, by their own path
        self._aufs_links: dict[bytes, Node] = {}

    def apply(self, members: Sequence[Member]) -> None:
        for member in members:
            if not member.path:
                self._root(member)
            elif WHITEOUT in member.path and self._marker(member):
                continue
            else:
                self._entry(member)
        self._late_links()

    # ---- markers

    def _marker(self, member: Member) -> bool:
        """Whether ``member`` is a whiteout or AUFS' own, of whatever type (F13); then it has been dealt with."""
        parent, _, name = member.path.rpartition(b"/")
        if (name.startswith(AUFS) and name != OPAQUE) or b"/" + AUFS in b"/" + parent:  # F10
            if member.path.startswith(AUFS_LINKS) and member.kind == FILE:
                self._aufs_links[member.path] = self._node(member)
            return True
        if any(part.startswith(WHITEOUT) for part in parent.split(b"/")):
            raise ConvertError(f"layer {self._index} has an entry below a whiteout: {show(member.path)}")
        if not name.startswith(WHITEOUT):
            return False
        victim = name[len(WHITEOUT) :]
        if victim in (b"", b".", b".."):
            raise ConvertError(f"layer {self._index} has a whiteout of nothing: {show(member.path)}")  # F9, F11
        directory = self._merge.directory(parent, create=False)
        if directory is None:
            return True  # F2
        if name == OPAQUE:
            self._hide_lower(directory)
        else:
            self._hide_name(directory, victim)
        return True

    def _hide_name(self, directory: Node, name: bytes) -> None:
        child = directory.children.get(name)
        if child is None:
            return
        own = name in self._put.get(directory, ())
        if child.kind == DIRECTORY and (self._hide_lower(child) or own):
            if not own:
                _reset(child)
        elif not own:
            del directory.children[name]

    def _hide_lower(self, top: Node) -> bool:
        """Remove from ``top`` what is not of this layer, and return whether anything is left (F5, F6).

        A directory of a lower layer that has entries of this one below it stays, as if it had been implied by them.
        """
        order, pending = [], [top]
        while pending:  # every directory below, parents first; no recursion, for depth is the image's choice
            directory = pending.pop()
            if directory in self._hidden:
                continue
            self._hidden.add(directory)
            order.append(directory)
            pending += [child for child in directory.children.values() if child.kind == DIRECTORY]
        for directory in reversed(order):
            put = self._put.get(directory, ())
            for name, child in list(directory.children.items()):
                if name in put:
                    continue
                if child.kind == DIRECTORY and child.children:
                    _reset(child)
                else:
                    del directory.children[name]
        return bool(top.children)

    # ---- entries

    def _root(self, member: Member) -> None:
        if member.kind != DIRECTORY:  # CVE-2021-29136
            raise ConvertError(f"layer {self._index} replaces the root directory by something else")
        _set_metadata(self._merge.root, member)

    def _entry(self, member: Member) -> None:
        parent, _, name = member.path.rpartition(b"/")
        directory = self._merge.directory(parent, create=True)
        assert directory is not None
        if self._waiting:
            self._waiting.pop(member.path, None)  # F18: the last one wins
        if member.kind == HARD_LINK:
            self._link(directory, name, member)
            return
        existing = directory.children.get(name)
        if member.kind == DIRECTORY and existing is not None and existing.kind == DIRECTORY:
            _set_metadata(existing, member)  # F17
        else:
            directory.children[name] = self._node(member)
        self._mark(directory, name)

    def _node(self, member: Member) -> Node:
        node = Node(member.kind)
        _set_metadata(node, member)
        node.size = member.size
        node.target = member.link
        node.rdev = member.rdev
        node.layer = self._index
        node.offset = member.offset
        node.sparse = member.sparse
        return node

    def _mark(self, directory: Node, name: bytes) -> None:
        put = self._put.get(directory)
        if put is None:
            put = self._put[directory] = set()
        put.add(name)

    # ---- hard links (F20)

    def _link(self, directory: Node, name: bytes, member: Member) -> None:
        if member.link == member.path:
            raise ConvertError(f"layer {self._index} has a hard link to itself: {show(member.path)}")
        target = self._target(member)
        if target is None:
            self._waiting[member.path] = member
            return
        directory.children[name] = target
        self._mark(directory, name)

    def _target(self, member: Member) -> Optional[Node]:
        """The inode that the hard link ``member`` names; its last component is not followed, as link(2) does."""
        if member.link.startswith(AUFS_LINKS):
            return self._aufs_links.get(member.link)
        parent, _, name = member.link.rpartition(b"/")
        directory = self._merge.directory(parent, create=False)
        target = directory.children.get(name) if directory is not None else None
        if not member.link or (target is not None and target.kind == DIRECTORY):
            raise ConvertError(f"layer {self._index} has a hard link to a directory: {show(member.path)}")
        return target

    def _late_links(self) -> None:
        """Make the links that came before their targets, chains of them included."""
        dependants: dict[bytes, list[Member]] = {}
        for member in self._waiting.values():
            dependants.setdefault(member.link, []).append(member)
        ready = [member for member in self._waiting.values() if member.link not in self._waiting]
        self._waiting = {}
        linked = 0
        while ready:
            member = ready.pop()
            self._entry(member)
            if self._waiting:
                break
            linked += 1
            ready += dependants.get(member.path, ())
        if linked < sum(map(len, dependants.values())):
            lost = next(iter(self._waiting.values()), None) or next(iter(dependants.values()))[0]
            raise ConvertError(
                f"layer {self._index} has a hard link to what is not there: {show(lost.path)} to {show(lost.link)}"
            )


def _set_metadata(node: Node, member: Member) -> None:
    node.mode = 0o777 if member.kind == SYMLINK else member.mode  # Linux has no modes of symlinks
    node.uid = member.uid
    node.gid = member.gid
    node.mtime = member.mtime
    node.xattrs = member.xattrs


def _reset(directory: Node) -> None:
    """Make ``directory`` one that no layer describes (F16)."""
    directory.mode, directory.uid, directory.gid, directory.mtime, directory.xattrs = 0o755, 0, 0, 0, None


def _finished(root: Node, warnings: list[str]) -> Tree:
    """The tree with its totals; ConvertError for a path that only symlinks made too long to be written."""
    names = live_bytes = 0
    seen: set[Node] = set()
    for path, node in walk(root):
        names += 1
        if len(path) > MAX_PATH:
            raise ConvertError(f"a layer nests directories too deeply: {show(path)[:200]}…")
        if node.kind == FILE and node not in seen:
            seen.add(node)
            live_bytes += node.stored_bytes()
    return Tree(root, warnings, names, live_bytes)
