"""What each way into a product costs: `python bench/embedding.py`, written into docs/embedding.md with --write.

The shipped digits network (8x8, guided) under DPM-Solver++ 2M, 8 steps of two branches, on one thread of a CPU: through
`Sampler` on torch and on ONNX Runtime, `Engine`, one ONNX file, and an AOTInductor package from Python and from C++.
Every way runs in processes of its own, in turn with the others: the time from the process's start to its first sample,
and then the least time of a sample. Both are the process's CPU time: on one thread that is the wall clock of an idle
machine, and other programs hardly move it. A way is measured only if its sample equals the first one's.

The files are made first, in build/embedding, and are not made again while they are there: with --prepare, nothing else.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np

from fewstep.solvers.files import write_whole

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "embedding"
PROGRAM = ROOT / "build" / "cpp" / "torch_loop"  # built as examples/cpp/CMakeLists.txt says, or without its row
PAGE = ROOT / "docs" / "embedding.md"
ROUNDS, SAMPLES = 3, 20

# How a process makes `run()`, which returns the sample of x and label.
DENOISER = """
import fewstep as fs
process = fs.VP.linear()
plan = fs.plan("dpmpp_2m", fs.grid(process, 8, "logsnr"))
"""
TORCH = """
import torch
from fewstep.bindings.unet import NO_CLASS, digits_model
torch.set_num_threads(1)
denoiser = fs.Denoiser(digits_model(), process, "v", guidance=2.0, null={"label": torch.tensor([NO_CLASS])})
x, label = torch.from_numpy(x), torch.from_numpy(label)
"""
ONNX = """
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
run = lambda: session.run(["sample"], {"x": x, "label": label})[0]
"""
WAYS = {
    "`Sampler`, torch module": (
        DENOISER + TORCH,
        'sampler = fs.Sampler(denoiser, plan, x.shape)\nrun = lambda: sampler(x, cond={"label": label}).numpy()',
        "",
        ("numpy", "numba", "llvmlite", "torch"),
    ),
    "`Engine`, torch module": (
        DENOISER + TORCH,
        "engine = fs.Engine(denoiser, x.shape, [plan])\n"
        'run = lambda: engine.submit(plan, x=x[0], seed=0, cond={"label": label}).result().numpy()[None]',
        "",
        ("numpy", "numba", "llvmlite", "torch"),
    ),
    "`Sampler`, `OnnxModel`": (
        DENOISER,
        "from fewstep.bindings.onnx import OnnxModel\n"
        'null = {"label": np.array([10])}  # NO_CLASS\n'
        'denoiser = fs.Denoiser(OnnxModel(file, threads=1), process, "v", guidance=2.0, null=null)\n'
        'sampler = fs.Sampler(denoiser, plan, x.shape)\nrun = lambda: sampler(x, cond={"label": label})',
        "network.onnx",
        ("numpy", "numba", "llvmlite", "onnxruntime"),
    ),
    "`save_loop`": ("", ONNX, "unrolled.onnx", ("numpy", "onnxruntime")),
    "`save_loop(unroll=False)`": ("", ONNX, "rolled.onnx", ("numpy", "onnxruntime")),
    "`compile_loop`": (
        "",
        "import torch, torch._inductor\ntorch.set_num_threads(1)\ntorch.set_grad_enabled(False)\n"
        "loop = torch._inductor.aoti_load_package(file)\n"
        "x, label = torch.from_numpy(x), torch.from_numpy(label)\n"
        'run = lambda: loop(x, cond={"label": label}).numpy()',
        "loop.pt2",
        ("numpy", "torch"),
    ),
}
MEASURE = """
first = run()
cold = time.process_time()
while time.process_time() < cold + 1.0:  # kernels may be loaded in the background
    run()
times = []
for _ in range(samples):
    before = time.process_time()
    run()
    times.append(time.process_time() - before)
print(json.dumps([cold, min(times), first.ravel().tolist()]))
"""


def inputs() -> tuple[np.ndarray, np.ndarray]:
    return np.random.default_rng(0).standard_normal((1, 1, 8, 8)).astype(np.float32), np.array([3])


def prepare() -> None:
    """The files that the ways load."""
    import torch

    import fewstep as fs
    from fewstep.bindings.export.sampler_module import SamplerModule
    from fewstep.bindings.export.torch_export import compile_loop
    from fewstep.bindings.onnx import OnnxModel, export_onnx
    from fewstep.bindings.onnx_loop import save_loop
    from fewstep.bindings.unet import NO_CLASS, digits_model

    FOLDER.mkdir(parents=True, exist_ok=True)
    process = fs.VP.linear()
    plan = fs.plan("dpmpp_2m", fs.grid(process, 8, "logsnr"))
    x, label = torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
    network = FOLDER / "network.onnx"
    if not network.exists():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about its other exporter
            export_onnx(digits_model(), network, x, {"label": label})
    denoiser = fs.Denoiser(OnnxModel(network), process, "v", guidance=2.0, null={"label": np.array([NO_CLASS])})
    save_loop(denoiser, plan, FOLDER / "unrolled.onnx")
    save_loop(denoiser, plan, FOLDER / "rolled.onnx", unroll=False)
    if not (FOLDER / "loop.pt2").exists():
        null = {"label": torch.tensor([NO_CLASS])}
        loop = SamplerModule(fs.Denoiser(digits_model(), process, "v", guidance=2.0, null=null), plan)
        compile_loop(loop, x, FOLDER / "loop.pt2", {"label": label}, batch=(1, 64))


def measure(way: str) -> tuple[float, float, np.ndarray]:
    """(seconds from the start of a process to its first sample, least seconds of a sample, the sample)."""
    before, make, file, _ = WAYS[way]
    x, label = inputs()
    code = (
        "import json, time\nimport numpy as np\n"
        f"samples, file = {SAMPLES}, {str(FOLDER / file)!r}\n"
        f"x, label = np.array({x.tolist()}, np.float32), np.array({label.tolist()})\n{before}\n{make}\n{MEASURE}"
    )
    env = os.environ | {"OMP_NUM_THREADS": "1", "FEWSTEP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise SystemExit(f"{way}: {done.stderr}")
    cold, warm, sample = json.loads(done.stdout.splitlines()[-1])
    return cold, warm, np.array(sample)


def from_cpp() -> float:
    """CPU seconds of examples/cpp/torch_loop, from its start to its end, for one sample."""
    x, label = inputs()
    command = [str(PROGRAM), str(FOLDER / "loop.pt2"), "1x1x8x8", "1:int64"]
    given, env = x.tobytes() + label.tobytes(), os.environ | {"OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, input=given, capture_output=True, env=env, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def installed(names: tuple[str, ...]) -> float:
    """The bytes of these packages' files."""
    files = [file for name in names for file in importlib.metadata.distribution(name).files or ()]
    paths = [Path(str(file.locate())) for file in files]
    return float(sum(path.stat().st_size for path in paths if path.is_file()))


def shown(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1.0 else f"{1e3 * seconds:.3g} ms"


def table() -> str:
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    want: np.ndarray | None = None
    for _ in range(ROUNDS):
        for way, own in found.items():
            cold, warm, sample = measure(way)
            want = sample if want is None else want
            if np.abs(sample - want).max() > 1e-4:
                raise SystemExit(f"{way}: its sample is {np.abs(sample - want).max():.2g} off")
            own.append((cold, warm))
    lines = ["| way | packages | file | start to first sample | a sample |", "|---|---|---|---|---|"]
    for way, own in found.items():
        _, _, file, packages = WAYS[way]
        size = f"{(FOLDER / file).stat().st_size / 2**20:.2f} MiB" if file else "-"
        cold, warm = (min(times) for times in zip(*own, strict=True))
        needs = f"{', '.join(packages)}: {installed(packages) / 2**20:.0f} MiB"
        lines.append(f"| {way} | {needs} | {size} | {shown(cold)} | {shown(warm)} |")
    if PROGRAM.exists():
        size, libraries = f"{(FOLDER / 'loop.pt2').stat().st_size / 2**20:.2f} MiB", installed(("torch",)) / 2**20
        cold = min(from_cpp() for _ in range(ROUNDS))
        lines.append(f"| `compile_loop`, from C++ | torch: {libraries:.0f} MiB | {size} | {shown(cold)} | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prepare", action="store_true", help="only make the files in build/embedding")
    parser.add_argument("--write", action="store_true", help="put the table into docs/embedding.md")
    parser.add_argument("--fresh", action="store_true", help="make all files anew")
    given = parser.parse_args()
    if given.fresh:
        shutil.rmtree(FOLDER, ignore_errors=True)
    prepare()
    if given.prepare:
        return
    made = table()
    print(made)
    if given.write:
        page = PAGE.read_text(encoding="utf-8")
        text = re.sub(r"(?s)(<!-- embedding -->\n).*(<!-- /embedding -->)", lambda m: f"{m[1]}{made}\n{m[2]}", page)
        write_whole(PAGE, lambda to: to.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
