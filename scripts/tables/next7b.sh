#!/usr/bin/env bash
# The official table of LLaVA-NeXT-7B: five methods at an average of 640, 320 and 160 of 2,880 visual tokens.
# Finished runs are not repeated. The model must see images in crops:
#   MODEL=liuhaotian/llava-v1.6-vicuna-7b DATA=playground/data/eval bash scripts/tables/next7b.sh
# Settings are environment variables or flags of the same name; docs/reproduction.md and docs/models.md describe them.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run.sh" llava_prune table next7b "$@"
