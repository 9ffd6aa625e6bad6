"""What the layout of the scripts promises, read off their source."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ["iql_bst.py", "td3_bc.py", "td3_bst.py"]  # one algorithm each
OUTSIDE = {"common", "tyro"}  # what only `main` may use
ALGORITHM = {"chex", "flax", "jax", "morse", "numpy", "optax"}

COPY = """
import sys
sys.modules["tyro"] = sys.modules["tqdm"] = sys.modules["gymnasium"] = None
import jax, jax.numpy as jnp, {name}
config = {name}.Config(
    reward_scale=1.0, reward_shift=0.0, normalize_obs=True, hidden_dims=(8,)
)
ones = jnp.ones((4, 1))
data = {name}.Transition(ones, ones, ones[:, 0], ones, ones[:, 0])
data, mean, std = {name}.prepare(data, config)
agent = {name}.init(jax.random.key(0), 1, 1, config)
print({name}.policy(agent.actor, data.obs, config).shape)
"""


def tree_of(script: str) -> ast.Module:
    return ast.parse((ROOT / script).read_text())


def above_main(script: str) -> list[ast.stmt]:
    body = tree_of(script).body
    names = [getattr(node, "name", None) for node in body]
    return body[: names.index("main")]


def imported(nodes: list[ast.stmt]) -> set[str]:
    """Top-level names of all imports, those inside functions too."""
    found = set()
    for node in (child for top in nodes for child in ast.walk(top)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def names(nodes: list[ast.stmt]) -> set[str]:
    walk = (child for top in nodes for child in ast.walk(top))
    return {node.id for node in walk if isinstance(node, ast.Name)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_only_main_uses_what_is_not_the_algorithm(script: str):
    nodes = above_main(script)
    assert not (imported(nodes) | names(nodes)) & OUTSIDE
    assert imported(nodes) <= ALGORITHM | set(sys.stdlib_module_names)


def test_morse_imports_only_what_it_says():
    top = [n for n in tree_of("morse.py").body if not hasattr(n, "body")]
    said = {"flax", "jax", "numpy", "optax"}
    assert imported(top) - set(sys.stdlib_module_names) == said


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_copied_files_are_enough(script: str, tmp_path: Path):
    for name in (script, "morse.py"):
        shutil.copy(ROOT / name, tmp_path)
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", COPY.format(name=Path(script).stem)],
        cwd=tmp_path,
        env=environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["(4,", "1)"]


def fields(tree: ast.Module) -> list[str]:
    """The options of the module's `Config`."""
    (config,) = (n for n in tree.body if getattr(n, "name", None) == "Config")
    assert isinstance(config, ast.ClassDef)
    return [
        node.target.id
        for node in config.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]


def options_read(tree: ast.Module) -> set[str]:
    """The x of every `config.x` that is read."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Load)
        and isinstance(node.value, ast.Name)
        and node.value.id == "config"
    }


@pytest.mark.parametrize("script", [*SCRIPTS, "morse.py"])
def test_every_option_is_read(script: str):
    tree = tree_of(script)
    options = fields(tree)
    assert options
    assert not set(options) - options_read(tree)


@pytest.mark.parametrize("script", [*SCRIPTS, "morse.py"])
def test_every_option_of_the_algorithm_has_a_comment(script: str):
    # tyro shows the comment as the option's help.
    lines = (ROOT / script).read_text().splitlines()
    (config,) = (n for n in tree_of(script).body if getattr(n, "name", "") == "Config")
    assert isinstance(config, ast.ClassDef)
    for node in config.body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) != "morse_net":
            assert "  # " in lines[node.lineno - 1], ast.unparse(node)


@pytest.mark.parametrize("script", [*SCRIPTS, "morse.py"])
def test_no_environment_variable_is_read(script: str):
    for node in ast.walk(tree_of(script)):
        name = getattr(node, "attr", getattr(node, "id", ""))
        assert name not in ("environ", "environb", "getenv"), ast.unparse(node)
