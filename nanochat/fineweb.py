"""FineWeb-EDU as nanochat's shuffled shards on the Hugging Face hub: which files, and what is here of them.

Shard i holds about 250M characters in 100 MB. The first ones are for training, in their order, so that a run that
wants more of them reads the same text first. The last one validates for every preset: it never moves between splits,
however many were downloaded.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nanochat import download, hub
from nanochat.common import UserError
from nanochat.text_sources import corrupt_row_groups, open_parquet

NAME = "fineweb-edu"
REPO = "karpathy/fineweb-edu-100b-shuffle"
N_TRAIN = 1822
VAL_SHARD = f"shard_{N_TRAIN:05d}.parquet"
_ENTRY = ("bytes", "sha256", "rows", "row_groups", "corrupt")


def folder() -> Path:
    """Return where the shards are."""
    return hub.repo_folder(REPO)


def prepare(shards: int | None, *, workers: int = 8, skip_corrupt: bool = False) -> dict:
    """Download the first `shards` training shards, None for all, and the validation shard; return their manifest.

    With `skip_corrupt` every row group is read once, and the manifest tells for good which ones to pass over.
    """
    names = _names(N_TRAIN if shards is None else shards)
    paths = hub.fetch_all([(REPO, name) for name in names], workers=workers)
    if skip_corrupt:
        with ThreadPoolExecutor(workers) as pool:
            corrupt = dict(zip(names, pool.map(corrupt_row_groups, paths), strict=True))
        known = download.read_manifest(folder())
        for path in paths:  # only what came so may be passed over: what was damaged here can come again
            if corrupt[path.name] and download.sha256(path) != known[path.name]["sha256"]:
                raise UserError(f"{path} must have the sha256 of its manifest, it has another: delete it and prepare "
                                "the data again")
        download.enter(folder(), {name: known[name] | {"corrupt": groups} for name, groups in corrupt.items()})
    return opened(shards)


def opened(shards: int | None) -> dict:
    """Return the manifest of the first `shards` training shards, None for as many as are here without a gap, and the
    validation shard. UserError when one of them is missing or has no text.
    """
    known = download.read_manifest(folder())
    wanted = _names(1 if shards is None else shards)
    while shards is None and (name := f"shard_{len(wanted) - 1:05d}.parquet") in known and name != VAL_SHARD:
        wanted.append(name)
    paths = {name: folder() / name for name in wanted}
    missing = [name for name, path in paths.items() if name not in known or not path.is_file()
               or path.stat().st_size != known[name]["bytes"]]
    if missing:
        more = f" and {len(missing) - 1:,} more are" if len(missing) > 1 else " is"
        raise UserError(f"data {NAME} must have {len(wanted) - 1} training shards and {VAL_SHARD}, {missing[0]}{more} "
                        f"missing or cut, run python -m scripts.dataset --data {NAME} --shards {len(wanted) - 1}")
    for path in paths.values():
        with open_parquet(path):  # has a column text
            pass
    files = {name: {key: known[name][key] for key in _ENTRY if key in known[name]} for name in sorted(wanted)}
    return {"name": NAME, "val": VAL_SHARD, "files": files}


def _names(shards: int) -> list[str]:
    if not 1 <= shards <= N_TRAIN:
        raise UserError(f"--shards must be in 1..{N_TRAIN}, got {shards}")
    # the pinned shard first: a tokenizer may start on what comes next while the rest arrives
    return [VAL_SHARD] + [f"shard_{i:05d}.parquet" for i in range(shards)]
