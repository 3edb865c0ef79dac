#!/usr/bin/env bash
# Looks at every node of a SLURM job before it trains; a bad node is left out and the job goes on without it.
#
# In a batch script, before the srun of the job itself, in the folder or environment where lmp can be imported:
#
#   export LMP_RUN=RUN LMP_PYTHON=python
#   . slurm/preflight.sh && preflight
#
# It returns when every node is fit. Otherwise it ends the script: a bad node is added to the job's excluded nodes and
# the job goes back to the queue (it was requeued by then, the exit code means nothing), at most LMP_PREFLIGHT_ROUNDS
# times. Exit code 3: no more rounds, or too few nodes would be left. Exit code 2: every node fails in the same way,
# which is the job's setting, or a floor, and not the nodes. `bash slurm/preflight.sh` inside an allocation only reports.
#
# Settings, all from the environment:
#   LMP_RUN                     the run folder (required); reports go to LMP_RUN/logs, bad nodes to LMP_RUN/bad-nodes
#   LMP_PYTHON=python           the Python that will train
#   LMP_PREFLIGHT=1             0: none
#   LMP_PREFLIGHT_ROUNDS=5      how often one job may be sent back for bad nodes
#   LMP_PREFLIGHT_LIMIT=300     seconds after which a silent node is bad
#   LMP_PREFLIGHT_SRUN=         further arguments of srun, split at blanks, such as those of a container
#   LMP_PREFLIGHT_SHM_GIB ...   floors; `python -m lmp.scaling.preflight floors` lists them with their defaults
#
# shellcheck disable=SC2016 # the inner scripts are expanded on the nodes

preflight_say() { echo "$(date '+%Y-%m-%dT%H:%M:%S%z') preflight: $*"; }

# The id by which SLURM's commands mean this job alone: an array's own id would mean all its elements.
preflight_job() {
  if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"; else echo "$SLURM_JOB_ID"; fi
}

preflight_nodes() { scontrol show hostnames "$SLURM_JOB_NODELIST"; }

# Processes that the job has on each node; where they differ, on that with the fewest.
preflight_ranks() { tr ',' '\n' <<<"${SLURM_TASKS_PER_NODE:-1}" | sed 's/(.*//' | sort -n | head -n 1; }

# STAGE ARGUMENT...: one task on each node, with the processors of all that will run there; prints what they print.
preflight_stage() {
  local ranks
  ranks=$(preflight_ranks)
  # A task that cannot start Python still gives a verdict; a node that cannot start a task gives none. SIGUSR2 is
  # meant for the training: whoever sends it now (a preemption) goes on to end the job, and nothing is lost.
  # shellcheck disable=SC2086
  timeout --kill-after=10 "${LMP_PREFLIGHT_LIMIT:-300}" \
    env -u SLURM_CPUS_PER_TASK -u SRUN_CPUS_PER_TASK -u SLURM_TRES_PER_TASK \
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    --cpus-per-task=$((${SLURM_CPUS_PER_TASK:-1} * ranks)) --kill-on-bad-exit=0 --wait=0 --unbuffered ${LMP_PREFLIGHT_SRUN:-} \
    bash -c 'trap "" USR2; "$0" -m lmp.scaling.preflight "$@" || echo "PREFLIGHT bad $SLURMD_NODENAME python: exit code $?"' \
    "${LMP_PYTHON:-python}" "$@" --ranks "$ranks" </dev/null 2>&1
}

# FILE: prints "NODE REASON" for each bad node of a stage's output.
preflight_verdicts() {
  awk -v nodes="$(preflight_nodes | paste -sd ' ' -)" '
    $1 != "PREFLIGHT" { next }
    { answered[$3] = 1 }
    $2 == "bad" { node = $3; $1 = $2 = $3 = ""; sub(/^ +/, ""); bad[node] = $0 }
    END {
      for (n = split(nodes, name, " "); n > 0; n--) {
        if (name[n] in bad) print name[n], bad[name[n]]
        else if (!(name[n] in answered)) print name[n], "silent: no answer"
      }
    }' "$1"
}

# NODE...: whether as many nodes as the job needs are left when these are excluded too.
preflight_enough_left() {
  local left
  left=$(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format=%N | sort -u |
    grep -cvxFf <(printf '%s\n' "$@"))
  [ "$left" -ge "$SLURM_JOB_NUM_NODES" ]
}

# The value of KEY in the controller's record of this job, empty for "(null)".
preflight_job_field() {
  scontrol show job -o "$(preflight_job)" | tr ' ' '\n' | sed -n "s/^$1=//p" | grep -v '^(null)$'
}

# "NODE REASON" lines: send the job back without those nodes. Ends the script.
preflight_leave_out() {
  local node reason rounds bad=() excluded=() wanted restart=${SLURM_RESTART_COUNT:-0} try
  mapfile -t excluded < <(preflight_job_field ExcNodeList | xargs -r -n 1 scontrol show hostnames)
  wanted=$(preflight_job_field ReqNodeList | xargs -r -n 1 scontrol show hostnames)
  while read -r node reason; do
    preflight_say "$node is bad: $reason"
    printf '%s\t%s\t%s\t%s\t%s\n' "$SLURM_JOB_ID" "$restart" "$(date '+%Y-%m-%dT%H:%M:%S%z')" "$node" "$reason" \
      >>"$LMP_RUN/bad-nodes"
    bad+=("$node")
    if grep -qxF "$node" <<<"$wanted"; then
      preflight_say "stopped: the job asks for $node by name (--nodelist)"
      exit 3
    fi
  done <<<"$1"
  excluded+=("${bad[@]}")
  rounds=$(awk -F '\t' -v job="$SLURM_JOB_ID" '$1 == job { seen[$2] } END { print length(seen) }' "$LMP_RUN/bad-nodes")
  if [ "$rounds" -gt "${LMP_PREFLIGHT_ROUNDS:-5}" ]; then
    preflight_say "stopped: nodes were bad in $rounds starts of this job, LMP_PREFLIGHT_ROUNDS allows ${LMP_PREFLIGHT_ROUNDS:-5}"
    exit 3
  fi
  if ! preflight_enough_left "${excluded[@]}"; then
    preflight_say "stopped: without ${excluded[*]} partition $SLURM_JOB_PARTITION has fewer than $SLURM_JOB_NUM_NODES nodes"
    exit 3
  fi
  if [ "$(preflight_job_field JobState)" != RUNNING ]; then
    preflight_say "not requeued: the job is $(preflight_job_field JobState)"
    exit 0
  fi
  # A requeue sends SIGTERM to this script. The excluded nodes of a job can be changed only while it is pending, and
  # it cannot start again before this script has ended.
  trap '' TERM
  if ! scontrol requeue "$(preflight_job)"; then
    preflight_say "stopped: the job cannot be requeued"
    exit 3
  fi
  for try in 1 2 3 4 5 6 7 8 9 10; do
    if scontrol update JobId="$(preflight_job)" ExcNodeList="$(printf '%s\n' "${excluded[@]}" | sort -u | paste -sd, -)"; then
      preflight_say "requeued without ${bad[*]} (try $try)"
      printf '{"time": "%s", "event": "requeue", "host": "%s", "job": "%s", "restart": %s, "reason": "bad nodes: %s"}\n' \
        "$(date '+%Y-%m-%dT%H:%M:%S%z')" "$(hostname)" "$(preflight_job)" "$restart" "${bad[*]}" >>"$LMP_RUN/ledger.jsonl"
      exit 0
    fi
    sleep 0.5
  done 2>/dev/null
  preflight_say "requeued, but the excluded nodes could not be set: the next start looks again"
  exit 0
}

# Both stages. The reports of the nodes are kept; bad nodes are left in $preflight_bad, one "NODE REASON" a line.
preflight_report() {
  local report first address
  mkdir -p "$LMP_RUN/logs"
  report=$LMP_RUN/logs/preflight-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}.log
  preflight_stage node --run "$LMP_RUN" >"$report"
  preflight_bad=$(preflight_verdicts "$report")
  if [ -z "$preflight_bad" ] && [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    first=$(preflight_nodes | head -n 1)
    address=$first # or the node's address, where names do not resolve
    getent hosts "$first" >/dev/null || address=$(scontrol show node -o "$first" | tr ' ' '\n' | sed -n 's/^NodeAddr=//p')
    # 32000 and above: beyond the port of the run itself, below those that the kernel hands out.
    preflight_stage network --nodes "$(preflight_nodes | paste -sd, -)" \
      --address "$address" --port $((32000 + SLURM_JOB_ID % 700)) >"$report.network"
    preflight_bad=$(preflight_verdicts "$report.network")
    cat "$report.network" >>"$report"
    rm "$report.network"
  fi
  grep -v '^PREFLIGHT ' "$report"
}

preflight() {
  local nodes reasons
  [ "${LMP_PREFLIGHT:-1}" != 0 ] || return 0
  : "${LMP_RUN:?names the run folder}"
  preflight_report
  if [ -z "$preflight_bad" ]; then
    preflight_say "$SLURM_JOB_NUM_NODES nodes are fit"
    return 0
  fi
  nodes=$(wc -l <<<"$preflight_bad")
  # The network's verdict names the guilty; a node's own check that fails everywhere alike has another cause.
  reasons=$(awk '{ print $2 }' <<<"$preflight_bad" | sort -u)
  if [ "$nodes" -gt 1 ] && [ "$nodes" = "$SLURM_JOB_NUM_NODES" ] && [ "$(wc -l <<<"$reasons")" = 1 ] &&
    [ "$reasons" != "network:" ]; then
    preflight_say "stopped: all $nodes nodes fail alike: $(head -n 1 <<<"$preflight_bad")"
    exit 2
  fi
  preflight_leave_out "$preflight_bad"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  : "${LMP_RUN:?names the run folder}" "${SLURM_JOB_ID:?this runs inside an allocation}"
  preflight_report
  [ -z "$preflight_bad" ] || {
    preflight_say "bad: $preflight_bad"
    exit 1
  }
fi
