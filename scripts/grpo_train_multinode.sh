#!/usr/bin/env bash
# The example over several hosts: a hostfile, or the nodes of the Slurm allocation this runs in.
#
#   scripts/grpo_train_multinode.sh --hostfile hosts --output /shared/runs/multi [vdr train flags]
#   salloc --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 scripts/grpo_train_multinode.sh --output /shared/runs/multi
#
# Hostfile: one line per host, `name slots=GPUS`; this machine must reach every host over ssh without a password.
set -euo pipefail

vdr="$(dirname "$0")/../.venv/bin/vdr"
[[ -x "$vdr" ]] || vdr=vdr

over_hostfile=false
for word in "$@"; do
  [[ "$word" == --hostfile* ]] && over_hostfile=true
done

if $over_hostfile; then
  exec "$vdr" train --mode end_of_sequence --ds-config zero3 "$@"
elif [[ -n "${SLURM_JOB_ID:-}" ]]; then
  # srun takes the cores of a task from sbatch only where this says so (Slurm 22.05 and later).
  [[ -z "${SLURM_CPUS_PER_TASK:-}" ]] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
  exec srun --kill-on-bad-exit=1 --ntasks-per-node=1 \
    "$vdr" train --mode end_of_sequence --ds-config zero3 --num-processes "${SLURM_GPUS_ON_NODE:-1}" "$@"
fi
echo "grpo_train_multinode: give --hostfile FILE, or run it inside a Slurm allocation" >&2
exit 2
