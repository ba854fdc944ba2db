#!/bin/sh
# Installs apptainer from Debian sid on Debian 12, beside the machine's own libc: sh apptainer.sh [USER]
# sid's build needs a newer glibc than the machine has. So its libc and loader go to a private directory, and only the
# two programs of apptainer are told to use them. apt sees sid through lists of our own, never through the machine's.
# Ends well only when USER, an ordinary one, could run a directory, build a SIF and run that.
set -eu
umask 022

user=${1:-swtester}
private=/usr/local/lib/apptainer-sid
say() { echo "apptainer.sh: $*" >&2; }

program=$(command -v apptainer || true)
# The file records which apptainer was found to work.
checked() { [ -n "$program" ] && [ "$(cat $private/checked 2>/dev/null)" = "$(stat -c '%n %i %Z' "$program")" ]; }
checked && exit 0

scratch=$(mktemp -d /var/tmp/apptainer-sid.XXXXXX)
trap 'rm -rf "$scratch"' EXIT
trap 'exit 1' HUP INT TERM
chmod 755 "$scratch"

# The machine's own mirror: apt knows it, in whatever format the sources are written.
mirror() {
	codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
	# shellcheck disable=SC2016 # apt's variables
	apt-get indextargets --format '$(RELEASE) $(REPO_URI)' 'Created-By: Packages' | sed -n "s/^$codename //p" | head -n 1
}

# apt-get with the one source sid, and all its state in the scratch directory. A mirror frozen at a date is fine.
sid_apt() {
	apt-get -qq -o Dir::Etc::sourcelist="$scratch/sid.list" -o Dir::Etc::sourceparts=/dev/null \
		-o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null \
		-o Dir::State::lists="$scratch/lists" -o Dir::Cache="$scratch/cache" -o APT::Sandbox::User=root \
		-o Acquire::Check-Valid-Until=false "$@"
}

download() {
	uri=$(mirror)
	[ -n "$uri" ] || { apt-get -qq update && uri=$(mirror); }
	[ -n "$uri" ] || { say "no apt source of this Debian release to take the mirror from" && exit 1; }
	mkdir -p "$scratch/lists/partial" "$scratch/cache/archives/partial" "$scratch/deb"
	echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $uri sid main" >"$scratch/sid.list"
	sid_apt update
	(cd "$scratch/deb" && sid_apt download apptainer libc6 libseccomp2 libsqlite3-0)
	for deb in "$scratch"/deb/*.deb; do dpkg-deb -x "$deb" "$scratch/root"; done
}

# Give one program of apptainer the private loader and libraries; RPATH, so that the libraries find each other too.
adopt() {
	loader=$(patchelf --print-interpreter "$1")
	patchelf --set-interpreter "$private/${loader##*/}" --force-rpath --set-rpath $private "$1"
}

install_beside() {
	cd "$scratch/root"
	libc=$(find usr/lib -name libc.so.6)
	libs=${libc%/*}
	adopt usr/bin/apptainer
	adopt "$libs/apptainer/bin/starter"
	rm -rf $private
	mkdir -p $private
	cp -a "$libs"/*.so* $private/
	tar -cf - "$libs/apptainer" etc/apptainer var/lib/apptainer usr/bin/apptainer | tar -C / --keep-directory-symlink -xf -
	cd /
}

as_user() {
	(cd "$scratch/user" && runuser -u "$user" -- env -i HOME="$scratch/user" PATH=/usr/sbin:/usr/bin:/sbin:/bin "$@")
}

check() {
	mkdir -p "$scratch/user/image/bin" "$scratch/user/image/etc"
	for directory in dev proc sys tmp var/tmp home root; do mkdir -p "$scratch/user/image/$directory"; done
	cp /bin/busybox "$scratch/user/image/bin/sh"
	chown -R "$user:" "$scratch/user"
	as_user apptainer --silent exec image /bin/sh -c 'exit 0' || { say "$user cannot run a directory" && exit 1; }
	as_user apptainer --silent build image.sif image || { say "$user cannot build a SIF" && exit 1; }
	as_user apptainer --silent exec image.sif /bin/sh -c 'exit 0' || { say "$user cannot run a SIF" && exit 1; }
}

if [ -z "$program" ]; then
	download
	install_beside
fi
check
mkdir -p $private
stat -c '%n %i %Z' "$(command -v apptainer)" >$private/checked
