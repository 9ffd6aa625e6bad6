"""The Morse network: a learned certainty M(s, a) that an action belongs to the data.

A perturbation model f maps (s, a) to an action, and the target of its kernel is the
input action itself, so M is 1 where f leaves the action alone and falls to 0 where f
pushes it away. It is fitted once to a dataset, then frozen: TD3-BST weighs behaviour
cloning by the uncertainty 1 - M of the policy's own actions.

    r^2(s, a) = ||f(s, a) - a||^2                             summed over action dims
    M(s, a)   = exp(-lam^2 / 2 * r^2)                         rbf
    M(s, a)   = (1 + lam^2 / (2 kappa) * r^2)^(-kappa)        rq, rational quadratic
    L         = mean_D[-log M(s, a)] + mean_{s ~ D, a_n ~ q(.|s)}[M(s, a_n)]

L is smallest at M*(s, a) = min(1, p(a|s) / q(a|s)), whatever lam and the number of
negatives a_n. Uniform ones, the paper's, have q = 2^-A: M* is 1 wherever the data is
denser than that, a wide region. Perturbed ones are the data's own actions plus noise of
every size: q is a blurred p, and M* is 1 within about the data's own spread. The
identity f(s, a) = a has M = 1 everywhere and a loss of exactly 1: a loss below 1 means
that something was learnt.

Paper:  Srinivasan & Knottenbelt, "Offline Reinforcement Learning with Behavioral
        Supervisor Tuning", arXiv 2404.16399; Morse networks: Dherin et al., 2307.00667.
Run:    uv run morse.py                          the four-mode toy, one picture
        uv run morse.py --dataset ID             calibration on a dataset
Copy:   everything above the ruled line "Command line" needs jax, flax, optax, numpy.
Shapes: B batch, K negatives per state, N dataset, S observation, A action.
"""

import csv
import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

MAX_CHUNK = 1000  # updates per compiled scan in `fit`

Params = Any  # a pytree of arrays
Metrics = dict[str, Array]
Scalar = float | Array


@dataclass(frozen=True)
class Config:
    kernel: Literal["rbf", "rq"] = "rbf"  # Gaussian, or the heavier rational quadratic
    kappa: float = 1.0  # shape of the rational quadratic; rbf in the limit of large
    hidden_dims: tuple[int, ...] = (256, 256, 256)  # widths of f's hidden layers
    learning_rate: float = 3e-4  # of Adam, the first one of a decay
    decay_updates: int | None = None  # cosine to 0; 0: none; unset: over the fit
    batch_size: int = 256  # dataset rows per update
    num_negatives: int = 1  # K, per state; changes only the noise
    negatives: Literal["uniform", "perturbed"] = "perturbed"  # q, see above
    noise: tuple[float, float] = (0.02, 1.0)  # perturbed: sd, log-uniform between these

    def __post_init__(self):
        if self.kernel not in ("rbf", "rq"):
            raise ValueError(f"kernel must be 'rbf' or 'rq', got {self.kernel!r}")
        for name in ("kappa", "learning_rate", "batch_size", "num_negatives"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{name} must be finite and > 0, got {getattr(self, name)}"
                )
        if self.decay_updates is not None and self.decay_updates < 0:
            raise ValueError(
                f"decay_updates must not be negative, got {self.decay_updates}"
            )
        if self.negatives not in ("uniform", "perturbed"):
            raise ValueError(
                f"negatives must be 'uniform' or 'perturbed', got {self.negatives!r}"
            )
        if not 0 < self.noise[0] <= self.noise[1] < float("inf"):
            raise ValueError(f"noise must be 0 < least <= largest, got {self.noise}")
        if not all(width > 0 for width in self.hidden_dims):
            raise ValueError(f"hidden_dims must all be > 0, got {self.hidden_dims}")


class MorseState(NamedTuple):
    params: Params  # of the perturbation network
    opt_state: optax.OptState


# ================================================================== Network and density


class Perturbation(nn.Module):
    """f(s, a): ReLU layers and a linear output, an action that no box confines."""

    hidden_dims: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, obs: Array, action: Array) -> Array:
        x = jnp.concatenate([obs, action], axis=-1)
        for width in self.hidden_dims:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.action_dim)(x)


def perturb(params: Params, obs: Array, action: Array) -> Array:
    """f(s, a), shape (..., A); the widths are read off `params`."""
    widths = [params[f"Dense_{i}"]["bias"].shape[-1] for i in range(len(params))]
    assert action.shape[-1] == widths[-1], (action.shape, widths)
    lead = jnp.broadcast_shapes(obs.shape[:-1], action.shape[:-1])
    obs = jnp.broadcast_to(obs, (*lead, obs.shape[-1]))
    action = jnp.broadcast_to(action, (*lead, action.shape[-1]))
    network: Any = Perturbation(tuple(widths[:-1]), widths[-1])
    return network.apply({"params": params}, obs, action)


def log_density(
    params: Params, obs: Array, action: Array, scale: Scalar, config: Config = Config()
) -> Array:
    """log M(s, a) <= 0, shape (...).

    Args:
        params: of the perturbation network, as in `MorseState.params`.
        obs: (..., S); its leading dims broadcast against those of `action`.
        action: (..., A), in [-1, 1].
        scale: lam, a scalar, may be traced.
        config: only `kernel` and `kappa` matter here.
    """
    square = jnp.sum((perturb(params, obs, action) - action) ** 2, axis=-1)
    exponent = 0.5 * scale**2 * square
    if config.kernel == "rbf":
        return -exponent
    return -config.kappa * jnp.log1p(exponent / config.kappa)


def certainty(
    params: Params, obs: Array, action: Array, scale: Scalar, config: Config = Config()
) -> Array:
    """M(s, a) in [0, 1], shape (...); arguments as in `log_density`."""
    return jnp.exp(log_density(params, obs, action, scale, config))


def uncertainty(
    params: Params, obs: Array, action: Array, scale: Scalar, config: Config = Config()
) -> Array:
    """C(s, a) = 1 - M(s, a), exact to rounding near 0; arguments as `log_density`."""
    return -jnp.expm1(log_density(params, obs, action, scale, config))


# ==================================================== Spread and drift of the behaviour


class LikeStates(NamedTuple):
    """M <= 2048 pairs of transitions in like states, of a log of N."""

    when: np.ndarray  # (M,) the first one's place in the log
    when_like: np.ndarray  # (M,) that of the one in the most like state
    squares: np.ndarray  # (M,) of the actions' difference, mean over dimensions
    log_size: int  # N


def like_states(obs: np.ndarray | Array, action: np.ndarray | Array) -> LikeStates:
    """Pairs of transitions in like states: what the spread and the drift are read from.

    Up to 2048 transitions, evenly spaced in the log and without duplicates, each with
    that in the nearest state more than min(1000, N / 10) steps away: a closer one has
    nearly the same noise. Logs of more than 100,000 are thinned first.

    Args:
        obs: (N, S) in the log's order; standardised here.
        action: (N, A) in [-1, 1].
    """
    log_size = len(obs)
    place = np.linspace(0, len(obs) - 1, min(len(obs), 100_000)).astype(int)
    away = min(1000, len(obs) // 10)
    obs, action = np.asarray(obs)[place].astype(float), np.asarray(action)[place]
    once = np.sort(np.unique(np.hstack([obs, action]), axis=0, return_index=True)[1])
    place, obs, action = place[once], obs[once], action[once]
    obs = ((obs - obs.mean(axis=0)) / (obs.std(axis=0) + 1e-3)).astype(np.float32)
    half_square = np.square(obs).sum(axis=1) / 2
    asked = np.linspace(0, len(obs) - 1, min(len(obs), 2048)).astype(int)
    like = []
    for some in np.array_split(asked, len(asked) // 256 + 1):
        distance = half_square - obs[some] @ obs.T  # half its square, less the same
        first = np.searchsorted(place, place[some] - away)
        after = np.searchsorted(place, place[some] + away, side="right")
        for row, i, j in zip(distance, first, after, strict=True):
            row[i:j] = np.inf
        like.append(distance.argmin(axis=1))
    like = np.concatenate(like)
    squares = np.square(action[asked] - action[like]).mean(axis=1)
    return LikeStates(place[asked], place[like], squares, log_size)


def action_spread(pairs: LikeStates) -> float:
    """sigma, the spread of the data's actions around what is done in such states.

    The root of half the mean squared difference of two actions in like states. Too
    large where states are few. 0 for a single transition.
    """
    return float(np.sqrt(pairs.squares.mean() / 2))


def log_drift(pairs: LikeStates) -> float:
    """The correlation of when a state was there and when the one most like it was.

    Near 1 where a state is most like others of its time, because the policy changed
    along the log: an agent's training, or one policy's episodes after another's. Near 0
    where one policy's states come again, and where the log's order is lost. 0 for fewer
    than 10,000 transitions, whose episodes may be longer than what is too close.
    """
    when, when_like, _, log_size = pairs
    if log_size < 10_000 or len(when) < 100 or not np.ptp(when_like):
        return 0.0
    return float(np.corrcoef(when, when_like)[0, 1])


# ===================================================================== Loss and updates


def morse_loss(
    params: Params,
    obs: Array,
    action: Array,
    negatives: Array,
    scale: Scalar,
    config: Config = Config(),
) -> tuple[Array, Metrics]:
    """L of the module docstring for obs (B, S), action (B, A), negatives (B, K, A)."""
    batch, action_dim = action.shape
    assert obs.ndim == 2, obs.shape
    assert negatives.shape == (batch, negatives.shape[1], action_dim), negatives.shape
    log_data = log_density(params, obs, action, scale, config)  # (B,)
    off_data = certainty(params, obs[:, None], negatives, scale, config)  # (B, K)
    loss = -jnp.mean(log_data) + jnp.mean(off_data)
    return loss, {
        "morse_loss": loss,
        "certainty_data": jnp.mean(jnp.exp(log_data)),
        "certainty_negatives": jnp.mean(off_data),
    }


def optimizer(config: Config) -> optax.GradientTransformation:
    """Adam, its step a cosine to 0 if asked; the state's structure is the same."""
    rate = optax.constant_schedule(config.learning_rate)
    if config.decay_updates:
        rate = optax.cosine_decay_schedule(config.learning_rate, config.decay_updates)
    return optax.adam(rate)


def decay_over(num_updates: int, config: Config) -> Config:
    """`config` with an unset decay ending after `num_updates`."""
    if config.decay_updates is not None:
        return config
    return dataclasses.replace(config, decay_updates=num_updates)


def init(
    key: Array, obs_dim: int, action_dim: int, config: Config = Config()
) -> MorseState:
    """Fresh parameters of f and of Adam."""
    network = Perturbation(config.hidden_dims, action_dim)
    inputs = jnp.zeros((1, obs_dim)), jnp.zeros((1, action_dim))
    params: Any = network.init(key, *inputs)["params"]
    return MorseState(params, optimizer(config).init(params))


def draw_negatives(key: Array, action: Array, config: Config) -> Array:
    """a_n ~ q(.|s) in [-1, 1], (B, K, A), at the states of the data's action (B, A)."""
    shape = (len(action), config.num_negatives, action.shape[-1])
    if config.negatives == "uniform":
        return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)
    key_sd, key_noise = jax.random.split(key)
    least, largest = jnp.log(jnp.array(config.noise))
    log_sd = jax.random.uniform(key_sd, shape[:2], minval=least, maxval=largest)
    noise = jnp.exp(log_sd)[..., None] * jax.random.normal(key_noise, shape)
    return jnp.clip(action[:, None] + noise, -1.0, 1.0)


def update(
    state: MorseState,
    obs: Array,
    action: Array,
    key: Array,
    scale: Scalar,
    config: Config,
) -> tuple[MorseState, Metrics]:
    """One Adam step on a fresh batch of the dataset obs (N, S), action (N, A)."""
    key_batch, key_negatives = jax.random.split(key)
    rows = jax.random.randint(key_batch, (config.batch_size,), 0, len(obs))
    negatives = draw_negatives(key_negatives, action[rows], config)
    grads, metrics = jax.grad(morse_loss, has_aux=True)(
        state.params, obs[rows], action[rows], negatives, scale, config
    )
    steps, opt_state = optimizer(config).update(grads, state.opt_state)
    params: Any = optax.apply_updates(state.params, steps)
    return MorseState(params, opt_state), metrics


@partial(jax.jit, static_argnames=("num_updates", "config"))
def train(
    state: MorseState,
    obs: Array,
    action: Array,
    key: Array,
    start: int | Array,
    num_updates: int,
    scale: Scalar,
    config: Config,
) -> tuple[MorseState, Metrics]:
    """Updates start, ..., start + num_updates - 1 as one scan; metrics are their mean.

    The key of update t is fold_in(key, t), so the chunking changes nothing.
    """

    def step(state: MorseState, t: Array) -> tuple[MorseState, Metrics]:
        return update(state, obs, action, jax.random.fold_in(key, t), scale, config)

    state, metrics = jax.lax.scan(step, state, start + jnp.arange(num_updates))
    return state, jax.tree.map(jnp.mean, metrics)


def fit(
    key: Array,
    obs: Array,
    action: Array,
    *,
    scale: float,
    num_updates: int,
    config: Config = Config(),
    report: Callable[[int, float], object] = lambda num_updates, loss: None,
) -> tuple[Params, Array]:
    """Fit a Morse network to a dataset, from fresh parameters.

    Args:
        key: a typed key, `jax.random.key(seed)`.
        obs: (N, S), any scale; standardise it first where its dims differ much.
        action: (N, A), in [-1, 1].
        scale: lam > 0; dim(A) / 2 is a good first value.
        num_updates: gradient steps, run as scans of at most `MAX_CHUNK`.
        report: called after each scan with its number of updates and mean loss.

    Returns:
        The parameters, and the mean loss of each scan, (ceil(num_updates / MAX_CHUNK),)

    Raises:
        ValueError: the input is not as above; says what was expected and what came.
    """
    obs, action = jnp.asarray(obs, jnp.float32), jnp.asarray(action, jnp.float32)
    check_input(obs, action, scale, num_updates)
    config = decay_over(num_updates, config)
    key_init, key_train = jax.random.split(key)
    state = init(key_init, obs.shape[1], action.shape[1], config)
    losses = []
    for start in range(0, num_updates, MAX_CHUNK):
        count = min(MAX_CHUNK, num_updates - start)
        state, metrics = train(
            state, obs, action, key_train, start, count, scale, config
        )
        losses.append(metrics["morse_loss"])
        report(count, float(losses[-1]))
    return state.params, jnp.stack(losses)


def check_input(obs: Array, action: Array, scale: float, num_updates: int) -> None:
    """Raise a ValueError unless `fit` can work with these."""
    if obs.ndim != 2 or action.ndim != 2 or len(obs) != len(action) or not obs.size:
        raise ValueError(
            "expected obs (N, S) and action (N, A) with the same N > 0, "
            f"got {obs.shape} and {action.shape}"
        )
    for name, array in (("obs", obs), ("action", action)):
        if not jnp.isfinite(array).all():
            raise ValueError(f"expected finite numbers, got NaN or infinity in {name}")
    low, high = float(action.min()), float(action.max())
    if low < -1.0 or high > 1.0:
        raise ValueError(f"expected actions in [-1, 1], got [{low:g}, {high:g}]")
    if not 0.0 < scale < float("inf"):
        raise ValueError(f"expected a finite scale > 0, got {scale}")
    if num_updates < 1:
        raise ValueError(f"expected num_updates >= 1, got {num_updates}")


# ========================================================================= Command line

TOY_SIZE = 100_000  # actions
TOY_SD = 0.05  # of each mode


@dataclass(frozen=True)
class Options:
    """Without a dataset the toy, one picture; with one, a calibration report."""

    dataset: str | None = None  # id or path of a dataset; none: the four-mode toy
    scale: tuple[float, ...] = ()  # kernel scales lam, any number; none: dim(A) / 2
    num_morse_updates: int = 10_000  # gradient steps of each network
    seed: int = 0  # first seed
    num_seeds: int = 1  # seeds seed, seed + 1, ...
    normalize_obs: bool = True  # standardise observations, as TD3-BST does
    num_points: int = 20_000  # most pairs in each of the report's four sets
    run_dir: Path = Path("runs")  # the run's own folder is made in here
    morse: Config = Config()

    def __post_init__(self):
        for scale in self.scale:
            if not 0.0 < scale < float("inf"):
                raise ValueError(f"--scale must be finite and > 0, got {scale:g}")
        for name in ("num_morse_updates", "num_seeds", "num_points"):
            if getattr(self, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} must be >= 1, got {getattr(self, name)}")
        if not 0 <= self.seed <= 2**32 - self.num_seeds:
            raise ValueError(f"--seed must lie in [0, 2**32), got {self.seed}")
        if self.dataset is None and (len(self.scale) > 1 or self.num_seeds > 1):
            raise ValueError("without --dataset: one --scale and one seed, the toy's")


def fit_with_bar(seed: int, obs, action, scale: float, options: Options) -> Params:
    from tqdm import tqdm

    name = f"scale {scale:g}, seed {seed}"
    with tqdm(total=options.num_morse_updates, desc=name, unit=" updates") as bar:

        def report(count: int, loss: float) -> None:
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update(count)

        params, _ = fit(
            jax.random.key(seed),
            obs,
            action,
            scale=scale,
            num_updates=options.num_morse_updates,
            config=options.morse,
            report=report,
        )
    return params


# ================================================= Toy: four modes of actions, no state


def toy_actions(key: Array, num: int) -> Array:
    """(num, 2): one of (+-.6, +-.6) plus noise of sd TOY_SD."""
    key_mode, key_noise = jax.random.split(key)
    mode = 0.6 * jax.random.rademacher(key_mode, (num, 2), jnp.float32)
    return mode + TOY_SD * jax.random.normal(key_noise, (num, 2))


def toy(options: Options) -> Path:
    """Fit the toy, print its loss beside the ideal one, draw `toy.png`.

    With uniform negatives, the paper's: there the ideal is known in closed form.
    """
    from common import run

    config = dataclasses.replace(options.morse, negatives="uniform")
    options = dataclasses.replace(options, morse=config)
    scale = options.scale[0] if options.scale else 1.0
    folder = run.new_folder(options.run_dir, "morse-toy")
    key_data, key_test = jax.random.split(jax.random.key(options.seed))
    action, test = toy_actions(key_data, TOY_SIZE), toy_actions(key_test, TOY_SIZE)
    obs = jnp.zeros((TOY_SIZE, 1))  # a constant: there is no state
    params = fit_with_bar(options.seed, obs, action, scale, options)

    axis = (jnp.arange(400) + 0.5) / 200 - 1  # midpoints, so that a mean integrates
    grid = jnp.stack(jnp.meshgrid(axis, axis), axis=-1)  # (400, 400, 2)
    fitted = certainty(params, obs[0], grid, scale, options.morse)
    log_data = log_density(params, obs[0], test, scale, options.morse)
    loss = float(fitted.mean() - log_data.mean())
    # With r the distance to a mode: M* = min(1, c exp(-r^2 / (2 sd^2))), c the largest
    # p / u; r^2 / (2 sd^2) of the data is Exp(1), so L* = 1 / c + (log c + 1) / c.
    peak = 1 / (2 * jnp.pi * TOY_SD**2)
    square = jnp.sum((jnp.abs(grid) - 0.6) ** 2, axis=-1)
    optimum = jnp.minimum(1.0, peak * jnp.exp(-square / (2 * TOY_SD**2)))
    ideal = float((jnp.log(peak) + 2) / peak)
    print(f"loss {loss:.4f} on fresh data; ideal {ideal:.4f}; identity 1")

    title = (
        f"A Morse network after {options.num_morse_updates:,} updates: "
        f"loss {loss:.3f}, ideal {ideal:.3f}"
    )
    draw_toy(folder / "toy.png", title, action, axis, fitted, optimum)
    return folder


def draw_toy(path: Path, title: str, action, axis, fitted, optimum) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    figure.suptitle(title)
    axis, fitted = np.asarray(axis), np.asarray(fitted)
    left, middle = figure.add_subplot(1, 3, 1), figure.add_subplot(1, 3, 2)
    right: Any = figure.add_subplot(1, 3, 3, projection="3d")
    left.plot(*np.asarray(action[:2000]).T, ".", markersize=2, color="tab:red")
    left.set_title("Actions in the data")
    filled = middle.contourf(axis, axis, fitted, np.linspace(0, 1, 11))
    middle.contour(axis, axis, optimum, [0.5], colors="white", linestyles="--")
    middle.set_title("Certainty; dashed: where the optimum is 1/2")
    right.plot_surface(
        *np.meshgrid(axis, axis),
        fitted,
        cmap="viridis",
        rcount=200,
        ccount=200,
        linewidth=0,
        antialiased=False,
    )
    right.set_title("The same as a surface")
    right.set(zlim=(0, 1), zticks=(0, 0.5, 1))
    right.view_init(elev=38, azim=-60)
    ticks = (-1, -0.5, 0, 0.5, 1)
    for axes in (left, middle, right):
        axes.set(xlabel="action 1", ylabel="action 2", xlim=(-1, 1), ylim=(-1, 1))
        axes.set(xticks=ticks, yticks=ticks)
    for axes in (left, middle):
        axes.set_aspect("equal")
    figure.colorbar(filled, ax=right, label="certainty", shrink=0.75, pad=0.12)
    figure.savefig(path, dpi=150)


# ============================================================= Calibration on a dataset


def auroc(positive, negative) -> float:
    """P(positive > negative) + P(equal) / 2, by ranks; each argument is (n,)."""
    pooled = np.concatenate([positive, negative])
    _, where, count = np.unique(pooled, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[where]  # from 1, the mean over ties
    num = len(positive)
    return float((rank[:num].mean() - (num + 1) / 2) / len(negative))


def calibrate(options: Options) -> Path:
    """Fit each scale and seed on 90 % of the episodes, report on the other 10 %."""
    from common import datasets, run
    from common.errors import UserError

    assert options.dataset is not None
    ds = datasets.load(options.dataset)
    rng = np.random.default_rng(options.seed)
    episodes = rng.permutation(np.unique(ds.episode))
    if len(episodes) < 2:
        raise UserError(f"{options.dataset}: one episode; two are the least to split")
    held_out = np.isin(ds.episode, episodes[: max(1, len(episodes) // 10)])
    obs, action = np.asarray(ds.obs), np.asarray(ds.action)
    if options.normalize_obs:
        std = obs.std(axis=0, dtype=np.float64) + 1e-3
        obs = ((obs - obs.mean(axis=0, dtype=np.float64)) / std).astype(np.float32)

    rows_of = [rng.permutation(np.flatnonzero(part)) for part in (~held_out, held_out)]
    seen, unseen = (rows[: options.num_points] for rows in rows_of)
    uniform = rng.uniform(-1, 1, (len(unseen), ds.action_dim)).astype(np.float32)
    sets = {
        "data": (obs[seen], action[seen]),
        "held_out": (obs[unseen], action[unseen]),
        "permuted": (obs[unseen], action[rng.permutation(unseen)]),
        "uniform": (obs[unseen], uniform),
    }
    slug = re.sub(r"[^\w.]+", "-", options.dataset).strip("-")
    folder = run.new_folder(options.run_dir, f"morse-{slug}")
    kept = jnp.asarray(obs[~held_out]), jnp.asarray(action[~held_out])
    rows: list[dict[str, float]] = []
    pooled: dict[float, dict[str, list]] = {}  # certainties by scale and set
    for scale in dict.fromkeys(options.scale or (ds.action_dim / 2,)):
        pooled[scale] = {name: [] for name in sets}
        for seed in range(options.seed, options.seed + options.num_seeds):
            params = fit_with_bar(seed, *kept, scale, options)
            about = options.morse, ds.fingerprint, options.normalize_obs
            run.save_morse(folder, seed, params, scale, *about)
            row = {"scale": scale, "seed": seed}
            log_m = {}
            for name, (s, a) in sets.items():
                log_m[name] = np.asarray(
                    log_density(params, s, a, scale, options.morse)
                )
                pooled[scale][name].extend(np.exp(log_m[name]))
                row[f"certainty_{name}"] = float(np.exp(log_m[name]).mean())
            for name in ("permuted", "uniform"):  # log M orders as M, with fewer ties
                row[f"auroc_{name}"] = auroc(log_m["held_out"], log_m[name])
            rows.append(row)
    with (folder / "calibration.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    table = calibration_table(rows)
    print(table)
    title = (
        f"Morse networks on {options.dataset}: {options.num_morse_updates:,} updates, "
        f"seeds: {options.num_seeds}"
    )
    draw_calibration(folder / "calibration.png", f"{title}\n\n{table}", pooled)
    return folder


def calibration_table(rows: list[dict[str, float]]) -> str:
    """One line per scale: means over the seeds, +- sd where there are several."""
    names = [name for name in rows[0] if name not in ("scale", "seed")]
    lines = ["   scale" + "".join(f"{name:>19}" for name in names)]
    for scale in dict.fromkeys(row["scale"] for row in rows):
        cells = [f"{scale:>8g}"]
        for name in names:
            values = [row[name] for row in rows if row["scale"] == scale]
            spread = f" +- {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{spread}".rjust(19))
        lines.append("".join(cells))
    return "\n".join(lines)


def draw_calibration(path: Path, title: str, pooled: dict[float, dict]) -> None:
    """Histograms of M in the four sets, a panel per scale, under the table."""
    from matplotlib.figure import Figure

    bins = np.linspace(0, 1, 41)
    columns = min(len(pooled), 4)
    rows = -(-len(pooled) // columns)
    size = (max(11.0, 4.0 * columns), 3.4 * rows + 0.2 * len(pooled) + 0.8)
    figure = Figure(size, layout="constrained")
    figure.suptitle(title, family="monospace", fontsize=8)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(pooled) :]:
        axes.axis("off")
    for axes, (scale, sets) in zip(grid.flat, pooled.items(), strict=False):
        for name, values in sets.items():
            share = np.full(len(values), 1 / len(values))
            axes.hist(values, bins, weights=share, histtype="step", label=name)
        axes.set(title=f"lam = {scale:g}", xlabel="certainty M(s, a)", yscale="log")
        axes.grid(alpha=0.25)
    grid[0, 0].set_ylabel("share of pairs per bin")
    grid[0, 0].legend()
    figure.savefig(path, dpi=130)


# ================================================================================= Main


def main() -> None:
    from common import run

    run.guarded(command)


def command() -> None:
    import tyro

    about = "Fit Morse networks and show what they hold for certain."
    options = tyro.cli(tyro.conf.OmitArgPrefixes[Options], description=about)
    print(f"device: {jax.devices()[0].device_kind}")
    folder = toy(options) if options.dataset is None else calibrate(options)
    print(folder)


if __name__ == "__main__":
    main()
