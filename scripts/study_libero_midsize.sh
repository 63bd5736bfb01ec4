#!/usr/bin/env bash
# From the mid-size base to the report of studies/libero_midsize.yaml. What is there is not made again; stopped, the same command goes on.
#   scripts/study_libero_midsize.sh [WORKERS] [words of vlakeep study]        default: 16 simulators
#   scripts/study_libero_midsize.sh 24 --seeds 11 --workers 6                 # one cell of each arm first, six at a time
# VLAKEEP_ROOT: the storage root, else /opt/data/private/vlakeep. The base must be in hf_cache/midsize-base: scripts/build_midsize_base.sh, or
# `vlakeep base-delta apply` with the file that it leaves. The simulator must be installed (make libero). STOP=data ends before the study.
set -euo pipefail
workers="${1:-16}"
shift $(($# > 0))
. "$(dirname "$0")/place.sh"
study="$(dirname "$0")/../studies/libero_midsize.yaml"
python="${PYTHON:-python}"
run() { echo "+ $*" >&2; "$@"; }
vlakeep() { run "$python" -m vlakeep.cli "$@"; }
pids=""
together() { for pid in $pids; do wait "$pid"; done; pids=""; }

[ -f "$root/hf_cache/midsize-base/PROVENANCE.json" ] || { echo "no base in $root/hf_cache/midsize-base: scripts/build_midsize_base.sh" >&2; exit 1; }
# What is learnt, and of the old suites the frames of the probe and of the replay
for suite in libero_goal libero_object libero_spatial; do
  demos="${DEMOS:-10}"; [ "$suite" = libero_goal ] || demos="${OLD_DEMOS:-5}"
  [ -f "$root/datasets/${suite}_expert_side_noise0_3/demos.json" ] ||
    { vlakeep libero-demos --suite "$suite" --demos "$demos" --noise 0.3 --approach side --workers "$((workers / 4 + 1))" & pids="$pids $!"; }
done
# Questions of every sixth task of the large suite: what is protected, and other scenes, of which the method knows nothing
tasks="$(seq -s, 0 6 89)"
[ -f "$root/probe/midsize_questions/probe.json" ] ||
  { vlakeep libero-vqa --suite libero_90 --tasks "$tasks" --items 300 --questions_per_scene 4 --workers "$((workers / 8 + 1))" --probe.name midsize_questions &
    pids="$pids $!"; }
[ -f "$root/probe/midsize_heldout/answers.jsonl" ] ||
  { vlakeep libero-vqa --suite libero_90 --tasks "$tasks" --items 500 --questions_per_scene 4 --split heldout --workers "$((workers / 8 + 1))" \
      --probe.name midsize_heldout & pids="$pids $!"; }
together
[ -f "$root/probe/midsize_keep/probe.json" ] ||
  vlakeep probe-add --probe.name midsize_questions --probe.size 300 --frames 350 --to midsize_keep \
    --data.datasets '[libero_object_expert_side_noise0_3, libero_spatial_expert_side_noise0_3]'
[ "${STOP:-}" != data ] || exit 0
vlakeep study "$study" --dry-run "$@" | tail -n 3
vlakeep study "$study" "$@"
vlakeep study "$study" --report
