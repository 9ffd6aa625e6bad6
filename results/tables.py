"""Markdown tables from rows of results, with interquartile means and intervals.

    uv run results/tables.py           write them into the pages, see `pages`
    uv run results/tables.py --check   write nothing; exit 1 if a page says otherwise

A run counts by its last evaluation, a seed once. A cell is the mean and the sample sd
over seeds, n their number. Aggregates are those of Agarwal et al., arXiv 2108.13264:
interquartile mean and probability of improvement, with 95 % bootstrap intervals that
resample seeds within each dataset.
"""

import argparse
import csv
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from scipy import stats

if __name__ == "__main__":  # a script's own folder comes first; put the root there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from results import store, sweeps
from results.store import Row
from results.sweeps import EMBEDDED

METHODS = ("data", *sweeps.METHODS)
COMPARED = sweeps.ALL  # they enter every aggregate
PLAIN = {  # options that leave a method what it is; also alpha = 0, see `changes`
    "num_updates",
    "num_morse_updates",
    "eval_every",
    "eval_episodes",
    "policy_step",
    "best_fraction",
}
FIRST_VERSION = {  # options that the sweep over lam was run with
    "actor_decay_updates": "0",
    "actor_learning_rate": "0.0003",
    "floor": "0",
    "morse_net.decay_updates": "0",
    "morse_net.negatives": "uniform",
    "n_step": "1",
    "obs_noise": "0",
    "omega_cap": "0",
    "polyak": "0.005",
    "q_weight": "1",
    "supervisor_gradient": "True",
}
NOISE = {  # half the spread of the data's actions
    "standin/mujoco/hopper/medium-v0": "0.119",
    "standin/mujoco/hopper/medium-replay-v0": "0.193",
}
OMEGA = {  # TD3-BST's mean at the end, with the gradient through omega
    "standin/mujoco/hopper/medium-v0": "0.8",
    "standin/mujoco/hopper/medium-replay-v0": "0.5",
}
Asked = Mapping[str, str | Mapping[str, str]]  # options; those of one dataset by name
THROUGH: Asked = {  # the gradient through omega; the other set has it by default
    "supervisor_gradient": {"standin/mujoco/hopper/medium-v0": "True"}
}
WEIGHT: Asked = {
    "supervisor_gradient": {"standin/mujoco/hopper/medium-replay-v0": "False"}
}
PRETRAINED = {"num_morse_updates": "8000"}  # in both factor studies, named or not
Part = tuple[str, str, Asked]  # label, method
PARTS: tuple[Part, ...] = (  # from cloning to TD3-BST
    ("BC", "BC", {}),
    ("BC with the noise", "BC", {"obs_noise": NOISE}),
    ("TD3+BC", "TD3+BC", {}),
    ("TD3+BC with the returns", "TD3+BC", {"n_step": "1000"}),
    (
        "TD3+BC with the returns and the noise",
        "TD3+BC",
        {"n_step": "1000", "obs_noise": NOISE},
    ),
    (
        "TD3-BST with omega = 3.3",
        "TD3-BST",
        {"mu": "1000", "floor": "3.3", **THROUGH},
    ),
    (
        "TD3-BST with its mean omega everywhere",
        "TD3-BST",
        {"mu": "1000", "floor": OMEGA, **THROUGH},
    ),
    (
        "TD3-BST through omega, without the noise",
        "TD3-BST",
        {"obs_noise": "0", **THROUGH},
    ),
    ("TD3-BST through omega, with w = 8", "TD3-BST", {"q_weight": "8", **THROUGH}),
    ("TD3-BST through omega", "TD3-BST", THROUGH),
    ("TD3-BST with omega as a weight", "TD3-BST", WEIGHT),
)
NAMES = {"score": "score", "length": "steps to the goal", "success": "success rate"}
RESAMPLES = 5_000
NOT_YET = "No such runs yet."

WHOSE = {  # by the beginning of a reference's source
    "original papers": "original paper",
    "CORL": "CORL",
    "arXiv 2404.16399": "TD3-BST paper",
}


# ---------------------------------------------------------------------------- runs


class Run(NamedTuple):
    """One seed's training; `data` is a run without a seed."""

    method: str
    dataset: str
    seed: str
    options: dict[str, str]
    code_hash: str
    rows: list[Row]  # its evaluations in the order of their steps
    place: int  # where in the file its last evaluation stands
    is_present: bool  # whether the code is the present one

    @property
    def step(self) -> int:
        """Updates at the last evaluation; 0 of the data."""
        return _step(self.rows[-1])


def _step(row: Row) -> int:
    return int(row["step"] or 0)


def runs_of(rows: Iterable[Row]) -> list[Run]:
    """The runs that rows of results belong to."""
    groups: dict[tuple[str, ...], list[tuple[int, int, Row]]] = {}
    for place, row in enumerate(rows):
        names = ("algorithm", "options", "dataset", "seed", "code_hash")
        key = tuple(row[name] for name in names)
        groups.setdefault(key, []).append((_step(row), place, row))
    present = {store.code_hash(script) for script in store.SCRIPTS}
    runs = []
    for (algorithm, _, dataset, seed, code), found in groups.items():
        found.sort(key=lambda item: item[:2])
        options = store.options_of(found[0][2])
        about = store.method_of(algorithm, options), dataset, seed, options, code
        own = [row for _, _, row in found]
        runs.append(Run(*about, own, found[-1][1], code in present))
    return runs


def changes(run: Run) -> dict[str, str]:
    """The options that make the run an ablation of its method; BC's alpha is none."""
    cloning = {"alpha"} if float(run.options.get("alpha", 0)) == 0 else set()
    return {k: v for k, v in run.options.items() if k not in PLAIN | cloning}


def is_plain(run: Run) -> bool:
    """Whether the run is its method as it is, no ablation."""
    return not changes(run)


def is_finished(run: Run) -> bool:
    """Whether the last evaluation is at the number of updates asked for."""
    return int(run.options.get("num_updates", run.step)) == run.step


def one_per_seed(runs: Sequence[Run]) -> list[Run]:
    """One run of each seed, in the seeds' order.

    Of several, that of the present code, else that of the code with most seeds.
    """
    seeds: dict[str, set[str]] = {}
    for run in runs:
        seeds.setdefault(run.code_hash, set()).add(run.seed)

    def rank(run: Run) -> tuple[bool, int, int]:
        return run.is_present, len(seeds[run.code_hash]), run.place

    found = {run.seed: run for run in sorted(runs, key=rank)}
    return [found[seed] for seed in sorted(found, key=lambda s: int(s or -1))]


def chosen(
    runs: Sequence[Run],
    method: str,
    dataset: str,
    step: int,
    options: Mapping[str, str] = MappingProxyType({}),
) -> list[Run]:
    """The finished runs of a table's cell that change `options`; data have no step."""
    step = 0 if method == "data" else step
    own = [run for run in runs if (run.method, run.dataset) == (method, dataset)]
    return one_per_seed(
        [
            run
            for run in own
            if run.step == step and is_finished(run) and changes(run) == options
        ]
    )


def largest_step(runs: Sequence[Run]) -> int:
    """The largest number of updates that plain runs finished with."""
    return max((r.step for r in runs if is_plain(r) and is_finished(r)), default=0)


def by_scale(runs: Sequence[Run]) -> dict[str, dict[float, list[Run]]]:
    """By dataset and lam, TD3-BST's runs with `--scale`, at their largest step.

    Of those whose other options are alike, the most: those of the first version, or of
    the present one.
    """
    found: dict[str, dict[frozenset[tuple[str, str]], list[Run]]] = {}
    for run in runs:
        others = {k: v for k, v in run.options.items() if k not in PLAIN | {"scale"}}
        scaled = "scale" in run.options and others.items() <= FIRST_VERSION.items()
        if run.method == "TD3-BST" and scaled and is_finished(run):
            alike = found.setdefault(run.dataset, {})
            alike.setdefault(frozenset(others.items()), []).append(run)
    groups: dict[str, dict[float, list[Run]]] = {}
    for dataset, alike in sorted(found.items()):
        own = max(alike.values(), key=len)
        step = max(run.step for run in own)
        by_lam: dict[float, list[Run]] = {}
        for run in own:
            if run.step == step:
                by_lam.setdefault(float(run.options["scale"]), []).append(run)
        groups[dataset] = {lam: one_per_seed(by_lam[lam]) for lam in sorted(by_lam)}
    return groups


def factor_study(dataset: str) -> sweeps.Sweep:
    """Which of `bst-factors` and `bst-factors-maze` a dataset's runs belong to."""
    return sweeps.TABLES["bst-factors-maze" if "maze" in dataset else "bst-factors"]


def variant(dataset: str, options: Mapping[str, str]) -> str:
    """What a run changes; what the dataset's factor study sets for all is no change."""
    point = PRETRAINED | dict(factor_study(dataset).further)
    changed = sorted(options.items() - point.items())
    unnamed = PLAIN - point.keys()
    named = "+".join(f"{name}={x}" for name, x in changed if name not in unnamed)
    return named or sweeps.PLAIN


def by_variant(runs: Sequence[Run], step: int) -> dict[str, dict[str, list[Run]]]:
    """By dataset and `variant`, TD3-BST's runs of `step` updates; plain first."""
    groups: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        if run.method != "TD3-BST" or run.step != step or not is_finished(run):
            continue
        own = groups.setdefault(run.dataset, {sweeps.PLAIN: []})
        own.setdefault(variant(run.dataset, run.options), []).append(run)
    return {
        dataset: {
            label: one_per_seed(own) for label, own in groups[dataset].items() if own
        }
        for dataset in sorted(groups)
    }


def lam_label(lam: float, dataset: str) -> str:
    """`k/2 = 1.5`, k = dim(A), where the dataset's name tells; else the number."""
    k = sweeps.action_dim(dataset)
    if k is None:
        return f"{lam:g}"
    names = {0.1: "k/10", 0.5: "k/2", 1.0: "k", 2.0: "2k"}
    share = round(lam / k, 6)
    return f"{names.get(share, f'{share:.4g}k')} = {lam:g}"


# ---------------------------------------------------------------------- statistics


class Estimate(NamedTuple):
    """A number with its 95 % interval; none where a dataset has a single seed."""

    value: float
    low: float | None
    high: float | None
    num_single: int  # datasets with one seed
    num_datasets: int

    def text(self, digits: int = 1) -> str:
        """`51.2 [48.0, 55.1]`, or why there is no interval."""
        value = f"{self.value:.{digits}f}"
        if self.low is not None:
            return f"{value} [{self.low:.{digits}f}, {self.high:.{digits}f}]"
        if self.num_datasets == 1:
            return f"{value} (n = 1)"
        plural = "s" if self.num_single > 1 else ""
        return f"{value} (n = 1 in {self.num_single} dataset{plural})"


def _estimate(
    groups: Sequence[Sequence[np.ndarray]], statistic: Callable[..., np.ndarray]
) -> Estimate:
    """The statistic of all samples; `groups` holds each dataset's samples."""
    samples = [sample for group in groups for sample in group]
    value = float(statistic(*samples, axis=-1))
    num_single = sum(min(map(len, group)) == 1 for group in groups)
    if num_single:
        return Estimate(value, None, None, num_single, len(groups))
    interval = stats.bootstrap(
        samples,
        statistic,
        n_resamples=RESAMPLES,
        vectorized=True,
        paired=False,  # each sample is resampled by itself: datasets are strata
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high), 0, len(groups))


def iqm(strata: Sequence[np.ndarray]) -> Estimate:
    """The mean of the middle half of all scores; `strata` has an (n,) per dataset."""

    def statistic(*samples: np.ndarray, axis: int) -> np.ndarray:
        pooled = np.concatenate(samples, axis=axis)
        return stats.trim_mean(pooled, 0.25, axis=axis)

    return _estimate([(sample,) for sample in strata], statistic)


def improvement(x: Sequence[np.ndarray], y: Sequence[np.ndarray]) -> Estimate:
    """The probability that a run of x exceeds one of y; ties count half.

    Mann and Whitney's U / (n m), averaged over datasets; a stratum each.
    """

    def statistic(*samples: np.ndarray, axis: int) -> np.ndarray:
        assert axis == -1  # the resamples, if any, come before it
        wins = []
        for a, b in zip(samples[::2], samples[1::2], strict=True):
            difference = a[..., :, None] - b[..., None, :]
            wins.append((np.sign(difference) / 2 + 0.5).mean((-2, -1)))
        return np.mean(wins, axis=0)

    return _estimate(list(zip(x, y, strict=True)), statistic)


def values(runs: Sequence[Run], column: str, factor: float = 1.0) -> np.ndarray:
    """The column at each run's last evaluation, (n,); runs without a value left out."""
    found = np.array([float(run.rows[-1][column] or "nan") for run in runs])
    return factor * found[~np.isnan(found)]


def spread(runs: Sequence[Run], column: str, factor: float = 1.0) -> str:
    """`mean ± sd (n = 3)`; without sd where there is one value, without n for data.

    `n = 3 of 4`: one run ended without a number. †: runs of more than one code.
    """
    sample = values(runs, column, factor)
    if not len(sample):
        return "-"
    mean = f"{sample.mean():.1f}"
    if runs[0].method == "data":
        return mean
    sd = f" ± {sample.std(ddof=1):.1f}" if len(sample) > 1 else ""
    lost = f" of {len(runs)}" if len(sample) < len(runs) else ""
    mixed = "†" if len({run.code_hash for run in runs}) > 1 else ""
    return f"{mean}{sd} (n = {len(sample)}{lost}){mixed}"


# -------------------------------------------------------------------------- tables


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table as Markdown."""
    every = [head, ["---"] * len(head), *lines]
    made = ["| " + " | ".join(line) + " |" for line in every]
    made[1] = made[1].replace(" ", "")
    return "\n".join(made)


def quick_table(
    rows: Sequence[Row], step: int = sweeps.TABLES["quick"].num_updates
) -> str:
    """Success and steps on the embedded maze after `step` updates, a line a method."""
    runs = runs_of(rows)
    base = values(chosen(runs, "BC", EMBEDDED, step), "length")
    lines = []
    for method in METHODS:
        own = chosen(runs, method, EMBEDDED, step)
        steps = values(own, "length")
        if not own:
            continue
        line = [method, spread(own, "success", 100), spread(own, "length"), "-", "-"]
        if method != "data" and len(steps):
            line[3] = iqm([steps]).text()
            if method != "BC" and len(base):
                line[4] = improvement([-steps], [-base]).text(2)
        lines.append(line)
    head = ["method", "success, %", "steps to the goal"]
    head += ["IQM of steps [95 %]", "P(fewer steps than BC) [95 %]"]
    return markdown(head, lines) if lines else NOT_YET


def score_table(
    rows: Sequence[Row],
    datasets: Sequence[str],
    step: int,
    methods: Sequence[str] = METHODS,
) -> str:
    """Scores after `step` updates, a line per dataset; two of a PointMaze."""
    lines = score_lines(runs_of(rows), datasets, step, methods)
    return markdown(["dataset", *methods], lines)


def score_lines(
    runs: Sequence[Run], datasets: Sequence[str], step: int, methods: Sequence[str]
) -> list[list[str]]:
    """A line's label and a cell per method, see `score_table`."""
    lines = []
    for name in datasets:
        if figure_column(name) == "length":
            label = "embedded maze" if name == EMBEDDED else name
            lines.append((name, f"{label}, success %", "score"))
            lines.append((name, f"{label}, steps", "length"))
        else:
            lines.append((name, name, "score"))
    return [
        [label, *(spread(chosen(runs, m, name, step), column) for m in methods)]
        for name, label, column in lines
    ]


def standins(rows: Iterable[Row]) -> list[str]:
    """The stand-in datasets among the rows; those of collect.py come first."""
    own = ("held/", "standin/")
    return sorted({r["dataset"] for r in rows if r["dataset"].startswith(own)})


def updates_on(dataset: str) -> int:
    """How long the runs of `standin_table` are."""
    shorter = {"antmaze": 60_000, "pointmaze": 20_000}
    return next((n for part, n in shorter.items() if part in dataset), 100_000)


def standin_table(rows: Sequence[Row]) -> str:
    """Scores on the stand-ins and the embedded maze after `updates_on` them."""
    runs, lines = runs_of(rows), []
    for name in (*standins(rows), EMBEDDED):
        updates = updates_on(name)
        for label, data, *cells in score_lines(runs, [name], updates, METHODS):
            if set(cells) != {"-"}:
                lines.append([label, f"{updates:,}", data, *cells])
    return markdown(["dataset", "updates", *METHODS], lines)


def factor_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows of `bst-factors` and `bst-factors-maze`, and of other methods."""

    def belongs(row: Row) -> bool:
        study, found = factor_study(row["dataset"]), store.options_of(row)
        at_point = dict(study.further).keys() <= found.keys()
        own = at_point and row["dataset"].endswith(study.datasets)
        return own and variant(row["dataset"], found) in study.variants

    return [row for row in rows if row["algorithm"] != "td3_bst" or belongs(row)]


def aggregate_table(
    rows: Sequence[Row],
    step: int = 100_000,
    datasets: Sequence[str] | None = None,
    methods: Sequence[str] = COMPARED,
) -> str:
    """IQM, mean and P(TD3-BST > method) over the datasets that all methods have run.

    Args:
        rows: of results.
        step: the number of updates.
        datasets: those that may enter; if not given, all but the embedded maze.
        methods: those that a dataset must have; others that have all of them come too.
    """
    runs = runs_of(rows)
    if datasets is None:
        datasets = sorted({run.dataset for run in runs} - {EMBEDDED})
    scores = {
        method: {
            name: values(chosen(runs, method, name, step), "score") for name in datasets
        }
        for method in METHODS
    }
    common = [n for n in datasets if all(len(scores[m][n]) for m in methods)]
    if not common:
        return f"No dataset has scores of all of {', '.join(methods)} yet."
    lines = []
    ours = [scores["TD3-BST"][name] for name in common]
    for method in METHODS[1:]:
        own = [scores[method][name] for name in common]
        if all(map(len, own)):
            compared = method != "TD3-BST" and all(map(len, ours))
            wins = improvement(ours, own).text(2) if compared else "-"
            mean = np.mean([sample.mean() for sample in own])
            lines.append([method, iqm(own).text(), f"{mean:.1f}", wins])
    head = ["method", "IQM of score [95 %]", "mean", "P(TD3-BST > method) [95 %]"]
    names = ", ".join(f"`{name}`" for name in common)
    return f"Over {names}, which all methods have run:\n\n{markdown(head, lines)}"


def ablation_table(rows: Sequence[Row]) -> str:
    """TD3-BST at each of the sweep's lam, a line per dataset and lam; data first."""
    runs = runs_of(rows)
    found = by_scale(runs)
    in_maze = any(row["success"] for row in rows if row["dataset"] in found)
    lines = []
    for dataset, by_lam in found.items():
        data = chosen(runs, "data", dataset, 0)
        groups = [(data, "data")] if data else []
        groups += [(by_lam[lam], lam_label(lam, dataset)) for lam in by_lam]
        for own, label in groups:
            updates = f"{own[0].step:,}" if own[0].step else "-"
            cells = [dataset, label, updates, spread(own, "score")]
            if in_maze:
                maze = own[0].rows[-1]["success"]
                cells.append(spread(own, "length") if maze else "-")
            lines.append(cells)
    head = ["dataset", "lam", "updates", "score"]
    if in_maze:
        head[-1] += " (mazes: success, %)"
        head.append("steps to the goal")
    return markdown(head, lines) if lines else NOT_YET


def factor_table(rows: Sequence[Row], step: int) -> str:
    """TD3-BST with options changed, a line per change, a column per dataset."""
    found = by_variant(runs_of(rows), step)
    labels = dict.fromkeys(label for own in found.values() for label in own)
    lines = [
        [
            f"`{label}`",
            *(spread(found[d].get(label, []), figure_column(d)) for d in found),
        ]
        for label in labels
    ]
    head = ["changed", *(f"{d}, {NAMES[figure_column(d)]}" for d in found)]
    return markdown(head, lines) if lines else NOT_YET


def parts_table(rows: Sequence[Row], step: int = 100_000) -> str:
    """What the parts of TD3-BST add on two hopper sets; the lines are `PARTS`."""
    runs, lines = runs_of(rows), []
    for label, method, asked in PARTS:
        cells = []
        for dataset in NOISE:
            options = {
                name: value if isinstance(value, str) else value[dataset]
                for name, value in asked.items()
                if isinstance(value, str) or dataset in value
            }
            cells.append(spread(chosen(runs, method, dataset, step, options), "score"))
        lines.append([label, *cells])
    return markdown(["", *(f"`{dataset}`" for dataset in NOISE)], lines)


def constants_table(rows: Sequence[Row]) -> str:
    """The embedded maze with an omega that is the same in every state, and TD3-BST."""
    step = sweeps.TABLES["bst-factors-maze"].num_updates
    found = by_variant(runs_of(factor_rows(rows)), step).get(EMBEDDED, {})
    shown = {
        f"omega = {sweeps.variant_options(label)['floor']}": found[label]
        for label in sweeps.CONSTANTS
        if label in found
    }
    shown["TD3-BST, also through omega"] = found.get(sweeps.THROUGH, [])
    shown["TD3-BST"] = found.get(sweeps.PLAIN, [])
    lines = [
        [label, spread(runs, "score"), spread(runs, "length")]
        for label, runs in shown.items()
    ]
    return markdown(["embedded maze", "success, %", "steps to the goal"], lines)


def figure_column(dataset: str) -> str:
    """What tells runs apart: steps in a PointMaze, where the score is soon 100."""
    return "length" if "pointmaze" in dataset else "score"


# ---------------------------------------------------------- beside published numbers


def read_references(path: Path) -> list[Row]:
    """Published scores: dataset, method, score, sd, evidence, source."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _reference(row: Mapping[str, str]) -> str:
    """`60.4 ± 3.5 (read, CORL)`."""
    begins = [
        whose for begin, whose in WHOSE.items() if row["source"].startswith(begin)
    ]
    number = f"{float(row['score']):.1f}"
    if row["sd"]:
        number += f" ± {float(row['sd']):.1f}"
    return f"{number} ({row['evidence']}, {(begins or [row['source']])[0]})"


def _official(
    rows: Sequence[Row],
    references: Sequence[Mapping[str, str]],
    datasets: Mapping[str, Sequence[str]],
) -> str:
    """A line per dataset and method; `datasets` has the references' names of each."""
    runs, lines = runs_of(rows), []
    for dataset, names in datasets.items():
        for method in COMPARED:
            own = spread(chosen(runs, method, dataset, 1_000_000), "score")
            published = [
                _reference(row)
                for row in references
                if row["method"] == method and row["dataset"] in names
            ]
            table = "locomotion" if dataset in sweeps.D4RL else "antmaze"
            command = f"uv run results/reproduce.py {table} --datasets {dataset}"
            command += f" --methods {method}"
            ours = "not run here" if own == "-" else own
            line = [dataset, method, ours, "; ".join(published) or "-", f"`{command}`"]
            lines.append(line)
    return markdown(["dataset", "method", "ours", "published", "command"], lines)


def official_table(rows: Sequence[Row], references: Sequence[Mapping[str, str]]) -> str:
    """D4RL's nine -v2 locomotion sets, after 1,000,000 updates."""
    return _official(rows, references, {name: [name] for name in sweeps.D4RL})


def official_antmaze_table(
    rows: Sequence[Row], references: Sequence[Mapping[str, str]]
) -> str:
    """Minari's AntMaze sets beside what was published on D4RL's."""
    names = {}
    for dataset in sweeps.ANTMAZE:
        maze = "antmaze-" + dataset.removeprefix("D4RL/antmaze/").removesuffix("-v1")
        names[dataset] = [maze, f"{maze}-v2"]
    table = _official(rows, references, names)
    return (
        "Ours would be on Minari's `D4RL/antmaze/*-v1`: new roll-outs, not the D4RL "
        "-v2 data\non which the published numbers were measured, and evaluated in "
        "another environment. The\ntwo columns stand side by side; neither reproduces "
        f"the other.\n\n{table}"
    )


def cost_table(rates: Sequence[sweeps.Rate]) -> str:
    """What the named tables take on the devices that were measured, and on a GPU."""
    devices = list(dict.fromkeys(rate["device"] for rate in rates))
    if all("cpu" in device for device in devices):
        devices.append("a GPU")
    lines = []
    for name, sweep in sweeps.TABLES.items():
        jobs = sweeps.jobs(sweep, dict.fromkeys(sweep.datasets, 1))
        spent = sweeps.total(jobs, rates)
        known = [spent.get(device) for device in devices]
        costs = ["not measured" if c is None else sweeps.duration(c) for c in known]
        policies = sum(job.lanes for job in jobs)
        counts = [str(len(jobs)), str(policies), f"{sweep.num_updates:,}"]
        lines.append([f"`{name}`", *counts, *costs])
    head = ["table", "processes", "policies", "updates of each", *devices]
    return markdown(head, lines)


def rate_table(rates: Sequence[sweeps.Rate]) -> str:
    """The measured rates themselves."""
    names = sweeps.RATE_COLUMNS[:-1]
    lines = sorted([rate[name] or "-" for name in names] for rate in rates)
    return markdown([name.replace("_", " ") for name in names], lines)


# --------------------------------------------------------------------------- pages


def report(rows: Sequence[Row], name: str) -> str:
    """A sweep's report, by the name of its table."""
    runs = runs_of(rows)
    step = largest_step(runs)
    if name == "ablation-scale":
        return ablation_table(rows)
    if name.startswith("bst-factors"):
        step = max((run.step for run in runs), default=0)
        return f"After {step:,} updates:\n\n{factor_table(rows, step)}"
    if name not in ("quick", "locomotion", "antmaze"):
        raise ValueError(f"expected one of {', '.join(sweeps.TABLES)}, got {name}")
    about = f"After {step:,} updates: last evaluation, mean ± sample sd over seeds."
    if name == "quick" and {run.dataset for run in runs} == {EMBEDDED}:
        return f"{about}\n\n{quick_table(rows, step)}"
    datasets = sorted({run.dataset for run in runs})
    methods = [m for m in METHODS if any(run.method == m for run in runs)]
    table = score_table(rows, datasets, step, methods)
    own = [m for m in methods if m in COMPARED]
    together = aggregate_table(rows, step, methods=own)
    return f"{about}\n\n{table}\n\n{together}"


def pages(
    rows: Sequence[Row],
    references: Sequence[Mapping[str, str]],
    rates: Sequence[sweeps.Rate],
) -> dict[str, dict[str, str]]:
    """The tables of each page, by marker."""
    both = f"{standin_table(rows)}\n\n{aggregate_table(rows, datasets=standins(rows))}"
    return {
        "README.md": {
            "embedded": quick_table(rows, 20_000),
            "standins": both,
            "ablation": ablation_table(rows),
        },
        "results/bst_study.md": {
            "study": standin_table(rows),
            "parts": parts_table(rows),
            "constants": constants_table(rows),
            "factors": factor_table(
                factor_rows(rows), sweeps.TABLES["bst-factors"].num_updates
            ),
        },
        "results/README.md": {
            "quick": quick_table(rows),
            "cost": cost_table(rates),
            "rates": rate_table(rates),
            "official": official_table(rows, references),
            "official-antmaze": official_antmaze_table(rows, references),
        },
    }


def with_tables(text: str, tables: Mapping[str, str]) -> str:
    """The page with each table between its markers; other markers stay as they are.

    Raises:
        ValueError: a table's markers are not there, once and in order.
    """
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"expected one pair of the markers {begin} and {end}")
        head, rest = text.split(begin)
        if end not in rest:
            raise ValueError(f"expected {begin} before {end}")
        text = f"{head}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    return text


def update(root: Path, check: bool) -> None:
    """Writes the tables into the pages, or exits if a page has others."""
    rows = store.read(root / "results" / "runs.csv")
    references = read_references(root / "results" / "reference_scores.csv")
    rates = sweeps.read_rates(root / "results" / "rates.csv")
    made = {}
    for name, tables in pages(rows, references, rates).items():
        text = (root / name).read_text(encoding="utf-8")
        try:
            made[name] = with_tables(text, tables)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if check and made[name] != text:
            raise ValueError(
                f"{name} differs from results/runs.csv: run results/tables.py"
            )
    for name, text in made.items():
        if not check:
            (root / name).write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None, root: Path = store.ROOT) -> None:
    """Writes the tables, or checks them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    try:
        update(root, args.check)
    except (OSError, ValueError) as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
