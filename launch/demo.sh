#!/usr/bin/env bash
# The whole story, small: `make demo`. Two processes on a CPU; the same commands run on a cluster with another recipe.
#   SEED=0             other data, other draws
#   NOISE=0.4          share of the training samples that carry a wrong answer, as scraped instruction data does
#   DATA=puzzles       or easy-vqa, a third party's data
#   SIZE=full          or smallest: a few updates each, to see that everything runs; its numbers mean nothing
#   DEVICE=cpu         or cuda: on GPUs, one for each rank
#   RANKS=2            processes
#   STUDENTS=...       some of "finetuned teacher_answers paper interaction"; the others are compared with the first
#   PLACE=.            the folder in which runs/ and data/ lie
# Starts afresh each time: there, runs/demo, runs/demo-*, data/$DATA and data/$DATA-answers are replaced.
set -euo pipefail
cd "$(dirname "$0")/.."

SEED=${SEED:-0} NOISE=${NOISE:-0.4} DATA=${DATA:-puzzles} SIZE=${SIZE:-full} DEVICE=${DEVICE:-cpu} RANKS=${RANKS:-2}
STUDENTS=${STUDENTS:-finetuned teacher_answers paper interaction}
RUNS=${PLACE:+$PLACE/}runs SHARDS=${PLACE:+$PLACE/}data/$DATA
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
case "$DEVICE" in
  cpu) export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1; ZERO=ds_configs/zero3_cpu.json ;;
  cuda) export DS_ACCELERATOR=cuda; ZERO=ds_configs/zero3.json ;;
  *) echo "DEVICE=$DEVICE: expected cpu or cuda" >&2; exit 2 ;;
esac
# Four students of the same pair, data and number of updates. Only how they are trained differs.
PAPER=(interact.steps=$HALF reinforce.steps=$HALF)
TO_THE_END=(stage_1="$RUNS/demo" interact.steps=$ALL reinforce.steps=0)
FINETUNED=(interact.steps=0 reinforce.steps=$ALL)
ANSWERS=(interact.steps=0 reinforce.steps=$ALL reinforce.train="$SHARDS-answers")
RECIPE_VALUES=(seed="$SEED" verbalize.steps=$VERBALIZE deepspeed=$ZERO data.train="$SHARDS/train" data.held_out="$SHARDS/held_out")

command -v deepspeed > /dev/null || export PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# root may start MPI here, and two ranks may share one core
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
[ -t 1 ] || export COLUMNS=140 TERM=dumb  # wide enough for the trace; mpirun gives its ranks a terminal even where there is none: no colours into files
LAUNCH=(deepspeed -q --num_accelerators "$RANKS")
# which would take the first GPUs of the machine, whatever CUDA_VISIBLE_DEVICES says
[ -z "${CUDA_VISIBLE_DEVICES:-}" ] || LAUNCH=(deepspeed -q --include "localhost:$(cut -d, -f1-"$RANKS" <<< "$CUDA_VISIBLE_DEVICES")")
MPI=(mpirun -n "$RANKS")
[ "$RANKS" -gt 1 ] || MPI=()  # one rank needs no MPI
TIMES=() REPORTED=()
MODELS=(--model teacher="demo/models/$DATA/teacher" --model untouched="demo/models/$DATA/student")

timed() { # NAME COMMAND...: show the command as one would type it, run it, keep its time
  local start=$SECONDS
  printf '\n$ %s\n' "${*:2}"
  "${@:2}"
  TIMES+=("$(printf '%-15s %4d s' "$1" $((SECONDS - start)))")
}

wanted() { [[ " $STUDENTS " == *" $1 "* ]]; } # NAME

stage_2() { # NAME RUN VALUES...: train one of the students, if it is wanted
  wanted "$1" || return 0
  timed "$1" "${LAUNCH[@]}" launch/train.py --stage 2 --recipe $RECIPE --set "${RECIPE_VALUES[@]}" run="$RUNS/$2" "${@:3}"
  MODELS+=(--model "$1=$RUNS/$2/student")
  REPORTED+=("$RUNS/$2")
}

rm -rf "$RUNS/demo" "$RUNS/demo-interaction" "$RUNS/demo-finetuned" "$RUNS/demo-answers" "$SHARDS" "$SHARDS-answers"

# 1. Data: drawn or read on the spot -> tar shards, over two MPI ranks. Leaves data/$DATA/{train,held_out}/.
timed "data" "${MPI[@]}" python -m data_prep shard --source "$DATA" --count $SAMPLES --held-out-count $HELD_OUT --noise "$NOISE" --seed "$SEED" --samples-per-shard 100 --output "$SHARDS"

# 2. Stage 1: both models frozen, a verbalizer on each target layer learns; then the teacher's words go to disk.
#    Leaves runs/demo/{verbalize,cache}/.
timed "stage 1" "${LAUNCH[@]}" launch/train.py --stage 1 --recipe $RECIPE --set "${RECIPE_VALUES[@]}" run="$RUNS/demo"

# 3. What most people do with a teacher: let it answer the training questions. Leaves data/$DATA-answers/.
! wanted teacher_answers || timed "answers" python -m pipeline answer --run "$RUNS/demo" --batch-size 100 --output "$SHARDS-answers"

# 4. Four students, each a Hugging Face folder in runs/NAME/student/.
stage_2 finetuned demo-finetuned "${FINETUNED[@]}"
stage_2 teacher_answers demo-answers "${ANSWERS[@]}"
stage_2 paper demo "${PAPER[@]}"
stage_2 interaction demo-interaction "${TO_THE_END[@]}"

# 5. All of them on clean held-out samples. Leaves runs/demo/evaluation.json.
unset OMP_NUM_THREADS  # one process from here on: it may use all cores
timed "evaluate" python -m pipeline evaluate "${MODELS[@]}" --against "${STUDENTS%% *}" --data "$SHARDS/held_out" --batch-size 100 --max-new-tokens 16 --output "$RUNS/demo/evaluation.json"

# 6. Which training samples have a wrong answer, from the cache alone.
timed "suspects" python -m pipeline cache-info "$RUNS/demo" --suspects --limit 8

# 7. What each layer says about one held-out picture. Leaves runs/trace.html.
SAMPLE=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["shards"][0]["keys"][0])' "$SHARDS/held_out/manifest.json")
! wanted interaction || timed "trace" python -m pipeline trace --run "$RUNS/demo-interaction" --sample "$SAMPLE" --page "$RUNS/trace.html"
#    Then about one whose answer went from wrong to right, and so on, for the report. Leaves runs/demo/traces/.
! wanted paper || timed "changed" python -m pipeline trace --run "$RUNS/demo" --changed --max-new-tokens 16

# 8. How the runs went, side by side. Leaves runs/report.html.
timed "report" python -m pipeline report "${REPORTED[@]}" --output "$RUNS/report.html"

printf '\ntime (%s wrong answers in training, seed %s)\n' "$NOISE" "$SEED"
printf '  %s\n' "${TIMES[@]}" "$(printf '%-15s %4d s' total $SECONDS)"
printf '\nwhere everything lies\n'
printf '  %-28s %s\n' \
  "$SHARDS/" "shards: train/ and held_out/; look at them: python -m data_prep preview $SHARDS" \
  "$SHARDS-answers/" "the same training questions, answered by the teacher" \
  "$RUNS/demo/" "verbalizers, teacher cache, the paper's student; python -m pipeline status $RUNS/demo" \
  "$RUNS/demo-interaction/" "the student of interaction to the end" \
  "$RUNS/demo-finetuned/" "the student finetuned on the given answers" \
  "$RUNS/demo-answers/" "the student finetuned on the teacher's answers" \
  "$RUNS/trace.html" "the trace as a page: open it in a browser; docs/reading_a_trace.md" \
  "$RUNS/demo/traces/" "traces of answers that changed, as pages; the report shows them too" \
  "$RUNS/report.html" "losses, matches, speed and evaluation of the runs, as a page" \
  "$RUNS/demo/evaluation.json" "the table above as numbers; what it shows beyond this seed: docs/evidence.md"
