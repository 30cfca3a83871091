"""The learner: batches, updates, checkpoints."""
