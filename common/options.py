"""A script's command line: what every run can be told, parsed, checked, stored."""

import dataclasses
import itertools
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from common import checkpoint, defaults
from common.datasets import Dataset, names_in
from common.defaults import EMBEDDED
from common.errors import UserError


@dataclass(frozen=True)
class RunOptions:
    """What to train on, for how long, where to write it. Counts are critic updates."""

    dataset: str = EMBEDDED  # Minari id, D4RL name, .hdf5 or .npz file; join by +
    best_fraction: float = 1.0  # of the episodes to train on, best returns first
    seed: int = 0  # the first seed
    num_seeds: int = 1  # train seeds seed, seed + 1, ... side by side
    # critic updates; unset: 20000 embedded, 100000 td3_bst.py in locomotion, else 1M
    num_updates: int | None = None
    num_morse_updates: int | None = None  # unset: 8000 embedded, else 20000
    eval_every: int | None = None  # critic updates; unset: 5000, other mazes 50000
    eval_episodes: int | None = None  # per seed; unset: 100 in mazes, else 10; 0: none
    eval_map: Literal["auto", "collection", "metadata"] = "auto"  # maze to evaluate in
    run_dir: Path = Path("runs")  # the run gets a folder of its own in here
    resume: Path | None = None  # go on with the run in this folder
    morse: Path | None = None  # take the fitted Morse networks of this run's folder
    sweep: tuple[str, ...] = ()  # NAME=V,V,...: these values side by side, each seed
    track: Literal["none", "tensorboard", "wandb"] = "none"  # a tracker beside log.csv

    def __post_init__(self) -> None:
        for name in ("num_seeds", "num_updates", "eval_every"):
            _at_least(name, getattr(self, name), 1)
        for name in ("seed", "num_morse_updates", "eval_episodes"):
            _at_least(name, getattr(self, name), 0)
        if self.seed + self.num_seeds > 2**32:
            raise ValueError(f"seeds must be below 2**32, got {self.seed}")
        if not 0 < self.best_fraction <= 1:
            raise ValueError(
                f"best_fraction must lie in (0, 1], got {self.best_fraction}"
            )
        for name, values in self.swept.items():
            if len({f"{value:.9g}" for value in values}) != len(values):
                raise ValueError(f"sweep names a value of {name} twice")

    @property
    def swept(self) -> dict[str, tuple[float, ...]]:
        """The values of every option that --sweep names."""
        values: dict[str, tuple[float, ...]] = {}
        for text in self.sweep:
            name, _, listed = text.partition("=")
            name = name.replace("-", "_")
            try:
                given = tuple(float(value) for value in listed.split(","))
            except ValueError as error:
                raise ValueError(
                    f"sweep expects NAME=VALUE,VALUE,..., got {text!r}"
                ) from error
            if name in values:
                raise ValueError(f"sweep names {name} twice")
            values[name] = given
        return values

    @property
    def lanes(self) -> list[dict[str, Any]]:
        """What is trained side by side: each choice of swept values with each seed."""
        seeds = range(self.seed, self.seed + self.num_seeds)
        names, values = list(self.swept), self.swept.values()
        return [
            {**dict(zip(names, chosen, strict=True)), "seed": seed}
            for chosen in itertools.product(*values)
            for seed in seeds
        ]


def _at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def resolve(options: RunOptions, dataset: Dataset, policy_delay: int) -> RunOptions:
    """Fills in what is unset; counts become multiples of `policy_delay`, and say so."""
    embedded = dataset.name == EMBEDDED
    maze = dataset.task is not None and dataset.task.ends_at_success
    counts = defaults.counts(embedded, maze)
    unset = {k: v for k, v in counts.items() if getattr(options, k) is None}
    options = dataclasses.replace(options, **unset)
    if dataset.task is None:
        options = dataclasses.replace(options, eval_episodes=0)
    for name in ("num_updates", "eval_every"):
        asked = getattr(options, name)
        count = -(-asked // policy_delay) * policy_delay
        if count != asked:
            print(f"{name}: {asked} -> {count}, a multiple of policy_delay")
            options = dataclasses.replace(options, **{name: count})
    return options


def parse(
    algorithm: str,
    config: Any,
    about: str,
    args: list[str] | None = None,
    traced: Sequence[str] = (),
) -> tuple[RunOptions, Any]:
    """Reads the command line; with --resume, the stored options are the defaults.

    Args:
        config: an instance of the algorithm's Config, the defaults.
        about: its first paragraph heads the help.
        traced: the options of `config` that --sweep may name.
    Raises:
        UserError: a bad value, or a resumed run given other options than its own.
    """
    args = sys.argv[1:] if args is None else args
    options, asked = _cli(algorithm, RunOptions(), config, about, args)
    _check_sweep(options, asked, traced)
    if options.resume is None:
        return _absolute(options), asked
    stored = checkpoint.read_json(options.resume / "config.json")
    if stored.get("algorithm") != algorithm:
        raise UserError(
            f"{options.resume} holds a run of {stored.get('algorithm')}, not of "
            f"{algorithm}; resume it with its own script"
        )
    own, own_config = stored_options(options.resume, stored, type(config))
    options, asked = _cli(algorithm, own, own_config, about, args)
    free: dict[str, Any] = dict(num_updates=None, resume=None, run_dir=Path())
    free |= dict(track="none", dataset="", morse=None)
    if (asked, dataclasses.replace(options, **free)) != (
        own_config,
        dataclasses.replace(own, **free),
    ):
        raise UserError(
            "a resumed run keeps its options; only --num-updates may change, and the "
            "place of its data (--dataset)"
        )
    return _absolute(options), asked


def stored_options(
    folder: Path, stored: Mapping[str, Any], kind: type
) -> tuple[RunOptions, Any]:
    """Options and config, a `kind`, of the run whose config.json is `stored`."""
    try:
        stored["dataset"]["fingerprint"]
        config = from_json(kind, stored["config"])
        return from_json(RunOptions, stored["options"]), config
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder}/config.json is damaged or from another version: {error}"
        ) from error


def _check_sweep(options: RunOptions, config: Any, traced: Sequence[str]) -> None:
    for name, values in options.swept.items():
        if name not in traced:
            raise UserError(
                f"--sweep cannot vary {name!r}, only {' and '.join(traced)}: what else "
                "differs needs a run of its own"
            )
        for value in values:
            try:
                dataclasses.replace(config, **{name: value})
            except ValueError as error:
                raise UserError(f"--sweep: {error}") from error


def _absolute(options: RunOptions) -> RunOptions:
    """Files by their absolute paths, so that a run can be resumed from anywhere."""
    names = names_in(options.dataset)
    if all(Path(name).is_file() for name in names):
        paths = [str(Path(name).resolve()) for name in names]
        if len(paths) == 1 or "+" not in "".join(paths):  # which would part them
            names = paths
    morse = options.morse.resolve() if options.morse else None
    return dataclasses.replace(options, dataset="+".join(names), morse=morse)


def _cli(
    algorithm: str, options: RunOptions, config: Any, about: str, args: list[str]
) -> tuple[RunOptions, Any]:
    fields = [
        (
            "config",
            Annotated[type(config), tyro.conf.arg(name="")],
            dataclasses.field(default=config),
        ),
        (
            "run",
            Annotated[RunOptions, tyro.conf.OmitArgPrefixes],
            dataclasses.field(default=options),
        ),
    ]
    both = dataclasses.make_dataclass("Options", fields, frozen=True)
    try:
        first = about.split("\n\n")[0]
        out = tyro.cli(both, args=args, description=first, prog=f"{algorithm}.py")
    except ValueError as error:
        raise UserError(str(error)) from error
    return out.run, out.config


def to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {
            f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)
        }
    return str(value) if isinstance(value, Path) else value


def from_json(kind: type, stored: Mapping[str, Any]) -> Any:
    """The dataclass; ValueError unless all its names are stored, and no others."""
    hints = typing.get_type_hints(kind)
    if differ := {f.name for f in dataclasses.fields(kind)} ^ stored.keys():
        raise ValueError(f"it differs in having {', '.join(sorted(differ))}")
    values: dict[str, Any] = {}
    for name, value in stored.items():
        if dataclasses.is_dataclass(hints[name]):
            value = from_json(hints[name], value)
        elif isinstance(value, list):
            value = tuple(value)
        elif value is not None and Path in (hints[name], *typing.get_args(hints[name])):
            value = Path(value)
        values[name] = value
    return kind(**values)
