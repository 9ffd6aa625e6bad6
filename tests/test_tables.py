"""Which rows a table shows, and its statistics against numbers worked out by hand."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from results import figures, store, sweeps, tables

HOPPER, CHEETAH = "standin/mujoco/hopper/medium-v0", "standin/mujoco/halfcheetah"
OPTIONS = {  # of each method, less the number of updates
    "BC": ("td3_bc", {"alpha": 0}),
    "10%BC": ("td3_bc", {"alpha": 0, "best_fraction": 0.1}),
    "TD3+BC": ("td3_bc", {}),
    "TD3-BST": ("td3_bst", {}),
    "IQL": ("iql_bst", {"policy_step": "awr", "num_morse_updates": 0}),
    "IQL-BST": ("iql_bst", {"policy_step": "bst"}),
}


def data(dataset: str, score: float, length: float = 9.0) -> store.Row:
    row = dict.fromkeys(store.COLUMNS, "")
    row |= {"algorithm": "data", "dataset": dataset, "length": str(length)}
    return row | {"score": str(score), "success": str(score / 100)}


def row(
    method: str,
    dataset: str,
    seed: int,
    score: float,
    step: int = 100_000,
    code: str = "c",
    length: float = 9.0,
    **options: object,
) -> store.Row:
    algorithm, own = OPTIONS[method]
    given = {"num_updates": step, **own, **options}
    return data(dataset, score, length) | {
        "algorithm": algorithm,
        "options": store.options_text(given),
        "seed": str(seed),
        "step": str(step),
        "code_hash": code,
    }


def cells(table: str, first: str) -> list[str]:
    """The cells of the line that begins with `first`."""
    lines = [[c.strip() for c in x.strip("|").split("|")] for x in table.splitlines()]
    (line,) = [line[1:] for line in lines if line[0] == first]
    return line


@pytest.mark.parametrize("method", OPTIONS)
def test_a_run_is_named_by_its_method(method: str):
    (run,) = tables.runs_of([row(method, HOPPER, 0, 1.0)])
    assert run.method == method
    assert method in tables.METHODS
    assert tables.is_plain(run)


# ---------------------------------------------------------------------- statistics


def test_interquartile_mean():
    # 1 of 4 goes at either end: (2 + 3) / 2
    assert tables.iqm([np.array([3.0, 100.0, 1.0, 2.0])]).value == 2.5
    # 2 of 8, pooled: 0 1 | 2 3 10 20 | 30 1000
    pooled = tables.iqm([np.arange(4.0), np.array([10.0, 20.0, 30.0, 1000.0])])
    assert pooled.value == 35 / 4
    # of 3 none: int(3 / 4) = 0
    assert tables.iqm([np.array([1.0, 2.0, 6.0])]).value == 3.0


def test_interval_contains_the_estimate_and_uses_uneven_seeds():
    rng = np.random.default_rng(1)
    strata = [rng.normal(50, 10, 5), rng.normal(20, 3, 3)]
    made = tables.iqm(strata)
    assert made.low is not None
    assert made.high is not None
    assert made.low < made.value < made.high
    assert tables.iqm(strata) == made  # the same numbers every time


def test_interval_resamples_within_datasets_only():
    # 5 5 5 7 7 7 less one at either end: (5 + 5 + 7 + 7) / 4. Seeds of a dataset
    # agree, so nothing varies, though datasets differ.
    same = tables.iqm([np.full(3, 5.0), np.full(3, 7.0)])
    assert same == (6.0, 6.0, 6.0, 0, 2)


def test_no_interval_where_a_dataset_has_one_seed():
    one = tables.iqm([np.array([4.0, 5.0]), np.array([9.0])])
    assert one == (6.0, None, None, 1, 2)
    assert one.text() == "6.0 (n = 1 in 1 dataset)"
    assert tables.iqm([np.array([9.0])]).text() == "9.0 (n = 1)"
    wins = tables.improvement(
        [np.array([1.0]), np.array([1.0, 2.0])], [np.zeros(2), np.zeros(1)]
    )
    assert wins.text(2) == "1.00 (n = 1 in 2 datasets)"


def test_probability_of_improvement():
    low, high = np.array([1.0, 2.0]), np.array([3.0, 4.0, 5.0])
    assert tables.improvement([high], [low]) == (1.0, 1.0, 1.0, 0, 1)
    assert tables.improvement([low], [high]) == (0.0, 0.0, 0.0, 0, 1)
    assert tables.improvement([np.ones(2)], [np.ones(3)]) == (0.5, 0.5, 0.5, 0, 1)
    # (1, 3) against (2, 3): no, no, yes, tie: 1.5 / 4; with the dataset above: / 2
    x, y = np.array([1.0, 3.0]), np.array([2.0, 3.0])
    assert tables.improvement([x], [y]).value == 0.375
    both = tables.improvement([x, high], [y, low])
    assert both.value == (0.375 + 1) / 2
    assert both.low is not None
    assert both.high is not None
    assert both.low < both.value < both.high
    assert both.low >= 0.5  # the second dataset's 1 never varies


def test_probability_is_that_of_mann_and_whitney():
    rng = np.random.default_rng(2)
    x, y = rng.integers(0, 6, 7).astype(float), rng.integers(0, 5, 4).astype(float)
    expected = mannwhitneyu(x, y).statistic / 28
    assert tables.improvement([x], [y]).value == pytest.approx(expected)


# ------------------------------------------------------------------------ selection


def test_standins_stand_apart_and_the_last_evaluation_counts():
    rows = [
        row("BC", HOPPER, 0, 50.0),
        row("BC", HOPPER, 0, 99.0, 60_000, num_updates=100_000),  # better, not last
        row("BC", HOPPER, 1, 53.0),
        row("BC", HOPPER, 2, 77.0, 60_000),  # another number of updates
        row("BC", HOPPER, 3, 77.0, num_updates=200_000),  # on its way
        row("BC", "hopper-medium-v2", 0, 2.0),
        data(HOPPER, 41.0),
    ]
    table = tables.standin_table(rows)
    assert "hopper-medium-v2" not in table  # official data are never among them
    # mean 51.5, sd sqrt(2 * 1.5^2 / 1) = 2.12
    found = ["100,000", "41.0", "51.5 ± 2.1 (n = 2)", *["-"] * 5]
    assert cells(table, HOPPER) == found


def test_some_standins_have_shorter_runs():
    antmaze = "standin/D4RL/antmaze/umaze-v1"
    rows = [row("BC", antmaze, 0, 40.0, 60_000), row("BC", antmaze, 1, 9.0, 100_000)]
    rows += [row("BC", tables.EMBEDDED, 0, 97.0, 20_000)]
    table = tables.standin_table(rows)
    assert cells(table, antmaze)[:3] == ["60,000", "-", "40.0 (n = 1)"]
    found = cells(table, "embedded maze, success %")
    assert found[:3] == ["20,000", "-", "97.0 (n = 1)"]
    assert len({line.count("|") for line in table.splitlines()}) == 1


def test_the_factor_study_is_known_by_its_own_options():
    cheetah = "standin/mujoco/halfcheetah/medium-v0"
    point: Any = dict(sweeps.TABLES["bst-factors"].further)

    def run(dataset: str, score: float, **options: Any) -> store.Row:
        return row("TD3-BST", dataset, 0, score, 20_000, **options)

    rows = [run(cheetah, 10.0, **point), run(cheetah, 20.0, **point, mu=0.5)]
    rows += [run(cheetah, 30.0, **point | {"q_weight": 3})]
    short = run(cheetah, 7.0, **point | {"num_morse_updates": 7})
    (labels,) = tables.by_variant(tables.runs_of([short]), 20_000).values()
    assert list(labels) == ["num_morse_updates=7"]
    brief: Any = {"num_morse_updates": 8000}
    maze: Any = dict(sweeps.TABLES["bst-factors-maze"].further)
    rows += [run(tables.EMBEDDED, 40.0, **maze)]
    rows += [run(tables.EMBEDDED, 50.0, **maze, **brief, floor=0)]
    others = [short, run(cheetah, 91.0, **brief), run(cheetah, 92.0)]
    others += [run(cheetah, 93.0, **point, mu=0.4), run(HOPPER, 94.0, **point)]
    others += [run(tables.EMBEDDED, 95.0, **maze, num_morse_updates=2500)]
    others += [run(tables.EMBEDDED, 96.0, **maze, **brief, floor=0, mu=0.5)]
    others += [run(tables.EMBEDDED, 98.0)]
    others += [run("held/pointmaze/medium-v0", 97.0)]
    others += [row("BC", HOPPER, 0, 5.0)]
    found = tables.factor_rows([*rows, *others])
    scores = ["10.0", "20.0", "30.0", "40.0", "50.0", "5.0"]
    assert [r["score"] for r in found] == scores
    groups = tables.by_variant(tables.runs_of(found), 20_000)
    assert list(groups[cheetah]) == ["plain", "mu=0.5", "q_weight=3"]
    assert list(groups[tables.EMBEDDED]) == ["plain", "floor=0"]


def test_ablations_never_enter_a_method():
    rows = [row("TD3-BST", HOPPER, 0, 10.0, eval_every=5000, eval_episodes=10)]
    rows += [row("TD3-BST", HOPPER, 1, 90.0, scale=0.3)]
    rows += [row("TD3-BST", HOPPER, 2, 90.0, mu=0.3)]
    rows += [row("TD3+BC", HOPPER, 0, 90.0, alpha=10)]
    table = tables.standin_table(rows)
    assert cells(table, HOPPER)[4:6] == ["-", "10.0 (n = 1)"]
    assert cells(table, HOPPER)[3] == "-"


def test_a_line_is_of_runs_of_its_own_length_and_of_one_at_least():
    maze, other = "held/D4RL/antmaze/umaze-v1", "held/mujoco/ant/medium-v0"
    rows = [data(maze, 1.0), data(other, 2.0), row("TD3-BST", maze, 0, 10.0, 60_000)]
    rows += [row("TD3-BST", other, 0, 90.0, 50_000), row("TD3-BST", HOPPER, 0, 20.0)]
    table = tables.standin_table(rows)
    assert cells(table, maze)[:5] == ["60,000", "1.0", "-", "-", "-"]
    assert cells(table, maze)[5] == "10.0 (n = 1)"
    assert cells(table, HOPPER)[0] == "100,000"
    assert other not in table


def codes(rows: list[store.Row]) -> list[str]:
    runs = tables.runs_of(store.merged(rows))  # in a file's order
    return [r.code_hash for r in tables.chosen(runs, "IQL", HOPPER, 100_000)]


def test_no_seed_counts_twice():
    now = store.code_hash("iql_bst")
    rows = [row("IQL", HOPPER, seed, 10.0, code="zz") for seed in (0, 1, 2)]
    rows += [row("IQL", HOPPER, seed, 20.0, code="aa") for seed in (0, 1)]
    assert codes(rows) == codes(rows[::-1]) == ["zz", "zz", "zz"]  # has most seeds
    rows += [row("IQL", HOPPER, 3, 20.0, code="aa")]
    rows += [row("IQL", HOPPER, 4, 20.0, code="aa")]
    assert codes(rows) == ["aa", "aa", "zz", "aa", "aa"]
    rows += [row("IQL", HOPPER, seed, 30.0, code=now) for seed in (1, 2)]
    assert codes(rows) == ["aa", now, now, "aa", "aa"]  # the present code's first
    assert cells(tables.standin_table(rows), HOPPER)[6] == "24.0 ± 5.5 (n = 5)†"
    assert "†" not in tables.standin_table(rows[:5])
    # of one code: the later run
    twice = [row("BC", HOPPER, 0, 1.0), row("BC", HOPPER, 0, 2.0, eval_every=500)]
    (run,) = tables.chosen(tables.runs_of(twice), "BC", HOPPER, 100_000)
    assert run.rows[-1]["score"] == "2.0"


def test_missing_values_are_no_seeds():
    rows = [row("BC", HOPPER, seed, 30.0) for seed in (0, 1, 2)]
    rows[1]["score"], rows[2]["score"] = "", "nan"
    assert cells(tables.standin_table(rows), HOPPER)[2] == "30.0 (n = 1 of 3)"


# --------------------------------------------------------------------------- tables


def test_quick_table():
    rows = [data(tables.EMBEDDED, 100.0, 158.0)]
    for seed, (ours, cloned) in enumerate([(100.0, 170.0), (110.0, 180.0)]):
        rows += [row("TD3-BST", tables.EMBEDDED, seed, 99.0, 6_000, length=ours)]
        rows += [row("BC", tables.EMBEDDED, seed, 100.0, 6_000, length=cloned)]
        rows += [row("BC", tables.EMBEDDED, seed, 100.0, 20_000, length=1.0)]
    table = tables.quick_table(rows)
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [
        "| data",
        "| BC",
        "| TD3-BST",
    ]
    assert cells(table, "data") == ["100.0", "158.0", "-", "-"]
    assert cells(table, "TD3-BST") == [
        "99.0 ± 0.0 (n = 2)",
        "105.0 ± 7.1 (n = 2)",
        "105.0 [100.0, 110.0]",
        "1.00 [1.00, 1.00]",  # fewer steps are better
    ]
    assert cells(table, "BC")[3] == "-"


def aggregate_rows() -> list[store.Row]:
    rows = [
        row(method, dataset, seed, 10.0 * i + seed)
        for i, method in enumerate(tables.COMPARED)
        for dataset in (HOPPER, CHEETAH)
        for seed in (0, 1)
    ]
    rows += [row("10%BC", HOPPER, 0, 5.0), row("BC", "standin/other", 0, 1e3)]
    return rows


def test_aggregates_are_over_datasets_that_all_methods_have():
    table = tables.aggregate_table(aggregate_rows())
    assert f"Over `{CHEETAH}`, `{HOPPER}`, which" in table
    assert "10%BC" not in table  # it has one of the two
    # BC: 0 1 0 1, less one at either end; TD3-BST is the third
    assert cells(table, "BC") == ["0.5 [0.0, 1.0]", "0.5", "1.00 [1.00, 1.00]"]
    assert cells(table, "TD3-BST")[1:] == ["20.5", "-"]
    assert cells(table, "IQL")[2] == "0.00 [0.00, 0.00]"


def test_no_aggregate_without_a_common_dataset():
    assert tables.aggregate_table([row("BC", HOPPER, 0, 1.0)]).startswith("No dataset")


def test_ablation_table():
    def run(dataset: str, seed: int, scale: float, score: float, step: int = 50_000):
        return row("TD3-BST", dataset, seed, score, step, scale=scale)

    rows = [data(HOPPER, 41.0)]
    rows += [row("TD3-BST", HOPPER, 1, 99.0, 50_000, scale=3, omega_cap=5)]  # another
    rows += [
        run(HOPPER, s, lam, 10 * lam + s) for lam in (0.3, 1.5, 3, 6) for s in (0, 2)
    ]
    rows += [row("TD3-BST", HOPPER, 4, 99.0, 50_000, scale=3, omega_cap=0)]  # fewer
    rows += [run(HOPPER, 5, 3, 99.0, 20_000), run(CHEETAH, 0, 0.7, 5.0)]
    rows += [row("TD3-BST", HOPPER, 7, 99.0), row("TD3-BST", HOPPER, 7, 99.0, mu=1)]
    rows += [row("TD3-BST", HOPPER, 9, 99.0, 50_000, scale=3, num_updates=90_000)]
    lines = tables.ablation_table(rows).splitlines()[2:]
    made = [[c.strip() for c in line.strip("|").split("|")][:4] for line in lines]
    assert made == [
        [CHEETAH, "0.1167k = 0.7", "50,000", "5.0 (n = 1)"],
        [HOPPER, "data", "-", "41.0"],
        [HOPPER, "k/10 = 0.3", "50,000", "4.0 ± 1.4 (n = 2)"],
        [HOPPER, "k/2 = 1.5", "50,000", "16.0 ± 1.4 (n = 2)"],
        [HOPPER, "k = 3", "50,000", "31.0 ± 1.4 (n = 2)"],
        [HOPPER, "2k = 6", "50,000", "61.0 ± 1.4 (n = 2)"],
    ]


def test_factor_table():
    rows = [data(HOPPER, 41.0)]
    for seed in (0, 2):
        rows += [row("TD3-BST", HOPPER, seed, 50.0 + seed, 50_000, eval_every=5000)]
        rows += [row("TD3-BST", HOPPER, seed, 30.0 + seed, 50_000, mu=1, floor=0)]
        rows += [row("TD3-BST", tables.EMBEDDED, seed, 100.0, 50_000, length=90 + seed)]
    rows += [row("TD3-BST", HOPPER, 5, 9.0, 20_000, mu=1, floor=0)]  # another length
    rows += [row("TD3-BST", HOPPER, 6, 9.0, 50_000, num_updates=90_000)]  # unfinished
    rows += [row("TD3+BC", HOPPER, 0, 9.0, 50_000)]
    lines = tables.factor_table(rows, 50_000).splitlines()
    maze = f"{tables.EMBEDDED}, steps to the goal"
    assert lines[0] == f"| changed | {HOPPER}, score | {maze} |"
    assert lines[2:] == [
        "| `plain` | 51.0 ± 1.4 (n = 2) | 91.0 ± 1.4 (n = 2) |",
        "| `floor=0+mu=1` | 31.0 ± 1.4 (n = 2) | - |",
    ]
    assert tables.factor_table(rows, 7) == tables.NOT_YET


def test_parts_table_takes_each_datasets_own_noise_and_default():
    replay = HOPPER.replace("medium", "medium-replay")
    rows = [row("BC", HOPPER, seed, 10.0 + seed) for seed in (0, 2)]
    rows += [row("BC", HOPPER, 0, 20.0, obs_noise=0.119)]
    rows += [row("BC", replay, 0, 99.0, obs_noise=0.119)]  # that of the other one
    rows += [row("BC", replay, 0, 30.0, obs_noise=0.193)]
    rows += [row("TD3+BC", HOPPER, 0, 40.0, n_step=1000)]
    rows += [row("TD3+BC", HOPPER, 0, 99.0, alpha=10, n_step=1000)]  # and another alpha
    rows += [row("TD3-BST", replay, 0, 50.0, mu=1000, floor=3.3)]
    rows += [row("TD3-BST", replay, 1, 99.0, mu=1000)]
    rows += [row("TD3-BST", HOPPER, 0, 60.0), row("TD3-BST", replay, 0, 70.0)]
    rows += [row("TD3-BST", HOPPER, 0, 65.0, supervisor_gradient=True)]
    rows += [row("TD3-BST", replay, 0, 75.0, supervisor_gradient=False)]
    table = tables.parts_table(rows)
    assert cells(table, "BC") == ["11.0 ± 1.4 (n = 2)", "-"]
    assert cells(table, "BC with the noise") == ["20.0 (n = 1)", "30.0 (n = 1)"]
    assert cells(table, "TD3+BC") == ["-", "-"]
    assert cells(table, "TD3+BC with the returns") == ["40.0 (n = 1)", "-"]
    label = "TD3-BST with omega = 3.3"
    assert cells(table, label) == ["-", "50.0 (n = 1)"]
    through, weight = "TD3-BST through omega", "TD3-BST with omega as a weight"
    assert cells(table, through) == ["65.0 (n = 1)", "70.0 (n = 1)"]
    assert cells(table, weight) == ["60.0 (n = 1)", "75.0 (n = 1)"]


def test_constants_table_is_the_mazes_runs_without_a_supervisor():
    def run(score: float, length: float, **options: Any) -> store.Row:
        point: Any = {"actor_learning_rate": 0.0003} | options
        return row("TD3-BST", tables.EMBEDDED, 0, score, 20_000, length=length, **point)

    through: Any = {"supervisor_gradient": True, "floor": 0}
    rows = [run(98.0, 120, **through), run(10.0, 400, **through, mu=0.5)]
    rows += [run(90.0, 130, **through | {"mu": 1000, "floor": 0.15})]
    rows += [run(80.0, 140, **through | {"mu": 1000, "floor": 0.05})]
    rows += [row("TD3-BST", HOPPER, 0, 7.0, 20_000, mu=1000, floor=0.4)]
    # At the constants' point, and at the present default's rate.
    rows += [run(99.0, 110)]
    rows += [row("TD3-BST", tables.EMBEDDED, 0, 97.0, 20_000, length=105)]
    assert tables.constants_table(rows).splitlines()[2:] == [
        "| omega = 0.05 | 80.0 (n = 1) | 140.0 (n = 1) |",
        "| omega = 0.15 | 90.0 (n = 1) | 130.0 (n = 1) |",
        "| TD3-BST, also through omega | 98.0 (n = 1) | 120.0 (n = 1) |",
        "| TD3-BST | 99.0 (n = 1) | 110.0 (n = 1) |",
    ]


@pytest.mark.parametrize(
    ("lam", "dataset", "label"),
    [
        (0.3, "standin/mujoco/hopper/medium-v0", "k/10 = 0.3"),
        (3.0, "halfcheetah-medium-replay-v2", "k/2 = 3"),
        (8.0, "D4RL/antmaze/umaze-v1", "k = 8"),
        (4.0, tables.EMBEDDED, "2k = 4"),
        (0.4, tables.EMBEDDED, "0.2k = 0.4"),  # not the smallest of four
        (0.3, "own/robot-v0", "0.3"),
    ],
)
def test_lam_is_named_by_the_dimension_of_the_actions(lam, dataset, label):
    assert tables.lam_label(lam, dataset) == label


def test_official_tables():
    name = "hopper-medium-v2"

    def own(method: str, dataset: str, seed: int, score: float, step: int, **options):
        made = row(method, dataset, seed, score, step, **options)
        made["options"] = made["options"].replace(" num_updates=1000000", "")
        return made

    rows = [own("BC", name, 0, 50.0, 10**6), row("BC", name, 1, 52.0, 10**6)]
    rows += [row("IQL", name, 0, 99.0), row("TD3+BC", HOPPER, 0, 99.0, 10**6)]
    references = tables.read_references(store.ROOT / "results/reference_scores.csv")
    lines = tables.official_table(rows, references).splitlines()[2:]
    assert len(lines) == 9 * 5
    command = f"uv run results/reproduce.py locomotion --datasets {name} --methods"
    assert [line for line in lines if f"| {name} |" in line][:3] == [
        f"| {name} | BC | 51.0 ± 1.4 (n = 2) | 53.5 ± 1.8 (read, CORL) "
        f"| `{command} BC` |",
        f"| {name} | TD3+BC | not run here | 59.3 (read, original paper); "
        f"60.4 ± 3.5 (read, CORL) "
        f"| `{command} TD3+BC` |",
        f"| {name} | TD3-BST | not run here | 102.9 ± 1.3 (recalled, TD3-BST paper) "
        f"| `{command} TD3-BST` |",
    ]
    mazes = tables.official_antmaze_table(rows, references)
    assert "new roll-outs, not the D4RL -v2 data" in mazes
    assert cells(mazes.replace("-v1 | TD3+BC", "-v1+"), "D4RL/antmaze/umaze-v1+")[
        1
    ] == ("78.6 (read, original paper); 70.8 ± 39.2 (read, CORL)")
    assert mazes.count("\n| D4RL/antmaze/") == 6 * 5
    assert mazes.count("(recalled, TD3-BST paper)") == 12


def test_every_recalled_number_is_marked():
    references = tables.read_references(store.ROOT / "results/reference_scores.csv")
    both = tables.official_table([], references)
    both += tables.official_antmaze_table([], references)
    recalled = [r for r in references if r["evidence"] == "recalled"]
    for r in recalled:
        number = f"{float(r['score']):.1f} ± {float(r['sd']):.1f}"
        assert f"{number} (recalled, TD3-BST paper)" in both
    assert both.count("(recalled, TD3-BST paper)") == len(recalled) == 21
    numbers = re.findall(r"\d+\.\d(?: ± \d+\.\d)?(?= |;)(.{2})", both)
    assert set(numbers) == {" ("}  # none without its mark


def test_reports():
    rows = [*aggregate_rows(), row("TD3-BST", HOPPER, 0, 5.0, 50_000, scale=0.3)]
    assert tables.report(rows, "ablation-scale") == tables.ablation_table(rows)
    made = tables.report(rows, "locomotion")
    assert made.startswith("After 100,000 updates")
    assert tables.aggregate_table(rows) in made
    assert "| dataset | BC | 10%BC |" in made  # no column without a run
    quick = [row("BC", tables.EMBEDDED, 0, 100.0, 2000)]
    assert tables.quick_table(quick, 2000) in tables.report(quick, "quick")
    factors = tables.report(quick, "bst-factors-maze")  # of one without variants
    assert factors == tables.report(quick, "bst-factors")
    with pytest.raises(ValueError, match="expected one of quick, locomotion"):
        tables.report(rows, "other")
    assert tables.report([], "ablation-scale") == tables.NOT_YET


# ---------------------------------------------------------------------------- pages


def project(folder: Path, rows: list[store.Row], text: str = "") -> Path:
    """A folder with the two pages, of which README.md ends with `text`."""
    references = (store.ROOT / "results/reference_scores.csv").read_text("utf-8")
    for name, tables_ in tables.pages([], [], []).items():
        (folder / name).parent.mkdir(exist_ok=True)
        pairs = "".join(f"<!-- {n} -->\nold\n<!-- end {n} -->\n" for n in tables_)
        (folder / name).write_text(f"head\n{pairs}{text}", "utf-8")
    (folder / "results/reference_scores.csv").write_text(references, "utf-8")
    store.write(folder / "results/runs.csv", rows)
    return folder


def test_pages_are_written_and_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = "<!-- mine -->\nleft alone\n<!-- end mine -->\n"
    root = project(tmp_path, [row("BC", HOPPER, 0, 12.3)], other)
    with pytest.raises(SystemExit, match=r"^README.md differs"):
        tables.main(["--check"], root)
    assert "old" in (root / "README.md").read_text("utf-8")
    tables.main([], root)
    page = (root / "README.md").read_text("utf-8")
    assert page.startswith("head\n<!-- embedded -->\n")
    assert "12.3 (n = 1)" in page
    assert "old" not in page
    assert page.endswith(other)
    tables.main(["--check"], root)
    (root / "results/README.md").write_text(
        (root / "results/README.md").read_text("utf-8").replace("recalled", "read")
    )
    with pytest.raises(SystemExit, match=r"^results/README.md differs"):
        tables.main(["--check"], root)


@pytest.mark.parametrize(
    "spoil", ["<!-- embedded -->", "<!-- end standins -->", "again", "order"]
)
def test_a_page_without_markers_is_one_clear_line(tmp_path: Path, spoil: str):
    root = project(tmp_path, [])
    page = root / "README.md"
    text = page.read_text("utf-8")
    if spoil == "again":
        text += "<!-- embedded -->"
    elif spoil == "order":
        text = text.replace("<!-- end embedded -->", "") + "<!-- end embedded -->"
        text = text.replace("<!-- embedded -->", "") + "<!-- embedded -->"
    else:
        text = text.replace(spoil, "")
    page.write_text(text, "utf-8")
    with pytest.raises(SystemExit, match=r"^README.md: expected .*<!-- "):
        tables.main([], root)
    assert page.read_text("utf-8") == text


def test_a_csv_of_another_kind_is_one_clear_line(tmp_path: Path):
    root = project(tmp_path, [])
    (root / "results/runs.csv").write_text("method,score\nBC,1\n")
    with pytest.raises(SystemExit, match="expected the columns algorithm"):
        tables.main([], root)


def test_the_script_runs_from_anywhere_and_does_not_load_jax(tmp_path: Path):
    script = store.ROOT / "results" / "tables.py"
    code = (
        f"import runpy, sys; sys.argv = ['tables.py', '--help']\n"
        f"try: runpy.run_path({str(script)!r}, run_name='__main__')\n"
        f"except SystemExit: assert 'jax' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


# -------------------------------------------------------------------------- figures


def figure_rows() -> list[store.Row]:
    rows = [data(HOPPER, 41.0), data(tables.EMBEDDED, 100.0, 158.0)]
    for dataset, total in ((HOPPER, 50_000), (tables.EMBEDDED, 10_000)):
        for seed in range(3):
            for step in range(total // 5, total + 1, total // 5):
                shown = {"num_updates": total, "length": 300.0 - step / 100}
                score = step / total * 50 + seed
                rows += [
                    row(method, dataset, seed, score, step, **shown)
                    for method in OPTIONS
                ]
                rows += [
                    row("TD3-BST", dataset, seed, score * lam, step, scale=lam, **shown)
                    for lam in (0.3, 1.5, 3.0, 6.0)
                ]
    rows[9]["score"] = ""  # one evaluation is missing
    return rows


def test_figures_are_the_same_bytes_for_the_same_rows(tmp_path: Path):
    rows = figure_rows()
    for draw in (figures.learning_curves, figures.ablation, figures.factors):
        one, two = tmp_path / "one.png", tmp_path / "two.png"
        draw(one, rows)
        draw(two, rows)
        assert one.read_bytes() == two.read_bytes()
        draw(one, [])  # nothing to draw is no error
        assert one.read_bytes() != two.read_bytes()


def test_a_curve_is_over_seeds_that_have_values():
    rows = [
        row("BC", HOPPER, seed, 10.0 * seed + step, step, num_updates=4)
        for seed in (0, 1, 2)
        for step in (2, 4)
    ]
    for bad in rows[-2:]:
        bad["score"] = "nan"  # seed 2 has no value at all
    rows[0]["score"] = ""
    runs = tables.chosen(tables.runs_of(rows), "BC", HOPPER, 4)
    steps, table = figures._evaluations(runs, "score")
    np.testing.assert_array_equal(steps, [2, 4])
    np.testing.assert_array_equal(table, [[np.nan, 12.0], [4.0, 14.0]])


def test_costs_say_what_is_not_measured():
    methods = (*tables.COMPARED, "10%BC")
    rates = [
        dict(
            zip(
                tables.sweeps.RATE_COLUMNS,
                [
                    "cpu, 2 cores",
                    method,
                    "pointmaze",
                    "4",
                    "1000",
                    "1000",
                    "1",
                    "6",
                    "c",
                ],
                strict=True,
            )
        )
        for method in methods
    ]
    # quick: 5 processes of 4 lanes x 6,000 / 1000 + 3 evaluations + 6 = 33 seconds,
    # and 4 x 2500 / 1000 = 10 for the two that fit Morse networks: 185 seconds.
    (line,) = [x for x in tables.cost_table(rates).splitlines() if "`quick`" in x]
    assert line == "| `quick` | 5 | 20 | 6,000 | 3 min | not measured |"
    (line,) = [x for x in tables.cost_table(rates[2:]).splitlines() if "quick" in x]
    assert line.count("not measured") == 2
    assert tables.rate_table(rates).count("pointmaze") == 6
