"""ClustNet's network: an encoder if there is one, a gate, and experts that each see what the gate gives them.

Sections 2.2 to 2.4 of our specification. All experts run on all images: expert k is given c_k x, the image or its code
times its entry of the gate's choice, so that those not chosen see zeros. Parameters and batch statistics of the experts
are stacked along a first axis.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxclust import models, runtime
from jaxclust.methods import gate
from jaxclust.methods.base import Batch, merge
from jaxclust.methods.gate import Decision
from jaxclust.models.experts import CNN, NO_STACK, stack
from jaxclust.ops.images import standardize

Params = dict[str, Any]
Stats = dict[str, Any]


class Net(NamedTuple):
    """The networks, and what is between them."""

    encoder: CNN | None
    gate: CNN
    expert: CNN
    top: CNN | None  # one dense layer on the sum of the experts' maps, where they have none of their own
    k: int
    decision: Decision
    settings: ConfigDict  # config.clustnet
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: Any
    seed: int


class Ran(NamedTuple):
    """What a network gave: its output, batch statistics, and recorded maps."""

    output: jax.Array
    stats: Any
    maps: dict[str, Any]


class Said(NamedTuple):
    """What is found of images."""

    logits: jax.Array  # [B, K] of the gate
    choice: jax.Array  # [B, K]
    log_probs: jax.Array  # [B, 2]: of N, of P
    maps: Any  # [K, B, H, W, C], the last one of each expert; None without convolutions
    stats: Stats


def build(config: ConfigDict) -> Net:
    """The networks of `config.clustnet`."""
    s, m = config.clustnet, config.data
    kinds: dict[str, Any] = {"dtype": runtime.compute_dtype(config), "param_dtype": runtime.param_dtype(config)}

    def cnn(section: ConfigDict, outputs: int) -> CNN:
        layers, sizes = section.dense_layers, tuple(section.dense_size)
        hidden = sizes if len(sizes) == layers - 1 else sizes[:1] * (layers - 1)
        return CNN(stack(section), hidden, outputs if layers else 0, **kinds)

    top = None if s.experts.dense_layers else CNN(NO_STACK, (), 2, **kinds)
    return Net(
        encoder(config), cnn(s.gate, config.cluster.k), cnn(s.experts, 2), top, config.cluster.k,
        gate.DECISIONS[s.decision], s, tuple(m.mean), tuple(m.std), kinds["param_dtype"], config.seed,
    )  # fmt: skip


def encoder(config: ConfigDict) -> CNN | None:
    """The encoder of `config.clustnet.encoder`, None without layers."""
    sizes = stack(config.clustnet.encoder)
    kinds = runtime.compute_dtype(config), runtime.param_dtype(config)
    return CNN(sizes, (), config.clustnet.encoder.dim, *kinds) if sizes.depth else None


def init(net: Net, rng: jax.Array, batch: Batch) -> tuple[Params, Any]:
    """New parameters {"body" (the encoder), "gate", "experts", "top"}, as far as there are such."""
    body_rng, gate_rng, experts_rng, top_rng = jax.random.split(rng, 4)
    x = standardize(jnp.asarray(batch["views"]["train"][:1]), net.mean, net.std, net.dtype)
    made: dict[str, Any] = {}
    if net.encoder and x.ndim > 2:
        made["body"] = net.encoder.init(body_rng, x)
        x = jnp.zeros((1, net.encoder.outputs), net.dtype)
    made["gate"] = net.gate.init(gate_rng, x)
    made["experts"] = jax.vmap(lambda key: net.expert.init(key, x))(jax.random.split(experts_rng, net.k))
    if net.top:
        maps = jax.eval_shape(net.expert.apply, jax.tree.map(lambda leaf: leaf[0], made["experts"]), x)
        total = weighed(net, jnp.zeros((net.k, *maps.shape), net.dtype), jnp.zeros((1, net.k), net.dtype))
        made["top"] = net.top.init(top_rng, pooled(net, total))
    params = {name: variables["params"] for name, variables in made.items()}
    stats = {name: variables.get("batch_stats", {}) for name, variables in made.items() if name != "top"}
    return params, {"batch_stats": stats}


def run(
    network: CNN, params: Any, stats: Any, x: jax.Array, train: bool, rng: jax.Array | None, rows: Any = None
) -> Ran:
    """A network on x, in training or evaluation mode; with `rows` [B] batch norm counts each image so much."""
    rngs = {"dropout": rng} if train and rng is not None else {}
    output, found = network.apply(
        {"params": params, "batch_stats": stats}, x, train, rows, mutable=["batch_stats", "maps"], rngs=rngs
    )
    dtype = jnp.promote_types(output.dtype, jnp.float32)
    return Ran(output.astype(dtype), found.get("batch_stats", {}) if train else stats, found.get("maps", {}))


def encode(net: Net, params: Params, stats: Stats, images: jax.Array, train: bool, rng: jax.Array | None) -> Ran:
    """The code [B, D] of images and new statistics; without an encoder, or of vectors, what they are, and no others."""
    x = standardize(images, net.mean, net.std, net.dtype)
    if net.encoder is None or x.ndim == 2:
        return Ran(x, {}, {})
    learns = net.settings.encoder.gradient != "none"
    code = run(net.encoder, params["body"], stats["body"], x, train and learns, rng)
    return Ran(code.output if learns else jax.lax.stop_gradient(code.output), {"body": code.stats}, code.maps)


def run_experts(
    net: Net, params: Params, stats: Stats, x: jax.Array, train: bool, rng: jax.Array, choice: jax.Array | None = None
) -> Ran:
    """Each expert on its own inputs x [K, B, ...]; batch norm is of the images that it is given, if that is asked for
    and `choice` [B, K] says which these are. Convolutions go one by one, since in groups they are slow on a CPU."""
    rows = None if choice is None or not net.settings.experts.bn_selected else jax.lax.stop_gradient(choice).T

    def one(params: Any, stats: Any, x: jax.Array, rng: jax.Array, rows: Any) -> Ran:
        return run(net.expert, params, stats, x, train, rng, rows)

    each = params["experts"], stats["experts"], x, jax.random.split(rng, net.k), rows
    return jax.lax.map(lambda of: one(*of), each) if net.expert.sizes.depth else jax.vmap(one)(*each)


def parts(net: Net, outputs: jax.Array) -> jax.Array:
    """What is combined of the experts' outputs: log-probabilities [K, B, 2], or their maps."""
    return outputs if net.top else jax.nn.log_softmax(outputs)


def weighed(net: Net, found: jax.Array, choice: jax.Array) -> jax.Array:
    """The sum over experts of parts [K, B, ...]: of all of them, or with "select" of the chosen one.

    With "halves" (section 2.11) the sum over the first half, and beside it, by channel, minus that over the second.
    """
    if net.settings.combine == "sum":
        return found.sum(axis=0)
    if net.settings.combine == "halves":
        first, second = found.reshape(2, -1, *found.shape[1:]).sum(axis=1)
        return jnp.concatenate([first, -second], axis=-1)
    return jnp.einsum("bk,kb...->b...", choice, found, precision=jax.lax.Precision.HIGHEST)


def pooled(net: Net, maps: jax.Array) -> jax.Array:
    """A sum of maps [B, H, W, C] as the layer of all experts sees it."""
    return maps.sum(axis=(1, 2)) if net.settings.experts.sum_pixels else maps


def log_probabilities(net: Net, params: Params, total: jax.Array) -> jax.Array:
    """ln P of N and of P, [..., 2], from sums of parts: in both cases a log-softmax comes last."""
    if net.top:
        total = run(net.top, params["top"], {}, pooled(net, total), False, None).output
    return jax.nn.log_softmax(total)


def given(choice: jax.Array, x: jax.Array) -> jax.Array:
    """What each expert sees, c_k x: [K, B, ...] of a choice c [B, K] and codes or images x [B, ...]."""
    return choice.T.reshape(choice.shape[1], -1, *[1] * (x.ndim - 1)) * x


def ask(net: Net, params: Params, stats: Stats, x: jax.Array, choice: jax.Array, train: bool, rng: jax.Array) -> Ran:
    """ln P of N and P [B, 2] by the experts, of codes or images x of which expert k is given c_k x."""
    experts = run_experts(net, params, stats, given(choice, x), train, rng, choice)
    total = weighed(net, parts(net, experts.output), choice)
    return experts._replace(output=log_probabilities(net, params, total))


def for_experts(net: Net, code: jax.Array) -> jax.Array:
    """The encoder's code as experts are given it: the encoder may be left to the gate."""
    return code if net.settings.encoder.gradient == "both" else jax.lax.stop_gradient(code)


def forward(
    net: Net, params: Params, stats: Stats, images: jax.Array, noise: jax.Array, train: bool, rng: jax.Array
) -> Said:
    """Gate and experts on images, with Gumbel noise [B, K] to draw by."""
    body_rng, gate_rng, experts_rng = jax.random.split(rng, 3)
    body = encode(net, params, stats, images, train, body_rng)
    decided = run(net.gate, params["gate"], stats["gate"], body.output, train, gate_rng)
    choose = net.decision.training if train else net.decision.evaluation
    choice = choose(decided.output, noise.astype(decided.output.dtype), net.settings.temperature)
    experts = ask(net, params, stats, for_experts(net, body.output), choice, train, experts_rng)
    new = merge(stats, **body.stats, gate=decided.stats, experts=experts.stats)
    return Said(decided.output, choice, experts.output, experts.maps.get("last", (None,))[0], new)


def experts(net: Net, params: Params, extra: Any, images: jax.Array, noise: jax.Array) -> dict[str, jax.Array]:
    """`Method.experts`, with Gumbel noise [B, K] to draw by."""
    stats = extra["batch_stats"]
    x = encode(net, params, stats, images, False, None).output
    logits = run(net.gate, params["gate"], stats["gate"], x, False, None).output
    choice = net.decision.evaluation(logits, noise.astype(logits.dtype), net.settings.temperature)
    seen = given(choice, x)
    maps = run_experts(net, params, stats, seen, False, jax.random.key(0)).maps.get("stack", {})
    found = {"input": seen} | {name: of_layer[0] for name, of_layer in maps.items()}
    return {"choice": choice} | {name: jnp.swapaxes(of_layer, 0, 1) for name, of_layer in found.items()}


def forced(net: Net, params: Params, stats: Stats, x: jax.Array) -> jax.Array:
    """Log-probabilities [K, B, 2] of codes or images x if each is given to expert k, in evaluation mode.

    An expert that is given nothing says the same of every image, so that two passes do.
    """
    key = jax.random.key(0)  # nothing is dropped
    everything = jnp.broadcast_to(x, (net.k, *x.shape))
    nothing = jnp.zeros((net.k, 1, *x.shape[1:]), x.dtype)
    found, silent = (parts(net, run_experts(net, params, stats, of, False, key).output) for of in (everything, nothing))
    if net.settings.combine == "sum":
        found = found + (silent.sum(axis=0) - silent)
    return jax.vmap(lambda total: log_probabilities(net, params, total))(found)


def layer_names(net: Net) -> tuple[str, ...]:
    """The maps that `embed` knows of images: "encoder/conv1", "gate/conv1", …, "expert0/conv1", …"""
    networks = {"encoder": net.encoder, "gate": net.gate} | {f"expert{k}": net.expert for k in range(net.k)}
    depths = {name: network.sizes.depth for name, network in networks.items() if network}
    return tuple(f"{name}/conv{number}" for name, depth in depths.items() for number in range(1, depth + 1))


def embed(net: Net, params: Params, extra: Any, images: jax.Array, layers: tuple[str, ...] = ()) -> Any:
    """The code of images [B, D], without an encoder what the gate's last layer sees; or the maps of `layers`.

    There are "feature" (this), "encoder/conv1", "gate/conv1", … and "expert0/conv1", …, of experts that are given all
    images. ConfigError, which lists what there is, if a layer does not exist.
    """
    stats = extra["batch_stats"]
    body = encode(net, params, stats, images, False, None)
    of_gate = run(net.gate, params["gate"], stats["gate"], body.output, False, None)
    feature = body.output if body.output.ndim == 2 else of_gate.maps["feature"][0]
    if not layers:
        return feature.astype(net.dtype)
    everything = jnp.broadcast_to(body.output, (net.k, *body.output.shape))
    experts = run_experts(net, params, stats, everything, False, jax.random.key(0)).maps.get("stack", {})
    found = {f"encoder/{name}": maps[0] for name, maps in body.maps.get("stack", {}).items()}
    found |= {f"gate/{name}": maps[0] for name, maps in of_gate.maps.get("stack", {}).items()}
    found |= {f"expert{k}/{name}": maps[0][k] for name, maps in experts.items() for k in range(net.k)}
    found["feature"] = feature
    return models.asked(found, layers, net.dtype)
