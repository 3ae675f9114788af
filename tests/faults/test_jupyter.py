"""A training in a notebook's kernel, stopped by Jupyter's interrupt button: kernel and run stay usable."""

import sys
from pathlib import Path

import pytest
from trainings import STEPS, finish, steps_done, wait_until

manager = pytest.importorskip("jupyter_client.manager", reason="a kernel needs jupyter_client")
pytest.importorskip("ipykernel", reason="a kernel needs ipykernel")

HERE = Path(__file__).parent
CELL = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from trainings import train
train("moco", Path({out!r}), pause=0.03)
print("at the end")
"""


@pytest.fixture
def kernel():
    kernels, client = manager.start_new_kernel(kernel_name="python3", extra_arguments=["--HistoryManager.enabled=False"])
    yield kernels, client
    client.stop_channels()
    kernels.shutdown_kernel(now=True)


def run_cell(client, code, during=None):
    """Run a cell; returns how it ended and what it wrote. ``during`` is done meanwhile."""
    sent = client.execute(code)
    if during:
        during()
    reply, said = client.get_shell_msg(timeout=60), ""
    assert reply["parent_header"]["msg_id"] == sent
    while True:
        message = client.get_iopub_msg(timeout=10)
        if message["parent_header"].get("msg_id") != sent:
            continue
        said += message["content"].get("text", "")
        if message["content"].get("execution_state") == "idle":
            return reply["content"], said


@pytest.mark.skipif(sys.platform == "win32", reason="an interrupt is a signal here")
def test_an_interrupted_cell_leaves_kernel_and_run_usable_and_goes_on_when_run_again(kernel, tmp_path, held):
    kernels, client = kernel
    out = tmp_path / "run"
    cell = CELL.format(here=str(HERE), out=str(out))
    out.mkdir()

    def interrupt():
        wait_until(lambda: steps_done(out) >= 5, 60)
        kernels.interrupt_kernel()

    reply, said = run_cell(client, cell, interrupt)
    assert (reply["status"], reply["ename"]) == ("error", "KeyboardInterrupt")
    done = steps_done(out)
    assert 5 <= done < STEPS
    assert f"SIGINT: step {done} is done and saved" in said
    reply, said = run_cell(client, "print(6 * 7)")
    assert (reply["status"], said) == ("ok", "42\n")
    reply, said = run_cell(client, cell)
    assert reply["status"] == "ok"
    assert f"going on from step {done}" in said
    assert "at the end" in said
    assert (out / "digest-0").read_text() == finish("moco", tmp_path / "undisturbed")
    held("stopped, no step is lost", "a cell interrupted in Jupyter, and run again; the same bits at its end", 1, 1)
