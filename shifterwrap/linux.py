"""The system calls that Python lacks, each a thin function that raises OSError; no policy lives here."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct

# linux/mount.h, linux/sched.h, linux/fs.h, linux/loop.h, linux/prctl.h
MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_REC = 0x4000
MS_SLAVE = 0x80000
MNT_DETACH = 0x2
CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
PR_SET_NO_NEW_PRIVS = 38
LOOP_CTL_GET_FREE = 0x4C82
LOOP_SET_FD = 0x4C00
LOOP_CLR_FD = 0x4C01
LOOP_SET_STATUS64 = 0x4C04
LOOP_CONFIGURE = 0x4C0A
LO_FLAGS_READ_ONLY = 1
LO_FLAGS_AUTOCLEAR = 4

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "ppc64le": 203, "riscv64": 41, "s390x": 217}
# struct flock of a 64-bit system: l_type, l_whence, l_start, l_len, l_pid (must be 0 for OFD locks), padding
_FLOCK = struct.Struct("hhqqi4x")

# statfs(2) f_type of file systems that several machines share, or that FUSE may put on a network.
NETWORK_FILE_SYSTEMS = {
    0x6969: "nfs", 0x517B: "smb", 0xFF534D42: "cifs", 0xFE534D42: "smb2", 0x0BD00BD0: "lustre",
    0x47504653: "gpfs", 0x19830326: "beegfs", 0x00C36400: "ceph", 0x5346414F: "afs", 0x6B414653: "kafs",
    0x73757245: "coda", 0x01021997: "9p", 0x65735546: "fuse", 0x20030528: "orangefs", 0xAAD7AAEA: "panfs",
    0x01161970: "gfs2", 0x7461636F: "ocfs2", 0x6A656A63: "virtiofs-dax", 0x564C: "ncp",
}


def _check(result: int, path: str | bytes | None = None) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fsdecode(path) if path is not None else None)
    return result


def _syscall(numbers: dict[str, int], *args: object) -> int:
    return int(_libc.syscall(numbers[os.uname().machine], *args))


def mount(source: str, target: str, fstype: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    _check(_libc.mount(os.fsencode(source), os.fsencode(target), fstype.encode() or None, ctypes.c_ulong(flags),
                       data.encode() or None), target)


def umount(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    _check(_libc.umount2(os.fsencode(target), flags), target)


def unshare(flags: int) -> None:
    """unshare(2)."""
    _check(_libc.unshare(flags))


def setns(fd: int, kind: int) -> None:
    """setns(2)."""
    _check(_libc.setns(fd, kind))


def pivot_root(new_root: str, put_old: str) -> None:
    """pivot_root(2)."""
    _check(_syscall(_SYS_PIVOT_ROOT, os.fsencode(new_root), os.fsencode(put_old)), new_root)


def no_new_privs() -> None:
    """prctl(PR_SET_NO_NEW_PRIVS): set-user-ID files and file capabilities give nothing from here on."""
    _check(_libc.prctl(PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)))


def syncfs(fd: int) -> None:
    """syncfs(2): everything written to the file system of ``fd`` is on its device."""
    _check(_libc.syncfs(fd))


def file_system_type(path: str) -> int:
    """The f_type of statfs(2) of ``path`` (the first word of struct statfs on every 64-bit Linux)."""
    buffer = ctypes.create_string_buffer(256)
    _check(_libc.statfs(os.fsencode(path), buffer), path)
    return int.from_bytes(buffer.raw[: 4 if os.uname().machine == "s390x" else 8], "little") & 0xFFFFFFFF


def network_file_system(path: str) -> str:
    """The name of the network file system that holds ``path``; empty when it is on none."""
    return NETWORK_FILE_SYSTEMS.get(file_system_type(path), "")


def ofd_lock(fd: int, kind: int) -> bool:
    """Take (F_RDLCK, F_WRLCK) or drop (F_UNLCK) a lock on the open file description of ``fd``, never waiting.

    False when somebody else holds a lock that conflicts. A conversion either way keeps the lock. OFD locks (Linux 3.15)
    are inherited over fork and execve and end with the last descriptor; a read-only descriptor cannot take F_WRLCK.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
    except (BlockingIOError, PermissionError):
        return False
    return True


def ofd_locked(fd: int) -> bool:
    """Whether somebody else holds any lock on the file of ``fd`` (F_OFD_GETLK); takes nothing."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def attach_loop(image_fd: int) -> str:
    """Attach the file to a free loop device, read-only, and return its path; it detaches with its last user."""
    with open("/dev/loop-control", "rb") as control:
        for _ in range(64):  # another process may take the free device between the two calls: EBUSY, ask again
            path = f"/dev/loop{fcntl.ioctl(control, LOOP_CTL_GET_FREE)}"
            device = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _configure_loop(device, image_fd)
            except OSError as exc:
                os.close(device)
                if exc.errno == 16:  # EBUSY
                    continue
                raise
            # It stays open until the process ends or executes: AUTOCLEAR would detach it before the mount.
            return path
    raise OSError(16, "no free loop device", "/dev/loop-control")


def _configure_loop(device: int, image_fd: int) -> None:
    """In one step, so that no kill leaves a device attached for ever; before Linux 5.8 in two slower ones."""
    # struct loop_info64: 7 u64/u32 fields up to lo_flags at byte 52; the rest (names, key) stays zero.
    info = bytearray(232)
    struct.pack_into("I", info, 52, LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR)
    try:
        # struct loop_config: fd, block_size, loop_info64, 8 reserved u64
        fcntl.ioctl(device, LOOP_CONFIGURE, struct.pack("II", image_fd, 0) + info + bytes(64))
        return
    except OSError as exc:
        if exc.errno not in (22, 25):  # EINVAL, ENOTTY: the kernel does not know it
            raise
    fcntl.ioctl(device, LOOP_SET_FD, image_fd)
    try:
        fcntl.ioctl(device, LOOP_SET_STATUS64, bytes(info))
    except OSError:
        fcntl.ioctl(device, LOOP_CLR_FD)
        raise
