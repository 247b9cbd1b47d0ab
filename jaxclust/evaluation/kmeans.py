"""k-means on frozen features: how far their clusters are classes, whatever the method that made them predicts."""

import numpy as np
from ml_collections import ConfigDict

from jaxclust import cluster
from jaxclust.cluster import reduce
from jaxclust.evaluation import clustering
from jaxclust.evaluation.suite import Images


def compare(images: Images, config: ConfigDict) -> dict[str, float]:
    """`kmeans/acc`, `kmeans/nmi` and so on of the training images, in as many clusters as there are classes.

    Features of any length are reduced and clustered as `config.cluster` says, but without whitening, which makes the
    noise of many dimensions as large as what tells classes apart; where it says PIC, by k-means. ConfigError if there
    are fewer images than classes.
    """
    labels = images.train.labels
    own = ConfigDict(config.to_dict())
    own.cluster.k = max(2, len(np.unique(labels[labels >= 0])))
    own.cluster.method = "kmeans" if own.cluster.method == "pic" else own.cluster.method
    c, rows = own.cluster, images.train.rows()
    whitening, _ = reduce.fit(rows, c.pca_dim, power=0.0)
    points, _ = reduce.transform(rows, whitening, l2=c.l2)
    found = cluster.get(own)(points, c.seed if c.seed >= 0 else config.seed)
    scores = clustering.scores(found.labels, labels, config.evaluate.nmi_average)
    return {f"kmeans/{name}": value for name, value in scores.items()} | {"kmeans/k": c.k}
