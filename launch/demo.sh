#!/usr/bin/env bash
# The whole story, small: `make demo`. Two processes on a CPU; the same commands run on a cluster with another recipe.
#   SEED=0             other data, other draws
#   NOISE=0.4          share of the training samples that carry a wrong answer, as scraped instruction data does
#   DATA=puzzles       or easy-vqa, a third party's data
#   SIZE=full          or smallest: a few updates each, to see that everything runs; its numbers mean nothing
# Starts afresh each time: runs/demo, runs/demo-finetuned and data/$DATA are replaced.
set -euo pipefail
cd "$(dirname "$0")/.."

SEED=${SEED:-0} NOISE=${NOISE:-0.4} DATA=${DATA:-puzzles} SIZE=${SIZE:-full}
case "$DATA" in
  puzzles) RECIPE=recipes/demo.yaml ;;
  easy-vqa) RECIPE=recipes/demo_easy_vqa.yaml ;;
  *) echo "DATA=$DATA: expected puzzles or easy-vqa" >&2; exit 2 ;;
esac
SET=(seed="$SEED")
PLAIN=(run=runs/demo-finetuned interact.steps=0 reinforce.steps=300)  # as many updates as both steps of stage 2
case "$SIZE" in
  full) SAMPLES=1000 HELD_OUT=200 ;;
  smallest)
    SAMPLES=64 HELD_OUT=16
    SET+=(verbalize.steps=2 interact.steps=2 reinforce.steps=2)
    PLAIN=(run=runs/demo-finetuned interact.steps=0 reinforce.steps=4) ;;
  *) echo "SIZE=$SIZE: expected full or smallest" >&2; exit 2 ;;
esac

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

rm -rf runs/demo runs/demo-finetuned "data/$DATA"

# 1. Data: puzzles drawn on the spot -> tar shards, over two MPI ranks. Leaves data/$DATA/{train,held_out}/.
timed "data" mpirun -n 2 python -m data_prep shard --source "$DATA" --count $SAMPLES --held-out-count $HELD_OUT --noise "$NOISE" --seed "$SEED" --samples-per-shard 100 --output "data/$DATA"

# 2. Stage 1: both models frozen, a verbalizer on each target layer learns; then the teacher's words go to disk.
#    The one stage that needs the teacher. Leaves runs/demo/{verbalize,cache}/.
timed "stage 1" "${LAUNCH[@]}" launch/train.py --stage 1 --recipe $RECIPE --set "${SET[@]}"

# 3. Stage 2: interaction from the cache, then reinforcement. Leaves runs/demo/student/, an ordinary Hugging Face folder.
timed "stage 2" "${LAUNCH[@]}" launch/train.py --stage 2 --recipe $RECIPE --set "${SET[@]}"

# 4. For comparison: the same student, data and number of updates, without a teacher. Leaves runs/demo-finetuned/student/.
timed "finetuned" "${LAUNCH[@]}" launch/train.py --stage 2 --recipe $RECIPE --set "${SET[@]}" "${PLAIN[@]}"

# 5. All four models on clean held-out samples. Leaves runs/demo/evaluation.json.
unset OMP_NUM_THREADS  # one process from here on: it may use all cores
timed "evaluate" python -m pipeline evaluate --run runs/demo --model finetuned=runs/demo-finetuned/student

# 6. What each layer says about one held-out picture.
SAMPLE=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["shards"][0]["keys"][0])' "data/$DATA/held_out/manifest.json")
timed "trace" python -m pipeline trace --run runs/demo --sample "$SAMPLE"

printf '\ntime (%s wrong answers in training, seed %s)\n' "$NOISE" "$SEED"
printf '  %s\n' "${TIMES[@]}" "$(printf '%-12s %4d s' total $SECONDS)"
cat <<END

where everything lies
  data/$DATA/                 shards: train/ and held_out/; look at them: python -m data_prep preview data/$DATA
  runs/demo/student/          the distilled student, an ordinary Hugging Face folder
  runs/demo/evaluation.json   the table above as numbers
  runs/demo/                  verbalizers, teacher cache, metrics; python -m pipeline status runs/demo
  runs/demo-finetuned/        the plainly finetuned student
END
