"""Named tables as lists of jobs, and what they cost. Nothing here imports jax."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from common import defaults
from common.defaults import EMBEDDED
from results import store

D4RL = tuple(
    f"{agent}-{kind}-v2"
    for agent in ("halfcheetah", "hopper", "walker2d")
    for kind in ("medium", "medium-replay", "medium-expert")
)
LARGE = ("large-play", "large-diverse")
MAZES = ("umaze", "umaze-diverse", "medium-play", "medium-diverse", *LARGE)
ANTMAZE = tuple(f"D4RL/antmaze/{maze}-v1" for maze in MAZES)
Method = Literal["BC", "10%BC", "TD3+BC", "TD3-BST", "IQL", "IQL-BST"]
ALL: tuple[Method, ...] = ("BC", "TD3+BC", "TD3-BST", "IQL", "IQL-BST")
NO_MORSE = {"num_morse_updates": "0"}  # there it is only a diagnostic
METHODS: dict[Method, tuple[str, dict[str, str]]] = {  # script, options
    "BC": ("td3_bc", {"alpha": "0"} | NO_MORSE),
    "10%BC": ("td3_bc", {"alpha": "0", "best_fraction": "0.1"} | NO_MORSE),
    "TD3+BC": ("td3_bc", NO_MORSE),
    "TD3-BST": ("td3_bst", {}),
    "IQL": ("iql_bst", {"policy_step": "awr"} | NO_MORSE),
    "IQL-BST": ("iql_bst", {}),
}
OWN = {"dataset", "seed", "num_seeds", "num_updates", "eval_every", "run_dir", "resume"}
OWN |= {"sweep", "morse", "track", "alpha", "policy_step", "best_fraction"}
PLAIN = "plain"  # the variant that changes nothing
# What an update costs, roughly, so that shards are alike on every machine.
COSTS = {"BC": 1, "10%BC": 1, "TD3+BC": 1, "TD3-BST": 1.4, "IQL": 1.3, "IQL-BST": 1.7}


def _value(text: str) -> str:
    """Numbers as a row has them: 0.10 is 0.1."""
    try:
        return f"{float(text):.9g}"
    except ValueError:
        return text


def pairs(texts: Iterable[str]) -> list[tuple[str, str]]:
    """Name and value of each NAME=VALUE, as a row has them."""
    parts = [text.partition("=") for text in texts]
    return [(name.replace("-", "_"), _value(value)) for name, _, value in parts]


def variant_options(variant: str) -> dict[str, str]:
    """The options that a variant changes."""
    return {} if variant == PLAIN else dict(pairs(variant.split("+")))


@dataclass(frozen=True)
class Sweep:
    """Trains methods on datasets over seeds and makes the table and its figures."""

    datasets: tuple[str, ...]  # as --dataset of the scripts takes them
    methods: tuple[Method, ...] = ALL
    seed: int = 0  # the first seed
    num_seeds: int = 5  # seed, seed + 1, ... side by side in one process
    num_updates: int = 1_000_000  # critic updates, an even number
    eval_every: int | None = None  # critic updates; unset: the scripts' default
    scales: tuple[float, ...] = ()  # TD3-BST's lam, as multiples of dim(A)
    set: tuple[str, ...] = ()  # NAME=VALUE, options that all the methods have
    variants: tuple[str, ...] = ()  # plain or NAME=VALUE[+...], before those of set
    out: Path = Path("runs/reproduce")  # results.csv, tables, figures, runs; resumed
    shard: str = "1/1"  # i/n: the i-th of n parts that cost about the same
    dry_run: bool = False  # print the commands and their cost

    def __post_init__(self) -> None:
        for name in ("num_seeds", "num_updates", "eval_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
            if value and name != "num_seeds" and value % 2:
                raise ValueError(f"{name} must be even, an actor step to two: {value}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        for name in ("datasets", "methods", "scales"):  # variants: below
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(
                    f"{name} names one twice: {' '.join(map(str, values))}"
                )
        if not (self.datasets and self.methods):
            raise ValueError("at least one dataset and one method are needed")
        if not all(scale > 0 for scale in self.scales):
            raise ValueError(f"scales must be above 0, got {self.scales}")
        for name in ("scales", "variants"):
            if getattr(self, name) and self.methods != ("TD3-BST",):
                raise ValueError(f"{name} are of TD3-BST: expected --methods TD3-BST")
        self._check_options(self.set)
        for variant in self.variants:
            self._check_options([] if variant == PLAIN else variant.split("+"))
        options = [dict(self.further) | variant_options(v) for v in self.variants]
        if any(found in options[:i] for i, found in enumerate(options)):
            raise ValueError(f"variants names one twice: {' '.join(self.variants)}")
        index, total = self.part
        if not 1 <= index <= total:
            raise ValueError(f"shard expects i/n with 1 <= i <= n, got {self.shard}")

    def _check_options(self, texts: Sequence[str]) -> None:
        for text in texts:
            name, _, value = text.partition("=")
            if not (name and value) or name.startswith("-") or " " in text:
                raise ValueError(f"set expects NAME=VALUE, got {text!r}")
            if name.replace("-", "_") in OWN:
                raise ValueError(f"set cannot change {name}, a sweep has it of its own")
        names = [name for name, _ in pairs(texts)]
        if len(set(names)) != len(names) or (self.scales and "scale" in names):
            raise ValueError(f"set names an option twice: {' '.join(texts)}")

    @property
    def further(self) -> list[tuple[str, str]]:
        """Name and value of every option that `set` adds."""
        return pairs(self.set)

    @property
    def part(self) -> tuple[int, int]:
        """i and n of the shard i/n."""
        index, _, total = self.shard.partition("/")
        if not (index.isdecimal() and total.isdecimal()):
            raise ValueError(f"shard expects i/n, 1/4 say, got {self.shard!r}")
        return int(index), int(total)


FACTORS = (  # what the factor study changes, on whichever dataset
    PLAIN,
    "floor=0.5",
    "q_weight=3",
    "obs_noise=0.1",
    "n_step=1000",
    "polyak=0.005",
    "morse_net.negatives=uniform",
    "floor=0.5+morse_net.negatives=uniform",
    "mu=0.5",
    "mu=0.05",
    "actor_critics=2",
    "discount=0.995",
    "actor_decay_updates=0",
    "omega_cap=0",
    "hidden_dims=256,256,256",
    "batch_size=512",
)
THROUGH = "floor=0+supervisor_gradient=True"  # the maze's defaults to 2026-11-26
CONSTANTS = [  # omega is its floor in every state, so has no gradient to speak of
    f"floor={c}+mu=1000+supervisor_gradient=True" for c in (0.014, 0.05, 0.15, 0.4)
]
FACTOR_STUDY = partial(
    Sweep, methods=("TD3-BST",), num_seeds=1, num_updates=20_000, eval_every=10_000
)

TABLES: dict[str, Sweep] = {
    "quick": Sweep(
        (EMBEDDED,),
        num_seeds=4,
        num_updates=6_000,
        eval_every=2_000,
        set=("eval_episodes=50", "num_morse_updates=2500"),
    ),
    "locomotion": Sweep(D4RL),
    "antmaze": Sweep(ANTMAZE),
    "bst-factors": FACTOR_STUDY(
        ("mujoco/halfcheetah/medium-v0",),
        set=(
            "num_morse_updates=8000",
            *("n_step=1", "q_weight=1", "obs_noise=0"),
            *("polyak=0.02", "supervisor_gradient=True"),  # defaults to 2026-11-27
        ),
        variants=(
            *FACTORS,
            "supervisor_gradient=False",
            "critic_layer_norm=True",
            "floor=0.5+q_weight=3",
            "n_step=1000+q_weight=0.2",
        ),
    ),
    "bst-factors-maze": FACTOR_STUDY(
        (EMBEDDED,),
        set=("actor_learning_rate=0.0003",),  # the default to 2026-11-27
        variants=(
            *FACTORS,
            "floor=0",
            "supervisor_gradient=True",
            THROUGH,
            "critic_layer_norm=False",
            "reward_shift=-1",
            *CONSTANTS,
        ),
    ),
    "ablation-scale": Sweep(
        (EMBEDDED, "mujoco/hopper/medium-v0"),
        methods=("TD3-BST",),
        num_seeds=3,
        num_updates=50_000,
        scales=(0.1, 0.5, 1.0, 2.0),
    ),
}
ABOUT = {
    "bst-factors": "TD3-BST on halfcheetah, one option changed at a time.",
    "bst-factors-maze": "The same on the embedded maze.",
    "quick": "All methods on the embedded maze, 6,000 updates: minutes on a CPU.",
    "locomotion": "All methods on D4RL's halfcheetah, hopper and walker2d -v2 sets.",
    "antmaze": "All methods on Minari's AntMaze sets.",
    "ablation-scale": "TD3-BST over lam = k/10, k/2, k, 2k with k = dim(A).",
}


# ============================================================================== Jobs


@dataclass(frozen=True)
class Job:
    """One process: a script, its options, and the seeds and scales side by side."""

    method: Method
    algorithm: str
    dataset: str
    options: tuple[tuple[str, str], ...]  # name, value; without the scale
    seeds: tuple[int, ...]  # consecutive
    scales: tuple[str, ...] = ()  # lam; (): the default alone

    @property
    def lanes(self) -> int:
        """Policies that it trains."""
        return len(self.seeds) * max(1, len(self.scales))

    def text(self, scale: str | None = None) -> str:
        """The options as a row has them."""
        swept = {} if scale is None else {"scale": scale}
        return store.options_text(dict(self.options) | swept)

    def cells(self) -> Iterator[tuple[str, int]]:
        """(options as a row has them, seed) of every lane."""
        for scale in self.scales or (None,):
            yield from ((self.text(scale), seed) for seed in self.seeds)

    def arguments(self) -> list[str]:
        """The script's command line, without the place of the run."""
        args = ["--dataset", self.dataset, *store.arguments(dict(self.options))]
        args += ["--seed", str(self.seeds[0])] if self.seeds[0] else []
        args += ["--num-seeds", str(len(self.seeds))] if len(self.seeds) > 1 else []
        args += ["--sweep", "scale=" + ",".join(self.scales)] if self.scales else []
        return args

    def name(self, code: str) -> str:
        """Of the job's folder: readable, and another one for other code or options."""
        text = " ".join([self.algorithm, code, *self.arguments()])
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        slug = "".join(c if c.isalnum() or c in "+-" else "-" for c in self.dataset)
        return f"{self.method.replace('%', '-')}-{slug[-40:].strip('-')}-{digest}"


def jobs(sweep: Sweep, action_dim: Mapping[str, int]) -> list[Job]:
    """All jobs of a table, one per dataset, method and variant, before shard or skip.

    Args:
        action_dim: dim(A) of each dataset; read only where scales vary.
    """
    made = []
    for dataset in sweep.datasets:
        for method in sweep.methods:
            algorithm, own = METHODS[method]
            shared = {**dict(sweep.further), **own}
            shared["num_updates"] = str(sweep.num_updates)
            if sweep.eval_every:
                shared["eval_every"] = str(sweep.eval_every)
            scales = tuple(f"{x * action_dim[dataset]:.9g}" for x in sweep.scales)
            seeds = tuple(range(sweep.seed, sweep.seed + sweep.num_seeds))
            for variant in sweep.variants or (PLAIN,):
                options = tuple(sorted((shared | variant_options(variant)).items()))
                made.append(Job(method, algorithm, dataset, options, seeds, scales))
    return made


def part(jobs: Sequence[Job], sweep: Sweep) -> list[Job]:
    """The shard's share: the costliest job to the shard with least to do, and so on."""
    index, total = sweep.part
    loads: list[float] = [0.0] * total
    shares: list[list[Job]] = [[] for _ in loads]
    for job in sorted(jobs, key=lambda job: -job.lanes * COSTS[job.method]):
        least = loads.index(min(loads))
        loads[least] += job.lanes * COSTS[job.method]
        shares[least].append(job)
    return [job for job in jobs if job in shares[index - 1]]


Cell = tuple[str, str, str, int, str]  # algorithm, options, dataset, seed, code hash


def held(rows: Iterable[store.Row]) -> set[Cell]:
    """The cells that have rows; a run's rows are added together, after its end."""
    return {cell_of(row) for row in rows if row["seed"]}


def cell_of(row: store.Row) -> Cell:
    """The cell of a trained policy's row."""
    names = row["algorithm"], row["options"], row["dataset"]
    return *names, int(row["seed"]), row["code_hash"]


def missing(job: Job, there: set[Cell], code: str) -> list[Job]:
    """What of the job is not there yet, as jobs over consecutive seeds."""
    made: list[Job] = []
    for seed in job.seeds:
        lacking = [
            scale
            for scale in job.scales or (None,)
            if (job.algorithm, job.text(scale), job.dataset, seed, code) not in there
        ]
        if not lacking:
            continue
        scales = tuple(scale for scale in lacking if scale is not None)
        seeds: tuple[int, ...] = (seed,)
        if made and made[-1].scales == scales and made[-1].seeds[-1] == seed - 1:
            seeds = (*made.pop().seeds, seed)
        made.append(replace(job, seeds=seeds, scales=scales))
    return made


# ============================================================================== Cost

RATE_COLUMNS: tuple[str, ...] = (
    "device",  # "cpu, 2 cores", or a GPU's name
    "method",
    "domain",
    "lanes",
    "updates_per_second",  # of all lanes together
    "morse_updates_per_second",  # "" where none is fitted
    "seconds_per_evaluation",  # waiting for one and writing its checkpoint
    "seconds_besides",  # start, load, compile
    "commit",
)
Rate = dict[str, str]


def read_rates(*paths: Path) -> list[Rate]:
    """Measured rates; later files first."""
    rates: list[Rate] = []
    for path in reversed(paths):
        if path.exists():
            rates += store.read_csv(path, RATE_COLUMNS)
    return rates


def add_rate(path: Path, rate: Rate) -> None:
    """Adds a rate to a CSV; it replaces an earlier one of the same kind."""
    kind = ("device", "method", "domain", "lanes")
    with store.locked(path):
        rates = {tuple(r[k] for k in kind): r for r in [*read_rates(path), rate]}
        store.write_csv(path, (rates[key] for key in sorted(rates)), RATE_COLUMNS)


AGENTS = {  # dim(A) by the word that a dataset's name has
    "antmaze": 8,
    "pointmaze": 2,
    "maze2d": 2,
    "halfcheetah": 6,
    "hopper": 3,
    "walker2d": 6,
    "ant": 8,
}


def action_dim(dataset: str) -> int | None:
    """dim(A) of the well-known datasets; None of others and of files."""
    words = re.split(r"[/-]", dataset)
    known = [AGENTS[word] for word in words if word in AGENTS]
    return known[0] if known and not Path(dataset).exists() else None


def domain_of(dataset: str) -> str:
    """Guessed from the name: antmaze, pointmaze or locomotion."""
    for domain in ("antmaze", "pointmaze"):
        if domain in dataset:
            return domain
    return "pointmaze" if "maze" in dataset else "locomotion"


def seconds(job: Job, rates: Sequence[Rate], device: str) -> float | None:
    """What the job takes, by the rate measured nearest to it; None: none was."""
    near = [r for r in rates if r["device"] == device and r["method"] == job.method]
    if not near:
        return None
    domain = domain_of(job.dataset)
    rate = min(near, key=lambda r: r["domain"] != domain)  # the first of these
    unset = defaults.counts(job.dataset == EMBEDDED, "maze" in job.dataset)
    options = unset | dict(job.options)
    updates, morse, every = (
        int(options[name])
        for name in ("num_updates", "num_morse_updates", "eval_every")
    )
    lanes = rounds(job.lanes, device) / rounds(int(rate["lanes"]), device)
    lanes *= int(rate["lanes"])  # at the rate of those measured
    spent = float(rate["seconds_besides"])
    spent += lanes * updates / float(rate["updates_per_second"])
    if morse and rate["morse_updates_per_second"]:
        spent += lanes * morse / float(rate["morse_updates_per_second"])
    return spent + -(-updates // every) * float(rate["seconds_per_evaluation"])


def rounds(lanes: int, device: str) -> int:
    """Lanes that follow each other: on a CPU a core trains one at a time."""
    cores = int(device.split()[1]) if device.startswith("cpu, ") else 1
    return -(-lanes // cores)


def duration(spent: float) -> str:
    """Seconds for people."""
    if spent < 90:
        return f"{spent:.0f} s"
    return f"{spent / 60:.0f} min" if spent < 5400 else f"{spent / 3600:.1f} h"


def total(jobs: Iterable[Job], rates: Sequence[Rate]) -> dict[str, float | None]:
    """Seconds of all jobs per device, None where a method was not measured on it."""
    costs: dict[str, float | None] = {}
    for device in dict.fromkeys(r["device"] for r in rates):
        each: list[Any] = [seconds(job, rates, device) for job in jobs]
        costs[device] = None if None in each else sum(each)
    return costs
