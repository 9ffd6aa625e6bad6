"""Evaluation: episodes are counted, cut, scored and reproduced as promised."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from common import rollout
from common.errors import UserError
from common.rollout import Evaluator, NumpyPolicy
from common.tasks import Task


class Counter(gym.Env):
    """Pays its action each step; ends after `seed % 5 + 1` steps; obs is the step."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = gym.spaces.Box(0.0, 4.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        assert seed is not None
        self.left, self.at = seed % 5 + 1, 0
        return np.array([0.0]), {}

    def step(self, action):
        self.at += 1
        return np.array([self.at]), float(action[0]), self.at >= self.left, False, {}


def task_of(**changes) -> Task:
    fields = {
        "env_spec": "",
        "eval_map": "metadata",
        "obs_keys": (),
        "horizon": 3,
        "ends_at_success": False,
        "metric": "return",
        "score_min": 0.0,
        "score_max": 10.0,
    }
    return Task(**(fields | changes))


def constant_policy(*outputs: float) -> NumpyPolicy:
    """A policy per output in (-1, 1): it ignores the observation."""
    count = len(outputs)
    bias = np.arctanh(np.array(outputs))[:, None]
    layers = ((np.zeros((count, 1, 1)), bias),)
    one = np.ones(1)
    return NumpyPolicy(layers, 0 * one, one, 0 * one, 4 * one)


@pytest.fixture
def counters(monkeypatch):
    monkeypatch.setattr(rollout, "make_env", lambda task: Counter())


def expected_lengths(seed: int, step: int, episodes: int, horizon: int) -> list[int]:
    entropy = [np.random.SeedSequence([seed, step, e]) for e in range(episodes)]
    starts = [int(e.generate_state(1)[0] >> 1) for e in entropy]
    return [min(s % 5 + 1, horizon) for s in starts]


def test_every_episode_is_played_once_and_cut_at_the_horizon(counters):
    # Outputs 0 and .5 in the box [0, 4] are actions 2 and 3, so the return of an
    # episode is 2 or 3 times its length; the score is 100 * return / 10.
    result = Evaluator(task_of(), 23).run(constant_policy(0.0, 0.5), [4, 9], 100)
    for k, (seed, action) in enumerate([(4, 2.0), (9, 3.0)]):
        lengths = expected_lengths(seed, 100, 23, horizon=3)
        assert result.lengths[k].tolist() == lengths
        np.testing.assert_allclose(result.returns[k], action * np.array(lengths))
        np.testing.assert_allclose(result.scores[k], 10 * result.returns[k].mean())
    assert np.isnan(result.success).all()


def test_a_seed_is_judged_alike_alone_and_in_a_group(counters):
    policies = constant_policy(0.1, -0.3, 0.7)
    group = Evaluator(task_of(), 12).run(policies, [0, 1, 2], 5)
    alone = Evaluator(task_of(), 12).run(constant_policy(-0.3), [1], 5)
    np.testing.assert_array_equal(alone.returns[0], group.returns[1])


def test_evaluations_repeat_and_differ_between_steps(counters):
    evaluator = Evaluator(task_of(), 12)
    first, again, other = (
        evaluator.run(constant_policy(0.0), [3], step) for step in (7, 7, 8)
    )
    np.testing.assert_array_equal(first.lengths, again.lengths)
    assert (first.lengths != other.lengths).any()


def test_a_maze_episode_ends_at_success(counters):
    # Every step pays 2 > 0, so each episode ends after its first step, with success.
    task = task_of(ends_at_success=True, metric="success")
    result = Evaluator(task, 6).run(constant_policy(0.0), [0], 1)
    assert result.lengths.tolist() == [[1] * 6]
    assert result.success.tolist() == [[1.0] * 6]
    assert result.scores.tolist() == [100.0]


def test_a_maze_episode_without_reward_fails(counters):
    # Output -1 + tiny is the action 0 up to rounding: below, exactly 0.
    low = constant_policy(0.0)
    nothing = NumpyPolicy(
        low.layers, low.obs_mean, low.obs_std, np.zeros(1), np.zeros(1)
    )
    task = task_of(ends_at_success=True, metric="success", horizon=5)
    result = Evaluator(task, 6).run(nothing, [0], 1)
    assert result.success.tolist() == [[0.0] * 6]
    assert result.scores.tolist() == [0.0]


def test_processes_play_what_one_process_plays():
    """Episodes are split between processes, and every one is itself again."""
    spec = gym.spec("Pendulum-v1").to_json()
    task = task_of(env_spec=spec, horizon=20)
    rng = np.random.default_rng(0)
    layers = ((rng.normal(size=(2, 3, 1)), rng.normal(size=(2, 1))),)
    box = np.full(1, 2.0)
    policy = NumpyPolicy(layers, np.zeros(3), np.ones(3), -box, box)
    here, there = Evaluator(task, 7), Evaluator(task, 7, num_workers=3)
    try:
        mine, theirs = (e.run(policy, [3, 8], 100) for e in (here, there))
    finally:
        there.close()
    for name in ("returns", "lengths", "success", "scores"):
        np.testing.assert_array_equal(getattr(theirs, name), getattr(mine, name))
    assert len(set(mine.returns.ravel())) == 14
    assert theirs.failed == ()


def test_killed_processes_are_started_again_once(monkeypatch):
    spec = gym.spec("Pendulum-v1").to_json()
    evaluator = Evaluator(task_of(env_spec=spec), 2, num_workers=2)
    policy = NumpyPolicy(
        ((np.ones((1, 3, 1)), np.zeros((1, 1))),),
        *(np.zeros(3), np.ones(3)),
        *(np.full(1, -2.0), np.full(1, 2.0)),
    )
    first = evaluator.run(policy, [0], 1)
    assert evaluator.workers is not None
    with pytest.raises(BrokenProcessPool):
        evaluator.workers.submit(os._exit, 9).result()
    np.testing.assert_array_equal(evaluator.run(policy, [0], 1).returns, first.returns)
    evaluator.close()

    def dies(*_: object) -> None:
        raise BrokenProcessPool

    monkeypatch.setattr(evaluator, "_shared", dies)
    with pytest.raises(UserError, match=r"killed .* go on with --resume"):
        evaluator.run(policy, [0], 1)
    evaluator.close()


SESSION = """
import os, signal
import gymnasium

if __name__ == "__main__":
    from common.rollout import Evaluator
    from common.tasks import Task

    spec = gymnasium.spec("Pendulum-v1").to_json()
    task = Task(spec, "metadata", (), 3, False, "return", None, None)
    workers = Evaluator(task, 2, num_workers=1).workers
    worker = workers.submit(os.getpid).result()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)  # as a batch system's, to the whole group
    assert workers.submit(os.getpid).result() == worker
    print(worker, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_processes_outlive_a_signal_to_the_group_but_not_the_run(tmp_path):
    (tmp_path / "session.py").write_text(SESSION)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "session.py")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL
    assert done.stderr == ""
    deadline = time.monotonic() + 30
    while is_alive(int(done.stdout)):
        assert time.monotonic() < deadline, "the process is still there"
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not (
        state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z"
    )
