"""scripts.tok_train and scripts.tok_eval on a small folder of text."""

import json

import pytest

from nanochat.common import UserError, run_script
from nanochat.dataset import iter_texts, prepare
from nanochat.tokenizer import Tokenizer
from scripts import tok_eval, tok_train

WORDS = "the river rose through night and by morning lower fields were a lake while nobody moved hay".split()


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(40):
        words = (WORDS[(index * 7 + at * at) % len(WORDS)] for at in range(60))
        (folder / f"{index:02}.txt").write_text(" ".join(words) + f" {index}.\n", encoding="utf-8")
    prepare(str(folder))
    return str(folder)


def section(base_dir, slug):
    return json.loads((base_dir / "report" / f"section_{slug}.json").read_text(encoding="utf-8"))["data"]


def train(data, *flags):
    tok_train.main(tok_train.parse_args(["--data", data, "--vocab-size", "300", *flags]))
    return Tokenizer.load()


def test_training_saves_a_tokenizer_and_reports_it(data, own_base_dir):
    tokenizer = train(data)
    facts = section(own_base_dir, "tokenizer-training")
    dataset = prepare(data)
    texts = list(iter_texts(dataset, "train"))
    assert tokenizer.vocab_size == facts["Vocabulary"] == 300
    assert tokenizer.fingerprint == facts["Fingerprint"] == Tokenizer.train(texts, 300).fingerprint
    assert facts["Documents"] == len(texts)
    assert facts["Bytes"] == facts["Characters"] == sum(map(len, texts))
    assert "Note" not in facts


def test_only_the_head_of_a_document_and_max_chars_of_the_data_are_learned_from(data, own_base_dir):
    tokenizer = train(data, "--doc-cap", "100", "--max-chars", "1e3")
    heads = [text[:100] for text in iter_texts(prepare(data), "train")][:10]
    assert section(own_base_dir, "tokenizer-training")["Characters"] == 1000
    assert tokenizer.fingerprint == Tokenizer.train(heads, 300).fingerprint


def test_too_little_text_is_said_and_reported(data, own_base_dir, capsys):
    tokenizer = train(data, "--vocab-size", "5000")
    note = section(own_base_dir, "tokenizer-training")["Note"]
    assert note.startswith(f"the texts gave a vocabulary of {tokenizer.vocab_size} tokens, 5000 were asked for")
    assert f"warning: {note}" in capsys.readouterr().err


def test_evaluation_reports_bytes_per_token_by_kind_of_text(data, own_base_dir, capsys):
    tokenizer = train(data)
    tok_eval.main(tok_eval.parse_args(["--data", data]))
    rows = {row["Text"]: row for row in section(own_base_dir, "tokenizer-evaluation")}
    name = prepare(data).name
    assert list(rows) == ["news", "korean", "code", "math", "science", f"{name} train", f"{name} val"]
    texts = list(iter_texts(prepare(data), "val"))
    n_bytes, n_tokens = sum(map(len, texts)), sum(len(tokenizer.encode(text)) for text in texts)
    assert rows[f"{name} val"] == {"Text": f"{name} val", "Bytes": n_bytes, "Tokens": n_tokens,
                                   "Bytes per token": round(n_bytes / n_tokens, 3)}
    assert rows["korean"]["Bytes"] == len(tok_eval.KOREAN.encode()) > len(tok_eval.KOREAN)
    assert f"{name} val" in capsys.readouterr().out


def test_evaluation_fails_when_a_text_does_not_come_back(data, monkeypatch):
    tokenizer = train(data)
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: "something else")
    with pytest.raises(RuntimeError, match="a news text does not come back"):
        tok_eval.measure(tokenizer, "news", ["the river"])


@pytest.mark.parametrize("flags, sentence", [
    (["--vocab-size", "264"], "vocab_size must be 265 to 1048576, got 264"),
    (["--max-chars", "0"], "--max-chars must be at least 1, got 0"),
    (["--max-chars", "nan"], "--max-chars must be at least 1, got nan"),
    (["--doc-cap", "-5"], "--doc-cap must be at least 1, got -5"),
])
def test_a_wrong_flag_is_one_sentence_and_the_old_tokenizer_stays(data, flags, sentence):
    before = train(data).fingerprint
    with pytest.raises(UserError) as error:
        train(data, *flags)
    assert str(error.value) == sentence
    assert Tokenizer.load().fingerprint == before


@pytest.mark.parametrize("script", [tok_train, tok_eval])
def test_unprepared_data_is_a_sentence_and_exit_code_2(script, tmp_path, own_base_dir, capsys):
    Tokenizer.train(["the river"], 265).save()
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: script.parse_args(["--data", str(tmp_path / "empty")]), script.main)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.startswith("error: ") and str(tmp_path / "empty") in err and err.count("\n") == 1
    assert not (own_base_dir / "report").exists()
