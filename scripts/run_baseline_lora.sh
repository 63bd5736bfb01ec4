#!/usr/bin/env bash
# Baseline arm: plain LoRA.
#   scripts/run_baseline_lora.sh --gpus 1|8 [--config FILE] [--data_root_dir DIR] [--data.datasets '[NAME]'] [--run_root_dir DIR]
#                                [--lora.rank 16] [--lora.layers last:8] [--lora.modules '[attention]'] ...
set -euo pipefail
source "$(dirname "$0")/common.sh"
launch train --config "${CONFIG:-configs/baseline_lora.yaml}" ${ARGS[@]+"${ARGS[@]}"}
