"""Finds the fastest settings for a machine by short measured trials: `headrace tune ENV`."""
