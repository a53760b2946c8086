"""`python -m service worker`: one worker process, from its settings to the loop, its signals and its wait for Redis."""

from __future__ import annotations

import functools
import logging
import os
import secrets
import signal
import socket
import time
from types import FrameType

import redis
import torch

from service.engine.host import Hosts, load_host
from service.engine.networks import check_kernels, choose_serving_dtype
from service.errors import NotReady
from service.heartbeat import RETRY_S
from service.metrics import WorkerMetrics, serve_metrics
from service.queue.connection import blocking_redis, check_server
from service.queue.worker_queue import WorkerQueue
from service.settings import Settings
from service.tracing import open_tracer
from service.worker import Worker
from shared.device import choose_device, choose_num_threads

log = logging.getLogger("service.worker")


def run_worker(settings: Settings) -> None:
    """Serve every model of `settings.models_dir` until SIGTERM or SIGINT.

    Raises:
        ConfigError: a setting that cannot work on this machine, or a Redis that cannot hold the queue.
    """
    device = choose_device(settings.device)
    if device.value.type == "cpu":
        check_kernels(settings.kernels)
    dtype = choose_serving_dtype(device.value, settings.dtype, kernels=settings.kernels)
    threads = choose_num_threads(settings.num_threads)
    torch.set_num_threads(threads.value)
    log.info("device %s: %s; dtype %s: %s", device.value, device.reason, dtype.value, dtype.reason)
    log.info("%d threads: %s", threads.value, threads.reason)
    client = blocking_redis(settings.redis_url.get_secret_value())
    tracer = open_tracer("worker", settings.otlp_endpoint)
    load = functools.partial(
        load_host,
        device=device.value,
        dtype=dtype.value,
        weights=settings.weights,
        kernels=settings.kernels,
        num_slots=settings.num_slots,
        max_cached_tokens=settings.max_cached_tokens,
        speculate=settings.speculation == "auto",
        share_prefixes=settings.share_prefixes,
    )
    worker_id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
    worker = Worker(
        WorkerQueue(client, worker_id=worker_id, limits=settings.queue_limits),
        Hosts(settings.models_dir, load, poll_s=settings.model_poll_s),
        WorkerMetrics(),
        shutdown_grace_s=settings.shutdown_grace_s,
        tracer=tracer,
    )

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        worker.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    serve_metrics(worker.metrics, settings.worker_metrics_port)
    if wait_for_redis(worker, client):
        worker.run()
    client.close()
    tracer.close()


def wait_for_redis(worker: Worker, client: redis.Redis) -> bool:
    """Wait until Redis answers; False if the worker was told to stop before."""
    told = False
    while not worker.is_stopping:
        try:
            log.info("the queue is in %s", check_server(client))
            return True
        except NotReady as error:
            if not told:
                log.warning("%s The worker waits for it.", error)
            told = True
            time.sleep(RETRY_S)
    return False
