"""The cold flow in order: resolve, fetch, convert, verify, commit. One of the two composers; stages do not know it.

::

    reference -> source.resolve -> Resolved                       what the reference means on this platform
              -> fetch.download per layer, in threads -> blobs    verified, compressed, in the stage directory
                 convert.layer.scan of the same bytes -> Layer    members, and the proof of the layer's diff id
              -> convert.flatten -> Tree                          one file system, in memory
              -> convert.squashfs.write | tree_writer.write       pass 2: each blob is inflated once more, in order
              -> convert.readback.check                           what was written is what was meant
              -> store.commit -> Lease                            the one rename
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, Optional

import filelock

from . import __version__, cache, fetch, singleflight, store
from .cache import Key, Ref
from .config import Config, from_values
from .convert import flatten, layer, readback, squashfs, tree_writer
from .convert.content import OpenLayer
from .convert.decode import decode
from .convert.tree import SYMLINK, Node, Tree
from .errors import Bug, ConverterMissing, ConvertError, Error, WaitTimeout
from .events import Emit, Event
from .oci import Descriptor, Platform, Reference
from .progress import Progress
from .singleflight import Flight
from .sources import Resolved
from .sources.docker import DockerSource

PARALLEL_LAYERS = 4
_TELL_SECONDS = 0.5


class Job(NamedTuple):
    """One pull: for whom, into which cache, as which kinds of entry (the first that can be made is).

    ``always`` asks the registry even if the reference is known; ``deadline`` is in seconds since the epoch.
    """

    reference: Reference
    platform: Platform
    root: str
    kinds: tuple[str, ...]
    always: bool
    deadline: float


class _Layers:
    """The layers of one image on their way through fetch and scan; the first failure stops the others."""

    def __init__(self, source: DockerSource, directory: str, settings: fetch.Settings, emit: Emit) -> None:
        self._source, self._directory, self._settings, self._emit = source, directory, settings, emit
        self._stopped = threading.Event()

    def path(self, descriptor: Descriptor) -> str:
        """Where the compressed blob lies."""
        return os.path.join(self._directory, descriptor.digest.replace(":", "-"))

    def read(self, resolved: Resolved, limits: layer.Limits) -> list[layer.Layer]:
        """Every layer scanned, bottom first; a blob that stands in the image twice is fetched once."""
        blobs = resolved.manifest.layers
        budget = layer.Budget(limits, sum(blob.size for blob in blobs))
        first = {blob.digest: index for index, blob in reversed(list(enumerate(blobs)))}
        with ThreadPoolExecutor(PARALLEL_LAYERS, thread_name_prefix="layer") as pool:
            jobs = {index: pool.submit(self._one, index, blobs[index], resolved.config.diff_ids[index], budget)
                    for index in sorted(first.values())}
            errors = [job.exception() for job in jobs.values()]
        for error in errors:
            if error is not None and not isinstance(error, _Stopped):
                raise error
        found = []
        for index, blob in enumerate(blobs):
            original = jobs[first[blob.digest]].result()
            if resolved.config.diff_ids[index] != resolved.config.diff_ids[first[blob.digest]]:
                raise ConvertError(f"layer {index} has two diff ids for one blob")
            found.append(original._replace(index=index))
        return found

    def _one(self, index: int, blob: Descriptor, diff_id: str, budget: layer.Budget) -> layer.Layer:
        chunks = self._stored(fetch.download(self._source.open_range, blob, settings=self._settings, emit=self._emit,
                                             subject=blob.digest[:19]), self.path(blob))
        try:
            scanned = layer.scan(index, chunks, diff_id, budget)
            _drain(chunks)
        except ConvertError:
            self._blame_bytes(chunks)
            self._stopped.set()
            raise
        except BaseException:
            self._stopped.set()
            raise
        return scanned

    def _blame_bytes(self, chunks: Iterable[bytes]) -> None:
        """Damaged content whose digest is wrong too is the registry's fault, not the image's: that error is raised."""
        try:
            _drain(chunks)
        except BaseException:
            self._stopped.set()
            raise

    def _stored(self, chunks: Iterable[bytes], path: str) -> Iterator[bytes]:
        with open(path, "wb", buffering=0) as blob:
            for chunk in chunks:
                if self._stopped.is_set():
                    raise _Stopped
                left = memoryview(chunk)
                while left:  # a disk that becomes full takes a part first, without an error
                    left = left[blob.write(left) :]
                yield chunk


class _Stopped(Exception):
    """Another layer failed; this one need not go on."""


def _drain(chunks: Iterable[bytes]) -> None:
    for _ in chunks:
        pass


def run(job: Job, config: Config, emit: Emit) -> Key:
    """Pull the image of ``job`` into its cache, unless it is there; the key of its entry.

    Raises the RegistryError, ConvertError or CacheError that ended it; the cache is then as it was before.
    """
    store.reap(job.root)
    settings = fetch.Settings(config.connect_seconds, config.read_seconds, config.retries,
                              deadline=time.monotonic() + max(job.deadline - time.time(), 0.0))
    source = DockerSource(job.reference, insecure=config.insecure_registries, settings=settings)
    try:
        known = _unchanged(job, config, source)
        if known is not None:
            return known
        with _stage("resolve", emit):
            resolved = source.resolve(job.platform)
            _warn_of_platform(resolved, job, emit)
        key = _converted_once(job, config, source, settings, resolved, emit)
    except OSError as exc:
        if exc.errno in store.FULL or str(exc.filename).startswith(job.root):
            raise store.explain(exc, job.root) from exc
        raise
    finally:
        source.close()
    _remember(job, key.digest, resolved.source_digest)
    return key


def _warn_of_platform(resolved: Resolved, job: Job, emit: Emit) -> None:
    """A tag without an index is what it is; its config may even be wrong about it, so this is no error."""
    said = resolved.config.architecture
    if said and said != job.platform.architecture:
        emit(Event("warn", f"{job.reference} says that it is for {said}, not for {job.platform.architecture}"))


def _unchanged(job: Job, config: Config, source: DockerSource) -> Optional[Key]:
    """The entry we have, when the tag still means it: for ``--pull always``, at the price of one HEAD."""
    ref = cache.lookup(job.root, job.reference, job.platform) if job.always else None
    if ref is None or not ref.source_digest or source.digest() != ref.source_digest:
        return None
    for kind in job.kinds:
        key = Key(ref.digest, job.platform, config.owner_policy, kind)
        lease = cache.lease(job.root, key)
        if lease is not None:
            os.close(lease.fd)
            _remember(job, ref.digest, ref.source_digest)
            return key
    return None


def _remember(job: Job, digest: str, source_digest: str) -> None:
    ref = Ref(str(job.reference), str(job.platform), digest, source_digest, time.time())
    store.put_ref(job.root, cache.ref_path(job.root, job.reference, job.platform), ref)


def _converted_once(job: Job, config: Config, source: DockerSource, settings: fetch.Settings, resolved: Resolved,
                    emit: Emit) -> Key:
    """The key of the entry, made unless it is there; two references to one digest convert it once."""
    kind, writer = _choose_kind(job, config, emit)
    key = Key(resolved.manifest.digest, job.platform, config.owner_policy, kind)
    lock = filelock.FileLock(singleflight.lock_path(job.root, str(key)), mode=0o600)
    try:
        with lock.acquire(timeout=max(job.deadline - time.time(), 0.0)):
            lease = cache.lease(job.root, key) or _make(job, config, source, settings, resolved, key, writer, emit)
    except filelock.Timeout:
        raise WaitTimeout(f"waited until the deadline for another pull of {resolved.manifest.digest}") from None
    os.close(lease.fd)
    return key


def _choose_kind(job: Job, config: Config, emit: Emit) -> tuple[str, Optional[squashfs.Writer]]:
    """Squashfs where the caller can mount it and a sound tool can write it; else a directory tree."""
    if job.kinds[0] == cache.TREE:
        return cache.TREE, None
    try:
        return cache.SQUASHFS, squashfs.find_writer(config.tool_path, _compressor(config))
    except ConverterMissing as exc:
        if cache.TREE not in job.kinds:
            raise
        emit(Event("warn", f"{exc}; caching a directory tree instead ({exc.hint})"))
        return cache.TREE, None


def _compressor(config: Config) -> str:
    return squashfs.best_compressor() if config.compressor == "auto" else config.compressor


def _make(job: Job, config: Config, source: DockerSource, settings: fetch.Settings, resolved: Resolved, key: Key,
          writer: Optional[squashfs.Writer], emit: Emit) -> cache.Lease:
    """Fetch, convert, verify and commit in a stage directory of our own."""
    packed = sum(blob.size for blob in {blob.digest: blob for blob in resolved.manifest.layers}.values())
    with store.stage(job.root) as staged:
        estimate = packed * 2 if key.kind == cache.SQUASHFS else packed * 4  # blobs beside a squashfs, or a tree
        store.reserve(job.root, staged, estimate, config.cache_max_bytes, config.cache_min_free_bytes,
                      lambda name: emit(Event("warn", f"evicted {name}")))
        blobs = os.path.join(staged.path, "blobs")
        os.mkdir(blobs, 0o700)
        layers = _Layers(source, blobs, settings, emit)
        limits = layer.Limits(max_unpacked_bytes=config.max_image_bytes, max_ratio=config.max_ratio,
                              max_entries=config.max_entries)
        with _stage("fetch", emit):
            tree = flatten.flatten(layers.read(resolved, limits), config.owner_policy)
        for warning in tree.warnings:
            emit(Event("warn", warning))

        def open_layer(index: int) -> Iterator[bytes]:
            return decode(_chunks(layers.path(resolved.manifest.layers[index])))

        image = os.path.join(staged.path, cache.IMAGE_NAMES[key.kind])
        if writer is not None:
            record = _write_squashfs(tree, open_layer, image, writer, config, emit)
        else:
            record = _write_tree(tree, open_layer, image, emit)
        record.update(_provenance(job, resolved, tree))
        store.write_file(os.path.join(staged.path, "manifest.json"), resolved.manifest_bytes, durable=True)
        store.write_file(os.path.join(staged.path, "config.json"), resolved.config_bytes, durable=True)
        signal.setitimer(signal.ITIMER_REAL, 0)  # from here on it is only renamed: see _end_at
        with _stage("commit", emit):
            return store.commit(job.root, staged, key, record, _image_document(job, resolved, tree))


@contextmanager
def _stage(name: str, emit: Emit) -> Iterator[None]:
    """Tells that a stage begins, and at its good end how long it took."""
    began = time.monotonic()
    emit(Event(name))
    yield
    emit(Event(name, seconds=time.monotonic() - began))


def _chunks(path: str) -> Iterator[bytes]:
    with open(path, "rb", buffering=0) as blob:
        while chunk := blob.read(1 << 20):
            yield chunk


def _write_squashfs(tree: Tree, open_layer: OpenLayer, path: str, writer: squashfs.Writer, config: Config,
                    emit: Emit) -> dict[str, Any]:
    compressor = _compressor(config)
    level = min(config.compression_level, 9 if compressor == "gzip" else 22)
    options = squashfs.Options(compressor, level, config.block_bytes,
                               config.threads or len(os.sched_getaffinity(0)))
    with _stage("convert", emit):
        squashfs.write(tree, open_layer, path, options, emit, writer=writer)
    with _stage("verify", emit), ThreadPoolExecutor(1, thread_name_prefix="sha256") as pool:
        digest = pool.submit(file_sha256, path)
        readback.check(path, tree, options.threads, emit)
    version = ".".join(map(str, writer.version))
    return {"bytes": os.stat(path).st_size, "sha256": digest.result(), "compressor": options.compressor,
            "converter": f"{writer.program} {version}"}


def _write_tree(tree: Tree, open_layer: OpenLayer, path: str, emit: Emit) -> dict[str, Any]:
    with _stage("convert", emit):
        digest = tree_writer.write(tree, open_layer, path, emit)
    return {"bytes": tree.live_bytes + tree.names * 4096, "sha256": digest, "compressor": "", "converter": "tree"}


def file_sha256(path: str) -> str:
    """The SHA-256 of a file, as hex."""
    digest = hashlib.sha256()
    for chunk in _chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def _provenance(job: Job, resolved: Resolved, tree: Tree) -> dict[str, Any]:
    return {"reference": str(job.reference), "digest": resolved.manifest.digest, "platform": str(job.platform),
            "files": tree.names, "unpacked_bytes": tree.live_bytes, "created": time.time(),
            "shifterwrap": __version__}


def _image_document(job: Job, resolved: Resolved, tree: Tree) -> dict[str, Any]:
    """What the launcher reads: small, whatever the history in the config is."""
    config = resolved.config
    return {"reference": str(job.reference), "digest": resolved.manifest.digest,
            "source_digest": resolved.source_digest, "env": list(config.env), "entrypoint": list(config.entrypoint),
            "cmd": list(config.cmd), "working_dir": config.working_dir, "user": config.user, "labels": config.labels,
            "architecture": config.architecture,
            "points": [path for path in cache.MOUNT_POINTS if _has(tree, path)]}


def _has(tree: Tree, path: str) -> bool:
    """Whether the image has ``path`` itself, not by way of a link."""
    node: Optional[Node] = tree.root
    for part in path.encode().split(b"/")[1:]:
        node = node.children.get(part) if node is not None else None
    return node is not None and node.kind != SYMLINK


class Teller:
    """A listener that keeps the producer's record current for the waiters, and passes events on."""

    def __init__(self, flight: Flight, then: Emit) -> None:
        self._flight, self._then = flight, then
        self._told = 0.0
        self._bytes: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        """Take one event."""
        self._then(event)
        with self._lock:
            if event.subject and event.stage == "fetch":
                self._bytes[event.subject] = (event.done, event.total)
            now = time.monotonic()
            if now - self._told < _TELL_SECONDS:
                return
            self._told = now
            layers = event.stage == "fetch"
            done = sum(done for done, _ in self._bytes.values()) if layers else event.done
            total = sum(total for _, total in self._bytes.values()) if layers else event.total
            singleflight.tell(self._flight, "pulling", stage=event.stage, done=done, total=total)


def produce(flight: Flight, job: Job, config: Config, emit: Emit) -> None:
    """Pull with the lock of the reference held, leaving progress, then the result or the failure, for the waiters."""
    singleflight.tell(flight, "pulling", stage="resolve", done=0, total=0)
    try:
        key = run(job, config, Teller(flight, emit))
    except Error as exc:
        singleflight.tell_failure(flight, exc)
        raise
    except Exception as exc:
        singleflight.tell_failure(flight, Bug(f"internal error: {type(exc).__name__}: {exc}"))
        raise
    singleflight.tell(flight, "done", key=str(key))


def _end_at(deadline: float) -> None:
    """Interrupt this process at ``deadline``, whatever it waits for: a writer that hangs, a lock, a slow disk."""

    def late(number: int, frame: object) -> None:
        raise WaitTimeout("the deadline passed before the image was converted")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(deadline - time.time(), 0.001))


def work(text: str) -> int:
    """A worker's main: the order that lease.py gave it, as JSON; the failure is left in the lock's record."""
    order = json.loads(text)
    raw = order["job"]
    reference = Reference(*raw["reference"])
    job = Job(reference, Platform(*raw["platform"]), raw["root"], tuple(raw["kinds"]), raw["always"], raw["deadline"])
    _end_at(job.deadline)
    listener = Progress(order["prog"], str(reference), sys.stderr, verbose=order["verbose"])
    try:
        produce(Flight(*order["flight"]), job, from_values(order["config"]), listener)
    except Error:
        return 1  # the process that started us reads the record and says it
    finally:
        listener.close()
    return 0
