"""The run's pictures: learning curves, and the certainty around the policy."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from common.datasets import Dataset
from common.rollout import NumpyPolicy

# (obs (B, S) as the networks see them, action (B, A) in [-1, 1]) -> certainty (B,)
Density = Callable[[Any, Any], Any]

GRID = 61  # points per axis of a certainty map
NEIGHBOURS = 60  # data actions shown per state


def curves(
    path: Path, lanes: Mapping[str, Sequence[dict[str, Any]]], title: str
) -> None:
    """Every logged quantity against the critic updates, a line per lane.

    Args:
        lanes: by label, the rows of its evaluations in their order.
    """
    skip = ("seed", "step")
    rows = [row for own in lanes.values() for row in own]
    names = [k for k in rows[0] if k not in skip and _numeric(rows, k)] or ["return"]
    columns = 4
    height = -(-len(names) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.3 * height + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(height, columns, squeeze=False).flat)
    for name, ax in zip(names, axes, strict=False):
        for label, own in lanes.items():
            steps = [int(r["step"]) for r in own]
            ax.plot(steps, [_float(r[name]) for r in own], marker=".", label=label)
        ax.set_title(name, fontsize=10)
        ax.tick_params(labelsize=8)
        ax.ticklabel_format(axis="x", style="sci", scilimits=(0, 4))
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    if len(lanes) > 1:
        figure.axes[0].legend(fontsize=6)
    figure.suptitle(f"{title}, against critic updates", fontsize=11)
    figure.savefig(path, dpi=110)


def _float(cell: Any) -> float:
    return float("nan") if cell in ("", None) else float(cell)


def _numeric(rows: list[dict[str, Any]], name: str) -> bool:
    return bool(np.isfinite([_float(row[name]) for row in rows]).any())


def certainty(
    path: Path, density: Density, dataset: Dataset, policy: NumpyPolicy, title: str
) -> None:
    """Maps of M over the first two action dimensions, at six states of the data.

    The other action dimensions are held at the policy's choice (the first seed's). Dots
    are the data's actions at the nearest states, whose other dimensions vary.
    """
    index = np.linspace(0, dataset.num_transitions - 1, 8).astype(int)[1:-1]
    seen = (dataset.obs - policy.obs_mean) / policy.obs_std
    span = np.linspace(-1.0, 1.0, GRID, dtype=np.float32)
    figure = Figure(figsize=(11, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3, sharex=True, sharey=True)
    level: Any = None
    for ax, i in zip(axes.flat, index, strict=True):
        chosen = _in_box(policy, dataset.obs[i])
        grid = np.tile(chosen, (GRID * GRID, 1))
        grid[:, 0] = np.tile(span, GRID)
        if dataset.action_dim > 1:
            grid[:, 1] = np.repeat(span, GRID)
        at = np.tile(seen[i], (GRID * GRID, 1))
        values = np.nan_to_num(np.asarray(density(at, grid)).reshape(GRID, GRID))
        level = ax.contourf(span, span, values, np.linspace(0, 1, 21), cmap="viridis")
        near = np.argsort(np.square(seen - seen[i]).sum(axis=1))[:NEIGHBOURS]
        shown = dataset.action[near]
        second = shown[:, 1] if dataset.action_dim > 1 else np.zeros(len(near))
        ax.scatter(shown[:, 0], second, s=9, c="white", edgecolors="black", lw=0.4)
        height = chosen[1] if dataset.action_dim > 1 else 0.0
        ax.scatter(
            chosen[0], height, s=170, marker="*", c="red", edgecolors="white", zorder=3
        )
        ax.set_title(f"transition {i}", fontsize=9)
    figure.supxlabel("action 0")
    figure.supylabel("action 1" if dataset.action_dim > 1 else "")
    figure.colorbar(level, ax=axes, label="certainty M(s, a)", shrink=0.8)
    figure.suptitle(
        f"{title}: certainty, the data's actions nearby (dots), the policy's (star)",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)


def _in_box(policy: NumpyPolicy, obs: np.ndarray) -> np.ndarray:
    """The first seed's action (A,) in [-1, 1] at a raw observation (S,)."""
    action = policy(np.broadcast_to(obs, (len(policy.layers[0][0]), 1, len(obs))))[0, 0]
    width = policy.action_high - policy.action_low
    return (2 * (action - policy.action_low) / width - 1).astype(np.float32)
