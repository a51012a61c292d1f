#!/usr/bin/env bash
# One node's launcher; srun starts one on each (launch/slurm/step.sh). Ranks write to ROADWORK_LOGS/NODE/ as well.
set -euo pipefail
cd "$ROADWORK_ROOT"
logs=$ROADWORK_LOGS/node-$SLURM_NODEID-$SLURMD_NODENAME
mkdir -p "$logs"
# Slurm's signals reach the ranks themselves. A launcher would pass them on, but drops its ranks in the middle of their
# save when it gets a second one, as at a time limit: where the ranks save, it ignores them and waits.
case $1 in
  *pretrain.py)
    export PET_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT
    trap '' TERM USR2
    ;;
esac
exec "$PYTHON" -m accelerate.commands.launch --config_file "$ROADWORK_ACCELERATE" \
  --num_machines "$SLURM_JOB_NUM_NODES" --num_processes "$ROADWORK_PROCESSES_ALL" --machine_rank "$SLURM_NODEID" \
  --main_process_ip "$ROADWORK_HEAD" --main_process_port "$ROADWORK_PORT" --log_dir "$logs" --tee 3 "$@"
