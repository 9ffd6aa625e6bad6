"""Builders of tiny datasets, and a home of one's own for tests that load them."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
from minari.data_collector import EpisodeBuffer

# Before JAX is imported, for this process and for those that tests start; a worker of
# pytest-xdist has a cache of its own in that of the process that started it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] += "/" + os.environ["PYTEST_XDIST_WORKER"]
else:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jax-cache-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Programs that are 6 % slower and compiled in half the time, most of a test's.
os.environ["XLA_FLAGS"] = " ".join(
    [*os.environ.get("XLA_FLAGS", "").split(), "--xla_cpu_use_fusion_emitters=false"]
)
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_PLATFORMS"] = "cpu"  # bit for bit means: the same program

STANDINS = Path(__file__).parents[2] / "shared" / "datasets"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty folders for the user's cache (`cache`) and Minari's datasets (`minari`)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.delenv("MINARI_REMOTE", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path


@pytest.fixture
def float64():
    """Float64 in JAX: `pytestmark = pytest.mark.usefixtures("float64")`."""
    import jax  # not before the variables above are set

    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def short_runs():
    """Runs in this process that compile sooner and whose pictures are empty files.

    Of a run of some updates both are most. What is asked of such runs must not depend
    on how well they are compiled.
    """
    import jax

    from common import plots

    with pytest.MonkeyPatch.context() as patch:
        for name in ("curves", "certainty"):
            patch.setattr(plots, name, lambda path, *_: path.touch())
        jax.config.update("jax_disable_most_optimizations", True)
        yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()  # or what was compiled here is used in other modules


@pytest.fixture(scope="module")
def quick_compile():
    """Processes that a module starts compile sooner; how well is nothing to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        yield


@pytest.fixture
def standins(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in datasets as Minari's folder, where the checkout has them."""
    if not STANDINS.is_dir():
        pytest.skip(f"no stand-in datasets at {STANDINS}")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(STANDINS))
    return STANDINS


@pytest.fixture(scope="module")
def pendulum(tmp_path_factory):
    """A local Minari dataset of InvertedPendulum-v5, four random episodes."""
    root = tmp_path_factory.mktemp("minari")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(root))
        env = gym.make("InvertedPendulum-v5")
        env.action_space.seed(0)
        buffers = []
        for seed in range(4):
            obs, _ = env.reset(seed=seed)
            buffer = EpisodeBuffer(id=seed, seed=seed, observations=[obs])
            done = False
            while not done:
                action = env.action_space.sample()
                obs, reward, terminated, truncated, info = env.step(action)
                done = terminated or truncated
                buffer = buffer.add_step_data(
                    {
                        "observation": obs,
                        "action": action,
                        "reward": reward,
                        "terminated": terminated,
                        "truncated": truncated,
                        "info": info,
                    }
                )
            buffers.append(buffer)
        minari.create_dataset_from_buffers(
            "test/pendulum/random-v0",
            buffers,
            env=env,
            eval_env="InvertedPendulum-v5",
            algorithm_name="random",
            description="for a test",
            **dict.fromkeys(("author", "author_email", "code_permalink"), "none"),
        )
        env.close()
        yield "test/pendulum/random-v0"


@pytest.fixture(scope="module")
def arrays_file(tmp_path_factory) -> Path:
    """A dataset of one's own: 200 random transitions, no environment."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("own") / "own.npz"
    timeouts = np.zeros(200, bool)
    timeouts[49::50] = True
    np.savez(
        path,
        observations=rng.normal(size=(200, 4)).astype(np.float32),
        actions=rng.uniform(-0.9, 0.9, (200, 2)).astype(np.float32),
        rewards=rng.normal(size=200).astype(np.float32),
        terminals=rng.random(200) < 0.05,
        timeouts=timeouts,
    )
    return path


@pytest.fixture
def write_minari(home: Path) -> Callable[..., Path]:
    """Writes a Minari dataset of episodes, dicts of the arrays that HDF5 shall hold."""
    from results import fuzz  # imports JAX

    def write(
        dataset_id: str,
        episodes: list[dict[str, Any]],
        obs_space: gym.Space,
        action_space: gym.Space,
        env: str | None = None,
        eval_env: str | None = None,
        **about: Any,
    ) -> Path:
        specs = {"env_spec": env, "eval_env_spec": eval_env}
        about |= {name: spec for name, spec in specs.items() if spec}
        root = home / "minari"
        return fuzz.write_minari(
            root, dataset_id, episodes, obs_space, action_space, **about
        )

    return write
