"""Serves models over HTTP: `api` takes requests, `queue` keeps them in Redis, `worker` runs `engine`."""
