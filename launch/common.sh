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

# require_training FLAGS...: what every training needs. An address without a bucket is refused: most
# likely a variable in it is not set.
require_training() {
  require CONFIG "the config file, such as configs/xl256.py"
  require WORKDIR "the folder of the run, in a bucket or where all its machines see it"
  require_config "$CONFIG"
  local word
  for word in "WORKDIR=$WORKDIR" "$@"; do
    [[ ! $word =~ =(gs|s3)://(/|$) ]] || fail "$word names no bucket: use ${BASH_REMATCH[1]}://BUCKET/PATH"
  done
}

# require_config CONFIG: a file, or a name in configs/ of this checkout, as dico_jax.main takes them.
require_config() {
  [[ -f $1 || -f $(dirname "${BASH_SOURCE[0]}")/../configs/$1.py ]] ||
    fail "CONFIG=$1: there is no such file in $PWD"
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
