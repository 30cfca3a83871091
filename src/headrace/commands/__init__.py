"""Commands of the command line that have settings of their own."""
