"""Environments to evaluate in: how they are made, how long they run, how they score.

A `Task` is plain picklable data, so worker processes can be handed one; this module
does not import jax.
"""

import contextlib
import dataclasses
import functools
import io
import math
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec

from common.errors import UserError

EVAL_MAPS = ("auto", "collection", "metadata")

# D4RL's infos: returns of the random and the expert policy, the same for every
# dataset and version of an agent. score = 100 * (return - min) / (max - min).
SCORES = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7),
    "maze2d-umaze": (23.85, 161.86),
    "maze2d-medium": (13.13, 277.39),
    "maze2d-large": (6.7, 273.99),
    "pen": (96.262799, 3076.8331017826877),
    "door": (-56.512833, 2880.5693087298737),
    "hammer": (-274.856578, 12794.134825156867),
    "relocate": (-6.425911, 4233.877797728884),
    "kitchen": (0.0, 4.0),
}

# D4RL's episode lengths in environment steps.
HORIZONS = {
    "halfcheetah": 1000,
    "hopper": 1000,
    "walker2d": 1000,
    "ant": 1000,
    "maze2d-umaze": 300,
    "maze2d-medium": 600,
    "maze2d-large": 800,
    "pointmaze-umaze": 300,
    "pointmaze-medium": 600,
    "pointmaze-large": 800,
    "antmaze-umaze": 700,
    "antmaze-medium": 1000,
    "antmaze-large": 1000,
    "pen": 100,
    "door": 200,
    "hammer": 200,
    "relocate": 200,
    "kitchen": 280,
}

LONGEST_HORIZON = 10_000  # a longer time limit of an environment means "none"

_AGENTS = (
    (re.compile(r"(HalfCheetah|Hopper|Walker2d|Ant)-v\d+"), "locomotion"),
    (re.compile(r"AdroitHand(Pen|Door|Hammer|Relocate)(?:Dense)?-v\d+"), "other"),
    (re.compile(r"Franka(Kitchen)-v\d+"), "other"),
    (re.compile(r"(PointMaze)_.*"), "pointmaze"),
    (re.compile(r"(AntMaze)_.*"), "antmaze"),
)


@dataclasses.dataclass(frozen=True)
class Task:
    """How a policy is evaluated: the environment, its time limit, its score.

    `score_min` and `score_max` are the returns of scores 0 and 100; both are None
    when nobody has published them, and unused when `metric` is "success".
    """

    env_spec: str  # gymnasium EnvSpec as JSON
    eval_map: str  # "collection" | "metadata": which of the dataset's environments
    obs_keys: tuple[str, ...]  # () for Box observations, else keys of the dict
    horizon: int  # steps until an evaluation episode is cut
    ends_at_success: bool  # the episode ends at the first reward > 0
    metric: str  # "return" | "success": what the score is made of
    score_min: float | None
    score_max: float | None


def agent_and_domain(env_id: str) -> tuple[str, str]:
    """The agent ("hopper", "pointmaze", ...; "" if unknown) and domain of an id."""
    for pattern, domain in _AGENTS:
        match = pattern.fullmatch(env_id.rpartition("/")[2])
        if match:
            return match[1].lower(), domain
    return "", "other"


def maze_size(spec: EnvSpec) -> str:
    """One of umaze, medium, large, judged by the walls; "" for any other maze."""
    maze_map = spec.kwargs.get("maze_map")
    if maze_map is None:
        match = re.search(r"_(UMaze|Medium|Large)", spec.id)
        return match[1].lower() if match else ""
    walls = _walls(maze_map)
    for size, standard in _standard_walls().items():
        if any(np.array_equal(np.rot90(walls, k), standard) for k in range(4)):
            return size
    return ""


def is_sparse_maze(spec: EnvSpec) -> bool:
    """Whether the reward is 1 at the goal and 0 elsewhere, so that > 0 is success."""
    _, domain = agent_and_domain(spec.id)
    dense = spec.kwargs.get("reward_type") == "dense" or "Dense" in spec.id
    return domain in ("pointmaze", "antmaze") and not dense


def choose_task(
    collection: EnvSpec | None,
    evaluation: EnvSpec | None,
    eval_map: str,
    obs_keys: tuple[str, ...],
    own_scores: tuple[float | None, float | None] = (None, None),
) -> tuple[Task | None, str]:
    """Decides how a dataset's policies are evaluated.

    Args:
        collection: spec of the environment that produced the data, if known.
        evaluation: spec that the dataset's metadata names for evaluation, if any.
        eval_map: "collection", "metadata" or "auto". Auto takes the collection's for
            AntMaze U-mazes, whose metadata name the maze turned by 180 degrees (none
            of the data lies in its corridor), and the metadata's elsewhere.
        obs_keys: keys of the observation dict in the dataset's order, () for a Box.
        own_scores: the dataset's reference returns, used where D4RL has none.

    Returns:
        The task and "", or None and one sentence that says why there is none.
    """
    spec, which = _choose_spec(collection, evaluation, eval_map)
    if spec is None:
        return None, "The dataset names no environment to evaluate in."
    agent, _ = agent_and_domain(spec.id)
    horizon = _horizon(spec)
    if horizon is None:
        limit = spec.max_episode_steps
        why = f"The time limit of {spec.id} is {limit}, so evaluation would not end."
        return None, why
    success = is_sparse_maze(spec)
    low, high = SCORES.get(agent, own_scores)
    if low is None or high is None or not high > low:
        low = high = None
    task = Task(
        env_spec=spec.to_json(),
        eval_map=which,
        obs_keys=obs_keys,
        horizon=horizon,
        ends_at_success=success,
        metric="success" if success else "return",
        score_min=0.0 if success else low,
        score_max=1.0 if success else high,
    )
    return task, ""


def check_task(
    task: Task, obs_dim: int, action_low: np.ndarray, action_high: np.ndarray
) -> str:
    """Builds the environment once and compares it with the dataset.

    Returns:
        "" if they fit, else one sentence why the environment cannot be built here.

    Raises:
        UserError: observations or actions differ from the environment's.
    """
    env_id = env_id_of(task)
    try:
        env = make_env(task)
    except Exception as error:  # any module of the spec may raise anything
        reason = f"{type(error).__name__} {error}".strip().splitlines()[0]
        return (
            f"{env_id} cannot be built here with mujoco {version('mujoco')} and "
            f"gymnasium-robotics {version('gymnasium-robotics')} ({reason})."
        )
    try:
        _check_spaces(env, task, env_id, obs_dim, action_low, action_high)
    finally:
        env.close()
    return ""


def make_env(task: Task) -> gym.Env:
    """The task's environment with raw observations and actions, cut at the horizon."""
    register()
    spec = EnvSpec.from_json(task.env_spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return gym.make(spec, max_episode_steps=task.horizon, disable_env_checker=True)


@functools.cache
def register() -> None:
    """Registers gymnasium-robotics' environments, without its import notices.

    MuJoCo's own warnings go to stderr from now on, less those on deprecated models;
    by default it would write them to a file in the working directory.
    """
    with _quiet():
        import gymnasium_robotics
        import mujoco

        gym.register_envs(gymnasium_robotics)
    mujoco.set_mju_user_warning(  # pyright: ignore[reportAttributeAccessIssue]
        _print_mujoco_warning
    )


def find_spec(env_id: str) -> EnvSpec:
    """The registered spec of an environment id."""
    register()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return gym.spec(env_id)


def env_id_of(task: Task) -> str:
    """The id of the environment that the task evaluates in."""
    return EnvSpec.from_json(task.env_spec).id


def flatten_obs(task: Task, obs: Any) -> np.ndarray:
    """An environment's observation in the dataset's layout, (..., S) float32."""
    return join_obs(task.obs_keys, obs).astype(np.float32, copy=False)


def join_obs(obs_keys: tuple[str, ...], obs: Any) -> np.ndarray:
    """Observations (..., S) of a Box, or of a dict's entries side by side."""
    if not obs_keys:
        return np.asarray(obs)
    return np.concatenate([np.asarray(obs[key]) for key in obs_keys], axis=-1)


def normalized_score(task: Task, mean_return: float, success_rate: float) -> float:
    """Score on the 0-100 scale; NaN if no reference returns are known.

    Args:
        task: the task that was evaluated.
        mean_return: mean undiscounted return of an episode.
        success_rate: share of successful episodes in [0, 1], used by mazes.
    """
    if task.metric == "success":
        return 100.0 * success_rate
    if task.score_min is None or task.score_max is None:
        return math.nan
    return 100.0 * (mean_return - task.score_min) / (task.score_max - task.score_min)


def _choose_spec(
    collection: EnvSpec | None, evaluation: EnvSpec | None, eval_map: str
) -> tuple[EnvSpec | None, str]:
    if eval_map not in EVAL_MAPS:
        raise UserError(f"--eval-map is one of {', '.join(EVAL_MAPS)}, not {eval_map}.")
    which = eval_map
    if which == "auto":
        which = "collection" if _is_ant_umaze(collection) else "metadata"
    if which == "metadata" and evaluation is not None:
        return evaluation, "metadata"
    if collection is not None:
        return collection, "collection"
    return evaluation, "metadata"


def _is_ant_umaze(spec: EnvSpec | None) -> bool:
    if spec is None or agent_and_domain(spec.id)[1] != "antmaze":
        return False
    return maze_size(spec) == "umaze"


def _horizon(spec: EnvSpec) -> int | None:
    """D4RL's episode length, else the environment's own if it has a real one."""
    agent, domain = agent_and_domain(spec.id)
    in_maze = domain in ("pointmaze", "antmaze")
    name = f"{agent}-{maze_size(spec)}" if in_maze else agent
    own = spec.max_episode_steps
    if name in HORIZONS:
        return HORIZONS[name]
    return own if own is not None and 0 < own <= LONGEST_HORIZON else None


def _walls(maze_map: Any) -> np.ndarray:
    return np.array([[cell == 1 for cell in row] for row in maze_map])


@functools.cache
def _standard_walls() -> Mapping[str, np.ndarray]:
    register()
    from gymnasium_robotics.envs.maze import maps

    return {
        "umaze": _walls(maps.U_MAZE),
        "medium": _walls(maps.MEDIUM_MAZE),
        "large": _walls(maps.LARGE_MAZE),
    }


def _check_spaces(
    env: gym.Env,
    task: Task,
    env_id: str,
    obs_dim: int,
    action_low: np.ndarray,
    action_high: np.ndarray,
) -> None:
    space = env.observation_space
    try:
        sample = join_obs(task.obs_keys, space.sample())
    except (KeyError, IndexError, TypeError, ValueError):
        raise UserError(
            f"The dataset's observations have the keys {', '.join(task.obs_keys)}, "
            f"but those of {env_id} are {space}."
        ) from None
    if sample.shape != (obs_dim,):
        raise UserError(
            f"The dataset's observations have {obs_dim} dimensions, "
            f"those of {env_id} have the shape {sample.shape}."
        )
    box = env.action_space
    if not isinstance(box, gym.spaces.Box) or box.shape != action_low.shape:
        raise UserError(
            f"The dataset's actions have {action_low.size} dimensions, "
            f"the action space of {env_id} is {box}."
        )
    if not (np.allclose(box.low, action_low) and np.allclose(box.high, action_high)):
        raise UserError(
            f"The dataset's action range is {action_low} to {action_high}, "
            f"that of {env_id} is {box.low} to {box.high}."
        )


def _print_mujoco_warning(message: str) -> None:
    if "deprecated" not in message:
        print(f"warning from MuJoCo: {message}", file=sys.stderr)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    sink = io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(sink),
        contextlib.redirect_stderr(sink),
    ):
        warnings.simplefilter("ignore")
        yield
