#!/bin/bash
# The training job of a run. The scheduler starts it; by hand: bash jobs/training.sh RUN_DIR
# It sets traps and environment, then waits; the logic is in orchestrator/job.py.

# Before anything slow: a signal without a trap kills the shell and nobody would write down why.
pid= wanted=
trap 'wanted="$wanted warned"; [ -z "$pid" ] || kill -USR1 "$pid"' USR1 USR2
trap 'wanted="$wanted stop"; [ -z "$pid" ] || kill -TERM "$pid"' TERM INT

export ORCHESTRATE_RUN_DIR=${1:?"usage: bash training.sh RUN_DIR"}
cd "$ORCHESTRATE_RUN_DIR" || exit 66 # under Slurm a missing work directory silently becomes /tmp
unset SLURM_EXPORT_ENV                # it would strip the environment of later steps
[ ! -r ./env.sh ] || . ./env.sh

# One life of this job, one nonce. In an array the task's own id: the bare id means the whole array.
read -r ORCHESTRATE_NONCE </proc/sys/kernel/random/uuid
id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
ORCHESTRATE_JOB_ID=${ORCHESTRATE_JOB_ID:-${id:-$SLURM_JOB_ID}}
ORCHESTRATE_RESTARTS=${ORCHESTRATE_RESTARTS:-${SLURM_RESTART_COUNT:-0}}
export ORCHESTRATE_NONCE ORCHESTRATE_JOB_ID ORCHESTRATE_RESTARTS
job() { exec "${ORCHESTRATE_PYTHON:-python3}" -m orchestrator.job "$@"; }

# USR1 is ignored until Python has its handler. The child is in the background: bash runs a trap only
# between commands, and a child in the foreground would keep the warning until it is too late.
(
    trap '' USR1
    job training "$ORCHESTRATE_RUN_DIR"
) &
pid=$!
case $wanted in *stop*) kill -TERM "$pid" ;; esac
while wait "$pid"; kill -0 "$pid" 2>/dev/null; do :; done
wait "$pid"; rc=$? # a signal ends a wait with its own code; this one is the child's
[ "$rc" = 0 ] || [ "$rc" = 85 ] || # perhaps it could not write down its end: see to that
    (job settle training "$ORCHESTRATE_RUN_DIR" "$rc" "$wanted") ||
    (ORCHESTRATE_PYTHON=python3 && job settle training "$ORCHESTRATE_RUN_DIR" "$rc" "$wanted")
exit "$rc"
