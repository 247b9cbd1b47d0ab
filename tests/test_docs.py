"""What the documents say is so."""

import re
from pathlib import Path

from jaxclust import config, plugins
from jaxclust.config import from_file


def test_the_table_of_settings_is_current():
    text = Path("docs/config.md").read_text()
    assert config.table() in text, "run: python -c 'from jaxclust import config; print(config.table())'"


def test_every_config_and_setting_that_the_readme_names_exists():
    text = Path("README.md").read_text()
    for path, variant in re.findall(r"--config=(configs/\w+\.py)(?::([\w,]+))?", text):
        from_file(Path(path), variant)
    for name in re.findall(r"config\.([a-z_]+(?:\.[a-z_]+)*)=", text):
        assert config.field_of(name) is not None, name
    for job in re.findall(r"--job=(\w+)", text):
        assert job in plugins.names("jaxclust.jobs"), job


def test_links_and_pictures_exist():
    for path in [Path("README.md"), *Path("docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / link).exists(), f"{path}: {link}"


def test_make_targets_that_the_readme_names_exist():
    makefile = Path("Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", Path("README.md").read_text()):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
