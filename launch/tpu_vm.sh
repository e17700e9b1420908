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
#   restart create, setup and run, and all of it again after every preemption, until the training
#           is done; ARGUMENTS are flags of dico_jax.main. It goes on with a slice that is there and
#           a training that runs. Exit status 0: done; 2: the training was called wrongly; 143:
#           stopped by `stop`; else what failed three times in a row. The slice is left as it is.
#
# --dry_run prints the commands, one a line, and runs nothing; of `restart` those of one round.
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
#   CREATE_FLAGS      further flags of gcloud, such as --service-account=ACCOUNT, between spaces
# for setup, all optional
#   GIT_URL           repository to install from; unset, this checkout is copied
#   EXTRAS            extras of the package (tpu,gcs); tpu,gcs,hub for weights from hf:// addresses
#   SETUP_COMMAND     what every worker runs first, such as mounting a shared folder
# for run
#   CONFIG            config file, as seen from the checkout
#   WORKDIR           gs://BUCKET/PATH, or a folder that all workers see
# for restart also
#   POLL_SECONDS      between two looks (60)
#   MAX_RESTARTS      how often the training may be started again (100)

set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

# gcloud_tpu GROUP VERB ARGUMENTS...
gcloud_tpu() {
  run gcloud compute tpus "$1" "$2" "${@:3}" --project="$PROJECT" --zone="$ZONE"
}

# on WORKER COMMAND: a line of shell on that worker, or on "all" of them. The flag of ssh ends the
# call when the machine is gone.
on() {
  gcloud_tpu tpu-vm ssh "$TPU_NAME" --worker="$1" --command="$2" \
    --ssh-flag=-oServerAliveInterval=30
}

require_slice() {
  require ACCELERATOR_TYPE "kind and size of the slice, such as v5litepod-8"
  require RUNTIME_VERSION "image of the hosts, such as v2-alpha-tpuv5-lite"
  case ${CAPACITY:-on-demand} in
    on-demand | spot | reserved) ;;
    *) fail "CAPACITY=$CAPACITY: use on-demand, spot or reserved" ;;
  esac
}

create() {
  require_slice
  local flags
  read -ra flags <<<"${CREATE_FLAGS:-}"
  if [[ ${CAPACITY:-on-demand} != on-demand ]]; then flags+=("--$CAPACITY"); fi
  # A queued resource waits for capacity, where tpu-vm create would fail.
  gcloud_tpu queued-resources create "$TPU_NAME" --node-id="$TPU_NAME" \
    --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION" \
    "${flags[@]}" "$@"
}

describe() {
  gcloud_tpu queued-resources describe "$TPU_NAME" --format="value(state.state)"
}

status() {
  describe
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
  on all "cd ~/dico_jax && ~/.local/bin/uv pip install -c constraints.txt -e .\[${EXTRAS:-tpu,gcs}\]"
}

require_run() {
  require_training "$@"
  [[ $WORKDIR != s3://* ]] || fail "WORKDIR=$WORKDIR: on Cloud TPU use gs://BUCKET/PATH"
}

run_training() {
  require_run "$@"
  local flags
  flags=$(printf '%q ' --config="$CONFIG" --workdir="$WORKDIR" "$@")
  on all "cd ~/dico_jax && launch/worker.sh run ${flags% }"
}

say() {
  echo "$(date '+%F %T') $*"
}

# The state of the request in Google's words, NONE where there is no such request, and nothing where
# gcloud cannot tell.
request_state() {
  local said
  if said=$(describe 2>&1); then
    grep -xE '[A-Z_]+' <<<"$said" || true
  elif [[ $said == *NOT_FOUND* ]]; then
    echo NONE
  else
    echo "$said" >&2
  fi
}

look_at_training='cd dico_jax/launch 2>/dev/null && exec ./worker.sh state; echo training: none'

# What the trainings of all workers do, one state of worker.sh a line. Fails where a worker does not
# answer.
training_states() {
  local said
  if said=$(on all "$look_at_training" 2>&1); then
    sed -n 's/^training: //p' <<<"$said" | sort -u
  else
    echo "$said" >&2
    return 1
  fi
}

# failed WHAT [STATUS]: three of these in a row end it; a training that lasts or a preemption count
# as none.
failed() {
  say "$1"
  if ((++failures == 3)); then
    say "three failures in a row: not again"
    exit "${2:-1}"
  fi
}

give_back() {
  launch/tpu_vm.sh delete --quiet || say "could not be deleted yet"
}

# set_up_and_run FLAGS...: in processes of their own, where the first command that fails ends them.
set_up_and_run() {
  if ((starts++ > max_restarts)); then
    say "started again $max_restarts times (MAX_RESTARTS): not again"
    exit 1
  fi
  if launch/tpu_vm.sh setup && launch/tpu_vm.sh run "$@"; then
    watching=true
    started=$SECONDS
  else
    failed "the training could not be started"
  fi
}

# judge STATES: a training that this script has started or seen running, and that runs no more.
judge() {
  case $1 in
    "ended 0")
      say "done; to give the slice back: launch/tpu_vm.sh delete"
      exit 0
      ;;
    *stopped*)
      say "stopped by launch/tpu_vm.sh stop"
      exit 143
      ;;
  esac
  launch/tpu_vm.sh status || true
  if grep -qx "ended 2" <<<"$1"; then
    say "the training was called wrongly: see above"
    exit 2
  fi
  # 143 after a SIGTERM that is not ours comes before a preemption or maintenance.
  local status
  status=$(sed -n 's/^ended //p' <<<"$1" | grep -vxE '0|143' | head -n 1) || return 0
  failed "the training ended with exit status $status" "$status"
}

# look FLAGS...: one look at a slice that is there.
look() {
  local states
  if ! states=$(training_states); then
    if ((++silent % 10 == 0)); then
      failed "the workers have not answered ten times in a row"
      give_back
    fi
    return
  fi
  silent=0
  case $states in
    running)
      watching=true mixed=0
      if ((SECONDS - started > 1800)); then failures=0; fi
      return
      ;;
    *running*)
      # They end one after the other; one that waits for another, which is gone, may never.
      if ((++mixed < 6)); then return; fi
      launch/tpu_vm.sh stop || true
      ;;
  esac
  mixed=0
  if "$watching"; then
    watching=false
    judge "$states"
  fi
  set_up_and_run "$@"
}

# What a slice that was preempted costs in commands.
one_round() {
  describe
  gcloud_tpu queued-resources delete "$TPU_NAME" --force --quiet
  create
  setup
  run_training "$@"
  on all "$look_at_training"
}

# left STATUS: ended by a signal.
left() {
  echo
  say "$TPU_NAME and its training are left as they are: 'launch/tpu_vm.sh restart' goes on with" \
    "them, 'stop' ends the training and 'delete' gives the slice back"
  exit "$1"
}

restart() {
  local name
  max_restarts=${MAX_RESTARTS:-100} poll_seconds=${POLL_SECONDS:-60}
  for name in max_restarts poll_seconds; do
    [[ ${!name} =~ ^(0|[1-9][0-9]*)$ ]] || fail "${name^^}=${!name}: use a whole number"
  done
  require_slice
  require_run "$@"
  if "$dry_run"; then
    one_round "$@"
    return
  fi
  # Nobody is there to answer.
  export CLOUDSDK_CORE_DISABLE_PROMPTS=1
  trap 'left 130' INT
  trap 'left 143' TERM
  watching=false started=0 starts=0 failures=0 silent=0 mixed=0
  local state previous=
  while true; do
    state=$(request_state)
    [[ -n $state$previous ]] || exit 1  # wrong from the start
    if [[ $state != "$previous" ]]; then say "$TPU_NAME: ${state:-not known}"; fi
    case $state in
      ACTIVE) look "$@" ;;
      NONE) launch/tpu_vm.sh create || failed "the slice could not be requested" ;;
      SUSPENDED)
        failures=0
        give_back
        ;;
      FAILED)
        failed "the request failed"
        give_back
        ;;
    esac
    case $state in
      ACTIVE | "") ;;
      *) watching=false ;;
    esac
    previous=${state:-$previous}
    sleep "$poll_seconds"
  done
}

no_more() {
  (($# == 0)) ||
    fail "unexpected argument '$1': only create, run, restart and delete take further ones"
}

parse "$@"
action=${arguments[0]:-}
set -- "${arguments[@]:1}"
case $action in
  create | run | restart | delete) ;;
  setup | status | follow | stop) no_more "$@" ;;
  *)
    fail "action '$action' is unknown: use create, status, setup, run, restart, follow, stop or" \
      "delete"
    ;;
esac
require PROJECT "the Google Cloud project"
require ZONE "the zone of the slice, such as us-west4-a"
require TPU_NAME "the name of the slice"
case $action in
  create) create "$@" ;;
  status) status ;;
  setup) setup ;;
  run) run_training "$@" ;;
  restart) restart "$@" ;;
  follow) on 0 'tail -n 100 -F ~/dico_jax/train.log' ;;
  stop) on all 'cd ~/dico_jax && launch/worker.sh stop' ;;
  delete) gcloud_tpu queued-resources delete "$TPU_NAME" --force "$@" ;;
esac
