"""Seeds as a leading axis, on whatever devices there are."""

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# An update is a hundred small kernels, many of which do not wait for each other: 1.4 to
# 1.6 times as fast on an H200, with the same bits (results/LOG.md).
OPTIONS = {"gpu": {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}}


def use_cores(num_lanes: int) -> None:
    """Makes host devices for the lanes, at most one per core.

    Does nothing once JAX has started; then the devices are what they are.
    """
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", host_devices(num_lanes, num_cores()))


def num_cores() -> int:
    """That this process may use; 1 where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def host_devices(num_lanes: int, cores: int) -> int:
    """The number of devices that finish first.

    n devices take ceil(lanes / n) turns, the last of which may repeat a lane; a turn on
    several cores takes (n / cores)^0.7 of its time on one (measured on two).
    """

    def time(count: int) -> float:
        turns = -(-num_lanes // count)
        return turns * (count / cores) ** 0.7

    return min(range(1, min(num_lanes, cores) + 1), key=time)


def mesh(num_lanes: int) -> Mesh:
    """The devices that share the lanes, a 1-D mesh with the axis `seed`."""
    devices = jax.devices()[:num_lanes]
    return Mesh(np.array(devices), ("seed",))


def lanes(seeds: Sequence[int], mesh: Mesh) -> np.ndarray:
    """The seeds, (L,), the last one repeated until every device has as many."""
    return np.array([*seeds, *[seeds[-1]] * (-len(seeds) % mesh.size)])


def stage_keys(lanes: np.ndarray, stage: int) -> jax.Array:
    """One typed key per lane, (L,); it depends on the seed, not on its lane."""
    return jax.vmap(lambda s: jax.random.fold_in(jax.random.key(s), stage))(
        jnp.asarray(lanes, jnp.uint32)
    )


def map_seeds(
    function: Callable[..., Any],
    per_seed: Sequence[bool],
    mesh: Mesh,
    donate: bool = False,
) -> Any:
    """Jits `function` over the leading axis of its per-seed arguments.

    The lanes are split over the devices; a device vmaps its lanes if it is an
    accelerator and loops over them if it is a CPU core, where vmap is slower.

    Args:
        function: of arrays, for one seed.
        per_seed: for each argument, True if it has the lanes' axis, False if shared.
        donate: let the result reuse the first argument's buffers.
    """
    platform = mesh.devices.flat[0].platform

    def on_device(*args: Any) -> Any:
        if platform != "cpu":
            return jax.vmap(function, [0 if own else None for own in per_seed])(*args)
        own_args = [a for a, own in zip(args, per_seed, strict=True) if own]

        def one_lane(lane: list[Any]) -> Any:
            own_lane = iter(lane)
            return function(
                *(
                    next(own_lane) if own else a
                    for a, own in zip(args, per_seed, strict=True)
                )
            )

        return jax.lax.map(one_lane, own_args)

    in_specs = tuple(P("seed") if own else P() for own in per_seed)
    sharded = jax.shard_map(
        on_device, mesh=mesh, in_specs=in_specs, out_specs=P("seed"), check_vma=False
    )
    return jax.jit(
        sharded,
        donate_argnums=(0,) if donate else (),
        compiler_options=OPTIONS.get(platform),
    )


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Copies a pytree of numpy arrays to every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, P()))


def split(tree: Any, mesh: Mesh) -> Any:
    """Lays a pytree with a leading lane axis out over the devices."""
    return jax.device_put(tree, NamedSharding(mesh, P("seed")))
