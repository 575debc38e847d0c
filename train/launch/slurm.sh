#!/bin/bash
#SBATCH --job-name=dsmoe
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --signal=TERM@120
#SBATCH --requeue
# One process per GPU; jax.distributed reads Slurm's variables. SIGTERM saves a checkpoint, the requeued job resumes from it.
srun dsmoe pretrain deepseek_moe_16b --data.sources /shared/shards --output-dir /shared/runs/16b --mesh.fsdp 8 --mesh.expert 4
