"""What holds for every test: few threads, Triton interpreted where there is no GPU, a base directory of its own."""

import os
import sys
import tempfile

assert "triton" not in sys.modules, "triton was imported before conftest.py could choose its interpreter"
os.environ.setdefault("OMP_NUM_THREADS", "2")  # more threads than cores cost 3x on models this small

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when @triton.jit decorates, hence before any kernel file
    from kernels import interpreter

    interpreter.install()


def pytest_configure(config):
    """Point module- and session-scoped fixtures, which run before `own_base_dir`, away from the user's cache."""
    config.nanochat_base_dir = tempfile.TemporaryDirectory(prefix="nanochat-tests-")
    os.environ["NANOCHAT_BASE_DIR"] = config.nanochat_base_dir.name


def pytest_terminal_summary(terminalreporter):
    """Show the figures that tests measured, from whichever process they ran in."""
    figures = [text for name in ("passed", "failed") for report in terminalreporter.stats.get(name, [])
               for key, text in report.user_properties if key == "figure"]
    if figures:
        terminalreporter.section("figures")
        terminalreporter.write_line("\n".join(figures))


def pytest_unconfigure(config):
    config.nanochat_base_dir.cleanup()


@pytest.fixture(autouse=True)
def own_base_dir(tmp_path, monkeypatch):
    """Give the test an empty NANOCHAT_BASE_DIR of its own (a path that does not exist yet) and return it."""
    folder = tmp_path / "nanochat"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    return folder


@pytest.fixture(autouse=True)
def seeded():
    """Start every test from the same random state, so that it passes or fails alone as it does in the suite."""
    torch.manual_seed(0)


@pytest.fixture
def figure(request):
    """Return a function that shows a text at the end of the run: a number measured on the way, not judged by itself."""
    return lambda text: request.node.user_properties.append(("figure", text))
