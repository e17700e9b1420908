#!/usr/bin/env bash
# A training on this machine that outlives the shell that starts it; tpu_vm.sh calls it on workers.
#
#   launch/worker.sh [--dry_run] ACTION [ARGUMENTS]
#
#   run     starts `python -m dico_jax.main ARGUMENTS`; its output is added to train.log;
#           a --config=FILE that is not there is refused
#   status  says whether it runs, and the end of the log
#   state   "training: " and running, stopped (by `stop`), ended STATUS, or none
#   stop    SIGTERM to it, which makes it save; returns when it has ended, killed after ten minutes
#
# STOP_SECONDS changes the ten minutes.
#
# --dry_run prints the commands, one a line, and runs nothing. train.log, train.pid, train.status
# and train.stopped are in the checkout. The last line of the log is the exit status: 0 done, 143
# saved after SIGTERM.

set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

# The process is checked by its name too: after a restart of the machine its number is another's.
running() {
  pid=$(cat train.pid 2>/dev/null) && grep -qa dico_jax.main "/proc/$pid/cmdline" 2>/dev/null
}

train() {
  local status=0
  "$@" &
  echo $! >train.pid
  wait $! || status=$?
  echo "$status" >train.status
  echo "$(date '+%F %T') dico_jax.main ended with exit status $status"
}

start() {
  local argument
  for argument in "$@"; do
    if [[ $argument == --config=* ]]; then require_config "${argument#*=}"; fi
  done
  local command=(.venv/bin/python -m dico_jax.main "$@")
  if "$dry_run"; then
    show "${command[@]}"
    return
  fi
  if running; then fail "$(hostname): a training runs already (process $pid)"; fi
  rm -f train.pid train.status train.stopped
  (trap '' HUP && train "${command[@]}") </dev/null >>train.log 2>&1 &
  until [[ -s train.pid ]]; do sleep 0.1; done
  echo "$(hostname): started (process $(cat train.pid)), log in $PWD/train.log"
}

status() {
  if running; then
    echo "$(hostname): runs (process $pid)"
  else
    echo "$(hostname): does not run"
  fi
  if [[ -f train.log ]]; then run tail -n 3 train.log; fi
}

state() {
  local state=none
  if running; then
    state=running
  elif [[ -f train.stopped ]]; then
    state=stopped
  elif [[ -f train.status ]]; then
    state="ended $(cat train.status)"
  fi
  echo "training: $state"
}

stop() {
  if ! running; then
    echo "$(hostname): does not run"
    return
  fi
  run kill -TERM "$pid"
  if "$dry_run"; then return; fi
  touch train.stopped
  echo "$(hostname): process $pid is saving"
  local since=$SECONDS
  while running; do
    # A process that waits for another host, which is gone, may never come to save.
    if ((SECONDS - since > ${STOP_SECONDS:-600})); then kill -KILL "$pid"; fi
    sleep 1
  done
  echo "$(hostname): ended"
}

parse "$@"
action=${arguments[0]:-}
set -- "${arguments[@]:1}"
case $action in
  run) start "$@" ;;
  status | state | stop) "$action" ;;
  *) fail "action '$action' is unknown: use run, status, state or stop" ;;
esac
