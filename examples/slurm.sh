#!/usr/bin/env bash
# One run on a SLURM cluster, continued through time limits, preemption and dead nodes until it has ended.
#
#   sbatch --nodes=1 --gpus-per-node=8 examples/slurm.sh --track gpt2-small --tricks record
#
# SLURM sends SIGUSR1 two minutes before the time limit; torchrun hands it to the ranks, which finish their step, save and
# leave: within 30 seconds, torchrun's patience. The job then puts itself back into the queue, and the same command goes on
# from the newest checkpoint. (Written from SLURM's manual; not tried on a cluster yet.)
#SBATCH --job-name=nanogpt-speedrun
#SBATCH --ntasks-per-node=1
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

nodes=${SLURM_JOB_NUM_NODES:-1}
gpus=${SLURM_GPUS_ON_NODE:-8}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
out=${OUT:-runs/slurm-${SLURM_JOB_ID}}

srun --kill-on-bad-exit=0 .venv/bin/torchrun \
  --nnodes="$nodes" --nproc_per_node="$gpus" --max-restarts=3 \
  --rdzv-backend=c10d --rdzv-endpoint="$first:29500" --rdzv-id="$SLURM_JOB_ID" \
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  train_gpt.py --out "$out" "$@"
code=$?

# result.json is written last: without it the run has not ended. A wrong command, which would only fail again, has left no
# checkpoints. The exit code says nothing: torchrun's is 1 whatever its ranks' was.
if [ ! -f "$out/result.json" ] && [ -d "$out/checkpoints" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
