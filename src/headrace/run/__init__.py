"""Roles and topologies: who runs where."""
