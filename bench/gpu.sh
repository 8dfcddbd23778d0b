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

  memcheck [op ...]   a step of no part: compute-sanitizer over Triton's kernels, which are compiled before

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
build_limit=150
skipped=77 # exit code of a step that cannot run for want of a tool
stopped=75 # and of one that a signal has ended
late=76    # and of one for which its part leaves no time
parts=("build checks iteration demo bench" "build test gpu sanitize compile")
seconds=(480 360)
# The ops that a training step spends its time in come first.
ops=(row_update bias_act noise_bias_act modulated_conv2d demodulation upfirdn2d mmd_groups mmd miner penalty row_score row_gradient
  minibatch_stddev winner manhattan)
cuda_ops="bias_act row_update" # those of csrc/*.cu

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

# configure FOLDER LIBRARY CAPABILITY [OPTION...]: the native module is to be built in FOLDER and to lie in LIBRARY. By
# CMake alone: an installation would need the setuptools that pyproject.toml asks for.
configure() {
  cmake -S . -B "$1" -DCMAKE_BUILD_TYPE=Release -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$2" \
    -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" \
    -DMINEGAN_CUDA=ON -DMINEGAN_CUDA_ARCHITECTURES="$3" "${@:4}"
}

# In a process of its own.
build() {
  command -v nvcc cmake ninja
  command -v nvcc >/dev/null || { echo "nvcc: not found on PATH"; return 1; }
  nvcc --version | tail -n 2
  configure build/native "$PWD/minegan_fast" "$(capability)" || return
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
  note limit "$1"
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

# A build elsewhere, each process of its compilers noted. What uses the module takes the one that is here.
rehearse_build() {
  local from=$SECONDS timed="$python;$PWD/bench/rehearsal.py;--timed"
  note start 24 # Python asks torch for the capability before, and for the backends after
  if ! { command -v nvcc && command -v cmake; } >/dev/null; then
    echo "nvcc or cmake: not found on PATH; the build is estimated at its limit"
    note limit $build_limit
    return
  fi
  configure "$scratch/native" "$scratch" 90 -DCMAKE_CXX_COMPILER_LAUNCHER="$timed" \
    -DCMAKE_CUDA_COMPILER_LAUNCHER="$timed" || return
  note serial $((SECONDS - from))
  limited $build_limit cmake --build "$scratch/native" --parallel 1
}

step_build() {
  if [[ -n $rehearsal ]]; then
    show_backends || true
    ((!build_chosen)) || rehearse_build
  elif [[ $(cat build/gpu.built 2>/dev/null) == "$(fingerprint)" ]]; then
    echo "built before"
  else
    timeout --kill-after=5 $build_limit bash bench/gpu.sh --build >"$out/build.log" 2>&1 &
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
  phase "checks cuda"
  if [[ -n $rehearsal ]]; then # of the CPU's kernels, as many as there are of CUDA's
    each 40 cpp "${*:-$cuda_ops}" checks-cpp.jsonl || failed=$?
  else
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

# collected ARGUMENTS...: how many tests pytest finds.
collected() {
  "$python" -m pytest "$@" -q --collect-only 2>&1 | sed -nE 's,^([0-9]+)[/0-9]* tests? collected.*,\1,p'
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
  [[ -z $rehearsal ]] || ((interrupted)) || note units "$(collected "${files[@]}" --device cuda --largest)"
  return $status
}

# A rehearsal compiles one op for the CPU.
step_compile() {
  built || true
  note units 15
  note budget 4 # a guess
  (($#)) || set -- bias_act noise_bias_act modulated_conv2d row_update mmd penalty upfirdn2d
  [[ -z $rehearsal ]] || set -- bias_act
  files_of "$@"
  local -x MINEGAN_GPU_REHEARSAL=
  benchmarks 90 "${files[@]}" --largest --budget 0.2 \
    -k "not bfloat16 and not inference and not double and not twice and not half and not channels"
}

# processes N: so many `workers` of pytest, where pytest-xdist is there.
processes() {
  workers=()
  [[ -n $rehearsal ]] || ! "$python" -c 'import xdist' 2>/dev/null || workers=(-n "$1")
}

step_test() {
  built || true
  note spread 14 # processes, of 16 cores
  (($#)) || set -- tests/ops -k "triton or cuda"
  processes $((jobs - 2))
  OMP_NUM_THREADS=1 run_pytest 110 --timeout 60 ${rehearsal:+--every 40} "${workers[@]}" "$@"
  local status=$?
  ((status != 1)) || [[ -z $rehearsal ]] || return 0 # what computes nothing is not right
  return $status
}

# In a rehearsal those that have a twin on the CPU, which is half of them.
step_gpu() {
  built || true
  (($#)) || set -- tests -m gpu
  if [[ -n $rehearsal && $* == "tests -m gpu" ]]; then
    note units "$(collected "$@")"
    set -- tests/finetune/test_masked_dense.py tests/finetune/test_training.py -k "cpu and (mask or frozen_bits)"
  fi
  note spread 4
  processes 4
  OMP_NUM_THREADS=4 run_pytest 65 --timeout 50 "${workers[@]}" "$@"
  local status=$?
  ((status != 1)) || [[ -z $rehearsal ]] || return 0
  return $status
}

# watch SECONDS TOOL BACKEND OPS [OPTION...]: what the tool finds is in files of its own; fails where that is anything. In a
# rehearsal the CPU's kernels run, without the tool.
watch() {
  local limit=$1 tool=$2 backend=$3 chosen=$4 failed=0
  shift 4
  phase "$tool $backend"
  if [[ -n $rehearsal ]]; then
    note start 24 # guesses: the tool doubles what a process takes to begin, and what it does then takes 10 times as long
    note factor 10
    [[ $backend != cuda ]] || chosen=${chosen:-$cuda_ops}
    each "$limit" cpp "$chosen" "under-$tool.jsonl"
    return
  fi
  each "$limit" "$backend" "$chosen" "under-$tool.jsonl" \
    compute-sanitizer --tool "$tool" --error-exitcode 9 --log-file "$scratch/$tool-$backend-%p.log" "$@" || failed=$?
  cat "$scratch/$tool-$backend"-*.log >"$out/$tool-$backend.log" # in one file: a machine may give few back
  if grep -E -B 12 'SUMMARY: [1-9]' "$out/$tool-$backend.log"; then failed=1; fi
  return $failed
}

find_planted() {
  local tool from=$SECONDS
  phase planted
  if [[ -n $rehearsal ]]; then
    ! command -v nvcc || nvcc -lineinfo -arch=sm_90 -o "$scratch/planted" bench/planted.cu || return
    note serial $((SECONDS - from))
    note limit 60
    note start 0 # torch has no part in it
    note units 2
    note budget 6 # a guess: the tool, a context and a launch
    return
  fi
  command -v compute-sanitizer || { echo "compute-sanitizer: not found on PATH"; return $skipped; }
  limited 20 nvcc -lineinfo -arch="sm_$(capability)" -o "$scratch/planted" bench/planted.cu || return
  for tool in memcheck racecheck; do
    limited 20 compute-sanitizer --tool "$tool" --error-exitcode 9 "$scratch/planted" "$tool"
    (($? == 9)) || { echo "compute-sanitizer does not work here: $tool overlooked its planted fault"; return 1; }
  done
}

step_sanitize() {
  local failed=0
  find_planted || return
  built || failed=$?
  # torch asks for things that may fail, and handles it: no fault of a kernel.
  watch 40 memcheck cuda "$*" --report-api-errors no || failed=$?
  watch 40 racecheck cuda "$*" || failed=$?
  return $failed
}

step_memcheck() {
  [[ -n $rehearsal ]] || command -v compute-sanitizer || { echo "compute-sanitizer: not found on PATH"; return $skipped; }
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
build_chosen=1
[[ ${chosen[0]} == build ]] || chosen=(build "${chosen[@]}") build_chosen=0
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

# phase NAME: what the estimate of a rehearsal counts from here on, after what came before.
phase() {
  MINEGAN_GPU_STEP=$1
}

# note NAME VALUE: for that estimate.
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
  start=$SECONDS given=()
  [[ $step != "${chosen[-1]}" ]] || given=("${arguments[@]}")
  "step_$step" "${given[@]}"
  status=$?
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
