"""Run the `llava-prune` command as `python -m llava_prune`."""

from .cli import main

raise SystemExit(main())
