"""The Morse network: its equations by hand, its optimum in closed form, its command."""

import dataclasses
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import adam_steps

import morse
import td3_bst
from morse import Config

ROOT = Path(morse.__file__).parent
SMALL = Config(hidden_dims=(8,), batch_size=16)
RQ = Config(kernel="rq", kappa=2.0)


@pytest.fixture(autouse=True)
def _strict_ranks() -> Iterator[None]:
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def dataset() -> tuple[jax.Array, jax.Array]:
    """obs (200, 3), action (200, 2)."""
    obs = jax.random.normal(jax.random.key(10), (200, 3))
    return obs, jax.random.uniform(jax.random.key(11), (200, 2), minval=-1, maxval=1)


def shift(*by: float) -> dict[str, Any]:
    """Parameters of the linear network f(s, a) = a + by, for S = 1."""
    dim = len(by)
    kernel = jnp.concatenate([jnp.zeros((1, dim)), jnp.eye(dim)])
    return {"Dense_0": {"kernel": kernel, "bias": jnp.array(by)}}


# =========================================================================== Equations


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # r^2 = .3^2 + .4^2 = .25, lam = 2: lam^2 / 2 r^2 = .5
        (Config(), -0.5),
        # kappa = 2: -2 log(1 + .5 / 2) = -2 log 1.25 = -.446287
        (RQ, -0.446287),
        # kappa = .5: -.5 log(1 + .5 / .5) = -.5 log 2 = -.346574
        (Config(kernel="rq", kappa=0.5), -0.346574),
    ],
)
def test_kernels_by_hand(config, expected):
    inputs = shift(0.3, -0.4), jnp.zeros((5, 1)), jnp.full((5, 2), 0.1), 2.0, config
    np.testing.assert_allclose(morse.log_density(*inputs), [expected] * 5, rtol=1e-5)
    np.testing.assert_allclose(
        morse.certainty(*inputs), [np.exp(expected)] * 5, rtol=1e-5
    )
    np.testing.assert_allclose(
        morse.uncertainty(*inputs), [1 - np.exp(expected)] * 5, rtol=1e-5
    )


def test_rational_quadratic_becomes_rbf_as_kappa_grows():
    inputs = shift(0.3, -0.4), jnp.zeros(1), jnp.zeros(2), 2.0
    rbf = float(morse.log_density(*inputs))
    gaps = [
        abs(float(morse.log_density(*inputs, Config(kernel="rq", kappa=k))) - rbf)
        for k in (1.0, 10.0, 100.0, 1e5)
    ]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-5


def test_relu_network_by_hand():
    # One hidden unit: h = relu(1 s + 2 a - 1), f = 3 h + .5.
    # s = 1, a = .5: h = 1, f = 3.5; s = 0, a = .25: h = relu(-.5) = 0, f = .5.
    params = {
        "Dense_0": {"kernel": jnp.array([[1.0], [2.0]]), "bias": jnp.array([-1.0])},
        "Dense_1": {"kernel": jnp.array([[3.0]]), "bias": jnp.array([0.5])},
    }
    found = morse.perturb(params, jnp.array([[1.0], [0.0]]), jnp.array([[0.5], [0.25]]))
    np.testing.assert_allclose(found, [[3.5], [0.5]])


def test_loss_by_hand():
    # f = .5 whatever s and a, lam = 2, so log M = -2 (.5 - a)^2.
    # Data a = 0, 1: log M = -.5, -.5; first term .5.
    # Negatives (.5, 0), (-.5, 1): M = 1, e^-.5, e^-2, e^-.5;
    # mean (1 + .606531 + .135335 + .606531) / 4 = .587099. Loss 1.087099.
    params = {"Dense_0": {"kernel": jnp.zeros((2, 1)), "bias": jnp.array([0.5])}}
    negatives = jnp.array([[[0.5], [0.0]], [[-0.5], [1.0]]])
    action = jnp.array([[0.0], [1.0]])
    loss, metrics = morse.morse_loss(
        params, jnp.ones((2, 1)), action, negatives, 2.0, Config()
    )
    np.testing.assert_allclose(loss, 1.087099, rtol=1e-6)
    np.testing.assert_allclose(metrics["certainty_data"], 0.606531, rtol=1e-6)
    np.testing.assert_allclose(metrics["certainty_negatives"], 0.587099, rtol=1e-6)


@pytest.mark.parametrize("config", [Config(), RQ])
def test_identity_has_certainty_and_loss_exactly_one(config, dataset):
    obs, action = dataset
    negatives = jax.random.uniform(jax.random.key(0), (200, 3, 2), minval=-1, maxval=1)
    params = shift(0.0, 0.0)
    assert (morse.certainty(params, obs[:, :1], action, 7.0, config) == 1).all()
    assert (morse.uncertainty(params, obs[:, :1], action, 7.0, config) == 0).all()
    loss, _ = morse.morse_loss(params, obs[:, :1], action, negatives, 7.0, config)
    assert loss == 1.0


def test_loss_stays_finite_where_certainty_underflows():
    # r^2 = 100, lam = 10: log M = -5000, M = 0 in float32; the loss is 5000.
    params = {"Dense_0": {"kernel": jnp.zeros((2, 1)), "bias": jnp.array([10.0])}}
    zeros = jnp.zeros((1, 1))
    grad, metrics = jax.grad(morse.morse_loss, has_aux=True)(
        params, zeros, zeros, zeros[None], 10.0, Config()
    )
    np.testing.assert_allclose(metrics["morse_loss"], 5000.0)
    # d/db of lam^2/2 b^2 = lam^2 b = 1000
    np.testing.assert_allclose(grad["Dense_0"]["bias"], [1000.0])


@pytest.mark.parametrize("config", [Config(), RQ])
def test_uncertainty_is_accurate_near_zero(config):
    # r = 1e-5, lam = 1: C = 5e-11, far below the spacing of float32 at 1 (6e-8)
    inputs = shift(1e-5), jnp.zeros(1), jnp.zeros(1), 1.0, config
    np.testing.assert_allclose(morse.uncertainty(*inputs), 5e-11, rtol=1e-5)
    assert 1 - morse.certainty(*inputs) == 0


def test_negatives_stay_in_the_box_and_have_the_stated_law():
    # Data at (0, .9); sd log-uniform on [.01, 1], so P(sd < .1) = 1/2, and with sd = s
    # P(|noise| < .1) = erf(.1 / (s sqrt 2)): averaged over log s that is .6206.
    action = jnp.tile(jnp.array([[0.0, 0.9]]), (20_000, 1))
    config = Config(negatives="perturbed", noise=(0.01, 1.0), num_negatives=3)
    found = np.asarray(morse.draw_negatives(jax.random.key(0), action, config))
    assert found.shape == (20_000, 3, 2)
    assert abs(found).max() == 1.0  # clipped onto the face, not drawn again
    assert (found[..., 1] == 1.0).mean() > 0.1
    sd = np.exp(np.linspace(np.log(0.01), 0, 2001))
    inside = np.mean([math.erf(0.1 / (s * math.sqrt(2))) for s in sd])
    assert inside == pytest.approx(0.6206, abs=2e-3)
    assert (abs(found[..., 0]) < 0.1).mean() == pytest.approx(inside, abs=0.01)
    # One sd for all dimensions of a negative: their sizes go together.
    size = np.log(abs(found[..., 0].ravel()) + 1e-9)
    other = np.log(abs(found[..., 1].ravel() - 0.9) + 1e-9)
    assert np.corrcoef(size, other)[0, 1] > 0.3
    uniform = dataclasses.replace(config, negatives="uniform")
    flat = np.asarray(morse.draw_negatives(jax.random.key(0), action, uniform))
    assert flat.mean() == pytest.approx(0.0, abs=0.01)
    assert flat.std() == pytest.approx(1 / math.sqrt(3), abs=0.01)


def test_leading_dims_broadcast():
    params = morse.init(jax.random.key(0), 3, 2, SMALL).params
    obs = jax.random.normal(jax.random.key(1), (4, 3))
    action = jax.random.uniform(jax.random.key(2), (6, 4, 2))
    found = morse.certainty(params, obs, action, 1.0)
    assert found.shape == (6, 4)
    one = morse.certainty(params, obs[3], action[2, 3], 1.0)
    np.testing.assert_allclose(found[2, 3], one, rtol=1e-5)
    assert morse.certainty(params, obs[0], action, 1.0).shape == (6, 4)


# ============================================================= Optimum in closed form
# M* = min(1, p / q), q = u for uniform negatives. Where p / q is steep, single networks
# scatter by up to .1 (2-D), so four seeds are fitted side by side and their median is
# judged; the last updates run at a tenth of the learning rate. A million actions: of
# 100,000 a sample can hold 12 % too many at a point, which the network rightly learns.

NET: Any = {"hidden_dims": (64, 64, 64), "batch_size": 256, "negatives": "uniform"}
FAST, SLOW = Config(learning_rate=1e-3, **NET), Config(learning_rate=1e-4, **NET)


def fitted_certainty(
    sd: list[float],
    action: jax.Array,
    scale: jax.Array,
    configs: tuple[Config, Config] = (FAST, SLOW),
    seeds: range = range(4),
) -> np.ndarray:
    """Median over seeds of M at `action`, fitted to N(0, diag(sd^2)) in the box."""
    rng = np.random.default_rng(0)
    data = rng.standard_normal((1_000_000, len(sd)), dtype=np.float32) * np.asarray(
        sd, np.float32
    )
    data = jnp.asarray(data[(abs(data) < 1).all(axis=1)])
    obs = jnp.zeros((len(data), 1))

    def run(seed: jax.Array) -> jax.Array:
        key_init, key = jax.random.split(jax.random.key(seed))
        state = morse.init(key_init, 1, len(sd), configs[0])
        for start, count, config in ((0, 3000, configs[0]), (3000, 1000, configs[1])):
            state, _ = morse.train(state, obs, data, key, start, count, scale, config)
        return morse.certainty(state.params, obs[0], action, scale)

    return np.median(jax.vmap(run)(jnp.arange(seeds.start, seeds.stop)), axis=0)


# N(0, .3^2), u = 1/2: p / u = 2 / (.3 sqrt(2 pi)) e^(-a^2 / .18)
#                            = 2.6596 e^(-a^2 / .18)
# a = .5: 2.6596 e^-1.38889 = .663; a = .6: .360; .7: .175; .8: .076; .9: .030
ACTIONS_1D = jnp.array([0.0, 0.2, -0.2, 0.5, -0.5, 0.6, 0.7, 0.8, 0.9])[:, None]
OPTIMUM_1D = [1.0, 1.0, 1.0, 0.663, 0.663, 0.360, 0.175, 0.076, 0.030]


@pytest.mark.parametrize("scale", [0.5, 5.0])
def test_optimum_in_1d_whatever_the_scale(scale):
    found = fitted_certainty([0.3], ACTIONS_1D, jnp.array(scale))
    np.testing.assert_allclose(found, OPTIMUM_1D, atol=0.05)


def test_optimum_in_1d_whatever_the_number_of_negatives():
    fast, slow = (dataclasses.replace(c, num_negatives=4) for c in (FAST, SLOW))
    found = fitted_certainty([0.3], ACTIONS_1D, jnp.array(1.0), (fast, slow), range(1))
    np.testing.assert_allclose(found, OPTIMUM_1D, atol=0.05)


def test_optimum_with_perturbed_negatives():
    # Data N(0, .15^2), noise of sd s log-uniform on [.05, 1]: q(a) is the mean over
    # log s of N(a; 0, .15^2 + s^2), and M* = min(1, p / q): 1 up to |a| = .223
    # (with uniform negatives up to .274), .585 at .3, .096 at .45.
    sd = np.exp(np.linspace(np.log(0.05), 0, 4001))

    def density(action, variance):
        return np.exp(-(action**2) / 2 / variance) / np.sqrt(2 * np.pi * variance)

    action = np.array([0.0, 0.1, -0.15, 0.25, 0.3, -0.35, 0.45, 0.7])
    blurred = density(action[:, None], 0.15**2 + sd**2).mean(axis=1)
    optimum = np.minimum(1.0, density(action, 0.15**2) / blurred)
    assert optimum[4] == pytest.approx(0.585, abs=1e-3)
    change: Any = dict(negatives="perturbed", noise=(0.05, 1.0))
    configs = [dataclasses.replace(c, **change) for c in (FAST, SLOW)]
    at = jnp.array(action, jnp.float32)[:, None]
    found = fitted_certainty([0.15], at, jnp.array(1.0), (configs[0], configs[1]))
    np.testing.assert_allclose(found, optimum, atol=0.07)


def test_optimum_in_2d():
    # Standard deviations .15 and .4, u = 1/4: p / u = 4 / (2 pi .15 .4) e^(-d) with
    # d = a^2 / .045 + b^2 / .32, and 4 / (2 pi .06) = 10.610
    # (.4, 0): d = 3.5556, .303; (0, .9): d = 2.5313, .844; (.2, .8): d = 2.8889, .590
    # (.35, 0): d = 2.7222, .697; (-.3, -.5): d = 2.7813, .657; (-.8, .8): 7e-7
    x = [0.0, 0.1, 0.4, 0.0, 0.2, 0.35, -0.3, -0.8]
    y = [0.0, 0.3, 0.0, 0.9, 0.8, 0.0, -0.5, 0.8]
    optimum = [1.0, 1.0, 0.303, 0.844, 0.590, 0.697, 0.657, 0.0]
    action = jnp.stack([jnp.array(x), jnp.array(y)], axis=-1)
    found = fitted_certainty([0.15, 0.4], action, jnp.array(1.0))
    np.testing.assert_allclose(found, optimum, atol=0.1)
    assert np.mean(abs(found - optimum)) < 0.05


# ================================================================ Spread of the actions


def spread(obs: np.ndarray, action: np.ndarray) -> float:
    return morse.action_spread(morse.like_states(obs, action))


def drift(obs: np.ndarray, action: np.ndarray) -> float:
    return morse.log_drift(morse.like_states(obs, action))


def test_action_spread_by_hand():
    # Pairs of states far from each other; within a pair the actions differ by
    # (.2, 0), (.4, .4) and (0, 0): half the mean square is (.04 + .16 + .16) / 12.
    obs = np.array([[0.0], [0.1], [5.0], [5.1], [9.0], [9.1]])
    action = np.array([[0, 0], [0.2, 0], [0.5, 0.5], [0.9, 0.9], [1, 1], [1, 1]])
    assert spread(obs, action) == pytest.approx(np.sqrt(0.36 / 12))
    assert spread(obs[:1], action[:1]) == 0.0  # nothing to compare with


@pytest.mark.parametrize("sigma", [0.02, 0.3])
@pytest.mark.parametrize("size", [300, 250_000])
def test_action_spread_is_the_noise_of_the_behaviour(sigma: float, size: int):
    rng = np.random.default_rng(0)
    obs = rng.uniform(-1, 1, (size, 2)) * [1, 1000] + [0, 1e5]  # units of any size
    noise = sigma * rng.standard_normal((size, 3))
    found = spread(obs, np.zeros((size, 3)) + noise)
    assert found == pytest.approx(sigma, rel=0.1)
    assert spread(obs, noise * 2) == pytest.approx(2 * found)
    if size > 1000:
        # What the state decides does not count, where there are states enough.
        found = spread(obs, 0.3 * np.sin(3 * obs[:, :1]) + noise)
        assert found == pytest.approx(sigma, rel=0.1)


def test_action_spread_where_noise_lasts_and_where_transitions_are_there_twice():
    # The nearest state of all is the one a step before, with nearly the same noise.
    rng = np.random.default_rng(0)
    obs = np.sin(np.cumsum(0.05 * rng.standard_normal((30_000, 2)), axis=0))
    noise = np.zeros((30_000, 2))
    for t, fresh in enumerate(
        0.3 * np.sqrt(1 - 0.99**2) * rng.standard_normal((30_000, 2))
    ):
        noise[t] = 0.99 * noise[t - 1] + fresh
    found = spread(obs, noise)
    assert found == pytest.approx(0.3, rel=0.1)
    twice = spread(np.tile(obs, (2, 1)), np.tile(noise, (2, 1)))
    assert twice == pytest.approx(found, rel=0.1)
    assert spread(np.ones((50, 2)), np.ones((50, 2))) == 0.0


def test_like_states_by_hand():
    # Rows 0 and 3, 2 and 4, 5 and 6 have each other's nearest state; row 1 is row 0.
    # Their actions differ by .1 and .1, by .1 and .1, by .1 and .3.
    obs = np.array([[0.0], [0.0], [5.0], [0.1], [5.1], [9.0], [9.1]])
    action = np.array([[0, 0], [0, 0], [10, 0], [1, 1], [9, 1], [0, 5], [1, 8]]) / 10
    when, when_like, squares, size = morse.like_states(obs, action)
    assert size == 7
    assert when.tolist() == [0, 2, 3, 4, 5, 6]
    assert when_like.tolist() == [3, 4, 0, 2, 6, 5]
    assert squares == pytest.approx([0.01, 0.01, 0.01, 0.01, 0.05, 0.05])


@pytest.mark.parametrize(("size", "away"), [(40, 4), (20_000, 1000)])
def test_like_states_are_more_than_so_many_steps_away(size: int, away: int):
    obs = np.arange(float(size))[:, None]  # a step further is a state further
    when, when_like, *_ = morse.like_states(obs, obs)
    assert (np.abs(when - when_like) == away + 1).all()


def test_log_drift_is_a_correlation_of_places():
    # States that go up and come down again: the one most like it is that of the other
    # half, at the same height, so late ones are like early ones, but near the turn.
    height = np.concatenate([np.arange(10_000), np.arange(9999.4, 0, -1)])[:, None]
    assert drift(height, height) == pytest.approx(-1, abs=0.1)
    rise = height[:10_000]  # and here, like those just before and after
    assert drift(rise, rise) > 0.9
    assert drift(rise[1:], rise[1:]) == 0.0  # too few to tell
    few = np.tile(height[:50], (500, 1))  # 50, again and again
    assert drift(few, few) == 0.0
    many = np.tile(height[:500], (40, 1))  # each of which is too close to all others
    assert drift(many, many) == 0.0


@pytest.mark.parametrize("size", [10_000, 150_000])
def test_log_drift_tells_one_policy_from_several(size: int):
    rng = np.random.default_rng(0)
    obs = rng.uniform(-1, 1, (size, 2)) * [1, 1000] + [0, 1e5]  # units of any size
    action = rng.uniform(-1, 1, (size, 2))
    assert -0.3 < drift(obs, action) < 0.1
    own = rng.uniform(-1, 1, (size // 100, 2)) * [10, 1e4]  # each episode's
    own = np.repeat(own, 100, axis=0)
    assert drift(obs + own, action) < 0.3
    later = np.linspace(0, 2, size)[:, None] * [1, 1000]
    assert drift(obs + later, action) > 0.3  # as an agent learns
    second = later[:, :1] > 1  # of two policies
    assert drift(obs + second * [2, 0], action) > 0.3
    assert drift(rng.permutation(obs + later), action) < 0.1


# ============================================================================= Updates


def test_chunks_change_nothing(dataset):
    state, key = morse.init(jax.random.key(0), 3, 2, SMALL), jax.random.key(1)
    whole, _ = morse.train(state, *dataset, key, 0, 40, 1.0, SMALL)
    half, _ = morse.train(state, *dataset, key, 0, 20, 1.0, SMALL)
    halves, _ = morse.train(half, *dataset, key, 20, 20, 1.0, SMALL)
    jax.tree.map(np.testing.assert_array_equal, whole, halves)


def test_metrics_are_the_mean_over_the_scan(dataset):
    state, key = morse.init(jax.random.key(0), 3, 2, SMALL), jax.random.key(1)
    _, mean = morse.train(state, *dataset, key, 0, 3, 1.0, SMALL)
    losses = []
    for t in range(3):
        state, metrics = morse.train(state, *dataset, key, t, 1, 1.0, SMALL)
        losses.append(metrics["morse_loss"])
    np.testing.assert_allclose(mean["morse_loss"], np.mean(losses), rtol=1e-5)


def test_update_t_uses_the_folded_key(dataset):
    state, key = morse.init(jax.random.key(0), 3, 2, SMALL), jax.random.key(1)
    scanned, _ = morse.train(state, *dataset, key, 7, 1, 1.0, SMALL)
    obs, action = dataset
    update = jax.jit(morse.update, static_argnames="config")
    alone, _ = update(state, obs, action, jax.random.fold_in(key, 7), 1.0, config=SMALL)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        scanned.params,
        alone.params,
    )


def test_seeds_together_agree_with_each_alone(dataset):
    def run(seed: jax.Array, scale: jax.Array) -> morse.MorseState:
        key_init, key = jax.random.split(jax.random.key(seed))
        state = morse.init(key_init, 3, 2, SMALL)
        return morse.train(state, *dataset, key, 0, 100, scale, SMALL)[0]

    scales = jnp.array([0.5, 1.0, 2.0])
    together = jax.vmap(run)(jnp.arange(3), scales)
    for lane in (0, 2):
        alone = run(jnp.array(lane), scales[lane])
        jax.tree.map(
            lambda x, y, lane=lane: np.testing.assert_allclose(x[lane], y, atol=1e-5),
            together.params,
            alone.params,
        )


def test_the_rate_decays():
    # A constant gradient's Adam step is the rate itself; a cosine to 0 over 4 updates.
    config = dataclasses.replace(SMALL, learning_rate=0.1, decay_updates=4)
    rates = [0.1, 0.0853553, 0.05, 0.0146447, 0, 0]
    steps = adam_steps(morse.optimizer(config), 6)
    assert steps == pytest.approx([-x for x in rates], abs=1e-5)
    for still in (0, None):
        config = dataclasses.replace(config, decay_updates=still)
        steps = adam_steps(morse.optimizer(config), 6)
        assert steps == pytest.approx([-0.1] * 6, rel=1e-4)


@pytest.mark.parametrize(("asked", "ends"), [(None, 40), (0, 0), (100, 100)])
def test_a_fit_decays_over_its_own_length(dataset, asked: int | None, ends: int):
    config = dataclasses.replace(SMALL, decay_updates=asked)
    key_init, key = jax.random.split(jax.random.key(4))
    given = dataclasses.replace(SMALL, decay_updates=ends)
    state = morse.init(key_init, 3, 2, given)
    expected, _ = morse.train(state, *dataset, key, 0, 40, 1.0, given)
    params, _ = morse.fit(
        jax.random.key(4), *dataset, scale=1.0, num_updates=40, config=config
    )
    jax.tree.map(np.testing.assert_array_equal, params, expected.params)


def test_fit_learns_and_does_what_train_does(dataset, monkeypatch):
    obs, _ = dataset
    action = 0.1 * jnp.tanh(obs[:, :2])
    monkeypatch.setattr(morse, "MAX_CHUNK", 200)
    calls = []
    params, losses = morse.fit(
        jax.random.key(3),
        obs,
        action,
        scale=5.0,
        num_updates=500,
        config=Config(hidden_dims=(32, 32), learning_rate=3e-3),
        report=lambda count, loss: calls.append(count),
    )
    assert losses.shape == (3,)
    assert losses[-1] < 0.4  # 1 is the identity's
    assert calls == [200, 200, 100]
    assert morse.certainty(params, obs, action, 5.0).mean() > 0.8
    assert morse.certainty(params, obs, -jnp.sign(action), 5.0).mean() < 0.2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"obs": np.zeros((9, 3))}, "same N"),
        ({"obs": np.zeros((0, 3)), "action": np.zeros((0, 2))}, "same N"),
        ({"action": np.zeros(10)}, "same N"),
        ({"obs": np.full((10, 3), np.nan)}, "infinity in obs"),
        ({"action": np.full((10, 2), np.inf)}, "infinity in action"),
        ({"action": np.full((10, 2), 1.5)}, r"in \[-1, 1\], got \[1.5, 1.5\]"),
        ({"scale": 0.0}, "scale > 0, got 0.0"),
        ({"scale": float("nan")}, "scale > 0, got nan"),
        ({"num_updates": 0}, "num_updates >= 1, got 0"),
    ],
)
def test_fit_says_what_is_wrong(change, message):
    inputs: dict[str, Any] = {
        "obs": np.zeros((10, 3)),
        "action": np.zeros((10, 2)),
        "scale": 1.0,
        "num_updates": 1,
    }
    inputs |= change
    with pytest.raises(ValueError, match=message):
        morse.fit(jax.random.key(0), config=SMALL, **inputs)


@pytest.mark.parametrize(
    "field",
    [
        {"kernel": "laplace"},
        {"kappa": 0.0},
        {"num_negatives": 0},
        {"hidden_dims": (0,)},
        {"negatives": "permuted"},
        {"noise": (0.0, 1.0)},
        {"noise": (0.5, 0.1)},
    ],
)
def test_config_says_what_is_wrong(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        Config(**field)


# ============================================================================== Module


def test_auroc_by_hand():
    # Pairs (2,1) (2,2) (3,1) (3,2): 1 + 1/2 + 1 + 1 = 3.5 of 4
    assert morse.auroc(np.array([2.0, 3.0]), np.array([1.0, 2.0])) == 0.875
    assert morse.auroc(np.zeros(5), np.zeros(7)) == 0.5
    assert morse.auroc(np.array([1.0]), np.array([0.0, 2.0, 3.0])) == 1 / 3


# ============================================================================= Command


def command(*options: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "morse.py", *map(str, options)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_toy_draws_its_picture_and_ends_with_its_folder(tmp_path):
    done = command("--num-morse-updates", 5, "--hidden-dims", 8, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "ideal 0.0967" in done.stdout
    folder = tmp_path / done.stdout.splitlines()[-1]
    assert folder.parent == tmp_path / "runs"
    assert (folder / "toy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "options",
    [("--num-morse-updates", 0), ("--kappa", 0)],
)
def test_mistakes_end_with_exit_code_2(options, tmp_path):
    done = command(*options, cwd=tmp_path)
    assert done.returncode == 2
    assert f"got {options[1]}" in done.stderr
    assert not any(tmp_path.iterdir())


def test_calibration_sees_observations_as_td3_bst_does():
    # Or --morse could not take its networks.
    own = morse.Options().normalize_obs
    assert {own} == {d["normalize_obs"] for d in td3_bst.DEFAULTS.values()}


def test_calibration_report(tmp_path):
    rng = np.random.default_rng(0)
    end = np.arange(400) % 20 == 19
    np.savez(
        tmp_path / "own.npz",
        observations=rng.normal(size=(400, 3)).astype(np.float32),
        actions=rng.uniform(-1, 1, (400, 2)).astype(np.float32),
        rewards=np.zeros(400, np.float32),
        terminals=np.zeros(400, bool),
        timeouts=end,
    )
    few = "--num-morse-updates", 5, "--hidden-dims", 8
    asked = "--dataset", tmp_path / "own.npz", "--scale", 1, 5, "--num-seeds", 2
    done = command(*asked, *few, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / done.stdout.splitlines()[-1]
    lines = (folder / "calibration.csv").read_text().splitlines()
    assert lines[0].startswith("scale,seed,certainty_data,certainty_held_out")
    assert [line.split(",")[:2] for line in lines[1:]] == [
        ["1.0", "0"],
        ["1.0", "1"],
        ["5.0", "0"],
        ["5.0", "1"],
    ]
    assert (folder / "calibration.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "morse" / "scale5-seed1.safetensors").is_file()
