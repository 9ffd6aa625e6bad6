"""Tiny networks, data and groups of seeds for the tests of the algorithm."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import morse
import td3_bst
from td3_bst import AgentState, Config, Supervisor, Transition

SMALL = Config(
    mu=0.5,
    scale=1.0,
    discount=0.9,
    reward_scale=1.0,
    reward_shift=0.0,
    normalize_obs=False,
    critic_layer_norm=False,
    hidden_dims=(8, 8),
    batch_size=16,
    morse_net=morse.Config(hidden_dims=(8, 8)),
)


def net(*layers: tuple[Any, Any]) -> dict[str, Any]:
    """{Dense_i: kernel (in, out), bias (out,)} from one pair of lists per layer."""
    return {
        f"Dense_{i}": {
            "kernel": jnp.asarray(kernel, jnp.float32),
            "bias": jnp.asarray(bias, jnp.float32),
        }
        for i, (kernel, bias) in enumerate(layers)
    }


def twins(first: Any, second: Any) -> Any:
    """The parameters of two critics along a new leading axis."""
    return jax.tree.map(lambda *x: jnp.stack(x), first, second)


def supervisor_of(params: Any, scale: float = 1.0, mu: float = 0.5) -> Supervisor:
    return Supervisor(params, jnp.float32(scale), jnp.float32(mu))


def random_data(seed: int, num: int, obs_dim: int = 3, action_dim: int = 2):
    """Transitions of noise, a quarter of them terminal."""
    rng = np.random.default_rng(seed)
    return Transition(
        obs=jnp.asarray(rng.normal(size=(num, obs_dim)), jnp.float32),
        action=jnp.asarray(rng.uniform(-0.9, 0.9, (num, action_dim)), jnp.float32),
        reward=jnp.asarray(rng.normal(size=num), jnp.float32),
        next_obs=jnp.asarray(rng.normal(size=(num, obs_dim)), jnp.float32),
        terminal=jnp.asarray(np.arange(num) % 4 == 0, jnp.float32),
    )


def random_agent(seed: int, config: Config = SMALL) -> tuple[AgentState, Supervisor]:
    """Fresh networks whose targets differ, and an unfitted Morse network."""
    key = jax.random.key(seed)
    key_agent, key_target, key_morse = jax.random.split(key, 3)
    agent = td3_bst.init(key_agent, 3, 2, config)
    other = td3_bst.init(key_target, 3, 2, config)
    agent = agent._replace(
        target_actor=other.target_actor, target_critics=other.target_critics
    )
    return agent, supervisor_of(morse.init(key_morse, 3, 2, config.morse_net).params)


def group_program(config: Config = SMALL, num_updates: int = 100):
    """100 updates of a fresh agent on `random_data`, for one seed's key."""
    _, bst = random_agent(0, config)
    data = random_data(0, 200)

    def one_seed(key: jax.Array) -> AgentState:
        key_init, key_train = jax.random.split(key)
        agent = td3_bst.init(key_init, 3, 2, config)
        start = jnp.int32(0)
        run = partial(td3_bst.train, num_updates=num_updates, config=config)
        return run(agent, bst, data, key_train, start)[0]

    return one_seed
