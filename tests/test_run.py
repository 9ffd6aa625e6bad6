"""The run's folder: what is in it, that nothing is lost, and that resuming is exact."""

import csv
import errno
import importlib.util
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import h5py
import jax
import numpy as np
import pytest
from filelock import FileLock
from safetensors.numpy import load_file

import iql_bst
import morse
import td3_bc
import td3_bst
from common import checkpoint, datasets, maze, options, rollout, run
from common.defaults import EMBEDDED
from common.errors import UserError

pytestmark = pytest.mark.usefixtures("short_runs")

ROOT = Path(__file__).parent.parent
NARROW = ["--hidden-dims", "8", "8", "--morse-net.hidden-dims", "8", "8"]
SMALL = [*NARROW, "--batch-size", "16", "--num-morse-updates", "20"]


def command(*args: object) -> list[str]:
    return [sys.executable, str(ROOT / "td3_bst.py"), *map(str, args)]


def train(capsys, *args: object) -> Path:
    """Runs td3_bst.main in this process; returns the folder it prints last."""
    td3_bst.main([*map(str, args), *SMALL])
    return Path(capsys.readouterr().out.splitlines()[-1])


def read_log(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def locomotion_file(folder: Path, falls: bool) -> Path:
    """300 random transitions of a hopper; the spread of actions is .3 / sqrt(3)."""
    path = folder / "hopper-medium-v2.hdf5"
    rng = np.random.default_rng(0)
    ends = np.arange(300) % 50 == 49
    with h5py.File(path, "w") as file:
        file["observations"] = rng.normal(size=(300, 11))
        file["actions"] = rng.uniform(-0.3, 0.3, (300, 3))
        file["rewards"] = rng.normal(size=300)
        file["terminals"] = ends if falls else np.zeros(300, bool)
        file["timeouts"] = np.zeros(300, bool) if falls else ends
    return path


@pytest.mark.parametrize(
    ("falls", "n_step", "noise"), [(True, 1000, 0.5), (False, 1, 0)]
)
def test_defaults_follow_the_data(capsys, tmp_path, falls, n_step, noise):
    path = locomotion_file(tmp_path, falls)
    folder = train(
        capsys,
        *("--dataset", path, "--num-updates", 2, "--run-dir", tmp_path),
        *("--eval-episodes", 0),
    )
    config = json.loads((folder / "config.json").read_text())["config"]
    weight = 25 * 2 / 100_000 if falls else 9000 * (0.3 / 3**0.5) ** 4
    assert config["q_weight"] == pytest.approx(weight, rel=0.3)
    assert config["obs_noise"] == pytest.approx(noise * 0.3 / 3**0.5, rel=0.1)
    assert config["n_step"] == n_step


@pytest.mark.parametrize(("asked", "length"), [(None, 100_000), (300_000, 300_000)])
def test_locomotion_trains_its_actor_for_100000_updates(
    tmp_path, monkeypatch, asked, length
):
    class Begun(Exception):
        pass

    def begin(algorithm, options, config, *_):
        assert (options.num_updates, config.actor_decay_updates) == (length, 100_000)
        raise Begun

    monkeypatch.setattr(run, "Run", begin)
    counts = ["--num-updates", str(asked)] if asked else []
    with pytest.raises(Begun):
        td3_bst.main(["--dataset", str(locomotion_file(tmp_path, True)), *counts])


def test_a_run_leaves_what_it_promises(capsys, tmp_path, pendulum, monkeypatch):
    commits = iter(["at its start", "later"])  # somebody pulls meanwhile
    monkeypatch.setattr("common.run.commit", lambda: next(commits))
    begin = time.perf_counter()
    folder = train(
        capsys,
        *("--dataset", pendulum, "--num-updates", 40, "--eval-every", 20),
        *("--eval-episodes", 3, "--num-seeds", 2, "--seed", 5, "--run-dir", tmp_path),
    )
    assert folder.parent == tmp_path
    assert (folder / "log.csv").read_text().startswith("seed,step,return,score,")
    log = read_log(folder)
    assert [(r["seed"], r["step"]) for r in log] == [
        ("5", "20"),
        ("6", "20"),
        ("5", "40"),
        ("6", "40"),
    ]
    for name in ("certainty", "omega", "omega_max", "q", "critic_loss", "actor_loss"):
        assert np.isfinite([float(r[name]) for r in log]).all()
    result = json.loads((folder / "result.json").read_text())
    assert result["algorithm"] == "td3_bst"
    assert result["seeds"] == [5, 6]
    assert result["commit"] == "at its start"
    assert result["returns"] == [float(r["return"]) for r in log[2:]]
    assert result["updates_per_second"] > 0
    for name in ("scores", "success", "wall", "eval_map", "options", "versions"):
        assert name in result
    stages = {"load", "compile", "pretraining", "training", "evaluation", "writing"}
    assert set(result["wall"]) == stages
    assert 0 < sum(result["wall"].values()) <= time.perf_counter() - begin
    assert result["morse_loss"] == [float(r["morse_loss"]) for r in log[2:]]
    for name in ("config.json", "curves.png", "certainty.png", "checkpoint", "policy"):
        assert (folder / name).exists()


def test_policy_folder_has_neither_time_nor_path(capsys, tmp_path, arrays_file):
    args = ("--dataset", arrays_file, "--num-updates", 10, "--run-dir")
    first = train(capsys, *args, tmp_path / "a")
    second = train(capsys, *args, tmp_path / "somewhere" / "else")
    assert contents(first / "policy") == contents(second / "policy")
    assert set(contents(first / "policy")) == {"policy.json", "seed0.safetensors"}


def test_processes_that_play_change_no_row(capsys, tmp_path, pendulum, monkeypatch):
    # As on a GPU: episodes are shared by processes; here every product is the CPU's.
    logs, evaluator = [], rollout.Evaluator
    for workers in (0, 2):

        def made(task, episodes, _, workers=workers):
            return evaluator(task, episodes, workers)

        monkeypatch.setattr(rollout, "Evaluator", made)
        args = ("--dataset", pendulum, "--num-updates", 40, "--eval-every", 20)
        more = ("--eval-episodes", 3, "--num-seeds", 2, "--run-dir", tmp_path)
        logs.append(read_log(train(capsys, *args, *more)))
    assert logs[0] == logs[1]
    assert len(logs[0]) == 4
    assert all(float(row["return"]) > 0 for row in logs[0])


def test_evaluation_off_without_an_environment(capsys, tmp_path, arrays_file):
    args = ["--dataset", str(arrays_file), "--run-dir", str(tmp_path)]
    td3_bst.main([*args, "--num-updates", "10", *SMALL])
    out = capsys.readouterr().out
    folder = Path(out.splitlines()[-1])
    assert "evaluation is off: " in out
    result = json.loads((folder / "result.json").read_text())
    assert result["scores"] == [None]
    assert result["eval_map"] is None
    assert [r["return"] for r in read_log(folder)] == [""]


@pytest.mark.parametrize(
    ("script", "sweep", "values"),
    [
        (td3_bst, "scale", (0.5, 2.0)),
        (td3_bst, "mu", (0.1, 1.0)),
        (td3_bc, "alpha", (0.0, 2.5)),
        (iql_bst, "expectile", (0.6, 0.95)),
    ],
)
def test_a_swept_lane_is_the_run_of_its_own(
    script, sweep, values, capsys, tmp_path, arrays_file
):
    net = NARROW[:3] if script is td3_bc else NARROW
    if script is iql_bst:  # a value that moves fast, so that its expectile shows
        net = [*net, "--policy-step", "awr", "--value-learning-rate", "0.03"]
    args = ["--dataset", str(arrays_file), "--num-updates", "40", "--batch-size", "16"]
    args += ["--num-morse-updates", "40", *net, "--run-dir", str(tmp_path)]

    def folder_of(*more: str) -> Path:
        script.main([*args, *more])
        return Path(capsys.readouterr().out.splitlines()[-1])

    text = ",".join(map(str, values))
    group = folder_of("--num-seeds", "2", "--sweep", f"{sweep}={text}")
    result = json.loads((group / "result.json").read_text())
    assert result["seeds"] == [0, 1, 0, 1]
    assert result["swept"] == {sweep: [x for x in values for _ in range(2)]}
    log = [(float(row[sweep]), int(row["seed"])) for row in read_log(group)]
    assert log == [(value, seed) for value in values for seed in (0, 1)]
    policies = []
    for value in values:
        alone = folder_of("--seed", "1", f"--{sweep}", str(value))
        expected = load_file(alone / "policy" / "seed1.safetensors")
        found = load_file(group / "policy" / f"{sweep}{value:g}-seed1.safetensors")
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], atol=1e-5)
        policies.append(found["layer0.weight"])
    assert np.abs(policies[0] - policies[1]).max() > 1e-4
    if sweep == "scale":  # each with a Morse network of its own, to be taken up again
        again = folder_of("--sweep", f"scale={text}", "--morse", str(group))
        found = json.loads((again / "result.json").read_text())
        assert found["morse_loss"] == result["morse_loss"][::2]


def test_a_maze_is_scored_by_success(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = maze.ensure(EMBEDDED, 5)
    monkeypatch.setattr(maze, "ensure", lambda name: folder)
    # Untrained, the policy stays where it is put: it cannot reach the goal.
    folder = train(
        capsys, "--num-updates", 4, "--eval-episodes", 4, "--run-dir", tmp_path / "runs"
    )
    result = json.loads((folder / "result.json").read_text())
    assert result["dataset"] == EMBEDDED
    assert result["eval_map"] == "metadata"
    assert result["scores"] == [100 * s for s in result["success"]]
    assert result["returns"] == result["success"]
    assert result["data"]["success"] == 1.0
    assert 0 < result["lengths"][0] <= 400


@pytest.mark.parametrize("delay", [1, 3, 7])
def test_every_update_is_made_once_whatever_the_policy_delay(
    delay, capsys, tmp_path, arrays_file
):
    # 1000 is no multiple of 3 or 7: chunks of 999 and 994.
    total = 1050
    folder = train(
        capsys,
        *("--dataset", arrays_file, "--num-updates", total, "--policy-delay", delay),
        *("--eval-every", total, "--run-dir", tmp_path),
    )
    (path,) = (folder / "checkpoint").glob(f"step-*{total}.safetensors")
    arrays, _ = checkpoint.load_arrays(path)
    counts = {k: int(v[0]) for k, v in arrays.items() if k.endswith(".count")}
    by_state = {k.split(".")[1].split("[")[0]: v for k, v in counts.items()}
    assert by_state == {"critic_opt": total, "actor_opt": total // delay}


def test_odd_counts_become_multiples_of_the_policy_delay(capsys, tmp_path, arrays_file):
    folder = train(
        capsys,
        *("--dataset", arrays_file, "--num-updates", 15, "--eval-every", 5),
        *("--run-dir", tmp_path),
    )
    assert [r["step"] for r in read_log(folder)] == ["6", "12", "16"]


# ------------------------------------------------------------------------------ resume


def kill_when(process: subprocess.Popen, ready, delay: float) -> None:
    """Kills -9 `delay` seconds after `ready()` first holds, or lets it end."""
    while not ready() and process.poll() is None:
        time.sleep(0.02)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_three_kills_then_resume_is_bit_identical(tmp_path, pendulum):
    args = ["--dataset", pendulum, "--num-updates", "20000", "--eval-every", "1000"]
    args += ["--eval-episodes", "2", "--num-seeds", "2", *SMALL]
    whole = subprocess.run(
        command(*args, "--run-dir", tmp_path / "whole"),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()[-1]
    rng = random.Random(0)
    parts = tmp_path / "parts"
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    first = subprocess.Popen(command(*args, "--run-dir", parts), **quiet)
    kill_when(first, lambda: any(parts.glob("*/config.json")), rng.uniform(0, 1))
    (folder,) = parts.iterdir()
    for _ in range(2):
        before = set(folder.glob("checkpoint/step*"))
        again = subprocess.Popen(command("--resume", folder), **quiet)
        kill_when(
            again,
            lambda before=before: set(folder.glob("checkpoint/step*")) - before,
            rng.uniform(0, 0.3),
        )
    assert not (folder / "result.json").exists(), "the run ended before the last kill"
    subprocess.run(command("--resume", folder), check=True, **quiet)
    for name in ("log.csv", "policy", "checkpoint", "morse"):
        mine, own = folder / name, Path(whole) / name
        if mine.is_dir():
            assert contents(mine) == contents(own), name
        else:
            assert mine.read_bytes() == own.read_bytes(), name


def test_an_extended_run_equals_a_long_one(capsys, tmp_path, arrays_file):
    args = ("--dataset", arrays_file, "--eval-every", 10, "--run-dir", tmp_path)
    args += ("--actor-decay-updates", 40)
    long = train(capsys, *args, "--num-updates", 40)
    short = train(capsys, *args, "--num-updates", 20)
    td3_bst.main(["--resume", str(short), "--num-updates", "40"])
    assert contents(short / "checkpoint") == contents(long / "checkpoint")
    assert (short / "log.csv").read_bytes() == (long / "log.csv").read_bytes()
    assert contents(short / "policy") == contents(long / "policy")
    assert json.loads((short / "result.json").read_text())["step"] == 40


@pytest.mark.parametrize(
    ("script", "extra", "longer"),
    [
        (td3_bst, [], "0"),
        (iql_bst, ["--policy-step", "awr"], "40"),
    ],
    ids=["td3_bst", "awr"],
)
def test_no_run_is_extended_past_the_end_of_its_decay(
    script, extra, longer, capsys, tmp_path, arrays_file
):
    args = ["--dataset", str(arrays_file), "--eval-every", "10", *SMALL, *extra]
    args += ["--run-dir", str(tmp_path), "--num-updates", "20"]
    script.main(args)
    folder = Path(capsys.readouterr().out.splitlines()[-1])
    with pytest.raises(UserError, match="is 0 from update 20 on, --num-updates is 40"):
        script.main(["--resume", str(folder), "--num-updates", "40"])
    assert [r["step"] for r in read_log(folder)] == ["10", "20"]  # and untouched
    script.main([*args, "--actor-decay-updates", longer])
    folder = Path(capsys.readouterr().out.splitlines()[-1])
    script.main(["--resume", str(folder), "--num-updates", "40"])
    assert [r["step"] for r in read_log(folder)] == ["10", "20", "30", "40"]


def test_an_actor_whose_decay_has_ended_stands_still(capsys, tmp_path, arrays_file):
    # What is left after 40 updates is what 20 leave, to the bit.
    args = ["--dataset", arrays_file, "--run-dir", tmp_path]
    args += ["--actor-decay-updates", 20]
    short = train(capsys, *args, "--num-updates", 20)
    td3_bst.main([*map(str, args), "--num-updates", "40", *SMALL])
    told = capsys.readouterr().out
    assert "the actor stands still after 20 updates" in told
    long = Path(told.splitlines()[-1])
    assert contents(long / "policy") == contents(short / "policy")
    assert read_log(long)[-1]["critic_loss"] != read_log(short)[-1]["critic_loss"]
    td3_bst.main(["--resume", str(long), "--num-updates", "50"])  # begun like that
    assert contents(long / "policy") == contents(short / "policy")


@pytest.mark.parametrize(
    ("script", "extra"),
    [
        (td3_bc, ["--sweep", "alpha=0,1"]),
        (iql_bst, ["--policy-step", "awr"]),
        (iql_bst, ["--sweep", "scale=1,2"]),
    ],
    ids=["td3_bc", "awr", "bst"],
)
def test_a_sibling_resumed_half_way_is_bit_identical(
    script, extra, capsys, tmp_path, arrays_file
):
    net = [] if script is td3_bc else NARROW[3:]
    args = ["--dataset", str(arrays_file), "--num-updates", "40", "--eval-every", "20"]
    args += ["--batch-size", "16", "--num-morse-updates", "10", "--num-seeds", "2"]
    script.main([*args, *NARROW[:3], *net, *extra, "--run-dir", str(tmp_path)])
    folder = Path(capsys.readouterr().out.splitlines()[-1])
    names = ("checkpoint", "policy", "morse")
    before = {name: contents(folder / name) for name in names}
    log = (folder / "log.csv").read_bytes()
    (folder / "result.json").unlink()
    (folder / "checkpoint" / "step-000000040.safetensors").unlink()
    script.main(["--resume", str(folder)])
    assert {name: contents(folder / name) for name in names} == before
    assert (folder / "log.csv").read_bytes() == log
    last = read_log(folder)[-1]
    for name in ("critic_loss", "actor_loss", "distance"):
        assert np.isfinite(float(last[name])), name


def test_the_best_episodes_are_trained_on(capsys, tmp_path, arrays_file):
    # 10 % BC is --alpha 0 --best-fraction 0.1; here with a quarter of the episodes.
    args = ["--dataset", str(arrays_file), "--alpha", "0", "--best-fraction", "0.25"]
    args += ["--num-updates", "4", "--hidden-dims", "8", "--num-morse-updates", "0"]
    td3_bc.main([*args, "--run-dir", str(tmp_path)])
    folder = Path(capsys.readouterr().out.splitlines()[-1])
    returns = np.sort(datasets.load(str(arrays_file)).episode_returns)
    quarter = returns[-(len(returns) // 4) :].mean()
    result = json.loads((folder / "result.json").read_text())
    assert result["data"]["return"] == pytest.approx(quarter)
    assert quarter > returns.mean() + 1
    td3_bc.main(["--resume", str(folder)])


def test_a_run_killed_inside_its_first_checkpoint_goes_on(
    capsys, tmp_path, arrays_file, monkeypatch
):
    args = ("--dataset", arrays_file, "--num-updates", 10, "--run-dir", tmp_path)
    written, save_tree = [], checkpoint.save_tree

    def save_and_die(path, *rest):
        save_tree(path, *rest)
        written.append(path)
        if path.parent.name == "checkpoint":
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_tree", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train(capsys, *args)
    monkeypatch.undo()
    assert written[-1].name == "step-000000000.safetensors"
    td3_bst.main(["--resume", str(written[-1].parent.parent)])
    assert "resumed at update 0" in capsys.readouterr().out


def test_a_checkpoint_holds_the_normalisation(capsys, tmp_path, arrays_file):
    args = ("--dataset", arrays_file, "--num-updates", 10, "--run-dir", tmp_path)
    folder = train(capsys, *args)
    (path,) = (folder / "checkpoint").glob("*10.safetensors")
    arrays, _ = checkpoint.load_arrays(path)
    policy = load_file(folder / "policy" / "seed0.safetensors")
    for name in ("obs_mean", "obs_std"):
        np.testing.assert_array_equal(arrays[f"['{name}']"], policy[name])


def test_a_run_resumes_from_anywhere_and_keeps_its_time(
    capsys, tmp_path, arrays_file, monkeypatch
):
    monkeypatch.chdir(arrays_file.parent)
    args = ("--dataset", arrays_file.name, "--num-updates", 20, "--eval-every", 10)
    folder = train(capsys, *args, "--run-dir", tmp_path)
    before = json.loads((folder / "result.json").read_text())
    (folder / "result.json").unlink()
    (folder / "checkpoint" / "step-000000020.safetensors").unlink()
    monkeypatch.chdir(tmp_path)
    td3_bst.main(["--resume", str(folder)])
    after = json.loads((folder / "result.json").read_text())
    assert after["wall"]["pretraining"] == pytest.approx(before["wall"]["pretraining"])
    assert after["wall"]["training"] > 0
    assert after["updates_per_second"] > 0
    stored = json.loads((folder / "config.json").read_text())
    assert [r["step"] for r in stored["resumed"]] == [10]


def test_resuming_refuses_what_would_change_the_run(capsys, tmp_path, arrays_file):
    folder = train(
        capsys, "--dataset", arrays_file, "--num-updates", 10, "--run-dir", tmp_path
    )
    with pytest.raises(UserError, match="a resumed run keeps its options"):
        td3_bst.main(["--resume", str(folder), "--mu", "0.5"])
    with pytest.raises(UserError, match="fewer than its 10"):
        td3_bst.main(["--resume", str(folder), "--num-updates", "4"])
    with pytest.raises(UserError, match="holds a run of td3_bst, not of other"):
        options.parse("other", td3_bst.Config(), "", ["--resume", str(folder)])
    with pytest.raises(UserError, match=r"cannot read .*config\.json"):
        td3_bst.main(["--resume", str(tmp_path / "nowhere")])
    stored = json.loads((folder / "config.json").read_text())
    noise = stored["config"].pop("obs_noise")  # as before there was this option
    (folder / "config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"another version: .* obs_noise"):
        td3_bst.main(["--resume", str(folder)])
    stored["config"]["obs_noise"] = noise
    (folder / "config.json").write_text(json.dumps(stored))
    log = (folder / "log.csv").read_text()
    (folder / "log.csv").write_text(log.replace(",", ";"))  # a spreadsheet's
    with pytest.raises(UserError, match="not the run's log any more"):
        td3_bst.main(["--resume", str(folder)])
    (folder / "log.csv").write_text(log)
    with (
        mock.patch.object(FileLock, "acquire", side_effect=PermissionError("no")),
        pytest.raises(UserError, match=f"cannot write to {folder}: no"),
    ):
        td3_bst.main(["--resume", str(folder)])
    stored["dataset"]["fingerprint"] = "another"
    (folder / "config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match="fingerprint"):
        td3_bst.main(["--resume", str(folder)])


# ---------------------------------------------------------------------- Morse networks


def test_fitted_networks_are_reused_bit_for_bit(capsys, tmp_path, arrays_file):
    args = ("--dataset", arrays_file, "--num-updates", 10, "--num-seeds", 2)
    first = train(capsys, *args, "--run-dir", tmp_path / "a")
    second = train(capsys, *args, "--morse", first, "--run-dir", tmp_path / "b")
    assert contents(second / "morse") == contents(first / "morse")
    assert contents(second / "policy") == contents(first / "policy")
    result = json.loads((second / "result.json").read_text())
    assert "pretraining" not in result["wall"]
    shutil.rmtree(first)  # a resumed run has its own
    before = contents(second / "policy")
    td3_bst.main(["--resume", str(second)])
    assert contents(second / "policy") == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--scale", "3"], "no Morse network of scale 3 and seed 0"),
        (["--seed", "7"], "no Morse network of scale 1 and seed 7"),
        (["--morse-net.kernel", "rq"], "was fitted with kernel rbf"),
        (["--no-normalize-obs"], "was fitted with standardised True"),
    ],
)
def test_a_network_fitted_otherwise_is_refused(
    change, message, capsys, tmp_path, arrays_file
):
    args = ("--dataset", arrays_file, "--num-updates", 10, "--run-dir", tmp_path)
    first = train(capsys, *args)
    if change == ["--no-normalize-obs"]:
        change = ["--normalize-obs", "False"]
    with pytest.raises(UserError, match=message):
        train(capsys, *args, "--morse", first, *change)
    assert list(tmp_path.iterdir()) == [first], "the refused run left a folder"


def test_a_network_fitted_to_other_data_is_refused(capsys, tmp_path, arrays_file):
    other = tmp_path / "other.npz"
    np.savez(other, **{**np.load(arrays_file), "rewards": np.zeros(200, np.float32)})
    args = ("--num-updates", 10, "--run-dir", tmp_path / "runs")
    first = train(capsys, *args, "--dataset", arrays_file)
    with pytest.raises(UserError, match=r"own\.npz, this run's data is .*other\.npz"):
        train(capsys, *args, "--dataset", other, "--morse", first)
    assert list((tmp_path / "runs").iterdir()) == [first]


def test_a_sweep_that_changes_no_run_of_awr_is_refused(tmp_path, arrays_file):
    args = ["--dataset", str(arrays_file), "--run-dir", str(tmp_path / "runs")]
    with pytest.raises(UserError, match="only expectile changes a run"):
        iql_bst.main([*args, "--policy-step", "awr", "--sweep", "mu=.1,.2"])
    assert not (tmp_path / "runs").exists()


def test_observations_that_are_constant_train(capsys, tmp_path):
    # A bandit: standardised to 0, where a fresh critic of IQL's is 0 and so is Z_Q. Its
    # mean is 0, which does not make it a run without standardisation.
    rows = np.arange(40)
    np.savez(
        path := tmp_path / "bandit.npz",
        observations=np.zeros((40, 3), np.float32),
        actions=np.linspace(-0.9, 0.9, 40, dtype=np.float32)[:, None],
        rewards=rows.astype(np.float32),
        terminals=rows >= 0,
        timeouts=rows < 0,
    )
    args = ["--dataset", path, "--num-updates", 10, "--run-dir", tmp_path, *SMALL]
    iql_bst.main([*map(str, args)])
    told = capsys.readouterr()
    assert "diverged" not in told.err
    assert json.loads((Path(told.out.splitlines()[-1]) / "result.json").read_text())
    asked = morse.Options(
        str(path),
        num_morse_updates=10,
        run_dir=tmp_path,
        morse=morse.Config(hidden_dims=(8, 8)),
    )
    iql_bst.main([*map(str, args), "--morse", str(morse.calibrate(asked))])


def test_td3_bc_refuses_a_network_before_it_trains(capsys, tmp_path, arrays_file):
    args = ["--dataset", str(arrays_file), "--num-updates", "10", "--hidden-dims", "8"]
    with pytest.raises(UserError, match="no Morse network of scale 1 and seed 0"):
        td3_bc.main([*args, "--morse", "nowhere", "--run-dir", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()
    td3_bc.main([*args, "--num-morse-updates", "5", "--run-dir", str(tmp_path)])
    folder = Path(capsys.readouterr().out.splitlines()[-1])
    assert (folder / "certainty.png").exists()


# ------------------------------------------------------------------------------ policy


def test_numpy_policy_is_the_jax_policy(capsys, tmp_path, arrays_file):
    config = td3_bst.Config(hidden_dims=(8, 8))
    actor = jax.vmap(lambda k: td3_bst.init(k, 4, 2, config).actor)(
        jax.random.split(jax.random.key(0), 3)
    )
    rng = np.random.default_rng(1)
    mean, std = rng.normal(size=4), rng.uniform(0.5, 2, 4)
    low, high = np.array([-3.0, 0.0]), np.array([1.0, 0.5])
    numpy_policy = rollout.NumpyPolicy(
        rollout.layers_of(jax.device_get(actor)), mean, std, low, high
    )
    obs = rng.normal(size=(3, 5, 4))
    for k in range(3):
        own = jax.tree.map(lambda x, k=k: x[k], actor)
        box = td3_bst.policy(own, jax.numpy.asarray((obs[k] - mean) / std), config)
        wanted = low + (np.asarray(box) + 1) / 2 * (high - low)
        np.testing.assert_allclose(numpy_policy(obs)[k], wanted, atol=1e-5)


# ------------------------------------------------------------------------------- files


def test_trees_come_back_exactly(tmp_path):
    tree = {"a": (np.arange(3), np.float32(2.5)), "b": [np.ones((2, 2))]}
    checkpoint.save_tree(tmp_path / "x.safetensors", tree, {"step": 3})
    back, meta = checkpoint.load_tree(tmp_path / "x.safetensors", tree)
    assert meta == {"step": 3}
    for one, other in zip(jax.tree.leaves(tree), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype


def test_a_damaged_or_foreign_file_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    checkpoint.save_tree(path, {"a": np.zeros(3)}, {})
    with pytest.raises(UserError, match=r"\['a'\] has shape \(3,\) there, expected"):
        checkpoint.load_tree(path, {"a": np.zeros(4)})
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="cannot read"):
        checkpoint.load_tree(path, {"a": np.zeros(3)})


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    checkpoint.write_json(path, {"step": 1})

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*no space left"):
        checkpoint.write_json(path, {"step": 2})
    assert json.loads(path.read_text()) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------ command line


def test_help_is_grouped_and_flags_are_bare():
    out = subprocess.run(
        command("--help"), capture_output=True, text=True, check=True
    ).stdout
    flags = """
        dataset seed num-seeds num-updates eval-every eval-episodes num-morse-updates
        run-dir resume morse eval-map mu scale
    """
    for flag in (f"--{name}" for name in flags.split()):
        assert f"│ {flag} " in out, flag
    assert "run options" in out
    assert "morse-net options" in out
    assert max(map(len, out.splitlines())) <= 88


@pytest.mark.parametrize("args", [["--mu", "0.01"], ["--learning-rate", "1"]])
def test_a_user_mistake_ends_the_process_with_two(args, tmp_path):
    done = subprocess.run(
        command(*args), capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 2
    assert args[0].strip("-") in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture
def exits(monkeypatch):
    """`guarded` raises SystemExit, where it else ends pytest as well."""

    def leave(code: int, told: str) -> None:
        print(told, file=sys.stderr)
        sys.exit(code)

    monkeypatch.setattr(run, "leave", leave)
    monkeypatch.setattr(run.SIGNALS, "install", lambda: None)


@pytest.mark.parametrize("stream", [None, "log.csv"])
def test_a_reader_that_is_gone_is_one_line(stream, exits, capsys):
    def main() -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe", stream)

    with pytest.raises(SystemExit) as end:
        run.guarded(main)
    assert end.value.code == 2
    what = stream or "what is printed"
    assert capsys.readouterr().err == f"error: cannot write {what}: Broken pipe\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--mu", "0.01"], "mu must be at least 0.02, got 0.01"),
        (["--scale", "inf"], "scale must be finite, got inf"),
        (["--reward-shift", "nan"], "reward_shift must be finite, got nan"),
        (["--num-updates", "0"], "num_updates must be at least 1, got 0"),
        (["--num-morse-updates", "0"], "expected --num-morse-updates of 1 or more"),
        (["--best-fraction", "0"], "best_fraction must lie in (0, 1], got 0.0"),
        (["--num-seeds", "0"], "num_seeds must be at least 1, got 0"),
        (["--scale", "-1"], "scale must be above 0, got -1.0"),
        (["--sweep", "mu=.1,-3"], "mu must be at least 0.02, got -3.0"),
        (
            ["--sweep", "alpha=1"],
            "--sweep cannot vary 'alpha', only mu and floor and scale",
        ),
        (["--sweep", "mu"], "sweep expects NAME=VALUE,VALUE,..., got 'mu'"),
        (["--sweep", "mu=.1,.2,.1"], "sweep names a value of mu twice"),
        (["--sweep", "mu=.1", "mu=.2"], "sweep names mu twice"),
        (["--dataset", "no/such"], "no/such"),
        (["--resume", "nowhere"], "nowhere"),
        (["--learning-rate", "1"], "learning-rate"),
        (["--track", "wandb"], "uv sync --extra wandb"),
    ],
)
def test_user_mistakes_exit_with_two_and_leave_nothing(
    args, message, tmp_path, arrays_file, capsys, monkeypatch, exits
):
    monkeypatch.chdir(tmp_path)
    if args[0] == "--track" and importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    if args[0] != "--dataset" and args[0] != "--resume":
        args = [*args, "--dataset", str(arrays_file)]
    with pytest.raises(SystemExit) as end:
        run.guarded(partial(td3_bst.main, [*args, "--run-dir", "runs"]))
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_new_folders_never_collide(tmp_path):
    folders = {run.new_folder(tmp_path, "name") for _ in range(5)}
    assert len(folders) == 5
