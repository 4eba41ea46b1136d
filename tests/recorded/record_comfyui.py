"""Record what ComfyUI's own samplers return: python tests/recorded/record_comfyui.py COMFYUI COMMIT [NEWER COMMIT]

COMFYUI is a checkout, of which only these files are used: comfy/k_diffusion/*.py, comfy/extra_samplers/uni_pc.py,
comfy/model_sampling.py and the lists of names in comfy/samplers.py. NEWER is a file with samplers of a later commit,
as they stand in its comfy/k_diffusion/sampling.py. torchsde, scipy and Pillow are needed. Four modules that ComfyUI
imports beside them stand below, with the one function that samplers call of each. Everything runs in float64, so that
the record holds the formulas and not their rounding.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from tqdm.auto import trange

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from recorded import comfyui_cases as shared


def package(name, path=None, **names):
    module = ModuleType(name)
    if path is not None:
        module.__path__ = [str(path)]
    module.__dict__.update(names)
    sys.modules[name] = module
    if "." in name:
        parent, _, last = name.rpartition(".")
        setattr(sys.modules[parent], last, module)
    return module


def comfyui(root):
    """ComfyUI's modules of samplers, without the rest of ComfyUI."""

    def with_hook(options, hook, disable_cfg1_optimization=False):
        options["sampler_post_cfg_function"] = [*options.get("sampler_post_cfg_function", []), hook]
        if disable_cfg1_optimization:
            options["disable_cfg1_optimization"] = True
        return options

    package("comfy", root / "comfy")
    package("comfy.utils", model_trange=trange)
    package("comfy.memory_management")
    package("comfy.model_patcher", set_model_options_post_cfg_function=with_hook)
    package("comfy.ldm", root / "nowhere")
    package("comfy.ldm.modules", root / "nowhere")
    package("comfy.ldm.modules.diffusionmodules", root / "nowhere")
    package("comfy.ldm.modules.diffusionmodules.util", make_beta_schedule=None)
    return [importlib.import_module(f"comfy.{name}") for name in
            ("model_sampling", "k_diffusion.sampling", "extra_samplers.uni_pc")]  # fmt: skip


def names_in(path, *wanted):
    """Lists of strings assigned in a file that cannot be imported."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in wanted:
            value = node.value
            if isinstance(value, ast.BinOp):
                found[node.targets[0].id] = found[value.left.id] + ast.literal_eval(value.right)
            elif isinstance(value, ast.Dict):
                found[node.targets[0].id] = [ast.literal_eval(key) for key in value.keys]
            else:
                found[node.targets[0].id] = ast.literal_eval(value)
    return found


def function_of(name, sampling, uni_pc):
    """As `sampler_object` of comfy/samplers.py finds it."""
    if name == "ddim":
        return sampling.sample_euler  # with fresh noise for inpainting
    if name.startswith("uni_pc"):
        return getattr(uni_pc, name.replace("uni_pc", "sample_unipc"))
    return getattr(sampling, f"sample_{name}")


def run(name, options, kind, sigmas, modules):
    model_sampling, sampling, uni_pc = modules
    waves = shared.Waves()
    model = shared.Model(shared.sampling(kind, model_sampling.CONST, model_sampling.EPS))
    function = function_of(name, sampling, uni_pc)
    given = shared.resolved(options)
    if "noise_sampler" in inspect.signature(function).parameters:
        given["noise_sampler"] = waves
    levels = torch.tensor(sigmas)
    ends = (levels,)
    if name in ("dpm_fast", "dpm_adaptive"):
        ends = (levels[-1] if levels[-1] > 0 else levels[-2], levels[0])
        ends += (len(sigmas) - 1,) if name == "dpm_fast" else ()
    keep, torch.randn_like = torch.randn_like, waves.randn_like
    try:
        out = function(model, shared.latent(sigmas[0], kind != "ve"), *ends, extra_args={}, disable=True, **given)
    except Exception as error:  # what ComfyUI does is what is recorded
        print(f"{name} {options} on {kind} {sigmas}: {type(error).__name__}: {error}"[:160])
        return {}
    finally:
        torch.randn_like = keep
    return {
        "out": [float(f"{value:.12g}") for value in out.flatten().tolist()],
        "calls": [float(f"{value:.9g}") for value in model.calls],
        "asked": [[float(f"{value:.9g}") for value in pair] for pair in waves.asked],
        "churned": waves.churned,
    }


def main(root, commit, newer=None, newer_commit=None):
    torch.set_default_dtype(torch.float64)
    modules = comfyui(root)
    if newer is not None:
        exec(newer.read_text(), vars(modules[1]))  # the code to record
    files = [*sorted((root / "comfy/k_diffusion").glob("*.py")), root / "comfy/extra_samplers/uni_pc.py",
             root / "comfy/samplers.py", root / "comfy/model_sampling.py"]  # fmt: skip
    record = {
        "repository": "https://github.com/comfyanonymous/ComfyUI",
        "commit": commit,
        "newer": {"commit": newer_commit, "sha256": hashlib.sha256(newer.read_bytes()).hexdigest()} if newer else None,
        "how": "tests/recorded/record_comfyui.py, in float64, with the model and noise of comfyui_cases.py",
        "sha256": {str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files},
        **names_in(root / "comfy/samplers.py", "KSAMPLER_NAMES", "SAMPLER_NAMES", "SCHEDULER_HANDLERS"),
        "helpers": {
            name: [[a, np.ravel(getattr(modules[1], name)(*a)).tolist()] for a in sets]
            for name, sets in shared.HELPERS.items()
        },
        "cases": [
            {"name": name, "options": options, "model": kind, "grid": grid, **found}
            for name, options, kind, grid, sigmas in shared.cases()
            if (found := run(name, options, kind, sigmas, modules))
        ],
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items() if key != "cases"]
    lines.append('"cases": [\n' + ",\n".join(json.dumps(case) for case in record["cases"]) + "\n]")
    Path(__file__).with_name("comfyui.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    missing = set(record["SAMPLER_NAMES"]) ^ set(shared.SAMPLERS)
    print(len(record["cases"]), "cases; names only here or in comfyui_cases.py:", sorted(missing) or "none")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *(f(a) for f, a in zip((Path, str), sys.argv[3:], strict=False)))
