"""Updates per core-second of every method, as a share of what the machine can multiply.

    uv run benchmarks/throughput.py
    uv run benchmarks/throughput.py --methods TD3+BC --shapes hopper --num-seeds 1 2

The figure to quote is `of peak`: floating point operations of the updates per
core-second over those of a matrix product in the same process. Rounds of all cases and
of the product take turns, so that a busy machine slows all of them; medians are shown.
"""

import dataclasses
import itertools
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro

if __name__ == "__main__":  # a script finds its neighbours through the repository root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import report
from results import tables

Method = Literal["TD3+BC", "TD3-BST", "IQL", "IQL-BST", "Morse"]
SHAPES = {"hopper": (11, 3), "halfcheetah": (17, 6), "antmaze": (29, 8)}
DOMAINS = {"hopper": "locomotion", "halfcheetah": "locomotion", "antmaze": "antmaze"}


@dataclass(frozen=True)
class Options:
    """What to measure, and how long."""

    methods: tuple[Method, ...] = ("TD3+BC", "TD3-BST", "IQL", "IQL-BST", "Morse")
    shapes: tuple[str, ...] = ("hopper", "halfcheetah", "antmaze")
    num_seeds: tuple[int, ...] = (1, 2)  # a process each: devices are made at its start
    cores: int = 0  # at most so many, on Linux; 0: all
    num_updates: int = 1000  # of a round, one compiled scan
    rounds: int = 7
    num_transitions: int = 100_000
    out: Path = Path("benchmarks/throughput.json")

    def __post_init__(self) -> None:
        unknown = set(self.shapes) - SHAPES.keys()
        if unknown:
            raise ValueError(f"shapes are of {', '.join(SHAPES)}, not {unknown}")
        if self.num_updates % 2 or self.num_updates < 2:
            raise ValueError(f"num_updates must be even, got {self.num_updates}")
        if self.cores < 0 or (self.cores and not hasattr(os, "sched_setaffinity")):
            raise ValueError(f"cores must be 0, or on Linux above, got {self.cores}")
        if min(self.rounds, self.num_transitions, *self.num_seeds) < 1:
            raise ValueError("rounds, transitions and seeds must be at least 1")


# ============================================================================== FLOPs


def net(batch: int, *widths: int) -> tuple[int, int, int]:
    """Operations of a dense network: forward, weight gradients, input gradients.

    2 B m n per layer and pass; the last without the first layer's, which only gradients
    through a critic or a Morse network need.
    """
    layers = [2 * batch * m * n for m, n in itertools.pairwise(widths)]
    return sum(layers), sum(layers), sum(layers[1:])


def flops(method: Method, obs_dim: int, action_dim: int, config: Any) -> float:
    """Of matrix products per critic update, as the equations need them, no more.

    Args:
        config: the script's, or morse.Config.
    """
    batch, both = config.batch_size, obs_dim + action_dim
    if method == "Morse":
        forward, weights, inputs = net(batch, both, *config.hidden_dims, action_dim)
        return (1 + config.num_negatives) * (forward + weights + inputs)
    hidden = config.hidden_dims
    actor, critic = (
        net(batch, obs_dim, *hidden, action_dim),
        net(batch, both, *hidden, 1),
    )
    through = critic[0] + critic[2] + 2 * batch * action_dim * hidden[0]  # Q's gradient
    supervised = 0.0
    if method in ("TD3-BST", "IQL-BST"):
        widths = (both, *config.morse_net.hidden_dims, action_dim)
        certainty = net(batch, *widths)
        supervised = certainty[0]
        if config.supervisor_gradient:
            supervised += certainty[2] + 2 * batch * action_dim * widths[1]
    if method in ("TD3+BC", "TD3-BST"):
        targets = actor[0] + 2 * critic[0]
        return (
            targets
            + 2 * sum(critic)
            + (sum(actor) + through + supervised) / config.policy_delay
        )
    value = net(batch, obs_dim, *hidden, 1)
    shared = 2 * critic[0] + sum(value) + value[0] + 2 * sum(critic) + sum(actor)
    return shared if method == "IQL" else shared + through + supervised


# =========================================================================== Programs


@dataclass
class Case:
    """A compiled round of one method and shape."""

    name: str
    run: Callable[[], None]  # a round, to its end
    flops: float  # of one update of one seed
    compile_seconds: float
    wall: list[float] = dataclasses.field(default_factory=list)  # seconds of the rounds
    cpu: list[float] = dataclasses.field(default_factory=list)  # core-seconds
    kernels: float | None = None  # launched per update, on a GPU


def make_case(method: Method, shape: str, num_seeds: int, options: Options) -> Case:
    """Initialises and compiles, as the scripts do, on random data."""
    import jax
    import numpy as np

    from common import seeds

    obs_dim, action_dim = SHAPES[shape]
    rng = np.random.default_rng(0)
    num = options.num_transitions
    obs = rng.normal(size=(num, obs_dim)).astype(np.float32)
    action = rng.uniform(-1, 1, (num, action_dim)).astype(np.float32)
    reward, terminal = rng.normal(size=(2, num)).astype(np.float32)
    terminal = (terminal > 2.5).astype(np.float32)
    mesh = seeds.mesh(num_seeds)
    lanes = seeds.lanes(range(num_seeds), mesh)
    place = partial(seeds.replicate, mesh=mesh)
    columns = tuple(map(place, (obs, action, reward, obs[::-1].copy(), terminal)))
    make = _morse if method == "Morse" else _agent
    state, train, config = make(method, shape, lanes, mesh, columns, options)
    begin = time.perf_counter()
    program, args = train
    compiled = program.lower(state, *args).compile()
    spent = time.perf_counter() - begin
    holder = {"state": state}

    def run() -> None:
        holder["state"], metrics = compiled(holder["state"], *args)
        jax.block_until_ready(metrics)

    launched = None
    if mesh.devices.flat[0].platform == "gpu":
        # An iteration of the scan has `policy_delay` updates, where there is one.
        updates = getattr(config, "policy_delay", 1)
        launched = kernels(compiled.as_text() or "") / updates
    cost = flops(method, obs_dim, action_dim, config)
    return Case(f"{method} {shape}", run, cost, spent, kernels=launched)


FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}


def kernels(program: str) -> int:
    """What an iteration of the longest loop of an optimised HLO program launches."""
    bodies, name = {}, ""
    for line in program.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line)
        name = head[1] if head else name
        bodies.setdefault(name, []).append(line)

    def count(name: str) -> int:
        total = 0
        for line in bodies[name]:
            made = re.match(r"\s+(?:ROOT )?%?[\w.-]+ = .*? ([\w-]+)\(", line)
            if not made or made[1] in FREE or made[1].endswith("-done"):
                continue
            called = re.search(r"to_apply=%?([\w.-]+)", line)
            total += count(called[1]) if called and made[1] == "call" else 1
        return total

    return max(map(count, re.findall(r"body=%?([\w.-]+)", program)), default=0)


def _agent(method, shape, lanes, mesh, columns, options) -> Any:
    import jax
    import numpy as np

    import iql_bst
    import morse
    import td3_bc
    import td3_bst
    from common import seeds

    obs_dim, action_dim = SHAPES[shape]
    module: Any = {"TD3+BC": td3_bc, "TD3-BST": td3_bst}.get(method, iql_bst)
    config: Any = module.Config()
    if module is iql_bst:
        step = "awr" if method == "IQL" else "bst"
        config = dataclasses.replace(config, policy_step=step)
    total = 10 * options.num_updates
    logged = td3_bst.Transition(*columns)
    more = {
        td3_bc: (),
        td3_bst: (logged, total),
        iql_bst: (logged, np.array([0.0, 1.0]), total),
    }
    config = module.resolve(config, DOMAINS[shape], *more[module])
    dims = {"obs_dim": obs_dim, "action_dim": action_dim}
    init = seeds.map_seeds(partial(module.init, **dims, config=config), [True], mesh)
    state = init(seeds.stage_keys(lanes, 0))
    data, keys = module.Transition(*columns), seeds.stage_keys(lanes, 2)
    count, start = len(lanes), np.int32(0)

    def lane(value: Any) -> Any:
        return seeds.split(np.full(count, value, np.float32), mesh)

    own: list[Any] = []
    if module is td3_bc:
        own = [(lane(config.alpha), True)]
    else:
        net = config.morse_net
        fresh = seeds.map_seeds(partial(morse.init, **dims, config=net), [True], mesh)
        params = fresh(seeds.stage_keys(lanes, 3)).params
        bst = module.Supervisor(
            params, *(lane(getattr(config, n)) for n in ("scale", "mu", "floor"))
        )
        own = [(bst, True)]
        if module is iql_bst:
            own.append((lane(config.expectile), True))
    args = [*own, (data, False), (keys, True), (start, False)]
    function = partial(module.train, num_updates=options.num_updates, config=config)
    flags = [True, *(flag for _, flag in args)]
    program = seeds.map_seeds(function, flags, mesh, donate=True)
    return jax.block_until_ready(state), (program, [a for a, _ in args]), config


def _morse(method, shape, lanes, mesh, columns, options) -> Any:
    import jax
    import numpy as np

    import morse
    from common import seeds

    obs_dim, action_dim = SHAPES[shape]
    config = morse.decay_over(10 * options.num_updates, morse.Config())
    init = partial(morse.init, obs_dim=obs_dim, action_dim=action_dim, config=config)
    state = seeds.map_seeds(init, [True], mesh)(seeds.stage_keys(lanes, 3))

    def train(state, obs, action, key, start):
        lam = action_dim / 2
        num = options.num_updates
        return morse.train(state, obs, action, key, start, num, lam, config)

    flags = [True, False, False, True, False]
    program = seeds.map_seeds(train, flags, mesh, donate=True)
    args = [columns[0], columns[1], seeds.stage_keys(lanes, 1), np.int32(0)]
    return jax.block_until_ready(state), (program, args), config


def make_product(num_devices: int) -> Case:
    """A float32 matrix product per device, several in a row."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from common import seeds

    repeat = 20
    mesh = seeds.mesh(num_devices)
    size = 1024 if mesh.devices.flat[0].platform == "cpu" else 4096
    matrix = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    lanes = seeds.split(np.stack([matrix / size] * mesh.size), mesh)

    def product(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, repeat, lambda _, y: jnp.dot(y, x), x)

    compiled = seeds.map_seeds(product, [True], mesh).lower(lanes).compile()

    def run() -> None:
        compiled(lanes).block_until_ready()

    return Case("matrix product", run, 2 * size**3 * repeat * mesh.size, 0.0)


# ============================================================================ Measure


def measure(num_seeds: int, options: Options) -> list[dict[str, Any]]:
    """All cases of one number of seeds, in this process."""
    import jax

    from common import seeds

    seeds.use_cores(num_seeds)
    product = make_product(min(num_seeds, len(jax.devices())))
    cases = [
        make_case(method, shape, num_seeds, options)
        for method in options.methods
        for shape in options.shapes
    ]
    for _ in range(options.rounds + 1):  # the first is to warm up
        for case in (product, *cases):
            wall, cpu = time.perf_counter(), time.process_time()
            case.run()
            case.wall.append(time.perf_counter() - wall)
            case.cpu.append(time.process_time() - cpu)
    on_cpu = jax.devices()[0].platform == "cpu"
    about = dict(
        num_seeds=num_seeds,
        device=jax.devices()[0].device_kind,
        devices=min(num_seeds, len(jax.devices())),
        peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    )
    count = num_seeds * options.num_updates
    return [about | row_of(case, product, count, on_cpu) for case in cases]


def row_of(case: Case, product: Case, count: int, on_cpu: bool) -> dict[str, Any]:
    """What the rounds of a case say, the first left out; shares are taken per round.

    Args:
        count: updates of a round, of all seeds.
        on_cpu: count core-seconds; else seconds.
    """
    spent = (case.cpu if on_cpu else case.wall)[1:]
    rates = [count / x for x in spent]
    peak = [product.flops / x for x in (product.cpu if on_cpu else product.wall)[1:]]
    shares = [x * case.flops / p for x, p in zip(rates, peak, strict=True)]
    return dict(
        case=case.name,
        updates_per_second=statistics.median(count / x for x in case.wall[1:]),
        updates_per_core_second=statistics.median(rates),
        spread=(max(rates) - min(rates)) / statistics.median(rates),
        mflop_per_update=case.flops / 1e6,
        of_peak=statistics.median(shares),
        product_gflop_per_core_second=statistics.median(peak) / 1e9,
        compile_seconds=case.compile_seconds,
        kernels=case.kernels,
    )


HEAD = (
    "case",
    "seeds",
    "updates/s",
    "per core-second",
    "spread",
    "MFLOP",
    "of peak",
    "kernels",  # per update, on a GPU
    "compile, s",
)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        [
            row["case"],
            str(row["num_seeds"]),
            f"{row['updates_per_second']:.0f}",
            f"{row['updates_per_core_second']:.0f}",
            f"{100 * row['spread']:.0f} %",
            f"{row['mflop_per_update']:.1f}",
            f"{100 * row['of_peak']:.0f} %",
            "-" if row["kernels"] is None else f"{row['kernels']:.0f}",
            f"{row['compile_seconds']:.1f}",
        ]
        for row in rows
    ]
    return tables.markdown(HEAD, lines)


def main() -> None:
    """One process per number of seeds; prints the table, writes the JSON."""
    options = tyro.cli(Options, description=(__doc__ or "").split("\n\n")[0])
    inside = os.environ.get("THROUGHPUT_SEEDS")
    if inside:
        if options.cores:  # before JAX starts
            # The last ones: interrupts and other work prefer the first.
            own = sorted(os.sched_getaffinity(0))[-options.cores :]
            os.sched_setaffinity(0, own)
        print(json.dumps(measure(int(inside), options)))
        return
    rows = []
    for count in options.num_seeds:
        environment = {**os.environ, "THROUGHPUT_SEEDS": str(count)}
        command = [sys.executable, __file__, *sys.argv[1:]]
        out = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        ).stdout
        rows += json.loads(out.splitlines()[-1])
    report.publish(rows, table(rows), options.out)


if __name__ == "__main__":
    main()
