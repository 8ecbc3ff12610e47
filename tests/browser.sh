#!/bin/sh
# Prints the path of a Chromium that the tests of the pages can use; with --install gets one first where there is none.
# Exits with 1, and one line that says what to install, where none is found.

answers() { [ -n "$1" ] && "$1" --version >/dev/null 2>&1; }

find_browser() {
    for name in "$CHROMIUM" chromium chromium-browser google-chrome google-chrome-stable \
        "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome" \
        "${PLAYWRIGHT_BROWSERS_PATH:-$HOME/.cache/ms-playwright}"/chromium-*/chrome-linux*/chrome; do
        path=$(command -v "$name" 2>/dev/null) || continue
        # Where a name only points to a snap that is not there, it is on the path and yet no browser.
        if answers "$path"; then echo "$path"; return 0; fi
    done
    return 1
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; elif [ -t 0 ]; then sudo "$@"; else sudo -n "$@"; fi
}

install_browser() {
    if command -v apt-get >/dev/null; then
        as_root apt-get -qq update && as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y chromium
        if find_browser >/dev/null; then return; fi
    fi
    # Ubuntu has Chromium only as a snap; playwright brings its own.
    if [ -x .venv/bin/playwright ]; then .venv/bin/playwright install chromium; fi
}

find_browser && exit 0
if [ "$1" = --install ]; then
    echo 'Installing Chromium for the tests of the pages ...' >&2
    install_browser >/dev/null 2>&1
    find_browser && exit 0
fi
echo 'no Chromium was found: install it (Debian: apt-get install chromium), or set CHROMIUM to the path of one' >&2
exit 1
