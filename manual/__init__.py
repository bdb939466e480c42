"""The manual of the commands, made from their own parsers: docs/cli.md and the man pages."""
