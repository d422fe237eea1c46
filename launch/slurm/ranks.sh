# shellcheck shell=bash
# Sourced by the job scripts: `ranks PROGRAM ...` runs a Python program as the job's ranks, `once COMMAND ...` a command
# on the first node. What launch/submit.py writes above it may set: LAUNCH, MAX_REQUEUES, REQUEUES_SET_BY, srun_options,
# in_container, overrides.
LAUNCH=${LAUNCH:-launch}  # the folder of train.py and cache.py
is_array() { [[ $(declare -p "$1" 2> /dev/null) == "declare -a"* ]]; }  # a user's exported variable is none
is_array srun_options || srun_options=()  # for a container that srun starts (Enroot): --container-image=...
is_array in_container || in_container=()  # for one that a program starts (Apptainer): apptainer exec --nv IMAGE
is_array overrides || overrides=()        # values of the recipe: --set KEY=VALUE
REQUEUE_EXIT=75                         # pipeline.errors.REQUEUE_EXIT
WARNED_EARLY=138                        # ended by SIGUSR1: SLURM's warning came before the program could take it
MAX_REQUEUES=${MAX_REQUEUES:-100}       # how often a job may have gone back to the queue
REQUEUES_SET_BY=${REQUEUES_SET_BY:-the variable MAX_REQUEUES}  # under launch.submit max_requeues of the site file
ANSWER_S=60
REQUEUE_TRIES=10                        # of scontrol, REQUEUE_WAIT_S apart: a busy slurmctld does not answer for minutes
REQUEUE_WAIT_S=30
LAST_RANKS_S=60                         # how long the other ranks may take to end once one has

command -v deepspeed >/dev/null || [ "${#in_container[@]}" != 0 ] || export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"  # srun no longer takes it from sbatch since SLURM 22.05
# Here, not on the ranks: inside a container there may be no scontrol.
MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
export MASTER_ADDR

or_requeue() { # COMMAND...: ranks that were asked to end write a checkpoint and exit with 75; then the job comes back
  local code=0
  "$@" || code=$?
  case "$code" in
    0) return 0 ;;
    "$REQUEUE_EXIT" | "$WARNED_EARLY") echo "the ranks were asked to end (exit code $code)" ;;
    *)
      if every_node_answers; then return "$code"; fi
      echo "exit code $code, and not every node of the job runs as much as 'true': a node is gone"
      ;;
  esac
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_REQUEUES" ]; then
    echo "error: job $SLURM_JOB_ID has gone back to the queue $SLURM_RESTART_COUNT times, as often as $REQUEUES_SET_BY" \
      "allows. See above whether it gets anywhere; what is done stays. Submit it again, or set a higher one"
    return "$code"
  fi
  echo "job $SLURM_JOB_ID goes back to the queue"
  local tries=1
  until scontrol requeue "$SLURM_JOB_ID"; do
    if [ "$tries" -ge "$REQUEUE_TRIES" ]; then
      echo "error: SLURM did not take job $SLURM_JOB_ID back in $tries tries; what is done stays. Submit it again"
      return "$code"
    fi
    tries=$((tries + 1))
    sleep "$REQUEUE_WAIT_S"
  done
  sleep 120  # SLURM ends this script; to end by itself is to fail, and never to end well: jobs wait for that
  return "$code"
}

every_node_answers() { # SLURM itself notices a dead node after minutes only, when the ranks have failed for it long since
  timeout "$ANSWER_S" srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 true
}

# Not --kill-on-bad-exit=1: it would kill the other ranks as soon as the first has left with 75, and their 137 would win.
ranks() { # PROGRAM ARGUMENT...: a Python program, on every rank
  or_requeue srun --kill-on-bad-exit=0 --wait="$LAST_RANKS_S" "${srun_options[@]}" \
    bash "$LAUNCH/slurm/as_rank.sh" "${in_container[@]}" python "$@"
}

once() { # COMMAND...: on the first node only
  srun --nodes=1 --ntasks=1 --ntasks-per-node=1 "${srun_options[@]}" "${in_container[@]}" "$@"
}
