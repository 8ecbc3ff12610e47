#!/bin/sh
# Prints the path of the program of azurite (Azure's blob storage, for tests), which node runs; with --install gets it
# first where it is missing, from npm into a cache of the user's. Exits with 1, and one line that says what to install.

VERSION=3.37.0
PLACE="${XDG_CACHE_HOME:-$HOME/.cache}/ckpt-convert-tests/azurite-$VERSION"
PROGRAM="$PLACE/node_modules/azurite/dist/src/blob/main.js"

# The stamp is written last, so an interrupted installation is done again.
find_azurite() {
    command -v node >/dev/null 2>&1 && [ -e "$PLACE/.installed" ] && [ -e "$PROGRAM" ] && echo "$PROGRAM"
}

find_azurite && exit 0
if [ "$1" = --install ] && command -v npm >/dev/null; then
    echo 'Installing azurite for the tests of Azure ...' >&2
    npm install --prefix "$PLACE" --ignore-scripts --no-fund --no-audit "azurite@$VERSION" >/dev/null 2>&1 &&
        touch "$PLACE/.installed"
    find_azurite && exit 0
fi
echo "no azurite was found: install node 18 or newer with npm, and run tests/azurite.sh --install" >&2
exit 1
