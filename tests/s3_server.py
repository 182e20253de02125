# SPDX-License-Identifier: Apache-2.0
"""A bucket of S3 on this machine: moto's server."""

import contextlib
import logging

import pytest

from rapid_jax.runtime import s3

KEYS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "us-east-1"}


@contextlib.contextmanager
def s3_server():
    """moto's server of S3 with one bucket; its client."""
    for package in ("s3fs", "moto.server"):
        pytest.importorskip(
            package, reason="the environment is older than the extras: bash launch/setup_environment.sh"
        )
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    emulator = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    emulator.start()
    host, port = emulator.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (KEYS | {"AWS_ENDPOINT_URL_S3": f"http://{host}:{port}"}).items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="models")
        s3.client.cache_clear()
        yield client
        s3.client.cache_clear()
    emulator.stop()
