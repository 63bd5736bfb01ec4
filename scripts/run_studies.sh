#!/usr/bin/env bash
# Parts of studies on a machine that is yours for minutes: data and artefacts once, cells until the time is over, records to take along.
#   scripts/run_studies.sh SECONDS OUT 'STUDY.yaml [words of vlakeep study]' ...      at most 7 parts, one after the other
#   scripts/run_studies.sh 460 out 'studies/final_tabletop.yaml --seeds 1,2' 'studies/setpoint_tabletop.yaml --tasks corner'
# No cell is started after SECONDS; those that run are finished. OUT gets the records of each part, a line a cell, written as they end, and
# log.txt. TAKE=FILE,FILE: records of earlier machines, whose cells are not run again. WORKERS: cells at a time, default 15 a GPU.
# DATA=0: data and probes are there. VLAKEEP_ROOT: else a temporary folder that is removed. PYTHON: the interpreter.
set -euo pipefail
[ $# -ge 3 ] && [ $# -le 9 ] || { sed -n '2,/^set /p' "$0" | sed '/^set /d; s/^# \{0,1\}//' >&2; exit 2; }
began=$SECONDS
limit="$1"; shift
mkdir -p "$1"
out="$(cd "$1" && pwd)"; shift
python="${PYTHON:-python3}"
gpus="$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true)"
workers="${WORKERS:-$((gpus > 0 ? 15 * gpus : 1))}"
made="" mps=""
# A control daemon of its own folders, so that none that is there already is touched.
cleanup() {
  [ -z "$mps" ] || { echo quit | nvidia-cuda-mps-control || true; rm -rf "$mps"; }
  [ -z "$made" ] || rm -rf "$made"
}
trap cleanup EXIT
trap 'exit 143' TERM INT
if [ -z "${VLAKEEP_ROOT:-}" ]; then
  made="$(mktemp -d)"
  export VLAKEEP_ROOT="$made"
fi
if [ "$gpus" -gt 0 ] && command -v nvidia-cuda-mps-control >/dev/null; then
  mps="$(mktemp -d)"
  export CUDA_MPS_PIPE_DIRECTORY="$mps/pipe" CUDA_MPS_LOG_DIRECTORY="$mps/log"
  mkdir -p "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"
  nvidia-cuda-mps-control -d
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
vlakeep() { echo "+ vlakeep $*" >>"$out/log.txt"; "$python" -m vlakeep.cli "$@" >>"$out/log.txt" 2>&1; }
if [ "${DATA:-1}" = 1 ]; then
  vlakeep tabletop-data --skills corner --probe.name tabletop-2000 --probe.size 2000 &
  vlakeep tabletop-data --skills path,order,relation,repeat --probe.name tabletop &
  vlakeep tabletop-data --skills pick,place,reach,tap,side,drop --probe.name tabletop-8000 --probe.size 8000 &
  for job in $(jobs -p); do wait "$job"; done
fi
number=0 status=0
for part in "$@"; do
  number=$((number + 1))
  read -r -a words <<<"$part"
  left=$((limit - (SECONDS - began)))
  [ "$left" -gt 0 ] || { echo "no time is left for: $part" | tee -a "$out/log.txt"; continue; }
  [ -z "${TAKE:-}" ] || vlakeep study "${words[0]}" --import "$TAKE" || status=1
  vlakeep study "${words[@]}" --workers "$workers" --seconds "$left" --export "$out/part$number.jsonl" || status=1
done
for file in "$out"/part*.jsonl; do
  [ ! -f "$file" ] || echo "$(wc -l <"$file") records in $file"
done
exit "$status"
