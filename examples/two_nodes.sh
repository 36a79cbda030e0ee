#!/usr/bin/env bash
# One evaluation on two machines. Start it on both with the same arguments, those of `tokenprune eval`; what is asked for
# is printed and written on the first:
#
#   NODE=0 HEAD=first.example PER_NODE=4 bash two_nodes.sh --model deit_small_patch16_224 --data imagenet/val \
#       --method tome --flops 0.6 --device cuda --output table.json
#   NODE=1 ...
#
# Both need the model and the data under the same names, and the same releases.
set -euo pipefail
: "${NODE:?0 on the first machine, 1 on the second}" "${HEAD:?the name or address of the first machine}"

exec torchrun --nnodes 2 --node-rank "$NODE" --nproc-per-node "${PER_NODE:-1}" \
    --master-addr "$HEAD" --master-port "${PORT:-29500}" -m tokenprune.cli eval "$@"
