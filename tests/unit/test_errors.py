"""errors.py: one line per fault, records that survive a process, and the exit code that each fault earns."""

from __future__ import annotations

import errno
import json
from typing import Any, Callable, NoReturn

import pytest

from shifterwrap import errors
from shifterwrap.errors import Error, describe, from_record, guard, one_line

CLASSES = sorted(errors.classes().items())


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plain", "plain"),
        ("two\nlines\r\nand\ttabs", "two lines and tabs"),
        ("\x1b[31mred\x1b[0m \x07bell", "?[31mred?[0m ?bell"),
        ("back\x08space\x00nul\x7fdelete\x9bcsi", "back?space?nul?delete?csi"),
        ("\u202egnp.exe\u2066", "?gnp.exe?"),
        ("caf\udce9", "caf?"),
        ("Grüße ✓", "Grüße ✓"),
        ("", ""),
        ("x" * 5000, "x" * 2000),
        (OSError(2, "No such file"), "[Errno 2] No such file"),
    ],
)
def test_one_line(text: object, line: str) -> None:
    assert one_line(text) == line


@pytest.mark.parametrize(("name", "kind"), CLASSES)
def test_records_come_back_as_what_they_were(name: str, kind: type[Error]) -> None:
    record = json.loads(json.dumps(kind("what\nhappened", "what to do").record()))
    assert record == {"id": name, "message": "what happened", "hint": "what to do"}
    again = from_record(record)
    assert (type(again), str(again), again.hint) == (kind, "what happened", "what to do")
    assert from_record(kind("x").record()).hint == kind.default_hint


def test_a_record_holds_the_causes() -> None:
    fault = Error("cannot pull")
    fault.__cause__ = OSError(errno.ECONNREFUSED, "Connection refused")
    assert fault.record()["message"] == "cannot pull: Connection refused"


@pytest.mark.parametrize(
    "record",
    [{}, {"id": "OfAnotherVersion", "message": "m"}, {"id": 3, "message": None, "hint": ["x"]}, {"id": "object"}],
)
def test_strange_records_are_plain_errors(record: dict[str, object]) -> None:
    fault = from_record(record)
    assert type(fault) is Error
    assert str(fault) == str(record.get("message", "failed"))


def raised(*chain: BaseException) -> Error:
    """The first, caused by the second, and so on."""
    for fault, cause in zip(chain, chain[1:]):
        fault.__cause__ = cause
    assert isinstance(chain[0], Error)
    return chain[0]


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (Error("failed"), "failed"),
        (Error("failed", "try again"), "failed (try again)"),
        (raised(Error("a"), ValueError("b"), OSError(13, "Permission denied", "/x")), "a: b: Permission denied"),
        (raised(Error("cannot open: No such file"), OSError(2, "No such file")), "cannot open: No such file"),
        (raised(Error("a"), ValueError("")), "a"),
        (raised(Error("a"), ValueError("evil\x1b[2J\nline")), "a: evil?[2J line"),
        (Error("a", "hint\x1b\nwith"), "a (hint? with)"),
    ],
)
def test_describe(fault: Error, line: str) -> None:
    assert describe(fault) == line


LAUNCH = {"CommandNotExecutable": 126, "CommandNotFound": 127}
ADMIN = {"UsageError": 2, "BadReference": 2, "NotCached": 3}


@pytest.mark.parametrize(("name", "kind"), CLASSES)
def test_exit_codes(name: str, kind: type[Error]) -> None:
    assert (kind.launch_code, kind.admin_code) == (LAUNCH.get(name, 125), ADMIN.get(name, 1))


def raising(fault: BaseException) -> Callable[[], int]:
    def main() -> NoReturn:
        raise fault

    return main


@pytest.mark.parametrize(
    ("fault", "codes", "line"),
    [
        (errors.UsageError("no IMAGE", "usage"), (125, 2), "prog: no IMAGE (usage)"),
        (errors.CommandNotFound("x: not found", "h"), (127, 1), "prog: x: not found (h)"),
        (errors.NotCached("x", "pull it"), (125, 3), "prog: x (pull it)"),
        (FileNotFoundError(2, "No such file or directory", "/f"), (125, 1), "prog: /f: No such file or directory"),
        (OSError(28, "No space left on device"), (125, 1), "prog: No space left on device"),
        (OSError("odd"), (125, 1), "prog: OSError('odd')"),
        (RecursionError("deep"), (125, 1), "prog: nested too deeply (please report it"),
        (KeyError("x"), (125, 1), "prog: internal error: KeyError: 'x' (please report it"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("admin", [False, True])
def test_guard_prints_one_line(fault: Exception, codes: Any, line: str, admin: bool, capsys: Any) -> None:
    assert guard("prog", raising(fault), admin=admin) == codes[admin]
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(line)
    assert (len(err.splitlines()), err[-1]) == (1, "\n")


def test_guard_returns_what_went_well(capsys: Any) -> None:
    assert [guard("prog", lambda code=code: code) for code in (0, 1, 7)] == [0, 1, 7]  # type: ignore[misc]
    assert capsys.readouterr() == ("", "")


def test_guard_of_an_interrupt(capsys: Any) -> None:
    assert guard("prog", raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ("", "")


def test_guard_of_a_closed_pipe(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    silenced: list[bool] = []
    monkeypatch.setattr(errors, "_silence_stdout", lambda: silenced.append(True))
    assert guard("prog", raising(BrokenPipeError(errno.EPIPE, "Broken pipe"))) == 141
    assert (silenced, capsys.readouterr()) == ([True], ("", ""))


def test_guard_for_machines(capsys: Any) -> None:
    assert guard("prog", raising(errors.NotFound("no\x1bsuch", "look")), json=True) == 125
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": {"id": "NotFound", "message": "no?such", "hint": "look"}}
    assert err == "prog: no?such (look)\n"


@pytest.mark.parametrize("fault", [Error("x"), OSError(5, "Input/output error"), ValueError("x")], ids=repr)
def test_guard_shows_where_with_debug(fault: Exception, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("SHIFTERWRAP_DEBUG", "1")
    assert guard("prog", raising(fault)) == 125
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "in main" in err
    assert err.splitlines()[-1].startswith("prog: ")
