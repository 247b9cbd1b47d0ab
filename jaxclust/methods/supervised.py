"""Training with class labels: the upper bound to compare with, and bodies for `init_from`.

The network, loss and checkpoint are DeepCluster's, so that `init_from` of a DeepCluster run takes such a checkpoint;
with `freeze_body` it is the linear classifier on frozen features.
"""

from functools import partial

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxclust.errors import ConfigError
from jaxclust.methods import classifier
from jaxclust.methods.base import Batch, DataInfo, Method, merge
from jaxclust.methods.classifier import Classifier, Extra, Params


def make(config: ConfigDict, info: DataInfo) -> Method:
    """A classifier of the classes; ConfigError if the data have none."""
    if info.num_classes is None:
        raise ConfigError(
            f"config.method='supervised' learns from class labels, and config.data.source={config.data.source!r} has "
            "none; two class folders or more are labels, or choose another method"
        )
    c = classifier.classifier(config, info)
    return Method(
        init=partial(init, info.num_classes, c),
        loss=partial(classifier.loss, c),
        embed=partial(classifier.embed, c),
        predict=partial(predict, c),
        labels="class",
        num_clusters=info.num_classes,
    )


def init(num_classes: int, c: Classifier, rng: jax.Array, batch: Batch) -> tuple[Params, Extra]:
    """New parameters with one output for each class."""
    params, extra, _ = classifier.init(c, rng, batch, num_classes)
    return params, merge(extra, num_outputs=jnp.full((), num_classes, jnp.int32))


def predict(c: Classifier, params: Params, extra: Extra, images: jax.Array) -> dict[str, jax.Array]:
    """The most probable class as `cluster`, and its probability as `score`."""
    probabilities = jax.nn.softmax(classifier.logits(c, params, classifier.embed(c, params, extra, images)))
    return {
        "cluster": jnp.argmax(probabilities, axis=1).astype(jnp.int32),
        "score": jnp.max(probabilities, axis=1),
    }
