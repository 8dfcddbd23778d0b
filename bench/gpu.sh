#!/usr/bin/env bash
# What only a machine with a GPU can say about this repository, in two parts of at most 8 and 6 minutes.
usage() {
  cat <<'END'
bench/gpu.sh [--out FOLDER] 1 | 2 | step [arguments]

  1                   in at most 8 minutes:
  build               the native module, for this GPU alone, in place; the next step goes on beside it
  checks [op ...]     every check of bench/sanitize.py, without the sanitizer, one process an op
  iteration           an iteration of StyleGAN2-256: eager, captured, dense
  demo                `transfer` as the demo calls it
  bench [op ...]      the largest shape of each op, and the machine's ceilings, without torch.compile

  2                   in at most 6 minutes, after the build where that has not been done:
  test [pytest args]  the tests of the ops: Triton and CUDA for real
  gpu [pytest args]   the tests that are marked gpu
  sanitize [op ...]   compute-sanitizer over the CUDA kernels; first it must find two planted faults
  compile [op ...]    bench again in float32, with torch.compile among the competitors
  memcheck [op ...]   compute-sanitizer over Triton's kernels, which are compiled before

FOLDER (default: $OUT, else build/gpu) gets gpu.log, checks.jsonl, tests.jsonl and <gpu>.json, in which each result is as
soon as it is known, with device, driver, versions, commit and date. A step is stopped (SIGINT, 20 seconds later SIGKILL)
at its limit or at the end of its part. One that fails does not stop the others; the exit code is 0 when none failed.

Needs, and no network: nvcc, cmake, ninja or make, and a python3 (PYTHON names another) that has torch, triton, pybind11,
pytest, pytest-timeout, pytest-benchmark, hypothesis and what the package requires. It installs nothing, so setuptools is
not needed. Uses pytest-xdist, compute-sanitizer and nvidia-ml-py where they are. MINEGAN_COMMIT names the commit where
there is no .git. MINEGAN_GPU_REHEARSAL=1 does the same without a GPU, over a driver that launches nothing, and estimates
how long a machine with 16 cores would take: see bench/rehearsal.py. It has one process at a time, and 8 times as long.
END
}

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export PYTHONUNBUFFERED=1 PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
export PYTHONPATH="$PWD:$PWD/bench${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET MINEGAN_BACKEND
python=${PYTHON:-python3}
grace=20
skipped=77 # exit code of a step that cannot run for want of a tool
stopped=75 # and of one that a signal has ended
late=76    # and of one for which its part leaves no time
parts=("build checks iteration demo bench" "build test gpu sanitize compile memcheck")
seconds=(480 360)
# The ops that a training step spends its time in come first.
ops=(row_update bias_act noise_bias_act modulated_conv2d demodulation upfirdn2d mmd_groups mmd penalty row_score row_gradient
  minibatch_stddev manhattan)

fingerprint() {
  { cat CMakeLists.txt csrc/*; "$python" --version; } | sha256sum
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

# In a process of its own. By CMake alone: an installation would need the setuptools that pyproject.toml asks for.
build() {
  command -v nvcc cmake ninja
  command -v nvcc >/dev/null || { echo "nvcc: not found on PATH"; return 1; }
  nvcc --version | tail -n 2
  cmake -S . -B build/native -DCMAKE_BUILD_TYPE=Release -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/minegan_fast" \
    -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" \
    -DMINEGAN_CUDA=ON -DMINEGAN_CUDA_ARCHITECTURES="$(capability)" || return
  cmake --build build/native --parallel || return
  show_backends || return
  fingerprint >build/gpu.built
}

if [[ ${1:-} == --build ]]; then
  mkdir -p build && build
  exit
fi

# limited SECONDS COMMAND...: the command's exit code; 124 or 137 where it ran out of time.
limited() {
  local left=$((end - SECONDS - grace)) limit=$(($1 * slower)) status
  step_limit=$((step_limit + $1))
  shift
  ((limit < left)) || limit=$left
  ((limit > 0 && !interrupted)) || return $late
  timeout --signal=INT --kill-after=$grace "$limit" "$@" &
  child=$!
  while :; do
    wait "$child"
    status=$?
    kill -0 "$child" 2>/dev/null || break # else it was `wait` that a signal has ended
  done
  child=
  return $status
}

step_build() {
  if [[ -n $rehearsal ]]; then
    show_backends || true
  elif [[ $(cat build/gpu.built 2>/dev/null) == "$(fingerprint)" ]]; then
    echo "built before"
  else
    timeout --kill-after=5 150 bash bench/gpu.sh --build >"$out/build.log" 2>&1 &
    building=$!
  fi
}

# Waits for the build that goes on; its exit code.
built() {
  [[ -n ${building:-} ]] || return 0
  local status
  while :; do
    wait "$building"
    status=$?
    kill -0 "$building" 2>/dev/null || break # else it was `wait` that a signal has ended
  done
  building=
  grep -E 'error|warning|^backend|not found' "$out/build.log" | tail -n 20
  ((status == 0 || interrupted)) || echo "the build failed, as build.log says"
  return $status
}

# each SECONDS BACKEND OPS FILE [COMMAND...]: sanitize.py under that command, a process an op, as many as there are cores.
each() {
  local limit=$1 backend=$2 chosen=$3 file=$4
  shift 4
  # shellcheck disable=SC2086
  "$python" bench/sanitize.py --backend "$backend" --list $chosen >"$scratch/processes" || return
  OMP_NUM_THREADS=1 limited "$limit" xargs -a "$scratch/processes" -P "$jobs" -L 1 \
    "$@" "$python" bench/sanitize.py --backend "$backend" --record "$out/$file"
}

step_checks() {
  local failed=0
  each 120 triton "$*" checks.jsonl || failed=$?
  if [[ -z $rehearsal ]]; then
    built || failed=$?
    each 40 cuda "$*" checks.jsonl || failed=$?
  fi
  return $failed
}

# run_pytest SECONDS ARGUMENTS...
run_pytest() {
  local limit=$1
  shift
  limited "$limit" "$python" -m pytest -q -p no:cacheprovider -p at_once --at-once "$out/tests.jsonl" \
    --continue-on-collection-errors "$@"
}

# benchmarks SECONDS ARGUMENTS...
benchmarks() {
  local limit=$1
  shift
  run_pytest "$limit" --benchmark-only --benchmark-columns=median,iqr --show-capture=no --record="$out" \
    ${rehearsal:+--quick --device cpu} "$@"
}

files_of() {
  (($#)) || set -- "${ops[@]}"
  set -- "${@/#/bench/bench_}"
  files=("${@/%/.py}")
}

step_iteration() {
  built || true
  note units 3.5 # 2 cases, whose networks have 7 resolutions and here 4
  note budget 9  # a guess, as are the others: 72 iterations a case
  benchmarks 130 bench/bench_step.py -k test_iteration
}

# What computes nothing cannot be trained: a rehearsal trains on the CPU.
step_demo() {
  note units 1
  note budget 40
  local -x MINEGAN_GPU_REHEARSAL=
  benchmarks 80 bench/bench_step.py -k test_demo --capture=no # the run says how far it is
}

step_bench() {
  local status
  built || true
  files_of "$@"
  note budget 0.6 # 0.2 of timing, the rest for checks, warming up and replays
  benchmarks 150 "${files[@]}" --largest --no-compile --budget 0.2
  status=$?
  [[ -z $rehearsal ]] || ((interrupted)) || note units "$(
    "$python" -m pytest "${files[@]}" -q --collect-only --device cuda --largest 2>&1 |
      sed -nE 's,^([0-9]+)[/0-9]* tests? collected.*,\1,p'
  )"
  return $status
}

# A rehearsal compiles one op for the CPU.
step_compile() {
  built || true
  note units 27
  note budget 4
  (($#)) || set -- bias_act noise_bias_act modulated_conv2d row_update mmd_groups mmd penalty upfirdn2d minibatch_stddev
  [[ -z $rehearsal ]] || set -- bias_act
  files_of "$@"
  local -x MINEGAN_GPU_REHEARSAL=
  benchmarks 130 "${files[@]}" --largest --budget 0.2 -k "not bfloat16 and not inference and not double"
}

# processes N: so many `workers` of pytest, where pytest-xdist is there.
processes() {
  workers=()
  [[ -n $rehearsal ]] || ! "$python" -c 'import xdist' 2>/dev/null || workers=(-n "$1")
}

step_test() {
  built || true
  note spread true
  (($#)) || set -- tests/ops -k "triton or cuda"
  processes $((jobs - 2))
  OMP_NUM_THREADS=1 run_pytest 110 --timeout 60 ${rehearsal:+--every 40} "${workers[@]}" "$@"
  local status=$?
  ((status != 1)) || [[ -z $rehearsal ]] || return 0 # what computes nothing is not right
  return $status
}

step_gpu() {
  built || true
  (($#)) || set -- tests -m gpu
  processes 4
  OMP_NUM_THREADS=4 run_pytest 50 --timeout 50 "${workers[@]}" "$@"
}

# watch SECONDS TOOL BACKEND OPS [OPTION...]: what the tool finds is in files of its own; fails where that is anything. In a
# rehearsal the CPU's kernels run, without the tool.
watch() {
  local limit=$1 tool=$2 backend=$3 chosen=$4 failed=0
  shift 4
  if [[ -n $rehearsal ]]; then
    each "$limit" cpp "${chosen:-row_update}" "under-$tool.jsonl"
    return
  fi
  each "$limit" "$backend" "$chosen" "under-$tool.jsonl" \
    compute-sanitizer --tool "$tool" --error-exitcode 9 --log-file "$scratch/$tool-$backend-%p.log" "$@" || failed=$?
  cat "$scratch/$tool-$backend"-*.log >"$out/$tool-$backend.log" # in one file: a machine may give few back
  if grep -E -B 12 'SUMMARY: [1-9]' "$out/$tool-$backend.log"; then failed=1; fi
  return $failed
}

find_planted() {
  local tool
  command -v compute-sanitizer || { echo "compute-sanitizer: not found on PATH"; return $skipped; }
  limited 20 nvcc -lineinfo -arch="sm_$(capability)" -o "$scratch/planted" bench/planted.cu || return
  for tool in memcheck racecheck; do
    limited 20 compute-sanitizer --tool "$tool" --error-exitcode 9 "$scratch/planted" "$tool"
    (($? == 9)) || { echo "compute-sanitizer does not work here: $tool overlooked its planted fault"; return 1; }
  done
}

step_sanitize() {
  local failed=0
  [[ -n $rehearsal ]] || find_planted || return
  built || failed=$?
  # torch asks for things that may fail, and handles it: no fault of a kernel.
  watch 40 memcheck cuda "$*" --report-api-errors no || failed=$?
  watch 40 racecheck cuda "$*" || failed=$?
  return $failed
}

step_memcheck() {
  [[ -z $rehearsal ]] || return $skipped
  command -v compute-sanitizer || { echo "compute-sanitizer: not found on PATH"; return $skipped; }
  local failed=0
  # Under compute-sanitizer Triton would take many times as long to compile.
  each 60 triton "$*" checks.jsonl || failed=$?
  watch 60 memcheck triton "$*" --report-api-errors no || failed=$?
  return $failed
}

out=${OUT:-build/gpu}
arguments=()
while (($#)); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --out) out=${2:?--out needs a folder}; shift 2 ;;
    1 | 2) read -ra chosen <<<"${parts[$1 - 1]}"; total=${seconds[$1 - 1]}; shift; break ;;
    build | checks | iteration | demo | bench | test | gpu | sanitize | compile | memcheck)
      chosen=("$1") total=540; shift; arguments=("$@"); break ;;
    *) echo "gpu.sh: no part or step is named $1" >&2; usage >&2; exit 2 ;;
  esac
done
[[ -n ${chosen[*]:-} ]] || { usage >&2; exit 2; }
if [[ ${chosen[*]} == @(bench|compile) ]]; then
  for op in "${arguments[@]}"; do
    [[ -f bench/bench_$op.py ]] || { echo "gpu.sh: there is no bench/bench_$op.py" >&2; exit 2; }
  done
fi

rehearsal=${MINEGAN_GPU_REHEARSAL:-}
gpu='import sys, torch; sys.exit(None if torch.cuda.is_available() else "torch sees no CUDA device")'
if [[ -z $rehearsal ]] && ! why=$("$python" -c "$gpu" 2>&1); then
  echo "gpu.sh: no usable GPU: ${why##*$'\n'}. Nothing was run; MINEGAN_GPU_REHEARSAL=1 does the same without one." >&2
  exit 3
fi
[[ ${chosen[0]} == build ]] || chosen=(build "${chosen[@]}")
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
jobs=$(nproc) slower=1
if [[ -n $rehearsal ]]; then
  export MINEGAN_GPU_REHEARSAL=$out/rehearsal.jsonl
  : >"$MINEGAN_GPU_REHEARSAL"
  jobs=1 slower=8
fi
end=$((SECONDS + total * slower)) interrupted=0 child="" building="" files=()
scratch=$(mktemp -d)
exec > >(trap '' INT TERM; tee -a "$out/gpu.log") 2>&1
log=$!
set -m # else what runs in the background would ignore SIGINT
trap 'rm -rf "$scratch"' EXIT
trap 'interrupted=1; for running in $child $building; do kill -INT "$running"; done' INT TERM

# note NAME VALUE: for the estimate of a rehearsal.
note() {
  [[ -z $rehearsal ]] || echo "{\"step\": \"$MINEGAN_GPU_STEP\", \"$1\": ${2:-0}}" >>"$out/rehearsal.jsonl"
}

date -u
nvidia-smi 2>/dev/null || echo "nvidia-smi: not found"
failed=0 table=""
for step in "${chosen[@]}"; do
  ((!interrupted)) || break
  echo "=== $step"
  export MINEGAN_GPU_STEP=$step
  start=$SECONDS given=() step_limit=0
  [[ $step != "${chosen[-1]}" ]] || given=("${arguments[@]}")
  "step_$step" "${given[@]}"
  status=$?
  note limit $step_limit
  ((!interrupted || status == 0)) || status=$stopped
  case $status in
    0) result=ok ;;
    "$stopped") result=interrupted failed=1 ;;
    "$skipped") result=skipped ;;
    "$late") result="no time left" failed=1 ;;
    124 | 137) result="out of time" failed=1 ;;
    *) result=FAILED failed=1 ;;
  esac
  table+=$(printf '%-10s %-12s %5d s' "$step" "$result" $((SECONDS - start)))$'\n'
done
if [[ -n $building ]]; then
  built || failed=1
fi
((!interrupted)) || failed=130
[[ -z $rehearsal ]] || ((interrupted)) || "$python" bench/rehearsal.py "$out/rehearsal.jsonl" --limit "$total"
printf '\n%s in %s\n%s' "${rehearsal:+rehearsal, nothing was tried on a GPU; }results" "$out" "$table"
exec >&- 2>&-
wait "$log" 2>/dev/null
exit $failed
