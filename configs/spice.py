"""SPICE, as far as it goes: MoCo, the network whose features the later stages take.

python -m jaxclust.main --config=configs/spice.py --config.evaluate.suite=knn
python -m jaxclust.main --config=configs/spice.py:smoke
"""

from ml_collections import ConfigDict

from jaxclust import config as c


def get_config(variant: str = "") -> ConfigDict:
    """The default learns from scikit-learn's 8 x 8 digits; variants are separated by commas and apply in order."""
    config = c.base()
    config.stages = "moco"
    config.sampler = "uniform_image"
    config.moco.queue, config.moco.momentum, config.moco.dim = 1024, 0.99, 64
    view = config.views.train
    view.rotate, view.scale, view.shear, view.translate = 15.0, 0.2, 12.0, 0.125
    with config.unlocked():
        config.views.query = config.views.train.copy_and_resolve_references()
        config.views.key = config.views.train.copy_and_resolve_references()
        config.stage.moco = {
            "method": "moco",
            "rounds": 50,
            "batch_size": 64,
            "optimizer": {
                "body": {"name": "sgd", "lr": 0.03, "momentum": 0.9, "weight_decay": 1e-4, "schedule": "cosine"}
            },
        }
    return c.apply_variants(config, variant, {"smoke": smoke})


def smoke(config: ConfigDict) -> None:
    """Two short rounds of a tiny network."""
    config.stage.moco.rounds = 2
    config.refresh_every = "20 steps"
    config.model.width, config.model.dim = 8, 32
    config.moco.queue, config.moco.dim = 256, 16
