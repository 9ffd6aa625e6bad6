"""A run's diagnosis: its numbers by hand, and that every script's runs have one."""

import csv
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import iql_bst
import td3_bc
import td3_bst
from common.errors import UserError
from common.rollout import NumpyPolicy
from results import diagnose

pytestmark = pytest.mark.usefixtures("short_runs")

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


@pytest.mark.parametrize("agent", ["Hopper-v5", "HalfCheetah-v5", "Walker2d-v5"])
def test_a_simulator_put_back_goes_on_as_it_did(agent, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # MuJoCo logs its warnings to where it is
    env = gym.make(agent)
    env.action_space.seed(0)
    seen, _ = env.reset(seed=1)
    for _ in range(8):  # slowly: beyond 10 a velocity is not shown
        seen, *_ = env.step(0.1 * env.action_space.sample())
    action = env.action_space.sample()
    followed = env.step(action)[:3]
    env.reset(seed=2)
    assert diagnose.put(env, np.asarray(seen, np.float32))
    again = env.step(action)[:3]
    assert np.allclose(again[0], followed[0], atol=1e-3)
    assert again[1] == pytest.approx(followed[1], abs=1e-3)
    env.close()


def test_a_simulator_that_shows_something_else_is_left_alone():
    env = gym.make("Hopper-v5")
    seen, _ = env.reset(seed=0)
    assert not diagnose.put(env, seen[:-4])  # too little to know the state by
    seen[-1] = 30.0  # beyond what it shows of a velocity
    assert not diagnose.put(env, seen)
    assert not diagnose.put(gym.make("Pendulum-v1"), np.zeros(3))
    env.close()


class Counter:
    """Adds the action to its state; the reward is the state; ends above 5."""

    unwrapped = property(lambda self: self)

    def __init__(self) -> None:
        self.state = 1.0

    def step(self, action):
        self.state += float(action[0])
        ends = self.state > 5
        return np.array([self.state]), self.state, ends, False, {}


def test_what_follows_an_action_by_hand(monkeypatch):
    monkeypatch.setattr(diagnose, "AHEAD", (1, 2, 4))
    config = SimpleNamespace(reward_scale=1.0, reward_shift=-1.0, discount=0.5)

    def one_more(obs: Any) -> Any:
        return np.ones((*obs.shape[:-1], 1))  # whatever it sees

    own: Any = one_more
    # From 1 by 2.5 to 3.5, then by ones to 4.5 and 5.5, which is the end: the rewards
    # less 1 are 2.5, 3.5, 4.5, their sums 2.5, 4.25 and 5.375.
    sums, seen, left = diagnose.futures(Counter(), own, np.array([2.5]), config)
    assert sums.tolist() == [2.5, 4.25, 5.375]
    assert seen.ravel().tolist() == [3.5, 4.5, 5.5]
    assert left.tolist() == [0.5, 0.25, 0.0]


def test_a_step_along_the_gradient_by_hand():
    # Q = s a, so its gradient is s: at states 1 and 3 of mean length 2, so for a length
    # of .4 the action, 0, moves by .2 s: at 3 to .6, at 8 to the box's face. In the
    # environment's units, 0 to 10, these are 8 and 10.
    lane: Any = SimpleNamespace(
        policy=lambda obs: np.zeros((len(obs), 1), np.float32),
        q=lambda obs, action: obs[:, 0] * action[:, 0],
    )
    one = np.ones(1)
    box = NumpyPolicy((), 0 * one, one, action_low=0 * one, action_high=10 * one)
    states = np.array([[1.0], [3.0]], np.float32)
    own = diagnose.stepping(lane, box, 0.4, states, lambda raw: raw)
    assert own(np.full((1, 1, 1), 3.0)) == pytest.approx(np.full((1, 1, 1), 8.0))
    assert own(np.full((1, 1, 1), 8.0)) == pytest.approx(np.full((1, 1, 1), 10.0))


def test_agreement_is_within_a_state():
    # Two states, 100 apart; within the first in the same order, in the second too.
    one = np.array([[0.0, 1.0, 2.0], [100.0, 101.0, 102.0]])
    other = np.array([[70.0, 80.0, 90.0], [1.0, 2.0, 3.0]])
    assert diagnose.agreement(one, one) == pytest.approx(1)
    assert diagnose.agreement(one, -one) == pytest.approx(-1)
    # Centred: -1 0 1 -1 0 1 against -10 0 10 -1 0 1, ranks 1.5 3.5 5.5 twice against
    # 1 3.5 6 2 3.5 5: 16 / sqrt(16 x 17) by their products and squares about 3.5.
    assert diagnose.agreement(one, other) == pytest.approx(16 / (16 * 17) ** 0.5)
    assert math.isnan(diagnose.agreement(one, np.ones((2, 3))))


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
    options = diagnose.Options((folder,), episodes=2, points=50, order=4, along=(0.1,))
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
        assert float(row["ahead_400"]) == pytest.approx(1)
        assert float(row["return_along_0.1"]) >= 1
        for steps in diagnose.AHEAD:
            assert -1 <= float(row[f"order_{steps}"]) <= 1
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


def test_data_without_an_environment_have_no_order(capsys, tmp_path, arrays_file):
    args = ["--dataset", str(arrays_file), "--run-dir", str(tmp_path), *SMALL]
    td3_bst.main(args)
    folder = Path(capsys.readouterr().out.splitlines()[-1])
    options = diagnose.Options((folder,), points=20, order=4, along=(0.1,))
    for row in diagnose.diagnose(folder, options):
        assert row["certainty_data"] > 0
        assert not [x for x in row if x.startswith(("order", "ahead", "return"))]
