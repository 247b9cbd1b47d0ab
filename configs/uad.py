"""UAD: DeepCluster on low and high features, with images weighted by how certain their cluster is.

python -m jaxclust.main --config=configs/uad.py
python -m jaxclust.main --config=configs/uad.py:mnist --config.data.source=idx:FOLDER --config.uad.mode=uncertainty
python -m jaxclust.main --config=configs/uad.py:folder --config.data.source=folder:PHOTOS --config.cluster.k=20
python -m jaxclust.main --config=configs/uad.py:imagenet --config.data.source=folder:IMAGENET
"""

from pathlib import Path

from ml_collections import ConfigDict

from jaxclust import config as c


def get_config(variant: str = "") -> ConfigDict:
    """Settings and variants are those of DeepCluster, without v2; `uad.mode` says which of the two parts are used."""
    config = c.from_file(Path(__file__).with_name("deepcluster.py"), variant)
    if config.method != "deepcluster":
        raise c.ConfigError(f"configs/uad.py:{variant}: UAD is a difference from DeepCluster, not from {config.method}")
    config.method = config.stages = "uad"
    return config
