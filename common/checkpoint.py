"""Pytrees on disk: safetensors files, written atomically, read without pickle."""

import contextlib
import hashlib
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
    """Writes a file whole or not at all: a temporary file, flushed, then renamed.

    Raises:
        UserError: it cannot be written, the disk is full say; what was there stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


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


class DamagedError(UserError):
    """A file that is not what was written: cut short, or bits of it changed."""


def _digest(arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> str:
    """SHA-256 of `meta` and of the arrays' names, types, shapes and bytes."""
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def save_tree(path: Path, tree: Any, meta: dict[str, Any]) -> None:
    """Writes a pytree of arrays, named by their place, `meta` and a checksum."""
    named, _ = jax.tree_util.tree_flatten_with_path(tree)
    arrays = {
        jax.tree_util.keystr(place): np.asarray(leaf, order="C")
        for place, leaf in named
    }
    meta = meta | {"sha256": _digest(arrays, meta)}
    write_bytes(path, save(arrays, {"meta": json.dumps(meta, sort_keys=True)}))


def load_tree(path: Path, template: Any) -> tuple[Any, dict[str, Any]]:
    """Reads what `save_tree` wrote into the structure of `template`.

    Raises:
        DamagedError: the file is damaged.
        UserError: its names or shapes are not the template's.
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
    """All arrays of a safetensors file by name, and its `meta`.

    Raises:
        DamagedError: it is no such file, or not what its checksum says.
        UserError: it cannot be read at all.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            meta = json.loads((file.metadata() or {}).get("meta", "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            written = meta.pop("sha256", None)  # policies have none
    except (AttributeError, SafetensorError, ValueError) as error:
        raise DamagedError(f"cannot read {path}: {error}") from error
    except OSError as error:  # an empty file cannot be mapped
        kind = UserError if not path.exists() or path.stat().st_size else DamagedError
        raise kind(f"cannot read {path}: {error}") from error
    if written not in (None, _digest(arrays, meta)):
        raise DamagedError(f"cannot read {path}: its checksum does not fit its content")
    return arrays, meta
