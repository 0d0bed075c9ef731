"""HumanEval: 164 Python functions to write from their docstrings, judged by running tests in the sandbox. Hub:
openai/openai_humaneval (MIT).

The user's message is the function's beginning as it stands. Of the answer the first ```python block counts, or all
of it; the imports at the top of the prompt are put before it, since an answer often leaves them out.
"""

import re

from nanochat import verdict
from nanochat.tasks.common import Answer, exchange
from nanochat.tasks.stored import StoredTask

_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)


class HumanEval(StoredTask):
    """164 problems, all of them for the test."""

    name = "HumanEval"
    repo = "openai/openai_humaneval"
    files = {"test": ("openai_humaneval/test-00000-of-00001.parquet",)}
    columns = dict.fromkeys(("prompt", "canonical_solution", "test", "entry_point"), "text")

    def conversation(self, row: dict) -> dict:
        solved = f"{row['prompt']}\n{row['canonical_solution']}"
        return exchange(row["prompt"], solved) | {"test": row["test"], "entry_point": row["entry_point"]}

    def evaluate(self, conversation: dict, answer: Answer) -> bool:
        """Whether the program defines a function that passes the problem's tests; runs it in the sandbox."""
        prompt = conversation["messages"][0]["content"]
        program = leading_imports(prompt) + program_of(answer.text)
        return verdict.passes(prompt, program, conversation["test"], conversation["entry_point"]).passed


def program_of(text: str) -> str:
    """The first fenced block of Python, to the text's end where nothing closes it; the whole text without one."""
    block = _BLOCK.search(text)
    return (block[1] if block else text).strip("\n")


def leading_imports(prompt: str) -> str:
    """The import lines before a prompt's first other statement, each with its newline."""
    imports = []
    for line in prompt.splitlines():
        if line.startswith(("import ", "from ")):
            imports.append(line + "\n")
        elif line.strip() and not line.startswith("#"):
            break
    return "".join(imports)
