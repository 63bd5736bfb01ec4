#!/usr/bin/env bash
# Offline stage: the frozen teacher's ICSM subspaces and Thermostat statistics, once per base model and probe.
#   scripts/run_offline_icms.sh [--gpus 1|8] [--config FILE] [--probe.name NAME] [--icsm.layers '[15,17]'] [--icsm.rank 128]
#                               [--icsm.epsilon 0.1] [--icsm.name FOLDER] [--root DIR] ...
# The artefact is the same to the byte with any number of GPUs.
set -euo pipefail
source "$(dirname "$0")/common.sh"
launch offline --config "${CONFIG:-configs/method_icsm_hsw_thermostat.yaml}" ${ARGS[@]+"${ARGS[@]}"}
