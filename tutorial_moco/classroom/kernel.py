"""A Python kernel for code that nobody has read: limits on memory, time and files, and where bubblewrap works, a sandbox.

``python -m tutorial_moco.classroom.kernel -f CONNECTION_FILE`` is what the kernel `NAME` runs. Inside bubblewrap
there is no network, the disk is read-only, homes, /tmp and /run are empty, other processes can't be seen, nor what
``TUTORIAL_MOCO_HIDE`` names (solutions, gradebook, other students).
"""

import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path

NAME = "tutorial-moco-grading"
GIB = 2**30
MEMORY = 4 * GIB  # of data; PyTorch and the package take one
FILE = GIB // 16  # of a file that is written
CPU_SECONDS = 1200  # on each core
TRANSPORT = "tcp" if sys.platform == "win32" else "ipc"  # a sandbox without network is reached through files
CONNECTION = "TUTORIAL_MOCO_CONNECTION"  # the file that says where the kernel's sockets are
HIDE = "TUTORIAL_MOCO_HIDE"  # what graded code can't see, separated as in PATH
KEPT = ("PATH", "LANG", "LC_ALL", "TUTORIAL_MOCO_SECRET", "TUTORIAL_MOCO_PATIENCE", "NBGRADER_EXECUTION")  # of the environment


def install(prefix: Path) -> dict[str, str]:
    """Write the kernel's description below ``prefix``; returns the environment in which Jupyter finds it and its sockets."""
    folder, runtime = prefix / "kernels" / NAME, prefix / "run"
    folder.mkdir(parents=True)
    runtime.mkdir()
    command = [sys.executable, "-m", "tutorial_moco.classroom.kernel", "-f", "{connection_file}"]
    how = "signal" if sys.platform == "win32" else "message"
    spec = {"argv": command, "display_name": NAME, "language": "python", "interrupt_mode": how}
    (folder / "kernel.json").write_text(json.dumps(spec))
    return {"JUPYTER_PATH": str(prefix), CONNECTION: str(runtime / "k.json"), "IPYTHONDIR": str(prefix / "ipython")}


@cache
def isolated() -> bool:
    """Whether submissions run in a sandbox, and not within limits alone: bubblewrap is there, and is allowed to work."""
    if shutil.which("bwrap") is None:
        return False
    tried = ["bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--unshare-all", sys.executable, "-c", ""]
    return subprocess.run(tried, capture_output=True).returncode == 0


def limit() -> None:
    """Limits of this process and all it starts; processor time counts all cores."""
    import resource

    cpu_seconds = CPU_SECONDS * (os.cpu_count() or 1)
    for name, most in {"DATA": MEMORY, "FSIZE": FILE, "CPU": cpu_seconds, "CORE": 0}.items():
        what = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def sandboxed(command: list[str], connection_file: Path) -> list[str]:
    """The command inside bubblewrap."""
    package = Path(__file__).parents[1]
    needed = {Path(path).resolve() for path in (sys.prefix, sys.base_prefix, sysconfig.get_path("purelib"), package)}
    needed |= {path for path in (package.parent / "data", Path(site.getuserbase())) if path.is_dir()}
    empty = [Path(path) for path in ("/tmp", "/var/tmp", "/run", "/home", "/root")]
    hidden = [Path(path) for path in os.environ.get(HIDE, "").split(os.pathsep) if path]
    words = ["bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"]
    for path in empty + sorted(hidden):
        if path.is_dir():
            words += ["--size", str(GIB), "--tmpfs", str(path)]
        elif path.exists():
            words += ["--ro-bind", "/dev/null", str(path)]
    for path in sorted(needed):
        if any(path.is_relative_to(covered) for covered in empty + hidden):
            words += ["--ro-bind", str(path), str(path)]
    runtime = str(connection_file.parent)
    words += ["--bind", runtime, runtime, "--chdir", "/tmp", "--clearenv"]
    for name in KEPT:
        words += ["--setenv", name, os.environ[name]] if name in os.environ else []
    words += ["--setenv", "HOME", "/tmp", "--setenv", "PYTHONUSERBASE", site.getuserbase(), "--setenv", "OMP_NUM_THREADS", "2"]
    return [*words, "--unshare-all", "--die-with-parent", *command]


def main() -> None:
    """Become the kernel."""
    connection_file = Path(sys.argv[sys.argv.index("-f") + 1])
    arguments = ["--HistoryManager.hist_file=:memory:", "-f", str(connection_file)]
    arguments.append("--IPKernelApp.capture_fd_output=False")  # a library's note on stderr is no failure, but nbgrader's rule
    if sys.platform == "win32":  # no limits there, and exec would be another process
        from ipykernel.kernelapp import launch_new_instance

        launch_new_instance(argv=arguments)
        return
    command = [sys.executable, "-m", "ipykernel_launcher", *arguments]
    limit()
    if isolated():
        command = sandboxed(command, connection_file)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # what a kernel tells a terminal; what the code prints goes another way
        os.dup2(nowhere, stream)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
