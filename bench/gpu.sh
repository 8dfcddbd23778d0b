#!/usr/bin/env bash
# What only a machine with a GPU can say about this repository, in one script.
usage() {
  cat <<'EOF'
bench/gpu.sh [--out FOLDER] [part]

  (no part)           all of these, in this order
  build               the native module, for this GPU alone, installed in place
  test [pytest args]  the test suite: Triton and CUDA for real
  sanitize [op ...]   compute-sanitizer over the kernels at small shapes; first it must find two planted faults
  bench [op ...]      the benchmarks, and the machine's ceilings in the same run

FOLDER (default: $OUT, else build/gpu) gets gpu.log, <gpu>.json and pytest's own JSON. Each part is stopped after 9 minutes; one
that fails does not stop the others; the exit code is 0 when none failed. A part builds first where that has not been done.

Needs, and no network: nvcc, cmake, ninja, and a python3 (PYTHON names another) that has torch, triton, setuptools, pybind11,
pytest, pytest-timeout, pytest-benchmark, hypothesis and what the package requires. Uses compute-sanitizer and nvidia-ml-py
where they are. MINEGAN_COMMIT names the commit where there is no .git. MINEGAN_GPU_SH_DRY=1 goes through the motions on the CPU.
EOF
}

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export PYTHONUNBUFFERED=1 PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
unset TRITON_INTERPRET MINEGAN_BACKEND
python=${PYTHON:-python3}
dry=${MINEGAN_GPU_SH_DRY:-}
minutes=9
skipped=77 # exit code of a part that cannot run for want of a tool

fingerprint() {
  { cat setup.py pyproject.toml CMakeLists.txt csrc/*; "$python" --version; } | sha256sum
}

capability() {
  "$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())'
}

show_backends() {
  "$python" -c '
import sys
from minegan_fast.ops import backend_report
report = backend_report()
print("\n".join(f"backend {name}: {text}" for name, (_, text) in report.items()))
sys.exit(not all(usable for usable, _ in report.values()))'
}

build() {
  if [[ -n $dry ]]; then
    show_backends || true
    return 0
  fi
  command -v nvcc cmake ninja
  command -v nvcc >/dev/null || { echo "nvcc: not found on PATH"; return 1; }
  nvcc --version | tail -n 2
  MINEGAN_CUDA_ARCHITECTURES=$(capability) \
    "$python" -m pip install -v --no-index --no-deps --no-build-isolation -e . || return
  show_backends || return
  mkdir -p build && fingerprint >build/gpu.built
}

run_tests() {
  "$python" -m pytest -q ${dry:+--collect-only} "$@"
}

# watch TOOL COMMAND...: the command's exit code, or 9 where the tool found something.
watch() {
  local tool=$1 status
  shift
  compute-sanitizer --tool "$tool" --error-exitcode 9 "$@" 2>&1 | tee "$scratch/report"
  status=${PIPESTATUS[0]}
  ! grep -qE 'SUMMARY: [1-9]' "$scratch/report" || status=9
  return "$status"
}

sanitize() {
  local tool failed=0
  if [[ -n $dry ]]; then
    "$python" bench/sanitize.py --backend cpp "$@"
    return
  fi
  command -v compute-sanitizer || { echo "compute-sanitizer: not found on PATH"; return $skipped; }
  nvcc -lineinfo -arch="sm_$(capability)" -o "$scratch/planted" bench/planted.cu || return
  for tool in memcheck racecheck; do
    watch "$tool" "$scratch/planted" "$tool"
    (($? == 9)) || { echo "compute-sanitizer does not work here: $tool overlooked its planted fault"; return 1; }
  done
  # torch asks for things that may fail, and handles it: no fault of a kernel.
  watch memcheck --report-api-errors no "$python" bench/sanitize.py --backend cuda "$@" || failed=1
  watch racecheck "$python" bench/sanitize.py --backend cuda "$@" || failed=1
  watch memcheck --report-api-errors no "$python" bench/sanitize.py --backend triton "$@" || failed=1
  return $failed
}

bench() {
  local files=("${@/#/bench/bench_}")
  files=("${files[@]/%/.py}")
  (($#)) || files=(bench)
  # shellcheck disable=SC2086
  "$python" -m pytest "${files[@]}" -q --benchmark-only --benchmark-columns=median,iqr --show-capture=no \
    --benchmark-json="$out/pytest-benchmark.json" --record="$out" ${dry:+--quick --device cpu --budget 0.01}
}

# One part, in a process of its own that `timeout` can end.
if [[ ${1:-} == --part ]]; then
  part=$2 out=$3 scratch=$4
  shift 4
  "${part/#test/run_tests}" "$@"
  exit
fi

out=${OUT:-build/gpu}
chosen=()
arguments=()
while (($#)); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --out) out=${2:?--out needs a folder}; shift 2 ;;
    build | test | sanitize | bench) chosen=("$1"); shift; arguments=("$@"); break ;;
    *) echo "gpu.sh: no part is named $1" >&2; usage >&2; exit 2 ;;
  esac
done
if [[ ${chosen[*]} == bench ]]; then
  for op in "${arguments[@]}"; do
    [[ -f bench/bench_$op.py ]] || { echo "gpu.sh: there is no bench/bench_$op.py" >&2; exit 2; }
  done
fi

gpu='import sys, torch; sys.exit(None if torch.cuda.is_available() else "torch sees no CUDA device")'
if [[ -z $dry ]] && ! why=$("$python" -c "$gpu" 2>&1); then
  echo "gpu.sh: no usable GPU: ${why##*$'\n'}. Nothing was run; MINEGAN_GPU_SH_DRY=1 goes through the motions on the CPU." >&2
  exit 3
fi

if ((${#chosen[@]} == 0)); then
  chosen=(build test sanitize bench)
elif [[ ${chosen[0]} != build && -z $dry && $(cat build/gpu.built 2>/dev/null) != "$(fingerprint)" ]]; then
  chosen=(build "${chosen[@]}")
fi
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

run_parts() {
  local part start result table="" failed=0 given
  date -u
  nvidia-smi 2>/dev/null || echo "nvidia-smi: not found"
  for part in "${chosen[@]}"; do
    echo "=== $part"
    start=$SECONDS given=()
    [[ $part != "${chosen[-1]}" ]] || given=("${arguments[@]}")
    timeout --kill-after=10 "${minutes}m" bash bench/gpu.sh --part "$part" "$out" "$scratch" "${given[@]}"
    case $? in
      0) result=ok ;;
      "$skipped") result=skipped ;;
      124 | 137) result="out of time" failed=1 ;;
      *) result=FAILED failed=1 ;;
    esac
    table+=$(printf '%-10s %-12s %5d s' "$part" "$result" $((SECONDS - start)))$'\n'
  done
  printf '\n%s in %s\n%s' "${dry:+dry run on the CPU, nothing was tried on a GPU; }results" "$out" "$table"
  return $failed
}
run_parts 2>&1 | tee -a "$out/gpu.log"
