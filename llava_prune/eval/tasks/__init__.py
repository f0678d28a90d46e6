"""One YAML file and one scorer module for each benchmark; `llava_prune.eval.task` lists the folder."""
