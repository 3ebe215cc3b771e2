"""What makes a write safe: locks, leases, intents, decisions, attempts, votes.

Pure: `now` is an argument. Rows, messages and timers come from the rooms above.
The rules and why they hold are in kvstore/DESIGN.md, sections 4 and 5.
"""
