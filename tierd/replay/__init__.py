"""Replaying a trace of requests through the daemon's own index, room and policies, to choose a policy for it."""
