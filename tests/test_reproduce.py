"""Sweeps: which jobs, what is skipped, what survives kills, shards and merging."""

import ast
import importlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock, Timeout

from common.options import parse
from results import reproduce, store, sweeps
from results.sweeps import Job, Sweep

pytestmark = pytest.mark.usefixtures("quick_compile")

ROOT = Path(__file__).parent.parent
QUICK = sweeps.TABLES["quick"]
BST: tuple = ("TD3-BST",)
SCALES = Sweep(("a",), ("TD3-BST",), num_seeds=3, num_updates=50, scales=(0.1, 2.0))


def row(**values: object) -> store.Row:
    """A row of results, empty but for these."""
    return {name: str(values.get(name, "")) for name in store.COLUMNS}


# ----------------------------------------------------------------------------- jobs


def test_a_table_is_a_job_per_dataset_and_method():
    sweep = Sweep(("a", "b"), ("BC", "IQL"), seed=3, num_seeds=2, num_updates=50)
    made = sweeps.jobs(sweep, {})
    assert [(j.dataset, j.method) for j in made] == [
        ("a", "BC"),
        ("a", "IQL"),
        ("b", "BC"),
        ("b", "IQL"),
    ]
    text = "alpha=0 num_morse_updates=0 num_updates=50"
    assert list(made[0].cells()) == [(text, 3), (text, 4)]
    assert " ".join(made[0].arguments()) == (
        "--dataset a --alpha 0 --num-morse-updates 0 --num-updates 50 --seed 3 "
        "--num-seeds 2"
    )


def test_scales_are_multiples_of_the_actions_dimension_and_share_a_process():
    (job,) = sweeps.jobs(SCALES, {"a": 3})
    assert job.lanes == 6
    assert job.arguments()[-2:] == ["--sweep", "scale=0.3,6"]
    assert list(job.cells()) == [
        (f"num_updates=50 scale={scale}", seed)
        for scale in ("0.3", "6")
        for seed in (0, 1, 2)
    ]


def test_further_options_are_part_of_the_cell():
    sweep = replace(QUICK, set=("mu=0.30", "no-such=x"), methods=("TD3-BST",))
    ((text, _), *_) = sweeps.jobs(sweep, {})[0].cells()
    assert text == "eval_every=2000 mu=0.3 no_such=x num_updates=6000"
    sweep = replace(QUICK, set=("num_morse_updates=7",), methods=("BC", "TD3-BST"))
    cloning, bst = (dict(job.options) for job in sweeps.jobs(sweep, {}))
    assert cloning["num_morse_updates"] == "0"  # a method's own option stays
    assert bst["num_morse_updates"] == "7"


def test_a_variant_is_a_job_of_its_own():
    variants, common = ("plain", "mu=0.30+floor=1"), ("discount=0.9", "mu=0.1")
    changes: dict = dict(variants=variants, set=common)
    made = sweeps.jobs(replace(QUICK, methods=BST, num_seeds=1, **changes), {})
    texts = [text for job in made for text, _ in job.cells()]
    shared = "discount=0.9 eval_every=2000"
    assert texts == [
        f"{shared} mu=0.1 num_updates=6000",
        f"{shared} floor=1 mu=0.3 num_updates=6000",  # the variant's comes first
    ]
    assert len({job.name("code") for job in made}) == 2


@pytest.mark.parametrize("table", ["bst-factors", "bst-factors-maze"])
def test_every_variant_of_the_factor_study_is_an_option_of_the_script(table: str):
    sweep = sweeps.TABLES[table]
    module = importlib.import_module("td3_bst")
    changed = []
    for variant in sweep.variants:
        given = sweeps.variant_options(variant)
        _, config = parse("td3_bst", module.Config(), "", store.arguments(given))
        changed.append(config)
    assert changed[0] == module.Config()
    assert len(set(map(repr, changed))) == len(changed)


def test_shards_share_every_job_once_and_cost_the_same():
    made = sweeps.jobs(sweeps.TABLES["locomotion"], {})
    for total in (1, 2, 5, 9, 60):
        parts = [
            sweeps.part(made, replace(QUICK, shard=f"{i}/{total}"))
            for i in range(1, total + 1)
        ]
        assert sorted(job.name("c") for part in parts for job in part) == sorted(
            job.name("c") for job in made
        )
        costs = [sum(sweeps.COSTS[job.method] for job in part) for part in parts]
        assert max(costs) - min(costs) <= max(sweeps.COSTS.values())


def cells_of(jobs: list[Job]) -> list[tuple[str, int]]:
    return [cell for job in jobs for cell in job.cells()]


@pytest.mark.parametrize("sweep", [SCALES, replace(QUICK, methods=("BC",))])
def test_only_what_is_missing_is_run(sweep: Sweep):
    # Whichever cells are there, the others are run, each once.
    rng = random.Random(0)
    (job,) = sweeps.jobs(sweep, {"a": 3})
    every = list(job.cells())
    for share in (0.0, 0.2, 0.5, 0.8, 1.0) * 4:
        have = {cell for cell in every if rng.random() < share}
        there = {(job.algorithm, text, job.dataset, s, "code") for text, s in have}
        lacking = sweeps.missing(job, there, "code")
        assert sorted(cells_of(lacking)) == sorted(set(every) - have)
        assert cells_of(sweeps.missing(job, there, "other code")) == every
    assert sweeps.missing(job, set(), "code") == [job]


def test_rows_hold_a_cell_by_all_of_its_key():
    own = dict(algorithm="td3_bst", options="mu=1", dataset="a", seed=2, code_hash="c")
    rows = [row(**own, step=10), row(**own, step=20), row(algorithm="data")]
    assert sweeps.held(rows) == {("td3_bst", "mu=1", "a", 2, "c")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(shard="3/2"), "1 <= i <= n"),
        (dict(shard="0/2"), "1 <= i <= n"),
        (dict(shard="half"), "expects i/n"),
        (dict(num_seeds=0), "num_seeds must be at least 1"),
        (dict(seed=-1), "seed must not be negative"),
        (dict(datasets=()), "at least one dataset"),
        (dict(datasets=("a", "a")), "names one twice"),
        (dict(scales=(0.5,)), "scales are of TD3-BST"),
        (dict(variants=("mu=1",)), "variants are of TD3-BST"),
        (dict(variants=("mu=1", "mu=1"), methods=BST), "variants names one twice"),
        (
            dict(variants=("plain", "mu=1"), set=("mu=1.0",), methods=BST),
            "variants names one twice",
        ),
        (dict(variants=("mu",), methods=BST), "expects NAME=VALUE, got 'mu'"),
        (dict(variants=("mu=1+mu=2",), methods=BST), "set names an option twice"),
        (dict(variants=("alpha=1",), methods=BST), "set cannot change alpha"),
        (dict(set=("mu",)), "expects NAME=VALUE"),
        (dict(set=("num-updates=3",)), "set cannot change num-updates"),
        (dict(set=("mu=.1", "mu=.2")), "set names an option twice"),
        (dict(num_updates=10_001), "num_updates must be even"),
    ],
)
def test_bad_sweeps_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        replace(QUICK, **changes)


# ---------------------------------------------------------------------------- costs


def test_cost_is_measured_rate_times_updates():
    # 4 lanes x (6,000 / 400 + 8,000 / 1,000) + 3 x .5 + 7 = 100.5 seconds. On 2 cores
    # 5 lanes take as long as 6: 46 seconds more.
    sweep = replace(QUICK, methods=("TD3-BST",), set=())
    (job,) = sweeps.jobs(sweep, {})
    values = ["cpu", "TD3-BST", "pointmaze", "4", "400", "1000", "0.5", "7", "c"]
    rate = dict(zip(sweeps.RATE_COLUMNS, values, strict=True))
    other = rate | {"domain": "locomotion", "updates_per_second": "1"}
    assert sweeps.seconds(job, [other, rate], "cpu") == pytest.approx(100.5)
    assert sweeps.seconds(job, [rate], "gpu") is None
    five, cores = replace(job, seeds=(0, 1, 2, 3, 4)), {"device": "cpu, 2 cores"}
    assert sweeps.seconds(five, [rate | cores], "cpu, 2 cores") == pytest.approx(146.5)
    assert sweeps.total([job, job], [rate]) == {"cpu": pytest.approx(201)}
    (bc,) = sweeps.jobs(replace(QUICK, methods=("BC",)), {})
    assert sweeps.total([job, bc], [rate]) == {"cpu": None}


def test_a_newer_rate_replaces_its_kind(tmp_path: Path):
    path, kind = tmp_path / "rates.csv", ["cpu", "BC", "pointmaze", "4"]
    for speed in ("1", "2"):
        values = [*kind, speed, "", "0", "0", "c"]
        sweeps.add_rate(path, dict(zip(sweeps.RATE_COLUMNS, values, strict=True)))
    assert [r["updates_per_second"] for r in sweeps.read_rates(path)] == ["2"]


# ---------------------------------------------------------------------------- store


def test_code_hash_covers_what_may_change_a_number(tmp_path: Path):
    for name in ("td3_bst.py", "td3_bc.py", "morse.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "common", tmp_path / "common")
    hashes = {store.code_hash("td3_bst", tmp_path)}
    assert hashes == {store.code_hash("td3_bst")}
    (tmp_path / "td3_bc.py").write_text("")  # not its own
    (tmp_path / "common" / "notes.txt").write_text("")
    assert store.code_hash("td3_bst", tmp_path) in hashes
    for name in ("td3_bst.py", "morse.py", "common/tasks.py"):
        path = tmp_path / name
        path.write_text(path.read_text() + "# changed\n")
        hashes.add(store.code_hash("td3_bst", tmp_path))
    assert len(hashes) == 4


def test_a_mean_does_not_hide_a_seed_that_diverged(tmp_path: Path):
    job = Job("TD3+BC", "td3_bc", "own/set-v0", (("num_updates", "20"),), (0, 1))
    lost = {"seed1": {"step": 10, "quantity": "q", "value": None}}
    result = {"eval_episodes": 2, "diverged": lost, "commit": None, "data": {}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    (tmp_path / "log.csv").write_text("seed,step,return\n0,20,1.0\n")
    with pytest.raises(reproduce.SweepError, match="diverged: seed1"):
        reproduce.rows_of(job, "code", tmp_path)


def test_merging_keeps_every_row_once(tmp_path: Path):
    rows = [
        row(algorithm="td3_bc", dataset="a", seed=seed, step=step, score=seed + step)
        for seed in range(12)
        for step in (5, 10, 20)
    ]
    store.add(tmp_path / "whole.csv", rows)
    store.add(tmp_path / "one.csv", rows[::2])
    store.add(tmp_path / "two.csv", rows[::-3])
    store.add(tmp_path / "three.csv", rows[1::2])
    names = [str(tmp_path / f"{name}.csv") for name in ("one", "two", "three")]
    assert reproduce.main(["merge", str(tmp_path / "all.csv"), *names]) == 0
    whole = (tmp_path / "whole.csv").read_bytes()
    assert (tmp_path / "all.csv").read_bytes() == whole
    assert [int(r["seed"]) for r in store.read(tmp_path / "all.csv")] == [
        seed for seed in range(12) for _ in range(3)
    ]


def test_two_results_of_one_experiment_are_refused(tmp_path: Path):
    path = tmp_path / "results.csv"
    store.add(path, [row(algorithm="td3_bc", seed=0, step=5, score=1)])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"two rows differ in score \(1, 2\)"):
        store.add(path, [row(algorithm="td3_bc", seed=0, step=5, score=2)])
    assert path.read_bytes() == before


def test_writers_of_one_file_lose_no_row(tmp_path: Path):
    path = tmp_path / "results.csv"
    with ThreadPoolExecutor(8) as pool:
        for seed in range(40):
            made = [row(algorithm="td3_bc", seed=seed, step=5)]
            pool.submit(store.add, path, made)
    assert len(store.read(path)) == 40


def test_foreign_files_are_refused(tmp_path: Path):
    path = tmp_path / "other.csv"
    path.write_text("method,score\nBC,1\n")
    with pytest.raises(ValueError, match=r"other\.csv: expected the columns algo"):
        store.read(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"other\.csv is not a CSV file"):
        store.read(path)


@pytest.mark.parametrize("algorithm", store.SCRIPTS)
def test_options_of_a_row_are_those_of_the_script(algorithm: str):
    given = {
        "critic_layer_norm": "True",
        "normalize_obs": "False",
        "hidden_dims": "8,8",
        "num_updates": "40",
        "discount": "0.97",
    }
    if algorithm != "td3_bc":
        given["supervisor_gradient"] = "False"
    module = importlib.import_module(algorithm)
    args = store.arguments(given)
    options, config = parse(algorithm, module.Config(), "", args)
    found = {**vars(options), **vars(config)}
    wanted = {name: ast.literal_eval(text) for name, text in given.items()}
    assert {name: found[name] for name in given} == wanted
    assert found["normalize_obs"] is False


# ---------------------------------------------------------------------- whole sweeps

TINY = ["hidden_dims=8,8", "batch_size=16", "eval_episodes=2", "num_morse_updates=20"]


def sweep_args(out: Path, *args: str) -> list[str]:
    counts = ["--num-updates", "6000", "--eval-every", "2000", "--num-seeds", "2"]
    return ["locomotion", *counts, *args, "--out", str(out), "--set", *TINY]


def start(out: Path, *args: str) -> subprocess.Popen[bytes]:
    """The sweep as a process of its own, to be killed."""
    script = [sys.executable, str(ROOT / "results" / "reproduce.py")]
    return subprocess.Popen(
        [*script, *sweep_args(out, *args)],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )


def call(args: list[str], code: int = 0) -> tuple[str, str]:
    """The command in this process, its scripts in theirs: what it said, out and err."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            ended = reproduce.command_line(args)
        except SystemExit as error:  # options that do not parse
            ended = error.code
    assert ended == code, err.getvalue()
    return out.getvalue(), err.getvalue()


def run(out: Path, *args: str, code: int = 0) -> tuple[str, str]:
    return call(sweep_args(out, *args), code)


@pytest.fixture(scope="module")
def methods(pendulum: str) -> list[str]:
    return ["--datasets", pendulum, "--methods", "BC", "TD3-BST"]


@pytest.fixture(scope="module")
def whole(methods: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that nobody disturbed."""
    out = tmp_path_factory.mktemp("sweep") / "whole"
    run(out, *methods)
    return out


def results(out: Path) -> bytes:
    return (out / "results.csv").read_bytes()


def test_a_sweep_leaves_rows_table_figures_and_rates(whole: Path):
    rows = store.read(whole / "results.csv")
    trained = [r for r in rows if r["algorithm"] != "data"]
    assert sorted((r["algorithm"], r["seed"], r["step"]) for r in trained) == [
        (algorithm, seed, step)
        for algorithm in ("td3_bc", "td3_bst")
        for seed in "01"
        for step in ("2000", "4000", "6000")
    ]
    assert all(float(r["return"]) > 0 and r["episodes"] == "2" for r in trained)
    assert {r["options_hash"] for r in trained} == {
        store.options_hash(r["algorithm"], r["options"]) for r in trained
    }
    (data,) = (r for r in rows if r["algorithm"] == "data")
    assert float(data["return"]) > 0
    assert (whole / "locomotion.md").read_text().startswith("After 6,000 updates")
    assert (whole / "locomotion.png").read_bytes()[:4] == b"\x89PNG"
    assert not (whole / "rates.csv").exists()  # of tiny networks: no rate for others


def test_what_is_there_is_not_run_again(whole: Path, methods: list[str]):
    before = results(whole)
    assert "holds every cell" in run(whole, *methods)[0]
    assert results(whole) == before
    planned = run(whole, *methods, "--num-seeds", "3", "--dry-run")[0]
    assert planned.count("uv run td3_b") == planned.count("--seed 2") == 2
    assert "2 processes, 2 policies to train" in planned
    assert results(whole) == before


def test_kills_change_nothing(whole: Path, methods: list[str], tmp_path: Path):
    rng = random.Random(1)
    kills = int(os.environ.get("KILLS", "3"))
    for number in range(kills):
        process = start(tmp_path, *methods)
        if number == 0:  # once in the midst of training for sure
            wait_for(tmp_path, "*/*/*/checkpoint/step-00000[24]*")
        else:
            time.sleep(rng.uniform(1, 14))
        if number % 2:  # with its script, or the sweep alone
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    run(tmp_path, *methods)
    said = "".join(x.read_text() for x in tmp_path.glob("runs/*/output.txt"))
    assert "resumed at update" in said
    assert results(tmp_path) == results(whole)


def wait_for(folder: Path, pattern: str) -> None:
    """Until a file is there, two minutes at most."""
    end = time.monotonic() + 120
    while not any(folder.glob(pattern)):
        assert time.monotonic() < end, pattern
        time.sleep(0.01)


def test_a_script_ends_with_its_sweep(methods: list[str], tmp_path: Path):
    process = start(tmp_path, *methods, "--num-updates", "2000000")
    wait_for(tmp_path, "*/*/*/checkpoint/step-000002*")
    (run_folder,) = tmp_path.glob("runs/*/*/checkpoint")
    lock = FileLock(run_folder.parent / ".lock")
    with pytest.raises(Timeout):
        lock.acquire(timeout=0)
    process.kill()
    process.wait()
    lock.acquire(timeout=30)
    lock.release()


def test_merged_shards_equal_one_run(whole: Path, methods: list[str], tmp_path: Path):
    for part in (1, 2):
        run(tmp_path / f"part{part}", *methods, "--shard", f"{part}/2")
    names = [str(tmp_path / f"part{part}" / "results.csv") for part in (1, 2)]
    assert all(0 < len(Path(n).read_bytes()) < len(results(whole)) for n in names)
    assert reproduce.main(["merge", str(tmp_path / "results.csv"), *names]) == 0
    assert results(tmp_path) == results(whole)


def test_scales_share_one_process(pendulum: str, tmp_path: Path):
    args = ["--datasets", pendulum, "--methods", "TD3-BST", "--scales", "0.5", "2"]
    assert run(tmp_path, *args)[0].count("done in") == 1
    rows = store.read(tmp_path / "results.csv")
    trained = [r for r in rows if r["algorithm"] != "data"]
    assert {store.options_of(r)["scale"] for r in trained} == {"0.5", "2"}
    assert len(trained) == 2 * 2 * 3
    half, double = (
        [r["return"] for r in trained if f"scale={scale}" in r["options"]]
        for scale in ("0.5", "2")
    )
    assert half != double
    assert (tmp_path / "locomotion.md").read_text().count("2,000") == 0
    assert (tmp_path / "locomotion.md").read_text().count("| 6,000 |") == 2


def test_other_code_than_planned_is_not_kept(tmp_path: Path, capsys):
    (job,) = sweeps.jobs(replace(QUICK, methods=("BC",)), {})
    options = replace(QUICK, out=tmp_path)
    (line,) = reproduce.train_all([(job, "another hash")], options)
    assert "changed while the sweep ran" in line
    assert not (tmp_path / "results.csv").exists()


def test_without_an_environment_there_is_nothing_to_tabulate(tmp_path: Path):
    arrays = tmp_path / "own.npz"
    rng = np.random.default_rng(0)
    np.savez(
        arrays,
        observations=rng.normal(size=(60, 2)),
        actions=rng.uniform(-1, 1, (60, 1)),
        rewards=rng.normal(size=60),
        terminals=np.zeros(60, bool),
        timeouts=np.arange(60) % 10 == 9,
    )
    _, said = run(tmp_path, "--datasets", str(arrays), "--methods", "BC", code=1)
    assert "there are no scores" in said
    assert not list(tmp_path.glob("runs/*/*"))  # nothing was trained
    assert not (tmp_path / "results.csv").exists()


def test_an_unknown_option_is_named(methods: list[str], tmp_path: Path):
    args = sweep_args(tmp_path, *methods)
    _, said = call([*args[: args.index("--set")], "--set", "no_such=1"], code=1)
    assert said.count("--no-such") >= 2  # both methods, each in one line


def test_a_failed_job_stops_no_other(pendulum: str, tmp_path: Path):
    args = ["--datasets", "no/such-v0", pendulum, "--methods", "BC"]
    _, said = run(tmp_path, *args, code=1)
    assert "failed: BC on no/such-v0" in said
    names = {r["dataset"] for r in store.read(tmp_path / "results.csv")}
    assert names == {pendulum}


def test_user_mistakes_are_one_line(tmp_path: Path):
    _, said = run(tmp_path, "--shard", "3/2", code=2)
    assert "shard expects i/n with 1 <= i <= n" in said
    script = [sys.executable, str(ROOT / "results" / "reproduce.py"), "merge"]
    done = subprocess.run(
        [*script, str(tmp_path / "all.csv"), str(tmp_path / "none.csv")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: no such file: ")
    assert "\n" not in done.stderr.strip()
    assert not (tmp_path / "all.csv").exists()
