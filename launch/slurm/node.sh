#!/usr/bin/env bash
# One node's launcher; srun starts one on each (launch/slurm/step.sh). Ranks write to ROADWORK_LOGS/NODE/ as well.
set -euo pipefail
cd "$ROADWORK_ROOT"
logs=$ROADWORK_LOGS/node-$SLURM_NODEID-$SLURMD_NODENAME
mkdir -p "$logs"
exec "$PYTHON" -m accelerate.commands.accelerate_cli launch --config_file "$ROADWORK_ACCELERATE" \
  --num_machines "$SLURM_JOB_NUM_NODES" --num_processes "$ROADWORK_PROCESSES_ALL" --machine_rank "$SLURM_NODEID" \
  --main_process_ip "$ROADWORK_HEAD" --main_process_port "$ROADWORK_PORT" --log_dir "$logs" --tee 3 "$@"
