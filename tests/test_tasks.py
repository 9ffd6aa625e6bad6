"""Environments, time limits and scores."""

import dataclasses
import math
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec

from common import tasks
from common.errors import UserError

TURNED = [
    [1, 1, 1, 1, 1],
    [1, 0, 0, "r", 1],
    [1, 0, 1, 1, 1],
    [1, 0, 0, "g", 1],
    [1, 1, 1, 1, 1],
]
CORRIDOR = [[1, 1, 1, 1, 1], [1, "r", 0, "g", 1], [1, 1, 1, 1, 1]]


def spec_of(env_id: str, **changes) -> EnvSpec:
    """A registered spec with some fields changed and `maze_map` put in its kwargs."""
    spec = tasks.find_spec(env_id)
    kwargs = dict(spec.kwargs)
    for key in ("maze_map", "reward_type"):
        if key in changes:
            kwargs[key] = changes.pop(key)
    return dataclasses.replace(spec, kwargs=kwargs, **changes)


def task_of(env_id: str, **changes) -> tasks.Task:
    task, why = tasks.choose_task(spec_of(env_id, **changes), None, "auto", ())
    assert task is not None, why
    return task


@pytest.mark.parametrize(
    ("env_id", "expected"),
    [
        ("Hopper-v4", ("hopper", "locomotion")),
        ("HalfCheetah-v5", ("halfcheetah", "locomotion")),
        ("Walker2d-v5", ("walker2d", "locomotion")),
        ("Ant-v5", ("ant", "locomotion")),
        ("AntMaze_UMaze-v4", ("antmaze", "antmaze")),
        ("PointMaze_Large_Diverse_GR-v3", ("pointmaze", "pointmaze")),
        ("AdroitHandPen-v1", ("pen", "other")),
        ("AdroitHandPenSparse-v1", ("", "other")),
        ("FrankaKitchen-v1", ("kitchen", "other")),
        ("CartPole-v1", ("", "other")),
    ],
)
def test_agent_and_domain(env_id, expected):
    assert tasks.agent_and_domain(env_id) == expected


@pytest.mark.parametrize(
    ("env_id", "horizon"),
    [
        ("Hopper-v5", 1000),
        ("AdroitHandPen-v1", 100),  # gymnasium-robotics itself says 200
        ("AdroitHandDoor-v1", 200),
        ("PointMaze_UMaze-v3", 300),
        ("PointMaze_Medium-v3", 600),
        ("PointMaze_Large-v3", 800),
        ("AntMaze_UMaze-v4", 700),
        ("AntMaze_Medium-v4", 1000),
        ("AntMaze_Large_Diverse_GR-v4", 1000),
        ("Pendulum-v1", 200),
    ],
)
def test_horizon_is_d4rls_or_the_environments_own(env_id, horizon):
    assert task_of(env_id).horizon == horizon


def test_an_endless_collection_environment_gets_the_horizon_of_its_maze():
    task = task_of("PointMaze_UMaze-v3", max_episode_steps=1_000_000)
    assert (task.horizon, task.ends_at_success, task.metric) == (300, True, "success")


def test_a_maze_of_ones_own_keeps_its_own_time_limit():
    changes = {"maze_map": CORRIDOR, "max_episode_steps": 123}
    assert task_of("PointMaze_UMaze-v3", **changes).horizon == 123


def test_a_maze_of_ones_own_without_time_limit_is_not_evaluated():
    spec = spec_of("PointMaze_UMaze-v3", maze_map=CORRIDOR, max_episode_steps=10**6)
    task, why = tasks.choose_task(spec, None, "auto", ())
    assert task is None
    assert "1000000" in why


def test_a_turned_maze_is_still_a_u_maze():
    assert tasks.maze_size(spec_of("AntMaze_UMaze-v4", maze_map=TURNED)) == "umaze"
    assert tasks.maze_size(spec_of("AntMaze_UMaze-v4", maze_map=CORRIDOR)) == ""


@pytest.mark.parametrize(
    ("env_id", "eval_map", "expected"),
    [
        ("AntMaze_UMaze-v4", "auto", "collection"),
        ("AntMaze_UMaze-v4", "metadata", "metadata"),
        ("AntMaze_Medium-v4", "auto", "metadata"),
        ("PointMaze_UMaze-v3", "auto", "metadata"),
        ("PointMaze_UMaze-v3", "collection", "collection"),
        ("Hopper-v5", "auto", "metadata"),
    ],
)
def test_eval_map(env_id, eval_map, expected):
    spec = tasks.find_spec(env_id)
    task, _ = tasks.choose_task(spec, spec, eval_map, ())
    assert task is not None
    assert task.eval_map == expected


def test_without_evaluation_environment_the_collection_serves():
    task, _ = tasks.choose_task(tasks.find_spec("Hopper-v5"), None, "metadata", ())
    assert task is not None
    assert task.eval_map == "collection"


def test_without_any_environment_there_is_no_task():
    task, why = tasks.choose_task(None, None, "auto", ())
    assert (task, why) == (None, "The dataset names no environment to evaluate in.")


def test_unknown_eval_map_is_refused():
    with pytest.raises(UserError, match="not both"):
        tasks.choose_task(tasks.find_spec("Hopper-v5"), None, "both", ())


@pytest.mark.parametrize(
    ("env_id", "mean_return", "score"),
    [
        # 100 * (1318 + 20.272305) / (3234.3 + 20.272305)
        ("Hopper-v5", 1318.0, 41.1198),
        # 100 * (5346 + 280.178953) / (12135 + 280.178953)
        ("HalfCheetah-v4", 5346.0, 45.3169),
        ("Walker2d-v5", 4592.3, 100.0),
        ("Ant-v5", -325.6, 0.0),
        ("AdroitHandPen-v1", 3076.8331018826877, 100.0),
        ("AdroitHandDoor-v1", -56.512833, 0.0),
        ("AdroitHandHammer-v1", 12794.134825156867, 100.0),
        ("AdroitHandRelocate-v1", 4233.877797728884, 100.0),
    ],
)
def test_score_is_d4rls(env_id, mean_return, score):
    task = task_of(env_id)
    assert tasks.normalized_score(task, mean_return, 0.0) == pytest.approx(
        score, abs=1e-4
    )


def test_score_of_a_maze_is_its_success_rate():
    assert tasks.normalized_score(task_of("AntMaze_UMaze-v4"), 200.0, 0.43) == 43.0


def test_minaris_scores_serve_only_where_d4rl_has_none():
    own = (0.0, 10.0)
    hopper, _ = tasks.choose_task(tasks.find_spec("Hopper-v5"), None, "auto", (), own)
    other, _ = tasks.choose_task(tasks.find_spec("Pendulum-v1"), None, "auto", (), own)
    assert hopper is not None
    assert other is not None
    assert hopper.score_max == 3234.3
    assert tasks.normalized_score(other, 5.0, 0.0) == 50.0


def test_score_without_references_is_nan():
    assert math.isnan(tasks.normalized_score(task_of("Pendulum-v1"), 5.0, 0.0))


def test_dense_maze_rewards_are_no_success():
    task = task_of("PointMaze_UMazeDense-v3")
    assert (task.ends_at_success, task.metric) == (False, "return")


def test_maze2d_and_kitchen_constants():
    assert tasks.SCORES["maze2d-umaze"] == (23.85, 161.86)
    assert tasks.SCORES["kitchen"] == (0.0, 4.0)


def test_environment_is_cut_at_the_horizon():
    task = dataclasses.replace(task_of("Pendulum-v1"), horizon=3)
    env = tasks.make_env(task)
    env.reset(seed=0)
    cuts = [env.step(np.zeros(1))[3] for _ in range(3)]
    env.close()
    assert cuts == [False, False, True]


def test_task_is_plain_data():
    task = task_of("AntMaze_UMaze-v4")
    assert pickle.loads(pickle.dumps(task)) == task


def test_flatten_obs_of_a_maze():
    task = dataclasses.replace(
        task_of("PointMaze_UMaze-v3"), obs_keys=("observation", "desired_goal")
    )
    obs = {
        "achieved_goal": np.array([1.0, 2.0]),
        "desired_goal": np.array([5.0, 6.0]),
        "observation": np.array([1.0, 2.0, 3.0, 4.0]),
    }
    flat = tasks.flatten_obs(task, obs)
    assert flat.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert flat.dtype == np.float32


def test_antmaze_observation_has_the_position_in_front():
    keys = ("achieved_goal", "observation", "desired_goal")
    task = dataclasses.replace(task_of("AntMaze_UMaze-v4"), obs_keys=keys)
    env = tasks.make_env(task)
    obs, _ = env.reset(seed=0)
    flat = tasks.flatten_obs(task, obs)
    env.close()
    assert flat.shape == (31,)
    assert flat[:2].tolist() == np.float32(obs["achieved_goal"]).tolist()
    assert flat[-2:].tolist() == np.float32(obs["desired_goal"]).tolist()


def test_dimensions_that_disagree_with_the_environment():
    task, ones = task_of("Pendulum-v1"), np.ones(1, np.float32)
    with pytest.raises(UserError, match="have 4 dimensions"):
        tasks.check_task(task, 4, -2 * ones, 2 * ones)
    with pytest.raises(UserError, match="actions have 2 dimensions"):
        tasks.check_task(task, 3, -np.ones(2), np.ones(2))
    with pytest.raises(UserError, match="action range"):
        tasks.check_task(task, 3, -ones, ones)
    assert tasks.check_task(task, 3, -2 * ones, 2 * ones) == ""


def test_environment_that_cannot_be_built_is_no_error():
    spec = dataclasses.replace(
        tasks.find_spec("Pendulum-v1"), entry_point="no_such_module:Env"
    )
    task, _ = tasks.choose_task(spec, None, "auto", ())
    assert task is not None
    why = tasks.check_task(task, 3, -np.ones(1), np.ones(1))
    assert "Pendulum-v1 cannot be built here" in why
    assert "no_such_module" in why


def test_environments_are_made_silently_and_without_jax(tmp_path):
    code = (
        "import sys; from common import tasks\n"
        "for name in ('HalfCheetah-v4', 'AntMaze_UMaze-v4', 'AdroitHandPen-v1'):\n"
        "    spec = tasks.find_spec(name)\n"
        "    task, _ = tasks.choose_task(spec, None, 'auto', ())\n"
        "    tasks.make_env(task).close()\n"
        "print('jax' in sys.modules)\n"
    )
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r})\n{code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("False\n", "")
    assert list(tmp_path.iterdir()) == []
