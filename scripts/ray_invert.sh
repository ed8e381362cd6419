#!/bin/bash
# One latent-augment command on a Ray cluster over the nodes of one Slurm job, an actor a GPU. The
# units of a node that fails go to the others; if the first node fails, submit the same again.
#
#   sbatch --nodes=4 scripts/ray_invert.sh invert --images "$PWD/images" --bank "$PWD/bank" \
#       --backbone sd15 --prompt 'a photo of a {name}' --executor ray
#
# Without Slurm: `ray start --head --port=6379` on one machine, `ray start --address=HEAD:6379` on
# the others, now or later, and on the first
#
#   RAY_ADDRESS=auto latent-augment invert ... --executor ray

#SBATCH --job-name=latent-augment-ray
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --no-kill
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log

source "${VENV:-.venv}/bin/activate" # of the folder that sbatch was called in
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# starts Ray on all nodes, runs what follows -- on the head, and stops Ray
srun --cpus-per-task="$SLURM_CPUS_ON_NODE" --no-kill --kill-on-bad-exit=0 \
    ray symmetric-run --address "$head:6379" \
    --min-nodes "$SLURM_JOB_NUM_NODES" -- env RAY_ADDRESS=auto latent-augment "$@"
