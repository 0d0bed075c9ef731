#!/usr/bin/env bash
# What a GPU is worth with these kernels, in one command: parity, the largest ops, training steps side by side, decoding.
#
#     bash bench/qualify.sh --minutes 10
#
# Rows are in a JSON file as soon as they are measured ($OUT/qualify.json, or bench/results/); what does not fit the
# time is dropped from the end and named. Exit code 2 without a GPU. Needs torch, triton and pytest-benchmark only.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" -m bench.qualify "$@"
