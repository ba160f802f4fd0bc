"""The command line: a YAML config in, one message out."""
