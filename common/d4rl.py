"""Flat files of transitions: D4RL's HDF5, by name or path, and arrays of one's own."""

import os
import re
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO

import gymnasium as gym
import h5py
import numpy as np
from filelock import FileLock
from tqdm import tqdm

from common import tasks
from common.errors import UserError
from common.transitions import Transitions, cache_dir, finish, until_success

HOST = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
REQUIRED = ("observations", "actions", "rewards", "terminals")
OPTIONAL = ("timeouts", "next_observations", "action_low", "action_high")
SUFFIXES = (".hdf5", ".h5", ".npz")
UNREADABLE = (OSError, EOFError, ValueError, RuntimeError)  # what readers raise

# D4RL's environments in gymnasium; the locomotion agents' -v4 share D4RL's
# observations and rewards, Adroit is what Minari converted D4RL's own files to.
ENV_IDS = {
    "hopper": "Hopper-v4",
    "halfcheetah": "HalfCheetah-v4",
    "walker2d": "Walker2d-v4",
    "pen": "AdroitHandPen-v1",
    "door": "AdroitHandDoor-v1",
    "hammer": "AdroitHandHammer-v1",
    "relocate": "AdroitHandRelocate-v1",
}

WHY_NO_ENV = {
    "antmaze": "D4RL's antmaze differs from gymnasium-robotics' in physics and "
    "coordinates, so policies trained on its files are not evaluated.",
    "maze2d": "D4RL's maze2d differs from gymnasium-robotics' in physics and "
    "coordinates, so policies trained on its files are not evaluated.",
    "ant": "D4RL's ant observations hold contact forces that gymnasium computes "
    "differently, so policies trained on its files are not evaluated.",
    "kitchen": "D4RL's kitchen does not run with current MuJoCo, so policies trained "
    "on its files are not evaluated.",
}


def _locomotion_urls() -> Iterator[tuple[str, str]]:
    levels = ("random", "medium", "expert", "medium-replay", "medium-expert")
    for agent in ("halfcheetah", "hopper", "walker2d", "ant"):
        for level in levels:
            file = level.replace("medium-replay", "mixed").replace("-", "_")
            stem = "walker" if (agent, file) == ("walker2d", "mixed") else agent
            yield f"{agent}-{level}-v0", f"gym_mujoco/{stem}_{file}.hdf5"
        for level in (*levels, "full-replay"):
            for n in (1, 2):
                file = f"{agent}_{level.replace('-', '_')}-v{n}.hdf5"
                yield f"{agent}-{level}-v{n}", f"gym_mujoco_v{n}/{file}"


def _maze_urls() -> Iterator[tuple[str, str]]:
    mazes = {
        "umaze": "u-maze_noisy_multistart_False_multigoal_False",
        "umaze-diverse": "u-maze_noisy_multistart_True_multigoal_True",
        "medium-play": "big-maze_noisy_multistart_True_multigoal_False",
        "medium-diverse": "big-maze_noisy_multistart_True_multigoal_True",
        "large-play": "hardest-maze_noisy_multistart_True_multigoal_False",
        "large-diverse": "hardest-maze_noisy_multistart_True_multigoal_True",
    }
    for maze, file in mazes.items():
        yield f"antmaze-{maze}-v0", f"ant_maze_new/Ant_maze_{file}_sparse.hdf5"
        yield f"antmaze-{maze}-v2", f"ant_maze_v2/Ant_maze_{file}_sparse_fixed.hdf5"
    for kind, infix in (("sparse", ""), ("dense", "-dense")):
        yield f"maze2d-open{infix}-v0", f"maze2d/maze2d-open-{kind}.hdf5"
        for size in ("umaze", "medium", "large"):
            file = f"maze2d/maze2d-{size}-{kind}-v1.hdf5"
            yield f"maze2d-{size}{infix}-v1", file


def _manipulation_urls() -> Iterator[tuple[str, str]]:
    hands = {
        "human": "{}-v0_demos_clipped",
        "cloned": "{}-demos-v0-bc-combined",
        "expert": "{}-v0_expert_clipped",
    }
    for agent in ("pen", "door", "hammer", "relocate"):
        for level, file in hands.items():
            yield f"{agent}-{level}-v0", f"hand_dapg/{file.format(agent)}.hdf5"
            yield f"{agent}-{level}-v1", f"hand_dapg_v1/{agent}-{level}-v1.hdf5"
    kitchen = {
        "complete": "mini_kitchen_microwave_kettle_light_slider",
        "partial": "kitchen_microwave_kettle_light_slider",
        "mixed": "kitchen_microwave_kettle_bottomburner_light",
    }
    for level, file in kitchen.items():
        yield f"kitchen-{level}-v0", f"kitchen/{file}-v0.hdf5"


# The path below HOST of every D4RL name, after D4RL's own list.
URLS = {**dict(_locomotion_urls()), **dict(_maze_urls()), **dict(_manipulation_urls())}


def name_of(path: Path) -> str:
    """The D4RL name of a file, judged by its file name; "" if it has none."""
    if path.suffix.lower() == ".npz":
        return ""
    by_file = {Path(url).stem: name for name, url in URLS.items()}
    return path.stem if path.stem in URLS else by_file.get(path.stem, "")


def agent_of(name: str) -> str:
    """What a D4RL name has before its level: "hopper", "antmaze-umaze", "pen"."""
    match = re.match(r"(?:antmaze|maze2d)-[a-z]+|[a-z0-9]+", name)
    return match[0] if match else ""


def domain_of(name: str) -> str:
    """The domain of a D4RL name, as in `Dataset.domain`; "other" for ""."""
    agent = name.partition("-")[0]
    if agent in ("halfcheetah", "hopper", "walker2d", "ant"):
        return "locomotion"
    return {"antmaze": "antmaze", "maze2d": "pointmaze"}.get(agent, "other")


def choose_task(name: str, eval_map: str) -> tuple[tasks.Task | None, str]:
    """The task of a D4RL name, or None and one sentence that says why."""
    agent = name.partition("-")[0]
    if agent in ENV_IDS:
        try:
            spec = tasks.find_spec(ENV_IDS[agent])
        except gym.error.Error as error:
            return None, f"{ENV_IDS[agent]} is not installed: {error}"
        return tasks.choose_task(spec, None, eval_map, ())
    why = "An own file names no environment to evaluate in."
    return None, WHY_NO_ENV.get(agent, why)


def fetch(name: str) -> Path:
    """The cached file of a D4RL name, downloaded from HOST on first use."""
    path = cache_dir() / "d4rl" / f"{name}.hdf5"
    if not _opens(path):
        download(HOST + URLS[name], path)
    return path


def _opens(path: Path) -> bool:
    """Whether a whole HDF5 file is there; a truncated one does not open."""
    try:
        h5py.File(path, "r").close()
    except OSError:
        return False
    return True


def download(url: str, path: Path) -> None:
    """Downloads an HDF5 file; `path` appears only when it is complete.

    What arrived before a connection broke is in `<path>.part`, and the next call asks
    for the rest. A second process waits for the first.

    Raises:
        UserError: no connection, a wrong size, not HDF5, or nowhere to write.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(part.with_suffix(".lock"))
        lock.acquire()
    except OSError as error:
        raise UserError(f"Cannot write downloads to {path.parent}: {error}") from None
    try:
        if _opens(path):
            return  # another process was faster
        _receive(url, part)
        if not _opens(part):
            part.unlink()
            raise UserError(f"What {url} sent is not an HDF5 file.")
        os.replace(part, path)
    except (OSError, HTTPException) as error:  # URLError is an OSError
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"Cannot download {url} ({reason}); check the network, or download the "
            f"file elsewhere and give its path as --dataset."
        ) from None
    finally:
        lock.release()


def _receive(url: str, part: Path) -> None:
    """Fills `part` with the whole of `url`; what is there already is not sent again."""
    begun = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url)
    if begun:
        request.add_header("Range", f"bytes={begun}-")
    try:
        response = urllib.request.urlopen(request, timeout=15)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # the part is no beginning of what is there now
            raise
        part.unlink()
        begun, response = 0, urllib.request.urlopen(url, timeout=15)
    with response:
        if response.status != 206:  # all of it, from the start
            begun = 0
        with part.open("ab" if begun else "wb") as file:
            _copy(response, file, begun, part.name)


def _copy(response: HTTPResponse, file: IO[bytes], begun: int, label: str) -> None:
    announced = response.headers.get("Content-Length")
    size = begun + int(announced) if announced else None
    received = begun
    with tqdm(
        total=size, initial=begun, desc=label, unit="B", unit_scale=True, delay=1.0
    ) as bar:
        while block := response.read(1 << 20):
            received += file.write(block)
            bar.update(len(block))
    if size is not None and received != size:
        raise OSError(f"{received} of {size} bytes arrived")


def read(path: Path, source: str, name: str) -> Transitions:
    """Reads a flat file.

    Args:
        path: `.hdf5`, `.h5` or `.npz` with the arrays REQUIRED and some of OPTIONAL.
        source: what the user calls it, for messages.
        name: its D4RL name, or "" for arrays of one's own.

    Returns:
        All rows if there are next observations; otherwise those that D4RL's
        `qlearning_dataset` keeps, no row at a time-out and not the last one, and of
        arrays of one's own the terminal rows as well. D4RL's own files with time-outs
        are always read its way.

    Raises:
        UserError: the file is not what it should be.
    """
    arrays = (
        _read_npz(path, source)
        if path.suffix.lower() == ".npz"
        else _read_hdf5(path, source)
    )
    _check_shapes(source, arrays)
    action_dim = arrays["actions"].shape[1]
    box = _box(source, arrays, action_dim)
    maze = domain_of(name) in ("pointmaze", "antmaze") and "dense" not in name
    if name and "timeouts" in arrays:
        arrays.pop("next_observations", None)
    if name and not ({"timeouts", "next_observations"} & arrays.keys()):
        arrays["timeouts"] = _timeouts_by_length(arrays["terminals"], name)
    rows, keep = _rows(source, arrays)
    if not name and "next_observations" not in arrays:  # terminal rows need none
        ended = rows["terminals"]
        keep |= ended
        rows["next_observations"][ended] = rows["observations"][ended]
    warnings = []
    if 0 < keep.sum() < len(keep) / 2:
        warnings.append(
            f"{source}: {keep.sum():,} of {len(keep):,} rows are used; the others have "
            "timeouts true, which is said of an episode's last row alone"
        )
    if maze:
        keep &= until_success(rows["rewards"], rows["episodes"])
        rows["terminals"] = rows["terminals"] | (rows["rewards"] > 0)
    return finish(source, rows, box, (), keep, warnings)


def _rows(
    source: str, arrays: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Flat rows with episodes and next observations, and the mask of usable ones."""
    obs, terminal = arrays["observations"], arrays["terminals"]
    next_obs = arrays.get("next_observations")
    timeout = arrays.get("timeouts")
    keep = np.ones(len(obs), bool)
    if next_obs is None:
        if timeout is None:
            raise UserError(
                f"{source} has neither timeouts nor next_observations: add timeouts, "
                f"true at the last row of every episode that was cut (all false if "
                f"none was), so that no transition runs from one episode into the next."
            )
        next_obs = np.concatenate([obs[1:], obs[-1:]])
        keep = ~timeout
        keep[-1:] = False
        ends = terminal | timeout
    elif timeout is None:
        ends = terminal.copy()
        ends[:-1] |= (next_obs[:-1] != obs[1:]).any(axis=1)
    else:
        ends = terminal | timeout
    rows = {
        "observations": obs,
        "next_observations": next_obs,
        "actions": arrays["actions"],
        "rewards": arrays["rewards"],
        "terminals": terminal,
        "episodes": np.cumsum(ends) - ends,
    }
    return rows, keep


def _timeouts_by_length(terminal: np.ndarray, name: str) -> np.ndarray:
    """Time-outs (N,) of an old D4RL file, by the episode length as D4RL infers them."""
    horizon = tasks.HORIZONS.get(agent_of(name), 1000)
    timeout = np.zeros(len(terminal), bool)
    step = 0
    for i, ended in enumerate(terminal.tolist()):
        if step == horizon - 1:
            timeout[i] = True
            step = 0
            continue
        step = 1 if ended else step + 1  # D4RL counts 1 after a terminal, 0 after a cut
    return timeout


def _read_npz(path: Path, source: str) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as raw:
            if not zipfile.is_zipfile(raw):  # NumPy would advise to load it unsafely
                raise ValueError("no zip, or cut short.")
            raw.seek(0)
            with np.load(raw, allow_pickle=False) as file:
                _check_keys(source, list(file))
                arrays = {k: file[k] for k in (*REQUIRED, *OPTIONAL) if k in file}
    except (*UNREADABLE, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{source} cannot be read as .npz: {error}") from None
    for key, array in arrays.items():
        if not isinstance(array, np.ndarray):  # a member that is no .npy
            raise UserError(f"{source}: {key} is not an array.")
    return arrays


def _read_hdf5(path: Path, source: str) -> dict[str, np.ndarray]:
    arrays = {}
    try:
        with h5py.File(path, "r") as file:
            _check_keys(source, list(file))
            for key in (*REQUIRED, *OPTIONAL):
                item = file.get(key)
                if item is not None and not isinstance(item, h5py.Dataset):
                    raise UserError(f"{source}: {key} is a group, not an array.")
                if item is not None:
                    arrays[key] = np.asarray(item[()])
    except (*UNREADABLE, KeyError) as error:
        raise UserError(f"{source} cannot be read as HDF5: {error}") from None
    _check_keys(source, list(arrays))  # a dangling link is a key without an array
    return arrays


def _check_keys(source: str, keys: list[str]) -> None:
    missing = [key for key in REQUIRED if key not in keys]
    if missing:
        raise UserError(
            f"{source} lacks {', '.join(missing)}; "
            f"it has {', '.join(keys) or 'nothing'}."
        )


def _check_shapes(source: str, arrays: dict[str, np.ndarray]) -> None:
    """Checks types and shapes, and brings vectors to (N,) and flags to bool."""
    for key, array in arrays.items():
        if array.dtype.kind not in "fiub":
            raise UserError(
                f"{source}: {key} has the type {array.dtype}, not plain numbers."
            )
    for key in ("rewards", "terminals", "timeouts"):
        if key in arrays:
            arrays[key] = _vector(source, key, arrays[key])
    _check_actions(source, arrays["actions"])
    for key in ("observations", "next_observations"):
        if key in arrays:
            _check_observations(source, key, arrays[key])
    lengths = {k: len(arrays[k]) for k in arrays if not k.startswith("action_")}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{key} {n}" for key, n in lengths.items())
        raise UserError(f"{source}: the arrays differ in length: {found}.")
    after = arrays.get("next_observations", arrays["observations"])
    if after.shape != arrays["observations"].shape:
        raise UserError(
            f"{source}: next_observations have the shape {after.shape}, "
            f"observations {arrays['observations'].shape}."
        )
    for key in ("terminals", "timeouts"):
        if key in arrays:
            arrays[key] = _flags(source, key, arrays[key])


def _vector(source: str, key: str, array: np.ndarray) -> np.ndarray:
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise UserError(f"{source}: {key} has the shape {array.shape}, expected (N,).")
    return array


def _flags(source: str, key: str, array: np.ndarray) -> np.ndarray:
    if not np.isin(array, (0, 1)).all():
        raise UserError(f"{source}: {key} has values other than true and false.")
    return array.astype(bool)


def _check_actions(source: str, action: np.ndarray) -> None:
    if action.dtype.kind != "f":
        raise UserError(
            f"{source}: actions have the type {action.dtype}, that is discrete; "
            f"only continuous (floating point) actions are supported."
        )
    if action.ndim != 2 or action.shape[1] == 0:
        raise UserError(
            f"{source}: actions have the shape {action.shape}, expected (N, A)."
        )


def _check_observations(source: str, key: str, obs: np.ndarray) -> None:
    if obs.ndim > 2:
        raise UserError(
            f"{source}: {key} have the shape {obs.shape}; images are not supported, "
            f"only vectors (N, S)."
        )
    if obs.ndim != 2 or obs.shape[1] == 0:
        raise UserError(f"{source}: {key} have the shape {obs.shape}, expected (N, S).")


def _box(
    source: str, arrays: dict[str, np.ndarray], action_dim: int
) -> tuple[np.ndarray, np.ndarray]:
    """The action range that the file gives, a number or (A,) each, else [-1, 1]."""
    given = [key for key in ("action_low", "action_high") if key in arrays]
    if len(given) == 1:
        raise UserError(f"{source} has {given[0]} alone; give both ends or none.")
    ends = (arrays.pop("action_low", -1.0), arrays.pop("action_high", 1.0))
    low, high = (np.asarray(end, np.float32) for end in ends)
    if low.ndim == 0 and high.ndim == 0:
        return np.full(action_dim, low), np.full(action_dim, high)
    return low, high
