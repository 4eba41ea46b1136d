"""The one thing pyproject.toml cannot say: which folder holds which package.

The layers stand side by side at the root (kernels, solvers, bindings, api), so that the
repository's first listing is its architecture, while users import one package, `fewstep`.
The api folder *is* the package `fewstep`; the other three are its subpackages.
"""

from setuptools import setup

FOLDERS = {
    "fewstep": "api",
    "fewstep.weights": "api/weights",
    "fewstep.kernels": "kernels",
    "fewstep.solvers": "solvers",
    "fewstep.solvers.distill": "solvers/distill",
    "fewstep.bindings": "bindings",
    "fewstep.bindings.comfyui": "bindings/comfyui",
    "fewstep.bindings.diffusers": "bindings/diffusers",
}

setup(packages=list(FOLDERS), package_dir=FOLDERS)
