#!/usr/bin/env bash
# What every batch script of lmp does around its srun: how the job stops, and when it goes back to the queue.
#
#   . slurm/step.sh FOLDER MAX_RESTARTS     # FOLDER: where the processes leave word, on a file system all nodes share
#   srun ARGUMENT...                        # a function: srun in the background, so that signals are handled at once
#   after_step $?                           # ends the script
#
# The processes leave word in $LMP_HANDOVER (launch/handover.py): "run PATH", "requeue REASON", "exit CODE WHY". With 0 and
# no wish to be requeued, 2 (the user's mistake) and 3 (too many restarts) the job is over; after any other exit code,
# and at the time limit, it goes back to the queue, at most MAX_RESTARTS times. A cancelled job stays cancelled.

LMP_MAX_RESTARTS=${2:?}
# An array's element is named by the array: its plain number may stand for the whole array.
lmp_job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
lmp_job=${lmp_job:-$SLURM_JOB_ID}
lmp_restart=${SLURM_RESTART_COUNT:-0}
export LMP_HANDOVER=${1:?}/handover-$lmp_job
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it from sbatch
rm -f "$LMP_HANDOVER"

lmp_say() { echo "$(date '+%Y-%m-%dT%H:%M:%S%z') job $lmp_job, restart $lmp_restart: $*"; }

# EVENT REASON: a line in the run's ledger, where there is a run.
lmp_note() {
  local run
  run=$(sed -n 's/^run //p' "$LMP_HANDOVER" 2>/dev/null | tail -n 1)
  [ -n "$run" ] || return 0
  printf '{"time": "%s", "event": "%s", "host": "%s", "job": "%s", "restart": %s, "reason": "%s"}\n' \
    "$(date '+%Y-%m-%dT%H:%M:%S%z')" "$1" "$(hostname)" "$lmp_job" "$lmp_restart" "${2//[\"\\]/\'}" >>"$run/ledger.jsonl"
}

# REASON: puts the job back in the queue, which ends this script, or returns 3 where it was restarted too often.
lmp_requeue() {
  local state try
  for try in 1 2 3 4 5; do
    state=$(scontrol show job -o "$lmp_job" | sed -n 's/.* JobState=\([A-Z_]*\) Reason=\([^ ]*\) .*/\1 \2/p')
    [ -z "$state" ] || break
    sleep "$try" # a busy controller
  done
  case $state in
    RUNNING* | 'COMPLETING TimeLimit' | TIMEOUT*) ;;
    *)
      lmp_say "not requeued here, its state is $state: cancelled, or SLURM does it"
      return 0
      ;;
  esac
  if [ "$lmp_restart" -ge "$LMP_MAX_RESTARTS" ]; then
    lmp_say "not requeued after $lmp_restart restarts (cluster.max_restarts): $1"
    lmp_note refused "restarted $lmp_restart times, cluster.max_restarts allows no more: $1"
    return 3
  fi
  lmp_say "requeue: $1"
  lmp_note requeue "$1"
  trap '' TERM # which the requeue sends
  for try in 1 2 3 4 5; do
    scontrol requeue "$lmp_job" && sleep 300
    sleep "$try"
  done
  lmp_say "scontrol requeue failed"
  return 75
}

# SIGTERM: cancelled, requeued by someone else, or the time limit. At the limit SLURM would leave it at that.
lmp_on_term() {
  if scontrol show job -o "$lmp_job" | grep -q ' JobState=[A-Z_]* Reason=TimeLimit '; then
    lmp_requeue "the time limit came before the processes had stopped"
  fi
}

srun() {
  local step code
  trap lmp_on_term TERM
  trap : USR2 # meant for the processes, which get it too
  command srun "$@" &
  step=$!
  # A trap interrupts `wait`.
  while :; do
    wait "$step"
    code=$?
    kill -0 "$step" 2>/dev/null || break
  done
  wait "$step" 2>/dev/null
  code=$?
  return "$code"
}

after_step() {
  local code=$1 told reason
  told=$(sed -n 's/^exit //p' "$LMP_HANDOVER" 2>/dev/null | head -n 1)
  reason=$(sed -n 's/^requeue //p' "$LMP_HANDOVER" 2>/dev/null | head -n 1)
  # A process that ends with 2 or 3 is soon followed by others that srun has killed.
  [ -z "$told" ] || code=${told%% *}
  lmp_say "the step ended with $code"
  # A function that raised an exception (not lmp's training) has left its result: another try would end the same.
  if [ "$code" = 1 ] && compgen -G "${LMP_HANDOVER%/*}/${lmp_job}_*_result.pkl" >/dev/null; then exit 1; fi
  case $code in
    0) if [ -n "$reason" ]; then lmp_requeue "$reason"; code=$?; fi ;;
    2) lmp_note refused "${told:+${told#* }}" ;;
    3) ;; # rank 0 has noted why
    *) lmp_requeue "the processes ended with $code" || code=$? ;;
  esac
  exit "$code"
}
