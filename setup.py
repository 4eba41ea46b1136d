"""What pyproject.toml cannot express: the folders of the package `fewstep`, and the README as a package index shows it.

The layers stand side by side at the root, so that the repository's first listing shows the architecture, while users
import one package: the api folder *is* `fewstep`, the other three are its subpackages. Any folder below them with an
`__init__.py` is a package too.
"""

import re
import tomllib
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent

ROOTS = {
    "fewstep": "api",
    "fewstep.kernels": "kernels",
    "fewstep.solvers": "solvers",
    "fewstep.bindings": "bindings",
    "fewstep.weights": "api/weights",  # data only
}

packages = [*ROOTS, *(f"{name}.{inner}" for name, folder in ROOTS.items() for inner in find_packages(folder))]


def index_page() -> str:
    """The README without relative links, which a package index cannot follow.

    They lead to the release's files at the project's address, `Source` of `project.urls`. Where there is none, links
    are plain text and pictures are left out.
    """
    project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    source, release = project.get("urls", {}).get("Source"), f"v{project['version']}"

    def absolute(match: re.Match[str]) -> str:
        picture, text, target = match.groups()
        if source is None:
            return "" if picture else text
        return f"{picture}[{text}]({source}/{'raw' if picture else 'blob'}/{release}/{target})"

    readme = (HERE / "README.md").read_text(encoding="utf-8")
    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)]+)\)", absolute, readme)


setup(
    packages=packages,
    package_dir=ROOTS,
    long_description=index_page(),
    long_description_content_type="text/markdown",
)
