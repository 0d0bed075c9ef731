#!/usr/bin/env bash
# Make .venv ready: python packages, torch, triton and our rustbpe. Safe to run at any time, from any directory.
#
#     bash scripts/setup.sh          # does what is missing; milliseconds when nothing changed
#     bash scripts/setup.sh --tests  # and what only the tests import (scripts/test.lock)
#     PYTHON=python3.12 bash scripts/setup.sh
#
# Packages come from scripts/requirements.lock, exact and hashed. torch and triton are ranges: a torch that the
# chosen python already has is used as it is, and plain pip means that a pip configuration has its say. What the
# tokenizer is compared with comes from scripts/peers.lock into .venv/peers, which is on nobody's import path.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PATH=${PATH//"$PWD/.venv/bin:"/}  # an activated .venv must not become the python that .venv is made with
stamp=.venv/.setup-stamp tests_stamp=.venv/.tests-stamp
py=.venv/bin/python

say() { echo "setup: $*"; }
die() { echo "error: $*" >&2; exit 2; }

# Everything that decides what .venv must hold, in one hash; starts no python and no cargo.
state_hash() {
    {
        cat .venv/pyvenv.cfg 2>/dev/null || echo "no .venv"
        find scripts/setup.sh scripts/requirements.lock scripts/peers.lock pyproject.toml rustbpe -type f \
            -not -path '*/target/*' -not -name Cargo.lock -not -name '*.so' -not -name '*.pyc' -print0 |
            LC_ALL=C sort -z | xargs -0 sha256sum
    } | sha256sum | cut -d' ' -f1
}

is_current() {
    [ -x "$py" ] && [ -d .venv/peers ] && [ -f "$stamp" ] && [ "$(<"$stamp")" = "$(state_hash)" ] &&
        ! asks_for_another_python
}

# Only an explicit $PYTHON can differ from the python that .venv was made with.
asks_for_another_python() {
    [ -n "${PYTHON:-}" ] || return 1
    local real='import os, sys; print(os.path.realpath(sys.executable), sys.version_info[:3])'
    [ "$("$PYTHON" -c "$real" 2>/dev/null)" != "$("$py" -c "$real" 2>/dev/null)" ]
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    die "${PYTHON:+PYTHON=$PYTHON is not one: }Python 3.11, 3.12 or 3.13 is needed;" \
        "install one (Debian and Ubuntu: apt install python3 python3-venv) or name it: PYTHON=/path/to/python3"
}

find_compiler() {
    [ -x "${CARGO_HOME:-$HOME/.cargo}/bin/cargo" ] && PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin"
    cargo --version >/dev/null 2>&1 ||
        die "a cargo that works was not found and rustbpe is written in Rust; install it as https://rustup.rs tells" \
            "(no root needed) or, if you have rustup, run: rustup default stable"
    command -v cc >/dev/null ||
        die "a C linker (cc) was not found and Rust needs one; install gcc (Debian and Ubuntu: apt install gcc)"
}

# Triton compiles a C file against Python's headers before its first kernel on a GPU.
find_headers() {
    nvidia-smi --list-gpus >/dev/null 2>&1 || return 0
    local include
    include=$("$base" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
    [ -f "$include/Python.h" ] || die "triton needs Python's headers to run on the GPU and $include/Python.h was not" \
        "found; install python3-dev (Debian and Ubuntu) or python3-devel (Fedora) of the version of $base"
}

# Version of torch as a python sees it, without the seconds of importing it; nothing when absent or older than 2.9.
torch_of() {
    "$1" - <<'PY'
import re
from importlib.metadata import PackageNotFoundError, version
try:
    found = version("torch")
except PackageNotFoundError:
    found = "0.0"
if tuple(map(int, re.findall(r"\d+", found)[:2])) >= (2, 9):
    print(found)
PY
}

make_venv() {
    if "$py" -m pip --version >/dev/null 2>&1 && [ ! -f .venv/.unfinished ] && ! asks_for_another_python; then
        return
    fi
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$base has no venv module; install it (Debian and Ubuntu: apt install python3-venv)"
    say "making .venv with $("$base" --version)"
    find .venv -mindepth 1 -maxdepth 1 ! -name .setup-lock -exec rm -rf {} +
    touch .venv/.unfinished
    "$base" -m venv .venv
    rm .venv/.unfinished
}

# Put the package folders of $base behind .venv's own. Not --system-site-packages: that is blind to the packages of a
# $base that is itself a virtual environment, and pip would leave out of .venv what the outer python has already.
borrow_torch() {
    local found minor='import sys; print(sys.version_info[:2])'
    found=$(torch_of "$base")
    [ -n "$found" ] && [ "$("$base" -c "$minor")" = "$("$py" -c "$minor")" ] || return 0
    say "using the torch $found that $base provides"
    "$base" -c 'import sys
for path in sys.path:
    if path.endswith("-packages"):
        print(f"import site; site.addsitedir({path!r})")' \
        >"$("$py" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base-python.pth"
}

pip_install() {
    local what=$1 output=--quiet
    shift
    [ -t 1 ] && output=--progress-bar=on
    say "installing $what"
    "$py" -m pip install --disable-pip-version-check "$output" "$@" ||
        die "pip could not install $what (its own words are above); this step needs a network or a package cache," \
            "and running it again goes on from here"
}

install_packages() {
    pip_install "the packages of scripts/requirements.lock" --require-hashes -r scripts/requirements.lock
    [ -n "$(torch_of "$py")" ] || borrow_torch
    if [ -z "$(torch_of "$py")" ]; then
        pip_install "torch and triton (about 3 GB with CUDA: minutes)" "torch>=2.9"
    fi
    # the CUDA builds of torch bring triton; the CPU builds do not, and our kernels are tested in its interpreter
    if ! "$py" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("triton") is None)'; then
        pip_install triton "triton>=3.5"
    fi
}

install_peers() {
    rm -rf .venv/peers  # pip leaves the old files of a --target folder where they are
    mkdir .venv/peers
    pip_install "the peers of scripts/peers.lock" --target .venv/peers --no-deps --require-hashes -r scripts/peers.lock
}

build_rustbpe() {
    say "building rustbpe in release mode (about half a minute)"
    # CONDA_PREFIX beside VIRTUAL_ENV is refused by maturin; the lock (fd 9) must not pass to a compiler cache daemon
    env -u CONDA_PREFIX VIRTUAL_ENV="$PWD/.venv" "$py" -m maturin develop --release -m rustbpe/Cargo.toml \
        >.venv/rustbpe-build.log 2>&1 9>&- || {
        cat .venv/rustbpe-build.log >&2
        die "rustbpe did not build with $(cargo --version) (the compiler's words are above);" \
            "the first build needs a network, and Rust must be 1.83 or newer: run rustup update or, where cargo is" \
            "the system's, install one as https://rustup.rs tells and run this again in a new shell"
    }
}

check_imports() {
    "$py" - <<'PY' || die "the packages are installed but do not work (see above); remove .venv and run this again"
import sys

import numpy, pyarrow, torch, triton, rustbpe

# the source folder rustbpe/ imports as an empty package, and the package index has a rustbpe of another make
home = getattr(rustbpe, "__file__", None)
if not hasattr(rustbpe, "__build__") or not home.startswith(sys.prefix):
    sys.exit(f"rustbpe must be the one built here in {sys.prefix}, found {home}")
print(f"setup: python {sys.version.split()[0]}, torch {torch.__version__}, triton {triton.__version__}, numpy "
      f"{numpy.__version__}, {torch.cuda.device_count()} GPUs")
PY
}

set_up() {
    rm -f "$stamp"
    make_venv
    local target
    target=$(state_hash)  # before the work: a source edited during it must not count as built
    install_packages
    install_peers
    build_rustbpe
    check_imports
    echo "$target" >"$stamp.new"
    mv "$stamp.new" "$stamp"
}

# pip keeps what is there, so packages of an earlier test.lock stay; a new .venv begins without the stamp.
tests_are_current() { [ -f "$tests_stamp" ] && [ "$(<"$tests_stamp")" = "$(sha256sum scripts/test.lock)" ]; }

install_tests() {
    pip_install "what the tests import, of scripts/test.lock" --require-hashes -r scripts/test.lock
    sha256sum scripts/test.lock >"$tests_stamp"
}

is_ready() { is_current && { [ "$with_tests" = no ] || tests_are_current; }; }

with_tests=no
case "${1:-}" in
    --print-hash) state_hash; exit ;;
    --tests) with_tests=yes ;;
    "") ;;
    *) die "setup.sh takes no argument but --tests and --print-hash, not $1" ;;
esac

is_ready && exit
[ "$(uname -s)" = Linux ] || die "Linux is needed (this is $(uname -s)): triton has no build for anything else"
is_current || { find_compiler; base=$(find_python); find_headers; }
mkdir -p .venv
exec 9>.venv/.setup-lock
if ! flock --nonblock 9; then
    say "waiting for another set-up of this checkout"
    flock 9
fi
is_current || set_up
[ "$with_tests" = no ] || tests_are_current || install_tests
say "done in $SECONDS s"
