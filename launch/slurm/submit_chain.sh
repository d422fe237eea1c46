#!/usr/bin/env bash
# Submit a whole run: data preparation, stage 1, the cache as a job array, stage 2; each starts when the one before
# it has ended well (afterok). Everything after -- goes to `python -m data_prep shard`; without it the shards are there.
#   RECIPE=recipes/NAME.yaml NODES=4 launch/slurm/submit_chain.sh -- --source llava --input FILE --images DIR --output DIR
set -euo pipefail
cd "$(dirname "$0")/../.."

export RECIPE=${RECIPE:?expected a recipe. Run: RECIPE=recipes/NAME.yaml launch/slurm/submit_chain.sh}
NODES=${NODES:-2}              # machines of stage 1 and stage 2
GPUS=${GPUS:-8}                # accelerators, and so ranks, of a machine
CPUS=${CPUS:-8}                # processor cores of a rank
CACHE_JOBS=${CACHE_JOBS:-4}    # tasks of the cache array, one machine each
DATA_RANKS=${DATA_RANKS:-8}    # MPI ranks of data preparation
SBATCH_ARGS=${SBATCH_ARGS:-}   # for all jobs alike, as in SBATCH_ARGS="--partition=gpu --account=lab"

[ -f "$RECIPE" ] || { echo "no recipe at $RECIPE; the shipped ones are in recipes/" >&2; exit 2; }

submit() { # NAME OPTION... SCRIPT ARGUMENT...: prints the job's id
  local name=$1 id
  shift
  # shellcheck disable=SC2086  # several options in one variable
  id=$(sbatch --parsable --kill-on-invalid-dep=yes $SBATCH_ARGS "$@")
  echo "$name: job $id" >&2
  echo "${id%%;*}"  # with federated clusters sbatch prints ID;CLUSTER
}

after=()
if [ "${1:-}" = "--" ]; then
  shift
  id=$(submit data --ntasks-per-node="$DATA_RANKS" launch/slurm/data_prep.sbatch "$@")
  after=(--dependency="afterok:$id")
fi
ranks=(--ntasks-per-node="$GPUS" --gpus-per-node="$GPUS" --cpus-per-task="$CPUS")
id=$(submit stage1 "${after[@]}" --nodes="$NODES" "${ranks[@]}" launch/slurm/stage1.sbatch)
id=$(submit cache --dependency="afterok:$id" --array="0-$((CACHE_JOBS - 1))" "${ranks[@]}" launch/slurm/cache_array.sbatch)
id=$(submit stage2 --dependency="afterok:$id" --nodes="$NODES" "${ranks[@]}" launch/slurm/stage2.sbatch)
echo "watch: squeue --me; the last job is $id; its output: slurm-vlsi-stage2-$id.out"
