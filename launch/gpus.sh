#!/usr/bin/env bash
# Trains on the GPUs of this machine: one process, in the foreground (docs/launch.md).
#
#   launch/gpus.sh [--dry_run] [--restart] [ARGUMENTS]
#
# ARGUMENTS are flags of dico_jax.main. With --restart the training is started again when it ends
# with exit status 143, which it has when it was sent SIGTERM and has saved. SIGTERM or Ctrl-C to
# this script is passed on as SIGTERM and ends both. --dry_run prints the command and runs nothing.
#
# Variables
#   CONFIG   config file
#   WORKDIR  folder of the run, or gs://BUCKET/PATH or s3://BUCKET/PATH
#   GPUS     numbers of the GPUs to use, such as 0,1,2,3 (all)
#   PYTHON   Python that has dico_jax (python)

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

ended_by_user=false
child=

pass_on() {
  ended_by_user=true
  if [[ -n $child ]]; then kill -TERM "$child" 2>/dev/null || true; fi
}

# Runs a command and passes its exit status on.
run_child() {
  local status=0
  "$@" &
  child=$!
  wait "$child" || status=$?
  if "$ended_by_user"; then
    # The signal ended the first wait; this one ends with the command.
    status=0
    wait "$child" || status=$?
  fi
  return "$status"
}

parse "$@"
restart=false
flags=()
for argument in "${arguments[@]}"; do
  if [[ $argument == --restart ]]; then restart=true; else flags+=("$argument"); fi
done
require_training "${flags[@]}"
command=("${PYTHON:-python}" -m dico_jax.main --config="$CONFIG" --workdir="$WORKDIR" "${flags[@]}")
if [[ -n ${GPUS:-} ]]; then command=(env CUDA_VISIBLE_DEVICES="$GPUS" "${command[@]}"); fi

if "$dry_run"; then
  show "${command[@]}"
  exit
fi
trap pass_on TERM INT
while true; do
  status=0
  run_child "${command[@]}" || status=$?
  if ((status != 143)) || ! "$restart" || "$ended_by_user"; then exit "$status"; fi
  echo "saved after SIGTERM; going on" >&2
done
