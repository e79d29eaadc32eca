"""The embedded CPU inference engine, behind SGLang's HTTP API.

A request comes in at a route of `http` or `openai`. `requests` checks its body and makes a
`Generation` of each completion. `scheduler` carries these to the engine's thread, where each waits
as a `Request` until its prompt is read and it gets a slot in `batch`, which samples a token for all
slots in each step of `model`. An `Output` tells the route how far it is. `updates` changes the
weights between two steps; `__main__` is the process.
"""
