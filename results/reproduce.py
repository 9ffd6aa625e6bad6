"""Runs a named table over datasets, methods and seeds, and makes its figures.

    uv run results/reproduce.py quick
    uv run results/reproduce.py locomotion --datasets hopper-medium-v2 --dry-run
    uv run results/reproduce.py antmaze --shard 2/8 --out runs/part2
    uv run results/reproduce.py merge results/runs.csv runs/*/results.csv

What `--out` holds for the same options and the same code is not run again, and what was
killed goes on where it was: type the same command again.
"""

import csv
import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from filelock import FileLock
from tqdm import tqdm

if __name__ == "__main__":  # a script finds its neighbours through the repository root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from results import figures, store, sweeps, tables
from results.sweeps import Job, Sweep

RATES = store.ROOT / "results" / "rates.csv"
HARMLESS = {"eval_episodes", "num_morse_updates"}  # to a rate


@dataclass(frozen=True)
class Merge:
    """Puts the rows of several CSVs into one; no row is lost or doubled."""

    into: tyro.conf.Positional[Path]  # made if it does not exist
    rows: tyro.conf.Positional[tuple[Path, ...]]  # results.csv of other sweeps


class SweepError(Exception):
    """What the user has to change, in one sentence."""


# ============================================================================== Plan


def action_dims(sweep: Sweep) -> dict[str, int]:
    """dim(A) of the datasets, which the scales are multiples of."""
    return {name: action_dim(name) for name in sweep.datasets if sweep.scales}


def action_dim(dataset: str) -> int:
    """Known by name, or read."""
    return sweeps.action_dim(dataset) or load(dataset).action_dim


def load(dataset: str, eval_map: str = "auto") -> Any:
    """The dataset, as the scripts load it; a SweepError where they have an error."""
    from common import datasets
    from common.errors import UserError

    try:
        return datasets.load(dataset, eval_map)
    except UserError as error:
        raise SweepError(str(error)) from error


def to_do(planned: Sequence[Job], path: Path) -> list[tuple[Job, str]]:
    """What the CSV does not hold of the jobs, each with its code's hash."""
    there = sweeps.held(store.read(path))
    hashes = {job.algorithm: store.code_hash(job.algorithm) for job in planned}
    return [
        (lacking, hashes[job.algorithm])
        for job in planned
        for lacking in sweeps.missing(job, there, hashes[job.algorithm])
    ]


def show(planned: Sequence[tuple[Job, str]], rates: Sequence[sweeps.Rate]) -> None:
    """Prints every command and the cost by the rates measured so far."""
    devices = dict.fromkeys(rate["device"] for rate in rates)
    for job, _ in planned:
        costs = ((device, sweeps.seconds(job, rates, device)) for device in devices)
        known = [f"{sweeps.duration(spent)} on {d}" for d, spent in costs if spent]
        print(f"uv run {job.algorithm}.py {shlex.join(job.arguments())}")
        print(f"    # {job.method}, {', '.join(known) or 'not measured'}")
    lanes = sum(job.lanes for job, _ in planned)
    print(f"{len(planned)} processes, {lanes} policies to train")
    for device, spent in sweeps.total([job for job, _ in planned], rates).items():
        text = "some methods not measured" if spent is None else sweeps.duration(spent)
        print(f"on {device}: {text}")
    if not any("cpu" not in device for device in devices):
        print("on a GPU: not measured")


# =============================================================================== Run


WATCHED = """
import os, runpy, sys, threading

def watch():
    os.read(0, 1)  # returns when the sweep is no more, however it ended
    os._exit(1)

threading.Thread(target=watch, daemon=True).start()
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_script(algorithm: str, args: Sequence[str], output: Path) -> None:
    """Runs a script to its end, or to the sweep's.

    Raises:
        SweepError: the script failed; what it said is in `output`.
    """
    script = [sys.executable, "-c", WATCHED, str(store.ROOT / f"{algorithm}.py"), *args]
    with output.open("ab") as file:
        begin = file.tell()
        with subprocess.Popen(  # closes what the script watches, at the end
            script,
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=file,
            start_new_session=True,  # a terminal's Ctrl-C comes by way of the sweep
        ) as process:
            try:
                code = process.wait()
            except BaseException:
                process.terminate()  # it writes a checkpoint; a second one: at once
                _wait_or_kill(process)
                raise
    if code != 0:
        said = output.read_bytes()[begin:].decode(errors="replace").splitlines()
        lines = [line.strip(" │╭╮╰╯─") for line in said]  # a bad option is in a box
        lines = [x for x in lines if x and not x.startswith("For full helptext")]
        what = lines[-1] if lines else "it said nothing"
        raise SweepError(f"{what} (exit code {code}, see {output})")


def _wait_or_kill(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait()
    finally:
        process.kill()


def run(job: Job, folder: Path) -> Path:
    """Trains a job, or goes on with it; returns the folder of the finished run."""
    for done in folder.glob("*/result.json"):
        return done.parent
    begun = [path.parent for path in sorted(folder.glob("*/config.json"))]
    if begun:
        args = ["--resume", str(begun[0])]
    else:
        args = [*job.arguments(), "--run-dir", str(folder)]
    run_script(job.algorithm, args, folder / "output.txt")
    for done in folder.glob("*/result.json"):
        return done.parent
    raise SweepError(f"{job.algorithm}.py left no result.json in {folder}")


def rows_of(job: Job, code: str, run: Path) -> list[store.Row]:
    """A finished run's rows: its evaluations, and the behaviour's own figures."""
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    if not result["eval_episodes"]:
        raise SweepError(
            f"there are no scores: {job.dataset} was not evaluated, {run.parent} says "
            "why; delete that folder to train again"
        )
    if result.get("diverged"):  # a mean over the others would hide it
        raise SweepError(
            f"diverged: {', '.join(result['diverged'])}; what is there is in {run}"
        )
    with (run / "log.csv").open(newline="", encoding="utf-8") as file:
        log = list(csv.DictReader(file))
    scales = {float(scale): scale for scale in job.scales}
    rows: list[dict[str, Any]] = []
    for line in log:
        row = {k: float(line[k]) if line[k] else None for k in store.MEASURED}
        options = dict(job.options)
        if job.scales:
            options["scale"] = scales[float(line["scale"])]
        text = store.options_text(options)
        row |= {"algorithm": job.algorithm, "options": text, "seed": line["seed"]}
        row |= {"options_hash": store.options_hash(job.algorithm, text)}
        row |= {"step": line["step"], "episodes": result["eval_episodes"]}
        rows.append(row | {"code_hash": code})
    if "best_fraction" not in dict(job.options):
        rows.append({"algorithm": "data"} | result["data"])
    shared = {"dataset": job.dataset, "commit": result["commit"]}
    return [
        {name: store.cell((row | shared).get(name)) for name in store.COLUMNS}
        for row in rows
    ]


def rate_of(job: Job, run: Path, spent: float) -> sweeps.Rate:
    """How fast a run was that took `spent` seconds in one go."""
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    wall, options = result["wall"], result["options"]
    fitting, waiting = wall.get("pretraining", 0), wall.get("evaluation", 0)
    waiting += wall["writing"]
    evaluations = -(-options["num_updates"] // options["eval_every"])
    fitted = options["num_morse_updates"] * job.lanes if fitting else 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    device = result["device"]
    values = dict(
        device=f"{device}, {cores} cores" if device == "cpu" else device,
        method=job.method,
        domain=config["dataset"]["domain"],
        lanes=job.lanes,
        updates_per_second=round(result["updates_per_second"], 1),
        morse_updates_per_second=round(fitted / fitting, 1) if fitted else "",
        seconds_per_evaluation=round(waiting / evaluations, 2),
        seconds_besides=round(spent - waiting - fitting - wall["training"], 1),
        commit=result["commit"] or "",
    )
    return {name: str(values[name]) for name in sweeps.RATE_COLUMNS}


@functools.cache
def check_evaluated(dataset: str, eval_map: str) -> None:
    """Refuses a dataset whose policies nothing evaluates, before they are trained."""
    found = load(dataset, eval_map)
    if found.task is None:
        raise SweepError(f"there are no scores: {found.why_no_task}")


def check_code(job: Job, code: str) -> None:
    """Refuses to run or to keep what other code than the planned one makes."""
    if store.code_hash(job.algorithm) != code:
        raise SweepError(
            f"{job.algorithm}.py, morse.py or common/ changed while the sweep ran; "
            "start it again"
        )


def finish(job: Job, code: str, options: Sweep) -> None:
    """Trains a job and adds its rows, all at once, and its rate."""
    out = options.out
    folder = out / "runs" / job.name(code)
    fresh, begin = not any(folder.iterdir()), time.perf_counter()
    check_code(job, code)
    check_evaluated(job.dataset, dict(job.options).get("eval_map", "auto"))
    done = run(job, folder)
    check_code(job, code)
    if fresh and {name for name, _ in options.further} <= HARMLESS:
        rate = rate_of(job, done, time.perf_counter() - begin)
        sweeps.add_rate(out / "rates.csv", rate)
    store.add(out / "results.csv", rows_of(job, code, done))


def train(job: Job, code: str, options: Sweep) -> str:
    """Trains a job unless another sweep has, meanwhile; says how it went."""
    begin, path = time.perf_counter(), options.out / "results.csv"
    lock = options.out / "runs" / f".{job.name(code)}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):  # waits for another sweep at the same job
        if not sweeps.missing(job, sweeps.held(store.read(path)), code):
            return "done by another sweep"
        (options.out / "runs" / job.name(code)).mkdir(exist_ok=True)
        finish(job, code, options)
    return f"done in {sweeps.duration(time.perf_counter() - begin)}"


def train_all(planned: Sequence[tuple[Job, str]], options: Sweep) -> list[str]:
    """Trains every job; returns what went wrong, a line per failed one."""
    failed = []
    lanes = sum(job.lanes for job, _ in planned)
    with tqdm(total=lanes, unit=" policies", disable=None) as bar:
        for number, (job, code) in enumerate(planned, 1):
            what = f"{job.method} on {job.dataset}, {job.lanes} policies"
            tqdm.write(f"[{number}/{len(planned)}] {what}", file=sys.stdout)
            sys.stdout.flush()
            try:
                told = train(job, code, options)
            except (OSError, SweepError, ValueError) as error:
                told = f"failed: {error}"
                failed.append(f"{what}: {error}")
            tqdm.write(f"    {told}", file=sys.stdout)
            bar.update(job.lanes)
    return failed


# ============================================================================ Report


def rows_wanted(planned: Sequence[Job], rows: Sequence[store.Row]) -> list[store.Row]:
    """The rows of these jobs by the present code, and their datasets' own."""
    codes = {job.algorithm: store.code_hash(job.algorithm) for job in planned}
    wanted = {
        (job.algorithm, text, job.dataset, seed, codes[job.algorithm])
        for job in planned
        for text, seed in job.cells()
    }
    names = {job.dataset for job in planned}
    data = [r for r in rows if r["algorithm"] == "data" and r["dataset"] in names]
    own = [r for r in rows if r["seed"] and sweeps.cell_of(r) in wanted]
    return [*data, *own]


def without(row: store.Row, names: set[str]) -> store.Row:
    """The row less some options, which all rows of a sweep share."""
    options = {k: v for k, v in store.options_of(row).items() if k not in names}
    return row | {"options": store.options_text(options)}


def report(table: str, options: Sweep, planned: Sequence[Job]) -> None:
    """Writes and prints the table of what is there, and draws its figures."""
    out = options.out
    rows = rows_wanted(planned, store.read(out / "results.csv"))
    shared = {name for name, _ in options.further}
    rows = [without(row, shared) for row in rows]
    kind = "bst-factors" if options.variants else table
    kind = "ablation-scale" if options.scales else kind
    text = tables.report(rows, kind)
    (out / f"{table}.md").write_text(text + "\n", encoding="utf-8")
    pictures = {"ablation-scale": figures.ablation, "bst-factors": figures.factors}
    draw = pictures.get(kind, figures.learning_curves)
    draw(out / f"{table}.png", rows)
    there, cells = sweeps.held(rows), sum(job.lanes for job in planned)
    print(f"\n{text}\n\n{len(there)} of {cells} policies are there")
    for name in ("results.csv", f"{table}.md", f"{table}.png"):
        print(out / name)


# ============================================================================== Main


def sweep(table: str, options: Sweep) -> int:
    """Runs a table's missing jobs; returns the exit code."""
    out = options.out
    every = sweeps.jobs(options, action_dims(options))
    share = sweeps.part(every, options)
    planned = to_do(share, out / "results.csv")
    if options.dry_run:
        show(planned, sweeps.read_rates(RATES, out / "rates.csv"))
        return 0
    if not planned:
        told = f"{out / 'results.csv'} holds every cell of its {len(share)} processes"
        print(f"nothing to run in shard {options.shard}: {told}")
    failed = train_all(planned, options)
    if store.read(out / "results.csv"):
        report(table, options, every)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


def merge(options: Merge) -> int:
    """Puts the rows of all files into one."""
    absent = [str(path) for path in options.rows if not path.is_file()]
    if absent or not options.rows:
        raise SweepError(f"no such file: {', '.join(absent) or 'nothing to merge'}")
    before = len(store.read(options.into))
    store.add(options.into, [row for path in options.rows for row in store.read(path)])
    after = len(store.read(options.into))
    print(f"{options.into}: {before} rows before, {after} now")
    return 0


def main(args: list[str] | None = None) -> int:
    """Parses the command line and runs it."""
    choices: Any = Annotated[Merge, tyro.conf.subcommand("merge")]
    for name, default in sweeps.TABLES.items():
        about = sweeps.ABOUT[name]
        named = tyro.conf.subcommand(name, default=default, description=about)
        choices = choices | Annotated[Sweep, named]
    options = tyro.cli(choices, args=args, description=(__doc__ or "").split("\n\n")[0])
    if isinstance(options, Merge):
        return merge(options)
    table, *_ = sys.argv[1:] if args is None else args
    return sweep(table, options)


def command_line(args: list[str] | None = None) -> int:
    """`main`, whose errors are one line; returns the exit code."""
    try:
        return main(args)
    except (OSError, SweepError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(command_line())
