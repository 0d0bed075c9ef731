"""Who may import whom, what may be in the tree, and how large it may grow. Read from the syntax, nothing is run."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("kernels", "nanochat", "scripts")
OURS = (*PRODUCT, "bench", "tests")
MAX_LINES_PER_FILE = 500
# of Python, Rust and shell: an addition that passes one of these must make room first
MAX_LINES = {"kernels": 4_500, "nanochat": 13_000, "scripts": 2_200, "rustbpe": 4_200, "bench": 4_000}

TOP_LEVEL = {
    ".ci", ".gitignore", "LICENSE", "README.md", "bench", "docs", "kernels", "nanochat", "pyproject.toml", "rustbpe",
    "scripts", "speedrun.sh", "tests",
}

# package -> which of our packages it may import
MAY_IMPORT = {
    "kernels": {"kernels"},
    "nanochat": {"nanochat", "kernels"},
    "scripts": {"scripts", "nanochat", "kernels"},
    "bench": {"bench", "scripts", "nanochat", "kernels"},
}

# between op files: training and decode share the rotation and norm, so that they cannot drift apart; and attention's
# own kernels have a file to themselves
OP_EDGES = {(op, "kernels.qk_norm_rope") for op in ("attention", "flash", "paged_attention", "paged_append")}
OP_EDGES |= {("attention", "kernels.flash")}

# package -> the only place of the product that may import it
ONLY_IN = {"rustbpe": "nanochat/tokenizer.py", "fastapi": "nanochat/server/"}

PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
BEFORE_SETUP = {"scripts/plan.py"}  # runs without any installed package, so without nanochat.common
PURE_CALLS = {"Path", "frozenset", "re.compile"}


def tracked(also=("--others", "--exclude-standard")):
    """Paths relative to the root of everything in git, by default also of what could be added next."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", *also], cwd=ROOT, check=True, capture_output=True,
                            text=True).stdout
    return [path for path in listed.split("\0") if path and (ROOT / path).is_file()]


def python_files(*packages):
    return [path for path in tracked() if path.endswith(".py") and path.split("/")[0] in packages]


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def imports(tree):
    """Dotted names that a module imports anywhere in it; `from a import b` counts as a and as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def import_faults(path, text):
    """Rules of who imports whom that `text`, as the file `path`, breaks."""
    package, stem = path.split("/")[0], Path(path).stem
    names = set(imports(ast.parse(text)))
    roots = {name.split(".")[0] for name in names}
    faults = [f"{path} imports relatively: {name}" for name in names if name.startswith(".")]
    faults += [f"{path} imports {root}" for root in roots & set(OURS) - MAY_IMPORT[package]]
    faults += [f"{path} imports {root}, which is for {home}" for root, home in ONLY_IN.items()
               if package in PRODUCT and root in roots and not path.startswith(home)]
    if package == "kernels":
        faults += [f"{path} imports {name}" for name in names if not kernel_edge_allowed(stem, name)]
    return faults


def kernel_edge_allowed(stem, name):
    """Op files see the registry, the device and their own edge; registry sees device; device sees neither."""
    if not name.startswith("kernels") or stem in ("__init__", "__main__", "compile_table"):
        return True
    module = ".".join(name.split(".")[:2])
    of_the_machinery = {"registry": {"kernels", "kernels.device"}, "device": set(), "interpreter": set()}
    allowed = of_the_machinery.get(stem, {"kernels.registry", "kernels.device"})
    return module in allowed or (stem, module) in OP_EDGES


def pickle_faults(path, text):
    """Ways to read or write pickles that `text` uses."""
    faults = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "torch.save"):
            faults.append(f"{path}:{node.lineno} calls {ast.unparse(node.func)}")
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            faults.append(f"{path}:{node.value.lineno} passes allow_pickle")
    roots = {name.split(".")[0] for name in imports(ast.parse(text))}
    return faults + [f"{path} imports {root}" for root in roots & PICKLES]


def work_at_import(path, text):
    """Top-level statements of a script that do more than define."""
    body = ast.parse(text).body
    if ast.get_docstring(ast.parse(text)) is not None:
        body = body[1:]
    definitions = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    faults = [f"{path}:{node.lineno} {ast.unparse(node).splitlines()[0]}" for node in body[:-1]
              if not isinstance(node, definitions) and not is_constant(node)]
    guard = ast.unparse(body[-1]) if body else ""
    call = "main(parse_args())" if path in BEFORE_SETUP else "run_script(parse_args, main)"
    if guard.split("\n") != ["if __name__ == '__main__':", f"    {call}"]:
        faults.append(f"{path} does not end in the main guard")
    return faults


def is_constant(node):
    if not isinstance(node, (ast.Assign, ast.AnnAssign)):
        return False
    return all(ast.unparse(call.func) in PURE_CALLS for call in ast.walk(node) if isinstance(call, ast.Call))


# --- the tree -------------------------------------------------------------------------------------


def test_imports_go_one_way():
    faults = [fault for path in python_files(*MAY_IMPORT) for fault in import_faults(path, read(path))]
    assert not faults


def test_scripts_do_no_work_at_import():
    programs = [path for path in python_files("scripts") if not path.endswith("__init__.py")]
    assert not [fault for path in programs for fault in work_at_import(path, read(path))]


def test_nothing_is_pickled():
    assert not [fault for path in python_files(*PRODUCT, "bench") for fault in pickle_faults(path, read(path))]


def test_top_level_names_are_the_agreed_ones():
    committed = tracked(also=())  # notes or texts that a user keeps in the checkout are none of our business
    assert {path.split("/")[0] for path in committed} <= TOP_LEVEL


def test_test_folders_are_not_packages():
    """An __init__.py would change how pytest names modules and let tests import each other's helpers by accident."""
    assert not {"tests/__init__.py", "bench/__init__.py"} & set(tracked())


def test_files_stay_small():
    lengths = {path: read(path).count("\n") for path in tracked() if path.endswith((".py", ".rs", ".sh"))}
    assert not {path: n for path, n in lengths.items() if path.endswith(".py") and n > MAX_LINES_PER_FILE}
    for part, limit in MAX_LINES.items():
        assert sum(n for path, n in lengths.items() if path.startswith(f"{part}/")) < limit, part


def test_no_lock_files_of_other_tools_and_no_registry_addresses():
    names = {"Cargo.lock", "uv.lock", "poetry.lock", "Pipfile.lock", "pdm.lock", "package-lock.json", "yarn.lock"}
    addresses = ["py" + "pi.org", "python" + "hosted.org", "crates" + ".io", "registry." + "npmjs",
                 "--index" + "-url", "--extra-index" + "-url", "--find" + "-links"]
    paths = tracked()
    assert not [path for path in paths if Path(path).name in names]
    texts = {path: (ROOT / path).read_bytes().decode("utf-8", errors="replace") for path in paths}
    assert not [(path, word) for path, text in texts.items() for word in addresses if word in text]


def test_readme_tree_names_every_module_and_none_that_is_gone():
    tree = read("README.md").split("\n## The tree\n")[1].split("\n## ")[0]
    in_one_line_each = ("nanochat/evals/", "nanochat/tasks/")
    modules = {Path(path).name for path in python_files("kernels", "nanochat")
               if "__" not in path and not path.startswith(in_one_line_each)}
    assert {word for word in tree.split() if word.endswith(".py")} == modules


def test_kernels_import_without_triton():
    code = ("import sys; sys.modules['triton'] = None\n"  # makes `import triton` raise ModuleNotFoundError
            "import torch, kernels\n"
            "config = kernels.KernelConfig.parse('auto')\n"
            "chosen = kernels.resolve(config, torch.device('cpu'), torch.float32)\n"
            "print('triton' in chosen.names.values())")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr


# --- the rules themselves can fail ----------------------------------------------------------------


@pytest.mark.parametrize("path, text", [
    ("kernels/rms_norm.py", "import nanochat"),
    ("kernels/rms_norm.py", "def f():\n    from nanochat.common import UserError"),
    ("kernels/rms_norm.py", "from kernels.relu2 import relu2_eager"),
    ("kernels/rms_norm.py", "from kernels import qk_norm_rope"),
    ("kernels/rms_norm.py", "from . import relu2"),
    ("kernels/rms_norm.py", "import kernels"),
    ("kernels/registry.py", "from kernels.relu2 import relu2_eager"),
    ("kernels/device.py", "from kernels.registry import OPS"),
    ("nanochat/gpt.py", "from scripts.base_train import main"),
    ("nanochat/gpt.py", "from tests.conftest import seeded"),
    ("nanochat/gpt.py", "import rustbpe"),
    ("nanochat/gpt.py", "from fastapi import FastAPI"),
    ("scripts/tok_train.py", "from rustbpe import Tokenizer"),
    ("scripts/base_train.py", "import bench.decode"),
])
def test_a_forbidden_import_is_found(path, text):
    assert import_faults(path, text)


@pytest.mark.parametrize("path, text", [
    ("kernels/attention.py", "from kernels.qk_norm_rope import rotary_table\nfrom kernels.registry import Op"),
    ("kernels/rms_norm.py", "from kernels.registry import Op\nfrom kernels.device import sm"),
    ("kernels/registry.py", "from kernels.device import sm"),
    ("kernels/__init__.py", "from kernels import attention"),
    ("nanochat/tokenizer.py", "import rustbpe"),
    ("nanochat/server/app.py", "from fastapi import FastAPI"),
    ("scripts/base_train.py", "from kernels import resolve\nfrom nanochat.gpt import GPT\nimport torch"),
])
def test_an_allowed_import_passes(path, text):
    assert import_faults(path, text) == []


GUARD = 'if __name__ == "__main__":\n    run_script(parse_args, main)\n'


@pytest.mark.parametrize("text", ["print('hello')\n" + GUARD, "device = pick_device('auto')\n" + GUARD,
                                  "for i in range(3):\n    pass\n" + GUARD, "def main(args): pass\n", ""])
def test_work_at_import_is_found(text):
    assert work_at_import("scripts/x.py", text)


def test_definitions_and_constants_are_no_work():
    text = '"""What it does."""\nimport os\nA = 3 * 4\nB: tuple = ("x", A)\nC = Path("a")\ndef main(args): pass\n'
    assert work_at_import("scripts/x.py", text + GUARD) == []


@pytest.mark.parametrize("text", ["import pickle", "from joblib import dump", "torch.load('x')",
                                  "torch.save({}, 'x')", "np.load('x', allow_pickle=True)"])
def test_a_pickle_is_found(text):
    assert pickle_faults("nanochat/x.py", text)
