"""What `make demo` runs: one prompt, five engine processes, one daemon that is killed and restarted between them.

`__main__` tells the story, `processes` starts and stops what it needs, `prepare` and `one_run` are the engines, and
`report` decides whether the promises held.
"""
