"""Every dataset as one kind of arrays: Minari, D4RL, or a file of one's own."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import d4rl, minari_sets, tasks
from common.errors import UserError
from common.tasks import Task
from common.transitions import (
    Transitions,
    cached,
    fingerprint,
)

GENERATED = "td3-bst/"  # namespace of the datasets that this project generates
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


def load(source: str, eval_map: str = "auto", best_fraction: float = 1.0) -> Dataset:
    """Loads a dataset, from the user's cache if it has been read before.

    Args:
        source: a Minari id (local, else downloaded), a D4RL name, the path of an
            `.hdf5` or `.npz` file, or several of them joined by `+`.
        eval_map: which of a Minari dataset's environments to evaluate in:
            "collection", "metadata" or "auto" (see `tasks.choose_task`).
        best_fraction: see `best`.

    Raises:
        UserError: anything that the user has to change, in one sentence.
    """
    if eval_map not in tasks.EVAL_MAPS:
        choices = ", ".join(tasks.EVAL_MAPS)
        raise UserError(f"--eval-map is one of {choices}, not {eval_map!r}.")
    names = names_in(source)
    if not all(name.strip() for name in names):
        raise UserError(f"--dataset {source!r} names nothing: {EXPECTED}.")
    parts = [_load_one(name.strip(), eval_map) for name in names]
    whole = parts[0] if len(parts) == 1 else _join(source, parts)
    return best(whole, best_fraction)


def names_in(source: str) -> list[str]:
    """The sources that `source` joins by `+`; a file may have one in its name."""
    return [source] if os.path.isfile(source) else source.split("+")


def best(dataset: Dataset, fraction: float) -> Dataset:
    """The episodes of highest return, in their order in the dataset.

    Args:
        fraction: of the episodes, in (0, 1], rounded down to at least one; of equal
            returns the earlier episode is better.
    """
    if fraction == 1.0:
        return dataset
    returns = dataset.episode_returns
    count = max(1, int(round(fraction * len(returns), 6)))  # .29 of 100 is 28.99..
    chosen = np.argsort(-returns, kind="stable")[:count]
    keep = np.isin(dataset.episode, chosen)
    _, episode = np.unique(dataset.episode[keep], return_inverse=True)
    names = ("obs", "action", "reward", "next_obs", "terminal")
    arrays = {name: getattr(dataset, name)[keep] for name in names}
    arrays["episode"] = episode.astype(np.int32)
    box = dict(action_low=dataset.action_low, action_high=dataset.action_high)
    digest = fingerprint(Transitions(**arrays, **box, obs_keys=(), warnings=()))
    return dataclasses.replace(dataset, **arrays, fingerprint=digest)


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
    data = minari_sets.open_folder(folder, name)
    about = data.storage.metadata
    eval_spec = minari_sets.eval_spec_of(about)
    spec = data.env_spec or eval_spec
    minari_sets.check_action_space(name, data.action_space)
    obs_keys = minari_sets.choose_obs_keys(name, data.observation_space, spec)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    arrays, digest = cached(files, lambda: minari_sets.read(data, name, spec, obs_keys))
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
    if Path(name).suffix.lower() in d4rl.SUFFIXES:
        return _load_file(Path(name), name, eval_map)
    if name in d4rl.URLS:
        return _load_file(d4rl.fetch(name), name, eval_map)
    if not minari_sets.ID.fullmatch(name):
        raise UserError(f"--dataset {name!r} is not understood: {EXPECTED}.")
    return load_minari_folder(minari_sets.find(name), name, eval_map)


def _load_file(path: Path, name: str, eval_map: str) -> Dataset:
    if not os.path.isfile(path):
        raise UserError(f"There is no file {path}.")
    known = d4rl.name_of(path)
    arrays, digest = cached([path], lambda: d4rl.read(path, name, known))
    task, why = d4rl.choose_task(known, eval_map)
    env_id = tasks.env_id_of(task) if task else d4rl.agent_of(known)
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
    return Dataset(
        name=name,
        **arrays.columns(),
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
    return Dataset(
        name=source,
        **arrays.columns(),
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
    maps = [
        json.loads(d.task.env_spec)["kwargs"] if d.task else {} for d in (first, other)
    ]
    if maps[0].get("maze_map") != maps[1].get("maze_map"):
        raise UserError(f"{first.name} and {other.name} cannot be joined: other mazes.")
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
