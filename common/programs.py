"""Compiled programs, kept for the next run."""

import hashlib
import os
import platform
import sys
from pathlib import Path

import jax

from common.transitions import cache_dir


def keep() -> None:
    """Has JAX keep what it compiles in the user's cache, for programs of the same text.

    JAX's own variables go before: JAX_COMPILATION_CACHE_DIR names another place, and
    JAX_ENABLE_COMPILATION_CACHE=false compiles anew.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    place = cache_dir() / "programs" / instructions()
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"warning: no compiled programs kept: {error}", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_compilation_cache_max_size", 2**30)  # bytes
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def instructions() -> str:
    """A hash of the CPU's kind: programs for another one may not run on this one."""
    kind = platform.machine() + platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        kind += "".join(
            sorted({x for x in lines if x.startswith(("flags", "Features"))})
        )
    return hashlib.sha256(kind.encode()).hexdigest()[:16]
