#!/bin/sh
# Expert tables split over memory groups of GPUs, all other parameters by FSDP2 over all GPUs:
#
#   configuration/launch/memory_group.sh examples/run_clm.py --config_name peer-toy --do_train --output_dir runs/clm
#
# The script is any that takes --ep_size. On several nodes run the same command on each of them, with the same NNODES
# and RDZV_ENDPOINT; under Slurm memory_group.sbatch does so.
#
#   GPUS_PER_NODE   processes on this node, 8 if not set
#   GROUP_SIZE      processes of a memory group, all of a node if not set, of several nodes if larger; divides the
#                   number of all processes, NNODES * GPUS_PER_NODE
#   NNODES          number of nodes, 1 if not set
#   RDZV_ENDPOINT   HOST:PORT of one of the nodes, the same on all
#   RDZV_ID         any name of the run, the same on all nodes, where several runs have one endpoint
set -eu
gpus=${GPUS_PER_NODE:-8}
group=${GROUP_SIZE:-$gpus}
nodes=${NNODES:-1}

if [ $((nodes * gpus % group)) -ne 0 ]; then
    echo "GROUP_SIZE=$group does not divide NNODES * GPUS_PER_NODE = $((nodes * gpus)), the number of processes." >&2
    exit 2
fi
if [ "$nodes" -gt 1 ] && [ -z "${RDZV_ENDPOINT:-}" ]; then
    echo "NNODES=$nodes needs RDZV_ENDPOINT=HOST:PORT, of one of the nodes." >&2
    exit 2
fi

exec torchrun --nnodes "$nodes" --nproc_per_node "$gpus" --rdzv_backend c10d \
    --rdzv_endpoint "${RDZV_ENDPOINT:-localhost:0}" --rdzv_id "${RDZV_ID:-memory_group}" "$@" --ep_size "$group"
