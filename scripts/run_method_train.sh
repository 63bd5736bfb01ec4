#!/usr/bin/env bash
# Method arm: LoRA + ICSM + HSW + Thermostat. Needs the artefact of run_offline_icms.sh.
#   scripts/run_method_train.sh --gpus 1|8 [--config FILE] [options of run_baseline_lora.sh] [--probe.name NAME]
#                               [--icsm.name FOLDER] [--hsw.site residual|lora_input|both] [--hsw.layers '[28,29,30,31]']
#                               [--thermostat.every K] [--thermostat.gamma_min 0.5] [--thermostat.beta_min 0.5] ...
set -euo pipefail
source "$(dirname "$0")/common.sh"
launch train --config "${CONFIG:-configs/method_icsm_hsw_thermostat.yaml}" ${ARGS[@]+"${ARGS[@]}"}
