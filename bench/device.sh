#!/bin/bash
# All that needs a GPU, in one command of under 8 minutes: bench/device.sh [OUT [WHEELS]]
#
#   OUT     receives <gpu>.json, written after each row, and a log per part; build/device by default
#   WHEELS  a folder of wheels to install for this run, `wheels` by default. What a machine with torch, triton and
#           pytest lacks: diffusers and importlib_metadata (pure Python); cupy is optional
#
# It needs no network and installs into build/gpu only. Short cases come first and the sanitizer last, so that a run
# that is cut short has measured most. A part that fails or runs out of time does not stop the others; the exit status
# is 0 if all of them passed.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${1:-build/device}
WHEELS=${2:-wheels}
mkdir -p "$OUT"
OUT=$(realpath "$OUT")
started=$SECONDS
statuses=()

part() {  # part NAME SECONDS COMMAND...: run it, log it, note its status
    local name=$1 limit=$(($2 * ${SLOWER:-1})) begin=$SECONDS
    shift 2
    echo "== $name (at most $limit s)"
    timeout -s INT -k 10 "$limit" "$@" > "$OUT/$name.log" 2>&1
    local status=$?
    tail -n 25 "$OUT/$name.log"
    statuses+=("$status")
    echo "== $name: status $status, $((SECONDS - begin)) s" | tee -a "$OUT/parts.txt"
}

prepare() {
    "$PYTHON" -c "import sys, torch, triton; print(torch.__version__, triton.__version__, torch.version.cuda)
if not torch.cuda.is_available(): sys.exit('no CUDA device')"
    local device=$?
    if [ $device != 0 ] && [ -z "${DRY_RUN:-}" ]; then return $device; fi
    # The package as setup.py maps it, whatever setuptools the machine has.
    rm -rf build/gpu && mkdir -p build/gpu && cp -r api build/gpu/fewstep || return 1
    cp -r bindings kernels solvers build/gpu/fewstep/ || return 1
    for wheel in "$WHEELS"/*.whl; do
        [ -e "$wheel" ] || continue
        "$PYTHON" -m pip install -q --no-deps --no-index --upgrade --target build/gpu "$wheel" && echo "with $wheel"
    done
    PYTHONPATH=$path "$PYTHON" -c "import fewstep; print(fewstep.__file__)"
}

# What the machine brings stays importable.
path=$PWD/build/gpu${PYTHONPATH:+:$PYTHONPATH}
pytest=(env "PYTHONPATH=$path" "GPU_RESULTS=$OUT" "$PYTHON" -u -m pytest -p no:cacheprovider -W default
        -o "addopts=-ra --strict-markers" -m gpu)

: > "$OUT/parts.txt"
begin=$SECONDS
prepare > "$OUT/prepare.log" 2>&1
status=$?
cat "$OUT/prepare.log"
if [ $status != 0 ]; then exit $status; fi
# CuPy's and diffusers' tests first: the last of test_gpu_runs.py could block the device.
if [ -z "${TESTS:-}" ]; then
    TESTS=tests/test_frameworks.py
    PYTHONPATH=$path "$PYTHON" -c "import diffusers, transformers" 2> /dev/null &&
        TESTS="$TESTS tests/test_diffusers_pipelines.py"
    TESTS="$TESTS tests/test_gpu_runs.py"
fi
echo "== prepare: status 0, $((SECONDS - begin)) s" >> "$OUT/parts.txt"

part small 150 "${pytest[@]}" -s bench/test_gpu.py -k "not large"
part large 110 "${pytest[@]}" -s bench/test_gpu.py -k "large"
part tests 110 "${pytest[@]}" $TESTS -k "not sanitizer"
part sanitizer 60 "${pytest[@]}" tests/test_gpu_runs.py -k "sanitizer"

for found in "$OUT"/*.json; do
    [ "$(basename "$found")" = cpu.json ] || PYTHONPATH=$path "$PYTHON" bench/readme.py "$found"
done | tee "$OUT/budgets.txt"
cat "$OUT/parts.txt"
echo "$((SECONDS - started)) s in all"
worst=0
for status in "${statuses[@]}"; do
    # 5: pytest had nothing to run, as where there is no sanitizer
    [ "$status" = 0 ] || [ "$status" = 5 ] || worst=1
done
exit $worst
