"""Judges: is what clients saw allowed?

One module a kind of history (registers, lists, bank, sets, locks, counters); pure, no network.
`python -m loadtest.histories FILE…` prints the verdict.
"""
