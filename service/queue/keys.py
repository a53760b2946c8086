"""Every key of the queue. Each starts with one hash tag, so a cluster keeps them together; each has a time to live.

A name below is complete, or a beginning that ends in ":" and takes an id or a model's name. `scripts.py` hands the
same names to the Lua scripts, so no name is written twice.

    JOB ID             HASH    state, request, model, key, class, cost, n (tokens delivered), chars (of text), attempt,
                               lost (workers lost), worker, revision, deadline, expires, keep, times in ms, reason, ...
    TOKENS ID          STREAM  chunks, explicit id "<end index>-0", fields c (chunk JSON) and o (characters before it);
                               last entry "<n + 1>-0" with field e (state), and c when text without a token remained
    PUSH ID            PUBSUB  the same chunks at once; the stream is the truth
    END ID             PUBSUB  its end, for those who wait for the whole answer
    BACKLOG MODEL:CLS  ZSET    queued job -> virtual finish; classes 0 high, 1 normal, 2 batch
    SHARE MODEL:CLS    HASH    fair share: "v" virtual time, "k:KEY" virtual finish of the key's last job
    COUNTS MODEL       HASH    queued, queued_cost, running, running_cost, speed (cost per second; mean of `samples`
                               until `measured`, ms), picks, promised, broken (when the last turn is due, ms),
                               "k:KEY" queued and "r:KEY" running jobs of a key
    PROMISES MODEL     ZSET    refused request -> its turn, when it was told to come back, ms
    RATE KEY           HASH    token buckets of a key: "jobs" and "cost" left, "at" which ms
    LEASES MODEL       ZSET    running job -> lease deadline in ms; 0 after a worker handed it over
    BELL MODEL         LIST    one push per admission wakes one idle worker
    SERVED MODEL       ZSET    worker that takes jobs of this model -> when it last said so, ms
    DEADLINES          ZSET    every job that is queued or running -> deadline in ms
    WATCHES            ZSET    job that a closed connection cancels -> until when its listener is believed in, ms
    MODELS, WORKERS    ZSET    model, worker -> when last seen, ms
    WORKER ID          STRING  WorkerInfo as JSON, 10 s
    CANCELLED          STREAM  running jobs closed from outside; each worker reads behind its own cursor
    DEAD               STREAM  jobs that killed their workers
    IDEMPOTENCY HASH   STRING  "<job id> <sha of the body>"
    REAPED             STRING  present while somebody reaps every second

**Why a sorted set of lease deadlines** and not the pending list of a stream group: a lease is then one number with
one owner. Taking, renewing, handing over (score 0), finding what ran out, and ending are one ZADD, ZRANGEBYSCORE or
ZREM each; there is no group to create at 0, no entry to acknowledge *and* delete, no idle time that a restart
resets, and nothing left behind when a job is closed by somebody else. The fence is the attempt number in the job's
hash either way.

**Why virtual finish times** and not a list per API key: one sorted set is the order of service, so a queue position
is ZRANK and cancelling is ZREM. A job's tag is max(virtual time, its key's last tag) + cost, and virtual time is the
tag last taken (self-clocked fair queueing): a key that floods lines up behind itself, not in front of others.
"""

from __future__ import annotations

from typing import Final

PREFIX: Final = "{smollm}:"

JOB: Final = PREFIX + "job:"
TOKENS: Final = PREFIX + "tokens:"
PUSH: Final = PREFIX + "push:"
END: Final = PREFIX + "end:"
BACKLOG: Final = PREFIX + "backlog:"
SHARE: Final = PREFIX + "share:"
COUNTS: Final = PREFIX + "counts:"
PROMISES: Final = PREFIX + "promises:"
RATE: Final = PREFIX + "rate:"
LEASES: Final = PREFIX + "leases:"
BELL: Final = PREFIX + "bell:"
SERVED: Final = PREFIX + "served:"
DEADLINES: Final = PREFIX + "deadlines"
WATCHES: Final = PREFIX + "watches"
MODELS: Final = PREFIX + "models"
WORKERS: Final = PREFIX + "workers"
WORKER: Final = PREFIX + "worker:"
CANCELLED: Final = PREFIX + "cancelled"
DEAD: Final = PREFIX + "dead"
IDEMPOTENCY: Final = PREFIX + "idempotency:"
REAPED: Final = PREFIX + "reaped"

ROUTE: Final = PREFIX + "route"
"""Never written: the key each script names so that a cluster sends it to the right node."""

WORKER_ALIVE_MS: Final = 10_000
"""A worker that said nothing for this long is gone."""
WATCH_MS: Final = 15_000
"""A listener that said nothing for this long is gone."""
PAUSE_MS: Final = 5_000
"""After a pause in reaping this long, listeners get their time again: Redis or every process was away."""

NAMES: Final = {name: value for name, value in dict(globals()).items() if name.isupper() and isinstance(value, str)}


def lua_names() -> str:
    """Return the names as Lua locals, one line."""
    return " ".join(f"local {name} = '{value}'" for name, value in NAMES.items())
