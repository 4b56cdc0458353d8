#!/usr/bin/env bash
# Where can a sweep be tried without a cluster? On this: a real Slurm of several nodes with pretended GPUs, on one machine.
#
# usage: slurm/local_cluster.sh install                 install the Debian/Ubuntu packages (no service starts)
#        slurm/local_cluster.sh up     [FOLDER]         start it, or what is missing of it; prints the line to export
#        slurm/local_cluster.sh status [FOLDER]         nodes, partitions, the line to export
#        slurm/local_cluster.sh stop   NAME [FOLDER]    end a daemon, or a node (n2) with all that runs on it; `up` brings it back
#        slurm/local_cluster.sh down   [FOLDER]         cancel the jobs, end everything, remove FOLDER
#
# FOLDER (default ${TMPDIR:-/tmp}/tsbench-cluster) holds everything: configuration, logs, sockets, database. All ports are on
# loopback. Only `install` needs root; a cluster started by another user runs that user's jobs only.
#
# Settings of a new cluster, from the environment (and their defaults):
#   CLUSTER_NODES (4)            how many nodes: n1, n2, ...
#   CLUSTER_CPUS (4), CLUSTER_MEMORY (8000 MB), CLUSTER_GPUS (2)   what each node says it has, be the machine larger or smaller
#   CLUSTER_PORT (17000)         the first of the hundred ports used; a second cluster needs another hundred
#   CLUSTER_CRED_EXPIRE (5 s)    also the delay before a requeued job starts again
#   CLUSTER_SLURMD_TIMEOUT (5 s) until a silent node is down (Slurm looks rarely: a lost node is noticed after half a minute)
#   CLUSTER_KILL_WAIT (2 s)      from TERM to KILL
#   CLUSTER_GRACE (20 s)         what the partition `low` gives preempted jobs
#   CLUSTER_EXTRA                further lines for slurm.conf, such as MaxArraySize=10
# Exit status: 0 done, 1 failed, 2 wrongly called, 3 this machine lacks something, 4 not running (`status`, `stop`).
set -euo pipefail
# shellcheck source=slurm/local_cluster_config.sh
source "$(dirname "${BASH_SOURCE[0]}")/local_cluster_config.sh"
PATH=$PATH:/usr/sbin:/sbin # the daemons' place, not on every user's PATH
unset "${!SLURM_@}" "${!SBATCH_@}" "${!SINFO_@}" "${!SQUEUE_@}" # another cluster's settings

PACKAGES="slurmctld slurmd slurm-client munge slurmdbd mariadb-server"
COMMANDS="munged mariadbd mariadb-install-db slurmdbd slurmctld slurmd sacctmgr sbatch scancel sinfo squeue unshare setsid flock"
MARK=.tsbench-local-cluster # only folders that hold this file are ever started in, or removed

say() { echo "local_cluster: $*" >&2; }
quit() { say "${*:2}"; exit "$1"; } # quit STATUS SENTENCE

# --- the machine ----------------------------------------------------------------------------------

need_commands() {
  local name missing=()
  for name in $COMMANDS; do command -v "$name" >/dev/null || missing+=("$name"); done
  [ ${#missing[@]} -eq 0 ] ||
    quit 3 "${missing[*]} not found: run \`$0 install\` or \`apt-get install --no-install-recommends $PACKAGES\`"
}

need_namespaces() {
  local reason
  reason=$( (inside true) 2>&1) ||
    quit 3 "a private mount namespace is not allowed to $(id -un) here ($reason): run \`$0 up\` as root"
}

install_packages() (
  local policy=/usr/sbin/policy-rc.d
  [ "$(id -u)" -eq 0 ] || quit 3 "installing packages needs root: run \`sudo $0 install\`"
  command -v apt-get >/dev/null || quit 3 "apt-get not found: this works on Debian and Ubuntu only"
  if [ ! -e "$policy" ]; then # Debian starts services as they are installed, unless this file forbids it
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy"
  fi
  apt-get update -qq
  # shellcheck disable=SC2086  # a list of packages
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $PACKAGES >&2
)

# --- the folder and its settings ------------------------------------------------------------------

set_folder() {
  D=$(realpath -m -- "${1:-${TMPDIR:-/tmp}/tsbench-cluster}")
  [[ $D =~ ^[A-Za-z0-9._/+-]+$ ]] || quit 2 "the folder $D has characters that slurm.conf cannot hold: use letters, digits, ._+-"
  # A step's socket, FOLDER/spool.n10/n10_12345.4294967291, has at most 107 characters.
  [ ${#D} -le 75 ] || quit 2 "the folder $D has ${#D} characters, and sockets in it allow 75: give a shorter one"
  export SLURM_CONF=$D/slurm.conf
}

exists() { [ -e "$D/$MARK" ]; }

need_cluster() { exists || quit 4 "no cluster in $D: start one with \`$0 up $D\`"; }

own_folder() {
  [ -O "$D" ] || quit 2 "the cluster in $D was started by $(stat -c %U "$D"): do this as that user, or give another folder"
}

refuse_other_files() {
  if exists || [ ! -e "$D" ] || { [ -d "$D" ] && [ -z "$(ls -A "$D")" ]; }; then return; fi
  quit 2 "$D holds something else than a local cluster: give a new or an empty folder"
}

new_folder() {
  mkdir -p "$D"/{state,log,pids}
  chmod 755 "$D" "$D"/{state,log,pids} # munged wants its socket's folder open to all, and closed to others' writing
  touch "$D/$MARK"
}

# --- processes ------------------------------------------------------------------------------------

# Every process of the cluster, and of its jobs, lives in a private mount namespace in which /etc/hosts is FOLDER/hosts. There the
# nodes' names resolve (submitit makes MASTER_ADDR of them); by that file `down` and `stop` know their own processes from others.

inside() { # inside COMMAND...: become it, in such a namespace, under the same process id
  local as_user=() hosts=$D/hosts
  [ "$(id -u)" -eq 0 ] || as_user=(--user --map-current-user --keep-caps)
  [ -e "$hosts" ] || hosts=/etc/hosts
  # shellcheck disable=SC2016  # expanded by the inner shell
  exec unshare "${as_user[@]}" --mount --propagation private sh -c 'mount --bind "$0" /etc/hosts && exec "$@"' "$hosts" "$@"
}

ours() { [ "/proc/$1/root/etc/hosts" -ef "$D/hosts" ]; } # does this process live in the cluster's namespaces?
pid_of() { cat "$D/pids/$1" 2>/dev/null || echo none; }
alive() { ours "$(pid_of "$1")"; }
all_daemons() { printf '%s\n' munged mariadbd slurmdbd slurmctld && seq -f 'n%.0f' "$(cat "$D/nodes")"; }

start() { # start NAME COMMAND...: in a session of its own, holding none of our files open
  (exec {lock}<&- && cd "$D" && inside setsid "${@:2}" </dev/null >>"$D/log/$1.out" 2>&1) &
  echo $! >"$D/pids/$1"
}

wait_for() { # wait_for NAME COMMAND...: until the daemon answers; a second or two, unless the machine is busy
  local deadline=$((SECONDS + 60)) answer
  until answer=$("${@:2}" 2>&1); do
    # Slurm says "fatal" of what no waiting heals, such as a key in slurm.conf that it does not know
    if [[ $answer == *fatal:* ]] || ! kill -0 "$(pid_of "$1")" 2>/dev/null || ((SECONDS > deadline)); then
      give_up "$1" "$answer"
    fi
    sleep 0.05
  done
}

give_up() { # give_up NAME [ANSWER]: shows the end of its log
  tail -n 5 "$D/log/$1.log" "$D/log/$1.out" "$D/log/slurmd.$1.log" >&2 2>/dev/null || true
  quit 1 "$1 did not start: above are the last lines of its log${2:+; asking it says: $2}"
}

start_munged() {
  [ -e "$D/munge.key" ] || (umask 277 && head -c 1024 /dev/urandom >"$D/munge.key")
  # --force: the folders above may be closed to others, as pytest's are
  start munged munged --foreground --force --key-file="$D/munge.key" --socket="$D/munge.socket" --pid-file="$D/munged.pid" \
    --log-file="$D/log/munged.log" --seed-file="$D/munge.seed"
  wait_for munged munge --no-input --socket="$D/munge.socket"
}

start_mariadbd() {
  local as_user=()
  [ "$(id -u)" -ne 0 ] || as_user=(--user=root)
  if [ ! -d "$D/database" ]; then
    (inside mariadb-install-db --defaults-file="$D/mariadb.conf" "${as_user[@]}" --skip-test-db) >"$D/log/mariadbd.out" 2>&1 ||
      give_up mariadbd
  fi
  start mariadbd mariadbd --defaults-file="$D/mariadb.conf" "${as_user[@]}" --init-file="$D/init.sql"
  wait_for mariadbd mariadb --defaults-file="$D/mariadb.conf" --execute "SELECT 1"
}

start_slurmdbd() {
  start slurmdbd slurmdbd -D
  wait_for slurmdbd sacctmgr --noheader list cluster
  [ -n "$(sacctmgr --noheader list cluster)" ] || sacctmgr --immediate --quiet add cluster ci >/dev/null
}

start_slurmctld() {
  start slurmctld slurmctld -D -f "$D/slurm.conf"
  wait_for slurmctld sinfo
}

start_node() { # start_node n1
  mkdir -p "$D/spool.$1"
  start "$1" slurmd -D -N "$1" -f "$D/slurm.conf"
}

node_serves() { # node_serves n1: its present slurmd runs (the controller may not have missed the last one), and is known
  [ "$(cat "$D/slurmd.$1.pid" 2>/dev/null)" = "$(pid_of "$1")" ] &&
    [[ $(sinfo --noheader --partition=main --nodes="$1" --format=%T) =~ ^(idle|allocated|mixed|completing|drained|draining)$ ]]
}

wait_for_nodes() {
  local name
  for name in $(all_daemons); do
    case $name in n[0-9]*) wait_for "$name" node_serves "$name" ;; esac
  done
}

end() { # end SIGNAL PID: and wait for it; KILL after 10 s
  local deadline=$((SECONDS + 10))
  kill "-$1" "$2" 2>/dev/null || return 0
  while ours "$2"; do
    ((SECONDS < deadline)) || kill -KILL "$2" 2>/dev/null || true
    sleep 0.02
  done
}

end_all_where() { # end_all_where TEST...: KILL every process of the cluster that passes, also those that start meanwhile
  local path pid found=(any)
  while [ ${#found[@]} -gt 0 ]; do
    found=()
    for path in /proc/[0-9]*; do
      pid=${path#/proc/}
      if ours "$pid" && "$@" "$pid"; then found+=("$pid"); fi
    done
    [ ${#found[@]} -eq 0 ] || kill -STOP "${found[@]}" 2>/dev/null || true # else a step's daemon tells how its task ended
    for pid in "${found[@]}"; do end KILL "$pid"; done
  done
}

on_node() { [ "$(readlink "/proc/$2/ns/mnt")" = "$1" ]; } # on_node NAMESPACE PID

cancel_jobs() {
  local deadline=$((SECONDS + 5)) jobs # what ignores it is ended with its node
  while ((SECONDS < deadline)); do
    mapfile -t jobs < <(timeout 5 squeue --noheader --format=%A | sort -u)
    [ ${#jobs[@]} -gt 0 ] || return 0
    timeout 5 scancel "${jobs[@]}" || true
    sleep 0.2
  done
}

# --- commands -------------------------------------------------------------------------------------

lock_folder() { exec {lock}<"$D" && flock "$lock"; } # one `up`, `stop` or `down` at a time

create() {
  need_namespaces
  read_settings
  need_free_ports
  new_folder
  lock_folder
  trap 'say "ending what was started"; end_cluster' EXIT # also after Ctrl-C; the exit status stays
  trap 'exit 130' INT TERM
  write_hosts
  write_slurm_conf
  write_device_conf
  write_cgroup_conf
  write_database_conf
}

up() {
  local name started=()
  refuse_other_files
  need_commands
  if exists; then own_folder && lock_folder; else create; fi
  for name in $(all_daemons); do
    ! alive "$name" || continue
    started+=("$name")
    case $name in n[0-9]*) start_node "$name" ;; *) "start_$name" ;; esac
  done
  [ ${#started[@]} -eq 0 ] || wait_for_nodes
  trap - EXIT INT TERM
  say "${#started[@]} daemons started in $D"
  echo "export SLURM_CONF=$SLURM_CONF"
}

status() {
  local name down=()
  need_cluster
  for name in $(all_daemons); do alive "$name" || down+=("$name"); done
  [ ${#down[@]} -eq 0 ] || quit 4 "${down[*]} not running in $D: bring back with \`$0 up $D\`"
  sinfo --Node --partition=main --format='%8N %10T %5c %8m %G'
  echo
  sinfo --format='%10P %5D %10T %10N %p' # PRIO_TIER: `high` preempts `low` and `low0`
  echo
  echo "export SLURM_CONF=$SLURM_CONF"
}

stop() { # stop NAME: a daemon by TERM; a node as if its power failed
  local namespace names
  need_cluster
  own_folder && lock_folder
  names=$(all_daemons | tr '\n' ' ')
  [[ " $names" == *" $1 "* ]] || quit 2 "$1 is no daemon of this cluster: give one of $names"
  alive "$1" || quit 4 "$1 is not running in $D"
  case $1 in
    n[0-9]*) namespace=$(readlink "/proc/$(pid_of "$1")/ns/mnt") && end_all_where on_node "$namespace" ;;
    *) end TERM "$(pid_of "$1")" ;;
  esac
}

end_cluster() {
  local name
  ! alive slurmctld || cancel_jobs
  for name in $(all_daemons | tac); do ! alive "$name" || end TERM "$(pid_of "$name")"; done
  end_all_where true # step daemons and what jobs left behind
  rm -rf "$D"
}

down() {
  exists || { say "no cluster in $D" && return; }
  own_folder && lock_folder
  end_cluster
  say "the cluster in $D is ended and its folder removed"
}

usage() { sed -n '/^# usage/,/^# Exit/s/^# \{0,1\}//p' "$0"; }

main() {
  case ${1:-} in
    install) install_packages ;;
    up | down | status) set_folder "${2:-}" && "$1" ;;
    stop)
      [ -n "${2:-}" ] || quit 2 "stop needs a name: give munged, mariadbd, slurmdbd, slurmctld, or a node such as n1"
      set_folder "${3:-}" && stop "$2"
      ;;
    help | -h | --help) usage ;;
    *) usage >&2 && exit 2 ;;
  esac
}

main "$@"
