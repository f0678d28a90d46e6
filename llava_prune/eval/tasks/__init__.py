"""One YAML file and one scorer module a benchmark; `llava_prune.eval.task` lists the folder."""
