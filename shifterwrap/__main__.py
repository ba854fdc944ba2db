"""``python -I …/shifterwrap/__main__.py``: the administrator's command, and the processes that wrapped-run starts.

Run by path, so that neither the caller's PYTHONPATH nor his current directory decides which shifterwrap runs.
"""

import os
import sys


def main() -> int:
    """``pull-worker``, with its order on standard input, and ``snapshot PATH`` are this package's own; the rest is
    ``shifterwrap``."""
    words = sys.argv[1:]
    if words[:1] == ["pull-worker"]:
        from shifterwrap.pull import work

        return work(sys.stdin.read())
    if words[:1] == ["snapshot"]:
        from shifterwrap.sitefile import answer

        return answer(words[1])
    from shifterwrap.cli import main as administer

    return administer()


if __name__ == "__main__":
    # After the standard library, which nothing here may shadow, and before any other shifterwrap.
    sys.path.insert(3, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as exc:
        sys.exit(f"shifterwrap: the Python package {exc.name} is missing (install shifterwrap anew, with pip)")
