"""How bytes get from process to process: HTTP, the channel between router and shard, the map's long poll.

It bounds what comes in and says what a lost connection means.
It knows neither routes nor what an operation does; what a router passes on to the controller has its form here.
"""
