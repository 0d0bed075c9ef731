"""scripts/setup.sh in a small checkout whose python, cargo and cc are fakes that log how they are called."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("bash", "cat", "chmod", "cp", "cut", "dirname", "env", "find", "flock", "mkdir", "mv", "rm", "sed",
         "sha256sum", "sort", "touch", "uname", "xargs")

FAKE_PYTHON = """#!/bin/bash
echo "$*" >>"$LOG"
case "$1 ${2:-}" in
    "-m venv") target="${@: -1}"; mkdir -p "$target/bin" "$target/lib"; cp "$0" "$target/bin/python"
               echo "version = 3.12.0" >"$target/pyvenv.cfg"; exit "${VENV_EXIT:-0}" ;;
    "-m pip") [ "$3" = --version ] || exit "${PIP_EXIT:-0}" ;;
    "- ") cat >/dev/null
          if [[ "$0" != *.venv* ]] || [ -f .venv/lib/base-python.pth ]; then echo "${TORCH:-}"; fi ;;
    *purelib*) echo "$PWD/.venv/lib" ;;
    *include*) echo "$INCLUDE" ;;
    *addsitedir*) echo "packages of the outer python" ;;
esac
"""


class Checkout:
    """A folder with the real setup.sh; `run` gives (exit code, stdout, stderr), `calls` what python was asked."""

    def __init__(self, folder):
        self.folder, self.bin, self.log = folder / "checkout", folder / "bin", folder / "log"
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        for name in ("scripts/setup.sh", "scripts/requirements.lock", "scripts/peers.lock", "scripts/test.lock",
                     "pyproject.toml"):
            self.write(name, (ROOT / name).read_text(encoding="utf-8"))
        self.write("rustbpe/Cargo.toml", "[package]")
        self.write("rustbpe/src/lib.rs", "pub fn train() {}")
        self.fake("python3", FAKE_PYTHON)
        self.fake("cargo", "#!/bin/bash\necho cargo 1.95.0")
        self.fake("cc", "#!/bin/bash")

    def write(self, name, text):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def fake(self, name, text):
        (self.bin / name).write_text(text, encoding="utf-8")
        (self.bin / name).chmod(0o755)

    def start(self, *arguments, **variables):
        env = {"PATH": str(self.bin), "HOME": str(self.bin), "LOG": str(self.log), **variables}
        return subprocess.Popen([shutil.which("bash"), self.folder / "scripts/setup.sh", *arguments], cwd="/", env=env,
                                text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(self, *arguments, **variables):
        process = self.start(*arguments, **variables)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def hash(self):
        return self.run("--print-hash")[1]

    def calls(self, word):
        """Logged calls that contain `word`, and an empty log afterwards."""
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [line for line in lines if word in line]

    @property
    def stamp(self):
        return self.folder / ".venv/.setup-stamp"


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_first_run_installs_and_the_second_starts_nothing(checkout):
    code, out, err = checkout.run()
    assert (code, err) == (0, "") and "setup: done" in out
    assert [call.split(" ")[2:3] for call in checkout.calls("-m ") if "install" in call or "maturin" in call] == [
        ["install"], ["install"], ["install"], ["develop"]]
    assert checkout.run() == (0, "", "")
    assert checkout.calls("") == []


def test_locked_packages_are_checked_by_hash_peers_stay_apart_and_torch_is_a_range(checkout):
    checkout.run()
    locked, torch, peers = checkout.calls("-m pip install")
    assert peers.endswith("--target .venv/peers --no-deps --require-hashes -r scripts/peers.lock")
    assert locked.endswith("--require-hashes -r scripts/requirements.lock") and torch.endswith("torch>=2.9")


def test_a_torch_that_python_provides_is_not_installed_again(checkout):
    code, out, _ = checkout.run(TORCH="2.15.0")
    assert code == 0 and "using the torch 2.15.0 that python3 provides" in out
    assert (checkout.folder / ".venv/lib/base-python.pth").read_text() == "packages of the outer python\n"
    assert not checkout.calls("torch>=")


@pytest.mark.parametrize("name", ["rustbpe/src/lib.rs", "rustbpe/core/src/new.rs", "rustbpe/Cargo.toml",
                                  "scripts/requirements.lock", "scripts/peers.lock", "scripts/setup.sh",
                                  "pyproject.toml", ".venv/pyvenv.cfg"])
def test_a_changed_source_changes_the_hash(checkout, name):
    checkout.run()
    before = checkout.hash()
    path = checkout.folder / name
    checkout.write(name, (path.read_text(encoding="utf-8") if path.exists() else "") + "\n# changed\n")
    assert checkout.hash() != before


@pytest.mark.parametrize("name", ["rustbpe/Cargo.lock", "rustbpe/target/release/x.d", "rustbpe/core/target/x.rs",
                                  "nanochat/gpt.py"])
def test_a_build_product_or_other_source_does_not(checkout, name):
    checkout.run()
    before = checkout.hash()
    checkout.write(name, "changed")
    assert checkout.hash() == before


def test_what_only_tests_import_is_installed_when_asked_for_and_once(checkout):
    checkout.run()
    assert not checkout.calls("test.lock")
    assert checkout.run("--tests")[0] == 0
    assert [call.split(" install ")[1] for call in checkout.calls("-m pip install")] == [
        "--disable-pip-version-check --quiet --require-hashes -r scripts/test.lock"]
    assert checkout.run("--tests") == (0, "", "")
    checkout.write("scripts/test.lock", "openai==1.0")
    assert checkout.run() == (0, "", "")
    assert checkout.run("--tests")[0] == 0 and checkout.calls("test.lock")


def test_a_changed_rust_source_is_built_again_on_the_next_run(checkout):
    checkout.run()
    checkout.calls("")
    checkout.write("rustbpe/src/lib.rs", "pub fn train() { todo!() }")
    assert checkout.run()[0] == 0
    assert len(checkout.calls("maturin develop --release")) == 1
    assert checkout.run() == (0, "", "")


def test_a_failed_set_up_leaves_no_stamp_and_the_next_one_goes_on(checkout):
    checkout.run()
    checkout.write("scripts/requirements.lock", "numpy==1.0")
    code, _, err = checkout.run(PIP_EXIT="1")
    assert code == 2 and not checkout.stamp.exists()
    assert err.startswith("error: pip could not install the packages of scripts/requirements.lock")
    assert "network" in err and err.count("\n") == 1
    checkout.calls("")
    assert checkout.run()[0] == 0 and checkout.stamp.exists()
    assert not checkout.calls("-m venv"), "a usable .venv was thrown away"


def test_peers_that_were_removed_are_installed_again(checkout):
    checkout.run()
    checkout.write(".venv/peers/old", "")
    checkout.calls("")
    assert checkout.run() == (0, "", "")
    shutil.rmtree(checkout.folder / ".venv/peers")
    assert checkout.run()[0] == 0
    assert checkout.calls("--target .venv/peers") and not (checkout.folder / ".venv/peers/old").exists()


def test_set_ups_at_the_same_time_build_once(checkout):
    running = [checkout.start() for _ in range(3)]
    for process in running:
        process.communicate(timeout=60)
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(checkout.calls("maturin develop")) == 1


def test_a_venv_whose_python_is_gone_is_made_again(checkout):
    checkout.run()
    (checkout.folder / ".venv/bin/python").unlink()
    assert checkout.run()[0] == 0
    assert len(checkout.calls("-m venv")) == 2


def test_a_venv_that_was_interrupted_half_made_is_made_again(checkout):
    assert checkout.run(VENV_EXIT="1")[0] == 1
    assert checkout.run()[0] == 0
    assert len(checkout.calls("-m venv")) == 2


def test_an_activated_venv_is_not_made_with_itself(checkout):
    checkout.run()
    venv_bin = checkout.folder / ".venv/bin"
    (venv_bin / "python3").symlink_to("python")
    checkout.write(".venv/.unfinished", "")
    assert checkout.run(PATH=f"{venv_bin}:{checkout.bin}")[0] == 0


def test_missing_cargo_says_how_to_get_it(checkout):
    (checkout.bin / "cargo").unlink()
    code, out, err = checkout.run()
    assert (code, out) == (2, "")
    assert err == ("error: a cargo that works was not found and rustbpe is written in Rust; install it as "
                   "https://rustup.rs tells (no root needed) or, if you have rustup, run: rustup default stable\n")


def test_missing_linker_says_how_to_get_it(checkout):
    (checkout.bin / "cc").unlink()
    code, out, err = checkout.run()
    assert (code, out) == (2, "")
    assert err.startswith("error: a C linker (cc) was not found") and "apt install gcc" in err


def test_missing_headers_are_named_where_there_is_a_gpu(checkout):
    """Triton's first launch would end in a compiler's error, minutes or hours later."""
    include = checkout.bin / "include"
    include.mkdir()
    checkout.fake("nvidia-smi", "#!/bin/bash\necho 'GPU 0: H200'")
    code, out, err = checkout.run(INCLUDE=str(include))
    assert (code, out) == (2, "") and not (checkout.folder / ".venv").exists()
    assert err == (f"error: triton needs Python's headers to run on the GPU and {include}/Python.h was not found; "
                   "install python3-dev (Debian and Ubuntu) or python3-devel (Fedora) of the version of python3\n")
    (include / "Python.h").touch()
    assert checkout.run(INCLUDE=str(include))[0] == 0


def test_without_a_gpu_no_headers_are_needed(checkout):
    checkout.fake("nvidia-smi", "#!/bin/bash\nexit 9")  # a driver that is not loaded
    assert checkout.run(INCLUDE="/nowhere")[0] == 0


def test_a_build_that_fails_says_how_to_get_a_newer_rust(checkout):
    checkout.fake("python3", FAKE_PYTHON.replace('case "$1', '[[ "$*" != *maturin* ]] || exit 1\ncase "$1', 1))
    code, _, err = checkout.run()
    assert code == 2 and "Rust must be 1.83 or newer: run rustup update or, where cargo is the system's, install" in err


@pytest.mark.parametrize("variables, start", [
    ({}, "error: Python 3.11, 3.12 or 3.13 is needed; "),
    ({"PYTHON": "python2"}, "error: PYTHON=python2 is not one: Python 3.11, 3.12 or 3.13 is needed; "),
])
def test_missing_python_says_which_are_good(checkout, variables, start):
    checkout.fake("python3", "#!/bin/bash\nexit 1")
    code, out, err = checkout.run(**variables)
    assert (code, out) == (2, "") and err.startswith(start) and "apt install python3 python3-venv" in err
    assert not (checkout.folder / ".venv").exists()


def test_an_unknown_argument_is_refused(checkout):
    assert checkout.run("--force") == (
        2, "", "error: setup.sh takes no argument but --tests and --print-hash, not --force\n")
