"""`python -m llava_prune` is the `llava-prune` command."""

from .cli import main

raise SystemExit(main())
