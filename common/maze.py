"""The project's own dataset: hasty and leisurely drives through a small maze.

Task      A point mass is pushed by a force in [-1, 1]^2 (gymnasium-robotics' PointMaze,
          100 steps per second) through a Z-shaped corridor of 1 m cells. Episodes
          start anywhere in it and end within .45 m of the goal at one end.
Behaviour A planner looks .6 m ahead along the shortest path; a controller steers
          towards that point. Speed (.5 to 4.5 m/s) and heading (up to 40 degrees off)
          are drawn afresh every .07 to .22 s, and each force gets Gaussian noise.
Why       Behaviour cloning inherits the average speed. Every state's actions form one
          connected region without gaps, so offline RL can choose its fast, well-aimed
          end and stay on the data. Few forces reach the box's faces, where a density
          against a uniform one is blind.

A dataset is made on first use, as a Minari dataset in the user's cache.
"""

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import minari
import numpy as np
import platformdirs
from gymnasium.envs.registration import EnvSpec
from minari.data_collector import EpisodeBuffer
from tqdm import tqdm

from common.errors import UserError
from common.tasks import find_spec

ZIGZAG = [  # 1 wall, r start, g goal
    [1, 1, 1, 1, 1, 1, 1],
    [1, "r", "r", "r", 1, 1, 1],
    [1, 1, 1, "r", 1, 1, 1],
    [1, 1, 1, "r", "r", "g", 1],
    [1, 1, 1, 1, 1, 1, 1],
]
HORIZON = 400  # steps; the slowest episode of the data takes 359
MAPS = {"td3-bst/pointmaze/zigzag-v0": ZIGZAG}  # a change of anything: a new version
NUM_EPISODES = 600
SPEED = (0.5, 4.5)  # m/s, range of the desired speed
HEADING = 0.7  # rad, largest error of the desired heading
HOLD = (7, 22)  # steps that a speed and a heading are held
GAIN = 0.25  # force per m/s of velocity error
MAX_FORCE = 0.7  # bound of the controller's force, before the noise
NOISE = 0.12  # sd of the force's noise
LOOKAHEAD = 0.6  # m

Cell = tuple[int, int]  # row, column of the map


# ======================================================================== The behaviour


class Planner:
    """Shortest paths between the cells of a maze, and a point ahead on them."""

    def __init__(self, maze: Any) -> None:
        self.maze = maze
        self.paths: dict[tuple[Cell, Cell], np.ndarray] = {}

    def cell(self, xy: np.ndarray) -> Cell:
        """The cell that holds a position."""
        row, column = self.maze.cell_xy_to_rowcol(xy)
        return int(row), int(column)

    def path(self, start: Cell, goal: Cell) -> np.ndarray:
        """Centres (P, 2) of the cells from one behind `start` to `goal`."""
        if (start, goal) not in self.paths:
            steps = count_steps(self.maze.maze_map, goal)
            cells = [start]
            while cells[-1] != goal:
                cells.append(min(neighbours(cells[-1]), key=lambda c: steps.get(c, 99)))
            behind = max(neighbours(start), key=lambda c: steps.get(c, -1))
            if steps.get(behind, -1) > steps[start]:
                cells.insert(0, behind)
            centres = [self.maze.cell_rowcol_to_xy(np.array(cell)) for cell in cells]
            self.paths[start, goal] = np.array(centres)
        return self.paths[start, goal]

    def point_ahead(self, xy: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """The point (2,) that lies LOOKAHEAD beyond `xy` on its path to `goal`."""
        start, last = self.cell(xy), self.cell(goal)
        if start == last:
            return goal
        path = self.path(start, last).copy()
        path[-1] = goal
        leg = np.diff(path, axis=0)  # (P - 1, 2)
        share = ((xy - path[:-1]) * leg).sum(axis=1) / (leg**2).sum(axis=1)
        nearest = path[:-1] + np.clip(share, 0.0, 1.0)[:, None] * leg
        i = int(np.argmin(((nearest - xy) ** 2).sum(axis=1)))
        point, left = nearest[i], LOOKAHEAD
        for corner in path[i + 1 :]:
            length = float(np.linalg.norm(corner - point))
            if length >= left:
                return point + (corner - point) * left / length
            point, left = corner, left - length
        return goal


def neighbours(cell: Cell) -> tuple[Cell, Cell, Cell, Cell]:
    """The four cells beside a cell."""
    row, column = cell
    return (row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)


def count_steps(maze_map: list[list[int | str]], goal: Cell) -> dict[Cell, int]:
    """Steps between cells from every reachable cell to `goal`, breadth first."""
    steps, queue = {goal: 0}, deque([goal])
    while queue:
        cell = queue.popleft()
        for row, column in neighbours(cell):
            if maze_map[row][column] != 1 and (row, column) not in steps:
                steps[row, column] = steps[cell] + 1
                queue.append((row, column))
    return steps


def control(
    xy: np.ndarray, velocity: np.ndarray, ahead: np.ndarray, speed: float, turn: float
) -> np.ndarray:
    """Force (2,) towards `ahead` at `speed` (m/s), the heading off by `turn` (rad)."""
    x, y = (ahead - xy) / (np.linalg.norm(ahead - xy) + 1e-6)
    cos, sin = np.cos(turn), np.sin(turn)
    wanted = speed * np.array([cos * x - sin * y, sin * x + cos * y])
    return np.clip(GAIN * (wanted - velocity), -MAX_FORCE, MAX_FORCE)


def drive(env: gym.Env, planner: Planner, number: int) -> EpisodeBuffer:
    """Episode `number` of the behaviour, the same whenever it is played."""
    rng = np.random.default_rng([0, number])
    obs, _ = env.reset(seed=number)
    seen, actions, rewards, ends = [obs], [], [], []
    left, speed, turn, done = 0, 0.0, 0.0, False
    while not done:
        if left == 0:
            left = int(rng.integers(*HOLD, endpoint=True))
            speed, turn = rng.uniform(*SPEED), rng.uniform(-HEADING, HEADING)
        xy, velocity = obs["observation"][:2], obs["observation"][2:]
        ahead = planner.point_ahead(xy, obs["desired_goal"])
        force = control(xy, velocity, ahead, speed, turn)
        noisy = np.clip(force + NOISE * rng.standard_normal(2), -1.0, 1.0)
        action = noisy.astype(np.float32)
        obs, reward, terminated, truncated, _ = env.step(action)
        seen.append(obs)
        actions.append(action)
        rewards.append(float(reward))
        ends.append((terminated, truncated))
        left, done = left - 1, terminated or truncated
    return EpisodeBuffer(
        id=number,
        seed=number,
        observations={key: np.stack([o[key] for o in seen]) for key in seen[0]},
        actions=np.stack(actions),  # pyright: ignore[reportArgumentType]
        rewards=rewards,
        terminations=[terminated for terminated, _ in ends],
        truncations=[truncated for _, truncated in ends],
    )


# ========================================================================= The dataset


def make_spec(maze_map: list[list[int | str]]) -> EnvSpec:
    """PointMaze on a map, ending at the goal; gymnasium-robotics alone rebuilds it."""
    kwargs = {"maze_map": maze_map, "continuing_task": False}
    spec = find_spec("PointMaze_UMaze-v3")
    return dataclasses.replace(spec, kwargs=kwargs, max_episode_steps=HORIZON)


def ensure(dataset_id: str, num_episodes: int = NUM_EPISODES) -> Path:
    """Returns a dataset's folder, which holds `data/`; generates it where missing.

    Args:
        dataset_id: one of MAPS.
        num_episodes: how many; only tests ask for other than the default.

    Raises:
        UserError: there is no such dataset, or no room for it.
    """
    if dataset_id not in MAPS:
        known = ", ".join(MAPS)
        raise UserError(f"There is no dataset {dataset_id!r}; generated ones: {known}.")
    root = platformdirs.user_cache_path("td3-bst") / "minari"
    folder = root / dataset_id
    if is_complete(folder, num_episodes):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=root) as scratch:
            generate(dataset_id, num_episodes, Path(scratch))
            put(Path(scratch) / dataset_id, folder, num_episodes)
    except OSError as error:
        raise UserError(f"{dataset_id} cannot be written to {root}: {error}") from error
    return folder


def put(made: Path, folder: Path, num_episodes: int) -> None:
    """Renames a new dataset to its place, unless another process was faster."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):  # something is there: complete, or half
        made.rename(folder)
    if not is_complete(folder, num_episodes):
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)


def is_complete(folder: Path, num_episodes: int) -> bool:
    """Whether all episodes of a dataset lie in a folder, readable."""
    try:
        with h5py.File(folder / "data" / "main_data.hdf5") as file:
            total = minari.MinariDataset(folder / "data").total_episodes
            return len(file) == total == num_episodes
    except (OSError, ValueError, KeyError):
        return False


def generate(dataset_id: str, num_episodes: int, root: Path) -> None:
    """Plays the episodes and writes them as Minari dataset `root / dataset_id`."""
    spec = make_spec(MAPS[dataset_id])
    env = gym.make(spec)
    planner = Planner(env.get_wrapper_attr("maze"))
    numbers = tqdm(range(num_episodes), f"making {dataset_id}", unit=" episodes")
    buffers = [drive(env, planner, number) for number in numbers]
    env.close()
    with minari_root(root):
        minari.create_dataset_from_buffers(
            dataset_id,
            buffers,
            env=spec,
            eval_env=spec,
            algorithm_name="planner and controller",
            author="td3-bst",
            author_email="none",
            code_permalink="common/maze.py",
            description=__doc__,
            requirements=["gymnasium-robotics>=1.4"],
        )


@contextlib.contextmanager
def minari_root(root: Path) -> Iterator[None]:
    """Lets Minari write below `root`; it takes its place from this variable alone."""
    name = "MINARI_DATASETS_PATH"
    before = os.environ.get(name)
    os.environ[name] = str(root)
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
