# What the batch scripts share: runs a stage over the job's nodes, stops it in time and puts the job back into the queue.
# Sourced by launch/slurm/*.sbatch in the repository's root: `source launch/slurm/launch.sh; roadwork_job STAGE "$@"`.
#
# Environment:
#   PYTHON                  interpreter; else ROADWORK_VENV/bin/python, .venv/bin/python, python3
#   ROADWORK_VENV           virtual environment that every node sees
#   ROADWORK_ROOT           this repository, where it is not the folder that sbatch was called in
#   ROADWORK_PROCESSES      processes per node; else its GPUs, else --ntasks-per-node, else 1
#   ROADWORK_GRACE          seconds from the warning (--signal) to a forced requeue; must be below the warning's own (90)
#   ROADWORK_MAX_REQUEUES   a job that was requeued this often is not put back again (100)

roadwork_say() { echo "roadwork: job ${SLURM_JOB_ID} on $(date '+%F %T'): $*"; }

roadwork_python() {
  if [ -n "${PYTHON:-}" ]; then echo "$PYTHON"
  elif [ -n "${ROADWORK_VENV:-}" ]; then echo "$ROADWORK_VENV/bin/python"
  elif [ -x .venv/bin/python ]; then echo "$PWD/.venv/bin/python"
  else echo python3; fi
}

# The run folder and the folder of masks, a line each, from the stage's own reading of its options; an unknown option
# ends the job here, with its one line.
roadwork_folders() {
  local script=$1 options
  shift
  options=$("$PYTHON" "launch/$script.py" "$@" --print_config) || return
  "$PYTHON" -c 'import sys, yaml
tree = yaml.safe_load(sys.stdin)
run = tree["run"]["dir"]
print(run, tree["masks"]["out"] or f"{run}/masks", sep="\n")' <<<"$options"
}

# What the next launch would not do again, as one sum: checkpoints, folds and what they share, answers, masks.
roadwork_kept() {
  {
    find "$ROADWORK_RUN_DIR/checkpoints" "$ROADWORK_RUN_DIR/folds" -name COMPLETE -o -name 'chunk-*'
    find "$ROADWORK_RUN_DIR" -name '*-rank-*.jsonl' -printf '%p %s\n'
    find "$ROADWORK_MASKS" -name '*.png'
  } 2>/dev/null | sort | cksum
}

# This job's own name. A task of an array is named as such: one of them has the array's number for its own, and Slurm takes
# that number for all of them.
roadwork_own() {
  if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
  else echo "$SLURM_JOB_ID"; fi
}

# What Slurm says of this job: one line, or none where it does not answer.
roadwork_facts() { scontrol show job -o "$(roadwork_own)" | grep "^JobId=$SLURM_JOB_ID "; }

# Folder of the newest complete checkpoint; empty without one.
roadwork_newest() {
  local marker newest=""
  for marker in "$ROADWORK_RUN_DIR"/checkpoints/step-*/COMPLETE; do
    [ -f "$marker" ] && newest=${marker%/COMPLETE}
  done
  echo "$newest"
}

# Whether pre-training has reached its end.
roadwork_finished() {
  local newest
  newest=$(roadwork_newest)
  [ -n "$newest" ] && grep -Eq '"finished": *true' "$newest/counters.json"
}

# Slurm's warning reaches this shell alone. Every process of the job's steps gets it from here, on all nodes: the ranks
# save at a common step boundary, loader processes that fall are replaced. Work that outlasts the grace is left to the
# last checkpoint.
roadwork_warned() {
  [ -n "$roadwork_stop" ] && return
  roadwork_stop=warning
  roadwork_say "warned (SIGUSR2): the ranks save and stop, then the job is put back"
  scancel --signal=USR2 "$(roadwork_own)" || true
  (
    trap '' USR2
    sleep "${ROADWORK_GRACE:-90}" && scontrol requeue "$(roadwork_own)"
  ) &
  roadwork_guard=$!
}

# Slurm itself sends SIGTERM to every process of the job (requeue, preemption, scancel, time limit): only wait.
roadwork_terminated() {
  roadwork_stop=termination
  roadwork_say "terminated (SIGTERM): the ranks save and stop"
}

# Wait for a child although traps interrupt `wait`.
roadwork_wait() {
  local child=$1 status again
  wait "$child"
  status=$?
  while [ "$status" -gt 128 ] && kill -0 "$child" 2>/dev/null; do
    wait "$child"
    status=$?
  done
  if [ "$status" -gt 128 ]; then  # it may have been the trap's: ask once more for the child's own
    wait "$child"
    again=$?
    [ "$again" -ne 127 ] && status=$again
  fi
  return "$status"
}

roadwork_requeue() {
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "${ROADWORK_MAX_REQUEUES:-100}" ]; then
    roadwork_say "requeued ${SLURM_RESTART_COUNT} times already (ROADWORK_MAX_REQUEUES): submit it again to go on"
    return 1
  fi
  roadwork_say "not finished: back into the queue"
  scontrol requeue "$(roadwork_own)" && return 0
  roadwork_say "Slurm did not take the job back (JobRequeue, --requeue?): submit it again to go on"
  return 1
}

# roadwork_job STAGE [OPTIONS]: the whole job. Status 0 when the stage is done or the job was put back.
roadwork_job() {
  local stage=$1 folders before status
  shift
  export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
  PYTHON=$(roadwork_python)
  folders=$(roadwork_folders "$stage" "$@") || exit
  ROADWORK_RUN_DIR=${folders%%$'\n'*} ROADWORK_MASKS=${folders#*$'\n'}
  export PYTHON ROADWORK_RUN_DIR ROADWORK_MASKS ROADWORK_ROOT=$PWD
  roadwork_stop="" roadwork_guard=""
  trap roadwork_warned USR2
  trap roadwork_terminated TERM
  before=$(roadwork_kept)
  roadwork_say "$stage on ${SLURM_JOB_NODELIST}, launch $((${SLURM_RESTART_COUNT:-0} + 1)), run folder $ROADWORK_RUN_DIR"
  if [ "$stage" = pipeline ]; then
    set -- env ROADWORK_LAUNCHER="bash launch/slurm/step.sh" "$PYTHON" launch/pipeline.py "$@"
  else
    set -- bash launch/slurm/step.sh "launch/$stage.py" "$@"
  fi
  # What runs in this shell's own step outlives the signals that the ranks answer to; srun would end the job at once.
  (trap '' USR2 TERM; exec "$@") &
  roadwork_wait $!
  status=$?
  [ -n "$roadwork_guard" ] && kill "$roadwork_guard" 2>/dev/null
  if [ "$status" = 0 ]; then
    roadwork_say "$stage is done"
  elif [ "$roadwork_stop" = termination ]; then
    # After `scontrol requeue` and preemption Slurm brings the job back; a requeue after scancel would undo it.
    if roadwork_facts | grep -q ' Reason=TimeLimit '; then roadwork_requeue && status=0
    else roadwork_say "$stage stopped; Slurm decides whether it comes back"; fi
  elif [ "$roadwork_stop" = warning ] || [ "$status" = 75 ]; then
    roadwork_requeue && status=0
  elif [ "$(roadwork_kept)" != "$before" ]; then
    # A rank or a node was lost. Where nothing was added to what is kept, the next launch would end in the same way.
    roadwork_say "$stage failed with status $status after it had come further: ${ROADWORK_RUN_DIR}/logs says why"
    roadwork_requeue && status=0
  else
    roadwork_say "$stage failed with status $status: ${ROADWORK_RUN_DIR}/logs says why"
  fi
  exit "$status"
}
