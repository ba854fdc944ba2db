#!/bin/sh
# Makes a bare Debian 12 able to run every test: sh tests/testbed/setup.sh, as root. Quiet, and quick once done.
# Starts no service, and leaves no apt source behind. With names of packages it installs those and does nothing else.
set -eu
umask 022

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# registry and images: docker-registry skopeo umoci busybox-static debootstrap (test/sci) openssl (token server)
# conversion and mounting: squashfs-tools squashfs-tools-ng squashfuse
# other runtimes: charliecloud-runtime, patchelf and uidmap for apptainer
# the checks: shellcheck man-db
packages='docker-registry skopeo umoci busybox-static debootstrap openssl ca-certificates python3-venv
	squashfs-tools squashfs-tools-ng squashfuse charliecloud-runtime patchelf uidmap shellcheck man-db'

die() {
	echo "setup.sh: $*" >&2
	exit 1
}

missing() {
	for package; do
		[ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || printf '%s ' "$package"
	done
}

# Debian's packages start their services when installed, unless a policy forbids it.
install_packages() {
	[ "$(id -u)" = 0 ] || die "must run as root to install: $*"
	command -v apt-get >/dev/null || die "knows Debian only"
	policy=/usr/sbin/policy-rc.d
	if [ ! -e $policy ]; then
		trap 'rm -f /usr/sbin/policy-rc.d' EXIT
		trap 'exit 1' HUP INT TERM
		printf '#!/bin/sh\nexit 101\n' >$policy
		chmod 755 $policy
	fi
	log=$(mktemp)
	export DEBIAN_FRONTEND=noninteractive
	{ apt-get -q update && apt-get -q install -y --no-install-recommends "$@"; } >"$log" 2>&1 || {
		tail -n 20 "$log" >&2
		die "apt-get could not install: $* (whole log: $log)"
	}
	rm -f "$log"
	case " $* " in *' docker-registry '*) update-rc.d docker-registry disable >/dev/null ;; esac
}

# An ordinary user with a range of subordinate ids, as newuidmap wants it.
add_user() {
	name=$1 uid=$2
	getent passwd "$name" >/dev/null || useradd --create-home --uid "$uid" --user-group --shell /bin/sh "$name"
	first=$((uid * 65536))
	range=$first-$((first + 65535))
	grep -qs "^$name:" /etc/subuid || usermod --add-subuids $range "$name"
	grep -qs "^$name:" /etc/subgid || usermod --add-subgids $range "$name"
}

# shellcheck disable=SC2086 # lists of package names
provide() {
	lacking=$(missing "$@")
	[ -z "$lacking" ] || install_packages $lacking
}

if [ $# -gt 0 ]; then
	provide "$@"
	exit
fi
# shellcheck disable=SC2086 # a list of package names
provide $packages
[ "$(id -u)" = 0 ] || die "must run as root"
add_user swtester 2001
add_user swother 2002
[ ! -c /dev/fuse ] || chmod 666 /dev/fuse
sh "$here/apptainer.sh" swtester
