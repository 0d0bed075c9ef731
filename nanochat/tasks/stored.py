"""Tasks stored as parquet files on the hub: fetched by exact name, kept as Arrow, shuffled once.

The order is `numpy.random.default_rng(42).permutation(rows)`, which is what the `datasets` library draws for
shuffle(seed=42). So the first 10,000 conversations, or the first 400 problems, are those of nanochat (Nov 2025).
"""

from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanochat import hub
from nanochat.common import UserError
from nanochat.tasks.common import Task
from nanochat.tokenizer import check_conversation

SHUFFLE_SEED = 42


class StoredTask(Task):
    """The rows of a split's files, at most the first `size` of the shuffled order; the text is read on first use.

    A subclass says where its files are (`repo`, `files`: split -> paths), what it reads from them (`columns`: name ->
    shape, "text", "integer", [shape] for a list or {field: shape} for a struct) and what `conversation` a row is.
    """

    repo: str
    files: dict[str, tuple[str, ...]]
    columns: dict[str, object]

    def __init__(self, split: str, size: int | None = None):
        if split not in self.files:
            raise UserError(f"unknown split {split!r} of task {self.name}: choose from {', '.join(self.files)}")
        if size is not None and size < 1:
            raise UserError(f"task {self.name} needs at least one problem, not {size}")
        self._paths = hub.fetch_all([(self.repo, path) for path in self.files[split]])
        self._ends = np.cumsum([_open(path, self.columns).metadata.num_rows for path in self._paths])
        if not self._ends[-1]:
            raise UserError(f"task {self.name} must have at least one row in split {split}, "
                            f"{', '.join(map(str, self._paths))} {'has' if len(self._paths) == 1 else 'have'} none")
        self._order = np.random.default_rng(SHUFFLE_SEED).permutation(self._ends[-1])[:size]

    def conversation(self, row: dict) -> dict:
        """Return the conversation of a row of `columns`; UserError when it cannot be one."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} problems, no {index}")
        rows, places = self._rows
        row = rows.slice(int(places[index]), 1).to_pylist()[0]
        try:
            return check_conversation(self.conversation(row))
        except UserError as error:
            number = int(self._order[index])
            file = int(np.searchsorted(self._ends, number, side="right"))
            first = self._ends[file - 1] if file else 0
            raise UserError(f"row {number - first} of {self._paths[file]}: {error}") from error

    @cached_property
    def _rows(self) -> tuple[pa.Table, np.ndarray]:
        """The rows in use, in the files' order, and the place of each problem among them.

        The rest of a row group is let go at once: the 10,000 of SFT take no more than they need.
        """
        used, first, tables = np.sort(self._order), 0, []
        for path in self._paths:
            file = _open(path, self.columns)
            for group in range(file.num_row_groups):
                n = file.metadata.row_group(group).num_rows
                begin, end = np.searchsorted(used, (first, first + n))
                if end > begin:
                    table = _read(file, path, group, list(self.columns))
                    tables.append(table if end - begin == n else table.take(used[begin:end] - first))
                first += n
        return pa.concat_tables(tables), np.searchsorted(used, self._order)


def _open(path: Path, columns: dict[str, object]) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} must be a whole parquet file ({error})") from error
    for name, shape in columns.items():
        found = file.schema_arrow.field(name).type if name in file.schema_arrow.names else None
        if found is None or not _fits(found, shape):
            raise UserError(f"{path} must have a column {name} of {_spell(shape)}, it has "
                            f"{found or ', '.join(file.schema_arrow.names) or 'no columns'}")
    return file


def _fits(found: pa.DataType, shape: object) -> bool:
    if isinstance(shape, dict):
        return pa.types.is_struct(found) and all(
            found.get_field_index(name) >= 0 and _fits(found.field(name).type, inner) for name, inner in shape.items())
    if isinstance(shape, list):
        return (pa.types.is_list(found) or pa.types.is_large_list(found)) and _fits(found.value_type, shape[0])
    if shape == "integer":
        return pa.types.is_integer(found)
    return pa.types.is_string(found) or pa.types.is_large_string(found)


def _spell(shape: object) -> str:
    if isinstance(shape, dict):
        return "{" + ", ".join(f"{name}: {_spell(inner)}" for name, inner in shape.items()) + "}"
    return f"[{_spell(shape[0])}]" if isinstance(shape, list) else str(shape)


def _read(file: pq.ParquetFile, path: Path, group: int, columns: list[str]) -> pa.Table:
    try:
        table = file.read_row_group(group, columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"row group {group} of {path} must be readable ({error})") from error
    flat = table.flatten()
    for name, column in zip(flat.column_names, flat.columns, strict=True):
        if column.null_count:
            raise UserError(f"row group {group} of {path} must have no empty cell, column {name} has "
                            f"{column.null_count}")
    return table
