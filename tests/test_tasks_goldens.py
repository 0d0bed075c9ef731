"""How conversations become tokens, worked out by hand: a change of format, special tokens or mask turns these red.

A vocabulary without merges makes every byte a token, so the goldens read as text: ‹...› is a special token, ⟦...⟧ what
the model learns to write.
"""

import itertools
import json

import hub_shelf
import pytest
from hub_shelf import ARC, GSM8K, HUMANEVAL, MMLU, SMOLTALK

from nanochat.tasks import make_task
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

shelf = hub_shelf.shelf


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["no merges"], 256 + len(SPECIAL_TOKENS))


def spelled(tokenizer, ids, mask) -> str:
    names = {tokenizer.special_id(name): f"‹{name[2:-2]}›".encode() for name in SPECIAL_TOKENS}
    text = ""
    for learned, run in itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]):
        span = b"".join(names.get(id) or bytes([id]) for id, _ in run).decode()
        text += f"⟦{span}⟧" if learned else span
    return text


def user(text):
    return {"role": "user", "content": text}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(text):
    return {"role": "system", "content": text}


def text(said):
    return {"type": "text", "text": said}


def call(expression, result):
    return [{"type": "python", "text": expression}, {"type": "python_output", "text": result}]


MESSAGES = {
    "one exchange": (
        [user("Hi"), assistant("Hello.")],
        "‹bos›‹user_start›Hi‹user_end›‹assistant_start›⟦Hello.‹assistant_end›⟧"),
    "two exchanges": (
        [user("Hi"), assistant("Hello."), user("Bye"), assistant("See you.")],
        "‹bos›‹user_start›Hi‹user_end›‹assistant_start›⟦Hello.‹assistant_end›⟧"
        "‹user_start›Bye‹user_end›‹assistant_start›⟦See you.‹assistant_end›⟧"),
    "a question without an answer": (
        [user("Hi")],
        "‹bos›‹user_start›Hi‹user_end›"),
    "a system message joins the first user message": (
        [system("Be brief."), user("Hi"), assistant("Yo."), user("Bye"), assistant("Bye.")],
        "‹bos›‹user_start›Be brief.\n\nHi‹user_end›‹assistant_start›⟦Yo.‹assistant_end›⟧"
        "‹user_start›Bye‹user_end›‹assistant_start›⟦Bye.‹assistant_end›⟧"),
    "names of special tokens are text": (
        [user("<|assistant_end|>"), assistant("<|python_start|>1<|python_end|>")],
        "‹bos›‹user_start›<|assistant_end|>‹user_end›"
        "‹assistant_start›⟦<|python_start|>1<|python_end|>‹assistant_end›⟧"),
    "any script": (
        [user("안녕 ½"), assistant("Grüße 👋")],
        "‹bos›‹user_start›안녕 ½‹user_end›‹assistant_start›⟦Grüße 👋‹assistant_end›⟧"),
    "empty texts": (
        [user(""), assistant("")],
        "‹bos›‹user_start›‹user_end›‹assistant_start›⟦‹assistant_end›⟧"),
    "parts of text follow each other with nothing between": (
        [user("a"), assistant([text("b"), text(" c")])],
        "‹bos›‹user_start›a‹user_end›‹assistant_start›⟦b c‹assistant_end›⟧"),
    "the model learns the call and not the tool's answer": (
        [user("37+85?"), assistant([*call("37+85", "122"), text("It is 122.")])],
        "‹bos›‹user_start›37+85?‹user_end›‹assistant_start›⟦‹python_start›37+85‹python_end›⟧"
        "‹output_start›122‹output_end›⟦It is 122.‹assistant_end›⟧"),
    "a call at the end, and a turn after it": (
        [user("2*3?"), assistant([text("So "), *call("2*3", "6")]), user("Ok"), assistant("Bye")],
        "‹bos›‹user_start›2*3?‹user_end›‹assistant_start›⟦So ‹python_start›2*3‹python_end›⟧‹output_start›6‹output_end›"
        "⟦‹assistant_end›⟧‹user_start›Ok‹user_end›‹assistant_start›⟦Bye‹assistant_end›⟧"),
}

# name: (task, split, repository, file, row, golden)
ROWS = {
    "SmolTalk": (
        "SmolTalk", "test", SMOLTALK, "data/test-00000-of-00001.parquet",
        {"messages": [system("You rhyme."), user("A cat?"), assistant("A hat!")], "source": "x"},
        "‹bos›‹user_start›You rhyme.\n\nA cat?‹user_end›‹assistant_start›⟦A hat!‹assistant_end›⟧"),
    "MMLU": (
        "MMLU", "test", MMLU, "all/test-00000-of-00001.parquet",
        {"question": "What is 2+2?", "subject": "math", "choices": ["3", "5", "4", "6"], "answer": 2},
        "‹bos›‹user_start›Multiple Choice question: What is 2+2?\n- 3=A\n- 5=B\n- 4=C\n- 6=D\n\n"
        "Respond only with the letter of the correct answer.‹user_end›‹assistant_start›⟦C‹assistant_end›⟧"),
    "MMLU's auxiliary rows sit inside `train`": (
        "MMLU", "train", MMLU, "auxiliary_train/train-00000-of-00001.parquet",
        {"train": {"question": "Red is", "subject": "", "choices": ["a", "b", "c", "d"], "answer": 0}},
        "‹bos›‹user_start›Multiple Choice question: Red is\n- a=A\n- b=B\n- c=C\n- d=D\n\n"
        "Respond only with the letter of the correct answer.‹user_end›‹assistant_start›⟦A‹assistant_end›⟧"),
    "ARC": (
        "ARC-Easy", "train", ARC, "ARC-Easy/train-00000-of-00001.parquet",
        {"id": "1", "question": "What is wet?", "answerKey": "D",
         "choices": {"text": ["sand", "salt", "iron", "rain"], "label": ["A", "B", "C", "D"]}},
        "‹bos›‹user_start›Multiple Choice question: What is wet?\n- sand=A\n- salt=B\n- iron=C\n- rain=D\n\n"
        "Respond only with the letter of the correct answer.‹user_end›‹assistant_start›⟦D‹assistant_end›⟧"),
    "ARC with three numbered choices": (
        "ARC-Challenge", "val", ARC, "ARC-Challenge/validation-00000-of-00001.parquet",
        {"id": "2", "question": "Which falls?", "answerKey": "1",
         "choices": {"text": ["a stone", "a star", "a cloud"], "label": ["1", "2", "3"]}},
        "‹bos›‹user_start›Multiple Choice question: Which falls?\n- a stone=1\n- a star=2\n- a cloud=3\n\n"
        "Respond only with the letter of the correct answer.‹user_end›‹assistant_start›⟦1‹assistant_end›⟧"),
    "ARC with five choices": (
        "ARC-Challenge", "test", ARC, "ARC-Challenge/test-00000-of-00001.parquet",
        {"id": "3", "question": "Q", "answerKey": "E",
         "choices": {"text": ["v", "w", "x", "y", "z"], "label": ["A", "B", "C", "D", "E"]}},
        "‹bos›‹user_start›Multiple Choice question: Q\n- v=A\n- w=B\n- x=C\n- y=D\n- z=E\n\n"
        "Respond only with the letter of the correct answer.‹user_end›‹assistant_start›⟦E‹assistant_end›⟧"),
    "GSM8K": (
        "GSM8K", "train", GSM8K, "main/train-00000-of-00001.parquet",
        {"question": "Ann has 6 pens in each of 4 boxes and loses 1. How many are left?",
         "answer": "Ann has 6*4=<<6*4=24>>24 pens.\nShe keeps 24-1=<<24-1=23>>23.\n#### 23"},
        "‹bos›‹user_start›Ann has 6 pens in each of 4 boxes and loses 1. How many are left?‹user_end›"
        "‹assistant_start›⟦Ann has 6*4=‹python_start›6*4‹python_end›⟧‹output_start›24‹output_end›"
        "⟦24 pens.\nShe keeps 24-1=‹python_start›24-1‹python_end›⟧‹output_start›23‹output_end›"
        "⟦23.\n#### 23‹assistant_end›⟧"),
    "GSM8K: marks first, side by side, with two equal signs, without one": (
        "GSM8K", "test", GSM8K, "main/test-00000-of-00001.parquet",
        {"question": "?", "answer": "<<1+1=2>><<2=4/2=2.0>>x<<7>>\n#### 1,002"},
        "‹bos›‹user_start›?‹user_end›‹assistant_start›⟦‹python_start›1+1‹python_end›⟧‹output_start›2‹output_end›"
        "⟦‹python_start›2=4/2‹python_end›⟧‹output_start›2.0‹output_end›"
        "⟦x‹python_start›7‹python_end›⟧‹output_start›‹output_end›⟦\n#### 1,002‹assistant_end›⟧"),
    "HumanEval": (
        "HumanEval", "test", HUMANEVAL, "openai_humaneval/test-00000-of-00001.parquet",
        {"task_id": "T/0", "prompt": 'def two():\n    """2"""\n', "canonical_solution": "    return 2\n", "test": "",
         "entry_point": "two"},
        '‹bos›‹user_start›def two():\n    """2"""\n‹user_end›'
        '‹assistant_start›⟦def two():\n    """2"""\n\n    return 2\n‹assistant_end›⟧'),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_become_these_tokens(name, tokenizer):
    messages, golden = MESSAGES[name]
    assert spelled(tokenizer, *tokenizer.render_conversation({"messages": messages})) == golden


@pytest.mark.parametrize("name", ROWS)
def test_rows_become_these_tokens(name, tokenizer, shelf):
    task, split, repo, path, row, golden = ROWS[name]
    shelf.put(repo, path, [row])
    assert spelled(tokenizer, *tokenizer.render_conversation(make_task(task, split)[0])) == golden


def test_a_line_of_json_becomes_these_tokens(tokenizer, tmp_path):
    (tmp_path / "own.jsonl").write_text(json.dumps([user("Who?"), assistant("nanochat.")]), encoding="utf-8")
    conversation = make_task(f"json:{tmp_path}/own.jsonl", "train")[0]
    assert spelled(tokenizer, *tokenizer.render_conversation(conversation)) == (
        "‹bos›‹user_start›Who?‹user_end›‹assistant_start›⟦nanochat.‹assistant_end›⟧")


def test_a_row_longer_than_allowed_is_cut_wherever_that_falls(tokenizer):
    conversation = {"messages": MESSAGES["the model learns the call and not the tool's answer"][0]}
    assert spelled(tokenizer, *tokenizer.render_conversation(conversation, 14)) == (
        "‹bos›‹user_start›37+85?‹user_end›‹assistant_start›⟦‹python_start›37+⟧")


def test_an_examination_asks_up_to_the_assistants_turn(tokenizer, shelf):
    task, split, repo, path, row, _ = ROWS["ARC with three numbered choices"]
    shelf.put(repo, path, [row])
    ids = tokenizer.render_for_completion(make_task(task, split)[0])
    assert spelled(tokenizer, ids, [0] * len(ids)) == (
        "‹bos›‹user_start›Multiple Choice question: Which falls?\n- a stone=1\n- a star=2\n- a cloud=3\n\n"
        "Respond only with the letter of the correct answer.‹user_end›‹assistant_start›")
    two_turns = {"messages": MESSAGES["two exchanges"][0]}
    ids = tokenizer.render_for_completion(two_turns)
    assert spelled(tokenizer, ids, [0] * len(ids)) == (
        "‹bos›‹user_start›Hi‹user_end›‹assistant_start›Hello.‹assistant_end›"
        "‹user_start›Bye‹user_end›‹assistant_start›")
