"""Several processes, as a launcher starts them."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait

import pytest


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def ending(process):
    """What a process printed; an error if it failed."""
    said = process.communicate(timeout=240)[0]
    if process.returncode:
        raise RuntimeError(f"status {process.returncode}: {said}")
    return said


@pytest.fixture(scope="session")
def launch():
    """Starts a script in so many processes that talk over gloo; what each of them printed."""

    def start(processes, script, *arguments):
        size = str(processes)
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        started = [
            subprocess.Popen(
                [sys.executable, str(script), *map(str, arguments)],
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(processes)
        ]
        with ThreadPoolExecutor(processes) as pool:
            waiting = [pool.submit(ending, process) for process in started]
            wait(waiting, return_when="FIRST_EXCEPTION")
            for process in started:
                process.kill()  # those that would wait for one that is gone
        outputs = [str(each.exception() or each.result()) for each in waiting]
        assert not any(each.exception() for each in waiting), "\n".join(outputs)
        return outputs

    return start


@pytest.fixture(scope="session")
def accelerated():
    """Starts a script by `accelerate launch` with a config file; what it printed."""

    def start(config, script, *arguments):
        program = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        program += ["--main_process_port", free_port(), str(script), *map(str, arguments)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return start
