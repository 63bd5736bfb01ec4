# Shared by the run scripts: --gpus N, the conda environment, and the launch line. Sourced, not run.
set -euo pipefail

GPUS=1
CONFIG=""
ARGS=()
while [ $# -gt 0 ]; do
  case "$1" in
    --gpus) GPUS="$2"; shift 2 ;;
    --gpus=*) GPUS="${1#*=}"; shift ;;
    --config) CONFIG="$2"; shift 2 ;;
    --config=*) CONFIG="${1#*=}"; shift ;;
    -h|--help) sed -n '2,/^set /p' "$0" | sed '/^set /d; s/^# \{0,1\}//'; exit 0 ;;
    *) ARGS+=("$1"); shift ;;
  esac
done
case "$GPUS" in
  ''|*[!0-9]*|0) echo "error: --gpus takes a whole number such as 1 or 8, not '$GPUS'" >&2; exit 2 ;;
esac
. "$(dirname "${BASH_SOURCE[0]}")/place.sh"

# Prints the command it runs, so that a log alone is enough to run it again. One process: the script becomes that command, and a
# scheduler's signal to the script is then one to the trainer, which saves. Several: see `watched`. Nothing after `launch` is run.
# Several machines: the same call on each, with NNODES, how many they are, and RDZV=HOST:PORT of one of them; --gpus are those of each machine.
launch() {
  local stage="$1" nodes=(--standalone); shift
  local command=(python3 -m vlakeep.cli "$stage" "$@")
  if [ "${NNODES:-1}" -gt 1 ]; then
    nodes=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "${RDZV:?NNODES=$NNODES: set RDZV to HOST:PORT of one of the machines}" --rdzv-id vlakeep)
  fi
  if [ "$GPUS" -gt 1 ] || [ "${NNODES:-1}" -gt 1 ]; then
    command=(torchrun "${nodes[@]}" --nproc-per-node "$GPUS" -m vlakeep.cli "$stage" "$@")
    echo "+$(printf ' %q' "${command[@]}")" >&2
    watched "${command[@]}"
  fi
  echo "+$(printf ' %q' "${command[@]}")" >&2
  exec "${command[@]}"
}

# torchrun knows what to do with SIGTERM: it hands it on and waits 30 s for the ranks. SIGUSR1 would end most versions of it, and the ranks
# with it, before anything is saved, also where a scheduler sends it to every process of a step. So torchrun is started deaf to SIGUSR1 (the
# ranks are not: they set handlers of their own), and the script turns SIGUSR1 into SIGTERM for it. Ends with 128 + the signal.
watched() {
  local caught=0 status child
  ( trap '' USR1; exec "$@" ) &
  child=$!
  trap 'caught=${caught/#0/143}; kill -TERM "$child" 2>/dev/null || true' TERM
  trap 'caught=${caught/#0/130}; kill -TERM "$child" 2>/dev/null || true' INT
  trap 'caught=${caught/#0/138}; kill -TERM "$child" 2>/dev/null || true' USR1
  while :; do
    wait "$child" || true
    kill -0 "$child" 2>/dev/null || break  # a signal ends `wait` before the child has ended
  done
  status=$caught
  [ "$caught" != 0 ] || wait "$child" || status=$?
  exit "$status"
}
