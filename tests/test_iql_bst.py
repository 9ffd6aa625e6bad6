"""IQL's equations against numbers worked out by hand, and its properties."""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    ACTION_DIM,
    OBS_DIM,
    SPREAD,
    adam_steps,
    assert_changed,
    assert_same,
    bst_of,
    critic_net,
    f32,
    logged,
    morse_init,
    net,
    random_data,
    twins,
    walked,
)

import iql_bst
import morse
import td3_bst
from iql_bst import AgentState, Config, Supervisor, Transition

SMALL = Config(
    policy_step="bst",
    expectile=0.7,
    beta=2.0,
    obs_noise=0.0,
    q_weight=1.0,
    mu=0.5,
    scale=1.0,
    supervisor_gradient=True,
    discount=0.9,
    reward_scale=1.0,
    reward_shift=0.0,
    polyak=0.25,
    normalize_obs=False,
    critic_layer_norm=False,
    hidden_dims=(8, 8),
    actor_learning_rate=0.01,  # steps large enough to be seen
    actor_decay_updates=0,
    critic_learning_rate=0.02,
    value_learning_rate=0.03,
    batch_size=16,
    morse_net=morse.Config(hidden_dims=(8, 8)),
)
AWR = dataclasses.replace(SMALL, policy_step="awr", actor_decay_updates=20)
# Networks by hand have one observation and one hidden unit, kept in ReLU's linear half
# by a bias of 10 that the output's bias takes off again.
HAND = dataclasses.replace(AWR, hidden_dims=(1,))
KEY = jax.random.key(0)
TAU = 0.7

init = jax.jit(iql_bst.init, static_argnums=(1, 2, 3))
awr_grad = jax.jit(jax.grad(iql_bst.awr_loss, has_aux=True), static_argnames="config")
actor_grad = jax.jit(
    jax.grad(iql_bst.actor_loss, has_aux=True), static_argnames="config"
)
critic_loss = jax.jit(iql_bst.critic_loss, static_argnames="config")
value_grad = jax.jit(
    jax.grad(iql_bst.value_loss, has_aux=True), static_argnames="config"
)
update = jax.jit(iql_bst.update, static_argnames="config")
update_value = jax.jit(iql_bst.update_value, static_argnames="config")
update_actor = jax.jit(iql_bst.update_actor, static_argnames="config")
update_critics = jax.jit(iql_bst.update_critics, static_argnames="config")
train = jax.jit(iql_bst.train, static_argnames=("num_updates", "config"))


def actor_net(obs_weight: list[float], action: list[float], std: list[float]) -> Any:
    """pi(s) = tanh(obs_weight s + atanh(action)), one entry per action dimension."""
    pairs = zip(obs_weight, action, strict=True)
    bias = [math.atanh(a) - 10 * w for w, a in pairs]
    layers = net(([[1]], [10]), ([obs_weight], bias))
    return {"params": layers | {"log_std": jnp.log(f32(std))}}


def value_net(obs_weight: float, constant: float) -> Any:
    """V(s) = obs_weight s + constant."""
    return {"params": net(([[obs_weight]], [10]), ([[1]], [constant - 10]))}


def agent_by_hand(**fields: Any) -> AgentState:
    """These fields, and None where the function under test must not look."""
    return AgentState._make([None] * 7)._replace(**fields)


def last_bias(tree: Any) -> float:
    """The constant of the first output, of a network by hand or of its gradient."""
    return float(tree["params"]["Dense_1"]["bias"][0])


def transitions(
    obs: list[float], action: Any = 0.0, next_obs: Any = 0.0, terminal: Any = 0.0
) -> Transition:
    """One transition per observation, with reward 1; `action` is (A,) or (B, A)."""
    num, action = len(obs), np.atleast_1d(np.asarray(action, float))
    return Transition(
        obs=f32(obs)[:, None],
        action=f32(np.broadcast_to(action, (num, action.shape[-1]))),
        reward=jnp.ones(num),
        next_obs=f32(np.broadcast_to(next_obs, num))[:, None],
        terminal=f32(np.broadcast_to(terminal, num)),
    )


def random_agent(seed: int, config: Config) -> tuple[AgentState, Supervisor]:
    """Networks and targets that all differ, and an unfitted Morse network."""
    key_agent, key_target, key_morse = jax.random.split(jax.random.key(seed), 3)
    agent = init(key_agent, OBS_DIM, ACTION_DIM, SMALL)  # one compile
    other = init(key_target, OBS_DIM, ACTION_DIM, SMALL)
    agent = agent._replace(
        target_critics=other.target_critics,
        actor_opt=iql_bst.optimizers(config)[0].init(agent.actor),
    )
    state = morse_init(key_morse, OBS_DIM, ACTION_DIM, config.morse_net)
    return agent, Supervisor(*bst_of(state.params))


def batch_of(seed: int, num: int = 16) -> Transition:
    return Transition(*random_data(seed, num))


# ============================================================================ Config


@pytest.mark.parametrize(
    "bad",
    [
        dict(expectile=0.0),
        dict(expectile=1.0),
        dict(expectile=1.5),
        dict(expectile=-0.1),
        dict(expectile=math.nan),
        dict(beta=-1.0),
        dict(beta=math.inf),
        dict(weight_clip=0.0),
        dict(weight_clip=math.inf),
        dict(mu=0.01),
        dict(mu=-1.0),
        dict(mu=math.nan),
        dict(scale=0.0),
        dict(discount=1.01),
        dict(discount=-0.1),
        dict(reward_scale=0.0),
        dict(reward_scale=-1.0),
        dict(reward_shift=-math.inf),
        dict(polyak=0.0),
        dict(polyak=1.5),
        dict(hidden_dims=()),
        dict(hidden_dims=(256, 0)),
        dict(actor_learning_rate=0.0),
        dict(actor_decay_updates=-1),
        dict(q_weight=-0.1),
        dict(obs_noise=-0.1),
        dict(actor_critics=0),
        dict(critic_learning_rate=-1.0),
        dict(value_learning_rate=0.0),
        dict(batch_size=0),
        dict(policy_step="AWR"),
    ],
    ids=str,
)
def test_config_refuses(bad: dict[str, Any]):
    (name,) = bad
    with pytest.raises(ValueError, match=name):
        Config(**bad)


def test_config_takes_the_edges():
    Config(mu=0.02, discount=1.0, polyak=1.0, beta=0.0, actor_decay_updates=0)
    Config(mu=1e6, discount=0.0, batch_size=1, reward_shift=-1.0, weight_clip=1e-3)
    Config(expectile=1e-3, policy_step="awr")
    Config(expectile=0.999, policy_step="bst")


RETURNS = np.array([100.0, 500.0, 300.0])
STEPS = pytest.mark.parametrize("step", ["bst", "awr"])


@STEPS
@pytest.mark.parametrize("domain", iql_bst.DEFAULTS)
def test_resolve_fills_what_is_unset(domain: str, step: Any):
    unset = Config(policy_step=step, batch_size=7)
    config = iql_bst.resolve(unset, domain, logged(SPREAD, 0.0), RETURNS, 1000)
    assert config.scale == 2.5  # dim(A) / 2
    assert None not in dataclasses.asdict(config).values()
    assert (config.batch_size, config.policy_step) == (7, step)
    assert config.actor_decay_updates == 1000
    for name, value in iql_bst.DEFAULTS[domain].items():
        if name not in ("reward_scale", "normalize_obs", "q_weight"):
            assert getattr(config, name) == value


@STEPS
@pytest.mark.parametrize("domain", iql_bst.DEFAULTS)
@pytest.mark.parametrize("terminal", [0.0, 1.0])
def test_the_bst_step_reads_noise_and_w_in_locomotion(domain: str, step: Any, terminal):
    unset = Config(policy_step=step)
    config = iql_bst.resolve(unset, domain, logged(SPREAD, terminal), RETURNS, 1000)
    reads = domain == "locomotion" and step == "bst"
    assert config.obs_noise == pytest.approx(0.2 / 2 if reads and terminal else 0)
    assert config.q_weight == (0.5 if reads else 1)  # 315 (.2)^4 = .504
    wide = iql_bst.resolve(unset, domain, logged(2 * SPREAD, 0.0), RETURNS, 1000)
    assert wide.q_weight == (8.1 if reads else 1)  # 315 (.4)^4 = 8.064


@pytest.mark.parametrize(("num_falls", "noise"), [(1, 0.0), (3, 0.1)])
def test_the_bst_step_has_no_noise_where_agents_seldom_fall(num_falls, noise):
    data = walked(SPREAD, num_falls)
    config = iql_bst.resolve(Config(), "locomotion", data, RETURNS, 1000)
    assert config.obs_noise == pytest.approx(noise)


@STEPS
@pytest.mark.parametrize("domain", iql_bst.DEFAULTS)
def test_resolve_keeps_what_is_set(domain: str, step: Any):
    # False and 0 are set, not unset.
    config = Config(
        policy_step=step,
        expectile=0.5,
        beta=0.0,
        mu=0.25,
        floor=0.0,
        scale=4.0,
        supervisor_gradient=False,
        q_weight=0.0,
        discount=0.0,
        reward_scale=2.0,
        reward_shift=0.0,
        obs_noise=0.0,
        polyak=0.5,
        normalize_obs=False,
        critic_layer_norm=False,
        actor_decay_updates=0,
    )
    assert iql_bst.resolve(config, domain, logged(SPREAD, 1.0), RETURNS, 1000) == config
    flipped = dataclasses.replace(config, normalize_obs=True, actor_decay_updates=5)
    assert (
        iql_bst.resolve(flipped, domain, logged(SPREAD, 0.0), RETURNS, 1000) == flipped
    )


@pytest.mark.parametrize(
    ("domain", "published"),
    [
        # 1000 / (500 - 100) = 2.5.
        ("locomotion", dict(expectile=0.7, beta=3, reward_scale=2.5, reward_shift=0)),
        ("antmaze", dict(expectile=0.9, beta=10, reward_scale=1, reward_shift=-1)),
        # Kitchen and Adroit.
        ("other", dict(expectile=0.7, beta=0.5, reward_scale=1, reward_shift=0)),
    ],
)
def test_awr_has_the_published_settings(domain: str, published: dict[str, Any]):
    # IQL, appendix B and its code: no normalisation, three Adams at 3e-4, the actor's
    # a cosine over the whole run.
    config = iql_bst.resolve(
        Config(policy_step="awr"), domain, logged(SPREAD, 0.0), RETURNS, 10**6
    )
    published = published | dict(
        discount=0.99,
        polyak=0.005,
        weight_clip=100,
        normalize_obs=False,
        critic_layer_norm=False,
        hidden_dims=(256, 256),
        batch_size=256,
        actor_learning_rate=3e-4,
        critic_learning_rate=3e-4,
        value_learning_rate=3e-4,
        actor_decay_updates=10**6,
    )
    assert {name: getattr(config, name) for name in published} == published


def test_bst_takes_observations_as_td3_bst_does():
    # So that both can share a Morse network; the rest is IQL's.
    for domain in iql_bst.DEFAULTS:
        data: Any = Transition._make(np.eye(3) for _ in Transition._fields)
        awr, bst = (
            iql_bst.resolve(Config(policy_step=step), domain, data, RETURNS, 1000)
            for step in ("awr", "bst")
        )
        other = td3_bst.resolve(td3_bst.Config(), domain, data, 1000)
        assert bst.normalize_obs == other.normalize_obs
        assert (bst.mu, bst.obs_noise) == (other.mu, other.obs_noise)
        if domain in ("pointmaze", "other"):  # a noisy controller breaks it there
            assert bst.supervisor_gradient is other.supervisor_gradient is False
        moved: dict[str, Any] = dict(policy_step="awr")
        moved["normalize_obs"] = awr.normalize_obs
        moved["obs_noise"], moved["q_weight"] = 0.0, 1.0
        assert dataclasses.replace(bst, **moved) == awr


@pytest.mark.parametrize(
    "returns", [[7.0], [7.0, 7.0], [0.0, 0.0], [0.1 + 0.2 + 0.3, 0.3 + 0.2 + 0.1]]
)
def test_returns_without_spread_scale_by_one(returns: list[float]):
    config = iql_bst.resolve(
        Config(), "locomotion", logged(SPREAD, 0.0), np.array(returns), 1000
    )
    assert config.reward_scale == 1.0


def test_published_rewards_and_observations():
    # Locomotion: 1000 r / (500 - 100); antmaze: r - 1. Observations stay raw.
    fields: list[Any] = [[[3], [5]], [[0], [0]], [0, 1], [[5], [9]], [0, 1]]
    raw: Any = Transition._make(np.array(field, float) for field in fields)
    for domain, reward in [("locomotion", [0, 2.5]), ("antmaze", [-1, 0])]:
        config = iql_bst.resolve(
            Config(policy_step="awr"), domain, logged(SPREAD, 0.0), RETURNS, 1000
        )
        data, mean, std = iql_bst.prepare(raw, config)
        assert_same(list(data), list(raw._replace(reward=np.array(reward))))
        assert (mean, std) == (0, 1)


# ============================================================================== Value


@pytest.mark.parametrize(
    ("tau", "losses"),
    [
        # u = -2, -.5, 0, 1, 3: u^2 = 4, .25, 0, 1, 9, times 1 - tau below 0, else tau.
        (0.7, [1.2, 0.075, 0, 0.7, 6.3]),
        (0.9, [0.4, 0.025, 0, 0.9, 8.1]),
        (0.1, [3.6, 0.225, 0, 0.1, 0.9]),
        (0.5, [2, 0.125, 0, 0.5, 4.5]),  # half the square
    ],
)
def test_expectile_loss(tau: float, losses: list[float]):
    got = iql_bst.expectile_loss(f32([-2, -0.5, 0, 1, 3]), f32(tau))
    assert np.asarray(got) == pytest.approx(losses, abs=1e-6)


def test_value_loss():
    # V = s = 0, 1, 2 and q = 1, .5, 2.5: u = 1, -.5, .5; tau = .7:
    # .7 * 1 + .3 * .25 + .7 * .25 = .95, mean .316667. The gradient of V's constant:
    # -2 (.7 * 1 - .3 * .5 + .7 * .5) / 3 = -.6.
    batch, q = transitions([0, 1, 2]), f32([1, 0.5, 2.5])
    grad, metrics = value_grad(value_net(1, 0), batch, q, f32(0.7), HAND)
    assert float(metrics["value_loss"]) == pytest.approx(0.316667, abs=1e-5)
    assert float(metrics["v"]) == pytest.approx(1.0, abs=1e-5)
    assert last_bias(grad) == pytest.approx(-0.6, abs=1e-5)


def test_value_loss_refuses_a_column():
    with pytest.raises(AssertionError):
        iql_bst.value_loss(
            value_net(0, 0), transitions([0, 0]), jnp.ones((2, 1)), f32(0.7), HAND
        )


@pytest.mark.parametrize(
    ("tau", "q", "expectile"),
    [
        # q in {0, 1}, a share p of ones: tau p (1 - V) = (1 - tau) (1 - p) V.
        (0.7, [0, 1], 0.7),  # p = 1/2: V = tau
        (0.9, [1, 0], 0.9),
        (0.9, [0, 0, 0, 1], 0.75),  # .9 (1 - V) = .3 V: V = .9 / 1.2
        (0.5, [0, 0, 0, 1], 0.25),  # the mean
    ],
)
def test_value_loss_is_smallest_at_the_expectile(
    tau: float, q: list[float], expectile: float
):
    batch = transitions([0.0] * len(q))
    below, at, above = (
        last_bias(value_grad(value_net(0, constant), batch, f32(q), f32(tau), HAND)[0])
        for constant in (expectile - 0.1, expectile, expectile + 0.1)
    )
    assert below < -0.01
    assert at == pytest.approx(0, abs=1e-5)
    assert above > 0.01


def test_update_value_fits_the_smaller_target_of_each_row():
    # Q'_1 = s + a, Q'_2 = 1 - s - a at s + a = .2, .9: min .2, .1; V = 0, so u is the
    # same: .7 (.04 + .01) / 2 = .0175. Adam's first step of .03 is upwards.
    value = value_net(0, 0)
    agent = agent_by_hand(
        target_critics=twins(critic_net(1, [1], 0), critic_net(-1, [-1], 1)),
        value=value,
        value_opt=iql_bst.optimizers(HAND)[2].init(value),
    )
    stepped, metrics = update_value(agent, transitions([0, 0.7], 0.2), f32(0.7), HAND)
    assert float(metrics["value_loss"]) == pytest.approx(0.0175, abs=1e-5)
    assert last_bias(stepped.value) == pytest.approx(-9.97, abs=1e-5)


# ============================================================================ Critics


def test_td_target():
    # V = 2 s + 1 = 2, 5, 0 at s' = .5, 2, -.5; r = 1, gamma = .9: y = 1 + .9 V = 2.8,
    # 5.5, 1; the second ends: y = r = 1. No policy, no critic and no target is asked.
    agent = agent_by_hand(value=value_net(2, 1))
    batch = transitions([7, 8, 9], 0.3, next_obs=[0.5, 2, -0.5], terminal=[0, 1, 0])
    y = iql_bst.td_target(agent, batch, HAND)
    assert np.asarray(y) == pytest.approx([2.8, 1, 1], abs=1e-5)


def test_update_critics_steps_towards_the_value():
    # V = 2, so y = 1 + .9 * 2 = 2.8, above Q_1 = 0 and below Q_2 = 5: L_Q = 2.8^2 +
    # 2.2^2 = 12.68, and Adam's first step of .02 lifts the one and lowers the other.
    critics = twins(critic_net(0, [0], 0), critic_net(0, [0], 5))
    agent = agent_by_hand(
        critics=critics,
        target_critics=critics,
        value=value_net(0, 2),
        critic_opt=iql_bst.optimizers(HAND)[1].init(critics),
    )
    stepped, metrics = update_critics(agent, transitions([0, 1]), HAND)
    assert float(metrics["critic_loss"]) == pytest.approx(12.68, rel=1e-5)
    bias = stepped.critics["params"]["Dense_1"]["bias"]
    assert np.ravel(bias) == pytest.approx([-9.98, -5.02], abs=1e-5)


def test_awr_weight():
    # Q'_1 = s + a = .5, .75, 2.5 and Q'_2 = 2 - s = 2, 1, 0: min .5, .75, 0; V = s/2:
    # u = .5, .25, -1; beta = 2: exp(1), exp(.5), exp(-2). The online critics are None.
    agent = agent_by_hand(
        target_critics=twins(critic_net(1, [1], 0), critic_net(-1, [0], 2)),
        value=value_net(0.5, 0),
    )
    batch = transitions([0, 1, 2], [[0.5], [-0.25], [0.5]], next_obs=[5, 6, 7])
    weight, advantage = iql_bst.awr_weight(agent, batch, HAND)
    assert np.asarray(advantage) == pytest.approx([0.5, 0.25, -1], abs=1e-5)
    assert np.asarray(weight) == pytest.approx([2.718282, 1.648721, 0.135335], abs=1e-4)


def advantages(*advantage: float) -> tuple[AgentState, Transition]:
    """V = 0 and Q' = s, so the observations are the advantages."""
    critic = critic_net(1, [0], 0)
    agent = agent_by_hand(target_critics=twins(critic, critic), value=value_net(0, 0))
    return agent, transitions(list(advantage))


def test_awr_weight_is_clipped():
    # exp(2 * 2.3) = 99.4843, exp(2 * 2.31) = 101.494; exp(2000) is inf in float32.
    args = advantages(2.3, 2.31, 1000)
    weight, advantage = iql_bst.awr_weight(*args, HAND)
    assert np.asarray(weight) == pytest.approx([99.4843, 100, 100], abs=1e-3)
    assert np.asarray(advantage) == pytest.approx([2.3, 2.31, 1000], abs=1e-4)
    lower = dataclasses.replace(HAND, weight_clip=5.0)
    weight, _ = iql_bst.awr_weight(*args, lower)
    np.testing.assert_array_equal(weight, [5, 5, 5])


def test_overflowing_weight_gives_a_finite_step():
    agent, batch = advantages(1000, -5)
    actor = actor_net([0], [0.5], [1])
    adam, _, _ = iql_bst.optimizers(HAND)
    agent = agent._replace(actor=actor, actor_opt=adam.init(actor))
    stepped, metrics = update_actor(agent, None, batch, batch.obs, HAND)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((stepped, metrics)))
    assert float(metrics["weight"]) == pytest.approx(50, abs=1e-3)  # of 100 and e^-10


def test_beta_zero_is_behaviour_cloning():
    config = dataclasses.replace(HAND, beta=0.0)
    weight, _ = iql_bst.awr_weight(*advantages(-1000, 0, 0.3, 1000), config)
    np.testing.assert_array_equal(weight, [1, 1, 1, 1])


def test_awr_loss():
    # N((.5, -.5), diag(1, 2)^2), log sqrt(2 pi) = .918939. Errors over sigma of
    # a = (.5, .5): 0, .5; of a = (-.5, -.5): -1, 0. log pi = -(0 + .25) / 2 - log 2
    # - 2 * .918939 = -2.656024, and -(1 + 0) / 2 - ... = -3.031024. Weights 2, .5:
    # L = (2 * 2.656024 + .5 * 3.031024) / 2 = 3.413780. Distance 1, std 1.5.
    actor = actor_net([0, 0], [0.5, -0.5], [1, 2])
    batch = transitions([-3, 4], [[0.5, 0.5], [-0.5, -0.5]])
    loss, metrics = iql_bst.awr_loss(actor, batch, f32([2, 0.5]), HAND)
    assert float(loss) == pytest.approx(3.413780, abs=1e-5)
    assert {name: float(x) for name, x in metrics.items()} == pytest.approx(
        dict(actor_loss=3.413780, distance=1.0, std=1.5), abs=1e-5
    )


def test_awr_gradient():
    # One action, pi = tanh(b) = .5, sigma = 2, a = .9, weight 3; the rest of L is
    # 3 [(a - pi)^2 / (2 sigma^2) + log sigma]: dL/db = -3 * .4 / 4 * (1 - .25) = -.225,
    # dL/dlog sigma = 3 (1 - .16 / 4) = 2.88.
    actor, batch = actor_net([0], [0.5], [2]), transitions([1], 0.9)
    grad, _ = awr_grad(actor, batch, f32([3]), HAND)
    assert last_bias(grad) == pytest.approx(-0.225, rel=1e-4)
    assert float(grad["params"]["log_std"][0]) == pytest.approx(2.88, rel=1e-4)


@pytest.mark.parametrize(
    ("log_std", "loss"),
    [
        # a - pi = .01. sigma = e^-5: .5 * 1e-4 e^10 - 5 + .918939 = -2.979738; at -4.9,
        # within: .5 * 1e-4 e^9.8 - 4.9 + .918939 = -3.079374. sigma = e^2: .5 * 1e-4
        # e^-4 + 2 + .918939 = 2.918940; at 1.9 2.818940.
        (-6.0, -2.979738),
        (-4.9, -3.079374),
        (1.9, 2.818940),
        (3.0, 2.918940),
    ],
)
def test_log_std_is_clipped(log_std: float, loss: float):
    actor = actor_net([0], [0.5], [1])
    actor["params"]["log_std"] = f32([log_std])
    grad, metrics = awr_grad(actor, transitions([0], 0.51), f32([1]), HAND)
    assert float(metrics["actor_loss"]) == pytest.approx(loss, abs=1e-4)
    beyond = not -5 <= log_std <= 2
    assert (float(grad["params"]["log_std"][0]) == 0) == beyond
    assert last_bias(grad) < 0  # the mean still learns


def test_policy_is_the_mode():
    # pi(s) = tanh(s + atanh(.5)) = .5 at s = 0, whatever sigma; at its own action the
    # log density is -log sigma - .918939, and its gradient in the mean 0.
    batch = transitions([0, -0.7])
    for std in (0.1, 3.0):
        actor = actor_net([1], [0.5], [std])
        action = iql_bst.policy(actor, batch.obs, HAND)
        expected = [[0.5], [math.tanh(math.atanh(0.5) - 0.7)]]
        assert np.asarray(action) == pytest.approx(np.array(expected), abs=1e-5)
        own = batch._replace(action=action)
        grad, metrics = awr_grad(actor, own, jnp.ones(2), HAND)
        assert float(metrics["actor_loss"]) == pytest.approx(
            math.log(std) + 0.918939, abs=1e-5
        )
        assert last_bias(grad) == pytest.approx(0, abs=1e-4)


def test_update_actor_by_awr():
    # V = 0, Q' = s = log(3) / 2, beta = 2: the weight is 3 and the gradients those of
    # test_awr_gradient, -.225 and 2.88, and of the kernel before the output, whose unit
    # is h = s + 10: -.225 h. Norm sqrt(.225^2 (1 + 10.549306^2) + 2.88^2) = 3.738846.
    # Adam's first step of .01 moves the mean up and sigma down.
    agent, batch = advantages(math.log(3) / 2)
    actor, batch = actor_net([0], [0.5], [2]), batch._replace(action=f32([[0.9]]))
    adam, _, _ = iql_bst.optimizers(HAND)
    agent = agent._replace(actor=actor, actor_opt=adam.init(actor))
    stepped, metrics = update_actor(agent, None, batch, batch.obs, HAND)
    assert float(metrics["weight"]) == pytest.approx(3, abs=1e-4)
    assert float(metrics["advantage"]) == pytest.approx(0.549306, abs=1e-5)
    assert float(metrics["actor_grad_norm"]) == pytest.approx(3.738846, rel=1e-4)
    moved = jax.tree.map(jnp.subtract, stepped.actor, actor)
    assert last_bias(moved) == pytest.approx(0.01, rel=1e-3)
    assert float(moved["params"]["log_std"][0]) == pytest.approx(-0.01, rel=1e-3)


# ================================================================================ BST

# Nothing but log_std is new: tests/test_siblings.py holds the loss to TD3-BST's, whose
# gradients are worked out in tests/test_td3_bst.py.


def test_update_actor_by_bst_asks_the_online_critics_and_keeps_log_std():
    agent, bst = random_agent(0, SMALL)
    batch = batch_of(1)
    stepped, metrics = update_actor(agent, bst, batch, batch.obs, SMALL)
    new, old = dict(stepped.actor["params"]), dict(agent.actor["params"])
    assert_same(new.pop("log_std"), old.pop("log_std"))
    assert_changed(new, old)
    # Neither the targets nor the value, which are NaN here, are asked.
    nan = jax.tree.map(lambda x: x * math.nan, agent)
    blind = agent._replace(target_critics=nan.target_critics, value=nan.value)
    again, same_metrics = update_actor(blind, bst, batch, batch.obs, SMALL)
    assert_same((again.actor, same_metrics), (stepped.actor, metrics))


# =============================================================================== init


def test_init_is_orthogonal():
    # sqrt(2) times an orthogonal matrix: W^T W = 2 I, or W W^T where W is wide.
    agent = init(KEY, OBS_DIM, ACTION_DIM, SMALL)
    first, second = (
        jax.tree.map(lambda x, i=i: x[i], agent.critics["params"]) for i in (0, 1)
    )
    actor = dict(agent.actor["params"])
    np.testing.assert_array_equal(actor.pop("log_std"), np.zeros(ACTION_DIM))
    nets = (actor, first, second, agent.value["params"])
    for layers, fan_in in zip(nets, (3, 5, 5, 3), strict=True):
        assert layers["Dense_0"]["kernel"].shape == (fan_in, 8)
        for layer in layers.values():
            kernel = np.asarray(layer["kernel"])
            short = kernel.T if kernel.shape[0] > kernel.shape[1] else kernel
            assert short @ short.T == pytest.approx(2 * np.eye(len(short)), abs=1e-5)
            np.testing.assert_array_equal(layer["bias"], np.zeros(kernel.shape[1]))
    kernels = [np.asarray(layers["Dense_1"]["kernel"]) for layers in nets]
    for one, other in itertools.combinations(kernels, 2):
        assert not np.array_equal(one, other)


def test_init_copies_into_the_targets_and_can_be_donated():
    agent = iql_bst.init(KEY, 1, 1, HAND)
    assert_same(agent.target_critics, agent.critics)
    expected = jax.tree.map(np.array, agent)
    donated = jax.jit(lambda tree: tree, donate_argnums=0)(agent)
    assert_same(donated, expected)


# ============================================================================ Updates


def test_only_the_actors_step_decays():
    # A constant gradient's Adam step is the rate itself. Cosine to 0 over 4:
    # .01 (1 + cos(pi t / 4)) / 2 = .01, .00853553, .005, .00146447, 0, and 0 after.
    config = dataclasses.replace(AWR, actor_decay_updates=4)
    actor, critics, value = (adam_steps(x, 7) for x in iql_bst.optimizers(config))
    rates = [0.01, 0.00853553, 0.005, 0.00146447, 0, 0, 0]
    assert actor == pytest.approx([-x for x in rates], abs=1e-6)
    assert critics == pytest.approx([-0.02] * 7, rel=1e-4)
    assert value == pytest.approx([-0.03] * 7, rel=1e-4)


def test_no_decay():
    assert adam_steps(iql_bst.optimizers(SMALL)[0], 7) == pytest.approx(
        [-0.01] * 7, rel=1e-4
    )


def config_of(step: str) -> Config:
    return {"bst": SMALL, "awr": AWR}[step]


@STEPS
def test_each_step_changes_only_its_own(step: str):
    config = config_of(step)
    agent, bst = random_agent(0, config)
    batch = batch_of(1)
    for stepped, own in [
        (update_value(agent, batch, TAU, config)[0], {"value", "value_opt"}),
        (
            update_actor(agent, bst, batch, batch.obs, config)[0],
            {"actor", "actor_opt"},
        ),
        (
            update_critics(agent, batch, config)[0],
            {"critics", "critic_opt", "target_critics"},
        ),
    ]:
        assert_same(stepped._replace(**{k: getattr(agent, k) for k in own}), agent)
        (opt,) = (name for name in own if name.endswith("_opt"))
        assert int(getattr(stepped, opt)[0].count) == 1
        for name in own - {opt, "actor"}:
            assert_changed(getattr(stepped, name), getattr(agent, name))
        if "actor" in own:  # BST's step leaves log_std
            new, old = stepped.actor["params"], agent.actor["params"]
            assert_changed(new["Dense_0"], old["Dense_0"])
            assert np.array_equal(new["log_std"], old["log_std"]) == (step == "bst")


def test_targets_follow_the_new_critics():
    agent, _ = random_agent(0, SMALL)
    batch = batch_of(1)
    stepped, _ = update_critics(agent, batch, SMALL)
    mixed = jax.tree.map(
        lambda x, y: 0.25 * x + 0.75 * y, stepped.critics, agent.target_critics
    )
    assert_same(stepped.target_critics, mixed, tolerance=1e-6)


@STEPS
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_update_is_its_parts(step: str, noise: float):
    # Update 6: one batch from fold_in(key, 6), and from that key the noise; the actor
    # and the critics' targets see the value that has just moved.
    config = dataclasses.replace(config_of(step), obs_noise=noise)
    agent, bst = random_agent(0, config)
    data = batch_of(1, 50)
    batch = iql_bst.sample(data, jax.random.fold_in(KEY, 6), 16)
    expected, value_metrics = update_value(agent, batch, TAU, config)
    target = iql_bst.td_target(expected, batch, config)
    loss, _ = critic_loss(agent.critics, batch, target, config)
    key_shown = jax.random.fold_in(jax.random.fold_in(KEY, 6), 1)
    shown = iql_bst.noisy(batch.obs, key_shown, config)
    assert np.array_equal(shown, batch.obs) == (noise == 0)
    expected, actor_metrics = update_actor(expected, bst, batch, shown, config)
    expected, critic_metrics = update_critics(expected, batch, config)
    got, metrics = update(agent, bst, TAU, data, KEY, jnp.int32(6), config)

    assert_same(got, expected, tolerance=1e-5)
    assert_same(metrics, value_metrics | actor_metrics | critic_metrics, tolerance=1e-5)
    assert float(metrics["critic_loss"]) == pytest.approx(float(loss), rel=1e-5)


# ============================================================================== train


@pytest.fixture(scope="module", params=["bst", "awr"])
def trained(request: pytest.FixtureRequest):
    """Updates 0 to 19 in one call, and what went in."""
    config = config_of(request.param)
    agent, bst = random_agent(0, config)
    data = batch_of(1, 50)
    result = train(agent, bst, TAU, data, KEY, jnp.int32(0), 20, config)
    return config, (agent, bst, data), result


def test_two_chunks_equal_one(trained):
    config, (agent, bst, data), (whole, metrics) = trained
    half, first = train(agent, bst, TAU, data, KEY, jnp.int32(0), 10, config)
    # What a resumed run starts from: numpy arrays that have been away.
    half = jax.tree.map(lambda x: jnp.asarray(np.array(x)), half)
    both, second = train(half, bst, TAU, data, KEY, jnp.int32(10), 10, config)
    assert_same(both, whole)
    for name in metrics.keys() - {"omega_max"}:
        mean = (first[name] + second[name]) / 2
        assert float(metrics[name]) == pytest.approx(float(mean), rel=1e-4, abs=1e-6)


def test_train_is_update_repeated(trained):
    config, (agent, bst, data), (whole, metrics) = trained
    seen = []
    for step in range(20):
        agent, step_metrics = update(
            agent, bst, TAU, data, KEY, jnp.int32(step), config
        )
        seen.append(step_metrics)
    assert_same(agent, whole, tolerance=1e-4)
    assert set(metrics) == set(seen[0])
    for name in metrics:
        values = [float(m[name]) for m in seen]
        expected = max(values) if name == "omega_max" else np.mean(values)
        assert float(metrics[name]) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_metrics_are_those_of_the_policy_step(trained):
    config, _, (_, metrics) = trained
    assert all(np.isfinite(x) and np.ndim(x) == 0 for x in metrics.values())
    awr, bst = {"weight", "advantage", "std"}, {"omega", "omega_max", "certainty", "q"}
    own, others = (awr, bst) if config.policy_step == "awr" else (bst, awr)
    assert own <= set(metrics)
    assert not others & set(metrics)


def test_the_actor_rests_when_its_decay_has_ended(trained):
    # AWR's rate ends at update 20; BST's never does.
    config, (_, bst, data), (whole, _) = trained
    stepped, _ = update(whole, bst, TAU, data, KEY, jnp.int32(20), config)
    name = "Dense_0"
    new, old = (x.actor["params"][name]["kernel"] for x in (stepped, whole))
    assert np.array_equal(new, old) == (config.policy_step == "awr")
    assert_changed(stepped.value, whole.value)
    assert_changed(stepped.critics, whole.critics)
