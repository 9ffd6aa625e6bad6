"""The algorithms once more: numpy in float64, and gradients by finite differences."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def to_numpy(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.array(x, np.float64), tree)


def mlp(layers: dict[str, Any], x: np.ndarray, margin: float = 1e-4) -> np.ndarray:
    """ReLU layers, linear output; asserts that no unit is at ReLU's kink."""
    for i in range(len(layers)):
        x = x @ layers[f"Dense_{i}"]["kernel"] + layers[f"Dense_{i}"]["bias"]
        if i + 1 < len(layers):
            assert np.abs(x).min() > margin, "choose another seed"
            x = np.maximum(x, 0.0)
    return x


def numpy_policy(actor: Any, obs: np.ndarray) -> np.ndarray:
    return np.tanh(mlp(actor["params"], obs))


def numpy_q(critics: Any, obs: np.ndarray, action: np.ndarray) -> list[np.ndarray]:
    x = np.concatenate([obs, action], axis=1)
    both = [jax.tree.map(lambda leaf, i=i: leaf[i], critics["params"]) for i in (0, 1)]
    return [mlp(critic, x)[:, 0] for critic in both]


def numpy_certainty(bst: Any, obs: np.ndarray, action: np.ndarray) -> np.ndarray:
    moved = mlp(bst.params, np.concatenate([obs, action], axis=1))
    return np.exp(-(bst.scale**2) / 2 * ((moved - action) ** 2).sum(axis=1))


def numpy_target(agent: Any, batch: Any, discount: float) -> np.ndarray:
    action = numpy_policy(agent.target_actor, batch.next_obs)
    q = np.minimum(*numpy_q(agent.target_critics, batch.next_obs, action))
    return batch.reward + discount * np.where(batch.terminal == 1, 0.0, q)


def numpy_critic_loss(critics: Any, batch: Any, target: np.ndarray) -> float:
    q_1, q_2 = numpy_q(critics, batch.obs, batch.action)
    return float(np.mean((q_1 - target) ** 2) + np.mean((q_2 - target) ** 2))


def numpy_actor_loss(
    actor: Any,
    critics: Any,
    bst: Any,
    batch: Any,
    z_q: float,
    omega: Any = None,
    cap: float = math.inf,
) -> float:
    """The loss given Z_Q, and given omega where no gradient shall go through it."""
    action = numpy_policy(actor, batch.obs)
    if omega is None:
        omega = np.exp((1 - numpy_certainty(bst, batch.obs, action)) / bst.mu) - 1
        omega = np.minimum(omega, cap)
    distance = ((action - batch.action) ** 2).sum(axis=1)
    q = numpy_q(critics, batch.obs, action)[0]
    return float(np.mean(omega * distance - q / z_q))


def finite_differences(function: Callable[[Any], Any], tree: Any) -> Any:
    """The gradient of a scalar function of a float64 tree, by central differences."""
    leaves, structure = jax.tree.flatten(tree)
    leaves, step = [leaf.copy() for leaf in leaves], 1e-6
    grads = [np.zeros_like(leaf) for leaf in leaves]
    for leaf, grad in zip(leaves, grads, strict=True):
        for index in np.ndindex(leaf.shape):
            value, sides = leaf[index], []
            for moved in (value + step, value - step):
                leaf[index] = moved
                sides.append(function(jax.tree.unflatten(structure, leaves)))
            leaf[index] = value
            grad[index] = (sides[0] - sides[1]) / (2 * step)
    return jax.tree.unflatten(structure, grads)


def warm_adam(opt_state: Any, seed: int) -> Any:
    """An Adam state as after four steps, so that the moments' decay is tested too."""
    rng = np.random.default_rng(seed)

    def warm(x: Any, y: np.ndarray) -> jax.Array:
        return jnp.asarray(y, x.dtype)

    adam, rest = opt_state[0], opt_state[1:]
    mean = jax.tree.map(lambda x: warm(x, rng.normal(0, 0.1, x.shape)), adam.mu)
    square = jax.tree.map(lambda x: warm(x, rng.uniform(0.01, 0.1, x.shape)), adam.nu)
    count = jnp.int32(4)
    rest = jax.tree.map(lambda _: count, rest)  # a schedule's count
    return (adam._replace(count=count, mu=mean, nu=square), *rest)


def numpy_adam(params: Any, grad: Any, opt_state: Any, rate: float) -> Any:
    """Kingma & Ba's algorithm 1 with beta = (.9, .999), epsilon 1e-8."""
    adam = to_numpy(opt_state[0])
    mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, adam.mu, grad)
    square = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, adam.nu, grad)
    t = adam.count + 1
    return jax.tree.map(
        lambda x, m, v: (
            x - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        ),
        *(params, mean, square),
    )


def norm(tree: Any) -> float:
    return math.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(tree)))
