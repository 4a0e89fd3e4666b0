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

# Each task is one rank: SLURM starts the ranks and signals each of them. 120 seconds before the time limit they save
# a checkpoint and exit 0 (138 before the first step), and the job requeues itself until the run has results.
# Edit this block. Every node must see the folders OUT and DATA.
OUT=${OUT:-runs/so400m}
DATA=${DATA:-/data/in21k}
COMMAND=(
    localign align --config align/siglip-vit-so400m-384px --data "$DATA" --out "$OUT"
    --micro-batch auto --workers 10 --checkpoint-every 500 --timeout 600 --resume auto
)

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=1

# exec makes Python the task itself, because SLURM does not signal the children of a task.
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
    export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec "$@"' rank "${COMMAND[@]}"
status=$?

if { [ $status -eq 0 ] || [ $status -eq 138 ]; } && [ ! -e "$OUT/results.json" ]; then
    scontrol requeue "$SLURM_JOB_ID" # ends this script
fi
exit $status
