"""KV blocks from one instance to another: a lease at the source, reserved blocks at the destination, one terminal status for each transfer.

    shared.py      KV memory that other processes of the host can map, without a name that could outlive its owner
    cuda_ipc.py    the same for a GPU's, by the driver's handles
    blocks.py      where a block's bytes lie, packing and unpacking them
    rdma.py        which NICs are near which device
    descriptor.py  what an endpoint tells its peers (JSON), and why two of them do not fit
    wire.py        messages and frames, every size checked first
    leases.py      the source's book;  tickets.py  the destination's
    connection.py  one authenticated socket;  pool.py  those kept open
    nixl.py        one-sided READs
    pair.py        how two ranks that differ fit;  landing.py  what comes, converted
    move.py        bytes over a connection;  together.py  parts of one transfer
    server.py      what peers ask of this endpoint;  client.py  what it asks of them;  endpoint.py  what the engine calls

Whatever the transport, only the destination's own threads write into the destination's KV memory. So a transfer that has ended there
cannot write any more, whatever the source still does.

Nothing is imported here, since a router reads descriptors and has no torch.
"""
