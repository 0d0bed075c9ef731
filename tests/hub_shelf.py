"""A stand-in for the hub: rows given in a test become the parquet files that tasks ask for."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import hub

ARC_ROW = {"id": "x", "question": "What is wet?", "answerKey": "B",
           "choices": {"text": ["sand", "rain", "salt", "iron"], "label": ["A", "B", "C", "D"]}}
MMLU_ROW = {"question": "What is 2+2?", "subject": "math", "choices": ["3", "5", "4", "6"], "answer": 2}
GSM_ROW = {"question": "2 and 3?", "answer": "2+3 = <<2+3=5>>5\n#### 5"}
CHAT_ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}], "source": "x"}
CODE_ROW = {"task_id": "T/0", "prompt": "import math\n\ndef two():\n", "canonical_solution": "    return 2\n",
            "test": "def check(candidate):\n    assert candidate() == 2\n", "entry_point": "two"}

SMOLTALK = "HuggingFaceTB/smol-smoltalk"
GSM8K, MMLU, ARC, HUMANEVAL = "openai/gsm8k", "cais/mmlu", "allenai/ai2_arc", "openai/openai_humaneval"
# every file of the recipe and rows for it
RECIPE = {
    **{(SMOLTALK, f"data/train-0000{i}-of-00004.parquet"): [CHAT_ROW] * (i + 2) for i in range(4)},
    (SMOLTALK, "data/test-00000-of-00001.parquet"): [CHAT_ROW] * 3,
    (MMLU, "auxiliary_train/train-00000-of-00001.parquet"): [{"train": MMLU_ROW}] * 6,
    (MMLU, "all/test-00000-of-00001.parquet"): [MMLU_ROW] * 4,
    (GSM8K, "main/train-00000-of-00001.parquet"): [GSM_ROW] * 5,
    (GSM8K, "main/test-00000-of-00001.parquet"): [GSM_ROW] * 2,
    **{(ARC, f"ARC-{kind}/{split}-00000-of-00001.parquet"): [ARC_ROW] * n for kind in ("Easy", "Challenge")
       for split, n in (("train", 7), ("validation", 2), ("test", 3))},
    (HUMANEVAL, "openai_humaneval/test-00000-of-00001.parquet"): [CODE_ROW],
}


class Shelf:
    """Where the files lie, and what was asked for."""

    def __init__(self, folder):
        self.folder = folder
        self.asked: list[tuple[str, str]] = []

    def put(self, repo: str, path: str, rows, *, row_group_size: int | None = None):
        """Write rows (dicts, or a table) as the file `path` of `repo` and return where it is."""
        file = self.folder / repo / path
        file.parent.mkdir(parents=True, exist_ok=True)
        table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
        pq.write_table(table, file, row_group_size=row_group_size)
        return file

    def put_recipe(self):
        for (repo, path), rows in RECIPE.items():
            self.put(repo, path, rows)

    def fetch_all(self, files, **_):
        self.asked += files
        return [self.folder / repo / path for repo, path in files]


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    shelf = Shelf(tmp_path / "shelf")
    monkeypatch.setattr(hub, "fetch_all", shelf.fetch_all)
    return shelf
