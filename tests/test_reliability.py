"""What goes wrong in hours of training: signals, files, divergence, environments."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from test_rollout import constant_policy, task_of
from test_run import SMALL, command, contents, read_log

import td3_bc
import td3_bst
from common import checkpoint, divergence, rollout, run
from common.errors import UserError
from common.signals import Stopped
from results import reliability

pytestmark = pytest.mark.usefixtures("short_runs")

PARTS = ("checkpoint", "policy", "morse")


def bits(folder: Path) -> dict[str, Any]:
    """All of a finished run that has to be the same after any interruption."""
    own = {name: contents(folder / name) for name in PARTS}
    return own | {"log.csv": (folder / "log.csv").read_bytes()}


def start(*args: object) -> subprocess.Popen:
    return piped(command(*args))


def piped(words: list[str], cwd: Path | None = None) -> Any:
    pipe = subprocess.PIPE
    return subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, cwd=cwd)


def stop(process: subprocess.Popen, number: signal.Signals, ready: Any) -> str:
    """Signals once `ready()` holds; returns stderr."""
    while not ready() and process.poll() is None:
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    return err


# ----------------------------------------------------------------------------- signals


def test_a_second_signal_stops_at_once_inside_a_chunk():
    # Compiled code lets no line of Python's main thread run; so does this, for long.
    code = """if True:
        import hashlib
        from common.signals import SIGNALS
        SIGNALS.install()
        SIGNALS.patient = True
        print("busy", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 400_000_000)
    """
    busy = piped([sys.executable, "-c", code], Path(td3_bst.__file__).parent)
    assert busy.stdout.readline() == "busy\n"
    time.sleep(0.5)
    busy.send_signal(signal.SIGINT)
    assert busy.stderr.readline() == "\n"
    assert "a second signal stops at once" in busy.stderr.readline()
    assert busy.poll() is None
    busy.send_signal(signal.SIGINT)
    _, err = busy.communicate(timeout=20)
    assert busy.returncode == 128 + signal.SIGINT
    assert "interrupted" in err


def test_a_signal_stops_after_the_chunk_and_nothing_is_lost(tmp_path, pendulum):
    args = ["--dataset", pendulum, "--num-updates", "30000", "--eval-every", "10000"]
    args += ["--eval-episodes", "2", "--num-seeds", "2", *SMALL]
    args += ["--num-morse-updates", "40000"]
    whole = start(*args, "--run-dir", tmp_path / "whole")
    out, err = whole.communicate()
    assert whole.returncode == 0, err
    parts = tmp_path / "parts"
    first = start(*args, "--run-dir", parts)
    err = stop(first, signal.SIGTERM, lambda: any(parts.glob("*/config.json")))
    (folder,) = parts.iterdir()
    assert "Traceback" not in err
    second = start("--resume", folder)
    reached = folder / "checkpoint" / "step-000010000.safetensors"
    err = stop(second, signal.SIGINT, reached.exists)
    found = sorted((folder / "checkpoint").glob("step-*"))[-1]
    step = int(found.stem.removeprefix("step-"))
    assert f"stopped at update {step}, with a checkpoint" in err
    assert 10_000 <= step < 20_000
    last = start("--resume", folder)
    out_again, err = last.communicate()
    assert last.returncode == 0, err
    assert f"resumed at update {step}" in out_again
    assert bits(folder) == bits(Path(out.splitlines()[-1]))


@pytest.fixture
def short_chunks():
    """Chunks of 10 updates, so that a short run has several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "CHUNK", 10)
        yield


@pytest.fixture
def stop_at(monkeypatch, short_chunks):
    """Signals when a stage of a run in this process reaches an update."""

    def arm(stage: str, at: int) -> None:
        chunks = run.Run.chunks

        def until(self, label, *args):
            for start, length in chunks(self, label, *args):
                if label == stage and start + length >= at:
                    monkeypatch.setattr(run.SIGNALS, "asked", signal.SIGTERM)
                yield start, length

        monkeypatch.setattr(run.Run, "chunks", until)

    yield arm
    run.SIGNALS.asked = 0


def args_of(data: Path, tmp_path: Path) -> list[str]:
    args = ["--dataset", str(data), "--num-updates", "40", "--eval-every", "20"]
    args += [*SMALL, "--num-morse-updates", "30", "--num-seeds", "2"]
    return [*args, "--run-dir", str(tmp_path)]


@pytest.mark.parametrize(
    ("stage", "at", "aside"),
    [
        ("Morse network", 20, "Morse-network.safetensors"),
        ("TD3-BST", 30, "step-000000030.safetensors"),
    ],
)
def test_stopped_in_any_stage_it_goes_on_to_the_same_bits(
    stage, at, aside, stop_at, capsys, tmp_path, arrays_file, monkeypatch
):
    td3_bst.main(args_of(arrays_file, tmp_path / "a"))
    whole = Path(capsys.readouterr().out.splitlines()[-1])
    stop_at(stage, at)
    with pytest.raises(Stopped, match=rf"update {at}, with a checkpoint; go on with"):
        td3_bst.main(args_of(arrays_file, tmp_path / "b"))
    monkeypatch.undo()
    (folder,) = (tmp_path / "b").iterdir()
    assert (folder / "checkpoint" / aside).exists()
    capsys.readouterr()
    td3_bst.main(["--resume", str(folder)])
    assert f"resumed at update {at} " in capsys.readouterr().out
    assert not (folder / "checkpoint" / aside).exists()
    assert bits(folder) == bits(whole)
    log = [(row["seed"], row["step"]) for row in read_log(folder)]
    assert log == [("0", "20"), ("1", "20"), ("0", "40"), ("1", "40")]


def test_where_a_signal_stopped_it_a_run_can_end(
    stop_at, capsys, tmp_path, arrays_file, monkeypatch
):
    stop_at("TD3-BST", 10)
    decay = ["--actor-decay-updates", "40"]
    with pytest.raises(Stopped):
        td3_bst.main([*args_of(arrays_file, tmp_path), *decay])
    monkeypatch.undo()
    (folder,) = tmp_path.iterdir()
    td3_bst.main(["--resume", str(folder), "--num-updates", "10"])
    assert [row["step"] for row in read_log(folder)] == ["10", "10"]
    for row in read_log(folder):
        assert np.isfinite([float(row["q"]), float(row["omega"])]).all()
    assert json.loads((folder / "result.json").read_text())["step"] == 10
    assert (folder / "curves.png").exists()


def test_failed_episodes_are_counted_across_a_stop(
    stop_at, capsys, tmp_path, pendulum, monkeypatch
):
    evaluate = rollout.Evaluator.run

    def failing(self, policy, seeds, step):
        failed = ("seed 0: episode 0 failed",) if step == 20 else ()
        return replace(evaluate(self, policy, seeds, step), failed=failed)

    monkeypatch.setattr(rollout.Evaluator, "run", failing)
    args = ["--dataset", pendulum, "--num-updates", "60", "--eval-every", "20"]
    args += ["--eval-episodes", "2", *SMALL, "--run-dir", str(tmp_path)]
    stop_at("TD3-BST", 60)
    with pytest.raises(Stopped):
        td3_bst.main(args)
    run.SIGNALS.asked = 0
    (folder,) = tmp_path.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(run.SIGNALS, "asked", 0)
        td3_bst.main(["--resume", str(folder), "--num-updates", "60"])
    result = json.loads((folder / "result.json").read_text())
    assert result["failed_episodes"] == 1


# ------------------------------------------------------------------------------- files


@pytest.mark.parametrize("damage", ["cut", "bit", "meta"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    damage, capsys, tmp_path, arrays_file
):
    args = ["--dataset", str(arrays_file), "--num-updates", "40", "--eval-every", "20"]
    args += ["--hidden-dims", "8", "--batch-size", "16", "--num-morse-updates", "0"]
    td3_bc.main([*args, "--run-dir", str(tmp_path)])
    folder = Path(capsys.readouterr().out.splitlines()[-1])
    before = {name: contents(folder / name) for name in PARTS[:2]}
    log = (folder / "log.csv").read_bytes()
    newest = folder / "checkpoint" / "step-000000040.safetensors"
    content = bytearray(newest.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "bit":
        content[-100] ^= 4
    else:
        content = content.replace(b'\\"step\\": 40', b'\\"step\\": 30')
    assert content != newest.read_bytes()
    newest.write_bytes(content)
    (folder / "result.json").unlink()
    td3_bc.main(["--resume", str(folder)])
    said = capsys.readouterr()
    assert "step-000000040.safetensors" in said.err
    assert "trying the one before" in said.err
    assert "resumed at update 20" in said.out
    assert {name: contents(folder / name) for name in PARTS[:2]} == before
    assert (folder / "log.csv").read_bytes() == log


def test_no_whole_checkpoint_is_an_error_and_changes_nothing(
    capsys, tmp_path, arrays_file
):
    args = ["--dataset", str(arrays_file), "--num-updates", "4", "--hidden-dims", "8"]
    td3_bc.main([*args, "--num-morse-updates", "0", "--run-dir", str(tmp_path)])
    folder = Path(capsys.readouterr().out.splitlines()[-1])
    for path in (folder / "checkpoint").iterdir():
        path.write_bytes(b"x")
    log = (folder / "log.csv").read_bytes()
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        td3_bc.main(["--resume", str(folder)])
    assert (folder / "log.csv").read_bytes() == log


def test_a_full_disk_is_one_line_and_keeps_what_was_there(tmp_path, arrays_file):
    code = (
        "import resource, runpy; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
        "runpy.run_path('td3_bc.py', run_name='__main__')"
    )
    args = [
        "--dataset",
        str(arrays_file),
        "--num-updates",
        "4",
        "--num-morse-updates",
        "0",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *args, "--run-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        check=False,
    )
    assert done.returncode == 2
    assert "error: cannot write " in done.stderr
    assert "Traceback" not in done.stderr
    (folder,) = tmp_path.iterdir()
    assert list((folder / "checkpoint").iterdir()) == []
    again = subprocess.run(
        [sys.executable, "td3_bc.py", "--resume", str(folder)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    assert (folder / "result.json").exists()


# -------------------------------------------------------------------------- divergence


def diverging(data: Path, tmp_path: Path, *more: str) -> list[str]:
    args = ["--dataset", str(data), "--num-updates", "60", "--eval-every", "20"]
    args += ["--hidden-dims", "8", "--batch-size", "16", "--num-morse-updates", "0"]
    return [*args, "--run-dir", str(tmp_path), *more]


def test_a_seed_that_diverges_stops_and_the_others_go_on(capsys, tmp_path, arrays_file):
    sweep = ["--sweep", "alpha=1,1e38"]
    td3_bc.main(diverging(arrays_file, tmp_path / "a", *sweep))
    said = capsys.readouterr()
    folder = Path(said.out.splitlines()[-1])
    assert "warning: alpha1e+38-seed0 diverged in updates 1 to 20: " in said.err
    assert "What may help: " in said.err
    result = json.loads((folder / "result.json").read_text())
    assert list(result["diverged"]) == ["alpha1e+38-seed0"]
    assert result["diverged"]["alpha1e+38-seed0"]["step"] == 20
    assert {float(r["alpha"]) for r in read_log(folder)} == {1.0}
    # The other lane is the run of its own, and the bad one keeps its last good state.
    td3_bc.main(diverging(arrays_file, tmp_path / "b", "--alpha", "1"))
    alone = Path(capsys.readouterr().out.splitlines()[-1])
    mine = checkpoint.load_arrays(folder / "policy" / "alpha1-seed0.safetensors")[0]
    own = checkpoint.load_arrays(alone / "policy" / "seed0.safetensors")[0]
    for name in own:
        np.testing.assert_allclose(mine[name], own[name], atol=1e-5)
    newest = folder / "checkpoint" / "step-000000060.safetensors"
    arrays, meta = checkpoint.load_arrays(newest)
    assert all(np.isfinite(x).all() for x in arrays.values())
    assert meta["rows"][1] is None
    # Resumed, it stays stopped.
    log = (folder / "log.csv").read_bytes()
    newest.unlink()
    td3_bc.main(["--resume", str(folder)])
    assert (folder / "log.csv").read_bytes() == log


def test_a_run_of_which_nothing_is_left_says_so(capsys, tmp_path, arrays_file):
    with pytest.raises(UserError, match="every seed diverged; the last checkpoint"):
        td3_bc.main(diverging(arrays_file, tmp_path, "--critic-learning-rate", "1e30"))
    assert "a smaller --critic-learning-rate" in capsys.readouterr().err
    (folder,) = tmp_path.iterdir()
    (kept,) = (folder / "checkpoint").iterdir()
    arrays, _ = checkpoint.load_arrays(kept)
    assert all(np.isfinite(x).all() for x in arrays.values())


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"q": 1.0, "critic_loss": 2.0, "omega_max": 3.0}, None),
        ({"q": 600.0, "critic_loss": 2.0}, "q"),
        ({"q_data": -600.0, "critic_loss": 2.0}, "q_data"),
        ({"v": 600.0, "critic_loss": 2.0}, "v"),
        ({"critic_loss": 600.0}, None),  # it may well be large
        ({"actor_loss": np.nan, "critic_loss": np.inf}, "critic_loss"),
        ({"actor_loss": np.nan, "omega_max": np.inf, "q": np.nan}, "omega_max"),
        ({"actor_grad_norm": np.nan}, "actor_grad_norm"),
    ],
)
def test_the_first_cause_is_named(values, found):
    told = divergence.find(values, 500.0)
    assert (told and told[0]) == found


# ------------------------------------------------------------------------ environments


class Faulty(gym.Env):
    """Ten steps of reward 1; every third episode raises, breaks or is not finite."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = gym.spaces.Box(0.0, 4.0, (1,), np.float32)
    made, played = 0, 0

    def __init__(self) -> None:
        Faulty.made += 1
        self.broken = False

    def reset(self, *, seed=None, options=None):
        assert not self.broken, "a broken environment was used again"
        self.fault = ("", "", "raise", "", "", "obs", "", "", "reward", "", "", "reset")
        self.fault = self.fault[Faulty.played % 12]
        Faulty.played += 1
        self.at = 0
        if self.fault == "reset":
            self.broken = True
            raise RuntimeError("cannot reset")
        return np.array([0.0]), {}

    def step(self, action):
        self.at += 1
        bad = self.at == 5
        if bad and self.fault:
            self.broken = True
        if bad and self.fault == "raise":
            raise RuntimeError("mj_step: unstable\nat length")
        obs = np.array([np.nan if bad and self.fault == "obs" else self.at])
        reward = np.inf if bad and self.fault == "reward" else 1.0
        return obs, reward, self.at >= 10, False, {}


def test_episodes_that_fail_are_named_and_left_out(monkeypatch):
    monkeypatch.setattr(rollout, "make_env", lambda task: Faulty())
    Faulty.made = Faulty.played = 0
    evaluator = rollout.Evaluator(task_of(horizon=50), 24)
    result = evaluator.run(constant_policy(0.0), [7], 100)
    assert len(result.failed) == 8
    assert Faulty.made == 10 + 8
    means = result.means(0)
    assert means["return"] == means["length"] == 10.0
    assert means["score"] == 100.0
    assert int(np.isnan(result.returns).sum()) == 8
    text = "\n".join(result.failed)
    for part in (
        "seed 7: episode ",
        "failed after 4 steps, RuntimeError: mj_step: unstable; left out",
        "ValueError: an observation was not finite",
        "ValueError: the reward was inf",
        "failed after 0 steps, RuntimeError: cannot reset",
    ):
        assert part in text, part
    number = int(text.partition("episode ")[2].split()[0])
    seed = np.random.SeedSequence([7, 100, number]).generate_state(1)[0] >> 1
    assert f"episode {number} (reset seed {seed})" in text


def test_an_evaluation_of_which_nothing_is_left_has_no_score(monkeypatch):
    class Broken(Faulty):
        def reset(self, *, seed=None, options=None):
            raise OSError("no display")

    monkeypatch.setattr(rollout, "make_env", lambda task: Broken())
    result = rollout.Evaluator(task_of(), 3).run(constant_policy(0.0), [0], 10)
    assert len(result.failed) == 3
    assert all(np.isnan(value) for value in result.means(0).values())


# ------------------------------------------------------------------------------ bits


def test_bits_are_the_same_with_and_without_compiling(tmp_path):
    # The other scripts': results/reliability.py
    assert reliability.same_bits("td3_bst", tmp_path, ("", "cache", "cache")) == 0


# -------------------------------------------------------------------------- the harness


def test_the_harness_sees_what_is_lost(tmp_path):
    """A comparison that cannot fail would prove nothing."""
    for name in ("whole", "mine"):
        (tmp_path / name / "policy").mkdir(parents=True)
        log = "seed,step\n0,10\n0,20\n"
        (tmp_path / name / "log.csv").write_text(log)
        (tmp_path / name / "policy" / "a").write_bytes(b"12")
    whole, mine = tmp_path / "whole", tmp_path / "mine"
    tally = reliability.Tally()
    reliability.compare(mine, whole, tally)
    assert (tally.rows_lost, tally.rows_doubled, tally.files_changed) == (0, 0, 0)
    (mine / "log.csv").write_text("seed,step\n0,10\n0,10\n")
    (mine / "policy" / "a").write_bytes(b"13")
    (mine / "policy" / "b").write_bytes(b"")
    reliability.compare(mine, whole, tally)
    assert (tally.rows_lost, tally.rows_doubled, tally.files_changed) == (1, 1, 3)
