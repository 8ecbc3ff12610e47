#!/bin/sh
# Prints the folder of the packages of a trainer (torchtune, torchtnt or composer), for tests that run it; with --install
# gets them first where they are missing, by pip into a cache of the user's. Not into .venv: they want packages, and
# versions of them, that transformers and PEFT refuse. Exits with 1, and one line that says what to run, without them.

TRAINER=$1
case $TRAINER in
torchtune) PACKAGES="torchtune==0.6.1 torchao==0.10.0 omegaconf==2.3.0 antlr4-python3-runtime==4.9.3" ;;
torchtnt) PACKAGES="torchtnt==0.2.4 pyre-extensions==0.0.32 typing-inspect==0.9.0 tensorboard==2.20.0 tabulate==0.9.0 setuptools==79.0.1" ;;
composer) PACKAGES="mosaicml==0.32.1 torchmetrics==1.7.4 torch-optimizer==0.3.0 coolname==2.2.0 tabulate==0.9.0 py-cpuinfo==9.0.0
    lightning-utilities==0.14.3 pytorch-ranger==0.1.1 importlib-metadata==8.7.0 zipp==3.21.0" ;;
*) echo "usage: tests/trainers.sh torchtune|torchtnt|composer [--install]" >&2; exit 2 ;;
esac
PLACE="${XDG_CACHE_HOME:-$HOME/.cache}/ckpt-convert-tests/$(echo "$PACKAGES" | sed 's/ .*//; s/==/-/')"

# The stamp is written last, so an interrupted installation is done again.
find_trainer() { [ -e "$PLACE/.installed" ] && echo "$PLACE"; }

find_trainer && exit 0
if [ "$2" = --install ]; then
    echo "Installing $TRAINER for the tests that run it ..." >&2
    # shellcheck disable=SC2086
    .venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --target "$PLACE" $PACKAGES >/dev/null 2>&1 &&
        touch "$PLACE/.installed"
    find_trainer && exit 0
fi
echo "no $TRAINER was found: run tests/trainers.sh $TRAINER --install" >&2
exit 1
