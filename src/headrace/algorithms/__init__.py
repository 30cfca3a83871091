"""Learning rules: a config, act and update; no process, clock or file."""
