"""Evaluation: every seed's policy, in numpy, in the real environment.

A deterministic tanh policy is a list of layers; JAX is not needed to run or ship it.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from common.checkpoint import write_bytes, write_json
from common.errors import UserError
from common.tasks import Task, flatten_obs, make_env, normalized_score

MAX_ENVS = 10  # per seed, stepped together
SHARES = 3  # at least so many per process, as episodes differ in length
NOTHING = np.zeros(1, np.float32)  # an observation where there is none; any shape


@dataclass(frozen=True)
class NumpyPolicy:
    """K deterministic policies, one per seed: ReLU layers, tanh output, box rescaling.

    Attributes:
        layers: (weight (K, in, out), bias (K, out)) from input to output.
        obs_mean, obs_std: (S,); the network sees (obs - obs_mean) / obs_std.
        action_low, action_high: (A,) the environment's own range.
    """

    layers: tuple[tuple[np.ndarray, np.ndarray], ...]
    obs_mean: np.ndarray
    obs_std: np.ndarray
    action_low: np.ndarray
    action_high: np.ndarray

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        """Actions (K, E, A) in the environment's range for raw obs (K, E, S)."""
        x = (obs - self.obs_mean) / self.obs_std
        for weight, bias in self.layers[:-1]:
            x = np.maximum(x @ weight + bias[:, None], 0.0)
        weight, bias = self.layers[-1]
        return self.in_box(np.tanh(x @ weight + bias[:, None]))

    def only(self, k: int) -> "NumpyPolicy":
        """Policy k alone."""
        own = slice(k, k + 1)
        layers = tuple((weight[own], bias[own]) for weight, bias in self.layers)
        return dataclasses.replace(self, layers=layers)

    def in_box(self, action: np.ndarray) -> np.ndarray:
        """Actions (..., A) in [-1, 1] in the environment's range."""
        half = (self.action_high - self.action_low) / 2
        return np.clip(
            self.action_low + (action + 1.0) * half, self.action_low, self.action_high
        )


def layers_of(actor: Mapping[str, Any]) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """The Dense layers of a flax actor, in order; any leading seed axis is kept."""
    params = actor["params"]
    dense = [params[f"Dense_{i}"] for i in range(len(params)) if f"Dense_{i}" in params]
    return tuple((np.array(x["kernel"]), np.array(x["bias"])) for x in dense)


def export(
    folder: Path, policy: NumpyPolicy, labels: Sequence[str], about: dict
) -> None:
    """Writes `<label>.safetensors` per policy and `policy.json`: no time, no path."""
    for i, label in enumerate(labels):
        arrays = {
            "obs_mean": policy.obs_mean,
            "obs_std": policy.obs_std,
            "action_low": policy.action_low,
            "action_high": policy.action_high,
        }
        for n, (weight, bias) in enumerate(policy.layers):
            arrays |= {f"layer{n}.weight": weight[i], f"layer{n}.bias": bias[i]}
        arrays = {k: np.ascontiguousarray(v, np.float32) for k, v in arrays.items()}
        write_bytes(folder / f"{label}.safetensors", save(arrays))
    num_layers = len(policy.layers)
    about = {**about, "num_layers": num_layers}
    about |= {"hidden_activation": "relu", "output_activation": "tanh"}
    write_json(folder / "policy.json", about)


@dataclass(frozen=True)
class Evaluation:
    """What the episodes gave, (K, E) each; NaN where undefined or failed."""

    returns: np.ndarray
    lengths: np.ndarray
    success: np.ndarray
    scores: np.ndarray  # (K,) 0-100 scale
    failed: tuple[str, ...] = ()  # one sentence per episode that was left out

    def means(self, k: int) -> dict[str, float]:
        """Of policy k over the episodes that did not fail; NaN if all did."""
        means = {"return": _mean(self.returns[k]), "score": float(self.scores[k])}
        return means | {
            "success": _mean(self.success[k]),
            "length": _mean(self.lengths[k]),
        }


def _mean(values: np.ndarray) -> float:
    finite = values[~np.isnan(values)]
    return float(finite.mean()) if len(finite) else np.nan


class Evaluator:
    """Keeps the environments, made when first used; one thread at a time may `run`."""

    def __init__(self, task: Task, num_episodes: int, num_workers: int = 0) -> None:
        """Starts the processes, if any; from the main thread, for it sets variables.

        Args:
            num_episodes: per seed.
            num_workers: processes that share the episodes; 0: they are played here.
        """
        self.task, self.num_episodes, self.num_workers = task, num_episodes, num_workers
        self.width = min(num_episodes, MAX_ENVS)  # a seed's episodes played together
        self.envs: list[list[Any]] = []
        self.workers = self._started() if num_workers else None

    def _started(self) -> ProcessPoolExecutor:
        """The processes, each on one thread; they import and wait."""
        spawn = multiprocessing.get_context("spawn")
        about = (self.task, self.num_episodes)
        with environment(
            OMP_NUM_THREADS="1",
            # The run ends by os._exit, after which semaphores are found and told of.
            PYTHONWARNINGS="ignore::UserWarning:multiprocessing.resource_tracker",
        ):
            workers = ProcessPoolExecutor(self.num_workers, spawn, _start, about)
            for _ in range(self.num_workers):
                workers.submit(os.getpid)
        return workers

    def run(self, policy: NumpyPolicy, seeds: Sequence[int], step: int) -> Evaluation:
        """Plays `num_episodes` per seed; episode e of (seed, step) is reproducible.

        Raises:
            UserError: a process that plays was killed, and once more.
        """
        if self.workers is None:
            return self.play(policy, seeds, step, range(self.num_episodes))
        with contextlib.suppress(BrokenProcessPool):
            return self._shared(self.workers, policy, seeds, step)
        self.workers = self._started()
        try:
            return self._shared(self.workers, policy, seeds, step)
        except BrokenProcessPool as error:
            raise UserError(
                "the processes that play evaluation episodes do not start, or are "
                "killed (by the system, for want of memory?); go on with --resume"
            ) from error

    def _shared(
        self,
        workers: ProcessPoolExecutor,
        policy: NumpyPolicy,
        seeds: Sequence[int],
        step: int,
    ) -> Evaluation:
        """As `run`, in the processes."""
        share = len(seeds) * self.num_episodes // (SHARES * self.num_workers)
        share = max(1, min(share, self.width))
        episodes = range(self.num_episodes)
        blocks = [episodes[i : i + share] for i in episodes[::share]]
        parts = [
            [workers.submit(_play, policy.only(k), seed, step, x) for x in blocks]
            for k, seed in enumerate(seeds)
        ]
        played = [[part.result() for part in own] for own in parts]
        returns, lengths, success = (
            np.concatenate(
                [np.hstack([getattr(part, name) for part in own]) for own in played]
            )
            for name in ("returns", "lengths", "success")
        )
        failed = tuple(told for own in played for part in own for told in part.failed)
        return self._judged(returns, lengths, success, failed)

    def play(
        self,
        policy: NumpyPolicy,
        seeds: Sequence[int],
        step: int,
        episodes: Sequence[int],
    ) -> Evaluation:
        """Plays these episodes of every seed in this process.

        The policy always sees `width` rows, for products of other heights may round
        otherwise: an episode is the same whichever it is played with.
        """
        self.envs += [[] for _ in range(len(seeds) - len(self.envs))]
        for envs in self.envs[: len(seeds)]:
            lacking = min(len(episodes), self.width) - len(envs)
            envs += [make_env(self.task) for _ in range(lacking)]
        shape = (len(seeds), len(episodes))
        returns, lengths, success = (np.full(shape, np.nan) for _ in range(3))
        play = [
            [_Slot(env, self.task) for env in envs[: len(episodes)]]
            for envs in self.envs[: len(seeds)]
        ]
        waiting = [list(episodes)[::-1] for _ in seeds]
        failed: list[str] = []
        obs = np.zeros((len(seeds), self.width, len(policy.obs_mean)), np.float32)
        for k, slots in enumerate(play):
            for e, slot in enumerate(slots):
                obs[k, e] = slot.start(waiting[k].pop(), seeds[k], step)
        while any(slot.episode >= 0 for slots in play for slot in slots):
            action = policy(obs)
            for k, slots in enumerate(play):
                for e, slot in enumerate(slots):
                    if slot.episode < 0:
                        continue
                    obs[k, e], done = slot.step(action[k, e])
                    if not done:
                        continue
                    if slot.failure:
                        failed.append(f"seed {seeds[k]}: {slot.failure}; left out")
                    else:
                        at = (k, slot.episode - episodes[0])
                        returns[at], lengths[at] = slot.ret, slot.length
                        success[at] = slot.success
                    slot.episode = -1
                    if waiting[k]:
                        obs[k, e] = slot.start(waiting[k].pop(), seeds[k], step)
        for envs, slots in zip(self.envs, play, strict=False):
            envs[: len(slots)] = [slot.env for slot in slots]
        return self._judged(returns, lengths, success, tuple(failed))

    def _judged(
        self,
        returns: np.ndarray,
        lengths: np.ndarray,
        success: np.ndarray,
        failed: tuple[str, ...],
    ) -> Evaluation:
        scores = [
            normalized_score(self.task, _mean(r), _mean(s))
            for r, s in zip(returns, success, strict=True)
        ]
        return Evaluation(returns, lengths, success, np.array(scores), failed)

    def close(self) -> None:
        """Frees the simulators."""
        if self.workers:
            self.workers.shutdown()
        for envs in self.envs:
            for env in envs:
                env.close()


_OWN: list[Evaluator] = []  # a worker's


def _start(task: Task, num_episodes: int) -> None:
    """A worker's first act: it leaves the run's group, but ends with the run."""
    with contextlib.suppress(AttributeError):  # Windows has no sessions
        os.setsid()

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    _OWN.append(Evaluator(task, num_episodes))


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Variables for the processes started inside."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _play(
    policy: NumpyPolicy, seed: int, step: int, episodes: Sequence[int]
) -> Evaluation:
    """A worker's share of an evaluation."""
    return _OWN[0].play(policy, [seed], step, episodes)


class _Slot:
    """One environment and the episode that it is playing; episode -1: idle."""

    def __init__(self, env: Any, task: Task) -> None:
        self.env, self.task, self.episode = env, task, -1
        self.ret, self.length, self.success = 0.0, 0, np.nan
        self.reset_seed, self.failure = 0, ""

    def start(self, episode: int, seed: int, step: int) -> np.ndarray:
        """The episode's first observation; 0 if that fails, as the next step says."""
        self.episode, self.ret, self.length, self.failure = episode, 0.0, 0, ""
        self.success = 0.0 if self.task.ends_at_success else np.nan
        entropy = np.random.SeedSequence([seed, step, episode])
        self.reset_seed = int(entropy.generate_state(1)[0] >> 1)
        try:
            obs, _ = self.env.reset(seed=self.reset_seed)
            return self._finite(obs)
        except Exception as error:  # a stranger's code
            return self._fail(error)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, bool]:
        """The next observation and whether the episode is over, or has failed."""
        if self.failure:
            return NOTHING, True
        try:
            return self._step(action)
        except Exception as error:  # a stranger's code
            return self._fail(error), True

    def _step(self, action: np.ndarray) -> tuple[np.ndarray, bool]:
        space = self.env.action_space
        obs, reward, terminated, truncated, info = self.env.step(
            action.astype(space.dtype)
        )
        self.ret += float(reward)
        self.length += 1
        done = terminated or truncated or self.length >= self.task.horizon
        if self.task.ends_at_success:
            self.success = float(float(reward) > 0)
            done = done or self.success > 0
        elif "success" in info:  # Adroit: solved at any step
            self.success = float(bool(info["success"]) or self.success == 1.0)
        if not np.isfinite(self.ret):
            raise ValueError(f"the reward was {float(reward)}")
        return self._finite(obs), bool(done)

    def _finite(self, obs: Any) -> np.ndarray:
        flat = flatten_obs(self.task, obs)
        if not np.isfinite(flat).all():
            raise ValueError("an observation was not finite")
        return flat

    def _fail(self, error: Exception) -> np.ndarray:
        """Notes what happened and takes a new environment: this one may be broken."""
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        self.failure = (
            f"episode {self.episode} (reset seed {self.reset_seed}) failed after "
            f"{self.length} steps, {what}"
        )
        with contextlib.suppress(Exception):
            self.env.close()
        self.env = make_env(self.task)
        return NOTHING
