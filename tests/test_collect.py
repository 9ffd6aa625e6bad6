"""Datasets made for a trial: whole, in order, the same again."""

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import minari
import numpy as np
import pytest

import td3_bc
from common import datasets
from common.errors import UserError
from results import collect
from results.collect import Step

ROOT = Path(__file__).parent.parent
NAN = np.nan


def line(ends: str) -> list[Step]:
    """Steps 0 -> 1 -> 2 ..., each of them going on (.), terminal (t) or cut (c)."""
    return [
        Step(np.full(2, i), np.full(1, i), i, np.full(2, i + 1), x == "t", x == "c")
        for i, x in enumerate(ends)
    ]


def test_episodes_end_where_the_task_the_clock_or_the_steps_end():
    made = list(collect.episodes(line(".t.c..")))
    assert [e.observations[:, 0].tolist() for e in made] == [  # pyright: ignore
        [0, 1, 2],
        [2, 3, 4],
        [4, 5, 6],
    ]
    assert [e.rewards for e in made] == [[0, 1], [2, 3], [4, 5]]
    assert [e.terminations for e in made] == [[False, True], [False] * 2, [False] * 2]
    assert [e.truncations for e in made] == [
        [False, False],
        [False, True],
        [False, True],
    ]
    (one,) = collect.episodes(line("t"))
    assert one.truncations == [False]  # the end is the task's own


def transitions(n: int, fill: float) -> td3_bc.Transition:
    shapes = ((3,), (2,), (), (3,), ())
    return td3_bc.Transition(*(jnp.full((n, *shape), fill) for shape in shapes))


def test_updates_see_what_has_been_collected_and_nothing_behind_it():
    agent = td3_bc.init(jax.random.key(0), 3, 2, collect.CONFIG)
    before = jax.tree.map(np.array, agent)
    replay, new = transitions(400, NAN), transitions(collect.CHUNK, 0.5)
    key, start = jax.random.key(1), jnp.int32(0)
    agent, replay = collect.learn(agent, replay, new, start, key, 0)
    jax.tree.map(np.testing.assert_array_equal, agent, before)  # random steps: none
    start = jnp.int32(collect.CHUNK)
    agent, replay = collect.learn(agent, replay, new, start, key, collect.CHUNK)
    reward = np.array(replay.reward)
    assert (reward[:200] == 0.5).all()
    assert np.isnan(reward[200:]).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(agent))
    counts = [int(opt[0].count) for opt in (agent.actor_opt, agent.critic_opt)]
    assert counts == [collect.CHUNK // 2, collect.CHUNK]


def test_act_is_the_policy():
    actor = td3_bc.init(jax.random.key(0), 3, 2, collect.CONFIG).actor
    obs = np.random.default_rng(0).normal(size=3)
    action = collect.act(collect.layers_of(actor), obs)
    expected = td3_bc.policy(actor, jnp.asarray(obs, jnp.float32), collect.CONFIG)
    np.testing.assert_allclose(action, expected, atol=1e-6)


def test_both_datasets_are_whole_and_the_same_again(home, monkeypatch, capsys):
    monkeypatch.setattr(collect, "NUM_RANDOM", 100)
    monkeypatch.setattr(collect, "keep_to_one_core", lambda: None)
    args = ["collect.py", "Hopper-v5", "--num-steps", "300", "--num-medium", "50"]
    monkeypatch.setattr(sys, "argv", args)
    made = []
    for folder in ("a", "b"):
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(home / folder))
        collect.main()
        for kind in ("medium-replay", "medium"):
            dataset = minari.load_dataset(f"held/mujoco/hopper/{kind}-v0")
            made.append([e.actions for e in dataset.iterate_episodes()])
            assert dataset.env_spec is not None
            assert dataset.env_spec.id == "Hopper-v5"
            for episode in dataset.iterate_episodes():
                last = episode.terminations[-1], episode.truncations[-1]
                assert any(last)
                assert not episode.terminations[:-1].any()
                assert len(episode.observations) == len(episode.actions) + 1
        assert sum(map(len, made[-2])) == 300
        assert sum(map(len, made[-1])) >= 50
    assert "held/mujoco/hopper/medium-v0: " in capsys.readouterr().out
    for first, second in zip(made[:2], made[2:], strict=True):
        np.testing.assert_array_equal(np.concatenate(first), np.concatenate(second))
    replay = np.concatenate(made[0])
    assert np.abs(replay).max() <= 1
    monkeypatch.setattr(collect, "explore", pytest.fail)
    with pytest.raises(UserError, match="is there already"):
        collect.main()


def test_drives_through_a_maze_end_at_their_goals(home, monkeypatch):
    args = ["collect.py", "PointMaze_UMaze-v3", "--num-medium", "400"]
    monkeypatch.setattr(sys, "argv", args)
    made = []
    for folder in ("a", "b"):
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(home / folder))
        collect.main()
        stored = minari.load_dataset("held/pointmaze/umaze-v0")
        made.append(list(stored.iterate_episodes()))
    assert sum(map(len, made[0])) == 400
    assert len(made[0]) > 2
    ends = [episode.rewards.sum() for episode in made[0]]
    assert set(ends[:-1]) == {1.0}
    for first, second in zip(made[0], made[1], strict=True):
        np.testing.assert_array_equal(first.actions, second.actions)
    for before, after in pairwise(made[0]):  # it goes on where it is
        places = [x.observations["achieved_goal"] for x in (before, after)]
        np.testing.assert_array_equal(places[0][-1], places[1][0])
        goal = before.observations["desired_goal"][-1]
        assert np.linalg.norm(places[0][-1] - goal) <= 0.45
    data = datasets.load("held/pointmaze/umaze-v0")
    assert data.domain == "pointmaze"
    assert data.task is not None
    assert data.terminal.sum() == sum(ends)
    with pytest.raises(UserError, match="is there already"):
        collect.main()
    monkeypatch.setattr(sys, "argv", [*args, "--seed", "1"])
    collect.main()  # beside it, and another
    other = minari.load_dataset("held/pointmaze/umaze-1-v0")
    assert (other[0].actions[:5] != made[0][0].actions[:5]).any()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["Nothing-v0"], "no environment Nothing-v0"),
        (["PointMaze_Nothing-v3"], "no environment PointMaze_Nothing-v3"),
        (["PointMaze_MediumDense-v3"], "rewards other steps than those at the goal"),
        (["InvertedPendulum-v5"], r"actions in \[-1, 1\], got .*Box\(-3.0, 3.0"),
        (["Hopper-v5", "--num-steps", "10050"], "multiple of 100 above 10000"),
        (["Hopper-v5", "--num-steps", "10000"], "multiple of 100 above 10000"),
        (["Hopper-v5", "--num-medium", "0"], "num_medium must be above 0"),
        (["Hopper-v5", "--noise", "nan"], "noise must not be negative"),
        (["Hopper-v5", "--seed", "-1"], "seed must not be negative"),
    ],
)
def test_what_cannot_be_made_is_one_clear_line(home, args, message):
    script = str(ROOT / "results" / "collect.py")
    run = subprocess.run(
        [sys.executable, script, *args], capture_output=True, text=True, cwd=home
    )
    assert run.returncode != 0
    assert "Traceback" not in run.stderr
    assert re.search(message, " ".join(run.stderr.split()))
    assert not list((home / "minari").glob("*"))
