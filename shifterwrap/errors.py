"""What can go wrong, and what each fault means to a caller.

Every failure that a person can act on is one class here. The class name is its stable id (``--json``, the record
that a producer leaves for its waiters); ``launch_code`` is what wrapped-run exits with and ``admin_code`` what
shifterwrap exits with; ``hint`` names the next step. Stages raise, only :func:`guard` prints and exits.
"""

from __future__ import annotations

import os
import sys

from .values import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class Error(Exception):
    """Something failed; the message says what and where."""

    launch_code = 125
    admin_code = 1
    default_hint = ""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.default_hint

    def __str__(self) -> str:
        return one_line(self.message)

    def record(self) -> dict[str, str]:
        """This error as the producer's record of a failure; see :func:`from_record`."""
        return {"id": type(self).__name__, "message": one_line(with_causes(self)), "hint": one_line(self.hint)}


class UsageError(Error):
    """The command line is wrong."""

    admin_code = 2


class BadReference(UsageError):
    """IMAGE is not a reference that any source understands."""

    default_hint = "write it as docker://REGISTRY/REPOSITORY:TAG"


class ConfigError(Error):
    """A configuration file or setting is wrong."""

    default_hint = "check it with: shifterwrap config --check"


class RegistryError(Error):
    """A registry answered with something that is not an image, or not at all."""


class NotFound(RegistryError):
    """The registry has no such repository, tag or digest."""

    default_hint = "check the spelling of the repository and the tag"


class AuthDenied(RegistryError):
    """The registry wants credentials, or refuses the ones it got."""

    default_hint = "the image is private or does not exist under that name"


class Unreachable(RegistryError):
    """No answer, or a server error that outlived the retries."""

    default_hint = "check the network and the registry, then run again; nothing was cached"


class RateLimited(RegistryError):
    """The registry told us to slow down (HTTP 429) for longer than we wait."""

    default_hint = "wait, or pull from a mirror of that registry"


class DigestMismatch(RegistryError):
    """Bytes do not match the digest or the size that names them; they were thrown away."""

    default_hint = "the registry or something before it alters content; nothing was cached"


class ConvertError(Error):
    """The layers cannot be made into one file system."""

    default_hint = "the image itself is at fault; nothing was cached"


class ConverterMissing(ConvertError):
    """No sound tool to write squashfs is installed."""

    default_hint = "install squashfs-tools-ng, or squashfs-tools 4.6 or newer; shifterwrap doctor says more"


class LimitExceeded(ConvertError):
    """The image is larger than a configured limit: a bomb, or a limit that is too low."""

    default_hint = "if the image is right, raise the limit in the configuration: shifterwrap config"


class CacheError(Error):
    """The cache cannot be used."""

    default_hint = "run: shifterwrap doctor"


class CacheFull(CacheError):
    """No room is left, and nothing may be evicted."""

    default_hint = "free some space: shifterwrap gc, shifterwrap rm IMAGE, or choose another SHIFTERWRAP_CACHE_DIR"


class CacheFormat(CacheError):
    """The cache was written by another version and is left alone."""

    default_hint = "use the shifterwrap that made it, or another SHIFTERWRAP_CACHE_DIR"


class NotCached(CacheError):
    """The image is not in the cache."""

    admin_code = 3
    default_hint = "get it with: shifterwrap pull IMAGE"


class EntryBusy(CacheError):
    """The entry is in use by a running job."""

    default_hint = "wait for the jobs that use it to end"


class WaitTimeout(CacheError):
    """Another process was still pulling this image when the deadline passed."""

    default_hint = "raise pull_deadline_seconds in the configuration, or look at the process that pulls"


class RuntimeUnavailable(Error):
    """The container runtime that was asked for is not here, or cannot do what was asked."""

    default_hint = "shifterwrap doctor lists the runtimes of this machine"


class SandboxError(Error):
    """The kernel refused a step of building the container."""

    default_hint = "run: shifterwrap doctor"


class CommandNotExecutable(Error):
    """The command was found in the image and cannot be executed."""

    launch_code = 126


class CommandNotFound(Error):
    """The command is not in the image."""

    launch_code = 127
    default_hint = "the command is looked up in the image, with the image's PATH"


class Interrupted(Error):
    """The work was ended by a signal."""


class Bug(Error):
    """A fault of shifterwrap itself."""

    default_hint = "please report it with the output of: SHIFTERWRAP_DEBUG=1 and the same command"


def one_line(text: object) -> str:
    """``text`` as one printable line: control characters of hostile servers never reach a terminal."""
    return printable(" ".join(str(text).split()))[:2000]


def printable(text: str) -> str:
    """``text`` with a question mark for whatever a terminal might obey."""
    return "".join(c if c.isprintable() else "?" for c in text.encode(errors="replace").decode())


def from_record(record: Mapping[str, object]) -> Error:
    """The error that another process recorded; an id of another version becomes a plain :class:`Error`."""
    kind = classes().get(str(record.get("id", "")), Error)
    return kind(str(record.get("message", "failed")), str(record.get("hint", "")))


def classes(base: type[Error] = Error) -> dict[str, type[Error]]:
    """Every error there is, by its id."""
    found = {base.__name__: base}
    for sub in base.__subclasses__():
        found.update(classes(sub))
    return found


def describe(exc: Error) -> str:
    """One line for a person: what happened, why, and in parentheses what to do next."""
    return with_causes(exc) + (f" ({one_line(exc.hint)})" if exc.hint else "")


def with_causes(exc: Error) -> str:
    """What happened and why."""
    parts = [str(exc)]
    cause = exc.__cause__
    while cause is not None:
        detail = cause.strerror if isinstance(cause, OSError) and cause.strerror else one_line(cause)
        if detail and detail not in parts[-1]:
            parts.append(detail)
        cause = cause.__cause__
    return ": ".join(parts)


def fill_standard_streams() -> None:
    """Open what the caller has closed of 0, 1 and 2, so that no lease becomes somebody's standard output."""
    while (fd := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) < 3:
        os.set_inheritable(fd, True)
    os.close(fd)
    sys.stdout = sys.stdout or open(1, "w")
    sys.stderr = sys.stderr or open(2, "w")


def guard(prog: str, main: Callable[[], int], *, admin: bool = False, json: bool = False) -> int:
    """Run ``main`` and return the exit code; the only place that turns exceptions into output."""
    debug = bool(os.environ.get("SHIFTERWRAP_DEBUG"))
    try:
        return main()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _silence_stdout()
        return 141
    except Error as exc:
        fault = exc
    except OSError as exc:
        fault = Error(f"{exc.filename}: {exc.strerror}" if exc.filename else exc.strerror or repr(exc))
        fault.__traceback__ = exc.__traceback__
    except RecursionError:
        fault = Bug("nested too deeply")
    except Exception as exc:  # noqa: BLE001 - the last resort that keeps a traceback from a user
        fault = Bug(f"internal error: {type(exc).__name__}: {exc}")
        fault.__traceback__ = exc.__traceback__
    if debug:
        sys.excepthook(type(fault), fault, fault.__traceback__)
    if json:
        import json as encoder

        print(encoder.dumps({"error": fault.record()}))
    print(f"{prog}: {describe(fault)}", file=sys.stderr)
    return fault.admin_code if admin else fault.launch_code


def _silence_stdout() -> None:
    """Keep the interpreter from complaining about the closed pipe once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
