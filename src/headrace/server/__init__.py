"""The server: acts for every environment."""
