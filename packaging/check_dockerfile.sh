#!/usr/bin/env bash
# Run the lines of the Dockerfile, in order, in a root made by mmdebstrap: no Docker needed, but root is.
#
#   packaging/check_dockerfile.sh [FOLDER]
#
# FOLDER holds the root afterwards for a look inside (default: a temporary one, removed). The host's apt sources,
# resolver and PIP_* settings are used; SHARE="/path ..." shows further paths of the host to it, such
# as a folder of wheels. Knows FROM debian:SUITE, ENV, COPY . DIR, WORKDIR, USER and RUN, which is all that is used.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
root=${1:-$(mktemp -d)}
mounted=()

clean_up() {
    for ((i = ${#mounted[@]} - 1; i >= 0; i--)); do umount "${mounted[i]}"; done
    # What is still mounted is the host's: better a folder that stays than one of these removed.
    if [ $# -eq 0 ] && ! grep -qF " $root/" /proc/mounts; then rm -rf "$root"; fi
}

# Show a path of the host in the root, read-only unless it is a device or /proc.
show() {
    [ -e "$1" ] || return 0
    if [ -d "$1" ]; then mkdir -p "$root$1"; else mkdir -p "$root$(dirname "$1")" && touch "$root$1"; fi
    mount --bind "$1" "$root$1"
    mounted+=("$root$1")
    case $1 in /proc | /dev) ;; *) mount -o remount,bind,ro "$root$1" ;; esac
}

make_root() {
    local sources=/etc/apt/sources.list
    for found in /etc/apt/sources.list.d/debian.sources; do [ ! -e "$found" ] || sources=$found; done
    mmdebstrap --quiet --mode=root --variant=minbase "$1" "$root" "$sources"
    trap 'clean_up "$@"' EXIT
    for path in /proc /dev /etc/resolv.conf /etc/hosts ${SHARE:-}; do show "$path"; done
    # Beside those that the image installs, not in their place.
    if [ -e "${PIP_CERT:-}" ]; then cp "$PIP_CERT" "$root/run/pip.crt" && export PIP_CERT=/run/pip.crt; fi
}

# Run one instruction's shell command as the image would: its environment, directory and user.
run() {
    local variables=(HOME=/ "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" DEBIAN_FRONTEND=noninteractive)
    while IFS= read -r -d '' variable; do variables+=("$variable"); done < <(env -0 | grep -zE '^PIP_|_proxy=' || true)
    env -i "${variables[@]}" "${environment[@]}" "$(command -v chroot)" --userspec="$user" "$root" /bin/sh -euc "cd '$directory'; $1"
}

directory=/ user=0:0 environment=(IMAGE=1)
# Comments out, continued lines joined.
while read -r instruction rest; do
    [ -n "$instruction" ] || continue
    echo "== $instruction $rest"
    case $instruction in
        FROM) suite=${rest#debian:} && make_root "${suite%-slim}" ;;
        ENV) read -r -a more <<<"$rest" && environment+=("${more[@]}") ;;
        WORKDIR) directory=$rest && mkdir -p "$root$directory" ;;
        COPY)
            mkdir -p "$root${rest#. }"
            git -C "$here" ls-files -z --cached --others --exclude-standard \
                | tar -C "$here" --null --files-from=- -c | tar -C "$root${rest#. }" -x
            ;;
        USER) user=$(chroot "$root" id -u "$rest"):$(chroot "$root" id -g "$rest") ;;
        RUN) run "$rest" ;;
        *) echo "$0: no such instruction here: $instruction" >&2 && exit 1 ;;
    esac
done < <(sed -e '/^#/d' "$here/Dockerfile" | sed -e ':a' -e '/\\$/N; s/\\\n */ /; ta')
echo "== all lines ran"
