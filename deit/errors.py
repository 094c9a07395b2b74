"""What a user can put right, printed as one line with exit 1, and what the exit codes of a process mean."""

# docs/reliability.md says which of them is worth a restart; 130 and 128 + n are a shell's usual ones for signals.
DONE, ERROR, PEER_LOST, DIVERGED, PREEMPTED = 0, 1, 3, 4, 42


class UserError(Exception):
    """Bad input: the message names the field or path, its value and the rule."""
