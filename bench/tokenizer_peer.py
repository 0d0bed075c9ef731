"""rustbpe 0.1.0 and ours through the methods that both have, each in a process of its own: they share the import name,
and a process has one peak of memory. Imported, this file gives `ask`; run, it is that process.

    said = ask({"texts": "texts.jsonl", "vocab_size": 8192, "encode": ["hello"]}, ours=False)
"""

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path


def write_texts(path: Path, texts: list[str]) -> Path:
    """Write texts as JSON lines, which the other process reads one by one, and return the path."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(text) + "\n" for text in texts)
    return path


def ask(request: dict, ours: bool) -> dict:
    """Train in another process and return what its tokenizer says.

    request: "texts" (path of JSON lines), "vocab_size", optionally "pattern", "rounds" of training (default 1) and
    texts to "encode".
    Returns "file" (of the module), "seconds" of each training, "peak_bytes" (of the first, above what was in use
    before), "pattern", "vocab_size", "ranks" (token i in hexadecimal), "ids" and "batch" (the texts encoded one by
    one and at once), "decoded" (the ids, back as text).
    """
    from nanochat import peers  # not in the process that is measured: torch comes with it
    from nanochat.common import UserError

    if not (peers.FOLDER / "rustbpe").is_dir():
        raise UserError(f"rustbpe 0.1.0 must be in {peers.FOLDER}, it is not installed: run `bash scripts/setup.sh`")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, __file__], input=json.dumps(request, default=str), text=True,
                          encoding="utf-8", capture_output=True,
                          env=environment if ours else environment | {"PYTHONPATH": str(peers.FOLDER)})
    if done.returncode:
        raise RuntimeError(f"{'ours' if ours else 'rustbpe 0.1.0'} failed in its process:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def answer(request: dict) -> dict:
    """Train and use the `rustbpe` that this process imports; see `ask`."""
    import rustbpe

    with open(request["texts"], encoding="utf-8") as file:
        texts = [json.loads(line) for line in file]
    said = {"file": rustbpe.__file__, "seconds": []}
    for _ in range(request.get("rounds", 1)):
        tokenizer = rustbpe.Tokenizer()
        gc.collect()
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        start = time.perf_counter()
        tokenizer.train_from_iterator(texts, request["vocab_size"], pattern=request.get("pattern"))
        said["seconds"].append(time.perf_counter() - start)
        said.setdefault("peak_bytes", memory("VmHWM") - before)
    ranks = tokenizer.get_mergeable_ranks()
    assert [id for _, id in ranks] == list(range(len(ranks))), "ranks must come in order"
    texts = request.get("encode", [])
    ids = [tokenizer.encode(text) for text in texts]
    return said | {"pattern": tokenizer.get_pattern(), "vocab_size": tokenizer.vocab_size,
                   "ranks": [bytes(token).hex() for token, _ in ranks],
                   "ids": ids, "batch": tokenizer.batch_encode(texts), "decoded": list(map(tokenizer.decode, ids))}


def memory(field: str) -> int:
    """Return VmRSS (now) or VmHWM (peak) of this process in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    json.dump(answer(json.load(sys.stdin)), sys.stdout)
