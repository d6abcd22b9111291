#!/bin/bash
# Pretrains on two nodes of eight GPUs, and goes on by itself after preemption, the time limit or
# the loss of a node:
#
#     sbatch examples/slurm.sh base_patch data.train=/data/shards train.batch_size=1536
#
#SBATCH --job-name=ssast
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=ssast-%j.log

MOST_RESTARTS=100

# USR1 reaches the processes of srun 180 s before the time is up: they save and end with 138.
# --kill-on-bad-exit ends the rest of a run that has lost a process.
srun --kill-on-bad-exit=1 ssast pretrain "$@" --resume
status=$?

# 75: hung or lost a process. 137: killed. 138, 143: stopped by USR1 or TERM, after saving.
case $status in
  75 | 137 | 138 | 143)
    if [ "${SLURM_RESTART_COUNT:-0}" -lt "$MOST_RESTARTS" ]; then
      scontrol requeue "$SLURM_JOB_ID"
    fi
    ;;
esac
exit $status
