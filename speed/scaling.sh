#!/usr/bin/env bash
# What N cards of one machine do: weights against one card, a killed rank, stages spread over them, 7B shapes with DDP and FSDP2; a table.
#   speed/scaling.sh OUT [PART ...]     OUT/cards.jsonl gets a line a figure; parts: scaling prepare equal killed spread types (all of them)
# PYTHON: the interpreter. TOKENIZER: a Llama-2 tokenizer's files, else fetched. RANKS: numbers of processes, else 2, 4, 8 as far as there
# are cards. ROOT: for weights and runs, else /dev/shm. TINY=1: small shapes on a CPU, to see that it runs.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,/^set /p' "$0" | sed '/^set /d; s/^# \{0,1\}//' >&2; exit 2; }
out="$1"; shift
parts="${*:-scaling prepare equal killed spread types}"
mkdir -p "$out"
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
root="$(mktemp -d "${ROOT:-/dev/shm}/vlakeep-scaling.XXXXXX")"
trap 'rm -rf "$root"' EXIT
trap 'exit 143' TERM INT
# V100s have none of it, and on some machines a job that uses it takes the cards from others.
export NCCL_NVLS_ENABLE=0 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
tokenizer="${TOKENIZER:-$root/tokenizer}"
[ -d "$tokenizer" ] || "$python" scripts/fetch_llama2_tokenizer.py "$tokenizer"
"$python" speed/cards.py --tokenizer "$tokenizer" --out "$out/cards.jsonl" --root "$root/work" --parts "${parts// /,}" \
  ${RANKS:+--ranks "$RANKS"} ${TINY:+--tiny}
"$python" speed/cards.py --table "$out/cards.jsonl" | tee "$out/table.txt"
