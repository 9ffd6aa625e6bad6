"""Pytrees on disk: safetensors files, written atomically, read without pickle."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from common.errors import UserError


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all: a temporary file, flushed, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON atomically, readable by people and by strict parsers (NaN: null)."""
    text = json.dumps(_finite(content), indent=2, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; UserError where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"expected a JSON object in {path}")
    return content


def save_tree(path: Path, tree: Any, meta: dict[str, Any]) -> None:
    """Writes a pytree of arrays, named by their place in it, beside JSON `meta`."""
    named, _ = jax.tree_util.tree_flatten_with_path(tree)
    arrays = {
        jax.tree_util.keystr(place): np.asarray(leaf, order="C")
        for place, leaf in named
    }
    write_bytes(path, save(arrays, {"meta": json.dumps(meta, sort_keys=True)}))


def load_tree(path: Path, template: Any) -> tuple[Any, dict[str, Any]]:
    """Reads what `save_tree` wrote into the structure of `template`.

    Raises:
        UserError: the file is damaged, or its names or shapes are not the template's.
    """
    named, structure = jax.tree_util.tree_flatten_with_path(template)
    arrays, meta = load_arrays(path)
    wanted = {jax.tree_util.keystr(place): np.shape(leaf) for place, leaf in named}
    found = {name: array.shape for name, array in arrays.items()}
    if wanted != found:
        name = next(
            n for n in sorted({*wanted, *found}) if wanted.get(n) != found.get(n)
        )
        raise UserError(
            f"{path} does not fit this run: {name} has shape {found.get(name)} there, "
            f"expected {wanted.get(name)}"
        )
    return jax.tree_util.tree_unflatten(structure, [arrays[n] for n in wanted]), meta


def load_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """All arrays of a safetensors file by name, and its `meta`."""
    try:
        with safe_open(path, framework="numpy") as file:
            meta = json.loads((file.metadata() or {}).get("meta", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, meta  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
