"""Benchmarks under LLaVA-1.5's protocol. A benchmark consists of `tasks/<name>.yaml` and the scorer module it names."""
