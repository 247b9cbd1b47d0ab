"""What a person sees of a training: one line for each round, and warnings in words."""

from collections.abc import Mapping

from jaxclust.evaluation import clustering
from jaxclust.train.stage import Stage


def print_round(stage: Stage, step: int, values: Mapping[str, float], before: float = 0.0) -> None:
    """Prints the line of a record, and what is suspicious about it; `before` clusters were found in earlier ones."""
    print(line(stage, step, values), flush=True)
    loss = clustering.judged_loss(values, step // stage.lengths.round)
    outputs = clustering.outputs(values, before, stage.method.num_clusters)
    size = stage.split.size if step == 0 else 10**12  # too few images is said once
    for words in clustering.warnings(values, size, stage.method.num_clusters, loss, outputs):
        print(f"  warning: {words}", flush=True)


def line(stage: Stage, step: int, values: Mapping[str, float]) -> str:
    """One line such as "deepcluster 3/40 · loss 1.92 · clusters 10/10 · largest 14 % · ..."."""
    length = stage.lengths
    total = -(-length.stage // length.round) if length.round else 0
    parts = [f"{stage.name} {step / length.round:g}/{total}" if length.stage else stage.name]
    asked = stage.method.num_clusters
    known = {
        "train/loss": lambda v: f"loss {v:.3f}",
        "train/accuracy": lambda v: f"accuracy {v:.3f}",
        "train/top1": lambda v: f"own key first {v:.0%}",
        "train/skipped": lambda v: f"skipped {v:.0%}" if v else "",
        "train/spread": lambda v: f"spread {v:.2f}",
        "clusters/found": lambda v: f"clusters {v:.0f}" + (f"/{asked}" if asked else ""),
        "clusters/largest_share": lambda v: f"largest {v:.0%}",
        "clusters/nmi_prev": lambda v: f"NMI to previous {v:.3f}",
        "clusters/changed": lambda v: f"moved {v:.0%}",
        "reliable/labelled": lambda v: f"labelled {v:,.0f}",
        "train/acc": lambda v: f"ACC {v:.3f}",
        "train/nmi": lambda v: f"NMI {v:.3f}",
        "images_per_second": lambda v: f"{v:,.0f} images/s",
    }
    parts += [show(values[name]) for name, show in known.items() if name in values]
    return " · ".join(filter(None, parts))
