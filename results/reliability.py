"""Breaks runs, files and environments on purpose and counts what is lost.

    uv run results/reliability.py

Runs are killed, stopped, starved of disk and robbed of a checkpoint at random moments,
resumed, and compared bit for bit with an undisturbed one. Datasets are generated with a
known answer, or broken. Writes `results/reliability.md`; needs Linux and 15 minutes.
"""

import csv
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from tqdm import tqdm

if __name__ == "__main__":  # a script finds its neighbours through the repository root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from common.rollout import environment
from results import fuzz, store, tables

SMALL = ["--hidden-dims", "8", "8", "--batch-size", "16", "--eval-episodes", "2"]
SMALL += ["--num-morse-updates", "3000"]
NET = ["--morse-net.hidden-dims", "8", "8"]
LONG = [*SMALL, *NET, "--num-seeds", "2", "--num-updates", "40000"]
LONG += ["--eval-every", "1000"]
SHORT = [*SMALL, "--num-updates", "2000", "--eval-every", "1000"]
SAME = ("checkpoint", "log.csv", "morse", "policy")  # of two runs, bit for bit

# Dies inside the n-th write: half of the content is in a temporary file.
DYING = """
import os, runpy, signal, sys
left, fsync = int(sys.argv[1]), os.fsync

def half(handle):
    global left
    left -= 1
    if left == 0:
        os.ftruncate(handle, os.fstat(handle).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(handle)

os.fsync = half
sys.argv = sys.argv[2:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True)
class Options:
    """How much of each; the report says it."""

    faults: int = 50  # injected into runs
    valid: int = 500  # generated datasets that have to be read right
    malformed: int = 200  # generated datasets that have to be refused
    evaluations: int = 200  # of one run whose memory is watched
    seed: int = 0  # of moments and datasets
    out: Path = store.ROOT / "results" / "reliability.md"


# ============================================================================= Faults


@dataclass
class Process:
    """A script under way, and where its run's folder is or will be."""

    popen: subprocess.Popen[str]
    runs: Path

    def signal(self, number: signal.Signals) -> None:
        """To the process, unless it has ended."""
        if self.popen.poll() is None:
            self.popen.send_signal(number)


def folder_in(runs: Path) -> Path | None:
    """The run's folder, once the run can be resumed."""
    found = [path.parent for path in runs.glob("*/config.json")]
    return found[0] if found else None


def start(runs: Path, args: list[str], dying: int = 0) -> Process:
    """Starts td3_bst.py with `args`, or resumes the run in `runs`."""
    folder = folder_in(runs)
    args = ["--resume", str(folder)] if folder else [*args, "--run-dir", str(runs)]
    code = ["-c", DYING, str(dying)] if dying else []
    command = [sys.executable, *code, str(store.ROOT / "td3_bst.py"), *args]
    quiet, kept = subprocess.DEVNULL, subprocess.PIPE
    return Process(
        subprocess.Popen(command, stdout=quiet, stderr=kept, text=True), runs
    )


def kill(process: Process, rng: random.Random) -> str:
    """SIGKILL."""
    process.signal(signal.SIGKILL)
    return "SIGKILL"


def damage(process: Process, rng: random.Random) -> str:
    """Kills, then cuts or changes the newest checkpoint if there is one before it."""
    kill(process, rng)
    process.popen.wait()
    paths = sorted(process.runs.glob("*/checkpoint/step-*.safetensors"))
    if len(paths) < 2:
        return "SIGKILL"
    content = bytearray(paths[-1].read_bytes())
    if rng.random() < 0.5:
        content = content[: rng.randrange(len(content))]
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    paths[-1].write_bytes(content)
    return "damaged checkpoint"


def ask(number: signal.Signals) -> Callable[[Process, random.Random], str]:
    """A signal that asks the run to stop."""

    def send(process: Process, _: random.Random) -> str:
        process.signal(number)
        return number.name

    return send


def fill_disk(process: Process, _: random.Random) -> str:
    """From now on no file of it can exceed 1000 bytes, as if the disk were full."""
    if process.popen.poll() is None:
        resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (1000, 1000))
    return "disk full"


INSIDE = "SIGKILL inside a write"
KINDS: dict[str, Callable[[Process, random.Random], str]] = {
    "SIGKILL": kill,
    INSIDE: lambda process, _: INSIDE,  # it dies by itself, see DYING
    "SIGTERM": ask(signal.SIGTERM),
    "SIGINT": ask(signal.SIGINT),
    "disk full": fill_disk,
    "damaged checkpoint": damage,
}
# Exit codes and a part of stderr by which a process ends as it should; -n: the signal
# came before Python's first line of the script.
ENDS = {
    "SIGTERM": ((143, -15), ""),
    "SIGINT": ((130, -2), ""),
    "disk full": ((2,), "cannot write"),
}


@dataclass
class Tally:
    """What the faults did."""

    injected: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)  # ended or went on wrongly
    stopped: int = 0  # with a checkpoint of the moment
    runs: int = 0
    rows_lost: int = 0
    rows_doubled: int = 0
    files_changed: int = 0
    tracebacks: int = 0

    @property
    def losses(self) -> int:
        """0 if nothing went wrong."""
        lost = self.rows_lost + self.rows_doubled + self.files_changed
        return self.failed.total() + self.tracebacks + lost


def inject(options: Options, root: Path) -> Tally:
    """Faults at random moments; each run takes up to eight, ends and is compared."""
    rng, tally = random.Random(options.seed), Tally()
    begin = time.perf_counter()
    whole = ended(start(root / "whole", LONG))
    if whole is None:
        raise SystemExit("error: the undisturbed run failed")
    longest = time.perf_counter() - begin
    with tqdm(total=options.faults, desc="faults", disable=None) as bar:
        while tally.injected.total() < options.faults:
            runs, kinds = root / f"run{tally.runs}", rng.choices(list(KINDS), k=8)
            tally.runs += 1
            last = "a start"
            for kind in kinds[: options.faults - tally.injected.total()]:
                done = fault(kind, runs, longest, rng, tally)
                if done is None:
                    break
                last = done
                tally.injected[done] += 1
                bar.update()
            folder = ended(start(runs, LONG))
            if folder is None:
                tally.failed[last] += 1
                tally.rows_lost += rows_of(whole).total()
            else:
                compare(folder, whole, tally)
    return tally


def fault(
    kind: str, runs: Path, longest: float, rng: random.Random, tally: Tally
) -> str | None:
    """One fault after a random time: its kind, None if the run had ended before."""
    process = start(runs, LONG, rng.randint(1, 12) if kind == INSIDE else 0)
    until = time.perf_counter() + rng.uniform(0, 0.5 * longest)
    while time.perf_counter() < until and process.popen.poll() is None:
        time.sleep(0.01)
    kind = KINDS[kind](process, rng)
    _, err = process.popen.communicate()
    tally.tracebacks += "Traceback" in err
    if process.popen.returncode == 0:
        return None
    codes, told = ENDS.get(kind, ((-9,), ""))
    tally.stopped += "with a checkpoint" in err
    if process.popen.returncode not in codes or told not in err:
        tally.failed[kind] += 1
        print(f"{kind}: {process.popen.returncode} {err[-3000:]}", file=sys.stderr)
    return kind


def ended(process: Process) -> Path | None:
    """Waits for a run's end; its folder, None if it failed, which it prints."""
    _, err = process.popen.communicate()
    if process.popen.returncode == 0:
        return folder_in(process.runs)
    print(err[-3000:], file=sys.stderr)
    return None


def contents(folder: Path) -> dict[str, bytes]:
    """The files that have to be the same, by name."""
    files = [p for name in SAME for p in (folder / name, *(folder / name).glob("*"))]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if p.is_file()}


def rows_of(folder: Path) -> Counter[tuple[str, str]]:
    """How often the log has each seed and step."""
    with (folder / "log.csv").open(newline="") as file:
        return Counter((row["seed"], row["step"]) for row in csv.DictReader(file))


def compare(folder: Path, whole: Path, tally: Tally) -> None:
    """Adds what a run lost to the tally."""
    mine, own = contents(folder), contents(whole)
    names = {*mine, *own}
    tally.files_changed += sum(mine.get(name) != own.get(name) for name in names)
    rows, wanted = rows_of(folder), rows_of(whole)
    tally.rows_lost += (wanted - rows).total()
    tally.rows_doubled += (rows - wanted).total()


# =============================================================================== Data


def generate(options: Options) -> tuple[int, Counter[str]]:
    """Tries the datasets; how many were read right, and what was refused how often."""
    read, refused = Counter(), Counter()
    usual: Any = dict(deadline=None, database=None)
    usual["suppress_health_check"] = list(HealthCheck)

    @seed(options.seed)
    @settings(max_examples=max(1, options.valid), **usual)
    @given(fuzz.cases())
    def valid(case: fuzz.Case) -> None:
        fuzz.check_valid(case)
        read[case.kind] += 1

    @seed(options.seed)
    @settings(max_examples=max(1, options.malformed), **usual)
    @given(fuzz.cases(), fuzz.MALFORMED, st.integers(0, 2**32 - 1))
    def malformed(case: fuzz.Case, how: str, number: int) -> None:
        fuzz.check_malformed(case, how, number)
        refused[how] += 1

    valid()
    malformed()
    return read.total(), refused


# ============================================================= Determinism and memory


def same_bits(script: str, root: Path, caches: tuple[str, ...]) -> int:
    """Files that differ between runs of one seed.

    Args:
        caches: of each run, the folder in `root` for compiled programs; "": none.

    Raises:
        SystemExit: a later run with the folder of an earlier one compiled anew.
    """
    folders, kept = [], {}
    for number, cache in enumerate(caches):
        runs = root / f"{script}{number}"
        net = ["--num-morse-updates", "100"] if script == "td3_bc" else NET
        args = [str(store.ROOT / f"{script}.py"), *SHORT, *net]
        place = {"JAX_ENABLE_COMPILATION_CACHE": str(bool(cache)).lower()}
        programs = root / f"{script}-{cache}"
        place |= {"JAX_COMPILATION_CACHE_DIR": str(programs)} if cache else {}
        place["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        with environment(**place):
            command = [sys.executable, *args, "--run-dir", str(runs)]
            subprocess.run(command, check=True, capture_output=True)
        if cache:
            found = {path.name for path in programs.glob("*-cache")}
            if not found or found != kept.setdefault(cache, found):
                raise SystemExit(f"error: {script}.py did not use {programs}")
        folders.append(contents(next(runs.iterdir())))
    first, *others = folders
    return sum(
        first.get(name) != other.get(name)
        for other in others
        for name in {*first, *other}
    )


def memory(root: Path, evaluations: int) -> dict[int, float]:
    """Resident MB of a run by the evaluation that it has reached."""
    every = 100
    args = [*SMALL, *NET, "--num-updates", str(every * evaluations)]
    process = start(root / "memory", [*args, "--eval-every", str(every)])
    found: dict[int, float] = {}
    while process.popen.poll() is None:
        time.sleep(0.2)
        status = Path(f"/proc/{process.popen.pid}/status").read_text()
        line = [x for x in status.splitlines() if x.startswith("VmRSS")]
        log = [p / "log.csv" for p in (root / "memory").glob("*")]
        if line and log and log[0].exists():
            reached = len(log[0].read_text().splitlines()) - 1
            found[reached] = int(line[0].split()[1]) / 1e3
    if ended(process) is None:
        raise SystemExit("error: the run whose memory was watched failed")
    return found


# ============================================================================= Report


def report(options: Options, root: Path) -> tuple[str, int]:
    """Runs everything; the page as Markdown, and how much went wrong."""
    lines = ["# Reliability", "", "Written by `uv run results/reliability.py`, which"]
    lines += ["breaks runs and files on purpose; nothing here is typed by hand.", ""]
    tally = inject(options, root) if options.faults else Tally()
    lines += faults_section(tally) if options.faults else []
    lines += data_section(*generate(options))
    caches = ("", "", "cache", "cache")
    differ = {name: same_bits(name, root, caches) for name in store.SCRIPTS}
    lines += bits_section(differ)
    if options.evaluations:
        lines += memory_section(memory(root, options.evaluations))
    return "\n".join(lines), tally.losses + sum(differ.values())


def faults_section(tally: Tally) -> list[str]:
    """The table of faults and what they cost."""
    names = {*tally.injected, *tally.failed}
    kinds = [[k, str(tally.injected[k]), str(tally.failed[k])] for k in sorted(names)]
    return [
        "## Runs",
        "",
        f"{tally.injected.total()} faults at random moments of {tally.runs} runs of "
        "`td3_bst.py` (two seeds, a pretraining, 40 evaluations), each resumed by "
        "`--resume` to its end and compared with an undisturbed run.",
        "",
        tables.markdown(["fault", "injected", "failed"], kinds),
        "",
        f"- stopped by SIGINT or SIGTERM with a checkpoint of the moment, the others "
        f"before the first chunk: {tally.stopped}",
        f"- rows of `log.csv` lost: {tally.rows_lost}, doubled: {tally.rows_doubled}",
        f"- files with other bits ({', '.join(SAME)}): {tally.files_changed}",
        f"- tracebacks shown: {tally.tracebacks}",
        "",
    ]


def data_section(read: int, refused: Counter[str]) -> list[str]:
    """What the loader did with the generated datasets."""
    kinds = sorted(refused.items(), key=lambda item: (-item[1], item[0]))
    return [
        "## Datasets",
        "",
        f"- good ones (Minari, HDF5, .npz) read, every transition as counted by hand: "
        f"{read}",
        f"- broken ones refused in one line, no code run, nothing cached: "
        f"{refused.total()}, in {len(refused)} ways "
        f"({', '.join(f'{name} {n}' for name, n in kinds)})",
        "",
    ]


def bits_section(differ: dict[str, int]) -> list[str]:
    """Whether runs of one seed are the same."""
    found = ", ".join(f"{script}.py {n}" for script, n in differ.items())
    return [
        "## Bits",
        "",
        f"Files that differ between four runs of one seed, two without and two with "
        f"JAX's compilation cache: {found}.",
        "",
        "Promised: the same bits for the same seed, options, versions, device kind and "
        "number of devices, however often a run was stopped. Not promised: across "
        "machines, devices or versions, where compilers order sums differently.",
        "",
    ]


def memory_section(found: dict[int, float]) -> list[str]:
    """Resident memory at some evaluations."""
    last = max(found)
    shown = {min(found, key=lambda at: abs(at - last * x)) for x in (0.1, 0.25, 0.5, 1)}
    cells = [f"{found[at]:.0f} MB after {at}" for at in sorted(shown)]
    return ["## Memory", "", f"Of one run by evaluations: {', '.join(cells)}.", ""]


def main(args: list[str] | None = None) -> int:
    """Parses the command line, writes the page; 1 if anything was lost."""
    options = tyro.cli(Options, args=args, description=(__doc__ or "").split("\n\n")[0])
    with tempfile.TemporaryDirectory() as root:
        text, losses = report(options, Path(root))
    options.out.write_text(text, encoding="utf-8")
    print(text)
    print(options.out)
    return 1 if losses else 0


if __name__ == "__main__":
    sys.exit(main())
