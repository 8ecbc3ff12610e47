#!/bin/sh
# Prints a C compiler that the tests of faults can use; with --install gets one first where there is none.
# Exits with 1, and one line that says what to install, where none is found.

find_compiler() {
    for name in "$CC" cc gcc clang; do
        if [ -n "$name" ] && command -v "$name" >/dev/null 2>&1; then echo "$name"; return 0; fi
    done
    return 1
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; elif [ -t 0 ]; then sudo "$@"; else sudo -n "$@"; fi
}

find_compiler && exit 0
if [ "$1" = --install ] && command -v apt-get >/dev/null; then
    echo 'Installing a C compiler for the tests of faults ...' >&2
    (as_root apt-get -qq update && as_root apt-get -qq install -y gcc libc6-dev) >/dev/null 2>&1
    find_compiler && exit 0
fi
echo 'no C compiler was found: install one (Debian: apt-get install gcc libc6-dev), or set CC to the path of one' >&2
exit 1
