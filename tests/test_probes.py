"""Tiny datasets with known answers: four vmapped seeds, their median judged."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import iql_bst
import morse
import td3_bc
import td3_bst
from td3_bst import Config, Params, Supervisor, Transition

SEEDS = np.arange(4)
NUM = 1000  # transitions in each dataset: one observation and one action wide
PROBE = Config(
    supervisor_gradient=True,
    mu=0.1,
    q_weight=1.0,
    obs_noise=0.0,
    discount=0.9,
    critic_layer_norm=False,
    hidden_dims=(32, 32),
    actor_learning_rate=1e-3,
    actor_decay_updates=0,
    critic_learning_rate=3e-3,
    batch_size=64,
    polyak=0.1,
    morse_net=morse.Config(hidden_dims=(64, 64), learning_rate=2e-3),
)


@pytest.fixture(scope="module")
def keys() -> jax.Array:
    return jax.vmap(jax.random.key)(SEEDS)


CHUNK = 200  # updates of a compiled program


def in_chunks(program: Any, num_updates: int, agent: Any) -> tuple[Any, Any]:
    """`num_updates` by calls of program(agent, start); the last one's metrics."""
    metrics = {}
    for start in range(0, num_updates, CHUNK):
        agent, metrics = program(agent, jnp.int32(start))
    return agent, metrics


@jax.jit
def fresh(keys) -> td3_bst.AgentState:
    """Agents of TD3-BST, which are TD3+BC's."""
    return jax.vmap(lambda key: td3_bst.init(key, 1, 1, PROBE))(keys)


@jax.jit
def chunk(agent, keys, data: Transition, morse_params: Params, scale, mu, start):
    def one_seed(agent, key, params):
        bst = Supervisor(params, scale, mu, f32(0.0))
        return td3_bst.train(agent, bst, data, key, start, CHUNK, PROBE)

    return jax.vmap(one_seed)(agent, keys, morse_params)


def train(keys, data: Transition, morse_params: Params, scale, mu, num_updates=2000):
    """Trains fresh agents, one per key, of one program for all the probes."""
    return in_chunks(
        lambda agent, start: chunk(agent, keys, data, morse_params, scale, mu, start),
        num_updates,
        fresh(keys),
    )


@jax.jit
def q_of(agent, obs, action):
    """The first critic's Q of each seed, (seed, B)."""
    q = partial(td3_bst.q_values, config=PROBE)
    return jax.vmap(q, (0, None, None))(agent.critics, obs, action)[:, 0]


@jax.jit
def actions_of(agent, obs):
    """Each seed's pi(s), (seed, B)."""
    policy = partial(td3_bst.policy, config=PROBE)
    return jax.vmap(policy, (0, None))(agent.actor, obs)[..., 0]


@partial(jax.jit, static_argnames="num_updates")
def fit_morse(keys, data: Transition, scale, num_updates=1500):
    def one_seed(key):
        key_init, key_train = jax.random.split(key)
        state = morse.init(key_init, 1, 1, PROBE.morse_net)
        start, config = jnp.int32(0), PROBE.morse_net
        args = state, data.obs, data.action, key_train, start, num_updates
        return morse.train(*args, scale, config)[0].params

    return jax.vmap(one_seed)(keys)


@jax.jit
def certainty_of(morse_params, obs, action, scale):
    """Each seed's M(s, a) for its own actions (seed, B)."""
    certainty = jax.vmap(morse.certainty, (0, None, 0, None))
    return certainty(morse_params, obs, action[..., None], scale)


def f32(values) -> jax.Array:
    return jnp.asarray(values, jnp.float32)


def transitions(action, reward, obs=None, next_obs=None, terminal=1.0) -> Transition:
    """NUM transitions from numbers or (NUM,) arrays; unset observations are noise."""
    noise = np.random.default_rng(1).uniform(-1, 1, NUM)
    obs = noise if obs is None else obs
    next_obs = obs if next_obs is None else next_obs
    each = np.ones(NUM)
    return Transition(
        obs=f32(obs * each)[:, None],
        action=f32(action * each)[:, None],
        reward=f32(reward * each),
        next_obs=f32(next_obs * each)[:, None],
        terminal=f32(terminal * each),
    )


@pytest.fixture(scope="module")
def unfitted(keys: jax.Array) -> Params:
    """Any Morse network will do where lam = 0: M = exp(0) = 1, so omega = 0."""
    return jax.vmap(lambda key: morse.init(key, 1, 1, PROBE.morse_net).params)(keys)


NO_PULL = f32(0.0)  # lam
MU = f32(0.1)
UNIFORM = np.random.default_rng(2).uniform(-1, 1, NUM)  # actions
POINTS = f32(np.linspace(-0.9, 0.9, 7))[:, None]  # observations, or actions


def test_a_last_reward_is_its_value(keys: jax.Array, unfitted: Params):
    # r = .7 and terminal: Q = .7. Bootstrapped, it would grow to .7 / (1 - .9) = 7.
    data = transitions(UNIFORM, reward=0.7)
    agent, _ = train(keys, data, unfitted, NO_PULL, MU)
    q = np.median(q_of(agent, POINTS, POINTS), axis=0)
    assert q == pytest.approx(np.full(7, 0.7), abs=0.02)


def test_a_reward_without_end_is_worth_ten(keys: jax.Array, unfitted: Params):
    # r = 1 for ever, a time-out being no end: Q = 1 / (1 - .9) = 10.
    data = transitions(UNIFORM, reward=1.0, terminal=0.0)
    agent, _ = train(keys, data, unfitted, NO_PULL, MU)
    q = np.median(q_of(agent, POINTS, POINTS), axis=0)
    assert q == pytest.approx(np.full(7, 10.0), rel=0.03)


def test_a_later_reward_is_discounted(keys: jax.Array, unfitted: Params):
    # From s = -1 without reward to s = 1, from there with r = 1 to the end:
    # Q(1, a) = 1, Q(-1, a) = .9.
    first = np.arange(NUM) % 2 == 0
    obs = np.where(first, -1.0, 1.0)
    data = transitions(
        UNIFORM, reward=~first * 1.0, obs=obs, next_obs=1.0, terminal=~first * 1.0
    )
    agent, _ = train(keys, data, unfitted, NO_PULL, MU)
    for place, value in ((-1.0, 0.9), (1.0, 1.0)):
        q = np.median(q_of(agent, jnp.full((7, 1), place), POINTS), axis=0)
        assert q == pytest.approx(np.full(7, value), abs=0.03)


def test_the_better_of_two_modes(keys: jax.Array):
    # Actions N(+-.5, .1^2), half each; the upper ones are worth 1, the lower ones 0.
    # Cloning would give the mean, 0, which nobody did. In distribution is where
    # p / u = .5 * 3.99 exp(-(a - .5)^2 / .02) / .5 >= 1: |a - .5| <= .166.
    upper = np.arange(NUM) % 2 == 0
    noise = np.random.default_rng(3).normal(0, 0.1, NUM)
    data = transitions(np.where(upper, 0.5, -0.5) + noise, reward=upper * 1.0)
    scale = f32(2.0)
    morse_params = fit_morse(keys, data, scale)
    agent, _ = train(keys, data, morse_params, scale, f32(0.5))
    action = actions_of(agent, POINTS)
    assert np.abs(np.median(action, axis=0) - 0.5).max() < 0.2
    certainty = np.median(certainty_of(morse_params, POINTS, action, scale), axis=0)
    assert certainty.min() > 0.8


def test_a_better_action_outside_the_data(keys: jax.Array):
    # Actions N(0, .1^2) and r = 1 + a, so Q goes on rising outside the data, whose
    # support ends where p / u = 3.99 exp(-a^2 / .02) / .5 = 1: at a = .204.
    action = np.random.default_rng(4).normal(0, 0.1, NUM)
    data, scale = transitions(action, reward=1 + action), f32(2.0)
    morse_params = fit_morse(keys, data, scale)

    agent, metrics = train(keys, data, morse_params, scale, MU)
    inside = actions_of(agent, POINTS)
    certainty = np.median(certainty_of(morse_params, POINTS, inside, scale), axis=0)
    assert certainty.min() > 0.8
    middle = np.median(inside, axis=0)
    assert middle.min() > 0.1  # better than the data's mean, 0
    assert middle.max() < 0.25

    # The same with M = 1 everywhere is plain TD3, which follows Q out of the data.
    agent, metrics = train(keys, data, morse_params, NO_PULL, MU)
    outside = actions_of(agent, POINTS)
    assert np.median(outside, axis=0).min() > 0.9
    certainty = np.median(certainty_of(morse_params, POINTS, outside, scale), axis=0)
    assert certainty.max() < 0.01
    np.testing.assert_array_equal(metrics["omega_max"], np.zeros(4))


# ============================================================================= TD3+BC

TD3_BC = td3_bc.Config(
    **{
        field.name: getattr(PROBE, field.name)
        for field in dataclasses.fields(td3_bc.Config)
        if field.name != "alpha"
    }
)


@jax.jit
def chunk_td3_bc(agent, keys, data: Any, alpha, start):
    def one_seed(agent, key):
        return td3_bc.train(agent, alpha, data, key, start, CHUNK, TD3_BC)

    return jax.vmap(one_seed)(agent, keys)


def train_td3_bc(keys, data: Any, alpha: float, num_updates=2000):
    """As `train`, from the same keys."""
    agent = td3_bc.AgentState(*fresh(keys))
    return in_chunks(
        lambda agent, start: chunk_td3_bc(agent, keys, data, f32(alpha), start),
        num_updates,
        agent,
    )


@pytest.mark.parametrize(("alpha", "best"), [(0.0, 0.0), (0.5, 0.207)])
def test_td3_bc_weighs_q_against_the_data(keys: jax.Array, alpha: float, best: float):
    # Actions N(0, .1^2), r = 1 + a, so with Q = 1 + pi and Z_Q its mean the loss is
    # least where 2 pi = alpha / (1 + pi): at (sqrt(1 + 2 alpha) - 1) / 2.
    action = np.random.default_rng(4).normal(0, 0.1, NUM)
    data = transitions(action, reward=1 + action)
    agent, _ = train_td3_bc(keys, data, alpha)
    chosen = np.median(actions_of(agent, POINTS), axis=0)
    assert chosen == pytest.approx(np.full(7, best), abs=0.04)


def nowhere_certain(keys: jax.Array) -> Params:
    """Morse networks with f(s, a) = 1000, so that M = exp(-5e5 lam^2) = 0."""

    def one_seed(key):
        params = morse.init(key, 1, 1, PROBE.morse_net).params
        zeros = jax.tree.map(jnp.zeros_like, params)
        zeros["Dense_2"]["bias"] += 1000.0
        return zeros

    return jax.vmap(one_seed)(keys)


def test_certain_nowhere_is_td3_bc(keys: jax.Array):
    # omega = e^(1 / mu) - 1 = w = 1.7, below the cap, everywhere: L = w ||pi - a||^2 -
    # Q / Z_Q is w times TD3+BC's with alpha = 1 / w (A = 1), and Adam does not see a
    # factor.
    data = random_bandit()
    mu = 1.0
    args = (keys, data, nowhere_certain(keys), f32(1.0), f32(mu))
    bst, metrics = train(*args, num_updates=CHUNK)
    bc, _ = train_td3_bc(keys, data, 1 / np.expm1(1 / mu), num_updates=CHUNK)
    assert metrics["certainty"] == pytest.approx(np.zeros(4), abs=1e-6)
    np.testing.assert_allclose(
        actions_of(bst, POINTS), actions_of(bc, POINTS), atol=1e-3
    )
    assert np.ptp(actions_of(bst, POINTS), axis=0).min() > 1e-3  # seeds are not alike


def test_certain_everywhere_is_td3_with_any_amount_of_q(keys: jax.Array, unfitted):
    # omega = 0 leaves -Q / Z_Q: TD3, and TD3+BC in the limit of a large alpha.
    data = random_bandit()
    args = (keys, data, unfitted, NO_PULL, MU)
    bst, metrics = train(*args, num_updates=CHUNK)
    bc, _ = train_td3_bc(keys, data, 1e5, num_updates=CHUNK)
    np.testing.assert_array_equal(metrics["omega"], np.zeros(4))
    np.testing.assert_allclose(
        actions_of(bst, POINTS), actions_of(bc, POINTS), atol=1e-3
    )


def random_bandit() -> Transition:
    rng = np.random.default_rng(6)
    return transitions(rng.uniform(-0.5, 0.5, NUM), reward=rng.normal(0, 1, NUM))


# ================================================================================ IQL

IQL = iql_bst.Config(
    supervisor_gradient=True,
    q_weight=1.0,
    beta=1.0,
    mu=0.5,
    discount=0.9,
    polyak=0.1,
    critic_layer_norm=False,
    hidden_dims=(32, 32),
    actor_learning_rate=1e-3,
    actor_decay_updates=0,
    critic_learning_rate=3e-3,
    value_learning_rate=3e-3,
    batch_size=64,
    morse_net=PROBE.morse_net,
)
AWR = dataclasses.replace(IQL, policy_step="awr")  # its beta is one of those below


@partial(jax.jit, static_argnames="config")
def chunk_iql(agent, keys, data: Any, morse_params, expectile, start, config):
    def one_seed(agent, key, params):
        bst = iql_bst.Supervisor(params, f32(2.0), f32(config.mu), f32(0.0))
        return iql_bst.train(agent, bst, expectile, data, key, start, CHUNK, config)

    return jax.vmap(one_seed)(agent, keys, morse_params)


@partial(jax.jit, static_argnames="config")
def fresh_iql(keys, config: iql_bst.Config) -> iql_bst.AgentState:
    return jax.vmap(lambda key: iql_bst.init(key, 1, 1, config))(keys)


def train_iql(keys, data: Any, morse_params, config: iql_bst.Config, expectile=0.7):
    """2000 updates of fresh agents, one per key."""
    args = keys, data, morse_params, f32(expectile)
    return in_chunks(
        lambda agent, start: chunk_iql(agent, *args, start, config),
        2000,
        fresh_iql(keys, config),
    )


@jax.jit
def values_of(agent, obs):
    """Each seed's V(s), (seed, B)."""
    value = partial(iql_bst.state_values, config=IQL)
    return jax.vmap(value, (0, None))(agent.value, obs)


ORIGIN = jnp.zeros((1, 1))  # the bandits' only observation


def two_actions(share: float) -> Transition:
    """A bandit: a = .5 pays 1 and has this share of the data, a = -.5 pays 0."""
    better = np.random.default_rng(7).permutation(NUM) < share * NUM
    action = np.where(better, 0.5, -0.5)
    action = action + np.random.default_rng(8).normal(0, 0.1, NUM)
    return transitions(action, reward=better * 1.0, obs=0.0)


@pytest.mark.parametrize("tau", [0.5, 0.9, 0.99])
def test_the_value_goes_to_the_best_action_as_tau_goes_to_one(
    keys: jax.Array, unfitted: Params, tau: float
):
    # Least p tau (1 - v)^2 + (1 - p) (1 - tau) v^2, p = .25 the better action's share:
    # v = p tau / (p tau + (1 - p) (1 - tau)) = .25, .75, .971: to 1, not the mean.
    agent, _ = train_iql(keys, two_actions(0.25), unfitted, AWR, tau)
    expected = 0.25 * tau / (0.25 * tau + 0.75 * (1 - tau))
    value = np.median(values_of(agent, ORIGIN))
    assert value == pytest.approx(expected, abs=0.04)


@pytest.mark.parametrize(("beta", "mode"), [(0.0, -0.25), (1.0, -0.025), (10.0, 0.5)])
def test_awr_with_a_large_beta_picks_the_better_action(
    keys: jax.Array, unfitted: Params, beta: float, mode: float
):
    # The likeliest Gaussian has the weighted mean of a: the weights' ratio is e^beta to
    # 1, so .5 (.25 e^beta - .75) / (.25 e^beta + .75); beta = 0 clones the mean. (With
    # beta = 10 the weight of the better one is e^(10 (1 - v)), v = .4375, clipped.)
    config = dataclasses.replace(AWR, beta=beta)
    agent, metrics = train_iql(keys, two_actions(0.25), unfitted, config)
    assert np.median(actions_of(agent, ORIGIN)) == pytest.approx(mode, abs=0.05)
    if beta == 0:
        assert metrics["weight"] == pytest.approx(np.ones(4), abs=1e-6)


def test_iql_bst_picks_the_better_mode(keys: jax.Array):
    # As above, half of the data each: Q alone chooses, and M keeps it to the data.
    data, scale = two_actions(0.5), f32(2.0)
    morse_params = fit_morse(keys, data, scale)
    agent, _ = train_iql(keys, data, morse_params, IQL)
    action = actions_of(agent, ORIGIN)
    assert np.median(action) == pytest.approx(0.5, abs=0.2)
    assert np.median(certainty_of(morse_params, ORIGIN, action, scale)) > 0.8


def test_iql_never_asks_for_the_value_of_an_action_that_is_not_in_the_data(
    keys: jax.Array, unfitted: Params
):
    # r = 1 for ever is worth 1 / (1 - .9) = 10 whatever the actor does, even where
    # omega = 0 and it leaves the data for good.
    data = transitions(UNIFORM * 0.1, reward=1.0, terminal=0.0)
    agent, _ = train_iql(keys, data, unfitted, IQL)
    value = np.median(values_of(agent, POINTS), axis=0)
    assert value == pytest.approx(np.full(7, 10.0), rel=0.03)
