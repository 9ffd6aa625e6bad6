"""Compiled programs survive their process."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMPILE = """
import jax, jax.numpy as jnp
from common import programs
programs.keep()
print(float(jax.jit(lambda x: jnp.sin(x).sum())(jnp.arange(8.0))))
"""


def compile_in(home: Path, **variables: str) -> tuple[float, str, set[Path]]:
    """What the program gives, what was warned of, and the files of `home`."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    env |= {"XDG_CACHE_HOME": str(home), "JAX_PLATFORMS": "cpu", **variables}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    files = {path for path in home.rglob("*") if path.name.endswith("-cache")}
    return float(done.stdout), done.stderr, files


def test_a_program_is_kept_and_found_again(tmp_path):
    first, warned, kept = compile_in(tmp_path)
    assert kept
    assert not warned
    times = {path: path.stat().st_mtime_ns for path in kept}
    again, warned, found = compile_in(tmp_path)
    assert (again, warned, found) == (first, "", kept)
    assert times == {path: path.stat().st_mtime_ns for path in found}


def test_jax_has_the_first_say(tmp_path):
    own, cache = tmp_path / "own", tmp_path / "cache"
    cache.mkdir()
    assert not compile_in(cache, JAX_COMPILATION_CACHE_DIR=str(own))[2]
    assert not compile_in(cache, JAX_ENABLE_COMPILATION_CACHE="false")[2]


def test_without_a_place_it_compiles_anew(tmp_path):
    (tmp_path / "td3-bst").write_text("a file where the cache's folder would be")
    value, warned, kept = compile_in(tmp_path)
    assert value == compile_in(tmp_path / "other")[0]
    assert "warning: no compiled programs kept" in warned
    assert len(warned.splitlines()) == 1
    assert not kept
