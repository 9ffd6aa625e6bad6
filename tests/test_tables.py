"""What results/tables.py calls a run, and which rows a table shows."""

from typing import Any

import pytest

from results import tables


@pytest.mark.parametrize(
    ("algorithm", "options", "method"),
    [
        ("td3_bst", {}, "TD3-BST"),
        ("td3_bc", {"alpha": 2.5}, "TD3+BC"),
        ("td3_bc", {"alpha": 0.0}, "BC"),
        ("td3_bc", {"alpha": 0.0, "best_fraction": 0.1}, "10 % BC"),
        ("iql_bst", {"policy_step": "bst", "best_fraction": 1.0}, "IQL-BST"),
        ("iql_bst", {"policy_step": "awr"}, "IQL"),
    ],
)
def test_a_run_is_named_by_its_method(algorithm: str, options: dict, method: str):
    assert tables.method_of(algorithm, options) == method
    assert method in tables.METHODS


def test_standins_stand_apart():
    def row(method: str, dataset: str, step: str, score: float) -> dict[str, Any]:
        return dict(
            method=method, dataset=dataset, step=step, score=str(score), length="9"
        )

    name = "standin/mujoco/hopper/medium-v0"
    rows = [
        row("BC", name, "100000", 50.0),
        row("BC", name, "100000", 53.0),
        row("BC", name, "60000", 1.0),
        row("data", name, "", 41.0),
        row("BC", "hopper-medium-v2", "100000", 2.0),
    ]
    table = tables.standin_table(rows)
    assert "hopper-medium-v2" not in table  # official data are never among them
    (line,) = [x for x in table.splitlines() if name in x]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [name, "41.0", "51.5 ± 2.1 (n = 2)", *["-"] * 5]
