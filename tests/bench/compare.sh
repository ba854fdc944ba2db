#!/bin/sh
# Measures shifterwrap beside its peers, on a bare Debian 12, as root: sh tests/bench/compare.sh [--quick] [ROW...]
# The rows are herd, cold, warm, memory and kills, all by default; --json FILE keeps every figure; --help says more.
# Prints one table of ratios, each of two things measured in turns in this run. A ratio over its target is a MISS and
# no failure; the exit code is 1 when something was wrong: a failed start, a damaged cache, an out-of-memory kill.
set -eu
umask 022

checkout=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
case " $* " in
*' --help '* | *' -h '*) ;;
*) sh "$checkout/tests/testbed/setup.sh" ;;
esac
export PYTHONDONTWRITEBYTECODE=1
exec /usr/bin/python3 "$checkout/tests/bench/compare.py" "$@"
