"""What the command line says beside the config."""

from typing import NamedTuple


class Options(NamedTuple):
    """Flags of single jobs; empty where not given."""

    images: str = ""  # predict: folder of images
    out: str = ""  # predict: .csv or .parquet file
    by_cluster: str = ""  # export: "link" or "copy"
    overwrite: bool = False  # export: replace what is there
    topology: str = ""  # plan: devices to compile for
    largest: bool = True  # plan: look for the largest batch too, which compiles several more
