"""What was made faster computes what its plain form computes."""

from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ACTION_DIM, OBS_DIM, bst_of, f32, random_data

import iql_bst
import morse
import td3_bc
import td3_bst

NET = morse.Config(hidden_dims=(64, 64))
SIZES: dict[str, Any] = dict(hidden_dims=(64, 64), batch_size=64)
RETURNS = np.array([0.0, 1.0])  # of episodes
TD3_BC = td3_bc.resolve(td3_bc.Config(**SIZES), "locomotion")
TD3_BST = td3_bst.resolve(
    td3_bst.Config(morse_net=NET, **SIZES), "locomotion", random_data(0, 500), 100
)
IQL_BST = iql_bst.resolve(
    iql_bst.Config(morse_net=NET, **SIZES), "locomotion", ACTION_DIM, RETURNS, 100
)


def after_100(script: Any, config: Any, actor_loss: Any) -> Any:
    """The agent after 100 updates whose actor descends `actor_loss`."""
    net = morse.init(jax.random.key(1), OBS_DIM, ACTION_DIM, NET).params
    own = {
        td3_bc: (f32(2.5),),
        td3_bst: (bst_of(net, floor=0.1),),
        iql_bst: (bst_of(net, floor=0.1), f32(0.7)),
    }[script]
    agent = script.init(jax.random.key(0), OBS_DIM, ACTION_DIM, config)
    data, key, start = random_data(0, 500), jax.random.key(2), jnp.int32(0)
    with mock.patch.object(script, "actor_loss", actor_loss):
        train = jax.jit(partial(script.train, num_updates=100, config=config))
        return train(agent, *own, data, key, start)[0]


@pytest.mark.parametrize(
    ("script", "config"),
    [(td3_bc, TD3_BC), (td3_bst, TD3_BST), (iql_bst, IQL_BST)],
    ids=["td3_bc", "td3_bst", "iql_bst"],
)
def test_asking_one_critic_equals_asking_both(script, config):
    own_loss, q_values, asked = script.actor_loss, script.q_values, []

    def plain(actor: Any, critics: Any, *rest: Any) -> Any:
        """`actor_loss`, but both critics are evaluated and one is thrown away."""

        def both(some: Any, obs: Any, action: Any, config: Any) -> jax.Array:
            asked.append(len(jax.tree.leaves(some)[0]))
            return q_values(critics, obs, action, config)[: asked[-1]]

        with mock.patch.object(script, "q_values", both):
            return own_loss(actor, critics, *rest)

    fast, slow = (after_100(script, config, loss) for loss in (own_loss, plain))
    assert set(asked) == {1}
    begin = script.init(jax.random.key(0), OBS_DIM, ACTION_DIM, config)
    for name in ("actor", "critics"):
        mine, plainly, before = (
            np.concatenate([np.ravel(x) for x in jax.tree.leaves(getattr(agent, name))])
            for agent in (fast, slow, begin)
        )
        np.testing.assert_allclose(mine, plainly, rtol=0, atol=1e-5)
        assert np.abs(mine - before).max() > 1e-3
