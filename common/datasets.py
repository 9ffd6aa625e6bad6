"""Every dataset as one kind of arrays: Minari, D4RL, or a file of one's own."""

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
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
from gymnasium.envs.registration import EnvSpec
from minari.storage import get_dataset_path
from tqdm import tqdm

from common import d4rl, tasks
from common.errors import UserError
from common.tasks import Task
from common.transitions import (
    Transitions,
    cached,
    fingerprint,
    finish,
    until_success,
)

MINARI_ID = re.compile(r"[\w-]+(/[\w-]+)*-v\d+")
GENERATED = "td3-bst/"  # namespace of the datasets that this project generates
EMBEDDED = "td3-bst/pointmaze/default-v0"  # what is trained on if nothing is named
EXPECTED = (
    "expected a Minari id (mujoco/hopper/medium-v0), a D4RL name (hopper-medium-v2), "
    "the path of an .hdf5 or .npz file, or several of them joined by +"
)


@dataclass(frozen=True)
class Dataset:
    """N transitions of E episodes, ready to train on, and how to evaluate.

    S and A are the observation's and the action's dimension. Rewards are the
    dataset's own.
    """

    name: str  # as given by --dataset
    obs: np.ndarray  # (N, S) float32
    action: np.ndarray  # (N, A) float32 in [-1, 1], rescaled from the box below
    reward: np.ndarray  # (N,) float32
    next_obs: np.ndarray  # (N, S) float32
    terminal: np.ndarray  # (N,) bool; a time-out is not terminal
    episode: np.ndarray  # (N,) int32, index of the transition's episode
    action_low: np.ndarray  # (A,) float32, the environment's own range
    action_high: np.ndarray  # (A,) float32
    domain: str  # "locomotion" | "pointmaze" | "antmaze" | "other"
    env_id: str  # of the environment that the data come from, "" if unknown
    task: Task | None  # how to evaluate; None: not at all
    why_no_task: str  # one sentence if task is None, else ""
    fingerprint: str  # SHA-256 in hex over the arrays

    @property
    def num_transitions(self) -> int:
        """N."""
        return len(self.reward)

    @property
    def obs_dim(self) -> int:
        """S."""
        return self.obs.shape[1]

    @property
    def action_dim(self) -> int:
        """A."""
        return self.action.shape[1]

    @property
    def episode_returns(self) -> np.ndarray:
        """Undiscounted sum of the kept rewards of every episode, (E,) float64."""
        return np.bincount(self.episode, weights=self.reward)

    @property
    def episode_lengths(self) -> np.ndarray:
        """Number of kept transitions of every episode, (E,) int64."""
        return np.bincount(self.episode)


def load(source: str, eval_map: str = "auto") -> Dataset:
    """Loads a dataset, from the user's cache if it has been read before.

    Args:
        source: a Minari id (local, else downloaded), a D4RL name, the path of an
            `.hdf5` or `.npz` file, or several of them joined by `+`.
        eval_map: which of a Minari dataset's environments to evaluate in:
            "collection", "metadata" or "auto" (see `tasks.choose_task`).

    Raises:
        UserError: anything that the user has to change, in one sentence.
    """
    if eval_map not in tasks.EVAL_MAPS:
        choices = ", ".join(tasks.EVAL_MAPS)
        raise UserError(f"--eval-map is one of {choices}, not {eval_map!r}.")
    names = [source] if os.path.isfile(source) else source.split("+")
    if not all(name.strip() for name in names):
        raise UserError(f"--dataset {source!r} names nothing: {EXPECTED}.")
    parts = [_load_one(name.strip(), eval_map) for name in names]
    return parts[0] if len(parts) == 1 else _join(source, parts)


def load_minari_folder(path: Path, name: str, eval_map: str = "auto") -> Dataset:
    """Loads the Minari dataset in a folder (that which holds `data/`).

    Args:
        path: the folder; it need not lie where Minari keeps its datasets.
        name: what to call the dataset.
        eval_map: as in `load`.

    Raises:
        UserError: the folder holds no Minari dataset of vectors.
    """
    folder = Path(path) / "data"
    data = _open_minari(folder, name)
    about = data.storage.metadata
    eval_spec = _eval_spec(about)
    spec = data.env_spec or eval_spec
    _check_action_space(name, data.action_space)
    obs_keys = _obs_keys(name, data.observation_space, spec)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    arrays, digest = cached(files, lambda: _read_minari(data, name, spec, obs_keys))
    own_scores = (about.get("ref_min_score"), about.get("ref_max_score"))
    task, why = tasks.choose_task(
        data.env_spec, eval_spec, eval_map, arrays.obs_keys, own_scores
    )
    env_id = spec.id if spec else ""
    domain = tasks.agent_and_domain(env_id)[1]
    return _dataset(name, arrays, digest, domain, env_id, task, why)


def _load_one(name: str, eval_map: str) -> Dataset:
    if name.startswith(GENERATED):
        from common import maze

        return load_minari_folder(maze.ensure(name), name, eval_map)
    if Path(name).suffix in d4rl.SUFFIXES:
        return _load_file(Path(name), name, eval_map)
    if name in d4rl.URLS:
        return _load_file(d4rl.fetch(name), name, eval_map)
    if not MINARI_ID.fullmatch(name):
        raise UserError(f"--dataset {name!r} is not understood: {EXPECTED}.")
    return load_minari_folder(_find_minari(name), name, eval_map)


def _load_file(path: Path, name: str, eval_map: str) -> Dataset:
    if not os.path.isfile(path):
        raise UserError(f"There is no file {path}.")
    known = d4rl.name_of(path)
    arrays, digest = cached([path], lambda: d4rl.read(path, name, known))
    task, why = d4rl.choose_task(known, eval_map)
    env_id = tasks.env_id_of(task) if task else known
    domain = d4rl.domain_of(known)
    return _dataset(name, arrays, digest, domain, env_id, task, why)


def _dataset(
    name: str,
    arrays: Transitions,
    digest: str,
    domain: str,
    env_id: str,
    task: Task | None,
    why: str,
) -> Dataset:
    """Joins arrays and task, once the environment has been seen to fit and to run."""
    if task is not None:
        why = tasks.check_task(
            task, arrays.obs.shape[1], arrays.action_low, arrays.action_high
        )
    columns = arrays._asdict()
    columns.pop("obs_keys")
    return Dataset(
        name=name,
        **columns,
        domain=domain,
        env_id=env_id,
        task=None if why else task,
        why_no_task=why,
        fingerprint=digest,
    )


def _join(source: str, parts: list[Dataset]) -> Dataset:
    """Datasets of one environment end to end; the first one's task."""
    first = parts[0]
    for part in parts[1:]:
        _check_alike(first, part)
    starts = np.cumsum([0, *(part.episode[-1] + 1 for part in parts[:-1])])
    episode = [p.episode + start for p, start in zip(parts, starts, strict=True)]
    arrays = Transitions(
        obs=np.concatenate([part.obs for part in parts]),
        action=np.concatenate([part.action for part in parts]),
        reward=np.concatenate([part.reward for part in parts]),
        next_obs=np.concatenate([part.next_obs for part in parts]),
        terminal=np.concatenate([part.terminal for part in parts]),
        episode=np.concatenate(episode).astype(np.int32),
        action_low=first.action_low,
        action_high=first.action_high,
        obs_keys=(),
    )
    columns = arrays._asdict()
    columns.pop("obs_keys")
    return Dataset(
        name=source,
        **columns,
        domain=first.domain,
        env_id=first.env_id,
        task=first.task,
        why_no_task=first.why_no_task,
        fingerprint=fingerprint(arrays),
    )


def _check_alike(first: Dataset, other: Dataset) -> None:
    if first.env_id != other.env_id:
        raise UserError(
            f"{first.name} and {other.name} cannot be joined: their environments are "
            f"{first.env_id or 'unknown'} and {other.env_id or 'unknown'}."
        )
    if (first.obs_dim, first.action_dim) != (other.obs_dim, other.action_dim):
        raise UserError(
            f"{first.name} and {other.name} cannot be joined: observations have "
            f"{first.obs_dim} and {other.obs_dim} dimensions, actions "
            f"{first.action_dim} and {other.action_dim}."
        )
    same_low = np.array_equal(first.action_low, other.action_low)
    if not (same_low and np.array_equal(first.action_high, other.action_high)):
        raise UserError(
            f"{first.name} and {other.name} cannot be joined: their action ranges "
            f"differ."
        )


def _find_minari(name: str) -> Path:
    """The folder of a Minari dataset, downloaded if it is not there."""
    try:
        path = get_dataset_path(name)
        if not (path / "data").is_dir():
            _download_minari(name, path)
    except OSError as error:
        raise UserError(f"Minari's dataset folder cannot be used: {error}") from None
    if not (path / "data").is_dir():
        raise UserError(
            f"{path} holds no complete dataset; remove it to download it again."
        )
    return path


def _download_minari(name: str, path: Path) -> None:
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


def _open_minari(folder: Path, name: str) -> minari.MinariDataset:
    try:
        return minari.MinariDataset(folder)
    except Exception as error:  # Minari raises whatever damaged metadata lead to
        reason = f"{type(error).__name__}: {error}".strip()
        raise UserError(
            f"{name}: no readable Minari dataset in {folder} ({reason})."
        ) from None


def _eval_spec(about: dict[str, Any]) -> EnvSpec | None:
    """The evaluation environment of Minari's metadata, written by any gymnasium."""
    if not about.get("eval_env_spec"):
        return None
    known = {field.name for field in fields(EnvSpec) if field.init}
    parsed = json.loads(about["eval_env_spec"])  # Minari has just parsed it as well
    return EnvSpec.from_json(
        json.dumps({key: value for key, value in parsed.items() if key in known})
    )


def _check_action_space(name: str, space: gym.Space) -> None:
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


def _obs_keys(name: str, space: gym.Space, spec: EnvSpec | None) -> tuple[str, ...]:
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


def _read_minari(
    data: minari.MinariDataset,
    name: str,
    spec: EnvSpec | None,
    obs_keys: tuple[str, ...],
) -> Transitions:
    """One pass over the episodes; see `load_minari_folder`."""
    maze = spec is not None and tasks.agent_and_domain(spec.id)[1].endswith("maze")
    goal_dim = data.observation_space["desired_goal"].shape[0] if maze else 0
    columns: dict[str, list[np.ndarray]] = {}
    for number, episode in enumerate(_episodes(data, name)):
        rows = _episode_rows(name, number, episode, obs_keys, goal_dim)
        for key, array in rows.items():
            columns.setdefault(key, []).append(array)
    if not columns:
        raise UserError(f"{name} is empty: it holds no episode.")
    rows = {key: np.concatenate(arrays) for key, arrays in columns.items()}
    if spec is not None and tasks.agent_and_domain(spec.id)[1] == "antmaze":
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
    obs = tasks.join_obs(obs_keys, episode.observations)
    action, reward = np.asarray(episode.actions), np.asarray(episode.rewards)
    terminal = np.asarray(episode.terminations)
    lengths = (len(obs) - 1, len(action), len(reward), len(terminal))
    if len(set(lengths)) > 1:
        raise UserError(
            f"{name}: episode {number} has {len(obs)} observations, {len(action)} "
            f"actions, {len(reward)} rewards and {len(terminal)} terminations; "
            f"expected T + 1, T, T and T."
        )
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
