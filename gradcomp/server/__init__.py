"""The parameter server: one shard's state machine and what travels to and from it. No socket, no thread, no clock.

Workers push compressed gradients; the server, which owns the parameters and their optimizer, applies them; workers pull
compressed changes of the parameters. Every shard is a process of its own and knows nothing of the others.

    modes.py       the modes: sync, async, ssp, softsync
    table.py       which piece of which parameter lives on which shard
    messages.py    requests, replies and events
    protocol.py    the same as bytes, checked as they come in
    hello.py       what all workers of a run agree on
    optimizers.py  the torch.optim classes a server runs, by name
    roster.py      workers: incarnations, sequence numbers, leases, clocks
    paces.py       when a pushed gradient is applied, and who may go on
    shard.py       parameters and their optimizer
    changes.py     a change of the parameters, as workers and server apply it
    publishing.py  what is published, and the changes that lead there
    totals.py      sums over workers
    run.py         all of that together: what must last
    service.py     what a request does
    journal.py     where it is written down
"""
