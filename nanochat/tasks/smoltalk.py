"""SmolTalk: everyday conversations, some with a system message. Hub: HuggingFaceTB/smol-smoltalk (Apache-2.0)."""

from nanochat.common import UserError
from nanochat.tasks.common import Answer, Task
from nanochat.tasks.stored import StoredTask


class Dialogues(Task):
    """Conversations to learn from that have no right answer."""

    kind = "dialogue"

    def evaluate(self, conversation: dict, answer: Answer) -> bool:
        raise UserError(f"a task to be examined on must have right answers, {self.name} is conversations to train on")


class SmolTalk(Dialogues, StoredTask):
    """460K conversations for training, 24K as test; the test file is also what validation reads."""

    name = "SmolTalk"
    repo = "HuggingFaceTB/smol-smoltalk"
    files = {"train": tuple(f"data/train-{i:05d}-of-00004.parquet" for i in range(4)),
             **dict.fromkeys(("val", "test"), ("data/test-00000-of-00001.parquet",))}
    columns = {"messages": [{"role": "text", "content": "text"}]}

    def conversation(self, row: dict) -> dict:
        return {"messages": row["messages"]}
