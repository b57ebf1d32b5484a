import os
import signal
from collections.abc import Iterator

import pytest
import store_servers

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores, and a thread that waits for work takes one
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """`app.main` takes SIGINT and SIGTERM for the life of its process; here that process is the test runner."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def rgw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[store_servers.S3Server]:
    """Ceph's S3 gateway; up in about five seconds."""
    absent = store_servers.missing(store_servers.CEPH_COMMANDS)
    if absent:
        pytest.skip(f"Ceph is not installed: no {', '.join(absent)}")
    with store_servers.ceph(tmp_path_factory.mktemp("ceph")) as server:
        yield server


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[store_servers.S3Server]:
    with store_servers.moto(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    command = store_servers.azurite_command()
    if command is None:
        pytest.skip("azurite is not installed: no azurite-blob (npm install -g azurite)")
    with store_servers.azurite(tmp_path_factory.mktemp("azurite"), command) as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def hdfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """hdfs://HOST:PORT of $LLMOS_TEST_HDFS, or of a mini cluster from $HADOOP_HOME."""
    given, hadoop = os.environ.get("LLMOS_TEST_HDFS"), os.environ.get("HADOOP_HOME")
    if given:
        yield given
    elif hadoop:
        with store_servers.hdfs(tmp_path_factory.mktemp("hdfs"), hadoop) as server:
            yield server
    else:
        pytest.skip("no HDFS: set LLMOS_TEST_HDFS=hdfs://HOST:PORT, or HADOOP_HOME for a mini cluster")
