"""One update of TD3+BC and of IQL, in float64, against numpy to 1e-6."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    ACTION_DIM,
    OBS_DIM,
    SMALL,
    assert_same,
    bst_of,
    doubled,
    random_data,
)
from reference import (
    finite_differences,
    mlp,
    norm,
    numpy_actor_loss,
    numpy_adam,
    numpy_certainty,
    numpy_critic_loss,
    numpy_policy,
    numpy_q,
    numpy_target,
    to_numpy,
    warm_adam,
)

import iql_bst
import morse
import td3_bc

pytestmark = pytest.mark.usefixtures("float64")

KEY = jax.random.key(0)
OPTIONS: dict[str, Any] = dict(  # of both; steps large enough to be seen
    discount=0.9,
    polyak=0.25,
    critic_layer_norm=False,
    hidden_dims=(8, 8),
    actor_learning_rate=0.1,
    critic_learning_rate=0.2,
)
TD3_BC = td3_bc.Config(alpha=1.5, policy_noise=0.0, **OPTIONS)
IQL = iql_bst.Config(
    policy_step="awr",
    expectile=0.8,
    beta=2.0,
    weight_clip=3.0,
    value_learning_rate=0.3,
    actor_decay_updates=10,
    **OPTIONS,
)
IQL_BST = dataclasses.replace(
    IQL,
    policy_step="bst",
    q_weight=1.0,
    mu=0.5,
    supervisor_gradient=True,
    actor_decay_updates=0,
)


def noisy(tree: Any, seed: int) -> Any:
    """Every leaf moved, so that no bias and no log sigma is 0; targets differ."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + rng.normal(0, 0.3, x.shape), doubled(tree))


def warm_agent(script: Any, config: Any) -> Any:
    """Networks that all differ, with Adam's moments as after four steps."""
    agent = script.init(jax.random.key(2), OBS_DIM, ACTION_DIM, config)._asdict()
    for seed, name in enumerate(agent):
        if name.endswith("_opt"):
            agent[name] = warm_adam(doubled(agent[name]), seed)
        else:
            agent[name] = noisy(agent[name], seed)
    return script.AgentState(**agent)


def plain(agent: Any) -> Any:
    """The networks in numpy, without the optimisers."""
    return to_numpy(agent._replace(**{k: 0 for k in agent._fields if "_opt" in k}))


def check_step(
    loss: Callable[[Any], float],
    parameters: Any,
    opt_state: Any,
    rate: float,
    stepped: Any,
    metrics: Any,
    name: str,
) -> None:
    """The loss, its gradient's norm and the parameters after one Adam step."""
    grad = finite_differences(loss, parameters)
    expected = numpy_adam(parameters, grad, opt_state, rate)
    assert stepped["params"]["Dense_0"]["kernel"].dtype == jnp.float64
    assert_same(stepped, expected, tolerance=1e-6)
    value = float(metrics[f"{name}_loss"])
    assert value == pytest.approx(loss(parameters), rel=1e-6)
    grad_norm = float(metrics[f"{name}_grad_norm"])
    assert grad_norm == pytest.approx(norm(grad), rel=1e-6)


def check_targets(new: Any, old: Any, targets: Any) -> None:
    mixed = jax.tree.map(lambda x, y: 0.25 * x + 0.75 * y, new, old)
    assert_same(targets, mixed, tolerance=1e-6)


# ============================================================================= TD3+BC


@pytest.fixture
def td3bc():
    """TD3+BC's agent and batch, and the same in numpy."""
    agent, batch = warm_agent(td3_bc, TD3_BC), doubled(random_data(3, 16))
    return agent, td3_bc.Transition(*batch), plain(agent), to_numpy(batch)


def test_td3_bc_critic_step(td3bc):
    agent, batch, reference, rows = td3bc
    target = numpy_target(reference, rows, 0.9)
    y = td3_bc.td_target(agent, batch, KEY, TD3_BC)
    stepped, metrics = jax.jit(partial(td3_bc.update_critics, config=TD3_BC))(
        agent, batch, y
    )
    check_step(
        lambda critics: numpy_critic_loss(critics, rows, target),
        reference.critics,
        agent.critic_opt,
        0.2,
        stepped.critics,
        metrics,
        "critic",
    )


def test_td3_bc_actor_step(td3bc):
    # L_pi = mean[||pi - a||^2 / A - alpha Q_1 / Z_Q], Z_Q at the present actor.
    agent, batch, reference, rows = td3bc

    def q_of(actor: Any) -> np.ndarray:
        action = numpy_policy(actor, rows.obs)
        return numpy_q(reference.critics, rows.obs, action)[0]

    z_q = np.abs(q_of(reference.actor)).mean()

    def loss(actor: Any) -> float:
        error = ((numpy_policy(actor, rows.obs) - rows.action) ** 2).mean()
        return float(error - 1.5 * q_of(actor).mean() / z_q)

    stepped, metrics = jax.jit(partial(td3_bc.update_actor, config=TD3_BC))(
        agent, TD3_BC.alpha, batch, batch.obs
    )
    actor, opt = reference.actor, agent.actor_opt
    check_step(loss, actor, opt, 0.1, stepped.actor, metrics, "actor")
    check_targets(stepped.actor, agent.target_actor, stepped.target_actor)
    check_targets(agent.critics, agent.target_critics, stepped.target_critics)


# ================================================================================ IQL


def numpy_value(value: Any, obs: np.ndarray) -> np.ndarray:
    return mlp(value["params"], obs)[:, 0]


def layers(actor: Any) -> Any:
    """The actor without log sigma, as the shared reference takes it."""
    return {"params": {k: v for k, v in actor["params"].items() if k != "log_std"}}


def numpy_target_q(agent: Any, rows: Any) -> np.ndarray:
    return np.minimum(*numpy_q(agent.target_critics, rows.obs, rows.action))


def numpy_value_loss(value: Any, q: np.ndarray, rows: Any) -> float:
    u = q - numpy_value(value, rows.obs)
    assert np.abs(u).min() > 1e-4, "choose another seed"  # a kink of its own
    return float(np.mean(np.where(u > 0, 0.8, 0.2) * u**2))


def numpy_iql_target(value: Any, rows: Any) -> np.ndarray:
    next_v = numpy_value(value, rows.next_obs)
    return rows.reward + 0.9 * np.where(rows.terminal == 1, 0.0, next_v)


def numpy_weight(q: np.ndarray, value: Any, rows: Any) -> np.ndarray:
    return np.minimum(np.exp(2 * (q - numpy_value(value, rows.obs))), 3)


def numpy_awr_loss(actor: Any, weight: np.ndarray, rows: Any) -> float:
    sigma = np.exp(actor["params"]["log_std"])
    error = (rows.action - numpy_policy(layers(actor), rows.obs)) / sigma
    density = np.exp(-0.5 * error**2) / (sigma * math.sqrt(2 * math.pi))
    return float(-np.mean(weight * np.log(density.prod(axis=1))))


# After four of ten updates the actor's step size is .1 (1 + cos(.4 pi)) / 2 = .0655.
ACTOR_RATE = 0.1 * (1 + math.cos(0.4 * math.pi)) / 2


@pytest.fixture
def iql():
    """IQL's agent, its V amid the batch's Q', and batch; and the same in numpy."""
    agent, batch = warm_agent(iql_bst, IQL), doubled(random_data(3, 16))
    rows, networks = to_numpy(batch), plain(agent)
    q = numpy_target_q(networks, rows)
    middle = np.median(q - numpy_value(networks.value, rows.obs))
    agent.value["params"]["Dense_2"]["bias"] += middle
    return agent, iql_bst.Transition(*batch), plain(agent), to_numpy(batch)


def test_iql_value_step(iql):
    agent, batch, reference, rows = iql
    q = numpy_target_q(reference, rows)
    signs = np.sign(q - numpy_value(reference.value, rows.obs))
    assert len(set(signs)) == 2  # both branches are seen
    stepped, metrics = jax.jit(partial(iql_bst.update_value, config=IQL))(
        agent, batch, IQL.expectile
    )
    check_step(
        lambda value: numpy_value_loss(value, q, rows),
        reference.value,
        agent.value_opt,
        0.3,
        stepped.value,
        metrics,
        "value",
    )


def test_iql_critic_step(iql):
    agent, batch, reference, rows = iql
    target = numpy_iql_target(reference.value, rows)
    stepped, metrics = jax.jit(partial(iql_bst.update_critics, config=IQL))(
        agent, batch
    )
    check_step(
        lambda critics: numpy_critic_loss(critics, rows, target),
        reference.critics,
        agent.critic_opt,
        0.2,
        stepped.critics,
        metrics,
        "critic",
    )
    check_targets(stepped.critics, agent.target_critics, stepped.target_critics)


def test_iql_actor_step(iql):
    agent, batch, reference, rows = iql
    q = numpy_target_q(reference, rows)
    weight = numpy_weight(q, reference.value, rows)
    assert weight.max() == 3 > weight.min()  # some are clipped, some are not
    nobody: Any = None  # no supervisor
    stepped, metrics = jax.jit(partial(iql_bst.update_actor, config=IQL))(
        agent, nobody, batch, batch.obs
    )
    check_step(
        lambda actor: numpy_awr_loss(actor, weight, rows),
        reference.actor,
        agent.actor_opt,
        ACTOR_RATE,
        stepped.actor,
        metrics,
        "actor",
    )
    assert float(metrics["weight"]) == pytest.approx(weight.mean(), rel=1e-6)


def test_iql_update_takes_the_steps_in_order(iql):
    # V from the old targets; the actor's weights from the new V; Q from the new V.
    agent, _, reference, _ = iql
    data = iql_bst.Transition(*doubled(random_data(3, 50)))
    nobody: Any = None
    config = dataclasses.replace(IQL, batch_size=16)
    step = jax.jit(partial(iql_bst.update, config=config))
    stepped, _ = step(agent, nobody, IQL.expectile, data, KEY, jnp.int32(7))

    batch = iql_bst.sample(data, jax.random.fold_in(KEY, 7), 16)
    rows = to_numpy(batch)
    q = numpy_target_q(reference, rows)
    grad = finite_differences(
        lambda value: numpy_value_loss(value, q, rows), reference.value
    )
    value = numpy_adam(reference.value, grad, agent.value_opt, 0.3)
    weight = numpy_weight(q, value, rows)
    grad = finite_differences(
        lambda actor: numpy_awr_loss(actor, weight, rows), reference.actor
    )
    actor = numpy_adam(reference.actor, grad, agent.actor_opt, ACTOR_RATE)
    target = numpy_iql_target(value, rows)
    grad = finite_differences(
        lambda critics: numpy_critic_loss(critics, rows, target), reference.critics
    )
    critics = numpy_adam(reference.critics, grad, agent.critic_opt, 0.2)
    for name, expected in (("value", value), ("actor", actor), ("critics", critics)):
        assert_same(getattr(stepped, name), expected, tolerance=1e-6)
    check_targets(stepped.critics, agent.target_critics, stepped.target_critics)


def test_iql_bst_actor_step(iql):
    # TD3-BST's objective; log sigma has no part in it and keeps its place.
    agent, batch, reference, rows = iql
    adam, *rest = agent.actor_opt
    for moment in (adam.mu, adam.nu):  # or log sigma would go on by its momentum
        moment["params"]["log_std"] *= 0
    agent = agent._replace(actor_opt=(adam, *rest))
    net = morse.init(jax.random.key(5), OBS_DIM, ACTION_DIM, SMALL.morse_net).params
    bst = doubled(bst_of(net))
    supervisor = to_numpy(bst)
    actor = layers(reference.actor)
    action = numpy_policy(actor, rows.obs)
    z_q = np.abs(numpy_q(reference.critics, rows.obs, action)[0]).mean()
    loss = partial(
        numpy_actor_loss,
        critics=reference.critics,
        bst=supervisor,
        batch=rows,
        z_q=z_q,
    )
    stepped, metrics = jax.jit(partial(iql_bst.update_actor, config=IQL_BST))(
        agent, bst, batch, batch.obs
    )
    opt = (adam._replace(mu=layers(adam.mu), nu=layers(adam.nu)), *rest)
    check_step(loss, actor, opt, 0.1, layers(stepped.actor), metrics, "actor")
    np.testing.assert_array_equal(
        stepped.actor["params"]["log_std"], agent.actor["params"]["log_std"]
    )
    certainty = numpy_certainty(supervisor, rows.obs, action)
    assert float(metrics["certainty"]) == pytest.approx(certainty.mean(), rel=1e-6)
