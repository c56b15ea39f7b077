"""`pdlab calibrate`: measure an instance, fit the simulator's cost to it, and say how well that fits.

grid.py        which steps are measured, and which are held out
bench.py       an engine in this process, driven step by step
rounds.py      the points in random order, again and again, until time is up
fit.py         from measured points to StepTimes, and the error on what was held out
stream.py      a streaming request over HTTP, token by token
over_http.py   a running server's step times, and our own server's overheads
transfer.py    KV between two processes of this host;  peer.py  the other of the two
machine.py     what it was measured on
neighbour.py   what servers on one machine cost each other
pool.py        several profiles of one instance as one
run.py         all of it, to a profile;  cli.py  the command
"""
