"""A run's diagnosis: its numbers by hand, and that every script's runs have one."""

import csv
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import iql_bst
import td3_bc
import td3_bst
from common.errors import UserError
from results import diagnose

SMALL = ("--num-updates", "40", "--eval-every", "20", "--num-morse-updates", "20")
SMALL = (*SMALL, "--hidden-dims", "8", "8", "--batch-size", "16", "--num-seeds", "2")
CONFIG = SimpleNamespace(reward_scale=2.0, reward_shift=-1.0, discount=0.5)


def test_returns_to_go_by_hand():
    # Rewards 1, 2, 3 become 1, 3, 5: 5; 3 + 2.5 = 5.5; 1 + 2.75 = 3.75.
    episode = {"reward": np.array([1.0, 2.0, 3.0]), "terminal": True}
    assert diagnose.returns_to_go(episode, CONFIG).tolist() == [3.75, 5.5, 5.0]


def test_a_return_that_was_cut_off_does_not_count():
    # Cut after 6 steps, a share .5^n of the value n steps before is missing: of that
    # 6 steps before .0156, 5 steps .03125, 4 steps .0625, which is above .05.
    episode = {"reward": np.ones(6), "terminal": False}
    found = diagnose.returns_to_go(episode, CONFIG)
    assert np.isnan(found).tolist() == [False, False, True, True, True, True]
    assert found[1] == pytest.approx(2 * (1 - 0.5**5))


def test_radius_is_where_certainty_halves():
    profile = np.interp(diagnose.RADII, [0.0, 0.4, 0.6], [0.8, 0.8, 0.0])
    # .8 to 0 between .4 and .6, seen at .4, .5 and .6: half of .8 at .5.
    assert diagnose.radius(profile) == pytest.approx(0.5)
    assert diagnose.radius(np.ones(len(diagnose.RADII))) == math.inf


def test_nearest_action_of_the_states_nearby():
    # 52 states; action i / 100 at state i: near state 0 those of 51 neighbours.
    states = np.arange(52.0)[:, None]
    known = {"tree": diagnose.KDTree(states), "action": states / 100}
    at, action = np.zeros((1, 1)), np.array([[0.0]])
    # The state's own action, 0, does not count: the next is .01 away.
    assert diagnose.nearest_action(action, at, known) == pytest.approx(1e-4)
    # Action .515 at state 0: 51 neighbours of it, 1 to 50, of which .50 is nearest.
    far = diagnose.nearest_action(np.array([[0.515]]), at, known)
    assert far == pytest.approx(0.015**2)


@pytest.mark.parametrize(
    ("script", "more"),
    [
        (td3_bst, ("--sweep", "mu=0.1,0.5")),
        (td3_bc, ()),
        (iql_bst, ("--floor", "0.7", "--omega-cap", "0.001")),
        (iql_bst, ("--policy-step", "awr")),
    ],
    ids=("bst", "bc", "iql-bst", "iql"),
)
def test_a_run_has_a_row_per_policy(script, more, capsys, tmp_path, pendulum):
    args = ["--dataset", pendulum, "--run-dir", str(tmp_path), *SMALL, *more]
    script.main([*args, "--eval-episodes", "1"])
    folder = Path(capsys.readouterr().out.splitlines()[-1])
    options = diagnose.Options((folder,), episodes=2, points=50)
    diagnose.diagnose(folder, options)
    with (folder / "diagnosis.csv").open() as file:
        rows = list(csv.DictReader(file))
    labels = [path.stem for path in sorted((folder / "policy").glob("*.safetensors"))]
    assert sorted(row["policy"] for row in rows) == labels
    assert len(labels) == (4 if more[:1] == ("--sweep",) else 2)
    for row in rows:
        for name in ("certainty_data", "certainty_policy", "certainty_uniform"):
            assert 0 < float(row[name]) <= 1
        assert float(row["distance"]) > 0
        assert float(row["rollout_length"]) >= 1
        assert bool(row["omega"]) == (script is not td3_bc and "awr" not in more)
        if "--floor" in more:  # the script's own omega, with its floor and its cap
            assert float(row["omega"]) == pytest.approx(0.701, abs=1e-3)
    assert (folder / "diagnosis.png").stat().st_size > 10_000


def test_a_run_that_cannot_be_looked_at_says_why(capsys, tmp_path, pendulum):
    args = ["--dataset", pendulum, "--run-dir", str(tmp_path), *SMALL]
    td3_bc.main([*args, "--num-morse-updates", "0", "--eval-episodes", "1"])
    folder = Path(capsys.readouterr().out.splitlines()[-1])
    with pytest.raises(UserError, match="has no Morse network"):
        diagnose.load(folder)
    (folder / "result.json").unlink()
    with pytest.raises(UserError, match="not a finished run"):
        diagnose.load(folder)
    with pytest.raises(UserError, match=r"cannot read .*config\.json"):
        diagnose.load(tmp_path)
