"""Every kernel compiles for sm90 and sm80 without spills and as well as the accepted figures; the gate can fail."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.compile_table import Row, changes, faults

ROOT = Path(__file__).resolve().parent.parent
ROW = Row("attention", "_kernel", 90, "*bf16 i32", 4, registers=128, spilled_bytes=0, shared_bytes=65536, wgmma=8,
          tma=0, loads_16_bytes=4)


def test_every_kernel_compiles_at_least_as_well_as_accepted():
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-m", "kernels.compile_table", "--check"], cwd=ROOT, env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "_rms_norm_fwd_kernel" in done.stdout


@pytest.mark.parametrize("change, sentence", [
    (dict(spilled_bytes=8), "must not spill, 8 bytes do"),
    (dict(shared_bytes=232_449), "shared memory must be at most 232448 bytes, it is 232449"),
    (dict(wgmma=0), "attention: must use wgmma on sm90, none of its kernels does"),
])
def test_a_broken_rule_is_a_sentence(change, sentence):
    assert not faults([ROW])
    assert sentence in faults([dataclasses.replace(ROW, **change)])[0]


@pytest.mark.parametrize("change, sentence", [
    (dict(registers=129), "registers was 128, is 129"),
    (dict(shared_bytes=65537), "shared_bytes was 65536, is 65537"),
    (dict(wgmma=7), "wgmma was 8, is 7"),
    (dict(loads_16_bytes=3), "loads_16_bytes was 4, is 3"),
    (dict(signature="*bf16 i64"), "is gone"),
])
def test_a_change_for_the_worse_is_a_sentence(change, sentence):
    before = {ROW.key: dataclasses.asdict(ROW)}
    assert not changes([ROW], before)
    assert not changes([dataclasses.replace(ROW, registers=100, wgmma=9)], before)
    assert sentence in changes([dataclasses.replace(ROW, **change)], before)[0]


def test_the_interpreter_cannot_compile():
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-m", "kernels.compile_table"], cwd=ROOT, env=env, capture_output=True,
                          text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: compiling needs TRITON_INTERPRET unset, it is 1"
