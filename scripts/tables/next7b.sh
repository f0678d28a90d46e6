#!/usr/bin/env bash
# The official repository's table of LLaVA-NeXT-7B at an average of 640, 320 and 160 of 2,880 visual tokens: five methods.
# What is finished already is not repeated. It needs a checkpoint that sees images in crops:
#   MODEL=liuhaotian/llava-v1.6-vicuna-7b DATA=playground/data/eval bash scripts/tables/next7b.sh
# Every setting is an environment variable or the flag of the same name; docs/reproduction.md and docs/models.md describe it.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run.sh" llava_prune table next7b "$@"
