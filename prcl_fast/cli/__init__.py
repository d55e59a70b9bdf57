"""The `prcl` command."""
