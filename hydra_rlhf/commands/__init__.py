"""One module a command: its settings, its checks, its run folder. The work is done elsewhere."""
