# Shared by the scripts beside it, which source it; bash 4.4 or newer.
# shellcheck shell=bash

dry_run=false
arguments=()

# fail MESSAGE: one line on stderr and exit status 2, as the commands of dico_jax do it.
fail() {
  echo "error: $*" >&2
  exit 2
}

# Prints the comment at the top of the script.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

# parse ARGUMENTS...: takes out --help and --dry_run, which count wherever they stand, so that no
# place of --dry_run makes a real run; the others become `arguments`.
parse() {
  local argument
  for argument in "$@"; do
    case $argument in
      --help) usage && exit ;;
      --dry_run) dry_run=true ;;
      *) arguments+=("$argument") ;;
    esac
  done
}

# require NAME MEANING: the variable must be set.
require() {
  [[ -n ${!1:-} ]] || fail "$1 is not set: $2"
}

# The variables that every training needs.
require_training() {
  require CONFIG "the config file, such as configs/xl256.py"
  require WORKDIR "the folder of the run, which all its machines see"
  [[ $WORKDIR != gs://* ]] ||
    fail "WORKDIR=$WORKDIR: buckets are not supported yet; use a folder that all machines see"
}

# run COMMAND...: runs it, or prints it as a line that can be pasted into a shell.
run() {
  if "$dry_run"; then
    show "$@"
  else
    "$@"
  fi
}

# Words that a shell would read differently are printed in quotes.
show() {
  local word line=()
  for word in "$@"; do
    if [[ $(printf %q "$word") == "$word" ]]; then
      line+=("$word")
    else
      line+=("${word@Q}")
    fi
  done
  echo "${line[*]}"
}
