#!/usr/bin/env bash
# Evaluation of the base or of a trained run, by the benchmark that the configuration names.
#   scripts/run_eval_libero.sh --evaluate.target base|RUN|CHECKPOINT_FOLDER [--gpus 1] [--config FILE]
#                              [--evaluate.benchmark NAME] [--evaluate.skills '[pick]'] [--evaluate.episodes 50] ...
# The tabletop benchmark ships with vlakeep; the LIBERO simulator is not wired in yet, and asking for it says so.
set -euo pipefail
source "$(dirname "$0")/common.sh"
launch evaluate --config "${CONFIG:-configs/baseline_lora.yaml}" ${ARGS[@]+"${ARGS[@]}"}
