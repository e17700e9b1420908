#!/usr/bin/env bash
# Trains on Slurm: one process per GPU, which is how JAX finds its place there (docs/launch.md).
#
#   sbatch [OPTIONS OF sbatch] launch/slurm.sh [ARGUMENTS]      in the folder of the checkout
#   launch/slurm.sh --dry_run [ARGUMENTS]
#
# ARGUMENTS are flags of dico_jax.main. Options of sbatch override the ones below. Five minutes
# before the time limit every process is sent SIGTERM, saves and ends with exit status 143, and the
# job goes back into the queue. --dry_run prints the commands and runs nothing.
#
# Variables
#   CONFIG        config file
#   WORKDIR       folder of the run, which all nodes see, or gs://BUCKET/PATH or s3://BUCKET/PATH
#   PYTHON        Python that has dico_jax, on all nodes (python)
#   MAX_REQUEUES  how often the job may have gone back into the queue (100)

#SBATCH --job-name=dico_jax
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

set -euo pipefail
# Slurm runs a copy of this file, so the checkout is known by where sbatch was called.
if [[ -n ${SLURM_JOB_ID:-} ]]; then cd "$SLURM_SUBMIT_DIR"; fi
if [[ ! -f launch/common.sh ]]; then
  echo "error: no launch/common.sh in $PWD: call this script in the folder of the checkout" >&2
  exit 2
fi
# shellcheck source=launch/common.sh
source launch/common.sh

parse "$@"
require_training "${arguments[@]}"
if "$dry_run"; then SLURM_JOB_ID=JOB_ID; fi
require SLURM_JOB_ID "submit this script with sbatch"

# No trap for SIGTERM: --signal reaches the processes of srun only, while scancel reaches this
# script too and is to end it. A process that crashes takes the others along after --wait seconds;
# killing them at once (--kill-on-bad-exit) could cut a save short.
status=0
run srun --kill-on-bad-exit=0 --wait=300 --gpu-bind=none \
  --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" "${PYTHON:-python}" -m dico_jax.main \
  --config="$CONFIG" --workdir="$WORKDIR" "${arguments[@]}" || status=$?

if ((status == 143)) || "$dry_run"; then
  # With a limit, because srun also gives 143 when processes are killed before they can save.
  if ((${SLURM_RESTART_COUNT:-0} < ${MAX_REQUEUES:-100})); then
    run scontrol requeue Incomplete "$SLURM_JOB_ID"
  else
    echo "requeued $SLURM_RESTART_COUNT times already (MAX_REQUEUES): not again" >&2
  fi
fi
exit "$status"
