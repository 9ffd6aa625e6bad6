"""IQL, and IQL with the BST policy step, offline, in one file.

Implicit Q-learning fits a value to an upper expectile of the data's own Q, so that no
action outside the data has a part in learning it. `--policy-step awr` then clones the
data's actions, the better ones harder: IQL as published. `--policy-step bst` (the
default) takes TD3-BST's policy step: it follows Q where a Morse network is certain.

    L_V      = mean[|tau - 1(u < 0)| u^2],  u = min_i Q'_i(s, a) - V(s)
    y        = r + gamma (1 - terminal) V(s')
    L_Q      = sum_i mean[(Q_i(s, a) - y)^2]
    awr      : L_pi = -mean[min(exp(beta u), 100) log pi(a|s)],
               pi(.|s) = N(tanh(m(s)), diag(sigma^2)), played at its mode
    bst      : L_pi = mean[omega(s) ||pi(s) - a||^2 - w Q_1(s, pi(s)) / Z_Q],
               omega(s) = min(exp((1 - M(s, pi(s))) / mu) - 1, cap) + floor,
               Z_Q = mean |Q_1(s, pi(s))|; w: 1, or ours; pi of s + noise, see `noisy`

Papers Kostrikov, Nair & Levine, ICLR 2022, arXiv 2110.06169 (IQL);
       Srinivasan & Knottenbelt, IJCAI 2024, arXiv 2404.16399 (the BST step).
Run    uv run iql_bst.py
Copy   morse.py and this file up to `main`. Needs jax, flax, optax, chex.
Shapes B batch, N transitions, S observation, A action; actions lie in [-1, 1].
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

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
    """IQL-BST's options. Unset (None) ones take the domain's value, see DEFAULTS."""

    policy_step: Literal["bst", "awr"] = "bst"  # awr: IQL as published
    expectile: float | None = None  # tau, the value's; unset: by domain
    beta: float | None = None  # awr: the weight's inverse temperature; unset: by domain
    weight_clip: float = 100.0  # awr: largest weight
    mu: float | None = None  # bst: mu, temperature of omega; unset: by domain
    floor: float | None = None  # bst: omega where M is 1; unset: by domain
    omega_cap: float = 10.0  # bst: largest omega, less the floor; 0: none
    scale: float | None = None  # bst: lam, the Morse kernel's scale; unset: dim(A) / 2
    supervisor_gradient: bool | None = None  # bst: also through omega; unset: by domain
    q_weight: float | None = None  # bst: w, of Q / Z_Q; unset: by domain and spread
    obs_noise: float | None = None  # bst: std, see `noisy`; unset: 0, or for falls
    actor_critics: int = 1  # bst: 1: Q_1 for the actor; 2: the smaller Q of both
    discount: float | None = None  # gamma, per step; unset: by domain
    reward_scale: float | None = None  # times the reward; unset: by domain and returns
    reward_shift: float | None = None  # added after scaling; unset: by domain
    polyak: float | None = None  # the target critics' step; unset: by domain
    normalize_obs: bool | None = None  # standardise observations; unset: by domain
    critic_layer_norm: bool | None = None  # layer norm in critics; unset: by domain
    hidden_dims: tuple[int, ...] = (256, 256)  # widths of actor, critics and value
    actor_learning_rate: float = 3e-4  # Adam's step size, the first one of a decay
    actor_decay_updates: int | None = None  # cosine to 0; 0: none; unset: the run
    critic_learning_rate: float = 3e-4  # Adam's step size
    value_learning_rate: float = 3e-4  # Adam's step size
    batch_size: int = 256  # B, transitions per update
    morse_net: morse.Config = morse.Config()

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float) and not np.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
        if self.policy_step not in ("bst", "awr"):
            raise ValueError(f"policy_step must be bst or awr, got {self.policy_step}")
        rates = ("actor_learning_rate", "critic_learning_rate", "value_learning_rate")
        for name in (*rates, "batch_size", "weight_clip", "scale", "reward_scale"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if self.expectile is not None and not 0 < self.expectile < 1:
            raise ValueError(f"expectile must lie in (0, 1), got {self.expectile}")
        if self.discount is not None and not 0 <= self.discount <= 1:
            raise ValueError(f"discount must lie in [0, 1], got {self.discount}")
        if self.polyak is not None and not 0 < self.polyak <= 1:
            raise ValueError(f"polyak must lie in (0, 1], got {self.polyak}")
        if self.mu is not None and not self.mu >= 0.02:
            raise ValueError(
                f"mu must be at least 0.02, got {self.mu}: the weight exp(C / mu) - 1 "
                "and its gradient would overflow float32"
            )
        at_least_0 = ("floor", "omega_cap", "q_weight", "obs_noise")
        for name in ("beta", *at_least_0, "actor_decay_updates"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if self.actor_critics not in (1, 2):
            raise ValueError(f"actor_critics must be 1 or 2, got {self.actor_critics}")
        if not self.hidden_dims or min(self.hidden_dims) < 1:
            raise ValueError(f"hidden_dims must be positive, got {self.hidden_dims}")


LOCOMOTION = {
    "expectile": 0.7,
    "beta": 3.0,
    "mu": 0.1,
    "floor": 0.1,
    "supervisor_gradient": True,
    "q_weight": 1.0,
    "discount": 0.99,
    "reward_scale": 1.0,
    "reward_shift": 0.0,
    "obs_noise": 0.0,
    "polyak": 0.005,
    "normalize_obs": False,
    "critic_layer_norm": False,
}
POINTMAZE = {
    "mu": 0.3,
    "floor": 0.0,
    "supervisor_gradient": False,
    "discount": 0.98,
    "reward_scale": 10.0,
    "normalize_obs": True,
}
ANTMAZE = {"floor": 5.0, "reward_shift": -1.0}
MAZE = {"expectile": 0.9, "beta": 10.0}
CAREFUL = {"beta": 0.5, "supervisor_gradient": False}  # beta: Kitchen's; untested
Q_PER_SPREAD = 315.0  # locomotion: q_weight over the spread of the actions, ^4
MANY_FALLS = 1e-3  # terminal transitions of all, above which agents often fall
NOISE_PER_SPREAD = 0.5  # where they do: obs_noise over the spread of the actions
DEFAULTS = {  # IQL's code; mu as in td3_bst.py, pointmaze: results/LOG.md
    "locomotion": LOCOMOTION,
    "pointmaze": LOCOMOTION | MAZE | POINTMAZE,
    "antmaze": LOCOMOTION | MAZE | ANTMAZE,
    "other": LOCOMOTION | CAREFUL,
}
TRACED = ("mu", "floor", "scale", "expectile")  # may differ between lanes: --sweep


def resolve(
    config: Config,
    domain: str,
    data: "Transition",
    episode_returns: np.ndarray,
    num_updates: int,
) -> Config:
    """Returns `config` with every unset option at its domain's value.

    In locomotion the spread of the data's actions decides w of the BST step, to the two
    digits that such a rule is good for, and, where agents often fall, which is what a
    terminal transition is there, the noise on the states that the actor is shown.

    Args:
        data: as it was logged, in its order; numpy.
        episode_returns: (E,) of the episodes that are trained on; IQL divides
            locomotion's rewards by their range / 1000.
        num_updates: of the whole run, over which the actor's learning rate decays.
    """
    awr = config.policy_step == "awr"
    defaults = DEFAULTS[domain] | {"scale": data.action.shape[1] / 2}
    defaults["actor_decay_updates"] = num_updates
    if domain == "locomotion":
        extent = float(np.ptp(episode_returns))
        known = extent > 1e-6 * np.abs(episode_returns).max()  # more than rounding
        defaults["reward_scale"] = 1000.0 / extent if known else 1.0
        if not awr and None in (config.q_weight, config.obs_noise):
            pairs = morse.like_states(data.obs, data.action)
            sigma = morse.action_spread(pairs)
            defaults["q_weight"] = float(f"{Q_PER_SPREAD * sigma**4:.2g}")
            if np.mean(data.terminal) > MANY_FALLS:
                defaults["obs_noise"] = NOISE_PER_SPREAD * sigma
    if domain != "pointmaze":
        defaults["normalize_obs"] = not awr
    unset = {k: v for k, v in defaults.items() if getattr(config, k) is None}
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
    value: Params
    target_critics: Params
    actor_opt: optax.OptState
    critic_opt: optax.OptState
    value_opt: optax.OptState


# ========================================================================== Networks


def dense(x: jax.Array, features: int) -> jax.Array:
    """A layer initialised as in IQL's code: orthogonal times sqrt(2), zero bias."""
    return nn.Dense(features, kernel_init=nn.initializers.orthogonal(2**0.5))(x)


class Actor(nn.Module):
    """pi(s): ReLU layers, tanh output; and AWR's log sigma, the same in every state."""

    hidden_dims: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, obs: jax.Array) -> jax.Array:
        self.param("log_std", nn.initializers.zeros, (self.action_dim,))
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


class Value(nn.Module):
    """V(s): ReLU layers."""

    hidden_dims: tuple[int, ...]

    @nn.compact
    def __call__(self, obs: jax.Array) -> jax.Array:
        x = obs
        for width in self.hidden_dims:
            x = nn.relu(dense(x, width))
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


def state_values(value: Params, obs: jax.Array, config: Config) -> jax.Array:
    """V(s), (B,)."""
    apply: Any = Value(config.hidden_dims).apply
    return apply(value, obs)


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


def expectile_loss(difference: jax.Array, expectile: jax.Array) -> jax.Array:
    """|tau - 1(u < 0)| u^2 of each difference u (IQL, sec. 4.1); tau = .5: u^2 / 2."""
    weight = jnp.where(difference > 0, expectile, 1.0 - expectile)
    return weight * jnp.square(difference)


def target_q(agent: AgentState, batch: Transition, config: Config) -> jax.Array:
    """The target critics' smaller Q(s, a), (B,)."""
    return q_values(agent.target_critics, batch.obs, batch.action, config).min(axis=0)


def value_loss(
    value: Params,
    batch: Transition,
    q: jax.Array,
    expectile: jax.Array,
    config: Config,
) -> tuple[jax.Array, Metrics]:
    """L_V (IQL, eq. 5) against the target q (B,)."""
    v = state_values(value, batch.obs, config)
    chex.assert_equal_shape([q, v])
    loss = expectile_loss(q - v, expectile).mean()
    return loss, {"value_loss": loss, "v": v.mean()}


def td_target(agent: AgentState, batch: Transition, config: Config) -> jax.Array:
    """y (B,): one step and the value behind it (IQL, eq. 6)."""
    next_v = state_values(agent.value, batch.next_obs, config)
    return batch.reward + config.discount * (1.0 - batch.terminal) * next_v


def critic_loss(
    critics: Params, batch: Transition, target: jax.Array, config: Config
) -> tuple[jax.Array, Metrics]:
    """L_Q: the squared TD errors, mean over the batch, summed over the twins."""
    q = q_values(critics, batch.obs, batch.action, config)
    chex.assert_equal_shape([q[0], target])
    loss = jnp.square(q - target[None]).mean(axis=1).sum()
    return loss, {"critic_loss": loss, "q_data": q[0].mean()}


def awr_weight(
    agent: AgentState, batch: Transition, config: Config
) -> tuple[jax.Array, jax.Array]:
    """min(exp(beta u), clip) (B,) and the advantage u = min_i Q'_i - V (B,)."""
    v = state_values(agent.value, batch.obs, config)
    advantage = target_q(agent, batch, config) - v
    return jnp.minimum(jnp.exp(config.beta * advantage), config.weight_clip), advantage


def awr_loss(
    actor: Params, batch: Transition, weight: jax.Array, config: Config
) -> tuple[jax.Array, Metrics]:
    """L_pi of AWR (IQL, eq. 7): the data's log-likelihood, weighted by weight (B,)."""
    mode = policy(actor, batch.obs, config)
    chex.assert_equal_shape([mode, batch.action])
    log_std = jnp.clip(actor["params"]["log_std"], -5.0, 2.0)[None]  # as IQL's code
    error = (batch.action - mode) / jnp.exp(log_std)
    log_density = -0.5 * (jnp.square(error) + jnp.log(2 * jnp.pi)) - log_std
    loss = -(weight * log_density.sum(axis=-1)).mean()
    return loss, {
        "actor_loss": loss,
        "distance": jnp.square(mode - batch.action).sum(axis=-1).mean(),
        "std": jnp.exp(log_std).mean(),
    }


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
) -> tuple[
    optax.GradientTransformation,
    optax.GradientTransformation,
    optax.GradientTransformation,
]:
    """Adam for the actor (its step size a cosine to 0, if asked), critics and value."""
    rate: Any = config.actor_learning_rate
    if config.actor_decay_updates:
        rate = optax.cosine_decay_schedule(rate, config.actor_decay_updates)
    critics, value = config.critic_learning_rate, config.value_learning_rate
    return optax.adam(rate), optax.adam(critics), optax.adam(value)


def init(key: jax.Array, obs_dim: int, action_dim: int, config: Config) -> AgentState:
    """Fresh networks; the targets are copies, so the state can be donated."""
    key_actor, key_critics, key_value = jax.random.split(key, 3)
    obs, action = jnp.zeros((1, obs_dim)), jnp.zeros((1, action_dim))
    actor = Actor(config.hidden_dims, action_dim).init(key_actor, obs)
    critic = Critic(config.hidden_dims, bool(config.critic_layer_norm))
    keys = jax.random.split(key_critics, 2)
    # Not vmapped: several batched QRs at once can deadlock jaxlib 0.10 on CPUs.
    critics = jax.lax.map(lambda key: critic.init(key, obs, action), keys)
    value = Value(config.hidden_dims).init(key_value, obs)
    adam_actor, adam_critics, adam_value = optimizers(config)
    return AgentState(
        actor=actor,
        critics=critics,
        value=value,
        target_critics=jax.tree.map(jnp.copy, critics),
        actor_opt=adam_actor.init(actor),
        critic_opt=adam_critics.init(critics),
        value_opt=adam_value.init(value),
    )


def update_value(
    agent: AgentState, batch: Transition, expectile: jax.Array, config: Config
) -> tuple[AgentState, Metrics]:
    """One Adam step of the value."""
    q = target_q(agent, batch, config)
    grad, metrics = jax.grad(value_loss, has_aux=True)(
        agent.value, batch, q, expectile, config
    )
    _, _, adam = optimizers(config)
    step, value_opt = adam.update(grad, agent.value_opt)
    value = optax.apply_updates(agent.value, step)
    metrics["value_grad_norm"] = optax.tree.norm(grad)
    return agent._replace(value=value, value_opt=value_opt), metrics


def update_critics(
    agent: AgentState, batch: Transition, config: Config
) -> tuple[AgentState, Metrics]:
    """One Adam step of the twin critics, then their targets follow."""
    target = td_target(agent, batch, config)
    grad, metrics = jax.grad(critic_loss, has_aux=True)(
        agent.critics, batch, target, config
    )
    _, adam, _ = optimizers(config)
    step, critic_opt = adam.update(grad, agent.critic_opt)
    critics = optax.apply_updates(agent.critics, step)
    metrics["critic_grad_norm"] = optax.tree.norm(grad)
    return agent._replace(
        critics=critics,
        critic_opt=critic_opt,
        target_critics=follow(agent.target_critics, critics, config),
    ), metrics


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
    """One Adam step of the actor, by AWR or by TD3-BST's objective."""
    if config.policy_step == "awr":
        weight, advantage = awr_weight(agent, batch, config)
        grad, metrics = jax.grad(awr_loss, has_aux=True)(
            agent.actor, batch, weight, config
        )
        metrics |= {"weight": weight.mean(), "advantage": advantage.mean()}
    else:
        grad, metrics = jax.grad(actor_loss, has_aux=True)(
            agent.actor, agent.critics, bst, batch, shown, config
        )
    metrics["actor_grad_norm"] = optax.tree.norm(grad)
    adam, _, _ = optimizers(config)
    step, actor_opt = adam.update(grad, agent.actor_opt)
    actor = optax.apply_updates(agent.actor, step)
    return agent._replace(actor=actor, actor_opt=actor_opt), metrics


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
    expectile: jax.Array,
    data: Transition,
    key: jax.Array,
    step: jax.Array,
    config: Config,
) -> tuple[AgentState, Metrics]:
    """Value, actor and critics on one batch, in the order of IQL's code.

    Update t draws its batch from fold_in(key, t), t = step, and its noise from that.
    """
    key = jax.random.fold_in(key, step)
    batch = sample(data, key, config.batch_size)
    shown = noisy(batch.obs, jax.random.fold_in(key, 1), config)
    agent, value_metrics = update_value(agent, batch, expectile, config)
    agent, actor_metrics = update_actor(agent, bst, batch, shown, config)
    agent, critic_metrics = update_critics(agent, batch, config)
    return agent, value_metrics | actor_metrics | critic_metrics


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


def train(
    agent: AgentState,
    bst: Supervisor,
    expectile: jax.Array,
    data: Transition,
    key: jax.Array,
    start: jax.Array,
    num_updates: int,
    config: Config,
) -> tuple[AgentState, Metrics]:
    """`num_updates` updates, counted from `start`, fused in one scan.

    The key of update t is fold_in(key, t), so two calls of n equal one of 2n.

    Args:
        expectile: () tau of the value, see `Config`.
        start: () updates done so far. num_updates: static.
    Returns:
        The new state; metrics, their mean over the scan (`omega_max`: the largest).
    """
    agent, metrics = jax.lax.scan(
        lambda agent, step: update(agent, bst, expectile, data, key, step, config),
        agent,
        start + jnp.arange(num_updates),
    )
    largest = {k: v.max() for k, v in metrics.items() if k == "omega_max"}
    return agent, jax.tree.map(jnp.mean, metrics) | largest


# ============================================================================== Main


def main(args: list[str] | None = None) -> None:
    """Loads, pretrains, trains, evaluates and writes; see `--help`."""
    import time

    from common import datasets, run, seeds
    from common.errors import UserError
    from common.options import parse
    from common.options import resolve as resolve_options

    options, config = parse("iql_bst", Config(), __doc__ or "", args, TRACED)
    awr = config.policy_step == "awr"
    if awr and set(options.swept) - {"expectile"}:
        raise UserError("--sweep: with --policy-step awr only expectile changes a run")
    begin = time.perf_counter()
    seeds.use_cores(len(options.lanes))
    dataset = datasets.load(options.dataset, options.eval_map, options.best_fraction)
    options = resolve_options(options, dataset, policy_delay=1)
    total, returns = options.num_updates or 0, dataset.episode_returns
    logged = Transition(*(getattr(dataset, name) for name in Transition._fields))
    config = resolve(config, dataset.domain, logged, returns, total)
    data, mean, std = prepare(logged, config)
    if min(options.swept.get("mu", (config.mu or 1,))) < 0.025 and not config.omega_cap:
        print(
            "warning: with mu below 0.025 the actor's first gradients overflow float32"
        )
    lam, net = config.scale, config.morse_net
    reused = run.reused_networks(options, dataset, std, lam, net, not awr)
    job = run.Run("iql_bst", options, config, dataset, mean, std)
    job.wall["load"] = time.perf_counter() - begin
    data = job.place(data)

    dims = {"obs_dim": dataset.obs_dim, "action_dim": dataset.action_dim}
    agent = job.map(partial(init, **dims, config=config), True)(job.keys(0))
    morse_state = job.map(partial(morse.init, **dims, config=net), True)(job.keys(3))
    step, restored = 0, job.restore((agent, morse_state.params))
    pairs = (data.obs, data.action)
    fit = partial(run.fit_morse, job, morse_state, *pairs, lam, net, reused)
    if restored is None:
        params = morse_state.params if awr else fit()  # AWR reads none
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
    tau = job.traced("expectile", config.expectile)
    per_seed = (True, True, True, False, True, False)
    program = job.chunked(partial(train, config=config), *per_seed)
    keys = job.keys(2)
    label = "IQL" if awr else "IQL-BST"
    for start, length in job.chunks(label, step, *job.plan):
        with job.timed("training"):
            inputs = (agent, bst, tau, data, keys, np.int32(start))
            agent, metrics = program(length, *inputs)
            job.record(metrics, length)
        if job.due(start + length):
            job.checkpoint(start + length, (agent, params), agent.actor)

    density = None
    fitted = not awr or reused or job.options.num_morse_updates
    if fitted:  # for AWR a diagnostic: how certain are the policy's actions?
        params = fit() if awr else params
        first = jax.tree.map(lambda x: np.asarray(x)[0], params)
        density = partial(morse.certainty, first, scale=bst.scale[0], config=net)
    job.finish(agent.actor, density)


if __name__ == "__main__":
    from common.run import guarded

    guarded(main)
