"""Makes datasets that no default was chosen on.

    uv run results/collect.py Walker2d-v5
    uv run results/collect.py PointMaze_Medium-v3

By training TD3: `held/mujoco/walker2d/medium-replay-v0` is every step of that training,
the first 10,000 of them random; `held/mujoco/walker2d/medium-v0` is what its last
policy does with noise on its actions. In a PointMaze, `held/pointmaze/medium-v0`, by a
controller that drives from goal to goal as that of D4RL's sets does (recalled): PD
towards the next cell's centre, a third of its forces on the box's faces.

All are Minari datasets, in the folder that Minari uses (MINARI_DATASETS_PATH). The same
command makes the same ones on the same machine: it keeps to one core, where TD3 takes
some 20 minutes, because several round otherwise.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
from common import maze, tasks
from common.errors import UserError
from common.rollout import layers_of
from common.run import guarded

NUM_RANDOM = 10_000  # steps before the first update
EXPLORATION = 0.1  # std of the training's noise on actions
CHUNK = 100  # steps, and then as many updates
# TD3+BC with so much of Q that the distance to "the data" counts for nothing: TD3.
CONFIG = td3_bc.resolve(td3_bc.Config(), "locomotion")
ALPHA = 1e6
GAINS = (10.0, 1.0)  # of the maze's controller: force per m, per m/s
NEAR = 0.1  # m; a cell's centre is reached

Layers = tuple[tuple[np.ndarray, np.ndarray], ...]  # (weight (in, out), bias (out,))


@dataclass(frozen=True)
class Options:
    """What to make."""

    env: tyro.conf.Positional[str]  # Gymnasium's name; its actions lie in [-1, 1]
    num_steps: int = 250_000  # of the training, and of the replay
    num_medium: int = 200_000  # of the last policy, or of the maze's controller
    noise: float | None = None  # std on their actions; unset: 0.2, in a maze 0.5
    seed: int = 0  # others are in the names: held/mujoco/walker2d-1/medium-v0

    def __post_init__(self) -> None:
        if self.num_steps % CHUNK or self.num_steps <= NUM_RANDOM:
            raise ValueError(
                f"num_steps must be a multiple of {CHUNK} above {NUM_RANDOM}, "
                f"got {self.num_steps}"
            )
        if self.num_medium < 1:
            raise ValueError(f"num_medium must be above 0, got {self.num_medium}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if self.noise is not None and not 0 <= self.noise < float("inf"):
            raise ValueError(f"noise must not be negative, got {self.noise}")


class Step(NamedTuple):
    """One step in the environment."""

    obs: Any  # (S,), in a maze a dict of such
    action: np.ndarray  # (A,) in [-1, 1]
    reward: float
    next_obs: Any  # as `obs`
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


def step(env: gym.Env, obs: Any, action: np.ndarray) -> Step:
    """One step; the action is clipped to the box, as float32."""
    action = np.clip(action, -1, 1).astype(np.float32)
    next_obs, reward, terminal, cut, _ = env.step(action)
    return Step(obs, action, float(reward), next_obs, terminal, cut)


def roll_out(env: gym.Env, layers: Layers, options: Options) -> list[Step]:
    """The policy with noise, whole episodes until `num_medium` steps are there."""
    rng, steps = np.random.default_rng(options.seed + 1), []
    sd = 0.2 if options.noise is None else options.noise
    while len(steps) < options.num_medium:
        obs, _ = env.reset(seed=int(rng.integers(1 << 30)))
        while True:
            noise = sd * rng.normal(size=env.action_space.shape)
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
            seen = (*(s.obs for s in own), one.next_obs)
            yield EpisodeBuffer(
                observations=jax.tree.map(lambda *x: np.stack(x), *seen),
                actions=np.stack([s.action for s in own]),  # pyright: ignore[reportArgumentType]
                rewards=[s.reward for s in own],
                terminations=[s.terminal for s in own],
                truncations=[s.cut or (s is steps[-1] and not s.terminal) for s in own],
            )
            own = []


# =========================================================================== A maze


def to_goal(planner: maze.Planner, xy: np.ndarray, goal: np.ndarray) -> list[Any]:
    """The points to drive to: centres of the cells between, then the goal."""
    cell, last = planner.cell(xy), planner.cell(goal)
    steps = maze.count_steps(planner.maze.maze_map, last)[cell]
    centres = planner.path(cell, last)  # from this cell on, or the one behind it
    return [*centres[len(centres) - steps : -1], goal]


def drives(env: gym.Env, options: Options) -> list[Step]:
    """Drives from goal to goal until `num_medium` steps are there; cut at each goal.

    As in D4RL's sets (recalled) the environment then moves the goal and goes on.
    """
    planner = maze.Planner(env.get_wrapper_attr("maze"))
    rng, steps = np.random.default_rng(options.seed), []
    sd = 0.5 if options.noise is None else options.noise
    obs, _ = env.reset(seed=options.seed)
    ahead: list[Any] = []
    while len(steps) < options.num_medium:
        xy, velocity = obs["achieved_goal"], obs["observation"][2:]
        ahead = ahead or to_goal(planner, xy, env.get_wrapper_attr("goal"))
        while len(ahead) > 1 and np.linalg.norm(ahead[0] - xy) < NEAR:
            del ahead[0]
        force = np.clip(GAINS[0] * (ahead[0] - xy) - GAINS[1] * velocity, -1, 1)
        one = step(env, obs, force + sd * rng.normal(size=2))
        steps.append(one._replace(cut=one.reward > 0))
        obs = one.next_obs
        if one.reward > 0:
            ahead = []
    return steps


# ============================================================================= Main


def make(name: str, **options: Any) -> gym.Env:
    """The environment; UserError if there is none."""
    tasks.register()
    try:
        return gym.make(name, **options)
    except gym.error.Error as error:
        raise UserError(f"no environment {name}: {error}") from None


def make_env(name: str) -> gym.Env:
    """The environment to train in; UserError if its spaces are others."""
    env = make(name)
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


def write(
    dataset_id: str,
    env: gym.Env,
    steps: Sequence[Step],
    algorithm: str = "TD3",
    eval_env: gym.Env | None = None,
) -> None:
    """The dataset, and a line about it; unless told, `env` evaluates as well."""
    made = minari.create_dataset_from_buffers(
        dataset_id,
        list(episodes(steps)),
        env=env,
        eval_env=eval_env or env,
        algorithm_name=algorithm,
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


def collect_maze(options: Options, dataset_id: str) -> None:
    """Drives, and writes; policies are evaluated by the environment as registered."""
    eval_env = make(options.env, disable_env_checker=True)
    if not tasks.is_sparse_maze(tasks.find_spec(options.env)):
        raise UserError(f"{options.env} rewards other steps than those at the goal")
    about = {"continuing_task": True, "reset_target": True, "max_episode_steps": 10**6}
    env = make(options.env, disable_env_checker=True, **about)
    write(dataset_id, env, drives(env, options), "controller", eval_env)


def main() -> None:
    options = tyro.cli(Options, description=(__doc__ or "").split("\n\n")[0])
    agent = options.env.rsplit("/")[-1].rsplit("-v")[0].lower()
    agent += f"-{options.seed}" if options.seed else ""
    is_maze = agent.startswith("pointmaze_")
    kinds = ("medium-replay", "medium")
    ids = [f"held/mujoco/{agent}/{kind}-v0" for kind in kinds]
    if is_maze:
        ids = [f"held/{agent.replace('_', '/')}-v0"]
    for dataset_id in ids:
        if (path := get_dataset_path(dataset_id)).exists():
            raise UserError(f"{path} is there already; remove it to make it again")
    if is_maze:
        collect_maze(options, ids[0])
        return
    env = make_env(options.env)
    keep_to_one_core()
    replay, layers = explore(env, options)
    write(ids[0], env, replay)
    write(ids[1], env, roll_out(env, layers, options))


if __name__ == "__main__":
    guarded(main)
