"""Where a whole run's time goes, by the dataset's size and by the number of seeds.

    uv run benchmarks/end_to_end.py
    uv run benchmarks/end_to_end.py --sizes 10000 100000 --num-seeds 1 2

Runs the script on random transitions of a hopper's shape, without an environment, and
once per number of seeds on the embedded maze, whose evaluations are real. Every run is
a process of its own; what its `result.json` does not account for is `import, end`.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

if __name__ == "__main__":  # a script finds its neighbours through the repository root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import report
from results import tables

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("load", "compile", "pretraining", "training", "evaluation", "writing")
OBS_DIM, ACTION_DIM = 11, 3


@dataclass(frozen=True)
class Options:
    """What to run, and how long."""

    script: Literal["td3_bst", "td3_bc", "iql_bst"] = "td3_bst"
    sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000, 4_000_000)  # transitions
    num_seeds: tuple[int, ...] = (1, 2, 4, 8, 16)  # at the smallest size
    num_updates: int = 4_000  # critic updates, an even number
    num_morse_updates: int = 1_000
    out: Path = Path("benchmarks/end_to_end.json")

    def __post_init__(self) -> None:
        if not (self.sizes and self.num_seeds):
            raise ValueError("at least one size and one number of seeds are needed")
        if min(self.sizes) < 2 or min(self.num_seeds) < 1:
            raise ValueError("sizes must be at least 2, seeds at least 1")
        if self.num_updates < 2 or self.num_updates % 2:
            raise ValueError(f"num_updates must be even, got {self.num_updates}")


def write_dataset(path: Path, size: int) -> None:
    """Random transitions, no episode of which ends, as .npz."""
    rng = np.random.default_rng(0)
    obs = rng.standard_normal((size, OBS_DIM), np.float32)
    np.savez(
        path,
        observations=obs,
        next_observations=np.roll(obs, -1, axis=0),
        actions=rng.uniform(-1, 1, (size, ACTION_DIM)).astype(np.float32),
        rewards=rng.standard_normal(size, np.float32),
        terminals=np.zeros(size, bool),
        timeouts=np.arange(size) % 1000 == 999,
    )


def run(options: Options, dataset: list[str], seeds: int, root: Path) -> dict[str, Any]:
    """One run; seconds of its stages and in all."""
    args = [*dataset, "--num-seeds", str(seeds), "--run-dir", str(root)]
    args += ["--num-updates", str(options.num_updates)]
    args += ["--eval-every", str(max(2, options.num_updates // 4 * 2))]
    args += ["--num-morse-updates", str(options.num_morse_updates)]
    command = [sys.executable, str(ROOT / f"{options.script}.py"), *args]
    begin = time.perf_counter()
    place = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    place |= {"XDG_CACHE_HOME": str(root / "cache")} if dataset else {}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **place},
    )
    total = time.perf_counter() - begin
    if done.returncode != 0:
        raise SystemExit(f"error: {' '.join(command)} failed: {done.stderr[-2000:]}")
    folder = Path(done.stdout.splitlines()[-1])
    result, config = (
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("result", "config")
    )
    stages = {name: result["wall"].get(name, 0.0) for name in STAGES}
    stages["import, end"] = total - sum(stages.values())
    each = 1e6 * stages["training"] / options.num_updates / seeds
    size = config["dataset"]["num_transitions"]
    return dict(size=size, seeds=seeds, total=total, stages=stages, us_per_update=each)


def measure(options: Options) -> list[dict[str, Any]]:
    """All runs; the first of a dataset's size reads it, the second has it cached."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for size in options.sizes:
            path = root / f"random{size}.npz"
            write_dataset(path, size)
            for what in ("first read", "cached"):
                row = run(options, ["--dataset", str(path)], 1, root / "runs")
                rows.append(dict(dataset=f"random, {what}") | row)
        smallest = root / f"random{min(options.sizes)}.npz"
        for count in options.num_seeds:
            row = run(options, ["--dataset", str(smallest)], count, root / "runs")
            rows.append(dict(dataset="random") | row)
        for count in options.num_seeds:
            row = run(options, [], count, root / "runs")
            rows.append(dict(dataset="embedded maze") | row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown; seconds."""
    lines = [
        [
            row["dataset"],
            f"{row['size']:,}",
            str(row["seeds"]),
            *(f"{seconds:.1f}" for seconds in row["stages"].values()),
            f"{row['total']:.1f}",
            f"{row['us_per_update']:.0f}",
        ]
        for row in rows
    ]
    head = ["dataset", "transitions", "seeds", *STAGES, "import, end", "in all"]
    return tables.markdown([*head, "us per update and seed"], lines)


def main() -> None:
    """Prints the table, writes the JSON."""
    options = tyro.cli(Options, description=(__doc__ or "").split("\n\n")[0])
    rows = measure(options)
    report.publish(rows, table(rows), options.out)


if __name__ == "__main__":
    main()
