"""What works on this machine, tried and not guessed, and what to do about what does not."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import platform
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import psutil

from . import cache, host, linux, plan, progress
from .config import Config
from .convert import squashfs
from .errors import Error, describe
from .host import Host
from .runtimes import embedded

# A squashfs image of one file, /probe, per compressor: 4 KiB each, made by mksquashfs, packed with zlib and base85.
PROBE_IMAGES = {
    "gzip": (
        'c-qS-E-YqcfB_~3Mj*+^AjoiliIIT?$Zmkjs4zlk87Tc93UZ+GOQG~fD9r~|SDcZVR+3s&UX)nCWzJA>D>*6R&<O@spMYQX0t!b2'
        'KAnkpA}M*#Na+Sg@s@@eqQ3Ur%vui|FQ4y9>9-Qt#F)uoQ^b>R0n(V#z@TPv_Rxg5De+MY4jkZkvcX71MNEA9as#KOj$4>#q$PRi'
        'dio_Ku)WsMIOXrf%D~>i@mZiD0qP(g2C&~4?nC*)Kr@RI99X#mtQft_9WoijH5eU#LM2(i-WFqI7zLwX6pVsVFbYP&C>RB!U=)mk'
        'Q7{UI1poj)8%BK'
    ),
    "zstd": (
        'c-qS-E-YqcfB_~3Mj*+?AjoiliIIT?$Zmkjcrij~Cn)_N3UZ+Go1rupRNe$i7iVOqm82Gx7bO;OxiV;M)&Hxo;3*@6P!l`<2TA6Q'
        'axdn)FwFAMTslRwzE=LGvwaiar+0Zgl`Py0*#<}6>ghdJ+@*KWAi!e6i2#`$k@wFSePDBj7~_4Fkzotal}s!Q=|%aa1qwj7Gcm9-'
        '6eJcGm!~)|F{G9xConJr#aI{$it>|ESs5HySOPQ;<?m!Zz$DO+0Ch1B1K86HKcIXCi18YG85kBFWab3AQo2(}$dvW}->=767#WNX'
        'FbP5Z#sUr;8%BmvFbYP&C>RB!U=)mkQ7{Td!6+C7qhOE&0M+|U+y'
    ),
    "lz4": (
        'c-rldu};G<6h)66H>41OLIh%9h$^H=ofu$auml5QEF((`1OiJ#Qs|nG;X|1D7o-mC-~{&{7~UCtpWc0XzINHXGy~RXlsg9`e1r<)'
        '>ef3G^`}=}e>`vA|MYt3{WGso>kFFl>0wdS%X(IAPPo>*D|cI}BhI@;TO5#)275#qr;0C&8Nwwu<1UgVHLjyc;uAs($6Z=V+MJxw'
        'jaWwA!d<<=_t1HU$9n!+Wv-{)ld4(MEbnudh{Q&$0!^{Fn-cV+RXx8gwi!LU={BbS24Ww5pRw(tW;>+Qh<5!aN8UGm<3b?_f*=Tj'
        'AP9mW2>+B{{s%3>'
    ),
    "xz": (
        'c-qS-E-YqcfB_~3Mj*+;Ajoili4jOMFf>4AS{Wg9EtLKb1vyapdr;aIDxVLfi!(CQN>Yo;ixLaC3K;&HS4BiIFfe8+-7{l8V7`D+'
        'k&y|c%5dV;>kk;_Gw8<x9U!vxrP_si3xyTu-~Vt*oq6_U&g)0kX|x-^nD(iZaZkvXhb#R$xcZ8?bDmbVbucg-Wo`Sw!05dIWMSjA'
        'z&twx-fpm=jFC~^4UBM~!DtqS^rHOI0tKK=Obo0H1&PJQ<tZ>_Ald;;Gclx=BquO1gLM=X<tL>IG$cS(@jw(ZXhXGWG&nGz0tF}y'
        '(*X-cSEvpaus}H@!zdU9qhJ(_f>AIEM!_f;1*2dTjDk@>4*&pq5lP<'
    ),
}


class Finding(NamedTuple):
    """One thing looked at. ``level`` is ok, warn (something is slower or missing) or fail (runs will not work)."""

    level: str
    subject: str
    detail: str
    hint: str = ""


def report(settings: Config, root: str, *, json_output: bool) -> int:
    """Print the findings; 1 when one of them is a failure."""
    findings = list(examine(settings, root))
    if json_output:
        print(json.dumps([finding._asdict() for finding in findings], indent=1))
    else:
        for finding in findings:
            print(f"{finding.level:<5} {finding.subject}: {finding.detail}")
            if finding.hint and finding.level != "ok":
                print(f"      -> {finding.hint}")
    return int(any(finding.level == "fail" for finding in findings))


def examine(settings: Config, root: str) -> Iterator[Finding]:
    """Every finding, in the order in which they depend on each other."""
    facts = host.probe(settings.tool_path)
    yield _machine()
    namespaces = _user_namespaces(facts)
    yield namespaces
    if namespaces.level == "ok":
        yield _overlay(facts)
    yield from _security_modules()
    yield _fuse(facts)
    if namespaces.level == "ok":
        yield from _squashfs_mounts(facts)
    yield _writer(settings)
    yield from _modules()
    yield from _runtimes(settings)
    yield _cache(root, settings)


def _machine() -> Finding:
    release, page = os.uname().release, os.sysconf("SC_PAGE_SIZE")
    detail = f"Linux {release}, {platform.machine()}, pages of {page >> 10} KiB, Python {platform.python_version()}"
    if host.kernel() < (4, 18):
        return Finding("fail", "kernel", detail, "Linux 4.18 (RHEL 8) or newer is needed")
    return Finding("ok", "kernel", detail)


def try_in_child(work: Callable[[], None]) -> str:
    """Run ``work`` in a forked process, for it changes namespaces; the reason when it fails, empty when not."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except (OSError, Error) as exc:
            text = describe(exc) if isinstance(exc, Error) else f"{exc.strerror}"
            os.write(writer, text.encode(errors="replace")[:2000])
        finally:
            os._exit(code)
    os.close(writer)
    with open(reader, encoding="utf-8", errors="replace") as answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    return text or ("" if status == 0 else "failed")


def _user_namespaces(facts: Host) -> Finding:
    if facts.uid == 0:
        return Finding("ok", "user namespaces", "not needed by root")
    reason = try_in_child(lambda: linux.unshare(linux.CLONE_NEWUSER | linux.CLONE_NEWNS))
    if not reason:
        return Finding("ok", "user namespaces", "ordinary users may make them")
    return Finding("fail", "user namespaces", reason, _user_namespace_hint())


def _user_namespace_hint() -> str:
    for name, bad, cure in (
        ("kernel/unprivileged_userns_clone", "0", "sysctl kernel.unprivileged_userns_clone=1"),
        ("user/max_user_namespaces", "0", "sysctl user.max_user_namespaces=28633"),
        ("kernel/apparmor_restrict_unprivileged_userns", "1",
         "an AppArmor profile with 'userns,' for python3, or sysctl kernel.apparmor_restrict_unprivileged_userns=0"),
    ):
        if _read(f"/proc/sys/{name}") == bad:
            return f"an administrator may allow them: {cure}"
    return "a seccomp filter or a security module forbids them; ask the administrator"


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as stream:
            return stream.read().strip()
    except OSError:
        return ""


def _overlay(facts: Host) -> Finding:
    def mount() -> None:
        if facts.uid:
            embedded.unshare_user((facts.uid, facts.gid), (facts.uid, facts.gid))
        linux.unshare(linux.CLONE_NEWNS)
        linux.mount("", "/", flags=linux.MS_REC | linux.MS_SLAVE)
        linux.mount("overlay", "/mnt", "overlay", linux.MS_RDONLY, "lowerdir=/usr:/etc")

    reason = try_in_child(mount)
    if not reason:
        return Finding("ok", "overlay", "mounts" + ("" if facts.uid == 0 else " in a user namespace"))
    return Finding("warn", "overlay", reason, "runs work by single binds; --writable-tmpfs needs Linux 5.11 or newer")


def _security_modules() -> Iterator[Finding]:
    if os.path.isdir("/sys/fs/selinux"):
        mode = "enforcing" if _read("/sys/fs/selinux/enforce") == "1" else "permissive"
        yield Finding("ok", "SELinux", mode)
    if _read("/sys/module/apparmor/parameters/enabled") == "Y":
        yield Finding("ok", "AppArmor", "enabled")


def _fuse(facts: Host) -> Finding:
    if facts.mounts_by_loop:
        return Finding("ok", "mounting images", "root mounts squashfs in the kernel, by a loop device")
    if not facts.squashfuse:
        return Finding("warn", "squashfuse_ll", "not found: images are cached as directory trees",
                       "install the package squashfuse (Debian, Ubuntu, EPEL)")
    if not facts.fuse:
        return Finding("warn", "/dev/fuse", "not readable and writable: images are cached as directory trees",
                       "chmod 666 /dev/fuse, as udev does; modprobe fuse")
    return Finding("ok", "mounting images", f"by {facts.squashfuse}")


def _squashfs_mounts(facts: Host) -> Iterator[Finding]:
    """Mount one small image per compressor the way a launch does."""
    if not facts.mounts_squashfs:
        return
    for name, packed in PROBE_IMAGES.items():
        with tempfile.TemporaryDirectory() as directory:
            path = os.path.join(directory, f"{name}.sqsh")
            with open(path, "wb") as stream:
                stream.write(zlib.decompress(base64.b85decode(packed)))
            reason = try_in_child(lambda: _look_inside(path, facts))  # noqa: B023 - called before the loop goes on
        if not reason:
            yield Finding("ok", f"squashfs with {name}", "mounts")
        else:
            hint = f"convert with another compressor than {name}: see compressor in the configuration"
            yield Finding("warn", f"squashfs with {name}", reason, hint)


def _look_inside(path: str, facts: Host) -> None:
    user = plan.User(facts.uid, facts.gid, "probe", "probe", "", "")
    image = plan.Image(path, cache.SQUASHFS, (), (), (), "/")
    embedded.enter(plan.Plan(image, (), (), {}, frozenset(), "/", ("/",), False, (), False, user), facts)
    with open("/probe", "rb") as stream:
        if stream.read() != b"shifterwrap\n":
            raise OSError(5, "the file reads differently")


def _writer(settings: Config) -> Finding:
    try:
        compressor = squashfs.best_compressor() if settings.compressor == "auto" else settings.compressor
        writer = squashfs.find_writer(settings.tool_path, compressor)
    except Error as exc:
        return Finding("warn", "squashfs writer", f"{exc}; images are cached as directory trees", exc.hint)
    version = ".".join(map(str, writer.version))
    return Finding("ok", "squashfs writer", f"{writer.path} {version} with {compressor}")


def _modules() -> Iterator[Finding]:
    for name, what in (("isal", "gzip layers unpack about three times as fast"),
                       ("zstandard", "zstd layers can be read, and images are written with zstd")):
        if importlib.util.find_spec(name) is None:
            yield Finding("warn", f"Python package {name}", f"missing; with it {what}", "pip install shifterwrap[fast]")
        else:
            yield Finding("ok", f"Python package {name}", "installed")


def _runtimes(settings: Config) -> Iterator[Finding]:
    yield Finding("ok", "runtime embedded", "built in")
    for name in host.RUNTIME_PROGRAMS:
        program = host.runtime_program(name, settings.tool_path)
        if program:
            yield Finding("ok", f"runtime {name}", f"{program} {_version(program)}".strip())
        else:
            yield Finding("ok", f"runtime {name}", "not installed; it is not needed")


def _version(program: str) -> str:
    env = {"PATH": "/usr/bin:/bin", "HOME": "/", "USER": "root"}
    try:
        done = subprocess.run([program, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=10,
                              env=env, text=True, errors="replace", check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "(does not start)"
    return (done.stdout + done.stderr).strip().split("\n")[0][:60]


def _cache(root: str, settings: Config) -> Finding:
    try:
        present = cache.check(root, os.getuid())
    except Error as exc:
        return Finding("fail", "cache", str(exc), exc.hint)
    existing = root
    while not os.path.isdir(existing):
        existing = os.path.dirname(existing)
    free = psutil.disk_usage(existing).free
    detail = f"{root}, {_file_system(existing)}, {progress.size(free)} free"
    if not present:
        detail += ", not made yet"
    if not os.access(existing, os.W_OK):
        return Finding("fail", "cache", f"{detail}, not writable", "set SHIFTERWRAP_CACHE_DIR to a directory of yours")
    if free < settings.cache_min_free_bytes:
        return Finding("fail", "cache", detail, "free some space, or set SHIFTERWRAP_CACHE_DIR to another place")
    return Finding("ok", "cache", detail)


def _file_system(path: str) -> str:
    """The type of the file system, by the longest mount point above ``path``."""
    real = os.path.realpath(path)
    above = [part for part in psutil.disk_partitions(all=True) if plan.within(real, part.mountpoint)]
    return max(above, key=lambda part: len(part.mountpoint)).fstype if above else "unknown file system"
