#!/bin/bash
#SBATCH --job-name=localign
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=localign-%j.log

# One task is one rank: SLURM starts the ranks, and its signal reaches each of them. 120 seconds before the time is
# up they save a checkpoint and end with 0 (before the first step: with 138); the job goes back into the queue until
# the run has its results.
# Set what is in this block; OUT and DATA are folders that every node sees.
OUT=${OUT:-runs/so400m}
DATA=${DATA:-/data/in21k}
COMMAND=(
    localign align --config align/siglip-vit-so400m-384px --data "$DATA" --out "$OUT"
    --micro-batch auto --workers 10 --checkpoint-every 500 --timeout 600 --resume auto
)

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=1

# exec, so that the task is Python itself: SLURM does not signal what a task has started.
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
    export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec "$@"' rank "${COMMAND[@]}"
status=$?

if { [ $status -eq 0 ] || [ $status -eq 138 ]; } && [ ! -e "$OUT/results.json" ]; then
    scontrol requeue "$SLURM_JOB_ID" # ends this script
fi
exit $status
