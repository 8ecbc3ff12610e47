#!/bin/sh
# Prints the folder of torchtune and what its recipes import, for tests that run them; with --install gets it first where
# it is missing, by pip into a cache of the user's. Not into .venv: transformers and PEFT refuse its old torchao.
# Exits with 1, and one line that says what to run, where it is not there.

VERSION=0.6.1
PLACE="${XDG_CACHE_HOME:-$HOME/.cache}/ckpt-convert-tests/torchtune-$VERSION"

# The stamp is written last, so an interrupted installation is done again.
find_torchtune() { [ -e "$PLACE/.installed" ] && echo "$PLACE"; }

find_torchtune && exit 0
if [ "$1" = --install ]; then
    echo 'Installing torchtune for the tests of its recipes ...' >&2
    .venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --target "$PLACE" "torchtune==$VERSION" \
        torchao==0.10.0 omegaconf==2.3.0 antlr4-python3-runtime==4.9.3 >/dev/null 2>&1 && touch "$PLACE/.installed"
    find_torchtune && exit 0
fi
echo 'no torchtune was found: run tests/torchtune.sh --install' >&2
exit 1
