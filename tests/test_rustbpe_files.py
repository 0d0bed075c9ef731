"""rustbpe's files, exports, pickles and stubs; above all, that no file can be believed to be what it is not."""

import ast
import base64
import hashlib
import inspect
import json
import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import rustbpe
import tiktoken
import tokenizers
from bpe_texts import CODE, PROSE, SPECIALS, WORLD, adversarial_text, file_of, signed, train
from hypothesis import given, settings


@pytest.fixture(scope="module")
def tokenizer():
    return train([PROSE, WORLD, CODE], 300)


def test_a_file_comes_back_as_it_was(tokenizer):
    again = rustbpe.Tokenizer.from_bytes(tokenizer.to_bytes())
    assert again.to_bytes() == tokenizer.to_bytes() == file_of(tokenizer.merges, SPECIALS)
    assert again.fingerprint == tokenizer.fingerprint == hashlib.sha256(tokenizer.to_bytes()[:-72]).hexdigest()
    assert again.encode(WORLD) == tokenizer.encode(WORLD)


def test_the_fingerprint_tells_vocabularies_and_special_tokens_apart(tokenizer):
    others = [train([PROSE, WORLD, CODE], 299), train([PROSE, WORLD], 300),
              train([PROSE, WORLD, CODE], 300, SPECIALS[::-1]),
              rustbpe.Tokenizer.from_bytes(file_of(tokenizer.merges, SPECIALS, rustbpe.GPT4_PATTERN))]
    assert len({tokenizer.fingerprint, *(other.fingerprint for other in others)}) == 5
    assert len({tokenizer, *others, rustbpe.Tokenizer.from_bytes(tokenizer.to_bytes())}) == 5
    assert tokenizer != others[0] and tokenizer != "tokenizer" and not tokenizer == tokenizer.to_bytes()


def test_no_cut_and_no_flipped_bit_is_accepted(tokenizer):
    data = train([PROSE], 20).to_bytes()
    for end in range(len(data)):
        with pytest.raises(ValueError, match=r"^a tokenizer file must .*"):
            rustbpe.Tokenizer.from_bytes(data[:end])
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        with pytest.raises(ValueError, match=r"^a tokenizer file must .*"):
            rustbpe.Tokenizer.from_bytes(bytes(flipped))


DOUBLING = [(97, 97), *((id, id) for id in range(256, 286))]


@pytest.mark.parametrize("data, sentence", [
    (b"", 'a tokenizer file must start with "rustbpe tokenizer", this one does not'),
    (b"\x80\x04pickle", 'a tokenizer file must start with "rustbpe tokenizer", this one does not'),
    (signed(b"rustbpe tokenizer 2\nanything\n"), "a tokenizer file must have format version 1, this one has 2"),
    (file_of([(97, 98)])[:-1] + b" ", "a tokenizer file must match its checksum, this one is damaged or cut short"),
    (file_of([(97, 256)]), "a merge must join earlier tokens, token 256 joins 97 and 256"),
    (file_of([(97, 98), (97, 98)]), "every token must have its own bytes, token 257 repeats another"),
    (file_of([(97, 98), (98, 99), (97, 257)]), "a token's bytes must encode to that token, those of 258 do not"),
    (file_of(DOUBLING), "all tokens together must hold at most 16777216 bytes, token 278 passes that"),
    (file_of([], ["a", "a"]), 'special tokens must differ, "a" comes twice'),
    (signed(file_of([(97, 98)])[:-72].replace(b"merges 1", b"merges 99999999999")),
     'the number of merges must be 0 to 1048576, the file has "99999999999"'),
    (signed(file_of([(97, 98)])[:-72].replace(b"97 98", b"97 98 99")),
     "a merge must be two ids on one line, got another line"),
    (signed(file_of([(97, 98)])[:-72].replace(b"97 98", b"097 98")),
     "a tokenizer file must be exactly as it was written, this one has other lines"),
    (signed(file_of([(97, 98)])[:-72].replace(b"16.0.0", b"15.0.0")),
     'the tokenizer\'s unicode must be 16.0.0, the file has "15.0.0": train it again'),
    (file_of([], pattern="a)"), 'a pattern must be a regular expression, "a)" is not (Parsing error at position 1: '
     "General parsing error: end of string not reached)"),
    (file_of([], pattern="(?:" * 4000 + "a" + ")" * 4000), "a pattern must have at most 8192 bytes, got 16001"),
])
def test_a_hostile_file_is_refused_with_a_sentence(data, sentence):
    with pytest.raises(ValueError) as error:
        rustbpe.Tokenizer.from_bytes(data)
    assert str(error.value) == sentence


@pytest.mark.parametrize("pattern", [rustbpe.GPT4_PATTERN, r"\p{L}+| ", ""])
def test_a_file_keeps_any_pattern(pattern):
    tokenizer = train([PROSE, CODE], 40, pattern=pattern)
    again = rustbpe.Tokenizer.from_bytes(tokenizer.to_bytes())
    assert again == tokenizer and again.pattern == pattern and again.report is None
    assert again.encode(WORLD) == tokenizer.encode(WORLD)
    assert tokenizer.to_bytes() == file_of(tokenizer.merges, SPECIALS, pattern)


def test_pickles_hold_the_file_and_reach_other_processes(tokenizer):
    data = pickle.dumps(tokenizer)
    assert tokenizer.to_bytes() in data
    assert pickle.loads(data) == tokenizer
    with ProcessPoolExecutor(1) as pool:
        assert pool.submit(tokenizer.encode, WORLD).result() == tokenizer.encode(WORLD)


# --- exports ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[rustbpe.PATTERN, rustbpe.GPT4_PATTERN])
def peers(request):
    ours = train([PROSE, WORLD, CODE], 300, pattern=request.param)
    return ours, tiktoken.Encoding(**ours.to_tiktoken()), tokenizers.Tokenizer.from_str(ours.to_huggingface())


@settings(max_examples=200, deadline=None)
@given(adversarial_text)
def test_tiktoken_and_tokenizers_built_from_the_exports_give_the_same_ids(peers, text):
    ours, tik, hf = peers
    ids = ours.encode_ordinary(text)
    assert tik.encode_ordinary(text) == hf.encode(text).ids == ids
    assert hf.decode(ids) == text


def test_exports_carry_names_and_special_tokens(peers):
    ours, tik, hf = peers
    assert (ours.to_tiktoken("mine")["name"], tik.name, tik.n_vocab) == ("mine", "rustbpe", 558)
    assert hf.get_vocab_size() == 558
    text = "a<|bos|> <|end|>"
    assert ours.encode(text, allowed_special="all") == hf.encode(text).ids == tik.encode(text, allowed_special="all")
    assert hf.decode([97, 556], skip_special_tokens=True) == "a"


def test_the_tiktoken_file_has_a_line_per_ordinary_token(tokenizer):
    lines = tokenizer.to_tiktoken_file().splitlines()
    ranks = {base64.b64decode(token, validate=True): int(id) for token, id in map(bytes.split, lines)}
    assert ranks == tokenizer.to_tiktoken()["mergeable_ranks"]
    assert [token for token, _ in map(bytes.split, lines)] == [base64.b64encode(token) for token in ranks]


def test_the_huggingface_file_escapes_whatever_a_name_or_pattern_holds():
    names = ['<|"\\|>', "<|\x01\t|>", "<|é🙂|>"]
    exported = json.loads(train([PROSE], 20, names, pattern='"[\\\\a]+\\s').to_huggingface())
    assert [token["content"] for token in exported["added_tokens"]] == names
    assert exported["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] == '"[\\\\a]+\\s'


def test_a_special_token_that_is_also_an_ordinary_one_has_no_huggingface_file():
    with pytest.raises(ValueError, match='^a special token in tokenizer.json must be no ordinary one, "a" is both$'):
        train([PROSE], 5, ["<|s|>", "a"]).to_huggingface()


# --- stubs ------------------------------------------------------------------------------------------


def signature_of(function):
    """Names, kinds and defaults of a stub's arguments; "..." stands for any default."""
    arguments = function.args
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
    pairs = [(name.arg, default, False) for name, default in zip(plain, defaults, strict=True)]
    pairs += [(name.arg, default, True)
              for name, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return [(name, "none" if default is None else repr(ast.literal_eval(default)), keyword)
            for name, default, keyword in pairs]


def signature_in(module_object):
    parameters = inspect.signature(module_object).parameters.values()
    return [(parameter.name, "none" if parameter.default is parameter.empty else repr(parameter.default),
             parameter.kind is parameter.KEYWORD_ONLY) for parameter in parameters]


def test_the_stubs_are_installed_and_say_what_the_module_has():
    folder = Path(rustbpe.__file__).parent
    stub = (folder / "__init__.pyi").read_text(encoding="utf-8")
    assert (folder / "py.typed").exists()
    assert stub == (Path(__file__).resolve().parent.parent / "rustbpe/rustbpe.pyi").read_text(encoding="utf-8")
    tree = ast.parse(stub)
    names = {node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)}
    names |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert names == {*rustbpe.__all__}
    functions = [(node, rustbpe.split) for node in tree.body if isinstance(node, ast.FunctionDef)]
    for node in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        cls = getattr(rustbpe, node.name)
        methods = {method.name: method for method in node.body if isinstance(method, ast.FunctionDef)}
        assert ast.get_docstring(node) and cls.__doc__
        own = {name for name in vars(cls) if not name.startswith("__")}
        assert own == {name for name in methods if not name.startswith("__")}
        for name in own:
            is_property = any(getattr(mark, "id", "") == "property" for mark in methods[name].decorator_list)
            assert is_property == inspect.isgetsetdescriptor(vars(cls)[name]), name
            if not is_property:
                functions.append((methods[name], vars(cls)[name]))
        functions.append((methods["__init__"], cls))
    for function, built in functions:
        stubbed, real = signature_of(function), signature_in(built)
        if function.name == "__init__":
            stubbed = stubbed[1:]
        assert [(name, keyword) for name, _, keyword in stubbed] == [(name, keyword) for name, _, keyword in real]
        for (name, ours, _), (_, theirs, _) in zip(stubbed, real, strict=True):
            assert ours == theirs or theirs == "Ellipsis", (function.name, name)
        assert function.name == "__init__" or (ast.get_docstring(function) and built.__doc__), function.name
