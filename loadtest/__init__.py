"""Programs that load a cluster, break it, judge what clients saw, and measure it.

Which program answers which question is in loadtest/README.md; what they have shown is in loadtest/MEASURED.md.
They talk HTTP to it, as any client does.
"""
