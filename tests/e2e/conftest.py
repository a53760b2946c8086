"""One cluster for the whole folder: two API processes, two workers, a Redis. What a test kills it replaces."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.cluster import Cluster

LEASE_MS = 1_500


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="package")
def running_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(
        tmp_path_factory.mktemp("cluster"), lease_ms=LEASE_MS, model_poll_s=0.2, num_slots=8, shutdown_grace_s=1
    )
    try:
        for _ in range(2):
            cluster.start_worker()
            cluster.start_api()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def cluster(running_cluster: Cluster) -> Cluster:
    """The cluster, whole again after what the test before did to it."""
    running_cluster.wait_until_ready()
    return running_cluster
