"""Who sends the calls of the workloads: `aio` (asyncio, for chaos), `gevent` (for Locust).

A driver sends every request once and says of each whether it was sent and answered.
What an answer means is said in `loadtest.workloads.answers`.
"""
