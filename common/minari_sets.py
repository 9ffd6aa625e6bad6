"""Minari's datasets: finding, downloading and flattening them."""

import contextlib
import importlib.util
import json
import os
import re
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
from gymnasium.envs.registration import EnvSpec
from minari.storage import get_dataset_path
from tqdm import tqdm

from common import tasks
from common.errors import UserError
from common.transitions import Transitions, finish, until_success

ID = re.compile(r"[\w-]+(/[\w-]+)*-v\d+")


def find(name: str) -> Path:
    """The folder of a Minari dataset, downloaded if it is not there."""
    try:
        path = get_dataset_path(name)
        if not (path / "data").is_dir():
            _download(name, path)
    except OSError as error:
        raise UserError(f"Minari's dataset folder cannot be used: {error}") from None
    if not (path / "data").is_dir():
        raise UserError(
            f"{path} holds no complete dataset; remove it to download it again."
        )
    return path


def _download(name: str, path: Path) -> None:
    remote = os.environ.get("MINARI_REMOTE", "hf://")
    if remote.startswith("hf://"):
        _check_hugging_face(name, path)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            minari.download_dataset(name)
    except Exception as error:  # httpx's errors are no OSErrors
        reason = str(error).strip() or type(error).__name__
        raise UserError(
            f"{name} is not at {path}, and Minari could not download it: {reason}"
        ) from None


def _check_hugging_face(name: str, path: Path) -> None:
    """Fails within seconds where Minari's own attempts would take half a minute."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UserError(
            f"{name} is not at {path}, and downloading it needs huggingface_hub: "
            f'pip install "minari[hf]".'
        )
    from huggingface_hub import constants

    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=5).close()
    except urllib.error.HTTPError:
        pass  # it answered
    except OSError as error:
        reason = getattr(error, "reason", error)
        if not isinstance(reason, ssl.SSLError):  # httpx brings its own certificates
            raise UserError(
                f"{name} is not at {path}, and {constants.ENDPOINT} cannot be reached "
                f"to download it ({reason})."
            ) from None


def open_folder(folder: Path, name: str) -> minari.MinariDataset:
    """Opens the folder with `metadata.json`; a UserError if it cannot be read."""
    try:
        return minari.MinariDataset(folder)
    except Exception as error:  # Minari raises whatever damaged metadata lead to
        reason = f"{type(error).__name__}: {error}".strip()
        raise UserError(
            f"{name}: no readable Minari dataset in {folder} ({reason})."
        ) from None


def eval_spec_of(about: dict[str, Any]) -> EnvSpec | None:
    """The evaluation environment of Minari's metadata, written by any gymnasium."""
    if not about.get("eval_env_spec"):
        return None
    known = {field.name for field in fields(EnvSpec) if field.init}
    parsed = json.loads(about["eval_env_spec"])  # Minari has just parsed it as well
    return EnvSpec.from_json(
        json.dumps({key: value for key, value in parsed.items() if key in known})
    )


def check_action_space(name: str, space: gym.Space) -> None:
    """Refuses, with a UserError, actions other than continuous vectors."""
    if isinstance(space, gym.spaces.Box) and space.dtype.kind == "f":
        if len(space.shape) == 1 and space.shape[0] > 0:
            return
        raise UserError(
            f"{name}: actions have the shape {space.shape}, expected a vector."
        )
    discrete = isinstance(
        space, gym.spaces.Discrete | gym.spaces.MultiDiscrete | gym.spaces.MultiBinary
    )
    kind = "discrete" if discrete or isinstance(space, gym.spaces.Box) else "composite"
    raise UserError(
        f"{name}: actions are {kind} ({space}); only continuous vectors are supported."
    )


def choose_obs_keys(
    name: str, space: gym.Space, spec: EnvSpec | None
) -> tuple[str, ...]:
    """Which entries of a dict observation to join, in order; () for a Box."""
    if isinstance(space, gym.spaces.Box):
        _check_vector(name, "observations", space)
        return ()
    if not isinstance(space, gym.spaces.Dict):
        raise UserError(
            f"{name}: observations of the type {type(space).__name__} are not "
            f"supported, only vectors and dicts of vectors."
        )
    agent, domain = tasks.agent_and_domain(spec.id if spec else "")
    keys = tuple(space.spaces)
    if domain == "antmaze":
        keys = ("achieved_goal", "observation", "desired_goal")
    elif domain == "pointmaze":  # its observation repeats achieved_goal
        keys = ("observation", "desired_goal")
    elif agent == "kitchen":  # its goals never change
        keys = ("observation",)
    for key in keys:
        if key not in space.spaces:
            raise UserError(f"{name}: observations lack {key}.")
        _check_vector(name, f"observations' {key}", space[key])
    return keys


def _check_vector(name: str, label: str, space: gym.Space) -> None:
    if not isinstance(space, gym.spaces.Box):
        raise UserError(
            f"{name}: {label} are {type(space).__name__}, which is not supported."
        )
    if len(space.shape) > 1:
        raise UserError(
            f"{name}: {label} have the shape {space.shape}; images are not "
            f"supported, only vectors."
        )
    if len(space.shape) == 0 or space.shape[0] == 0:
        raise UserError(f"{name}: {label} have the shape {space.shape}.")


def read(
    data: minari.MinariDataset,
    name: str,
    spec: EnvSpec | None,
    obs_keys: tuple[str, ...],
) -> Transitions:
    """Reads all episodes in one pass.

    Where the reward of a maze is 1 at the goal, the first such row of an episode is
    terminal and its later rows are dropped; Minari itself records on and never
    terminates.

    Args:
        data: the dataset.
        name: what the user calls it, for messages.
        spec: the environment it was collected in, if known.
        obs_keys: see `choose_obs_keys`; AntMaze loses a goal that never varies.

    Raises:
        UserError: unreadable, empty, or arrays that do not fit.
    """
    domain = tasks.agent_and_domain(spec.id if spec else "")[1]
    goal_dim = 0
    if domain in ("pointmaze", "antmaze") and obs_keys:
        goal_dim = data.observation_space["desired_goal"].shape[0]
    columns: dict[str, list[np.ndarray]] = {}
    for number, episode in enumerate(_episodes(data, name)):
        rows = _episode_rows(name, number, episode, obs_keys, goal_dim)
        for key, array in rows.items():
            columns.setdefault(key, []).append(array)
    if not columns:
        raise UserError(f"{name} is empty: it holds no episode.")
    try:
        rows = {key: np.concatenate(arrays) for key, arrays in columns.items()}
    except ValueError as error:
        raise UserError(f"{name}: episodes differ in width ({error}).") from None
    if domain == "antmaze" and obs_keys:
        obs_keys = _drop_constant_goal(rows, obs_keys, goal_dim)
    keep = None
    if spec is not None and tasks.is_sparse_maze(spec):
        keep = until_success(rows["rewards"], rows["episodes"])
        rows["terminals"] = rows["terminals"] | (rows["rewards"] > 0)
    box = (data.action_space.low, data.action_space.high)
    return finish(name, rows, box, obs_keys, keep)


def _episodes(data: minari.MinariDataset, name: str) -> Iterator[Any]:
    """The dataset's episodes, with a progress bar where it takes over a second."""
    with tqdm(
        total=data.total_episodes, desc=f"reading {name}", unit="ep", delay=1.0
    ) as bar:
        try:
            for episode in data.iterate_episodes():
                yield episode
                bar.update()
        except UserError:
            raise
        except Exception as error:  # h5py's and Minari's, of any kind
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{name} cannot be read ({reason}).") from None


def _episode_rows(
    name: str, number: int, episode: Any, obs_keys: tuple[str, ...], goal_dim: int
) -> dict[str, np.ndarray]:
    """The T transitions of an episode, which has T + 1 observations."""
    try:
        obs = tasks.join_obs(obs_keys, episode.observations)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"{name}: the observations of episode {number} lack an entry or differ "
            f"in length ({error})."
        ) from None
    action, reward = np.asarray(episode.actions), np.asarray(episode.rewards)
    terminal = np.asarray(episode.terminations)
    _check_episode(name, number, obs, action, reward, terminal)
    if goal_dim and len(reward):
        # Where an environment moved its goal at the last episode's success, the
        # first observation still shows the goal before.
        obs[0, -goal_dim:] = obs[1, -goal_dim:]
    return {
        "observations": obs[:-1],
        "next_observations": obs[1:],
        "actions": action,
        "rewards": reward,
        "terminals": terminal.astype(bool),
        "episodes": np.full(len(reward), number),
    }


def _check_episode(
    name: str,
    number: int,
    obs: np.ndarray,
    action: np.ndarray,
    reward: np.ndarray,
    terminal: np.ndarray,
) -> None:
    arrays = (obs, action, reward, terminal)
    if any(array.dtype.kind not in "fiub" for array in arrays) or [
        array.ndim for array in arrays
    ] != [2, 2, 1, 1]:
        raise UserError(
            f"{name}: episode {number} has observations, actions, rewards and "
            f"terminations of the shapes {', '.join(str(a.shape) for a in arrays)} "
            f"and types {', '.join(str(a.dtype) for a in arrays)}; expected numbers, "
            f"(T + 1, S), (T, A), (T,) and (T,)."
        )
    if len({len(obs) - 1, len(action), len(reward), len(terminal)}) > 1:
        raise UserError(
            f"{name}: episode {number} has {len(obs)} observations, {len(action)} "
            f"actions, {len(reward)} rewards and {len(terminal)} terminations; "
            f"expected T + 1, T, T and T."
        )


def _drop_constant_goal(
    rows: dict[str, np.ndarray], obs_keys: tuple[str, ...], goal_dim: int
) -> tuple[str, ...]:
    """Drops the desired goal from `rows` if it never varies; returns the keys."""
    if not len(rows["rewards"]):
        return obs_keys
    goal = rows["observations"][:, -goal_dim:]
    if np.ptp(goal, axis=0).max() > 1e-6:
        return obs_keys
    for key in ("observations", "next_observations"):
        rows[key] = rows[key][:, :-goal_dim]
    return obs_keys[:-1]
