"""builtin: the standard library's docstrings, reference and code as documents, the same on every machine."""

import gc
import shutil

import pytest

from nanochat import text_sources
from nanochat.common import UserError
from nanochat.text_sources import BuiltinSource


@pytest.fixture
def stdlib(tmp_path):
    """A small standard library: 80 modules, the language reference, and what is no documentation."""
    root = tmp_path / "python"
    (root / "pydoc_data").mkdir(parents=True)
    shared = "This licence text is repeated at the top of every module and must be read by the model only once."
    for i in range(80):
        (root / f"module{i:02d}.py").write_text(
            f'"""Module {i} does something.\n\n{shared}\n"""\n\n\nclass Thing{i}:\n    """A thing of {i}."""\n\n'
            f'    def run(self, speed=1):\n        r"""Run thing {i} with a \\d pattern."""\n        return {i}\n',
            encoding="utf-8")
    (root / "pydoc_data" / "topics.py").write_text(
        "topics = {'while': 'The \"while\" statement\\n\\nIt '\n 'loops.', 'if': 'The \"if\" statement'}\n",
        encoding="utf-8")
    for name in ("test/a.py", "site-packages/pkg/b.py", "_sysconfigdata__linux_.py", "encodings/c.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text('"""Must not be read."""\n', encoding="utf-8")
    (root / "latin.py").write_bytes(b'# -*- coding: latin-1 -*-\n"""Gr\xfc\xdfe from an old file."""\n')
    (root / "python2.py").write_text('print "broken"\n', encoding="utf-8")
    return root


def test_builtin_gathers_docstrings_reference_and_code(stdlib):
    source = BuiltinSource(stdlib)
    documents = list(source.documents())
    text = "\n".join(text for _, text in documents)
    assert "The \"if\" statement\n\nThe \"while\" statement\n\nIt loops." in text
    assert "Grüße from an old file." in text
    assert "class Thing7\n\nA thing of 7.\n\nrun(self, speed=1)\n\nRun thing 7 with a \\d pattern." in text
    assert "class Thing7:\n\n    def run(self, speed=1):\n        return 7" in text  # code without docstrings
    assert text.count("This licence text") == 1
    assert "Must not be read" not in text
    assert source.skipped == 1  # python2.py
    assert gc.isenabled()
    assert documents == list(BuiltinSource(stdlib).documents())
    few = list(BuiltinSource(stdlib).documents(max_chars=1000))
    assert few == documents[: len(few)] and 1000 <= sum(len(text) for _, text in few) < 2000


def test_builtin_is_the_same_wherever_python_lives_and_mixes_modules(stdlib, tmp_path):
    documents = list(BuiltinSource(stdlib).documents())
    shutil.copytree(stdlib, tmp_path / "elsewhere")
    assert list(BuiltinSource(tmp_path / "elsewhere").documents()) == documents
    order = [int(text.split("class Thing")[1].split()[0]) for _, text in documents if "\n\nclass Thing" in text]
    assert len(order) == 80 and sum(after < before for before, after in zip(order, order[1:], strict=False)) > 20


def test_builtin_never_splits_a_module(stdlib):
    modules = {"train": set(), "val": set()}
    for split, text in BuiltinSource(stdlib).documents():
        modules[split] |= {i for i in range(80) if f"Thing{i}\n" in text or f"Thing{i}:" in text}
    assert not modules["train"] & modules["val"]
    assert modules["train"] | modules["val"] == set(range(80))
    assert 1 <= len(modules["val"]) <= 12


def test_builtin_documents_fit_the_smallest_rows(stdlib):
    paragraphs = [f"paragraph {i} " + "word " * 20 for i in range(50)]
    sections = list(text_sources._sections(paragraphs, set()))
    assert "\n\n".join(sections) == "\n\n".join(paragraphs)
    assert all(400 < len(section) <= 620 for section in sections[:-1])


def test_builtin_needs_source_files(tmp_path):
    with pytest.raises(UserError) as error:
        list(BuiltinSource(tmp_path).documents())
    assert str(error.value) == ("builtin data needs the source files of Python's standard library, "
                                f"found none in {tmp_path}")
