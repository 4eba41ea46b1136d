"""The one thing pyproject.toml cannot say: which folder holds which package.

The layers stand side by side at the root (kernels, solvers, bindings, api), so that the
repository's first listing is its architecture, while users import one package, `fewstep`.
The api folder *is* the package `fewstep`; the other three are its subpackages.
"""

from setuptools import setup

ROOMS = ("schedule", "plans", "families", "run", "tune", "distill")
FOLDERS = {
    "fewstep": "api",
    "fewstep.weights": "api/weights",
    "fewstep.kernels": "kernels",
    "fewstep.solvers": "solvers",
    **{f"fewstep.solvers.{room}": f"solvers/{room}" for room in ROOMS},
    "fewstep.bindings": "bindings",
    **{f"fewstep.bindings.{name}": f"bindings/{name}" for name in ("comfyui", "diffusers", "export", "k_diffusion")},
}

setup(packages=list(FOLDERS), package_dir=FOLDERS)
