#!/usr/bin/env bash
# The test command: set up, lint, test the Rust core, test the rest.
#
#     bash tests/run.sh                          # what holds on two CPU cores, in minutes
#     bash tests/run.sh --slow                   # and what takes longer
#     bash tests/run.sh -m gpu                   # on a machine with a GPU; anything else goes to pytest as well
#     bash tests/run.sh tests/test_gpt.py -x
#
# Two processes share the test files, one thread each; -n 0 runs all in one, as a debugger or a GPU wants it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

which_tests="not slow and not gpu"
arguments=()
for argument in "$@"; do
    if [ "$argument" = --slow ]; then which_tests="not gpu"; else arguments+=("$argument"); fi
done

bash scripts/setup.sh --tests
PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin"
.venv/bin/python -m ruff check --quiet .
cargo test --quiet --manifest-path rustbpe/core/Cargo.toml
case " $* " in *" -m gpu "*) processes=0 ;; *) processes=2 ;; esac
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# A worker that dies ends the run: xdist would go on without the tests of its file, and wait for them for ever.
check() { .venv/bin/python -m pytest -q --dist loadfile --max-worker-restart 0 --durations=10 -m "$which_tests" "$@"; }

if [ ${#arguments[@]} -gt 0 ]; then
    check -n "$processes" "${arguments[@]}"
    exit
fi
check -n "$processes" --ignore-glob 'tests/test_browser*.py'
# Playwright starts once in a process: each file of the page's tests has its own.
command -v chromium chromium-browser google-chrome >/dev/null ||
    echo "Chromium is missing, so the chat page is not tested: apt-get install chromium"
for file in tests/test_browser*.py; do
    check -n 0 "$file"
done
