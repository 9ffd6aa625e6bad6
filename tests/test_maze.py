"""The generated dataset: valid Minari, the same each time, and made once."""

import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest

from common import maze
from common.errors import UserError

ID = "td3-bst/pointmaze/zigzag-v0"
NUM = 12  # episodes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return maze.ensure(ID, NUM)


@pytest.fixture(scope="module")
def data(folder: Path) -> minari.MinariDataset:
    return minari.MinariDataset(folder / "data")


def test_it_is_a_valid_minari_dataset(data: minari.MinariDataset):
    assert data.spec.dataset_id == ID
    assert data.total_episodes == NUM
    episodes = list(data.iterate_episodes())
    assert data.total_steps == sum(len(e.rewards) for e in episodes)
    assert isinstance(data.action_space, gym.spaces.Box)
    for episode in episodes:
        steps = len(episode.rewards)
        assert episode.actions.shape == (steps, 2)
        assert episode.actions.dtype == np.float32
        assert episode.observations["observation"].shape == (steps + 1, 4)
        assert episode.observations["desired_goal"].shape == (steps + 1, 2)
        assert all(action in data.action_space for action in episode.actions)


def test_every_episode_ends_at_the_goal_and_only_there(data: minari.MinariDataset):
    for episode in data.iterate_episodes():
        ends = np.zeros(len(episode.rewards), bool)
        ends[-1] = True
        np.testing.assert_array_equal(episode.rewards, ends)
        np.testing.assert_array_equal(episode.terminations, ends)
        assert not episode.truncations.any()
        obs = episode.observations
        distance = np.linalg.norm(obs["achieved_goal"] - obs["desired_goal"], axis=1)
        assert distance[-1] <= 0.45 < distance[:-1].min()


def test_the_actions_are_spread_out_and_away_from_the_faces(
    data: minari.MinariDataset,
):
    actions = np.concatenate([e.actions for e in data.iterate_episodes()])
    assert (np.abs(actions) > 0.95).mean() < 0.01
    assert (actions.std(axis=0) > 0.2).all()


@pytest.mark.parametrize("eval_env", [False, True])
def test_the_environment_rebuilds_from_its_spec_and_replays_an_episode(
    data: minari.MinariDataset, eval_env: bool
):
    env = data.recover_environment(eval_env=eval_env)
    assert env.spec is not None
    assert env.spec.max_episode_steps == maze.HORIZON
    episode = data[3]
    obs, _ = env.reset(seed=3)
    for t, action in enumerate(episode.actions):
        for key, value in obs.items():
            np.testing.assert_array_equal(episode.observations[key][t], value)
        obs, reward, terminated, _, _ = env.step(action)
        assert reward == episode.rewards[t]
        assert terminated == episode.terminations[t]
    env.close()


def test_a_second_generation_gives_the_same_arrays(
    data: minari.MinariDataset, tmp_path: Path
):
    before = dict(os.environ)
    maze.generate(ID, 3, tmp_path)
    assert dict(os.environ) == before
    again = minari.MinariDataset(tmp_path / ID / "data")
    for number in range(3):
        first, second = data[number], again[number]
        np.testing.assert_array_equal(first.actions, second.actions)
        for key, value in first.observations.items():
            np.testing.assert_array_equal(value, second.observations[key])


def test_what_is_complete_is_kept_and_what_is_not_is_made_again(home: Path):
    folder = maze.ensure(ID, 2)
    assert folder == home / "cache" / "td3-bst" / "minari" / ID
    file = folder / "data" / "main_data.hdf5"
    made = file.stat().st_mtime_ns
    assert maze.ensure(ID, 2) == folder
    assert file.stat().st_mtime_ns == made
    with file.open("r+b") as stream:
        stream.truncate(1000)
    maze.ensure(ID, 2)
    assert len(minari.MinariDataset(folder / "data")[1].rewards) > 0
    (folder / "data" / "metadata.json").unlink()
    maze.ensure(ID, 2)
    assert maze.is_complete(folder, 2)
    root = home / "cache" / "td3-bst" / "minari"
    assert [path.name for path in root.iterdir()] == ["td3-bst"]


def test_two_processes_may_ask_at_once(home: Path):
    code = f"from common import maze; print(maze.ensure({ID!r}, 2))"
    asked = [
        subprocess.Popen([sys.executable, "-c", code], stdout=-1, text=True)
        for _ in range(2)
    ]
    answers = [process.communicate()[0].splitlines()[-1] for process in asked]
    assert answers[0] == answers[1]
    assert all(process.returncode == 0 for process in asked)
    assert maze.is_complete(Path(answers[0]), 2)


def test_the_registry_keeps_its_own_maze():
    before = maze.find_spec("PointMaze_UMaze-v3")
    spec = maze.make_spec(maze.MAPS[ID])
    assert spec.max_episode_steps == maze.HORIZON != before.max_episode_steps
    assert spec.kwargs["maze_map"] != before.kwargs["maze_map"]


def test_an_unknown_id_is_an_error_that_lists_the_known_ones(home: Path):
    with pytest.raises(UserError, match=ID):
        maze.ensure("td3-bst/pointmaze/zigzag-v9")
    assert not (home / "cache").exists()


def test_the_point_ahead_follows_the_path_around_the_corner():
    env = gym.make(maze.make_spec(maze.MAPS[ID]))
    layout = env.get_wrapper_attr("maze")
    planner = maze.Planner(layout)
    goal = layout.cell_rowcol_to_xy(np.array([3, 5]))
    x, y = layout.cell_rowcol_to_xy(np.array([1, 3]))
    # .2 m before the corner, .1 m beside the middle: .2 to the corner, .4 beyond it
    ahead = planner.point_ahead(np.array([x - 0.2, y + 0.1]), goal)
    np.testing.assert_allclose(ahead, [x, y - 0.4], atol=1e-9)
    # half a metre before the goal: the goal itself, not a point beyond
    np.testing.assert_allclose(planner.point_ahead(goal - [0.5, 0], goal), goal)
    env.close()


def test_the_controller_pushes_towards_the_wanted_velocity():
    # wanted: 2 m/s along x; .25 * ((2, 0) - (1, .4)) = (.25, -.1)
    ahead, still = np.array([3.0, 0.0]), np.zeros(2)
    force = maze.control(still, np.array([1.0, 0.4]), ahead, speed=2.0, turn=0.0)
    np.testing.assert_allclose(force, [0.25, -0.1], atol=1e-6)
    force = maze.control(still, still, ahead, speed=2.0, turn=np.pi / 2)
    np.testing.assert_allclose(force, [0.0, 0.5], atol=1e-6)
    force = maze.control(still, still, ahead, speed=4.5, turn=0.0)
    np.testing.assert_allclose(force, [maze.MAX_FORCE, 0.0], atol=1e-6)


def test_no_room_for_the_dataset_is_one_error(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the cache's folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=f"{ID} cannot be written to "):
        maze.ensure(ID, NUM)
