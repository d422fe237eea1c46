#!/usr/bin/env bash
# The whole story, small: `make demo`. Two processes on a CPU; the same commands run on a cluster with another recipe.
#   SEED=0             other data, other draws
#   NOISE=0.4          share of the training samples that carry a wrong answer, as scraped instruction data does
#   DATA=puzzles       or easy-vqa, a third party's data
#   SIZE=full          or smallest: a few updates each, to see that everything runs; its numbers mean nothing
# Starts afresh each time: runs/demo, runs/demo-*, data/$DATA and data/$DATA-answers are replaced.
set -euo pipefail
cd "$(dirname "$0")/.."

SEED=${SEED:-0} NOISE=${NOISE:-0.4} DATA=${DATA:-puzzles} SIZE=${SIZE:-full}
case "$DATA" in
  puzzles) RECIPE=recipes/demo.yaml ;;
  easy-vqa) RECIPE=recipes/demo_easy_vqa.yaml ;;
  *) echo "DATA=$DATA: expected puzzles or easy-vqa" >&2; exit 2 ;;
esac
case "$SIZE" in
  full) SAMPLES=1000 HELD_OUT=500 VERBALIZE=120 HALF=150 ALL=300 ;;
  smallest) SAMPLES=64 HELD_OUT=16 VERBALIZE=2 HALF=2 ALL=4 ;;
  *) echo "SIZE=$SIZE: expected full or smallest" >&2; exit 2 ;;
esac
# Four students of the same pair, data and number of updates. Only how they are trained differs.
PAPER=(run=runs/demo interact.steps=$HALF reinforce.steps=$HALF)
TO_THE_END=(run=runs/demo-interaction stage_1=runs/demo interact.steps=$ALL reinforce.steps=0)
FINETUNED=(run=runs/demo-finetuned interact.steps=0 reinforce.steps=$ALL)
ANSWERS=(run=runs/demo-answers interact.steps=0 reinforce.steps=$ALL reinforce.train="data/$DATA-answers")

[ ! -d .venv/bin ] || export PATH="$PWD/.venv/bin:$PATH"
export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# root may start MPI here, and two ranks may share one core
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
[ -t 1 ] || export COLUMNS=140 TERM=dumb  # wide enough for the trace; mpirun gives its ranks a terminal even where there is none: no colours into files
LAUNCH=(deepspeed -q --num_accelerators 2)
TIMES=()

timed() { # NAME COMMAND...: show the command as one would type it, run it, keep its time
  local start=$SECONDS
  printf '\n$ %s\n' "${*:2}"
  "${@:2}"
  TIMES+=("$(printf '%-12s %4d s' "$1" $((SECONDS - start)))")
}

stage_2() { # NAME VALUES...: train one of the students
  timed "$1" "${LAUNCH[@]}" launch/train.py --stage 2 --recipe $RECIPE --set seed="$SEED" verbalize.steps=$VERBALIZE "${@:2}"
}

rm -rf runs/demo runs/demo-interaction runs/demo-finetuned runs/demo-answers "data/$DATA" "data/$DATA-answers"

# 1. Data: drawn or read on the spot -> tar shards, over two MPI ranks. Leaves data/$DATA/{train,held_out}/.
timed "data" mpirun -n 2 python -m data_prep shard --source "$DATA" --count $SAMPLES --held-out-count $HELD_OUT --noise "$NOISE" --seed "$SEED" --samples-per-shard 100 --output "data/$DATA"

# 2. Stage 1: both models frozen, a verbalizer on each target layer learns; then the teacher's words go to disk.
#    Leaves runs/demo/{verbalize,cache}/.
timed "stage 1" "${LAUNCH[@]}" launch/train.py --stage 1 --recipe $RECIPE --set seed="$SEED" run=runs/demo verbalize.steps=$VERBALIZE

# 3. What most people do with a teacher: let it answer the training questions. Leaves data/$DATA-answers/.
timed "answers" python -m pipeline answer --run runs/demo --batch-size 100 --output "data/$DATA-answers"

# 4. Four students, each a Hugging Face folder in runs/NAME/student/.
stage_2 "paper" "${PAPER[@]}"
stage_2 "interaction" "${TO_THE_END[@]}"
stage_2 "finetuned" "${FINETUNED[@]}"
stage_2 "on answers" "${ANSWERS[@]}"

# 5. All of them on clean held-out samples. Leaves runs/demo/evaluation.json.
unset OMP_NUM_THREADS  # one process from here on: it may use all cores
MODELS=(--model teacher="demo/models/$DATA/teacher" --model untouched="demo/models/$DATA/student")
MODELS+=(--model finetuned=runs/demo-finetuned/student --model teacher_answers=runs/demo-answers/student)
MODELS+=(--model paper=runs/demo/student --model interaction=runs/demo-interaction/student)
timed "evaluate" python -m pipeline evaluate "${MODELS[@]}" --against finetuned --data "data/$DATA/held_out" --batch-size 100 --max-new-tokens 16 --output runs/demo/evaluation.json

# 6. Which training samples have a wrong answer, from the cache alone.
timed "suspects" python -m pipeline cache-info runs/demo --suspects --limit 8

# 7. What each layer says about one held-out picture.
SAMPLE=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["shards"][0]["keys"][0])' "data/$DATA/held_out/manifest.json")
timed "trace" python -m pipeline trace --run runs/demo-interaction --sample "$SAMPLE"

printf '\ntime (%s wrong answers in training, seed %s)\n' "$NOISE" "$SEED"
printf '  %s\n' "${TIMES[@]}" "$(printf '%-12s %4d s' total $SECONDS)"
printf '\nwhere everything lies\n'
printf '  %-28s %s\n' \
  "data/$DATA/" "shards: train/ and held_out/; look at them: python -m data_prep preview data/$DATA" \
  "data/$DATA-answers/" "the same training questions, answered by the teacher" \
  runs/demo/ "verbalizers, teacher cache, the paper's student; python -m pipeline status runs/demo" \
  runs/demo-interaction/ "the student of interaction to the end" \
  runs/demo-finetuned/ "the student finetuned on the given answers" \
  runs/demo-answers/ "the student finetuned on the teacher's answers" \
  runs/demo/evaluation.json "the table above as numbers; what it shows beyond this seed: docs/evidence.md"
