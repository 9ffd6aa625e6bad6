"""What was made faster computes what its plain form computes."""

import dataclasses
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ACTION_DIM, OBS_DIM, bst_of, doubled, f32, random_data

import iql_bst
import morse
import td3_bc
import td3_bst

# Adam makes whole steps of gradients that are rounding alone; float32 has those.
pytestmark = pytest.mark.usefixtures("float64")

NET = morse.Config(hidden_dims=(64, 64))
SIZES: dict[str, Any] = dict(hidden_dims=(64, 64), batch_size=64)
RETURNS = np.array([0.0, 1.0])  # of episodes
TD3_BC = td3_bc.resolve(td3_bc.Config(**SIZES), "locomotion")
TD3_BST = td3_bst.resolve(
    td3_bst.Config(morse_net=NET, **SIZES), "locomotion", random_data(0, 500), 100
)
IQL_BST = iql_bst.resolve(
    iql_bst.Config(morse_net=NET, **SIZES),
    "locomotion",
    iql_bst.Transition(*random_data(0, 500)),
    RETURNS,
    100,
)


def after_100(script: Any, config: Any, **plain: Any) -> Any:
    """The agent after 100 updates with these functions in the place of the script's."""
    net = morse.init(jax.random.key(1), OBS_DIM, ACTION_DIM, NET).params
    own = {
        td3_bc: (f32(2.5),),
        td3_bst: (bst_of(net, floor=0.1),),
        iql_bst: (bst_of(net, floor=0.1), f32(0.7)),
    }[script]
    agent = script.init(jax.random.key(0), OBS_DIM, ACTION_DIM, config)
    data, key, start = random_data(0, 500), jax.random.key(2), jnp.int32(0)
    agent, own, data = doubled((agent, own, data))
    with mock.patch.dict(vars(script), plain):
        train = jax.jit(partial(script.train, num_updates=100, config=config))
        return train(agent, *own, data, key, start)[0]


EVERY_SCRIPT = pytest.mark.parametrize(
    ("script", "config"),
    [(td3_bc, TD3_BC), (td3_bst, TD3_BST), (iql_bst, IQL_BST)],
    ids=["td3_bc", "td3_bst", "iql_bst"],
)


@EVERY_SCRIPT
def test_asking_one_critic_equals_asking_both(script, config):
    own_loss, q_values, asked = script.actor_loss, script.q_values, []

    def plain(actor: Any, critics: Any, *rest: Any) -> Any:
        """`actor_loss`, but both critics are evaluated and one is thrown away."""

        def both(some: Any, obs: Any, action: Any, config: Any) -> jax.Array:
            asked.append(len(jax.tree.leaves(some)[0]))
            return q_values(critics, obs, action, config)[: asked[-1]]

        with mock.patch.object(script, "q_values", both):
            return own_loss(actor, critics, *rest)

    check_parity(script, config, actor_loss=plain)
    assert set(asked) == {1}


@pytest.mark.parametrize(
    ("script", "config"),
    [(td3_bc, TD3_BC), (td3_bst, TD3_BST)],
    ids=["td3_bc", "td3_bst"],
)
def test_one_pass_of_targets_equals_one_for_each_batch(script, config):
    calls = []

    def plain(agent: Any, *args: Any) -> Any:
        """`update`, each batch drawn and its targets computed when it is used."""
        *own, data, key, step, config = args
        calls.append(step)
        batch, key_shown = data, key
        for i in range(config.policy_delay):
            keys = jax.random.split(jax.random.fold_in(key, step + i), 3)
            key_batch, key_noise, key_shown = keys
            batch = script.sample(data, key_batch, config.batch_size)
            target = script.td_target(agent, batch, key_noise, config)
            agent, _ = script.update_critics(agent, batch, target, config)
        shown = script.noisy(batch.obs, key_shown, config)
        agent, metrics = script.update_actor(agent, *own, batch, shown, config)
        return agent, {"omega_max": jnp.float32(0)} | metrics

    config = dataclasses.replace(config, obs_noise=0.1)
    check_parity(script, config, update=plain)
    assert len(calls) > 0


@EVERY_SCRIPT
def test_critics_of_repeated_inputs_equal_those_of_shared_ones(script, config):
    calls = []

    def plain(critics: Any, obs: Any, action: Any, config: Any) -> jax.Array:
        """`q_values`, the critics one after the other."""
        calls.append(obs.shape)
        apply: Any = script.Critic(config.hidden_dims, config.critic_layer_norm).apply
        num = len(jax.tree.leaves(critics)[0])
        each = [jax.tree.map(lambda x, i=i: x[i], critics) for i in range(num)]
        return jnp.stack([apply(one, obs, action) for one in each])

    check_parity(script, config, q_values=plain)
    assert len(calls) > 0


def check_parity(script: Any, config: Any, **plain: Any) -> None:
    """The script's own functions and the plain ones train the same networks."""
    fast, slow = after_100(script, config), after_100(script, config, **plain)
    begin = script.init(jax.random.key(0), OBS_DIM, ACTION_DIM, config)
    for name in ("actor", "critics"):
        mine, plainly, before = (
            np.concatenate([np.ravel(x) for x in jax.tree.leaves(getattr(agent, name))])
            for agent in (fast, slow, begin)
        )
        np.testing.assert_allclose(mine, plainly, rtol=0, atol=1e-5)
        assert np.abs(mine - before).max() > 1e-3
