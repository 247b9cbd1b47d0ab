"""The settings of DSCL, `config.dscl`."""

import math

from jaxclust.kinds import choice, flag, number

DSCL = {
    "vector_size": number(0, 0, 65536, "dscl: length d of an embedding; 0: as many as there are training classes"),
    "scope": choice("large", ("small",), "one loss of the whole batch, or one for each small batch, as published"),
    "small_batch_size": number(60, 1, math.inf, "images in a forward pass, at most; `batch_size` is the large batch"),
    "solver": choice(
        "gradient", ("closed_form",), "closed_form: on a frozen body, the linear layer of the least loss, without steps"
    ),
    "init": choice("normal", ("orthogonal", "upstream"), "of the last layer: N(0, 0.01^2), orthogonal, or U(-2, 2)"),
    "dropout_rate": number(0.0, 0.0, 0.9, "share of numbers dropped in training; L is measured without"),
    "dropout_site": choice("embedding", ("feature",), "of what: of the embedding, or before the last layer"),
    "bn": choice(
        "frozen", ("small_batch",), "batch norm: the body in evaluation mode, or statistics of each small batch"
    ),
    "row_normalize": flag(False, "whether embeddings are brought to unit length before the loss"),
    "grad_scale": number(1.0, 0.0, math.inf, "1: the gradient of the loss, 0.5: half of it, as published"),
    "mean_gradient": flag(False, "whether the gradient is divided by the number of images of a loss, as published"),
    "rtol": number(0.0, 0.0, 0.5, "singular values below this share of the largest are zero; 0: 1e-5, float64 1e-12"),
    "ridge": number(0.0, 0.0, math.inf, "added to F'F, and with closed_form to X'X, as a share of its mean diagonal"),
    "allow_degenerate": flag(False, "whether a loss may have no more images than an embedding has numbers"),
    "max_grad_norm": number(0.0, 0.0, math.inf, "a step with a longer gradient is skipped; 0: any may be taken"),
    "loss_skip_threshold": number(5e8, 0.0, math.inf, "a step whose <G, F> per image is farther from 0 is skipped"),
}
