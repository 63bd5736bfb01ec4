#!/usr/bin/env bash
# From OpenVLA's checkpoint of libero_object to the report of studies/libero_7b.yaml. What is there is not made again; stopped, the same command goes on.
#   scripts/study_libero_7b.sh [words of vlakeep study]
#   scripts/study_libero_7b.sh --arms base,plain,graded --tasks spatial --seeds 1 --rates 5.0e-4                # first: three cells
#   HARDWARE=v100x8 scripts/study_libero_7b.sh --workers 8                                                      # a cell a GPU
#   scripts/study_libero_7b.sh --scheduler slurm --workers 16 --resources slurm_partition=gpu,gpus_per_node=1,timeout_min=600
# VLAKEEP_ROOT: the storage root, else /opt/data/private/vlakeep (60 GB and 1 GB a run). HARDWARE: rtx4090, v100x8, h100 or auto, the card of a
# cell; types, 4 bits and micro-batch are chosen for it, so that it has to be the same in every call of one root. Unset: as the study's file has
# it, for 24 GB with bfloat16.
# The simulator must be installed (make libero), and HF_ENDPOINT names a mirror of the hub.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/place.sh
base=openvla/openvla-7b-finetuned-libero-object
study=studies/libero_7b.yaml
python="${PYTHON:-python}"
card=(${HARDWARE:+--hardware "$HARDWARE"})
run() { echo "+ $*" >&2; "$@"; }
vlakeep() { run "$python" -m vlakeep.cli "$@"; }

vlakeep libero-check
# What was fetched whole is not asked for again; a link leads to what you have.
[ -L "$root/hf_cache/$base" ] || vlakeep fetch "$base"
for suite in spatial goal object; do  # object: of the probe and of the replay
  [ -L "$root/datasets/libero_${suite}_no_noops" ] ||
    vlakeep fetch --dataset openvla/modified_libero_rlds --only "libero_${suite}_no_noops"
done
# The probe: frames from everywhere in the old suite's episodes, a task a kind. Held out: other scenes of the same suite.
[ -e "$root/probe/keep/probe.json" ] || run "$python" - <<'PY'
from vlakeep.core.config import load_config
from vlakeep.core.storage import Storage
from vlakeep.data.formats import open_dataset
from vlakeep.data.images import resize_uint8
from vlakeep.data.sample import Sample
from vlakeep.probe.probe_set import write_probe
storage = Storage.from_config(load_config())
data = open_dataset(storage.data / "libero_object_no_noops", cache_dir=storage.cache)
samples = []
for i in range(500):
    episode = i * len(data) // 500
    frame = data.frame(episode, int(data.lengths[episode]) * (i % 5) // 5)
    samples.append(Sample(resize_uint8(frame.image, (224, 224)), frame.instruction))
write_probe(storage.guard_write(storage.probe_folder("keep"), what="probe"), samples, [sample.instruction for sample in samples])
PY
[ -e "$root/probe/keep_heldout/probe.json" ] ||
  vlakeep libero-vqa --suite libero_object --items 500 --split heldout --workers 8 --probe.name keep_heldout
vlakeep plan --config configs/openvla_libero_graded.yaml --hardware "${HARDWARE:-rtx4090}" --backbone.checkpoint "$base"
vlakeep study "$study" --dry-run "$@" ${card[@]+"${card[@]}"} | tail -n 3
vlakeep study "$study" "$@" ${card[@]+"${card[@]}"}
vlakeep study "$study" --report ${card[@]+"${card[@]}"}
