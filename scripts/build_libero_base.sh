#!/usr/bin/env bash
# A small base model for LIBERO from nothing: demonstrations, questions, training. One GPU and 16 cores take about 25 minutes.
#   scripts/build_libero_base.sh [SUITE] [WORKERS] [MINUTES]      default: libero_object 16 8
# Everything lands below VLAKEEP_ROOT (default /opt/data/private/vlakeep), the model in hf_cache/SUITE-base.
set -euo pipefail
suite="${1:-libero_object}" workers="${2:-16}" minutes="${3:-8}"
. "$(dirname "$0")/place.sh"
run() { echo "+ $*" >&2; "$@"; }
run vlakeep libero-demos --suite "$suite" --demos 30 --first 1000 --noise 0.3 --approach side --workers "$workers"
run vlakeep libero-demos --suite "$suite" --demos 30 --first 2000 --noise 0.2 --approach side --workers "$workers"
run vlakeep libero-vqa --suite "$suite" --items 2000 --questions_per_scene 4 --workers "$workers" --probe.name "${suite}_pretraining"
run vlakeep pretrain-libero --data "${suite}_expert_side_noise0_3,${suite}_expert_side_noise0_2" --questions "${suite}_pretraining" --key "$suite" \
  --out "$root/hf_cache/$suite-base" --patch 16 --compile --minutes "$minutes"
