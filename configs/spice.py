"""SPICE, as far as it goes: MoCo, k-means of its embeddings, heads on it (SPICE-Self), and reliable labels.

python -m jaxclust.main --config=configs/spice.py
python -m jaxclust.main --config=configs/spice.py --config.stages=moco --config.evaluate.suite=knn
python -m jaxclust.main --config=configs/spice.py:smoke
"""

from ml_collections import ConfigDict

from jaxclust import config as c


def get_config(variant: str = "") -> ConfigDict:
    """The default learns from scikit-learn's 8 x 8 digits; variants are separated by commas and apply in order."""
    config = c.base()
    config.stages = "moco,embed,self,reliable"
    config.sampler = "uniform_image"
    config.evaluate.suite = "clustering,heads"
    config.moco.queue, config.moco.momentum, config.moco.dim = 1024, 0.99, 64
    view = config.views.train
    view.rotate, view.scale, view.shear, view.translate = 15.0, 0.2, 12.0, 0.125
    with config.unlocked():
        for name in ("query", "key", "strong"):
            config.views[name] = view.copy_and_resolve_references()
        config.views.original = ConfigDict({"flip": 0.0})
        config.views.weak = ConfigDict({"translate": 0.0625})
        config.stage = stages()
    return c.apply_variants(config, variant, {"smoke": smoke})


def stages() -> ConfigDict:
    """What each stage does otherwise than the whole."""
    sgd = {"name": "sgd", "lr": 0.03, "momentum": 0.9, "weight_decay": 1e-4, "schedule": "cosine"}
    as_it_is = {"k": 10, "pca_dim": 0, "whiten": False, "runs": 10}
    return ConfigDict(
        {
            "moco": {"method": "moco", "rounds": 50, "batch_size": 64, "optimizer": {"body": sgd}},
            "embed": {
                "method": "deepcluster", "rounds": 0, "freeze_body": True, "init_from": "@moco", "cluster": as_it_is
            },
            "self": {
                "method": "spice", "rounds": 30, "batch_size": 1500, "sampler": "resample", "init_from": "@moco"
            },
            "reliable": {"method": "reliable", "rounds": 0, "init_from": "@self"},
        }
    )  # fmt: skip


def smoke(config: ConfigDict) -> None:
    """Two short rounds of a tiny network."""
    config.stage.moco.rounds = 2
    config.stage.self.rounds = 2
    config.refresh_every = "20 steps"
    config.model.width, config.model.dim = 8, 32
    config.moco.queue, config.moco.dim = 256, 16
    config.spice.num_head = 2
