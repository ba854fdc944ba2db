"""NamedTuple and a JSON reader for the launcher's path, where ``typing`` and ``json`` would cost half of a launch.

Measured with CPython 3.11, CPU over the bare interpreter's 7 ms: typing 11 ms, json 8 ms, this 1 ms. Type checkers see
typing's NamedTuple; at run time it is the small class below, which behaves the same as far as this project uses it.
"""

from __future__ import annotations

from operator import itemgetter

try:
    from _json import make_scanner as _make_scanner
except ImportError:  # another Python: slower, and right
    _make_scanner = None  # type: ignore[assignment,misc]

TYPE_CHECKING = False  # type checkers take this name for true, as typing's
if TYPE_CHECKING:
    from typing import Any, NamedTuple

    __all__ = ["TYPE_CHECKING", "NamedTuple", "loads"]
else:

    class _Record(tuple):
        """What the classes made below have in common; as collections.namedtuple, without the code that it compiles."""

        __slots__ = ()
        _fields = ()
        _field_defaults = {}

        def __new__(cls, *args, **kwargs):
            if len(args) != len(cls._fields) or kwargs:
                args = cls._complete(args, kwargs)
            return tuple.__new__(cls, args)

        @classmethod
        def _complete(cls, args, kwargs):
            values = list(args)
            for name in cls._fields[len(args) :]:
                if name not in kwargs and name not in cls._field_defaults:
                    raise TypeError(f"{cls.__name__} misses {name}")
                values.append(kwargs.pop(name) if name in kwargs else cls._field_defaults[name])
            if kwargs or len(args) > len(cls._fields):
                raise TypeError(f"{cls.__name__} takes no {', '.join(kwargs) or 'more arguments'}")
            return values

        def __getnewargs__(self):
            return tuple(self)

        def __repr__(self):
            return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._asdict().items())})"

        def _asdict(self):
            return dict(zip(self._fields, self))

        def _replace(self, **changes):
            return type(self)(**{**self._asdict(), **changes})

    class _Maker(type):
        """Turns a class body of annotations into a _Record with those fields."""

        def __new__(mcs, name, bases, body):
            if not bases:
                return type.__new__(mcs, name, bases, body)
            fields = tuple(body.get("__annotations__", ()))
            body["_field_defaults"] = {field: body.pop(field) for field in fields if field in body}
            body.update({field: property(itemgetter(index)) for index, field in enumerate(fields)})
            return type(name, (_Record,), {**body, "_fields": fields, "__slots__": ()})

    class NamedTuple(metaclass=_Maker):
        """The base to derive from: fields are the annotations, defaults their values."""


class _Context:
    """What the scanner of the C module asks a JSONDecoder for."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = float


def loads(text: str) -> Any:
    """The value of a JSON text without leading white space; ValueError when it is none."""
    if _make_scanner is None:
        import json

        return json.loads(text)
    try:
        value, end = _make_scanner(_Context)(text, 0)  # type: ignore[arg-type]
    except StopIteration:
        raise ValueError("not JSON") from None
    if text[end:].strip():
        raise ValueError("something follows the JSON value")
    return value
