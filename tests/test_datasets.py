"""Loading: what becomes of each kind of source, and which inputs are refused."""

import contextlib
import dataclasses
import os
import socket
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
from minari.data_collector import EpisodeBuffer

import td3_bst
from common import d4rl, datasets, minari_sets, tasks, transitions
from common.errors import UserError
from common.options import parse

pytestmark = pytest.mark.usefixtures("home")

HOPPER_OBS = gym.spaces.Box(-np.inf, np.inf, (11,), np.float64)
HOPPER_ACTION = gym.spaces.Box(-1.0, 1.0, (3,), np.float32)
POINT_ACTION = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
ANT_ACTION = gym.spaces.Box(-1.0, 1.0, (8,), np.float32)
TURNED = [
    [1, 1, 1, 1, 1],
    [1, 0, 0, "r", 1],
    [1, 0, 1, 1, 1],
    [1, 0, 0, "g", 1],
    [1, 1, 1, 1, 1],
]


def spec_json(env_id: str, **changes: Any) -> str:
    spec = tasks.find_spec(env_id)
    kwargs = dict(spec.kwargs)
    if "maze_map" in changes:
        kwargs["maze_map"] = changes.pop("maze_map")
    return dataclasses.replace(spec, kwargs=kwargs, **changes).to_json()


def goal_space(obs_dim: int) -> gym.spaces.Dict:
    sizes = {"achieved_goal": 2, "desired_goal": 2, "observation": obs_dim}
    return gym.spaces.Dict(
        {key: gym.spaces.Box(-np.inf, np.inf, (n,)) for key, n in sizes.items()}
    )


def hopper_episode(length: int, terminated: bool, start: float = 0.0) -> dict:
    """Observations count up from `start` in every dimension; each reward is 1."""
    flags = np.zeros(length, bool)
    flags[-1] = True
    return {
        "observations": np.repeat(start + np.arange(length + 1.0)[:, None], 11, 1),
        "actions": np.full((length, 3), 0.5, np.float32),
        "rewards": np.ones(length),
        "terminations": flags & terminated,
        "truncations": flags & (not terminated),
    }


def maze_episode(
    rewards: list[float], goals: list[list[float]], obs_dim: int, action_dim: int
) -> dict:
    """The position counts up; nothing ever terminates, as in Minari's mazes."""
    length = len(rewards)
    position = np.repeat(np.arange(length + 1.0)[:, None], 2, 1)
    return {
        "observations": {
            "achieved_goal": position,
            "desired_goal": np.array(goals),
            "observation": np.full((length + 1, obs_dim), 7.0),
        },
        "actions": np.zeros((length, action_dim), np.float32),
        "rewards": np.array(rewards),
        "terminations": np.zeros(length, bool),
        "truncations": np.arange(length) == length - 1,
    }


@pytest.fixture
def hopper(write_minari: Callable[..., Path]) -> Callable[..., Path]:
    """Writes a Minari set of Hopper: an episode that falls and one that is cut."""

    def write(dataset_id: str = "mujoco/hopper/tiny-v0", **changes: Any) -> Path:
        arguments = {
            "episodes": [hopper_episode(3, True), hopper_episode(2, False, 100.0)],
            "obs_space": HOPPER_OBS,
            "action_space": HOPPER_ACTION,
            "env": spec_json("Hopper-v5"),
            **changes,
        }
        return write_minari(dataset_id, **arguments)

    return write


def own_arrays(length: int = 6, **changes: Any) -> dict[str, Any]:
    """Rows with observations (i, i), actions 0.5, a terminal at 2, a time-out at 4."""
    rows = np.arange(length)
    arrays = {
        "observations": np.stack([rows, rows], 1).astype(np.float32),
        "actions": np.full((length, 1), 0.5, np.float32),
        "rewards": rows.astype(np.float32),
        "terminals": rows == 2,
        "timeouts": rows == 4,
        **changes,
    }
    return {key: value for key, value in arrays.items() if value is not None}


def save(path: Path, arrays: dict[str, Any]) -> str:
    """Saves arrays as `.npz` or HDF5 by the path's suffix."""
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for key, value in arrays.items():
                file[key] = value
    return str(path)


# --------------------------------------------------------------------- Minari


def test_minari_episodes_have_one_more_observation(hopper):
    hopper()
    data = datasets.load("mujoco/hopper/tiny-v0")
    assert data.obs[:, 0].tolist() == [0, 1, 2, 100, 101]
    assert data.next_obs[:, 0].tolist() == [1, 2, 3, 101, 102]
    assert data.terminal.tolist() == [False, False, True, False, False]
    assert data.episode.tolist() == [0, 0, 0, 1, 1]
    assert data.episode_returns.tolist() == [3.0, 2.0]
    assert data.episode_lengths.tolist() == [3, 2]
    assert (data.num_transitions, data.obs_dim, data.action_dim) == (5, 11, 3)
    assert (data.domain, data.env_id) == ("locomotion", "Hopper-v5")
    assert data.task is not None
    assert (data.task.horizon, data.task.score_max) == (1000, 3234.3)


def test_types(hopper):
    hopper()
    data = datasets.load("mujoco/hopper/tiny-v0")
    kinds = {
        "obs": "float32",
        "action": "float32",
        "reward": "float32",
        "next_obs": "float32",
        "terminal": "bool",
        "episode": "int32",
        "action_low": "float32",
        "action_high": "float32",
    }
    assert {key: str(getattr(data, key).dtype) for key in kinds} == kinds
    assert len(data.fingerprint) == 64


def test_a_set_written_by_minari_itself():
    spec = tasks.find_spec("Hopper-v5")
    episode = hopper_episode(3, True)
    minari.create_dataset_from_buffers(
        "own/hopper/some-v3",
        [
            EpisodeBuffer(
                observations=list(episode["observations"]),
                actions=list(episode["actions"]),
                rewards=list(episode["rewards"]),
                terminations=list(episode["terminations"]),
                truncations=list(episode["truncations"]),
            )
        ],
        env=spec,
        eval_env=spec,
        action_space=HOPPER_ACTION,
        observation_space=HOPPER_OBS,
        algorithm_name="none",
        author="nobody",
        author_email="nobody@example.org",
        code_permalink="none",
        description="three steps",
    )
    data = datasets.load("own/hopper/some-v3")
    assert data.next_obs[:, 10].tolist() == [1, 2, 3]
    assert data.task is not None


def test_pointmaze_goal_success_and_layout(write_minari):
    # In the second episode, as recorded, the first observation shows the old goal.
    episodes = [
        maze_episode([0, 1], [[5, 5]] * 3, 4, 2),
        maze_episode([0, 0, 1], [[5, 5], [6, 6], [6, 6], [6, 6]], 4, 2),
    ]
    collection = spec_json("PointMaze_UMaze-v3", max_episode_steps=1_000_000)
    write_minari(
        "D4RL/pointmaze/umaze-v2",
        episodes,
        goal_space(4),
        POINT_ACTION,
        collection,
        spec_json("PointMaze_UMaze-v3"),
    )
    data = datasets.load("D4RL/pointmaze/umaze-v2")
    assert data.obs[:, 4:].tolist() == [[5, 5], [5, 5], [6, 6], [6, 6], [6, 6]]
    assert data.next_obs[:, 4:].tolist() == [[5, 5], [5, 5], [6, 6], [6, 6], [6, 6]]
    assert data.obs_dim == 6
    assert data.terminal.tolist() == [False, True, False, False, True]
    assert data.domain == "pointmaze"
    assert data.task is not None
    assert data.task.obs_keys == ("observation", "desired_goal")
    assert (data.task.eval_map, data.task.horizon) == ("metadata", 300)
    chosen = datasets.load("D4RL/pointmaze/umaze-v2", "collection")
    assert chosen.task is not None
    assert (chosen.task.eval_map, chosen.task.horizon) == ("collection", 300)


def test_maze_with_flat_observations(write_minari):
    episode = maze_episode([0, 1, 1], [[5, 5]] * 4, 4, 2)
    episode["observations"] = np.arange(24.0).reshape(4, 6)
    box = gym.spaces.Box(-np.inf, np.inf, (6,))
    write_minari("own/pointmaze-v0", [episode], box, POINT_ACTION)
    assert datasets.load("own/pointmaze-v0").num_transitions == 3
    env = spec_json("PointMaze_UMaze-v3", entry_point="no_maze:Env")
    write_minari("own/pointmaze-v1", [episode], box, POINT_ACTION, env)
    data = datasets.load("own/pointmaze-v1")
    assert data.obs[:, 0].tolist() == [0, 6]
    assert data.terminal.tolist() == [False, True]


def antmaze_set(write_minari: Callable[..., Path], goals: list[list[float]]) -> None:
    episodes = [
        maze_episode([0, 0, 1, 1, 1], [goals[0]] * 6, 27, 8),
        maze_episode([0, 0], [goals[1]] * 3, 27, 8),
        maze_episode([1, 0], [goals[1]] * 3, 27, 8),
    ]
    write_minari(
        "D4RL/antmaze/umaze-v1",
        episodes,
        goal_space(27),
        ANT_ACTION,
        spec_json("AntMaze_UMaze-v4"),
        spec_json("AntMaze_UMaze-v4", maze_map=TURNED),
    )


def test_antmaze_ends_at_the_first_reward(write_minari):
    antmaze_set(write_minari, [[8, 8], [9, 9]])
    data = datasets.load("D4RL/antmaze/umaze-v1")
    assert data.reward.tolist() == [0, 0, 1, 0, 0, 1]
    assert data.terminal.tolist() == [False, False, True, False, False, True]
    assert data.episode.tolist() == [0, 0, 0, 1, 1, 2]
    assert data.obs[:, 0].tolist() == [0, 1, 2, 0, 1, 0]
    assert data.obs[:, 2].tolist() == [7] * 6
    assert data.obs[:, -1].tolist() == [8, 8, 8, 9, 9, 9]
    assert data.task is not None
    assert data.task.obs_keys == ("achieved_goal", "observation", "desired_goal")


def test_antmaze_goal_that_never_varies_is_left_out(write_minari):
    antmaze_set(write_minari, [[8, 8], [8, 8]])
    for _ in range(2):  # built, then from the cache
        data = datasets.load("D4RL/antmaze/umaze-v1")
        assert data.obs_dim == 29
        assert data.task is not None
        assert data.task.obs_keys == ("achieved_goal", "observation")


def test_antmaze_umaze_is_evaluated_where_the_data_are(write_minari):
    antmaze_set(write_minari, [[8, 8], [9, 9]])
    auto = datasets.load("D4RL/antmaze/umaze-v1").task
    asked = datasets.load("D4RL/antmaze/umaze-v1", "metadata").task
    assert auto is not None
    assert asked is not None
    assert (auto.eval_map, asked.eval_map) == ("collection", "metadata")
    assert '"r"' not in auto.env_spec
    assert '"r"' in asked.env_spec
    assert (auto.horizon, auto.ends_at_success) == (700, True)


def test_dense_maze_rewards_do_not_end_episodes(write_minari):
    write_minari(
        "D4RL/pointmaze/umaze-dense-v2",
        [maze_episode([0.2, 0.3, 0.4], [[5, 5]] * 4, 4, 2)],
        goal_space(4),
        POINT_ACTION,
        spec_json("PointMaze_UMazeDense-v3"),
        ref_min_score=10.0,
        ref_max_score=110.0,
    )
    data = datasets.load("D4RL/pointmaze/umaze-dense-v2")
    assert data.terminal.tolist() == [False, False, False]
    assert data.task is not None
    assert (data.task.metric, data.task.score_max) == ("return", 110.0)


def test_kitchen_trains_without_evaluation(write_minari):
    goals = gym.spaces.Dict({"kettle": gym.spaces.Box(-np.inf, np.inf, (7,))})
    space = gym.spaces.Dict(
        {
            "achieved_goal": goals,
            "desired_goal": goals,
            "observation": gym.spaces.Box(-np.inf, np.inf, (59,)),
        }
    )
    episode = {
        "observations": {
            "achieved_goal": {"kettle": np.zeros((3, 7))},
            "desired_goal": {"kettle": np.zeros((3, 7))},
            "observation": np.zeros((3, 59)),
        },
        "actions": np.zeros((2, 9), np.float32),
        "rewards": np.zeros(2),
        "terminations": np.zeros(2, bool),
        "truncations": np.zeros(2, bool),
    }
    box = gym.spaces.Box(-1.0, 1.0, (9,), np.float32)
    kitchen = spec_json("FrankaKitchen-v1", entry_point="no_kitchen:Env")
    write_minari("D4RL/kitchen/complete-v2", [episode], space, box, kitchen)
    data = datasets.load("D4RL/kitchen/complete-v2")
    assert data.obs_dim == 59
    assert data.task is None
    assert "FrankaKitchen-v1 cannot be built here" in data.why_no_task


def test_any_minari_folder(hopper, home):
    folder = hopper("elsewhere-v0")
    moved = home / "cache" / "td3-bst" / "mine"
    moved.parent.mkdir(parents=True)
    folder.rename(moved)
    data = datasets.load_minari_folder(moved, "td3-bst/mine-v0")
    assert (data.name, data.num_transitions) == ("td3-bst/mine-v0", 5)


def test_no_environment_named(hopper):
    hopper(env=None)
    data = datasets.load("mujoco/hopper/tiny-v0")
    assert (data.task, data.domain) == (None, "other")
    assert data.why_no_task == "The dataset names no environment to evaluate in."


def test_other_action_range_is_rescaled(write_minari):
    episode = hopper_episode(3, False)
    episode["observations"] = episode["observations"][:, :3]
    episode["actions"] = np.array([[-2.0], [0.0], [1.0]], np.float32)
    write_minari(
        "own/pendulum-v0",
        [episode],
        gym.spaces.Box(-np.inf, np.inf, (3,)),
        gym.spaces.Box(-2.0, 2.0, (1,)),
        spec_json("Pendulum-v1"),
    )
    data = datasets.load("own/pendulum-v0")
    assert data.action.tolist() == [[-1.0], [0.0], [0.5]]
    assert (data.action_low.tolist(), data.action_high.tolist()) == ([-2.0], [2.0])


# --------------------------------------------------------- D4RL and own files


def test_terminal_rows_of_own_arrays_are_kept(home):
    # Row 5 is the last and terminal, row 4 terminal and timed out: both are whole.
    ends = np.isin(np.arange(6), (4, 5))
    arrays = own_arrays(terminals=ends, timeouts=np.arange(6) == 4)
    data = datasets.load(save(home / "mine.npz", arrays))
    assert data.reward.tolist() == [0, 1, 2, 3, 4, 5]
    assert data.terminal.tolist() == [False] * 4 + [True] * 2
    assert data.next_obs[:, 0].tolist() == [1, 2, 3, 4, 4, 5]
    assert data.episode.tolist() == [0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize(("timeouts", "warned"), [((4,), False), (range(5), True)])
def test_timeouts_at_most_rows_are_warned_of(timeouts, warned, home, capsys):
    arrays = own_arrays(timeouts=np.isin(np.arange(6), timeouts))
    path = save(home / "mine.npz", arrays)
    for _ in range(2):  # the second time from the cache
        datasets.load(path)
        told = capsys.readouterr().err
        assert ("mine.npz: 1 of 6 rows are used" in told) is warned
        assert ("warning" in told) is warned


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_column_that_float32_loses_is_warned_of(dtype, home, capsys):
    arrays = own_arrays()
    obs = arrays["observations"].astype(np.float64)
    obs[:, 0] = 1.7643e9 + 0.02 * np.arange(len(obs))  # a clock
    obs[:, 1] = 1234567.891  # constant: nothing is lost
    datasets.load(save(home / "mine.npz", arrays | {"observations": obs.astype(dtype)}))
    told = capsys.readouterr().err
    # What was float32 before it came here has lost it already.
    assert ("observations[:, 0] vary by 0.034" in told) is (dtype == np.float64)
    assert "[:, 1]" not in told


def test_a_file_of_the_same_size_and_modification_time_is_read_anew(home):
    path = save(home / "mine.npz", own_arrays())
    os.utime(path, ns=(0, 0))
    before = datasets.load(path).reward
    save(home / "mine.npz", own_arrays(rewards=-own_arrays()["rewards"]))
    os.utime(path, ns=(0, 0))
    assert datasets.load(path).reward.tolist() == (-before).tolist()


def test_suffixes_may_be_in_capitals(home):
    path = save(home / "mine.npz", own_arrays())
    Path(path).rename(home / "MINE.NPZ")
    assert len(datasets.load(str(home / "MINE.NPZ")).reward) == 4


def test_a_plus_in_a_name_does_not_part_it(home, monkeypatch):
    (folder := home / "c++").mkdir()
    for name in ("p+q", "a", "b"):
        save(folder / f"{name}.npz", own_arrays())
    monkeypatch.chdir(folder)
    for name, rows in (("p+q.npz", 4), ("a.npz+b.npz", 8)):
        args = ["--dataset", name]
        options, _ = parse("td3_bst", td3_bst.Config(), "", args, td3_bst.TRACED)
        assert len(datasets.load(options.dataset).reward) == rows
        assert Path(options.dataset).is_absolute() is (rows == 4)


@pytest.mark.parametrize("broken", ["text", "encrypted"])
def test_a_zip_whose_members_are_no_arrays_is_refused(broken, home):
    path = Path(save(home / "mine.npz", own_arrays()))
    if broken == "text":
        with zipfile.ZipFile(path) as file:
            parts = {name: file.read(name) for name in file.namelist()}
        with zipfile.ZipFile(path, "w") as file:
            for name, part in parts.items():
                file.writestr(name, "1, 2" if name == "rewards.npy" else part)
    else:  # bit 0 of the flags, in a member's own header and in the directory
        bytes_ = bytearray(path.read_bytes())
        for mark, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
            bytes_[bytes_.index(mark) + offset] |= 1
        path.write_bytes(bytes_)
    with pytest.raises(UserError, match="not an array" if broken == "text" else "encr"):
        datasets.load(str(path))


def test_rows_of_own_arrays_are_those_of_qlearning_dataset(home):
    # The time-out at row 4 and the last row are lost; the terminal stays terminal, and
    # does not look into the next episode.
    data = datasets.load(save(home / "mine.hdf5", own_arrays()))
    assert data.obs[:, 0].tolist() == [0, 1, 2, 3]
    assert data.next_obs[:, 0].tolist() == [1, 2, 2, 4]
    assert data.terminal.tolist() == [False, False, True, False]
    assert data.episode.tolist() == [0, 0, 0, 1]
    assert data.why_no_task == "An own file names no environment to evaluate in."


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
def test_next_observations_keep_every_row(home, suffix):
    after = own_arrays()["observations"] + 10
    arrays = own_arrays(next_observations=after)
    data = datasets.load(save(home / f"mine{suffix}", arrays))
    assert data.next_obs[:, 0].tolist() == [10, 11, 12, 13, 14, 15]
    assert data.terminal.tolist() == [False, False, True, False, False, False]
    assert data.episode.tolist() == [0, 0, 0, 1, 1, 2]


def test_without_timeouts_episodes_end_where_observations_jump(home):
    after = own_arrays()["observations"] + 1
    after[3] += 5
    arrays = own_arrays(next_observations=after, timeouts=None)
    data = datasets.load(save(home / "mine.npz", arrays))
    assert data.episode.tolist() == [0, 0, 0, 1, 2, 2]


def test_own_action_range(home):
    arrays = own_arrays(action_low=np.array([0.0]), action_high=np.array([2.0]))
    data = datasets.load(save(home / "mine.npz", arrays))
    assert data.action[0].tolist() == [-0.5]
    arrays = own_arrays(action_low=np.float64(-0.5), action_high=np.float64(0.5))
    data = datasets.load(save(home / "scalar.npz", arrays))
    assert data.action[0].tolist() == [1.0]


def hopper_rows(length: int = 5, **changes: Any) -> dict[str, Any]:
    rows = np.arange(length)
    return own_arrays(
        length,
        observations=np.repeat(rows[:, None], 11, 1).astype(np.float32),
        actions=np.zeros((length, 3), np.float32),
        **changes,
    )


def test_d4rl_file_by_path_is_evaluated_in_v4(home):
    wrong = np.full((5, 11), 9.0, np.float32)  # D4RL itself does not read these
    path = home / "hopper_medium-v2.hdf5"
    data = datasets.load(save(path, hopper_rows(next_observations=wrong)))
    assert data.next_obs[:, 0].tolist() == [1, 2, 3, 4]
    assert data.task is not None
    assert tasks.env_id_of(data.task) == "Hopper-v4"
    assert data.env_id == "Hopper-v4"
    assert data.domain == "locomotion"


@pytest.mark.parametrize(
    ("name", "domain"),
    [("antmaze-umaze-v2", "antmaze"), ("maze2d-umaze-v1", "pointmaze")],
)
def test_d4rl_mazes_are_not_evaluated(home, name, domain):
    rewards = np.array([0, 1, 0, 0, 0, 0], np.float32)
    arrays = own_arrays(rewards=rewards, terminals=np.zeros(6, bool))
    data = datasets.load(save(home / f"{name}.hdf5", arrays))
    assert data.task is None
    assert "physics and coordinates" in data.why_no_task
    assert data.domain == domain
    # Rows 2 to 4 follow the success at row 1, row 5 is the last.
    assert data.obs[:, 0].tolist() == [0, 1]
    assert data.terminal.tolist() == [False, True]


def test_old_d4rl_files_have_time_outs_by_length():
    # Horizon 100: row 99 is cut. After a terminal D4RL counts from 1, so that the
    # episode from row 103 on is cut at its 99th row, 201.
    terminal = np.zeros(300, bool)
    terminal[102] = True
    cuts = d4rl._timeouts_by_length(terminal, "pen-human-v0")
    assert np.flatnonzero(cuts).tolist() == [99, 201]


def test_d4rl_addresses():
    base = "gym_mujoco_v2/"
    assert d4rl.URLS["hopper-medium-v2"] == base + "hopper_medium-v2.hdf5"
    replay = d4rl.URLS["walker2d-medium-replay-v2"]
    assert replay == base + "walker2d_medium_replay-v2.hdf5"
    assert d4rl.URLS["walker2d-medium-replay-v0"] == "gym_mujoco/walker_mixed.hdf5"
    assert d4rl.URLS["maze2d-large-v1"] == "maze2d/maze2d-large-sparse-v1.hdf5"
    antmaze = "ant_maze_v2/Ant_maze_u-maze_noisy_multistart_False_multigoal_False"
    assert d4rl.URLS["antmaze-umaze-v2"] == f"{antmaze}_sparse_fixed.hdf5"
    assert d4rl.URLS["door-cloned-v1"] == "hand_dapg_v1/door-cloned-v1.hdf5"


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """D4RL's host, on this machine: sends `answer`, counts `requests`."""
    state: dict[str, Any] = {"answer": b"", "answers": [], "requests": 0, "asked": []}

    def serve() -> None:
        with contextlib.suppress(OSError):  # the listener has been shut down
            while True:
                connection, _ = listener.accept()
                with connection:
                    state["asked"].append(connection.recv(65_536))
                    state["requests"] += 1
                    later = state["answers"]
                    connection.sendall(later.pop(0) if later else state["answer"])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        port = listener.getsockname()[1]
        monkeypatch.setattr(d4rl, "HOST", f"http://127.0.0.1:{port}/")
        yield state
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def http_ok(content: bytes, announced: int | None = None) -> bytes:
    """An answer with `content`, of which it announces another length if asked."""
    length = len(content) if announced is None else announced
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (length, content)


def downloads(home: Path) -> list[str]:
    folder = home / "cache" / "td3-bst" / "d4rl"
    return [path.name for path in folder.iterdir() if path.suffix != ".lock"]


def test_download_by_d4rl_name(home, host):
    save(home / "source.hdf5", hopper_rows())
    host["answer"] = http_ok((home / "source.hdf5").read_bytes())
    for _ in range(2):
        data = datasets.load("hopper-medium-v2")
        assert data.obs[:, 0].tolist() == [0, 1, 2, 3]
        assert data.name == "hopper-medium-v2"
    assert host["requests"] == 1
    assert downloads(home) == ["hopper-medium-v2.hdf5"]


def test_truncated_download_file_is_fetched_again(home, host):
    save(home / "source.hdf5", hopper_rows())
    host["answer"] = http_ok((home / "source.hdf5").read_bytes())
    cached = home / "cache" / "td3-bst" / "d4rl" / "hopper-medium-v2.hdf5"
    cached.parent.mkdir(parents=True)
    cached.write_bytes((home / "source.hdf5").read_bytes()[:1000])
    assert datasets.load("hopper-medium-v2").num_transitions == 4


@pytest.mark.parametrize("resumable", [True, False])
def test_a_broken_download_goes_on_where_it_was(home, host, resumable):
    save(home / "source.hdf5", hopper_rows())
    content = (home / "source.hdf5").read_bytes()
    host["answer"] = http_ok(content[:1000], announced=len(content))
    with pytest.raises(UserError, match=f"1000 of {len(content)} bytes arrived"):
        datasets.load("hopper-medium-v2")
    assert downloads(home) == ["hopper-medium-v2.hdf5.part"]
    rest = http_ok(content[1000:]).replace(b"200 OK", b"206 Partial Content")
    host["answer"] = rest if resumable else http_ok(content)
    assert datasets.load("hopper-medium-v2").num_transitions == 4
    assert b"Range: bytes=1000-" in host["asked"][1]
    assert downloads(home) == ["hopper-medium-v2.hdf5"]


def test_a_part_of_another_file_is_given_up(home, host):
    save(home / "source.hdf5", hopper_rows())
    part = home / "cache" / "td3-bst" / "d4rl" / "hopper-medium-v2.hdf5.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 100_000)
    refused = b"HTTP/1.1 416 Range Not Satisfiable\r\nContent-Length: 0\r\n\r\n"
    host["answers"] = [refused, http_ok((home / "source.hdf5").read_bytes())]
    assert datasets.load("hopper-medium-v2").num_transitions == 4
    # One that fits in length shows itself as no HDF5, and is not kept either.
    (home / "cache" / "td3-bst" / "d4rl" / "hopper-medium-v2.hdf5").unlink()
    part.write_bytes(b"x" * 50)
    host["answer"] = http_ok(b"y" * 50).replace(b"200 OK", b"206 Partial Content")
    with pytest.raises(UserError, match="is not an HDF5 file"):
        datasets.load("hopper-medium-v2")
    assert downloads(home) == []


def test_download_of_something_else_leaves_nothing(home, host):
    host["answer"] = http_ok(b"<html>")
    with pytest.raises(UserError, match="is not an HDF5 file"):
        datasets.load("hopper-medium-v2")
    assert downloads(home) == []


def test_download_not_found(home, host):
    host["answer"] = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
    with pytest.raises(UserError, match="Not Found"):
        datasets.load("hopper-expert-v2")
    assert downloads(home) == []


def test_download_without_a_host(monkeypatch):
    monkeypatch.setattr(d4rl, "HOST", "http://127.0.0.1:9/")
    with pytest.raises(UserError, match="Cannot download"):
        datasets.load("hopper-medium-v2")


def test_download_without_a_folder_to_write_to(home):
    (home / "cache").write_text("a file in the folder's place")
    with pytest.raises(UserError, match="Cannot write downloads"):
        datasets.load("hopper-medium-v2")


# -------------------------------------------------------------------- several


def test_several_are_joined(hopper):
    hopper("hopper/one-v0")
    hopper("hopper/two-v0", episodes=[hopper_episode(2, True, 50.0)])
    data = datasets.load("hopper/one-v0+hopper/two-v0")
    assert data.obs[:, 0].tolist() == [0, 1, 2, 100, 101, 50, 51]
    assert data.episode.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert data.episode.dtype == np.int32
    assert data.name == "hopper/one-v0+hopper/two-v0"
    assert data.task == datasets.load("hopper/one-v0").task
    assert data.fingerprint != datasets.load("hopper/one-v0").fingerprint
    other_way = datasets.load("hopper/two-v0+hopper/one-v0")
    assert data.fingerprint != other_way.fingerprint


def test_different_environments_are_not_joined(hopper):
    hopper("hopper/one-v0")
    hopper("hopper/two-v0", env=spec_json("Hopper-v4"))
    with pytest.raises(UserError, match=r"Hopper-v5 and Hopper-v4\."):
        datasets.load("hopper/one-v0+hopper/two-v0")


def test_different_shapes_and_ranges_are_not_joined(home):
    one = save(home / "one.npz", own_arrays())
    wide = save(home / "wide.npz", own_arrays(observations=np.zeros((6, 3))))
    low, high = np.array([-2.0]), np.array([2.0])
    scaled = save(home / "scaled.npz", own_arrays(action_low=low, action_high=high))
    with pytest.raises(UserError, match="observations have 2 and 3 dimensions"):
        datasets.load(f"{one}+{wide}")
    with pytest.raises(UserError, match="action ranges differ"):
        datasets.load(f"{one}+{scaled}")


def test_d4rl_files_of_one_maze_are_joined(home):
    names = ("antmaze-umaze-v2", "antmaze-umaze-diverse-v2", "antmaze-large-play-v2")
    paths = [save(home / f"{name}.hdf5", own_arrays()) for name in names]
    assert datasets.load(f"{paths[0]}+{paths[1]}").task is None
    with pytest.raises(UserError, match="antmaze-umaze and antmaze-large"):
        datasets.load(f"{paths[0]}+{paths[2]}")


def test_a_path_may_hold_a_plus(home):
    data = datasets.load(save(home / "a+b.npz", own_arrays()))
    assert data.num_transitions == 4


# ---------------------------------------------------------------------- cache


def entries(home: Path) -> list[Path]:
    return sorted((home / "cache" / "td3-bst" / "datasets").iterdir())


def test_second_load_comes_from_the_cache(hopper, monkeypatch):
    folder = hopper()
    first = datasets.load("mujoco/hopper/tiny-v0")
    before = sorted(folder.rglob("*"))
    monkeypatch.setattr(minari_sets, "read", None)
    second = datasets.load("mujoco/hopper/tiny-v0")
    assert second.fingerprint == first.fingerprint
    assert second.obs.tolist() == first.obs.tolist()
    assert sorted(folder.rglob("*")) == before


def test_changed_source_is_read_again(home):
    path = home / "mine.npz"
    save(path, own_arrays())
    assert datasets.load(str(path)).reward[0] == 0.0
    save(path, own_arrays(rewards=np.full(6, 5.0)))
    os.utime(path, ns=(0, 1))  # whatever the file system's resolution
    assert datasets.load(str(path)).reward[0] == 5.0
    assert len(entries(home)) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-7],
        lambda content: content[:-7] + b"damaged",
        lambda content: b"damaged" + content[7:],
    ],
)
def test_damaged_cache_is_rebuilt(home, damage):
    path = save(home / "mine.npz", own_arrays())
    first = datasets.load(path)
    (entry,) = entries(home)
    entry.write_bytes(damage(entry.read_bytes()))
    assert transitions._read(entry) is None
    assert datasets.load(path).fingerprint == first.fingerprint
    rebuilt = transitions._read(entry)
    assert rebuilt is not None
    assert rebuilt[1] == first.fingerprint


def test_cache_that_cannot_be_written_is_done_without(home, capsys):
    path = save(home / "mine.npz", own_arrays())
    (home / "cache").write_text("a file in the folder's place")
    assert datasets.load(path).num_transitions == 4
    assert "warning: no cache in" in capsys.readouterr().err


def test_concurrent_first_loads(home):
    path = save(home / "mine.npz", own_arrays(2000))
    loaded = []
    threads = [
        threading.Thread(target=lambda: loaded.append(datasets.load(path)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({data.fingerprint for data in loaded}) == 1
    assert [entry.suffix for entry in entries(home)] == [".safetensors"]
    assert len(loaded) == 8


def test_fingerprint_depends_on_every_array(home):
    data = datasets.load(save(home / "mine.npz", own_arrays()))
    columns = {key: getattr(data, key) for key in transitions.Transitions._fields[:-2]}
    flat = transitions.Transitions(obs_keys=(), **columns)
    changed = {key: value.copy() for key, value in columns.items()}
    prints = {transitions.fingerprint(flat)}
    for key, value in changed.items():
        value.flat[0] = not value.flat[0]
        prints.add(transitions.fingerprint(flat._replace(**{key: value})))
    assert len(prints) == 9


def test_until_success():
    reward = np.array([0, 1, 1, 0, 0, 0, 1, 0, 2.0])
    episode = np.array([0, 0, 0, 1, 1, 2, 2, 2, 3])
    keep = transitions.until_success(reward, episode)
    assert keep.tolist() == [1, 1, 0, 1, 1, 1, 1, 0, 1]


# ------------------------------------------------------------- refused inputs


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("mujoco/hopper/medium", "is not understood: expected a Minari id"),
        ("hopper-medum-v2 ", "is not at"),
        ("../escape-v0", "is not understood"),
        ("", "names nothing"),
        ("a-v0++b-v0", "names nothing"),
        ("nothing/here.npz", r"There is no file nothing/here\.npz"),
        ("nothing\0here.npz", "There is no file"),
        ("x" * 5000 + ".hdf5", "There is no file"),
    ],
)
def test_sources_that_are_none(source, message, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=message):
        datasets.load(source)


def test_unknown_eval_map_is_refused_before_anything_is_read():
    with pytest.raises(UserError, match="--eval-map is one of auto, collection"):
        datasets.load("nothing-v0", "both")


def test_missing_minari_set_without_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be reached to download it"):
        datasets.load("mujoco/hopper/nowhere-v0")


def test_missing_minari_set_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r'pip install "minari\[hf\]"'):
        datasets.load("mujoco/hopper/nowhere-v0")


@pytest.mark.parametrize(
    "error", [ValueError("no such set"), ImportError("x"), RuntimeError()]
)
def test_minari_that_fails_to_download(monkeypatch, error):
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(minari_sets, "_check_hugging_face", lambda name, path: None)
    monkeypatch.setattr(minari, "download_dataset", fail)
    with pytest.raises(UserError, match=r"Minari could not download it: \S"):
        datasets.load("mujoco/hopper/nowhere-v0")


def test_minari_download_reports_on_stderr(hopper, monkeypatch, capsys):
    def download(name: str) -> None:
        print("Downloading from Farama servers...")
        hopper(name)

    monkeypatch.setattr(minari_sets, "_check_hugging_face", lambda name, path: None)
    monkeypatch.setattr(minari, "download_dataset", download)
    assert datasets.load("mujoco/hopper/remote-v0").num_transitions == 5
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"episodes": []}, "empty"),
        ({"action_space": gym.spaces.Discrete(3)}, "actions are discrete"),
        ({"action_space": gym.spaces.MultiDiscrete([3, 3])}, "actions are discrete"),
        ({"action_space": gym.spaces.Tuple([HOPPER_ACTION])}, "actions are composite"),
        ({"action_space": gym.spaces.Box(-np.inf, np.inf, (3,))}, "not a finite box"),
        ({"action_space": gym.spaces.Box(-1, 1, (2,))}, "actions have 3 dimensions"),
        ({"obs_space": gym.spaces.Tuple([HOPPER_OBS])}, "type Tuple"),
        ({"obs_space": gym.spaces.Discrete(3)}, "type Discrete"),
        (
            {"obs_space": gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)},
            "images are not supported",
        ),
        ({"env": spec_json("Walker2d-v5")}, r"those of Walker2d-v5 have the shape"),
        ({"minari_version": "9.0.0"}, "no readable Minari dataset"),
        ({"data_format": "parchment"}, "no readable Minari dataset"),
        ({"total_episodes": 3}, "cannot be read"),
    ],
)
def test_minari_sets_that_do_not_fit(hopper, changes, message):
    hopper(**changes)
    with pytest.raises(UserError, match=message):
        datasets.load("mujoco/hopper/tiny-v0")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("actions", np.zeros((2, 3)), "episode 0 has 4 observations, 2 actions"),
        ("rewards", np.zeros(4), "3 actions, 4 rewards"),
        ("rewards", np.zeros((3, 1)), r"\(3, 1\)"),
        ("actions", np.zeros(3), r"\(3,\)"),
        ("actions", np.array([[b"x"] * 3] * 3), "expected numbers"),
        ("actions", np.zeros((3, 2)), "actions have 2 dimensions"),
        ("observations", np.zeros((3, 11)), "has 3 observations"),
        ("rewards", np.array([0, np.nan, 0]), "rewards has 1 NaN or infinite"),
        ("actions", np.full((3, 3), 1.1), r"furthest 1\.1 at index \(0, 0\)"),
    ],
)
def test_minari_episodes_that_do_not_fit(hopper, key, value, message):
    hopper(episodes=[{**hopper_episode(3, True), key: value}])
    with pytest.raises(UserError, match=message):
        datasets.load("mujoco/hopper/tiny-v0")


def test_minari_episodes_of_different_width(hopper):
    narrow = hopper_episode(3, True)
    narrow["observations"] = narrow["observations"][:, :10]
    hopper(episodes=[hopper_episode(3, True), narrow])
    with pytest.raises(UserError, match="episodes differ in width"):
        datasets.load("mujoco/hopper/tiny-v0")


def test_maze_observations_that_lack_an_entry(write_minari):
    episode = maze_episode([0, 1], [[5, 5]] * 3, 4, 2)
    del episode["observations"]["desired_goal"]
    env = spec_json("PointMaze_UMaze-v3")
    arguments = ([episode], goal_space(4), POINT_ACTION, env)
    write_minari("D4RL/pointmaze/umaze-v2", *arguments)
    with pytest.raises(UserError, match="episode 0 lack an entry"):
        datasets.load("D4RL/pointmaze/umaze-v2")
    plain = gym.spaces.Dict({"observation": HOPPER_OBS})
    write_minari("D4RL/pointmaze/plain-v2", [episode], plain, POINT_ACTION, env)
    with pytest.raises(UserError, match="observations lack desired_goal"):
        datasets.load("D4RL/pointmaze/plain-v2")


def test_damaged_minari_folders(hopper):
    folder = hopper()
    (folder / "data" / "main_data.hdf5").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        datasets.load("mujoco/hopper/tiny-v0")
    (folder / "data" / "main_data.hdf5").unlink()
    with pytest.raises(UserError, match="No data found"):
        datasets.load("mujoco/hopper/tiny-v0")
    (folder / "data" / "metadata.json").write_text("{")
    with pytest.raises(UserError, match="no readable Minari dataset"):
        datasets.load("mujoco/hopper/tiny-v0")


NAN_ROWS = np.zeros((6, 2))
NAN_ROWS[2, 1], NAN_ROWS[4, 0] = np.nan, np.inf


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": None, "actions": None}, "lacks actions, rewards; it has"),
        ({"timeouts": None}, "neither timeouts nor next_observations"),
        (
            {"observations": NAN_ROWS},
            r"observations has 2 NaN or infinite values, the first at index \(2, 1\)",
        ),
        ({"rewards": np.array([0, 0, 0, np.inf, 0, 0])}, "rewards has 1 NaN"),
        ({"rewards": np.full(6, 1e300)}, "rewards has 6 NaN or infinite"),
        ({"actions": np.full((6, 1), np.nan)}, "actions has 6 NaN"),
        ({"rewards": np.zeros(5)}, "differ in length: .*rewards 5"),
        ({"rewards": np.zeros((6, 2))}, r"rewards has the shape \(6, 2\)"),
        ({"actions": np.zeros(6, int)}, "discrete"),
        ({"actions": np.zeros((6, 2), np.int64)}, "discrete"),
        ({"actions": np.zeros(6)}, r"actions have the shape \(6,\)"),
        ({"actions": np.full((6, 1), -1.5)}, r"furthest -1\.5 at index \(0, 0\)"),
        ({"observations": np.zeros((6, 8, 8), np.uint8)}, "images are not supported"),
        ({"observations": np.zeros(6)}, r"observations have the shape \(6,\)"),
        ({"observations": np.array([b"a"] * 6)}, "not plain numbers"),
        ({"next_observations": np.zeros((6, 3))}, "next_observations have the shape"),
        ({"terminals": np.full(6, 0.5)}, "values other than true and false"),
        ({"action_low": np.array([-1.0])}, "action_low alone"),
        (
            {"action_low": np.array([1.0]), "action_high": np.array([1.0])},
            "not a finite box",
        ),
        ({"action_low": np.zeros(2), "action_high": np.ones(2)}, "their range has"),
    ],
)
def test_own_arrays_that_do_not_fit(home, suffix, changes, message):
    path = save(home / f"mine{suffix}", own_arrays(**changes))
    with pytest.raises(UserError, match=message):
        datasets.load(path)
    assert not (home / "cache").exists()


@pytest.mark.parametrize("length", [0, 1])
def test_own_arrays_without_a_transition(home, length):
    path = save(home / "mine.npz", own_arrays(length))
    with pytest.raises(UserError, match="is empty"):
        datasets.load(path)


@pytest.mark.parametrize("suffix", [".npz", ".hdf5", ".h5"])
@pytest.mark.parametrize("content", [b"", b"just text\n", b"PK\x03\x04 broken"])
def test_files_that_are_something_else(home, suffix, content):
    path = home / f"mine{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as"):
        datasets.load(str(path))


def test_truncated_files(home):
    for name in ("mine.npz", "mine.hdf5"):
        save(home / name, own_arrays(2000))
        whole = (home / name).read_bytes()
        (home / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match="cannot be read as"):
            datasets.load(str(home / name))


def test_object_arrays_are_never_unpickled(home):
    rows = np.empty(6, object)
    rows[:] = [[0.0]] * 6
    path = home / "mine.npz"
    np.savez(path, allow_pickle=True, **own_arrays(observations=rows))
    with pytest.raises(UserError, match="Object arrays cannot be loaded"):
        datasets.load(str(path))


def test_a_dangling_link_in_an_arrays_place(home):
    path = save(home / "mine.hdf5", own_arrays(rewards=None))
    with h5py.File(path, "a") as file:
        file["rewards"] = h5py.SoftLink("/nowhere")
    with pytest.raises(UserError, match="lacks rewards"):
        datasets.load(path)


def test_a_group_in_an_arrays_place(home):
    path = save(home / "mine.hdf5", own_arrays(rewards=None))
    with h5py.File(path, "a") as file:
        file.create_group("rewards")
    with pytest.raises(UserError, match="rewards is a group"):
        datasets.load(path)


def test_actions_just_outside_the_range_are_clipped(home):
    # 1e-3 of the width 2 is 0.002.
    arrays = own_arrays(actions=np.full((6, 1), 1.0019))
    assert datasets.load(save(home / "in.npz", arrays)).action.max() == 1.0
    arrays = own_arrays(actions=np.full((6, 1), 1.0021))
    with pytest.raises(UserError, match="leave their range in 6 values"):
        datasets.load(save(home / "out.npz", arrays))


# -------------------------------------------------------- the real stand-ins


@pytest.mark.usefixtures("standins")
def test_standin_hopper_expert():
    data = datasets.load("standin/mujoco/hopper/expert-v0")
    assert data.obs.shape == (100_993, 11)
    assert len(data.episode_returns) == 106
    assert data.episode_returns.mean() == pytest.approx(3415.1, abs=0.1)


@pytest.mark.usefixtures("standins")
def test_standin_antmaze():
    data = datasets.load("standin/D4RL/antmaze/umaze-v1")
    assert (data.obs_dim, data.action_dim) == (31, 8)
    assert len(data.episode_returns) == 286
    assert data.episode_returns.sum() == data.terminal.sum() == 244
    assert data.task is not None
    assert data.task.eval_map == "collection"


def test_cached_million_is_quick(home):
    # 11 dimensions, 1M rows: 100 MB from the cache, well under the 2 s promised.
    rows = np.zeros(1_000_000, np.float32)
    arrays = {
        "observations": np.zeros((1_000_000, 11), np.float32),
        "actions": np.zeros((1_000_000, 3), np.float32),
        "rewards": rows,
        "terminals": rows.astype(bool),
        "timeouts": rows.astype(bool),
    }
    path = save(home / "large.npz", arrays)
    datasets.load(path)
    start = time.perf_counter()
    assert datasets.load(path).num_transitions == 999_999
    assert time.perf_counter() - start < 2.0


# ---------------------------------------------------------------------- best episodes


def test_best_keeps_whole_episodes_of_highest_return(tmp_path: Path):
    # Episodes of 3 rows with returns 6, 9, 6, 0 and 3.
    path = tmp_path / "own.npz"
    each = np.repeat([2.0, 3.0, 2.0, 0.0, 1.0], 3)
    obs = np.arange(15.0)[:, None]
    np.savez(
        path,
        observations=obs,
        next_observations=obs + 0.5,
        actions=np.linspace(-1, 1, 15)[:, None],
        rewards=each,
        terminals=np.zeros(15, bool),
        timeouts=np.arange(15) % 3 == 2,
    )
    whole = datasets.load(str(path))
    assert whole.episode_returns.tolist() == [6, 9, 6, 0, 3]
    two = datasets.load(str(path), best_fraction=0.4)
    assert two.obs[:, 0].tolist() == [0, 1, 2, 3, 4, 5]  # the earlier of the two sixes
    three = datasets.best(whole, 0.6)
    rows = [0, 1, 2, 3, 4, 5, 6, 7, 8]
    for name in ("obs", "action", "reward", "next_obs", "terminal"):
        np.testing.assert_array_equal(getattr(three, name), getattr(whole, name)[rows])
    four = datasets.best(whole, 0.8)  # all but the fourth
    assert four.episode.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert four.episode.dtype == np.int32
    assert four.obs[-1, 0] == 14
    assert datasets.best(whole, 0.01).obs[:, 0].tolist() == [3, 4, 5]  # at least one
    assert datasets.best(whole, 1.0) is whole
    many = dataclasses.replace(whole, episode=np.arange(15))
    assert len(datasets.best(many, 7 / 15 - 1e-12).obs) == 7  # rounding is not a loss
    prints = {d.fingerprint for d in (whole, two, three, four)}
    assert len(prints) == 4
