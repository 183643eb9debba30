"""A program that gives several command lines to `drrho`, one after another; a launcher starts several such programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from drrho_clip.cli import main


def start(commands: Sequence[Sequence[str]], size: int, port: int, folder: Path) -> list[tuple[int, str, str]]:
    """Run command lines in several processes; return the exit code, the output and the errors of each process."""
    processes = []
    for rank in range(size):
        variables = {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        # A warning of a library, such as one about a deprecated name, would be seen by every user.
        command = [sys.executable, "-m", "helpers.clip_commands", json.dumps(commands)]
        streams = {name: (folder / f"{rank}.{name}").open("w+") for name in ("stdout", "stderr")}
        process = subprocess.Popen(command, env=os.environ | variables, cwd=Path(__file__).parents[1], **streams)  # type: ignore[call-overload]
        processes.append((process, streams))
    results = []
    try:
        for process, streams in processes:
            process.wait(timeout=120)
            texts = []
            for stream in streams.values():
                stream.seek(0)
                texts.append(stream.read())
            results.append((process.returncode, texts[0], texts[1]))
    finally:
        for process, streams in processes:
            process.kill()
            process.wait()
            for stream in streams.values():
                stream.close()
    return results


if __name__ == "__main__":
    for words in json.loads(sys.argv[1]):
        code = main(words)
        print(f"exit code {code}", flush=True)
    sys.exit(code)
