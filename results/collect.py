"""Makes two datasets that no default was chosen on, by training TD3 in an environment.

    uv run results/collect.py Walker2d-v5

`held/mujoco/walker2d/medium-replay-v0` is every step of that training, the first 10,000
of them random; `held/mujoco/walker2d/medium-v0` is what its last policy does with noise
on its actions. Both are Minari datasets, in the folder that Minari uses
(MINARI_DATASETS_PATH). The same command makes the same ones on the same machine: it
keeps to one core, where it takes some 20 minutes, because several round otherwise.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import jax
import jax.numpy as jnp
import minari
import numpy as np
import tyro
from gymnasium.spaces import Box, flatdim
from minari.data_collector import EpisodeBuffer
from minari.storage import get_dataset_path
from tqdm import tqdm

if __name__ == "__main__":  # a script finds its neighbours through the repository root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import td3_bc
from common.errors import UserError
from common.rollout import layers_of
from common.run import guarded

NUM_RANDOM = 10_000  # steps before the first update
EXPLORATION = 0.1  # std of the training's noise on actions
CHUNK = 100  # steps, and then as many updates
# TD3+BC with so much of Q that the distance to "the data" counts for nothing: TD3.
CONFIG = td3_bc.resolve(td3_bc.Config(), "locomotion")
ALPHA = 1e6

Layers = tuple[tuple[np.ndarray, np.ndarray], ...]  # (weight (in, out), bias (out,))


@dataclass(frozen=True)
class Options:
    """What to make."""

    env: tyro.conf.Positional[str]  # Gymnasium's name; its actions lie in [-1, 1]
    num_steps: int = 250_000  # of the training, and of the replay
    num_medium: int = 200_000  # steps of the last policy; its last episode ends after
    noise: float = 0.2  # std of the noise on its actions
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_steps % CHUNK or self.num_steps <= NUM_RANDOM:
            raise ValueError(
                f"num_steps must be a multiple of {CHUNK} above {NUM_RANDOM}, "
                f"got {self.num_steps}"
            )
        if self.num_medium < 1:
            raise ValueError(f"num_medium must be above 0, got {self.num_medium}")
        if not 0 <= self.noise < float("inf"):
            raise ValueError(f"noise must not be negative, got {self.noise}")


class Step(NamedTuple):
    """One step in the environment."""

    obs: np.ndarray  # (S,)
    action: np.ndarray  # (A,) in [-1, 1]
    reward: float
    next_obs: np.ndarray  # (S,)
    terminal: bool
    cut: bool  # by the clock


# ========================================================================== Training


def act(layers: Layers, obs: np.ndarray) -> np.ndarray:
    """pi(s), (A,), in the precision of `obs`."""
    x = obs
    for weight, bias in layers[:-1]:
        x = np.maximum(x @ weight + bias, 0)
    return np.tanh(x @ layers[-1][0] + layers[-1][1])


@partial(jax.jit, donate_argnums=(0, 1), static_argnames="num_updates")
def learn(
    agent: td3_bc.AgentState,
    replay: td3_bc.Transition,
    new: td3_bc.Transition,
    start: jax.Array,
    key: jax.Array,
    num_updates: int,
) -> tuple[td3_bc.AgentState, td3_bc.Transition]:
    """Puts a chunk's steps at `start` of the replay; then makes the updates."""
    replay = jax.tree.map(
        lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, start, 0), replay, new
    )
    size = (CONFIG.batch_size,)

    def pair(agent, key):
        batch, keys = new, jax.random.split(key, 4)
        for key_batch, key_noise in (keys[:2], keys[2:]):
            index = jax.random.randint(key_batch, size, 0, start + CHUNK)
            batch = jax.tree.map(lambda x, index=index: x[index], replay)
            target = td3_bc.td_target(agent, batch, key_noise, CONFIG)
            agent, _ = td3_bc.update_critics(agent, batch, target, CONFIG)
        alpha = jnp.float32(ALPHA)
        return td3_bc.update_actor(agent, alpha, batch, batch.obs, CONFIG)[0], None

    keys = jax.random.split(key, CHUNK // 2)[: num_updates // 2]
    agent, _ = jax.lax.scan(pair, agent, keys)
    return agent, replay


def explore(env: gym.Env, options: Options) -> tuple[list[Step], Layers]:
    """Trains TD3; returns its steps in order, and the actor's layers."""
    obs_dim, action_dim = (
        flatdim(x) for x in (env.observation_space, env.action_space)
    )
    agent = td3_bc.init(jax.random.key(options.seed), obs_dim, action_dim, CONFIG)
    shapes = ((obs_dim,), (action_dim,), (), (obs_dim,), ())
    rows = (jnp.zeros((options.num_steps, *shape)) for shape in shapes)
    replay = td3_bc.Transition(*rows)
    rng, key = np.random.default_rng(options.seed), jax.random.key(options.seed + 1)
    obs, _ = env.reset(seed=options.seed)
    layers, steps = layers_of(agent.actor), []
    for t in tqdm(range(options.num_steps), f"TD3 in {options.env}", unit=" steps"):
        is_random = t < NUM_RANDOM
        action = rng.uniform(-1, 1, action_dim) if is_random else act(layers, obs)
        noise = 0.0 if is_random else EXPLORATION * rng.normal(size=action_dim)
        steps.append(step(env, obs, action + noise))
        obs = steps[-1].next_obs
        if steps[-1].terminal or steps[-1].cut:
            obs, _ = env.reset()
        if (t + 1) % CHUNK == 0:
            columns = list(zip(*steps[-CHUNK:], strict=True))[:5]
            rows = (jnp.asarray(np.array(x, np.float32)) for x in columns)
            new = td3_bc.Transition(*rows)
            key, key_new = jax.random.split(key)
            num_updates = 0 if is_random else CHUNK
            start = jnp.int32(t + 1 - CHUNK)
            agent, replay = learn(agent, replay, new, start, key_new, num_updates)
            layers = layers_of(agent.actor)
    return steps, layers


# ======================================================================== Roll-outs


def step(env: gym.Env, obs: np.ndarray, action: np.ndarray) -> Step:
    """One step; the action is clipped to the box, as float32."""
    action = np.clip(action, -1, 1).astype(np.float32)
    next_obs, reward, terminal, cut, _ = env.step(action)
    return Step(obs, action, float(reward), next_obs, terminal, cut)


def roll_out(env: gym.Env, layers: Layers, options: Options) -> list[Step]:
    """The policy with noise, whole episodes until `num_medium` steps are there."""
    rng, steps = np.random.default_rng(options.seed + 1), []
    while len(steps) < options.num_medium:
        obs, _ = env.reset(seed=int(rng.integers(1 << 30)))
        while True:
            noise = options.noise * rng.normal(size=env.action_space.shape)
            steps.append(step(env, obs, act(layers, obs) + noise))
            obs = steps[-1].next_obs
            if steps[-1].terminal or steps[-1].cut:
                break
    return steps


def episodes(steps: Sequence[Step]) -> Iterator[EpisodeBuffer]:
    """The steps' episodes; the last is cut where the steps end."""
    own: list[Step] = []
    for one in steps:
        own.append(one)
        if one.terminal or one.cut or one is steps[-1]:
            obs = np.stack([*(s.obs for s in own), one.next_obs])
            yield EpisodeBuffer(
                observations=obs,  # pyright: ignore[reportArgumentType]
                actions=np.stack([s.action for s in own]),  # pyright: ignore[reportArgumentType]
                rewards=[s.reward for s in own],
                terminations=[s.terminal for s in own],
                truncations=[s.cut or (s is steps[-1] and not s.terminal) for s in own],
            )
            own = []


# ============================================================================= Main


def make_env(name: str) -> gym.Env:
    """The environment; UserError if there is none or its actions are others."""
    try:
        env = gym.make(name)
    except gym.error.Error as error:
        raise UserError(f"no environment {name}: {error}") from None
    obs, space = env.observation_space, env.action_space
    if not (
        isinstance(obs, Box)
        and len(obs.shape) == 1
        and isinstance(space, Box)
        and (space.low == -1).all()
        and (space.high == 1).all()
    ):
        raise UserError(
            f"{name} must have a vector of observations and actions in [-1, 1], "
            f"got {obs} and {space}"
        )
    return env


def write(dataset_id: str, env: gym.Env, steps: Sequence[Step]) -> None:
    """The dataset, and a line about it."""
    made = minari.create_dataset_from_buffers(
        dataset_id,
        list(episodes(steps)),
        env=env,
        eval_env=env,
        algorithm_name="TD3",
        author="td3-bst",
        author_email="none",
        code_permalink="results/collect.py",
        description=__doc__,
    )
    mean = sum(one.reward for one in steps) / made.total_episodes
    print(f"{dataset_id}: {made.total_episodes} episodes, mean return {mean:.1f}")


def keep_to_one_core() -> None:
    """From now on, and if JAX's threads are not there yet; where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def main() -> None:
    options = tyro.cli(Options, description=(__doc__ or "").split("\n\n")[0])
    agent = options.env.rsplit("/")[-1].rsplit("-v")[0].lower()
    ids = [f"held/mujoco/{agent}/{kind}-v0" for kind in ("medium-replay", "medium")]
    for dataset_id in ids:
        if (path := get_dataset_path(dataset_id)).exists():
            raise UserError(f"{path} is there already; remove it to make it again")
    env = make_env(options.env)
    keep_to_one_core()
    replay, layers = explore(env, options)
    write(ids[0], env, replay)
    write(ids[1], env, roll_out(env, layers, options))


if __name__ == "__main__":
    guarded(main)
