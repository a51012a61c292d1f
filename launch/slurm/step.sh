#!/usr/bin/env bash
# One job step over all nodes of the job: `bash launch/slurm/step.sh SCRIPT.py [OPTIONS]`, one `accelerate launch` per node.
# Exits 75 where the stage was stopped before its end and all said 0: ranks and launchers that save on a signal do.
# After `--dry_run`, which leaves nothing, the launchers' own status counts.
set -uo pipefail
cd "$ROADWORK_ROOT"
source launch/slurm/launch.sh

nodes=$SLURM_JOB_NUM_NODES
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# The address by which Slurm itself reaches the node: its name, unless the site says otherwise.
address=$(scontrol show node -o "$head" | grep -o ' NodeAddr=[^ ]*' | cut -d= -f2)
gpus=${SLURM_GPUS_ON_NODE:-0}
per_node=${ROADWORK_PROCESSES:-$((gpus > 0 ? gpus : ${SLURM_NTASKS_PER_NODE:-1}))}
if [ "${SLURM_CPUS_ON_NODE:-$per_node}" -lt "$per_node" ]; then
  roadwork_say "$SLURM_CPUS_ON_NODE CPUs on a node for $per_node processes and their loaders: slow; give sbatch --exclusive or --cpus-per-gpu"
fi
export ROADWORK_HEAD=${address:-$head}
# Jobs that share a node get different ports, below the kernel's own range (32768 and up). This shell runs on the head
# node, so it can pass over a port that another program listens on.
ROADWORK_PORT=$("$PYTHON" - $((20000 + SLURM_JOB_ID % 12000)) <<'END'
import socket, sys
for port in range(int(sys.argv[1]), int(sys.argv[1]) + 100):
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
        print(port)
        break
    except OSError:
        continue
END
)
export ROADWORK_PORT
export ROADWORK_PROCESSES_ALL=$((nodes * per_node))
export ROADWORK_ACCELERATE=accelerate_configs/multinode$([ "$gpus" -gt 0 ] || echo _cpu).yaml
export ROADWORK_LOGS=$ROADWORK_RUN_DIR/logs/slurm-$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
# Stages that do not save on a signal end at once; the launcher's own default for SIGUSR2 would leave orphans.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2 PET_SHUTDOWN_TIMEOUT=${ROADWORK_GRACE:-90}
# One launcher per node has all of the node that the job has, whatever was asked for per task.
unset SLURM_NTASKS_PER_NODE SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK SLURM_CPUS_PER_TASK

# Rank 0 may still write its checkpoint when the others have left: a node's end must not kill the rest at once. Nodes that
# label masks have no last word in common: one may work on for hours.
case $1 in
  *pretrain.py) patience=900 ;;
  *) patience=0 ;;  # without limit
esac
srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 --wait="$patience" --label \
  bash launch/slurm/node.sh "$@"
status=$?
if [ "$status" = 0 ]; then
  # While Slurm ends a job, a srun that is cut off may say 0 for tasks that did not: only a job that still runs is done.
  case " $* " in
    *" --dry_run "*) ;;
    " launch/pretrain.py "*) roadwork_finished ;;
    *) ! roadwork_facts | grep -qv ' JobState=RUNNING ' ;;
  esac || status=75
fi
exit "$status"
