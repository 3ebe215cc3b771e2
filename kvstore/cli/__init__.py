"""The command line: `kvstore`, a module for each command or group of them.

`commands` has the names of all and `main`; `frame` is what they share, `asking` what those share that ask a cluster;
`lazy` loads a command when it is called. What a command shows goes through `table`, `terminal` and `progress`.
"""
