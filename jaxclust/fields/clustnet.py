"""The settings of ClustNet, `config.clustnet`."""

import math

from jaxclust.kinds import Field, choice, flag, number, positive, some


def _stack(layers: int, channels: int, kernel: int, pools: tuple[int, int]) -> dict[str, Field]:
    return {
        "layers": number(layers, 0, 100, "convolutions, of which there are two at least; 0: none"),
        "channels": number(channels, 1, 4096, "channels of each"),
        "kernel": number(kernel, 1, 31, "side of its kernels"),
        "pool": number(pools[0], 1, 64, "window of the max pooling half way; 1: none"),
        "pool_out": number(pools[1], 1, 64, "window of that after the last one; 1: none"),
        "dropout": number(0.0, 0.0, 0.9, "share of channels dropped in training before each but the first"),
        "bn": flag(True, "whether batch norm follows each"),
    }


def _dense(least: int, layers: int, size: int) -> dict[str, Field]:
    none = "" if least else "; 0: maps are added up, and one layer for all experts sees the sum"
    return {
        "dense_layers": number(layers, least, 100, f"dense layers, the output's among them{none}"),
        "dense_size": some((size,), 1, 65536, "width of each hidden one, or one for all"),
    }


CLUSTNET = {
    "decision": choice(
        "sample",
        ("always_sample", "argmax", "soft", "gumbel"),
        "clustnet: how the gate chooses the expert of an image: drawn in training and the likeliest in evaluation, "
        "always drawn, always the likeliest, all by their probability, or Gumbel's straight-through estimator",
    ),
    "temperature": positive(1.0, "gumbel: what logits and noise are divided by"),
    "combine": choice(
        "sum",
        ("select", "halves"),
        "log-probabilities of all experts added up, or of the chosen one alone; halves: the sum of the first half's "
        "maps beside minus that of the second's",
    ),
    "optimizer": choice("sgd", ("adam", "amsgrad"), "rule of the method's two optimisers; `optimizer` is not used"),
    "momentum": number(0.5, 0.0, 0.9999, "momentum of sgd"),
    "lr": number(0.01, 0.0, math.inf, "learning rate of the experts"),
    "lr_gate": Field(-1.0, lambda v: v == -1 or 0 <= v < math.inf, "0 or more, or -1", "rate of the gate; -1: `lr`"),
    "lr_next": some((), 0.0, math.inf, "rates of the experts after `lr`, each for an equal share of the rounds"),
    "lr_gate_next": some((), 0.0, math.inf, "rates of the gate after `lr_gate`, as many; of lr_gate=-1 also `lr_next`"),
    "period": number(2, 0, math.inf, "steps that gate and experts move in turn; 0: both in each step"),
    "mode": choice("joint", ("separated",), "separated: in its turn the gate learns which expert is best"),
    "best_share": some(
        (0.9, 0.5, 0.1),
        0.0,
        1.0,
        "separated: share of images with the best expert in epochs 0, 1, …, of which the first that is trained is 1",
    ),
    "noise": number(0.0, 0.0, math.inf, "noise on the gate's gradient, as a share of its length"),
    "gate_entropy": number(0.0, -100.0, 100.0, "weight of the entropy of an image's gate; over 0 it should be large"),
    "diversity": number(0.0, 0.0, math.inf, "weight of the entropy of the mean gate, which should be large"),
    "group_diversity": number(0.0, 0.0, math.inf, "weight of that entropy within each of both groups"),
    "filter_similarity": number(0.0, 0.0, math.inf, "weight of how alike the experts' last filters are"),
    "map_entropy": number(0.0, 0.0, math.inf, "weight of the entropy of the experts' last maps"),
    "map_spread": number(0.0, 0.0, math.inf, "weight of the deviation of those maps over images of a group"),
    "gate": _stack(5, 3, 5, (2, 2)) | _dense(1, 1, 64),
    "experts": _stack(2, 3, 3, (2, 5))
    | _dense(0, 1, 2)
    | {
        "sum_pixels": flag(False, "dense_layers 0: whether the sum of maps is summed over pixels too"),
        "bn_selected": flag(False, "whether batch norm of an expert counts only the images that it is given"),
    },
    "encoder": _stack(0, 32, 4, (2, 2))
    | {
        "dim": number(100, 1, 65536, "length of the code that gate and experts see"),
        "gradient": choice("both", ("gate", "none"), "who moves the encoder; none: it is in evaluation mode"),
        "decoder_relu": flag(False, "cae: whether the last layer has batch norm and ReLU, as published"),
    },
}
