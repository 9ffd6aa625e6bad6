"""Flat arrays of transitions: checked, brought to [-1, 1], cached on disk."""

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import platformdirs
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from common.errors import UserError

CACHE_VERSION = 2  # counts up when the same source gives different arrays
ACTION_TOLERANCE = 1e-3  # of the box's width: nearer actions are clipped


class Transitions(NamedTuple):
    """N transitions of E episodes, as they are trained on and stored in the cache."""

    obs: np.ndarray  # (N, S) float32
    action: np.ndarray  # (N, A) float32 in [-1, 1]
    reward: np.ndarray  # (N,) float32
    next_obs: np.ndarray  # (N, S) float32
    terminal: np.ndarray  # (N,) bool
    episode: np.ndarray  # (N,) int32, counts 0, 0, 1, 1, 1, 2, ...
    action_low: np.ndarray  # (A,) float32
    action_high: np.ndarray  # (A,) float32
    obs_keys: tuple[str, ...]  # entries of a dict observation, () for a Box
    warnings: tuple[str, ...] = ()  # what whoever loads them is to be told

    def columns(self) -> dict[str, np.ndarray]:
        """The arrays by name."""
        return {k: v for k, v in self._asdict().items() if isinstance(v, np.ndarray)}


def finish(
    source: str,
    rows: dict[str, np.ndarray],
    box: tuple[np.ndarray, np.ndarray],
    obs_keys: tuple[str, ...] = (),
    keep: np.ndarray | None = None,
    warnings: Sequence[str] = (),
) -> Transitions:
    """Checks flat arrays in their own units and turns them into transitions.

    Args:
        source: what the user calls the data, for messages.
        rows: observations, next_observations (N, S), actions (N, A), rewards,
            terminals (bool) and episodes (N,).
        box: lower and upper ends of the action range, (A,) each.
        obs_keys: entries of the dict observations that were joined.
        keep: mask (N,) of the transitions to keep, after all have been checked.
        warnings: what was found before.

    Raises:
        UserError: empty, not finite, or actions outside their range.
    """
    if len(rows["rewards"]) == 0 or (keep is not None and not keep.any()):
        raise UserError(f"{source} is empty: it holds no complete transition.")
    obs = _finite_float32(source, "observations", rows["observations"])
    coarse = _too_fine_for_float32(source, rows["observations"])
    next_obs = _finite_float32(source, "next_observations", rows["next_observations"])
    reward = _finite_float32(source, "rewards", rows["rewards"])
    _finite_float32(source, "actions", rows["actions"])
    low, high = _check_box(source, *box, rows["actions"].shape[1])
    action = _rescale(source, rows["actions"], low, high)
    pick = slice(None) if keep is None else keep
    episode = rows["episodes"][pick]
    episode = np.cumsum(np.diff(episode, prepend=episode[0]) != 0, dtype=np.int32)
    return Transitions(
        obs=np.ascontiguousarray(obs[pick]),
        action=np.ascontiguousarray(action[pick]),
        reward=np.ascontiguousarray(reward[pick]),
        next_obs=np.ascontiguousarray(next_obs[pick]),
        terminal=np.ascontiguousarray(rows["terminals"][pick]),
        episode=episode,
        action_low=low,
        action_high=high,
        obs_keys=obs_keys,
        warnings=(*warnings, *coarse),
    )


def until_success(reward: np.ndarray, episode: np.ndarray) -> np.ndarray:
    """Mask (N,) of the rows up to and including an episode's first reward > 0."""
    success = reward > 0
    before = np.cumsum(success) - success
    first_row = np.flatnonzero(np.diff(episode, prepend=-1))
    index = np.searchsorted(first_row, np.arange(len(episode)), side="right") - 1
    return before == before[first_row][index]


def fingerprint(data: Transitions) -> str:
    """SHA-256 in hex over names, types, shapes and bytes of the arrays."""
    digest = hashlib.sha256(json.dumps(data.obs_keys).encode())
    for name, array in data.columns().items():
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()


def cached(
    files: Sequence[Path], build: Callable[[], Transitions]
) -> tuple[Transitions, str]:
    """The transitions of some source files and their fingerprint, built at most once.

    The cache entry is keyed by the files' paths, sizes and times of change, which no
    copying program sets back. A damaged entry is rebuilt; where the cache cannot be
    written, one line on stderr says so and the program goes on without. The data's
    own warnings are printed at every load.
    """
    path = _entry(files)
    data, digest = _read(path) or _build(path, build)
    for warning in data.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return data, digest


def cache_dir() -> Path:
    """The user's cache directory of this project; it need not exist."""
    return platformdirs.user_cache_path("td3-bst")


def _build(path: Path, build: Callable[[], Transitions]) -> tuple[Transitions, str]:
    """Builds the transitions and writes a cache entry, if that can be written."""
    data = build()
    digest = fingerprint(data)
    try:
        _write(path, data, digest)
    except (OSError, SafetensorError) as error:
        print(f"warning: no cache in {path.parent}: {error}", file=sys.stderr)
    return data, digest


def _too_fine_for_float32(source: str, obs: np.ndarray) -> list[str]:
    """A warning for every column (N,) that vanishes in float32, as a large offset's."""
    told = []
    for i, column in enumerate(obs.T if obs.dtype.itemsize > 4 else ()):
        largest = np.abs(column).max()
        spread = (column - column[0]).std()
        if 0 < spread < 4 * np.spacing(np.float32(largest)):
            told.append(
                f"{source}: observations[:, {i}] vary by {spread:.2g} about "
                f"{column[0]:.10g}, finer than float32 is there: subtract an offset"
            )
    return told


def _finite_float32(source: str, name: str, array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        array = np.asarray(array, np.float32)
    bad = ~np.isfinite(array)
    if bad.any():
        first = np.argwhere(bad)[0].tolist()
        where = first[0] if len(first) == 1 else tuple(first)
        raise UserError(
            f"{source}: {name} has {int(bad.sum())} NaN or infinite values, "
            f"the first at index {where}."
        )
    return array


def _check_box(
    source: str, low: np.ndarray, high: np.ndarray, action_dim: int
) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.asarray(low, np.float32), np.asarray(high, np.float32)
    if low.shape != (action_dim,) or high.shape != (action_dim,):
        raise UserError(
            f"{source}: actions have {action_dim} dimensions, but their range has the "
            f"shapes {low.shape} and {high.shape}."
        )
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
        raise UserError(
            f"{source}: the action range {low} to {high} is not a finite box with "
            f"low < high in every dimension."
        )
    return low, high


def _rescale(
    source: str, action: np.ndarray, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """Actions from the box [low, high] to [-1, 1], float32."""
    width = high.astype(np.float64) - low
    excess = np.maximum(low - action, action - high) / width
    if excess.max() > ACTION_TOLERANCE:
        row, dim = np.unravel_index(excess.argmax(), excess.shape)
        raise UserError(
            f"{source}: actions leave their range in "
            f"{int((excess > ACTION_TOLERANCE).sum())} values, furthest "
            f"{float(action[row, dim]):g} at index ({row}, {dim}), where the range is "
            f"{low[dim]:g} to {high[dim]:g}."
        )
    if (low == -1).all() and (high == 1).all():
        scaled = action
    else:
        scaled = 2 * (action.astype(np.float64) - low) / width - 1
    return np.clip(scaled, -1, 1).astype(np.float32)


def _entry(files: Sequence[Path]) -> Path:
    """Cache file named by the source's place and, after a dash, by its state."""
    resolved = [file.resolve() for file in files]
    stats = [file.stat() for file in resolved]
    place = json.dumps([CACHE_VERSION, *map(str, resolved)])
    state = json.dumps([(stat.st_size, stat.st_ctime_ns) for stat in stats])
    names = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in (place, state)]
    return cache_dir() / "datasets" / f"{'-'.join(names)}.safetensors"


def _read(path: Path) -> tuple[Transitions, str] | None:
    """A cache entry, or None if it is missing or damaged."""
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata()
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        keys, told = (tuple(json.loads(about[k])) for k in ("obs_keys", "warnings"))
        data = Transitions(obs_keys=keys, warnings=told, **arrays)
        digest = about["fingerprint"]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    return (data, digest) if fingerprint(data) == digest else None


def _write(path: Path, data: Transitions, digest: str) -> None:
    about = {k: json.dumps(getattr(data, k)) for k in ("obs_keys", "warnings")}
    about["fingerprint"] = digest
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        save_file(data.columns(), temporary, about)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    _remove_outdated(path)


def _remove_outdated(path: Path) -> None:
    """Removes entries of earlier states of a source and leftovers of killed writers."""
    place = path.name.partition("-")[0]
    for other in path.parent.glob(f"{place}-*.safetensors"):
        if other != path:
            other.unlink(missing_ok=True)
    for leftover in path.parent.glob("*.tmp"):
        with_age = leftover.stat() if leftover.exists() else None
        if with_age is not None and time.time() - with_age.st_mtime > 86_400:
            leftover.unlink(missing_ok=True)
