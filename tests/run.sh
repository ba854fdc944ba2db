#!/bin/sh
# Every test, on a bare Debian 12: sh tests/run.sh [PYTEST ARGUMENT...]; the exit code says whether all passed.
# As root it installs what the tests need, and takes a missing feature for a failure. As an ordinary user it uses what
# is there, and skips. With no arguments the unit tests also run with the oldest Python that the package supports.
set -eu
umask 022

checkout=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
oldest=3.9

say() { echo "run.sh: $*"; }

if [ "$(id -u)" = 0 ]; then
	base=${SHIFTERWRAP_TEST_BASE:-/var/tmp/shifterwrap-test}
	sh "$checkout/tests/testbed/setup.sh"
	export SHIFTERWRAP_TESTS_REQUIRE_ALL=1
else
	base=${SHIFTERWRAP_TEST_BASE:-/var/tmp/shifterwrap-test-$(id -u)}
	say "not root: nothing is installed, and tests of what is missing are skipped"
fi
export SHIFTERWRAP_TEST_BASE="$base" PYTHONDONTWRITEBYTECODE=1
mkdir -p "$base"
copy=$(mktemp -d "$base/copy.XXXXXX")
trap 'rm -rf "$copy"' EXIT
trap 'exit 1' HUP INT TERM

# Building leaves files in the tree that it builds, so it gets a copy. Untracked files are part of the tree.
tar -C "$checkout" --exclude=./.git --exclude=./build --exclude=./.venv --exclude='*.egg-info' --exclude=__pycache__ \
	-cf - . | tar -C "$copy" --no-same-owner -xf -

# environment VENV PYTHON: a virtual environment that ordinary users can read, with the package as it is now
environment() {
	"$1/bin/python" -c '' 2>/dev/null || "$2" -m venv --clear "$1"
	"$1/bin/python" -m pip install -qq --use-pep517 --disable-pip-version-check "${copy}[fast,test]"
}

# suite VENV ARGUMENT...
suite() {
	venv=$1
	shift
	(cd "$checkout" && PATH="$venv/bin:$PATH" "$venv/bin/python" -m pytest -o cache_dir="$venv/pytest" "$@")
}

old_python() {
	for candidate in "python$oldest" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$oldest".*/bin/python; do
		"$candidate" -c 'import ensurepip, venv' 2>/dev/null && echo "$candidate" && return
	done
}

failed=0
environment "$base/venv" /usr/bin/python3
if [ $# -gt 0 ]; then
	suite "$base/venv" "$@" || failed=$?
	exit $failed
fi
suite "$base/venv" tests || failed=$?

old=$(old_python || true)
if [ -n "$old" ]; then
	say "the unit tests with $("$old" --version)"
	environment "$base/venv-$oldest" "$old"
	# that interpreter may lie where ordinary users cannot run it: tests that act as one are skipped then
	SHIFTERWRAP_TESTS_REQUIRE_ALL=0 suite "$base/venv-$oldest" tests/unit || failed=$?
else
	say "skipped: the unit tests with Python $oldest, which is not installed"
fi
exit $failed
