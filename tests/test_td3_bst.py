"""TD3-BST's equations against numbers worked out by hand, and its properties."""

import dataclasses
import math
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    ACTION_DIM,
    OBS_DIM,
    SMALL,
    SPREAD,
    actor_grad,
    actor_loss,
    adam_steps,
    assert_changed,
    assert_same,
    bst_of,
    critic_net,
    f32,
    init,
    logged,
    net,
    random_agent,
    random_data,
    train,
    twins,
    update,
    update_actor,
    update_critics,
    walked,
)
from reference import (
    finite_differences,
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

import morse
import td3_bc
import td3_bst
from td3_bst import AgentState, Config, Supervisor, Transition

# Networks by hand have one observation and one hidden unit, kept in ReLU's linear half
# by a bias of 10 that the output's bias takes off again.
HAND = dataclasses.replace(SMALL, hidden_dims=(1,), policy_noise=0.0)
QUIET = dataclasses.replace(SMALL, policy_noise=0.0)


def actor_net(obs_weight: list[float], action: list[float]) -> Any:
    """pi(s) = tanh(obs_weight s + atanh(action)), one entry per action dimension."""
    return {
        "params": net(([[1]], [10]), ([obs_weight], output_bias(obs_weight, action)))
    }


def output_bias(obs_weight: list[float], action: list[float]) -> list[float]:
    return [math.atanh(a) - 10 * w for w, a in zip(obs_weight, action, strict=True)]


def agent_by_hand(target_actor: Any, target_critics: Any) -> AgentState:
    """Targets by hand; NaN where td_target must not look."""
    actor, critics = jax.tree.map(
        lambda x: jnp.full_like(x, jnp.nan), (target_actor, target_critics)
    )
    return AgentState(actor, critics, target_actor, target_critics, (), ())


def transitions(
    num: int,
    action: Any = 0.0,
    obs: Any = 0.0,
    next_obs: Any = 0.0,
    terminal: Any = 0.0,
) -> Transition:
    """`num` transitions with reward 1; `action` is (A,) or (num, A)."""
    action = np.atleast_1d(np.asarray(action, float))
    action = np.broadcast_to(action, (num, action.shape[-1]))
    column = np.ones((num, 1))
    return Transition(
        obs=f32(column * np.reshape(obs, (-1, 1))),
        action=f32(action),
        reward=jnp.ones(num),
        next_obs=f32(column * np.reshape(next_obs, (-1, 1))),
        terminal=f32(np.ones(num) * terminal),
    )


KEY = jax.random.key(0)


# ============================================================================ Config


@pytest.mark.parametrize(
    "bad",
    [
        dict(mu=0.01),
        dict(mu=0.0),
        dict(mu=-1.0),
        dict(mu=math.nan),
        dict(scale=0.0),
        dict(discount=1.01),
        dict(discount=-0.1),
        dict(reward_scale=0.0),
        dict(actor_learning_rate=0.0),
        dict(critic_learning_rate=-1.0),
        dict(batch_size=0),
        dict(policy_delay=0),
        dict(n_step=0),
        dict(polyak=0.0),
        dict(polyak=1.5),
        dict(policy_noise=-0.1),
        dict(noise_clip=-0.1),
        dict(floor=-0.1),
        dict(omega_cap=-1.0),
        dict(actor_decay_updates=-1),
        dict(q_weight=-0.1),
        dict(obs_noise=-0.1),
        dict(actor_critics=0),
        dict(actor_critics=3),
        dict(hidden_dims=(256, 0)),
    ],
    ids=str,
)
def test_config_refuses(bad: dict[str, Any]):
    (name,) = bad
    with pytest.raises(ValueError, match=name):
        Config(**bad)


def test_config_takes_the_edges():
    Config(mu=0.02, discount=1.0, polyak=1.0, policy_noise=0.0, noise_clip=0.0)
    Config(floor=0.0, omega_cap=0.0, actor_decay_updates=0)
    Config(mu=1e6, discount=0.0, batch_size=1, policy_delay=1, reward_shift=-1.0)


@pytest.mark.parametrize("domain", td3_bst.DEFAULTS)
@pytest.mark.parametrize("terminal", [0.0, 1.0])
def test_resolve_fills_what_is_unset(domain: str, terminal: float):
    def resolve(config: Config, action: np.ndarray, num_updates=100_000) -> Config:
        return td3_bst.resolve(config, domain, logged(action, terminal), num_updates)

    config, wide = resolve(Config(batch_size=7), SPREAD), resolve(Config(), 2 * SPREAD)
    assert config.scale == 2.5  # dim(A) / 2
    moves = domain == "locomotion"
    assert config.q_weight == pytest.approx(9000 * 0.2**4 if moves else 1)
    falls = moves and terminal  # elsewhere the end may be a success
    assert wide.q_weight == ((25 if falls else 100) if moves else 1)
    assert wide.obs_noise == pytest.approx(0.4 / 2 if falls else 0)
    assert wide.n_step == (1000 if falls else 1)
    assert config.actor_decay_updates == 100_000
    long, short = (resolve(Config(), 2 * SPREAD, n) for n in (300_000, 1000))
    assert long.actor_decay_updates == (100_000 if falls else 300_000)
    assert long.q_weight == wide.q_weight
    assert short.q_weight == (0.25 if falls else wide.q_weight)
    follows = {"n_step", "obs_noise"} | ({"floor"} if domain == "pointmaze" else set())
    follows |= {"polyak"} if moves and not falls else set()
    for name in td3_bst.DEFAULTS[domain].keys() - follows:
        assert getattr(config, name) == td3_bst.DEFAULTS[domain][name]
    if domain == "pointmaze":
        assert config.floor == pytest.approx(5 * 0.2**4)
        assert wide.floor == pytest.approx(5 * 0.4**4)
    deep = domain == "antmaze"  # where a cloned policy needs it as well
    assert config.hidden_dims == (256,) * (3 if deep else 2)
    assert config.actor_learning_rate == (1e-3 if "maze" in domain else 3e-4)
    assert config.supervisor_gradient is (domain == "antmaze")
    fast = 0.01 if "maze" in domain else 0.02
    assert config.polyak == (0.005 if moves and not falls else fast)
    assert not {None, ()} & {*vars(config).values()}
    assert config.batch_size == 7


@pytest.mark.parametrize("num_falls", [0, 1, 3])
def test_what_falls_decide(num_falls: int):
    data = walked(2 * SPREAD, num_falls)  # never, seldom, often
    config = td3_bst.resolve(Config(), "locomotion", data, 50_000)
    assert config.q_weight == {0: 100, 1: 8, 3: 12.5}[num_falls]
    assert config.supervisor_gradient is False  # too few to tell, see below
    assert config.polyak == (0.02 if num_falls else 0.005)
    assert config.n_step == (1000 if num_falls == 3 else 1)
    assert (config.obs_noise == 0) is (num_falls < 3)


@pytest.mark.parametrize("falls", [0, 10, 11])  # never, seldom, often
@pytest.mark.parametrize("drift", [0, 2])
def test_omega_has_a_gradient_where_many_policies_fall(falls: int, drift: float):
    obs: Any = np.random.default_rng(0).uniform(-1, 1, (10_000, 1))
    obs += drift * np.linspace(-1, 1, 10_000)[:, None]  # other states, along the log
    action: Any = np.zeros((10_000, 5))
    terminal: Any = np.arange(10_000) < falls
    data = Transition(obs, action, 0 * terminal, obs, terminal)
    with mock.patch.object(morse, "like_states", wraps=morse.like_states) as search:
        config = td3_bst.resolve(Config(), "locomotion", data, 50_000)
    assert search.call_count == 1  # it takes a second on large data
    assert config.supervisor_gradient is bool(drift and falls == 11)
    for domain in ("pointmaze", "antmaze", "other"):
        config = td3_bst.resolve(Config(), domain, data, 50_000)
        assert config.supervisor_gradient is (domain == "antmaze")


@pytest.mark.parametrize(("decay", "w"), [(50_000, 12.5), (200_000, 25), (0, 25)])
def test_the_share_of_w_is_that_of_the_actors_decay(decay: int, w: float):
    # So a run that is to be extended has from the beginning what the whole run has.
    data = walked(2 * SPREAD, 3)
    config = Config(actor_decay_updates=decay)
    for num_updates in (20_000, 300_000):
        resolved = td3_bst.resolve(config, "locomotion", data, num_updates)
        assert resolved.q_weight == w


@pytest.mark.parametrize("domain", td3_bst.DEFAULTS)
def test_resolve_keeps_what_is_set(domain: str):
    # False and 0 are set, not unset.
    config = Config(
        mu=0.3,
        floor=0.0,
        scale=4.0,
        supervisor_gradient=False,
        q_weight=0.0,
        obs_noise=0.0,
        discount=0.0,
        reward_scale=2.0,
        reward_shift=0.0,
        n_step=3,
        polyak=0.5,
        normalize_obs=False,
        critic_layer_norm=False,
        hidden_dims=(8,),
        actor_learning_rate=0.5,
        actor_decay_updates=0,
    )
    with mock.patch.object(morse, "like_states", side_effect=AssertionError):
        same = td3_bst.resolve(config, domain, logged(SPREAD, 1.0), num_updates=1000)
    assert same == config


@pytest.mark.parametrize("domain", td3_bc.DEFAULTS)
def test_td3_bc_has_the_mazes_settings(domain: str):
    config = td3_bc.resolve(td3_bc.Config(), domain, 1000)
    bst = td3_bst.resolve(Config(), domain, logged(SPREAD, 0.0), 1000)
    own = {"actor_decay_updates": 1000 if domain == "antmaze" else 0}
    own |= {} if "maze" in domain else {"polyak": 0.005}
    own |= {"actor_learning_rate": 3e-4} if domain == "pointmaze" else {}
    for name, value in td3_bc.DEFAULTS[domain].items():
        assert value == own.get(name, getattr(bst, name))
    assert not {None, ()} & {*vars(config).values()}
    assert config.actor_decay_updates == own["actor_decay_updates"]
    still = td3_bc.Config(actor_decay_updates=0, hidden_dims=(8,))
    kept = td3_bc.resolve(still, domain, 1000)
    assert (kept.actor_decay_updates, kept.hidden_dims) == (0, (8,))


# ======================================================================== Supervisor


@pytest.mark.parametrize(
    ("certainty", "mu", "omega"),
    [
        (1.0, 1.0, 0.0),  # exp(0) - 1
        (1.0, 0.02, 0.0),
        (0.5, 0.5, 1.718281828),  # exp(.5 / .5) - 1
        (0.9, 0.1, 1.718281828),  # exp(.1 / .1) - 1
        (0.0, 1.0, 1.718281828),  # exp(1) - 1
        (0.0, 0.5, 6.389056099),  # exp(2) - 1
        (0.0, 0.25, 53.59815003),  # exp(4) - 1
        (0.0, 0.1, 22025.46579),  # exp(10) - 1
        (0.0, 0.02, 5.184705529e21),  # exp(50) - 1, still a float32
    ],
)
def test_supervisor_weight(certainty: float, mu: float, omega: float):
    # f(s, a) = a + b, so M = exp(-lam^2/2 b^2) whatever s and a, for one action: with
    # lam = 2, b = sqrt(-log(M) / 2).
    offset = 100.0 if certainty == 0 else math.sqrt(-math.log(certainty) / 2)
    bst = bst_of(net(([[0], [1]], [offset])), scale=2.0, mu=mu)
    weight, uncertainty = td3_bst.supervisor(
        bst, f32([[0.3], [-1.0]]), f32([[0.9], [-0.4]]), HAND
    )
    assert np.asarray(weight) == pytest.approx([omega, omega], rel=1e-5)
    assert np.asarray(uncertainty) == pytest.approx([1 - certainty] * 2, rel=1e-5)


def test_the_floor_is_added_to_omega():
    # M = .9, mu = .1: omega = e - 1 = 1.718282, plus .5; where M is 1, .5.
    for offset, omega in ((math.sqrt(-math.log(0.9) / 2), 2.218282), (0.0, 0.5)):
        bst = bst_of(net(([[0], [1]], [offset])), scale=2.0, mu=0.1, floor=0.5)
        weight, _ = td3_bst.supervisor(bst, f32([[0.3]]), f32([[0.9]]), HAND)
        assert float(weight[0]) == pytest.approx(omega, rel=1e-5)


def test_supervisor_weight_is_precise_near_zero():
    # f(s, a) = a + .001 and lam = 2: C = 1 - exp(-2e-6) = 1.999998e-6, and with mu = 1
    # omega = exp(C) - 1 = 2.000000e-6, where exp(C) would round to steps of 1e-7.
    bst = bst_of(net(([[0], [1]], [1e-3])), scale=2.0, mu=1.0)
    action = jnp.zeros((1, 1))  # so that a + .001 does not round either
    weight, uncertainty = td3_bst.supervisor(bst, jnp.zeros((1, 1)), action, HAND)
    assert float(weight[0]) == pytest.approx(2e-6, rel=1e-5)
    assert float(uncertainty[0]) == pytest.approx(1.999998e-6, rel=1e-5)


def test_supervisor_sums_over_action_dimensions():
    # f = 0, lam = 1: M = exp(-||a||^2 / 2) = exp(-(.36 + .64) / 2) = .606531;
    # C = .393469, mu = .5: omega = exp(.786939) - 1 = 1.196662.
    bst = bst_of(net(([[0, 0]] * 3, [0, 0])))
    weight, uncertainty = td3_bst.supervisor(
        bst, jnp.ones((1, 1)), f32([[0.6, -0.8]]), HAND
    )
    assert float(uncertainty[0]) == pytest.approx(0.393469, abs=1e-6)
    assert float(weight[0]) == pytest.approx(1.196662, abs=1e-5)


def test_supervisor_uses_the_kernel_of_the_config():
    # f = 0, a = 1, lam = 2, rational quadratic with kappa 1: M = 1 / (1 + 2) = 1/3,
    # C = 2/3, mu = .5: omega = exp(4/3) - 1 = 2.793668.
    morse_net = morse.Config(kernel="rq", kappa=1.0)
    config = dataclasses.replace(HAND, morse_net=morse_net)
    bst = bst_of(net(([[0], [0]], [0])), scale=2.0)
    weight, _ = td3_bst.supervisor(bst, jnp.ones((1, 1)), jnp.ones((1, 1)), config)
    assert float(weight[0]) == pytest.approx(2.793668, abs=1e-5)


def test_one_compile_serves_every_mu_and_scale():
    agent, bst = random_agent(0, QUIET)
    batch = random_data(0, 16)

    def loss_of(bst: Supervisor) -> jax.Array:
        return actor_loss(agent.actor, agent.critics, bst, batch, QUIET)[0]

    loss: Any = jax.jit(loss_of)
    losses = [
        float(loss(bst_of(bst.params, scale, mu)))
        for scale, mu in [(1.0, 0.5), (3.0, 0.5), (1.0, 0.1)]
    ]
    assert len(set(losses)) == 3
    assert loss._cache_size() == 1


# ========================================================================== td_target


@pytest.mark.parametrize(("q1", "q2"), [(3.0, 5.0), (5.0, 3.0)])
def test_td_target(q1: float, q2: float):
    # r = 1, gamma = .9, min Q' = 3: y = 1 + .9 * 3 = 3.7; terminal: y = r = 1.
    critics = twins(critic_net(0, [0], q1), critic_net(0, [0], q2))
    agent = agent_by_hand(actor_net([0], [0]), critics)
    batch = transitions(2, terminal=[0, 1])
    y = td3_bst.td_target(agent, batch, KEY, HAND)
    assert np.asarray(y) == pytest.approx([3.7, 1.0], abs=1e-5)


def test_td_target_takes_the_minimum_of_each_row():
    # Q'_1 = s', Q'_2 = 1 - s'; s' = .2, .9: min = .2, .1; y = 1 + .9 min = 1.18, 1.09.
    # A minimum of the means, .5 and .5, would be 1.45 twice.
    critics = twins(critic_net(1, [0], 0), critic_net(-1, [0], 1))
    agent = agent_by_hand(actor_net([0], [0]), critics)
    batch = transitions(2, obs=[7, 8], next_obs=[0.2, 0.9])
    y = td3_bst.td_target(agent, batch, KEY, HAND)
    assert np.asarray(y) == pytest.approx([1.18, 1.09], abs=1e-5)


def test_td_target_uses_the_target_policy_at_the_next_observation():
    # Q'_1 = Q'_2 = 2 s' - a', pi'(s') = tanh(s'), the data's a and s not in it:
    # s' = .5, a' = tanh(.5) = .462117: y = 1 + .9 (1 - .462117) = 1.484095.
    critic = critic_net(2, [-1], 0)
    agent = agent_by_hand(actor_net([1], [0]), twins(critic, critic))
    batch = transitions(1, action=0.9, obs=-0.7, next_obs=0.5)
    y = td3_bst.td_target(agent, batch, KEY, HAND)
    assert float(y[0]) == pytest.approx(1.484095, abs=1e-5)


def target_actions(action: float, noise: float, clip: float, num: int) -> np.ndarray:
    """a' of `num` rows: gamma = 1 and Q' = a' - 1, so y = r + Q' = a'."""
    critic = critic_net(0, [1], -1)
    agent = agent_by_hand(actor_net([0], [action]), twins(critic, critic))
    config = dataclasses.replace(
        HAND, discount=1.0, policy_noise=noise, noise_clip=clip
    )
    return np.asarray(td3_bst.td_target(agent, transitions(num), KEY, config))


def test_target_noise_is_clipped():
    # pi' = .5, |noise| <= .3: a' in [.2, .8], and sigma = 100 reaches both ends.
    drawn = target_actions(0.5, noise=100.0, clip=0.3, num=256)
    assert drawn.min() == pytest.approx(0.2, abs=1e-5)
    assert drawn.max() == pytest.approx(0.8, abs=1e-5)


def test_target_action_is_clipped_to_the_box():
    # pi' = +-.9, |noise| <= .5: a' in [.4, 1] and [-1, -.4].
    drawn = target_actions(0.9, noise=100.0, clip=0.5, num=256)
    assert (drawn.min(), drawn.max()) == pytest.approx((0.4, 1.0), abs=1e-5)
    drawn = target_actions(-0.9, noise=100.0, clip=0.5, num=256)
    assert (drawn.min(), drawn.max()) == pytest.approx((-1.0, -0.4), abs=1e-5)


def test_target_noise_has_its_standard_deviation():
    # sigma = .2, 40,000 draws: mean 0 +- .001, sd .2 +- .0007; the clip at c = .4, two
    # sigma, holds 4.55 +- .1 % of them.
    drawn = target_actions(0.0, noise=0.2, clip=10.0, num=40_000)
    assert drawn.mean() == pytest.approx(0.0, abs=0.004)
    assert drawn.std() == pytest.approx(0.2, abs=0.003)
    drawn = target_actions(0.0, noise=0.2, clip=0.4, num=40_000)
    assert np.mean(np.abs(drawn) > 0.3999) == pytest.approx(0.0455, abs=0.005)


def test_target_noise_is_drawn_for_each_action_dimension():
    # Q' = a'_1 - a'_2 - 1, so y is the difference of two draws: sd .2 sqrt(2) = .2828.
    critic = critic_net(0, [1, -1], -1)
    agent = agent_by_hand(actor_net([0, 0], [0, 0]), twins(critic, critic))
    config = dataclasses.replace(HAND, discount=1.0, policy_noise=0.2, noise_clip=9.0)
    batch = transitions(40_000, action=[0, 0])
    y = td3_bst.td_target(agent, batch, KEY, config)
    assert float(y.std()) == pytest.approx(0.2828, abs=0.005)


# ============================================================================= Losses


def test_critic_loss():
    # Q_1 = s + 2 a = .5, 2.5, -1; y = 1, 2, 0: squares .25, .25, 1, mean .5.
    # Q_2 = 1 everywhere: squares 0, 1, 1, mean .6667. L = 1.1667; mean Q_1 = .6667.
    critics = twins(critic_net(1, [2], 0), critic_net(0, [0], 1))
    batch = transitions(3, action=[[0.5], [1.0], [-1.0]], obs=[-0.5, 0.5, 1.0])
    loss, metrics = td3_bst.critic_loss(critics, batch, f32([1, 2, 0]), HAND)
    assert float(loss) == pytest.approx(7 / 6, abs=1e-5)
    assert float(metrics["critic_loss"]) == float(loss)
    assert float(metrics["q_data"]) == pytest.approx(2 / 3, abs=1e-5)


def test_critic_loss_refuses_a_column_of_targets():
    critic = critic_net(0, [0], 0)
    with pytest.raises(AssertionError):
        td3_bst.critic_loss(
            twins(critic, critic), transitions(3), jnp.zeros((3, 1)), HAND
        )


def test_layer_norm_comes_before_relu():
    # x = (3, 1) has mean 2 and sd 1: normalised (1, -1), after ReLU (1, 0);
    # Q = 5 * 1 + 7 * 0 + .25 = 5.25. ReLU first would give 5 - 7 + .25.
    config = dataclasses.replace(HAND, hidden_dims=(2,), critic_layer_norm=True)
    layer_norm = {"scale": jnp.ones(2), "bias": jnp.zeros(2)}
    critic = net(([[0, 0], [0, 0]], [3, 1]), ([[5], [7]], [0.25]))
    critic = critic | {"LayerNorm_0": layer_norm}
    q = td3_bst.q_values(
        twins(critic, critic), jnp.zeros((1, 1)), jnp.zeros((1, 1)), config
    )
    assert np.asarray(q) == pytest.approx(np.full((2, 1), 5.25), abs=1e-4)


Q_1 = critic_net(1, [1, 2], 0)  # s + a_1 + 2 a_2
DECOY = critic_net(-3, [-7, 5], -50)  # a Q_2 that no loss of the actor may look at
ACTOR = actor_net([0, 0], [0.5, -0.5])
HALF = net(([[0, 0], [1, 0], [0, 1]], [math.sqrt(2 * math.log(2)), 0]))
"""f(s, a) = a + (1.177, 0), so with lam = 1 M = 1/2 everywhere."""


def test_actor_loss():
    # pi = (.5, -.5) for all s; mu = .5, M = .5: omega = e - 1 = 1.718282.
    # a = (.1, .3), (.5, .5): d = .16 + .64 = .8 and 1; mean of omega d = 1.546454.
    # Q_1 = s + .5 - 1 = 1, -3 at s = 1.5, -2.5: mean -1, Z_Q = 2: -Q / Z_Q = +.5.
    batch = transitions(2, action=[[0.1, 0.3], [0.5, 0.5]], obs=[1.5, -2.5])
    loss, metrics = actor_loss(ACTOR, twins(Q_1, DECOY), bst_of(HALF), batch, HAND)
    assert float(loss) == pytest.approx(2.046454, abs=1e-5)
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        {
            "actor_loss": 2.046454,
            "q": -1.0,
            "distance": 0.9,
            "certainty": 0.5,
            "omega": 1.718282,
            "omega_max": 1.718282,
        },
        abs=1e-5,
    )


def test_omega_metrics():
    # f = 0, lam = 1, pi = tanh(s) = 0 and .761594: M = 1 and exp(-.290013) = .748254,
    # C = 0, .251746; mu = .5: omega = 0, exp(.503492) - 1 = .654488; mean .327244.
    batch = transitions(2, obs=[0, 1])
    critics = twins(critic_net(0, [1], 1), critic_net(0, [1], 1))
    bst = bst_of(net(([[0], [0]], [0])))
    _, metrics = actor_loss(actor_net([1], [0]), critics, bst, batch, HAND)
    assert float(metrics["omega_max"]) == pytest.approx(0.654488, abs=1e-5)
    assert float(metrics["omega"]) == pytest.approx(0.327244, abs=1e-5)
    assert float(metrics["certainty"]) == pytest.approx(0.874127, abs=1e-5)


def test_only_the_actor_is_shown_the_noise():
    # As in test_actor_loss, but pi = tanh(s') with s' = atanh(.5), atanh(-.2), shown
    # instead of s = 1.5, -2.5, and f = a + 1.177 s, so that M is 2^-(s^2) of s alone:
    # M = 2^-2.25 = .210224, 2^-6.25 = .013139; mu = 1: omega = e^.789776 - 1, ... =
    # 1.202903, 1.682799; a = .1, .5: d = .16, .49; mean of omega d = .508518.
    # Q_1 = s + 2 a = 2.5, -2.9: mean -.2, Z_Q = 2.7: -Q / Z_Q = .074074.
    shown = f32([[math.atanh(0.5)], [math.atanh(-0.2)]])
    batch = transitions(2, action=[[0.1], [0.5]], obs=[1.5, -2.5])
    identity = net(([[math.sqrt(2 * math.log(2))], [1]], [0]))
    loss, metrics = td3_bst.actor_loss(
        actor_net([1], [0]),
        twins(critic_net(1, [2], 0), critic_net(-3, [-7], -50)),
        bst_of(identity, mu=1.0),
        batch,
        shown,
        HAND,
    )
    assert float(metrics["certainty"]) == pytest.approx(0.111682, abs=1e-5)
    assert float(metrics["distance"]) == pytest.approx(0.325, abs=1e-5)
    assert float(metrics["q"]) == pytest.approx(-0.2, abs=1e-5)
    assert float(loss) == pytest.approx(0.582592, abs=1e-5)


@pytest.mark.parametrize("script", [td3_bst, td3_bc])
def test_what_the_actor_is_shown(script: Any):
    obs = jnp.arange(80_000.0).reshape(20_000, 4)
    assert script.noisy(obs, KEY, script.Config(obs_noise=0.0)) is obs
    noise = np.asarray(script.noisy(0 * obs, KEY, script.Config(obs_noise=0.5)))
    assert noise.std(axis=0) == pytest.approx([0.5] * 4, rel=0.02)
    assert noise.mean(axis=0) == pytest.approx([0.0] * 4, abs=0.02)
    assert np.abs(np.corrcoef(noise.T) - np.eye(4)).max() < 0.03


def test_z_q_is_a_constant_to_the_gradient():
    # One action, pi = tanh(b) = .5, Q_1 = 2 a = 1, Z_Q = 1, omega = 0 (lam = 0):
    # dL/db = -2 (1 - .5^2) / 1 = -1.5. Through Z_Q as well, L = -1 and dL/db = 0.
    critics = twins(critic_net(0, [2], 0), critic_net(0, [-9], 3))
    bst = bst_of(net(([[0], [0]], [0])), scale=0.0)
    batch = transitions(2)
    grad, _ = actor_grad(actor_net([0], [0.5]), critics, bst, batch, HAND)
    assert float(grad["params"]["Dense_1"]["bias"][0]) == pytest.approx(-1.5, abs=1e-5)


def test_a_q_of_zero_is_no_nan():
    # Z_Q = 0: the loss is the pull alone, and the gradient Q's own.
    nothing = critic_net(0, [0], 0)
    bst = bst_of(net(([[0], [0]], [0])), scale=0.0, floor=1.0)
    batch, actor = transitions(2), actor_net([0], [0.5])
    grad, metrics = actor_grad(actor, twins(nothing, nothing), bst, batch, HAND)
    assert float(metrics["actor_loss"]) == pytest.approx(0.25)
    # d/db of tanh(b)^2 = 2 (.5) (1 - .5^2)
    assert float(grad["params"]["Dense_1"]["bias"][0]) == pytest.approx(0.75, abs=1e-5)


def test_certainty_one_leaves_td3():
    # M = 1: omega = 0 and the loss is TD3's, scaled: -mean Q_1 / mean |Q_1|. With
    # Q_1 = 1, -3 that is 1 / 2, with no trace of the data's actions.
    batch = transitions(2, action=[[0.1, 0.3], [0.5, 0.5]], obs=[1.5, -2.5])
    identity = net(([[0, 0], [1, 0], [0, 1]], [0, 0]))
    args = ACTOR, twins(Q_1, DECOY), bst_of(identity, mu=0.02)
    (grad, metrics), (other, _) = (
        actor_grad(*args, batch._replace(action=action), HAND)
        for action in (batch.action, -batch.action)
    )
    assert float(metrics["actor_loss"]) == 0.5
    assert float(metrics["omega_max"]) == 0.0
    assert_same(grad, other)


def test_a_certain_action_is_pulled_by_the_floor_alone():
    # M = 1, floor = .5, pi = tanh(b) = .5, a = .1, Q_1 = 2 a with Z_Q = 1:
    # L = .5 (.16) - 1, dL/db = (.5 * 2 (.4) - 2) (1 - .25) = -1.2.
    critics = twins(critic_net(0, [2], 0), critic_net(0, [2], 0))
    bst = bst_of(net(([[0], [1]], [0])), mu=0.1, floor=0.5)
    batch = transitions(2, action=0.1)
    grad, metrics = actor_grad(actor_net([0], [0.5]), critics, bst, batch, HAND)
    assert float(grad["params"]["Dense_1"]["bias"][0]) == pytest.approx(-1.2, abs=1e-5)
    assert float(metrics["actor_loss"]) == pytest.approx(-0.92, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "slope", "loss"),
    [
        # M = 1 and floor 0: L = -w Q / Z_Q, dL/db = -w (dQ/da) (.75) / Z_Q at a = .5.
        (dict(), 2.0, -1.0),  # Q_1 = 2 a, Z_Q = 1
        (dict(q_weight=3.0), 6.0, -3.0),
        (dict(actor_critics=2), -2.0, -1.0),  # Q_2 = 1 - a is the smaller, Z_Q = .5
        (dict(q_weight=0.0), 0.0, 0.0),
    ],
    ids=str,
)
def test_what_of_q_the_actor_climbs(change: Any, slope: float, loss: float):
    critics = twins(critic_net(0, [2], 0), critic_net(0, [-1], 1))
    bst = bst_of(net(([[0], [1]], [0])))
    config = dataclasses.replace(HAND, **change)
    batch = transitions(2, action=0.1)
    grad, metrics = actor_grad(actor_net([0], [0.5]), critics, bst, batch, config)
    bias = float(grad["params"]["Dense_1"]["bias"][0])
    assert bias == pytest.approx(-0.75 * slope, abs=1e-5)
    assert float(metrics["actor_loss"]) == pytest.approx(loss, abs=1e-6)


def test_the_cap_of_omega_by_hand():
    # M = e^-.5 = .606531 at a = 1 and e^-.125 = .882497 at a = .5 (f = 0, lam = 1):
    # (1 - M) / .1 = 3.93469, omega = 50.1465, above the cap of 4; 1.17503, 2.23824.
    bst = bst_of(net(([[0], [0]], [0])), mu=0.1, floor=0.5)
    action = f32([[1.0], [0.5]])
    for cap, expected in [(4.0, [4.5, 2.73824]), (0.0, [50.6465, 2.73824])]:
        config = dataclasses.replace(HAND, omega_cap=cap)
        omega, _ = td3_bst.supervisor(bst, f32([[0.0], [0.0]]), action, config)
        assert np.asarray(omega) == pytest.approx(expected, rel=1e-4)


def test_supervisor_gradient_by_hand():
    # One action, f = 0, lam = 1, mu = .5, a = .1, pi = tanh(b) = .5, d = .16:
    # M = exp(-.125) = .882497, C = .117503, exp(C / mu) = 1.264917, omega = .264917.
    # Q_1 = 2 a: -1.5 as above. omega's constant: omega 2 (.4) (1 - .25) = .158950.
    # Through omega: grad_a M = -.5 M = -.441248, and
    # -(1/mu) e^(C/mu) d grad_a M (.75) = 2 * 1.264917 * .16 * .441248 * .75 = .133954.
    critics = twins(critic_net(0, [2], 0), critic_net(0, [2], 0))
    bst = bst_of(net(([[0], [0]], [0])))
    batch = transitions(2, action=0.1)
    for through, expected in [(False, -1.341050), (True, -1.207096)]:
        config = dataclasses.replace(HAND, supervisor_gradient=through)
        grad, metrics = actor_grad(actor_net([0], [0.5]), critics, bst, batch, config)
        assert float(grad["params"]["Dense_1"]["bias"][0]) == pytest.approx(
            expected, abs=1e-5
        )
        # The loss is the same: .264917 * .16 - 1.
        assert float(metrics["actor_loss"]) == pytest.approx(-0.957613, abs=1e-5)


def test_the_largest_weight_is_finite():
    # mu = .02 and M = 0: loss e^50 d and gradient are float32 numbers.
    far = bst_of(net(([[0], [0]], [100])), mu=0.02)
    critics = twins(critic_net(0, [2], 0), critic_net(0, [2], 0))
    batch = transitions(2, action=-1.0)
    grad, metrics = actor_grad(actor_net([0], [0.9]), critics, far, batch, HAND)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((grad, metrics)))


# ============================================ Independent reference: numpy in float64


LARGE_STEPS = dataclasses.replace(
    QUIET, actor_learning_rate=0.1, critic_learning_rate=0.2, polyak=0.25
)


@pytest.fixture(scope="module")
def one_step():
    """Agent, supervisor and batch, with Adam's moments warm; and the same in numpy."""
    agent, bst = random_agent(2, LARGE_STEPS)
    agent = agent._replace(
        actor_opt=warm_adam(agent.actor_opt, 0),
        critic_opt=warm_adam(agent.critic_opt, 1),
    )
    batch = random_data(3, 16)
    return (
        agent,
        bst,
        batch,
        to_numpy((agent._replace(actor_opt=0, critic_opt=0), bst, batch)),
    )


def test_critic_step_against_numpy(one_step):
    agent, _, batch, (reference, _, rows) = one_step
    target = numpy_target(reference, rows, 0.9)
    loss = numpy_critic_loss(reference.critics, rows, target)
    grad = finite_differences(
        lambda critics: numpy_critic_loss(critics, rows, target), reference.critics
    )
    expected = numpy_adam(reference.critics, grad, agent.critic_opt, rate=0.2)

    stepped, metrics = update_critics(agent, batch, KEY, LARGE_STEPS)
    assert float(metrics["critic_loss"]) == pytest.approx(loss, rel=1e-5)
    assert float(metrics["critic_grad_norm"]) == pytest.approx(norm(grad), rel=1e-4)
    assert_same(stepped.critics, expected, tolerance=1e-5)
    q_data = numpy_q(reference.critics, rows.obs, rows.action)[0].mean()
    assert float(metrics["q_data"]) == pytest.approx(q_data, rel=1e-4)


@pytest.mark.parametrize("script", [td3_bst, td3_bc])
def test_only_the_actors_step_decays(script: Any):
    # A constant gradient's Adam step is the rate itself. One actor step in two
    # updates, so the cosine over 8 updates ends after 4 steps:
    # .1 (1 + cos(pi t / 4)) / 2 = .1, .0853553, .05, .0146447, 0, and 0 after.
    config = script.Config(
        actor_learning_rate=0.1, critic_learning_rate=0.2, actor_decay_updates=8
    )
    still = dataclasses.replace(config, actor_decay_updates=0)
    rates = [0.1, 0.0853553, 0.05, 0.0146447, 0, 0]
    (actor, critics), (constant, _) = map(script.optimizers, (config, still))
    assert adam_steps(actor, 6) == pytest.approx([-x for x in rates], abs=1e-5)
    assert adam_steps(critics, 6) == pytest.approx([-0.2] * 6, rel=1e-4)
    assert adam_steps(constant, 6) == pytest.approx([-0.1] * 6, rel=1e-4)


@pytest.mark.parametrize(("through", "cap"), [(True, 0.0), (False, 0.0), (True, 1.0)])
def test_actor_step_against_numpy(one_step, through: bool, cap: float):
    agent, _, batch, (reference, supervisor, rows) = one_step
    change: Any = dict(supervisor_gradient=through, omega_cap=cap)
    config = dataclasses.replace(LARGE_STEPS, **change)
    critics = reference.critics
    action = numpy_policy(reference.actor, rows.obs)
    z_q = np.abs(numpy_q(critics, rows.obs, action)[0]).mean()
    certainty = numpy_certainty(supervisor, rows.obs, action)
    omega = np.exp((1 - certainty) / supervisor.mu) - 1
    assert 0 < (omega > 1).sum() < len(omega)  # the cap of 1 holds some
    omega = np.minimum(omega, cap or math.inf)
    given = (
        critics,
        supervisor,
        rows,
        z_q,
        None if through else omega,
        cap or math.inf,
    )
    grad = finite_differences(
        lambda actor: numpy_actor_loss(actor, *given), reference.actor
    )
    expected = numpy_adam(reference.actor, grad, agent.actor_opt, rate=0.1)

    stepped, metrics = update_actor(agent, one_step[1], batch, batch.obs, config)
    loss = numpy_actor_loss(reference.actor, *given)
    assert float(metrics["actor_loss"]) == pytest.approx(loss, rel=1e-5)
    assert float(metrics["actor_grad_norm"]) == pytest.approx(norm(grad), rel=1e-4)
    assert float(metrics["certainty"]) == pytest.approx(certainty.mean(), rel=1e-5)
    assert float(metrics["omega"]) == pytest.approx(omega.mean(), rel=1e-5)
    assert float(metrics["omega_max"]) == pytest.approx(omega.max(), rel=1e-5)
    assert_same(stepped.actor, expected, tolerance=1e-5)
    # Targets: a quarter of the new parameters, three quarters of the old targets.
    for name in ("actor", "critics"):
        new, old = getattr(stepped, name), getattr(agent, f"target_{name}")
        mixed = jax.tree.map(lambda x, y: 0.25 * x + 0.75 * y, new, old)
        assert_same(getattr(stepped, f"target_{name}"), mixed, tolerance=1e-6)


@pytest.mark.parametrize(("cap", "omega"), [(10.0, 10.0), (2.5, 2.5), (0.0, None)])
def test_a_policy_far_out_does_not_spoil_adam(cap: float, omega: float | None):
    # M = 0, mu = .05: omega is e^20 - 1, 5e8. Adam keeps the gradient's square, less a
    # thousandth per step, so that for 40,000 steps no later gradient would move the
    # policy much. Capped, the pull is a constant one: omega d / d theta of distance.
    config = dataclasses.replace(SMALL, omega_cap=cap)
    agent, bst = random_agent(2, config)
    far = bst._replace(params=net(([[0, 0]] * 5, [100, 100])), mu=f32(0.05))
    batch = random_data(3, 16)
    grad, metrics = actor_grad(agent.actor, agent.critics, far, batch, config)
    if omega is None:
        assert float(optax.tree.norm(grad)) > 1e7
        return
    assert float(metrics["omega"]) == pytest.approx(omega)
    flat = dataclasses.replace(config, omega_cap=0.0, supervisor_gradient=False)
    even = far._replace(params=net(([[0, 0]] * 3 + [[1, 0], [0, 1]], [0, 0])))
    even = even._replace(floor=f32(omega))  # M = 1 everywhere
    other, _ = actor_grad(agent.actor, agent.critics, even, batch, flat)
    assert_same(grad, other, tolerance=1e-5)


def test_what_the_supervisor_gradient_adds(one_step):
    # mean over the batch of -(1/mu) e^(C/mu) d grad_a M . d pi / d theta.
    agent, bst, batch, (reference, supervisor, rows) = one_step
    action = numpy_policy(reference.actor, rows.obs)
    pull = finite_differences(
        lambda a: numpy_certainty(supervisor, rows.obs, a).sum(), action
    )  # grad_a M of each row, (B, A)
    certainty = numpy_certainty(supervisor, rows.obs, action)
    distance = ((action - rows.action) ** 2).sum(axis=1)
    weight = -np.exp((1 - certainty) / supervisor.mu) * distance / supervisor.mu
    added = finite_differences(
        lambda actor: np.mean(
            weight * (pull * numpy_policy(actor, rows.obs)).sum(axis=1)
        ),
        reference.actor,
    )
    (through, _), (stopped, _) = (
        actor_grad(
            agent.actor,
            agent.critics,
            bst,
            batch,
            dataclasses.replace(LARGE_STEPS, supervisor_gradient=switch),
        )
        for switch in (True, False)
    )
    difference = jax.tree.map(jnp.subtract, through, stopped)
    assert norm(added) > 0.1
    assert_same(difference, added, tolerance=1e-5)


# ============================================================================ Updates


def test_update_critics_changes_only_the_critics(one_step):
    agent, _, batch, _ = one_step
    stepped, _ = update_critics(agent, batch, KEY, LARGE_STEPS)
    assert_changed(stepped.critics, agent.critics)
    assert_changed(stepped.critic_opt[0], agent.critic_opt[0])
    changed = dict(critics=agent.critics, critic_opt=agent.critic_opt)
    assert_same(stepped._replace(**changed), agent)


def test_update_actor_changes_only_the_actor_and_the_targets(one_step):
    agent, bst, batch, _ = one_step
    stepped, _ = update_actor(agent, bst, batch, batch.obs, LARGE_STEPS)
    for name in ("actor", "target_actor", "target_critics"):
        assert_changed(getattr(stepped, name), getattr(agent, name))
    assert_changed(stepped.actor_opt[0], agent.actor_opt[0])
    assert_same(stepped.critics, agent.critics)
    assert_same(stepped.critic_opt, agent.critic_opt)


def test_polyak_one_copies(one_step):
    agent, bst, batch, _ = one_step
    config = dataclasses.replace(LARGE_STEPS, polyak=1.0)
    stepped, _ = update_actor(agent, bst, batch, batch.obs, config)
    assert_changed(stepped.target_actor, agent.actor)  # the new ones, not the old
    assert_same(stepped.target_actor, stepped.actor)
    assert_same(stepped.target_critics, stepped.critics)


def adam_count(opt_state: Any) -> int:
    return int(opt_state[0].count)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_update_is_its_parts(noise: float):
    # Updates 6 and 7: each of the critics on its own batch and noise from
    # fold_in(key, t); then one of the actor, on the last batch.
    agent, bst = random_agent(0)
    config = dataclasses.replace(SMALL, obs_noise=noise)
    data, expected = random_data(1, 50), agent
    batches, metrics, key_shown = [], {}, KEY
    for t in (6, 7):
        keys = jax.random.split(jax.random.fold_in(KEY, t), 3)
        key_batch, key_noise, key_shown = keys
        batches.append(td3_bst.sample(data, key_batch, 16))
        expected, metrics = update_critics(expected, batches[-1], key_noise, config)
    shown = td3_bst.noisy(batches[-1].obs, key_shown, config)
    expected, actor_metrics = update_actor(expected, bst, batches[-1], shown, config)
    got, got_metrics = update(agent, bst, data, KEY, jnp.int32(6), config)

    assert_same(got, expected, tolerance=1e-6)
    assert_same(got_metrics, metrics | actor_metrics, tolerance=1e-5)
    assert adam_count(got.critic_opt) == 2
    assert adam_count(got.actor_opt) == 1
    assert not np.array_equal(batches[0].reward, batches[1].reward)
    # Target critics follow the critics after both steps.
    mixed = jax.tree.map(
        lambda x, y: 0.005 * x + 0.995 * y, got.critics, agent.target_critics
    )
    assert_same(got.target_critics, mixed, tolerance=1e-6)


def test_td3_bc_shows_its_actor_the_noise():
    # One update on one row: the noise changes the actor's gradient, no critic.
    config = td3_bc.resolve(td3_bc.Config(hidden_dims=(8, 8)), "locomotion")
    data = td3_bc.Transition(*(x[:1] for x in random_data(1, 50)))
    agents = []
    for noise in (0.0, 0.5):
        own = dataclasses.replace(config, obs_noise=noise)
        agent = td3_bc.init(KEY, OBS_DIM, ACTION_DIM, own)
        step = jnp.int32(6), own
        agents.append(td3_bc.update(agent, f32(2.5), data, KEY, *step)[0])
    plain, noisy = agents
    assert_changed(noisy.actor_opt[0].mu, plain.actor_opt[0].mu)  # the gradient
    assert_same((noisy.critics, noisy.critic_opt), (plain.critics, plain.critic_opt))


def test_sample_draws_whole_rows_uniformly():
    number = jnp.arange(5.0)
    column = number[:, None]
    data = Transition(column, column, number, column, number)
    batch = td3_bst.sample(data, KEY, 10_000)
    assert batch.obs.shape == (10_000, 1)
    for field in batch:
        np.testing.assert_array_equal(jnp.ravel(field), batch.reward)
    # 2000 of each row expected, sd sqrt(10000 * .2 * .8) = 40.
    counts = np.bincount(np.asarray(batch.reward, int), minlength=5)
    assert counts == pytest.approx([2000] * 5, abs=160)


def test_init_copies_into_targets_and_can_be_donated():
    agent = td3_bst.init(KEY, 1, 1, HAND)
    assert_same(agent.target_actor, agent.actor)
    assert_same(agent.target_critics, agent.critics)
    expected = jax.tree.map(np.array, agent)
    donated = jax.jit(lambda tree: tree, donate_argnums=0)(agent)
    assert_same(donated, expected)


def test_init_draws_every_layer_by_its_fan_in():
    # U(+-1/sqrt(fan_in)), biases too: sd 1/sqrt(3 fan_in). fan_in is 3 (obs) or
    # 5 (obs, action), then 8. Of 30 seeds' 240 values, the least.
    agents = [
        init(jax.random.key(seed), OBS_DIM, ACTION_DIM, SMALL) for seed in range(30)
    ]
    for name, first in (("actor", 3), ("critics", 5)):
        for layer, fan_in in (("Dense_0", first), ("Dense_1", 8)):
            for kind in ("kernel", "bias"):
                x = np.array([getattr(a, name)["params"][layer][kind] for a in agents])
                assert 0.97 * fan_in**-0.5 < np.abs(x).max() <= fan_in**-0.5
                assert x.std() == pytest.approx((3 * fan_in) ** -0.5, rel=0.15)
    kernels = agents[0].critics["params"]["Dense_0"]["kernel"]
    assert not np.array_equal(kernels[0], kernels[1])


# ============================================================================ prepare


def raw_data(dtype: Any = np.float64) -> Any:
    """Two transitions in numpy."""
    fields: list[Any] = [
        [[1.0, 5.0], [3.0, 5.0]],  # obs
        [[0.25], [-1.0]],  # action
        [10.0, 0.0],  # reward
        [[3.0, 5.0], [7.0, 5.001]],  # next_obs
        [0.0, 1.0],  # terminal
    ]
    return Transition._make(np.array(field, dtype) for field in fields)


def test_prepare():
    # obs: mean (2, 5), sd (1, 0), plus 1e-3. (1 - 2) / 1.001 = -.999001; next_obs by
    # the same numbers: (7 - 2) / 1.001 = 4.995005, (5.001 - 5) / .001 = 1.
    # reward: 10 * 2 - 1 = 19; shifted first it would be (10 - 1) * 2 = 18.
    config = dataclasses.replace(
        SMALL, normalize_obs=True, reward_scale=2.0, reward_shift=-1.0
    )
    data, mean, std = td3_bst.prepare(raw_data(), config)
    assert mean == pytest.approx(np.array([2, 5]))
    assert std == pytest.approx(np.array([1.001, 0.001]))
    assert data.obs == pytest.approx(
        np.array([[-0.999001, 0], [0.999001, 0]]), abs=1e-6
    )
    assert data.next_obs == pytest.approx(
        np.array([[0.999001, 0], [4.995005, 1.0]]), rel=1e-3, abs=1e-6
    )
    assert data.reward == pytest.approx(np.array([19, -1]))
    np.testing.assert_array_equal(data.action, [[0.25], [-1.0]])
    np.testing.assert_array_equal(data.terminal, [0.0, 1.0])
    assert {np.asarray(x).dtype for x in (*data, mean, std)} == {np.dtype("float32")}


def test_prepare_without_normalisation():
    raw = raw_data()
    data, mean, std = td3_bst.prepare(raw, SMALL)
    np.testing.assert_array_equal(mean, [0, 0])
    np.testing.assert_array_equal(std, [1, 1])
    np.testing.assert_array_equal(data.obs, raw.obs)
    np.testing.assert_array_equal(data.next_obs, np.float32(raw.next_obs))
    np.testing.assert_array_equal(data.reward, raw.reward)


def test_prepare_leaves_its_input_alone():
    raw = raw_data(np.float32)
    before = [np.array(x) for x in raw]
    config = dataclasses.replace(
        SMALL, normalize_obs=True, reward_scale=2.0, reward_shift=-1.0
    )
    td3_bst.prepare(raw, config)
    assert_same(list(raw), before)


def test_prepare_is_precise_for_a_million_rows():
    # Half the rows 1000, half 1001: mean 1000.5, sd .5, plus 1e-3. Summed row by row in
    # float32, whose steps near 1e9 are 64, the mean would come out as 1010.
    num = 1_000_000
    pair = np.array([[1000, 1001], [1001, 1000]], np.float32)
    obs: Any = np.tile(pair, (num // 2, 1))
    flat: Any = np.zeros(num, np.float32)
    config = dataclasses.replace(SMALL, normalize_obs=True)
    data = Transition(obs, obs, flat, obs, flat)
    _, mean, std = td3_bst.prepare(data, config)
    assert mean == pytest.approx(np.array([1000.5, 1000.5]), abs=1e-4)
    assert std == pytest.approx(np.array([0.501, 0.501]), abs=1e-6)


def steps_of(num: int) -> Any:
    """Rewards 1, 2, 4 of an episode that ends, 8, 16 of one that is cut off."""
    rows = np.arange(5, dtype=np.float32)[:, None]
    reward = np.array([1, 2, 4, 8, 16], np.float32)
    terminal = np.array([0, 0, 1, 0, 0], np.float32)
    data = Transition._make((rows, rows, reward, rows + 100, terminal))
    config = dataclasses.replace(SMALL, n_step=num, discount=0.5)
    return td3_bst.n_step(data, np.array([0, 0, 0, 1, 1]), config)


def test_two_steps_by_hand():
    data = steps_of(2)
    # 1 + 2/2 = 2, 2 + 4/2 = 4, 4; 8 + 16/2 = 16, 16.
    assert data.reward.tolist() == [2, 4, 4, 16, 16]
    assert data.next_obs.ravel().tolist() == [101, 102, 102, 104, 104]
    # Two steps: 1 - 1/2, or 1 where the second ends; one step: its own.
    assert data.terminal.tolist() == [0.5, 1, 1, 0.5, 0]
    assert data.obs.ravel().tolist() == data.action.ravel().tolist() == [0, 1, 2, 3, 4]
    assert {x.dtype for x in data} == {np.dtype("float32")}


def test_more_steps_than_an_episode_has_are_its_return():
    for num in (3, 1000):
        data = steps_of(num)
        # 1 + 2/2 + 4/4 = 3; the third step of the first episode ends it.
        assert data.reward.tolist() == [3, 4, 4, 16, 16]
        assert data.next_obs.ravel().tolist() == [102, 102, 102, 104, 104]
        assert data.terminal.tolist() == [1, 1, 1, 0.5, 0]


@pytest.mark.parametrize("label", [0, -1])
def test_a_terminal_transition_ends_an_episode_whose_label_goes_on(label: int):
    flat: Any = np.ones(4, np.float32)
    rows = flat[:, None]
    terminal: Any = np.array([0, 1, 0, 0], np.float32)
    data = Transition(rows, rows, flat, rows, terminal)
    config = dataclasses.replace(SMALL, n_step=1000, discount=0.5)
    data = td3_bst.n_step(data, np.full(4, label), config)
    assert data.reward.tolist() == [1.5, 1, 1.5, 1]
    assert data.terminal.tolist() == [1, 1, 0.5, 0]
    with pytest.raises(ValueError, match="every transition's episode"):
        td3_bst.n_step(data, np.zeros(3), config)


def test_one_step_is_the_data_itself():
    data = steps_of(1)
    assert data.reward.tolist() == [1, 2, 4, 8, 16]
    assert data.terminal.tolist() == [0, 0, 1, 0, 0]


def test_the_target_of_two_steps_by_hand():
    # y = 2 + 1/4 Q' in place of 1 + 1/2 (2 + 1/2 Q'): the same.
    data = jax.tree.map(jnp.asarray, steps_of(2))
    agent, _ = random_agent(0, config := dataclasses.replace(SMALL, policy_noise=0.0))
    config = dataclasses.replace(config, discount=0.5)
    data = data._replace(next_obs=jnp.tile(data.next_obs / 100, (1, 3))[:, :OBS_DIM])
    plain = data._replace(reward=0 * data.reward, terminal=0 * data.terminal)
    half_q = td3_bst.td_target(agent, plain, KEY, config)
    y = td3_bst.td_target(agent, data, KEY, config)
    assert float(y[0]) == pytest.approx(2 + float(half_q[0]) / 2, rel=1e-5)
    assert float(y[1]) == pytest.approx(4)


# ============================================================================== train


@pytest.fixture(scope="module")
def trained():
    """Updates 0 to 19 in one call, and what went in."""
    agent, bst = random_agent(0)
    data = random_data(1, 50)
    return agent, bst, data, train(agent, bst, data, KEY, jnp.int32(0), 20, SMALL)


def test_two_chunks_equal_one(trained):
    agent, bst, data, (whole, metrics) = trained
    half, first = train(agent, bst, data, KEY, jnp.int32(0), 10, SMALL)
    # What a resumed run starts from: numpy arrays that have been away.
    half = jax.tree.map(lambda x: jnp.asarray(np.array(x)), half)
    both, second = train(half, bst, data, KEY, jnp.int32(10), 10, SMALL)
    assert_same(both, whole)
    assert adam_count(whole.critic_opt) == 20
    assert adam_count(whole.actor_opt) == 10

    for name in metrics.keys() - {"omega_max"}:
        mean = (first[name] + second[name]) / 2
        assert float(metrics[name]) == pytest.approx(float(mean), rel=1e-4, abs=1e-6)
    largest = max(float(first["omega_max"]), float(second["omega_max"]))
    assert float(metrics["omega_max"]) == largest


def test_train_is_update_repeated(trained):
    agent, bst, data, (whole, metrics) = trained
    seen = []
    for step in range(0, 20, 2):
        agent, step_metrics = update(agent, bst, data, KEY, jnp.int32(step), SMALL)
        seen.append(step_metrics)
    assert_same(agent, whole, tolerance=1e-5)
    largest = max(float(m["omega_max"]) for m in seen)
    assert float(metrics["omega_max"]) == pytest.approx(largest, rel=1e-4)
    assert set(metrics) == set(seen[0])
    for name in metrics.keys() - {"omega_max"}:
        mean = np.mean([float(m[name]) for m in seen])
        assert float(metrics[name]) == pytest.approx(mean, rel=1e-3, abs=1e-5)


def test_no_key_is_used_twice():
    config = dataclasses.replace(SMALL, hidden_dims=(2,))
    agent, bst = random_agent(0, config)
    with jax.debug_key_reuse(True):
        train(
            agent, bst, random_data(1, 50), jax.random.key(1), jnp.int32(0), 4, config
        )
