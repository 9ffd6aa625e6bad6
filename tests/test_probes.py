"""Tiny datasets with known answers: four vmapped seeds, their median judged."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import morse
import td3_bst
from td3_bst import Config, Params, Supervisor, Transition

SEEDS = np.arange(4)
NUM = 1000  # transitions in each dataset: one observation and one action wide
PROBE = Config(
    mu=0.1,
    discount=0.9,
    critic_layer_norm=False,
    hidden_dims=(32, 32),
    actor_learning_rate=1e-3,
    critic_learning_rate=3e-3,
    batch_size=64,
    polyak=0.02,
    morse_net=morse.Config(hidden_dims=(64, 64), learning_rate=2e-3),
)


@pytest.fixture(scope="module")
def keys() -> jax.Array:
    return jax.vmap(jax.random.key)(SEEDS)


@partial(jax.jit, static_argnames="num_updates")
def train(keys, data: Transition, morse_params: Params, scale, mu, num_updates=2000):
    """Trains fresh agents, one per key, of one program for all the probes."""

    def one_seed(key, params):
        key_init, key_train = jax.random.split(key)
        agent = td3_bst.init(key_init, 1, 1, PROBE)
        bst = Supervisor(params, scale, mu)
        start = jnp.int32(0)
        return td3_bst.train(agent, bst, data, key_train, start, num_updates, PROBE)

    return jax.vmap(one_seed)(keys, morse_params)


@jax.jit
def q_of(agent, obs, action):
    """The first critic's Q of each seed, (seed, B)."""
    q = partial(td3_bst.q_values, config=PROBE)
    return jax.vmap(q, (0, None, None))(agent.critics, obs, action)[:, 0]
