#!/bin/bash
# Several machines under SLURM: sbatch recipes/launch/slurm.sh [the recipe's options]
# Edit the numbers of machines and GPUs. One launcher a machine; each learns from SLURM which machine it is.
#SBATCH --job-name=ppo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail

gpus_per_node=${GPUS_PER_NODE:-8}
recipe=${RECIPE:-recipes/ppo_gpt2_sentiment.py}
read -r main_process_ip < <(scontrol show hostnames "$SLURM_JOB_NODELIST")  # `| head` could end scontrol by SIGPIPE
# A port of this job's own, so that two jobs on one machine do not meet.
main_process_port=$((20000 + SLURM_JOB_ID % 20000))
export main_process_ip main_process_port gpus_per_node recipe

# A requeued job goes on from the newest checkpoint (save_every says how old that can be).
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --config_file recipes/launch/multi_node_0.yaml \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * gpus_per_node))" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$main_process_ip" --main_process_port "$main_process_port" "$recipe" "$@"' _ "$@"
