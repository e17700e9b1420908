#!/usr/bin/env bash
# Trains on a Cloud TPU slice of one or several hosts (docs/launch.md).
#
#   launch/tpu_vm.sh [--dry_run] ACTION [ARGUMENTS]
#
#   create  requests the slice; ARGUMENTS go to gcloud
#   status  says whether the slice is ready and what each worker does
#   setup   installs dico_jax on all workers; again after changes of the code
#   run     starts the training on all workers, detached; ARGUMENTS are flags of dico_jax.main
#   follow  shows the log of worker 0 as it grows
#   stop    SIGTERM to the training on all workers, which saves; returns when all have ended
#   delete  gives the slice back, local disks included; ARGUMENTS go to gcloud
#
# --dry_run prints the commands, one a line, and runs nothing.
#
# Variables, always
#   PROJECT           Google Cloud project
#   ZONE              zone of the slice, such as us-west4-a
#   TPU_NAME          name of the slice and of the request for it
# for create
#   ACCELERATOR_TYPE  kind and size, such as v5litepod-8 or v4-32
#   RUNTIME_VERSION   image of the hosts: v2-alpha-tpuv6e (v6e), v2-alpha-tpuv5 (v5p),
#                     v2-alpha-tpuv5-lite (v5e) or tpu-ubuntu2204-base (v4 and older)
#   CAPACITY          on-demand (as it is when unset), spot or reserved
# for setup, all optional
#   GIT_URL           repository to install from; unset, this checkout is copied
#   EXTRAS            extras of the package (tpu); tpu,hub for weights from hf:// addresses
#   SETUP_COMMAND     what every worker runs first, such as mounting a shared folder
# for run
#   CONFIG            config file, as seen from the checkout
#   WORKDIR           folder of the run, which all workers see

set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

# gcloud_tpu GROUP VERB ARGUMENTS...
gcloud_tpu() {
  run gcloud compute tpus "$1" "$2" "${@:3}" --project="$PROJECT" --zone="$ZONE"
}

# on WORKER COMMAND: a line of shell on that worker, or on "all" of them.
on() {
  gcloud_tpu tpu-vm ssh "$TPU_NAME" --worker="$1" --command="$2"
}

create() {
  require ACCELERATOR_TYPE "kind and size of the slice, such as v5litepod-8"
  require RUNTIME_VERSION "image of the hosts, such as v2-alpha-tpuv5-lite"
  local flags=()
  case ${CAPACITY:-on-demand} in
    on-demand) ;;
    spot | reserved) flags=("--$CAPACITY") ;;
    *) fail "CAPACITY=$CAPACITY: use on-demand, spot or reserved" ;;
  esac
  # A queued resource waits for capacity, where tpu-vm create would fail.
  gcloud_tpu queued-resources create "$TPU_NAME" --node-id="$TPU_NAME" \
    --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION" \
    "${flags[@]}" "$@"
}

status() {
  gcloud_tpu queued-resources describe "$TPU_NAME" --format="value(state.state)"
  on all 'cd ~/dico_jax && launch/worker.sh status'
}

copy_checkout() {
  local archive=build/dico_jax.tar.gz
  run mkdir -p build
  run tar --exclude=__pycache__ -czf "$archive" \
    setup.py pyproject.toml constraints.txt dico_jax configs launch
  gcloud_tpu tpu-vm scp "$archive" "$TPU_NAME:" --worker=all
  on all 'mkdir -p ~/dico_jax && tar -xzf ~/dico_jax.tar.gz -C ~/dico_jax'
}

clone() {
  on all "git -C ~/dico_jax pull --ff-only || git clone $(printf %q "$GIT_URL") ~/dico_jax"
}

setup() {
  if [[ -n ${SETUP_COMMAND:-} ]]; then on all "$SETUP_COMMAND"; fi
  if [[ -n ${GIT_URL:-} ]]; then clone; else copy_checkout; fi
  # uv brings a Python of its own: the one of the images is older than what dico_jax needs.
  on all 'curl -LsSf https://astral.sh/uv/install.sh | sh'
  on all 'cd ~/dico_jax && ~/.local/bin/uv venv --allow-existing --python=3.12'
  on all "cd ~/dico_jax && ~/.local/bin/uv pip install -c constraints.txt -e .\[${EXTRAS:-tpu}\]"
}

run_training() {
  require_training
  local flags
  flags=$(printf '%q ' --config="$CONFIG" --workdir="$WORKDIR" "$@")
  on all "cd ~/dico_jax && launch/worker.sh run ${flags% }"
}

no_more() {
  (($# == 0)) || fail "unexpected argument '$1': only create, run and delete take further ones"
}

parse "$@"
action=${arguments[0]:-}
set -- "${arguments[@]:1}"
case $action in
  create | run | delete) ;;
  setup | status | follow | stop) no_more "$@" ;;
  *) fail "action '$action' is unknown: use create, status, setup, run, follow, stop or delete" ;;
esac
require PROJECT "the Google Cloud project"
require ZONE "the zone of the slice, such as us-west4-a"
require TPU_NAME "the name of the slice"
case $action in
  create) create "$@" ;;
  status) status ;;
  setup) setup ;;
  run) run_training "$@" ;;
  follow) on 0 'tail -n 100 -F ~/dico_jax/train.log' ;;
  stop) on all 'cd ~/dico_jax && launch/worker.sh stop' ;;
  delete) gcloud_tpu queued-resources delete "$TPU_NAME" --force "$@" ;;
esac
