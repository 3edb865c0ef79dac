#!/usr/bin/env bash
# A real SLURM of several virtual nodes on one Linux machine, for tests and for trying things out.
#
#   cluster.sh install            the packages of Debian or Ubuntu (root); no system-wide daemon is started
#   cluster.sh start      DIR     starts what is not running; waits until every node is usable
#   cluster.sh env        DIR     prints what a client shell needs:  eval "$(cluster.sh env DIR)"
#   cluster.sh status     DIR     lists daemons and nodes; exit code 0 if all of them are usable
#   cluster.sh kill-node  DIR N   node N loses power: its slurmd and its tasks are gone at once
#   cluster.sh start-node DIR N   ... and comes back
#   cluster.sh stop       DIR     cancels the jobs and ends the daemons; the files stay
#
# There is no systemd, no cgroup and nothing outside DIR (but what `install` installs). A process is
# signalled only if its id is in DIR/run/*.pid and its environment bears the mark of DIR. As root each node
# is a slurmd in pid, uts and mount namespaces of its own: it has its own host name, and one kill ends
# all that runs on it. Partitions: batch (default), and low, which jobs of high preempt by requeueing.
#
# Settings, from the environment, kept in DIR/etc/settings at the first start:
#   LMP_SLURM_NODES=4          nodes, lmp-node1 to lmp-node4
#   LMP_SLURM_GPUS=8           GPUs that each node claims; they are links to /dev/null
#   LMP_SLURM_CPUS=32          CPUs that each node claims, whatever there is
#   LMP_SLURM_MEMORY=64000     MB that each node claims
#   LMP_SLURM_ACCOUNTING=1     1: MariaDB and slurmdbd, so that sacct answers; 0: none, a faster start
#   LMP_SLURM_PORT=26810       first of LMP_SLURM_NODES + 11 TCP ports in a row
#   LMP_SLURM_CONF=            a file of slurm.conf lines, each replacing the line of the same key
#   LMP_SLURM_ISOLATE=auto     1: namespaces (root); 0: plain slurmd, whose names may not resolve
# shellcheck disable=SC2153
set -euo pipefail
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"

usage() {
  sed -n '2,/^# shellcheck/{/^# shellcheck/d;/^#/s/^# \{0,1\}//p}' "$0"
  exit 2
}
say() { printf 'cluster: %s\n' "$*" >&2; }
die() {
  say "$*"
  exit 1
}

# ---------------------------------------------------------------- packages
install_packages() {
  local packages=(slurmctld slurmd slurm-client munge) made_policy=
  [ "${LMP_SLURM_ACCOUNTING:-1}" = 0 ] || packages+=(slurmdbd mariadb-server)
  command -v apt-get >/dev/null || die "only the packages of Debian and Ubuntu are known here"
  [ "$(id -u)" = 0 ] || die "installing needs root"
  # Exit code 101 of policy-rc.d keeps a package from starting its daemon.
  if [ ! -e /usr/sbin/policy-rc.d ]; then
    made_policy=1
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
    chmod 755 /usr/sbin/policy-rc.d
  fi
  trap '[ -z "'"$made_policy"'" ] || rm -f /usr/sbin/policy-rc.d' EXIT
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
  say "installed $(slurmctld -V)"
}

# ---------------------------------------------------------------- settings and files
load() { # DIR [create]
  [ "${2:-}" != create ] || mkdir -p "$1"
  DIR=$(cd "$1" 2>/dev/null && pwd -P) || die "there is no $1"
  case "$DIR" in *[[:space:]]*) die "no blanks in the path, please: $DIR" ;; esac
  [ ${#DIR} -le 85 ] || die "the path is too long for a unix socket in it: $DIR"
  RUN=$DIR/run ETC=$DIR/etc LOG=$DIR/log
  MARK="LMP_SLURM_CLUSTER=$DIR"
  if [ ! -e "$ETC/settings" ]; then
    [ "${2:-}" = create ] || die "no cluster in $DIR (run: $0 start $DIR)"
    create_settings
  fi
  # shellcheck disable=SC1091
  . "$ETC/settings" # NODES, GPUS, CPUS, MEMORY, ACCOUNTING, PORT, ISOLATE, PREFIX
  export SLURM_CONF=$ETC/slurm.conf
}

create_settings() {
  mkdir -p "$RUN" "$ETC" "$LOG" "$DIR/state" "$DIR/spool"
  chmod 755 "$DIR" "$RUN" "$ETC" "$LOG" # munged refuses a socket folder that others can write to
  local isolate=${LMP_SLURM_ISOLATE:-auto}
  if [ "$isolate" = auto ]; then
    isolate=0
    unshare --pid --uts --mount --fork --mount-proc true 2>/dev/null && isolate=1
  fi
  cat /dev/null ${LMP_SLURM_CONF:+"$LMP_SLURM_CONF"} >"$ETC/override.conf"
  cat >"$ETC/settings.tmp" <<END
NODES=${LMP_SLURM_NODES:-4}
GPUS=${LMP_SLURM_GPUS:-8}
CPUS=${LMP_SLURM_CPUS:-32}
MEMORY=${LMP_SLURM_MEMORY:-64000}
ACCOUNTING=${LMP_SLURM_ACCOUNTING:-1}
PORT=${LMP_SLURM_PORT:-26810}
ISOLATE=$isolate
PREFIX=lmp-node
END
  mv "$ETC/settings.tmp" "$ETC/settings"
}

slurm_at_least() { # MAJOR MINOR of the installed SLURM
  local v
  v=$(slurmctld -V | grep -oE '[0-9]+\.[0-9]+' | head -n 1)
  ((10#${v%.*} > $1 || (10#${v%.*} == $1 && 10#${v#*.} >= $2)))
}

node_host() { if [ "$ISOLATE" = 1 ]; then echo "$PREFIX$1"; else hostname -s; fi; }

slurm_conf() {
  local host user own_address i
  host=$(hostname -s) user=$(id -un)
  # Listen on loopback alone where the machine's own name is a loopback address.
  own_address=$(getent ahostsv4 "$host" | awk 'NR == 1 { print $1 }' || true)
  case "$ISOLATE$own_address" in 1127.*) ;; *) own_address= ;; esac
  # cred_expire: a requeued job waits that long and a second before it may start (SLURM's default is 120 s).
  # config_overrides: believe the CPUs, memory and GPUs given here. DefMemPerCPU: else a job without --mem takes
  # all memory of a node. FirstJobId: jobs derive ports from their ids, and there may be other clusters here.
  # linuxproc, task/none: no cgroups. KillWait, SlurmdTimeout: short, for tests.
  cat <<END
ClusterName=lmptest
SlurmctldHost=$host(${own_address:-127.0.0.1})
${own_address:+CommunicationParameters=NoCtldInAddrAny,NoInAddrAny}
SlurmctldPort=$PORT
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$RUN/munge.sock,cred_expire=5
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$RUN/slurmctld.own
SlurmdPidFile=$RUN/slurmd.%n.own
SlurmctldLogFile=$LOG/slurmctld.log
SlurmdLogFile=$LOG/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=0
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=$((MEMORY / CPUS / 2))
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
$(if slurm_at_least 23 2; then echo PreemptParameters=send_user_signal; else echo SlurmctldParameters=preempt_send_user_signal; fi)
JobRequeue=1
MaxArraySize=10001
FirstJobId=$((PORT % 10000))
MinJobAge=300
KillWait=5
CompleteWait=0
InactiveLimit=0
MessageTimeout=15
SlurmctldTimeout=30
SlurmdTimeout=10
ReturnToService=2
TreeWidth=65533
JobCompType=jobcomp/filetxt
JobCompLoc=$LOG/jobcomp.txt
END
  if [ "$ACCOUNTING" = 1 ]; then
    cat <<END
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((PORT + 1))
AccountingStoragePass=$RUN/munge.sock
AccountingStorageTRES=gres/gpu
AccountingStoreFlags=job_comment,job_script
END
  else
    echo "AccountingStorageType=accounting_storage/none"
  fi
  # One address for all nodes and a port for each: the parts of a step connect back to 127.0.0.1.
  for ((i = 1; i <= NODES; i++)); do
    echo "NodeName=$PREFIX$i NodeHostname=$(node_host "$i") NodeAddr=127.0.0.1 Port=$((PORT + 10 + i))" \
      "CPUs=$CPUS RealMemory=$MEMORY Gres=gpu:$GPUS State=UNKNOWN"
  done
  cat <<END
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 PriorityTier=10 PreemptMode=OFF State=UP
PartitionName=low Nodes=ALL MaxTime=INFINITE DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE GraceTime=20 State=UP
PartitionName=high Nodes=ALL MaxTime=INFINITE DefaultTime=10 PriorityTier=100 PreemptMode=OFF State=UP
END
}

write_files() {
  local i
  slurm_conf | grep -v '^$' |
    awk -F= 'FILENAME == ARGV[1] { if (NF > 1) { line[$1] = $0; order[++n] = $1 } next }
             { if ($1 in line) next; print }
             END { for (i = 1; i <= n; i++) print line[order[i]] }' "$ETC/override.conf" - >"$ETC/slurm.conf.tmp"
  mv "$ETC/slurm.conf.tmp" "$ETC/slurm.conf"
  # From 24.05 slurmd wants a cgroup tree, even if nothing uses it, unless it is told not to.
  if slurm_at_least 24 5; then echo "CgroupPlugin=disabled" >"$ETC/cgroup.conf"; fi
  # slurmd sets CUDA_VISIBLE_DEVICES only for a File that is a device, or a link to one.
  mkdir -p "$DIR/dev"
  for ((i = 0; i < GPUS; i++)); do ln -sfn /dev/null "$DIR/dev/gpu$i"; done
  if [ "$GPUS" -gt 0 ]; then
    echo "NodeName=${PREFIX}[1-$NODES] Name=gpu File=$DIR/dev/gpu[0-$((GPUS - 1))]"
  fi >"$ETC/gres.conf"
  {
    cat /etc/hosts
    for ((i = 1; i <= NODES; i++)); do echo "127.0.0.1 $PREFIX$i"; done
  } >"$ETC/hosts"
  [ "$ACCOUNTING" = 0 ] || (umask 077 && slurmdbd_conf >"$ETC/slurmdbd.conf")
  [ -e "$ETC/munge.key" ] || (umask 077 && head -c 128 /dev/urandom >"$ETC/munge.key")
}

slurmdbd_conf() {
  cat <<END
DbdHost=$(hostname -s)
DbdAddr=127.0.0.1
DbdPort=$((PORT + 1))
SlurmUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$RUN/munge.sock
PidFile=$RUN/slurmdbd.own
LogFile=$LOG/slurmdbd.log
DebugLevel=info
CommitDelay=1
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((PORT + 2))
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct
END
}

# ---------------------------------------------------------------- processes
pid_of() { # NAME -> its process id, if it lives and is ours
  local pid=
  [ ! -r "$RUN/$1.pid" ] || read -r pid <"$RUN/$1.pid"
  [ -n "$pid" ] && grep -qzxF "$MARK" "/proc/$pid/environ" 2>/dev/null || return 1
  echo "$pid"
}
gone() { ! pid_of "$1" >/dev/null; }

wait_for() { # SECONDS WHAT COMMAND...
  local end=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    if [ $SECONDS -ge $end ]; then
      say "waited too long for $what"
      return 1
    fi
    sleep 0.1
  done
}

spawn() { # NAME COMMAND...: a daemon that stays in the foreground, in a session of its own
  local name=$1
  shift
  env "$MARK" setsid "$@" </dev/null >>"$LOG/$name.out" 2>&1 &
  # setsid forks only where it leads a process group, which it does not in a script: $! is the daemon.
  echo $! >"$RUN/$name.pid"
  disown
}

end() { # NAME [SIGNAL]
  local pid
  if pid=$(pid_of "$1"); then
    kill "-${2:-TERM}" "$pid" 2>/dev/null || true
    if ! wait_for 10 "$1 to end" gone "$1"; then
      kill -KILL "$pid" 2>/dev/null || true
      wait_for 5 "$1 to die" gone "$1" || true
    fi
  fi
  rm -f "$RUN/$1.pid" "$RUN/$1.own" "$RUN/slurmd.$1.own"
}
end_node() { # N [SIGNAL]: the `unshare` of a node heeds only KILL, and its namespace dies with it
  end "$PREFIX$1" "$([ "$ISOLATE" = 1 ] && echo KILL || echo "${2:-TERM}")"
}

ports_free() {
  local port taken=
  for ((port = PORT; port <= PORT + 10 + NODES; port++)); do
    if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then taken="$taken $port"; fi
  done
  [ -z "$taken" ] || die "these ports are taken:$taken (set LMP_SLURM_PORT and use a new folder)"
}

start_munge() {
  ! pid_of munged >/dev/null || return 0
  rm -f "$RUN"/munge.sock*
  spawn munged munged --foreground --force --key-file="$ETC/munge.key" --socket="$RUN/munge.sock" --num-threads=4 \
    --pid-file="$RUN/munged.own" --log-file="$LOG/munged.log" --seed-file="$DIR/state/munge.seed"
  wait_for 10 munged munge -S "$RUN/munge.sock" -n || die "see $LOG/munged.out"
}

start_database() {
  local user socket=$RUN/mysql.sock
  user=$(id -un)
  if ! pid_of mariadbd >/dev/null; then
    if [ ! -d "$DIR/mysql/mysql" ]; then
      mariadb-install-db --no-defaults --datadir="$DIR/mysql" --user="$user" --skip-test-db \
        --auth-root-authentication-method=socket --auth-root-socket-user="$user" \
        >"$LOG/mariadb-install.log" 2>&1 || die "see $LOG/mariadb-install.log"
    fi
    spawn mariadbd mariadbd --no-defaults --user="$user" --datadir="$DIR/mysql" --socket="$socket" \
      --bind-address=127.0.0.1 --port=$((PORT + 2)) --pid-file="$RUN/mariadbd.own" --skip-log-bin \
      --innodb-buffer-pool-size=64M --innodb-log-file-size=32M --innodb-flush-log-at-trx-commit=0 \
      --innodb-lock-wait-timeout=900 --performance-schema=OFF
    wait_for 30 mariadbd mariadb --no-defaults --socket="$socket" --user="$user" -e 'select 1' ||
      die "see $LOG/mariadbd.out"
    mariadb --no-defaults --socket="$socket" --user="$user" -e \
      "create database if not exists slurm_acct;
       create user if not exists slurm@'127.0.0.1' identified by 'slurm';
       create user if not exists slurm@localhost identified by 'slurm';
       grant all on slurm_acct.* to slurm@'127.0.0.1'; grant all on slurm_acct.* to slurm@localhost;"
  fi
  if ! pid_of slurmdbd >/dev/null; then
    spawn slurmdbd slurmdbd -D
    wait_for 60 slurmdbd sacctmgr -n show cluster || die "see $LOG/slurmdbd.log"
  fi
}

start_node() { # N
  local name=$PREFIX$1
  case "$1" in '' | *[!0-9]*) die "$1 is not the number of a node" ;; esac
  if [ "$1" -lt 1 ] || [ "$1" -gt "$NODES" ]; then die "there are nodes 1 to $NODES"; fi
  ! pid_of "$name" >/dev/null || return 0
  mkdir -p "$DIR/spool/$name"
  if [ "$ISOLATE" = 1 ]; then
    # The inner shell is the init of the node's pid namespace: it reaps orphans, it dies with `unshare`,
    # and with it dies all that runs on the node.
    # shellcheck disable=SC2016
    spawn "$name" unshare --pid --uts --mount --fork --kill-child --mount-proc bash -c '
      hostname "$1"; mount --bind "$2" /etc/hosts; slurmd -D -N "$1" -f "$3" & wait $!
      ' slurmnode "$name" "$ETC/hosts" "$ETC/slurm.conf"
  else
    spawn "$name" slurmd -D -N "$name" -f "$ETC/slurm.conf"
  fi
}

nodes_up() {
  local unusable
  unusable=$(sinfo -h -N -p batch -o '%N %t' | grep -Evc ' (idle|mix|alloc|comp)$' || true)
  [ "$unusable" = 0 ] && [ "$(scontrol show node -o | grep -Ec 'SlurmdStartTime=[0-9]')" = "$NODES" ]
}
no_jobs() { [ -z "$(squeue -h)" ]; }

# ---------------------------------------------------------------- commands
start() { # DIR
  local program i needed=(munged slurmctld slurmd sbatch)
  load "$1" create
  [ "$ACCOUNTING" = 0 ] || needed+=(slurmdbd mariadbd mariadb-install-db)
  for program in "${needed[@]}"; do
    command -v "$program" >/dev/null || die "$program is missing (run: $0 install)"
  done
  pid_of slurmctld >/dev/null || write_files
  compgen -G "$RUN/*.pid" >/dev/null || ports_free
  start_munge
  [ "$ACCOUNTING" = 0 ] || start_database
  pid_of slurmctld >/dev/null || spawn slurmctld slurmctld -D -f "$ETC/slurm.conf"
  for ((i = 1; i <= NODES; i++)); do start_node "$i"; done
  wait_for 30 slurmctld scontrol ping || die "see $LOG/slurmctld.log"
  wait_for 30 "the nodes" nodes_up || die "see $LOG/slurmd.*.log and $LOG/$PREFIX*.out"
  say "$(sinfo -h -p batch -o '%D nodes %t %G'); now: eval \"\$($0 env $DIR)\""
}

stop() { # DIR
  local i
  load "$1"
  if pid_of slurmctld >/dev/null && scontrol ping >/dev/null 2>&1; then
    squeue -h -o %A | sort -u | xargs -r scancel 2>/dev/null || true
    wait_for 12 "the jobs to end" no_jobs || true
  fi
  for ((i = 1; i <= NODES; i++)); do end_node "$i"; done
  for i in slurmctld slurmdbd mariadbd munged; do end "$i"; done
  say "stopped; the files stay in $DIR"
}

status() { # DIR
  local name pid i names=(munged) all_up=1
  load "$1"
  [ "$ACCOUNTING" = 0 ] || names+=(mariadbd slurmdbd)
  names+=(slurmctld)
  for ((i = 1; i <= NODES; i++)); do names+=("$PREFIX$i"); done
  for name in "${names[@]}"; do
    if pid=$(pid_of "$name"); then
      printf '%-12s up   pid %s\n' "$name" "$pid"
    else
      printf '%-12s down\n' "$name"
      all_up=0
    fi
  done
  ! pid_of slurmctld >/dev/null || sinfo -N -p batch -o '%12N %10t %.5c %.8m %G'
  [ $all_up = 1 ] && nodes_up
}

kill_node() { # DIR N
  local pid
  load "$1"
  pid=$(pid_of "$PREFIX$2") || die "$PREFIX$2 is not running"
  end_node "$2" KILL
  say "$PREFIX$2 (process $pid) is dead"
}

case "${1:-}:$#" in
  install:1) install_packages ;;
  start:2 | stop:2 | status:2) "$1" "$2" ;;
  env:2)
    load "$2"
    echo "export SLURM_CONF='$SLURM_CONF'"
    ;;
  kill-node:3) kill_node "$2" "$3" ;;
  start-node:3)
    load "$2"
    start_node "$3"
    ;;
  *) usage ;;
esac
