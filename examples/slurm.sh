#!/usr/bin/env bash
# One evaluation on all GPUs of a SLURM job:
#
#   sbatch slurm.sh --model deit_small_patch16_224 --data imagenet/val --method tome --flops 0.6 --output table.json
#
#SBATCH --job-name=tokenprune-eval
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=02:00:00
set -euo pipefail
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}

# A torchrun for each node; where one ends with an error srun ends the others.
exec srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head:${PORT:-29500}" \
    -m tokenprune.cli eval --device cuda "$@"
