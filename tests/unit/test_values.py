"""values.py stands in for typing and json on the launcher's path: it must behave as they do."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from shifterwrap.values import NamedTuple, loads


class Point(NamedTuple):
    """Two fields, one with a default, and a method."""

    x: int
    y: int = 7

    @property
    def total(self) -> int:
        return self.x + self.y


def test_fields_come_by_position_by_name_and_by_default() -> None:
    assert Point(1) == Point(x=1) == Point(1, 7) == Point(y=7, x=1) == (1, 7)


def test_fields_are_attributes_and_methods_work() -> None:
    point = Point(1, 2)
    assert (point.x, point.y, point.total) == (1, 2, 3)


@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((1, 2, 3), {}), ((1,), {"z": 1}), ((1, 2), {"x": 3})])
def test_wrong_arguments_are_refused(args: tuple[int, ...], kwargs: dict[str, int]) -> None:
    with pytest.raises(TypeError):
        Point(*args, **kwargs)


def test_a_value_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Point(1).x = 2  # type: ignore[misc]
    with pytest.raises(AttributeError):
        Point(1).z = 2  # type: ignore[attr-defined]


def test_replace_and_asdict_and_repr_are_namedtuples() -> None:
    assert Point(1)._replace(y=9) == Point(1, 9)
    assert Point(1)._asdict() == {"x": 1, "y": 7}
    assert repr(Point(1)) == "Point(x=1, y=7)"
    assert Point._fields == ("x", "y")
    assert Point._field_defaults == {"y": 7}


def test_values_can_be_pickled() -> None:
    assert pickle.loads(pickle.dumps(Point(1, 2))) == Point(1, 2)


JSON = ['{"a":[1,2.5,null,true,"\\u00e9\\n"],"b":{}}', "[]", '"x"', "12", "-0.5e3", '{"a":1} \n']


@pytest.mark.parametrize("text", JSON)
def test_json_is_read_as_json_reads_it(text: str) -> None:
    assert loads(text) == json.loads(text)


@pytest.mark.parametrize("text", ["", "{", '{"a":}', "[1,]", "nul", '{"a":1}x', '"\n"', "{'a':1}"])
def test_what_is_not_json_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        loads(text)


def test_it_loads_neither_typing_nor_json() -> None:
    root = Path(__file__).resolve().parents[2]
    code = f"import sys; sys.path.append({str(root)!r}); import shifterwrap.values; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-SI", "-c", code], capture_output=True, text=True, check=True)
    assert not {"typing", "json", "re", "collections"} & set(done.stdout.split())
