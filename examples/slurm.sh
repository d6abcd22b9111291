#!/bin/bash
# Pretrain on two nodes with eight GPUs each; requeue and resume after preemption, the time limit or
# a node failure:
#
#     sbatch examples/slurm.sh base_throughput data.train=/data/shards
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

MAX_RESTARTS=100

# SIGUSR1 is sent 180 s before the time limit: processes save a checkpoint and exit with 138.
# Processes end by themselves when another fails. Slurm must not kill them: its 137 would hide the
# status 2 of an error that comes again after a restart.
# Some versions of srun give a process one core unless they are told.
srun --kill-on-bad-exit=0 --cpus-per-task="$SLURM_CPUS_PER_TASK" ssast pretrain "$@" --resume
status=$?

# 75: a process hung or was lost, storage failed, or the run before still lives. 137: SIGKILL.
# 138, 143: SIGUSR1 or SIGTERM, after saving.
case $status in
  75 | 137 | 138 | 143)
    if [ "${SLURM_RESTART_COUNT:-0}" -lt "$MAX_RESTARTS" ]; then
      scontrol requeue "$SLURM_JOB_ID"
    fi
    ;;
esac
exit $status
