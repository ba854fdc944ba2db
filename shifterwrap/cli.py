"""The command ``shifterwrap``: what people and scripts do with the cache; nothing here is on the launcher's path."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Optional

from . import __version__, cache, config, doctor, evict, host, lease, oci, progress, store
from .cache import Entry
from .config import Config
from .errors import (
    BadReference,
    CacheError,
    ConfigError,
    EntryBusy,
    Error,
    NotCached,
    UsageError,
    describe,
    fill_standard_streams,
    guard,
    printable,
)

PROG = "shifterwrap"


class Context(NamedTuple):
    """What every subcommand works with."""

    args: argparse.Namespace
    settings: Config
    root: str


def main() -> int:
    """The program."""
    fill_standard_streams()
    args = _parser().parse_args()
    return guard(PROG, lambda: _flushed(_dispatch(args)), admin=True, json=bool(args.json))


def _flushed(code: int) -> int:
    """Meet a closed pipe while guard() looks; at exit Python would complain about it."""
    sys.stdout.flush()
    return code


def _dispatch(args: argparse.Namespace) -> int:
    if args.name == "config":  # explains a configuration that cannot be loaded
        return _config(Context(args, Config(), ""))
    try:
        settings = config.load(os.environ, os.getuid())
    except ConfigError as exc:
        if args.name != "doctor":
            raise
        print(f"{PROG}: {describe(exc)}", file=sys.stderr)
        settings = Config()
    root = cache.locate(os.environ, os.getuid(), settings.local_scratch)
    context = Context(args, settings, root)
    if args.needs_cache and not cache.check(root, os.getuid()) and args.needs_cache == "existing":
        raise NotCached(f"there is no cache at {root} yet")
    run: Callable[[Context], int] = args.run
    return run(context)


def _pull(context: Context) -> int:
    facts = host.probe(context.settings.tool_path)
    platform = oci.parse_platform(context.args.platform) if context.args.platform else None
    when = "always" if context.args.always else "missing"
    rows = []
    for text in context.args.image:
        want = lease.wanted(text, platform, context.settings, facts.mounts_squashfs, os.environ, facts.uid)
        held = lease.obtain(want, context.settings, when, PROG, verbose=context.args.verbose)
        rows.append({"reference": str(want.reference), **_row(context.root, held.entry)})
        os.close(held.fd)
    _print(context, rows, lambda row: f"{row['reference']} {row['digest']} {row['path']}")
    return 0


def _row(root: str, entry: Entry) -> dict[str, Any]:
    return {
        "digest": entry.record.get("digest", ""), "platform": entry.record.get("platform", ""), "kind": entry.kind,
        "bytes": entry.bytes, "created": entry.record.get("created", 0), "last_used": cache.last_used(entry),
        "pinned": cache.pinned(root, entry.name), "in_use": cache.in_use(entry), "name": entry.name,
        "path": entry.image,
    }


def _list(context: Context) -> int:
    names: dict[tuple[str, str], list[str]] = {}
    for ref in cache.refs(context.root):
        names.setdefault((ref.digest, ref.platform), []).append(ref.reference)
    rows = []
    for entry in cache.entries(context.root):
        try:
            row = _row(context.root, entry)
        except FileNotFoundError:
            continue  # removed while we looked
        rows.append({"references": names.get((row["digest"], row["platform"]), []), **row})
    if context.args.json:
        print(json.dumps(rows, indent=1))
        return 0
    if not rows:
        print(f"the cache {context.root} is empty")
        return 0
    now = time.time()
    table = [("REFERENCE", "DIGEST", "KIND", "SIZE", "USED", "")]
    for row in rows:
        flags = " ".join(word for word, key in (("pinned", "pinned"), ("in use", "in_use")) if row[key])
        for reference in row["references"] or ["-"]:
            table.append((reference, str(row["digest"])[:19], str(row["kind"]), progress.size(int(row["bytes"])),
                          _ago(now - float(row["last_used"])), flags))
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    for line in table:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())
    return 0


def _ago(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"


def select(context: Context, texts: Iterable[str]) -> list[Entry]:
    """The entries that ``texts`` name: by reference, by digest or the beginning of one (8 digits), or by entry name.

    NotCached for what names none.
    """
    entries = list(cache.entries(context.root))
    found = []
    for text in texts:
        digests = {text}
        try:
            reference = oci.parse_reference(text, context.settings.default_registry)
            digests = {ref.digest for ref in cache.refs(context.root) if ref.reference == str(reference)}
        except BadReference:
            pass
        bare = text.removeprefix("sha256:")
        matches = [
            entry for entry in entries
            if entry.record.get("digest") in digests or entry.name == text
            or (len(bare) >= 8 and str(entry.record.get("digest", "")).removeprefix("sha256:").startswith(bare))
        ]
        if not matches:  # perhaps one whose record is damaged
            paths = cache.entry_paths(context.root)
            matches = [cache.damaged(path) for path in paths if os.path.basename(path) == text]
        if not matches:
            raise NotCached(f"{text} is not in the cache {context.root}", "shifterwrap list shows what is")
        found += [entry for entry in matches if entry not in found]
    return found


def _inspect(context: Context) -> int:
    documents = []
    for entry in select(context, context.args.image):
        manifest = cache.read_json(os.path.join(entry.path, "manifest.json")) or {}
        documents.append({
            **_row(context.root, entry), "record": entry.record, "image": cache.image_document(entry),
            "layers": [{key: item.get(key) for key in ("digest", "size", "mediaType")}
                       for item in manifest.get("layers", [])],
        })
    if context.args.json:
        print(json.dumps(documents, indent=1))
        return 0
    for document in documents:
        print("\n".join(map(printable, _inspect_lines(document))))
    return 0


def _inspect_lines(document: dict[str, Any]) -> list[str]:
    image, record = document["image"], document["record"]
    lines = [
        f"reference:   {image['reference']}", f"digest:      {document['digest']}",
        f"platform:    {document['platform']}", f"file:        {document['path']}",
        f"kind:        {document['kind']} {record.get('compressor', '')}".rstrip(),
        f"size:        {progress.size(document['bytes'])} on disk, {progress.size(record.get('unpacked_bytes', 0))}"
        f" unpacked, {record.get('files', 0)} files",
        f"sha256:      {record.get('sha256', '')}",
        f"pulled:      {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(document['created']))}"
        f" by shifterwrap {record.get('shifterwrap', '?')} with {record.get('converter', '?')}",
        f"entrypoint:  {json.dumps(image['entrypoint'])}", f"cmd:         {json.dumps(image['cmd'])}",
        f"workdir:     {image['working_dir'] or '/'}",
    ]
    lines += [f"env:         {item}" for item in image["env"]]
    lines += [f"layer:       {item['digest']} {progress.size(int(item['size']))}" for item in document["layers"]]
    return lines


def _verify(context: Context) -> int:
    everything = context.args.all or not context.args.image
    every = [cache.read_entry(path) or cache.damaged(path) for path in cache.entry_paths(context.root)]
    chosen = every if everything else select(context, context.args.image)
    rows = []
    for entry in chosen:
        fault = _fault(entry)
        rows.append({"name": entry.name, "ok": not fault, "fault": fault})
    _print(context, rows, lambda row: f"{'ok     ' if row['ok'] else 'DAMAGED'} {row['name']} {row['fault']}".rstrip())
    if any(not row["ok"] for row in rows):
        print(f"{PROG}: remove what is damaged with: shifterwrap rm NAME; the next run pulls it anew", file=sys.stderr)
        return 1
    return 0


def _fault(entry: Entry) -> str:
    """What is wrong with an entry's bytes; empty when they are as committed."""
    from .convert import sqfs_reader, tree_writer
    from .pull import file_sha256

    try:
        if not cache.sound(entry):
            return "missing, or not of its recorded size"
        if entry.kind == cache.TREE:
            actual = tree_writer.digest_of(entry.image)
        else:
            sqfs_reader.superblock(entry.image)
            actual = file_sha256(entry.image)
        cache.image_document(entry)
    except (Error, OSError) as exc:
        return str(exc)
    return "" if actual == entry.record.get("sha256") else "content differs from what was committed"


def _rm(context: Context) -> int:
    every = [cache.read_entry(path) or cache.damaged(path) for path in cache.entry_paths(context.root)]
    entries = every if context.args.all else select(context, context.args.image)
    busy: Optional[EntryBusy] = None
    rows = []
    for entry in entries:
        try:
            freed = store.remove(context.root, entry.name)
        except EntryBusy as exc:
            busy = exc
            continue
        rows.append({"name": entry.name, "reference": entry.record.get("reference", ""), "bytes": freed})
    _print(context, rows, lambda row: f"removed {row['reference'] or row['name']} ({progress.size(row['bytes'])})")
    _forget(context)
    if busy is not None:
        raise busy
    return 0


def _forget(context: Context) -> None:
    """Drop the refs of digests that no entry has any more."""
    named = {ref.digest for ref in cache.refs(context.root)}  # first: who pulls meanwhile commits, then names
    kept = {str(entry.record.get("digest")) for entry in cache.entries(context.root)}
    store.remove_refs(context.root, named - kept)


def _pin(context: Context) -> int:
    rows = []
    for entry in select(context, context.args.image):
        store.pin(context.root, entry.name)
        rows.append({"name": entry.name, "reference": entry.record.get("reference", "")})
    _print(context, rows, lambda row: f"pinned {row['reference'] or row['name']}")
    return 0


def _unpin(context: Context) -> int:
    rows = []
    for entry in select(context, context.args.image):
        was = store.unpin(context.root, entry.name)
        rows.append({"name": entry.name, "reference": entry.record.get("reference", ""), "was_pinned": was})
    _print(context, rows, lambda row: f"{'unpinned' if row['was_pinned'] else 'was not pinned:'} "
                                      f"{row['reference'] or row['name']}")
    return 0


def _gc(context: Context) -> int:
    """Remove what dead pulls left, then what is over the limits or unused for too long."""
    args, settings = context.args, context.settings
    limit = settings.cache_max_bytes if args.max_bytes is None else max(args.max_bytes, 1)  # 0 would be no limit
    reaped = 0 if args.dry_run else store.reap(context.root)
    need = store.shortage(context.root, 0, limit, settings.cache_min_free_bytes)
    now = time.time()
    candidates = store.candidates(context.root)
    doomed = evict.victims(candidates, need, now)
    if args.older_than is not None:
        doomed += [item for item in candidates
                   if item not in doomed and not item.kept and now - item.last_used > args.older_than * 86400]
    removed = []
    for item in doomed:
        try:
            if not args.dry_run:
                store.remove(context.root, item.name)
            removed.append({"name": item.name, "bytes": item.bytes})
        except EntryBusy:
            continue
    if not args.dry_run:
        _forget(context)
    verb = "would remove" if args.dry_run else "removed"
    if args.json:
        print(json.dumps({"dry_run": args.dry_run, "removed": removed, "reaped": reaped}))
        return 0
    for row in removed:
        print(f"{verb} {row['name']} ({progress.size(int(str(row['bytes'])))})")
    total = sum(int(str(row["bytes"])) for row in removed)
    unfinished = f", {reaped} unfinished pulls" if reaped else ""
    print(f"{verb} {len(removed)} entries ({progress.size(total)}){unfinished}")
    return 0


def _export(context: Context) -> int:
    (entry,) = select(context, [context.args.image])[:1]
    if entry.kind != cache.SQUASHFS:
        raise CacheError(f"{entry.name} is a directory tree, not a squashfs file",
                         "copy the directory that shifterwrap inspect shows")
    held = cache.lease_name(context.root, entry.name)
    if held is None:
        raise NotCached(f"{context.args.image} was removed meanwhile")
    target = os.path.abspath(context.args.output)
    if os.path.lexists(target) and not context.args.force:
        raise UsageError(f"{target} exists", "name another file, or use --force")
    _copy(held.entry.image, target)
    os.close(held.fd)
    _print(context, [{"path": target, "bytes": held.entry.bytes}],
           lambda row: f"wrote {target} ({progress.size(row['bytes'])})")
    return 0


def _copy(source: str, target: str) -> None:
    """Copy in the kernel where it can (reflink, copy_file_range), and put the result in place in one step."""
    temporary = f"{target}.new-{os.getpid()}"
    with open(source, "rb", buffering=0) as src, open(temporary, "xb", buffering=0) as dst:
        try:
            left = os.fstat(src.fileno()).st_size
            while left > 0:
                left -= os.sendfile(dst.fileno(), src.fileno(), None, left)
            os.fsync(dst.fileno())
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise


def _config(context: Context) -> int:
    from . import sitefile

    if context.args.sample:
        print(sitefile.sample(), end="")
        return 0
    path = config.site_file(os.environ)
    unknown: list[str] = []
    rows = sitefile.load(path, unknown.append)
    for text in unknown:
        print(f"{PROG}: {text}", file=sys.stderr)
    if context.args.check:
        if unknown:
            raise ConfigError(f"{len(unknown)} unknown settings", "correct or remove them")
        changed = sum(row.source != "default" for row in rows)
        _print(context, [{"path": path, "settings": changed}], lambda row: f"{path}: ok, {changed} settings changed")
        return 0
    wanted = context.args.key
    if wanted and wanted not in {row.setting.key for row in rows}:
        raise UsageError(f"no setting {wanted}", "shifterwrap config lists them")
    shown = [row for row in rows if not wanted or row.setting.key == wanted]
    if context.args.json:
        rows_out = [{"key": row.setting.key, "value": row.value, "source": row.source} for row in shown]
        print(json.dumps(rows_out, indent=1))
        return 0
    for row in shown:
        print(f"{row.setting.key}: {sitefile.show(row.setting, row.value)}  # {row.source}")
    return 0


def _doctor(context: Context) -> int:
    return doctor.report(context.settings, context.root, json_output=context.args.json)


def _print(context: Context, rows: Sequence[dict[str, Any]], line: Callable[[dict[str, Any]], str]) -> None:
    if context.args.json:
        print(json.dumps(list(rows), indent=1))
    else:
        for row in rows:
            print(line(row))


def _size(text: str) -> int:
    from .sitefile import parse_size

    try:
        return parse_size(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROG, description="Manage the node-local cache of container images.",
                                     epilog="Exit: 0 done, 1 failed, 2 wrong usage, 3 not cached. man shifterwrap(1).")
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[Context], int], text: str, needs: str = "existing") -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--json", action="store_true", help="output for machines")
        command.set_defaults(run=run, name=name, needs_cache=needs)
        return command

    pull = add("pull", _pull, "pull and convert images into the cache", "any")
    pull.add_argument("image", nargs="+", metavar="IMAGE")
    pull.add_argument("--always", action="store_true", help="ask the registry whether the tag moved")
    pull.add_argument("--platform", default="", metavar="OS/ARCH", help="default: this machine's")
    pull.add_argument("-v", "--verbose", action="store_true", help="print the seconds of each stage")
    add("list", _list, "list what is cached", "any")
    images: dict[str, Any] = {"nargs": "+", "metavar": "IMAGE",
                              "help": "a reference, a digest (8 digits are enough) or an entry's name"}
    add("inspect", _inspect, "show an image's configuration and origin").add_argument("image", **images)
    verify = add("verify", _verify, "read entries whole and compare them with what was committed")
    verify.add_argument("image", nargs="*", metavar="IMAGE")
    verify.add_argument("--all", action="store_true", help="every entry (the default)")
    remove = add("rm", _rm, "remove images from the cache")
    group = remove.add_mutually_exclusive_group(required=True)
    group.add_argument("image", nargs="*", metavar="IMAGE", default=[])
    group.add_argument("--all", action="store_true", help="every entry that no job uses")
    add("pin", _pin, "keep images from being evicted").add_argument("image", **images)
    add("unpin", _unpin, "let images be evicted again").add_argument("image", **images)
    collect = add("gc", _gc, "remove what dead pulls left, and the least recently used entries over the limits")
    collect.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    collect.add_argument("--max-bytes", type=_size, metavar="SIZE", help="shrink the cache to this size")
    collect.add_argument("--older-than", type=float, metavar="DAYS", help="remove what was not used for so long")
    export = add("export", _export, "copy an image's squashfs file out of the cache")
    export.add_argument("image", metavar="IMAGE")
    export.add_argument("output", metavar="FILE")
    export.add_argument("--force", action="store_true", help="replace FILE")
    settings = add("config", _config, "show settings, their values and where they come from", "")
    settings.add_argument("key", nargs="?", default="", metavar="KEY")
    settings.add_argument("--check", action="store_true", help="only say whether the files are right")
    settings.add_argument("--sample", action="store_true", help="print a file with every setting and its default")
    add("doctor", _doctor, "look what works on this machine, and say what to do about what does not", "")
    return parser
