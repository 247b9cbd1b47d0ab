"""--job=report: pictures and one page from the files of a workdir."""

from pathlib import Path

from ml_collections import ConfigDict

from jaxclust.jobs.options import Options
from jaxclust.report import html


def run(config: ConfigDict, workdir: Path, options: Options) -> None:
    """Writes report/index.html."""
    page = html.write(workdir)
    print(f"report: {page}", flush=True)
