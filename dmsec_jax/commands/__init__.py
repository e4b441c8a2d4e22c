"""Floor 7, the verbs of the command line: each module has a `Config` dataclass and `run(config) -> exit code`."""
