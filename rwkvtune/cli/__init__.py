"""The command line: flags in, one call out."""
