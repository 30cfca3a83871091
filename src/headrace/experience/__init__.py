"""Server to learner: unrolls, and how they wait."""
