"""Why does a run succeed or fail? Looks at one run's policies, critics and densities.

    uv run results/diagnose.py RUN [RUN ...]

For every policy of a finished run of td3_bst.py, td3_bc.py or iql_bst.py:

- at states of the data: the certainty M of the data's and of the policy's actions, the
  weight omega, how far the policy is from the data's actions, how much of its action
  sits on the box's faces; how far out M stays large, in random directions and along Q's
  gradient; uniform actions and corners that M holds for certain;
- in roll-outs: how certain and how far from the data the visited states are, and
  Q_1(s, pi(s)) beside the return that really followed;
- where asked (`--order`), and where the simulator can be put into the data's states:
  whether Q orders actions as what follows them does;
- where asked (`--along`): the return after a step along Q's gradient in every state.

Writes `diagnosis.csv`, a row per policy, and `diagnosis.png` (the first policy's) into
the run's folder, and prints the rows.
"""

import csv
import importlib
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.spatial import KDTree
from scipy.stats import rankdata

if __name__ == "__main__":  # a script finds its neighbours through the repository root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import morse
from common import checkpoint, datasets, rollout
from common.datasets import Dataset
from common.errors import UserError
from common.options import stored_options
from common.run import guarded
from common.tasks import flatten_obs, make_env

RADII = np.array([0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.3, 1.6])
NEIGHBOURS = 50  # states whose actions count as the data's at a state
KNOWN = 50_000  # most transitions among which neighbours are looked for
UNIFORM = 64  # uniform actions, and corners, per state
SETTLED = 0.05  # what may be missing of a discounted return, as a share of gamma^t
AHEAD = (1, 3, 10, 30, 100, 400)  # steps after which Q says what is still to come
RIVALS = 10  # actions that are compared at a state
SPREAD = 0.2  # their standard deviation around the policy's action
Acting = Callable[[np.ndarray], np.ndarray]  # (1, 1, S) to (1, 1, A), raw units


@dataclass(frozen=True)
class Options:
    """Looks at finished runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]  # their folders
    episodes: int = 10  # roll-outs per policy; 0: none
    points: int = 2000  # states of the data to look at
    order: int = 0  # of these, to compare actions at; 100: about a minute
    along: tuple[float, ...] = ()  # mean lengths of steps that follow Q's gradient

    def __post_init__(self) -> None:
        if min(self.episodes, self.order) < 0 or self.points < 1:
            raise ValueError("episodes and order must be at least 0, points at least 1")


@dataclass(frozen=True)
class Lane:
    """One policy of a run, with its critics and density; all in the networks' units."""

    label: str
    module: Any  # the algorithm's file
    config: Any
    actor: Any
    critics: Any
    density: Any  # parameters of its Morse network
    scale: float  # lam
    bst: Any  # its Supervisor; None: the algorithm has no such weight

    def policy(self, obs: Any) -> jax.Array:
        """pi(s), (B, A) in [-1, 1]."""
        return self.module.policy(self.actor, obs, self.config)

    def q(self, obs: Any, action: Any) -> jax.Array:
        """Q_1(s, a), (B,)."""
        return self.module.q_values(self.critics, obs, action, self.config)[0]

    def certainty(self, obs: Any, action: Any) -> jax.Array:
        """M(s, a), (...)."""
        net = getattr(self.config, "morse_net", morse.Config())
        return morse.certainty(self.density, obs, action, self.scale, net)

    def omega(self, obs: Any, action: Any) -> jax.Array:
        """omega(s), (B,), at these actions."""
        return self.module.supervisor(self.bst, obs, action, self.config)[0]


# ============================================================================== Load


def load(folder: Path) -> tuple[list[Lane], Dataset, rollout.NumpyPolicy]:
    """A finished run's policies, its dataset, and the policies in numpy.

    Raises:
        UserError: the folder is no finished run of this version, or its data are gone.
    """
    stored = checkpoint.read_json(folder / "config.json")
    module = importlib.import_module(stored["algorithm"])
    options, config = stored_options(folder, stored, module.Config)
    dataset = datasets.load(options.dataset, options.eval_map, options.best_fraction)
    if dataset.fingerprint != stored["dataset"]["fingerprint"]:
        raise UserError(f"{dataset.name} is not the data that {folder} was trained on")
    paths = sorted((folder / "checkpoint").glob("step-*.safetensors"))
    if not paths or not (folder / "result.json").exists():
        raise UserError(f"{folder} is not a finished run; go on with --resume {folder}")
    dims, norm = (dataset.obs_dim, dataset.action_dim), np.zeros(dataset.obs_dim)
    net = getattr(config, "morse_net", morse.Config())
    agent, density = jax.eval_shape(
        jax.vmap(partial(_fresh, module=module, config=config, net=net, dims=dims)),
        jax.random.split(jax.random.key(0), len(options.lanes)),
    )
    state = (agent, density) if hasattr(config, "morse_net") else agent
    whole, _ = checkpoint.load_tree(
        paths[-1], {"state": state, "obs_mean": norm, "obs_std": norm}
    )
    agent = whole["state"][0] if hasattr(config, "morse_net") else whole["state"]
    box = dataset.action_low, dataset.action_high
    layers = rollout.layers_of(agent.actor)
    policy = rollout.NumpyPolicy(layers, whole["obs_mean"], whole["obs_std"], *box)
    one = jax.tree.map(lambda x: np.zeros(x.shape[1:]), density)
    lanes = []
    for i, run in enumerate(options.lanes):
        label = "-".join(f"{name}{value:.9g}" for name, value in run.items())
        scale = run.get("scale", getattr(config, "scale", dataset.action_dim / 2))
        path = (
            folder / "morse" / f"scale{float(scale):.9g}-seed{run['seed']}.safetensors"
        )
        if not path.is_file():
            raise UserError(
                f"{folder} has no Morse network of {label}; train with "
                "--num-morse-updates above 0"
            )
        params, _ = checkpoint.load_tree(path, one)
        bst = None
        if hasattr(config, "mu") and getattr(config, "policy_step", "bst") == "bst":
            values = {x: run.get(x, getattr(config, x)) for x in ("mu", "floor")}
            bst = module.Supervisor(params, scale=scale, **values)
        actor = jax.tree.map(lambda x, i=i: x[i], agent.actor)
        critics = jax.tree.map(lambda x, i=i: x[i], agent.critics)
        lanes.append(Lane(label, module, config, actor, critics, params, scale, bst))
    return lanes, dataset, policy


def _fresh(
    key: jax.Array, module: Any, config: Any, net: morse.Config, dims: tuple[int, int]
) -> Any:
    """An agent and a Morse network's parameters, for their shapes."""
    return module.init(key, *dims, config), morse.init(key, *dims, net).params


# ======================================================================= On the data


def nearest_action(
    action: np.ndarray, at: np.ndarray, known: Mapping[str, Any]
) -> np.ndarray:
    """Squared distance (B,) to the nearest of the actions that data has nearby.

    Args:
        action: (B, A). at: (B, S) states of the data, as the networks see them; what
            was done there itself does not count.
        known: `tree` over the data's states and their `action`s.
    """
    many = min(NEIGHBOURS + 1, len(known["action"]))
    index = known["tree"].query(at, k=many)[1][:, 1:]
    return np.square(known["action"][index] - action[:, None]).sum(-1).min(-1)


def profile(
    lane: Lane, obs: np.ndarray, action: np.ndarray, towards: np.ndarray
) -> np.ndarray:
    """Mean M at RADII from the actions in the unit directions `towards` (B, A)."""
    moved = np.clip(action + RADII[:, None, None] * towards, -1.0, 1.0)  # (R, B, A)
    return np.asarray(lane.certainty(obs, moved).mean(axis=1))


def radius(profile: np.ndarray) -> float:
    """Where the mean certainty falls to half its value at the data; infinite if not."""
    below = np.flatnonzero(profile < profile[0] / 2)
    if not below.size or below[0] == 0:
        return float("inf")
    end = int(below[0])
    return float(
        np.interp(
            -profile[0] / 2, -profile[end - 1 : end + 1], RADII[end - 1 : end + 1]
        )
    )


def unit(vectors: np.ndarray) -> np.ndarray:
    """The vectors (..., A) at length 1."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def on_data(
    lane: Lane,
    obs: np.ndarray,
    action: np.ndarray,
    known: Mapping[str, Any],
    rng: np.random.Generator,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Scalars, and arrays for the picture, at states (B, S) and actions (B, A)."""
    chosen = np.asarray(lane.policy(obs))
    uniform = rng.uniform(-1, 1, (UNIFORM, *action.shape)).astype(np.float32)
    sure = np.asarray(lane.certainty(obs, uniform))  # (U, B)
    corner = np.asarray(lane.certainty(obs, np.sign(uniform)))
    gradient = jax.grad(lambda a: lane.q(obs, a).sum())(jnp.asarray(action))
    random = unit(rng.normal(size=action.shape))
    profiles = {
        "random": profile(lane, obs, action, random),
        "q": profile(lane, obs, action, unit(np.asarray(gradient))),
    }
    own = nearest_action(action, obs, known)
    far = nearest_action(uniform[0], obs, known) > np.quantile(own, 0.99)
    policy_m = np.asarray(lane.certainty(obs, chosen))
    scalars = {
        "certainty_data": float(lane.certainty(obs, action).mean()),
        "certainty_policy": float(policy_m.mean()),
        "certainty_uniform": float(sure.mean()),
        "certainty_corners": float(corner.mean()),
        "false_certain": float((sure[0] > 0.5)[far].mean()) if far.any() else 0.0,
        "omega": float(lane.omega(obs, chosen).mean()) if lane.bst else None,
        "distance": float(np.square(chosen - action).sum(-1).mean()),
        "nearest_policy": float(nearest_action(chosen, obs, known).mean()),
        "nearest_data": float(own.mean()),
        "saturated_policy": float((np.abs(chosen) > 0.95).mean()),
        "saturated_data": float((np.abs(action) > 0.95).mean()),
        "radius_random": radius(profiles["random"]),
        "radius_q": radius(profiles["q"]),
    }
    arrays = {"data": np.asarray(lane.certainty(obs, action)), "policy": policy_m}
    arrays |= {"uniform": sure[0], "chosen": chosen, "action": action}
    return scalars, arrays | {f"profile_{k}": v for k, v in profiles.items()}


# ======================================================================= In roll-outs


def play(own: Acting, dataset: Dataset, episodes: int) -> list[dict[str, Any]]:
    """A policy's episodes: observations (T, S), rewards (T,), how they end."""
    assert dataset.task is not None
    task = dataset.task
    env, played = make_env(task), []
    for episode in range(episodes):
        obs, rewards, terminal = [], [], False
        raw, _ = env.reset(seed=episode)
        while len(rewards) < task.horizon and not terminal:
            obs.append(np.asarray(flatten_obs(task, raw), np.float32))
            act = own(obs[-1][None, None])[0, 0].astype(env.action_space.dtype)
            raw, reward, terminal, truncated, _ = env.step(act)
            rewards.append(float(reward))
            terminal = terminal or (task.ends_at_success and rewards[-1] > 0)
            if truncated:
                break
        played.append(
            {"obs": np.array(obs), "reward": np.array(rewards), "terminal": terminal}
        )
    env.close()
    return played


def stepping(
    lane: Lane, own: rollout.NumpyPolicy, length: float, obs: np.ndarray, norm: Any
) -> Acting:
    """The policy moved along Q_1's gradient at its action, by `length` on average.

    Args:
        obs: (B, S) states of the data to average over, as the networks see them.
    """

    def gradient(obs: Any) -> jax.Array:
        return jax.grad(lambda a: lane.q(obs, a).sum())(lane.policy(obs))

    scale = length / np.linalg.norm(np.asarray(gradient(obs)), axis=-1).mean()

    @jax.jit
    def moved(obs: Any) -> jax.Array:
        return jnp.clip(lane.policy(obs) + scale * gradient(obs), -1.0, 1.0)

    return lambda raw: own.in_box(np.asarray(moved(norm(raw[0])))[None])


def returns_to_go(episode: Mapping[str, Any], config: Any) -> np.ndarray:
    """Discounted return from every step (T,), NaN where too much of it was cut off."""
    reward = config.reward_scale * episode["reward"] + config.reward_shift
    total, out = 0.0, np.zeros(len(reward))
    for t in range(len(reward) - 1, -1, -1):
        out[t] = total = reward[t] + config.discount * total
    if not episode["terminal"]:
        left = config.discount ** np.arange(len(reward), 0, -1)
        out[left > SETTLED] = np.nan
    return out


def on_rollouts(
    lane: Lane, played: Sequence[Mapping[str, Any]], norm: Any, known: Mapping[str, Any]
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Scalars, and arrays for the picture, over the episodes played."""
    obs = np.concatenate([norm(episode["obs"]) for episode in played])
    true = np.concatenate([returns_to_go(e, lane.config) for e in played])
    action = lane.policy(obs)
    q, sure = np.asarray(lane.q(obs, action)), np.asarray(lane.certainty(obs, action))
    away, _ = known["tree"].query(obs, k=1)
    settled = ~np.isnan(true)
    enough = settled.sum() > 2 and np.ptp(true[settled]) > 0 and np.ptp(q[settled]) > 0
    scalars = {
        "rollout_return": float(np.mean([e["reward"].sum() for e in played])),
        "rollout_length": float(np.mean([len(e["reward"]) for e in played])),
        "rollout_certainty": float(sure.mean()),
        "state_distance": float(np.median(away)),
        "q_rollout": float(q[settled].mean()) if settled.any() else None,
        "true_return": float(true[settled].mean()) if settled.any() else None,
        "q_correlation": float(np.corrcoef(q[settled], true[settled])[0, 1])
        if enough
        else None,
    }
    time = np.concatenate([np.arange(len(e["reward"])) for e in played])
    return scalars, {"q": q, "true": true, "away": away, "time": time, "visited": sure}


# ================================================================== Order of actions


def put(env: Any, obs: np.ndarray) -> bool:
    """Puts a MuJoCo environment into an observed state; whether that worked.

    Args:
        obs: (S,) positions, without the first ones where the agent is not to know how
            far it has come (taken as 0), then velocities, as Hopper has them.
    """
    sim = env.unwrapped
    if not hasattr(sim, "model"):
        return False
    model = sim.model
    unseen = model.nq + model.nv - len(obs)
    if not 0 <= unseen <= 2:
        return False
    position, velocity = np.split(obs.astype(np.float64), [model.nq - unseen])
    sim.set_state(np.concatenate([np.zeros(unseen), position]), velocity)
    return np.allclose(sim._get_obs(), obs, atol=1e-4)


def futures(
    env: Any, own: Acting, action: np.ndarray, config: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What follows an action (A,), in the environment's units, and then the policy.

    Returns:
        For each of AHEAD the discounted rewards until then (H,), the observation (H, S)
        and its discount (H,), 0 after the episode's end.
    """
    sums, seen, left = [], [], []
    total, discount, terminal = 0.0, 1.0, False
    obs = np.zeros(0)
    for step in range(1, AHEAD[-1] + 1):
        if not terminal:
            obs, reward, terminal, *_ = env.unwrapped.step(action)
            total += discount * (config.reward_scale * reward + config.reward_shift)
            discount *= config.discount
            action = own(np.asarray(obs, np.float32)[None, None])[0, 0]
        if step in AHEAD:
            sums.append(total)
            seen.append(obs)
            left.append(0.0 if terminal else discount)
    return np.array(sums), np.array(seen), np.array(left)


def agreement(one: np.ndarray, other: np.ndarray) -> float:
    """Rank correlation of two values (B, K) of actions, each less its state's mean.

    Not a number where one of them tells no action from another.
    """
    centred = [(x - x.mean(axis=1, keepdims=True)).ravel() for x in (one, other)]
    if not all(np.ptp(x) > 0 for x in centred):
        return float("nan")
    return float(np.corrcoef(*map(rankdata, centred))[0, 1])


def on_order(
    lane: Lane, own: rollout.NumpyPolicy, raw: np.ndarray, norm: Any, dataset: Dataset
) -> dict[str, float]:
    """How Q_1 orders actions near the policy's, and how what follows them does.

    Args:
        raw: (B, S) states of the data.
    Returns:
        For each h of AHEAD, `order_h`: the agreement of Q_1(s, a) with the rewards of h
        steps and Q_1(s_h, pi(s_h)) after them; `ahead_h`: that of the latter with the
        same after the longest h, which is next to nothing but rewards. Empty where the
        simulator cannot be put into the data's states.
    """
    assert dataset.task is not None
    env, rng = make_env(dataset.task), np.random.default_rng(0)
    env.reset(seed=0)
    raw = raw[[put(env, obs) for obs in raw]]
    if len(raw) < 2:
        env.close()
        return {}
    chosen = np.asarray(lane.policy(norm(raw)))
    shape = (len(raw), RIVALS, chosen.shape[-1])
    rivals = np.clip(chosen[:, None] + SPREAD * rng.normal(size=shape), -1, 1)
    found = []
    for obs, actions in zip(raw, own.in_box(rivals), strict=True):
        for action in actions:
            put(env, obs)
            found.append(futures(env, own, action.astype(np.float32), lane.config))
    env.close()
    sums, seen, left = (np.array(x) for x in zip(*found, strict=True))  # (B K, H, ...)
    later = norm(seen.reshape(-1, seen.shape[-1]))
    value = np.asarray(lane.q(later, lane.policy(later))).reshape(left.shape)
    truth = (sums + left * value).reshape(*shape[:2], -1)
    asked = np.repeat(norm(raw), RIVALS, axis=0), rivals.reshape(-1, shape[-1])
    q = np.asarray(lane.q(*asked)).reshape(shape[:2])
    return {
        f"{name}_{steps}": agreement(value, truth[..., i])
        for name, value in (("order", q), ("ahead", truth[..., -1]))
        for i, steps in enumerate(AHEAD)
    }


# ============================================================================ Picture


def draw(path: Path, title: str, arrays: Mapping[str, np.ndarray], base: float) -> None:
    """Six panels: certainties, M against distance, box, Q against truth, states."""
    figure = Figure(figsize=(12, 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    bins = np.linspace(0, 1, 41)
    names = {
        "data": "data's actions",
        "policy": "policy's actions",
        "uniform": "uniform",
    }
    names["visited"] = "policy's, in roll-outs"
    for name, label in names.items():
        if name in arrays:
            share = np.full(len(arrays[name]), 1 / len(arrays[name]))
            axes[0, 0].hist(
                arrays[name], bins, weights=share, histtype="step", label=label
            )
    axes[0, 0].set(yscale="log", xlabel="certainty M", ylabel="share of pairs per bin")
    for name, label in (("random", "random directions"), ("q", "along Q's gradient")):
        axes[0, 1].plot(RADII, arrays[f"profile_{name}"], marker=".", label=label)
    gap = np.sqrt(np.square(arrays["chosen"] - arrays["action"]).sum(-1))
    axes[0, 1].axvline(np.median(gap), color="0.5", ls="--", label="policy, median")
    axes[0, 1].set(
        xlabel="distance from the data's action", ylabel="mean M", ylim=(0, 1.02)
    )
    box = np.linspace(-1, 1, 41)
    for name, label in (("action", "data"), ("chosen", "policy")):
        flat = arrays[name].ravel()
        weights = np.full(len(flat), 1 / len(flat))
        axes[0, 2].hist(flat, box, weights=weights, histtype="step", label=label)
    axes[0, 2].set(yscale="log", xlabel="action component", ylabel="share per bin")
    if "q" in arrays:
        axes[1, 0].plot(arrays["true"], arrays["q"], ".", ms=2, alpha=0.3)
        ends = [
            np.nanmin([arrays["true"], arrays["q"]]),
            np.nanmax([arrays["true"], arrays["q"]]),
        ]
        axes[1, 0].plot(ends, ends, color="0.5", ls="--", label="equal")
        axes[1, 0].set(xlabel="return that followed", ylabel="Q(s, pi(s))")
        axes[1, 1].plot(
            arrays["time"], arrays["away"], ".", ms=2, alpha=0.3, label="visited"
        )
        axes[1, 1].axhline(base, color="0.5", ls="--", label="data, median")
        axes[1, 1].set(
            xlabel="step of the episode", ylabel="distance to the nearest state"
        )
        axes[1, 2].plot(arrays["time"], arrays["visited"], ".", ms=2, alpha=0.3)
        axes[1, 2].set(
            xlabel="step of the episode", ylabel="M(s, pi(s))", ylim=(0, 1.02)
        )
    for ax in axes.flat:
        ax.grid(alpha=0.25)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


# =============================================================================== Main


def diagnose(folder: Path, options: Options) -> list[dict[str, Any]]:
    """The rows of one run, a policy each; writes them and the picture."""
    lanes, dataset, policy = load(folder)
    rng = np.random.default_rng(0)

    def norm(raw: np.ndarray) -> np.ndarray:
        return ((raw - policy.obs_mean) / policy.obs_std).astype(np.float32)

    kept = rng.permutation(dataset.num_transitions)[:KNOWN]
    seen, acted = norm(np.asarray(dataset.obs)[kept]), np.asarray(dataset.action)[kept]
    known = {"tree": KDTree(seen), "action": acted}
    obs, action = seen[: options.points], acted[: options.points]
    between, _ = known["tree"].query(obs, k=2)
    rows, first = [], {}
    for i, lane in enumerate(lanes):
        row, arrays = on_data(lane, obs, action, known, rng)
        own = policy.only(i)
        if options.episodes and dataset.task is not None:
            played = play(own, dataset, options.episodes)
            more, seen_there = on_rollouts(lane, played, norm, known)
            row, arrays = row | more, arrays | seen_there
            for length in options.along:
                moved = stepping(lane, own, length, obs, norm)
                played = play(moved, dataset, options.episodes)
                total = np.mean([episode["reward"].sum() for episode in played])
                row[f"return_along_{length:g}"] = float(total)
        row["state_distance_data"] = float(np.median(between[:, 1]))
        if options.order and dataset.task is not None:
            raw = np.asarray(dataset.obs)[kept[: options.order]]
            row |= on_order(lane, own, raw, norm, dataset)
        rows.append({"run": folder.name, "policy": lane.label} | row)
        first = first or arrays
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    checkpoint.write_bytes(folder / "diagnosis.csv", text.getvalue().encode())
    title = f"{lanes[0].module.__name__} on {dataset.name}, {lanes[0].label}"
    draw(folder / "diagnosis.png", title, first, rows[0]["state_distance_data"])
    return rows


def main() -> None:
    options = tyro.cli(Options, description=(__doc__ or "").split("\n\n")[0])
    for folder in options.runs:
        for row in diagnose(folder, options):
            print(f"{row['run']}, {row['policy']}")
            for name, value in list(row.items())[2:]:
                print(f"  {name:<20} {'-' if value is None else f'{value:.4g}'}")
        print(folder / "diagnosis.png")


if __name__ == "__main__":
    guarded(main)
