#!/bin/bash
# One run on two machines of eight GPUs each:
#   DATASET=data/mine OUTPUT=runs/mine sbatch --export=ALL recipes/launch/slurm.sh --num_epochs 2
# The output folder, the cache and the models are on a file system that all machines mount.
#SBATCH --job-name=diffsynth
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --requeue
set -euo pipefail

RECIPE=${RECIPE:-qwen-image-full}
DATASET=${DATASET:?the folder of the dataset}
OUTPUT=${OUTPUT:?the folder of the run}
PROCESSES=${PROCESSES:-8} # on each machine, one for each GPU
export MASTER_PORT=${MASTER_PORT:-29500}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)  # not `head`, which may end scontrol by SIGPIPE
export MASTER_ADDR RECIPE DATASET OUTPUT PROCESSES

# A step of the job on each machine; `--resume auto` continues after a requeue, and `--max_time` saves before the limit.
srun --kill-on-bad-exit=1 bash -c 'diffsynth train --recipe "$RECIPE" \
  --dataset_base_path "$DATASET" --output_path "$OUTPUT" \
  --accelerate_config fsdp2 --num_processes "$((SLURM_NNODES * PROCESSES))" \
  --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \
  --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" \
  --resume auto --max_time 3h45m "$@"' diffsynth "$@"
