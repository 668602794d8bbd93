"""How messages travel between ranks: ``inproc`` (threads of one process) and ``zmq`` (TCP or unix-domain sockets).

Nothing is imported here: a transport is found by name through :func:`gradcomp.transport`.
"""
