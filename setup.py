"""Maps the folders at the root to the package `fewstep`, which pyproject.toml cannot express.

The layers stand side by side at the root, so that the repository's first listing shows the architecture, while users
import one package: the api folder *is* `fewstep`, the other three are its subpackages. Any folder below them with an
`__init__.py` is a package too.
"""

from setuptools import find_packages, setup

ROOTS = {
    "fewstep": "api",
    "fewstep.kernels": "kernels",
    "fewstep.solvers": "solvers",
    "fewstep.bindings": "bindings",
    "fewstep.weights": "api/weights",  # data only
}

packages = [*ROOTS, *(f"{name}.{inner}" for name, folder in ROOTS.items() for inner in find_packages(folder))]

setup(packages=packages, package_dir=ROOTS)
