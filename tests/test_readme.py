"""The README's commands and snippets run, and its tables are those of the results."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import td3_bst
from common import rollout

pytestmark = pytest.mark.usefixtures("quick_compile")

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COUNTS = "--num-updates 4 --eval-every 4 --num-morse-updates 2 --num-seeds 1"
TINY = {  # small counts, appended to the scripts' own options
    **dict.fromkeys(("td3_bst.py", "td3_bc.py", "iql_bst.py"), COUNTS),
    "morse.py": "--num-morse-updates 2",
}
SWEEP = ["--num-updates", "4", "--num-seeds", "1", "--set", "num_morse_updates=2"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line]
    return [line for line in lines if "pytest" not in line]  # that is this very run


@pytest.fixture(scope="module")
def arrays_file(tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("own") / "own.npz"
    np.savez(
        path,
        observations=rng.normal(size=(300, 3)).astype(np.float32),
        actions=rng.uniform(-1, 1, (300, 2)).astype(np.float32),
        rewards=rng.normal(size=300).astype(np.float32),
        terminals=np.zeros(300, bool),
        timeouts=np.arange(1, 301) % 30 == 0,
    )
    return path


@pytest.fixture(scope="module")
def finished(arrays_file, tmp_path_factory) -> Path:
    """A run to resume, or to take Morse networks from."""
    counts = TINY["td3_bst.py"] + " --actor-decay-updates 8"  # to be extended
    args = f"--dataset {arrays_file} {counts} --run-dir"
    return run("td3_bst.py", shlex.split(args), tmp_path_factory.mktemp("runs"))


def run(script: str, args: list[str], folder: Path) -> Path:
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *args, str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.splitlines()[-1])


def without(args: list[str], option: str) -> list[str]:
    """`args` less an option and its one value."""
    if option not in args:
        return args
    at = args.index(option)
    return args[:at] + args[at + 2 :]


@pytest.mark.parametrize("line", commands())
def test_command_runs(line, arrays_file, pendulum, finished, tmp_path):
    words = shlex.split(line.removeprefix("pip install uv && "))
    assert words[:2] == ["uv", "run"]
    script, *args = words[2:]
    assert (ROOT / script).is_file()
    if "--help" in args:
        subprocess.run([sys.executable, str(ROOT / script), *args], check=True)
        return
    if script == "results/diagnose.py":
        subprocess.run([sys.executable, str(ROOT / script), str(finished)], check=True)
        assert (finished / "diagnosis.png").is_file()
        return
    if script == "results/reproduce.py":
        for option in ("--datasets", "--num-seeds"):
            args = without(args, option)
        if "quick" not in args and "--dry-run" not in args:  # one sweep is run whole
            args.append("--dry-run")
        own = ["--datasets", pendulum, "--methods", "TD3-BST", *SWEEP]
        subprocess.run(
            [sys.executable, str(ROOT / script), *args, *own, "--out", str(tmp_path)],
            check=True,
        )
        assert (tmp_path / "results.csv").exists() != ("--dry-run" in args)
        return
    if "--resume" in args:
        args[args.index("--resume") + 1] = str(finished)
        args = ["8" if word.isdigit() else word for word in args]
        assert run(script, args, Path("--track=none")) == finished
        return
    if "--morse" in args:
        args[args.index("--morse") + 1] = str(finished)
    tiny = shlex.split(TINY[script])
    for option in tiny[::2]:
        args = without(args, option)
    if script != "morse.py" or "--dataset" in args:
        args = ["--dataset", str(arrays_file), *without(args, "--dataset")]
    folder = run(script, [*args, *tiny, "--run-dir"], tmp_path)
    pictures = [path.stat().st_size for path in folder.glob("*.png")]
    assert pictures
    assert min(pictures) > 10_000


def test_snippet_for_your_project_runs():
    (snippet,) = [b for b in blocks("python") if "Supervisor" in b]
    scope: dict = {}
    exec(snippet, scope)
    assert scope["action"].shape == (1000, 2)
    assert float(np.abs(scope["action"]).max()) <= 1
    assert np.isfinite(float(scope["metrics"]["critic_loss"]))


def test_policy_loader_acts_as_the_jax_policy(tmp_path):
    (snippet,) = [b for b in blocks("python") if "def load_policy" in b]
    assert len([x for x in snippet.split("def load_policy")[1].splitlines() if x]) <= 12
    scope: dict = {}
    exec(snippet, scope)
    config = td3_bst.Config(hidden_dims=(8, 16))
    actor = td3_bst.init(jax.random.key(3), 3, 2, config).actor
    rng = np.random.default_rng(0)
    # A constant far from 0, in float64: its rounding over a std of 1e-3 is no signal.
    far = np.array([0, 0, 1234567.891])
    mean, std = rng.normal(size=3) + far, np.append(rng.uniform(0.5, 2, 2), 1e-3)
    mean = mean.astype(np.float32)
    low, high = np.array([-2.0, 0.0]), np.array([2.0, 0.4])
    lanes = jax.tree.map(lambda x: np.asarray(x)[None], actor)
    policy = rollout.NumpyPolicy(rollout.layers_of(lanes), mean, std, low, high)
    rollout.export(tmp_path, policy, ["seed7"], {})
    obs = rng.normal(size=(20, 3)) * [1, 1, 0] + mean.astype(np.float64) * [0, 0, 1]
    obs[:, 2] += 0.01  # which float32 does not see
    box = np.asarray(
        td3_bst.policy(
            actor, jax.numpy.asarray((obs.astype(np.float32) - mean) / std), config
        )
    )
    acted = scope["load_policy"](tmp_path / "seed7.safetensors")(obs)
    np.testing.assert_allclose(acted, low + (box + 1) / 2 * (high - low), atol=1e-5)
    assert (acted >= np.float32(low)).all()
    assert (acted <= np.float32(high)).all()


def test_tables_are_those_of_the_results():
    script = [sys.executable, str(ROOT / "results" / "tables.py"), "--check"]
    subprocess.run(script, check=True)


def test_files_and_tests_that_the_readme_names_exist():
    for name in re.findall(r"`((?:tests|common|results)/[\w./]*)`", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\((results/[\w./-]+)\)", README):
        assert (ROOT / name).is_file(), name
