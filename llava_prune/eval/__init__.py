"""Benchmarks under LLaVA-1.5's protocol. A benchmark is `tasks/<name>.yaml` and a scorer module beside it."""
