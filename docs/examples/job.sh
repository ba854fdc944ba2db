#!/bin/sh
#SBATCH --job-name=container
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --time=00:30:00
# Runs a program in a container on every task: sbatch job.sh [IMAGE [COMMAND...]]
set -eu

image=${1:-docker://docker.io/library/debian:12}
[ $# -eq 0 ] || shift
# shellcheck disable=SC2016 # each task expands it
[ $# -gt 0 ] || set -- sh -c 'echo "task $SLURM_PROCID on $SLURMD_NODENAME: $(head -n 1 /etc/os-release)"'

# First one task of each node, so that the pull shows in a step of its own and has all of the node's cores.
# Left out, the job is the same: the first task of a node pulls, and the others wait for it.
srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" \
	shifterwrap pull "$image"

# From here on nothing is pulled. --pull never makes sure of it.
srun wrapped-run --pull never "$image" "$@"
