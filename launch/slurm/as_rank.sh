#!/usr/bin/env bash
# Run a command as one rank of a distributed job: srun launch/slurm/as_rank.sh python launch/train.py ...
# Translates what SLURM tells each task into what DeepSpeed and torch.distributed read.
set -euo pipefail

: "${SLURM_PROCID:?as_rank.sh runs inside srun; expected SLURM_PROCID to be set. Run: srun launch/slurm/as_rank.sh COMMAND}"
: "${SLURM_NTASKS_PER_NODE:?SLURM does not say how many ranks a node has. Add: #SBATCH --ntasks-per-node=N}"

export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID"
# Where SLURM binds each task to a GPU of its own (--gpus-per-task), that is the only one it sees.
[[ "${CUDA_VISIBLE_DEVICES:-}" =~ ^[^,]+$ ]] && export LOCAL_RANK=0
export WORLD_SIZE="$SLURM_NTASKS" LOCAL_SIZE="$SLURM_NTASKS_PER_NODE"
export MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
# One port a job, the same on all its ranks: two jobs that share a node do not meet.
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"
exec "$@"
