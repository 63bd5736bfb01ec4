#!/usr/bin/env bash
# Evaluation of the base or of a trained run, by the benchmark that the configuration or --evaluate.benchmark names.
#   scripts/run_eval_libero.sh --evaluate.target base|RUN|CHECKPOINT_FOLDER [--gpus 1|8] [--config FILE]
#                              --evaluate.benchmark libero_spatial|libero_object|libero_goal|libero_10|libero_90 [--evaluate.workers 8]
#                              [--evaluate.skills '[0, 3]'] [--evaluate.episodes 50] [--evaluate.videos 1] ...
# LIBERO suites follow the official protocol, 50 episodes of each task. `make libero` installs the simulator, `vlakeep libero-check` says
# whether it runs. Without --evaluate.benchmark the configurations that ship evaluate the tabletop, which needs no simulator.
set -euo pipefail
source "$(dirname "$0")/common.sh"
launch evaluate --config "${CONFIG:-configs/baseline_lora.yaml}" ${ARGS[@]+"${ARGS[@]}"}
