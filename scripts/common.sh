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
if [ "${CONDA_DEFAULT_ENV:-}" != "openvla" ]; then
  echo "note: the conda environment 'openvla' is not active (conda activate openvla); using $(command -v python3)" >&2
fi

# Prints the command it runs, so that a log alone is enough to run it again, and becomes that command: a scheduler's signal to the
# script is then one to the trainer, which saves. Nothing after `launch` is run.
launch() {
  local stage="$1"; shift
  local command=(python3 -m vlakeep.cli "$stage" "$@")
  if [ "$GPUS" -gt 1 ] && [ "$stage" = train ]; then
    # torchrun hands SIGTERM on by itself; USR1 when it is asked to, and only newer versions read this.
    export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}"
    command=(torchrun --standalone --nproc-per-node "$GPUS" -m vlakeep.cli "$stage" "$@")
  fi
  echo "+$(printf ' %q' "${command[@]}")" >&2
  exec "${command[@]}"
}
