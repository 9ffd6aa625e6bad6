"""Tiny networks, data and programs for the tests of the algorithm."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import morse
import td3_bst
from td3_bst import AgentState, Config, Supervisor, Transition

OBS_DIM, ACTION_DIM = 3, 2  # of everything random below
SMALL = Config(
    mu=0.5,
    scale=1.0,
    supervisor_gradient=True,
    q_weight=1.0,
    discount=0.9,
    reward_scale=1.0,
    reward_shift=0.0,
    obs_noise=0.0,
    polyak=0.005,
    normalize_obs=False,
    critic_layer_norm=False,
    omega_cap=0.0,  # the paper's omega
    hidden_dims=(8, 8),
    actor_learning_rate=3e-4,
    batch_size=16,
    morse_net=morse.Config(hidden_dims=(8, 8)),
)

init = jax.jit(td3_bst.init, static_argnums=(1, 2, 3))
morse_init = jax.jit(morse.init, static_argnums=(1, 2, 3))


@partial(jax.jit, static_argnames="config")
def actor_loss(
    actor: Any, critics: Any, bst: Any, batch: Any, config: Config
) -> tuple[jax.Array, Any]:
    """TD3-BST's, where the actor is shown the states as they are."""
    return td3_bst.actor_loss(actor, critics, bst, batch, batch.obs, config)


@partial(jax.jit, static_argnames="config")
def update_critics(agent: Any, batch: Any, key: Any, config: Config) -> tuple[Any, Any]:
    """TD3-BST's, towards the targets of `batch` with noise from `key`."""
    target = td3_bst.td_target(agent, batch, key, config)
    return td3_bst.update_critics(agent, batch, target, config)


actor_grad = jax.jit(jax.grad(actor_loss, has_aux=True), static_argnames="config")
update = jax.jit(td3_bst.update, static_argnames="config")
update_actor = jax.jit(td3_bst.update_actor, static_argnames="config")
train = jax.jit(td3_bst.train, static_argnames=("num_updates", "config"))


def f32(values: Any) -> jax.Array:
    return jnp.asarray(values, jnp.float32)


def doubled(tree: Any) -> Any:
    """Its float32 leaves in float64, which `jax.enable_x64` must allow."""
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float64 if x.dtype == jnp.float32 else x.dtype),
        tree,
    )


# Two states far from each other, twice each: the spread of their actions is .2.
FOUR = np.array([[0.0], [0.1], [9.0], [9.1]])
SPREAD = np.array([[0.0], [0.2], [1.0], [0.8]]) * np.sqrt([2.0] * 5)


def logged(action: np.ndarray, terminal: float) -> Any:
    """`action` in FOUR; the last transition ends its task where `terminal` is 1."""
    columns: Any = FOUR, action, np.zeros(4), FOUR, np.array([0, 0, 0, terminal])
    return Transition(*columns)


def walked(action: np.ndarray, num_falls: int) -> Any:
    """`logged` 500 times over: of 2,000 transitions so many are falls."""
    data = jax.tree.map(lambda x: np.repeat(x, 500, axis=0), logged(action, 0.0))
    data.terminal[:num_falls] = 1
    return data


def net(*layers: tuple[Any, Any]) -> dict[str, Any]:
    """{Dense_i: kernel (in, out), bias (out,)} from one pair per layer."""
    return {
        f"Dense_{i}": {"kernel": f32(kernel), "bias": f32(bias)}
        for i, (kernel, bias) in enumerate(layers)
    }


def critic_net(obs_weight: float, action_weight: list[float], constant: float) -> Any:
    """Q(s, a) = obs_weight s + action_weight a + constant."""
    kernel = [[obs_weight], *[[w] for w in action_weight]]
    return net((kernel, [10]), ([[1]], [constant - 10]))


def twins(first: Any, second: Any) -> Any:
    """Two critics along a new leading axis, as `AgentState.critics`."""
    stacked = jax.tree.map(lambda *x: jnp.stack(x), first, second)
    return {"params": stacked}


def bst_of(
    params: Any, scale: float = 1.0, mu: float = 0.5, floor: float = 0.0
) -> Supervisor:
    return Supervisor(params, f32(scale), f32(mu), f32(floor))


def random_data(seed: int, num: int) -> Transition:
    """Transitions of noise, every fourth of them terminal."""
    rng = np.random.default_rng(seed)
    return Transition(
        obs=f32(rng.normal(size=(num, OBS_DIM))),
        action=f32(rng.uniform(-0.9, 0.9, (num, ACTION_DIM))),
        reward=f32(rng.normal(size=num)),
        next_obs=f32(rng.normal(size=(num, OBS_DIM))),
        terminal=f32(np.arange(num) % 4 == 0),
    )


def random_agent(seed: int, config: Config = SMALL) -> tuple[AgentState, Supervisor]:
    """Networks and targets that all differ, and an unfitted Morse network."""
    key_agent, key_target, key_morse = jax.random.split(jax.random.key(seed), 3)
    shape = dataclasses.replace(SMALL, hidden_dims=config.hidden_dims)  # one compile
    agent = init(key_agent, OBS_DIM, ACTION_DIM, shape)
    other = init(key_target, OBS_DIM, ACTION_DIM, shape)
    agent = agent._replace(
        target_actor=other.target_actor, target_critics=other.target_critics
    )
    state = morse_init(key_morse, OBS_DIM, ACTION_DIM, config.morse_net)
    return agent, bst_of(state.params)


def hundred_updates(key: jax.Array, data: Transition, morse_params: Any) -> AgentState:
    """One seed from its key: a fresh agent, trained."""
    key_init, key_train = jax.random.split(key)
    agent = td3_bst.init(key_init, OBS_DIM, ACTION_DIM, SMALL)
    bst, start = bst_of(morse_params), jnp.int32(0)
    return td3_bst.train(agent, bst, data, key_train, start, 100, SMALL)[0]


def assert_same(first: Any, second: Any, tolerance: float = 0.0) -> None:
    """Two trees are equal, bit for bit or to an absolute and relative tolerance."""
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def assert_changed(first: Any, second: Any) -> None:
    """Every leaf of the one differs from the other's."""
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert not np.array_equal(x, y)


def adam_steps(adam: Any, num: int) -> np.ndarray:
    """The first steps of one parameter whose gradient is always 1."""
    grad = jnp.ones(())

    def step(state: Any, _: Any) -> Any:
        moved, state = adam.update(grad, state)
        return state, moved

    return np.asarray(jax.lax.scan(step, adam.init(grad), None, num)[1])
