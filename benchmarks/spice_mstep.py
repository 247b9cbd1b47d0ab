"""The M step of SPICE-Self: one scan over all heads at once, against a loop in Python over heads and minibatches.

Both learn the same labels of the same features in the same minibatches and the same arithmetic, so that their losses at
the end may differ by rounding alone. The peer is what one writes first: a jitted step of one head, called for each head
and each minibatch; it waits for nothing before the end. A turn is the M step of one pool, without the E step.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from benchmarks import results, sides
from jaxclust import config as config_lib

Run = Callable[[], tuple[float, list[float]]]
"""Seconds of an M step, and the mean loss of each head over its last pass."""


class Case(NamedTuple):
    """The pool, and how it is learnt."""

    size: int
    dim: int
    k: int
    heads: int
    batch: int
    repeats: int


class Problem(NamedTuple):
    """What both sides are given: heads, features [B, D], labels of each head [H, B], and minibatches of them."""

    net: Any
    params: Any
    extra: Any
    pool: Any
    found: Any
    key: Any


CASE, QUICK = Case(5000, 512, 10, 10, 128, 8), Case(200, 16, 4, 3, 20, 2)


def main() -> None:
    """Measures and writes the section."""
    parser = results.arguments(__doc__)
    parser.add_argument("--turns", type=int, default=5, help="turns of each side")
    options = results.parse(parser)
    case, turns = (QUICK, 1) if options.quick else (CASE, options.turns)
    with sides.sides({name: (make, case) for name, make in SIDES.items()}) as asks:
        sides.take_turns(asks, 1)  # compiles
        answers = sides.take_turns(asks, turns)
    results.publish(options, "M step of SPICE", "python -m benchmarks.spice_mstep", describe(case, answers))


def describe(case: Case, answers: Mapping[str, Sequence[sides.Answer]]) -> str:
    """The table."""
    seconds = {name: [answer.value[0] for answer in of_side] for name, of_side in answers.items()}
    losses = {name: np.array(of_side[-1].value[1]) for name, of_side in answers.items()}
    rows = [
        [name, results.spread(times), results.ratio(seconds[PEER], times), results.gigabytes(answers[name][-1].peak)]
        for name, times in seconds.items()
    ]
    steps = case.size // case.batch * case.repeats
    difference = max(float(np.abs(found - losses[PEER]).max()) for found in losses.values())
    return (
        f"{case.size:,} x {case.dim}, k = {case.k}, {case.heads} heads, {steps} minibatches of {case.batch}. Largest "
        f"difference of the losses {difference:.6f}.\n\n"
        f"{results.table(('', 'seconds', 'speed / loop', 'peak memory'), rows)}"
    )


def problem(case: Case) -> Problem:
    """Rows of overlapping clusters, a fifth of whose labels is wrong, another fifth for each head."""
    import jax
    import jax.numpy as jnp

    from jaxclust import runtime
    from jaxclust.methods import spice
    from jaxclust.methods.base import DataInfo
    from jaxclust.ops.prototypes import PseudoLabels

    config = config_lib.base()
    config.runtime.cpu_devices, config.cluster.k, config.freeze_body = 1, case.k, True
    config.batch_size, config.spice.num_head = case.size, case.heads
    config.spice.train_sub_batch_size, config.spice.num_repeat = case.batch, case.repeats
    runtime.start(config)
    rng = np.random.default_rng(0)
    truth = np.arange(case.size) * case.k // case.size
    rows = rng.standard_normal((case.k, case.dim))[truth] + rng.standard_normal((case.size, case.dim))
    shape = (case.heads, case.size)
    label = np.where(rng.random(shape) < 0.2, rng.integers(0, case.k, shape), truth).astype(np.int32)
    image = np.broadcast_to(np.arange(case.size, dtype=np.int32), shape)
    net = spice.net_of(config, DataInfo(case.size, (case.dim,)))
    pool = jax.device_put(rows.astype(np.float32))
    params, extra = spice.init(net, jax.random.key(0), {"views": {"original": pool}})
    found = PseudoLabels(jnp.asarray(image), jnp.asarray(label), jnp.ones(shape, bool))
    return Problem(net, params, extra, pool, found, jax.random.key(1))


def scan(case: Case) -> Run:
    """The M step of a run."""
    import jax

    from jaxclust.methods import spice

    p = problem(case)
    start = spice.Carry(p.params["heads"], p.net.adam.init(p.params["heads"]), p.extra["drift"])
    m_step = jax.jit(partial(spice.m_step, p.net, p.params, p.extra))

    def run() -> np.ndarray:
        _, losses = m_step(start, p.found, p.pool, p.key)
        return np.asarray(losses)

    return timed(case, run)


def loop(case: Case) -> Run:
    """A step of one head, for each head and each minibatch."""
    import jax
    import jax.numpy as jnp
    import optax

    from jaxclust.methods import heads, spice
    from jaxclust.ops.losses import double_softmax

    p = problem(case)
    ones = jnp.ones(case.batch)

    @jax.jit
    def step(head: Any, moments: Any, pool: jax.Array, image: jax.Array, label: jax.Array) -> Any:
        def objective(head: Any) -> jax.Array:  # its share of the mean over heads
            return double_softmax(heads.scores(p.net.heads, head, pool[image]), label, ones) / case.heads

        value, gradient = jax.value_and_grad(objective)(head)
        changes, moments = p.net.adam.update(gradient, moments, head)
        return optax.apply_updates(head, changes), moments, value * case.heads

    places = np.asarray(spice.minibatches(p.net, case.size, p.key)[0])
    images, labels = np.asarray(p.found.image), np.asarray(p.found.label)

    def run() -> np.ndarray:
        losses: list[list[jax.Array]] = []
        for h in range(case.heads):
            head = jax.tree.map(lambda leaf, h=h: leaf[h], p.params["heads"])
            moments, of_head = p.net.adam.init(head), []
            for chosen in places:
                head, moments, value = step(head, moments, p.pool, images[h, chosen], labels[h, chosen])
                of_head.append(value)
            losses.append(of_head)
        return np.array(jax.device_get(losses)).T

    return timed(case, run)


def timed(case: Case, run: Callable[[], np.ndarray]) -> Run:
    """What a side answers; `run` gives the losses [steps, H]."""

    def answer() -> tuple[float, list[float]]:
        start = time.perf_counter()
        losses = run()
        seconds = time.perf_counter() - start
        return seconds, losses[-(case.size // case.batch) :].mean(axis=0).tolist()

    return answer


PEER = "loop"
SIDES: dict[str, Callable[[Case], Run]] = {PEER: loop, "scan over vmapped heads": scan}


if __name__ == "__main__":
    main()
