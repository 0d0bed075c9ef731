"""The tokenizer as a folder that Hugging Face's libraries, vLLM and SGLang read: vocabulary, special tokens, chat
template. hf_model.py writes the model beside it.

The Jinja template writes what `Tokenizer.render_conversation` gives, and with add_generation_prompt what
`render_for_completion` gives: encoded by `tokenizers`, its text has exactly their ids. Two things differ, since a
template makes one text and Hugging Face finds the names of special tokens anywhere in a text:

- the name of a special token inside content gets a space, `<|bos|>` becomes `< |bos|>`, so that there too nobody can
  write a special token; ours keeps the name and encodes it as ordinary text,
- text parts in a row are encoded as one text; ours encodes each by itself. A user's content may be a list of text
  parts as well, the form that vLLM hands to templates.

A conversation that ours refuses is refused there too (raise_exception).
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nanochat.common import UserError, atomic_write, fsync_folder
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

BOS, EOS = "<|bos|>", "<|assistant_end|>"  # the end of an answer is what generation stops at, and what pads

# Every tag strips the white space around it, so that trim_blocks and lstrip_blocks change nothing. Filters and tests
# only, no methods of Python's str: other engines than jinja2 have none.
CHAT_TEMPLATE = """\
{%- macro ordinary(text) -%}
    {%- if text is not string -%}{{- raise_exception('content must be text or a list of parts') -}}{%- endif -%}
    {%- set safe = namespace(text=text) -%}
    {%- for name in SPECIAL_TOKENS -%}
        {%- set safe.text = safe.text | replace('<' ~ name, '< ' ~ name) -%}
    {%- endfor -%}
    {{- safe.text -}}
{%- endmacro -%}

{%- macro render(content, role) -%}
    {%- if content is string or content is mapping or content is not iterable -%}
        {{- ordinary(content) -}}
    {%- else -%}
        {%- set waiting = namespace(text='') -%}
        {%- for part in content -%}
            {%- if part['type'] == 'text' and part['text'] is string -%}
                {%- set waiting.text = waiting.text ~ part['text'] -%}
            {%- elif part['type'] in ['python', 'python_output'] and role == 'assistant' -%}
                {%- set name = 'python' if part['type'] == 'python' else 'output' -%}
                {{- ordinary(waiting.text) ~ '<|' ~ name ~ '_start|>' ~ ordinary(part['text']) -}}
                {{- '<|' ~ name ~ '_end|>' -}}
                {%- set waiting.text = '' -%}
            {%- else -%}
                {{- raise_exception('a part must be text, or of an assistant python or python_output') -}}
            {%- endif -%}
        {%- endfor -%}
        {{- ordinary(waiting.text) -}}
    {%- endif -%}
{%- endmacro -%}

{%- set has_system = messages | length > 0 and messages[0]['role'] == 'system' -%}
{%- set turns = messages[1:] if has_system else messages -%}
{%- if add_generation_prompt and turns | length > 0 and turns[-1]['role'] == 'assistant' -%}
    {%- set turns = turns[:-1] -%}
{%- endif -%}
{%- if turns | length == 0 -%}
    {{- raise_exception('a conversation must hold a user message') -}}
{%- endif -%}
{{- '<|bos|>' -}}
{%- for message in turns -%}
    {%- set role = 'user' if loop.index0 % 2 == 0 else 'assistant' -%}
    {%- if message['role'] != role -%}
        {{- raise_exception('user and assistant must take turns, a system message comes first') -}}
    {%- endif -%}
    {{- '<|' ~ role ~ '_start|>' -}}
    {%- if has_system and loop.first -%}
        {{- render(messages[0]['content'], 'system') ~ '\\n\\n' -}}
    {%- endif -%}
    {{- render(message['content'], role) ~ '<|' ~ role ~ '_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant_start|>' -}}
{%- endif -%}
""".replace("SPECIAL_TOKENS", repr([name.removeprefix("<") for name in SPECIAL_TOKENS]))


def huggingface_files(tokenizer: Tokenizer) -> dict[str, str]:
    """Return file name -> text of everything that transformers.AutoTokenizer reads."""
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS,
             "additional_special_tokens": [name for name in SPECIAL_TOKENS if name not in (BOS, EOS)]}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = names | {
        "added_tokens_decoder": {str(tokenizer.special_id(name)): {"content": name} | flags for name in SPECIAL_TOKENS},
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,  # it would drop spaces before marks when decoding
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return {"tokenizer.json": tokenizer.to_huggingface(),
            "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
            "special_tokens_map.json": json.dumps(names, indent=2) + "\n"}


def tiktoken_files(tokenizer: Tokenizer) -> dict[str, str]:
    """Return file name -> text: tiktoken's text of ranks, and beside it the other arguments of tiktoken.Encoding."""
    arguments = tokenizer.to_tiktoken()
    del arguments["mergeable_ranks"]
    return {"tokenizer.tiktoken": tokenizer.to_tiktoken_file().decode("ascii"),
            "encoding.json": json.dumps(arguments, indent=2) + "\n"}


FORMATS = {"huggingface": huggingface_files, "tiktoken": tiktoken_files}


def export(tokenizer: Tokenizer, folder: Path, format: str = "huggingface") -> list[Path]:
    """Write the files of a format ("huggingface" or "tiktoken") into `folder` and return their paths.

    A new folder appears whole or not at all; in an earlier export each file is replaced in one step. UserError, and
    nothing written, for a folder that holds anything else.
    """
    if format not in FORMATS:
        raise UserError(f"the format must be one of {', '.join(FORMATS)}, got {format!r}")
    files, folder = FORMATS[format](tokenizer), Path(folder)
    try:
        _check(folder, files)
        if folder.is_dir() and any(folder.iterdir()):
            write_files(folder, files)
        else:
            with new_folder(folder) as temporary:
                write_files(temporary, files)
    except OSError as error:
        raise UserError(f"the tokenizer cannot be written to {folder} ({error.strerror})") from error
    return [folder / name for name in files]


def _check(folder: Path, files: dict[str, str]) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"the export needs a folder, {folder} is none")
    others = sorted(path.name for path in folder.iterdir() if path.name not in files) if folder.exists() else []
    if others:
        raise UserError(f"the export needs a folder that is empty, new or holds an earlier export, {folder} holds "
                        f"{', '.join(others[:3])}{', ...' if len(others) > 3 else ''}")


def write_files(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        atomic_write(folder / name, text)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the name `folder` when the body is done; an empty folder there gives way.

    After an error in the body nothing is left. Files must be durable by then. UserError for the current folder: whoever
    stands in it would be left in the one that gave way.
    """
    if folder.resolve() == Path.cwd():
        raise UserError(f"the export puts a folder of its own in place, which cannot be the current one, got {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".tmp-{folder.name}-"))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes folders private
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_folder(folder.parent)
