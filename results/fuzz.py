"""Generated datasets with a known answer, and broken ones that have to be refused.

`check_valid` compares what the loader returns with transitions taken one row at a time
in plain Python; `check_malformed` breaks a good dataset and wants one clear error.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import gymnasium as gym
import h5py
import numpy as np
from hypothesis import strategies as st
from minari.serialization import serialize_space

from common import datasets
from common.errors import UserError

Arrays = dict[str, Any]
Rng = np.random.Generator
NAME = "own/fuzz-v0"


@dataclass
class Case:
    """A dataset to write: flat arrays, or a Minari set's episodes."""

    kind: str  # "npz", "hdf5" or "minari"
    arrays: Arrays = field(default_factory=dict)
    episodes: list[Arrays] = field(default_factory=list)
    obs_space: Any = None
    action_space: Any = None


@dataclass
class Row:
    """One transition as the loader has to return it."""

    obs: np.ndarray
    action: np.ndarray
    reward: float
    next_obs: np.ndarray
    terminal: bool
    episode: int  # of the source; some have no transition


# =========================================================================== Generate


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Good datasets: lengths, types, spaces, ends of all kinds."""
    kind = draw(st.sampled_from(["minari", "npz", "hdf5"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lengths = draw(st.lists(st.integers(0, 7), min_size=1, max_size=6))
    lengths[draw(st.integers(0, len(lengths) - 1))] += 2  # one transition at least
    action_dim = draw(st.integers(1, 3))
    low = rng.uniform(-3, 0, action_dim).astype(np.float32)
    high = low + rng.uniform(0.5, 4, action_dim).astype(np.float32)
    if draw(st.booleans()):
        low, high = -np.ones_like(low), np.ones_like(high)
    real = st.sampled_from([np.float32, np.float64])
    number = st.sampled_from([np.float32, np.float64, np.int64, np.uint8])
    types = {"obs": draw(number), "action": draw(real), "reward": draw(number)}
    make = _minari if kind == "minari" else _flat
    return make(draw, rng, kind, lengths, low, high, types)


def _minari(draw, rng, kind, lengths, low, high, types) -> Case:
    widths = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    is_dict = draw(st.booleans())
    widths = widths if is_dict else widths[:1]
    boxes: dict[str, Any] = {
        f"part{i}": gym.spaces.Box(-np.inf, np.inf, (w,)) for i, w in enumerate(widths)
    }
    episodes = []
    for length in lengths:
        obs = {
            key: _values(rng, types["obs"], length + 1, *box.shape)
            for key, box in boxes.items()
        }
        ends = rng.random((2, length)) < draw(st.sampled_from([0.0, 0.1, 1.0]))
        episodes.append(
            {
                "observations": obs if is_dict else obs["part0"],
                "actions": _actions(rng, types["action"], length, low, high),
                "rewards": _values(rng, types["reward"], length),
                "terminations": ends[0],
                "truncations": ends[1],
            }
        )
    obs_space: Any = gym.spaces.Dict(boxes) if is_dict else boxes["part0"]
    action_space = gym.spaces.Box(low, high, dtype=np.float32)
    return Case(kind, {}, episodes, obs_space, action_space)


def _flat(draw, rng, kind, lengths, low, high, types) -> Case:
    total, width = sum(lengths), draw(st.integers(1, 4))
    last = np.zeros(total, bool)
    last[np.cumsum([n for n in lengths if n]) - 1] = True
    timeout = last & (rng.random(total) < draw(st.sampled_from([0.0, 0.5, 1.0])))
    terminal = last & (~timeout | (rng.random(total) < 0.2))
    obs = _values(rng, types["obs"], total, width)
    arrays: Arrays = {
        "observations": obs,
        "actions": _actions(rng, types["action"], total, low, high),
        "rewards": _values(rng, types["reward"], total),
        "terminals": terminal,
    }
    given = draw(st.sampled_from(["timeouts", "next", "both"]))
    if given != "timeouts":
        arrays["next_observations"] = np.concatenate([obs[1:], obs[:1]])
        arrays["next_observations"][last] = _values(
            rng, types["obs"], int(last.sum()), width
        )
    if given != "next":
        arrays["timeouts"] = timeout
    flag = draw(st.sampled_from([bool, np.uint8, np.float32]))
    for name in ("terminals", "timeouts"):
        if name in arrays:
            arrays[name] = arrays[name].astype(flag)
    if draw(st.booleans()):  # columns are welcome as well
        arrays["rewards"] = arrays["rewards"][:, None]
    if (low != -1).any() or draw(st.booleans()):
        arrays |= {"action_low": low, "action_high": high}
    return Case(kind, arrays)


def _values(rng: Rng, kind: Any, *shape: int) -> np.ndarray:
    """Of both signs where the type has them, with repeats where it is of integers."""
    values = rng.normal(size=shape) * 10
    return (np.abs(values) if kind is np.uint8 else values).astype(kind)


def _actions(rng: Rng, kind: Any, num: int, low: Any, high: Any) -> np.ndarray:
    """In the box, a fifth of them on its faces."""
    share = np.clip(rng.uniform(-0.1, 1.1, (num, len(low))), 0, 1)
    return np.clip(low + share * (high - low), low, high).astype(kind)


# ============================================================================== Write


def write(case: Case, root: Path) -> str:
    """Writes the dataset below `root`; returns what to give as --dataset."""
    if case.kind == "minari":
        write_minari(
            root / "minari", NAME, case.episodes, case.obs_space, case.action_space
        )
        return NAME
    path = root / f"own.{case.kind}"
    if case.kind == "npz":
        np.savez(path, **case.arrays)
    else:
        with h5py.File(path, "w") as file:
            _write_group(file, case.arrays)
    return str(path)


def write_minari(
    root: Path,
    dataset_id: str,
    episodes: list[Arrays],
    obs_space: gym.Space,
    action_space: gym.Space,
    **about: Any,
) -> Path:
    """Writes a Minari dataset of episodes, dicts of the arrays that HDF5 shall hold.

    Args:
        root: of Minari's datasets.
        about: further entries of metadata.json.
    """
    data = root / dataset_id / "data"
    data.mkdir(parents=True)
    metadata = {
        "total_episodes": len(episodes),
        "total_steps": sum(len(episode.get("rewards", ())) for episode in episodes),
        "data_format": "hdf5",
        "observation_space": serialize_space(obs_space),
        "action_space": serialize_space(action_space),
        "dataset_id": dataset_id,
        "minari_version": "0.5.4",
    }
    (data / "metadata.json").write_text(json.dumps(metadata | about), encoding="utf-8")
    with h5py.File(data / "main_data.hdf5", "w") as file:
        for number, episode in enumerate(episodes):
            group = file.create_group(f"episode_{number}")
            group.attrs["id"] = number
            _write_group(group, episode)
    return data.parent


def _write_group(group: h5py.Group, content: Arrays) -> None:
    for key, value in content.items():
        if isinstance(value, dict):
            _write_group(group.create_group(key), value)
        else:
            group.create_dataset(key, data=np.asarray(value))


# ============================================================================= Answer


def expected(case: Case) -> list[Row]:
    """The transitions, one row at a time."""
    if case.kind == "minari":
        return [
            row
            for number, episode in enumerate(case.episodes)
            for row in _rows_of_episode(case, number, episode)
        ]
    return _rows_of_arrays(case.arrays)


def _rows_of_episode(case: Case, number: int, episode: Arrays) -> list[Row]:
    obs = episode["observations"]
    if isinstance(obs, dict):
        obs = np.concatenate([obs[key] for key in sorted(obs)], axis=1)
    low, high = case.action_space.low, case.action_space.high
    return [
        Row(
            obs[t],
            _to_unit(episode["actions"][t], low, high),
            float(episode["rewards"][t]),
            obs[t + 1],
            bool(episode["terminations"][t]),
            number,
        )
        for t in range(len(episode["rewards"]))
    ]


def _rows_of_arrays(arrays: Arrays) -> list[Row]:
    rows, episode = [], 0
    obs, after = arrays["observations"], arrays.get("next_observations")
    total = len(obs)
    low, high = arrays.get("action_low", -1.0), arrays.get("action_high", 1.0)
    for t in range(total):
        terminal = bool(arrays["terminals"][t])
        timeout = bool(arrays["timeouts"][t]) if "timeouts" in arrays else False
        if after is not None:
            next_obs = after[t]
        elif terminal:
            next_obs = obs[t]  # of no consequence
        elif timeout or t + 1 == total:
            next_obs = None  # not recorded
        else:
            next_obs = obs[t + 1]
        if next_obs is not None:
            action = _to_unit(arrays["actions"][t], low, high)
            reward = float(np.ravel(arrays["rewards"])[t])
            rows.append(Row(obs[t], action, reward, next_obs, terminal, episode))
        jumps = "timeouts" not in arrays and t + 1 < total
        jumps = jumps and after is not None and (after[t] != obs[t + 1]).any()
        episode += bool(terminal or timeout or jumps)
    return rows


def _to_unit(action: Any, low: Any, high: Any) -> np.ndarray:
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    return np.clip(2 * (np.asarray(action, np.float64) - low) / (high - low) - 1, -1, 1)


# ============================================================================== Check


class Sandbox:
    """A folder of its own for a dataset, Minari's root and the cache, then deleted."""

    def __enter__(self) -> Path:
        with ExitStack() as stack:
            root = Path(tempfile.mkdtemp(prefix="fuzz-"))
            stack.callback(shutil.rmtree, root, ignore_errors=True)
            places = {"XDG_CACHE_HOME": "cache", "MINARI_DATASETS_PATH": "minari"}
            places = {name: str(root / folder) for name, folder in places.items()}
            stack.enter_context(mock.patch.dict(os.environ, places))
            self._stack = stack.pop_all()
        return root

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def check_valid(case: Case) -> None:
    """Loads the dataset twice, once from the cache, and compares every number."""
    rows = expected(case)
    numbers = {row.episode for row in rows}
    index = {number: i for i, number in enumerate(sorted(numbers))}
    with Sandbox() as root:
        source = write(case, root)
        for _ in range(2):
            data = datasets.load(source)
            assert data.num_transitions == len(rows) == data.episode_lengths.sum()
            assert len(data.episode_lengths) == len(numbers)
            assert data.terminal.tolist() == [row.terminal for row in rows]
            assert data.episode.tolist() == [index[row.episode] for row in rows]
            for name in ("obs", "action", "reward", "next_obs"):
                wanted = np.array([getattr(row, name) for row in rows], np.float32)
                np.testing.assert_allclose(getattr(data, name), wanted, 1e-5, 1e-5)


def check_malformed(case: Case, how: str, seed: int) -> str:
    """Breaks the dataset as `how` says; returns the error, one line of text."""
    rng = np.random.default_rng(seed)
    with Sandbox() as root:
        marker = root / "executed"
        in_file = IN_FILE.get(how)
        if in_file is None:
            IN_ARRAYS[how](case, rng, marker)
        source = write(case, root)
        if in_file is not None:
            in_file(_files(case, root), rng)
        try:
            datasets.load(source)
        except UserError as error:
            told = str(error)
        else:
            raise AssertionError(f"{how} was accepted in {case}")
        assert told, how
        assert "\n" not in told, f"{how}: {told}"
        assert not marker.exists(), f"{how}: the file ran code"
        kept = list((root / "cache").rglob("*.safetensors"))
        assert not kept, f"{how}: a broken dataset is in the cache"
    return told


def _files(case: Case, root: Path) -> list[Path]:
    if case.kind == "minari":
        return sorted((root / "minari").rglob("main_data.hdf5"))
    return [root / f"own.{case.kind}"]


# =========================================================================== Breakages


def _numbers(case: Case, name: str, rng: Rng) -> tuple[Arrays, str]:
    """Where an array of that name lies: the dict and the key; not an empty one."""
    if case.kind != "minari":
        return case.arrays, name
    whole = [e for e in case.episodes if len(e["rewards"])]
    place = whole[rng.integers(len(whole))]
    if isinstance(place[name], dict):
        place = place[name]
        name = sorted(place)[0]
    return place, name


def _end(case: Case) -> str:
    return "terminations" if case.kind == "minari" else "terminals"


def _poison(name: str, value: float) -> Callable[..., None]:
    def change(case: Case, rng: Rng, _: Path) -> None:
        place, key = _numbers(case, name, rng)
        array = np.array(place[key], np.float64)
        array.flat[rng.integers(array.size)] = value
        place[key] = array

    return change


def _replace(name: str, make: Callable[[np.ndarray], Any]) -> Callable[..., None]:
    def change(case: Case, rng: Rng, _: Path) -> None:
        place, key = _numbers(case, name if name != "end" else _end(case), rng)
        place[key] = make(np.asarray(place[key]))

    return change


def _lack(name: str) -> Callable[..., None]:
    def change(case: Case, rng: Rng, _: Path) -> None:
        place, key = _numbers(case, name if name != "end" else _end(case), rng)
        del place[key]

    return change


def _discrete(case: Case, rng: Rng, _: Path) -> None:
    if case.kind == "minari":
        case.action_space = gym.spaces.Discrete(3)
    case_actions = _replace("actions", lambda a: np.zeros(a.shape, np.int64))
    case_actions(case, rng, _)


def _images(case: Case, rng: Rng, _: Path) -> None:
    if case.kind == "minari":
        case.obs_space = gym.spaces.Box(0, 255, (2, 2, 3), np.uint8)
        for episode in case.episodes:
            length = len(episode["rewards"]) + 1
            episode["observations"] = np.zeros((length, 2, 2, 3), np.uint8)
    else:
        case.arrays["observations"] = np.zeros((len(case.arrays["rewards"]), 2, 2, 3))
        case.arrays.pop("next_observations", None)
        case.arrays["timeouts"] = np.zeros(len(case.arrays["rewards"]), bool)


def _bad_box(case: Case, rng: Rng, _: Path) -> None:
    if case.kind == "minari":
        shape = case.action_space.shape
        case.action_space = gym.spaces.Box(-np.inf, np.inf, shape)
    else:
        width = case.arrays["actions"].shape[1]
        case.arrays |= {"action_low": np.ones(width), "action_high": np.ones(width)}


def _nothing(case: Case, rng: Rng, _: Path) -> None:
    if case.kind == "minari":
        case.episodes = []
    else:
        case.arrays = {
            k: v if k.startswith("action_") else v[:0] for k, v in case.arrays.items()
        }


class _Bomb:
    """Pickled into an array: unpickling it leaves a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def _code(case: Case, rng: Rng, marker: Path) -> None:
    array = np.empty(3, object)
    array[:] = [_Bomb(marker)] * 3
    if case.kind == "npz":
        case.arrays["rewards"] = array
    else:  # HDF5 has no objects: the pickle itself, as bytes
        import pickle

        place, key = _numbers(case, "rewards", rng)
        place[key] = np.frombuffer(pickle.dumps(_Bomb(marker)), "S1")


def _half(array: np.ndarray) -> np.ndarray:
    return array[: len(array) - 1] if len(array) else array[None]


IN_ARRAYS: dict[str, Callable[[Case, Rng, Path], None]] = {
    "NaN observation": _poison("observations", np.nan),
    "infinite observation": _poison("observations", np.inf),
    "NaN action": _poison("actions", np.nan),
    "infinite reward": _poison("rewards", -np.inf),
    "NaN reward": _poison("rewards", np.nan),
    "reward beyond float32": _poison("rewards", 1e300),
    "action outside its range": _poison("actions", 1e3),
    "no observations": _lack("observations"),
    "no actions": _lack("actions"),
    "no rewards": _lack("rewards"),
    "no ends": _lack("end"),
    "observations too few": _replace("observations", _half),
    "actions too few": _replace("actions", _half),
    "rewards too few": _replace("rewards", _half),
    "ends too few": _replace("end", _half),
    "text for rewards": _replace("rewards", lambda a: np.full(a.shape, b"x")),
    "complex observations": _replace("observations", lambda a: a + 1j),
    "rewards in two columns": _replace(
        "rewards", lambda a: np.tile(a.reshape(-1, 1), (1, 2))
    ),
    "actions without width": _replace("actions", lambda a: a[:, :0]),
    "actions of rank 1": _replace("actions", lambda a: a.reshape(-1)),
    "observations of rank 1": _replace("observations", lambda a: a.reshape(-1)),
    "discrete actions": _discrete,
    "images": _images,
    "no finite action range": _bad_box,
    "no rows": _nothing,
    "a pickle": _code,
}


def _cut(files: list[Path], rng: Rng) -> None:
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * rng.uniform(0.05, 0.9))])


def _empty(files: list[Path], rng: Rng) -> None:
    for path in files:
        path.write_bytes(b"")


def _text(files: list[Path], rng: Rng) -> None:
    for path in files:
        path.write_text("<html>404 Not Found</html>\n" * 30, encoding="utf-8")


def _header(files: list[Path], rng: Rng) -> None:
    for path in files:
        content = bytearray(path.read_bytes())
        content[:8] = rng.bytes(8)
        content[-30:] = rng.bytes(30)  # a zip archive's directory is at its end
        path.write_bytes(content)


def _gone(files: list[Path], rng: Rng) -> None:
    for path in files:
        path.unlink()


def _metadata(files: list[Path], rng: Rng) -> None:
    for path in files:
        about = path.with_name("metadata.json")
        if not about.exists():  # a flat file has none
            _text(files, rng)
            return
        text = about.read_text(encoding="utf-8")
        kinds = ("", "[]", "null", text[: len(text) // 2], text.replace("Box", "Bux"))
        about.write_text(kinds[rng.integers(len(kinds))], encoding="utf-8")


IN_FILE: dict[str, Callable[[list[Path], Rng], None]] = {
    "cut short": _cut,
    "an empty file": _empty,
    "a web page": _text,
    "a damaged header": _header,
    "no file": _gone,
    "damaged metadata": _metadata,
}
MALFORMED = st.sampled_from(sorted({**IN_ARRAYS, **IN_FILE}))
