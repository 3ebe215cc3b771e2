"""What the users of a load test do: keys, operations, and what each writes into its history.

Used by Locust (`locustfile.py`) and by `chaos`.
Whether what they saw is allowed is judged in `histories`.
"""
