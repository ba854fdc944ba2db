#!/bin/sh
# Shows what shifterwrap does, in a minute, with a registry of its own: sh tests/demo.sh
# On a bare Debian 12 run it as root, and it installs what it needs; an ordinary user needs those packages there.
# All else it makes lies in one temporary directory, which goes when it ends.
set -eu
umask 022

checkout=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
herd=16
scratch=$(mktemp -d /var/tmp/shifterwrap-demo.XXXXXX)
log=$scratch/registry.log

finish() {
	if [ -s "$scratch/registry.pid" ]; then
		pid=$(cat "$scratch/registry.pid")
		kill "$pid" 2>/dev/null || true
		for _ in $(seq 50); do
			kill -0 "$pid" 2>/dev/null || break
			sleep 0.1
		done
	fi
	rm -rf --one-file-system "$scratch"
}
trap finish EXIT
trap 'exit 1' HUP INT TERM

heading() { printf '\n== %s\n' "$*"; }
milliseconds() { echo $(($(date +%s%N) / 1000000)); }
fail() {
	echo "demo.sh: $*" >&2
	exit 1
}

# Print a command as a user types it, run it, and tell how long it took.
show() {
	echo "\$ $*"
	began=$(milliseconds)
	"$@" || fail "exit code $?"
	echo "  ($(($(milliseconds) - began)) ms)"
}

# The blobs that were fetched since line $1 of the registry's log, one line for each time.
blob_gets() { tail -n "+$(($1 + 1))" "$log" | sed -n 's/.*"GET [^ ]*\/blobs\/\(sha256:[0-9a-f]*\)[^"]*" 20[06] .*/\1/p'; }

heading "Preparing: packages, a virtual environment, a registry on loopback"
sh "$checkout/tests/testbed/setup.sh" docker-registry skopeo busybox-static squashfs-tools squashfuse python3-venv
mkdir "$scratch/copy"
tar -C "$checkout" --exclude=./.git --exclude=./build --exclude=./.venv --exclude='*.egg-info' -cf - . |
	tar -C "$scratch/copy" --no-same-owner -xf -
/usr/bin/python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install -qq --use-pep517 --disable-pip-version-check "${scratch}/copy[fast]"
testbed=$scratch/copy/tests/testbed/registry.py
host=$(/usr/bin/python3 "$testbed" serve --data "$scratch/registry" --pid-file "$scratch/registry.pid" --log "$log")
/usr/bin/python3 "$testbed" images --registry "$host" --data "$scratch/layouts" bb
export PATH="$scratch/venv/bin:$PATH" SHIFTERWRAP_CACHE_DIR="$scratch/cache"
image=docker://$host/test/bb:1

heading "A first run: nothing is cached, so it downloads, converts, keeps, and starts"
show wrapped-run "$image" cat /etc/os-release

heading "A second run: from the cache"
show wrapped-run "$image" cat /etc/os-release

heading "$herd at once on a cold node: one download for all of them"
mark=$(wc -l <"$log")
export SHIFTERWRAP_CACHE_DIR="$scratch/cold-cache"
echo "\$ for i in \$(seq $herd); do wrapped-run $image true & done; wait"
began=$(milliseconds)
pids=
for _ in $(seq $herd); do
	wrapped-run "$image" true &
	pids="$pids $!"
done
good=0
for pid in $pids; do
	wait "$pid" && good=$((good + 1))
done
echo "  ($(($(milliseconds) - began)) ms)"
gets=$(blob_gets "$mark" | wc -l)
blobs=$(blob_gets "$mark" | sort -u | wc -l)
echo "$good of $herd succeeded; the registry served $blobs blobs in $gets downloads"
[ "$good" = $herd ] || fail "$((herd - good)) of $herd failed"
[ "$blobs" -gt 0 ] || fail "the registry served no blob"
[ "$gets" = "$blobs" ] || fail "each blob should have been downloaded once"

heading "What is cached"
show shifterwrap list
