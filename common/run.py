"""One run from compiled chunks to its folder: log, checkpoints, evaluation, result.

Nothing here changes a number: it calls what the algorithm's file hands it and writes
down what came.
"""

import contextlib
import csv
import dataclasses
import errno
import importlib.metadata
import io
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

import morse
from common import checkpoint, divergence, report, rollout, seeds
from common.datasets import Dataset
from common.errors import UserError
from common.options import RunOptions, to_json
from common.signals import SIGNALS, Stopped, leave

CHUNK = 1000  # updates per compiled scan, at most
MORSE = "Morse network"  # the stage that fits it
MAX_WORKERS = 16  # processes that play evaluation episodes; each imports JAX


def guarded(main: Callable[[], None]) -> None:
    """Runs a script's `main`; what a user can cause becomes one line and an exit code.

    2 after a UserError, 128 + its number after a signal.
    """
    SIGNALS.install()
    try:
        main()
    except UserError as error:
        leave(2, f"error: {error}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EPIPE):
            raise
        what = error.filename or "what is printed"
        leave(2, f"error: cannot write {what}: {error.strerror}")
    except Stopped as stop:
        leave(128 + SIGNALS.asked, str(stop))


# ============================================================================ Folder


def new_folder(run_dir: Path, name: str) -> Path:
    """Makes the run's own folder, `name` and the time in `run_dir`."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    for attempt in range(1000):
        folder = run_dir / f"{name}-{stamp}{f'-{attempt}' if attempt else ''}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"cannot make the folder {folder}: {error}") from error
    raise UserError(f"cannot find a free name for {name} in {run_dir}")


def versions() -> dict[str, str]:
    """Python and the packages that a number could depend on."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "gymnasium", "mujoco")
    found = {"python": platform.python_version()}
    for name in (*packages, "gymnasium-robotics", "minari"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def commit() -> str | None:
    """The commit of the script's own repository, `+` behind it if files differ."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def device_line() -> str:
    """Names the device; warns when a GPU is there but JAX has none."""
    devices = jax.devices()
    line = f"device: {len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
    if devices[0].platform == "cpu" and Path("/dev/nvidia0").exists():
        line += "\nwarning: a GPU is present but unused; uv sync --extra cuda"
    return line


# ============================================================================= Morse


def save_morse(
    folder: Path,
    seed: int,
    params: Any,
    scale: float,
    config: Any,
    fingerprint: str,
    standardised: bool,
    loss: float | None = None,
) -> None:
    """Writes one fitted Morse network, and its last loss, to `folder`/morse."""
    meta = dict(scale=float(scale), config=to_json(config), fingerprint=fingerprint)
    meta |= dict(standardised=standardised, loss=loss)
    path = folder / "morse" / f"scale{float(scale):.9g}-seed{seed}.safetensors"
    checkpoint.save_tree(path, params, meta)


def load_morse(
    folders: Sequence[Path],
    seed: int,
    template: Any,
    scale: float,
    config: Any,
    fingerprint: str,
    standardised: bool,
) -> Any:
    """Reads what `save_morse` wrote, of the first folder that has it.

    Returns:
        The parameters and the loss.

    Raises:
        UserError: there is no such network, or its data or settings are others.
    """
    name = f"morse/scale{float(scale):.9g}-seed{seed}.safetensors"
    path = next((f / name for f in folders if (f / name).is_file()), None)
    if path is None:
        folder = folders[-1]
        there = sorted(p.stem for p in (folder / "morse").glob("*.safetensors"))
        raise UserError(
            f"no Morse network of scale {scale:g} and seed {seed} in {folder}; "
            f"there: {', '.join(there) or 'none'}"
        )
    params, meta = checkpoint.load_tree(path, template)
    wanted = dict(
        scale=float(scale),
        kernel=config.kernel,
        kappa=config.kappa,
        negatives=config.negatives,
        noise=list(config.noise),
        fingerprint=fingerprint,
        standardised=standardised,
    )
    found = {"negatives": "uniform", "noise": wanted["noise"]}  # of older networks
    found |= {**meta.get("config", {}), **meta}
    for name, value in wanted.items():
        if found.get(name) != value:
            raise UserError(
                f"{path} was fitted with {name} {found.get(name)}, this run has {value}"
            )
    loss = meta.get("loss")
    return params, float("nan") if loss is None else loss


# =============================================================================== Run


class Run:
    """A run under way: its folder, log, evaluations and checkpoints.

    `keys(stage)`, `map(...)` and `chunks(...)` drive the compiled scans; `record`,
    `checkpoint` and `finish` write. Steps count critic updates.
    """

    def __init__(
        self,
        algorithm: str,
        options: RunOptions,
        config: Any,
        dataset: Dataset,
        obs_mean: np.ndarray,
        obs_std: np.ndarray,
    ) -> None:
        """Makes the folder, or opens the one to resume, and prints what will be run.

        Args:
            options: resolved; `lanes` are the runs.
            obs_mean, obs_std: (S,); the networks see (obs - obs_mean) / obs_std.

        Raises:
            UserError: the folder cannot be made, or belongs to another dataset; a run
                was to be made longer whose actor would stand still.
        """
        self.algorithm, self.dataset, self.config = algorithm, dataset, config
        unit = getattr(config, "policy_delay", 1)
        self.options = options
        self.num_updates = self.options.num_updates or 0
        decay = getattr(config, "actor_decay_updates", 0)
        self.rests = decay if 0 < decay < self.num_updates else 0  # from there on
        self.eval_every = self.options.eval_every or 1
        self.plan = (self.num_updates, self.eval_every, unit)  # for `chunks`
        self.obs_mean, self.obs_std = obs_mean, obs_std
        self.tracker = report.Tracker(self.options.track)
        self.runs = options.lanes  # one per lane, less what pads the devices
        self.seeds = [run["seed"] for run in self.runs]
        self.labels = [
            "-".join(f"{name}{value:.9g}" for name, value in run.items())
            for run in self.runs
        ]
        self.mesh = seeds.mesh(len(self.seeds))
        self.lanes = seeds.lanes(self.seeds, self.mesh)
        self.wall: dict[str, float] = {}
        self._inside = 0.0  # seconds of timed blocks inside the present one
        self.trained = 0  # updates, by this and earlier processes of the run
        self.constants: dict[str, list[float]] = {}  # columns that stay, per seed
        self.rows: list[dict[str, Any]] = []
        self._sums: dict[str, np.ndarray] = {}
        self._count = 0
        self._pending: tuple[int, Future[Any] | None, list[Any]] | None = None
        self.diverged: dict[str, dict[str, Any]] = {}  # by label: from where, what
        self.failed_episodes = 0
        self._good: tuple[Any, Any] = (None, None)  # the last checkpoint's
        self._largest_q = divergence.largest_q(config, dataset.reward)
        self._pool = ThreadPoolExecutor(1, "evaluation")
        self._evaluator: rollout.Evaluator | None = None
        self.folder = self._open(options.resume)
        self.tracker.open(self.folder, algorithm, report.flat(config))
        print(device_line())
        print(f"dataset: {report.describe(dataset)}")
        for part in (config, self.options):
            print(
                "options: " + " ".join(f"{k}={v}" for k, v in report.flat(part).items())
            )
        if self.rests:
            print(f"the actor stands still after {self.rests} updates")
        if dataset.task is None:
            print(f"evaluation is off: {dataset.why_no_task}")
        if self.options.eval_episodes:
            self._evaluator = self._make_evaluator()
        print(f"run: {self.folder}", flush=True)

    def _open(self, resume: Path | None) -> Path:
        about = dict(
            fingerprint=self.dataset.fingerprint,
            num_transitions=self.dataset.num_transitions,
            obs_dim=self.dataset.obs_dim,
            action_dim=self.dataset.action_dim,
            domain=self.dataset.domain,
        )
        stored, done = {}, 0
        if resume is not None:
            stored = checkpoint.read_json(resume / "config.json")
            if stored["dataset"]["fingerprint"] != about["fingerprint"]:
                raise UserError(
                    f"{self.dataset.name} is not the data that {resume} was trained on "
                    "(its fingerprint differs)"
                )
            length = stored["options"]["num_updates"]
            if length <= self.rests and length < self.num_updates:
                raise UserError(
                    f"the actor's learning rate is 0 from update {self.rests} on, "
                    f"--num-updates is {self.num_updates}: begin a new run with a "
                    "longer --actor-decay-updates (0: none)"
                )
            folder = resume
            done = max(map(_step_of, self._checkpoints(folder)), default=0)
            if done > self.num_updates:
                raise UserError(
                    f"{folder} has trained {done} updates, --num-updates "
                    f"{self.num_updates} is fewer than its {done}"
                )
        else:
            source = self.dataset.name.split("+")[0]
            source = Path(source).stem if Path(source).is_file() else source
            slug = "".join(c if c.isalnum() or c in "._" else "-" for c in source)
            name = f"{self.algorithm}-{slug.strip('-.')}-seed{self.seeds[0]}"
            folder = new_folder(self.options.run_dir, name)
        self._lock = FileLock(folder / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(f"another process is at work in {folder}") from error
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error}") from error
        own = to_json(dataclasses.replace(self.options, resume=None))
        # Now: the files may be others by the end of a long run.
        now = self.code = dict(versions=versions(), commit=commit())
        content = dict(algorithm=self.algorithm, options=own)
        content |= dict(config=to_json(self.config), dataset=about, **now)
        if resume is not None:  # what the run began with stays
            for torn in folder.rglob(".*.tmp"):
                torn.unlink()
            content = {**stored, "options": own}
            content["resumed"] = [*stored.get("resumed", []), {"step": done, **now}]
        checkpoint.write_json(folder / "config.json", content)
        return folder

    # ------------------------------------------------------------------ compiled work

    def keys(self, stage: int) -> jax.Array:
        """The stage's key of every lane, (L,)."""
        return seeds.stage_keys(self.lanes, stage)

    def map(self, function: Callable[..., Any], *per_seed: bool) -> Callable[..., Any]:
        """`common.seeds.map_seeds` over this run's devices."""
        return seeds.map_seeds(function, per_seed, self.mesh)

    def chunks(
        self, label: str, start: int, total: int, every: int, unit: int
    ) -> Iterator[tuple[int, int]]:
        """Yields (start, length) up to `total`, with a progress bar.

        A chunk has at most 1000 updates, ends at multiples of `every`, and is a
        multiple of `unit` if the counts are.
        """
        longest = max(CHUNK - CHUNK % unit, unit)
        bar = tqdm(
            total=total, initial=start, desc=label, unit=" updates", disable=None
        )
        with bar, self._patient():
            while start < total:
                length = min(longest, total - start, every - start % every)
                self._chunk = (start, start + length)
                yield start, length
                bar.update(length)
                start += length

    @staticmethod
    @contextlib.contextmanager
    def _patient() -> Iterator[None]:
        SIGNALS.patient = True
        try:
            yield
        finally:
            SIGNALS.patient = False

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the block's wall time to `stage`, less blocks timed inside it."""
        begin, outer, self._inside = time.perf_counter(), self._inside, 0.0
        try:
            yield
        finally:
            spent = time.perf_counter() - begin
            own = spent - self._inside
            self.wall[stage] = self.wall.get(stage, 0.0) + own
            self._inside = outer + spent

    def chunked(
        self, function: Callable[..., Any], *per_seed: bool
    ) -> Callable[..., Any]:
        """Maps `function(..., num_updates=length)` over the seeds; compiles per length.

        The first argument is donated. Returns a callable of (length, *arguments).
        """
        programs: dict[int, Any] = {}

        def call(length: int, *args: Any) -> Any:
            if length not in programs:
                with self.timed("compile"):
                    jitted = seeds.map_seeds(
                        partial(function, num_updates=length),
                        per_seed,
                        self.mesh,
                        donate=True,
                    )
                    programs[length] = jitted.lower(*args).compile()
            return programs[length](*args)

        return call

    def traced(self, name: str, value: float | None) -> jax.Array:
        """An option's value in every lane, (L,): the swept one, else `value`."""
        values = [run.get(name, value) for run in self.runs]
        return self.spread(np.array(values, np.float32))

    def place(self, tree: Any) -> Any:
        """Copies arrays that all seeds share, the dataset say, to every device."""
        return seeds.replicate(tree, self.mesh)

    # ------------------------------------------------------------ metrics and results

    def record(self, metrics: Mapping[str, jax.Array], length: int) -> None:
        """Adds a chunk's metrics, (L,) each; waits until the chunk is done.

        A row shows the mean since the row before, `*_max` the largest.
        """
        values = {k: np.asarray(v, np.float64) for k, v in metrics.items()}
        for name, value in values.items():
            if name.endswith("_max"):
                self._sums[name] = np.maximum(self._sums.get(name, value), value)
            else:
                self._sums[name] = self._sums.get(name, 0.0) + value * length
        self._count += length
        self.trained += length
        self._notice_divergence(values)

    def _notice_divergence(self, values: Mapping[str, np.ndarray]) -> None:
        """Stops the seeds of which something is not finite, or Q beyond all returns.

        Raises:
            UserError: none is left.
        """
        for i, label in enumerate(self.labels):
            own = {k: float(v[i]) for k, v in values.items()}
            found = divergence.find(own, self._largest_q)
            if found is None or label in self.diverged:
                continue
            name, remedy = found
            first, last = self._chunk
            self.diverged[label] = dict(step=last, quantity=name, value=own[name])
            told = f"{label} diverged in updates {first + 1} to {last}: {name} is "
            told += f"{own[name]:.3g}; it stops here. What may help: {remedy}"
            tqdm.write(f"warning: {told}", file=sys.stderr)
        if len(self.diverged) == len(self.labels):
            self.flush()
            self.tracker.close()
            raise UserError(
                f"every seed diverged; the last checkpoint of {self.folder} is from "
                "before"
            )

    def due(self, step: int) -> bool:
        """Whether to write a checkpoint at `step`: its turn, or a signal came."""
        return self._scheduled(step) or bool(SIGNALS.asked)

    def _scheduled(self, step: int) -> bool:
        return step % self.eval_every == 0 or step == self.num_updates

    def checkpoint(self, step: int, state: Any, actor: Any) -> None:
        """Writes a checkpoint and starts the evaluation of `actor` beside the training.

        Args:
            state: pytree with a leading lane axis, all that training needs to go on.
            actor: the lanes' deterministic tanh policies, flax parameters.
        """
        self.flush()
        scheduled, path = self._scheduled(step), self._checkpoint_path(step)
        meta: dict[str, Any] = dict(step=step, seeds=self.seeds)
        meta |= dict(constants=self.constants, diverged=self.diverged)
        meta |= dict(failed_episodes=self.failed_episodes)
        if scheduled:
            meta["rows"] = self._new_rows()
        sums = {k: self._own(v).tolist() for k, v in self._sums.items()}
        meta |= dict(sums=sums, count=self._count)
        self._good = self._kept((self._own(state), self._own(actor)), self._good)
        with self.timed("writing"):
            self._write_wall()  # first, so that there is one beside any checkpoint
            norm = dict(obs_mean=self.obs_mean, obs_std=self.obs_std)
            checkpoint.save_tree(path, {"state": self._good[0], **norm}, meta)
            self._prune()
        self._stop_if_asked(step)
        if scheduled:
            self._evaluate(step, meta["rows"])

    def _checkpoint_path(self, step: int) -> Path:
        return self.folder / "checkpoint" / f"step-{step:09d}.safetensors"

    def _new_rows(self) -> list[dict[str, float] | None]:
        """The metrics since the last rows, per seed; None of one that diverged."""
        means = self._means() | self.constants
        self._sums, self._count = {}, 0
        return [
            None
            if label in self.diverged
            else {k: float(v[i]) for k, v in means.items()}
            for i, label in enumerate(self.labels)
        ]

    def _kept(self, trees: Any, before: Any) -> Any:
        """The seeds' trees, of those that diverged the ones from before."""
        bad = [i for i, label in enumerate(self.labels) if label in self.diverged]

        def mixed(new: np.ndarray, old: np.ndarray) -> np.ndarray:
            new = new.copy()
            new[bad] = old[bad]
            return new

        return jax.tree.map(mixed, trees, before) if bad else trees

    def _write_wall(self) -> None:
        spent = dict(wall=self.wall, trained=self.trained)
        checkpoint.write_json(self.folder / "wall.json", spent)

    def _prune(self) -> None:
        """Keeps the two newest checkpoints; one between evaluations only as newest."""
        *older, _ = self._checkpoints(self.folder)
        between = [p for p in older if not self._scheduled(_step_of(p))]
        kept = [p for p in older if p not in between]
        for path in (*between, *kept[:-1]):
            path.unlink()

    def _stop_if_asked(self, step: int, of: str = "update") -> None:
        """Raises Stopped if a signal came; a checkpoint has just been written."""
        if SIGNALS.asked:
            self.tracker.close()
            told = f"stopped at {of} {step}, with a checkpoint"
            raise Stopped(f"{told}; go on with --resume {self.folder}")

    def _means(self) -> dict[str, np.ndarray]:
        return {
            name: value if name.endswith("_max") else value / self._count
            for name, value in self._sums.items()
        }

    def restore(self, template: Any) -> tuple[Any, int] | None:
        """The newest whole checkpoint's state, laid out as `template`, and its step.

        None if the run is new or died before its first checkpoint. `evaluate_again`
        then writes the rows of that step, which may have been lost.
        """
        found = self._newest(template)
        if found is None:
            return None
        path, whole, meta = found
        for name in ("obs_mean", "obs_std"):
            if not np.array_equal(whole[name], getattr(self, name)):
                raise UserError(f"{path} was trained with another {name}")
        self._read_wall()
        self.constants = meta["constants"]
        self.diverged = meta.get("diverged", {})
        self.failed_episodes = meta.get("failed_episodes", 0)
        self._count = meta.get("count", 0)
        self._sums = {k: self._laid(v) for k, v in meta.get("sums", {}).items()}
        self.rows = [r for r in self._read_log() if r["step"] < meta["step"]]
        self._write_log()
        print(f"resumed at update {meta['step']} from {path}")
        self._restored_rows = meta.get("rows")
        self._good = (whole["state"], None)
        return self.spread(whole["state"]), int(meta["step"])

    def _newest(self, template: Any) -> tuple[Path, Any, dict[str, Any]] | None:
        """The newest checkpoint that is not damaged: path, content, meta."""
        norm = dict(obs_mean=self.obs_mean, obs_std=self.obs_std)
        wanted = {"state": self._own(template), **norm}
        damaged: list[Path] = []
        for path in reversed(self._checkpoints(self.folder)):
            try:
                whole, meta = checkpoint.load_tree(path, wanted)
                if "step" not in meta:
                    raise checkpoint.DamagedError(f"cannot read {path}: no step in it")
            except checkpoint.DamagedError as error:
                print(f"warning: {error}; trying the one before", file=sys.stderr)
                damaged.append(path)
                continue
            for other in damaged:
                (self.folder / "damaged").mkdir(exist_ok=True)
                other.replace(self.folder / "damaged" / other.name)
            return path, whole, meta
        if damaged:
            raise UserError(f"no checkpoint in {self.folder} is whole: begin a new run")
        return None

    def _read_wall(self) -> None:
        try:
            spent = checkpoint.read_json(self.folder / "wall.json")
            self.wall, self.trained = dict(spent["wall"]), int(spent["trained"])
        except (KeyError, TypeError, UserError) as error:
            print(f"warning: times so far are lost: {error}", file=sys.stderr)

    def _aside(self, name: str) -> Path:
        return self.folder / "checkpoint" / f"{name.replace(' ', '-')}.safetensors"

    def pause(self, name: str, step: int, state: Any) -> None:
        """Writes a state that is not the agent's yet if a signal came, and stops."""
        if SIGNALS.asked:
            checkpoint.save_tree(self._aside(name), self._own(state), {"step": step})
            self._write_wall()
            self._stop_if_asked(step, f"the {name}'s update")

    def forget(self, name: str) -> None:
        """Deletes what `pause` wrote."""
        self._aside(name).unlink(missing_ok=True)

    def paused(self, name: str, state: Any) -> tuple[Any, int]:
        """What `pause` wrote and its step; `state` and 0 if there is nothing."""
        if not self._aside(name).exists():
            return state, 0
        try:
            own, meta = checkpoint.load_tree(self._aside(name), self._own(state))
        except checkpoint.DamagedError as error:
            print(f"warning: {error}; fitting from the start", file=sys.stderr)
            return state, 0
        self._read_wall()
        print(f"resumed at update {meta['step']} of the {name}")
        return self.spread(own), int(meta["step"])

    @staticmethod
    def _checkpoints(folder: Path) -> list[Path]:
        return sorted(
            (folder / "checkpoint").glob("step-[0-9]*.safetensors"), key=_step_of
        )

    def _own(self, tree: Any) -> Any:
        """The seeds' share of the lanes, in numpy: copies, for buffers are donated."""
        return jax.tree.map(lambda x: np.array(x)[: len(self.seeds)], tree)

    def policy(self, actor: Any) -> rollout.NumpyPolicy:
        """The seeds' policies in numpy, (K, ...) parameters, acting on raw obs."""
        return rollout.NumpyPolicy(
            rollout.layers_of(actor),
            self.obs_mean,
            self.obs_std,
            self.dataset.action_low,
            self.dataset.action_high,
        )

    def spread(self, tree: Any) -> Any:
        """Lays numpy arrays with a leading seed axis out over the lanes' devices."""
        return seeds.split(jax.tree.map(self._laid, tree), self.mesh)

    def _laid(self, x: Any) -> np.ndarray:
        """An array with a seed axis with one of lanes, the last seed repeated."""
        lane = np.minimum(np.arange(len(self.lanes)), len(self.seeds) - 1)
        return np.asarray(x)[lane]

    def evaluate_again(self, step: int, actor: Any) -> None:
        """Starts the evaluation that belongs to a restored checkpoint."""
        self._good = (self._good[0], self._own(actor))
        rows = self._restored_rows
        if rows is None and self._scheduled(step):  # the end was moved to this step
            rows = self._new_rows()
        if rows is not None:
            self._evaluate(step, rows)

    def _evaluate(self, step: int, rows: list[dict[str, Any] | None]) -> None:
        if step == 0:  # nothing trained yet
            return
        future = None
        if self.options.eval_episodes:
            policy = self.policy(self._good[1])
            future = self._pool.submit(self._play, policy, step)
        self._pending = (step, future, rows)

    def _make_evaluator(self) -> rollout.Evaluator:
        """Plays in processes of its own where training leaves the cores to it."""
        assert self.dataset.task is not None
        episodes, workers = self.options.eval_episodes or 0, 0
        if self.mesh.devices.flat[0].platform != "cpu":
            spare = min(max(seeds.num_cores() - 1, 1), MAX_WORKERS)
            workers = min(spare, len(self.seeds) * episodes)
        return rollout.Evaluator(self.dataset.task, episodes, workers)

    def _play(self, policy: rollout.NumpyPolicy, step: int) -> rollout.Evaluation:
        assert self._evaluator is not None
        return self._evaluator.run(policy, self.seeds, step)

    def flush(self) -> None:
        """Waits for the evaluation under way and writes its rows."""
        if self._pending is None:
            return
        step, future, metrics = self._pending
        with self.timed("evaluation"):
            result = future.result() if future else None
        self._pending = None
        rows = {}
        for i, run in enumerate(self.runs):
            own = metrics[i]
            if own is None:  # diverged before
                continue
            row: dict[str, Any] = {"seed": run["seed"], "step": step, **run}
            row |= dict.fromkeys(("return", "score", "success", "length"), "")
            if result is not None:
                row |= result.means(i)
            row = {k: "" if v != v else v for k, v in row.items()}  # NaN: undefined
            rows[self.labels[i]] = row | dict(sorted(own.items()))
        for told in result.failed if result else ():
            tqdm.write(f"warning: at update {step}, {told}", file=sys.stderr)
            self.failed_episodes += 1
        self.rows += rows.values()
        self._write_log()
        self.tracker.send(rows)
        tqdm.write(report.line(step, list(rows.values())), file=sys.stdout)

    def _write_log(self) -> None:
        """Writes the whole log anew: no reader, and no crash, finds half a row."""
        path, text = self.folder / "log.csv", io.StringIO()
        if not self.rows:
            path.unlink(missing_ok=True)
            return
        writer = csv.DictWriter(text, list(self.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        checkpoint.write_bytes(path, text.getvalue().encode())

    def _read_log(self) -> list[dict[str, Any]]:
        path = self.folder / "log.csv"
        if not path.exists():
            return []
        try:
            with path.open(newline="", encoding="utf-8") as file:
                rows = [r for r in csv.DictReader(file) if None not in r.values()]
            read = [{k: report.number(v) for k, v in row.items()} for row in rows]
            return [row | {"step": int(row["step"])} for row in read]
        except (csv.Error, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is not the run's log any more ({error!r}): move it away; "
                "what it held before the checkpoint stays away"
            ) from error

    def finish(
        self, actor: Any, density: Callable[[Any, Any], Any] | None = None
    ) -> None:
        """Writes policy, result and pictures; prints the table and, last, the folder.

        Args:
            density: the first seed's certainty (B,) of the observations (B, S) as the
                networks see them and actions (B, A); None: no picture of it.
        """
        from common import plots  # late: a start need not wait for matplotlib

        self.flush()
        policy = self.policy(self._kept(self._own(actor), self._good[1]))
        with self.timed("writing"):
            task = self.dataset.task
            about = dict(
                algorithm=self.algorithm,
                obs_dim=self.dataset.obs_dim,
                action_dim=self.dataset.action_dim,
                seeds=self.seeds,
                obs_keys=list(task.obs_keys) if task else [],
            )
            rollout.export(self.folder / "policy", policy, self.labels, about)
        self._write_result()
        with self.timed("writing"):
            title = f"{self.algorithm} on {self.dataset.name}"
            plots.curves(self.folder / "curves.png", self._rows_by_label(), title)
            if density is not None:
                path = self.folder / "certainty.png"
                plots.certainty(path, density, self.dataset, policy, title)
        self.tracker.close()
        self._pool.shutdown()
        self._lock.release()
        if self._evaluator:
            self._evaluator.close()
        found = self._rows_by_label()
        last = {k: rows[-1] for k, rows in found.items() if k not in self.diverged}
        print(report.table(last, self.dataset))
        for label, what in self.diverged.items():
            print(f"{label} diverged at update {what['step']}: {what['quantity']}")
        print(self.folder, flush=True)

    def _rows_by_label(self) -> dict[str, list[dict[str, Any]]]:
        """Every lane's rows, by label; those of one that diverged end early."""
        names = ("seed", *self.options.swept)
        return {
            label: [r for r in self.rows if all(r[n] == run[n] for n in names)]
            for label, run in zip(self.labels, self.runs, strict=True)
        }

    def _write_result(self) -> None:
        path = self.folder / "result.json"
        last = [
            rows[-1] if label not in self.diverged else {}
            for label, rows in self._rows_by_label().items()
        ]
        task = self.dataset.task
        wall = {k: round(v, 3) for k, v in self.wall.items()}
        rate = self.trained * len(self.seeds) / max(self.wall.get("training", 0), 1e-9)
        checkpoint.write_json(
            path,
            dict(
                algorithm=self.algorithm,
                dataset=self.dataset.name,
                seeds=self.seeds,
                swept={k: [run[k] for run in self.runs] for k in self.options.swept},
                step=self.num_updates,
                **{
                    f"{k}s": [report.number(r.get(k)) for r in last]
                    for k in ("score", "return")
                },
                success=[report.number(r.get("success")) for r in last],
                **self.constants,
                lengths=[report.number(r.get("length")) for r in last],
                diverged=self.diverged,
                failed_episodes=self.failed_episodes,
                data=report.data_figures(self.dataset),
                eval_map=task.eval_map if task else None,
                eval_episodes=self.options.eval_episodes,
                wall=wall,
                updates_per_second=rate,
                options=to_json(self.options) | to_json(self.config),
                device=jax.devices()[0].device_kind,
                **self.code,
            ),
        )


# ============================================================================ Helpers


def _identity(
    scale: Any, config: Any, dataset: Dataset, obs_std: np.ndarray
) -> tuple[Any, Any, str, bool]:
    """What a network was fitted with, as `save_morse` and `load_morse` take it."""
    return scale, config, dataset.fingerprint, bool(np.any(obs_std != 1))


def reused_networks(
    options: RunOptions,
    dataset: Dataset,
    obs_std: np.ndarray,
    scale: Any,
    config: Any,
    is_needed: bool,
) -> list[Any] | None:
    """The networks that --morse names, one per lane; None without it.

    Call before the run has a folder: a network that does not fit is a UserError, and so
    is none where training `is_needed` one. A resumed run takes its own copies, so that
    what --morse named may be gone.
    """
    if options.morse is None:
        if is_needed and not options.num_morse_updates:
            raise UserError(
                "expected --num-morse-updates of 1 or more, or --morse RUN: omega is "
                "read from a Morse network, which 0 leaves untrained"
            )
        return None
    folders = [options.resume, options.morse] if options.resume else [options.morse]
    if (options.morse / "config.json").is_file():
        stored = checkpoint.read_json(options.morse / "config.json")
        data, told = stored.get("dataset"), stored.get("options")
        if (
            isinstance(data, dict)
            and isinstance(told, dict)
            and data.get("fingerprint") != dataset.fingerprint
        ):
            raise UserError(
                f"the Morse networks in {options.morse} were fitted to "
                f"{told.get('dataset')}, this run's data is {dataset.name}, or other "
                "episodes of it: give --dataset and --best-fraction as there"
            )
    init = partial(morse.init, config=config)
    shape = jax.eval_shape(
        lambda key: init(key, dataset.obs_dim, dataset.action_dim), jax.random.key(0)
    )
    return [
        load_morse(
            folders,
            lane["seed"],
            shape.params,
            *_identity(lane.get("scale", scale), config, dataset, obs_std),
        )
        for lane in options.lanes
    ]


def fit_morse(
    job: Run,
    state: Any,
    obs: Any,
    action: Any,
    scale: Any,
    config: Any,
    reused: list[Any] | None,
) -> Any:
    """One Morse network per lane: the reused ones, else fitted.

    Args:
        state: the lanes' fresh morse.MorseState.
        obs, action: the dataset on the devices, as the networks see it.
        scale: lam of every lane, unless it is swept.
        reused: what `reused_networks` found: (parameters, loss) per lane.
    Returns:
        The networks' parameters, with the lane axis.
    """
    if reused is not None:
        params = job.spread(
            jax.tree.map(lambda *x: np.stack(x), *[n for n, _ in reused])
        )
        losses = [loss for _, loss in reused]
    else:
        lam = job.traced("scale", scale)
        params, losses = _fitted(job, state, obs, action, lam, config)
        print("Morse loss: " + " ".join(f"{x:.3f}" for x in losses), flush=True)
    job.constants["morse_loss"] = losses
    for i, seed in enumerate(job.seeds):
        own = jax.tree.map(lambda x, i=i: np.asarray(x)[i], params)
        lam = job.runs[i].get("scale", scale)
        about = _identity(lam, config, job.dataset, job.obs_std)
        save_morse(job.folder, seed, own, *about, loss=losses[i])
    job.forget(MORSE)
    return params


def _fitted(
    job: Run, state: Any, obs: Any, action: Any, lam: jax.Array, config: Any
) -> tuple[Any, list[float]]:
    """The parameters after the run's Morse updates, and each seed's last loss."""
    keys, total = job.keys(1), job.options.num_morse_updates or 0
    config = morse.decay_over(total, config)

    def train(state, obs, action, key, start, lam, num_updates):
        return morse.train(state, obs, action, key, start, num_updates, lam, config)

    program = job.chunked(train, True, False, False, True, False, True)
    losses = np.full(len(job.lanes), np.nan)
    state, done = job.paused(MORSE, state)
    for start, length in job.chunks(MORSE, done, total, total, 1):
        with job.timed("pretraining"):
            state, metrics = program(
                length, state, obs, action, keys, np.int32(start), lam
            )
            losses = np.asarray(metrics["morse_loss"])
        if start + length < total:
            job.pause(MORSE, start + length, state)
    if total and not np.isfinite(losses).all():
        told = "a Morse network's loss is not finite: what uses it will diverge; a "
        told += "smaller --morse-net.learning-rate may help"
        print(f"warning: {told}", file=sys.stderr)
    return state.params, [float(x) for x in losses[: len(job.seeds)]]


def _step_of(checkpoint_path: Path) -> int:
    return int(checkpoint_path.stem.removeprefix("step-"))
