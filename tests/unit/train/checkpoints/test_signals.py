import signal
import threading

import pytest

from llmos_cli.train.checkpoints.signals import stop_flag


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_only_raises_the_flag(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with stop_flag() as flag:
        assert not flag
        signal.raise_signal(number)
        assert flag
        assert flag.error("stopped").exit_code == code
        assert signal.getsignal(number) is before
    assert signal.getsignal(number) is before


def test_the_second_ctrl_c_acts_at_once() -> None:
    with stop_flag():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_off_the_main_thread_nothing_is_caught() -> None:
    flags = []

    def work() -> None:
        with stop_flag() as flag:
            flags.append(flag)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not flags[0]
