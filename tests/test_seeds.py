"""Seeds as a leading axis: alone or in a group, on one device or two, looped or not."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    assert_changed,
    assert_same,
    hundred_updates,
    random_agent,
    random_data,
)

from common import seeds

TESTS = Path(__file__).parent
STAGE = 2
PER_SEED = [True, False, False]  # keys, data, the Morse network

# On two host devices, which must exist before JAX makes an array: seeds 0 to 3, then
# three seeds, whose last lane is padding.
TWO_DEVICES = """
import os, sys
os.sched_getaffinity = lambda pid: {0, 1, 2}
from common import seeds
seeds.use_cores(2)
import jax, numpy as np, test_seeds
assert jax.device_count() == 2, jax.devices()
mesh = seeds.mesh(4)
for name, group in (("four", [0, 1, 2, 3]), ("three", [0, 1, 2])):
    lanes = seeds.lanes(group, mesh)
    agents = test_seeds.train_seeds(lanes, mesh)
    assert len(jax.tree.leaves(agents)[0].sharding.device_set) == 2
    np.savez(sys.argv[1] + name, *jax.tree.leaves(agents), lanes=lanes)
"""


def arguments() -> tuple[Any, Any]:
    return random_data(0, 200), random_agent(0)[1].params


def train_seeds(lanes: Any, mesh: Any) -> Any:
    """100 updates of a fresh agent per lane, by `map_seeds`."""
    program = seeds.map_seeds(hundred_updates, PER_SEED, mesh)
    data, morse_params = arguments()
    keys = seeds.split(seeds.stage_keys(np.asarray(lanes), STAGE), mesh)
    return program(
        keys, seeds.replicate(data, mesh), seeds.replicate(morse_params, mesh)
    )


def lane(agents: Any, index: int) -> Any:
    return jax.tree.map(lambda x: np.asarray(x)[index], agents)


@pytest.fixture(scope="module")
def group() -> Any:
    """Seeds 0 to 3 together on one device, which loops over them."""
    return train_seeds([0, 1, 2, 3], seeds.mesh(1))


@pytest.fixture(scope="module")
def two_devices(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("two_devices")
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    subprocess.run(
        [sys.executable, "-c", TWO_DEVICES, f"{folder}/"],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        check=True,
    )
    return {name: np.load(folder / f"{name}.npz") for name in ("four", "three")}


def test_a_seed_alone_equals_one_in_a_group(group: Any):
    for seed in (0, 2):
        alone = lane(train_seeds([seed], seeds.mesh(1)), 0)
        assert_same(alone, lane(group, seed), tolerance=1e-5)


def test_a_lane_does_not_depend_on_its_neighbours(group: Any):
    # One program: bit for bit.
    moved = train_seeds([2, 7, 0, 2], seeds.mesh(1))
    assert_same(lane(moved, 0), lane(group, 2))
    assert_same(lane(moved, 2), lane(group, 0))
    assert_same(lane(moved, 3), lane(group, 2))
    assert_changed(lane(moved, 1).actor, lane(group, 1).actor)


def test_vmapped_seeds_equal_looped_ones(group: Any, monkeypatch: pytest.MonkeyPatch):
    # What an accelerator runs: `map_seeds` on a mesh that says that it is one.
    gpu: Any = SimpleNamespace(devices=np.array([SimpleNamespace(platform="gpu")]))
    monkeypatch.setattr(jax, "shard_map", lambda function, **_: function)
    monkeypatch.setattr(seeds, "OPTIONS", {})  # the compiler's, which a CPU's refuses
    program = seeds.map_seeds(hundred_updates, PER_SEED, gpu)
    keys = seeds.stage_keys(np.arange(4), STAGE)
    text = str(jax.make_jaxpr(program)(keys, *arguments()))
    assert "f32[4,16,3]" in text  # the four seeds' batches in one array
    assert_same(program(keys, *arguments()), group, tolerance=1e-5)


def test_two_devices_share_the_seeds(group: Any, two_devices: dict[str, Any]):
    four = two_devices["four"]
    assert four["lanes"].tolist() == [0, 1, 2, 3]
    for i, leaf in enumerate(jax.tree.leaves(group)):
        # Two lanes in the loop instead of four; the loop's body is the same program.
        np.testing.assert_array_equal(four[f"arr_{i}"], leaf)


def test_padded_lanes_repeat_the_last_seed(two_devices: dict[str, Any]):
    four, three = two_devices["four"], two_devices["three"]
    assert three["lanes"].tolist() == [0, 1, 2, 2]
    for name in set(three.files) - {"lanes"}:
        np.testing.assert_array_equal(three[name][:3], four[name][:3])
        np.testing.assert_array_equal(three[name][3], three[name][2])


@pytest.mark.parametrize(
    ("lanes", "cores", "expected"),
    [
        (1, 2, 1),
        (2, 2, 2),
        (3, 2, 1),  # three turns on both cores, not two with a lane repeated
        (9, 2, 2),  # where that is one of ten
        (6, 4, 3),
        (5, 4, 3),
        (15, 8, 8),
        (3, 16, 3),
        (17, 16, 9),
        (4, 1, 1),
    ],
)
def test_devices_are_as_many_as_finish_first(lanes, cores, expected):
    assert seeds.host_devices(lanes, cores) == expected


@pytest.mark.parametrize(
    ("group", "devices", "expected"),
    [
        ([5], 1, [5]),
        ([5, 6, 7], 1, [5, 6, 7]),
        ([5, 6, 7], 2, [5, 6, 7, 7]),
        ([5, 6], 2, [5, 6]),
        ([5, 6, 7, 8, 9], 4, [5, 6, 7, 8, 9, 9, 9, 9]),
    ],
)
def test_lanes(group: list[int], devices: int, expected: list[int]):
    mesh: Any = SimpleNamespace(size=devices)
    assert seeds.lanes(group, mesh).tolist() == expected


def test_keys_depend_on_seed_and_stage_not_on_lane():
    def data(lanes: list[int], stage: int) -> np.ndarray:
        return np.array(jax.random.key_data(seeds.stage_keys(np.array(lanes), stage)))

    np.testing.assert_array_equal(data([3, 5], 1)[1], data([5, 0, 3], 1)[0])
    everything = np.concatenate([data([0, 1, 2, 3], stage) for stage in range(3)])
    assert len(np.unique(everything, axis=0)) == 12


def test_map_seeds_shares_and_splits():
    # x + y, where x is a lane's and y everybody's.
    program = seeds.map_seeds(lambda x, y: x + y.sum(), [True, False], seeds.mesh(1))
    result = program(jnp.array([1.0, 2.0]), jnp.array([10.0, 20.0]))
    np.testing.assert_array_equal(result, [31.0, 32.0])


def test_map_seeds_donates_the_first_argument():
    agents = jax.tree.map(lambda x: jnp.stack([x, x]), random_agent(0)[0].actor)
    mesh = seeds.mesh(1)
    kept = seeds.map_seeds(lambda x: jax.tree.map(jnp.negative, x), [True], mesh)
    expected = kept(agents)
    donating = seeds.map_seeds(
        lambda x: jax.tree.map(jnp.negative, x), [True], mesh, donate=True
    )
    assert_same(donating(agents), expected)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(agents))


@pytest.mark.parametrize("name", ["iql_bst", "td3_bst"])
def test_init_of_every_algorithm_ends_on_two_devices(name: str):
    # Batched QRs, IQL's orthogonal layers of both critics say, wait for each other's
    # threads in jaxlib 0.10: vmapped, this hung within 200 rounds, 4 times of 4.
    # They wait by spinning, so beside other loads this takes many times as long: what
    # must not be is a round without an end.
    code = f"""
import faulthandler
import jax
import {name} as module
jax.config.update("jax_num_cpu_devices", 2)
from functools import partial
from common import seeds
mesh = seeds.mesh(2)
lanes = seeds.lanes([0, 1, 2, 3], mesh)
config = module.Config(critic_layer_norm=False)
init = partial(module.init, obs_dim=6, action_dim=2, config=config)
mapped = seeds.map_seeds(init, (True,), mesh)
for stage in range(200):
    faulthandler.dump_traceback_later(120, exit=True)  # from now on, anew
    jax.block_until_ready(mapped(seeds.stage_keys(lanes, stage)))
"""
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
