"""The README's tables, from the runs that made them.

    uv run results/tables.py add RUN [RUN ...]   take the last evaluation of these runs
    uv run results/tables.py                     write the tables into README.md
    uv run results/tables.py --check             exit 1 if README.md says otherwise

`runs.csv` has one row per method, dataset, seed and step; adding a run again replaces
its rows. A table shows the mean and the sample sd over seeds; n is their number.
"""

import argparse
import csv
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RUNS, README = ROOT / "results" / "runs.csv", ROOT / "README.md"
KEY: tuple[str, ...] = ("method", "dataset", "seed", "step")
COLUMNS: tuple[str, ...] = (
    *KEY,
    "return",
    "score",
    "success",
    "length",
    "episodes",
    "commit",
)
METHODS = ("data", "BC", "10 % BC", "TD3+BC", "TD3-BST", "IQL", "IQL-BST")
EMBEDDED = "td3-bst/pointmaze/zigzag-v0"
Row = dict[str, Any]


def rows_of(run: Path) -> list[Row]:
    """The rows of a finished run: one per seed, and one of the data's own figures."""
    try:
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    except OSError as error:
        sys.exit(f"no finished run in {run}: {error}")
    method = method_of(result["algorithm"], result["options"])
    shared = {"dataset": result["dataset"], "commit": result["commit"] or ""}
    shared |= {"step": result["step"], "episodes": result["eval_episodes"]}
    rows = [
        {"method": method, "seed": seed, **figures, **shared}
        for seed, *values in zip(
            *(result[k] for k in ("seeds", "returns", "scores", "success", "lengths")),
            strict=True,
        )
        for figures in [
            dict(zip(("return", "score", "success", "length"), values, strict=True))
        ]
    ]
    if result["options"].get("best_fraction", 1) == 1:
        rows.append({"method": "data", "seed": "", **shared, **result["data"]})
        rows[-1] |= {"step": "", "episodes": ""}
    return [{c: _cell(row.get(c)) for c in COLUMNS} for row in rows]


def method_of(algorithm: str, options: dict[str, Any]) -> str:
    """The tables' name of what a run trained."""
    method = {"td3_bst": "TD3-BST", "td3_bc": "TD3+BC", "iql_bst": "IQL-BST"}[algorithm]
    if options.get("policy_step") == "awr":
        method = "IQL"
    if options.get("alpha") == 0:
        method = "BC"
    fraction = options.get("best_fraction", 1)
    return method if fraction == 1 else f"{100 * fraction:g} % {method}"


def _cell(value: object) -> str:
    return (
        "" if value is None else f"{value:.6g}" if type(value) is float else str(value)
    )


def read() -> list[Row]:
    """All rows of runs.csv."""
    if not RUNS.exists():
        return []
    with RUNS.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def add(runs: Sequence[Path]) -> None:
    """Puts the runs' rows into runs.csv, sorted; the newer of two equal keys stays."""
    merged = {tuple(row[k] for k in KEY): row for row in read()}
    for run in runs:
        merged |= {tuple(row[k] for k in KEY): row for row in rows_of(run)}
    with RUNS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for _, row in sorted(merged.items()))


def spread(rows: Sequence[Row], column: str, factor: float = 1.0) -> str:
    """`mean +- sd (n)` of a column; without sd where there is one value."""
    values = [factor * float(row[column]) for row in rows if row[column]]
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.1f}"
    if rows[0]["method"] == "data":
        return mean
    if len(values) == 1:
        return f"{mean} (n = 1)"
    return f"{mean} ± {statistics.stdev(values):.1f} (n = {len(values)})"


def chosen(rows: Sequence[Row], method: str, dataset: str, step: int) -> list[Row]:
    """The method's rows at this number of updates; the data have none."""
    key = (method, dataset, "" if method == "data" else str(step))
    return [r for r in rows if (r["method"], r["dataset"], r["step"]) == key]


def embedded_table(rows: Sequence[Row]) -> str:
    """Success and steps on the embedded maze by the default run, a line per method."""
    lines = ["| method | success, % | steps to the goal |", "|---|---|---|"]
    for method in METHODS:
        own = chosen(rows, method, EMBEDDED, 20_000)
        if own:
            cells = spread(own, "success", 100), spread(own, "length")
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def standin_table(rows: Sequence[Row]) -> str:
    """Scores after 100,000 updates on the stand-ins and the embedded maze."""
    lines = ["| dataset | " + " | ".join(METHODS) + " |"]
    lines.append("|---" * (len(METHODS) + 1) + "|")
    names = sorted({r["dataset"] for r in rows if r["dataset"].startswith("standin/")})
    columns = [(name, name, "score") for name in names]
    columns.append((EMBEDDED, "embedded maze, success %", "score"))
    columns.append((EMBEDDED, "embedded maze, steps", "length"))
    for dataset, label, column in columns:
        cells = [
            spread(chosen(rows, method, dataset, 100_000), column) for method in METHODS
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """The README's text with each table between its markers made anew."""
    rows = read()
    for name, table in (("embedded", embedded_table), ("standins", standin_table)):
        begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        head, rest = text.split(begin)
        text = f"{head}{begin}\n{table(rows)}\n{end}{rest.split(end)[1]}"
    return text


def main() -> None:
    """Adds runs, writes the tables, or checks them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("add", nargs="*", help="the word add, then run folders")
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    if args.add[:1] not in ([], ["add"]):
        parser.error(f"expected `add RUN ...`, got {args.add[0]!r}")
    add([Path(run) for run in args.add[1:]])
    text = README.read_text(encoding="utf-8")
    made = with_tables(text)
    if args.check and made != text:
        sys.exit(
            "README.md's tables differ from results/runs.csv: run results/tables.py"
        )
    README.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
