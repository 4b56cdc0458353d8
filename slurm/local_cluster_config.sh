# How is the local cluster configured? Settings from the environment, and the files made from them (sourced by local_cluster.sh).
# shellcheck shell=bash
# What is not a setting has the value with which signals, requeues, preemption and accounting were seen to work.

number() { # number NAME DEFAULT LEAST MOST: the setting, checked
  local value=${!1:-$2}
  if ! [[ $value =~ ^[0-9]{1,7}$ ]] || ((10#$value < $3 || 10#$value > $4)); then
    quit 2 "$1=$value: give a whole number from $3 to $4"
  fi
  echo "$((10#$value))"
}

read_settings() {
  nodes=$(number CLUSTER_NODES 4 1 64)
  cpus=$(number CLUSTER_CPUS 4 1 256)
  memory=$(number CLUSTER_MEMORY 8000 100 9999999)
  gpus=$(number CLUSTER_GPUS 2 1 4)
  first_port=$(number CLUSTER_PORT 17000 1024 65000)
  cred_expire=$(number CLUSTER_CRED_EXPIRE 5 5 3600) # Slurm knows nothing below 5
  slurmd_timeout=$(number CLUSTER_SLURMD_TIMEOUT 5 1 3600)
  kill_wait=$(number CLUSTER_KILL_WAIT 2 1 3600)
  grace=$(number CLUSTER_GRACE 20 0 3600)
}

need_free_ports() {
  local port
  for port in 1 3 5 $(seq 11 $((10 + nodes))); do
    port=$((first_port + port))
    ! (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null ||
      quit 1 "port $port is in use: set CLUSTER_PORT to another number than $first_port"
  done
}

write_hosts() {
  { cat /etc/hosts && for ((i = 1; i <= nodes; i++)); do echo "127.0.0.1 n$i"; done; } >"$D/hosts"
  echo "$nodes" >"$D/nodes"
}

write_slurm_conf() {
  local node_ports="$((first_port + 11))-$((first_port + 10 + nodes))"
  cat >"$D/slurm.conf" <<CONF
ClusterName=ci
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
# cred_expire is also the delay before a requeued job starts again: 120 s by default
AuthInfo=socket=$D/munge.socket,cred_expire=$cred_expire
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort=$((first_port + 1))
SlurmctldPidFile=$D/slurmctld.pid
SlurmdPidFile=$D/slurmd.%n.pid
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool.%n
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
# without cgroups: memory is sampled every second, and what takes more than it asked for is killed
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=bf_interval=1,sched_min_interval=200000,batch_sched_delay=0
# nodes have the CPUs and memory named here, also where the machine has less
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=$slurmd_timeout
KillWait=$kill_wait
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((first_port + 3))
# without the socket here sacctmgr fails for ever
AccountingStoragePass=$D/munge.socket
AccountingStorageTRES=gres/gpu
GresTypes=gpu
NodeName=n[1-$nodes] NodeAddr=127.0.0.1 NodeHostname=localhost Port=[$node_ports] \\
  CPUs=$cpus RealMemory=$memory Gres=gpu:$gpus State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES PriorityTier=50 PreemptMode=OFF DefMemPerCPU=500
PartitionName=low Nodes=n1 PriorityTier=1 GraceTime=$grace PreemptMode=REQUEUE DefMemPerCPU=500
PartitionName=low0 Nodes=n1 PriorityTier=1 GraceTime=0 PreemptMode=REQUEUE DefMemPerCPU=500
PartitionName=high Nodes=n1 PriorityTier=100 PreemptMode=OFF DefMemPerCPU=500
${CLUSTER_EXTRA:-}
CONF
}

write_device_conf() { # character devices stand in for GPUs; with regular files jobs get an empty CUDA_VISIBLE_DEVICES
  local devices=/dev/null,/dev/zero,/dev/full,/dev/random
  printf 'AutoDetect=off\nNodeName=n[1-%s] Name=gpu File=%s\n' "$nodes" "$(cut -d, -f"1-$gpus" <<<"$devices")" >"$D/gres.conf"
}

write_cgroup_conf() { # slurmd 22.05 needs no cgroups and does not know this word; 24.11 needs them or this word
  if [[ $(slurmctld -V) =~ ([0-9]+)\. ]] && ((BASH_REMATCH[1] >= 23)); then echo CgroupPlugin=disabled >"$D/cgroup.conf"; fi
}

write_database_conf() {
  cat >"$D/slurmdbd.conf" <<CONF
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((first_port + 3))
SlurmUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$D/munge.socket
PidFile=$D/slurmdbd.pid
LogFile=$D/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((first_port + 5))
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
CommunicationParameters=NoInAddrAny
CONF
  chmod 600 "$D/slurmdbd.conf" # or slurmdbd refuses it
  # One statement a line: mariadbd runs this file each time it starts.
  cat >"$D/init.sql" <<SQL
CREATE DATABASE IF NOT EXISTS slurm_acct_db;
CREATE USER IF NOT EXISTS 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm';
GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1';
SQL
  # Fast rather than safe: nothing waits for the disk.
  cat >"$D/mariadb.conf" <<CONF
[mysqld]
datadir=$D/database
tmpdir=$D/database
socket=$D/mariadb.socket
pid-file=$D/mariadb.pid
log-error=$D/log/mariadbd.log
bind-address=127.0.0.1
port=$((first_port + 5))
skip-name-resolve
innodb-flush-log-at-trx-commit=0
innodb-flush-method=nosync
innodb-doublewrite=0
innodb-log-file-size=16M
innodb-lock-wait-timeout=900
[client-mariadb]
host=127.0.0.1
port=$((first_port + 5))
user=slurm
password=slurm
CONF
}
