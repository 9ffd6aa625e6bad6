"""TD3-BST: TD3 with behavioral supervisor tuning, offline, in one file.

A Morse network M, fitted to the dataset's actions and then frozen, weighs the pull
towards the data: weak or none where the policy's own action is in distribution, strong
where it is not. Q improves the policy inside the data's support and nowhere else.

    M(s, a)  = exp(-lam^2/2 ||f(s, a) - a||^2)            certainty in (0, 1], morse.py
    omega(s) = min(exp((1 - M(s, pi(s))) / mu) - 1, cap) + floor    cap, floor: ours
    L_pi     = mean[omega(s) ||pi(s) - a||^2 - w Q_1(s, pi(s)) / Z_Q]
               Z_Q = mean |Q_1(s, pi(s))|, a constant to the gradient; w: 1, or ours;
               ours too: pi of s + noise for pi(s), while training, see `noisy`
    y        = r + gamma (1 - terminal) min_i Q'_i(s', a'), or see `n_step`,
               a' = clip(pi'(s') + clip(sigma eps, -c, c), -1, 1)
    L_Q      = sum_i mean[(Q_i(s, a) - y)^2]

Paper  Srinivasan & Knottenbelt, IJCAI 2024, arXiv 2404.16399.
Run    uv run td3_bst.py
Copy   morse.py and this file up to `main`. Needs jax, flax, optax, chex.
Shapes B batch, N transitions, S observation, A action; actions lie in [-1, 1].
"""

import dataclasses
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import morse

Params = Any  # a pytree of arrays
Metrics = dict[str, jax.Array]


# ============================================================================ Config


@dataclass(frozen=True)
class Config:
    """TD3-BST's options. Unset ones (None, ()): the domain's value, DEFAULTS."""

    mu: float | None = None  # mu, temperature of the weight; unset: by domain
    floor: float | None = None  # omega where M is 1; unset: by domain and spread
    omega_cap: float = 10.0  # largest omega, less the floor; 0: none
    scale: float | None = None  # lam, the Morse kernel's scale; unset: dim(A) / 2
    supervisor_gradient: bool | None = None  # through omega; unset: by domain and log
    q_weight: float | None = None  # w, of Q / Z_Q; unset: by domain and spread
    obs_noise: float | None = None  # std, see `noisy`; unset: 0, or for falls
    actor_critics: int = 1  # 1: Q_1 for the actor; 2: the smaller Q of both
    discount: float | None = None  # gamma, per step; unset: by domain
    reward_scale: float | None = None  # times the reward; unset: by domain
    reward_shift: float | None = None  # added after scaling; unset: by domain
    n_step: int | None = None  # rewards before Q'; unset: 1, or for falls
    polyak: float | None = None  # tau, the targets' step; unset: by domain and falls
    normalize_obs: bool | None = None  # standardise observations; unset: by domain
    critic_layer_norm: bool | None = None  # layer norm in critics; unset: by domain
    hidden_dims: tuple[int, ...] = ()  # widths of actor and critics; unset: by domain
    actor_learning_rate: float | None = None  # Adam's, at first; unset: by domain
    actor_decay_updates: int | None = None  # cosine to 0; 0: none; unset: by domain
    critic_learning_rate: float = 3e-4  # Adam's step size
    batch_size: int = 256  # B, transitions per update
    policy_noise: float = 0.2  # sigma of the target action's noise
    noise_clip: float = 0.5  # c, largest noise
    policy_delay: int = 2  # critic updates per update of actor and targets
    morse_net: morse.Config = morse.Config()

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float) and not np.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
        positive = ("scale", "actor_learning_rate", "critic_learning_rate")
        for name in (*positive, "batch_size", "policy_delay", "n_step", "reward_scale"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if self.mu is not None and not self.mu >= 0.02:
            raise ValueError(
                f"mu must be at least 0.02, got {self.mu}: the weight exp(C / mu) - 1 "
                "and its gradient would overflow float32"
            )
        if self.discount is not None and not 0 <= self.discount <= 1:
            raise ValueError(f"discount must lie in [0, 1], got {self.discount}")
        if self.polyak is not None and not 0 < self.polyak <= 1:
            raise ValueError(f"polyak must lie in (0, 1], got {self.polyak}")
        at_least_0 = ("floor", "omega_cap", "q_weight", "policy_noise", "noise_clip")
        for name in (*at_least_0, "obs_noise", "actor_decay_updates"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if self.actor_critics not in (1, 2):
            raise ValueError(f"actor_critics must be 1 or 2, got {self.actor_critics}")
        if self.hidden_dims and min(self.hidden_dims) < 1:
            raise ValueError(f"hidden_dims must be positive, got {self.hidden_dims}")


LOCOMOTION = {
    "mu": 0.1,
    "floor": 0.1,
    "supervisor_gradient": False,
    "discount": 0.99,
    "reward_scale": 1.0,
    "reward_shift": 0.0,
    "n_step": 1,
    "obs_noise": 0.0,
    "polyak": 0.02,
    "normalize_obs": True,
    "critic_layer_norm": False,
    "hidden_dims": (256, 256),
    "actor_learning_rate": 3e-4,
}
POINTMAZE = {
    "mu": 0.3,
    "discount": 0.98,
    "reward_scale": 10.0,
    "actor_learning_rate": 1e-3,
}
DEEPER = {"hidden_dims": (256, 256, 256), "actor_learning_rate": 1e-3}
ANTMAZE = {
    "floor": 20.0,
    "supervisor_gradient": True,
    "discount": 0.998,
    "reward_scale": 100.0,
} | DEEPER
MAZE = {"q_weight": 1.0, "polyak": 0.01, "critic_layer_norm": True}
CAREFUL = {"q_weight": 1.0}  # where nobody can look
FLOOR_PER_SPREAD = 5.0  # PointMaze: floor over the spread of the actions, ^4
Q_PER_SPREAD = 9000.0  # locomotion: q_weight over the spread of the actions, ^4
LARGEST_Q_WEIGHT = {"never": 100.0, "seldom": 8.0, "often": 25.0}  # by falls
FALLS = {  # locomotion's, by how often agents fall
    "never": {"polyak": 0.005},
    "seldom": {},
    "often": {"n_step": 1000},  # rewards to the episode's end
}
MANY_FALLS = 1e-3  # terminal transitions of all, above which agents often fall
MANY_POLICIES = 0.3  # where they do: the log's drift above which omega has a gradient
NOISE_PER_SPREAD = 0.5  # where they do: obs_noise over the spread of the actions
LOCOMOTION_UPDATES = 100_000  # a run's, unless told; where they do the actor's
DEFAULTS = {  # from short experiments, results/bst_study.md
    "locomotion": LOCOMOTION,
    "pointmaze": LOCOMOTION | MAZE | POINTMAZE,
    "antmaze": LOCOMOTION | MAZE | ANTMAZE,
    "other": LOCOMOTION | CAREFUL,
}
TRACED = ("mu", "floor", "scale")  # may differ between the lanes: --sweep


def resolve(
    config: Config, domain: str, data: "Transition", num_updates: int
) -> Config:
    """Returns `config` with every unset option at its domain's value.

    The spread of the data's actions decides w in locomotion and the floor in PointMaze:
    the wider they are, the less certainty tells apart. A terminal transition of
    locomotion is a fall. Where agents often fall, critics learn the data's returns, to
    its end, and the actor is shown states with noise; it stands still after
    LOCOMOTION_UPDATES, because following such critics for longer wears it down, and one
    that does so sooner has its share of w, for critics that are not there yet. Omega is
    a weight and no more, unless many policies made the log of agents that often fall.

    Args:
        data: as it was logged, in its order; numpy.
        num_updates: of the whole run, over which the actor's learning rate goes to 0.
    """
    defaults = DEFAULTS[domain] | {"scale": data.action.shape[1] / 2}
    defaults["actor_decay_updates"] = num_updates
    pairs = cache(partial(morse.like_states, data.obs, data.action))
    if domain == "pointmaze" and config.floor is None:
        defaults["floor"] = FLOOR_PER_SPREAD * morse.action_spread(pairs()) ** 4
    if domain == "locomotion":
        share = np.mean(data.terminal)
        falls = "never" if share == 0 else "often" if share > MANY_FALLS else "seldom"
        defaults |= FALLS[falls]
        if falls == "often":
            defaults["actor_decay_updates"] = min(num_updates, LOCOMOTION_UPDATES)
            if config.supervisor_gradient is None:
                drift = morse.log_drift(pairs())
                defaults["supervisor_gradient"] = drift > MANY_POLICIES
        if None in (config.q_weight, config.obs_noise):
            sigma, largest = morse.action_spread(pairs()), LARGEST_Q_WEIGHT[falls]
            if falls == "often":
                defaults["obs_noise"] = NOISE_PER_SPREAD * sigma
                decay = config.actor_decay_updates
                decay = defaults["actor_decay_updates"] if decay is None else decay
                largest *= min(1.0, (decay or LOCOMOTION_UPDATES) / LOCOMOTION_UPDATES)
            defaults["q_weight"] = min(Q_PER_SPREAD * sigma**4, largest)
    unset = {k: v for k, v in defaults.items() if getattr(config, k) in (None, ())}
    return dataclasses.replace(config, **unset)


# ============================================================================= Types


class Transition(NamedTuple):
    """N or B transitions; a time-out is not terminal."""

    obs: jax.Array  # (N, S)
    action: jax.Array  # (N, A) in [-1, 1]
    reward: jax.Array  # (N,)
    next_obs: jax.Array  # (N, S)
    terminal: jax.Array  # (N,) 1.0 where the task itself ended


class Supervisor(NamedTuple):
    """The frozen Morse network, and what makes omega of it; traced, for sweeps."""

    params: Params  # of the perturbation model f
    scale: jax.Array  # () lam
    mu: jax.Array  # ()
    floor: jax.Array  # () of omega; 0 in the paper


class AgentState(NamedTuple):
    """Everything that training changes."""

    actor: Params
    critics: Params  # twin: leading axis 2
    target_actor: Params
    target_critics: Params
    actor_opt: optax.OptState
    critic_opt: optax.OptState


# ========================================================================== Networks


def dense(x: jax.Array, features: int) -> jax.Array:
    """A layer initialised as the TD3+BC reference: U(+-1/sqrt(fan_in)), bias too."""
    bound = x.shape[-1] ** -0.5

    def uniform(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nn.Dense(features, kernel_init=uniform, bias_init=uniform)(x)


class Actor(nn.Module):
    """pi(s): ReLU layers, tanh output."""

    hidden_dims: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, obs: jax.Array) -> jax.Array:
        x = obs
        for width in self.hidden_dims:
            x = nn.relu(dense(x, width))
        return jnp.tanh(dense(x, self.action_dim))


class Critic(nn.Module):
    """Q(s, a): ReLU layers, layer norm before each ReLU where asked."""

    hidden_dims: tuple[int, ...]
    layer_norm: bool

    @nn.compact
    def __call__(self, obs: jax.Array, action: jax.Array) -> jax.Array:
        x = jnp.concatenate([obs, action], axis=-1)
        for width in self.hidden_dims:
            x = dense(x, width)
            x = nn.relu(nn.LayerNorm()(x) if self.layer_norm else x)
        return dense(x, 1).squeeze(-1)


def policy(actor: Params, obs: jax.Array, config: Config) -> jax.Array:
    """The deterministic action pi(s), (..., A) in [-1, 1]."""
    action_dim = actor["params"][f"Dense_{len(config.hidden_dims)}"]["bias"].shape[-1]
    apply: Any = Actor(config.hidden_dims, action_dim).apply
    return apply(actor, obs)


def q_values(
    critics: Params, obs: jax.Array, action: jax.Array, config: Config
) -> jax.Array:
    """Each critic's Q(s, a), (2, B)."""
    apply: Any = Critic(config.hidden_dims, bool(config.critic_layer_norm)).apply
    num = len(jax.tree.leaves(critics)[0])
    obs, action = (jnp.broadcast_to(x, (num, *x.shape)) for x in (obs, action))
    return jax.vmap(apply)(critics, obs, action)  # faster on CPUs than shared inputs


# ============================================================================ Losses


def supervisor(
    bst: Supervisor, obs: jax.Array, action: jax.Array, config: Config
) -> tuple[jax.Array, jax.Array]:
    """The weight omega (B,), floor to floor + min(cap, e^(1/mu) - 1), and C (B,)."""
    uncertainty = morse.uncertainty(
        bst.params, obs, action, bst.scale, config.morse_net
    )
    exponent = uncertainty / bst.mu
    if config.omega_cap:  # or a batch's few uncertain states outweigh all the others
        exponent = jnp.minimum(exponent, np.log1p(config.omega_cap))
    return bst.floor + jnp.expm1(exponent), uncertainty


def td_target(
    agent: AgentState, batch: Transition, key: jax.Array, config: Config
) -> jax.Array:
    """y (B,): clipped double Q at the smoothed target action (TD3, eqs. 10 and 14)."""
    noise = config.policy_noise * jax.random.normal(key, batch.action.shape)
    noise = jnp.clip(noise, -config.noise_clip, config.noise_clip)
    next_action = policy(agent.target_actor, batch.next_obs, config)
    next_action = jnp.clip(next_action + noise, -1.0, 1.0)
    next_q = q_values(agent.target_critics, batch.next_obs, next_action, config)
    return batch.reward + config.discount * (1.0 - batch.terminal) * next_q.min(axis=0)


def critic_loss(
    critics: Params, batch: Transition, target: jax.Array, config: Config
) -> tuple[jax.Array, Metrics]:
    """L_Q: the squared TD errors, mean over the batch, summed over the twins."""
    q = q_values(critics, batch.obs, batch.action, config)
    chex.assert_equal_shape([q[0], target])
    loss = jnp.square(q - target[None]).mean(axis=1).sum()
    return loss, {"critic_loss": loss, "q_data": q[0].mean()}


def actor_loss(
    actor: Params,
    critics: Params,
    bst: Supervisor,
    batch: Transition,
    shown: jax.Array,
    config: Config,
) -> tuple[jax.Array, Metrics]:
    """L_pi: w Q / Z_Q against omega times the squared distance to the data's action.

    Args:
        shown: (B, S) what the actor sees of the states: `batch.obs`, or with noise.
    """
    action = policy(actor, shown, config)
    chex.assert_equal_shape([action, batch.action])
    asked = jax.tree.map(lambda x: x[: config.actor_critics], critics)
    q = q_values(asked, batch.obs, action, config).min(axis=0)
    z_q = jax.lax.stop_gradient(jnp.abs(q).mean())
    z_q = jnp.where(z_q > 0, z_q, 1.0)  # 0: a fresh critic, of states that are all 0
    judged = action if config.supervisor_gradient else jax.lax.stop_gradient(action)
    omega, uncertainty = supervisor(bst, batch.obs, judged, config)
    distance = jnp.square(action - batch.action).sum(axis=-1)  # (B,)
    loss = (omega * distance).mean() - config.q_weight * q.mean() / z_q
    return loss, {
        "actor_loss": loss,
        "q": q.mean(),
        "distance": distance.mean(),
        "certainty": 1.0 - uncertainty.mean(),
        "omega": omega.mean(),
        "omega_max": omega.max(),
    }


# =========================================================================== Updates


def optimizers(
    config: Config,
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Adam for the actor (its step a cosine to 0, if asked) and for the critics."""
    rate: Any = config.actor_learning_rate
    if config.actor_decay_updates:
        num_steps = config.actor_decay_updates // config.policy_delay
        rate = optax.cosine_decay_schedule(rate, max(num_steps, 1))
    return optax.adam(rate), optax.adam(config.critic_learning_rate)


def init(key: jax.Array, obs_dim: int, action_dim: int, config: Config) -> AgentState:
    """Fresh networks; the targets are copies, so the state can be donated."""
    key_actor, key_critics = jax.random.split(key)
    obs, action = jnp.zeros((1, obs_dim)), jnp.zeros((1, action_dim))
    actor = Actor(config.hidden_dims, action_dim).init(key_actor, obs)
    critic = Critic(config.hidden_dims, bool(config.critic_layer_norm))
    keys = jax.random.split(key_critics, 2)
    critics = jax.vmap(critic.init, (0, None, None))(keys, obs, action)
    adam_actor, adam_critics = optimizers(config)
    return AgentState(
        actor=actor,
        critics=critics,
        target_actor=jax.tree.map(jnp.copy, actor),
        target_critics=jax.tree.map(jnp.copy, critics),
        actor_opt=adam_actor.init(actor),
        critic_opt=adam_critics.init(critics),
    )


def update_critics(
    agent: AgentState, batch: Transition, target: jax.Array, config: Config
) -> tuple[AgentState, Metrics]:
    """One Adam step of the twin critics towards y, `target` (B,)."""
    grad, metrics = jax.grad(critic_loss, has_aux=True)(
        agent.critics, batch, target, config
    )
    _, adam = optimizers(config)
    step, critic_opt = adam.update(grad, agent.critic_opt)
    critics = optax.apply_updates(agent.critics, step)
    metrics["critic_grad_norm"] = optax.tree.norm(grad)
    return agent._replace(critics=critics, critic_opt=critic_opt), metrics


def follow(targets: Params, parameters: Params, config: Config) -> Params:
    """The targets, one polyak step closer to the new parameters."""
    tau: Any = config.polyak
    return optax.incremental_update(parameters, targets, tau)


def update_actor(
    agent: AgentState,
    bst: Supervisor,
    batch: Transition,
    shown: jax.Array,
    config: Config,
) -> tuple[AgentState, Metrics]:
    """One Adam step of the actor, then all targets follow the new parameters."""
    grad, metrics = jax.grad(actor_loss, has_aux=True)(
        agent.actor, agent.critics, bst, batch, shown, config
    )
    metrics["actor_grad_norm"] = optax.tree.norm(grad)
    adam, _ = optimizers(config)
    step, actor_opt = adam.update(grad, agent.actor_opt)
    actor = optax.apply_updates(agent.actor, step)
    return agent._replace(
        actor=actor,
        actor_opt=actor_opt,
        target_actor=follow(agent.target_actor, actor, config),
        target_critics=follow(agent.target_critics, agent.critics, config),
    ), metrics


def sample(data: Transition, key: jax.Array, batch_size: int) -> Transition:
    """A uniform batch, with replacement."""
    index = jax.random.randint(key, (batch_size,), 0, data.reward.shape[0])
    return jax.tree.map(lambda x: x[index], data)


def noisy(obs: jax.Array, key: jax.Array, config: Config) -> jax.Array:
    """(B, S) as the actor is shown it in training: like states, like actions.

    `obs_noise` has the units of observations after `prepare`.
    """
    if not config.obs_noise:
        return obs
    return obs + config.obs_noise * jax.random.normal(key, obs.shape)


def update(
    agent: AgentState,
    bst: Supervisor,
    data: Transition,
    key: jax.Array,
    step: jax.Array,
    config: Config,
) -> tuple[AgentState, Metrics]:
    """`policy_delay` critic updates on fresh batches, then one of the actor.

    Critic update t draws from fold_in(key, t), t = step, step + 1, ...; the actor
    uses the last batch, as TD3's reference code does. The target networks move after
    that, so one pass gives the targets of all batches.
    """
    steps = step + jnp.arange(config.policy_delay)
    keys = jax.vmap(lambda t: jax.random.split(jax.random.fold_in(key, t), 3))(steps)
    batches = jax.vmap(sample, (None, 0, None))(data, keys[:, 0], config.batch_size)
    every = (None, 0, 0, None)
    targets = jax.vmap(td_target, every)(agent, batches, keys[:, 1], config)
    batch, critic_metrics = batches, {}
    for i in range(config.policy_delay):
        batch, target = jax.tree.map(lambda x, i=i: x[i], (batches, targets))
        agent, critic_metrics = update_critics(agent, batch, target, config)
    shown = noisy(batch.obs, keys[-1, 2], config)
    agent, actor_metrics = update_actor(agent, bst, batch, shown, config)
    return agent, critic_metrics | actor_metrics


# ============================================================================= Train


def prepare(
    data: Transition, config: Config
) -> tuple[Transition, np.ndarray, np.ndarray]:
    """Standardises observations, transforms rewards; numpy in, numpy out.

    Returns:
        The float32 transitions to train on, and `mean` and `std` (S,) such that the
        policy's input is (obs - mean) / std. `std` includes TD3+BC's epsilon of 1e-3.
    """
    obs = np.asarray(data.obs, np.float32)
    mean, std = np.zeros_like(obs[0]), np.ones_like(obs[0])
    if config.normalize_obs:
        mean = obs.mean(axis=0, dtype=np.float64).astype(np.float32)
        std = (obs.std(axis=0, dtype=np.float64) + 1e-3).astype(np.float32)
    reward = config.reward_scale * np.asarray(data.reward, np.float32)
    reward = (config.reward_shift + reward).astype(np.float32)
    next_obs = (np.asarray(data.next_obs, np.float32) - mean) / std
    action = np.asarray(data.action, np.float32)
    terminal = np.asarray(data.terminal, np.float32)
    arrays = ((obs - mean) / std, action, reward, next_obs, terminal)
    return Transition._make(arrays), mean, std


def n_step(data: Transition, episode: np.ndarray, config: Config) -> Transition:
    """Joins up to `n_step` rewards of an episode into one; numpy in, numpy out.

    The reward becomes R = sum_k<m gamma^k r_(t+k), m = n_step or what the episode still
    has, `next_obs` what was observed after them, and `terminal` 1 - gamma^(m-1) (1 -
    that of the last), so that `td_target` adds gamma^m Q' where the task went on.

    Args:
        data: as `prepare` returns it, its episodes one after the other, each in order.
        episode: (N,) which episode a transition is of; it ends at a terminal one too.
    """
    gamma, steps = config.discount, config.n_step
    if steps in (None, 1):
        return data
    if gamma is None or len(episode) != len(data.reward):
        raise ValueError("expected a resolved config, and every transition's episode")
    here = np.arange(len(episode))
    is_end = np.append(np.diff(episode) != 0, True) | (np.asarray(data.terminal) > 0)
    end = np.flatnonzero(is_end)[np.cumsum(is_end) - is_end]
    last = np.minimum(here + steps - 1, end)
    total, to_go = 0.0, np.zeros(len(here) + 1)  # discounted, to the episode's end
    rewards = np.asarray(data.reward).tolist()
    for t, ends in reversed(list(enumerate(is_end.tolist()))):
        to_go[t] = total = rewards[t] + (0.0 if ends else gamma * total)
    beyond = gamma ** (last - here + 1) * np.where(is_end[last], 0.0, to_go[last + 1])
    alive = gamma ** (last - here) * (1.0 - np.asarray(data.terminal)[last])
    return data._replace(
        reward=(to_go[:-1] - beyond).astype(np.float32),
        next_obs=np.asarray(data.next_obs)[last],
        terminal=(1.0 - alive).astype(np.float32),
    )


def train(
    agent: AgentState,
    bst: Supervisor,
    data: Transition,
    key: jax.Array,
    start: jax.Array,
    num_updates: int,
    config: Config,
) -> tuple[AgentState, Metrics]:
    """`num_updates` critic updates, counted from `start`, fused in one scan.

    The key of update t is fold_in(key, t), so two calls of n equal one of 2n.

    Args:
        start: () updates done so far. num_updates: static, a multiple of policy_delay.
    Returns:
        The new state; metrics, their mean over the scan (`omega_max`: the largest).
    """
    steps = start + jnp.arange(0, num_updates, config.policy_delay)
    agent, metrics = jax.lax.scan(
        lambda agent, step: update(agent, bst, data, key, step, config), agent, steps
    )
    largest = metrics["omega_max"].max()
    return agent, jax.tree.map(jnp.mean, metrics) | {"omega_max": largest}


# ============================================================================== Main


def main(args: list[str] | None = None) -> None:
    """Loads, pretrains, trains, evaluates and writes; see `--help`."""
    import time

    from common import datasets, run, seeds
    from common.options import parse
    from common.options import resolve as resolve_options

    options, config = parse("td3_bst", Config(), __doc__ or "", args, TRACED)
    begin = time.perf_counter()
    seeds.use_cores(len(options.lanes))
    dataset = datasets.load(options.dataset, options.eval_map, options.best_fraction)
    if dataset.domain == "locomotion" and options.num_updates is None:
        options = dataclasses.replace(options, num_updates=LOCOMOTION_UPDATES)
    options = resolve_options(options, dataset, config.policy_delay)
    total = options.num_updates or 0
    logged = Transition(*(getattr(dataset, name) for name in Transition._fields))
    config = resolve(config, dataset.domain, logged, total)
    data, mean, std = prepare(logged, config)
    if min(options.swept.get("mu", (config.mu or 1,))) < 0.025 and not config.omega_cap:
        print(
            "warning: with mu below 0.025 the actor's first gradients overflow float32"
        )
    lam, net = config.scale, config.morse_net
    reused = run.reused_networks(options, dataset, std, lam, net, True)
    job = run.Run("td3_bst", options, config, dataset, mean, std)
    job.wall["load"] = time.perf_counter() - begin
    data = job.place(n_step(data, dataset.episode, config))

    dims = {"obs_dim": dataset.obs_dim, "action_dim": dataset.action_dim}
    agent = job.map(partial(init, **dims, config=config), True)(job.keys(0))
    morse_state = job.map(partial(morse.init, **dims, config=net), True)(job.keys(3))
    step, restored = 0, job.restore((agent, morse_state.params))
    if restored is None:
        pairs = (data.obs, data.action)
        params = run.fit_morse(job, morse_state, *pairs, lam, net, reused)
        job.checkpoint(0, (agent, params), agent.actor)
    else:
        (agent, params), step = restored
        job.evaluate_again(step, agent.actor)

    bst = Supervisor(
        params,
        scale=job.traced("scale", config.scale),
        mu=job.traced("mu", config.mu),
        floor=job.traced("floor", config.floor),
    )
    program = job.chunked(partial(train, config=config), True, True, False, True, False)
    keys = job.keys(2)
    for start, length in job.chunks("TD3-BST", step, *job.plan):
        with job.timed("training"):
            agent, metrics = program(length, agent, bst, data, keys, np.int32(start))
            job.record(metrics, length)
        if job.due(start + length):
            job.checkpoint(start + length, (agent, params), agent.actor)

    first = jax.tree.map(lambda x: np.asarray(x)[0], params)
    density = partial(morse.certainty, first, scale=bst.scale[0], config=net)
    job.finish(agent.actor, density)


if __name__ == "__main__":
    from common.run import guarded

    guarded(main)
