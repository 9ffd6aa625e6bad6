"""The rows of results: what a CSV holds, how rows are named, hashed and merged.

A row is one evaluation of one policy. Its key says what was run: algorithm, options,
dataset, seed and step, and the hash of the code; `commit` is only for people. Two rows
of one key are the same experiment.
"""

import csv
import hashlib
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

Row = dict[str, str]  # by column; "" where there is no value

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("td3_bst", "td3_bc", "iql_bst")
MEASURED = ("return", "score", "success", "length")
KEY: tuple[str, ...] = ("algorithm", "options", "dataset", "seed", "step", "code_hash")
COLUMNS: tuple[str, ...] = (
    "algorithm",  # the script's name; "data": the behaviour itself
    "options",  # those given, `name=value` sorted, without dataset, seed and places
    "dataset",
    "seed",
    "step",  # critic updates
    *MEASURED,
    "episodes",
    "options_hash",
    "code_hash",  # of the algorithm's file, morse.py and common/
    "commit",
)


def options_text(options: Mapping[str, str]) -> str:
    """`name=value` of the options given, sorted, separated by blanks."""
    return " ".join(f"{name}={options[name]}" for name in sorted(options))


def options_of(row: Mapping[str, str]) -> dict[str, str]:
    """The row's options by name."""
    return dict(pair.split("=", 1) for pair in row["options"].split())


def options_hash(algorithm: str, text: str) -> str:
    """Names an algorithm with its options, twelve hex digits."""
    return hashlib.sha256(f"{algorithm} {text}".encode()).hexdigest()[:12]


def code_hash(algorithm: str, root: Path = ROOT) -> str:
    """Of the algorithm's file, morse.py and common/, twelve hex digits."""
    digest = hashlib.sha256()
    for path in (
        root / f"{algorithm}.py",
        root / "morse.py",
        *sorted((root / "common").glob("*.py")),
    ):
        text = path.read_text(encoding="utf-8")  # universal newlines
        digest.update(f"{path.name} {len(text)}\n{text}".encode())
    return digest.hexdigest()[:12]


def method_of(algorithm: str, options: Mapping[str, str]) -> str:
    """The tables' name of what was trained: TD3-BST, BC, 10%BC, IQL, ..."""
    names = {"td3_bst": "TD3-BST", "td3_bc": "TD3+BC", "iql_bst": "IQL-BST"}
    method = names.get(algorithm, algorithm)
    if options.get("policy_step") == "awr":
        method = "IQL"
    if float(options.get("alpha", 1)) == 0:
        method = "BC"
    fraction = float(options.get("best_fraction", 1))
    return method if fraction == 1 else f"{100 * fraction:g}%{method}"


def arguments(options: Mapping[str, str]) -> list[str]:
    """The options as words of a command line."""
    words = []
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", *value.split(",")]
    return words


def cell(value: Any) -> str:
    """A value as a CSV has it: numbers with six digits, None as nothing."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)


def key_of(row: Row) -> tuple[str, ...]:
    """What was run, see the module's docstring."""
    return tuple(row[name] for name in KEY)


def read(path: Path) -> list[Row]:
    """The rows of a CSV; none if it does not exist.

    Raises:
        ValueError: the file has other columns.
    """
    return read_csv(path, COLUMNS) if path.exists() else []


def read_csv(path: Path, columns: tuple[str, ...]) -> list[Row]:
    """The rows of a CSV of just these columns; else a ValueError."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (csv.Error, UnicodeError) as error:
        raise ValueError(f"{path} is not a CSV file: {error}") from error
    whole = not any(None in row or None in row.values() for row in rows)
    if tuple(reader.fieldnames or ()) != columns or not whole:
        raise ValueError(f"{path}: expected the columns {', '.join(columns)}")
    return rows


def write_csv(path: Path, rows: Iterable[Row], columns: tuple[str, ...]) -> None:
    """Writes a CSV whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text.getvalue(), encoding="utf-8")
    temporary.replace(path)


def locked(path: Path) -> FileLock:
    """Keeps other processes from changing a CSV meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(f".{path.name}.lock"))


def merged(rows: Iterable[Row]) -> list[Row]:
    """The rows, one per key, sorted.

    Raises:
        ValueError: two rows of one key differ in what was measured.
    """
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        other = found.setdefault(key_of(row), row)
        for name in (*MEASURED, "episodes"):
            if other[name] != row[name]:
                raise ValueError(
                    f"two rows differ in {name} ({other[name]}, {row[name]}) but are "
                    f"of one key: {', '.join(key_of(row))}"
                )
    return [found[key] for key in sorted(found, key=_order)]


def _order(key: tuple[str, ...]) -> tuple[Any, ...]:
    algorithm, options, dataset, seed, step, code = key
    return dataset, algorithm, options, code, int(seed or -1), int(step or -1)


def write(path: Path, rows: Iterable[Row]) -> None:
    """Writes a CSV of results whole or not at all."""
    write_csv(path, rows, COLUMNS)


def add(path: Path, rows: Iterable[Row]) -> None:
    """Puts rows into a CSV, one per key; safe beside other writers and readers."""
    with locked(path):
        write(path, merged([*read(path), *rows]))
